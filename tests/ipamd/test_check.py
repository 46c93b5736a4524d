"""A check of the store against what the kernel shows, with a ledger and an engine but no daemon."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from ipamd.check import Checker, Difference, Further, KernelAddress, Report
from ipamd.desk import Desk
from ipamd.engine import Engine, Transaction
from ipamd.errors import InvalidArgumentError
from ipamd.lease import Ask, Ledger
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.store.base import Allocation, Instant, Key, Netns, Reservation
from ipamd.store.memory import MemoryStore
from tests.ipamd.clock import FakeClock

T = TypeVar("T")
SECOND = 1_000_000_000
GRACE_S = 60


class World:
    """A store with one pool, and a checker."""

    def __init__(self, *further: Callable[[], Awaitable[Further]]) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore()
        self.transaction = Transaction(self.store)
        self.ledger = Ledger(self.transaction, self.clock, 30)
        self.engine = Engine(self.transaction)
        self.checker = Checker(
            self.engine,
            self.ledger,
            self.store,
            self.clock,
            node="n1",
            grace_s=GRACE_S,
            reserve=Desk(self.engine, self.ledger).reserve,
            further=further,
        )

    async def pool(self, name: str = "blue", subnet: str = "10.1.0.0/24") -> None:
        spec = PoolSpec(((RangeSpec(subnet),),))
        await self.engine.run(lambda: self.ledger.create_pool(name, spec))

    async def allocate(self, container: str, inode: int, pool: str = "blue") -> Allocation:
        ask = Ask(Key("n1", "cni", "net", container, "eth0"), Netns(inode), None, (pool,))
        made, _ = await self.engine.run(lambda: self.ledger.allocate(ask))
        self.clock.advance(1)
        return made

    def now(self) -> Instant:
        return Instant(self.clock.boot_id, self.clock.now_ns())

    async def check(self, *kernel: KernelAddress, repair: bool = False) -> Report:
        return await self.checker.check(kernel, self.now(), repair)


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def whole() -> T:
        return await test()

    return asyncio.run(whole())


def kinds(report: Report) -> list[tuple[str, str]]:
    return [(one.kind, one.address) for one in report.differences]


def on(ip: str, inode: int) -> KernelAddress:
    return KernelAddress(ip, inode, "eth0")


def test_nothing_to_say_where_both_agree() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.allocate("a", 11)
        await world.allocate("b", 12)
        report = await world.check(on("10.1.0.2", 11), on("10.1.0.3", 12), on("fe80::1", 12), on("172.16.0.1", 12))
        assert report == Report((), 2, 0)

    run(test)


def test_an_address_that_left_its_interface_is_released_when_it_was_found_twice_a_grace_apart() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        held = await world.allocate("a", 11)
        first = await world.check(repair=True)
        assert kinds(first) == [("leaked", "10.1.0.2")]
        assert "a/eth0 of network net" in first.differences[0].text
        assert not first.differences[0].repaired
        world.clock.advance(GRACE_S - 1)
        assert not (await world.check(repair=True)).differences[0].repaired
        world.clock.advance(2)
        assert not (await world.check()).differences[0].repaired, "not asked to"
        mended = (await world.check(repair=True)).differences
        assert [one.repaired for one in mended] == [True]
        assert world.store.find(held.key) is None
        assert (await world.check()).differences == ()

    run(test)


def test_a_difference_that_went_away_in_between_begins_anew() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.allocate("a", 11)
        await world.check()
        world.clock.advance(GRACE_S)
        assert (await world.check(on("10.1.0.2", 11))).differences == ()
        again = (await world.check(repair=True)).differences
        assert [one.repaired for one in again] == [False]

    run(test)


def test_what_is_younger_than_the_look_is_not_judged() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        at = world.now()
        world.clock.advance(1)
        await world.allocate("a", 11)
        assert (await world.checker.check([], at, True)).differences == ()

    run(test)


def test_an_address_in_another_namespace_than_its_holders_is_not_released() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.allocate("a", 11)
        found = (await world.check(on("10.1.0.2", 99))).differences
        assert [(one.kind, one.repairable) for one in found] == [("leaked", False)]
        assert "namespace 99, eth0, has" in found[0].text

    run(test)


def test_an_address_that_nobody_holds_is_reserved() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.check(on("10.1.0.2", 77))
        world.clock.advance(GRACE_S)
        mended = (await world.check(on("10.1.0.2", 77), repair=True)).differences
        assert [(one.kind, one.repaired) for one in mended] == [("missing", True)]
        holder = world.store.holder("blue", "10.1.0.2")
        assert isinstance(holder, Reservation)
        assert "eth0 in namespace 77" in holder.note
        assert (await world.allocate("b", 12)).addresses[0].ip == "10.1.0.3"
        assert (await world.check(on("10.1.0.2", 77), on("10.1.0.3", 12))).differences == ()

    run(test)


def test_an_address_that_one_of_two_pools_with_the_same_range_holds_is_not_missing() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.pool("green")
        await world.allocate("a", 11, "green")
        assert (await world.check(on("10.1.0.2", 11))).differences == ()

    run(test)


def test_one_address_in_two_namespaces_is_for_a_person_to_decide() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.allocate("a", 11)
        for _ in range(2):
            found = (await world.check(on("10.1.0.2", 11), on("10.1.0.2", 12), repair=True)).differences
            world.clock.advance(2 * GRACE_S)
        assert [(one.kind, one.repairable, one.repaired) for one in found] == [("duplicate", False, False)]
        assert "11, 12" in found[0].text

    run(test)


def test_networks_apart_may_have_the_same_addresses() -> None:
    async def test() -> None:
        world = World()
        await world.pool()
        await world.pool("green")
        await world.allocate("a", 11)
        await world.allocate("b", 12, "green")
        assert (await world.check(on("10.1.0.2", 11), on("10.1.0.2", 12))).differences == ()
        found = (await world.check(on("10.1.0.2", 11), on("10.1.0.2", 12), on("10.1.0.2", 13))).differences
        assert {one.kind for one in found} == {"duplicate"}

    run(test)


def test_what_is_asked_for_again_while_a_check_runs_is_not_released() -> None:
    async def nothing(_difference: Difference) -> bool:
        raise AssertionError("there is nothing to mend")

    async def again() -> Further:
        (world,) = worlds
        world.clock.advance(1)
        await world.allocate("a", 12)  # the same container, in a namespace of its own by now
        return Further((), 0, nothing)

    async def test() -> None:
        world = World()
        worlds.append(world)
        await world.pool()
        held = await world.allocate("a", 11)
        await world.check()
        world.clock.advance(GRACE_S)
        world.checker = Checker(
            world.engine, world.ledger, world.store, world.clock, node="n1", grace_s=0,
            reserve=Desk(world.engine, world.ledger).reserve, further=[again],
        )  # fmt: skip
        for _ in range(2):
            world.clock.advance(1)
            assert [one.repaired for one in (await world.check(repair=True)).differences] == [False]
        found = world.store.find(held.key)
        assert found is not None
        assert found.netns.inode == 12

    worlds: list[World] = []
    run(test)


def test_what_others_find_is_mended_by_them_and_a_failure_is_told() -> None:
    fails = True

    async def repair(difference: Difference) -> bool:
        if fails:
            raise InvalidArgumentError("it cannot be")
        return difference.address == "10.9.0.0/26"

    async def ask() -> Further:
        return Further((Difference("orphan-block", "p", "10.9.0.0/26", "n7", "nobody's", True),), 3, repair)

    async def test() -> None:
        nonlocal fails
        world = World(ask)
        assert (await world.check(repair=True)).blocks == 3
        world.clock.advance(GRACE_S)
        (failed,) = (await world.check(repair=True)).differences
        assert not failed.repaired
        assert failed.text == "nobody's; not mended: it cannot be"
        fails = False
        (mended,) = (await world.check(repair=True)).differences
        assert mended.repaired

    run(test)


def test_a_look_of_another_boot_and_an_address_that_is_none_are_refused() -> None:
    async def test() -> None:
        world = World()
        with pytest.raises(InvalidArgumentError, match="of this boot"):
            await world.checker.check([], Instant("another", 1), False)
        with pytest.raises(InvalidArgumentError, match="found 'x'"):
            await world.check(on("x", 1))

    run(test)
