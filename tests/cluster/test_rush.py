"""A node whose addresses are taken quickly: its own code in this process, and a real etcd."""

from __future__ import annotations

import asyncio
import contextlib

from cluster import layout
from cluster.layout import BlockRecord, PoolRecord
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


@looped
async def test_blocks_are_claimed_before_they_are_wanted_and_as_early_as_the_rush_wants() -> None:
    with EtcdCluster() as cluster:
        async with connected(cluster.sockets) as etcd:
            store = MemoryStore()
            transaction = Transaction(store)
            ledger = Ledger(transaction, BootClock(), 0.0)
            ledger.in_cluster = True
            engine = Engine(transaction)
            holdings = Holdings(transaction, ledger)
            mirror = Mirror(etcd, engine, ledger, store, holdings, "a")
            blocks = Blocks(etcd, engine, ledger, holdings, mirror, BlockRecord("a", "id"), IpamdMetrics())
            record = PoolRecord(SPEC.encode())
            revision = await etcd.put(layout.POOLS + "blue", layout.encode(record))
            mirror.pools["blue"] = Known(record, revision)
            pool = await engine.run(lambda: ledger.create_pool("blue", SPEC))
            ahead = asyncio.create_task(blocks.keep_ahead())
            try:
                await blocks.claim("blue", 0)
                assert (len(pool.cidrs[0]), pool.early[0]) == (1, 4)  # a quarter of 16
                while pool.early[0] == 4:  # the first ones lasted for nothing
                    await blocks.claim("blue", 0)
                for rush in range(3):
                    await _take_all_but_a_few(engine, ledger, pool, f"r{rush}")

                async def is_over() -> bool:
                    await blocks.tidy()
                    return pool.early[0] == 4

                await until(is_over, "the end of the rush")
            finally:
                ahead.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await ahead
                await engine.close()


async def _take_all_but_a_few(engine: Engine, ledger: Ledger, pool: Pool, prefix: str) -> None:
    """Until a claim is due, and it comes: by nobody's asking for an address that is not there."""
    held, early, number = len(pool.cidrs[0]), pool.early[0], 0
    while pool.count_untouched(0) > early and len(pool.cidrs[0]) == held:
        ask = Ask(Key("a", "cni", "net", f"{prefix}-{number}", "eth0"), Netns(), None, ("blue",))
        await engine.run(lambda ask=ask: ledger.allocate(ask))  # type: ignore[misc]
        number += 1

    async def more() -> bool:
        return len(pool.cidrs[0]) > held

    await until(more, "further blocks")
