"""Who has a say in packets that a tunnel sends: rules that may concern them, and those that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from kernel import outgoing
from kernel.outgoing import Sent
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import run

pytestmark = pytest.mark.kernel

SENT = Sent("eth0", IPv4Address("192.168.9.1"), 4789)
OUT = "type filter hook output priority 0;"
POST = "type nat hook postrouting priority 100;"


@pytest.fixture
def session() -> Iterator[Session]:
    with ExitStack() as stack:
        stack.enter_context(spaces.inside(stack.enter_context(spaces.fresh())))
        yield stack.enter_context(Session())


@pytest.mark.parametrize(
    ("family", "chains"),
    [
        ("ip", f"chain c {{ {OUT} udp dport 4789 drop; }}"),
        ("inet", f"chain c {{ {OUT} udp dport 4789 counter drop; }}"),
        ("inet", f"chain c {{ {OUT} ip daddr 192.168.9.2 drop; }}"),
        ("inet", f"chain c {{ {OUT} ip saddr 192.168.0.0/16 drop; }}"),
        ("inet", f"chain c {{ {OUT} ip saddr != 192.168.9.2 drop; }}"),
        ("inet", f"chain c {{ {OUT} oifname eth0 reject; }}"),
        ("inet", f'chain c {{ {OUT} oifname "eth*" drop; }}'),
        ("inet", f"chain c {{ {OUT} meta l4proto != tcp drop; }}"),
        ("inet", f"chain c {{ {OUT} meta mark set 1; }}"),
        ("inet", f"chain c {{ {OUT} log ip saddr 10.0.0.1; }}"),
        ("inet", f"chain c {{ {OUT} ip dscp set 10; }}"),
        ("inet", f"chain c {{ {OUT} fib daddr type unicast drop; }}"),
        ("inet", f"chain c {{ {OUT} policy drop; udp dport 4789 accept; }}"),
        ("inet", f"map m {{ type inet_service : verdict; }}; chain c {{ {OUT} udp dport vmap @m; }}"),
        ("inet", f"chain d {{ drop; }}; chain c {{ {OUT} oifname eth0 jump d; }}"),
        ("inet", f"chain e {{ drop; }}; chain d {{ udp dport 4789 goto e; }}; chain c {{ {OUT} jump d; }}"),
        ("ip", "chain c { type route hook output priority 0; udp dport 4789 meta mark set 3; }"),
        ("ip", f"chain c {{ {POST} oifname eth0 masquerade; }}"),
        ("ip", f"chain c {{ {POST} ip saddr 192.168.9.0/24 snat to 192.0.2.1; }}"),
    ],
)
def test_rules_that_may_concern_them(session: Session, family: str, chains: str) -> None:
    run("nft", f"table {family} test {{ {chains}; }}")
    assert outgoing.of_rules(session, [SENT]) == f"chain c of table {family} test"


@pytest.mark.parametrize(
    ("family", "chains"),
    [
        ("inet", f"chain c {{ {OUT} }}"),
        (
            "inet",
            f"chain c {{ {OUT} ip saddr 172.17.0.0/16 drop; ip saddr 10.1.2.3 drop; ip saddr 10.4.0.0/14 drop; }}",
        ),
        ("inet", f"chain c {{ {OUT} ip saddr != 192.168.0.0/16 drop; }}"),
        ("inet", f"chain c {{ {OUT} tcp dport 80 drop; udp dport 53 reject; ip protocol icmp drop; }}"),
        ("inet", f"chain c {{ {OUT} meta nfproto ipv6 drop; ip6 daddr fd00::/8 drop; }}"),
        ("inet", f'chain c {{ {OUT} oifname "docker0" drop; oifname != "eth0" drop; oifname "eth01" drop; }}'),
        ("inet", f'chain c {{ {OUT} iifname "eth0" drop; fib daddr type local drop; }}'),
        ("inet", f"chain c {{ {OUT} ct state established,related counter accept; }}"),
        ("inet", f"chain d {{ ip saddr 10.0.0.1 drop; return; }}; chain c {{ {OUT} oifname eth0 jump d; }}"),
        ("ip", "chain c { type filter hook output priority raw; udp dport 4789 notrack; }"),
        ("ip", "chain c { type filter hook input priority 0; policy drop; }"),
        ("ip", "chain c { type filter hook forward priority 0; policy drop; udp dport 4789 drop; }"),
        ("ip6", f"chain c {{ {OUT} policy drop; }}"),
        # Docker's.
        ("ip", f'chain c {{ {POST} ip saddr 172.17.0.0/16 oifname != "docker0" counter masquerade; }}'),
        ("ip", f"chain c {{ {POST} ip saddr 172.17.0.2 ip daddr 172.17.0.2 tcp dport 80 masquerade; }}"),
    ],
)
def test_rules_that_cannot(session: Session, family: str, chains: str) -> None:
    run("nft", f"table {family} test {{ {chains}; }}")
    assert outgoing.of_rules(session, [SENT]) == ""


def test_rules_of_the_iptables_command(session: Session) -> None:
    run(
        "iptables-nft",
        "-t",
        "nat",
        "-A",
        "POSTROUTING",
        "-s",
        "172.17.0.0/16",
        "!",
        "-o",
        "docker0",
        "-j",
        "MASQUERADE",
    )
    run("iptables-nft", "-t", "nat", "-N", "DOCKER")
    run("iptables-nft", "-t", "nat", "-A", "DOCKER", "-p", "tcp", "-j", "DNAT", "--to-destination", "172.17.0.2:80")
    local = ("!", "-d", "127.0.0.0/8", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER")
    run("iptables-nft", "-t", "nat", "-A", "OUTPUT", *local)
    assert outgoing.of_rules(session, [SENT]) == ""
    run("iptables-nft", "-A", "OUTPUT", "-p", "udp", "-m", "udp", "--dport", "4789", "-j", "DROP")
    assert outgoing.of_rules(session, [SENT]) == "chain OUTPUT of table ip filter"
    run("iptables-nft", "-F", "OUTPUT")
    run("iptables-nft", "-A", "OUTPUT", "-m", "addrtype", "!", "--dst-type", "LOCAL", "-j", "DROP")
    assert outgoing.of_rules(session, [SENT]) == "chain OUTPUT of table ip filter"


def test_each_packet_counts(session: Session) -> None:
    run("nft", f"table inet test {{ chain c {{ {OUT} ip saddr 192.168.8.1 drop; }}; }}")
    other = Sent("eth1", IPv4Address("192.168.8.1"), 4789)
    assert outgoing.of_rules(session, []) == ""
    assert outgoing.of_rules(session, [SENT]) == ""
    assert outgoing.of_rules(session, [SENT, other]) == "chain c of table inet test"


def test_what_leaves_a_link(session: Session) -> None:
    """A chain of family netdev may be at the tunnel's end."""
    run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    run("nft", "table netdev test { chain c { type filter hook ingress device v0 priority 0; }; }")
    assert outgoing.of_rules(session, [SENT]) == ""
    run("nft", "table netdev test { chain d { type filter hook egress device v0 priority 0; }; }")
    assert outgoing.of_rules(session, [SENT]) == "chain d of table netdev test"


