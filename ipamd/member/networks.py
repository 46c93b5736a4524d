"""The cluster's networks: put into etcd by whoever defines one, copied from there by every node."""

import logging
from collections.abc import Sequence

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Event, Pair, Put, absent
from cluster.layout import LayoutError, NetworkRecord
from ipamd.engine import Engine
from ipamd.errors import AlreadyExistsError, UnavailableError
from ipamd.member.follow import Follower
from ipamd.networks import Networks
from telemetry import log

_logger = logging.getLogger("ipamd.member")


class SharedNetworks:
    """See `ipamd.networks.Shared`. `follower` keeps this node's copy."""

    def __init__(self, etcd: Etcd, engine: Engine, networks: Networks) -> None:
        self._etcd = etcd
        self._engine = engine
        self._networks = networks
        self.follower = Follower(etcd, layout.NETWORKS, self._listed, self._changed)

    async def put(self, record: NetworkRecord, *, new: bool) -> None:
        """Raises AlreadyExistsError where it is `new` and another node was faster, UnavailableError."""
        key = layout.NETWORKS + record.name
        try:
            wanted = [absent(key)] if new else []
            done = await self._etcd.txn(wanted, [Put(key, layout.encode(record))], repeatable=not new)
        except EtcdError as error:
            raise UnavailableError(f"the cluster cannot be told of network {record.name}: {error}") from None
        if not done.succeeded:
            raise AlreadyExistsError(f"another node just defined network {record.name}; look at it, and ask again")

    async def delete(self, name: str) -> None:
        """Raises UnavailableError."""
        try:
            await self._etcd.txn([], [Delete(layout.NETWORKS + name)], repeatable=True)
        except EtcdError as error:
            raise UnavailableError(f"the cluster cannot be told of network {name}: {error}") from None

    async def _listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        records = [record for pair in pairs if (record := _read(pair)) is not None]
        there = {pair.key.removeprefix(layout.NETWORKS) for pair in pairs}
        gone = [record.name for record in self._networks.all() if record.name not in there]
        await self._engine.run(lambda: self._networks.keep(records, without=gone), grows=True)

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
        await self._engine.run(lambda: self._networks.keep(records.values(), without=gone), grows=True)


def _read(pair: Pair) -> NetworkRecord | None:
    try:
        return layout.decode(NetworkRecord, pair.key, pair.value)
    except LayoutError as error:
        log.event(_logger, "error", "a network of the cluster cannot be used here", error=str(error))
        return None
