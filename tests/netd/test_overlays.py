"""Overlays in a real network namespace: what is there for whom, when it comes, and when it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from kernel import macs
from kernel.leftovers import BRIDGE_MARK
from kernel.rtevents import RouteEvents
from kernel.session import Session
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.values import BRIDGE, PORT, Holder, Network, Node, Overlay, vtep_mac
from tests.hosts import IPV6, wait_until
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
DEFAULT = Network("default", (), "vxlan", 1, 4789, 0, True, False)
OWN = Node("a", (), (), vtep_mac("a"))
PEERS = [Node(name, (ip_address(f"10.0.0.{n}"),), (), vtep_mac(name)) for n, name in enumerate("bcd", 2)]
OV1 = Overlay("ov1", (ip_network("10.9.0.0/24"), ip_network("fd09::/64")), 256, "nl-ov1", 4789, 0, False, True, False)


def holder(text: str, node: str) -> Holder:
    address = ip_address(text)
    return Holder(address, macs.of_address(address), node)


@pytest.fixture
def reconciler() -> Iterator[Reconciler]:
    with spaces.fresh() as space, spaces.inside(space), Session() as session:
        spaces.run("ip", "link", "set", "lo", "up")
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        if IPV6:  # a link-local address is told of once more when nobody else is found to have it, seconds later
            spaces.run("ip", "link", "set", "eth0", "addrgenmode", "none")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        made = Reconciler(session, OWN, Choice("eth0"), (DEFAULT,))
        for peer in PEERS:
            made.put_peer(peer)
        made.full()
        made.define_overlays([OV1])
        made.full()
        yield made


def bridge(name: str = "nl-ov1") -> None:
    spaces.run("ip", "link", "add", name, "address", "02:42:0a:09:00:01", "up", "type", "bridge")
    spaces.run("ip", "link", "set", name, "alias", BRIDGE_MARK)


def neighbours() -> set[str]:
    lines = [spaces.run("ip", family, "neigh", "show", "dev", "nl-ov1", "nud", "permanent") for family in ("-4", "-6")]
    return {" ".join(line.split()[:3:2]) for line in "".join(lines).splitlines() if not line.startswith("ff")}


def fdb() -> set[str]:
    shown = spaces.run("bridge", "fdb", "show", "dev", "nl-vx256").splitlines()
    return {" ".join(line.split()) for line in shown if "master nl-ov1 permanent" not in line}


def entries_of(*holders: tuple[str, str]) -> set[str]:
    """(address, outer address)"""
    found: set[str] = set()
    for text, outer in holders:
        mac = macs.of_address(ip_address(text))
        found |= {f"{mac} sticky master nl-ov1 static", f"{mac} dst {outer} self permanent"}
    return found


def test_nothing_without_the_bridge(reconciler: Reconciler) -> None:
    assert "nl-vx256" not in spaces.run("ip", "-br", "link")
    assert reconciler.overlays.active() == {}
    spaces.run("ip", "link", "add", "nl-ov1", "type", "bridge")  # somebody else's of that name
    reconciler.full()
    assert reconciler.overlays.active() == {}


def test_from_the_first_container_to_the_last(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    assert list(reconciler.overlays.active()) == ["ov1"]
    shown = spaces.run("ip", "-d", "link", "show", "nl-vx256")
    assert "master nl-ov1" in shown
    assert "state DOWN" in shown  # nothing passes before all holders are known
    for text in ("vxlan id 256 ", "nolearning", "neigh_suppress on", "learning off", "flood off", "bcast_flood off"):
        assert text in shown
    two, three = holder("10.9.0.2", "b"), holder("10.9.0.3", "c")
    six = holder("fd09::3", "c")
    reconciler.sync(reconciler.overlays.replace("ov1", [two, three, six, holder("10.9.0.9", "a")]))
    assert "LOWER_UP" in spaces.run("ip", "link", "show", "nl-vx256")
    assert neighbours() == {f"{one.address} {one.mac}" for one in (two, three, six)}
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"), ("10.9.0.3", "10.0.0.3"), ("fd09::3", "10.0.0.3"))
    # Another host has an address, another MAC, and nobody has one.
    moved, other = replace(two, node="d"), replace(three, mac="02:00:00:00:00:03")
    reconciler.sync(reconciler.overlays.put("ov1", {one.address: one for one in (moved, other)}))
    reconciler.sync(reconciler.overlays.put("ov1", {six.address: None}))
    assert neighbours() == {f"{one.address} {one.mac}" for one in (moved, other)}
    assert fdb() == {
        *entries_of(("10.9.0.2", "10.0.0.4")),
        "02:00:00:00:00:03 sticky master nl-ov1 static",
        "02:00:00:00:00:03 dst 10.0.0.3 self permanent",
    }
    # It comes here.
    reconciler.sync(reconciler.overlays.put("ov1", {moved.address: replace(moved, node="a")}))
    assert neighbours() == {f"{other.address} {other.mac}"}
    assert reconciler.full() == 0
    spaces.run("ip", "link", "delete", "nl-ov1")
    reconciler.full()
    assert "nl-vx256" not in spaces.run("ip", "-br", "link")
    assert reconciler.overlays.active() == {}
    assert reconciler.problems() == []


def test_flooding_goes_to_hosts_that_are_on_the_network(reconciler: Reconciler) -> None:
    reconciler.define_overlays([replace(OV1, flood=True)])
    bridge()
    reconciler.full()
    holders = [holder("10.9.0.2", "b"), holder("10.9.0.3", "b"), holder("10.9.0.4", "c"), holder("10.9.0.9", "a")]
    reconciler.sync(reconciler.overlays.replace("ov1", holders))
    assert "bcast_flood on" in spaces.run("ip", "-d", "link", "show", "nl-vx256")
    zero = {"00:00:00:00:00:00 dst 10.0.0.2 self permanent", "00:00:00:00:00:00 dst 10.0.0.3 self permanent"}
    assert {line for line in fdb() if line.startswith("00:00")} == zero
    reconciler.sync(reconciler.overlays.put("ov1", {holders[0].address: None, holders[2].address: None}))
    assert {line for line in fdb() if line.startswith("00:00")} == {min(zero)}
    reconciler.sync(reconciler.overlays.put("ov1", {holders[1].address: None}))
    assert {line for line in fdb() if line.startswith("00:00")} == set()
    assert reconciler.full() == 0


def test_a_host_that_is_down_takes_its_containers_with_it(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), holder("10.9.0.3", "c")]))
    reconciler.sync(reconciler.put_peer(replace(PEERS[0], down=True)))
    assert fdb() == entries_of(("10.9.0.3", "10.0.0.3"))
    reconciler.sync(reconciler.put_peer(replace(PEERS[0], addresses=(ip_address("10.0.0.7"),))))
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.7"), ("10.9.0.3", "10.0.0.3"))
    reconciler.sync(reconciler.drop_peer("b"))
    assert fdb() == entries_of(("10.9.0.3", "10.0.0.3"))
    assert "10.9.0.2, are on b, of which no underlay address is known" in " ".join(reconciler.problems())


def test_a_host_that_claims_anothers_underlay_address(reconciler: Reconciler) -> None:
    """As with routes: who had it first keeps it, and nothing goes there in the other's name."""
    bridge()
    reconciler.define_overlays([replace(OV1, flood=True)])
    reconciler.full()
    thief = Node("x", PEERS[0].addresses, (), vtep_mac("x"))
    reconciler.sync(reconciler.put_peer(thief))
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), holder("10.9.0.66", "x")]))
    flooded = "00:00:00:00:00:00 dst 10.0.0.2 self permanent"
    assert fdb() == {*entries_of(("10.9.0.2", "10.0.0.2")), flooded}
    told = " ".join(reconciler.problems())
    assert "10.9.0.66, are on x, which claims the underlay address of b: 10.0.0.2: give one of them another" in told
    # It gets another one: nothing is wrong any more.
    reconciler.sync(reconciler.put_peer(replace(thief, addresses=(ip_address("10.0.0.9"),))))
    both = entries_of(("10.9.0.2", "10.0.0.2"), ("10.9.0.66", "10.0.0.9"))
    assert fdb() == {*both, flooded, flooded.replace("0.0.2", "0.0.9")}
    assert reconciler.problems() == []
    # Back to the other's, whose host then leaves: the address is its own.
    reconciler.sync(reconciler.put_peer(thief))
    assert fdb() == {*entries_of(("10.9.0.2", "10.0.0.2")), flooded}
    reconciler.sync(reconciler.drop_peer("b"))
    assert fdb() == {*entries_of(("10.9.0.66", "10.0.0.2")), flooded}
    # And this host's own is nobody else's.
    reconciler.sync(reconciler.put_peer(replace(thief, addresses=(ip_address("10.0.0.1"),))))
    assert fdb() == set()
    assert "which claims the underlay address of this host, a: 10.0.0.1" in " ".join(reconciler.problems())
    assert reconciler.full() == 0


