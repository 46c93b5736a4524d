"""UDP flows in a namespace of its own: which are forgotten, and which are not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel import conntrack, libnftables
from kernel.errors import NotFound
from kernel.netlink import Message
from kernel.ports import Port
from kernel.session import Session
from tests.hosts import IPV6, wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel

_NAT = """
table inet nat {
	chain output {
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.1 udp dport 5353 dnat ip to 127.0.0.9:53
		ip daddr 127.0.0.2 udp dport 5353 dnat ip to 127.0.0.8:53
		ip6 daddr ::1 udp dport 5353 dnat ip6 to [::1]:53
	}
}
"""


@pytest.fixture
def tracked(home: Space, session: Session) -> Iterator[Session]:
    libnftables.run(_NAT, "test rules")
    yield session


def send(address: str, number: int, own: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::1" if ":" in address else "127.0.0.1", own))
        one.sendto(b"x", (address, number))


def sources() -> set[int]:
    """The source ports of the flows that the kernel has."""
    return {int(line.split("sport=")[1].split()[0]) for line in _lines()}


def flows_of(own: int) -> list[str]:
    return [line for line in _lines() if f" sport={own} " in line]


def _lines() -> list[str]:
    lines = Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines()
    return [line for line in lines if " udp " in line]


def some_flows() -> set[int]:
    send("127.0.0.1", 5353, 1001)
    send("127.0.0.2", 5353, 1002)
    send("127.0.0.3", 5353, 1003)  # the host's own
    send("127.0.0.1", 53, 1004)
    expected = {1001, 1002, 1003, 1004}
    if IPV6:
        send("::1", 5353, 1006)
        expected.add(1006)
    assert sources() == expected
    return expected


WAYS = ["one list of all", "filtered", "as before Linux 5.8"]


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != WAYS[0]:
        monkeypatch.setattr(conntrack, "_WALK_US", 0)
    if way == WAYS[2]:
        monkeypatch.setattr(conntrack, "_FILTER", 200)


@pytest.mark.parametrize("way", WAYS)
def test_flows_to_a_port(tracked: Session, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    by(way, monkeypatch)
    flows = some_flows()
    assert conntrack.forget_port(tracked, []) == 0
    assert conntrack.forget_port(tracked, [Port("tcp", 5353, "0.0.0.0")]) == 0
    assert conntrack.forget_port(tracked, [Port("udp", 5354, "0.0.0.0")]) == 0
    assert conntrack.forget_port(tracked, [Port("udp", 5353, "127.0.0.2")]) == 1
    assert sources() == flows - {1002}
    assert conntrack.forget_port(tracked, [Port("udp", 5353, "0.0.0.0")]) == 2
    assert sources() == flows - {1001, 1002, 1003}
    if IPV6:
        assert conntrack.forget_port(tracked, [Port("udp", 5353, "::")]) == 1
    assert sources() == {1004}
    assert conntrack.forget_port(tracked, [Port("udp", 5353, "0.0.0.0"), Port("udp", 5353, "::")]) == 0


@pytest.mark.parametrize("way", WAYS)
def test_flows_to_a_container(tracked: Session, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    by(way, monkeypatch)
    flows = some_flows()
    assert conntrack.forget_target(tracked, [("127.0.0.9", 54), ("127.0.0.7", 53)]) == 0
    assert conntrack.forget_target(tracked, [("127.0.0.9", 53)]) == 1
    assert sources() == flows - {1001}
    # One that goes there by itself was not translated.
    send("127.0.0.8", 53, 1005)
    assert conntrack.forget_target(tracked, {("127.0.0.8", 53)}) == 1
    assert sources() == (flows - {1001, 1002}) | {1005}
    if IPV6:
        assert conntrack.forget_target(tracked, [("::1", 53)]) == 1
        assert 1006 not in sources()


def test_the_kernel_filters(tracked: Session) -> None:
    """What is sent to us does not grow with the flows that are none of ours."""
    some_flows()
    for number in range(200):
        send("127.0.0.4", 6000, 20000 + number)
    request = conntrack._dump(4, conntrack._TUPLE_ORIG, conntrack._ORIG_FLAGS, 1 << 5, (3, 5353))
    assert len(list(tracked.netfilter.dump(request))) == 3
    assert conntrack.forget_port(tracked, [Port("udp", 5353, "0.0.0.0")]) == 3
    assert len(sources()) >= 200


def test_many_ports_are_one_list(tracked: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    flows = some_flows()
    asked: list[Message] = []
    dump = tracked.netfilter.dump

    def counted(message: Message) -> Iterator[bytes]:
        asked.append(message)
        return dump(message)

    monkeypatch.setattr(tracked.netfilter, "dump", counted)
    many = [Port("udp", number, "0.0.0.0") for number in range(5000, 6000)]
    assert conntrack.forget_port(tracked, many) == 3
    assert len(asked) == 1
    assert sources() == flows - {1001, 1002, 1003}


def test_without_any_flow_nothing_is_listed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.netfilter, "dump", lambda message: pytest.fail(message.what))
    assert conntrack.forget_port(session, [Port("udp", 5353, "0.0.0.0")]) == 0
    monkeypatch.setattr("kernel.sysctl.read", lambda *_: (_ for _ in ()).throw(NotFound("read", 2)))
    assert conntrack.forget_target(session, [("127.0.0.1", 5353)]) == 0


def test_what_passes_through_is_spared(tracked: Session, container: Space) -> None:
    """A client behind the host asks a server beyond it, at a port that the host has published."""
    spaces.run("ip", "link", "add", "in0", "type", "veth", "peer", "name", "eth0", "netns", container.path)
    spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "in0")
    spaces.run("ip", "link", "set", "in0", "up")
    spaces.run("ip", "link", "add", "out0", "type", "veth", "peer", "name", "out1")
    for name in ("out0", "out1"):
        spaces.run("ip", "link", "set", name, "up")
    spaces.run("ip", "address", "add", "192.0.2.1/24", "dev", "out0")
    spaces.run("ip", "neighbour", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", "out0")
    spaces.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    with spaces.inside(container):
        spaces.run("ip", "address", "add", "10.0.0.2/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        spaces.run("ip", "route", "add", "default", "via", "10.0.0.1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind(("10.0.0.2", 3001))
            client.sendto(b"x", ("192.0.2.9", 5353))
            client.sendto(b"x", ("10.0.0.1", 5354))
    wait_until(lambda: len(flows_of(3001)) == 2, "both flows")  # after the neighbours were found
    assert conntrack.forget_port(tracked, [Port("udp", 5353, "0.0.0.0")]) == 0
    assert conntrack.forget_port(tracked, [Port("udp", 5354, "0.0.0.0")]) == 1
    assert 3001 in sources()
