"""Says in the log when a pool is nearly full: once at each mark, and once more when it is below again."""

import logging
from collections.abc import Iterable, Iterator

from msgspec import Struct

from ipamd.pool import Pool
from ipamd.pools import Pools
from telemetry import log

MARKS = (80, 95)  # percent
_SLACK = 3  # a pool that swings about a mark is told of once

_logger = logging.getLogger("ipamd.fill")


class Fill(Struct, frozen=True):
    """How full one family of a pool is: of addresses, or of blocks where nodes claim those."""

    pool: str
    family: str
    unit: str
    used: int
    size: int


class FillWatch:
    """Is shown how full the pools are, again and again."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], int] = {}

    def look(self, fills: Iterable[Fill]) -> None:
        """Logs what is new since the last look."""
        seen = set()
        for fill in fills:
            key = fill.pool, fill.family
            seen.add(key)
            before = self._marks.get(key, 0)
            now = _mark(fill, before)
            if now == before:
                continue
            self._marks[key] = now
            full = now > before
            text = f"pool is {now} % full" if full else f"pool is less than {before} % full again"
            log.event(_logger, "warning" if full else "info", text, pool=fill.pool, family=fill.family,
                      unit=fill.unit, used=fill.used, size=fill.size)  # fmt: skip
        for key in self._marks.keys() - seen:
            del self._marks[key]


def fills(pools: Pools) -> Iterator[Fill]:
    """Of each pool and family, out of what is in memory."""
    for pool in list(pools.pools.values()):
        yield from _fills(pools, pool)


def _fills(pools: Pools, pool: Pool) -> Iterator[Fill]:
    sums: dict[str, tuple[int, int]] = {}
    for index in range(len(pool.sets)):
        used, size = pools.count_used(pool, index)
        so_far = sums.get(pool.family(index), (0, 0))
        sums[pool.family(index)] = so_far[0] + used, so_far[1] + size
    for family, (used, size) in sums.items():
        yield Fill(pool.name, family, "blocks" if pool.has_blocks else "addresses", used, size)


def _mark(fill: Fill, before: int) -> int:
    reached = 0
    for mark in MARKS:
        wanted = mark - _SLACK if mark <= before else mark
        if fill.size and fill.used * 100 >= wanted * fill.size:
            reached = mark
    return reached
