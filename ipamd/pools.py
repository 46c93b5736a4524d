"""The pools, and what belongs to them and nobody's attachment: sizes, reservations, the pools that networks bring.

`Pools` keeps bitmaps and rows in step, as `lease.Ledger` does, which is built upon it: synchronous, inside a batch of
`engine`, all or nothing.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NoReturn

from msgspec import Struct

from ipamd.clock import Clock, age_ns
from ipamd.engine import Transaction
from ipamd.errors import AlreadyExistsError, InvalidArgumentError, IpamdError, NotFoundError, PreconditionError
from ipamd.pool import Pool, PoolSpec, address_number, address_text, parse_address
from ipamd.store.base import (
    Allocation,
    DropPool,
    Forget,
    Freed,
    Instant,
    PoolRow,
    PutPool,
    Regroup,
    Reservation,
    Reserve,
    Unreserve,
)
from telemetry import log

# Without a slash: "net/<network>" is the pool that ipamd keeps for a network.
_POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

_logger = logging.getLogger("ipamd.pools")

Number = tuple[int, int]  # IP version, address


class NetworkSpec(Struct, frozen=True):
    """The spec of a network's own pool, read only where `asked` (its encoded form) is not what the pool has."""

    asked: bytes
    read: Callable[[], PoolSpec]


class Usage(Struct, frozen=True):
    """How full a range set is. `free` can be handed out now.

    Of a node-block pool all but the last two are of this node's `blocks`; `blocks_claimed` are all nodes' together.
    Of a cluster-address pool other nodes hold those `elsewhere`.
    """

    family: Literal["ipv4", "ipv6"]
    size: int
    allocated: int
    reserved: int
    cooling: int
    free: int
    blocks: int = 0
    blocks_claimed: int = 0
    blocks_total: int = 0
    elsewhere: int = 0


