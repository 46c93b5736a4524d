"""VXLAN devices, neighbours and forwarding entries, as iproute2 shows them, and the events that tell of changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from kernel import addr, fdb, link, neigh, route, vxlan
from kernel.errors import Exists, NotFound
from kernel.fdb import Forward
from kernel.neigh import Neighbour
from kernel.route import Route
from kernel.rtevents import AddressChange, Change, ForwardChange, LinkChange, NeighbourChange, RouteChange, RouteEvents
from kernel.session import Session
from kernel.vxlan import Vxlan
from tests.hosts import IPV6
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
MAC, OTHER = "02:11:22:33:44:55", "02:11:22:33:44:66"


@pytest.fixture
def under(session: Session) -> int:
    """The underlay: br0 with 10.0.0.2/24 and fd00::2/64."""
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    index = link.get(session, "br0").index
    addr.add(session, index, ip_interface("10.0.0.2/24"))
    if IPV6:
        addr.add(session, index, ip_interface("fd00::2/64"))
    return index


def spec(under: int, local: str = "10.0.0.2", **more: object) -> Vxlan:
    values: dict[str, object] = {"vni": 7, "port": 4790, "mac": MAC, "mtu": 1430, "alias": "ours", **more}
    return Vxlan("vx7", local=ip_address(local), link=under, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("local", ["10.0.0.2", pytest.param("fd00::2", marks=needs_ipv6)])
def test_a_device_is_as_it_was_asked_for(session: Session, under: int, local: str, checksum: bool) -> None:
    wanted = spec(under, local, udp_checksum=checksum)
    assert vxlan.find(session, "vx7") is None
    vxlan.add(session, wanted)
    found = vxlan.find(session, "vx7")
    assert found is not None
    assert found.vxlan == wanted
    assert found.up
    assert vxlan.all_vxlans(session) == [found]
    shown = next(one for one in spaces.ip("-d", "link", "show", "vx7"))
    data = shown["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["learning"], data["link"]) == (7, 4790, False, "br0")
    assert data.get("local") == local or data.get("local6") == local
    assert (shown["mtu"], shown["address"], shown["ifalias"]) == (1430, MAC, "ours")
    assert "fe80" not in str(spaces.ip("address", "show", "vx7"))
    with pytest.raises(Exists):
        vxlan.add(session, wanted)


def test_what_can_change_changes_in_place(session: Session, under: int) -> None:
    vxlan.add(session, spec(under))
    before = vxlan.find(session, "vx7")
    wanted = spec(under, mac=OTHER, mtu=1300, alias="still")
    vxlan.change(session, wanted)
    after = vxlan.find(session, "vx7")
    assert before is not None
    assert after is not None
    assert (after.vxlan, after.index) == (wanted, before.index)


def test_checksum_offload_is_switched(session: Session, under: int) -> None:
    vxlan.add(session, spec(under))
    assert vxlan.tx_checksum("vx7")
    vxlan.set_tx_checksum("vx7", False)
    assert not vxlan.tx_checksum("vx7")
    vxlan.set_tx_checksum("vx7", True)
    assert vxlan.tx_checksum("vx7")
    with pytest.raises(NotFound):
        vxlan.tx_checksum("nobody")


def test_a_link_of_another_kind_is_no_vxlan(session: Session, under: int) -> None:
    found = vxlan.find(session, "br0")
    assert found is not None
    assert (found.index, found.vxlan) == (under, None)


@pytest.fixture
def device(session: Session, under: int) -> int:
    vxlan.add(session, spec(under))
    found = vxlan.find(session, "vx7")
    assert found is not None
    return found.index


@pytest.mark.parametrize("address", ["10.2.1.0", pytest.param("fd00:2::", marks=needs_ipv6)])
def test_neighbours(session: Session, device: int, address: str) -> None:
    one = Neighbour(device, ip_address(address), MAC)
    session.rtnl.execute([neigh.set_message(one)])
    assert neigh.all_neighbours(session, device) == [one]
    assert [entry["state"] for entry in spaces.ip("neigh", "show", "dev", "vx7")] == [["PERMANENT"]]
    other = Neighbour(device, ip_address(address), OTHER)
    session.rtnl.execute([neigh.set_message(other)])
    assert neigh.all_neighbours(session, device) == [other]
    session.rtnl.execute([neigh.delete_message(one)])
    # The kernel keeps a removed one for a moment, as one that is not known.
    assert not [found for found in neigh.all_neighbours(session, device) if found.permanent]
    with pytest.raises(NotFound):
        session.rtnl.execute([neigh.delete_message(Neighbour(device, ip_address("10.9.9.9"), MAC))])


def test_neighbours_of_others_are_not_listed(session: Session, device: int, under: int) -> None:
    session.rtnl.execute([neigh.set_message(Neighbour(under, ip_address("10.0.0.9"), MAC))])
    assert neigh.all_neighbours(session, device) == []


@pytest.mark.parametrize("dst", ["10.0.0.3", pytest.param("fd00::3", marks=needs_ipv6)])
def test_forwarding_entries(session: Session, under: int, dst: str) -> None:
    vxlan.add(session, spec(under, "fd00::2" if ":" in dst else "10.0.0.2"))
    device = link.get(session, "vx7").index
    one = Forward(device, OTHER, ip_address(dst))
    session.rtnl.execute([fdb.set_message(one)])
    assert fdb.all_forwards(session, device) == [one]
    shown = spaces.run("bridge", "fdb", "show", "dev", "vx7")
    assert OTHER in shown
    assert f"dst {dst}" in shown
    assert "permanent" in shown
    moved = Forward(device, OTHER, ip_address(dst) + 1)
    session.rtnl.execute([fdb.set_message(moved)])
    assert fdb.all_forwards(session, device) == [moved]
    session.rtnl.execute([fdb.delete_message(moved)])
    assert fdb.all_forwards(session, device) == []
    with pytest.raises(NotFound):
        session.rtnl.execute([fdb.delete_message(moved)])


@pytest.mark.parametrize(
    ("dst", "gateway"), [("10.2.1.0/24", "10.2.1.0"), pytest.param("fd00:2::/64", "fd00:2::", marks=needs_ipv6)]
)
def test_routes_by_a_gateway_that_is_no_neighbour_and_of_a_protocol(
    session: Session, device: int, dst: str, gateway: str
) -> None:
    family = ip_network(dst).version
    one = Route(ip_network(dst), device, ip_address(gateway), protocol=110, onlink=True)
    session.rtnl.execute([route.add_message(one, exclusive=True)])
    found = route.all_routes(session, family, protocol=110)
    assert [(r.dst, r.gateway, r.index, r.protocol, r.onlink) for r in found] == [
        (one.dst, one.gateway, device, 110, True)
    ]
    with pytest.raises(Exists):
        session.rtnl.execute([route.add_message(one, exclusive=True)])
    assert not route.delete(session, Route(ip_network(dst), device, ip_address(gateway), protocol=111))
    looked_up = route.look_up(session, ip_network(dst)[5])
    assert looked_up is not None
    assert (looked_up.index, looked_up.gateway) == (device, one.gateway)
    assert route.delete(session, one)


@needs_ipv6
def test_an_ipv4_route_by_an_ipv6_gateway(session: Session, under: int) -> None:
    one = Route(ip_network("10.2.1.0/24"), under, ip_address("fd00::9"), protocol=110)
    route.add(session, one)
    assert [(r.dst, r.gateway) for r in route.all_routes(session, 4, protocol=110)] == [(one.dst, one.gateway)]
    assert spaces.ip("route", "show", "10.2.1.0/24")[0]["via"] == {"family": "inet6", "host": "fd00::9"}
    session.rtnl.execute([route.replace_message(Route(one.dst, under, ip_address("10.0.0.9"), protocol=110))])
    assert [r.gateway for r in route.all_routes(session, 4, protocol=110)] == [ip_address("10.0.0.9")]


@pytest.fixture
def events(home: object) -> Iterator[RouteEvents]:
    made = RouteEvents()
    yield made
    made.close()


def read(events: RouteEvents, wanted: Callable[[Change], bool]) -> Change:
    """The next event of that kind; events come at once, but a loaded machine may take a while to read them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for change in events.read():
            if wanted(change):
                return change
        time.sleep(0.01)
    raise AssertionError("the event did not come")


