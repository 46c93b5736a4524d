"""The cluster's networks: put into etcd by whoever defines one, copied from there by every node.

What is defined must fit to all that is there, so each definition is made of what was just read, in a transaction that
fails where another one came in between: `last-network`, which each of them writes, puts them in order.
"""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Compare, Delete, Etcd, Event, Get, Pair, Put, absent, unchanged
from cluster.layout import (
    AddressRecord,
    AliveRecord,
    LayoutError,
    NetworkRecord,
    PoolRecord,
    VersionRecord,
)
from ipamd.engine import Engine
from ipamd.errors import (
    AlreadyExistsError,
    ExhaustedError,
    IpamdError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from ipamd.lease import Ledger
from ipamd.member.follow import Follower
from ipamd.member.lost import in_use
from ipamd.member.mirror import Along
from ipamd.networks import Choice, Networks, disconnected, judge, refuse_shown
from ipamd.overlay import OVERLAY, spec_of
from ipamd.pool import Network, PoolSpec, validate
from ipamd.store.base import Allocation
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_BATCH = 40  # networks of a transaction
_TRIES = 10  # each is lost to a node that defined a network
_UNDERLAY = "underlay/"  # netd's: whose address of the underlay is whose
_NETD = "netd/"
_TELL_S = 1.5  # how long a node may take to tell of what it released
_POLL_S = 0.1


DeletePool = Callable[[str, Along], Awaitable[None]]


class _Reached(Struct, frozen=True):
    """Of netd's record of a host: where it is, and which subnets it has beside its blocks."""

    addresses: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()


class _State(Struct, frozen=True):
    """All networks, and the condition that nobody defines one meanwhile."""

    order: Compare
    networks: dict[str, tuple[NetworkRecord, Pair]]

    @property
    def records(self) -> list[NetworkRecord]:
        return [record for record, _ in self.networks.values()]

    def is_there(self, name: str) -> Compare:
        """The condition that a network is as it was read."""
        _, pair = self.networks[name]
        return unchanged(pair.key, pair.mod_revision)


class SharedNetworks:
    """See `ipamd.networks.Shared`. `follower` keeps this node's copy."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, networks: Networks, delete_pool: DeletePool) -> None:
        """`delete_pool`: `Mirror.delete_pool`."""
        self._delete_pool = delete_pool
        self.conflicts: dict[str, str] = {}  # lost in etcd, in use here, and why they cannot be put there again
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._networks = networks
        self.follower = Follower(etcd, layout.NETWORKS, self._listed, self._changed)

    async def create(self, record: NetworkRecord) -> None:
        """Raises AlreadyExistsError where it cannot be beside one that another node just defined, UnavailableError."""
        for _ in range(_TRIES):
            with _told():
                state = await self._state()
            if judge(record, state.records) is not None:
                return
            pool = await self._pool_of(record.name)
            conditions = [absent(layout.NETWORKS + record.name), state.order, unchanged(pool.key, pool.mod_revision)]
            with _told():
                done = await self._etcd.txn(conditions, _puts(record))
            if done.succeeded:
                return
        raise _late(record.name)

    async def create_overlay(
        self, record: NetworkRecord, spec: PoolSpec, choice: Choice
    ) -> tuple[NetworkRecord, PoolSpec]:
        """See `ipamd.networks.Shared`. Network and pool are made in one change, so a choice that is lost to another
        node leaves nothing behind."""
        for _ in range(_TRIES):
            with _told():
                state = await self._state()
                read = await self._etcd.txn([], [Get(layout.POOLS + record.name), Get(layout.VERSION)])
                pool, version = read.pairs
                there = judge(record, state.records)
                if there is not None and pool is not None:
                    return there, _spec_in(pool)
                if there is not None:  # an older version left half of a deletion, or somebody lost the key
                    its_pool = spec_of(there, spec)
                    conditions, puts = _pool_change(there.name, its_pool, None)
                    if (await self._etcd.txn([state.is_there(there.name), *conditions], puts)).succeeded:
                        return there, its_pool
                    continue
                try:
                    made = choice(record, state.records, [] if record.subnets else await self._taken())
                    its_pool = spec_of(made, spec)
                    conditions, puts = _pool_change(record.name, its_pool, pool)
                except (AlreadyExistsError, ExhaustedError):
                    # Pools are read after the networks: what is in the way may be this network, of another node.
                    if (await self._state()).order == state.order:
                        raise
                    continue
                needs = await self._raised(version)
                if needs and version is not None:
                    conditions.append(unchanged(version.key, version.mod_revision))
                conditions += [absent(layout.NETWORKS + record.name), state.order]
                done = await self._etcd.txn(conditions, [*_puts(made), *puts, *needs])
            if done.succeeded:
                return made, its_pool
        raise _late(record.name)

    async def share(self, name: str, docker: str) -> NetworkRecord:
        """See `ipamd.networks.Directory.share`."""
        for _ in range(_TRIES):
            with _told():
                state = await self._state()
            if name not in state.networks:
                self._networks.get(name)
                raise NotFoundError(f"there is no network {name} any more; another node deleted it")
            record, pair = state.networks[name]
            if record.type != OVERLAY:
                raise PreconditionError(
                    f"network {name} is {record.type}; only an overlay network is shared (netloom network create "
                    "--type overlay)"
                )
            if record.docker == docker:
                return record
            await self._judge_name(record, docker, state.records)
            conditions = [state.is_there(name), state.order]
            if docker:
                pool = await self._pool_of(name)
                conditions.append(unchanged(pool.key, pool.mod_revision))
            after = replace(record, docker=docker)
            with _told():
                done = await self._etcd.txn(conditions, _puts(after, pair))
            if done.succeeded:
                return after
        raise _late(name)

    async def _pool_of(self, name: str) -> Pair:
        """A network's pool. Raises UnavailableError where it is being deleted, PreconditionError without one."""
        with _told():
            pool = await self._etcd.get(layout.POOLS + name)
            if pool is not None:
                _spec_in(pool)
                return pool
        raise PreconditionError(
            f"network {name} has no pool in the cluster any more; delete it, or create it again as it is (netloom "
            "network create)"
        )

    async def _judge_name(self, record: NetworkRecord, docker: str, others: Iterable[NetworkRecord]) -> None:
        if not docker:
            with _told():
                holder = await self._docker_holder(record.name)
            if holder:
                raise PreconditionError(
                    f"network {record.name} is in use: {holder}; stop that container, or disconnect it (docker network "
                    "disconnect)"
                )
            return
        if record.docker:
            raise PreconditionError(
                f"docker: found {docker}, and every host's Docker shows network {record.name} as {record.docker}; "
                f"remove it there first (docker network rm {record.docker}), or keep that name"
            )
        for other in others:
            if other.docker == docker:
                raise AlreadyExistsError(
                    f"docker: every host's Docker shows network {other.name} as {docker}; take another name"
                )

    async def _docker_holder(self, name: str) -> str:
        """A container of Docker's with an address of the network, on any node; "" where there is none.

        A node tells of a release a moment after it was answered.
        """
        until = asyncio.get_running_loop().time() + _TELL_S
        while True:
            holder = ""
            async for page in self._etcd.walk(layout.ADDRESSES + layout.place(name, "")):
                for pair in page.pairs:
                    record = layout.decode(AddressRecord, pair.key, pair.value)
                    key = layout.decode(Allocation, pair.key, bytes(record.allocation)).key
                    if key.client == "docker":
                        ip = layout.split(pair.key)[1]
                        holder = f"container {key.container_id} on node {record.node} has {ip}"
            if not holder or asyncio.get_running_loop().time() > until:
                return holder
            await asyncio.sleep(_POLL_S)

    async def _state(self) -> _State:
        """Raises EtcdError."""
        last = await self._etcd.get(layout.LAST_NETWORK)
        found = {}
        async for page in self._etcd.walk(layout.NETWORKS):
            for pair in page.pairs:
                record = _read(pair)
                if record is not None:
                    found[record.name] = record, pair
        order = absent(layout.LAST_NETWORK) if last is None else unchanged(last.key, last.mod_revision)
        return _State(order, found)

    async def _taken(self) -> list[Network]:
        """What the cluster uses beside its networks: pools, and where netd's hosts are."""
        found: list[Network] = []
        texts: list[str] = []
        async for page in self._etcd.walk(layout.POOLS):
            for pair in page.pairs:
                with contextlib.suppress(LayoutError):  # `mirror` says so
                    spec = _spec_of(pair, layout.decode(PoolRecord, pair.key, pair.value))
                    texts += (one.subnet for ranges in spec.range_sets for one in ranges)
        async for page in self._etcd.walk(_UNDERLAY, keys_only=True):
            texts += (pair.key.removeprefix(_UNDERLAY) for pair in page.pairs)
        async for page in self._etcd.walk(_NETD):
            for pair in page.pairs:
                with contextlib.suppress(LayoutError):  # netd says so
                    host = layout.decode(_Reached, pair.key, pair.value)
                    texts += (*host.addresses, *host.subnets)
        for text in texts:
            with contextlib.suppress(ValueError):
                found.append(ipaddress.ip_network(text))
        return found

    async def _raised(self, version: Pair | None) -> list[Put]:
        """What keeps members out that know no overlay networks. Raises PreconditionError where one runs."""
        record = layout.decode(VersionRecord, version.key, version.value) if version is not None else None
        if version is None or record is None or record.needs >= layout.OVERLAYS_NEED:
            return []
        async for page in self._etcd.walk(layout.ALIVE):
            for pair in page.pairs:
                alive = layout.decode(AliveRecord, pair.key, pair.value)
                if alive.schema < layout.OVERLAYS_NEED:
                    raise PreconditionError(
                        f"type: found overlay, and node {pair.key.removeprefix(layout.ALIVE)} runs version "
                        f"{alive.version}, which would take it for a routed network; install a newer one there first"
                    )
        raised = replace(record, schema=max(record.schema, layout.SCHEMA), needs=layout.OVERLAYS_NEED)
        return [Put(layout.VERSION, layout.encode_over(version.value, raised))]

    async def change(self, changes: Sequence[tuple[NetworkRecord, NetworkRecord]]) -> None:
        """Raises UnavailableError, also where this node does not know yet what another one changed."""
        for start in range(0, len(changes), _BATCH):
            conditions: list[Compare] = []
            puts: list[Put] = []
            for before, after in changes[start : start + _BATCH]:
                pair = await self._as_known(before, after)
                if pair is None:
                    raise _late(before.name)
                if _read(pair) != after:
                    conditions.append(unchanged(pair.key, pair.mod_revision))
                    puts.append(Put(pair.key, layout.encode_over(pair.value, after)))
            if not puts:
                continue
            with _told():
                done = await self._etcd.txn(conditions, puts)
            if not done.succeeded:
                raise _late(changes[start][0].name)

    async def gone(self, name: str) -> tuple[bool, bool]:
        """See `ipamd.networks.Shared`. Raises UnavailableError."""
        with _told():
            pairs = (await self._etcd.txn([], [Get(layout.NETWORKS + name), Get(layout.POOLS + name)])).pairs
        return pairs[0] is None, pairs[1] is None

    async def delete(self, name: str) -> list[NetworkRecord]:
        """See `ipamd.networks.Shared`. The definition, its pool and what other networks say of it end in one change."""
        changed: list[NetworkRecord] = []

        async def along() -> tuple[list[Compare], list[Put | Delete]]:
            with _told():
                there = await self._etcd.get(layout.NETWORKS + name)
                state = await self._state()  # later: who connects two networks changes both
            if there is None:
                return [absent(layout.NETWORKS + name)], []
            if name in state.networks:
                refuse_shown(state.networks[name][0])
            connected = [(record, disconnected(record, name)) for record in state.records if name in record.connected]
            # More than one change holds: those first. Where that is all that is done, the network is there, apart.
            await self.change(connected[_BATCH:])
            conditions = [unchanged(there.key, there.mod_revision)]
            then: list[Put | Delete] = [Delete(there.key)]
            for record, after in connected[:_BATCH]:
                conditions.append(state.is_there(record.name))
                _, pair = state.networks[record.name]
                then.append(Put(pair.key, layout.encode_over(pair.value, after)))
            changed[:] = [after for _, after in connected]
            return conditions, then

        for _ in range(_TRIES):
            with _told():
                pool, there = (await self._etcd.txn([], [Get(layout.POOLS + name), Get(layout.NETWORKS + name)])).pairs
            if pool is not None:
                record = _read(there) if there is not None else None
                if record is not None:
                    refuse_shown(record)  # before the pool is marked
                await self._delete_pool(name, along)
                return changed
            conditions, then = await along()
            if not then:
                return []
            with _told():
                done = await self._etcd.txn([*conditions, absent(layout.POOLS + name)], then)
            if done.succeeded:
                return changed
        raise _late(name)

    async def _as_known(self, *known: NetworkRecord) -> Pair | None:
        """What stands in etcd, if it is one of these; None where there is nothing."""
        with _told():
            pair = await self._etcd.get(layout.NETWORKS + known[0].name)
        if pair is not None and _read(pair) not in known:
            raise _late(known[0].name)
        return pair

    async def _listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        records = [record for pair in pairs if (record := _read(pair)) is not None]
        there = {pair.key.removeprefix(layout.NETWORKS) for pair in pairs}
        await self._take(records, {record.name for record in self._networks.all()} - there)

    async def _take(self, records: Iterable[NetworkRecord], gone: Collection[str]) -> None:
        missing = [record for record in self._networks.all() if record.name in gone]
        lost = [record for record in missing if await self._is_used(record)]
        ended = [record.name for record in missing if record not in lost]
        await self._engine.run(lambda: self._networks.keep(records, without=ended), grows=True)
        for name in self.conflicts.keys() - {record.name for record in lost}:
            del self.conflicts[name]
        for record in lost:
            await self._put_back(record)

    async def _is_used(self, record: NetworkRecord) -> bool:
        return await in_use(self._engine, self._ledger, self._networks.store, record.name)

    async def _put_back(self, record: NetworkRecord) -> None:
        """Where nothing that was defined meanwhile is in the way; else an operator hears of it. Raises EtcdError."""
        for _ in range(_TRIES):
            state = await self._state()
            if record.name in state.networks:
                return  # by another node; the watch tells
            try:
                conditions, puts = await self._as_before(record, state)
            except (IpamdError, LayoutError, ValueError) as error:
                self._complain(record, str(error))
                return
            done = await self._etcd.txn(
                [absent(layout.NETWORKS + record.name), state.order, *conditions], [*_puts(record), *puts]
            )
            if done.succeeded:
                self.conflicts.pop(record.name, None)
                log.event(_logger, "error", "etcd lost a network of which addresses are in use here; it is put there "
                          "again", network=record.name)  # fmt: skip
                return
        self._complain(record, "its key in etcd cannot be read, or others define networks all the time")

    async def _as_before(self, record: NetworkRecord, state: _State) -> tuple[list[Compare], list[Put]]:
        """What goes with a lost network: its pool, where that is lost too, and what keeps older members out."""
        judge(record, state.records)
        for other in state.records:
            if record.docker and other.docker == record.docker:
                raise AlreadyExistsError(f"docker: every host's Docker shows network {other.name} as {record.docker}")
        pool, version = (await self._etcd.txn([], [Get(layout.POOLS + record.name), Get(layout.VERSION)])).pairs
        spec = self._ledger.pools[record.name].spec if record.name in self._ledger.pools else None
        conditions, puts = _pool_change(record.name, spec, pool) if spec and spec.mode != "local" else ([], [])
        needs = await self._raised(version) if record.type == OVERLAY else []
        if needs and version is not None:
            conditions.append(unchanged(version.key, version.mod_revision))
        return conditions, [*puts, *needs]

    def _complain(self, record: NetworkRecord, why: str) -> None:
        if self.conflicts.get(record.name) != why:
            log.event(_logger, "error", "etcd lost a network of which addresses are in use here, and it cannot be put "
                      "there again", network=record.name, error=why)  # fmt: skip
        self.conflicts[record.name] = why

    async def _changed(self, events: Sequence[Event]) -> None:
        records: dict[str, NetworkRecord] = {}
        gone: set[str] = set()
        for event in events:
            name = event.pair.key.removeprefix(layout.NETWORKS)
            record = _read(event.pair) if event.kind == "put" else None
            if record is not None:
                records[name] = record
                gone.discard(name)
            elif event.kind == "delete":
                records.pop(name, None)
                gone.add(name)
        # What was in the way of a lost one may be gone.
        await self._take(records.values(), gone | (self.conflicts.keys() - records.keys()))


def _puts(record: NetworkRecord, there: Pair | None = None) -> list[Put]:
    value = layout.encode(record) if there is None else layout.encode_over(there.value, record)
    return [
        Put(layout.NETWORKS + record.name, value),
        Put(layout.LAST_NETWORK, record.name.encode()),
    ]


def _pool_change(name: str, spec: PoolSpec, there: Pair | None) -> tuple[list[Compare], list[Put]]:
    """What makes a network's pool, where it is not there yet. Raises AlreadyExistsError for another one of the name."""
    validate(spec)
    key = layout.POOLS + name
    if there is None:
        return [absent(key)], [Put(key, layout.encode(PoolRecord(spec.encode())))]
    if _spec_in(there) == spec:
        return [unchanged(key, there.mod_revision)], []
    raise AlreadyExistsError(
        f"the cluster has a pool {name} with another spec; delete it first (netloom pool delete {name}), or take "
        "another name"
    )


def _spec_in(pair: Pair) -> PoolSpec:
    """Raises LayoutError, UnavailableError."""
    record = layout.decode(PoolRecord, pair.key, pair.value)
    if record.deleting:
        name = pair.key.removeprefix(layout.POOLS)
        raise UnavailableError(f"pool {name} is being deleted; ask again, or delete it again")
    return _spec_of(pair, record)


def _spec_of(pair: Pair, record: PoolRecord) -> PoolSpec:
    return layout.decode(PoolSpec, pair.key, record.spec.encode())


def _read(pair: Pair) -> NetworkRecord | None:
    try:
        return layout.decode(NetworkRecord, pair.key, pair.value)
    except LayoutError as error:
        log.event(_logger, "error", "a network of the cluster cannot be used here", error=str(error))
        return None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except EtcdError as error:
        raise UnavailableError(f"the cluster cannot be told: {error}; ask again") from None
    except (LayoutError, ValueError) as error:
        raise PreconditionError(f"what the cluster has cannot be read: {error}; delete or correct it") from None


def _late(name: str) -> UnavailableError:
    return UnavailableError(f"network {name} was changed by another node at this moment; ask again")
