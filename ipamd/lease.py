"""Who holds which address: allocate, release, check, and the pools that this rests on.

`Ledger` keeps bitmaps and rows in step. Its methods are synchronous and run one at a time, inside a batch of `engine`;
each either does all that it says or, raising IpamdError, nothing. What was never handed out goes first; then what was
freed longest ago, once its cool-down is over.

A workload gets the address again that it had last, while nobody else has it: the cool-down is for others.

A freed address stays in its range set's queue until it is handed out again, or until the queue holds more than
`LONGEST_QUEUE` and the oldest, if it has cooled down, is forgotten and thus counts as never used.
"""

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from ipamd.allocator import Block
from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    IpamdError,
    NeedsBlockError,
    NotFoundError,
    PreconditionError,
)
from ipamd.pool import Pool, address_number, address_text, parse_address
from ipamd.pools import NetworkSpec, Number, listed, refuse_outside
from ipamd.shared import SharedPools
from ipamd.store.base import (
    Address,
    Allocation,
    Change,
    Drop,
    Forget,
    Freed,
    Grant,
    Instant,
    Key,
    Netns,
    Touch,
    former_name,
)

LONGEST_QUEUE = 65_536


class Ask(Struct, frozen=True):
    """What an Allocate wants: addresses of named pools, or of the network's own."""

    key: Key
    netns: Netns
    at: Instant | None
    pools: tuple[str, ...] = ()
    network: NetworkSpec | None = None
    requested: tuple[str, ...] = ()
    workload: str = ""
    family: int = 0


