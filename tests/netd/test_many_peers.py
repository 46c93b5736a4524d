"""A thousand peers: what one change costs does not depend on how many there are. Counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from unittest import mock

import pytest

from kernel import netlink
from kernel.rtevents import RouteEvents
from kernel.session import Session
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.values import Network, Node, vtep_mac
from tests.hosts import IPV6
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
PEERS = 1000


def peer(number: int, *more: str) -> Node:
    subnets = [ip_network((0x0A020000 + (number << 8), 24)), *map(ip_network, more)]
    if IPV6:
        subnets.append(ip_network(f"fd02:{number:x}::/64"))
    return Node(f"host{number}", (ip_address(0x0A000001 + number),), tuple(subnets), vtep_mac(f"host{number}"))


@pytest.fixture
def settled() -> Iterator[tuple[Reconciler, RouteEvents]]:
    with spaces.fresh() as space, spaces.inside(space), Session() as session:
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        if IPV6:  # a link-local address is told of once more when nobody else is found to have it, seconds later
            spaces.run("ip", "link", "set", "eth0", "addrgenmode", "none")
        spaces.run("ip", "address", "add", "10.0.0.1/16", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        network = Network("default", (), "vxlan", 1, 4789, 0, True, False)
        made = Reconciler(session, peer(0), Choice("eth0"), (network,))
        events = RouteEvents()
        for number in range(1, PEERS + 1):
            made.put_peer(peer(number))
        made.full()
        events.watched = made.watched()
        yield made, events
        events.close()


def messages_of(work: mock.Mock) -> int:
    return sum(len(call.args[0]) for call in work.call_args_list)


def test_a_thousand_peers(settled: tuple[Reconciler, RouteEvents]) -> None:
    reconciler, events = settled
    assert reconciler.problems() == []
    each = 5 if IPV6 else 3
    assert len(reconciler.found.entries) == PEERS * each + (3 if IPV6 else 2)
    assert reconciler.note(events.read()) == set(), "our own changes need no repair"
    assert reconciler.full() == 0, "what is well is not touched"

    dumps = mock.patch.object(netlink.Socket, "dump", side_effect=AssertionError("a dump for one change"))
    with (
        dumps,
        mock.patch.object(session_socket(reconciler), "attempt", wraps=session_socket(reconciler).attempt) as made,
    ):
        assert reconciler.sync(reconciler.put_peer(peer(7, "10.99.0.0/24"))) == 2
        assert messages_of(made) == 2, "one route and one neighbour"
        made.reset_mock()
        assert reconciler.sync(reconciler.put_peer(peer(7, "10.99.0.0/24"))) == 0
        assert messages_of(made) == 0
        spaces.run("ip", "route", "del", "10.2.9.0/24")
        dirty = reconciler.note(events.read())
        assert dirty is not None
        assert len(dirty) == 1
        assert reconciler.sync(dirty) == 1
        assert messages_of(made) == 1
        assert reconciler.sync(reconciler.drop_peer("host9")) == each
    assert "10.2.9.0" not in spaces.run("ip", "route")
    assert reconciler.full() == 0


def session_socket(reconciler: Reconciler) -> netlink.Socket:
    return reconciler.session.rtnl


def test_two_hosts_with_one_address_are_both_named(settled: tuple[Reconciler, RouteEvents]) -> None:
    reconciler, _ = settled
    thief = Node("thief", (ip_address("10.0.0.8"),), (ip_network("10.98.0.0/24"),), vtep_mac("thief"))
    reconciler.sync(reconciler.put_peer(thief))
    assert reconciler.problems() == [
        "thief claims the underlay address of host7: 10.0.0.8, and nothing leads there: give one of them another, or"
        " remove the one that is gone (netloom node remove)"
    ]
    assert "10.98.0.0" not in spaces.run("ip", "route")
    assert "10.2.7.0" in spaces.run("ip", "route"), "who had it keeps it"
    reconciler.sync(reconciler.drop_peer("host7"))
    assert reconciler.problems() == []
    assert "10.98.0.0" in spaces.run("ip", "route"), "who was refused gets it when it is free"


def test_who_claims_this_hosts_address_or_subnet_gets_nothing(settled: tuple[Reconciler, RouteEvents]) -> None:
    reconciler, _ = settled
    reconciler.sync(
        reconciler.put_peer(Node("x", (ip_address("10.0.0.1"),), (ip_network("10.98.0.0/24"),), vtep_mac("x")))
    )
    assert "x claims the underlay address of this host, host0: 10.0.0.1" in reconciler.problems()[0]
    reconciler.sync(reconciler.drop_peer("x"))
    reconciler.sync(
        reconciler.put_peer(
            Node(
                "y",
                (ip_address("10.0.99.1"),),
                (ip_network("10.2.0.128/25"), ip_network("10.97.0.0/24")),
                vtep_mac("y"),
            )
        )
    )
    assert "y claims 10.2.0.128/25, and 10.2.0.0/24 is this host's own" in reconciler.problems()[0]
    routes = spaces.run("ip", "route")
    assert "10.2.0.128" not in routes
    assert "10.97.0.0" in routes, "the rest of what it has is reached"
    reconciler.sync(reconciler.drop_peer("y"))
    assert reconciler.problems() == []


def test_one_subnet_of_two_hosts(settled: tuple[Reconciler, RouteEvents]) -> None:
    reconciler, _ = settled
    rival = Node("rival", (ip_address("10.0.99.1"),), (ip_network("10.2.5.0/24"),), vtep_mac("rival"))
    reconciler.sync(reconciler.put_peer(rival))
    assert any("host5 and rival claim the same" in one for one in reconciler.problems())
    neighbour = spaces.run("ip", "neigh", "show", "10.2.5.0", "dev", "nl-vx1")
    assert vtep_mac("host5") in neighbour
    reconciler.sync(reconciler.drop_peer("host5"))
    assert vtep_mac("rival") in spaces.run("ip", "neigh", "show", "10.2.5.0", "dev", "nl-vx1")
    assert reconciler.problems() == []
