"""The judge: from clients' own logs, whether an address ever had two owners, and who owns what in the end.

An address is owned from the moment at which the answer to an Allocate arrived until the moment before a Release was
sent. That is the shortest that it can have been, so two intervals that overlap are always a fault. All logs are of one
machine, so CLOCK_MONOTONIC is the same for all.

A log has one JSON object in each line, written before a request is sent or after its answer arrived:

    {"t": 1, "node": "n1", "n": 7, "e": "ask", "k": "c3", "p": "pool"}     Allocate for key c3; n: the request
    {"t": 2, "node": "n1", "n": 7, "e": "got", "k": "c3", "p": "pool", "g": 5, "new": true, "a": [...]}
    {"t": 3, "node": "n1", "n": 8, "e": "free", "k": "c3", "g": 5}            Release
    {"t": 4, "node": "n1", "n": 8, "e": "freed", "k": "c3"}
    {"t": 5, "node": "n1", "n": 9, "e": "late", "k": "c3", "g": 4}            a Release for a generation long gone
    {"t": 6, "node": "n1", "n": 9, "e": "no", "k": "c3", "c": "UNAVAILABLE", "m": "..."}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a client may be told while things are broken, or a pool is full. All else is a fault.
BEARABLE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS"})
_MOST = 20  # problems that are told; the others are counted


@dataclass(frozen=True, slots=True)
class Holding:
    """One interval of ownership. `end_ns` is None where it goes on."""

    address: str
    node: str
    key: str
    generation: int
    begin_ns: int
    end_ns: int | None

    def __str__(self) -> str:
        until = "on" if self.end_ns is None else f"until {self.end_ns / 1e9:.6f}"
        return f"{self.node}/{self.key} generation {self.generation} from {self.begin_ns / 1e9:.6f} {until}"


@dataclass(frozen=True, slots=True)
class Answer:
    """How an Allocate ended."""

    at_ns: int
    took_ns: int
    node: str
    pool: str
    code: str  # "OK", "held" (it had been answered before), or why not
    message: str


@dataclass(slots=True)
class Verdict:
    """What the logs say."""

    holdings: list[Holding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    unknown: set[tuple[str, str]] = field(default_factory=set)  # node and key: the last request has no clear outcome
    answers: list[Answer] = field(default_factory=list)  # to Allocates
    slowest_ns: int = 0  # between a request and its answer or refusal

    @property
    def owned(self) -> dict[tuple[str, str], frozenset[str]]:
        """Node and key → addresses that it has now."""
        found: dict[tuple[str, str], set[str]] = {}
        for holding in self.holdings:
            if holding.end_ns is None:
                found.setdefault((holding.node, holding.key), set()).add(holding.address)
        return {owner: frozenset(addresses) for owner, addresses in found.items()}

    def granted(self, begin_ns: int, end_ns: int, pool: str = "") -> Counter[str]:
        """How many Allocates (from a pool) were answered with new addresses in this time, by node."""
        wanted = (one for one in self.answers if one.code == "OK" and begin_ns <= one.at_ns < end_ns)
        return Counter(one.node for one in wanted if pool in ("", one.pool))

    def refusals(self, begin_ns: int, end_ns: int, pool: str = "") -> Counter[str]:
        """Codes of the Allocates that were refused in this time."""
        wanted = (one for one in self.answers if one.code not in ("OK", "held") and begin_ns <= one.at_ns < end_ns)
        return Counter(one.code for one in wanted if pool in ("", one.pool))

    def assert_clean(self) -> None:
        """Raises AssertionError that names what is wrong."""
        if self.problems:
            more = f"\nand {len(self.problems) - _MOST} more" if len(self.problems) > _MOST else ""
            raise AssertionError("\n".join(self.problems[:_MOST]) + more)

    def compare(self, known: Mapping[tuple[str, str], frozenset[str]]) -> list[str]:
        """What the logs and ipamd's own list do not agree on; `known` is the list, for all nodes together."""
        owned = self.owned
        found = []
        for node, key in sorted(owned.keys() | known.keys()):
            ours, theirs = owned.get((node, key), frozenset()), known.get((node, key), frozenset())
            if ours == theirs:
                continue
            if (node, key) in self.unknown and not ours:
                continue  # asked for, or given back, and nobody heard the answer
            what = "lost" if not theirs else "leaked" if not ours else "changed"
            found.append(f"{what}: {node}/{key} owns {sorted(ours)}, ipamd has {sorted(theirs)}")
        return found


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of all logs in the order of time. A last line that a killed client left half written is left out."""
    events = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                events.append(json.loads(line))
    # At one moment: what ends a holding before what begins one.
    return sorted(events, key=lambda event: (event["t"], event["e"] == "got"))


class Tail:
    """What is written to a log from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._at = file.stat().st_size if file.exists() else 0
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """The lines that came whole since the last time."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as log:
            log.seek(self._at)
            found = log.read()
        self._at += len(found)
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [json.loads(line) for line in lines]


def judge(events: Iterable[Mapping[str, Any]], bearable: frozenset[str] = BEARABLE) -> Verdict:
    """Reads events in the order of time."""
    verdict = Verdict()
    case = _Case(verdict, bearable)
    for event in events:
        case.take(event)
    case.close()
    verdict.problems += _overlaps(verdict.holdings)
    return verdict


class _Case:
    """Goes through the events and keeps what each key holds."""

    def __init__(self, verdict: Verdict, bearable: frozenset[str]) -> None:
        self._verdict = verdict
        self._bearable = bearable
        self._held: dict[tuple[str, str], tuple[int, int, tuple[str, ...]]] = {}  # begin, generation, addresses
        self._sent: dict[tuple[str, int], tuple[int, str]] = {}  # node and request → when, which event

    def take(self, event: Mapping[str, Any]) -> None:
        owner = (event["node"], event["k"])
        kind = event["e"]
        verdict = self._verdict
        if kind in ("ask", "free", "late"):
            self._sent[event["node"], event["n"]] = (event["t"], kind)
            if kind == "free":
                self._end(owner, event["t"])
            if kind != "late":
                verdict.unknown.add(owner)
            return
        sent_ns, what = self._sent.pop((event["node"], event["n"]), (event["t"], ""))
        verdict.slowest_ns = max(verdict.slowest_ns, event["t"] - sent_ns)
        if what == "ask" or kind == "got":
            code, message = event.get("c", "OK" if event.get("new", True) else "held"), event.get("m", "")
            verdict.answers.append(
                Answer(event["t"], event["t"] - sent_ns, owner[0], event.get("p", ""), code, message)
            )
        if kind == "got":
            self._begin(owner, event)
        elif kind == "no":
            verdict.refused[event["c"]] += 1
            if event["c"] not in self._bearable:
                verdict.problems.append(f"{owner[0]}/{owner[1]}: {what} was refused: {event['c']}: {event['m']}")
            # Two that say for certain that nothing was done.
            if what == "ask" and event["c"] in ("RESOURCE_EXHAUSTED", "ALREADY_EXISTS"):
                verdict.unknown.discard(owner)
        if kind in ("got", "freed") and what != "late":
            verdict.unknown.discard(owner)

    def close(self) -> None:
        for owner in list(self._held):
            self._end(owner, None)

    def _begin(self, owner: tuple[str, str], event: Mapping[str, Any]) -> None:
        addresses = tuple(event["a"])
        if not addresses:
            self._verdict.problems.append(f"{owner[0]}/{owner[1]}: an answer without an address")
        before = self._held.get(owner)
        if before is None:
            self._held[owner] = (event["t"], event["g"], addresses)
        elif before[1:] != (event["g"], addresses):
            self._verdict.problems.append(
                f"{owner[0]}/{owner[1]}: asked again and got generation {event['g']} {list(addresses)}, "
                f"while it owned generation {before[1]} {list(before[2])}"
            )
            self._end(owner, event["t"])
            self._held[owner] = (event["t"], event["g"], addresses)

    def _end(self, owner: tuple[str, str], end_ns: int | None) -> None:
        held = self._held.pop(owner, None)
        if held is not None:
            begin_ns, generation, addresses = held
            self._verdict.holdings += [Holding(address, *owner, generation, begin_ns, end_ns) for address in addresses]


def _overlaps(holdings: Iterable[Holding]) -> list[str]:
    of: dict[str, list[Holding]] = {}
    for holding in holdings:
        of.setdefault(holding.address, []).append(holding)
    found = []
    for address, intervals in of.items():
        intervals.sort(key=lambda holding: holding.begin_ns)
        last: Holding | None = None  # the one that goes on longest so far
        for holding in intervals:
            if last is not None and (last.end_ns is None or holding.begin_ns < last.end_ns):
                found.append(f"{address} had two owners: {last}; {holding}")
            if last is None or (last.end_ns is not None and (holding.end_ns is None or holding.end_ns > last.end_ns)):
                last = holding
    return found
