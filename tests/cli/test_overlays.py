"""What `netloom status`, `route`, `topology` and `network show` say of overlays, of a netd whose answers are given."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cli import overlays
from cli.overlays import OverlayDocument
from protos.node.v1 import node_pb2 as pb
from protos.node.v1.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from tests.cli.conftest import Ipamd, Netloom

OV1 = pb.Overlay(
    name="ov1",
    subnets=["10.9.0.0/24", "fd09::/64"],
    vni=256,
    bridge="nl-ov1",
    device="nl-vx256",
    port=4789,
    mtu=1450,
    here=True,
    known=True,
    addresses=5,
    containers=4,
    hosts=[
        pb.OverlayHost(name="a", state="here", addresses=1, containers=1),
        pb.OverlayHost(name="b", outer="10.0.0.2", state="up", addresses=3, containers=2),
        pb.OverlayHost(name="e", state="unknown", addresses=1, containers=1),
    ],
    wanted=9,
    present=8,
    problems=["network ov1: 1 addresses, such as 10.9.0.4, are on e: start netd there"],
)
OV2 = pb.Overlay(
    name="ov2", subnets=["10.8.0.0/24"], vni=257, bridge="nl-ov2", device="nl-vx257", port=4789, mtu=1450, flood=True
)
WAYS = {
    "10.9.0.2": pb.ExplainResponse(
        kind="overlay",
        node="b",
        network="ov1",
        backend="overlay",
        subnet="10.9.0.0/24",
        way="tunnel",
        link="nl-vx256",
        outer="10.0.0.2",
        vni=256,
        port=4789,
        mtu=1450,
        bridge="nl-ov1",
        mac="02:42:0a:09:00:02",
        kernel="10.9.0.2 dev nl-ov1 src 10.9.0.1",
        entries=[
            pb.EntryState(kind="neighbour", text="10.9.0.2 dev nl-ov1", present=True),
            pb.EntryState(kind="bridged", text="02:42", present=False, instead="the bridge has it at veth7"),
        ],
    ),
    "10.9.0.9": pb.ExplainResponse(
        kind="own", node="a", network="ov1", link="veth9", vni=256, bridge="nl-ov1", mac="02:42:0a:09:00:09"
    ),
    "10.9.0.1": pb.ExplainResponse(kind="gateway", node="a", network="ov1", link="nl-ov1", vni=256, bridge="nl-ov1"),
    "10.9.0.77": pb.ExplainResponse(
        kind="nobody", network="ov1", vni=256, bridge="nl-ov1", problems=["nobody holds 10.9.0.77"]
    ),
    "10.8.0.2": pb.ExplainResponse(
        kind="overlay",
        node="b",
        network="ov2",
        outer="10.0.0.2",
        vni=257,
        bridge="nl-ov2",
        mac="02:42:0a:08:00:02",
        note="no container of this host is on ov2, so nothing here leads to it",
    ),
}


class Netd(NodeServicer):
    """Answers what it is told to."""

    def Status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.StatusResponse:  # noqa: N802
        underlay = pb.Underlay(link="eth0", mtu=1500, public=["10.0.0.1"])
        peers = [pb.Peer(name="b", addresses=["10.0.0.2"], state="up")]
        problems = list(OV1.problems)
        return pb.StatusResponse(
            version="1", node="a", underlay=underlay, peers=peers, overlays=[OV1, OV2], problems=problems
        )

    def Explain(self, request: pb.ExplainRequest, _context: grpc.ServicerContext) -> pb.ExplainResponse:  # noqa: N802
        return WAYS[request.address]

    def Sync(self, _request: pb.SyncRequest, _context: grpc.ServicerContext) -> pb.SyncResponse:  # noqa: N802
        return pb.SyncResponse()


@pytest.fixture(autouse=True)
def netd(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the socket of the scratch directory, whose path is too long for one."""
    short = scratch.parent / "s"
    short.symlink_to(scratch)
    (scratch / "netloom.toml").write_text(f'[netd]\nsocket = "{short}/netd.sock"\n')
    server = grpc.server(ThreadPoolExecutor(2))
    add_NodeServicer_to_server(Netd(), server)
    server.add_insecure_port(f"unix:{short}/netd.sock")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def test_status(ipamd: Ipamd, netloom: Netloom) -> None:
    shown = netloom("status")
    assert shown.status == 1  # for its problem
    lines = [line.split() for line in shown.out.splitlines()]
    header = ["OVERLAY", "SUBNETS", "VNI", "BRIDGE", "DEVICE", "MTU", "HOSTS", "CONTAINERS", "ENTRIES", "STATE"]
    first = lines.index(header)
    assert lines[first + 1] == [
        *("ov1", "10.9.0.0/24", "fd09::/64", "256", "nl-ov1", "nl-vx256", "1450", "3", "1/4", "8/9", "here"),
    ]
    assert lines[first + 2] == ["ov2", "10.8.0.0/24", "257", "nl-ov2", "nl-vx257", "1450", "not", "here"]
    (one, other) = json.loads(netloom("status", "--json").out)["netd"]["overlays"]
    assert (one["name"], one["vni"], one["here"], one["known"], one["containers"]) == ("ov1", 256, True, True, 4)
    assert [(host["name"], host["outer"], host["state"], host["containers"]) for host in one["hosts"]] == [
        ("a", "", "here", 1),
        ("b", "10.0.0.2", "up", 2),
        ("e", "", "unknown", 1),
    ]
    assert (other["here"], other["flood"], other["hosts"]) == (False, True, [])


