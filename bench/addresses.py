"""ipamd: allocations a second, latency, memory and start, on an empty pool and with many addresses taken.

- Two daemons on one host, alike but for what they hold. Each round measures one right after the other, in changing
  order; only one works at a time. What a run took is released before the next one.
- The databases lie on a disk, whose syncs are measured in each round too.
- The many are allocated through the API, as containers would have done, by 32 clients at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.disk import Syncs, require_disk
from bench.host import BenchError, Helper, Plan, finished
from bench.stats import Row, Spec, absent, row
from bench.warm import answers
from tests.hosts import Host, HostError

CLIENTS = (1, 8, 32)
OTHER_LOAD = "other load on the processors"
_POOL = "bench"
_SUBNET = "10.0.0.0/8"
_WINDOW_S = 0.8
_SYNCS = 60
_RESTARTS = 3
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

_TOGETHER = "clients are processes and share the processors with ipamd"


class Catalogue:
    """The rows of this file, by what they are about; names depend on how many addresses count as many."""

    def __init__(self, taken: int) -> None:
        many = f"{taken:,} taken"
        self.rate = {
            (clients, full): Spec(
                f"ipamd allocations, {_clients(clients)}, {many if full else 'empty pool'}",
                "1/s",
                "higher",
                2000 if clients == 8 else None,
                3000 if clients == 8 else None,
                _TOGETHER,
            )
            for full in (False, True)
            for clients in CLIENTS
        }
        self.latency = {
            clients: Spec(
                f"ipamd Allocate, {_clients(clients)}", "ms", "lower", 1.3, note=f"ours: {many}; peer: empty pool"
            )
            for clients in CLIENTS
        }
        self.release = Spec("ipamd releases, 8 clients, " + many, "1/s", "higher", note=_TOGETHER)
        self.batch = {
            clients: Spec(f"ipamd allocations per fsync, {_clients(clients)}", "", "higher", note=many)
            for clients in CLIENTS
        }
        self.commit = Spec(
            "ipamd commit, 8 clients", "ms", note="mean of a commit with its fsync; peer: the overwriting sync below"
        )
        self.cpu = Spec("ipamd CPU per allocation, 8 clients", "us", note=many)
        self.client_cpu = Spec(
            "client CPU per allocation, 8 clients", "us", note="the plugins' side of it, in Python too"
        )
        self.append = Spec("disk: append 4 KiB, fdatasync", "ms")
        self.overwrite = Spec("disk: overwrite 16 KiB, fdatasync", "ms", note="as a small commit into SQLite's log")
        self.others = Spec(OTHER_LOAD, "%", note="while this benchmark sleeps; 100: all of them")
        self.memory = Spec(f"ipamd resident memory, {many}", "MB", "lower", 110, 80, "after all of the load above")
        self.memory_started = Spec(f"ipamd resident memory, {many}, restarted", "MB", "lower", 110, 80)
        self.start = Spec(f"ipamd start, {many}", "ms", note="exec to the first connection; peer: empty pool")

    @property
    def specs(self) -> list[Spec]:
        return [
            *self.rate.values(),
            *self.latency.values(),
            self.release,
            *self.batch.values(),
            self.commit,
            self.cpu,
            self.client_cpu,
            self.append,
            self.overwrite,
            self.others,
            self.memory,
            self.memory_started,
            self.start,
        ]


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


class Daemon:
    """One ipamd with a database of its own, on a host that has two."""

    def __init__(self, host: Host, name: str, place: Path, port: int) -> None:
        self.name = name
        self.port = port
        self.socket = f"/run/netloom/{name}.sock"
        self.database = place / name / "ipamd.db"
        self._host = host
        self._log = host.directory / f"{name}.log"
        self._argv = [sys.executable, "-m", "ipamd", "--socket", self.socket, "--store", str(self.database)]
        self._argv += ["--http-listen", f"127.0.0.1:{port}", "--node", "bench"]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Milliseconds from its exec to the first connection that it takes."""
        with self._log.open("a", encoding="utf-8") as log:
            began = time.perf_counter()
            process = self._host.popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._process = process
        path = self._host.path(self.socket)

        def serving() -> bool:
            if process.poll() is not None:
                text = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise BenchError(f"ipamd ended with status {process.returncode}: {text}")
            return answers(path)

        deadline = time.monotonic() + 60
        while not serving():
            if time.monotonic() > deadline:
                raise BenchError(f"ipamd took no connection on {self.socket} within 60 s")
            time.sleep(0.001)
        return (time.perf_counter() - began) * 1000

    def stop(self) -> None:
        """SIGTERM; raises BenchError unless it ends with status 0."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(60)
        if status != 0:
            raise BenchError(f"ipamd ended with status {status} on SIGTERM, wanted 0")

    def cpu_s(self) -> float:
        """Processor time since its start."""
        assert self._process is not None
        return cpu_s(self._process.pid)

    def resident_mb(self) -> float:
        """Resident memory in 10^6 bytes (proc(5), status, VmRSS), shared libraries included."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise BenchError("no VmRSS in /proc: ipamd is gone")
        return int(found[1]) * 1024 / 1e6


