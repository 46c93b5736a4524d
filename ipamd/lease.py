"""Who holds which address: allocate, release, check, and the pools that this rests on.

`Ledger` keeps bitmaps and rows in step. Its methods are synchronous and run one at a time, inside a batch of `engine`;
each either does all that it says or, raising IpamdError, nothing. What was never handed out goes first; then what was
freed longest ago, once its cool-down is over.

A freed address stays in its range set's queue until it is handed out again, or until the queue holds more than
`LONGEST_QUEUE` and the oldest, if it has cooled down, is forgotten and thus counts as never used.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NoReturn

from msgspec import Struct

from ipamd.clock import Clock, age_ns
from ipamd.engine import Transaction
from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)
from ipamd.pool import Pool, PoolSpec, address_number, address_text, parse_address
from ipamd.store.base import (
    Address,
    Allocation,
    Change,
    Drop,
    DropPool,
    Forget,
    Freed,
    Grant,
    Instant,
    Key,
    Netns,
    PoolRow,
    PutPool,
    Regroup,
    Reservation,
    Reserve,
    Touch,
    Unreserve,
)
from telemetry import log

LONGEST_QUEUE = 65_536

# Without a slash: "net/<network>" is the pool that ipamd keeps for a network.
_POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

_logger = logging.getLogger("ipamd.lease")

Number = tuple[int, int]  # IP version, address


class NetworkSpec(Struct, frozen=True):
    """The spec of a network's own pool, read only where `asked` (its encoded form) is not what the pool has."""

    asked: bytes
    read: Callable[[], PoolSpec]


class Ask(Struct, frozen=True):
    """What an Allocate wants: addresses of named pools, or of the network's own."""

    key: Key
    netns: Netns
    at: Instant | None
    pools: tuple[str, ...] = ()
    network: NetworkSpec | None = None
    requested: tuple[str, ...] = ()
    workload: str = ""


class Usage(Struct, frozen=True):
    """How full a range set is. `free` can be handed out now."""

    family: Literal["ipv4", "ipv6"]
    size: int
    allocated: int
    reserved: int
    cooling: int
    free: int


