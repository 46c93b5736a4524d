"""Each backend as a pure function: which entries lead to a peer. One suite for all that is the same, then each one."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from netd.fabric.base import Place, UnreachableError
from netd.fabric.registry import BACKENDS, TUNNELS
from netd.values import Address, Device, Forward, Neighbour, Network, Node, Route, Underlay, vtep_mac

V4, V6 = ip_address("10.0.0.1"), ip_address("fd00::1")
UNDERLAY = Underlay("eth0", 2, 1500, (ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64")), (V4, V6), (V4, V6))
OWN = Node("a", (V4, V6), (ip_network("10.2.1.0/24"), ip_network("fd02:1::/64")), vtep_mac("a"))
PEER = Node(
    "b",
    (ip_address("10.0.0.2"), ip_address("fd00::2")),
    (ip_network("10.2.2.0/24"), ip_network("fd02:2::/64")),
    vtep_mac("b"),
)
FAR = replace(PEER, addresses=(ip_address("10.9.0.2"),))


def place(backend: str, underlay: Underlay = UNDERLAY, **more: object) -> Place:
    network = Network("n", (), backend, 7, 4789, 0, True, False)
    return Place(replace(network, **more), OWN, OWN.subnets, underlay)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
def test_contract(name: str) -> None:
    backend, where = BACKENDS[name], place(name)
    entries = [*backend.own(where), *backend.towards(where, PEER, PEER.subnets)]
    again = [*backend.own(where), *backend.towards(where, PEER, PEER.subnets)]
    assert entries == again, "the same for the same"
    assert len({one.key for one in entries}) == len(entries), "one entry for each key"
    assert not list(backend.towards(where, PEER, [])), "no subnets, nothing"
    assert backend.mtu(place(name, mtu=1400)) == 1400
    assert (1280 <= backend.mtu(where) <= UNDERLAY.mtu) and isinstance(backend.mtu(where), int)
    devices = {one.name for one in entries if isinstance(one, Device)}
    assert bool(devices) == (name in TUNNELS)
    leads = {one.device for one in entries if not isinstance(one, Device)}
    assert leads <= devices | {"eth0"}, "each entry is on a link that is there"
    routed = {one.dst for one in entries if isinstance(one, Route)}
    assert routed == (set() if name == "none" else set(PEER.subnets))


def test_vxlan() -> None:
    where, vxlan = place("vxlan"), BACKENDS["vxlan"]
    assert list(vxlan.own(where)) == [
        Device("nl-vx7", 7, V4, 4789, 2, vtep_mac("a"), 1450, True, False),
        Address("nl-vx7", ip_interface("10.2.1.0/32")),
        Address("nl-vx7", ip_interface("fd02:1::/128")),
    ]
    assert list(vxlan.towards(where, PEER, PEER.subnets)) == [
        Forward("nl-vx7", PEER.mac, ip_address("10.0.0.2")),
        Neighbour("nl-vx7", ip_address("10.2.2.0"), PEER.mac),
        Route("nl-vx7", ip_network("10.2.2.0/24"), ip_address("10.2.2.0"), onlink=True),
        Neighbour("nl-vx7", ip_address("fd02:2::"), PEER.mac),
        Route("nl-vx7", ip_network("fd02:2::/64"), ip_address("fd02:2::"), onlink=True),
    ]


def test_vxlan_over_ipv6() -> None:
    underlay = replace(UNDERLAY, public=(V6,), local=(V6,), mtu=9000)
    where, vxlan = place("vxlan", underlay), BACKENDS["vxlan"]
    assert vxlan.mtu(where) == 8930
    assert next(iter(vxlan.towards(where, PEER, PEER.subnets))) == Forward("nl-vx7", PEER.mac, ip_address("fd00::2"))
    with pytest.raises(UnreachableError, match="that host has no IPv6 address; give it one"):
        vxlan.towards(where, FAR, FAR.subnets)


def test_vxlan_mtu_is_never_more_than_the_underlay_allows() -> None:
    assert BACKENDS["vxlan"].mtu(place("vxlan", mtu=1500)) == 1450


def test_a_peer_without_a_tunnels_end_is_reached_by_a_route() -> None:
    entries = list(BACKENDS["vxlan"].towards(place("vxlan"), replace(PEER, takes_vxlan=False), PEER.subnets[:1]))
    assert entries == [Route("eth0", PEER.subnets[0], ip_address("10.0.0.2"), onlink=False)]


def test_host_gw() -> None:
    where, host_gw = place("host-gw"), BACKENDS["host-gw"]
    assert list(host_gw.towards(where, PEER, PEER.subnets)) == [
        Route("eth0", ip_network("10.2.2.0/24"), ip_address("10.0.0.2"), onlink=False),
        Route("eth0", ip_network("fd02:2::/64"), ip_address("fd00::2"), onlink=False),
    ]
    only6 = replace(PEER, addresses=(ip_address("fd00::2"),))
    assert [one.gateway for one in host_gw.towards(where, only6, PEER.subnets) if isinstance(one, Route)] == [
        ip_address("fd00::2"),
        ip_address("fd00::2"),
    ]
    only4 = replace(PEER, addresses=(ip_address("10.0.0.2"),))
    with pytest.raises(UnreachableError, match="a route needs an IPv6 address of that host"):
        host_gw.towards(where, only4, PEER.subnets)
    with pytest.raises(
        UnreachableError, match=r"10\.9\.0\.2 is not on the segment of eth0 \(10\.0\.0\.1/24, fd00::1/64"
    ):
        host_gw.towards(where, FAR, FAR.subnets[:1])


def test_direct_decides_for_each_subnet() -> None:
    where, direct = place("direct"), BACKENDS["direct"]
    only4 = replace(PEER, addresses=(ip_address("10.0.0.2"),))
    routes = {one.dst: one.device for one in direct.towards(where, only4, PEER.subnets) if isinstance(one, Route)}
    assert routes == {PEER.subnets[0]: "eth0", PEER.subnets[1]: "nl-vx7"}
    routes = {one.dst: one.device for one in direct.towards(where, FAR, FAR.subnets) if isinstance(one, Route)}
    assert set(routes.values()) == {"nl-vx7"}


def test_the_mac_of_a_node_is_its_own_and_stays() -> None:
    macs = {vtep_mac(f"host{number}") for number in range(5000)}
    assert len(macs) == 5000
    assert vtep_mac("host2") == "22:07:46:f6:45:1e", "another one would cut every host off from those not yet upgraded"
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs), "locally administered, one host's"