def cpu_s(pid: int) -> float:
    """A process's processor time since its start: user and system (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def counters(page: str) -> dict[str, float]:
    """The numbers without labels on a page in Prometheus' text format."""
    found = {}
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if name and not name.startswith("#") and "{" not in name:
            found[name] = float(value)
    return found


def other_load(seconds: float = 0.2) -> float:
    """Percent of all processors' time that somebody takes while this process sleeps (proc(5), stat)."""
    before = _processors()
    time.sleep(seconds)
    after = _processors()
    total = sum(after) - sum(before)
    # Fields 4 and 5: idle, and idle while a disk works.
    return 100 * (1 - (after[3] + after[4] - before[3] - before[4]) / total) if total > 0 else 0.0


def _processors() -> list[int]:
    with open("/proc/stat", encoding="ascii") as file:
        return [int(ticks) for ticks in file.readline().split()[1:9]]


class Samples:
    """What the rounds gave, a list for each round."""

    def __init__(self) -> None:
        self.of: dict[object, list[list[float]]] = {}

    def add(self, key: object, samples: Sequence[float]) -> None:
        self.of.setdefault(key, []).append(list(samples))


class Bench:
    """The host, the two daemons and the clients."""

    def __init__(self, plan: Plan, place: Path, stack: ExitStack) -> None:
        self._plan = plan
        self._window_s = max(0.3, _WINDOW_S * plan.scale)
        self._host = stack.enter_context(Host("ipamd", plugins=False))
        self.empty = Daemon(self._host, "empty", place, 9464)
        self.full = Daemon(self._host, "full", place, 9465)
        for daemon in (self.empty, self.full):
            daemon.start()
        self._load = stack.enter_context(Helper(self._host, [sys.executable, "-m", "bench.load"]))
        for daemon in (self.empty, self.full):
            self._ask("pool", daemon, pool=_POOL, subnet=_SUBNET)

    def fill(self, count: int) -> None:
        """Takes so many addresses of the full one, for good."""
        self._ask("fill", self.full, clients=32, pool=_POOL, count=count)

    def window(self, daemon: Daemon, clients: int, samples: Samples) -> None:
        """One run of so many clients, and the release of what it took."""
        before, used_s = self._counters(daemon), daemon.cpu_s()
        ran = self._ask("run", daemon, clients=clients, pool=_POOL, seconds=self._window_s)
        used_s = daemon.cpu_s() - used_s
        after = self._counters(daemon)
        took = [micros / 1000 for micros in ran["took_us"]]
        if not took:
            raise BenchError(f"no allocation was answered within {self._window_s:g} s")
        full = daemon is self.full
        samples.add(("rate", clients, full), [len(took) / self._window_s])
        samples.add(("latency", clients, full), took)
        samples.add(("cpu", clients, full), [used_s * 1e6 / len(took)])
        samples.add(("client_cpu", clients, full), [ran["cpu_s"] * 1e6 / len(took)])
        commits = _gained(before, after, "netloom_ipamd_commit_batch_size_count")
        samples.add(("batch", clients, full), [_gained(before, after, "netloom_ipamd_commit_batch_size_sum") / commits])
        synced_s = _gained(before, after, "netloom_ipamd_fsync_seconds_sum")
        samples.add(("commit", clients, full), [synced_s * 1000 / commits])
        gave = self._ask("release", daemon, clients=clients)
        samples.add(("release", clients, full), [len(gave["took_us"]) / gave["wall_s"]])

    def _counters(self, daemon: Daemon) -> dict[str, float]:
        return counters(self._load.ask({"do": "page", "port": daemon.port})["text"])

    def _ask(self, do: str, daemon: Daemon, **more: object) -> dict[str, Any]:
        return self._load.ask({"do": do, "socket": str(daemon.socket), **more}, limit_s=300)


