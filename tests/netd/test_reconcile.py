"""Steps of the reconciler in a real network namespace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from kernel import vxlan
from kernel.rtevents import RouteEvents
from kernel.session import Session
from netd import reconcile
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.values import Network, Node, vtep_mac
from tests.hosts import wait_until
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
DEFAULT = Network("default", (), "vxlan", 1, 4789, 0, True, False)
OWN = Node("a", (), (ip_network("10.2.1.0/24"),), vtep_mac("a"))
PEER = Node("b", (ip_address("10.0.0.2"),), (ip_network("10.2.2.0/24"),), vtep_mac("b"))


@pytest.fixture
def reconciler() -> Iterator[Reconciler]:
    with spaces.fresh() as space, spaces.inside(space), Session() as session:
        spaces.run("ip", "link", "set", "lo", "up")
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        made = Reconciler(session, OWN, Choice("eth0"), (DEFAULT,))
        made.put_peer(PEER)
        made.full()
        assert made.problems() == []
        yield made


def routes() -> str:
    return spaces.run("ip", "route", "show", "proto", "110")


def test_another_backend_keeps_the_old_tunnels_end_for_a_while(
    reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "LINGER_S", 0.2)
    assert "nl-vx1" in routes()
    reconciler.configure(OWN, Choice("eth0"), (replace(DEFAULT, backend="host-gw"),))
    reconciler.full()
    assert routes() == "10.2.2.0/24 via 10.0.0.2 dev eth0 \n"
    # Without its address it would take nothing that comes from peers who have yet to hear of the change.
    assert "10.2.1.0/32" in spaces.run("ip", "address", "show", "nl-vx1")
    assert reconciler.next_s() is not None
    wait_until(reconciler.outstayed, "its time to be over")
    reconciler.sync(reconciler.outstayed())
    assert vxlan.find(reconciler.session, "nl-vx1") is None
    assert reconciler.next_s() is None
    assert reconciler.full() == 0


def test_back_again_before_it_is_gone(reconciler: Reconciler) -> None:
    before = spaces.run("ip", "-d", "link", "show", "nl-vx1")
    for backend in ("host-gw", "vxlan"):
        reconciler.configure(OWN, Choice("eth0"), (replace(DEFAULT, backend=backend),))
        reconciler.full()
    assert spaces.run("ip", "-d", "link", "show", "nl-vx1") == before
    assert reconciler.next_s() is None
    assert "nl-vx1" in routes()


def test_nothing_is_taken_away_while_nobody_knows_all_peers(reconciler: Reconciler) -> None:
    reconciler.may_drop = False
    reconciler.sync(reconciler.drop_peer("b"))
    reconciler.full()
    assert "10.2.2.0/24" in routes()
    reconciler.may_drop = True
    reconciler.full()
    assert routes() == ""


def test_a_link_of_its_name_that_is_not_netds(reconciler: Reconciler) -> None:
    other = replace(DEFAULT, vni=2)
    spaces.run("ip", "link", "add", "nl-vx2", "type", "bridge")
    reconciler.configure(OWN, Choice("eth0"), (other,))
    reconciler.full()
    assert any("there is a link nl-vx2 already that is not netd's" in one for one in reconciler.problems())
    spaces.run("ip", "link", "delete", "nl-vx2")
    reconciler.sync(reconciler.refused())
    assert reconciler.problems() == []
    assert "nl-vx2" in routes()


def test_a_tunnels_end_that_gets_another_name(reconciler: Reconciler) -> None:
    """It would be in the way of the new one for as long as former ones stay."""
    spaces.run("ip", "link", "set", "nl-vx1", "down")
    spaces.run("ip", "link", "set", "nl-vx1", "name", "mine")
    reconciler.full()
    assert reconciler.problems() == []
    assert "nl-vx1" in routes()
    assert "mine" not in spaces.run("ip", "link")
    assert reconciler.full() == 0
    assert reconciler.next_s() is None


@pytest.mark.parametrize("words", ["address 02:00:00:00:00:54", "mtu 1300"])
def test_a_tunnels_end_that_somebody_changes(reconciler: Reconciler, words: str) -> None:
    """The routes over it stay, and nobody else's are in their place."""
    before = routes(), spaces.run("ip", "neigh", "show", "dev", "nl-vx1", "nud", "permanent")
    spaces.run("ip", "link", "set", "nl-vx1", *words.split())
    assert reconciler.full() > 0
    assert reconciler.problems() == []
    assert (routes(), spaces.run("ip", "neigh", "show", "dev", "nl-vx1", "nud", "permanent")) == before
    assert reconciler.full() == 0
    reconciler.sync(reconciler.drop_peer("b"))
    assert routes() == ""


