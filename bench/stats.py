"""From samples to a row: medians of rounds, the ratio of each round, and how far the rounds are apart. Pure.

A round measures ours and the peer one right after the other, so what else the machine does hits both. The ratio is
taken within each round; the row's ratio is the median of those, and its spread goes from the smallest to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

Better = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Spec:
    """What is measured, before it is. The limit and the aim are for the ratio where there is a peer, else for ours."""

    name: str
    unit: str
    better: Better = "lower"
    limit: float | None = None
    aim: float | None = None
    note: str = ""

    def noted(self, *more: str) -> Spec:
        """With more words in the note."""
        return replace(self, note="; ".join(text for text in (self.note, *more) if text))


class Row(msgspec.Struct, frozen=True):
    """One line of out/bench.json. `ours` and `peer` are medians of the rounds' medians; a p95 is over all samples.

    `ours` is None where nothing could be measured; the note says why. `peer` is None where there is no peer. `spread`
    is the smallest and the largest of the rounds: of their ratios, or of ours where there is no peer.
    """

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    limit: float | None = None
    aim: float | None = None
    spread: tuple[float, float] | None = None
    ours_p95: float | None = None
    peer_p95: float | None = None
    better: Better = "lower"
    rounds: int = 0
    note: str = ""

    @property
    def judged(self) -> float | None:
        """What the limit is compared with: the ratio where there is a peer, else ours."""
        return self.ours if self.peer is None else self.ratio


def median(samples: Sequence[float]) -> float:
    """The middle one, or the mean of the middle two. Raises ValueError where there is none."""
    if not samples:
        raise ValueError("the median of nothing")
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def quantile(samples: Sequence[float], part: float) -> float:
    """The smallest sample that at least `part` (0 … 1) of all do not exceed. Raises ValueError where there is none."""
    if not samples:
        raise ValueError("a quantile of nothing")
    return sorted(samples)[max(0, math.ceil(part * len(samples)) - 1)]


def interval(samples: Sequence[float], doubt: float = 0.05) -> tuple[float, float]:
    """Between which two the median of all that could be sampled lies, but for the doubt; whatever the distribution.

    By order statistics: how many of n samples are below the true median is binomial. Fewer than six samples cannot say
    it at 5 %: then the smallest and the largest. Raises ValueError where there is none.
    """
    if not samples:
        raise ValueError("an interval of nothing")
    ordered = sorted(samples)
    count = len(ordered)
    outside, cut = 0.0, 0
    while cut < (count - 1) // 2:
        outside += 2 * math.comb(count, cut) / 2**count
        if outside > doubt:
            break
        cut += 1
    cut = max(0, cut - 1)
    return ordered[cut], ordered[count - 1 - cut]


def row(spec: Spec, ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]] | None = None) -> Row:
    """The row of what was sampled, a list for each round; with a peer, both have the same rounds.

    Raises ValueError for no round, an empty one, rounds that do not pair, or a peer's median of 0.
    """
    if peer is not None and len(peer) != len(ours):
        raise ValueError(f"{spec.name}: {len(ours)} rounds of ours, {len(peer)} of the peer")
    own = [median(samples) for samples in ours]
    others = None if peer is None else [median(samples) for samples in peer]
    if others is not None and 0 in others:
        raise ValueError(f"{spec.name}: the peer's median is 0, which nothing can be compared with")
    ratios = None if others is None else [mine / other for mine, other in zip(own, others, strict=True)]
    apart = own if ratios is None else ratios
    return Row(
        name=spec.name,
        unit=spec.unit,
        ours=median(own),
        peer=None if others is None else median(others),
        ratio=None if ratios is None else median(ratios),
        limit=spec.limit,
        aim=spec.aim,
        spread=(min(apart), max(apart)),
        ours_p95=quantile([sample for samples in ours for sample in samples], 0.95),
        peer_p95=None if peer is None else quantile([sample for samples in peer for sample in samples], 0.95),
        better=spec.better,
        rounds=len(ours),
        note=spec.note,
    )


def absent(spec: Spec, why: str, *, excused: bool) -> Row:
    """The row of what could not be measured. `excused`: it has no limit then, so that nobody fails for it."""
    note = spec.noted(f"not measured: {why}").note
    limit = None if excused else spec.limit
    return Row(spec.name, spec.unit, limit=limit, aim=spec.aim, better=spec.better, note=note)
