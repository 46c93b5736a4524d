"""Overlay networks: what one costs traffic, how soon a container is reached, what is asked on the underlay, and many.

- Two hosts with all of Netloom and containers, beside two with a bridge and a VXLAN device made by hand with `ip`, as
  people write them: learning, unknown and broadcast frames to the other host, and a rule that masquerades on the way
  out. Both have the same MTU, the same kind of underlay and the same settings for bridges. Where br_netfilter is
  loaded, what is bridged goes through the host's netfilter, too: that has rows of its own. So has a host without any
  rule, from which nothing gets out.
- An ADD is launcher and warm worker. The container that waits asks all the time.
- Frames are those that both hosts send on the underlay while a container asks for others, as ARP does, by broadcast.
- Many: a real netd and a real etcd, in which hosts and their containers are but records.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from bench import pair, paths, rest, warm
from bench.host import BenchError, Helper, Plan, finished, runner
from bench.parts import Part, in_parts
from bench.stats import Row, Spec, absent, row
from cluster import layout
from cluster.config import EtcdConfig
from cluster.etcd import Etcd, Put
from cluster.layout import BlockRecord, NetworkRecord
from ipamd.client import Client
from ipamd.member.book import Book
from ipamd.store import base as store
from ipamd.store.base import Address, Allocation, Instant, Key
from kernel import macs
from kernel.leftovers import BRIDGE_MARK
from netd.fabric.vxlan import device_name
from netd.values import vtep_mac
from protos.ipam.v1 import ipam_pb2
from tests.etcd import EtcdCluster
from tests.hosts import CNI_BIN, PROGRAM_PATH, ROOT, Host, Netns, wait_until
from tests.many_hosts.fleet import CONFIG, LEASE_S, Netd
from tests.many_hosts.pods import Pods, conf_of
from tests.underlay import Underlay

NETWORK, VNI, SUBNET = "ov", 4711, "10.0.0.0/16"
HOSTS, CONTAINERS = 100, 10_000
REQUESTS = 1000
_LIMIT = 0.97
_NOTE = "between two hosts; peer: bridge, VXLAN and masquerade made by hand"
_BRIDGED = "br_netfilter shows netfilter what is bridged, here and there"
_BARE = "between two hosts; peer: made by hand without any rule, so without a way out; docs/adr/0022-fast-path.md"
_WAITS = 4  # ADDs of a round
_ASKED = 4  # containers that are asked for
_FILLS, _CHANGES = 5, 15
_IDLE_S = 12.0
_TABLE = "byhand"
_WAY_OUT = "{ type nat hook postrouting priority srcnat; }"

STREAM = Spec("TCP through an overlay", "Gbit/s", "higher", _LIMIT, note=_NOTE)
TRIPS = Spec("round trips through an overlay", "1/s", "higher", _LIMIT, note=_NOTE)
STREAM_NF = Spec("TCP through an overlay, br_netfilter", "Gbit/s", "higher", _LIMIT, note=f"{_NOTE}; {_BRIDGED}")
TRIPS_NF = Spec("round trips through an overlay, br_netfilter", "1/s", "higher", _LIMIT, note=f"{_NOTE}; {_BRIDGED}")
STREAM_BARE = Spec("TCP through an overlay, bare peer", "Gbit/s", "higher", _LIMIT, note=_BARE)
TRIPS_BARE = Spec("round trips through an overlay, bare peer", "1/s", "higher", _LIMIT, note=_BARE)
STREAM_BARE_NF = Spec(
    "TCP through an overlay, bare peer, br_netfilter", "Gbit/s", "higher", _LIMIT, note=f"{_BARE}; {_BRIDGED}"
)
TRIPS_BARE_NF = Spec(
    "round trips through an overlay, bare peer, br_netfilter", "1/s", "higher", _LIMIT, note=f"{_BARE}; {_BRIDGED}"
)
_TRAFFIC = (STREAM, TRIPS, STREAM_NF, TRIPS_NF, STREAM_BARE, TRIPS_BARE, STREAM_BARE_NF, TRIPS_BARE_NF)
_OF_BRIDGED = (STREAM_NF, TRIPS_NF, STREAM_BARE_NF, TRIPS_BARE_NF)
_OF_BARE = (STREAM_BARE, TRIPS_BARE, STREAM_BARE_NF, TRIPS_BARE_NF)
_OF_STREAMS = (STREAM, STREAM_NF, STREAM_BARE, STREAM_BARE_NF)
REACHED = Spec("overlay: ADD to the first ping", "ms", "lower", 150, None, "from another host, where one asks already")
ASKED = Spec(
    f"overlay: frames for {REQUESTS:,} ARP requests",
    "",
    "lower",
    0,
    None,
    "broadcast and multicast, in tunnels too; peer: made by hand",
)
_MANY = f"{CONTAINERS:,} remote containers"
FILLED = Spec(f"overlay: {_MANY} in the kernel", "s", "lower", 5, None, f"of {HOSTS} hosts, from the bridge on")
MOVED = Spec(f"overlay: a move beside {_MANY}", "ms", "lower", 20, None, "from etcd to the kernel")
MEMORY = Spec(f"overlay: netd's memory with {_MANY}", "MB", "lower", 200)
IDLE = Spec(f"overlay: netd's processor, {_MANY}", "%", "lower", 1, None, "of one; idle")


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [*_TRAFFIC, REACHED, ASKED, FILLED, MOVED, MEMORY, IDLE]


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    parts: list[Part] = [
        ([*_TRAFFIC, REACHED, ASKED], lambda stack, mine: _between(plan, place, stack, mine)),
        ([FILLED, MOVED, MEMORY, IDLE], lambda stack, mine: _many(plan, stack, mine)),
    ]
    return in_parts(parts, wanted, say)


# Two hosts


@dataclass(frozen=True)
class Pair:
    """Two hosts with containers on one network: one on the first with this address, others on the second with those."""

    hosts: Sequence[Host]
    near: Netns
    far: Netns
    address: str
    addresses: Sequence[str]

    def way(self, stack: ExitStack) -> paths.Way:
        """From the one container to another."""
        return paths.Way(paths.space(stack, self.near), paths.space(stack, self.far), self.addresses[0])


def _between(plan: Plan, place: Path, stack: ExitStack, mine: list[Spec]) -> Iterator[Row]:
    pods = stack.enter_context(overlay())
    ours = of_overlay(pods)
    if mine != [REACHED]:
        under = stack.enter_context(Underlay("by-hand"))
        hosts = [stack.enter_context(Host(f"hand{number}", plugins=False)) for number in (1, 2)]
        for number, host in enumerate(hosts, 1):
            under.join(host, 10 + number)
        hand = by_hand(hosts, under)
        helper = paths.measurer(stack, hosts[0])
        ways = [one.way(stack) for one in (ours, hand)]
        until_on_fast_path(pods)
        for spec in [spec for spec in _TRAFFIC if spec in mine]:
            if spec in _OF_BARE:
                for host in hosts:
                    host.run(["sh", "-c", f"nft delete table ip {_TABLE} 2>/dev/null || true"])
            yield _traffic(plan, spec, [*ours.hosts, *hand.hosts], helper, ways)
        if ASKED in mine:
            yield row(
                ASKED, *([[float(_frames(way.source, one))]] for way, one in zip(ways, (ours, hand), strict=True))
            )
    if REACHED in mine:
        warm.start(pods.host(1), place, stack)
        waits = Waits(pods, ours.far)
        rounds: list[list[float]] = []
        while len(rounds) < plan.rounds and not (rounds and plan.budget.over):
            rounds.append([waits.once() for _ in range(plan.samples(_WAITS))])
        yield finished(plan, REACHED, rounds, None)
    pods.release_all()


def _traffic(plan: Plan, spec: Spec, hosts: Iterable[Host], helper: Helper, ways: Sequence[paths.Way]) -> Row:
    bridged = spec in _OF_BRIDGED
    if not bridge_netfilter(hosts, on=bridged) and bridged:
        return absent(spec, "this kernel has not loaded br_netfilter", excused=True)
    return paths.compared(helper, plan, spec, "stream" if spec in _OF_STREAMS else "trips", *ways)


def bridge_netfilter(hosts: Iterable[Host], *, on: bool) -> bool:
    """What is bridged goes through netfilter, or does not; False where it cannot."""
    setting = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if setting.exists():
        for host in hosts:
            host.run(["sysctl", "-qw", f"net.bridge.{setting.name}={int(on)}"])
    return setting.exists()


@contextmanager
def overlay() -> Iterator[Pods]:
    """Two hosts that know an overlay network, and have no container on it."""
    with Pods(segments=(0, 0)) as pods:
        pods.start()
        network = ipam_pb2.Network(name=NETWORK, type="overlay", subnets=[SUBNET], vni=VNI)
        with Client(str(pods.host(1).path("/run/netloom/ipamd.sock")), 30) as client:
            client.create_network(ipam_pb2.CreateNetworkRequest(network=network))
        pods.until_known(NETWORK)
        yield pods


def of_overlay(pods: Pods) -> Pair:
    near, *far = (pods.pod(number, NETWORK) for number in (1, *[2] * _ASKED))
    near.ping(far[0].ipv4)
    return Pair(pods.hosts, near.netns, far[0].netns, near.ipv4, [one.ipv4 for one in far])


def until_on_fast_path(pods: Pods) -> None:
    """All containers, as they are a moment after their start."""
    wait_until(lambda: [netd.status().overlays[0].fast for netd in pods.netds] == [1, _ASKED], "the fast path")


def by_hand(hosts: Sequence[Host], under: Underlay) -> Pair:
    """What people write who have two hosts: each sends what it has not learned to the other."""
    spaces = []
    addresses = [f"10.0.1.{number}" for number in range(1, _ASKED + 2)]
    for number, (host, mine) in enumerate(zip(hosts, (addresses[:1], addresses[1:]), strict=True), 1):
        own, there = under.address(10 + number), under.address(13 - number)
        script = "sysctl -qw net.ipv4.ip_forward=1; ip link add br0 mtu 1450 up type bridge; "
        script += f"ip link add vx0 mtu 1450 type vxlan id {VNI} local {own} dev eth0 dstport 4789; "
        script += f"bridge fdb append 00:00:00:00:00:00 dev vx0 dst {there}; ip link set vx0 up master br0; "
        script += f"nft add table ip {_TABLE}; nft add chain ip {_TABLE} out '{_WAY_OUT}'; "
        script += f"nft add rule ip {_TABLE} out ip saddr {SUBNET} ip daddr != {SUBNET} masquerade"
        host.run(["sh", "-ec", script])
        for address in mine:
            spaces.append(host.netns(address))
            port = f"v{address.rpartition('.')[2]}"
            script = f"ip link add {port} mtu 1450 type veth peer name eth0 mtu 1450 netns {address}; "
            host.run(["sh", "-ec", f"{script}ip link set {port} up master br0"])
            spaces[-1].run(["sh", "-ec", f"ip link set eth0 up; ip address add {address}/16 dev eth0"])
    spaces[0].ping(addresses[1])
    return Pair(hosts, spaces[0], spaces[1], addresses[0], addresses[1:])


# How soon a container is reached


class Waits:
    """A container of the second host that asks for one of the first before it is there."""

    def __init__(self, pods: Pods, waiting: Netns) -> None:
        self._pods = pods
        self._host = pods.host(1)
        self._client = runner(self._host)
        self._waiting = waiting
        self._count = 0
        self.once()  # the worker's first

    def once(self) -> float:
        """Milliseconds from before the ADD to the first answer; the container is gone then."""
        self._count += 1
        address, name = f"10.0.200.{self._count}", f"late{self._count}"
        netns = self._host.netns(name)
        script = str(ROOT / "tests/many_hosts/pinger.py")
        argv = [sys.executable, "-I", "-S", script, address, "0.001"]
        pinger = self._waiting.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            wait_until(lambda: self._asks(address), f"somebody asking for {address}")
            began = time.perf_counter()
            self._client.say({"width": 1, "limit_s": 60, "calls": [self._call("ADD", netns, address)]})
            if pinger.stdout is None or pinger.stdout.readline() != "answered\n":
                raise BenchError(f"{address}: nobody was answered")
            took = (time.perf_counter() - began) * 1e3
            self._done()
        finally:
            pinger.communicate("\n")
        self._client.say({"width": 1, "limit_s": 60, "calls": [self._call("DEL", netns, address)]})
        self._done()
        netns.delete()
        return took

    def _asks(self, address: str) -> bool:
        return address in self._waiting.run(["ip", "neigh", "show", "dev", "eth0"]).stdout

    def _call(self, verb: str, netns: Netns, address: str) -> dict[str, object]:
        env = {"CNI_COMMAND": verb, "CNI_CONTAINERID": netns.name, "CNI_NETNS": netns.path, "CNI_IFNAME": "eth0"}
        env |= {"CNI_PATH": CNI_BIN, "PATH": PROGRAM_PATH, "CNI_ARGS": f"IP={address}"}
        return {"argv": [f"{CNI_BIN}/netloom"], "env": env, "stdin": json.dumps(conf_of(NETWORK))}

    def _done(self) -> None:
        answer = self._client.answer()
        if answer["status"] != [0]:
            raise BenchError(f"netloom exited {answer['status']}: {answer['stdout']} {answer['stderr'][-2000:]}")


# What is asked on the underlay

_ARP, _IPV4, _ALL = 0x0806, 0x0800, 3  # linux/if_ether.h
_OUTGOING = 4  # linux/if_packet.h
_VXLAN_PORT = 4789
_RCVBUFFORCE = 33
_ANSWER_S = 5.0


def _frames(near: str, one: Pair) -> int:
    """How many frames for more than one receiver both hosts send while the container asks for the others."""
    with ExitStack() as stack:
        taps = []
        for host in one.hosts:
            with pair.inside(host.netns_path):
                tap = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)))
            tap.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 64 << 20)
            tap.bind(("eth0", _ALL))
            taps.append(tap)
        with pair.inside(near):
            asker = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ARP)))
        asker.bind(("eth0", _ARP))
        asker.settimeout(_ANSWER_S)
        for number in range(REQUESTS):
            _ask(asker, one.address, one.addresses[number % len(one.addresses)])
        return sum(is_for_many(frame) for tap in taps for frame in _sent(tap))


def _ask(asker: socket.socket, sender: str, address: str) -> None:
    """A broadcast that asks who has the address; returns when that one has answered. Raises BenchError."""
    own, mine, target = asker.getsockname()[4], ip_address(sender).packed, ip_address(address).packed
    body = struct.pack("!HHBBH6s4s6s4s", 1, _IPV4, 6, 4, 1, own, mine, b"\0" * 6, target)  # RFC 826
    asker.send(b"\xff" * 6 + own + struct.pack("!H", _ARP) + body)
    end = time.monotonic() + _ANSWER_S
    try:
        while time.monotonic() < end:
            answer = asker.recv(2048)
            if answer[20:22] == b"\0\2" and answer[28:32] == target:
                return
    except TimeoutError:
        pass
    raise BenchError(f"nobody said within {_ANSWER_S:g} s who has {address}")


def _sent(tap: socket.socket) -> Iterator[bytes]:
    tap.setblocking(False)
    while True:
        try:
            frame, (_, _, kind, *_) = tap.recvfrom(2048)
        except BlockingIOError:
            return
        if kind == _OUTGOING:
            yield frame


def is_for_many(frame: bytes) -> bool:
    """Whether a frame on the underlay, or the one in its tunnel, is a broadcast or a multicast of some container.

    What the host asks for itself is none: ARP for underlay addresses, and IPv6's own.
    """
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == _IPV4 and frame[23] == socket.IPPROTO_UDP and frame[36:38] == _VXLAN_PORT.to_bytes(2, "big"):
        return bool((frame[0] | frame[50]) & 1)
    if kind == _ARP:
        return bool(frame[0] & 1) and ip_address(frame[38:42]) in ip_network(SUBNET)
    return bool(frame[0] & 1) and kind == _IPV4


# Many containers

_BRIDGE, _DEVICE = f"nl-{NETWORK}", device_name(VNI)
_PER_TRANSACTION = 100  # operations; etcd takes 128
_PATIENCE_S = 120.0
_GROUP_LINK, _GROUP_NEIGH = 1 << 0, 1 << 2  # linux/rtnetlink.h, RTMGRP_…
_IFF_UP = 1


def _many(plan: Plan, stack: ExitStack, mine: list[Spec]) -> Iterator[Row]:
    under = stack.enter_context(Underlay("many", "10.50.0.0/16"))
    etcd = stack.enter_context(EtcdCluster(1, underlay=under))
    host = stack.enter_context(Host("many", plugins=False))
    under.join(host, 5)
    asyncio.run(_populate(etcd))
    tables = f'[netd]\nnode = "many"\ninterface = "eth0"\n[etcd]\nendpoints = {json.dumps(etcd.endpoints)}\n'
    host.path(CONFIG).write_text(f"{tables}[cluster]\nlease_s = {LEASE_S}\n", encoding="utf-8")
    netd = Netd(host)
    netd.start()
    wait_until(lambda: len(netd.status().peers) == HOSTS, "all hosts", netd.log)
    fills = [_fill_s(host)]
    while len(fills) < plan.samples(_FILLS):
        _clear(host)
        fills.append(_fill_s(host))
    yield row(FILLED, [fills])
    if MOVED in mine:
        rest.wait(netd.pid, netd.log)
        yield row(MOVED, [asyncio.run(_moves(etcd, host, plan.samples(_CHANGES)))])
    yield row(MEMORY, [[rest.resident_mb(netd.pid)]])
    if IDLE in mine:
        yield row(IDLE, [[rest.idle_percent(netd.pid, netd.log, max(4.0, _IDLE_S * plan.scale))]])
    netd.stop()


def _underlay(number: int) -> str:
    return f"10.50.1.{1 + number}"


def _container(number: int) -> tuple[str, str]:
    """Its address and its MAC."""
    address = ip_address(int(ip_network(SUBNET)[256]) + number)
    return str(address), macs.of_address(address)


def _record(number: int, host: int, generation: int = 1) -> Put:
    """That a container is on a host, as ipamd writes it."""
    address, _ = _container(number)
    allocation = Allocation(
        Key(f"h{host}", "cni", NETWORK, f"{number:064x}", "eth0"),
        (Address(f"{address}/16", "10.0.0.1", NETWORK, 0),),
        store.Netns(4026532000 + number, number, f"/run/netns/{number:032x}"),
        Instant("", 0),
        0,
        generation,
    )
    book = Book(BlockRecord(f"h{host}", f"id{host}"))
    return Put(layout.ADDRESSES + layout.place(NETWORK, address), book.record(allocation))


@asynccontextmanager
async def _client(etcd: EtcdCluster) -> AsyncIterator[Etcd]:
    client = Etcd(EtcdConfig(endpoints=etcd.sockets))
    try:
        yield client
    finally:
        await client.close()


async def _populate(etcd: EtcdCluster) -> None:
    network = NetworkRecord(NETWORK, "overlay", (SUBNET,), bridge=_BRIDGE, vni=VNI)
    puts = [Put(layout.NETWORKS + NETWORK, layout.encode(network))]
    for number in range(HOSTS):
        record = {"id": f"id{number}", "addresses": [_underlay(number)], "mac": vtep_mac(f"h{number}")}
        puts.append(Put(f"netd/h{number}", json.dumps(record).encode()))
        puts.append(Put(f"netd-alive/h{number}", b"x"))
    puts += [_record(number, number % HOSTS) for number in range(CONTAINERS)]
    async with _client(etcd) as client:
        for first in range(0, len(puts), _PER_TRANSACTION):
            await client.txn([], puts[first : first + _PER_TRANSACTION])


def _fill_s(host: Host) -> float:
    """Seconds from the bridge to the tunnel's end that is up. Raises BenchError where an entry is missing."""
    gateway = macs.of_address(ip_network(SUBNET)[1])
    script = "ip link add c0 up type veth peer name c1; "
    script += f"ip link add {_BRIDGE} mtu 1450 address {gateway} up type bridge; "
    script += f"ip link set {_BRIDGE} alias '{BRIDGE_MARK}'; ip link set c0 master {_BRIDGE}"
    with _told_by_kernel(host, _GROUP_LINK) as kernel:
        began = time.perf_counter()
        host.run(["sh", "-ec", script])
        _until_told(kernel, lambda told: _is_up(told, _DEVICE))
        took = time.perf_counter() - began
    entries = host.run(["bridge", "fdb", "show", "dev", _DEVICE]).stdout.splitlines()
    found = (
        sum(" dst " in line for line in entries),
        sum("static" in line for line in entries),
        len(host.run(["ip", "neigh", "show", "dev", _BRIDGE, "nud", "permanent"]).stdout.splitlines()),
    )
    if found != (CONTAINERS,) * 3:
        raise BenchError(f"wanted {CONTAINERS} entries of each kind when {_DEVICE} is up, found {found}")
    return took