def test_hosts_that_come_with_another_choice_of_the_underlay(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), holder("10.9.0.66", "x")]))
    reconciler.configure(OWN, Choice("10.0.0.1"), (DEFAULT,))
    reconciler.put_peer(Node("x", (ip_address("10.0.0.9"),), (), vtep_mac("x")))
    reconciler.full()
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"), ("10.9.0.66", "10.0.0.9"))


def test_what_others_change_comes_back(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), holder("fd09::2", "b")]))
    before = neighbours(), fdb(), shown_device()
    mac = macs.of_address(ip_address("10.9.0.2"))
    for words in (
        ("ip", "neigh", "del", "10.9.0.2", "dev", "nl-ov1"),
        ("bridge", "fdb", "del", mac, "dev", "nl-vx256", "self"),
        ("bridge", "fdb", "del", mac, "dev", "nl-vx256", "master"),
        ("bridge", "fdb", "add", "02:00:00:00:00:77", "dev", "nl-vx256", "self", "dst", "10.0.0.3"),
        ("bridge", "link", "set", "dev", "nl-vx256", "neigh_suppress", "off"),
        ("bridge", "link", "set", "dev", "nl-vx256", "flood", "on"),
        ("ip", "link", "set", "nl-vx256", "type", "vxlan", "learning"),
        ("ip", "link", "set", "nl-vx256", "nomaster"),
        ("ip", "link", "set", "nl-vx256", "down"),
        ("ip", "link", "delete", "nl-vx256"),
    ):
        spaces.run(*words)
        assert reconciler.full() > 0, words
        after = neighbours(), fdb(), shown_device()
        assert after == before, words
        assert reconciler.full() == 0, words


