"""Routes with everything a CNI result can ask for, as the kernel has them afterwards."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from kernel import addr, link, route
from kernel.errors import Exists, KernelError
from kernel.route import Route
from kernel.session import Session
from tests.hosts import IPV6
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")


@pytest.fixture
def index(session: Session) -> int:
    """A bridge br0 with 10.0.0.2/24 and fd00::2/64."""
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    index = link.get(session, "br0").index
    addr.add(session, index, ip_interface("10.0.0.2/24"))
    if IPV6:
        addr.add(session, index, ip_interface("fd00::2/64"))
    return index


def shown(family: str, destination: str, table: str = "all") -> list[dict[str, object]]:
    found = spaces.ip(family, "-d", "route", "show", "table", table)
    return [entry for entry in found if entry["dst"] == destination and entry.get("dev") == "br0"]


def wanted(index: int, dst: str, gateway: str = "", **more: int | None) -> Route:
    return Route(ip_network(dst), index, ip_address(gateway) if gateway else None, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dst", "gateway", "more", "expected"),
    [
        ("0.0.0.0/0", "10.0.0.1", {}, {"dst": "default", "gateway": "10.0.0.1", "scope": "global"}),
        ("192.0.2.0/24", "", {}, {"scope": "link"}),
        ("192.0.2.0/24", "10.0.0.1", {"priority": 42}, {"metric": 42}),
        ("192.0.2.0/24", "10.0.0.1", {"table": 100}, {"table": "100"}),
        ("192.0.2.0/24", "10.0.0.1", {"table": 70000}, {"table": "70000"}),
        ("192.0.2.0/24", "", {"scope": 0}, {"scope": "global"}),
        ("192.0.2.9/32", "10.0.0.1", {"mtu": 1300, "advmss": 1200}, {"metrics": [{"mtu": 1300, "advmss": 1200}]}),
    ],
)
def test_ipv4(
    session: Session, index: int, dst: str, gateway: str, more: dict[str, int], expected: dict[str, object]
) -> None:
    one = wanted(index, dst, gateway, **more)
    route.add(session, one)
    name = {"0.0.0.0/0": "default", "192.0.2.9/32": "192.0.2.9"}.get(dst, dst)
    entry = shown("-4", name)[0]
    assert {key: entry.get(key, "global" if key == "scope" else None) for key in expected} == expected
    read = [found for found in route.all_routes(session, 4) if found.dst == one.dst]
    assert len(read) == 1
    assert (read[0].gateway, read[0].index, read[0].priority) == (one.gateway, index, one.priority)
    assert (read[0].mtu, read[0].advmss) == (one.mtu, one.advmss)
    assert read[0].table == (one.table or route.MAIN)
    with pytest.raises(Exists):
        route.add(session, one)
    assert route.delete(session, one)
    assert not route.delete(session, one)
    assert shown("-4", name) == []


@needs_ipv6
@pytest.mark.parametrize(
    ("dst", "gateway", "more", "expected"),
    [
        ("::/0", "fd00::1", {}, {"dst": "default", "gateway": "fd00::1", "metric": 1024}),
        ("2001:db8::/32", "", {"priority": 7}, {"metric": 7}),
        ("2001:db8::/32", "fd00::1", {"table": 70000}, {"table": "70000"}),
        ("2001:db8::/32", "fd00::1", {"mtu": 1300, "advmss": 1200}, {"metrics": [{"mtu": 1300, "advmss": 1200}]}),
    ],
)
def test_ipv6(
    session: Session, index: int, dst: str, gateway: str, more: dict[str, int], expected: dict[str, object]
) -> None:
    one = wanted(index, dst, gateway, **more)
    route.add(session, one)
    entry = shown("-6", {"::/0": "default"}.get(dst, dst))[0]
    assert {key: entry.get(key) for key in expected} == expected
    read = next(found for found in route.all_routes(session, 6) if found.dst == one.dst)
    assert (read.gateway, read.index, read.mtu, read.advmss) == (one.gateway, index, one.mtu, one.advmss)
    with pytest.raises(Exists):
        route.add(session, one)
    assert route.delete(session, one)
    assert not route.delete(session, one)


@pytest.mark.parametrize(
    ("version", "dst", "first", "second"),
    [
        (4, "192.0.2.0/24", "10.0.0.1", "10.0.0.3"),
        pytest.param(6, "2001:db8::/32", "fd00::1", "fd00::3", marks=needs_ipv6),
    ],
)
def test_two_next_hops_are_both_listed(
    session: Session, index: int, version: int, dst: str, first: str, second: str
) -> None:
    # IPv6 makes one route with two next hops of them, IPv4 keeps two routes.
    route.add(session, wanted(index, dst, first))
    route.add(session, wanted(index, dst, second))
    found = [(one.gateway, one.index) for one in route.all_routes(session, version) if one.dst == ip_network(dst)]
    assert sorted(found, key=str) == [(ip_address(first), index), (ip_address(second), index)]


def test_only_unicast_routes_are_listed(session: Session, index: int) -> None:
    spaces.run("ip", "route", "add", "blackhole", "198.51.100.0/24")
    found = {str(one.dst) for one in route.all_routes(session, 4)}
    assert "198.51.100.0/24" not in found
    assert "10.0.0.0/24" in found
    assert "10.0.0.255/32" not in found


def test_a_gateway_out_of_reach_is_refused_in_the_kernels_words(session: Session, index: int) -> None:
    with pytest.raises(KernelError, match=r"add route 0\.0\.0\.0/0 via 192\.0\.2\.1 .*Nexthop has invalid gateway"):
        route.add(session, wanted(index, "0.0.0.0/0", "192.0.2.1"))
    with pytest.raises(KernelError):
        route.add(session, wanted(4711, "0.0.0.0/0", "10.0.0.1"))
