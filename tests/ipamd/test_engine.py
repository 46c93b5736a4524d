"""Group commit: who shares one, who waits for it, and what a failure does."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ipamd.engine import Engine, Transaction
from ipamd.errors import ExhaustedError, InvalidArgumentError, IpamdError, UnavailableError
from ipamd.store.base import Filter, PoolRow, PutPool, StoreError, StoreFullError
from ipamd.store.memory import MemoryStore


class SlowStore(MemoryStore):
    """A commit lasts until the test says so, and fails when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.begun = 0
        self.commits = 0
        self.in_loop: list[int] = []  # which of the commits were made by the loop itself
        self.failure: StoreError | None = None

    def begin(self) -> None:
        self.begun += 1
        super().begin()

    def commit(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.in_loop.append(self.commits)
        assert self.gate.wait(60)
        if self.failure is not None:
            raise self.failure
        self.commits += 1
        super().commit()


class FakeBallast:
    def __init__(self) -> None:
        self.room = True
        self.dropped = 0

    def drop(self) -> None:
        self.dropped += 1

    def restore(self) -> bool:
        return self.room


class Bench:
    def __init__(self) -> None:
        self.store = SlowStore()
        self.transaction = Transaction(self.store)
        self.ballast = FakeBallast()
        self.batches: list[int] = []
        self.may_commit_in_loop = False
        self.engine = Engine(
            self.transaction, ballast=self.ballast, on_commit=lambda size, _seconds: self.batches.append(size)
        )

    def put(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.transaction.apply(PutPool(PoolRow(name, "{}", managed=False), new=True))
            return name

        return work

    async def begun(self) -> None:
        """Returns when the first batch is on its way; no event tells, as the store knows none."""
        for _ in range(10_000):
            if self.store.begun:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("no batch began")

    def names(self) -> list[str]:
        return [row.name for row in self.store.pools()]


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            await asyncio.wait_for(test(bench), 60)
            assert bench.may_commit_in_loop or not bench.store.in_loop
        finally:
            bench.store.gate.set()
            bench.store.failure = None
            await bench.engine.close()

    asyncio.run(main())


def test_requests_that_wait_share_a_commit() -> None:
    async def test(bench: Bench) -> None:
        bench.store.gate.clear()
        first = asyncio.create_task(bench.engine.run(bench.put("first")))
        await bench.begun()
        rest = [asyncio.create_task(bench.engine.run(bench.put(f"p{n}"))) for n in range(20)]
        await asyncio.sleep(0.05)
        assert not first.done()
        assert bench.store.begun == 1  # the next batch only gathers
        bench.store.gate.set()
        assert await asyncio.gather(first, *rest) == ["first", *(f"p{n}" for n in range(20))]
        assert bench.batches == [1, 20]

    run(test)


def test_a_reader_waits_for_the_commit_of_what_it_saw() -> None:
    async def test(bench: Bench) -> None:
        bench.store.gate.clear()
        writer = asyncio.create_task(bench.engine.run(bench.put("p")))
        reader = asyncio.create_task(bench.engine.run(bench.names))
        await asyncio.sleep(0.05)
        assert not writer.done()
        assert not reader.done()
        bench.store.gate.set()
        assert await reader == ["p"]
        assert await writer == "p"

    run(test)


def test_readers_alone_commit_nothing() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.engine.run(lambda: bench.store.allocations(Filter())) == []
        assert bench.store.begun == 0
        assert bench.batches == []

    run(test)


def test_one_bad_request_does_not_fail_its_batch() -> None:
    async def test(bench: Bench) -> None:
        def refuse() -> str:
            raise InvalidArgumentError("no")

        def fault() -> str:
            raise ZeroDivisionError("ours")

        def conflict() -> str:
            return bench.put("a")()

        answers = await asyncio.gather(
            *(bench.engine.run(work) for work in (bench.put("a"), refuse, fault, conflict, bench.put("b"))),
            return_exceptions=True,
        )
        assert answers[0] == "a"
        assert isinstance(answers[1], InvalidArgumentError)
        assert type(answers[2]) is IpamdError
        assert "see its log" in str(answers[2])
        assert type(answers[3]) is IpamdError
        assert answers[4] == "b"
        assert bench.batches == [5]
        assert bench.names() == ["a", "b"]

    run(test)


def test_a_failed_commit_takes_everything_back() -> None:
    async def test(bench: Bench) -> None:
        undone: list[str] = []

        def change_memory() -> str:
            bench.transaction.on_undo(undone.append, "one")
            bench.transaction.on_undo(undone.append, "two")
            return bench.put("a")()

        bench.store.failure = StoreError("the disk is on fire")
        answers = await asyncio.gather(
            bench.engine.run(change_memory), bench.engine.run(bench.names), return_exceptions=True
        )
        for answer in answers:
            assert isinstance(answer, UnavailableError)
            assert "on fire" in str(answer)
        assert undone == ["two", "one"]
        assert bench.names() == []
        bench.store.failure = None
        assert await bench.engine.run(bench.put("a")) == "a"

    run(test)


def test_a_full_disk_refuses_growth_and_takes_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.store.failure = StoreFullError("full")
        bench.ballast.room = False

        def release() -> str:
            bench.store.failure = None if bench.ballast.dropped else bench.store.failure
            return bench.put("released")()

        answers = await asyncio.gather(
            bench.engine.run(bench.put("grown"), grows=True), bench.engine.run(release), return_exceptions=True
        )
        assert isinstance(answers[0], ExhaustedError)
        assert "disk" in str(answers[0])
        assert answers[1] == "released"
        assert bench.names() == ["released"]
        assert bench.ballast.dropped == 1
        assert bench.engine.disk_full
        with pytest.raises(ExhaustedError, match="disk"):
            await bench.engine.run(bench.put("grown"), grows=True)
        # Room again: noticed by itself at the next request, but not looked for at each.
        bench.ballast.room = True
        monkeypatch.setattr("ipamd.engine._LOOK_FOR_ROOM_S", 0.0)
        assert await bench.engine.run(bench.put("grown"), grows=True) == "grown"
        assert not bench.engine.disk_full

    run(test)


def test_a_disk_that_is_full_at_the_start() -> None:
    async def test() -> None:
        ballast = FakeBallast()
        ballast.room = False
        engine = Engine(Transaction(MemoryStore()), ballast=ballast)
        with pytest.raises(ExhaustedError):
            await engine.run(lambda: None, grows=True)
        await engine.close()

    asyncio.run(test())


def test_a_request_whose_client_left_before_its_turn_is_not_run() -> None:
    async def test(bench: Bench) -> None:
        bench.store.gate.clear()
        first = asyncio.create_task(bench.engine.run(bench.put("first")))
        await bench.begun()
        gone = asyncio.create_task(bench.engine.run(bench.put("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        bench.store.gate.set()
        await first
        await bench.engine.run(lambda: None)
        assert bench.names() == ["first"]

    run(test)


def test_close_answers_what_waits_and_refuses_the_rest() -> None:
    async def test(bench: Bench) -> None:
        bench.store.gate.clear()
        waiting = [asyncio.create_task(bench.engine.run(bench.put(f"p{n}"))) for n in range(3)]
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(bench.engine.close())
        await asyncio.sleep(0.02)
        with pytest.raises(UnavailableError, match="stopping"):
            await bench.engine.run(bench.put("late"))
        bench.store.gate.set()
        await closing
        assert [await task for task in waiting] == ["p0", "p1", "p2"]

    run(test)


def test_too_many_waiting_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipamd.engine._LONGEST_QUEUE", 2)

    async def test(bench: Bench) -> None:
        bench.store.gate.clear()
        tasks = [asyncio.create_task(bench.engine.run(bench.put("a")))]
        await bench.begun()
        tasks += [asyncio.create_task(bench.engine.run(bench.put(name))) for name in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="overloaded"):
            await bench.engine.run(bench.put("d"))
        bench.store.gate.set()
        assert [await task for task in tasks] == ["a", "b", "c"]

    run(test)


def test_a_client_alone_never_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipamd.engine._GATHER_S", 3600.0)

    async def test(bench: Bench) -> None:
        for number in range(20):
            await bench.engine.run(bench.put(str(number)))
        assert bench.batches == [1] * 20
        bench.may_commit_in_loop = True

    run(test)


def test_the_loop_commits_for_a_client_alone_while_the_disk_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = 3600.0, 0.0
    monkeypatch.setattr("ipamd.engine._QUICK_ONES", 3)
    monkeypatch.setattr("ipamd.engine._GATHER_S", 0.0)

    async def test(bench: Bench) -> None:
        async def alone(count: int) -> list[int]:
            bench.store.in_loop.clear()
            first = bench.store.commits
            for number in range(count):
                await bench.engine.run(bench.put(f"{first}-{number}"))
            return [number - first for number in bench.store.in_loop]

        bench.may_commit_in_loop = True
        monkeypatch.setattr("ipamd.engine._QUICK_S", quick)
        assert await alone(5) == [3, 4]
        bench.store.in_loop.clear()
        await asyncio.gather(*(bench.engine.run(bench.put(name)) for name in "abcd"))
        assert bench.store.in_loop == []
        assert await alone(5) == [1, 2, 3, 4]  # the first one might have been one of many still
        monkeypatch.setattr("ipamd.engine._QUICK_S", slow)
        assert await alone(5) == [0]
        monkeypatch.setattr("ipamd.engine._QUICK_S", quick)
        assert await alone(5) == [3, 4]

    run(test)


def test_those_who_were_just_answered_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes back after a few rounds of the loop; without the wait the first would get a commit of its own."""
    monkeypatch.setattr("ipamd.engine._GATHER_S", 3600.0)

    async def test(bench: Bench) -> None:
        async def client(name: str, rounds: int) -> None:
            for number in range(rounds):
                await bench.engine.run(bench.put(f"{name}-{number}"))
                for _ in range(ord(name) % 8):
                    await asyncio.sleep(0)

        clients = [asyncio.create_task(client(name, 20)) for name in "abcdefgh"]
        while not all(task.done() for task in clients):
            await asyncio.sleep(0.001)
            if sum(bench.batches) > 100:  # the last ones have nobody to wait for
                monkeypatch.setattr("ipamd.engine._GATHER_S", 0.0)
                bench.engine._more.set()
        bench.may_commit_in_loop = True  # for the last one
        assert sum(bench.batches) == 160
        assert sum(size >= 6 for size in bench.batches[1:12]) >= 10

    run(test)


def test_waits_in_vain_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of clients that ask once each: after it, a request waits in vain at most now and then."""
    monkeypatch.setattr("ipamd.engine._GATHER_S", 0.02)

    async def test(bench: Bench) -> None:
        waits: list[float] = []
        call_later = bench.engine._loop.call_later

        def counting(delay: float, *rest: Any) -> asyncio.TimerHandle:
            waits.append(delay)
            return call_later(delay, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(bench.engine._loop, "call_later", counting)
            for number in range(60):
                # Two at once, then nobody comes back before the next two.
                await asyncio.gather(
                    bench.engine.run(bench.put(f"a{number}")), bench.engine.run(bench.put(f"b{number}"))
                )
                await bench.engine.run(bench.put(f"c{number}"))
        assert len(waits) <= 20

    run(test)