def test_an_event_tells_of_another_port(reconciler: Reconciler) -> None:
    """Nobody has to wait until everything is compared."""
    bridge()
    reconciler.full()
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        reconciler.sync(reconciler.overlays.replace("ov1", []))
        assert reconciler.note(events.read()) == set()
        for option in ("neigh_suppress", "flood", "learning"):
            spaces.run("bridge", "link", "set", "dev", "nl-vx256", option, "off" if "_" in option else "on")
            keys = reconciler.note(events.read())
            assert keys == {(PORT, "nl-vx256", b"")}, option
            assert reconciler.sync(keys) == 1
            assert reconciler.note(events.read()) == set()
            assert reconciler.full() == 0


def shown_device() -> list[str]:
    """What it is as a tunnel's end and as a port."""
    _, _, tunnel, port, *more = spaces.run("ip", "-d", "link", "show", "nl-vx256").splitlines()
    words = port.split()  # with timers and numbers of ports, too
    flags = [
        words[words.index(one) + 1] for one in ("learning", "flood", "mcast_flood", "bcast_flood", "neigh_suppress")
    ]
    return [tunnel, *flags, *more]


def shown_bridge() -> list[str]:
    """Whether it is up, its MAC, addresses and permanent neighbours."""
    words = spaces.run("ip", "-o", "link", "show", "nl-ov1").split()
    found = ["up" if "UP" in words[2].strip("<>").split(",") else "down", words[words.index("link/ether") + 1]]
    found += [line.split()[3] for line in spaces.run("ip", "-o", "address", "show", "dev", "nl-ov1").splitlines()]
    return [*(one for one in found if not one.startswith("fe80")), *sorted(neighbours())]


