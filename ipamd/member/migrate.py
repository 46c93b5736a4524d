"""Takes a node's database into a cluster, and out of one that has no other node. ipamd is stopped, containers run on.

Into a cluster: its named pools and its networks become the cluster's. What is held is claimed in etcd, and only when
all of it is this node's the database says so too; a crash in between is mended by running it again. Nothing changes
where another node has a pool or a network of the name with another definition, a block, or an address.

Out of it: only the last node may, as nobody else would keep its addresses from others any more, and only without
overlay networks, which want a cluster. The database is changed first; what then is left in etcd is of no meaning, and
is removed.
"""

import platform
import time
from collections.abc import AsyncIterator, Iterable, Iterator

import msgspec
from msgspec import Raw, Struct

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Get, Pair, Put, absent, equals
from cluster.layout import (
    AddressHolder,
    AddressRecord,
    BlockRecord,
    LayoutError,
    NetworkRecord,
    NodeRecord,
    PoolRecord,
    ReservationRecord,
)
from ipamd.engine import Transaction
from ipamd.errors import AlreadyExistsError, PreconditionError
from ipamd.member import identity as identities
from ipamd.member.errors import JoinError
from ipamd.networks import Networks, judge
from ipamd.overlay import OVERLAY
from ipamd.pool import Mode, Pool, PoolSpec, address_number
from ipamd.pools import frozen_note
from ipamd.store.base import Allocation, Change, DropBlock, Filter, Note, PoolRow, PutBlock, PutPool, Settle
from ipamd.store.sqlite import SqliteStore

_PAGE = 500
_NOTES = ("cluster", "node-id", "draining", "renewed", "macs")
_ERRANDS = 1 << 31  # all

Place = tuple[str, str]


class Migrated(Struct, frozen=True):
    """What was moved."""

    pools: tuple[str, ...]
    blocks: int
    addresses: int
    left: tuple[str, ...] = ()  # in etcd, because it could not be reached


class _Claim(Struct, frozen=True):
    """A key that must become this node's."""

    key: str
    value: bytes
    also: tuple[str, ...] = ()  # keys without a value that go with it


async def to_cluster(store: SqliteStore, etcd: Etcd, node: str, mode: Mode) -> Migrated:
    """Raises PreconditionError (what stands against it), StartError or EtcdError."""
    transaction = Transaction(store)
    rows = [row for row in store.pools() if not row.managed and PoolSpec.decode(row.spec).mode == "local"]
    pools = [Pool(row.name, msgspec.structs.replace(PoolSpec.decode(row.spec), mode=mode), False) for row in rows]
    identity = identities.on_disk(transaction, node)
    own = BlockRecord(identity.node, identity.node_id)
    blocks = sorted({block for pool in pools for block in _blocks_of(store, pool)})
    claims = [*_block_claims(blocks, own), *_address_claims(store, pools, own)]
    networks = Networks(transaction).all()
    await _check_networks(etcd, networks)
    try:
        cluster = await identities.join_cluster(etcd, identity)
        record = NodeRecord(identity.node_id, platform.node(), int(time.time()))
        await identities.register(etcd, identity, record)
    except JoinError as error:
        raise PreconditionError(str(error)) from None
    await _put_pools(etcd, pools)
    await _claim(etcd, claims, own)
    await _put_reservations(etcd, store, pools)
    await _put_networks(etcd, networks)
    changes: list[Change] = [PutPool(PoolRow(pool.name, pool.spec.encode(), False), new=False) for pool in pools]
    held = set(store.blocks())
    changes += [PutBlock(*block) for block in blocks if block not in held]
    _commit(transaction, [*changes, Note("cluster", cluster)])
    return Migrated(tuple(pool.name for pool in pools), len(blocks), len(claims) - len(blocks))


def _blocks_of(store: SqliteStore, pool: Pool) -> Iterator[Place]:
    if not pool.has_blocks:
        return
    for ip, generation in store.taken(pool.name):
        number = address_number(ip)
        block = pool.block_for(*number)
        if block is not None:
            yield pool.name, block[1]
        elif generation:
            holder = store.holder(pool.name, ip)
            who = str(holder.key) if isinstance(holder, Allocation) else "nobody"
            raise PreconditionError(
                f"pool {pool.name}: {ip}, held by {who}, would be the gateway, or the first or last address, of a "
                "block; release it first, or take --mode cluster-address"
            )


def _block_claims(blocks: Iterable[Place], own: BlockRecord) -> Iterator[_Claim]:
    value = layout.encode(own)
    for place in blocks:
        yield _Claim(layout.BLOCKS + layout.place(*place), value)


def _address_claims(store: SqliteStore, pools: Iterable[Pool], own: BlockRecord) -> Iterator[_Claim]:
    shared = {pool.name for pool in pools if pool.is_shared}
    after = 0
    while page := store.allocations(Filter(), after, _PAGE) if shared else []:
        for allocation in page:
            row = Raw(msgspec.json.encode(allocation))
            value = layout.encode(AddressRecord(own.node, own.node_id, allocation.generation, row))
            for address in allocation.addresses:
                if address.pool in shared:
                    ending = layout.place(address.pool, address.ip)
                    yield _Claim(layout.ADDRESSES + ending, value, (f"{layout.OWNED}{own.node}/{ending}",))
        after = page[-1].generation


