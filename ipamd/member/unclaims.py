"""Tells etcd of released addresses: the store's errands, in the background, in order for each address.

A release is answered when the store has it. Its errand stays there until etcd knows: the address is deleted if it still
is this node's, and cools down for everybody under a lease as long as the cool-down. While etcd is away errands wait.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable, Sequence

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Get, Pair, Put, TxnResult, unchanged
from cluster.layout import FreedRecord
from ipamd.engine import Engine
from ipamd.errors import IpamdError
from ipamd.lease import Ledger
from ipamd.member.book import Book, Own, address_key, freed_key, holder_of, mac_key
from ipamd.shared import Place, Rest
from ipamd.store.base import Errand, Store
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_AT_ONCE = 32  # up to four changes each, and etcd takes 128 operations of a kind
_PAGE = 1000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_GATHER_S = 0.02
# Claims that were confirmed are struck off so often: each time is a commit, and only a restart reads them.
_STRIKE_OFF_S = 1.0
# A lease is used for what is freed within so long, and lives that much longer.
_SHARED_S = 1.0


class Leases:
    """Leases of the lengths that are wanted, each for all that is freed within a second."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._granted: dict[int, tuple[int, float]] = {}  # by length: id, time.monotonic()

    async def get(self, cooldown_s: float) -> int:
        """A lease that lives at least that long, 0 for none. Raises EtcdError."""
        if cooldown_s <= 0:
            return 0
        ttl_s = math.ceil(cooldown_s + _SHARED_S)
        known = self._granted.get(ttl_s)
        now = time.monotonic()
        if known is not None and now - known[1] < _SHARED_S:
            return known[0]
        lease = await self._etcd.grant(ttl_s)
        self._granted[ttl_s] = lease.id, now
        return lease.id

    def forget(self) -> None:
        """One of them may be gone."""
        self._granted.clear()


class Unclaims:
    """See the top of this file. `pending`: how many errands there were at the last look."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, store: Store, book: Book) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._book = book
        self._leases = Leases(etcd)
        self._more = asyncio.Event()
        self.pending = 0
        self._waiting = False  # whether an errand waits for a claim to end
        self._claimed = True  # whether a claim was confirmed since the last look
        engine.after_commit(self._look)

    def _look(self) -> None:
        if self._ledger.errands_written:
            self._ledger.errands_written = False
            self._more.set()

    def claimed(self) -> None:
        """Claims ended: their errands may be struck off, and what waited for them may go on."""
        self._claimed = True
        if self._waiting:
            self._more.set()

    async def run(self) -> None:
        """Does errands as they come. Never returns."""
        self._more.set()  # where this begins anew, the run before may have been woken and got no further
        pause = _FIRST_PAUSE_S
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), _STRIKE_OFF_S)
            if self._more.is_set():
                await asyncio.sleep(_GATHER_S)
                self._more.clear()
            elif not self._claimed:
                continue
            try:
                await self._work()
            except EtcdError as error:
                self._leases.forget()
                log.event(_logger, "debug", "etcd is to be told of released addresses later", error=str(error))
            except IpamdError as error:
                log.event(_logger, "warning", "errands could not be worked off", error=str(error))
            except Exception as error:  # noqa: BLE001 (whatever it was must not end the errands)
                log.event(_logger, "error", "an errand failed for no known reason", exc_info=error)
            else:
                pause = _FIRST_PAUSE_S
                continue
            self._more.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _work(self) -> None:
        """Does what can be done now; raises EtcdError, and what is left is asked for again."""
        self._claimed = False
        errands = await self._engine.run(lambda: self._store.errands(_PAGE))
        self.pending = len(errands)
        told = [e.seq for e in errands if e.kind == "claim" and e.generation not in self._ledger.unconfirmed]
        if told:
            await self._engine.run(lambda: self._ledger.settle(told))
        # What a claim under way may yet make ours comes in a later round: its end wakes us.
        ready = [e for e in errands if e.kind == "unclaim" and (e.pool, e.ip) not in self._book.claiming]
        self._waiting = len(ready) < sum(e.kind == "unclaim" for e in errands)
        for start in range(0, len(ready), _AT_ONCE):
            await self._unclaim(ready[start : start + _AT_ONCE])
        if errands:  # nobody may look again for long
            self.pending = await self._engine.run(lambda: len(self._store.errands(_PAGE)))
        if len(errands) == _PAGE:
            self._more.set()

    async def _unclaim(self, errands: Sequence[Errand]) -> None:
        """Raises EtcdError with nothing settled."""
        held = await self._own(errands)
        result = await self._release(held) if held else None
        if result is not None and not result.succeeded:
            # Somebody changed one of them (an operator who removed this node): look, and try with what is there.
            for pair, place in zip(result.pairs, held, strict=True):
                self._learn(place, pair)
            self._more.set()
            return
        rests = {place: own.workload for place, own in held.items() if self._ledger.cooldown_s(place[0]) > 0}
        revision = result.revision if result is not None else 0
        for place in held:
            self._book.own.pop(place, None)
        await self._engine.run(lambda: self._settle(errands, rests, revision))

    async def _own(self, errands: Iterable[Errand]) -> dict[Place, Own]:
        """Those that etcd has as ours, of the generation that was released."""
        unknown = []
        for errand in errands:
            own = self._book.own.get((errand.pool, errand.ip))
            if own is None or own.generation != errand.generation:
                unknown.append(errand)
        if unknown:
            read = await self._etcd.txn([], [Get(address_key((e.pool, e.ip))) for e in unknown])
            for errand, pair in zip(unknown, read.pairs, strict=True):
                self._learn((errand.pool, errand.ip), pair)
        found = {}
        for errand in errands:
            place = (errand.pool, errand.ip)
            own = self._book.own.get(place)
            if own is not None and own.generation == errand.generation:
                found[place] = own
        return found

    def _learn(self, place: Place, pair: Pair | None) -> None:
        known = self._book.own.pop(place, None)
        if pair is None:
            return
        holder = holder_of(pair)
        if self._book.is_ours(holder):
            workload = known.workload if known is not None and known.generation == holder.generation else ""
            self._book.own[place] = Own(pair.mod_revision, holder.generation, workload)

    async def _release(self, held: dict[Place, Own]) -> TxnResult:
        then: list[Put | Delete | Get] = []
        identity = self._book.identity
        for place, own in held.items():
            then += [Delete(address_key(place)), Delete(self._book.owned_key(place))]
            if self._ledger.has_macs(place[0]):
                then.append(Delete(mac_key(place)))
            lease = await self._leases.get(self._ledger.cooldown_s(place[0]))
            if lease:
                record = FreedRecord(identity.node, identity.node_id, own.workload)
                then.append(Put(freed_key(place), layout.encode(record), lease))
        compares = [unchanged(address_key(place), own.revision) for place, own in held.items()]
        return await self._etcd.txn(compares, then, [Get(address_key(place)) for place in held], repeatable=True)

    def _settle(self, errands: Sequence[Errand], rests: dict[Place, str], revision: int) -> None:
        self._ledger.settle(errand.seq for errand in errands)
        for errand in errands:
            place = (errand.pool, errand.ip)
            if place in rests:
                self._ledger.rest(*place, Rest(self._book.identity.node, revision, rests[place]))
            self._ledger.left(*place)