def test_an_event_tells_of_another_bridge(reconciler: Reconciler) -> None:
    """Gateways, MAC and whether it is up are as the plugin made them, before the next ADD; what others add stays."""
    bridge()
    reconciler.full()
    here = [holder("10.9.0.9", "a"), *([holder("fd09::9", "a")] if IPV6 else [])]
    gateways = ["10.9.0.1/24", *(["fd09::1/64"] if IPV6 else [])]
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), *here]))
        before = shown_bridge()
        assert set(gateways) < set(before)
        assert "10.9.0.0/24" in spaces.run("ip", "route"), "the way to the network"
        assert reconciler.note(events.read()) == set()
        for words in (
            *(f"ip address del {gateway} dev nl-ov1" for gateway in gateways),
            "ip link set nl-ov1 address 02:00:00:00:00:99",
            "ip link set nl-ov1 down",
            *(["sysctl -qw net.ipv6.conf.nl-ov1.disable_ipv6=1"] if IPV6 else []),
        ):
            spaces.run(*words.split())
            assert shown_bridge() != before, words
            keys = reconciler.note(events.read())
            assert keys, words
            assert reconciler.sync(keys) > 0, words
            assert shown_bridge() == before, words
            assert reconciler.sync(reconciler.note(events.read()) or ()) == 0, words
            assert reconciler.full() == 0, words
        spaces.run("ip", "address", "add", "10.9.0.77/24", "dev", "nl-ov1")
        assert reconciler.note(events.read()) == set()
        assert reconciler.full() == 0
    assert "10.9.0.77" in spaces.run("ip", "address")


def test_gateways_of_nobody_here(reconciler: Reconciler) -> None:
    """What containers of this host have no use for is not put there, and not taken away either: an ADD may be about to
    need it. Nor is a MAC changed that follows from another gateway."""
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    assert "10.9.0.1" not in spaces.run("ip", "address")
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        spaces.run("ip", "address", "add", "10.9.0.1/24", "dev", "nl-ov1")
        spaces.run("ip", "link", "set", "nl-ov1", "address", macs.of_address(ip_address("fd09::1")))
        keys = reconciler.note(events.read())
        assert keys is not None
        assert not any(key[0] == BRIDGE for key in keys)
        reconciler.sync(keys)  # its neighbours went with the MAC
    assert neighbours() == {f"10.9.0.2 {macs.of_address(ip_address('10.9.0.2'))}"}
    assert reconciler.full() == 0
    assert "10.9.0.1" in spaces.run("ip", "address")
    assert macs.of_address(ip_address("fd09::1")) in spaces.run("ip", "link", "show", "nl-ov1")


