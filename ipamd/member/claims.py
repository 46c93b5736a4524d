"""Claims addresses of cluster-address pools: create-if-absent in etcd, before anybody is told of them.

- The ledger has chosen and the store keeps the choice, with an errand, before etcd is asked: after a crash the errand
  says what etcd may have. The allocation is answered when etcd has its addresses as this node's.
- Claims that wait at the same time share a transaction, so the rate does not depend on the way to etcd. Where it fails,
  a look says for whose sake; the others are asked for again at once.
- An address wants: nobody's, neither reserved nor cooling down (but for the workload that had it, and for the node that
  was removed and has it still), its pool unchanged, and this node one of the cluster.
- Whether a transaction without an answer was done shows in the next one, which finds this node's own id and generation.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from cluster import layout
from cluster.errors import EtcdError, QuotaError
from cluster.etcd import Compare, Delete, Etcd, Get, Pair, Put, TxnResult, absent, present, unchanged
from cluster.layout import FreedRecord, LayoutError, PoolRecord, ReservationRecord
from ipamd.allocate import LostError
from ipamd.engine import Engine
from ipamd.errors import IpamdError, PreconditionError, UnavailableError
from ipamd.lease import Ledger
from ipamd.member.book import Book, Own, address_key, freed_key, holder_of, workload_of
from ipamd.member.mirror import Known
from ipamd.pool import address_number
from ipamd.shared import Place, Rest
from ipamd.store.base import Allocation
from telemetry import log

_logger = logging.getLogger("ipamd.member")

# Three conditions each, and etcd takes 128 operations of a kind.
MOST_ADDRESSES = 32
_MOST_ROUNDS = 8


class Claim:
    """An allocation whose addresses are asked for."""

    __slots__ = ("again", "allocation", "expected", "future", "places")

    def __init__(
        self, allocation: Allocation, places: Sequence[Place], future: "asyncio.Future[None]", *, again: bool
    ) -> None:
        self.again = again
        self.allocation = allocation
        self.places = tuple(places)
        self.future = future
        # Keys that may be there, by the revision at which they were read: this node's own of an earlier generation, and
        # its own cool-downs.
        self.expected: dict[str, int] = {}

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Claims:
    """See the top of this file. `pools`: as they stand in etcd; kept by somebody else."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, book: Book, pools: dict[str, Known]) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._book = book
        self._pools = pools
        self._waiting: dict[int, Claim] = {}  # by generation
        self._more = asyncio.Event()
        self.on_claimed: Callable[[], None] = lambda: None
        self.collisions = 0  # claims that others were faster with

    async def confirm(self, allocation: Allocation) -> None:
        """See `ipamd.allocate.Claims`. Where it cannot be had, nothing of it is kept."""
        claim = self.begin(allocation)
        try:
            async with asyncio.timeout(self._etcd.config.timeout_s):
                await asyncio.shield(claim.future)
        except TimeoutError:
            await self._cancel(allocation)
            raise UnavailableError("etcd does not answer, so no address can be claimed; ask again later") from None
        except LostError:
            raise
        except IpamdError:
            await self._cancel(allocation)
            raise

    def begin(self, allocation: Allocation, *, again: bool = False) -> Claim:
        """Asks for an allocation's addresses; the future of what is returned tells how it went.

        `again`: they were this node's before.
        """
        claim = self._waiting.get(allocation.generation)
        if claim is None:
            places = [
                (address.pool, address.ip)
                for address in allocation.addresses
                if (pool := self._ledger.pools.get(address.pool)) is not None and pool.is_shared
            ]
            claim = Claim(allocation, places, asyncio.get_running_loop().create_future(), again=again)
            claim.future.add_done_callback(lambda done: self._done(allocation.generation, done))
            self._waiting[allocation.generation] = claim
            self._more.set()
        return claim

    def _done(self, generation: int, done: "asyncio.Future[None]") -> None:
        self._waiting.pop(generation, None)
        if not done.cancelled():
            done.exception()  # seen, also where nobody waits any more

    async def _cancel(self, allocation: Allocation) -> None:
        claim = self._waiting.pop(allocation.generation, None)
        if claim is not None:
            claim.future.cancel()
        await self._engine.run(lambda: self._ledger.release(allocation.key, allocation.generation))

    async def run(self) -> None:
        """Claims what waits. Never returns."""
        while True:
            batch = self._next()
            if not batch:
                self._more.clear()
                await self._more.wait()
                continue
            try:
                await self._claim(batch)
            except Exception as error:  # noqa: BLE001 (whatever it was must not end the claiming)
                log.event(_logger, "error", "addresses could not be claimed for no known reason", exc_info=error)
                for claim in batch:
                    claim.fail(IpamdError(f"a fault in ipamd, see its log: {error}"))
            finally:
                self._book.claiming.clear()
                self.on_claimed()

    def _next(self) -> list[Claim]:
        batch: list[Claim] = []
        count = 0
        for claim in self._waiting.values():
            if claim.future.done():
                continue
            count += len(claim.places)
            if batch and count > MOST_ADDRESSES:
                break
            batch.append(claim)
        return batch

    async def _claim(self, batch: list[Claim]) -> None:
        self._book.claiming.update(place for claim in batch for place in claim.places)
        try:
            for _ in range(_MOST_ROUNDS):
                batch = [claim for claim in await self._with_pools(batch) if not claim.future.done()]
                if not batch:
                    return
                done = await self._txn(batch)
                if done.succeeded:
                    self._keep(batch, done.revision)
                    return
                await self._judge(batch, await self._read(batch))
        except QuotaError as error:
            self._fail(batch, UnavailableError(f"no address can be claimed: {error}"))
        except EtcdError as error:
            self._fail(batch, UnavailableError(f"no address can be claimed, as etcd cannot be reached: {error}"))
        except LayoutError as error:
            self._fail(batch, UnavailableError(f"no address can be claimed: {error}"))
        else:
            self._fail(batch, UnavailableError("etcd's state changed each time that an address was claimed; ask again"))

    def _fail(self, batch: Sequence[Claim], error: IpamdError) -> None:
        for claim in batch:
            claim.fail(error)

    async def _with_pools(self, batch: Sequence[Claim]) -> list[Claim]:
        """Those whose pools may give addresses."""
        for name in {name for claim in batch for name, _ in claim.places} - self._pools.keys():
            self._learn_pool(name, await self._etcd.get(layout.POOLS + name))
        found = []
        for claim in batch:
            if not claim.again and claim.allocation.generation not in self._ledger.unconfirmed:
                claim.fail(UnavailableError(f"{claim.allocation.key} was released while its addresses were claimed"))
                continue
            for name, _ in claim.places:
                known = self._pools.get(name)
                if known is None or known.record.deleting:
                    why = "is being deleted" if known else "is not there any more"
                    claim.fail(PreconditionError(f"pool {name} {why} in the cluster; ask another pool"))
                    break
            else:
                found.append(claim)
        return found

    def _learn_pool(self, name: str, pair: Pair | None) -> None:
        if pair is None:
            self._pools.pop(name, None)
        else:
            self._pools[name] = Known(layout.decode(PoolRecord, pair.key, pair.value), pair.mod_revision)

    async def _txn(self, batch: Sequence[Claim]) -> TxnResult:
        node_key = layout.NODES + self._book.identity.node
        names = sorted({name for claim in batch for name, _ in claim.places})
        compares: list[Compare] = [present(node_key)]
        compares += [unchanged(layout.POOLS + name, self._pools[name].revision) for name in names]
        then: list[Put | Delete | Get] = []
        for claim in batch:
            value = self._book.record(claim.allocation)
            for place in claim.places:
                key, freed = address_key(place), freed_key(place)
                known = claim.expected.get(key)
                compares.append(absent(key) if known is None else unchanged(key, known))
                compares.append(absent(layout.RESERVATIONS + layout.place(*place)))
                then += [Put(key, value), Put(self._book.owned_key(place), b"")]
                rest = claim.expected.get(freed) or self._rest_for(claim, place)
                if not rest:
                    compares.append(absent(freed))
                else:
                    compares.append(unchanged(freed, rest))
                    then.append(Delete(freed))
        return await self._etcd.txn(compares, then, repeatable=True)

    async def _read(self, batch: Sequence[Claim]) -> TxnResult:
        """What a transaction's conditions are about. Not asked within it, as etcd would keep the question, too."""
        names = sorted({name for claim in batch for name, _ in claim.places})
        gets = [Get(layout.NODES + self._book.identity.node), *(Get(layout.POOLS + name) for name in names)]
        for claim in batch:
            for place in claim.places:
                reserved = layout.RESERVATIONS + layout.place(*place)
                gets += [Get(address_key(place)), Get(reserved), Get(freed_key(place))]
        return await self._etcd.txn([], gets)

    def _rest_for(self, claim: Claim, place: Place) -> int:
        """The revision of the cool-down that an address is taken out of, for the workload that had it; 0: of none."""
        rest = self._ledger.shared_of(place[0]).resting.get(address_number(place[1]))
        if rest is None or not rest.workload or rest.workload != workload_of(claim.allocation):
            return 0
        return rest.revision

    def _keep(self, batch: Sequence[Claim], revision: int = 0, *, found: bool = False) -> None:
        """Etcd has them as ours: since this revision, or it was `found` so."""
        for claim in batch:
            generation = claim.allocation.generation
            for place in claim.places:
                at = claim.expected.get(address_key(place), revision) if found else revision
                self._book.own[place] = Own(at, generation, workload_of(claim.allocation))
                self._book.conflicts.pop(place, None)
            self._ledger.unconfirmed.pop(generation, None)
            if not claim.future.done():
                claim.future.set_result(None)

    async def _judge(self, batch: Sequence[Claim], done: TxnResult) -> None:
        """Ends the claims that cannot succeed, and notes what to expect for those that can."""
        pairs = iter(done.pairs)
        if next(pairs) is None:
            node = self._book.identity.node
            self._fail(batch, UnavailableError(f"node {node} is not in the cluster; it joins anew, ask again then"))
            return
        for name in sorted({name for claim in batch for name, _ in claim.places}):
            self._learn_pool(name, next(pairs))
        kept = []
        for claim in batch:
            found = [(place, (next(pairs), next(pairs), next(pairs))) for place in claim.places]
            lost = [(place, pair) for place, of_place in found for pair in self._against(claim, place, of_place)]
            addresses = [of_place[0] for _, of_place in found]
            if all(pair is not None and self._is_of(claim, pair) for pair in addresses):
                kept.append(claim)  # the answer to an earlier try was lost
            elif lost:
                self.collisions += 1
                await self._lose(claim, lost)
        if kept:
            self._keep(kept, found=True)

    def _is_of(self, claim: Claim, pair: Pair) -> bool:
        holder = holder_of(pair)
        return self._book.is_ours(holder) and holder.generation == claim.allocation.generation

    def _against(self, claim: Claim, place: Place, pairs: Sequence[Pair | None]) -> Iterator[Pair]:
        """What stands against a claim of an address; what of it is our own is expected from now on."""
        address, reserved, freed = pairs
        claim.expected.pop(address_key(place), None)
        claim.expected.pop(freed_key(place), None)
        if address is not None:
            if self._book.is_ours(holder_of(address)):
                claim.expected[address.key] = address.mod_revision
            else:
                yield address
        if reserved is not None:
            yield reserved
        if freed is not None and not self._may_take(claim, place, freed):
            yield freed

    def _may_take(self, claim: Claim, place: Place, freed: Pair) -> bool:
        record = layout.decode(FreedRecord, freed.key, freed.value)
        if claim.again and self._book.is_ours(record):
            # This node was removed, and its container still uses the address: the cool-down is for others.
            claim.expected[freed.key] = freed.mod_revision
            return True
        if not record.workload or record.workload != workload_of(claim.allocation):
            return False
        self._ledger.rest(*place, Rest(record.node, freed.mod_revision, record.workload))
        return True

    async def _lose(self, claim: Claim, lost: Sequence[tuple[Place, Pair]]) -> None:
        """Others have what the ledger chose: it chooses again, and not the same."""
        allocation = claim.allocation

        def tell() -> None:
            self._ledger.release(allocation.key, allocation.generation)
            for place, pair in lost:
                note_pair(self._ledger, place, pair)
                if pair.key.startswith(layout.RESERVATIONS):
                    with contextlib.suppress(IpamdError):
                        self._ledger.reserve(*place, layout.decode(ReservationRecord, pair.key, pair.value).note)

        if claim.again:
            # Its container uses it.
            claim.fail(LostError(lost[0][1].key))
            return
        try:
            await self._engine.run(tell)
        except IpamdError as error:
            claim.fail(error)
        else:
            claim.fail(LostError(", ".join(f"{ip} of pool {name}" for (name, ip), _ in lost)))


def note_pair(ledger: Ledger, place: Place, pair: Pair) -> None:
    """Tells the ledger what stands in etcd about an address of another's."""
    if pair.key.startswith(layout.ADDRESSES):
        ledger.hold_elsewhere(*place, holder_of(pair).node)
    elif pair.key.startswith(layout.FREED):
        record = layout.decode(FreedRecord, pair.key, pair.value)
        ledger.rest(*place, Rest(record.node, pair.mod_revision, record.workload))
