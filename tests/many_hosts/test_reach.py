"""Every container reaches every other, whatever the backend and the family of the underlay."""

from __future__ import annotations

import pytest

from tests.hosts import IPV6
from tests.many_hosts.fleet import Fleet, routes_of_netd, state_of_netd

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
FAMILIES = [4, pytest.param(6, marks=needs_ipv6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_vxlan(family: int) -> None:
    with Fleet("vxlan", family) as fleet:
        fleet.start()
        containers = [fleet.container(number) for number in (1, 2, 3)]
        fleet.all_reach_all(containers)
        host = fleet.host(1)
        device = host.links()["nl-vx1"]
        overhead = 50 if family == 4 else 70
        assert device["mtu"] == 1500 - overhead
        assert device["linkinfo"]["info_data"]["learning"] is False
        assert "10.2.1.0/32" in host.addresses()["nl-vx1"]
        assert [(one["dst"], one["gateway"], one["dev"], one["flags"]) for one in routes_of_netd(host)] == [
            (f"10.2.{number}.0/24", f"10.2.{number}.0", "nl-vx1", ["onlink"]) for number in (2, 3)
        ]
        # For each peer one route and one neighbour a subnet, one forwarding entry, nothing more; and the own address.
        subnets = len(fleet.subnets(1))
        assert len(state_of_netd(host)) == 2 * (2 * subnets + 1) + subnets
        # A host reaches containers of others, too, and speaks from within its own subnet then.
        host.ping(containers[1].ipv4)
        status = fleet.netd(1).status()
        assert list(status.problems) == []
        assert [(peer.name, peer.wanted, peer.present) for peer in status.peers] == [
            (name, 2 * subnets + 1, 2 * subnets + 1) for name in ("host2", "host3")
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_host_gw(family: int) -> None:
    # Linux has no IPv6 routes by an IPv4 gateway; IPv4 by an IPv6 gateway it has.
    with Fleet("host-gw", family, ipv6_containers=family == 6) as fleet:
        fleet.start()
        containers = [fleet.container(number) for number in (1, 2, 3)]
        fleet.all_reach_all(containers)
        host = fleet.host(1)
        assert not [name for name in host.links() if name.startswith("nl-vx")]
        gateways = [one.get("gateway") or one["via"]["host"] for one in routes_of_netd(host)]
        assert gateways == [fleet.underlay_address(number) for number in (2, 3)]
        assert fleet.netd(1).status().networks[0].mtu == 1500


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_over_two_segments(family: int) -> None:
    with Fleet("direct", family, segments=(0, 0, 1), ipv6_containers=family == 6) as fleet:
        fleet.start()
        containers = [fleet.container(number) for number in (1, 2, 3)]
        fleet.all_reach_all(containers)
        ways = {one["dst"]: one["dev"] for one in routes_of_netd(fleet.host(1))}
        assert ways == {"10.2.2.0/24": "eth0", "10.2.3.0/24": "nl-vx1"}
        ways = {one["dst"]: one["dev"] for one in routes_of_netd(fleet.host(3))}
        assert ways == {"10.2.1.0/24": "nl-vx1", "10.2.2.0/24": "nl-vx1"}


def test_none_makes_nothing() -> None:
    with Fleet("none") as fleet:
        before = [set(host.links()) for host in fleet.hosts]
        fleet.start()
        assert [state_of_netd(host) for host in fleet.hosts] == [[], [], []]
        assert [set(host.links()) for host in fleet.hosts] == before


def test_host_gw_over_two_segments_says_what_is_wrong() -> None:
    with Fleet("host-gw", segments=(0, 0, 1), ipv6_containers=False) as fleet:
        fleet.start()
        problems = list(fleet.netd(1).status().problems)
        assert len(problems) == 1
        assert "10.2.3.0/24 of host3: 192.168.78.13 is not on the segment of eth0" in problems[0]
        assert "use the backend direct or vxlan" in problems[0]
        assert [one["dst"] for one in routes_of_netd(fleet.host(1))] == ["10.2.2.0/24"]
