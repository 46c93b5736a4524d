"""Claims blocks for node-block pools, gives empty ones back, and keeps what this node holds in step with etcd.

- A block is this node's where etcd's record names its id. It is put by a transaction that wants it absent and the pool
  unchanged; then the store keeps it, and only then is an address of it handed out.
- Requests that want a block of one range set at the same time share one claim. Where addresses become scarce the next
  block is claimed before anybody waits for it, and several at once where the last ones were used up quickly.
- It is given back in the other order: first the store forgets it, then etcd. What a crash leaves is found when the
  records are listed: ours but unknown here is adopted, ours here but missing there is put there again if something of
  it is in use, somebody else's is frozen: it hands nothing out until an operator has seen to it.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Event, Get, List, Page, Pair, Put, TxnResult, absent, equals, unchanged
from cluster.layout import BlockRecord, PoolRecord, ReservationRecord
from ipamd.engine import Engine
from ipamd.errors import CoolingError, ExhaustedError, IpamdError, NeedsBlockError, PreconditionError, UnavailableError
from ipamd.lease import Ledger
from ipamd.member.flow import Flow
from ipamd.member.follow import Follower
from ipamd.member.holdings import Holdings
from ipamd.member.mirror import Known, Mirror
from ipamd.member.settle import Settling
from ipamd.member.table import Table
from ipamd.pool import Pool
from ipamd.store.base import Reservation
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_TRIES = 20
_REREAD_AFTER = 3  # conflicts in a row: what is known of the others is too old
_FEW_RESERVATIONS = 500  # of a pool: as many are read in one piece
_GIVE_BACK_INTERVAL_S = 2.0
_LOOK_AGAIN_S = 0.25

Place = tuple[str, int, str]  # pool, range set, block ("": any)


class Counts(Protocol):
    """What is measured."""

    def claimed(self, blocks: int, conflicts: int, seconds: float) -> None:
        """One claim that succeeded."""

    def told(self, operation: str, seconds: float) -> None:
        """Something else that etcd was told."""


class Blocks:
    """See the top of this file. `identity` is put into each record of this node."""

    def __init__(
        self,
        etcd: Etcd,
        engine: Engine,
        ledger: Ledger,
        holdings: Holdings,
        mirror: Mirror,
        identity: BlockRecord,
        counts: Counts,
    ) -> None:
        self.draining = False
        self.table = Table(identity)
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._holdings = holdings
        self._mirror = mirror
        self._identity = identity
        self._record = layout.encode(identity)
        self._counts = counts
        self._flights: dict[Place, asyncio.Task[None]] = {}
        self._flows: dict[tuple[str, int], Flow] = {}
        self._returns: dict[tuple[str, str], None] = {}  # given up here, yet to be deleted there
        self._resting: set[tuple[str, str]] = set()  # empty at the last look
        self._claiming: set[tuple[str, str]] = set()
        self._wake = asyncio.Event()
        self._untidy = asyncio.Event()
        self._settling = Settling(etcd, engine, ledger, holdings, self.table, self._record)
        self.frozen = self._settling.frozen
        mirror.on_deleting = self._untidy.set
        self.follower = Follower(etcd, layout.BLOCKS, self._listed, self._changed)
        ledger.count_claimed = self.count_others
        engine.after_commit(self._after_commit)

    # --- claiming

    async def provide(self, need: NeedsBlockError) -> None:
        """Claims what the ledger wants; raises what the client is to be told where that cannot be."""
        try:
            await self.claim(need.pool, need.range_set, need.cidr)
        except (ExhaustedError, UnavailableError) as error:
            if isinstance(need.otherwise, CoolingError):
                raise CoolingError(f"{need.otherwise}; no further block: {error}") from None
            raise

    def foresee(self, need: NeedsBlockError) -> None:
        """Raises what `provide` would, as far as that is known without asking etcd."""
        pool = self._ledger.pool(need.pool)
        try:
            if need.cidr:
                self._refuse_wanted(pool, need.range_set, need.cidr)
            else:
                self._choose(pool, need.range_set, 1)
        except ExhaustedError as error:
            if isinstance(need.otherwise, CoolingError):
                raise need.otherwise from error
            raise
        if not self._etcd.state.connected:
            raise self._away(need.pool)

    async def claim(self, pool: str, range_set: int, cidr: str = "") -> None:
        """Returns when this node holds a block more of the range set (this one, if it is named).

        Raises ExhaustedError (none is left, or this node has as many as it may), PreconditionError (the named one is
        another node's), UnavailableError (etcd is away).
        """
        place = pool, range_set, cidr
        flight = self._flights.get(place)
        if flight is None:
            flight = asyncio.create_task(self._claim(*place))
            self._flights[place] = flight
            flight.add_done_callback(lambda done: self._landed(place, done))
        await asyncio.shield(flight)

    def _landed(self, place: Place, done: "asyncio.Task[None]") -> None:
        del self._flights[place]
        if not done.cancelled():
            done.exception()  # seen, also where nobody waits any more

    async def _claim(self, name: str, index: int, wanted: str) -> None:
        began = time.monotonic()
        conflicts = 0
        while conflicts < _TRIES:
            pool = self._ledger.pool(name)
            known = self._mirror.pools.get(name)
            if known is None and not self._mirror.synced:
                raise self._away(name)
            if known is None or known.record.deleting:
                why = "is being deleted" if known else "is not known to the cluster yet"
                raise UnavailableError(f"pool {name} {why}; ask again later")
            cidrs = [wanted] if wanted else self._choose(pool, index, conflicts)
            if wanted:
                self._refuse_wanted(pool, index, wanted)
            try:
                self._claiming.update((name, cidr) for cidr in cidrs)
                got, reserved = await self._try_claim(name, known, cidrs)
                if got:
                    await self._keep(name, got, reserved)
                    if not wanted:
                        self._flow(name, index).note(len(got), began)
                        # Where several are wanted at once they last no longer than one does else.
                        pool.early[index] = pool.ahead(index) * len(got)
                    self._counts.claimed(len(got), conflicts, time.monotonic() - began)
                    log.event(_logger, "info", "blocks claimed", pool=name, blocks=",".join(got), conflicts=conflicts)
                    return
            except EtcdError as error:
                raise UnavailableError(f"pool {name} wants a block more, and etcd is away: {error}") from None
            finally:
                self._claiming.difference_update((name, cidr) for cidr in cidrs)
            conflicts += 1
            if conflicts % _REREAD_AFTER == 0:
                await self._reread(name)
        raise UnavailableError(f"pool {name}: other nodes took each block that this one chose; ask again")

    def _away(self, name: str) -> UnavailableError:
        why = self._etcd.state.reason or "it was not met yet"
        return UnavailableError(f"pool {name} wants a block more, and etcd is away: {why}")

    def _choose(self, pool: Pool, index: int, conflicts: int) -> list[str]:
        grid, have = pool.whole.grids[index], len(pool.cidrs[index])
        room = pool.spec.blocks_per_node - have if pool.spec.blocks_per_node else grid.total
        if room <= 0:
            raise ExhaustedError(
                f"pool {pool.name} has no free address in {pool.describe(index)} here: this node holds {have} blocks, "
                "as many as blocks_per_node lets it; release some addresses, or make the pool anew with more"
            )
        claimed = {*self.table.cidrs(pool.name), *pool.cidrs[index]}
        free = grid.total - len(claimed)
        wanted = self._flow(pool.name, index).wanted(time.monotonic())
        many = 1 if conflicts else max(1, min(wanted, room, free // 16))
        found: list[str] = []
        for number in range(many):
            seed = self._seed(pool.name, index) + have + number
            cidr = grid.choose(seed, claimed, spread=bool(conflicts))
            if not cidr:
                break
            found.append(cidr)
            claimed.add(cidr)
        if not found:
            raise ExhaustedError(
                f"pool {pool.name} has no free address in {pool.describe(index)} here, and all of its {grid.total} "
                "blocks are claimed by nodes (netloom node list); widen the pool, or remove nodes that are gone"
            )
        return found

    def _flow(self, pool: str, index: int) -> Flow:
        return self._flows.setdefault((pool, index), Flow())

    def _seed(self, pool: str, index: int) -> int:
        text = f"{self._identity.node_id} {pool} {index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def _refuse_wanted(self, pool: Pool, index: int, cidr: str) -> None:
        owner = self.table.get(pool.name, cidr)
        if owner is not None and owner.node_id != self._identity.node_id:
            raise PreconditionError(
                f"block {cidr} of pool {pool.name} is node {owner.node}'s, which alone hands its addresses out; ask "
                "for another address"
            )
        limit = pool.spec.blocks_per_node
        if limit and len(pool.cidrs[index]) >= limit and pool.find_block(cidr) is None:
            raise ExhaustedError(
                f"pool {pool.name}: this node holds {limit} blocks, as many as blocks_per_node lets it"
            )

    async def _try_claim(self, name: str, known: Known, cidrs: Sequence[str]) -> tuple[list[str], Page | None]:
        """The blocks that became ours; none where somebody was faster, who is known then. And the pool's reservations
        as of that moment, where they came along.
        """
        pool_key = layout.POOLS + name
        keys = [layout.BLOCKS + layout.place(name, cidr) for cidr in cidrs]
        done = await self._etcd.txn(
            [unchanged(pool_key, known.revision), *map(absent, keys)],
            [*(Put(key, self._record) for key in keys), List(_reservations(name), _FEW_RESERVATIONS)],
            [Get(pool_key), *map(Get, keys)],
            repeatable=True,
        )
        if done.succeeded:
            for cidr in cidrs:
                self.table.note_own(name, cidr, done.revision)
            return list(cidrs), done.pages[0]
        self._learn_pool(name, done)
        got = []
        for cidr, pair in zip(cidrs, done.pairs[1:], strict=True):
            if pair is not None:
                self.table.note(pair)
                # Ours: the answer to an earlier try was lost, or it is about to be given back.
                if self.table.is_own(name, cidr) and await self._assert(name, cidr):
                    got.append(cidr)
        return got, None

    async def _assert(self, name: str, cidr: str) -> bool:
        """Writes our record of a block anew, so that no deletion that was sent before can meet it any more.

        False where it is not there, or not ours, any more.
        """
        key = layout.BLOCKS + layout.place(name, cidr)
        known = self.table.get(name, cidr)
        before = known.revision if known else 0
        done = await self._etcd.txn([unchanged(key, before)], [Put(key, self._record)], [Get(key)], repeatable=True)
        if done.succeeded:
            self.table.note_own(name, cidr, done.revision)
            return True
        pair = done.pairs[0]
        if pair is None:
            self.table.note_free(name, cidr, done.revision)
            return False
        self.table.note(pair)
        return pair.value == self._record

    def _learn_pool(self, name: str, done: TxnResult) -> None:
        pair = done.pairs[0]
        if pair is None:
            self._mirror.pools.pop(name, None)
        else:
            self._mirror.pools[name] = Known(layout.decode(PoolRecord, pair.key, pair.value), pair.mod_revision)

    async def _keep(self, name: str, cidrs: Sequence[str], known: Page | None = None) -> None:
        """Has the ledger hold blocks that etcd says are ours. `known`: the pool's reservations, read since they are."""
        prefix = _reservations(name)
        if known is None or known.more:
            pairs = [pair async for page in self._etcd.walk(prefix) for pair in page.pairs]
        else:
            pairs = known.pairs
        reserved = [
            Reservation(
                name, pair.key.removeprefix(prefix), layout.decode(ReservationRecord, pair.key, pair.value).note
            )
            for pair in pairs
        ]
        for cidr in cidrs:
            self._returns.pop((name, cidr), None)
        await self._engine.run(lambda: self._holdings.add(name, cidrs, reserved), grows=True)

    async def _reread(self, name: str) -> None:
        prefix = layout.BLOCKS + layout.place(name, "")
        pairs: list[Pair] = []
        revision = 0
        try:
            async for page in self._etcd.walk(prefix):
                pairs += page.pairs
                revision = page.revision
        except EtcdError as error:
            raise UnavailableError(f"the cluster cannot be asked for blocks of pool {name}: {error}") from None
        self.table.replace(pairs, revision, name)

    # --- claiming ahead

    def _after_commit(self) -> None:
        if self._ledger.scarce:
            self._wake.set()

    async def keep_ahead(self) -> None:
        """Claims before it is wanted. Never returns."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            places, later = list(self._ledger.scarce), False
            self._ledger.scarce.clear()
            for place in places:
                flow = self._flow(*place)
                if time.monotonic() - flow.enough_s < _LOOK_AGAIN_S:
                    self._ledger.scarce[place] = None
                    later = True
                elif not self.draining:
                    await self._claim_ahead(*place, flow)
            if later:
                await asyncio.sleep(_LOOK_AGAIN_S)
                self._wake.set()

    async def _claim_ahead(self, name: str, index: int, flow: Flow) -> None:
        try:
            pool = self._ledger.pool(name)
            if await self._engine.run(lambda: self._ledger.has_more(pool, index, pool.early[index])):
                if pool.count_untouched(index) <= pool.early[index]:
                    # Some cooled down. The ledger does not see that, and will go on saying that it wants a block.
                    flow.enough_s = time.monotonic()
                return
            await self.claim(name, index)
        except IpamdError as error:
            # Whoever needs it will be told.
            flow.enough_s = time.monotonic()
            log.event(_logger, "debug", "no block could be claimed ahead", pool=name, error=str(error))

    # --- giving back

    async def keep_tidy(self) -> None:
        """Gives empty blocks back. Never returns."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._untidy.wait(), _GIVE_BACK_INTERVAL_S)
            self._untidy.clear()
            try:
                await self.tidy()
            except EtcdError as error:
                log.event(_logger, "debug", "blocks could not be given back", error=str(error))
            except IpamdError as error:
                log.event(_logger, "warning", "blocks could not be given back", error=str(error))

    async def tidy(self) -> None:
        """One round: what was empty at the last look too, and is not needed."""
        for name, cidr in list(self._returns):
            if self._holdings.one(name, cidr) is None:
                await self._give_back(name, cidr)
        await self._adopt(self.table.own())
        resting = set()
        for pool in list(self._ledger.pools.values()):
            known = self._mirror.pools.get(pool.name)
            leaving = self.draining or (known is not None and known.record.deleting)
            hot = known is not None and known.record.deleting
            for index in range(len(pool.cidrs)):
                if not self._flow(pool.name, index).is_rush(time.monotonic()):
                    pool.early[index] = pool.ahead(index)
                spare = [(pool.name, cidr) for cidr in self._spare(pool, index, leaving)]
                if not leaving:
                    resting.update(set(spare) - self._resting)
                    spare = [place for place in spare if place in self._resting]
                if spare and not hot:  # all in one question: a busy node has many that cool down
                    spare = await self._engine.run(lambda spare=spare: self._holdings.at_rest(spare))  # type: ignore[misc]
                for place in spare:
                    if await self._retire(place, hot):
                        await self._give_back(*place)
        self._resting = resting

    async def _retire(self, place: tuple[str, str], hot: bool) -> bool:
        self._returns[place] = None
        retired = False
        try:
            retired = await self._engine.run(lambda: self._holdings.retire(*place, hot=hot))
        finally:
            if not retired:
                self._returns.pop(place, None)
        return retired

    def _spare(self, pool: Pool, index: int, leaving: bool) -> list[str]:
        """Empty blocks that may go, the newest first."""
        blocks = pool.sets[index].blocks
        empty = [(cidr, block) for cidr, block in zip(pool.cidrs[index], blocks, strict=True) if not block.held]
        if leaving:
            return [cidr for cidr, _ in empty]
        spare: list[str] = []
        # What stays has room for twice as much as makes the next block be claimed.
        free = pool.sets[index].size - pool.allocated[index] - pool.reserved[index]
        for cidr, block in reversed(empty):
            free -= block.size
            if len(spare) + 1 == len(blocks) or free < 2 * pool.early[index]:
                break
            spare.append(cidr)
        return spare

    async def _give_back(self, name: str, cidr: str) -> None:
        """Deletes our record of a block that the store has forgotten, if it is still the one that we know."""
        ending = layout.place(name, cidr)
        key = layout.BLOCKS + ending
        known = self.table.get(name, cidr)
        ours = unchanged(key, known.revision) if known else equals(key, self._record)
        done = await self._etcd.txn(
            [ours], [Delete(key), Delete(layout.PUBLISHED + ending)], [Get(key)], repeatable=True
        )
        if not done.succeeded and done.pairs[0] is not None:
            self.table.note(done.pairs[0])
            if self.table.is_own(name, cidr):
                return  # written anew: the next round, unless it was taken again
        else:
            self.table.note_free(name, cidr, done.revision)
        self._returns.pop((name, cidr), None)
        log.event(_logger, "info", "block given back", pool=name, block=cidr)

    # --- keeping in step

    def count_others(self, name: str, index: int) -> int:
        """How many blocks of a range set other nodes hold."""
        pool = self._ledger.pools.get(name)
        if pool is None:
            return 0
        others = self.table.others(name)
        if len(pool.cidrs) == 1:
            return len(others)
        alike = [i for i in range(len(pool.cidrs)) if pool.family(i) == pool.family(index)]
        six = pool.family(index) == "ipv6"
        return sum((":" in cidr) == six and (len(alike) == 1 or pool.home(cidr) == index) for cidr in others)

    async def _listed(self, pairs: Sequence[Pair], revision: int) -> None:
        self.table.replace(pairs, revision, went_back=self.follower.went_back)
        for held in self._holdings.all():
            if (held.pool, held.cidr) not in self._claiming:
                await self._settling.settle(held.pool, held.cidr)
        await self._adopt(self.table.own())

    async def _changed(self, events: Sequence[Event]) -> None:
        places = []
        for event in events:
            if event.kind == "put":
                places.append(self.table.note(event.pair))
            else:
                name, cidr = layout.split(event.pair.key.removeprefix(layout.BLOCKS))
                self.table.note_free(name, cidr, event.pair.mod_revision)
                places.append((name, cidr))
        for place in places:
            if place not in self._claiming:
                await self._settling.settle(*place)
        await self._adopt(places)

    async def _adopt(self, places: Iterable[tuple[str, str]]) -> None:
        """Takes blocks that etcd says are ours, and the ledger does not know: the answer to a claim was lost."""
        for name, cidr in places:
            pool = self._ledger.pools.get(name)
            if pool is None or not self.table.is_own(name, cidr):
                continue
            if (name, cidr) in self._claiming or (name, cidr) in self._returns or pool.find_block(cidr) is not None:
                continue
            if pool.home(cidr) is None:
                log.event(_logger, "error", "a block of this node does not fit its pool", pool=name, block=cidr)
                continue
            try:
                if not await self._assert(name, cidr):
                    continue
                await self._keep(name, [cidr])
            except IpamdError as error:
                # A full disk: the next round tries again.
                log.event(_logger, "warning", "a block of this node cannot be kept yet", pool=name, block=cidr,
                          error=str(error))  # fmt: skip
                continue
            log.event(_logger, "info", "a block of this node was not known here, and is now", pool=name, block=cidr)


def _reservations(pool: str) -> str:
    return layout.RESERVATIONS + layout.place(pool, "")
