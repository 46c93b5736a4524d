"""`make bench` and `make bench-check`.

A run measures ours and the peers in turn, in private namespaces, prints a table and writes out/bench.json: a list of
rows (see `bench.stats.Row`). Runs of a part write elsewhere: --only to out/bench-part.json, --quick to
out/bench-quick.json. --check compares the rows with their limits; it runs first where there is nothing to read.

Exit statuses: 0; 1 a row is over its limit, or something failed; 2 the command line is wrong, or another run is there;
128 and the signal's number when interrupted. In each case nothing stays behind.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from bench import (
    addresses,
    attach,
    between,
    chained,
    cluster,
    disk,
    engine,
    host_local,
    overlay,
    report,
    traffic,
    workers,
)
from bench.host import BenchError, Budget, Plan
from bench.stats import Row, Spec
from bench.verdict import complaints
from tests.hosts import ROOT, HostError, keep_in_memory, remove_scratch, sweep

OUT = ROOT / "out"
_FULL_S, _QUICK_S = 390.0, 80.0  # after which the rounds of a comparison end early
_BUSY = 15.0  # percent of the processors; ratios bear it, rates do not


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Netloom beside its peers, measured in one run.")
    parser.add_argument("--check", action="store_true", help="exit 1 when a row of the last run is over its limit")
    parser.add_argument("--run", action="store_true", help="with --check: run first, whatever there is to read")
    parser.add_argument("--quick", action="store_true", help="few rounds, 10,000 addresses; under three minutes")
    parser.add_argument("--only", metavar="PATTERN", help="only rows whose name holds this, or matches it (* and ?)")
    parser.add_argument("--list", action="store_true", help="the names of all rows with their limits, and stop")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 9 (with --quick 3); limits are meant for 7")
    parser.add_argument("--state", type=Path, default=OUT, metavar="DIR", help="a directory on a disk; default: out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    wanted = matcher(given.only)
    if given.list:
        print("\n".join(_listed(_specs(_plan(given)), wanted)))
        return 0
    file = OUT / ("bench-part.json" if given.only else "bench-quick.json" if given.quick else "bench.json")
    try:
        if given.run or not given.check or not file.exists():
            # /run of a host; what must be on a disk is below --state. dockerd's host has a /dev/shm of its own.
            if not (given.only and any(wanted(spec) for spec in engine.specs())):
                keep_in_memory()
            rows = run(given, wanted)
            write(file, rows)
        else:
            rows = read(file)
    except KeyboardInterrupt:
        sys.stderr.write("\nbench: interrupted; everything was removed\n")
        return 130
    except (BenchError, HostError, OSError) as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2
    finally:
        remove_scratch()
    print("\n".join(report.table(rows, report.style(os.environ, sys.stdout.isatty()))), flush=True)
    return verdict(rows, file) if given.check else 0


def verdict(rows: Sequence[Row], file: Path) -> int:
    """Says on stderr what is over its limit; 1 where something is."""
    found = complaints(rows)
    for text in found:
        sys.stderr.write(f"over its limit: {text}\n")
    load = next((row.ours for row in rows if row.name == addresses.OTHER_LOAD and row.ours is not None), 0.0)
    if found and load > _BUSY:
        sys.stderr.write(f"bench: others took {load:.0f} % of the processors meanwhile: ours would be better alone\n")
    limits = sum(row.limit is not None for row in rows)
    sys.stderr.write(f"bench: {limits - len(found)} of {limits} limits hold ({file})\n")
    return 1 if found else 0


def run(given: argparse.Namespace, wanted: Callable[[Spec], bool]) -> list[Row]:
    """Measures all that is wanted. Raises BenchError, HostError."""
    plan = _plan(given)
    if not any(wanted(spec) for spec in _specs(plan)):
        raise BenchError(f"no row is called {given.only}: --list names all of them")
    for what in sweep():
        _say(f"left by a dead run: {what}")
    rows: list[Row] = []
    with disk.scratch(given.state) as place:
        # dockerd's rows only where they are named: they take minutes of their own.
        parts = (
            attach,
            chained,
            workers,
            host_local,
            traffic,
            between,
            overlay,
            addresses,
            cluster,
            *([engine] if given.only else []),
        )
        for part in parts:
            rows += part.measure(plan, place, wanted, _say)
    return rows


def _plan(given: argparse.Namespace) -> Plan:
    if given.quick:
        return Plan(given.rounds or 3, 0.4, 10_000, Budget(_QUICK_S))
    return Plan(given.rounds or 9, 1.0, 100_000, Budget(_FULL_S))


def _specs(plan: Plan) -> list[Spec]:
    found = [
        *attach.specs(),
        *chained.specs(),
        *workers.specs(),
        *host_local.specs(plan),
        *traffic.specs(),
        *between.specs(),
        *overlay.specs(),
    ]
    return found + addresses.Catalogue(plan.taken).specs + cluster.specs(plan) + engine.specs()


def matcher(pattern: str | None) -> Callable[[Spec], bool]:
    """Which rows a pattern names: all without one, else a part of the name, or the whole with * and ?."""
    if not pattern:
        return lambda _spec: True
    word = pattern.lower()
    return lambda spec: word in spec.name.lower() or fnmatch.fnmatchcase(spec.name.lower(), word)


def _listed(specs: Iterable[Spec], wanted: Callable[[Spec], bool]) -> list[str]:
    lines = []
    for spec in specs:
        if wanted(spec):
            sign = "<=" if spec.better == "lower" else ">="
            bound = "" if spec.limit is None else f"limit {sign} {spec.limit:g}"
            aim = "" if spec.aim is None else f", aim {spec.aim:g}"
            lines.append(f"{spec.name:50} {bound}{aim}".rstrip())
    return lines


def write(file: Path, rows: Sequence[Row]) -> None:
    """Replaces the file by rename."""
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")
    new.replace(file)


def read(file: Path) -> list[Row]:
    """Raises BenchError where the file is none of ours."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Row])
    except msgspec.DecodeError as error:
        raise BenchError(f"{file}: {error}; run the benchmark again") from None


def _say(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    # Unwinds like Ctrl-C, so that hosts clean up; the status says which signal it was.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
