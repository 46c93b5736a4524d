"""The way from the command to netd, and what `netloom status` says of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import grpc

from cli import output, overlays
from cli.daemon import TIMEOUT_S, knock, unreachable
from cli.failure import Failure, Status
from cli.overlays import OverlayDocument
from kernel import paths, settings
from netd.client import Client, NodeError
from protos.node.v1 import node_pb2 as pb


class NetworkDocument(TypedDict):
    name: str
    backend: str
    subnets: list[str]
    own_subnets: list[str]
    mtu: int
    device: str
    vni: int
    port: int


class PeerDocument(TypedDict):
    name: str
    addresses: list[str]
    subnets: list[str]
    state: str
    version: str
    wanted: int  # entries of the kernel that lead there
    present: int
    links: list[str]  # that its routes lead to
    problems: list[str]


class NetdDocument(TypedDict):
    socket: str
    answers: bool
    error: str
    version: str
    node: str
    uptime_s: float
    source: str  # "file", "etcd"
    store_state: str
    underlay: str  # link, "" where there is none
    underlay_mtu: int
    public: list[str]
    networks: list[NetworkDocument]
    peers: list[PeerDocument]
    overlays: list[OverlayDocument]
    problems: list[str]
    last_change_unix_s: float
    entries: int


def socket_path() -> str:
    """Where netd is expected. Raises Failure where the environment names no usable path."""
    try:
        return settings.netd_socket(os.environ)
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


@contextmanager
def connected(timeout_s: float = TIMEOUT_S) -> Iterator[Client]:
    """A client of netd for the duration of the block; what netd refuses within becomes a Failure in its own words.

    Raises Failure (status 3) where nobody answers.
    """
    path = socket_path()
    try:
        knock(path, timeout_s)
    except OSError as error:
        raise Failure(unreachable(path, error, "netd"), Status.UNREACHABLE) from None
    with Client(path, timeout_s) as client:
        try:
            yield client
        except NodeError as error:
            raise refusal(error) from None


def refusal(error: NodeError) -> Failure:
    """What netd's refusal means for the operator."""
    text = error.message or "netd gave no reason; see its log"
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Failure(text, Status.UNREACHABLE)
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return Failure(text, Status.USAGE)
    return Failure(text)


def look() -> NetdDocument | None:
    """None where netd does not run on this host and left no sign of it, or where this user may not look."""
    path = socket_path()
    try:
        with connected() as netd:
            return document(netd.status(), path)
    except Failure as failure:
        # Its state file stays when it ends, and goes with a reboot.
        if not os.path.exists(f"{paths.run_dir(os.environ)}/fabric.json") or os.geteuid() != 0:
            return None
        return document(pb.StatusResponse(), path, failure.message)


def overlay(name: str) -> OverlayDocument | None:
    """What netd of this host knows of one; None where it does not know it, or does not answer."""
    found = look()
    return next((one for one in found["overlays"] if one["name"] == name), None) if found is not None else None


def document(status: pb.StatusResponse, path: str, error: str = "") -> NetdDocument:
    """netd's answer; `error`: why there is none."""
    return NetdDocument(
        socket=path,
        answers=not error,
        error=error,
        version=status.version,
        node=status.node,
        uptime_s=status.uptime_s,
        source=status.source,
        store_state=status.store_state,
        underlay=status.underlay.link,
        underlay_mtu=status.underlay.mtu,
        public=list(status.underlay.public),
        networks=[
            NetworkDocument(
                name=one.name,
                backend=one.backend,
                subnets=list(one.subnets),
                own_subnets=list(one.own_subnets),
                mtu=one.mtu,
                device=one.device,
                vni=one.vni,
                port=one.port,
            )
            for one in status.networks
        ],
        peers=[
            PeerDocument(
                name=one.name,
                addresses=list(one.addresses),
                subnets=list(one.subnets),
                state=one.state,
                version=one.version,
                wanted=one.wanted,
                present=one.present,
                links=list(one.links),
                problems=list(one.problems),
            )
            for one in status.peers
        ],
        overlays=[overlays.document(one) for one in status.overlays],
        problems=list(status.problems),
        last_change_unix_s=status.counts.last_change_unix_s,
        entries=status.counts.entries,
    )


def problems(found: NetdDocument | None) -> list[str]:
    """What keeps containers from those of other hosts."""
    if found is None:
        return []
    if not found["answers"]:
        return [f"{found['error']}; what it made still works, and nobody keeps it in order"]
    return found["problems"]


def fact(found: NetdDocument) -> str:
    """One line."""
    if not found["answers"]:
        return f"does not answer ({found['error']})"
    through = f"by {found['underlay']} {' '.join(found['public'])}" if found["underlay"] else "no underlay"
    reached = sum(peer["present"] == peer["wanted"] for peer in found["peers"])
    store = f", etcd {found['store_state']}" if found["source"] == "etcd" else ""
    return f"version {found['version']}, {through}, {reached} of {len(found['peers'])} hosts reached{store}"


def print_tables(found: NetdDocument) -> None:
    """Networks, hosts and overlays, for people."""
    networks = [one for one in found["networks"] if one["subnets"] or one["own_subnets"] or len(found["networks"]) == 1]
    if networks:
        output.line("")
        output.table(
            ("NETWORK", "BACKEND", "OWN SUBNETS", "DEVICE", "MTU"),
            [
                (one["name"], one["backend"], " ".join(one["own_subnets"]), one["device"], str(one["mtu"]))
                for one in networks
            ],
            ("MTU",),
        )
    if found["peers"]:
        output.line("")
        output.table(
            ("HOST", "ADDRESSES", "SUBNETS", "STATE", "ENTRIES"),
            [
                (
                    one["name"],
                    " ".join(one["addresses"]),
                    " ".join(one["subnets"]),
                    one["state"],
                    f"{one['present']}/{one['wanted']}",
                )
                for one in found["peers"]
            ],
            ("ENTRIES",),
        )
    if found["overlays"]:
        overlays.print_table(found["overlays"])
