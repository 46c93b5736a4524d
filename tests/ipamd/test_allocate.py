"""An ask that waits for the cluster, and a release that overtakes it."""

from __future__ import annotations

import asyncio

import pytest

from ipamd.allocate import Underway, allocate
from ipamd.clock import BootClock
from ipamd.engine import Engine, Transaction
from ipamd.errors import NeedsBlockError, UnavailableError
from ipamd.lease import Ask, Ledger
from ipamd.member.holdings import Holdings
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.store.base import Allocation, Instant, Key, Netns
from ipamd.store.memory import MemoryStore

SPEC = PoolSpec(((RangeSpec("10.1.0.0/24"),),), mode="node-block")
KEY = Key("n1", "cni", "net", "c1", "eth0")
BOOT = "a boot"


class Member:
    """Claims a block when the test says so."""

    def __init__(self, engine: Engine, ledger: Ledger, transaction: Transaction) -> None:
        self._engine = engine
        self._holdings = Holdings(transaction, ledger)
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    @property
    def blocks(self) -> Member:
        return self

    @property
    def claims(self) -> Member:
        return self

    async def provide(self, need: NeedsBlockError) -> None:
        self.asked.set()
        await self.answer.wait()
        await self._engine.run(lambda: self._holdings.add(need.pool, ["10.1.0.64/26"]))

    async def ready(self) -> None:
        raise AssertionError

    async def confirm(self, allocation: Allocation) -> None:
        raise AssertionError


async def overtaken(key: Key, before: Instant | None) -> Allocation | None:
    """What a key has after an ask that a release of `key` overtook; raises what the ask got."""
    store = MemoryStore()
    transaction = Transaction(store)
    ledger = Ledger(transaction, BootClock(), 30.0)
    ledger.in_cluster = True
    engine = Engine(transaction)
    underway = Underway()
    try:
        await engine.run(lambda: ledger.create_pool("p", SPEC))
        member = Member(engine, ledger, transaction)
        ask = Ask(KEY, Netns(), Instant(BOOT, 100), ("p",))
        task = asyncio.create_task(allocate(engine, ledger, member, underway, ask))
        await member.asked.wait()
        underway.end(key, before)
        member.answer.set()
        try:
            await task
        except UnavailableError as error:
            assert store.find(KEY) is None
            raise error from None
        # Whoever asks now is not meant.
        assert (await allocate(engine, ledger, member, underway, ask))[1] is False
        return store.find(KEY)
    finally:
        await engine.close()


@pytest.mark.parametrize("before", [None, Instant(BOOT, 101)])
def test_a_release_ends_what_was_asked_for_before_it(before: Instant | None) -> None:
    with pytest.raises(UnavailableError, match="was released while"):
        asyncio.run(overtaken(KEY, before))


@pytest.mark.parametrize(
    ("key", "before"),
    [(Key("n1", "cni", "net", "c2", "eth0"), None), (KEY, Instant(BOOT, 100)), (KEY, Instant("another", 101))],
)
def test_another_release_does_not(key: Key, before: Instant | None) -> None:
    assert asyncio.run(overtaken(key, before)) is not None
