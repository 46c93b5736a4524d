"""The launcher and the warm workers by themselves: start, the steps of a request, memory, growth, restart.

A host of its own with ipamd and a master with four workers, never more. The steps are those of `netloom trace`, from
requests of which nothing else is measured at the same time. Growth is what is more after thousands of ADDs and DELs
than it was after the first few hundred: what a worker keeps for good it has by then.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import warm
from bench.attach import MASQUERADED, NAMESPACES, Side, side
from bench.host import BenchError, Plan, finished
from bench.stats import Row, Spec, absent
from telemetry import traces
from tests.hosts import CNI_BIN, Host, HostError, wait_until

_ONE = "/run/netloom/one.sock"  # of the master with one worker
_STEPS = (
    "receive",
    "parse",
    "lock",
    "namespace",
    "allocate",
    "record",
    "bridge link",
    "gateway",
    "veth",
    "nftables",
    "configure",
    "deliver",
    "unlock",
)
_NO_WORK = {"CNI_COMMAND": "VERSION", "NETLOOM_CNI_SOCKET": "/nonexistent"}
_ALONE = 20
_PAIRS, _QUICK_PAIRS, _FIRST_PAIRS = 10_000, 640, 640
_DYING_S = 10.0
_GROWTH_S = 120.0  # where the machine does other things
_GROWN_MB = 4.0  # a worker's arenas come and go by a few hundred kB

ALONE = Spec(
    "launcher alone", "ms", "lower", 1.0, note="neither a worker nor a cold way: starts, looks for both, fails"
)
INSIDE = Spec("bridge ipMasq ADD inside the worker", "ms", note="from the connection to the lock's end")
STEPS = {
    name: Spec(f"bridge ipMasq ADD, step {name}", "ms", note="of the row above; see netloom trace") for name in _STEPS
}
REST = Spec("bridge ipMasq ADD, other steps", "ms", note="of the row above; see netloom trace")
MEMORY = Spec("memory of master, helper and 4 workers", "MB", "lower", 150.0, note="proportional set size, at the end")
GROWTH = {
    "memory": Spec("growth: memory", "MB", "lower", _GROWN_MB, note="of all workers, proportional set size"),
    "descriptors": Spec("growth: open descriptors", "", "lower", 0.0, note="of all workers and the master"),
    "namespaces": Spec(
        "growth: network namespaces", "", "lower", 0.0, note="that processes of the host are in or hold"
    ),
    "links": Spec("growth: links on the host", "", "lower", 0.0),
}
RESTART = Spec("restart of a worker", "ms", note="from kill -9 of the only worker to the answer of the next request")


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [ALONE, INSIDE, *STEPS.values(), REST, RESTART, *GROWTH.values(), MEMORY]


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    mine = [spec for spec in specs() if wanted(spec)]
    if not mine:
        return
    found: dict[str, Row] = {}
    try:
        with ExitStack() as hosts:
            masters = []

            def start(host: Host, at: Path) -> None:
                masters.append(warm.start(host, at, hosts, ("--max-workers", "4")).pid)

            here = Workers(side(hosts, "workers", CNI_BIN, {"type": "ipamd"}, place, start), masters[0])
            here.side.prove(MASQUERADED)
            for names, work in (
                ([ALONE], _alone),
                ([INSIDE, *STEPS.values(), REST], _steps),
                ([RESTART], _restart),
                ([*GROWTH.values(), MEMORY], _growth),
            ):
                if any(wanted(spec) for spec in names):
                    say(names[0].name)
                    try:
                        found.update((row.name, row) for row in work(plan, here, place))
                    except (BenchError, HostError, OSError) as error:
                        found.update((spec.name, absent(spec, str(error), excused=False)) for spec in names)
    except (BenchError, HostError, OSError) as error:
        yield from (found.get(spec.name) or absent(spec, str(error), excused=not warm.exists()) for spec in mine)
        return
    yield from (found[spec.name] for spec in mine)


class Workers:
    """A host's side with the master behind it."""

    def __init__(self, one: Side, master: int) -> None:
        self.side = one
        self.master = master

    @property
    def processes(self) -> list[int]:
        """Master, helper and workers."""
        return [self.master, *warm.children(self.master)]

    def pairs(self, count: int) -> int:
        """So many ADDs and DELs, several at once, or what there is time for; how many they were."""
        conf = MASQUERADED.conf(self.side.ipam)
        done, until_s = 0, time.monotonic() + _GROWTH_S
        while done < count and time.monotonic() < until_s:
            for verb in ("ADD", "DEL"):
                self.side.run([self.side.call(verb, conf, index) for index in range(NAMESPACES)], 8)
            done += NAMESPACES
        return done


def _alone(plan: Plan, here: Workers, _place: Path) -> Iterable[Row]:
    call = {"argv": [f"{CNI_BIN}/bridge"], "env": _NO_WORK, "stdin": ""}
    took = []
    for _ in range(plan.rounds):
        answer = here.side.client.ask({"width": 1, "limit_s": 60, "calls": [call] * plan.samples(_ALONE)})
        if set(answer["status"]) != {1}:
            raise BenchError(f"the launcher without worker and cold way exited {answer['status']}, wanted 1")
        took.append([ns / 1e6 for ns in answer["took_ns"]])
    yield finished(plan, ALONE, took, None)


