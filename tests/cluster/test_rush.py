"""A node whose addresses are taken quickly: its own code in this process, and a real etcd."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cluster import layout
from cluster.etcd import Etcd
from cluster.layout import BlockRecord, PoolRecord, ReservationRecord
from ipamd.clock import BootClock
from ipamd.engine import Engine, Transaction
from ipamd.lease import Ask, Ledger
from ipamd.member.blocks import Blocks
from ipamd.member.holdings import Holdings
from ipamd.member.mirror import Known, Mirror
from ipamd.pool import Pool, PoolSpec, RangeSpec
from ipamd.store.base import Key, Netns
from ipamd.store.memory import MemoryStore
from telemetry.metrics import IpamdMetrics
from tests.cluster.loop import connected, looped, until
from tests.etcd import EtcdCluster

SPEC = PoolSpec(((RangeSpec("10.1.0.0/16"),),), mode="node-block", block_v4=28)


class Node:
    """One that knows the pool, and follows nobody."""

    def __init__(self, etcd: Etcd) -> None:
        store = MemoryStore()
        transaction = Transaction(store)
        self.etcd = etcd
        self.store = store
        self.ledger = Ledger(transaction, BootClock(), 0.0)
        self.ledger.in_cluster = True
        self.engine = Engine(transaction)
        holdings = Holdings(transaction, self.ledger)
        self.mirror = Mirror(etcd, self.engine, self.ledger, store, holdings, "a")
        own = BlockRecord("a", "id")
        self.blocks = Blocks(etcd, self.engine, self.ledger, holdings, self.mirror, own, IpamdMetrics())

    async def begin(self) -> Pool:
        record = PoolRecord(SPEC.encode())
        revision = await self.etcd.put(layout.POOLS + "blue", layout.encode(record))
        self.mirror.pools["blue"] = Known(record, revision)
        return await self.engine.run(lambda: self.ledger.create_pool("blue", SPEC))

    async def allocate(self, container: str) -> str:
        ask = Ask(Key("a", "cni", "net", container, "eth0"), Netns(), None, ("blue",))
        allocation, _ = await self.engine.run(lambda: self.ledger.allocate(ask))
        return allocation.addresses[0].ip


@looped
async def test_blocks_are_claimed_before_they_are_wanted_and_as_early_as_the_rush_wants() -> None:
    with EtcdCluster() as cluster:
        async with connected(cluster.sockets) as etcd:
            node = Node(etcd)
            pool = await node.begin()
            ahead = asyncio.create_task(node.blocks.keep_ahead())
            try:
                await node.blocks.claim("blue", 0)
                assert (len(pool.cidrs[0]), pool.early[0]) == (1, 4)  # a quarter of 16
                while pool.early[0] == 4:  # the first ones lasted for nothing
                    await node.blocks.claim("blue", 0)
                for rush in range(3):
                    await _take_all_but_a_few(node, pool, f"r{rush}")

                async def is_over() -> bool:
                    await node.blocks.tidy()
                    return pool.early[0] == 4

                await until(is_over, "the end of the rush")
            finally:
                ahead.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await ahead
                await node.engine.close()


@pytest.mark.parametrize("few", [3, 2])
def test_reservations_come_with_the_block_however_many_they_are(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipamd.member.blocks._FEW_RESERVATIONS", few)
    _reservations_come_with_the_block()


@looped
async def _reservations_come_with_the_block() -> None:
    with EtcdCluster() as cluster:
        async with connected(cluster.sockets) as etcd:
            reserved = ["10.1.7.18", "10.1.7.20", "10.1.9.2"]
            for ip in reserved:
                place = layout.RESERVATIONS + layout.place("blue", ip)
                await etcd.put(place, layout.encode(ReservationRecord("kept")))
            await etcd.put(layout.RESERVATIONS + layout.place("blue2", "10.1.7.19"), layout.encode(ReservationRecord()))
            node = Node(etcd)
            try:
                await node.begin()
                await node.blocks.claim("blue", 0, "10.1.7.16/28")
                assert [(row.ip, row.note) for row in node.store.reservations("blue")] == [
                    (ip, "kept") for ip in reserved
                ]
                assert [await node.allocate(f"c{n}") for n in range(2)] == ["10.1.7.19", "10.1.7.21"]
            finally:
                await node.engine.close()


async def _take_all_but_a_few(node: Node, pool: Pool, prefix: str) -> None:
    """Until a claim is due, and it comes: by nobody's asking for an address that is not there."""
    held, early, number = len(pool.cidrs[0]), pool.early[0], 0
    while pool.count_untouched(0) > early and len(pool.cidrs[0]) == held:
        await node.allocate(f"{prefix}-{number}")
        number += 1

    async def more() -> bool:
        return len(pool.cidrs[0]) > held

    await until(more, "further blocks")