class Pools:
    """See the top of this file."""

    def __init__(self, transaction: Transaction, clock: Clock, cooldown_s: float) -> None:
        """Reads the rows of every pool once, to set the bitmaps."""
        self._transaction = transaction
        self._store = transaction.store
        self._clock = clock
        self._cooldown_ns = int(cooldown_s * 1e9)
        self.pools: dict[str, Pool] = {}
        # In a cluster, for `member`: whether there is one; why its pools give no new address now; blocks whose
        # addresses changed; range sets of node-block pools (pool, index) that soon want another block.
        self.in_cluster = False
        self.refusal: Callable[[], IpamdError] | None = None
        self.changed: dict[tuple[str, str], None] = {}
        self.scarce: dict[tuple[str, int], None] = {}
        self.count_claimed: Callable[[str, int], int] = lambda _pool, _index: 0  # blocks of other nodes
        self.has_macs: Callable[[str], bool] = lambda _pool: False  # whether its addresses may have MACs in etcd
        for row in self._store.pools():
            pool = Pool(row.name, PoolSpec.decode(row.spec), row.managed)
            self._fill(pool)
            self.pools[row.name] = pool

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
        pool = Pool(name, spec, managed=False)
        if spec.mode != "local" and not self.in_cluster:
            raise PreconditionError(
                f"mode {spec.mode} wants a cluster, and this ipamd keeps its addresses for itself; set [store] kind = "
                '"etcd" (docs/operations.md), or create the pool with mode local'
            )
        return self._add_pool(pool)

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
        for index in range(len(pool.sets)):
            size, allocated, reserved = pool.sets[index].size, pool.allocated[index], pool.reserved[index]
            if now.boottime_ns < cooldown_ns or pool.is_shared:
                cooling = pool.freed[index]  # what an earlier boot freed cools down from this boot's start
            else:
                since = Instant(now.boot_id, now.boottime_ns - cooldown_ns + 1)
                cooling = self._store.count_freed(pool.name, index, since) if pool.freed[index] else 0
            elsewhere = pool.elsewhere[index]
            free = size - allocated - reserved - cooling - elsewhere
            blocks = self._count_blocks(pool, index) if pool.has_blocks else (0, 0, 0)
            found.append(Usage(pool.family(index), size, allocated, reserved, cooling, free, *blocks, elsewhere))
        return found

    def count_used(self, pool: Pool, index: int) -> tuple[int, int]:
        """How much of a range set is in use, and how much there is: addresses, or blocks where nodes claim those."""
        if pool.has_blocks:
            _, claimed, total = self._count_blocks(pool, index)
            return claimed, total
        return pool.allocated[index] + pool.reserved[index] + pool.elsewhere[index], pool.sets[index].size

    def _count_blocks(self, pool: Pool, index: int) -> tuple[int, int, int]:
        own = len(pool.cidrs[index])
        return own, own + self.count_claimed(pool.name, index), pool.whole.grids[index].total

    def reserve(self, name: str, text: str, note: str) -> Reservation:
        """Keeps an address back; raises AlreadyExistsError that names the holder."""
        pool, place, (version, number) = self._place(name, text)
        ip = address_text(version, number)
        self.refuse_held(pool, ip)
        if place is None:
            reservation = Reservation(name, ip, note)
            self._transaction.apply(Reserve(reservation))
            return reservation
        index, block = place
        allocator = pool.sets[index].blocks[block]
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
            kept = place is not None and not pool.is_shared
            if place is not None:
                self._count(pool.reserved, place[0], -1)
                self._count(pool.freed, place[0], int(kept))
            self._transaction.apply(Unreserve(Freed(name, place[0] if place else 0, ip, self._now())),
                                    *(() if kept else (Forget(name, (ip,)),)))  # fmt: skip
            if place is not None and not kept:
                self._cool(name, number)
                self._transaction.on_undo(pool.sets[place[0]].blocks[place[1]].touch, number[1])
        except Exception:
            self._transaction.unwind(mark)
            raise

    def check_place(self, name: str, text: str) -> None:
        """Raises where an address cannot be one of the pool's."""
        self._place(name, text)

    def _place(self, name: str, text: str) -> tuple[Pool, tuple[int, int] | None, Number]:
        """The pool, range set and block of an address; no place for one in a block that this node does not hold."""
        pool = self.pool(name)
        number = parse_address(text, "address")
        place = pool.locate(*number)
        if place is None and pool.block_for(*number) is None:
            refuse_outside([pool], number)
        return pool, place, number

    def _network_pool(self, network: str, wanted: NetworkSpec) -> Pool:
        """The network's own pool, with the spec that is wanted. Stays changed even if what follows fails."""
        name = network_pool_name(network)
        pool = self.pools.get(name)
        if pool is not None and pool.asked == wanted.asked:
            return pool
        spec = _read(wanted)
        if pool is None:
            pool = self._add_pool(Pool(name, spec, managed=True))
        elif pool.spec != spec:
            pool = self._change_pool(pool, spec)
        pool.asked = wanted.asked
        return pool

    def _network_pool_as_is(self, network: str, asked: NetworkSpec) -> Sequence[Pool]:
        """For questions: the pool if it has the spec, else one that looks as it would, with nothing kept."""
        name = network_pool_name(network)
        pool = self.pools.get(name)
        if pool is not None and pool.asked == asked.asked:
            return (pool,)
        wanted = Pool(name, _read(asked), managed=True)
        if pool is not None:
            self._refuse_shrink(wanted)
            self._fill(wanted)
        return (wanted,)

    def _paint(self, pool: Pool) -> None:
        """Of `shared`: sets the bitmaps and counts to what other nodes hold."""

    def _cool(self, name: str, number: Number) -> None:
        """Of `shared`: makes an address of a cluster-address pool cold unless another node has a reason against it."""

    def _add_pool(self, pool: Pool) -> Pool:
        self._transaction.apply(PutPool(PoolRow(pool.name, pool.spec.encode(), pool.managed), new=True))
        self._paint(pool)
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
        if pool.has_blocks:
            self._add_blocks(pool)
        self._paint(pool)
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
                pool.sets[index].blocks[block].held += 1
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

    def refuse_held(self, pool: Pool, ip: str) -> None:
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

    def is_cooling(self, pool: Pool, freed: Freed) -> bool:
        """Whether a freed address is not to be handed out yet."""
        return self._left_s(pool, freed) > 0

    def has_more(self, pool: Pool, index: int, than: int) -> bool:
        """Whether more than so many addresses of a node-block pool's range set can be handed out now."""
        cooled = than - pool.count_untouched(index)  # so many and one more must have cooled down
        if cooled < 0:
            return True
        if cooled >= pool.freed[index]:
            return False
        # The queue is in the order of freeing, and may be long: not counted.
        freed = self._store.oldest_freed(pool.name, index, skip=cooled)
        return freed is not None and not self.is_cooling(pool, freed)

    def _left_s(self, pool: Pool, freed: Freed) -> float:
        """Seconds until a freed address has cooled down; 0 or less where it has."""
        return (self._cooldown_of(pool) - age_ns(self._clock, freed.at)) / 1e9

    def _cooldown_of(self, pool: Pool) -> int:
        cooldown_ms = pool.spec.cooldown_ms
        return self._cooldown_ns if cooldown_ms is None else cooldown_ms * 1_000_000

    def _now(self) -> Instant:
        return Instant(self._clock.boot_id, self._clock.now_ns())

    def _count(self, counts: list[int], index: int, by: int) -> None:
        counts[index] += by
        self._transaction.on_undo(_add, counts, index, -by)

    def _add_blocks(self, pool: Pool) -> None:
        """Gives a pool the blocks that the rows say are this node's."""
        for _, cidr in self._store.blocks(pool.name):
            if pool.home(cidr) is not None:
                _, block = pool.add_block(cidr)
                block.closed = bool(self._store.note(frozen_note(pool.name, cidr)))


def frozen_note(pool: str, cidr: str) -> str:
    """Under which name the store keeps why a block hands nothing out."""
    return f"frozen/{pool}#{cidr}"


def check_pool_name(name: str) -> None:
    """Raises InvalidArgumentError for a name that an operator cannot give to a pool."""
    if not _POOL_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"name: wanted 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit; found {name[:80]!r}"
        )


def network_pool_name(network: str) -> str:
    """The name of the pool that ipamd keeps for a network."""
    return f"net/{network}"


def _read(wanted: NetworkSpec) -> PoolSpec:
    spec = wanted.read()
    if spec.mode != "local":
        raise InvalidArgumentError(
            f"mode: found {spec.mode}; the pool of a network is local to its node; create a named pool for a cluster"
        )
    return spec


def refuse_outside(pools: Sequence[Pool], number: Number) -> NoReturn:
    ip = address_text(*number)
    for pool in pools:
        if pool.is_gateway(*number):
            raise InvalidArgumentError(
                f"{ip} is a gateway of pool {pool.name} and is never handed out; ask for another"
            )
    ranges = "; ".join(f"pool {pool.name}: {pool.describe(index)}" for pool in pools for index in range(len(pool.sets)))
    raise InvalidArgumentError(
        f"{ip} cannot be handed out: it is excluded, or outside the ranges ({ranges}); ask for one of those"
    )


def listed(texts: Iterable[str]) -> str:
    """Names in an error's text."""
    return ", ".join(sorted(texts)) or "none"


def _add(counts: list[int], index: int, by: int) -> None:
    counts[index] += by
