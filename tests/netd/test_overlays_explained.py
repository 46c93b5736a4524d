"""What is said of overlays: whose an address is, and whether what leads there is in the kernel at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from kernel.session import Session
from netd.explain import explain
from netd.explain_overlay import explain_held
from netd.overlay_status import holders_by_place, overlay_messages
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.way import Way
from protos.node.v1 import node_pb2 as pb
from tests.kernel import spaces
from tests.netd.test_overlays import DEFAULT, OV1, OWN, PEERS, bridge, holder

pytestmark = pytest.mark.kernel
KINDS = ["device", "port", "neighbour", "bridged", "forward"]


@pytest.fixture
def reconciler() -> Iterator[Reconciler]:
    """Of host a, which is on no overlay."""
    with spaces.fresh() as space, spaces.inside(space), Session() as session:
        spaces.run("ip", "link", "set", "lo", "up")
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        made = Reconciler(session, OWN, Choice("eth0"), (DEFAULT,))
        for peer in PEERS:
            made.put_peer(peer)
        made.define_overlays([OV1])
        made.full()
        yield made


@pytest.fixture
def joined(reconciler: Reconciler) -> Reconciler:
    """The same, with a bridge, and holders on a, b and on e, which nobody knows."""
    bridge()
    spaces.run("ip", "address", "add", "10.9.0.1/24", "dev", "nl-ov1")
    reconciler.full()
    six = replace(holder("fd09::2", "b"), mac=holder("10.9.0.2", "b").mac)  # of one interface
    held = [holder("10.9.0.2", "b"), six, holder("10.9.0.3", "b"), holder("10.9.0.4", "e"), holder("10.9.0.9", "a")]
    reconciler.sync(reconciler.overlays.replace("ov1", held))
    return reconciler


def way(reconciler: Reconciler, text: str) -> Way:
    return explain(reconciler, ip_address(text))


def missing(found: Way) -> dict[str, str]:
    """Kind of each entry that is not there → what is there instead."""
    return {one.kind: one.instead for one in found.entries if not one.present}


def status(reconciler: Reconciler) -> pb.Overlay:
    (found,) = overlay_messages(reconciler, lambda _: "up")
    return found


def test_a_container_of_another_host(joined: Reconciler) -> None:
    found = way(joined, "10.9.0.2")
    assert (found.kind, found.node, found.network, found.outer) == ("overlay", "b", "ov1", "10.0.0.2")
    assert (found.bridge, found.link, found.vni, found.port) == ("nl-ov1", "nl-vx256", 256, 4789)
    assert (found.mac, found.mtu, found.subnet) == ("02:42:0a:09:00:02", 1450, "10.9.0.0/24")
    assert [one.kind for one in found.entries] == KINDS
    assert [one.text for one in found.entries] == [
        "nl-vx256 vxlan id 256 local 10.0.0.1 dstport 4789 mtu 1450",
        "nl-vx256 master nl-ov1 neigh_suppress on learning off flood off",
        "10.9.0.2 dev nl-ov1 lladdr 02:42:0a:09:00:02 PERMANENT",
        "02:42:0a:09:00:02 dev nl-vx256 master sticky static",
        "02:42:0a:09:00:02 dev nl-vx256 dst 10.0.0.2 self permanent",
    ]
    assert missing(found) == {}
    assert (found.problems, found.note) == ((), "")
    assert found.kernel == "10.9.0.2 dev nl-ov1 src 10.9.0.1"
    six = way(joined, "fd09::2")
    assert (six.kind, six.outer, six.mac, missing(six)) == ("overlay", "10.0.0.2", found.mac, {})


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("ip neigh del 10.9.0.2 dev nl-ov1", {"neighbour": ""}),
        (
            "ip neigh replace 10.9.0.2 dev nl-ov1 lladdr 02:00:00:00:00:01 nud permanent",
            {"neighbour": "10.9.0.2 dev nl-ov1 lladdr 02:00:00:00:00:01 PERMANENT"},
        ),
        ("bridge fdb del 02:42:0a:09:00:02 dev nl-vx256 self", {"forward": ""}),
        (
            "bridge fdb replace 02:42:0a:09:00:02 dev nl-vx256 self dst 10.0.0.3",
            {"forward": "02:42:0a:09:00:02 dev nl-vx256 dst 10.0.0.3 self permanent"},
        ),
        ("bridge fdb del 02:42:0a:09:00:02 dev nl-vx256 master", {"bridged": ""}),
        ("bridge fdb replace 02:42:0a:09:00:02 dev other0 master static", {"bridged": "the bridge has it at other0"}),
        ("bridge link set dev nl-vx256 neigh_suppress off", {"port": "nl-vx256 master nl-ov1 other flags"}),
        ("ip link set nl-vx256 nomaster", {"port": "", "bridged": ""}),
        (
            "ip link set nl-vx256 down",
            {"device": "nl-vx256 vxlan id 256 local 10.0.0.1 dstport 4789 mtu 1450, down"},
        ),
        ("ip link set nl-vx256 alias mine", dict.fromkeys(["port", "bridged", "forward"], "")),
    ],
)  # fmt: skip
def test_what_is_missing_now(joined: Reconciler, words: str, lost: dict[str, str]) -> None:
    spaces.run("ip", "link", "add", "other0", "master", "nl-ov1", "type", "veth")
    spaces.run(*words.split())
    found = missing(way(joined, "10.9.0.2"))
    if "alias" in words:
        assert found.pop("device") == "a link of that name that is not netd's, vxlan"
        found["bridged"] = ""  # the bridge has it there indeed
    assert found == lost


def test_own_container_and_its_port(joined: Reconciler) -> None:
    found = way(joined, "10.9.0.9")
    assert (found.kind, found.node, found.network, found.bridge, found.link) == ("own", "a", "ov1", "nl-ov1", "")
    assert found.entries == ()
    spaces.run("ip", "link", "add", "port9", "up", "type", "veth")
    spaces.run("ip", "link", "set", "port9", "master", "nl-ov1")
    spaces.run("bridge", "fdb", "add", found.mac, "dev", "port9", "master", "static")
    assert way(joined, "10.9.0.9").link == "port9"
    spaces.run("bridge", "fdb", "replace", found.mac, "dev", "nl-vx256", "master", "static")
    astray = way(joined, "10.9.0.9")
    assert (astray.link, astray.problems) == (
        "",
        ("nl-ov1 sends 02:42:0a:09:00:09 into the tunnel, though this host has it",),
    )


def test_gateway(joined: Reconciler) -> None:
    found = way(joined, "10.9.0.1")
    assert (found.kind, found.node, found.link, found.problems) == ("gateway", "a", "nl-ov1", ())
    six = way(joined, "fd09::1")
    assert six.kind == "gateway"
    assert "lacks the gateway fd09::1" in six.problems[0]


def test_nobody(joined: Reconciler) -> None:
    found = way(joined, "10.9.0.77")
    assert (found.kind, found.node, found.network) == ("nobody", "", "ov1")
    assert found.problems == ("nobody holds 10.9.0.77: no container has it",)
    assert way(joined, "10.8.0.77").kind == "elsewhere"
    assert way(joined, "10.0.0.2").kind == "underlay"


def test_hosts_that_nothing_can_lead_to(joined: Reconciler) -> None:
    unknown = way(joined, "10.9.0.4")
    assert (unknown.kind, unknown.node, unknown.outer) == ("overlay", "e", "")
    assert [one.kind for one in unknown.entries] == KINDS[:2]
    said = "10.9.0.4 is on e, of which no underlay address is known: start netd there"
    assert unknown.problems == (said,)
    joined.sync(joined.put_peer(replace(PEERS[0], down=True)))
    assert "b is silent and does not answer" in way(joined, "10.9.0.2").problems[0]
    joined.sync(joined.put_peer(replace(PEERS[0], addresses=(ip_address("fd00::2"),))))
    assert "which has no IPv4 underlay address" in way(joined, "10.9.0.2").problems[0]
    assert any("3 addresses, such as 10.9.0.2" in one and "no IPv4" in one for one in joined.problems())


def test_two_hosts_with_one_mac(joined: Reconciler) -> None:
    twin = replace(holder("10.9.0.5", "c"), mac=holder("10.9.0.3", "b").mac)
    joined.sync(joined.overlays.put("ov1", {twin.address: twin}))
    said = "network ov1: 10.9.0.3 on b and 10.9.0.5 on c have one MAC, 02:42:0a:09:00:03, so only the first of them"
    for text in ("10.9.0.3", "10.9.0.5"):
        assert [one.startswith(said) for one in way(joined, text).problems] == [True]
    assert way(joined, "10.9.0.2").problems == ()
    assert sum(one.startswith(said) for one in status(joined).problems) == 1
    assert sum("one MAC" in one or "claim" in one for one in joined.problems()) == 1
    joined.sync(joined.overlays.put("ov1", {ip_address("10.9.0.3"): None}))
    assert way(joined, "10.9.0.5").problems == ()
    assert missing(way(joined, "10.9.0.5")) == {}


def test_a_host_that_is_not_on_it(reconciler: Reconciler) -> None:
    found = way(reconciler, "10.9.0.2")
    assert (found.kind, found.network, found.bridge) == ("unknown", "ov1", "nl-ov1")
    said = explain_held(reconciler, found, ip_address("10.9.0.2"), holder("10.9.0.2", "b"))
    assert (said.kind, said.node, said.outer, said.mac) == ("overlay", "b", "10.0.0.2", "02:42:0a:09:00:02")
    assert (said.link, said.entries, said.problems) == ("", (), ())
    assert said.note == "no container of this host is on ov1, so nothing here leads to it"
    own = explain_held(reconciler, found, ip_address("10.9.0.2"), holder("10.9.0.2", "a"))
    assert own.kind == "own"
    assert "has no bridge nl-ov1" in own.problems[0]
    nobody = explain_held(reconciler, found, ip_address("10.9.0.2"), None)
    assert (nobody.kind, nobody.note, len(nobody.problems)) == ("nobody", "", 1)
    gateway = way(reconciler, "10.9.0.1")
    assert (gateway.kind, gateway.node, gateway.problems) == ("gateway", "", ())
    reconciler.define_overlays([])
    assert "deleted meanwhile" in explain_held(reconciler, found, ip_address("10.9.0.2"), None).problems[0]


def test_before_etcd_has_told_the_holders(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    found = way(reconciler, "10.9.0.2")
    assert (found.kind, found.note) == ("unknown", "")
    said = explain_held(reconciler, found, ip_address("10.9.0.2"), holder("10.9.0.2", "b"))
    assert said.problems == ("etcd has not told yet who is on ov1: nothing is made before it does",)
    assert (status(reconciler).here, status(reconciler).known) == (True, False)


def test_status(joined: Reconciler) -> None:
    found = status(joined)
    assert (found.name, list(found.subnets), found.vni) == ("ov1", ["10.9.0.0/24", "fd09::/64"], 256)
    assert (found.bridge, found.device, found.port, found.mtu) == ("nl-ov1", "nl-vx256", 4789, 1450)
    assert (found.here, found.known, found.flood, found.internal) == (True, True, False, False)
    assert (found.addresses, found.containers) == (5, 4)
    assert [(one.name, one.outer, one.state, one.addresses, one.containers) for one in found.hosts] == [
        ("a", "", "here", 1, 1),
        ("b", "10.0.0.2", "up", 3, 2),
        ("e", "", "unknown", 1, 1),
    ]
    assert [one.address for one in found.hosts[1].some] == ["10.9.0.2", "10.9.0.3", "fd09::2"]
    # Device and port, bridge and gateway; three neighbours, two MACs.
    assert (found.wanted, found.present) == (4 + 3 + 2 * 2, 4 + 3 + 2 * 2)
    assert [one.partition(",")[0] for one in found.problems] == ["network ov1: 1 addresses"]
    assert holders_by_place(joined) == {"here": 1, "other": 4}
    joined.found.drop(next(key for key in joined.overlays.keys_of("ov1", ip_address("10.9.0.3"))))
    assert status(joined).present == found.wanted - 1


def test_status_of_what_the_kernel_refuses(reconciler: Reconciler) -> None:
    spaces.run("ip", "link", "add", "theirs", "type", "vxlan", "id", "256", "dstport", "4789", "dev", "eth0")
    bridge()
    reconciler.full()
    found = status(reconciler)
    assert any("another VXLAN device has VNI 256" in one for one in found.problems)
    assert found.present < found.wanted


def test_status_without_this_host(reconciler: Reconciler) -> None:
    found = status(reconciler)
    assert (found.here, found.known, found.addresses, found.wanted, len(found.hosts)) == (False, False, 0, 0, 0)
    assert holders_by_place(reconciler) == {"here": 0, "other": 0}