def _steps(plan: Plan, here: Workers, _place: Path) -> Iterable[Row]:
    samples: dict[str, list[list[float]]] = {name: [] for name in (*_STEPS, REST.name, INSIDE.name)}
    run_dir = str(here.side.host.path("/run/netloom"))
    for _ in range(plan.rounds):
        before = {one.id for one in traces.read(run_dir).requests}
        here.side.attach_and_detach(MASQUERADED, plan.samples(16), 1)
        new = [one for one in traces.read(run_dir).requests if one.id not in before and one.verb == "ADD"]
        if not new or any(one.way != "warm" for one in new):
            raise BenchError(f"wanted traces of warm ADDs, found {[one.way for one in new]}")
        for name in _STEPS:
            samples[name].append([one.steps.get(name, 0) / 1e6 for one in new])
        samples[INSIDE.name].append([one.total_ns / 1e6 for one in new])
        samples[REST.name].append([(one.total_ns - _named(one.steps)) / 1e6 for one in new])
    yield finished(plan, INSIDE, samples[INSIDE.name], None)
    for name, spec in STEPS.items():
        yield finished(plan, spec, samples[name], None)
    yield finished(plan, REST, samples[REST.name], None)


def _named(steps: Mapping[str, int]) -> int:
    return sum(steps.get(name, 0) for name in _STEPS)


def _restart(plan: Plan, here: Workers, place: Path) -> Iterable[Row]:
    took = []
    with ExitStack() as until:
        master = warm.start(here.side.host, place, until, ("--workers", "1", "--max-workers", "1"), _ONE)
        call: dict[str, Any] = here.side.call("VERSION", {"cniVersion": "1.0.0", "type": "bridge"})
        call["env"] |= {"NETLOOM_CNI_SOCKET": _ONE, "NETLOOM_CNI_WAIT_MS": "30000"}
        for _ in range(plan.rounds):
            here.side.run([call], 1)
            (worker,) = warm.workers(master.pid)
            began = time.perf_counter()
            os.kill(worker, signal.SIGKILL)
            # One that dies while it accepts takes the connection along, and its launcher goes the cold way.
            while not _is_dead(worker) and time.perf_counter() - began < _DYING_S:
                time.sleep(0.0002)
            here.side.run([call], 1)
            took.append([(time.perf_counter() - began) * 1000])
            wait_until(lambda: len(warm.workers(master.pid)) == 1, "the new worker")
            if warm.workers(master.pid) == [worker]:
                raise BenchError(f"worker {worker} was killed, and is there all the same")
    yield finished(plan, RESTART, took, None)


def _is_dead(pid: int) -> bool:
    """Whether it runs no more, reaped or not (proc(5), stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _growth(plan: Plan, here: Workers, _place: Path) -> Iterable[Row]:
    pairs = _PAIRS if plan.scale >= 1 else _QUICK_PAIRS
    here.pairs(_FIRST_PAIRS)
    before = _inventory(here)
    done = here.pairs(pairs)
    after = _inventory(here)
    for name, spec in GROWTH.items():
        counted = spec.noted(f"over {done:,} ADDs and DELs, 8 at once, after the first {_FIRST_PAIRS}")
        # With one round there is nothing that could be out of time.
        yield finished(_once(plan), counted, [[after[name] - before[name]]], None)
    yield finished(_once(plan), MEMORY, [[sum(pss_mb(pid) for pid in here.processes)]], None)


def _once(plan: Plan) -> Plan:
    return Plan(1, plan.scale, plan.taken, plan.budget)


def _inventory(here: Workers) -> dict[str, float]:
    workers = warm.workers(here.master)
    _settle(here)
    return {
        "memory": sum(pss_mb(pid) for pid in workers),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (here.master, *workers)),
        "namespaces": len(_namespaces(here)),
        "links": len(here.side.host.links()),
    }


def _settle(here: Workers) -> None:
    """Until the kernel has freed what was deleted last: its namespaces' sockets and links go a little later."""
    counts: list[int] = []

    def still() -> bool:
        counts.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in here.processes))
        return len(counts) > 5 and len(set(counts[-5:])) == 1

    wait_until(still, "workers that do nothing", lambda: str(counts[-5:]))


def _namespaces(here: Workers) -> set[str]:
    """Network namespaces that somebody is in, or has a descriptor of, as far as the host's own processes go."""
    found = set()
    for pid in here.side.host.processes():
        places = [f"/proc/{pid}/ns/net"]
        try:
            places += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
            found |= {os.readlink(place) for place in places if os.readlink(place).startswith("net:")}
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def pss_mb(pid: int) -> float:
    """Proportional set size in 10^6 bytes (proc(5), smaps_rollup)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    match = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise BenchError(f"no Pss of process {pid}: it is gone")
    return int(match[1]) * 1024 / 1e6
