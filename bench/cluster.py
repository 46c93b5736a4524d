"""ipamd in a cluster: what blocks and cluster-wide addresses cost, many nodes at once, and one node with very much.

- etcd is Debian's, with its data in memory: on the machine of a test it would share the disk with ipamd, which it does
  not in a real cluster. Its members, ipamd and the clients share the processors; no real cluster does that either.
- node-block is compared with an ipamd of the same host that has SQLite alone, in turn, as in `bench.addresses`.
- cluster-address: four nodes on three members, against bare transactions: four processes with the client that ipamd
  has, each with as many under way as a node has clients, and the same etcd.
- Nodes that claim their first block at the same time are simulated: the claiming is ipamd's own code, a connection and
  a seed for each; what they claim of is one pool.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.addresses import Daemon, cpu_s
from bench.disk import require_disk
from bench.host import BenchError, Helper, Plan, finished
from bench.stats import Row, Spec, absent, row
from tests.etcd import EtcdCluster, EtcdMissingError, programs
from tests.hosts import Host, HostError, _toml, wait_until
from tests.underlay import Underlay

NODES, WIDTH = 4, 8
CLAIMANTS = 1000
_PER_BLOCK, _USABLE = 50, 61  # a /26 without its ends and its gateway
_POOL = "bench"
_WINDOW_S = 0.8
_LEAD_S = 0.3
# etcd is calm when its members together use less than so much of one processor, looked at so often and for so long.
_CALM, _LOOK_S, _SETTLE_S = 0.2, 0.2, 5.0
_FIRST = 11  # number on the underlay

BLOCK_RATE = Spec(
    "cluster: node-block allocations, 8 clients", "1/s", "higher", 0.9, 1.0, "peer: the same with SQLite alone"
)
_TOGETHER = f"{NODES * WIDTH} clients, three members; peer: {NODES} processes with {WIDTH} under way"
ADDRESS_RATE = Spec(
    f"cluster: cluster-address allocations, {NODES} nodes",
    "1/s",
    "higher",
    0.5,
    None,
    f"{_TOGETHER}, the same transactions one by one without ipamd",
)
ADDRESS_LEAST = Spec(
    f"cluster: cluster-address beside puts, {NODES} nodes",
    "1/s",
    "higher",
    None,
    None,
    f"{_TOGETHER}, transactions that only make a key",
)
CLAIM_TIME = Spec(f"cluster: {CLAIMANTS:,} nodes claim their first block", "s", "lower", 30, None, "all at once")
CLAIM_RETRIES = Spec(f"cluster: retries of a first block, {CLAIMANTS:,} nodes", "", "lower", 5, None, "p95: over nodes")


class Many:
    """Rows about one ipamd with many addresses; their names depend on how many."""

    def __init__(self, taken: int) -> None:
        self.taken = taken
        self.blocks = taken // _PER_BLOCK
        what = f"{taken:,} taken in {self.blocks:,} blocks"
        note = "after lists of all"
        self.memory = Spec(f"cluster: ipamd resident memory, {what}", "MB", "lower", 150, None, note)
        self.restarted = Spec(f"cluster: ipamd resident memory, {what}, restarted", "MB", "lower", 150, None, note)
        self.start = Spec(
            f"cluster: ipamd start, {what}", "ms", "lower", 5000, None, "exec to the first connection that it takes"
        )
        self.listing = Spec(
            f"cluster: ip list, {what}", "ms", "lower", 0.1, None, "the first allocation comes; peer: the last one"
        )

    @property
    def specs(self) -> list[Spec]:
        return [self.memory, self.restarted, self.start, self.listing]


def specs(plan: Plan) -> list[Spec]:
    """All rows of this file, in their order."""
    return [BLOCK_RATE, ADDRESS_RATE, ADDRESS_LEAST, CLAIM_TIME, CLAIM_RETRIES, *Many(plan.taken).specs]


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    many = Many(plan.taken)
    parts: list[tuple[list[Spec], Callable[[ExitStack], Iterator[Row]]]] = [
        ([BLOCK_RATE], lambda stack: _blocks(plan, place, stack)),
        ([ADDRESS_RATE, ADDRESS_LEAST], lambda stack: _addresses(plan, place, stack)),
        ([CLAIM_TIME, CLAIM_RETRIES], _claims),
        (many.specs, lambda stack: _many(many, place, stack)),
    ]
    for mine, work in parts:
        wishes = [spec for spec in mine if wanted(spec)]
        if not wishes:
            continue
        say(mine[0].name)
        try:
            programs("3.4")
            require_disk(place)
            with ExitStack() as stack:
                found = {one.name: one for one in work(stack)}
        except EtcdMissingError as error:
            yield from (absent(spec, str(error), excused=True) for spec in wishes)
        except (BenchError, HostError, OSError, subprocess.TimeoutExpired) as error:
            yield from (absent(spec, str(error), excused=False) for spec in wishes)
        else:
            yield from (found[spec.name] for spec in wishes)


class Member(Daemon):
    """An ipamd that belongs to a cluster."""

    def __init__(self, host: Host, name: str, place: Path, port: int, etcd: EtcdCluster) -> None:
        super().__init__(host, name, place, port)
        config = f"/etc/netloom/{name}.toml"
        tables: Mapping[str, Mapping[str, object]] = {
            "store": {"kind": "etcd", "path": str(self.database)},
            "etcd": {"endpoints": list(etcd.endpoints)},
        }
        host.path(config).write_text(_toml(tables), encoding="utf-8")
        self._argv = [sys.executable, "-m", "ipamd", "--config", config, "--socket", self.socket, "--node", name]
        self._argv += ["--http-listen", f"127.0.0.1:{port}"]

    @property
    def outside(self) -> str:
        """Its socket, as every host sees it."""
        return str(self._host.path(self.socket))


def _cluster(stack: ExitStack, members: int) -> EtcdCluster:
    underlay = stack.enter_context(Underlay())
    # A history of many transactions: more than etcd's own quota of 2 GB would not be reached either.
    return stack.enter_context(EtcdCluster(members, "3.4", underlay=underlay))


def _load(host: Host, stack: ExitStack) -> Helper:
    return stack.enter_context(Helper(host, [sys.executable, "-m", "bench.load"]))


def _rate(load: Helper, sockets: Sequence[str], clients: int, seconds: float) -> float:
    """Allocations a second; what was taken is given back."""
    order: dict[str, Any] = {"socket": list(sockets), "clients": clients}
    took = load.ask({"do": "run", "pool": _POOL, "seconds": seconds, **order})["took_us"]
    load.ask({"do": "release", **order})
    return float(len(took) / seconds)


def _blocks(plan: Plan, place: Path, stack: ExitStack) -> Iterator[Row]:
    etcd = _cluster(stack, 1)
    host = stack.enter_context(Host("blocks", plugins=False))
    etcd.underlay.join(host, _FIRST)
    alone = Daemon(host, "alone", place, 9464)
    member = Member(host, "member", place, 9465, etcd)
    load = _load(host, stack)
    for daemon, mode in ((alone, ""), (member, "node-block")):
        daemon.start()
        order = {"do": "pool", "socket": daemon.socket, "pool": _POOL, "subnet": "10.0.0.0/12", "mode": mode}
        load.ask(order)
        _rate(load, [daemon.socket], 8, _WINDOW_S)
    samples: dict[Daemon, list[list[float]]] = {alone: [], member: []}
    for number in range(plan.rounds):
        if number and plan.budget.over:
            break
        for daemon in (alone, member) if number % 2 else (member, alone):
            samples[daemon].append([_rate(load, [daemon.socket], 8, max(0.3, _WINDOW_S * plan.scale))])
    for daemon in (alone, member):
        daemon.stop()
    yield finished(plan, BLOCK_RATE, samples[member], samples[alone])


def _addresses(plan: Plan, place: Path, stack: ExitStack) -> Iterator[Row]:
    etcd = _cluster(stack, 3)
    members, bare = [], []
    for number in range(NODES):
        host = stack.enter_context(Host(f"node{number}", plugins=False))
        etcd.underlay.join(host, _FIRST + number)
        member = Member(host, f"node{number}", place, 9465, etcd)
        member.start()
        members.append(member)
        bare.append(stack.enter_context(Helper(host, [sys.executable, "-m", "bench.bare"])))
    load = _load(etcd.underlay.host, stack)
    sockets = [member.outside for member in members]
    order = {"do": "pool", "pool": _POOL, "subnet": "10.0.0.0/12", "mode": "cluster-address"}
    load.ask({**order, "socket": sockets[0]})
    window_s = max(0.5, _WINDOW_S * plan.scale)

    def ours() -> float:
        rate = _rate(load, sockets, NODES * WIDTH, window_s)
        # Releases reach etcd in the background.
        wait_until(lambda: not etcd.keys("/netloom/addresses/"), "etcd hearing of all releases")
        return rate

    def theirs() -> float:
        return _transactions(bare, etcd.endpoints, window_s)

    def least() -> float:
        return _transactions(bare, etcd.endpoints, window_s, least=True)

    wait_until(lambda: _knows(load, sockets), "the pool on every node")
    samples: dict[Callable[[], float], list[list[float]]] = {ours: [], theirs: [], least: []}
    for work in samples:
        work()
    for number in range(plan.rounds):
        if number and plan.budget.over:
            break
        for work in (ours, theirs, least) if number % 2 else (least, theirs, ours):
            _settle(etcd)
            samples[work].append([work()])
        etcd.compact()
    for member in members:
        member.stop()
    yield finished(plan, ADDRESS_RATE, samples[ours], samples[theirs])
    yield finished(plan, ADDRESS_LEAST, samples[ours], samples[least])


def _settle(etcd: EtcdCluster) -> None:
    """Waits until etcd has done what the last measurement left to it, which is no part of the next: its keys are taken
    away, and the history is compacted. Who came after whom made half of a rate's difference.
    """
    until_s = time.monotonic() + _SETTLE_S
    used_s = _cpu_s(etcd)
    while time.monotonic() < until_s:
        time.sleep(_LOOK_S)
        before_s, used_s = used_s, _cpu_s(etcd)
        if used_s - before_s < _CALM * _LOOK_S:
            return


def _cpu_s(etcd: EtcdCluster) -> float:
    return sum(cpu_s(member.process.pid) for member in etcd.members.values() if member.process is not None)


def _knows(load: Helper, sockets: Sequence[str]) -> bool:
    """Whether each node has the pool."""
    order = {"pool": _POOL, "clients": len(sockets), "socket": list(sockets)}
    try:
        load.ask({"do": "run", "seconds": 0.1, **order})
    except BenchError:
        return False
    finally:
        load.ask({"do": "release", **order})
    return True


def _transactions(bare: Sequence[Helper], endpoints: Sequence[str], seconds: float, least: bool = False) -> float:
    begin_s = time.monotonic() + _LEAD_S
    request: dict[str, Any] = {"endpoints": list(endpoints), "width": WIDTH, "least": least}
    request |= {"begin_s": begin_s, "end_s": begin_s + seconds}
    for helper in bare:
        helper.say(request)
    return sum(len(helper.answer()["took_us"]) for helper in bare) / seconds


def _claims(stack: ExitStack) -> Iterator[Row]:
    etcd = _cluster(stack, 1)
    argv = [sys.executable, "-m", "bench.claims"]
    claims = stack.enter_context(Helper(etcd.underlay.host, argv))
    found = claims.ask({"endpoints": list(etcd.endpoints), "nodes": CLAIMANTS})
    if found["blocks"] != CLAIMANTS:
        raise BenchError(f"{CLAIMANTS} nodes claimed {found['blocks']} different blocks")
    yield row(CLAIM_TIME, [[found["took_s"]]])
    yield row(CLAIM_RETRIES, [found["retries"]])


def _many(many: Many, place: Path, stack: ExitStack) -> Iterator[Row]:
    etcd = _cluster(stack, 1)
    host = stack.enter_context(Host("many", plugins=False))
    etcd.underlay.join(host, _FIRST)
    member = Member(host, "many", place, 9465, etcd)
    member.start()
    load = _load(host, stack)
    load.ask({"do": "pool", "socket": member.socket, "pool": _POOL, "subnet": "10.0.0.0/12", "mode": "node-block"})
    full = many.blocks * _USABLE
    # So that each block keeps some: nearly all blocks are full before any address is given back.
    order = {"do": "fill", "socket": member.socket, "clients": 32, "pool": _POOL}
    load.ask({**order, "count": full, "spare": full - many.taken}, limit_s=600)
    lists = [load.ask({"do": "read", "socket": member.socket}) for _ in range(3)]
    if any(one["count"] != many.taken for one in lists):
        raise BenchError(f"wanted {many.taken} allocations in the list, found {lists[0]['count']}")
    loaded_mb = member.resident_mb()
    member.stop()
    starts = [member.start()]
    for _ in range(2):
        member.stop()
        starts.append(member.start())
    lists += [load.ask({"do": "read", "socket": member.socket}) for _ in range(2)]
    held = len(etcd.keys("/netloom/blocks/"))
    # A node in a rush claims up to 16 at once, and gives back what it did not need.
    if not 0.98 * many.blocks <= held <= 1.02 * many.blocks + 16:
        raise BenchError(f"wanted about {many.blocks} blocks, found {held}")
    yield row(many.memory, [[loaded_mb]])
    yield row(many.restarted, [[member.resident_mb()]])
    yield row(many.start, [starts])
    yield row(many.listing, [[one["first_ms"]] for one in lists], [[one["last_ms"]] for one in lists])
