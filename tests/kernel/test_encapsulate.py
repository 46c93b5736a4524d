"""Frames that a container's port sends to another host without the tunnel's end: what arrives there, what is on the
wire, and when the tunnel's end is asked all the same.

Two hosts with a bridge, a VXLAN device and a container each. The first has the programs, the second has none.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address

import pytest

from kernel import bpf, fastpath, link, vxlan
from kernel.encapsulate import Outer
from kernel.fastpath import TUNNEL, Places
from kernel.session import Session
from tests.hosts import IPV6, PATIENCE_S, wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space, ip, run

pytestmark = pytest.mark.kernel

VNI, MTU = 4711, 1450
MACS = {"one": "02:42:0a:00:00:01", "far": "02:42:0a:00:00:02"}
FAMILIES = [4, pytest.param(6, marks=pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine"))]
_UDP_SEGMENT, _PMTUDISC, _DONT, _PROBE = 103, 10, 0, 3  # linux/udp.h, linux/in.h
_SOL_UDP, _ALL = 17, 3


class Stage:
    """In the first host's namespace."""

    def __init__(self, session: Session, there: dict[str, Space], other: Space) -> None:
        self.session = session
        self.there = there
        self.other = other
        self.index = {one.name: one.index for one in link.all_links(session)}
        self.places = Places(16)
        self.until = bpf.Cell("test")

    def begin(self) -> None:
        """Put a program at the container's port, which knows the other container, and vouch for it."""
        self.places.put(MACS["far"], TUNNEL, IPv4Address("192.168.9.2"))
        self.until.put(time.monotonic_ns() + 10**12)
        outer = Outer(self.index["eth0"], IPv4Address("192.168.9.1"), VNI, 4789, MTU, self.until.fd)
        program = fastpath.load_outward(self.places, self.index["vx0"], MACS["one"], outer)
        try:
            assert fastpath.attach(self.session, self.index["one"], program)
        finally:
            os.close(program)

    def by_tunnel(self) -> int:
        """How many packets have left by the tunnel's end."""
        (found,) = ip("-s", "link", "show", "vx0")
        return int(found["stats64"]["tx"]["packets"])

    def open(self, name: str, kind: int, family: int = 4) -> socket.socket:
        with spaces.inside(self.there[name]):
            made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        made.settimeout(PATIENCE_S)
        made.bind((address_of(name, family), 0))
        return made

    def reaches(self, size: int = 100, family: int = 4) -> bool:
        """Whether so many bytes of a datagram arrive as they were."""
        with self.open("one", socket.SOCK_DGRAM, family) as one, self.open("far", socket.SOCK_DGRAM, family) as far:
            one.setsockopt(socket.IPPROTO_IP, _PMTUDISC, _DONT)  # on the way it may be cut
            sent = os.urandom(size)
            one.sendto(sent, far.getsockname())
            return far.recv(65536) == sent

    def answers(self, family: int) -> bool:
        """Whether the other container is reached by now."""
        with self.open("one", socket.SOCK_DGRAM, family) as one, self.open("far", socket.SOCK_DGRAM, family) as far:
            far.settimeout(0.2)
            one.sendto(b"x", far.getsockname())
            try:
                return far.recv(10) == b"x"
            except TimeoutError:
                return False

    def listen(self) -> socket.socket:
        """What arrives at the other host."""
        with spaces.inside(self.other):
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        tap.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
        tap.bind(("eth0", _ALL))
        tap.settimeout(PATIENCE_S)
        return tap