def test_a_change_right_after_a_making_that_nobody_heard_of(reconciler: Reconciler) -> None:
    """What came before it meant that everything had to be read."""
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        spaces.run("ip", "link", "delete", "nl-vx1")
        spaces.run("ip", "address", "add", "10.0.0.99/24", "dev", "eth0")
        reconciler.full()
        assert reconciler.note(events.read()) is None
        reconciler.full()
        spaces.run("ip", "link", "set", "nl-vx1", "down")
        assert reconciler.note(events.read()) is None
        reconciler.full()
    assert "nl-vx1" in routes()


def test_a_vni_that_another_device_has(reconciler: Reconciler) -> None:
    spaces.run("ip", "link", "add", "theirs", "type", "vxlan", "id", "3", "dstport", "4789", "local", "10.0.0.1")
    reconciler.configure(OWN, Choice("eth0"), (replace(DEFAULT, vni=3),))
    reconciler.full()
    assert any("another VXLAN device has VNI 3 on UDP port 4789 already" in one for one in reconciler.problems())
    assert "theirs" in spaces.run("ip", "link")


def test_without_an_underlay_nothing_is_withdrawn(reconciler: Reconciler) -> None:
    before = routes()
    spaces.run("ip", "address", "flush", "dev", "eth0")
    reconciler.full()
    assert "has no address; give it one" in reconciler.problems()[0]
    assert routes() == before
    spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
    reconciler.full()
    assert reconciler.problems() == []
    assert routes() == before


def test_hosts_that_come_with_another_choice_of_the_underlay(reconciler: Reconciler) -> None:
    """As a reload has it: the choice is another, and leads to the same link."""
    reconciler.configure(OWN, Choice("10.0.0.1"), (DEFAULT,))
    reconciler.put_peer(Node("c", (ip_address("10.0.0.3"),), (ip_network("10.2.3.0/24"),), vtep_mac("c")))
    reconciler.full()
    assert "10.2.3.0/24" in routes()
    assert "10.2.2.0/24" in routes()


def test_an_underlay_that_is_deleted_and_comes_back(reconciler: Reconciler) -> None:
    """Under its name, with another index: an event says so, and nobody waits until all is compared."""
    with contextlib.closing(RouteEvents()) as events:
        events.watched = reconciler.watched()
        spaces.run("ip", "link", "delete", "eth0")
        assert reconciler.note(events.read()) is None
        reconciler.full()
        assert "eth0" in reconciler.problems()[0]
        assert reconciler.note(events.read()) is not None, "no event, no work"
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        assert reconciler.note(events.read()) is None
        reconciler.full()
    assert reconciler.problems() == []
    assert "nl-vx1" in routes()
    assert "10.2.2.0" in spaces.run("ip", "neigh", "show", "dev", "nl-vx1")


def test_another_underlay_address_makes_another_tunnels_end(reconciler: Reconciler) -> None:
    spaces.run("ip", "address", "add", "10.0.0.9/24", "dev", "eth0")
    spaces.run("ip", "address", "del", "10.0.0.1/24", "dev", "eth0")
    if "10.0.0.9" not in spaces.run("ip", "address"):  # a second address of a network goes with the first one
        spaces.run("ip", "address", "add", "10.0.0.9/24", "dev", "eth0")
    reconciler.full()
    assert reconciler.problems() == []
    found = vxlan.find(reconciler.session, "nl-vx1")
    assert found is not None
    assert found.vxlan is not None
    assert found.vxlan.local == ip_address("10.0.0.9")
    assert "nl-vx1" in routes(), "with all that was on the one before"
    assert "10.2.2.0" in spaces.run("ip", "neigh", "show", "dev", "nl-vx1")