async def _put_pools(etcd: Etcd, pools: Iterable[Pool]) -> None:
    for pool in pools:
        key, value = layout.POOLS + pool.name, layout.encode(PoolRecord(pool.spec.encode()))
        done = await etcd.txn([absent(key)], [Put(key, value)], [Get(key)], repeatable=True)
        if not done.succeeded and (done.pairs[0] is None or done.pairs[0].value != value):
            raise PreconditionError(
                f"the cluster has a pool {pool.name} with another spec; make the two the same, or delete one of them"
            )


async def _check_networks(etcd: Etcd, networks: Iterable[NetworkRecord]) -> None:
    """Raises PreconditionError where one cannot be beside what the cluster has."""
    there: list[NetworkRecord] = []
    async for page in etcd.walk(layout.NETWORKS):
        there += [layout.decode(NetworkRecord, pair.key, pair.value) for pair in page.pairs]
    for network in networks:
        try:
            judge(network, there)
        except AlreadyExistsError as error:
            raise PreconditionError(f"network {network.name} cannot become the cluster's: {error}") from None


async def _put_networks(etcd: Etcd, networks: Iterable[NetworkRecord]) -> None:
    for network in networks:
        key = layout.NETWORKS + network.name
        await etcd.txn([absent(key)], [Put(key, layout.encode(network))], repeatable=True)


async def _claim(etcd: Etcd, claims: Iterable[_Claim], own: BlockRecord) -> None:
    """All of them, or, where one is another node's, none more than there were."""
    mine: list[_Claim] = []
    try:
        for claim in claims:
            puts = [Put(claim.key, claim.value), *(Put(key, b"") for key in claim.also)]
            done = await etcd.txn([absent(claim.key)], puts, [Get(claim.key)], repeatable=True)
            there = None if done.succeeded else done.pairs[0]
            if there is not None:
                _want_own(there, own)
            if done.succeeded:
                mine.append(claim)
    except PreconditionError:
        for claim in mine:
            gone = [Delete(claim.key), *map(Delete, claim.also)]
            await etcd.txn([equals(claim.key, claim.value)], gone, repeatable=True)
        raise


def _want_own(there: Pair, own: BlockRecord) -> None:
    try:
        if there.key.startswith(layout.BLOCKS):
            node_id = layout.decode(BlockRecord, there.key, there.value).node_id
        else:
            node_id = layout.decode(AddressHolder, there.key, there.value).node_id
    except LayoutError:
        node_id = ""
    if node_id != own.node_id:
        raise PreconditionError(
            f"{there.key}: another node of the cluster has it ({there.value[:200].decode(errors='replace')}); release "
            "it there, or here, then run this again"
        )


async def _put_reservations(etcd: Etcd, store: SqliteStore, pools: Iterable[Pool]) -> None:
    for pool in pools:
        for row in store.reservations(pool.name):
            key = layout.RESERVATIONS + layout.place(pool.name, row.ip)
            await etcd.txn([absent(key)], [Put(key, layout.encode(ReservationRecord(row.note)))], repeatable=True)


async def to_sqlite(store: SqliteStore, etcd: Etcd) -> Migrated:
    """Raises PreconditionError, StartError or EtcdError."""
    node, cluster = store.remembered_node(), store.note("cluster")
    if not cluster:
        raise PreconditionError("this node is one of no cluster; nothing is to be done")
    others = [name async for name in _other_nodes(etcd, node)]
    if others:
        raise PreconditionError(
            f"the cluster has other nodes ({', '.join(others[:5])}), and what this one holds would no longer be kept "
            "from them: remove them first (netloom node remove), or drain and remove this one and begin anew"
        )
    overlays = [record.name for record in Networks(Transaction(store)).all() if record.type == OVERLAY]
    if overlays:
        raise PreconditionError(
            f"network {', '.join(overlays[:5])} is an overlay, which wants a cluster: start ipamd once more, and "
            "delete it (netloom network delete)"
        )
    changes: list[Change] = []
    pools = []
    for row in store.pools():
        spec = PoolSpec.decode(row.spec)
        if spec.mode != "local":
            local = msgspec.structs.replace(spec, mode="local")
            changes.append(PutPool(PoolRow(row.name, local.encode(), row.managed), new=False))
            pools.append(row.name)
    blocks = store.blocks()
    changes += [DropBlock(*block) for block in blocks]
    changes += [Note(frozen_note(*block), "") for block in blocks]
    changes += [Note(name, "") for name in _NOTES]
    changes.append(Settle(tuple(errand.seq for errand in store.errands(_ERRANDS))))
    _commit(Transaction(store), changes)
    left: tuple[str, ...] = ()
    try:
        await etcd.delete("", prefix=True)
    except EtcdError as error:
        left = (f"{etcd.config.prefix} ({error})",)
    return Migrated(tuple(pools), len(blocks), store.count(), left)


async def _other_nodes(etcd: Etcd, own: str) -> AsyncIterator[str]:
    async for page in etcd.walk(layout.NODES, keys_only=True):
        for pair in page.pairs:
            name = pair.key.removeprefix(layout.NODES)
            if name != own:
                yield name


def _commit(transaction: Transaction, changes: Iterable[Change]) -> None:
    transaction.apply(*changes)
    transaction.store.commit()
    transaction.committed()