def _clear(host: Host) -> None:
    host.run(["ip", "link", "delete", _BRIDGE])
    host.run(["ip", "link", "delete", "c0"])
    wait_until(lambda: _DEVICE not in host.links(), "the tunnel's end gone with its bridge")


async def _moves(etcd: EtcdCluster, host: Host, count: int) -> list[float]:
    """Milliseconds from a put to the kernel's word that a container is now on another host."""
    took = []
    with _told_by_kernel(host, _GROUP_NEIGH) as kernel:
        async with _client(etcd) as client:
            await client.count(layout.NETWORKS)  # the connection is there
            for number in range(0, count * 7, 7):
                there = (number + HOSTS // 2) % HOSTS
                mac, outer = bytes.fromhex(_container(number)[1].replace(":", "")), ip_address(_underlay(there)).packed
                put = _record(number, there, 2)
                began = time.perf_counter()
                await client.put(put.key, put.value)
                _until_told(kernel, lambda told, mac=mac, outer=outer: mac in told and outer in told)  # type: ignore[misc]
                took.append((time.perf_counter() - began) * 1e3)
                await asyncio.sleep(0.1)
    return took


def _told_by_kernel(host: Host, group: int) -> socket.socket:
    """A socket that hears of the host's links or neighbours. Asking again and again would keep netd from its work."""
    with pair.inside(host.netns_path):
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    kernel.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 64 << 20)
    kernel.settimeout(_PATIENCE_S)
    kernel.bind((0, group))
    return kernel


def _until_told(kernel: socket.socket, wanted: Callable[[bytes], bool]) -> None:
    """Until the kernel tells what is wanted. Raises BenchError."""
    try:
        while not wanted(kernel.recv(65536)):
            pass
    except TimeoutError:
        raise BenchError(f"the kernel did not tell what was waited for within {_PATIENCE_S:g} s") from None


def _is_up(told: bytes, device: str) -> bool:
    (flags,) = struct.unpack_from("=I", told, 24)  # struct nlmsghdr, then struct ifinfomsg
    return bool(flags & _IFF_UP) and f"{device}\0".encode() in told
