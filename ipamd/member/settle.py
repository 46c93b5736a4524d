"""Brings the blocks that this node holds in step with etcd's records of them, one by one."""

import logging

from msgspec import Struct

from cluster import layout
from cluster.etcd import Etcd, Get, Put, absent
from ipamd.engine import Engine
from ipamd.lease import Ledger
from ipamd.member.holdings import Held, Holdings
from ipamd.member.table import Table
from telemetry import log

_logger = logging.getLogger("ipamd.member")


class Frozen(Struct, frozen=True):
    """A block that two nodes believe to be theirs."""

    pool: str
    cidr: str
    reason: str


class Settling:
    """See the top of this file. `record` is what stands in etcd for a block of this node."""

    def __init__(
        self, etcd: Etcd, engine: Engine, ledger: Ledger, holdings: Holdings, table: Table, record: bytes
    ) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._holdings = holdings
        self._table = table
        self._record = record

    async def settle(self, name: str, cidr: str) -> None:
        """Brings one block of ours in step with etcd's record of it."""
        held = self._holdings.one(name, cidr)
        if held is None:
            return
        record = self._table.get(name, cidr)
        if record is None:
            if not await self._retire_quietly(held):
                await self._put_again(held)
        elif self._table.is_own(name, cidr):
            if held.closed and await self._engine.run(lambda: self._holdings.thaw(name, cidr)):
                log.event(_logger, "warning", "the block is this node's again", pool=name, block=cidr)
        elif not await self._retire_quietly(held):
            reason = f"node {record.node} ({record.node_id}) claims it, too"
            await self._freeze(held, reason)

    async def _put_again(self, held: Held) -> None:
        key = layout.BLOCKS + layout.place(held.pool, held.cidr)
        done = await self._etcd.txn([absent(key)], [Put(key, self._record)], [Get(key)], repeatable=True)
        self._ledger.changed[held.pool, held.cidr] = None
        if done.succeeded:
            log.event(_logger, "warning", "etcd had lost a block of this node, and has it again", pool=held.pool,
                      block=held.cidr)  # fmt: skip
            self._table.note_own(held.pool, held.cidr, done.revision)
        elif done.pairs[0] is not None:
            self._table.note(done.pairs[0])
            await self.settle(held.pool, held.cidr)

    async def _retire_quietly(self, held: Held) -> bool:
        """Forgets a block that etcd no longer says is ours, if nothing of it is in use or was lately."""
        if held.held or not await self._engine.run(lambda: self._holdings.retire(held.pool, held.cidr)):
            return False
        log.event(_logger, "warning", "a block is no longer this node's, and was empty", pool=held.pool,
                  block=held.cidr)  # fmt: skip
        return True

    async def _freeze(self, held: Held, reason: str) -> None:
        if await self._engine.run(lambda: self._holdings.freeze(held.pool, held.cidr, reason)):
            log.event(_logger, "error", "a block is claimed by two nodes: it hands nothing out here any more, and its "
                      "addresses may be in use twice (netloom ip check)", pool=held.pool, block=held.cidr,
                      reason=reason)  # fmt: skip

    def frozen(self) -> list[Frozen]:
        """Blocks that hand nothing out. Inside a batch of the engine."""
        return [
            Frozen(held.pool, held.cidr, self._holdings.frozen(held.pool, held.cidr))
            for held in self._holdings.all()
            if held.closed
        ]
