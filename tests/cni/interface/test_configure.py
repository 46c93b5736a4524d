"""What a result becomes on an interface; the order in which the kernel is asked; duplicates."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

import pytest

from cni.errors import CniError
from cni.interface.configure import configure, first_gateway, wanted_route
from cni.result import IPConfig, Result, Route
from kernel import addr, link, netns, route
from kernel.link import VethSpec
from kernel.session import Session
from tests.hosts import IPV6, wait_until
from tests.kernel import spaces
from tests.kernel.conftest import container, home, session  # noqa: F401 - fixtures
from tests.kernel.spaces import Space

IPS = (IPConfig("10.1.0.2/16", "10.1.0.1"), IPConfig("10.2.0.2/16", "10.2.0.1"), IPConfig("fd00::2/64", "fd00::1"))
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")


def test_the_first_gateway_of_each_family() -> None:
    assert first_gateway(IPS, 4) == ip_address("10.1.0.1")
    assert first_gateway(IPS, 6) == ip_address("fd00::1")
    assert first_gateway((IPConfig("10.1.0.2/16"),), 4) is None
    assert first_gateway((), 6) is None


@pytest.mark.parametrize(
    ("wish", "gateway"),
    [
        (Route("0.0.0.0/0"), "10.1.0.1"),
        (Route("::/0"), "fd00::1"),
        (Route("192.0.2.1/24", "10.1.0.9"), "10.1.0.9"),
        (Route("192.0.2.0/24", scope=0), "10.1.0.1"),
        (Route("192.0.2.0/24", scope=253), None),
        (Route("192.0.2.0/24", scope=254), None),
    ],
)
def test_a_route_without_a_gateway_takes_the_first(wish: Route, gateway: str | None) -> None:
    found = wanted_route(7, wish, IPS)
    assert found.gateway == (ip_address(gateway) if gateway else None)
    assert (found.index, found.scope) == (7, wish.scope)


@pytest.mark.parametrize(
    "wish",
    [
        *(Route("192.0.2.0/24", **{key: 2**32}) for key in ("mtu", "advmss", "priority", "table")),  # type: ignore[arg-type]
        Route("192.0.2.0/24", scope=256),
        Route("192.0.2.0/24", mtu=-1),
        Route("192.0.2.0/24", "fd00::1"),
        Route("2001:db8::/32", "10.1.0.1"),
    ],
)
def test_values_that_no_route_has(wish: Route) -> None:
    with pytest.raises(CniError, match="route to ") as caught:
        wanted_route(7, wish, IPS)
    assert caught.value.code == 7


@pytest.mark.kernel
class TestInAContainer:
    """eth0 of a pair whose other end is a port of br0."""

    def configured(self, session: Session, container: Space, result: Result, *, dad: bool = False) -> None:  # noqa: F811
        if link.find(session, "br0") is None:
            link.add_bridge(session, "br0", "02:00:00:00:00:01")
        with netns.opened(container.path) as where, session.visit(where) as inside:
            spec = VethSpec(f"v{where.identity.inode}", "eth0", where.fd)
            link.add_veth(session, spec, link.get(session, "br0").index)
            configure(inside, "eth0", link.get(inside, "eth0").index, result, dad=dad)

    def test_addresses_then_up_then_routes(self, session: Session, container: Space) -> None:  # noqa: F811
        ips = IPS if IPV6 else IPS[:2]
        routes = (Route("0.0.0.0/0"), Route("192.0.2.0/24", "10.2.0.9", mtu=1300, priority=5))
        self.configured(session, container, Result((), ips, routes))
        with spaces.inside(container):
            (eth,) = spaces.ip("address", "show", "eth0")
            assert "UP" in eth["flags"]
            present = {f"{a['local']}/{a['prefixlen']}" for a in eth["addr_info"] if a["scope"] == "global"}
            assert present == {ip.address for ip in ips}
            found = {r["dst"]: r for r in spaces.ip("route")}
            assert found["default"]["gateway"] == "10.1.0.1"
            assert (found["192.0.2.0/24"]["metric"], found["192.0.2.0/24"]["gateway"]) == (5, "10.2.0.9")

    def test_without_addresses_it_is_only_up(self, session: Session, container: Space) -> None:  # noqa: F811
        self.configured(session, container, Result())
        with spaces.inside(container):
            assert "UP" in spaces.ip("link", "show", "eth0")[0]["flags"]

    @needs_ipv6
    def test_ipv6_that_the_runtime_switched_off_is_on_where_it_is_needed(
        self,
        session: Session,  # noqa: F811
        container: Space,  # noqa: F811
    ) -> None:
        with spaces.inside(container):
            for name in ("all", "default", "lo"):
                spaces.run("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        self.configured(session, container, Result((), IPS))
        with spaces.inside(container):
            (eth,) = spaces.ip("-6", "address", "show", "eth0")
            assert "fd00::2" in {a["local"] for a in eth["addr_info"]}
            assert spaces.run("cat", "/proc/sys/net/ipv6/conf/lo/disable_ipv6") == "0\n"

    @needs_ipv6
    def test_addresses_stay_when_the_link_goes_down(self, session: Session, container: Space) -> None:  # noqa: F811
        self.configured(session, container, Result((), IPS))
        with spaces.inside(container):
            spaces.run("ip", "link", "set", "eth0", "down")
            spaces.run("ip", "link", "set", "eth0", "up")
            assert "fd00::2" in {a["local"] for a in spaces.ip("-6", "address", "show", "eth0")[0]["addr_info"]}

    @needs_ipv6
    def test_detection_waits_and_finds_a_duplicate(self, session: Session, container: Space) -> None:  # noqa: F811
        with spaces.fresh() as second:
            self.configured(session, container, Result((), (IPS[2],)), dad=True)
            with netns.opened(container.path) as where, session.visit(where) as inside:
                (found,) = [
                    a for a in addr.all_addresses(inside, family=6) if a.interface == ip_interface("fd00::2/64")
                ]
                assert not found.tentative
            with pytest.raises(CniError, match="fd00::2/64 of eth0 is in use") as caught:
                self.configured(session, second, Result((), (IPS[2],)), dad=True)
            assert caught.value.code == 101

    @needs_ipv6
    def test_detection_that_never_ends_is_said(
        self,
        session: Session,  # noqa: F811
        container: Space,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("cni.interface.configure.DAD_TIMEOUT_S", 0.2)
        with netns.opened(container.path) as where, session.visit(where) as inside:
            link.add_veth(session, VethSpec("v0", "eth0", where.fd))
            link.set_down(session, link.get(session, "v0").index)  # no carrier: nothing can be asked
            with pytest.raises(CniError, match="still tentative") as caught:
                configure(inside, "eth0", link.get(inside, "eth0").index, Result((), (IPS[2],)), dad=True)
        assert caught.value.code == 11

    def test_a_refused_route_is_told_by_its_words(self, session: Session, container: Space) -> None:  # noqa: F811
        with pytest.raises(CniError, match=r"add route 192\.0\.2\.0/24 via 172\.16\.0\.1") as caught:
            self.configured(session, container, Result((), IPS[:1], (Route("192.0.2.0/24", "172.16.0.1"),)))
        assert caught.value.code == 7

    def test_arp_is_announced_when_the_interface_is_told_to(self, session: Session, container: Space) -> None:  # noqa: F811
        self.configured(session, container, Result((), IPS[:1]))
        with spaces.inside(container):
            assert spaces.run("cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify") == "1\n"
        wait_until(lambda: link.get(session, "br0").operstate == link.OPER_UP, "a carrier")
        assert all(one.dst.version == 4 for one in route.all_routes(session, 4))
