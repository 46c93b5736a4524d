"""Many nodes that claim their first block at the same moment: `python -m bench.claims`, inside a host.

A node is what ipamd has for it: a ledger and a store of its own (in memory), a connection to etcd of its own, and
`ipamd.member.blocks`, which chooses and claims. None of them has heard of another's claim. Nodes do not follow each
other's changes here: a thousand followers of a thousand changes would measure this one process, not etcd.

It reads one JSON request per line and answers with one:

    {"endpoints": ["192.168.77.2:2379"], "nodes": 1000}  →  {"took_s": 2.5, "retries": [0, 1], "blocks": 1000}
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from typing import Any

from cluster import layout
from cluster.etcd import Etcd, EtcdConfig
from cluster.layout import BlockRecord, PoolRecord
from ipamd.clock import BootClock
from ipamd.engine import Engine, Transaction
from ipamd.lease import Ledger
from ipamd.member.blocks import Blocks
from ipamd.member.holdings import Holdings
from ipamd.member.mirror import Known, Mirror
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.store.memory import MemoryStore

POOL = "bench"
# 2,048 blocks of 64 addresses: half of them are wanted.
SPEC = PoolSpec(((RangeSpec("10.0.0.0/15"),),), mode="node-block")
_LIMIT_S = 60.0


class Node:
    """One that has just started, and knows the pool."""

    def __init__(self, number: int, endpoints: tuple[str, ...]) -> None:
        name = f"node{number}"
        self.retries = 0
        self.etcd = Etcd(EtcdConfig(endpoints, timeout_s=_LIMIT_S))
        store = MemoryStore()
        transaction = Transaction(store)
        self.ledger = Ledger(transaction, BootClock(), 30.0)
        self.ledger.in_cluster = True
        self.engine = Engine(transaction)
        holdings = Holdings(transaction, self.ledger)
        self.mirror = Mirror(self.etcd, self.engine, self.ledger, store, holdings, name)
        own = BlockRecord(name, str(uuid.uuid4()))
        self.blocks = Blocks(self.etcd, self.engine, self.ledger, holdings, self.mirror, own, self)

    def claimed(self, _blocks: int, conflicts: int, _seconds: float) -> None:
        self.retries = conflicts

    def told(self, _operation: str, _seconds: float) -> None:
        pass

    async def begin(self, known: Known) -> None:
        self.mirror.pools[POOL] = known
        await self.engine.run(lambda: self.ledger.create_pool(POOL, SPEC))
        await self.etcd.count("version")  # the connection is there

    async def close(self) -> None:
        await self.engine.close()
        await self.etcd.close()


async def answer(endpoints: tuple[str, ...], count: int) -> dict[str, Any]:
    etcd = Etcd(EtcdConfig(endpoints))
    record = PoolRecord(SPEC.encode())
    known = Known(record, await etcd.put(layout.POOLS + POOL, layout.encode(record)))
    nodes = [Node(number, endpoints) for number in range(count)]
    for some in range(0, count, 50):
        await asyncio.gather(*(node.begin(known) for node in nodes[some : some + 50]))
    began = time.perf_counter()
    await asyncio.gather(*(node.blocks.claim(POOL, 0) for node in nodes))
    took_s = time.perf_counter() - began
    owners = set()
    blocks = 0
    async for page in etcd.walk(layout.BLOCKS):
        blocks += len(page.pairs)
        owners |= {layout.decode(BlockRecord, pair.key, pair.value).node for pair in page.pairs}
    for node in nodes:
        await node.close()
    await etcd.close()
    if len(owners) != count:
        raise RuntimeError(f"{len(owners)} of {count} nodes have a block")
    return {"took_s": took_s, "retries": [node.retries for node in nodes], "blocks": blocks}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = asyncio.run(answer(tuple(request["endpoints"]), request["nodes"]))
        except Exception as error:  # noqa: BLE001 - the asker shows it
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