def _gained(before: dict[str, float], after: dict[str, float], name: str) -> float:
    gained = after.get(name, 0.0) - before.get(name, 0.0)
    if gained <= 0:
        raise BenchError(f"ipamd's metric {name} did not grow while it served allocations")
    return gained


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    catalogue = Catalogue(plan.taken)
    if not any(wanted(spec) for spec in catalogue.specs):
        return
    samples = Samples()
    try:
        kind = require_disk(place)
        with ExitStack() as stack:
            _run(plan, place, stack, samples, say)
    except (BenchError, HostError, OSError, subprocess.TimeoutExpired) as error:
        yield from (absent(spec, str(error), excused=False) for spec in catalogue.specs if wanted(spec))
        return
    once = (catalogue.memory, catalogue.memory_started, catalogue.start)
    for spec, ours, peer in _rows(catalogue, samples, f"on {kind}"):
        if wanted(spec):
            yield row(spec, ours, peer) if spec in once else finished(plan, spec, ours, peer)


def _run(
    plan: Plan,
    place: Path,
    stack: ExitStack,
    samples: Samples,
    say: Callable[[str], None],
) -> None:
    bench = Bench(plan, place, stack)
    syncs = Syncs(place)
    stack.callback(syncs.close)
    say(f"ipamd: {plan.taken:,} addresses are taken, through the API")
    bench.fill(plan.taken)
    say(f"ipamd: {' and '.join(map(str, CLIENTS))} clients, {plan.rounds} rounds")
    for number in range(plan.rounds):
        if number and plan.budget.over:
            break
        samples.add("others", [other_load()])
        samples.add("append", syncs.append(_SYNCS))
        samples.add("overwrite", syncs.overwrite(_SYNCS))
        daemons = (bench.full, bench.empty) if number % 2 else (bench.empty, bench.full)
        for clients in CLIENTS:
            for daemon in daemons:
                bench.window(daemon, clients, samples)
    samples.add("memory", [bench.full.resident_mb()])
    say("ipamd: restarts")
    for _ in range(_RESTARTS):
        for daemon in (bench.empty, bench.full):
            daemon.stop()
            samples.add(("start", daemon.name), [daemon.start()])
    samples.add("memory_started", [bench.full.resident_mb()])


def _rows(
    catalogue: Catalogue, samples: Samples, where: str
) -> Iterable[tuple[Spec, list[list[float]], list[list[float]] | None]]:
    of = samples.of
    for (clients, full), spec in catalogue.rate.items():
        yield spec, of["rate", clients, full], None
    for clients, spec in catalogue.latency.items():
        yield spec, of["latency", clients, True], of["latency", clients, False]
    yield catalogue.release, of["release", 8, True], None
    for clients, spec in catalogue.batch.items():
        yield spec, of["batch", clients, True], None
    yield catalogue.commit, of["commit", 8, True], of["overwrite"]
    yield catalogue.cpu, of["cpu", 8, True], None
    yield catalogue.client_cpu, of["client_cpu", 8, True], None
    yield catalogue.append.noted(where), of["append"], None
    yield catalogue.overwrite.noted(where), of["overwrite"], None
    yield catalogue.others, of["others"], None
    yield catalogue.memory, of["memory"], None
    yield catalogue.memory_started, of["memory_started"], None
    yield catalogue.start, of["start", "full"], of["start", "empty"]
