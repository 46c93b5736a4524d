"""Pools of mode cluster-address: what this node knows of the other nodes' addresses, beside its own rows.

etcd decides who holds an address; what is here only keeps this node from asking for what it could not get. An address
is touched while it is held by another node (`holders`), while it cools down for everybody (`resting`), and while it was
released here and the cluster has not been told yet (`leaving`). It is cold again when none of these holds.

The facts are by the pool's name, so they outlive a change of the pool, and may come before it. They are etcd's, so a
batch that fails does not take them back.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from msgspec import Struct

from ipamd.allocator import Block
from ipamd.clock import Clock
from ipamd.engine import Transaction
from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    IpamdError,
    UnavailableError,
)
from ipamd.pool import Pool, address_number, address_text
from ipamd.pools import Number, Pools
from ipamd.store.base import Errand, Settle

_ALL = 1 << 31

Place = tuple[str, str]  # pool, address


class Rest(Struct, frozen=True):
    """An address cools down: who had it last, and the revision at which etcd was told."""

    node: str
    revision: int
    workload: str = ""


class Shared:
    """What is known of one pool's addresses."""

    __slots__ = ("holders", "leaving", "resting", "workloads")

    def __init__(self) -> None:
        self.holders: dict[Number, str] = {}  # the node
        self.resting: dict[Number, Rest] = {}
        self.leaving: set[Number] = set()
        self.workloads: dict[str, tuple[Number, ...]] = {}  # of `resting`; one of each range set, as a rule

    def note_rest(self, number: Number, rest: Rest | None) -> None:
        """The address cools down like that, or (None) no longer."""
        known = self.resting.pop(number, None)
        if known is not None and known.workload:
            left = tuple(one for one in self.workloads.get(known.workload, ()) if one != number)
            if left:
                self.workloads[known.workload] = left
            else:
                self.workloads.pop(known.workload, None)
        if rest is not None:
            self.resting[number] = rest
            if rest.workload:
                self.workloads[rest.workload] = (*self.workloads.get(rest.workload, ()), number)

    def __contains__(self, number: Number) -> bool:
        return number in self.holders or number in self.resting or number in self.leaving