class Ledger:
    """See the top of this file."""

    def __init__(self, transaction: Transaction, clock: Clock, cooldown_s: float) -> None:
        """Reads the rows of every pool once, to set the bitmaps."""
        self._transaction = transaction
        self._store = transaction.store
        self._clock = clock
        self._cooldown_ns = int(cooldown_s * 1e9)
        self.pools: dict[str, Pool] = {}
        for row in self._store.pools():
            pool = Pool(row.name, PoolSpec.decode(row.spec), row.managed)
            self._fill(pool)
            self.pools[row.name] = pool

    # --- allocations

    def allocate(self, ask: Ask) -> tuple[Allocation, bool]:
        """The attachment's addresses, and whether this request created the allocation."""
        pools = self._pools_of(ask)
        held = self._store.find(ask.key)
        if held is not None:
            return self._again(held, ask, pools), False
        mark = self._transaction.mark()
        try:
            new = Allocation(ask.key, self._pick_all(pools, ask.requested), ask.netns, self._when(ask.at),
                             self._clock.unix_s(), 0, ask.workload)  # fmt: skip
            generation = self._transaction.apply(Grant(new))
        except Exception:
            self._transaction.unwind(mark)
            raise
        return _with_generation(new, generation), True

    def release(self, key: Key, generation: int = 0, before: Instant | None = None) -> Allocation | None:
        """Ends the key's allocation and returns it; None where there was nothing to release.

        `generation` other than 0: only that one. `before`: only what was not asked for at or after that moment.
        """
        held = self._store.find(key)
        if held is None or generation not in (0, held.generation):
            return None
        if before is not None and not self.is_before(held, before):
            return None
        self.drop(held)
        return held

    def is_before(self, held: Allocation, moment: Instant) -> bool:
        """Whether an allocation was last asked for before a moment.

        Moments of two boots cannot be compared by their numbers; but what this boot asked for is younger than any
        earlier boot, and what an earlier boot asked for is older than this one, or as dead as it.
        """
        if held.at.boot_id == moment.boot_id:
            return held.at.boottime_ns < moment.boottime_ns
        return held.at.boot_id != self._clock.boot_id

    def drop(self, held: Allocation) -> None:
        """Ends an allocation; its addresses begin to cool down."""
        mark = self._transaction.mark()
        try:
            now = self._now()
            freed: list[Freed] = []
            forgotten: list[Change] = []
            for address in held.addresses:
                pool = self.pools.get(address.pool)
                place = pool.locate(*address_number(address.ip)) if pool else None
                if pool is None or place is None:
                    continue
                self._count(pool.allocated, place[0], -1)
                self._count(pool.freed, place[0], 1)
                freed.append(Freed(pool.name, place[0], address.ip, now))
                forgotten += self._shorten_queue(pool, place[0])
            self._transaction.apply(*forgotten, Drop(held, tuple(freed), unix_s=self._clock.unix_s()))
        except Exception:
            self._transaction.unwind(mark)
            raise

    def check(self, key: Key, cidrs: Sequence[str]) -> Allocation:
        """The key's allocation; raises where there is none or it holds other addresses than `cidrs`."""
        held = self._store.find(key)
        if held is None:
            raise NotFoundError(f"{key} holds no address; it was released, or never allocated here")
        have = {address.cidr for address in held.addresses}
        if cidrs and set(cidrs) != have:
            raise PreconditionError(f"{key} holds {_list(have)}, not {_list(cidrs)}; the two must be the same")
        return held

    def _again(self, held: Allocation, ask: Ask, pools: Sequence[Pool]) -> Allocation:
        have = {address.ip for address in held.addresses}
        wanted = {address_text(*parse_address(text.partition("/")[0], "requested")) for text in ask.requested}
        if not wanted <= have:
            raise PreconditionError(
                f"{held.key} holds {_list(have)}, and now asks for {_list(wanted)}; release it (DEL) before it asks "
                "for other addresses"
            )
        old, new = {address.pool for address in held.addresses}, {pool.name for pool in pools}
        if old != new:
            raise PreconditionError(
                f"{held.key} holds {_list(have)} of pool {_list(old)}, and now asks pool {_list(new)}; release it "
                "(DEL) before it asks another pool"
            )
        netns, at = ask.netns, self._when(ask.at)
        self._transaction.apply(Touch(held.generation, netns, at))
        return Allocation(held.key, held.addresses, netns, at, held.created_unix_s, held.generation, held.workload)

    def _when(self, at: Instant | None) -> Instant:
        """When the request began. What is asked for now is of this boot and not of the future, whoever says else."""
        now = self._clock.now_ns()
        if at is None or at.boot_id != self._clock.boot_id or at.boottime_ns > now:
            return Instant(self._clock.boot_id, now)
        return at

    def _now(self) -> Instant:
        return Instant(self._clock.boot_id, self._clock.now_ns())

    # --- choosing addresses

    def _pick_all(self, pools: Sequence[Pool], requested: Sequence[str]) -> tuple[Address, ...]:
        if not requested:
            return tuple([self._pick(pool, index) for pool in pools for index in range(len(pool.sets))])
        wanted = _assign(pools, requested)
        return tuple(
            self._pick_wanted(pool, index, *wanted[pool.name, index])
            if (pool.name, index) in wanted
            else self._pick(pool, index)
            for pool in pools
            for index in range(len(pool.sets))
        )

    def _pick(self, pool: Pool, index: int) -> Address:
        range_set = pool.sets[index]
        cold = range_set.take_cold()
        if cold is None:
            number, block = self._pick_freed(pool, index)
        else:
            number, block = cold
            self._transaction.on_undo(range_set.blocks[block].untouch, number)
        self._count(pool.allocated, index, 1)
        return _address(pool, index, block, number)

    def _pick_freed(self, pool: Pool, index: int) -> tuple[int, int]:
        oldest = self._store.oldest_freed(pool.name, index)
        if oldest is None:
            raise ExhaustedError(
                f"pool {pool.name} has no free address in {pool.describe(index)}: {pool.allocated[index]} of "
                f"{pool.sets[index].size} are allocated, {pool.reserved[index]} reserved; release some, or "
                "widen the pool"
            )
        left_s = self._left_s(pool, oldest)
        if left_s > 0:
            raise CoolingError(
                f"pool {pool.name} has no free address in {pool.describe(index)} now: {pool.freed[index]} are cooling "
                f"down, the next one for {left_s:.1f} s; ask again then, or widen the pool"
            )
        _, number = address_number(oldest.ip)
        self._count(pool.freed, index, -1)
        return number, pool.sets[index].block_of(number)

    def _pick_wanted(self, pool: Pool, index: int, block: int, wanted: Number) -> Address:
        version, number = wanted
        allocator = pool.sets[index].blocks[block]
        if not allocator.is_touched(number):
            allocator.touch(number)
            self._transaction.on_undo(allocator.untouch, number)
        else:
            ip = address_text(version, number)
            self._refuse_held(pool, ip)
            freed = self._store.find_freed(pool.name, ip)
            if freed is not None:
                left_s = self._left_s(pool, freed)
                if left_s > 0:
                    raise CoolingError(
                        f"{ip} of pool {pool.name} was released lately and cools down for another {left_s:.1f} s; ask "
                        "again then"
                    )
                self._count(pool.freed, index, -1)
        self._count(pool.allocated, index, 1)
        return _address(pool, index, block, number)

    def _refuse_held(self, pool: Pool, ip: str) -> None:
        holder = self._store.holder(pool.name, ip)
        if isinstance(holder, Allocation):
            raise AlreadyExistsError(
                f"{ip} of pool {pool.name} is held by {holder.key}; release that, or ask for another"
            )
        if holder is not None:
            note = f" ({holder.note})" if holder.note else ""
            raise AlreadyExistsError(
                f"{ip} of pool {pool.name} is reserved{note}; unreserve it first, or ask for another"
            )

    def _left_s(self, pool: Pool, freed: Freed) -> float:
        """Seconds until a freed address has cooled down; 0 or less where it has."""
        return (self._cooldown_of(pool) - age_ns(self._clock, freed.at)) / 1e9

    def _cooldown_of(self, pool: Pool) -> int:
        cooldown_ms = pool.spec.cooldown_ms
        return self._cooldown_ns if cooldown_ms is None else cooldown_ms * 1_000_000

    def _shorten_queue(self, pool: Pool, index: int) -> Iterator[Change]:
        if pool.freed[index] <= LONGEST_QUEUE:
            return
        oldest = self._store.oldest_freed(pool.name, index)
        if oldest is None or self._left_s(pool, oldest) > 0:
            return
        _, number = address_number(oldest.ip)
        block = pool.sets[index].blocks[pool.sets[index].block_of(number)]
        block.untouch(number)
        self._transaction.on_undo(block.touch, number)
        self._count(pool.freed, index, -1)
        yield Forget(pool.name, (oldest.ip,))

    def _count(self, counts: list[int], index: int, by: int) -> None:
        counts[index] += by
        self._transaction.on_undo(_add, counts, index, -by)

    # --- pools

    def pool(self, name: str) -> Pool:
        """A pool by its name; raises NotFoundError."""
        found = self.pools.get(name)
        if found is None:
            raise NotFoundError(
                f"there is no pool {name}; create it (netloom pool create), or name one of those there are"
            )
        return found

    def create_pool(self, name: str, spec: PoolSpec) -> Pool:
        """Makes a named pool. The same again is no error; another spec under a name that is taken is."""
        there = self.pools.get(name)
        if there is not None:
            if there.spec == spec:
                return there
            raise AlreadyExistsError(f"there is a pool {name} with another spec; delete it first, or take another name")
        return self._add_pool(Pool(name, spec, managed=False))

    def delete_pool(self, name: str) -> None:
        """Removes a pool from which nothing is allocated; its reservations go with it."""
        pool = self.pool(name)
        for ip, generation in self._store.taken(name):
            holder = self._store.holder(name, ip) if generation else None
            if isinstance(holder, Allocation):
                raise PreconditionError(
                    f"pool {name} still has {sum(pool.allocated)} addresses allocated, such as {ip} of {holder.key}; "
                    "release them first"
                )
        self._transaction.apply(DropPool(name))
        del self.pools[name]
        self._transaction.on_undo(self.pools.__setitem__, name, pool)

    def usage(self, pool: Pool) -> list[Usage]:
        """How full each range set is, now."""
        cooldown_ns = self._cooldown_of(pool)
        now = self._now()
        found = []
        for index, ranges in enumerate(pool.layout.range_sets):
            size, allocated, reserved = pool.sets[index].size, pool.allocated[index], pool.reserved[index]
            if now.boottime_ns < cooldown_ns:
                cooling = pool.freed[index]  # what an earlier boot freed cools down from this boot's start
            else:
                since = Instant(now.boot_id, now.boottime_ns - cooldown_ns + 1)
                cooling = self._store.count_freed(pool.name, index, since) if pool.freed[index] else 0
            free = size - allocated - reserved - cooling
            found.append(Usage(ranges[0].family, size, allocated, reserved, cooling, free))
        return found

    def probe(self, ask: Ask) -> None:
        """Raises what the next `allocate` for these pools would, as far as that rests on the pools. Changes nothing."""
        for pool in [self.pool(name) for name in ask.pools] if ask.network is None else self._network_pool_as_is(ask):
            for index, range_set in enumerate(pool.sets):
                if not range_set.has_cold():
                    mark = self._transaction.mark()
                    try:
                        self._pick_freed(pool, index)
                    finally:
                        self._transaction.unwind(mark)

    def reserve(self, name: str, text: str, note: str) -> Reservation:
        """Keeps an address back; raises AlreadyExistsError that names the holder."""
        pool, index, block, (version, number) = self._place(name, text)
        allocator = pool.sets[index].blocks[block]
        ip = address_text(version, number)
        self._refuse_held(pool, ip)
        mark = self._transaction.mark()
        try:
            if not allocator.is_touched(number):
                allocator.touch(number)
                self._transaction.on_undo(allocator.untouch, number)
            elif self._store.find_freed(name, ip) is not None:
                self._count(pool.freed, index, -1)
            self._count(pool.reserved, index, 1)
            reservation = Reservation(name, ip, note)
            self._transaction.apply(Reserve(reservation))
        except Exception:
            self._transaction.unwind(mark)
            raise
        return reservation

    def unreserve(self, name: str, text: str) -> None:
        """Ends a reservation; the address cools down like one that was released, as somebody may still use it."""
        pool = self.pool(name)
        number = parse_address(text, "address")
        ip = address_text(*number)
        if not isinstance(self._store.holder(name, ip), Reservation):
            raise NotFoundError(f"{ip} of pool {name} is not reserved")
        place = pool.locate(*number)
        mark = self._transaction.mark()
        try:
            if place is not None:
                self._count(pool.reserved, place[0], -1)
                self._count(pool.freed, place[0], 1)
            self._transaction.apply(Unreserve(Freed(name, place[0] if place else 0, ip, self._now())),
                                    *(() if place else (Forget(name, (ip,)),)))  # fmt: skip
        except Exception:
            self._transaction.unwind(mark)
            raise

    def _place(self, name: str, text: str) -> tuple[Pool, int, int, Number]:
        pool = self.pool(name)
        number = parse_address(text, "address")
        place = pool.locate(*number)
        if place is None:
            _refuse_outside([pool], number)
        return pool, *place, number

    def _pools_of(self, ask: Ask) -> Sequence[Pool]:
        if ask.network is not None:
            return (self._network_pool(ask.key.network, ask.network),)
        return [self.pool(name) for name in ask.pools]

    def _network_pool(self, network: str, wanted: NetworkSpec) -> Pool:
        """The network's own pool, with the spec that is wanted. Stays changed even if what follows fails."""
        name = network_pool_name(network)
        pool = self.pools.get(name)
        if pool is not None and pool.asked == wanted.asked:
            return pool
        spec = wanted.read()
        if pool is None:
            pool = self._add_pool(Pool(name, spec, managed=True))
        elif pool.spec != spec:
            pool = self._change_pool(pool, spec)
        pool.asked = wanted.asked
        return pool

    def _network_pool_as_is(self, ask: Ask) -> Sequence[Pool]:
        """For questions: the pool if it has the spec, else one that looks as it would, with nothing kept."""
        assert ask.network is not None  # noqa: S101 (the caller's branch)
        name = network_pool_name(ask.key.network)
        pool = self.pools.get(name)
        if pool is not None and pool.asked == ask.network.asked:
            return (pool,)
        wanted = Pool(name, ask.network.read(), managed=True)
        if pool is not None:
            self._refuse_shrink(wanted)
            self._fill(wanted)
        return (wanted,)

    def _add_pool(self, pool: Pool) -> Pool:
        self._transaction.apply(PutPool(PoolRow(pool.name, pool.spec.encode(), pool.managed), new=True))
        self.pools[pool.name] = pool
        self._transaction.on_undo(self.pools.pop, pool.name)
        return pool

    def _change_pool(self, old: Pool, spec: PoolSpec) -> Pool:
        new = Pool(old.name, spec, old.managed)
        self._refuse_shrink(new)
        gone: list[str] = []
        moved: list[tuple[str, int]] = []
        for freed in self._store.freed(new.name):
            place = new.locate(*address_number(freed.ip))
            if place is None:
                gone.append(freed.ip)
            elif place[0] != freed.range_set:
                moved.append((freed.ip, place[0]))
        self._transaction.apply(
            PutPool(PoolRow(new.name, spec.encode(), new.managed), new=False),
            Forget(new.name, tuple(gone)),
            Regroup(new.name, tuple(moved)),
        )
        self._fill(new)
        self.pools[new.name] = new
        self._transaction.on_undo(self.pools.__setitem__, new.name, old)
        log.event(_logger, "info", "pool changed", pool=new.name, spec=new.spec.encode())
        return new

    def _refuse_shrink(self, new: Pool) -> None:
        dropped = [
            ip
            for ip, generation in self._store.taken(new.name)
            if generation and new.locate(*address_number(ip)) is None
        ]
        if not dropped:
            return
        holder = self._store.holder(new.name, dropped[0])
        who = str(holder.key) if isinstance(holder, Allocation) else "nobody"
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise PreconditionError(
            f"pool {new.name}: the new ranges leave out {dropped[0]}, which {who} holds{more}; release it first, or "
            "keep it within the ranges"
        )

    def _fill(self, pool: Pool) -> None:
        """Sets the bitmaps and counts of a new pool from the rows."""
        newest: dict[tuple[int, int], tuple[int, int]] = {}
        for ip, generation in self._store.taken(pool.name):
            number = address_number(ip)
            place = pool.locate(*number)
            if place is None:
                continue  # a reservation that the ranges no longer hold
            index, block = place
            pool.sets[index].blocks[block].touch(number[1])
            if generation:
                pool.allocated[index] += 1
                newest[place] = max(newest.get(place, (0, 0)), (generation, number[1]))
            else:
                pool.reserved[index] += 1
        for freed in self._store.freed(pool.name):
            number = address_number(freed.ip)
            place = pool.locate(*number)
            if place is not None:
                pool.sets[place[0]].blocks[place[1]].touch(number[1])
                pool.freed[place[0]] += 1
        for (index, block), (_, last) in newest.items():
            pool.sets[index].blocks[block].start_after(last)


