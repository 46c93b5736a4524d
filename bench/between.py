"""Between hosts: what netd makes against the same made by hand with `ip`, and how quick it is.

- Throughput and round trips: two pairs of hosts, each on an underlay of its own, with containers set up alike by hand.
  Between the hosts of one pair netd has made the routes and tunnels, between those of the other `ip`.
- netd alone, on a host with 1,000 peers from its file; and three hosts on one etcd, which hear of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import paths, rest
from bench.host import BenchError, Plan
from bench.parts import Part, in_parts
from bench.stats import Row, Spec, row
from cluster.config import EtcdConfig
from cluster.etcd import Etcd
from netd.values import vtep_mac
from tests.hosts import Host, wait_until
from tests.many_hosts.fleet import CONFIG, Fleet, Netd
from tests.underlay import Underlay

KINDS = ("vxlan", "host-gw")
PEERS = 1000
_LIMIT = 0.97
_NOTE = "between two hosts; peer: made by hand with ip"
_JOINS, _RETURNS, _CHANGES = 15, 30, 15
_IDLE_S = 20.0

STREAM = {kind: Spec(f"TCP through {kind}", "Gbit/s", "higher", _LIMIT, note=_NOTE) for kind in KINDS}
TRIPS = {kind: Spec(f"round trips through {kind}", "1/s", "higher", _LIMIT, note=_NOTE) for kind in KINDS}
JOIN = Spec("netd: a new host in the kernels of three others", "ms", "lower", 100, None, "from its record in etcd on")
BACK = Spec("netd: a deleted route is back", "ms", "lower", 200, None, f"with {PEERS:,} peers; one ip more in it")
FIRST = Spec(f"netd: start with {PEERS:,} peers", "s", "lower", 3, None, "exec to all entries in the kernel")
CHANGE = Spec(f"netd: one peer's change beside {PEERS:,}", "ms", "lower", 20, None, "from etcd to the kernel")
IDLE = Spec(f"netd: processor, idle with {PEERS:,} peers", "%", "lower", 1, None, "of one")
MEMORY = Spec(f"netd: resident memory with {PEERS:,} peers", "MB", "lower", 120)


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [*(one[kind] for kind in KINDS for one in (STREAM, TRIPS)), JOIN, CHANGE, FIRST, BACK, IDLE, MEMORY]


def measure(plan: Plan, _place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    parts: list[Part] = [
        (specs()[: 2 * len(KINDS)], lambda _stack, mine: _traffic(plan, mine)),
        ([JOIN], _joins),
        ([CHANGE], _changes),
        ([FIRST, BACK, IDLE, MEMORY], _alone),
    ]
    return in_parts(parts, wanted, say)


# Traffic


def _traffic(plan: Plan, mine: list[Spec]) -> Iterator[Row]:
    for kind in KINDS:
        wishes = [(spec, do) for spec, do in ((STREAM[kind], "stream"), (TRIPS[kind], "trips")) if spec in mine]
        if not wishes:
            continue
        with ExitStack() as inner:
            ours = inner.enter_context(Fleet(kind, segments=(0, 0), ipv6_containers=False))
            ours.start()
            under = inner.enter_context(Underlay("by-hand"))
            hosts = [inner.enter_context(Host(f"hand{number}", plugins=False)) for number in (1, 2)]
            for number, host in enumerate(hosts, 1):
                under.join(host, 10 + number)
            by_hand(kind, hosts, under)
            helper = paths.measurer(inner, hosts[0])
            ways = [_way(inner, pair) for pair in (ours.hosts, hosts)]
            for spec, do in wishes:
                yield paths.compared(helper, plan, spec, "stream" if do == "stream" else "trips", *ways)


def by_hand(kind: str, hosts: list[Host], under: Underlay) -> None:
    """What netd makes between two hosts, as somebody would write it."""
    for number, host in enumerate(hosts, 1):
        other = 3 - number
        own, there, mac = under.address(10 + number), under.address(10 + other), vtep_mac(f"hand{other}")
        script = "sysctl -qw net.ipv4.ip_forward=1; "
        if kind == "host-gw":
            script += f"ip route add 10.2.{other}.0/24 via {there}"
        else:
            script += f"ip link add vx1 address {vtep_mac(f'hand{number}')} mtu 1450 type vxlan id 1 local {own}"
            script += (
                f" dev eth0 dstport 4789 nolearning; ip link set vx1 up; ip address add 10.2.{number}.0/32 dev vx1; "
            )
            script += f"ip neigh add 10.2.{other}.0 lladdr {mac} dev vx1 nud permanent; "
            script += f"bridge fdb add {mac} dev vx1 dst {there} self permanent; "
            script += f"ip route add 10.2.{other}.0/24 via 10.2.{other}.0 dev vx1 onlink"
        host.run(["sh", "-ec", script])


def _way(stack: ExitStack, hosts: list[Host]) -> paths.Way:
    """A container on each host, behind a bridge, made by hand."""
    spaces = []
    for number, host in enumerate(hosts, 1):
        netns = host.netns(f"c{number}")
        script = f"ip link add br0 type bridge; ip link set br0 up; ip address add 10.2.{number}.1/24 dev br0; "
        script += f"ip link add v0 type veth peer name eth0 netns {netns.name}; ip link set v0 up master br0"
        host.run(["sh", "-ec", script])
        inside = f"ip link set eth0 up mtu 1450; ip address add 10.2.{number}.2/24 dev eth0; "
        netns.run(["sh", "-ec", f"{inside}ip route add default via 10.2.{number}.1"])
        spaces.append(netns)
    spaces[0].ping("10.2.2.2")
    return paths.Way(paths.space(stack, spaces[0]), paths.space(stack, spaces[1]), "10.2.2.2")


# Quickness


def _joins(stack: ExitStack, _mine: list[Spec]) -> Iterator[Row]:
    fleet = stack.enter_context(Fleet("vxlan", etcd=True))
    fleet.start()
    for netd in fleet.netds:
        wait_until(lambda netd=netd: len(netd.status().peers) == 2, "all peers", netd.log)  # type: ignore[misc]
    yield row(JOIN, [asyncio.run(_told(fleet, _JOINS, _record))])


def _changes(stack: ExitStack, _mine: list[Spec]) -> Iterator[Row]:
    fleet = stack.enter_context(Fleet("vxlan", etcd=True, segments=(0,)))
    asyncio.run(_populate(fleet))
    fleet.start()
    wait_until(lambda: len(_routes(fleet.host(1))) >= PEERS, "all routes", fleet.netd(1).log)
    yield row(CHANGE, [asyncio.run(_told(fleet, _CHANGES, _block))])


Told = tuple[str, bytes, str]  # key, value, the network that it leads to


def _record(number: int) -> Told:
    """A host that is new."""
    subnet = f"10.9.{number}.0/24"
    record = {"id": f"x{number}", "addresses": [f"192.168.77.{100 + number}"], "mac": vtep_mac(f"x{number}")}
    return f"netd/x{number}", json.dumps({**record, "subnets": [subnet]}).encode(), subnet


def _block(number: int) -> Told:
    """A block more of a host that is known."""
    cidr = f"10.200.{number}.0/26"
    return f"blocks/p#{cidr}", json.dumps({"node": f"p{number * 7}", "node_id": "x"}).encode(), cidr


async def _told(fleet: Fleet, count: int, what: Callable[[int], Told]) -> list[float]:
    """Milliseconds from a put to the route in every host's kernel."""
    took = []
    async with contextlib.AsyncExitStack() as stack:
        etcd = Etcd(EtcdConfig(endpoints=fleet.etcd.sockets))
        stack.push_async_callback(etcd.close)
        for number in range(count):
            key, value, subnet = what(number)
            began = time.perf_counter()
            await etcd.put(key, value)
            for host in fleet.hosts:
                _until_route(host, subnet)
            took.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.1)
    return took


