"""What netd says of overlays, as documents, and as tables and facts for people."""

from collections.abc import Sequence
from typing import TypedDict

from cli import output
from protos.node.v1 import node_pb2 as pb


class HolderDocument(TypedDict):
    address: str
    mac: str


class OverlayHostDocument(TypedDict):
    name: str
    outer: str  # where its tunnels end; "" of this host, and where nothing can lead there
    state: str  # "here", "up", "silent", "down", "unknown"
    addresses: int
    containers: int
    some: list[HolderDocument]


class OverlayDocument(TypedDict):
    name: str
    subnets: list[str]
    vni: int
    bridge: str
    device: str
    port: int
    mtu: int
    flood: bool
    internal: bool
    here: bool  # whether a container of this host is on it
    known: bool  # whether its holders are
    addresses: int
    containers: int
    hosts: list[OverlayHostDocument]
    wanted: int  # entries of the kernel
    present: int
    problems: list[str]
    fast_path: bool
    fast: int
    fast_problem: str


def document(one: pb.Overlay) -> OverlayDocument:
    return OverlayDocument(
        name=one.name,
        subnets=list(one.subnets),
        vni=one.vni,
        bridge=one.bridge,
        device=one.device,
        port=one.port,
        mtu=one.mtu,
        flood=one.flood,
        internal=one.internal,
        here=one.here,
        known=one.known,
        addresses=one.addresses,
        containers=one.containers,
        hosts=[
            OverlayHostDocument(
                name=host.name,
                outer=host.outer,
                state=host.state,
                addresses=host.addresses,
                containers=host.containers,
                some=[HolderDocument(address=holder.address, mac=holder.mac) for holder in host.some],
            )
            for host in one.hosts
        ],
        wanted=one.wanted,
        present=one.present,
        problems=list(one.problems),
        fast_path=one.fast_path,
        fast=one.fast,
        fast_problem=one.fast_problem,
    )


def print_table(overlays: Sequence[OverlayDocument]) -> None:
    """Of all overlays; what is only known on a host that is on it is left out elsewhere."""
    output.line("")
    output.table(
        ("OVERLAY", "SUBNETS", "VNI", "BRIDGE", "DEVICE", "MTU", "HOSTS", "CONTAINERS", "ENTRIES", "STATE"),
        [
            (
                one["name"],
                " ".join(one["subnets"]),
                str(one["vni"]),
                one["bridge"],
                one["device"],
                str(one["mtu"]),
                str(len(one["hosts"])) if one["known"] else "",
                f"{containers_here(one)}/{one['containers']}" if one["known"] else "",
                f"{one['present']}/{one['wanted']}" if one["here"] else "",
                state(one),
            )
            for one in overlays
        ],
        ("VNI", "MTU", "HOSTS", "CONTAINERS", "ENTRIES"),
    )


def containers_here(one: OverlayDocument) -> int:
    """Of this host."""
    return sum(host["containers"] for host in one["hosts"] if host["state"] == "here")


def state(one: OverlayDocument) -> str:
    """A word or two: whether this host is on it."""
    if not one["here"]:
        return "not here"
    return "here" if one["known"] else "waits for etcd"


def counted(number: int) -> str:
    """ "1 container", "2 containers"."""
    return f"{number} container{'' if number == 1 else 's'}"


def _fast(one: OverlayDocument) -> str:
    if not one["fast_path"]:
        return "off"
    problem = f"; {one['fast_problem']}" if one["fast_problem"] else ""
    return f"{one['fast']} of {counted(containers_here(one))} here{problem}"


def facts(one: OverlayDocument) -> list[tuple[str, str]]:
    """What this host knows of one, beside its definition."""
    found = [("device", f"{one['device']}, MTU {one['mtu']}, UDP port {one['port']}"), ("this host", state(one))]
    if one["here"]:
        found.append(("entries", f"{one['present']} of {one['wanted']} in this host's kernel"))
        found.append(("fast path", _fast(one)))
    for host in one["hosts"]:
        where = f", {host['outer']}" if host["outer"] else ""
        found.append(("host", f"{host['name']} ({host['state']}{where}): {counted(host['containers'])}"))
    return found + [("problem", problem) for problem in one["problems"]]
