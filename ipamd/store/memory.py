"""Address state in memory: for tests, and for trying things out. It forgets everything when the process ends.

What takes a change back is kept in a journal, newest last.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import msgspec

from ipamd.store.base import (
    Allocation,
    Change,
    ConflictError,
    Drop,
    DropPool,
    Filter,
    Forget,
    Freed,
    Grant,
    Instant,
    Key,
    PoolRow,
    PutPool,
    Regroup,
    Rename,
    Reservation,
    Reserve,
    Touch,
    Unreserve,
)

_Place = tuple[str, str]  # pool, address
K = TypeVar("K")
V = TypeVar("V")


class MemoryStore:
    """See `ipamd.store.base.Store`."""

    kind = "memory"
    schema = "0"

    def __init__(self) -> None:
        self._generation = 0
        self._node = ""
        self._allocations: dict[int, Allocation] = {}  # rising generation
        self._keys: dict[Key, int] = {}
        self._taken: dict[_Place, int] = {}
        self._pools: dict[str, PoolRow] = {}
        self._sequence = 0
        self._queue: dict[int, Freed] = {}  # in the order of freeing
        self._freed: dict[_Place, int] = {}  # the number in the queue
        self._reservations: dict[_Place, Reservation] = {}
        self._journal: list[Callable[[], object]] = []

    def begin(self) -> None:
        self._journal.clear()

    def apply(self, changes: Sequence[Change]) -> int:
        mark = len(self._journal)
        generation = 0
        try:
            for change in changes:
                generation = self._apply(change) or generation
        except ConflictError:
            self._undo(mark)
            raise
        return generation

    def commit(self) -> None:
        self._journal.clear()

    def rollback(self) -> None:
        self._undo(0)

    def close(self) -> None:
        self._journal.clear()

    def find(self, key: Key) -> Allocation | None:
        return self._allocations.get(self._keys.get(key, 0))

    def holder(self, pool: str, ip: str) -> Allocation | Reservation | None:
        generation = self._taken.get((pool, ip))
        if generation is None:
            return None
        return self._allocations[generation] if generation else self._reservations[pool, ip]

    def allocations(self, wanted: Filter, after: int = 0, limit: int = 1000) -> list[Allocation]:
        found = (self._allocations[g] for g in self._allocations if g > after)
        return list(islice((allocation for allocation in found if wanted.matches(allocation)), limit))

    def count(self) -> int:
        return len(self._allocations)

    def taken(self, pool: str) -> Iterator[tuple[str, int]]:
        return ((ip, generation) for (name, ip), generation in list(self._taken.items()) if name == pool)

    def pools(self) -> list[PoolRow]:
        return [row for _, row in sorted(self._pools.items())]

    def freed(self, pool: str) -> Iterator[Freed]:
        return (freed for freed in list(self._queue.values()) if freed.pool == pool)

    def find_freed(self, pool: str, ip: str) -> Freed | None:
        return self._queue.get(self._freed.get((pool, ip), 0))

    def oldest_freed(self, pool: str, range_set: int) -> Freed | None:
        return next((f for f in self._queue.values() if f.pool == pool and f.range_set == range_set), None)

    def count_freed(self, pool: str, range_set: int, since: Instant) -> int:
        return sum(
            f.range_set == range_set and f.at.boot_id == since.boot_id and f.at.boottime_ns >= since.boottime_ns
            for f in self.freed(pool)
        )

    def reservations(self, pool: str = "") -> Iterable[Reservation]:
        return [row for (name, _), row in sorted(self._reservations.items()) if pool in ("", name)]

    def remembered_node(self) -> str:
        return self._node

    def remember_node(self, name: str) -> None:
        old = self._node
        self._journal.append(lambda: setattr(self, "_node", old))
        self._node = name

    def _undo(self, mark: int) -> None:
        if len(self._journal) == mark:
            return
        while len(self._journal) > mark:
            self._journal.pop()()
        # A row that came back stands at the end; the order of both is that of their numbers.
        for rows in (self._allocations, self._queue):
            ordered = sorted(rows.items())
            rows.clear()
            rows.update(ordered)  # type: ignore[arg-type]

    def _set(self, rows: dict[K, V], key: K, value: V | None) -> None:
        """Puts a row, or removes it (None)."""
        before = rows.get(key)
        self._journal.append(lambda: _put(rows, key, before))
        _put(rows, key, value)

    def _apply(self, change: Change) -> int:  # noqa: PLR0912 (one case for each kind of change)
        match change:
            case Grant(allocation):
                return self._grant(allocation)
            case Touch(generation, netns, at):
                old = _want(self._allocations, generation, f"generation {generation}")
                self._set(self._allocations, generation, msgspec.structs.replace(old, netns=netns, at=at))
            case Drop(allocation, freed):
                self._drop(allocation, freed)
            case Forget(pool, ips):
                for ip in ips:
                    self._forget((pool, ip))
            case PutPool(pool_row, new):
                if (pool_row.name in self._pools) == new:
                    raise ConflictError(f"pool {pool_row.name} is {'there' if new else 'not there'}")
                self._set(self._pools, pool_row.name, pool_row)
            case Regroup() | DropPool():
                self._change_pool(change)
            case Reserve(reservation):
                place = (reservation.pool, reservation.ip)
                self._take(place, 0)
                self._set(self._reservations, place, reservation)
            case Unreserve(row):
                place = (row.pool, row.ip)
                _want(self._reservations, place, f"reservation of {row.ip}")
                self._set(self._reservations, place, None)
                self._set(self._taken, place, None)
                self._free(row)
            case Rename(old_name, new_name):
                for allocation in list(self._allocations.values()):
                    if allocation.key.node == old_name:
                        self._rename(allocation, new_name)
        return 0

    def _grant(self, new: Allocation) -> int:
        if new.key in self._keys:
            raise ConflictError(f"{new.key} has an allocation")
        # Not in the journal: a generation is never used again, also after a rollback.
        self._generation += 1
        for address in new.addresses:
            self._take((address.pool, address.ip), self._generation)
        self._set(self._keys, new.key, self._generation)
        self._set(self._allocations, self._generation, msgspec.structs.replace(new, generation=self._generation))
        return self._generation

    def _take(self, place: _Place, generation: int) -> None:
        if place in self._taken:
            raise ConflictError(f"{place[1]} of pool {place[0]} is taken")
        self._set(self._taken, place, generation)
        self._forget(place)

    def _drop(self, old: Allocation, freed: Iterable[Freed]) -> None:
        _want(self._allocations, old.generation, f"generation {old.generation}")
        self._set(self._allocations, old.generation, None)
        self._set(self._keys, old.key, None)
        for address in old.addresses:
            self._set(self._taken, (address.pool, address.ip), None)
        for row in freed:
            self._free(row)

    def _free(self, row: Freed) -> None:
        self._forget((row.pool, row.ip))
        self._sequence += 1
        self._set(self._queue, self._sequence, row)
        self._set(self._freed, (row.pool, row.ip), self._sequence)

    def _forget(self, place: _Place) -> None:
        sequence = self._freed.get(place)
        if sequence is not None:
            self._set(self._freed, place, None)
            self._set(self._queue, sequence, None)

    def _change_pool(self, change: Regroup | DropPool) -> None:
        if isinstance(change, Regroup):
            for ip, range_set in change.range_sets:
                sequence = self._freed.get((change.pool, ip))
                if sequence is not None:
                    row = msgspec.structs.replace(self._queue[sequence], range_set=range_set)
                    self._set(self._queue, sequence, row)
            return
        _want(self._pools, change.name, f"pool {change.name}")
        if any(generation for _, generation in self.taken(change.name)):
            raise ConflictError(f"pool {change.name} still has allocations")
        self._set(self._pools, change.name, None)
        for row in list(self.freed(change.name)):
            self._forget((row.pool, row.ip))
        for reservation in self.reservations(change.name):
            self._set(self._taken, (reservation.pool, reservation.ip), None)
            self._set(self._reservations, (reservation.pool, reservation.ip), None)

    def _rename(self, allocation: Allocation, node: str) -> None:
        key = msgspec.structs.replace(allocation.key, node=node)
        if key in self._keys:
            raise ConflictError(f"{key} has an allocation")
        self._set(self._keys, allocation.key, None)
        self._set(self._keys, key, allocation.generation)
        self._set(self._allocations, allocation.generation, msgspec.structs.replace(allocation, key=key))


def _put(rows: dict[K, V], key: K, value: V | None) -> None:
    if value is None:
        rows.pop(key, None)
    else:
        rows[key] = value


def _want(rows: dict[K, V], key: K, what: str) -> V:
    if key not in rows:
        raise ConflictError(f"there is no {what}")
    return rows[key]
