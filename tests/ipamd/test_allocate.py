"""An ask that waits for the cluster, and a release that overtakes it."""

from __future__ import annotations

import asyncio

import pytest

from ipamd.allocate import LostError, Underway, allocate, release
from ipamd.clock import BootClock
from ipamd.engine import Engine, Transaction
from ipamd.errors import NeedsBlockError, UnavailableError
from ipamd.lease import Ask, Ledger
from ipamd.member.holdings import Holdings
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.rounds import Rounds
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
        self.rounds = Rounds()

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


async def overtaken(key: Key, before: Instant | None, behind: bool = False) -> Allocation | None:
    """What a key has after an ask that a release of `key` overtook; raises what the ask got.

    `behind`: the release came right behind the ask, before anybody knew that the ask is to wait.
    """
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
        if not behind:
            await member.asked.wait()
        else:
            await asyncio.sleep(0)  # the ask is in the queue, and nothing more
        held = await engine.run(lambda: release(ledger, underway, key, 0, before))
        assert held is None
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


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("before", [None, Instant(BOOT, 101)])
def test_a_release_ends_what_was_asked_for_before_it(before: Instant | None, behind: bool) -> None:
    with pytest.raises(UnavailableError, match="was released while"):
        asyncio.run(overtaken(KEY, before, behind))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("key", "before"),
    [(Key("n1", "cni", "net", "c2", "eth0"), None), (KEY, Instant(BOOT, 100)), (KEY, Instant("another", 101))],
)
def test_another_release_does_not(key: Key, before: Instant | None, behind: bool) -> None:
    assert asyncio.run(overtaken(key, before, behind)) is not None


def test_nobody_waits_any_more_when_all_are_answered() -> None:
    """What waited for a block, and what found none that could be had."""

    class Empty(Member):
        async def provide(self, need: NeedsBlockError) -> None:
            if self.answer.is_set():
                raise UnavailableError("etcd is away")
            self.answer.set()
            await super().provide(need)

    async def run() -> Underway:
        transaction = Transaction(MemoryStore())
        ledger = Ledger(transaction, BootClock(), 30.0)
        ledger.in_cluster = True
        engine, underway = Engine(transaction), Underway()
        try:
            await engine.run(lambda: ledger.create_pool("p", SPEC))
            member = Empty(engine, ledger, transaction)
            for number in range(61):
                key = Key("n1", "cni", "net", f"c{number}", "eth0")
                await allocate(engine, ledger, member, underway, Ask(key, Netns(), None, ("p",)))
            with pytest.raises(UnavailableError, match="etcd is away"):
                await allocate(
                    engine,
                    ledger,
                    member,
                    underway,
                    Ask(Key("n1", "cni", "net", "more", "eth0"), Netns(), None, ("p",)),
                )
        finally:
            await engine.close()
        return underway

    assert asyncio.run(run()).waiting == 0


def test_who_lost_to_others_is_not_kept_waiting_beyond_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is given up by `confirm` in time; what adds up is the tries."""

    class Loser(Member):
        tries = 0

        async def ready(self) -> None:
            pass

        async def confirm(self, allocation: Allocation) -> None:
            self.tries += 1
            await self._engine.run(lambda: self._ledger.release(allocation.key, allocation.generation))
            raise LostError

        def __init__(self, engine: Engine, ledger: Ledger, transaction: Transaction) -> None:
            super().__init__(engine, ledger, transaction)
            self._ledger = ledger

    async def lose() -> int:
        transaction = Transaction(MemoryStore())
        ledger = Ledger(transaction, BootClock(), 0.0)
        ledger.in_cluster = True
        ledger.join("n1")
        ledger.shared_refusal = ""
        engine = Engine(transaction)
        loser = Loser(engine, ledger, transaction)
        try:
            spec = PoolSpec(((RangeSpec("10.1.0.0/24"),),), mode="cluster-address")
            await engine.run(lambda: ledger.create_pool("blue", spec))
            with pytest.raises(UnavailableError, match="others were faster"):
                await allocate(engine, ledger, loser, Underway(), Ask(KEY, Netns(1), None, ("blue",)))
        finally:
            await engine.close()
        return loser.tries

    assert asyncio.run(lose()) > 1
    monkeypatch.setattr("ipamd.allocate._LAST_TRY_S", 0.0)
    assert asyncio.run(lose()) == 1
