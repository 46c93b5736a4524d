"""What a node has for networks and pools, in the test's own process, on a real etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster import layout
from cluster.etcd import Etcd
from cluster.layout import NetworkRecord, PoolRecord
from ipamd.desk import Desk
from ipamd.engine import Engine, Transaction
from ipamd.lease import Ledger
from ipamd.member.holdings import Holdings
from ipamd.member.macs import Macs
from ipamd.member.mirror import Along, Mirror
from ipamd.member.networks import SharedNetworks
from ipamd.networks import Directory, Networks, OverlayDesk
from ipamd.overlay import parts_of
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.store.memory import MemoryStore
from tests.cluster.loop import connected
from tests.etcd import EtcdCluster
from tests.ipamd.clock import FakeClock


class World:
    """It follows nobody.

    `before_mark` and `before_end` are awaited when the pool of a network that is deleted is about to be marked, and
    about to go.
    """

    def __init__(self, etcd: Etcd) -> None:
        self.etcd = etcd
        self.transaction = transaction = Transaction(MemoryStore())
        self.ledger = Ledger(transaction, FakeClock(), 0)
        self.ledger.in_cluster = True
        self.ledger.join("a")
        self.engine = Engine(transaction)
        self.networks = Networks(transaction)
        self.mirror = Mirror(etcd, self.engine, self.ledger, transaction.store, Holdings(transaction, self.ledger), "a")
        desk = Desk(self.engine, self.ledger, self.mirror)
        self.shared = SharedNetworks(etcd, self.engine, self.ledger, self.networks, self._delete_pool)
        self.directory = Directory(
            self.engine,
            self.ledger,
            self.networks,
            create_pool=desk.create_pool,
            delete_pool=desk.delete_pool,
            shared=self.shared,
            overlays=OverlayDesk(
                self.shared, Macs(etcd, self.engine, transaction, "id-a"), parts_of("198.18.0.0/16,24")
            ),
        )
        self.before_mark: Callable[[], Awaitable[object]] = nothing
        self.before_end: Callable[[], Awaitable[object]] = nothing

    async def _delete_pool(self, name: str, along: Along) -> None:
        await self.before_mark()

        async def late() -> Any:
            await self.before_end()
            return await along()

        await self.mirror.delete_pool(name, late)

    async def create(self, name: str, subnet: str, kind: str = "overlay", bridge: str = "") -> None:
        spec = PoolSpec(((RangeSpec(subnet),),), mode="cluster-address")
        await self.directory.create(NetworkRecord(name, kind, (subnet,), bridge=bridge), spec)

    async def in_etcd(self, name: str) -> str:
        """ "": nothing; "network", "pool" and "deleting" where they are."""
        network, pool = await self.etcd.get(layout.NETWORKS + name), await self.etcd.get(layout.POOLS + name)
        found = ["network"] if network is not None else []
        if pool is not None:
            found.append("pool")
            found += ["deleting"] * layout.decode(PoolRecord, pool.key, pool.value).deleting
        return " ".join(found)

    async def here(self, name: str) -> str:
        return " ".join(
            [record.name for record in self.networks.all() if record.name == name]
            + ["pool"] * (name in self.ledger.pools)
        )


async def nothing() -> None:
    pass


@asynccontextmanager
async def worlds(one: EtcdCluster, directory: Path) -> AsyncIterator[tuple[World, World]]:
    """Two nodes, each with a client of its own."""
    prefix = f"/{directory.name}/"
    async with connected(one.sockets, prefix) as first, connected(one.sockets, prefix) as second:
        a, b = World(first), World(second)
        try:
            yield a, b
        finally:
            for world in (a, b):
                await world.engine.close()
