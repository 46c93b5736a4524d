"""Addresses on a link: added, listed, removed, and as `ip` shows them."""

from __future__ import annotations

from ipaddress import ip_interface

import pytest

from kernel import addr, link, sysctl
from kernel.errors import Exists, KernelError, NotFound
from kernel.session import Session
from tests.hosts import IPV6, wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")


@pytest.fixture
def index(session: Session) -> int:
    """A bridge br0 that addresses can be put on."""
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    return link.get(session, "br0").index


def shown(family: str) -> list[dict[str, object]]:
    return [
        {key: entry.get(key) for key in ("local", "prefixlen", "broadcast", "nodad", "tentative") if entry.get(key)}
        for entry in spaces.ip(family, "address", "show", "dev", "br0")[0]["addr_info"]
        if entry["scope"] != "link"
    ]


@pytest.mark.parametrize(
    ("text", "broadcast"),
    [("10.1.2.3/16", "10.1.255.255"), ("10.1.2.2/31", None), ("10.1.2.3/32", None), ("10.9.9.9/8", "10.255.255.255")],
)
def test_ipv4(session: Session, index: int, text: str, broadcast: str | None) -> None:
    address = ip_interface(text)
    addr.add(session, index, address)
    entry = shown("-4")[0]
    assert f"{entry['local']}/{entry['prefixlen']}" == text
    assert entry.get("broadcast") == broadcast
    assert [one.interface for one in addr.all_addresses(session, index, 4)] == [address]
    with pytest.raises(Exists, match=f"add address {text}"):
        addr.add(session, index, address)
    assert addr.delete(session, index, address)
    assert not addr.delete(session, index, address)
    assert addr.all_addresses(session, index, 4) == []


@needs_ipv6
def test_ipv6_is_usable_at_once(session: Session, index: int) -> None:
    address = ip_interface("fd00::2/64")
    addr.add(session, index, address)
    found = next(one for one in addr.all_addresses(session, index, 6) if one.interface == address)
    assert found.flags & addr.NODAD
    assert not found.tentative
    assert not found.duplicate
    with pytest.raises(Exists):
        addr.add(session, index, address)
    assert addr.delete(session, index, address)
    assert not addr.delete(session, index, address)


@needs_ipv6
def test_ipv6_with_detection_is_tentative_first(session: Session, index: int, container: Space) -> None:
    link.add_veth(session, link.VethSpec("v0", "v1", container.fd), index)
    sysctl.write("1", "ipv6", "conf", "br0", "accept_dad")
    with spaces.inside(container):
        spaces.run("ip", "link", "set", "v1", "up")
    wait_until(lambda: link.get(session, "br0").operstate == link.OPER_UP, "a carrier")
    addr.add(session, index, ip_interface("fd00::2/64"), dad=True)

    def found() -> addr.Address:
        present = addr.all_addresses(session, index, 6)
        return next(one for one in present if one.interface == ip_interface("fd00::2/64"))

    assert found().tentative
    wait_until(lambda: not found().tentative, "the end of duplicate address detection")
    assert not found().duplicate


def test_of_one_link_and_of_all(session: Session, index: int) -> None:
    link.add_bridge(session, "br1", "02:00:00:00:00:02")
    other = link.get(session, "br1").index
    addr.add(session, index, ip_interface("10.0.0.1/24"))
    addr.add(session, other, ip_interface("10.0.1.1/24"))
    assert [str(one.interface) for one in addr.all_addresses(session, other)][:1] == ["10.0.1.1/24"]
    everywhere = {str(one.interface) for one in addr.all_addresses(session, family=4)}
    assert everywhere == {"127.0.0.1/8", "10.0.0.1/24", "10.0.1.1/24"}
    assert addr.all_addresses(session, 4711) == []


def test_what_the_kernel_refuses(session: Session, index: int) -> None:
    with pytest.raises(NotFound):
        addr.add(session, 4711, ip_interface("10.0.0.1/24"))
    assert not addr.delete(session, 4711, ip_interface("10.0.0.1/24"))
    if IPV6:
        with pytest.raises(KernelError, match="add address ff02::1/64"):
            addr.add(session, index, ip_interface("ff02::1/64"))
