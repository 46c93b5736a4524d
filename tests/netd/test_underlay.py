"""Which link and address other hosts are reached by."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from kernel.session import Session
from netd.underlay import Choice, UnderlayError, choose
from tests.hosts import IPV6
from tests.kernel import spaces

pytestmark = pytest.mark.kernel


@pytest.fixture
def session() -> Iterator[Session]:
    """eth0 with 10.0.0.1, eth1 with 10.1.0.1 and 10.1.0.9 and the default route, eth2 down, eth3 without addresses."""
    with spaces.fresh() as space, spaces.inside(space), Session() as opened:
        spaces.run("ip", "link", "set", "lo", "up")
        for number in range(4):
            spaces.run("ip", "link", "add", f"eth{number}", "type", "bridge")
            if number != 2:
                spaces.run("ip", "link", "set", f"eth{number}", "up")
        for address, device in (("10.0.0.1/24", 0), ("10.1.0.1/24", 1), ("10.1.0.9/24", 1), ("10.2.0.1/24", 2)):
            spaces.run("ip", "address", "add", address, "dev", f"eth{device}")
        spaces.run("ip", "route", "add", "default", "via", "10.1.0.254", "metric", "5")
        spaces.run("ip", "route", "add", "default", "via", "10.0.0.254", "metric", "9")
        spaces.run("ip", "route", "add", "192.0.2.0/24", "via", "10.0.0.254")
        if IPV6:
            spaces.run("ip", "address", "add", "fd00::1/64", "dev", "eth0", "nodad")
            spaces.run("ip", "address", "add", "fe80::77/64", "dev", "eth3", "nodad")
        yield opened


ADDRESS6 = [ip_address("fd00::1")] if IPV6 else []


@pytest.mark.parametrize(
    ("choice", "link", "public"),
    [
        (Choice(), "eth1", [ip_address("10.1.0.1")]),
        (Choice(interface="eth0"), "eth0", [ip_address("10.0.0.1"), *ADDRESS6]),
        (Choice(interface="10.1.0.9"), "eth1", [ip_address("10.1.0.9")]),
        (Choice(interface_regex="eth[02]"), "eth0", [ip_address("10.0.0.1"), *ADDRESS6]),
        (Choice(interface_regex=r"10\.1\..*"), "eth1", [ip_address("10.1.0.1")]),
        (Choice(can_reach=ip_address("192.0.2.7")), "eth0", [ip_address("10.0.0.1"), *ADDRESS6]),
        (Choice(public_ip=(ip_address("10.0.0.1"),)), "eth0", [ip_address("10.0.0.1")]),
        (Choice(interface="eth1", public_ip=(ip_address("203.0.113.5"),)), "eth1", [ip_address("203.0.113.5")]),
    ],
)
def test_choice(session: Session, choice: Choice, link: str, public: list[object]) -> None:
    found = choose(session, choice)
    assert (found.link, list(found.public)) == (link, public)


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_ipv6(session: Session) -> None:
    by_address = choose(session, Choice(interface="fd00::1"))
    assert [str(one) for one in by_address.public] == ["fd00::1", "10.0.0.1"], "what was named comes first"
    only = choose(session, Choice(public_ip=(ip_address("fd00::1"),)))
    assert (only.link, [str(one) for one in only.public]) == ("eth0", ["fd00::1"])
    spaces.run("ip", "address", "flush", "dev", "eth1")
    spaces.run("ip", "address", "flush", "dev", "eth0")
    spaces.run("ip", "address", "add", "fd00::1/64", "dev", "eth0", "nodad")
    spaces.run("ip", "-6", "route", "add", "default", "via", "fd00::fe")
    assert choose(session, Choice()).link == "eth0"


def test_behind_a_translator_tunnels_begin_at_the_links_address(session: Session) -> None:
    found = choose(session, Choice(interface="eth1", public_ip=(ip_address("203.0.113.5"),)))
    assert [str(one) for one in found.local] == ["10.1.0.1"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice(interface="eth9"), "interface: there is no link eth9; there are eth0, eth1, eth2, eth3, lo"),
        (Choice(interface="10.9.9.9"), "interface: no link has the address 10.9.9.9"),
        (Choice(interface="eth2"), "the link eth2, by which other hosts are reached, is down; bring it up"),
        (Choice(interface="eth3"), "the link eth3, by which other hosts are reached, has no address; give it one"),
        (Choice(interface_regex="wlan.*"), "no link that is up has a name or an address that 'wlan.*' matches"),
        (
            Choice(interface="eth1", public_ip=(ip_address("fd00::9"),)),
            "the link eth1 has no IPv6 address that packets",
        ),
    ],
)
def test_refusals(session: Session, choice: Choice, said: str) -> None:
    with pytest.raises(UnderlayError) as caught:
        choose(session, choice)
    assert said in str(caught.value)


def test_nothing_leads_anywhere(session: Session) -> None:
    spaces.run("ip", "route", "del", "default", "metric", "5")
    spaces.run("ip", "route", "del", "default", "metric", "9")
    with pytest.raises(UnderlayError, match="no default route that tells which link leads to others; name one with"):
        choose(session, Choice())
    spaces.run("ip", "route", "del", "192.0.2.0/24")
    with pytest.raises(UnderlayError, match=r"can_reach: there is no route to 192\.0\.2\.7"):
        choose(session, Choice(can_reach=ip_address("192.0.2.7")))


def test_a_default_route_that_moves_moves_no_tunnel(session: Session) -> None:
    before = choose(session, Choice())
    spaces.run("ip", "route", "del", "default", "metric", "5")
    assert choose(session, Choice()).link == "eth0"
    assert choose(session, Choice(), before) == before
    spaces.run("ip", "link", "set", "eth1", "mtu", "1400")
    assert choose(session, Choice(), before).mtu == 1400
    spaces.run("ip", "link", "set", "eth1", "down")
    assert choose(session, Choice(), before).link == "eth0"