async def _populate(fleet: Fleet) -> None:
    etcd = Etcd(EtcdConfig(endpoints=fleet.etcd.sockets))
    for number in range(PEERS):
        record = {"id": f"p{number}", "addresses": [_underlay(number)], "mac": vtep_mac(f"p{number}")}
        await etcd.put(f"netd/p{number}", json.dumps({**record, "subnets": [_subnet(number)]}).encode())
        await etcd.put(f"netd-alive/p{number}", b"x")
    await etcd.close()


def _underlay(number: int) -> str:
    return f"10.50.{4 + number // 250}.{1 + number % 250}"


def _subnet(number: int) -> str:
    return f"10.{129 + number // 256}.{number % 256}.0/24"


def _until_route(host: Host, subnet: str) -> None:
    deadline = time.monotonic() + 60
    while subnet not in host.run(["ip", "route", "show", subnet]).stdout:
        if time.monotonic() > deadline:
            raise BenchError(f"{host.name}: wanted a route to {subnet}, found none")


def _routes(host: Host) -> list[str]:
    return host.run(["ip", "route", "show", "proto", "110"]).stdout.splitlines()


# Alone


def _alone(stack: ExitStack, mine: list[Spec]) -> Iterator[Row]:
    under = stack.enter_context(Underlay("many", "10.50.0.0/16"))
    host = stack.enter_context(Host("many", plugins=False))
    under.join(host, 5)
    lines = ["[netd]", 'node = "many"', 'interface = "eth0"', 'subnets = ["10.128.0.0/24"]']
    for number in range(PEERS):
        lines += ["[[peer]]", f'name = "p{number}"', f'address = "{_underlay(number)}"']
        lines += [f'subnets = ["{_subnet(number)}", "fd02:{number:x}::/64"]']
    host.path(CONFIG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    netd = Netd(host)
    began = time.perf_counter()
    netd.spawn()
    netd.wait()
    yield row(FIRST, [[time.perf_counter() - began]])
    yield row(MEMORY, [[rest.resident_mb(netd.pid)]])
    if BACK in mine:
        yield row(BACK, [[_back_ms(host, _subnet(number)) for number in range(_RETURNS)]])
    if IDLE in mine:
        yield row(IDLE, [[rest.idle_percent(netd.pid, netd.log, _IDLE_S)]])
    netd.stop()


def _back_ms(host: Host, subnet: str) -> float:
    host.run(["ip", "route", "del", subnet])
    began = time.perf_counter()
    _until_route(host, subnet)
    return (time.perf_counter() - began) * 1e3
