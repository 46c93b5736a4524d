"""Pools and reservations of the cluster, brought into the ledger; and how they are made, changed and deleted.

etcd has the truth, and the store a copy, with which ipamd serves while etcd is down. A pool that is to be deleted is
marked first: from then on no node claims a block or an address of it, and each gives its empty blocks back.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Compare, Delete, Etcd, Event, Get, Pair, Put, TxnResult, absent, present, unchanged
from cluster.layout import BlockRecord, FreedRecord, LayoutError, PoolRecord, PublishedRecord, ReservationRecord
from ipamd.desk import networks_pool
from ipamd.engine import Engine
from ipamd.errors import AlreadyExistsError, IpamdError, NotFoundError, PreconditionError, UnavailableError
from ipamd.lease import Ledger
from ipamd.member.book import freed_key
from ipamd.member.follow import Follower
from ipamd.member.holdings import Holdings
from ipamd.member.listing import listing
from ipamd.member.lost import in_use
from ipamd.member.unclaims import Leases
from ipamd.pool import Pool, PoolSpec, address_text, parse_address
from ipamd.shared import Rest
from ipamd.store.base import Allocation, Filter, Reservation, Store
from telemetry import log

_logger = logging.getLogger("ipamd.member")

# How long the others have to give their empty blocks of a pool back that is being deleted.
_GIVE_BACK_S = 3.5
_TELL_S = 1.5
_SHOWN = 5
_POLL_S = 0.25
_TRIES = 10


# What is to happen in the change that ends a pool, and its conditions; asked for when nothing of the pool is in use.
Along = Callable[[], Awaitable[tuple[Sequence[Compare], Sequence[Put | Delete]]]]


class Known(Struct, frozen=True):
    """A pool as it stands in etcd."""

    record: PoolRecord
    revision: int


class Mirror:
    """See the top of this file."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, store: Store, holdings: Holdings, node: str) -> None:
        self.pools: dict[str, Known] = {}
        self.reservations: dict[str, dict[str, str]] = {}
        self.on_deleting: Callable[[], None] = lambda: None  # called when a pool's empty blocks are to go back
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._holdings = holdings
        self._node = node
        self._leases = Leases(etcd)
        self.followers = (
            Follower(etcd, layout.POOLS, self._list_pools, self._change_pools),
            Follower(etcd, layout.RESERVATIONS, self._list_reservations, self._change_reservations),
        )

    @property
    def synced(self) -> bool:
        """Whether the pools were read from etcd since the start."""
        return self.followers[0].synced.is_set()

    # --- what etcd says

    async def _list_pools(self, pairs: Sequence[Pair], revision: int) -> None:
        found = {pair.key.removeprefix(layout.POOLS): pair for pair in pairs}
        # What this node did meanwhile is newer than the list; revisions of another history say nothing.
        went_back = self.followers[0].went_back
        for name in [name for name, known in self.pools.items() if known.revision <= revision or went_back]:
            del self.pools[name]
        for name, pair in found.items():
            await self._take_pool(name, pair)
        for pool in list(self._ledger.pools.values()):
            if pool.spec.mode != "local" and pool.name not in found and pool.name not in self.pools:
                await self._lost_pool(pool)

    async def _change_pools(self, events: Sequence[Event]) -> None:
        for event in events:
            name = event.pair.key.removeprefix(layout.POOLS)
            if event.kind == "put":
                await self._take_pool(name, event.pair)
                continue
            known = self.pools.get(name)
            if known is not None and known.revision > event.pair.mod_revision:
                continue  # it was made again since
            self.pools.pop(name, None)
            pool = self._ledger.pools.get(name)
            if pool is not None and pool.spec.mode != "local":
                await self._lost_pool(pool)

    async def _take_pool(self, name: str, pair: Pair) -> None:
        try:
            record = layout.decode(PoolRecord, pair.key, pair.value)
            known = self.pools.get(name)
            if known is not None and known.revision > pair.mod_revision:
                return
            self.pools[name] = Known(record, pair.mod_revision)
            if record.deleting:
                self.on_deleting()
            spec = PoolSpec.decode(record.spec)
            there = self._ledger.pools.get(name)
            if there is not None and there.spec == spec:
                return
            await self._engine.run(lambda: self._ledger.create_pool(name, spec), grows=True)
        except (LayoutError, IpamdError, ValueError) as error:
            log.event(_logger, "error", "a pool of the cluster cannot be used here", pool=name, error=str(error))
            return
        log.event(_logger, "info", "the cluster has a pool", pool=name, spec=record.spec)
        await self._take_reservations(name)

    async def _lost_pool(self, pool: Pool) -> None:
        """It is not in etcd: deleted elsewhere, unless something of it is in use here, which only a loss explains."""
        while not await in_use(self._engine, self._ledger, self._store, pool.name):
            try:
                await self._engine.run(lambda: self._ledger.delete_pool(pool.name))
            except PreconditionError:
                continue  # a claim just began
            except NotFoundError:
                return
            log.event(_logger, "info", "the cluster no longer has a pool", pool=pool.name)
            return
        log.event(_logger, "error", "etcd lost a pool of which addresses are in use here; it is put there again",
                  pool=pool.name)  # fmt: skip
        record = PoolRecord(pool.spec.encode())
        key = layout.POOLS + pool.name
        try:
            await self._etcd.txn([absent(key)], [Put(key, layout.encode(record))], repeatable=True)
        except EtcdError as error:
            log.event(_logger, "warning", "the pool could not be put there", pool=pool.name, error=str(error))

    async def _list_reservations(self, pairs: Sequence[Pair], _revision: int) -> None:
        self.reservations.clear()
        for pair in pairs:
            self._note_reservation(pair)
        for name in list(self._ledger.pools):
            await self._take_reservations(name)

    async def _change_reservations(self, events: Sequence[Event]) -> None:
        pools = set()
        for event in events:
            pool, ip = layout.split(event.pair.key.removeprefix(layout.RESERVATIONS))
            pools.add(pool)
            if event.kind == "put":
                self._note_reservation(event.pair)
            else:
                self.reservations.get(pool, {}).pop(ip, None)
        for pool in pools:
            await self._take_reservations(pool)

    def _note_reservation(self, pair: Pair) -> None:
        pool, ip = layout.split(pair.key.removeprefix(layout.RESERVATIONS))
        try:
            note = layout.decode(ReservationRecord, pair.key, pair.value).note
        except LayoutError as error:
            note = "?"
            log.event(_logger, "error", "a reservation of the cluster cannot be read", error=str(error))
        self.reservations.setdefault(pool, {})[ip] = note

    async def _take_reservations(self, name: str) -> None:
        """Makes the ledger's reservations of a pool what they are in etcd."""
        pool = self._ledger.pools.get(name)
        if pool is None or pool.spec.mode == "local":
            return
        wanted = self.reservations.get(name, {})
        have = {row.ip: row.note for row in await self._engine.run(lambda: list(self._store.reservations(name)))}
        for ip in have.keys() - wanted.keys():
            await self._try(functools.partial(self._ledger.unreserve, name, ip))
        for ip in wanted.keys() - have.keys():
            await self._try(functools.partial(self._ledger.reserve, name, ip, wanted[ip]))

    async def _try(self, change: Callable[[], object]) -> None:
        try:
            await self._engine.run(change)
        except IpamdError as error:
            log.event(_logger, "error", "a reservation of the cluster does not fit to what is here", error=str(error))

    # --- what an operator asks

    async def create_pool(self, name: str, spec: PoolSpec) -> Pool:
        """As `Ledger.create_pool`, for all nodes."""
        Pool(name, spec, managed=False)
        there = self._ledger.pools.get(name)
        if there is None or there.spec.mode == "local":
            if there is not None:
                raise AlreadyExistsError(f"this node has a pool {name} of its own; take another name")
            key = layout.POOLS + name
            record = PoolRecord(spec.encode())
            done = await self._txn([absent(key)], [Put(key, layout.encode(record))], [Get(key)])
            found = done.pairs[0] if done.pairs else None
            if done.succeeded:
                self.pools[name] = Known(record, done.revision)  # the watch may take its time
            if found is not None:
                record = layout.decode(PoolRecord, key, found.value)
                if record.deleting:
                    raise UnavailableError(f"pool {name} is being deleted; ask again, or delete it again")
                if PoolSpec.decode(record.spec) != spec:
                    raise AlreadyExistsError(
                        f"the cluster has a pool {name} with another spec; delete it first, or take another name"
                    )
                self.pools[name] = Known(record, found.mod_revision)
        return await self._engine.run(lambda: self._ledger.create_pool(name, spec), grows=True)

    async def delete_pool(self, name: str, along: Along | None = None) -> None:
        """As `Ledger.delete_pool`, for all nodes.

        With `along`, what belongs to the pool goes in the same change; where that cannot be, the pool is as it was
        before. Without, a network's pool is refused: PreconditionError.
        """
        key = layout.POOLS + name
        pair = await self._get(key)
        if pair is None:
            raise NotFoundError(f"the cluster has no pool {name}")
        record = layout.decode(PoolRecord, key, pair.value)
        marked = layout.encode_over(pair.value, PoolRecord(record.spec, deleting=True))
        network = layout.NETWORKS + name
        guard = [absent(network)] if along is None else []
        done = await self._txn([unchanged(key, pair.mod_revision), *guard], [Put(key, marked)], [Get(network)])
        if not done.succeeded:
            if guard and done.pairs[0] is not None:
                raise networks_pool(name)
            raise _changed(name)
        try:
            await self._refuse_used(name)
            await self._end_pool(name, unchanged(key, done.revision), along)
        except BaseException:
            # Its first node may still be there, and gave nothing back because an address is in use.
            unmarked = layout.encode_over(pair.value, PoolRecord(record.spec))
            with contextlib.suppress(UnavailableError):
                await self._txn([unchanged(key, done.revision)], [Put(key, unmarked)])
            raise
        # Who follows etcd may be faster, and has taken it out of the ledger.
        with contextlib.suppress(NotFoundError):
            await self._engine.run(lambda: self._ledger.delete_pool(name))

    async def _refuse_used(self, name: str) -> None:
        in_use = await self._wait_until_free(name)
        if in_use:
            users = await self._users(name)
            raise PreconditionError(f"pool {name} is in use: {users or in_use}; release its addresses first")

    async def _end_pool(self, name: str, as_marked: Compare, along: Along | None) -> None:
        key, network = layout.POOLS + name, layout.NETWORKS + name
        ended = [Delete(key)]
        ended += [Delete(prefix + layout.place(name, ""), True) for prefix in (layout.RESERVATIONS, layout.MACS)]
        for _ in range(_TRIES):
            conditions, then = await along() if along is not None else ([absent(network)], [])
            done = await self._txn([as_marked, *conditions], [*ended, *then], [Get(key)])
            if done.succeeded:
                return
            there = done.pairs[0]
            if along is None or there is None or there.mod_revision != as_marked.number:
                break
            # Not the pool: what goes along was changed meanwhile.
        raise _changed(name)

    async def _wait_until_free(self, name: str) -> str:
        """Returns "" when no node has anything of a pool, else what they have and will not give back."""
        began = time.monotonic()
        while True:
            try:
                blocks = await self._etcd.range(layout.BLOCKS + layout.place(name, ""), limit=_SHOWN)
                addresses = await self._etcd.range(
                    layout.ADDRESSES + layout.place(name, ""), limit=_SHOWN, keys_only=True
                )
                used = [pair for pair in blocks.pairs if await self._is_used(pair)]
            except EtcdError as error:
                raise UnavailableError(f"the cluster cannot be asked: {error}; delete the pool again later") from None
            if not blocks.pairs and not addresses.pairs:
                return ""
            # A node gives empty blocks back at once, but tells of what was released a moment later.
            waited_s = time.monotonic() - began
            if waited_s > _GIVE_BACK_S or (waited_s > _TELL_S and (used or addresses.pairs)):
                found = [
                    f"block {layout.split(pair.key)[1]} by node {layout.decode(BlockRecord, pair.key, pair.value).node}"
                    for pair in used or blocks.pairs
                ] + [layout.split(pair.key)[1] for pair in addresses.pairs]
                return ", ".join(found) + (", ..." if blocks.more or addresses.more else "")
            await asyncio.sleep(_POLL_S)

    async def _users(self, name: str) -> str:
        """Some who hold addresses of a pool, as far as their nodes have told."""
        found: list[str] = []
        async with contextlib.aclosing(listing(self._etcd, Filter(pool=name))) as allocations:
            async for one in allocations:
                if len(found) == _SHOWN:
                    found.append("...")
                    break
                addresses = " and ".join(address.ip for address in one.addresses)
                found.append(f"{one.key.container_id or one.key.client} on node {one.key.node} has {addresses}")
        return ", ".join(found)

    async def _is_used(self, block: Pair) -> bool:
        """Whether its node has told that addresses of a block are in use."""
        pair = await self._etcd.get(layout.PUBLISHED + block.key.removeprefix(layout.BLOCKS))
        return pair is not None and bool(layout.decode(PublishedRecord, pair.key, pair.value).rows)

    async def reserve(self, name: str, text: str, note: str) -> Reservation:
        """As `Ledger.reserve`, for all nodes."""
        pool = self._ledger.pool(name)
        ip = address_text(*parse_address(text, "address"))
        key = layout.RESERVATIONS + layout.place(name, ip)
        there = await self._engine.run(lambda: self._reservable(pool, ip))
        if there is not None:
            await self._engine.run(lambda: self._ledger.refuse_held(pool, ip))
        conditions = [absent(key), absent(layout.ADDRESSES + layout.place(name, ip))]
        conditions += self._unowned(pool, ip)
        record = ReservationRecord(note)
        done = await self._txn(conditions, [Put(key, layout.encode(record))], [Get(c.key) for c in conditions])
        if not done.succeeded:
            self._refuse(pool, ip, key, [pair for pair in done.pairs if pair is not None])
        try:
            return await self._engine.run(lambda: self._reserve_here(pool, ip, note), grows=True)
        except IpamdError:
            await self._txn([unchanged(key, done.revision)], [Delete(key)])
            raise

    def _reservable(self, pool: Pool, ip: str) -> Allocation | Reservation | None:
        self._ledger.check_place(pool.name, ip)
        return self._store.holder(pool.name, ip)

    def _reserve_here(self, pool: Pool, ip: str, note: str) -> Reservation:
        holder = self._store.holder(pool.name, ip)
        if isinstance(holder, Reservation):
            return holder  # the watch was faster
        return self._ledger.reserve(pool.name, ip, note)

    def _unowned(self, pool: Pool, ip: str) -> list[Compare]:
        """Of a block that another node holds only that node can say whether the address is in use."""
        number = parse_address(ip, "address")
        found = pool.block_for(*number) if pool.has_blocks else None
        if found is None or pool.find_block(found[1]) is not None:
            return []
        return [absent(layout.BLOCKS + layout.place(pool.name, found[1]))]

    def _refuse(self, pool: Pool, ip: str, key: str, found: Sequence[Pair]) -> None:
        for pair in found:
            if pair.key.startswith(layout.BLOCKS):
                node = layout.decode(BlockRecord, pair.key, pair.value).node
                cidr = layout.split(pair.key)[1]
                if node == self._node:
                    raise UnavailableError(f"block {cidr} is coming to this node; ask again")
                raise PreconditionError(
                    f"{ip} of pool {pool.name} lies in block {cidr} of node {node}, which alone knows whether it is in "
                    "use; reserve it there"
                )
            if pair.key == key:
                note = layout.decode(ReservationRecord, pair.key, pair.value).note
                raise AlreadyExistsError(f"{ip} of pool {pool.name} is reserved ({note}); unreserve it first")
            raise AlreadyExistsError(f"{ip} of pool {pool.name} is held by an allocation of another node")
        raise UnavailableError(f"{ip} of pool {pool.name} changed hands at this moment; ask again")

    async def unreserve(self, name: str, text: str) -> None:
        """As `Ledger.unreserve`, for all nodes: of a cluster-address pool etcd says that the address cools down."""
        ip = address_text(*parse_address(text, "address"))
        key = layout.RESERVATIONS + layout.place(name, ip)
        pool = self._ledger.pools.get(name)
        then: list[Put | Delete] = [Delete(key)]
        lease = await self._rest_lease(name) if pool is not None and pool.is_shared else 0
        if lease:
            # Nobody's: a node may have its own again at once.
            freed = FreedRecord(self._node, "")
            then.append(Put(freed_key((name, ip)), layout.encode(freed), lease))
        done = await self._txn([present(key)], then)

        def end() -> None:
            if lease and done.succeeded:
                self._ledger.rest(name, ip, Rest(self._node, done.revision))
            self._ledger.unreserve(name, ip)

        try:
            await self._engine.run(end)
        except NotFoundError:
            if not done.succeeded:
                raise

    async def _rest_lease(self, name: str) -> int:
        try:
            return await self._leases.get(self._ledger.cooldown_s(name))
        except EtcdError as error:
            self._leases.forget()
            raise UnavailableError(f"the cluster cannot be told: {error}") from None

    async def _txn(
        self, compares: Sequence[Compare], then: Sequence[Put | Delete | Get], otherwise: Sequence[Get] = ()
    ) -> TxnResult:
        try:
            return await self._etcd.txn(compares, then, otherwise)
        except EtcdError as error:
            raise UnavailableError(f"the cluster cannot be told: {error}") from None

    async def _get(self, key: str) -> Pair | None:
        try:
            return await self._etcd.get(key)
        except EtcdError as error:
            raise UnavailableError(f"the cluster cannot be asked: {error}") from None


def _changed(name: str) -> UnavailableError:
    return UnavailableError(f"pool {name} was changed by another node at the same moment; ask again")