def test_route_to_another_hosts_container(netloom: Netloom) -> None:
    shown = netloom("route", "10.9.0.2")
    assert shown.status == 1  # an entry is missing
    assert shown.out.splitlines() == [
        "address  10.9.0.2",
        "host     b",
        "network  ov1, an overlay, VNI 256",
        "subnet   10.9.0.0/24",
        "bridge   nl-ov1",
        "mac      02:42:0a:09:00:02",
        "way      tunnel nl-vx256 to 10.0.0.2, VNI 256, UDP port 4789",
        "mtu      1450",
        "kernel   10.9.0.2 dev nl-ov1 src 10.9.0.1",
        "",
        "ENTRY      THERE  AS IPROUTE2 WRITES IT",
        "neighbour  yes    10.9.0.2 dev nl-ov1",
        "bridged    NO     02:42 (instead: the bridge has it at veth7)",
    ]
    (way,) = json.loads(netloom("route", "10.9.0.2", "--json").out)["ways"]
    assert (way["kind"], way["bridge"], way["mac"], way["note"]) == ("overlay", "nl-ov1", "02:42:0a:09:00:02", "")


@pytest.mark.parametrize(
    ("address", "status", "lines"),
    [
        ("10.9.0.9", 0, ["is a container of this host (a)", "bridge nl-ov1, port veth9", "mac 02:42:0a:09:00:09"]),
        ("10.9.0.1", 0, ["is the gateway, which each host of the network has itself (a)", "bridge nl-ov1"]),
        ("10.9.0.77", 1, ["is nobody's: no container has it", "problem nobody holds 10.9.0.77"]),
        ("10.8.0.2", 0, ["host b", "vtep 10.0.0.2", f"note {WAYS['10.8.0.2'].note}"]),
    ],
)
def test_route_to_others(netloom: Netloom, address: str, status: int, lines: list[str]) -> None:
    shown = netloom("route", address)
    assert shown.status == status
    assert set(lines) <= {" ".join(line.split()) for line in shown.out.splitlines()}
    assert "tunnel" not in shown.out


def test_topology(netloom: Netloom) -> None:
    shown = netloom("topology")
    assert shown.status == 0
    lines = shown.out.splitlines()
    assert " +-- nothing to route --> [b]  10.0.0.2" in lines
    assert lines[lines.index("(ov1)  overlay, VNI 256, 10.9.0.0/24 fd09::/64: 4 containers") :] == [
        "(ov1)  overlay, VNI 256, 10.9.0.0/24 fd09::/64: 4 containers",
        " +-- [a]  1 container, this host",
        " +-- [b]  2 containers, by nl-vx256 to 10.0.0.2",
        " +-- [e]  1 container, NO WAY  UNKNOWN",
        " +-- 1 OF 9 ENTRIES MISSING",
        "",
        "(ov2)  overlay, VNI 257, 10.8.0.0/24: not here",
    ]
    assert [one["name"] for one in json.loads(netloom("topology", "--json").out)["overlays"]] == ["ov1", "ov2"]
    root = ET.fromstring(netloom("topology", "--svg", "-").out)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"a", "b", "ov1", "[b]  2 containers, by nl-vx256 to 10.0.0.2", "ov2"} <= set(texts)
    boxes = [(float(box.attrib["y"]), float(box.attrib["height"])) for box in root.iter(f"{space}rect")]
    assert len(boxes) == 4  # two hosts, two overlays
    height = float(root.attrib["height"])
    assert all(y >= 0 and y + size <= height for y, size in boxes)
    (first, size), (second, _) = boxes[2:]
    assert first + size < second
    assert all(y + size < first for y, size in boxes[:2])


def test_facts_of_network_show() -> None:
    found: OverlayDocument = overlays.document(OV1)
    assert overlays.facts(found) == [
        ("device", "nl-vx256, MTU 1450, UDP port 4789"),
        ("this host", "here"),
        ("entries", "8 of 9 in this host's kernel"),
        ("fast path", "off"),
        ("host", "a (here): 1 container"),
        ("host", "b (up, 10.0.0.2): 2 containers"),
        ("host", "e (unknown): 1 container"),
        ("problem", OV1.problems[0]),
    ]
    assert overlays.facts(overlays.document(OV2))[1:] == [("this host", "not here")]
    waits = overlays.document(OV1)
    waits["known"] = False
    assert overlays.state(waits) == "waits for etcd"


def test_facts_of_the_fast_path() -> None:
    found = overlays.document(OV1)
    found["fast_path"], found["fast"] = True, 1
    assert ("fast path", "1 of 1 container here") in overlays.facts(found)
    found["fast"], found["fast_problem"] = 0, "the kernel refuses the fast path: no"
    assert ("fast path", "0 of 1 container here; the kernel refuses the fast path: no") in overlays.facts(found)


def test_a_routed_network_has_nothing_of_an_overlay(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("network", "create", "pods", "--subnet", "10.2.0.0/16").status == 0
    assert json.loads(netloom("network", "show", "pods", "--json").out)["overlay"] is None