class SharedPools(Pools):
    """See the top of this file."""

    def __init__(self, transaction: Transaction, clock: Clock, cooldown_s: float) -> None:
        self.node = ""
        self.shared: dict[str, Shared] = {}
        # Generations that etcd has not confirmed yet; whether errands were written since somebody looked.
        self.unconfirmed: dict[int, None] = {}
        self.errands_written = False
        # Why no new address is given now; before etcd's state was read none is.
        self.shared_refusal = "its state was not read yet"
        for errand in transaction.store.errands(_ALL):
            self._take_up(errand)
        super().__init__(transaction, clock, cooldown_s)

    def _take_up(self, errand: Errand) -> None:
        if errand.kind == "claim":
            self.unconfirmed[errand.generation] = None
        else:
            self.shared_of(errand.pool).leaving.add(address_number(errand.ip))

    def join(self, node: str) -> None:
        """From now on this node is one of a cluster, under this name: it begins in each pool at a place of its own."""
        self.node = node
        for pool in self.pools.values():
            self._seat(pool)

    def shared_of(self, name: str) -> Shared:
        """What is known of a pool, which need not be there."""
        found = self.shared.get(name)
        if found is None:
            found = self.shared[name] = Shared()
        return found

    def cooldown_s(self, name: str) -> float:
        """The cool-down of a pool; 0 where there is no such pool (any more)."""
        pool = self.pools.get(name)
        return self._cooldown_of(pool) / 1e9 if pool is not None else 0.0

    # --- what etcd tells

    def hold_elsewhere(self, name: str, ip: str, node: str) -> None:
        """Another node holds the address."""
        shared, number = self.shared_of(name), address_number(ip)
        if number not in shared.holders:
            self._add_to(name, number, elsewhere=1)
        shared.holders[number] = node
        self._touch(name, number)

    def let_go_elsewhere(self, name: str, ip: str) -> None:
        """No other node holds the address."""
        shared, number = self.shared_of(name), address_number(ip)
        if shared.holders.pop(number, None) is not None:
            self._add_to(name, number, elsewhere=-1)
            self._cool(name, number)

    def rest(self, name: str, ip: str, rest: Rest) -> None:
        """The address cools down."""
        shared, number = self.shared_of(name), address_number(ip)
        if number not in shared.resting:
            self._add_to(name, number, cooling=1)
        shared.note_rest(number, rest)
        self._touch(name, number)

    def rested(self, name: str, ip: str, revision: int) -> None:
        """The address' cool-down ended with this revision."""
        shared, number = self.shared_of(name), address_number(ip)
        known = shared.resting.get(number)
        if known is None or known.revision > revision:
            return
        shared.note_rest(number, None)
        self._add_to(name, number, cooling=-1)
        self._cool(name, number)

    def left(self, name: str, ip: str) -> None:
        """The cluster knows that this node released the address."""
        shared, number = self.shared_of(name), address_number(ip)
        if number in shared.leaving:
            shared.leaving.remove(number)
            self._add_to(name, number, cooling=-1)
            self._cool(name, number)

    def settle(self, seqs: Iterable[int]) -> None:
        """The cluster knows of these errands."""
        wanted = tuple(seqs)
        if wanted:
            self._transaction.apply(Settle(wanted))

    def wants_claims(self, pools: Iterable[str]) -> bool:
        """Whether addresses of these pools are claimed in the cluster."""
        for name in pools:  # on the way of every allocation
            pool = self.pools.get(name)
            if pool is not None and pool.is_shared:
                return True
        return False

    # --- for the ledger

    def _claims(self, pools: Sequence[Pool]) -> tuple[str, ...]:
        """The pools whose addresses the cluster is to be told of; raises UnavailableError before etcd was read."""
        for pool in pools:
            if pool.is_shared:
                break
        else:
            return ()
        claims = tuple([pool.name for pool in pools if pool.is_shared])
        if len(claims) < len(pools):
            raise InvalidArgumentError(
                f"pools: found {claims[0]}, of mode cluster-address, together with pools of other modes; ask for pools "
                "of one mode"
            )
        if self.shared_refusal:
            raise UnavailableError(
                f"pool {claims[0]}: each of its addresses is asked of etcd, which is away ({self.shared_refusal}); see "
                "netloom status, and ask again later"
            )
        return claims

    def _await_confirmation(self, generation: int) -> None:
        """An allocation is not to be answered before etcd has taken its addresses for this node's."""
        self.unconfirmed[generation] = None
        self._transaction.on_undo(self.unconfirmed.pop, generation, None)

    def _confirmed(self, generation: int) -> None:
        """Nobody waits for that confirmation any more."""
        if generation in self.unconfirmed:
            del self.unconfirmed[generation]
            self._transaction.on_undo(self.unconfirmed.__setitem__, generation, None)

    def _leave(self, pool: Pool, ip: str) -> None:
        """An address was released here."""
        number = address_number(ip)
        self.shared_of(pool.name).leaving.add(number)
        self._add_to(pool.name, number, cooling=1)
        self._transaction.on_undo(self._stay, pool.name, number)
        self.errands_written = True

    def _stay(self, name: str, number: Number) -> None:
        self.shared_of(name).leaving.discard(number)
        self._add_to(name, number, cooling=-1)

    def _former_of(self, pool: Pool, index: int, name: str) -> str:
        """The address that a workload may have back; "" for none. Another node may have had it for the workload."""
        shared = self.shared_of(pool.name)
        own = self._store.former(pool.name, index, name)
        for number in (*shared.workloads.get(name, ()), *([address_number(own)] if own else ())):
            if number in shared.holders or number in shared.leaving:
                continue
            place = pool.locate(*number)
            rest = shared.resting.get(number)
            if place is None or place[0] != index or (rest is not None and rest.workload != name):
                continue
            ip = address_text(*number)
            if self._store.holder(pool.name, ip) is None:
                return ip
        return ""

    def _nothing_cold(self, pool: Pool, index: int) -> IpamdError:
        """Why a pool has no address to give."""
        where = f"pool {pool.name} has no free address in {pool.describe(index)}"
        if pool.freed[index]:
            return CoolingError(
                f"{where} now: {pool.freed[index]} are cooling down; ask again later, or widen the pool"
            )
        return ExhaustedError(
            f"{where}: {pool.allocated[index]} of {pool.sets[index].size} are allocated here, {pool.elsewhere[index]} "
            f"by other nodes, {pool.reserved[index]} reserved; release some, or widen the pool"
        )

    def refuse_held(self, pool: Pool, ip: str) -> None:
        super().refuse_held(pool, ip)
        if not pool.is_shared:
            return
        shared, number = self.shared_of(pool.name), address_number(ip)
        node = shared.holders.get(number)
        if node is not None:
            raise AlreadyExistsError(
                f"{ip} of pool {pool.name} is held on node {node} ('netloom ip list --cluster' says by whom); release "
                "it there, or ask for another"
            )

    def _refuse_resting(self, pool: Pool, ip: str) -> None:
        shared, number = self.shared_of(pool.name), address_number(ip)
        if number in shared.resting or number in shared.leaving:
            raise CoolingError(f"{ip} of pool {pool.name} was released lately and cools down; ask again later")

    def _paint(self, pool: Pool) -> None:
        """Sets the bitmaps and counts of a pool that is new in memory."""
        if not pool.is_shared:
            return
        shared = self.shared_of(pool.name)
        for counts, numbers in (
            (pool.elsewhere, shared.holders),
            (pool.freed, shared.resting),
            (pool.freed, shared.leaving),
        ):
            for number in numbers:
                place = pool.locate(*number)
                if place is not None:
                    counts[place[0]] += 1
                    pool.sets[place[0]].blocks[place[1]].touch(number[1])
        self._seat(pool)

    def _seat(self, pool: Pool) -> None:
        """Lets a pool's search for cold addresses begin at this node's own place, so that nodes rarely meet."""
        if not pool.is_shared or not self.node:
            return
        for index, range_set in enumerate(pool.sets):
            if not pool.allocated[index]:
                for number, block in enumerate(range_set.blocks):
                    if block.size:
                        block.start_after(_seat_of(f"{self.node}#{pool.name}#{index}#{number}", block) - 1)

    def _touch(self, name: str, number: Number) -> None:
        block = self._block_of(name, number)
        if block is not None:
            block.touch(number[1])

    def _cool(self, name: str, number: Number) -> None:
        """The address is cold unless there is another reason against it."""
        block = self._block_of(name, number)
        if block is None or number in self.shared_of(name):
            return
        if self._store.holder(name, address_text(*number)) is None:
            block.untouch(number[1])

    def _block_of(self, name: str, number: Number) -> Block | None:
        pool = self.pools.get(name)
        place = pool.locate(*number) if pool is not None and pool.is_shared else None
        return None if pool is None or place is None else pool.sets[place[0]].blocks[place[1]]

    def _add_to(self, name: str, number: Number, *, elsewhere: int = 0, cooling: int = 0) -> None:
        pool = self.pools.get(name)
        place = pool.locate(*number) if pool is not None and pool.is_shared else None
        if pool is not None and place is not None:
            pool.elsewhere[place[0]] += elsewhere
            pool.freed[place[0]] += cooling


def _seat_of(name: str, block: Block) -> int:
    seed = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "big")
    return block.first + seed % block.size