def address_of(name: str, family: int = 4) -> str:
    number = list(MACS).index(name) + 1
    return f"10.0.0.{number}" if family == 4 else f"fd00::{number}"


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        hosts = [stack.enter_context(spaces.fresh()) for _ in range(2)]
        there = {name: stack.enter_context(spaces.fresh()) for name in MACS}
        stack.enter_context(spaces.inside(hosts[0]))
        session = stack.enter_context(Session())
        link.add_veth(session, link.VethSpec("eth0", "eth0", hosts[1].fd))
        for number, (host, name) in enumerate(zip(hosts, MACS, strict=True), 1):
            other = list(MACS.values())[2 - number]
            with spaces.inside(host), Session() as door:
                run("sysctl", "-qw", "net.ipv4.ip_forward=1")
                run("ip", "link", "set", "lo", "up")
                run("ip", "link", "set", "eth0", "up")
                run("ip", "address", "add", f"192.168.9.{number}/24", "dev", "eth0")
                run("ip", "link", "add", "br0", "mtu", "1450", "up", "type", "bridge")
                local, mac = IPv4Address(f"192.168.9.{number}"), f"02:00:00:00:00:0{number}"
                spec = vxlan.Vxlan("vx0", VNI, local, 4789, link.get(door, "eth0").index, mac, MTU)
                vxlan.add(door, spec)
                run("ip", "link", "set", "vx0", "master", "br0")
                run("bridge", "fdb", "add", other, "dev", "vx0", "dst", f"192.168.9.{3 - number}", "self", "permanent")
                run("bridge", "fdb", "add", other, "dev", "vx0", "master", "static")
                link.add_veth(door, link.VethSpec(name, "eth0", there[name].fd, MTU, MACS[name]))
                run("ip", "link", "set", name, "up", "master", "br0")
            with spaces.inside(there[name]):
                run("ip", "link", "set", "eth0", "up")
                run("ip", "address", "add", f"{address_of(name)}/24", "dev", "eth0")
                away = next(one for one in MACS if one != name)
                run("ip", "neigh", "replace", address_of(away), "lladdr", MACS[away], "dev", "eth0")
                if IPV6:
                    run("ip", "address", "add", f"{address_of(name, 6)}/64", "dev", "eth0", "nodad")
                    run("ip", "neigh", "replace", address_of(away, 6), "lladdr", MACS[away], "dev", "eth0")
        made = Stage(session, there, hosts[1])
        stack.callback(made.places.close)
        stack.callback(made.until.close)
        for family in (4, 6) if IPV6 else (4,):
            wait_until(partial(made.answers, family), "ports that forward, and MACs that are known")
        yield made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offload", [True, False])
def test_streams_arrive_whole(stage: Stage, offload: bool, family: int) -> None:
    """In pieces of 64 KB, whose checksums nobody made; and in segments with checksums, which the other end verifies."""
    stage.begin()
    if not offload:
        vxlan.set_tx_checksum("eth0", False)
    before = stage.by_tunnel()
    data = os.urandom(1 << 20)
    for source, target in (("one", "far"), ("far", "one")):
        with stage.open(target, socket.SOCK_STREAM, family) as listener:
            listener.listen(1)
            with stage.open(source, socket.SOCK_STREAM, family) as near:
                near.connect(listener.getsockname())
                far, _ = listener.accept()
                far.settimeout(PATIENCE_S)
                with far:
                    sender = threading.Thread(target=_send_all, args=(near, data))
                    sender.start()
                    got = b"".join(iter(lambda far=far: far.recv(1 << 20), b""))  # type: ignore[misc]
                    sender.join()
        assert got == data
    assert stage.by_tunnel() == before


def _send_all(near: socket.socket, data: bytes) -> None:
    near.sendall(data)
    near.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offload", [True, False])
def test_datagrams_of_all_sizes_arrive(stage: Stage, offload: bool, family: int) -> None:
    """Those that the container cuts, too."""
    stage.begin()
    if not offload:
        vxlan.set_tx_checksum("eth0", False)
    before = stage.by_tunnel()
    for size in (0, 1, 2, 17, 18, 19, 500, 1401, 1402, 1403, 1421, 1422, 1423, 3000, 60_000):
        assert stage.reaches(size, family), size
    assert stage.by_tunnel() == before