def test_a_gateway_that_a_plugin_put_there_first(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    spaces.run("ip", "address", "add", "10.9.0.1/24", "dev", "nl-ov1")  # its event is not read yet
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.9", "a")]))
    assert reconciler.problems() == []
    assert reconciler.full() == 0


def test_a_bridge_of_another_name_is_none(reconciler: Reconciler) -> None:
    """The tunnel's end leaves it, and is a port of the one that the plugin makes then."""
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        spaces.run("ip", "link", "set", "nl-ov1", "down")
        spaces.run("ip", "link", "set", "nl-ov1", "name", "mine")
        reconciler.sync({*(reconciler.note(events.read()) or ()), *reconciler.take_new()})
        assert reconciler.overlays.active() == {}
        assert "nl-vx256" not in spaces.run("ip", "-br", "link")
        bridge()
        reconciler.sync({*(reconciler.note(events.read()) or ()), *reconciler.take_new()})
        reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
        assert "master nl-ov1" in spaces.run("ip", "link", "show", "nl-vx256")
        assert neighbours() == {f"10.9.0.2 {macs.of_address(ip_address('10.9.0.2'))}"}
        assert reconciler.full() == 0


def test_another_start_takes_nothing_away_before_all_holders_are_known(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    before = fdb()
    again = Reconciler(reconciler.session, OWN, Choice("eth0"), (DEFAULT,))
    for peer in PEERS:
        again.put_peer(peer)
    again.define_overlays([OV1])
    again.full()
    assert fdb() == before
    assert "LOWER_UP" in spaces.run("ip", "link", "show", "nl-vx256")
    again.sync(again.overlays.replace("ov1", [holder("10.9.0.3", "c")]))
    assert fdb() == entries_of(("10.9.0.3", "10.0.0.3"))
    assert again.full() == 0


def test_another_start_takes_nothing_away_before_all_hosts_are_known(reconciler: Reconciler) -> None:
    """What was on the disk of them is lost, and etcd tells of the holders first."""
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b"), holder("10.9.0.3", "c")]))
    before = fdb(), neighbours()
    again = Reconciler(reconciler.session, OWN, Choice("eth0"), (DEFAULT,))
    again.may_drop = False
    again.define_overlays([OV1])
    again.full()
    again.sync(again.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    assert (fdb(), neighbours()) == before
    for peer in PEERS:
        again.sync(again.put_peer(peer))
    again.may_drop = True
    again.full()
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"))


def test_made_anew_with_another_vni(reconciler: Reconciler) -> None:
    """The bridge stays; were the former tunnel's end to stay on it, frames that are flooded would go round for ever."""
    flooding = replace(OV1, flood=True)
    bridge()
    reconciler.define_overlays([flooding])
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    reconciler.define_overlays([])
    reconciler.full()
    reconciler.define_overlays([replace(flooding, vni=300)])
    reconciler.full()
    assert "nl-vx256" not in spaces.run("ip", "-br", "link")
    assert "master nl-ov1" in spaces.run("ip", "link", "show", "nl-vx300")


def test_a_former_tunnels_end_that_somebody_deletes(reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for any more; the daemon would go round without a pause."""
    monkeypatch.setattr("netd.reconcile.LINGER_S", 0.05)
    bridge()
    reconciler.full()
    reconciler.define_overlays([])
    reconciler.full()
    assert reconciler.next_s() is not None
    spaces.run("ip", "link", "delete", "nl-vx256")
    reconciler.full()
    wait_until(lambda: reconciler.sync(reconciler.outstayed()) == 0 and reconciler.next_s() is None, "the wait's end")


def test_a_device_that_waits_for_holders_and_is_deleted(reconciler: Reconciler) -> None:
    """Etcd may take its time: what becomes of it meanwhile is seen as ever."""
    bridge()
    with contextlib.closing(RouteEvents()) as events:
        reconciler.full()
        events.watched = reconciler.watched()
        assert reconciler.note(events.read()) == set(), "its own making"
        spaces.run("ip", "link", "set", "nl-vx256", "nomaster")
        keys = reconciler.note(events.read())
        assert keys == {(PORT, "nl-vx256", b"")}
        reconciler.sync(keys)
        spaces.run("ip", "link", "delete", "nl-vx256")
        assert reconciler.note(events.read()) is None
        reconciler.full()
        assert reconciler.note(events.read()) == set()
        assert "master nl-ov1" in spaces.run("ip", "link", "show", "nl-vx256")
        reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
        assert reconciler.note(events.read()) == set()
    assert "LOWER_UP" in spaces.run("ip", "link", "show", "nl-vx256")
    assert reconciler.full() == 0


def test_nobody_takes_the_gateway_away(reconciler: Reconciler) -> None:
    """As etcd could say after somebody wrote there by hand."""
    bridge()
    reconciler.full()
    gateway = ip_address("10.9.0.1")
    stranger = replace(holder("10.9.0.5", "b"), mac=macs.of_address(gateway))
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.1", "b"), stranger, holder("10.9.0.2", "b")]))
    assert neighbours() == {f"10.9.0.2 {macs.of_address(ip_address('10.9.0.2'))}"}
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"))
    # And it is said: by status for as long as it is so, in the log once.
    texts = [
        "network ov1: 10.9.0.1 on b is the gateway's own address, so nothing leads there: end its container there, or"
        " delete addresses/ov1#10.9.0.1 in etcd where there is none",
        "network ov1: 10.9.0.5 on b has the gateway's MAC, 02:42:0a:09:00:01, so nothing leads there: end its container"
        " there, or delete macs/ov1#10.9.0.5 in etcd where there is none",
    ]
    assert reconciler.problems() == reconciler.overlays.problems("ov1") == texts
    assert reconciler.overlays.problems("ov2") == []
    assert reconciler.overlays.take_false_news() == texts
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.1", "b"), stranger]))
    assert reconciler.overlays.take_false_news() == []
    reconciler.sync(reconciler.overlays.put("ov1", {gateway: None, stranger.address: holder("10.9.0.5", "b")}))
    assert reconciler.problems() == []
    assert neighbours() == {f"10.9.0.5 {macs.of_address(stranger.address)}"}
    reconciler.sync(reconciler.overlays.put("ov1", {stranger.address: stranger}))
    assert (reconciler.overlays.take_false_news(), reconciler.problems()) == (texts[1:], texts[1:])
    spaces.run("ip", "link", "delete", "nl-ov1")
    reconciler.full()
    assert reconciler.problems() == []


def test_two_addresses_of_one_interface(reconciler: Reconciler) -> None:
    bridge()
    reconciler.full()
    four = holder("10.9.0.2", "b")
    six = replace(holder("fd09::2", "b"), mac=four.mac)
    reconciler.sync(reconciler.overlays.replace("ov1", [four, six]))
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"))
    reconciler.sync(reconciler.overlays.put("ov1", {four.address: None}))
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"))  # the other one needs it still
    reconciler.sync(reconciler.overlays.put("ov1", {six.address: None}))
    assert fdb() == set()
    assert reconciler.problems() == []


def test_containers_here_are_told_of_another_mac(reconciler: Reconciler) -> None:
    """Also where the address was nobody's in between, and not where nothing they know is wrong."""
    bridge()
    spaces.run("ip", "link", "add", "port", "master", "nl-ov1", "up", "type", "veth", "peer", "name", "inside")
    spaces.run("ip", "link", "set", "inside", "up")
    wait_until(lambda: "state forwarding" in spaces.run("bridge", "link", "show", "dev", "port"), "the port's carrier")
    reconciler.full()
    two, six = holder("10.9.0.2", "b"), holder("fd09::2", "b")
    reconciler.sync(reconciler.overlays.replace("ov1", [two, six]))
    for one in (two, six):
        spaces.run("ip", "neigh", "add", str(one.address), "lladdr", one.mac, "dev", "inside", "nud", "stale")
    assert reconciler.overlays.take_news() == []
    for mac, node, gap in (("02:00:00:00:00:02", "b", False), ("02:00:00:00:00:03", "c", True)):
        if gap:
            reconciler.sync(reconciler.overlays.put("ov1", {two.address: None, six.address: None}))
        changed = [replace(one, mac=mac, node=node) for one in (two, six)]
        reconciler.sync(reconciler.overlays.put("ov1", {one.address: one for one in changed}))
        reconciler.announce()
        for one in changed:
            wait_until(lambda one=one: one.mac in told(one), f"{one.address} with {one.mac}", lambda: told(two))  # type: ignore[misc]
    # One that asked in vain would ask again only after a second.
    late = holder("10.9.0.7", "b")
    spaces.run("ip", "neigh", "add", "10.9.0.7", "dev", "inside", "nud", "incomplete")
    reconciler.sync(reconciler.overlays.put("ov1", {late.address: late}))
    reconciler.announce()
    wait_until(lambda: late.mac in told(late), "10.9.0.7", lambda: told(late))
    # Who is here tells of itself; but what it was is known when it goes.
    own = replace(two, mac="02:00:00:00:00:04", node="a")
    reconciler.sync(reconciler.overlays.put("ov1", {two.address: own}))
    assert reconciler.overlays.take_news() == []
    reconciler.sync(reconciler.overlays.put("ov1", {two.address: two}))
    assert [(one.address, one.mac) for one in reconciler.overlays.take_news()] == [(two.address, two.mac)]


def test_the_device_of_an_earlier_bridge_waits_as_a_new_one(reconciler: Reconciler) -> None:
    """Whoever sees it up on the bridge goes by that."""
    bridge()
    reconciler.full()
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    assert "LOWER_UP" in spaces.run("ip", "link", "show", "nl-vx256")
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        spaces.run("ip", "link", "delete", "nl-ov1")
        bridge()
        keys = reconciler.note(events.read())  # all in one look, so the device was never unwanted
    reconciler.sync({*reconciler.take_new(), *(keys or ())})
    assert "master nl-ov1" in spaces.run("ip", "link", "show", "nl-vx256")
    assert "LOWER_UP" not in spaces.run("ip", "link", "show", "nl-vx256")
    reconciler.sync(reconciler.overlays.replace("ov1", [holder("10.9.0.2", "b")]))
    assert "LOWER_UP" in spaces.run("ip", "link", "show", "nl-vx256")
    assert fdb() == entries_of(("10.9.0.2", "10.0.0.2"))
    assert reconciler.full() == 0


def told(one: Holder) -> str:
    return spaces.run("ip", "neigh", "show", str(one.address), "dev", "inside")
