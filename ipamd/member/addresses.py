"""Follows who holds the addresses of cluster-address pools, and keeps what this node holds in step with it.

Both watches begin with a list and go on from its revision; where history was compacted away, they begin anew. Nothing
is watched before there is such a pool.

Where etcd and the store differ about an address of this node's, nothing is done at once, as one of them may be about to
hear of the other. What differs still after a moment:
- in use here, and etcd has nobody: it is claimed again;
- in use here, and etcd has another node: an error for `netloom ip check`, as two containers may have it;
- not known here, and etcd has this node (an older copy of the database): it becomes an allocation again, and is
  released like any other once its container is gone.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import msgspec

from cluster import layout
from cluster.errors import CompactedError, EtcdError
from cluster.etcd import Delete, Etcd, Event, Pair, unchanged
from cluster.layout import AddressRecord, LayoutError
from ipamd.allocate import LostError
from ipamd.engine import Engine
from ipamd.errors import IpamdError
from ipamd.lease import Ledger
from ipamd.member.book import Book, Own, address_key, holder_of, mac_key, workload_of
from ipamd.member.claims import Claims, note_pair
from ipamd.pool import address_number, address_text
from ipamd.shared import Place
from ipamd.store.base import Allocation, Filter, Store
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_PAUSE_S = 0.5
_GRACE_S = 3.0
_PAGE = 500
_LATEST = 1 << 63
_GATHER_S = 0.05
# More messages in so long are many, and who followed them comes again that much later.
_BUSY_S, _MANY = 0.25, 8


async def changes(etcd: Etcd, prefix: str, revision: int, take: Callable[[list[Event]], None]) -> int:
    """Hands on what happens behind a revision; where that is much, returns how far it came, to be called again later.

    etcd sends a message for each transaction, which costs a node as much as a dozen events. Who comes a while later and
    asks for what happened since gets all of it in one.
    """
    began_s, messages = time.monotonic(), 0
    async with contextlib.aclosing(etcd.watch(prefix, revision + 1)) as batches:
        async for batch in batches:
            revision = batch.revision
            if not batch.events:
                continue
            take(batch.events)
            now_s = time.monotonic()
            if now_s - began_s > _BUSY_S:
                began_s, messages = now_s, 0
            messages += 1
            if messages > _MANY or batch.events[0].pair.mod_revision + _MANY < revision:
                break
    return revision


class Addresses:
    """See the top of this file."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, store: Store, book: Book, claims: Claims) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._book = book
        self._claims = claims
        self._suspects: dict[Place, float] = {}  # since when, time.monotonic()
        self._listed = {layout.ADDRESSES: False, layout.FREED: False}
        self._wanted = asyncio.Event()
        # Of an earlier process, which may have answered them: they are not dropped where others have the address.
        self._doubtful = frozenset(ledger.unconfirmed)
        self.known = asyncio.Event()

    def want(self) -> None:
        """Somebody asks for an address of such a pool: the watches begin now."""
        self._wanted.set()

    async def run(self) -> None:
        """Follows both. Never returns."""
        while not any(pool.is_shared for pool in self._ledger.pools.values()):
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _PAUSE_S)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(layout.ADDRESSES, self._list_addresses, self._change_address))
            group.create_task(self._follow(layout.FREED, self._list_freed, self._change_freed))
            group.create_task(self._clear_up())

    # --- following

    async def _follow(self, prefix: str, read: Callable[[], Awaitable[int]], change: Callable[[Event], None]) -> None:
        while True:
            try:
                revision = await read()
                await self._note_listed(prefix)
                async with self._gathering(change) as take:
                    while True:
                        revision = await changes(self._etcd, prefix, revision, take)
                        await asyncio.sleep(_BUSY_S)
            except CompactedError:
                log.event(_logger, "info", "etcd forgot what came in between; read anew", prefix=prefix)
            except EtcdError as error:
                log.event(_logger, "debug", "etcd cannot be followed", prefix=prefix, error=str(error))
                await asyncio.sleep(_PAUSE_S)
            except Exception as error:  # noqa: BLE001 (a fault in one change must not end the following)
                log.event(_logger, "error", "what etcd says cannot be used; it is read anew", prefix=prefix,
                          exc_info=error)  # fmt: skip
                await asyncio.sleep(_PAUSE_S)

    @contextlib.asynccontextmanager
    async def _gathering(self, change: Callable[[Event], None]) -> AsyncIterator[Callable[[list[Event]], None]]:
        """Tells the ledger of events in the order in which they are taken, of many at a time.

        A change of four nodes under load comes every millisecond, and each time is a batch of the engine's; what the
        ledger knows a moment later costs a claim that etcd refuses, at most.
        """
        gathered: list[Event] = []
        some = asyncio.Event()

        def take(events: list[Event]) -> None:
            if events:
                gathered.extend(events)
                some.set()

        async def tell() -> None:
            while True:
                await some.wait()
                await asyncio.sleep(_GATHER_S)
                some.clear()
                events, gathered[:] = gathered[:], []
                await self._tell(partial(self._change, change, events))

        telling = asyncio.create_task(tell())
        try:
            yield take
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _note_listed(self, prefix: str) -> None:
        self._listed[prefix] = True
        if all(self._listed.values()) and not self.known.is_set():
            self._ledger.shared_refusal = ""
            await self._take_up()
            self.known.set()

    async def _tell(self, change: Callable[[], object]) -> None:
        """Has the ledger hear of it. A batch that fails takes it along, and then it is told again."""
        while True:
            try:
                await self._engine.run(change)
            except IpamdError:
                await asyncio.sleep(_PAUSE_S)
            else:
                return

    def _change(self, change: Callable[[Event], None], events: Sequence[Event]) -> None:
        for event in events:
            try:
                change(event)
            except (LayoutError, ValueError, OSError) as error:
                log.event(_logger, "error", "an address of the cluster cannot be read", key=event.pair.key,
                          error=str(error))  # fmt: skip

    # --- addresses

    async def _list_addresses(self) -> int:
        found: set[Place] = set()
        revision = 0
        async for page in self._etcd.walk(layout.ADDRESSES, page=_PAGE):
            revision = page.revision
            await self._tell(partial(self._note_page, page.pairs, found))
        await self._tell(partial(self._drop_others, found))
        for place, own in list(self._book.own.items()):
            if place not in found:
                # Claimed since, unless etcd was restored from an older copy, in which case revisions say nothing.
                self.suspect(place)
                if own.revision <= revision:
                    del self._book.own[place]
        for place in await self._engine.run(self._held_here):
            if place not in self._book.own:
                self.suspect(place)
        return revision

    def _note_page(self, pairs: Sequence[Pair], found: set[Place]) -> None:
        for pair in pairs:
            place = _place(pair, layout.ADDRESSES)
            found.add(place)
            with contextlib.suppress(LayoutError, ValueError, OSError):
                self._note(place, pair)

    def _note(self, place: Place, pair: Pair) -> None:
        known = self._book.own.get(place)
        if known is not None and known.revision == pair.mod_revision:
            return
        holder = holder_of(pair)
        if not self._book.is_ours(holder):
            self._ledger.hold_elsewhere(*place, holder.node)
            if known is not None:
                self.suspect(place)
            return
        self._ledger.let_go_elsewhere(*place)
        if known is not None and known.revision > pair.mod_revision:
            return
        held = self._store.holder(*place)
        if isinstance(held, Allocation) and held.generation == holder.generation:
            self._book.own[place] = Own(pair.mod_revision, holder.generation, workload_of(held))
        else:
            self._book.own[place] = Own(pair.mod_revision, holder.generation)
            self.suspect(place)

    def _drop_others(self, found: set[Place]) -> None:
        for name, shared in self._ledger.shared.items():
            for number in [number for number in shared.holders if (name, address_text(*number)) not in found]:
                self._ledger.let_go_elsewhere(name, address_text(*number))

    def _held_here(self) -> list[Place]:
        return [
            (pool.name, ip)
            for pool in self._ledger.pools.values()
            if pool.is_shared
            for ip, generation in self._store.taken(pool.name)
            if generation and generation not in self._ledger.unconfirmed
        ]

    def _change_address(self, event: Event) -> None:
        place = _place(event.pair, layout.ADDRESSES)
        if event.kind == "put":
            self._note(place, event.pair)
            return
        self._ledger.let_go_elsewhere(*place)
        own = self._book.own.get(place)
        if own is not None and own.revision < event.pair.mod_revision:
            self.suspect(place)

    # --- cool-downs

    async def _list_freed(self) -> int:
        found: set[Place] = set()
        revision = 0
        async for page in self._etcd.walk(layout.FREED, page=_PAGE):
            revision = page.revision
            await self._tell(partial(self._note_freed, page.pairs, found))
        await self._tell(partial(self._drop_rested, found))
        return revision

    def _note_freed(self, pairs: Sequence[Pair], found: set[Place]) -> None:
        for pair in pairs:
            place = _place(pair, layout.FREED)
            found.add(place)
            with contextlib.suppress(LayoutError, ValueError, OSError):
                note_pair(self._ledger, place, pair)

    def _drop_rested(self, found: set[Place]) -> None:
        for name, shared in self._ledger.shared.items():
            for number in [number for number in shared.resting if (name, address_text(*number)) not in found]:
                self._ledger.rested(name, address_text(*number), _LATEST)

    def _change_freed(self, event: Event) -> None:
        place = _place(event.pair, layout.FREED)
        if event.kind == "put":
            note_pair(self._ledger, place, event.pair)
        else:
            self._ledger.rested(*place, event.pair.mod_revision)

    # --- where etcd and the store differ

    def suspect(self, place: Place) -> None:
        """Has an address compared with etcd's record of it, once a moment has passed."""
        self._suspects.setdefault(place, time.monotonic())

    async def _take_up(self) -> None:
        """Claims what was recorded and got no answer: by an earlier process, or while etcd was away."""
        for generation in list(self._ledger.unconfirmed):
            page = await self._engine.run(partial(self._store.allocations, Filter(), generation - 1, 1))
            if page and page[0].generation == generation:
                claim = self._claims.begin(page[0], again=generation in self._doubtful)
                claim.future.add_done_callback(partial(self._taken_up, claim.places))
            else:
                self._ledger.unconfirmed.pop(generation, None)

    def _taken_up(self, places: Sequence[Place], done: "asyncio.Future[None]") -> None:
        if not done.cancelled() and isinstance(done.exception(), LostError):
            for place in places:
                self.suspect(place)

    async def _clear_up(self) -> None:
        taken_up_s = time.monotonic()
        while True:
            await asyncio.sleep(_PAUSE_S)
            if not self.known.is_set():
                continue
            if time.monotonic() - taken_up_s > _GRACE_S:
                taken_up_s = time.monotonic()
                with contextlib.suppress(IpamdError):
                    await self._take_up()
            due = [(place, since) for place, since in self._suspects.items() if time.monotonic() - since >= _GRACE_S]
            for place, since in due:
                del self._suspects[place]
                try:
                    if not await self._compare(place):
                        # Not from now on: what is claimed anew each few seconds, in vain, would never be looked at.
                        self._suspects[place] = since
                except Exception as error:  # noqa: BLE001 (one address must not keep the others from being looked at)
                    log.event(_logger, "warning", "an address could not be compared with etcd's", pool=place[0],
                              address=place[1], error=str(error))  # fmt: skip
                    self.suspect(place)

    async def _compare(self, place: Place) -> bool:
        """False: nothing can be said while it is claimed."""
        pair = await self._etcd.get(address_key(place))
        held = await self._engine.run(partial(self._store.holder, *place))
        pool = self._ledger.pools.get(place[0])
        leaving = address_number(place[1]) in self._ledger.shared_of(place[0]).leaving
        if place in self._book.claiming:
            return False
        if pool is None or leaving:
            return True  # an errand says what is to be done
        holder = holder_of(pair) if pair is not None else None
        ours = holder is not None and self._book.is_ours(holder)
        if not isinstance(held, Allocation):
            self._book.conflicts.pop(place, None)
            if ours and pair is not None:
                await self._adopt(place, pair)
        elif held.generation in self._ledger.unconfirmed and held.generation not in self._doubtful:
            pass
        elif ours and holder is not None and holder.generation == held.generation:
            self._book.conflicts.pop(place, None)
        elif holder is not None and not ours:
            self._complain(place, held, holder.node)
        else:
            await self._claim_again(place, held)
        return True

    def _complain(self, place: Place, held: Allocation, node: str) -> None:
        text = f"{held.key} uses it, and the cluster has it for node {node}; end one of the two containers"
        if place not in self._book.conflicts:
            log.event(_logger, "error", "an address has two owners", pool=place[0], address=place[1], text=text)
        self._book.conflicts[place] = text

    async def _claim_again(self, place: Place, held: Allocation) -> None:
        log.event(_logger, "warning", "etcd had lost an address that is in use; it is claimed again", pool=place[0],
                  address=place[1])  # fmt: skip
        try:
            await asyncio.shield(self._claims.begin(held, again=True).future)
        except LostError:
            self.suspect(place)

    async def _adopt(self, place: Place, pair: Pair) -> None:
        record = layout.decode(AddressRecord, pair.key, pair.value)
        allocation = msgspec.json.decode(record.allocation, type=Allocation)
        key = msgspec.structs.replace(allocation.key, node=self._book.identity.node)
        wanted = msgspec.structs.replace(allocation, key=key)
        try:
            adopted = await self._engine.run(partial(self._ledger.adopt, wanted), grows=True)
        except IpamdError as error:
            log.event(_logger, "warning", "an address that etcd has for this node, and nobody here, is given back",
                      pool=place[0], address=place[1], was=str(key), why=str(error))  # fmt: skip
            gone = [Delete(pair.key), Delete(self._book.owned_key(place)), Delete(mac_key(place))]
            await self._etcd.txn([unchanged(pair.key, pair.mod_revision)], gone, repeatable=True)
            self._book.own.pop(place, None)
            return
        log.event(_logger, "warning", "an address that etcd has for this node is an allocation again", pool=place[0],
                  address=place[1], holder=str(key))  # fmt: skip
        with contextlib.suppress(LostError):
            await asyncio.shield(self._claims.begin(adopted).future)


def _place(pair: Pair, prefix: str) -> Place:
    return layout.split(pair.key.removeprefix(prefix))