class Ledger(SharedPools):
    """See the top of this file."""

    # --- allocations

    def allocate(self, ask: Ask) -> tuple[Allocation, bool]:
        """The attachment's addresses, and whether this request created the allocation."""
        pools = self._pools_of(ask)
        held = self._store.find(ask.key)
        if held is not None:
            return self._again(held, ask, pools), False
        if self.refusal is not None and any(pool.spec.mode != "local" for pool in pools):
            raise self.refusal()
        claims = self._claims(pools) if self.node else ()
        mark = self._transaction.mark()
        try:
            new = Allocation(ask.key, self._pick_all(pools, ask), ask.netns, self._when(ask.at),
                             self._clock.unix_s(), 0, ask.workload)  # fmt: skip
            generation = self._transaction.apply(Grant(new, claims))
            if claims:
                self._await_confirmation(generation)
        except Exception:
            self._transaction.unwind(mark)
            raise
        return _with_generation(new, generation), True

    def adopt(self, allocation: Allocation) -> Allocation:
        """Makes an allocation of an earlier time one again, with a new generation; raises IpamdError if it cannot."""
        if self._store.find(allocation.key) is not None:
            raise AlreadyExistsError(f"{allocation.key} holds other addresses by now")
        mark = self._transaction.mark()
        try:
            claims = self._claims([self.pool(address.pool) for address in allocation.addresses])
            for address in allocation.addresses:
                self._occupy(address)
            generation = self._transaction.apply(Grant(_with_generation(allocation, 0), claims))
            if claims:
                self._await_confirmation(generation)
        except Exception:
            self._transaction.unwind(mark)
            raise
        return _with_generation(allocation, generation)

    def _occupy(self, address: Address) -> None:
        pool = self.pool(address.pool)
        version, number = address_number(address.ip)
        place = pool.locate(version, number)
        if place is None:
            raise PreconditionError(f"{address.ip} is not handed out by pool {pool.name} any more")
        self.refuse_held(pool, address.ip)
        block = pool.sets[place[0]].blocks[place[1]]
        if not block.is_touched(number):
            block.touch(number)
            self._transaction.on_undo(block.untouch, number)
        self._count(pool.allocated, place[0], 1)

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
            claims: list[str] = []
            for address in held.addresses:
                pool = self.pools.get(address.pool)
                place = pool.locate(*address_number(address.ip)) if pool else None
                if pool is None or place is None:
                    continue
                self._count(pool.allocated, place[0], -1)
                if pool.is_shared:
                    self._leave(pool, address.ip)
                    claims.append(pool.name)
                    continue
                if pool.has_blocks and not self._leave_block(pool, place):
                    continue
                self._count(pool.freed, place[0], 1)
                freed.append(Freed(pool.name, place[0], address.ip, now))
                forgotten += self._shorten_queue(pool, place[0])
            self._transaction.apply(*forgotten, Drop(held, tuple(freed), tuple(claims), self._clock.unix_s()))
            if claims:
                self._confirmed(held.generation)
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
            raise PreconditionError(f"{key} holds {listed(have)}, not {listed(cidrs)}; the two must be the same")
        return held

    def _again(self, held: Allocation, ask: Ask, pools: Sequence[Pool]) -> Allocation:
        have = {address.ip for address in held.addresses}
        wanted = {address_text(*parse_address(text.partition("/")[0], "requested")) for text in ask.requested}
        if not wanted <= have:
            raise PreconditionError(
                f"{held.key} holds {listed(have)}, and now asks for {listed(wanted)}; release it (DEL) before it asks "
                "for other addresses"
            )
        old, new = {address.pool for address in held.addresses}, {pool.name for pool in pools}
        if old != new:
            raise PreconditionError(
                f"{held.key} holds {listed(have)} of pool {listed(old)}, and now asks pool {listed(new)}; release it "
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

    # --- choosing addresses

    def _pick_all(self, pools: Sequence[Pool], ask: Ask) -> tuple[Address, ...]:
        if not ask.requested and not ask.workload and not ask.family:
            return tuple([self._pick(pool, index) for pool in pools for index in range(len(pool.sets))])
        wanted = _assign(pools, ask.requested)
        places = [
            (pool, index)
            for pool in pools
            for index in range(len(pool.sets))
            if ask.family in (0, 4 if pool.family(index) == "ipv4" else 6)
        ]
        if not places or not wanted.keys() <= {(pool.name, index) for pool, index in places}:
            raise InvalidArgumentError(
                f"family: wanted IPv{ask.family} addresses only, and pool {listed(pool.name for pool in pools)} has "
                f"none, or one of {listed(ask.requested)} is of the other family"
            )
        name = former_name(ask.workload, ask.key.ifname) if ask.workload else ""
        return tuple(self._choose(pool, index, wanted.get((pool.name, index)), name) for pool, index in places)

    def _choose(self, pool: Pool, index: int, wanted: tuple[int, Number] | None, name: str) -> Address:
        if wanted is None:
            return (name and self._pick_former(pool, index, name)) or self._pick(pool, index)
        if name and self._former(pool, index, name) == address_text(*wanted[1]):
            # It cools down for everybody else.
            return self._pick_former(pool, index, name) or self._pick_wanted(pool, index, *wanted)
        return self._pick_wanted(pool, index, *wanted)

    def _pick(self, pool: Pool, index: int) -> Address:
        range_set = pool.sets[index]
        cold = range_set.take_cold()
        if cold is None:
            number, block = self._pick_freed(pool, index)
        else:
            number, block = cold
            self._transaction.on_undo(range_set.blocks[block].untouch, number)
        self._count(pool.allocated, index, 1)
        if pool.has_blocks:
            self._enter_block(pool, (index, block))
        return _address(pool, index, block, number)

    def _pick_freed(self, pool: Pool, index: int) -> tuple[int, int]:
        try:
            return self._pick_oldest(pool, index)
        except IpamdError as error:
            if pool.has_blocks:
                raise NeedsBlockError(pool.name, index, otherwise=error) from None
            raise

    def _pick_oldest(self, pool: Pool, index: int) -> tuple[int, int]:
        oldest = self._store.oldest_freed(pool.name, index)
        if pool.is_shared:
            raise self._nothing_cold(pool, index)
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
        if allocator.closed:
            raise AlreadyExistsError(
                f"{address_text(version, number)} of pool {pool.name} lies in a block that hands nothing out, see "
                "netloom ip check; ask for another"
            )
        if not allocator.is_touched(number):
            allocator.touch(number)
            self._transaction.on_undo(allocator.untouch, number)
        else:
            ip = address_text(version, number)
            self.refuse_held(pool, ip)
            if pool.is_shared:
                self._refuse_resting(pool, ip)
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
        if pool.has_blocks:
            self._enter_block(pool, (index, block))
        return _address(pool, index, block, number)

    def _former(self, pool: Pool, index: int, name: str) -> str:
        return (
            self._former_of(pool, index, name) if pool.is_shared else self._store.former(pool.name, index, name)
        ) or ""

    def _pick_former(self, pool: Pool, index: int, name: str) -> Address | None:
        """The address that this workload had last, also while it cools down: nobody else had it since."""
        ip = self._former(pool, index, name)
        place = pool.locate(*address_number(ip)) if ip else None
        if place is None or place[0] != index:
            return None
        _, number = address_number(ip)
        block = pool.sets[index].blocks[place[1]]
        if block.closed:
            return None
        if not block.is_touched(number):
            block.touch(number)
            self._transaction.on_undo(block.untouch, number)
        elif self._store.find_freed(pool.name, ip) is not None:
            self._count(pool.freed, index, -1)
        elif not pool.is_shared:
            return None  # held
        self._count(pool.allocated, index, 1)
        if pool.has_blocks:
            self._enter_block(pool, place)
        return _address(pool, index, place[1], number)

    def _enter_block(self, pool: Pool, place: tuple[int, int]) -> None:
        index, number = place
        block = pool.sets[index].blocks[number]
        block.held += 1
        self._transaction.on_undo(_hold, block, -1)
        self.changed[pool.name, pool.cidrs[index][number]] = None
        if pool.count_untouched(index) <= pool.early[index]:
            self.scarce[pool.name, index] = None

    def _leave_block(self, pool: Pool, place: tuple[int, int]) -> bool:
        """Whether the address may be handed out again from here."""
        index, number = place
        block = pool.sets[index].blocks[number]
        block.held -= 1
        self._transaction.on_undo(_hold, block, 1)
        self.changed[pool.name, pool.cidrs[index][number]] = None
        return not block.closed

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

    def probe(self, ask: Ask) -> None:
        """Raises what the next `allocate` for these pools would, as far as that rests on the pools. Changes nothing."""
        if ask.network is None:
            pools: Sequence[Pool] = [self.pool(name) for name in ask.pools]
        else:
            pools = self._network_pool_as_is(ask.key.network, ask.network)
        for pool in pools:
            if self.refusal is not None and pool.spec.mode != "local":
                raise self.refusal()
            for index, range_set in enumerate(pool.sets):
                if not range_set.has_cold():
                    mark = self._transaction.mark()
                    try:
                        self._pick_freed(pool, index)
                    finally:
                        self._transaction.unwind(mark)

    def _pools_of(self, ask: Ask) -> Sequence[Pool]:
        if ask.network is not None:
            return (self._network_pool(ask.key.network, ask.network),)
        return [self.pool(name) for name in ask.pools]


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
            _want_block(pools, number)
            refuse_outside(pools, number)
        index, block = place
        if (pool.name, index) in assigned:
            other = address_text(*assigned[pool.name, index][1])
            raise InvalidArgumentError(
                f"requested: {text} and {other} are both of {pool.describe(index)} in pool {pool.name}, which gives "
                "one address; ask for one of them"
            )
        assigned[pool.name, index] = block, number
    return assigned


def _want_block(pools: Iterable[Pool], number: Number) -> None:
    """Raises NeedsBlockError where the address is one of a block that this node does not hold."""
    for pool in pools:
        found = pool.block_for(*number)
        if found is not None:
            raise NeedsBlockError(pool.name, *found)


def _hold(block: Block, by: int) -> None:
    block.held += by


def _address(pool: Pool, index: int, block: int, number: int) -> Address:
    r = pool.layout.range_sets[index][block]
    gateway = "" if r.gateway is None else address_text(r.version, r.gateway)
    return Address(f"{address_text(r.version, number)}/{r.prefix}", gateway, pool.name, index)


def _with_generation(new: Allocation, generation: int) -> Allocation:
    return Allocation(new.key, new.addresses, new.netns, new.at, new.created_unix_s, generation, new.workload)