def check_pool_name(name: str) -> None:
    """Raises InvalidArgumentError for a name that an operator cannot give to a pool."""
    if not _POOL_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"name: wanted 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit; found {name[:80]!r}"
        )


def network_pool_name(network: str) -> str:
    """The name of the pool that ipamd keeps for a network."""
    return f"net/{network}"


def _assign(pools: Iterable[Pool], requested: Iterable[str]) -> dict[tuple[str, int], tuple[int, Number]]:
    """Which requested address goes to which range set: (pool, set) → (block, address)."""
    pools = list(pools)
    assigned: dict[tuple[str, int], tuple[int, Number]] = {}
    for text in requested:
        number = parse_address(text.partition("/")[0], "requested")
        for pool in pools:
            place = pool.locate(*number)
            if place is not None:
                break
        else:
            _refuse_outside(pools, number)
        index, block = place
        if (pool.name, index) in assigned:
            other = address_text(*assigned[pool.name, index][1])
            raise InvalidArgumentError(
                f"requested: {text} and {other} are both of {pool.describe(index)} in pool {pool.name}, which gives "
                "one address; ask for one of them"
            )
        assigned[pool.name, index] = block, number
    return assigned


def _refuse_outside(pools: Sequence[Pool], number: Number) -> NoReturn:
    ip = address_text(*number)
    for pool in pools:
        if pool.is_gateway(*number):
            raise InvalidArgumentError(
                f"{ip} is a gateway of pool {pool.name} and is never handed out; ask for another"
            )
    ranges = "; ".join(
        f"pool {pool.name}: {pool.describe(index)}" for pool in pools for index in range(len(pool.layout.range_sets))
    )
    raise InvalidArgumentError(
        f"{ip} cannot be handed out: it is excluded, or outside the ranges ({ranges}); ask for one of those"
    )


def _address(pool: Pool, index: int, block: int, number: int) -> Address:
    r = pool.layout.range_sets[index][block]
    gateway = "" if r.gateway is None else address_text(r.version, r.gateway)
    return Address(f"{address_text(r.version, number)}/{r.prefix}", gateway, pool.name, index)


def _with_generation(new: Allocation, generation: int) -> Allocation:
    return Allocation(new.key, new.addresses, new.netns, new.at, new.created_unix_s, generation, new.workload)


def _list(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts)) or "none"


def _add(counts: list[int], index: int, by: int) -> None:
    counts[index] += by