def test_more_than_can_be_looked_at(session: Session) -> None:
    many = " ".join("ip saddr 10.0.0.1 drop;" for _ in range(100))
    run("nft", f"table inet test {{ chain c {{ {OUT} {many} }}; }}")
    assert outgoing.of_rules(session, [SENT]) == "chain c of table inet test"
    run("nft", "delete table inet test")
    run("nft", "table inet test { " + " ".join(f"chain c{number} {{ }};" for number in range(500)) + " }")
    assert outgoing.of_rules(session, [SENT]) == "nftables has more than 500 chains"


def test_another_generation_with_each_change(session: Session) -> None:
    seen = {outgoing.generation(session)}
    for change in ("add table inet test", "add set inet test s { type mark; }", "add element inet test s { 1 }"):
        assert outgoing.generation(session) in seen
        run("nft", change)
        seen.add(outgoing.generation(session))
    assert len(seen) == 4


def test_ipsec_has_a_say(session: Session) -> None:
    assert outgoing.unseen() == ""
    for way in ("in", "out"):
        run("ip", "xfrm", "policy", "add", "src", "192.168.9.1/32", "dst", "192.168.9.2/32", "dir", way)
        assert bool(outgoing.unseen()) == (way == "out")
    run("ip", "xfrm", "policy", "flush")
    assert outgoing.unseen() == ""
    run("ip", "xfrm", "policy", "setdefault", "out", "block")
    assert outgoing.unseen() == "IPsec's default is to block"
