"""Address state in memory: for tests, and for trying things out. It forgets everything when the process ends.

What takes a change back is kept in a journal, newest last.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, TypeVar

import msgspec

from ipamd.store.base import (
    EVENTS_KEPT,
    Allocation,
    Change,
    ConflictError,
    Copy,
    Drop,
    DropBlock,
    DropPool,
    Errand,
    Event,
    Filter,
    Forget,
    Former,
    Freed,
    Grant,
    Instant,
    Key,
    Note,
    PoolRow,
    PutBlock,
    PutPool,
    Regroup,
    Rename,
    Reservation,
    Reserve,
    Settle,
    Touch,
    Unreserve,
    Use,
    former_name,
)

_Place = tuple[str, str]  # pool, address
_FormerPlace = tuple[str, int, str]  # pool, range set, workload
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
        self._blocks: dict[_Place, bool] = {}  # pool, CIDR
        self._errand = 0
        self._errands: dict[int, Errand] = {}
        self._former: dict[_FormerPlace, str] = {}
        self._formers: dict[_Place, _FormerPlace] = {}  # who had an address last
        self._revision = 0
        self._events: dict[int, Event] = {}
        self._notes: dict[str, str] = {}
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

    def snapshot(self) -> "MemorySnapshot":
        return MemorySnapshot(
            Copy(
                pools=self.pools(),
                reservations=list(self.reservations()),
                allocations=list(self._allocations.values()),
                freed=list(self._queue.values()),
                former=[Former(*place, ip) for place, ip in self._former.items()],
                blocks=self.blocks(),
                notes=[Note(name, value) for name, value in self._notes.items()],
                generation=self._generation,
                revision=self._revision,
            )
        )

    def find(self, key: Key) -> Allocation | None:
        return self._allocations.get(self._keys.get(key, 0))

    def holder(self, pool: str, ip: str) -> Allocation | Reservation | None:
        generation = self._taken.get((pool, ip))
        if generation is None:
            return None
        return self._allocations[generation] if generation else self._reservations[pool, ip]

    def uses(self, pool: str, ips: Sequence[str]) -> list[Use]:
        held = [(ip, self._allocations[g]) for ip in ips if (g := self._taken.get((pool, ip)))]
        return [
            Use(next(a for a in one.addresses if a.pool == pool and a.ip == ip), one.generation, one.key.client,
                one.key.network, one.key.container_id, one.key.ifname, one.created_unix_s, one.workload)
            for ip, one in held
        ]  # fmt: skip

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

    def oldest_freed(self, pool: str, range_set: int, skip: int = 0) -> Freed | None:
        queue = (f for f in self._queue.values() if f.pool == pool and f.range_set == range_set)
        return next(islice(queue, skip, None), None)

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

    def blocks(self, pool: str = "") -> list[tuple[str, str]]:
        return sorted(place for place in self._blocks if pool in ("", place[0]))

    def errands(self, limit: int = 1000) -> list[Errand]:
        return list(islice(self._errands.values(), limit))

    def former(self, pool: str, range_set: int, workload: str) -> str:
        return self._former.get((pool, range_set, workload), "")

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        return list(islice((event for event in self._events.values() if event.revision > after), limit))

    def event_bounds(self) -> tuple[int, int]:
        return next(iter(self._events), self._revision + 1), self._revision

    def note(self, name: str) -> str:
        return self._notes.get(name, "")

    def _undo(self, mark: int) -> None:
        if len(self._journal) == mark:
            return
        while len(self._journal) > mark:
            self._journal.pop()()
        # A row that came back stands at the end; the order of both is that of their numbers.
        for rows in (self._allocations, self._queue, self._errands, self._events):
            ordered = sorted(rows.items())
            rows.clear()
            rows.update(ordered)  # type: ignore[arg-type]

    def _set(self, rows: dict[K, V], key: K, value: V | None) -> None:
        """Puts a row, or removes it (None)."""
        before = rows.get(key)
        self._journal.append(lambda: _put(rows, key, before))
        _put(rows, key, value)

    def _apply(self, change: Change) -> int:  # noqa: C901, PLR0912 (one case for each kind of change)
        match change:
            case Grant():
                return self._grant(change)
            case Touch(generation, netns, at):
                old = _want(self._allocations, generation, f"generation {generation}")
                self._set(self._allocations, generation, msgspec.structs.replace(old, netns=netns, at=at))
            case Drop():
                self._drop(change)
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
            case PutBlock() | DropBlock() | Settle() | Note():
                self._apply_of_cluster(change)
        return 0

    def _apply_of_cluster(self, change: PutBlock | DropBlock | Settle | Note) -> None:
        match change:
            case PutBlock(pool, cidr):
                if (pool, cidr) in self._blocks:
                    raise ConflictError(f"block {cidr} of pool {pool} is there")
                self._set(self._blocks, (pool, cidr), True)
            case DropBlock(pool, cidr, ips):
                _want(self._blocks, (pool, cidr), f"block {cidr} of pool {pool}")
                self._set(self._blocks, (pool, cidr), None)
                for ip in ips:
                    self._forget((pool, ip))
            case Settle(seqs):
                for seq in seqs:
                    self._set(self._errands, seq, None)
            case Note(name, value):
                self._set(self._notes, name, value or None)

    def _grant(self, change: Grant) -> int:
        new = change.allocation
        if new.key in self._keys:
            raise ConflictError(f"{new.key} has an allocation")
        # Not in the journal: a generation is never used again, also after a rollback.
        self._generation += 1
        for address in new.addresses:
            self._take((address.pool, address.ip), self._generation)
            if new.workload:
                self._remember((address.pool, address.range_set, former_name(new.workload, new.key.ifname)), address.ip)
            if address.pool in change.claims:
                self._send("claim", address.pool, address.ip, self._generation)
        self._set(self._keys, new.key, self._generation)
        new = msgspec.structs.replace(new, generation=self._generation)
        self._set(self._allocations, self._generation, new)
        self._record_event("allocated", new, new.created_unix_s)
        return self._generation

    def _send(self, kind: Literal["claim", "unclaim"], pool: str, ip: str, generation: int) -> None:
        self._errand += 1
        self._set(self._errands, self._errand, Errand(self._errand, kind, pool, ip, generation))

    def _record_event(self, kind: Literal["allocated", "released"], allocation: Allocation, unix_s: int) -> None:
        self._revision += 1
        self._set(self._events, self._revision, Event(self._revision, kind, allocation, unix_s))
        if self._revision % EVENTS_KEPT == 0:
            for revision in [known for known in self._events if known <= self._revision - EVENTS_KEPT]:
                self._set(self._events, revision, None)

    def _take(self, place: _Place, generation: int) -> None:
        if place in self._taken:
            raise ConflictError(f"{place[1]} of pool {place[0]} is taken")
        self._set(self._taken, place, generation)
        self._forget(place)

    def _drop(self, change: Drop) -> None:
        old = change.allocation
        _want(self._allocations, old.generation, f"generation {old.generation}")
        self._set(self._allocations, old.generation, None)
        self._set(self._keys, old.key, None)
        for address in old.addresses:
            self._set(self._taken, (address.pool, address.ip), None)
            if address.pool in change.claims:
                self._recall(address.pool, address.ip)
                self._send("unclaim", address.pool, address.ip, old.generation)
        for row in change.freed:
            self._free(row)
        self._record_event("released", old, change.unix_s)

    def _recall(self, pool: str, ip: str) -> None:
        for errand in [e for e in self._errands.values() if (e.kind, e.pool, e.ip) == ("claim", pool, ip)]:
            self._set(self._errands, errand.seq, None)

    def _free(self, row: Freed) -> None:
        self._forget_freed((row.pool, row.ip))
        self._sequence += 1
        self._set(self._queue, self._sequence, row)
        self._set(self._freed, (row.pool, row.ip), self._sequence)

    def _remember(self, former: _FormerPlace, ip: str) -> None:
        earlier = self._former.get(former)
        if earlier is not None:
            self._set(self._formers, (former[0], earlier), None)
        self._set(self._former, former, ip)
        self._set(self._formers, (former[0], ip), former)

    def _forget(self, place: _Place) -> None:
        self._forget_freed(place)
        former = self._formers.get(place)
        if former is not None:
            self._set(self._formers, place, None)
            self._set(self._former, former, None)

    def _forget_freed(self, place: _Place) -> None:
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
        for place in self.blocks(change.name):
            self._set(self._blocks, place, None)
        for place in [place for place in self._formers if place[0] == change.name]:
            self._forget(place)
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


class MemorySnapshot:
    """The rows of one moment; they do not change, so their lists are enough."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def copy(self) -> Copy:
        return self._copy

    def close(self) -> None:
        pass


def _put(rows: dict[K, V], key: K, value: V | None) -> None:
    if value is None:
        rows.pop(key, None)
    else:
        rows[key] = value


def _want(rows: dict[K, V], key: K, what: str) -> V:
    if key not in rows:
        raise ConflictError(f"there is no {what}")
    return rows[key]
