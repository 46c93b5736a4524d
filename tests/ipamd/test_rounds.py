"""Who goes with whom when addresses are asked of the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ipamd.rounds import MOST_ASKS, Round, Rounds


class Asks:
    """Each enters a round and stays until it is let go."""

    def __init__(self) -> None:
        self.rounds = Rounds()
        self.inside: dict[str, Round] = {}

    async def ask(self, *names: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self._enter(name)) for name in names]
        await settled()
        return tasks

    async def _enter(self, name: str) -> None:
        self.inside[name] = await self.rounds.enter()

    async def let_go(self, *names: str) -> None:
        for name in names:
            self.rounds.leave(self.inside.pop(name))
        await settled()


async def settled() -> None:
    """Everything that can go on without time passing has."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends by time unless a test says so."""
    monkeypatch.setattr("ipamd.rounds._GATHER_S", 3600.0)
    monkeypatch.setattr("ipamd.rounds._LONGEST_S", 3600.0)


def run(test: Callable[[Asks], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Asks())

    asyncio.run(main())


def test_who_is_alone_never_waits() -> None:
    async def test(asks: Asks) -> None:
        for number in range(5):
            await asks.ask(f"{number}")
            assert list(asks.inside) == [f"{number}"]
            await asks.let_go(f"{number}")

    run(test)


def test_who_comes_meanwhile_goes_together_afterwards() -> None:
    async def test(asks: Asks) -> None:
        await asks.ask("a", "b", "c", "d", "e")
        assert list(asks.inside) == ["a"]
        await asks.let_go("a")
        assert sorted(asks.inside) == ["b", "c", "d", "e"]
        assert len(set(map(id, asks.inside.values()))) == 1
        await asks.ask("f")
        await asks.let_go("b", "c", "d")
        assert list(asks.inside) == ["e"]

    run(test)


def test_after_a_round_most_of_those_who_were_answered_are_waited_for() -> None:
    async def test(asks: Asks) -> None:
        await asks.ask("a", "b", "c", "d")
        await asks.let_go("a")
        await asks.let_go("b", "c", "d")  # three answered: three are wanted again
        await asks.ask("e", "f")
        assert not asks.inside
        await asks.ask("g")
        assert sorted(asks.inside) == ["e", "f", "g"]

    run(test)


def test_where_nobody_comes_again_the_next_rounds_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(asks: Asks) -> None:
        await asks.ask("a", "b", "c", "d")
        await asks.let_go("a")
        monkeypatch.setattr("ipamd.rounds._GATHER_S", 0.0)
        await asks.let_go("b", "c", "d")
        await asyncio.sleep(0.01)
        monkeypatch.setattr("ipamd.rounds._GATHER_S", 3600.0)
        await asks.ask("e", "f", "g", "h")
        assert list(asks.inside) == ["e"]
        await asks.let_go("e")
        await asks.let_go("f", "g", "h")
        await asks.ask("i")  # once more in vain it would have been
        assert list(asks.inside) == ["i"]

    run(test)


def test_a_round_that_takes_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(asks: Asks) -> None:
        monkeypatch.setattr("ipamd.rounds._LONGEST_S", 0.0)
        await asks.ask("slow", "b", "c")
        await asyncio.sleep(0.01)
        assert sorted(asks.inside) == ["b", "c", "slow"]
        await asks.let_go("slow")
        await asks.ask("d")
        await asyncio.sleep(0.01)
        assert "d" in asks.inside

    run(test)


def test_a_round_has_an_end_and_who_gave_up_is_no_part_of_it() -> None:
    async def test(asks: Asks) -> None:
        await asks.ask("first")
        tasks = await asks.ask(*(f"{number}" for number in range(MOST_ASKS + 2)))
        tasks[0].cancel()
        await settled()
        await asks.let_go("first")
        assert len(asks.inside) == MOST_ASKS
        await asks.let_go(*tuple(asks.inside))
        # Of 33 who were at work 32 count, and 28 of these are enough; one waits already.
        await asks.ask(*(f"again {number}" for number in range(27)))
        assert len(asks.inside) == 28

    run(test)


def test_who_is_let_in_and_gives_up_at_the_same_moment_leaves() -> None:
    async def test(asks: Asks) -> None:
        await asks.ask("a")
        (task,) = await asks.ask("b")
        asks.rounds.leave(asks.inside.pop("a"))  # lets b in, which has not run yet
        task.cancel()
        await settled()
        assert not asks.inside
        await asks.ask("c")
        assert list(asks.inside) == ["c"]

    run(test)