@pytest.mark.parametrize("offload", [True, False])
def test_datagrams_that_are_cut_late_arrive(stage: Stage, offload: bool) -> None:
    """UDP_SEGMENT: many of one size, as one packet."""
    stage.begin()
    if not offload:
        vxlan.set_tx_checksum("eth0", False)
    before = stage.by_tunnel()
    with stage.open("one", socket.SOCK_DGRAM) as one, stage.open("far", socket.SOCK_DGRAM) as far:
        one.setsockopt(_SOL_UDP, _UDP_SEGMENT, 1000)
        sent = os.urandom(9_500)
        one.sendto(sent, far.getsockname())
        got = [far.recv(65536) for _ in range(10)]
    assert b"".join(got) == sent
    assert stage.by_tunnel() == before


def test_what_is_on_the_wire(stage: Stage) -> None:
    """Each segment of a stream is a packet of its own, with the right lengths, as large as the underlay takes."""
    stage.begin()
    vxlan.set_tx_checksum("eth0", False)
    with stage.listen() as tap, stage.open("far", socket.SOCK_STREAM) as listener:
        listener.listen(1)
        with stage.open("one", socket.SOCK_STREAM) as near:
            near.connect(listener.getsockname())
            near.sendall(bytes(100_000))
            far, _ = listener.accept()
            got = 0
            while got < 100_000:
                got += len(far.recv(1 << 20))
            far.close()
        frames = [frame for frame in _waiting(tap) if _is_tunnels(frame, "192.168.9.1")]
    assert len(frames) > 60
    assert max(map(len, frames)) == 1514
    ports = set()
    for frame in frames:
        outer, udp, inner = frame[14:34], frame[34:42], frame[50:]
        assert outer[:2] == b"\x45\x00"
        assert _sum(outer) == 0xFFFF
        assert int.from_bytes(outer[2:4], "big") == len(frame) - 14
        assert outer[6:10] == b"\0\0\x40\x11"
        assert (outer[12:16], outer[16:20]) == (IPv4Address("192.168.9.1").packed, IPv4Address("192.168.9.2").packed)
        ports.add(int.from_bytes(udp[:2], "big"))
        assert udp[2:] == struct.pack("!HHH", 4789, len(frame) - 34, 0)
        assert frame[42:50] == struct.pack("!II", 0x08000000, VNI << 8)
        assert inner[:12].hex() == (MACS["far"] + MACS["one"]).replace(":", "")
        assert _sum(inner[14:34]) == 0xFFFF
        assert _sum(_pseudo(inner) + inner[34:]) == 0xFFFF
    assert len(ports) == 1  # one flow
    assert min(ports) >= 0xC000


def _waiting(tap: socket.socket) -> Iterator[bytes]:
    tap.setblocking(False)
    try:
        while True:
            yield tap.recv(65536)
    except BlockingIOError:
        return


def _is_tunnels(frame: bytes, source: str) -> bool:
    return frame[12:14] == b"\x08\0" and frame[23] == 17 and frame[26:30] == IPv4Address(source).packed