def test_events(events: RouteEvents, session: Session, device: int) -> None:
    found = read(events, lambda one: isinstance(one, LinkChange) and one.name == "vx7")
    assert found == LinkChange(device, "vx7", gone=False, up=False)
    neighbour, forward = Neighbour(device, ip_address("10.2.1.0"), MAC), Forward(device, MAC, ip_address("10.0.0.9"))
    session.rtnl.execute([neigh.set_message(neighbour), fdb.set_message(forward)])
    time.sleep(0.05)
    assert not [one for one in events.read() if isinstance(one, NeighbourChange | ForwardChange)], "nobody asked"
    events.watched = frozenset((device,))
    spaces.run("bridge", "fdb", "del", MAC, "dev", "vx7", "dst", "10.0.0.9")
    assert read(events, lambda one: isinstance(one, ForwardChange)) == ForwardChange(forward, gone=True)
    spaces.run("ip", "neigh", "del", "10.2.1.0", "dev", "vx7")
    gone = read(events, lambda one: isinstance(one, NeighbourChange))
    assert isinstance(gone, NeighbourChange)
    assert gone.gone or not gone.neighbour.permanent
    spaces.run("ip", "route", "add", "10.2.1.0/24", "via", "10.2.1.0", "dev", "vx7", "onlink", "proto", "110")
    came = read(events, lambda one: isinstance(one, RouteChange) and one.route.dst == ip_network("10.2.1.0/24"))
    assert isinstance(came, RouteChange)
    assert (came.gone, came.replaced, came.route.protocol, came.route.onlink) == (False, False, 110, True)
    spaces.run("ip", "route", "replace", "10.2.1.0/24", "dev", "br0")
    other = read(events, lambda one: isinstance(one, RouteChange) and one.route.dst == ip_network("10.2.1.0/24"))
    assert isinstance(other, RouteChange)
    assert other.replaced
    spaces.run("ip", "address", "add", "10.2.0.0/32", "dev", "vx7")
    assert read(events, lambda one: isinstance(one, AddressChange)) == AddressChange(device, gone=False)
    spaces.run("ip", "link", "delete", "vx7")
    went = read(events, lambda one: isinstance(one, LinkChange) and one.gone)
    assert went == LinkChange(device, "vx7", gone=True, up=False)
