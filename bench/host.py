"""What the measurements share: errors, the time that is left, processes that answer line by line, ipamd of a host."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.stats import Row, Spec, row
from tests.hosts import Host

_END_S = 5.0


class BenchError(Exception):
    """Something could not be measured; the text says what was wanted and what was found."""


class Budget:
    """The time that a whole run may take."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end_s


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    rounds: of each comparison; limits are meant for 7 and more.
    scale: how many samples each round takes, relative to a full run.
    taken: how many addresses count as many.
    """

    rounds: int
    scale: float
    taken: int
    budget: Budget

    def samples(self, full: int) -> int:
        """How many of a full run's samples this run takes in a round."""
        return max(2, round(full * self.scale))


class Helper:
    """A process of a host that answers each JSON line with another. Teardown of the host ends it."""

    def __init__(self, host: Host, argv: Sequence[str]) -> None:
        self._what = " ".join(argv[-2:])
        self._process = host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its input ends it, and it its children; one that is busy is killed."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, request: Mapping[str, Any], limit_s: float = 180.0) -> dict[str, Any]:
        """Raises BenchError where no answer comes, or the answer is {"error": text}."""
        self.say(request)
        return self.answer(limit_s)

    def say(self, request: Mapping[str, Any]) -> None:
        """Asks, and does not wait."""
        sink = self._process.stdin
        assert sink is not None
        try:
            sink.write(json.dumps(request) + "\n")
            sink.flush()
        except BrokenPipeError:
            raise BenchError(f"{self._what} ended with status {self._process.wait()}") from None

    def answer(self, limit_s: float = 180.0) -> dict[str, Any]:
        """Waits for what was asked."""
        source = self._process.stdout
        assert source is not None
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            if not selector.select(limit_s):
                self._process.kill()
                raise BenchError(f"{self._what}: no answer within {limit_s:g} s")
        line = source.readline()
        if not line:
            raise BenchError(f"{self._what} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self._what}: {answer['error']}")
        return answer


def runner(host: Host) -> Helper:
    """The measuring client, inside the host."""
    return Helper(host, [sys.executable, "-I", "-S", str(Path(__file__).with_name("runner.py"))])


def finished(plan: Plan, spec: Spec, ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]] | None) -> Row:
    """The row; its note tells when the time was over before all rounds were."""
    if len(ours) < plan.rounds:
        spec = spec.noted(f"out of time after {len(ours)} of {plan.rounds} rounds")
    return row(spec, ours, peer)