def _sum(data: bytes) -> int:
    """RFC 1071; 0xffff where the checksum within is right."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _pseudo(inner: bytes) -> bytes:
    return inner[26:34] + struct.pack("!HH", inner[23], len(inner) - 34)


@pytest.mark.parametrize("family", FAMILIES)
def test_congestion_is_told_as_the_tunnels_end_tells_it(stage: Stage, family: int) -> None:
    marks: list[list[int]] = []
    level, option = (socket.IPPROTO_IP, socket.IP_TOS) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    for begun in (False, True):
        if begun:
            stage.begin()
        before = stage.by_tunnel()
        marks.append([])
        for mark in range(4):
            with (
                stage.listen() as tap,
                stage.open("one", socket.SOCK_DGRAM, family) as one,
                stage.open("far", socket.SOCK_DGRAM, family) as far,
            ):
                one.setsockopt(level, option, 0xB8 | mark)
                one.sendto(b"x", far.getsockname())
                assert far.recv(10) == b"x"
                marks[-1] += [frame[15] for frame in _waiting(tap) if _is_tunnels(frame, "192.168.9.1")]
        assert (stage.by_tunnel() == before) == begun
    assert marks[0] == marks[1] == [0, 1, 2, 2]


def test_who_moves_to_another_host_is_followed(stage: Stage) -> None:
    stage.begin()
    with spaces.inside(stage.other):
        run("ip", "address", "add", "192.168.9.3/24", "dev", "eth0")
    stage.places.put(MACS["far"], TUNNEL, IPv4Address("192.168.9.3"))
    run("bridge", "fdb", "replace", MACS["far"], "dev", "vx0", "dst", "192.168.9.3", "self", "permanent")
    assert stage.places.hosts() == {MACS["far"]: IPv4Address("192.168.9.3")}
    assert stage.reaches()  # its MAC is asked for
    before = stage.by_tunnel()
    with stage.listen() as tap:
        assert stage.reaches()
        there = [frame[30:34] for frame in _waiting(tap) if _is_tunnels(frame, "192.168.9.1")]
    assert there == [IPv4Address("192.168.9.3").packed]
    assert stage.by_tunnel() == before


@pytest.mark.parametrize(
    "reason",
    ["nobody vouches", "unknown host", "another link", "lo forwards nothing", "small path", "small link", "no MAC"],
)
def test_where_anything_is_otherwise_the_tunnels_end_is_asked(stage: Stage, reason: str) -> None:
    """And everything arrives."""
    stage.begin()
    assert stage.reaches(1400)
    before = stage.by_tunnel()
    if reason == "nobody vouches":
        stage.until.put(time.monotonic_ns() - 10**9)
    elif reason == "unknown host":
        stage.places.put(MACS["far"], TUNNEL)
    elif reason == "another link":
        link.add_veth(stage.session, link.VethSpec("eth1", "eth1", stage.other.fd))
        with spaces.inside(stage.other):
            run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth1.rp_filter=0")
            run("ip", "link", "set", "eth1", "up")
        run("ip", "link", "set", "eth1", "up")
        run("ip", "route", "add", "192.168.9.2/32", "dev", "eth1")
    elif reason == "lo forwards nothing":
        run("sysctl", "-qw", "net.ipv4.conf.lo.forwarding=0")
    elif reason == "small path":
        run("ip", "route", "add", "192.168.9.2/32", "dev", "eth0", "mtu", "lock", "1400")
    elif reason == "small link":
        run("ip", "link", "set", "eth0", "mtu", "1450")
    elif reason == "no MAC":
        run("ip", "neigh", "flush", "dev", "eth0")
    assert stage.reaches(1400)
    assert stage.reaches(10)
    assert stage.by_tunnel() > before


def test_what_is_too_large_for_the_tunnels_end_is_cut_by_it(stage: Stage) -> None:
    """A container may set its own MTU: single packets, and segments."""
    stage.begin()
    for name in MACS:
        with spaces.inside(stage.there[name]):
            run("ip", "link", "set", "eth0", "mtu", "1600")
    for host, name in ((None, "one"), (stage.other, "far")):
        with ExitStack() as stack:
            if host is not None:
                stack.enter_context(spaces.inside(host))
            run("ip", "link", "set", name, "mtu", "1600")
    before = stage.by_tunnel()
    with stage.open("one", socket.SOCK_DGRAM) as one, stage.open("far", socket.SOCK_DGRAM) as far:
        one.setsockopt(socket.IPPROTO_IP, _PMTUDISC, _PROBE)
        one.sendto(bytes(MTU - 28), far.getsockname())
        assert len(far.recv(65536)) == MTU - 28
        assert stage.by_tunnel() == before
        one.sendto(bytes(MTU - 27), far.getsockname())
        wait_until(lambda: stage.by_tunnel() == before + 1, "a packet by the tunnel's end")
        one.setsockopt(_SOL_UDP, _UDP_SEGMENT, MTU - 27)
        one.sendto(bytes(3 * (MTU - 27)), far.getsockname())
        wait_until(lambda: stage.by_tunnel() > before + 1, "segments by the tunnel's end")
