"""The cluster's networks: put into etcd by whoever defines one, copied from there by every node."""

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Compare, Delete, Etcd, Event, Pair, Put, absent, unchanged
from cluster.layout import LayoutError, NetworkRecord
from ipamd.engine import Engine
from ipamd.errors import UnavailableError
from ipamd.lease import Ledger
from ipamd.member.follow import Follower
from ipamd.networks import Networks, judge
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_BATCH = 40  # networks of a transaction
_TRIES = 10  # each is lost to a node that defined a network


class SharedNetworks:
    """See `ipamd.networks.Shared`. `follower` keeps this node's copy."""

    def __init__(self, etcd: Etcd, engine: Engine, ledger: Ledger, networks: Networks) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._networks = networks
        self.follower = Follower(etcd, layout.NETWORKS, self._listed, self._changed)

    async def create(self, record: NetworkRecord) -> None:
        """Raises AlreadyExistsError where it cannot be beside one that another node just defined, UnavailableError.

        Networks of two nodes are different keys; one that every definition writes puts them in order.
        """
        key = layout.NETWORKS + record.name
        for _ in range(_TRIES):
            with _told():
                last = await self._etcd.get(layout.LAST_NETWORK)
                others = [_read(pair) async for page in self._etcd.walk(layout.NETWORKS) for pair in page.pairs]
            if judge(record, (other for other in others if other is not None)) is not None:
                return
            order = absent(layout.LAST_NETWORK) if last is None else unchanged(last.key, last.mod_revision)
            puts = [Put(key, layout.encode(record)), Put(layout.LAST_NETWORK, record.name.encode())]
            with _told():
                done = await self._etcd.txn([absent(key), order], puts)
            if done.succeeded:
                return
        raise _late(record.name)

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
                    puts.append(Put(pair.key, layout.encode(after)))
            if not puts:
                continue
            with _told():
                done = await self._etcd.txn(conditions, puts)
            if not done.succeeded:
                raise _late(changes[start][0].name)

    async def delete(self, record: NetworkRecord) -> None:
        """Raises UnavailableError, also where this node does not know yet what another one changed."""
        pair = await self._as_known(record, record)
        if pair is None:
            return
        with _told():
            done = await self._etcd.txn([unchanged(pair.key, pair.mod_revision)], [Delete(pair.key)])
        if not done.succeeded:
            raise _late(record.name)

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
        lost = [record for record in missing if self._is_used(record)]
        ended = [record.name for record in missing if record not in lost]
        await self._engine.run(lambda: self._networks.keep(records, without=ended), grows=True)
        for record in lost:
            log.event(_logger, "error", "etcd lost a network of which addresses are in use here; it is put there again",
                      network=record.name)  # fmt: skip
            key = layout.NETWORKS + record.name
            await self._etcd.txn([absent(key)], [Put(key, layout.encode(record))], repeatable=True)

    def _is_used(self, record: NetworkRecord) -> bool:
        """Nobody deletes a network of which an address is in use."""
        pool = self._ledger.pools.get(record.name)
        return pool is not None and sum(pool.allocated) > 0

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
        await self._take(records.values(), gone)


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


def _late(name: str) -> UnavailableError:
    return UnavailableError(f"network {name} was changed by another node at this moment; ask again")
