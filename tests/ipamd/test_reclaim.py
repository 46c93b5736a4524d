"""Reclaim with a clock that is moved by hand: GC, namespaces that are gone, earlier boots."""

# ruff: noqa: ASYNC240 (what a test reads of its own directory blocks nobody)

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ipamd.engine import Engine, Transaction
from ipamd.errors import InvalidArgumentError
from ipamd.lease import Ask, Ledger
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.reclaim import Found, Live, Reclaimer
from ipamd.records import ReleaseRecords
from ipamd.store.base import Allocation, Filter, Instant, Key, Netns, StoreError
from ipamd.store.memory import MemoryStore
from tests.ipamd.clock import FakeClock

GRACE_S = 60.0


class Office:
    def __init__(self, store: MemoryStore | None = None, clock: FakeClock | None = None, records: str = "") -> None:
        self.clock = clock or FakeClock()
        self.store = store or MemoryStore()
        self.transaction = Transaction(self.store)
        self.ledger = Ledger(self.transaction, self.clock, 30.0)
        if not self.ledger.pools:
            self.ledger.create_pool("p", PoolSpec(((RangeSpec("10.1.0.0/16"),),)))
            self.store.commit()
            self.transaction.committed()
        self.engine = Engine(self.transaction)
        self.counts: dict[str, int] = {}
        self.reclaimer = Reclaimer(
            self.engine, self.ledger, self.store, self.clock, node="host", grace_s=GRACE_S, on_release=self._count
        )
        self.records = ReleaseRecords(records, self.engine, self.ledger, node="host", on_release=self._count)

    def _count(self, reason: str, count: int) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count

    async def allocate(
        self, container: str, netns: Netns | None = None, *, network: str = "n", client: str = "cni", node: str = "host"
    ) -> Allocation:
        ask = Ask(Key(node, client, network, container, "eth0"), netns or Netns(), None, ("p",))
        allocation, _ = await self.engine.run(lambda: self.ledger.allocate(ask))
        self.clock.advance(0.001)
        return allocation

    def held(self) -> list[str]:
        return [a.key.container_id for a in self.store.allocations(Filter(), limit=10_000)]


def names(found: tuple[Allocation, ...]) -> list[str]:
    return [a.key.container_id for a in found]


def run(test: Callable[[Office], Coroutine[Any, Any, None]], office: Callable[[], Office] = Office) -> None:
    async def main() -> None:
        made = office()
        try:
            await asyncio.wait_for(test(made), 60)
        finally:
            await made.engine.close()

    asyncio.run(main())


def test_collect_touches_only_what_is_its_own_and_older() -> None:
    async def test(office: Office) -> None:
        for name in ("valid", "gone", "living"):
            await office.allocate(name)
        living = await office.allocate("living")
        await office.allocate("other-network", network="m")
        await office.allocate("other-client", client="docker")
        await office.allocate("other-node", node="elsewhere")
        before = office.clock.instant()
        await office.allocate("young")
        found = await office.reclaimer.collect(
            "cni", "n", frozenset({("valid", "eth0")}), before, living=frozenset({living.generation})
        )
        assert names(found.released) == ["gone"]
        assert names(found.kept) == ["living"]
        assert office.held() == ["valid", "living", "other-network", "other-client", "other-node", "young"]
        assert office.counts == {"gc": 1}

    run(test)


def test_collect_in_many_pages() -> None:
    async def test(office: Office) -> None:
        for number in range(1000):
            await office.allocate(f"c{number}")
        valid = frozenset((f"c{number}", "eth0") for number in range(0, 1000, 10))
        found = await office.reclaimer.collect("cni", "n", valid, office.clock.instant())
        assert len(found.released) == 900
        assert office.held() == [f"c{number}" for number in range(0, 1000, 10)]

    run(test)


def test_what_asked_again_during_the_gc_is_kept() -> None:
    async def test(office: Office) -> None:
        await office.allocate("a")
        before = office.clock.instant()
        office.clock.advance(1)
        await office.allocate("a")
        found = await office.reclaimer.collect("cni", "n", frozenset(), before)
        assert found == Found()

    run(test)


@pytest.mark.parametrize(
    ("netns", "alive"),
    [
        (Netns(1, 11), True),
        (Netns(1, 99), False),  # the inode lives on, in another namespace
        (Netns(9, 11), True),  # the cookie decides
        (Netns(9, 99), False),
        (Netns(1, 0), True),
        (Netns(9, 0), False),
        (Netns(3, 99), True),  # the report does not know that one's cookie
        (Netns(0, 0), True),  # unknown: never judged
        (Netns(0, 99), False),
    ],
)
def test_namespaces_are_known_by_cookie_else_by_inode(netns: Netns, alive: bool) -> None:
    live = Live.of([(1, 11), (2, 12), (3, 0)])
    assert live.may_hold(netns) is alive


def test_namespaces_without_any_cookie() -> None:
    live = Live.of([(1, 0)])
    assert live.may_hold(Netns(1, 77))
    assert not live.may_hold(Netns(2, 77))
    assert live.may_hold(Netns(0, 77))


def test_a_namespace_must_be_missing_twice_with_the_grace_between() -> None:
    async def test(office: Office) -> None:
        await office.allocate("dead", Netns(5))
        await office.allocate("alive", Netns(1))
        await office.allocate("unknown")
        live = Live.of([(1, 0)])
        first = await office.reclaimer.report(office.clock.instant(), live)
        assert (names(first.released), names(first.kept)) == ([], ["dead"])
        office.clock.advance(GRACE_S - 1)
        second = await office.reclaimer.report(office.clock.instant(), live)
        assert (names(second.released), names(second.kept)) == ([], ["dead"])
        office.clock.advance(1)
        trial = await office.reclaimer.report(office.clock.instant(), live, dry_run=True)
        assert names(trial.released) == ["dead"]
        assert office.held() == ["dead", "alive", "unknown"]
        third = await office.reclaimer.report(office.clock.instant(), live)
        assert names(third.released) == ["dead"]
        assert office.held() == ["alive", "unknown"]
        assert office.counts == {"netns": 1}

    run(test)


def test_a_namespace_that_was_seen_again_is_suspected_anew() -> None:
    async def test(office: Office) -> None:
        await office.allocate("a", Netns(5))
        gone, there = Live.of([(1, 0)]), Live.of([(1, 0), (5, 0)])
        for live in (gone, there, gone):
            found = await office.reclaimer.report(office.clock.instant(), live)
            assert found.released == ()
            office.clock.advance(GRACE_S)
        assert names((await office.reclaimer.report(office.clock.instant(), gone)).released) == ["a"]

    run(test)


def test_an_allocate_ends_the_suspicion() -> None:
    async def test(office: Office) -> None:
        await office.allocate("a", Netns(5))
        live = Live.of([(1, 0)])
        await office.reclaimer.report(office.clock.instant(), live)
        office.clock.advance(GRACE_S)
        await office.allocate("a", Netns(6))  # a new namespace, that the reports below do not know either
        office.clock.advance(1)
        assert (await office.reclaimer.report(office.clock.instant(), live)).released == ()
        office.clock.advance(GRACE_S)
        assert names((await office.reclaimer.report(office.clock.instant(), live)).released) == ["a"]

    run(test)


def test_what_is_younger_than_the_report_is_not_judged() -> None:
    async def test(office: Office) -> None:
        at = office.clock.instant()
        await office.allocate("a", Netns(5))
        live = Live.of([(1, 0)])
        assert await office.reclaimer.report(at, live) == Found()
        office.clock.advance(GRACE_S)
        assert await office.reclaimer.report(at, live) == Found()

    run(test)


def test_a_dry_run_is_no_observation() -> None:
    async def test(office: Office) -> None:
        await office.allocate("a", Netns(5))
        live = Live.of([(1, 0)])
        for _ in range(3):
            office.clock.advance(GRACE_S)
            found = await office.reclaimer.report(office.clock.instant(), live, dry_run=True)
            assert (names(found.released), names(found.kept)) == ([], ["a"])

    run(test)


def test_reports_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(office: Office) -> None:
        with pytest.raises(InvalidArgumentError, match="not whole"):
            await office.reclaimer.report(office.clock.instant(), Live.of([]))
        with pytest.raises(InvalidArgumentError, match="of boot boot-0"):
            await office.reclaimer.report(Instant("boot-0", 1), Live.of([(1, 0)]))

    run(test)


def test_a_reboot() -> None:
    """The first look is at the start, the second a grace later; what asked again meanwhile is of this boot."""
    store, clock = MemoryStore(), FakeClock()

    async def before(office: Office) -> None:
        for name in ("gone", "back", "foreign"):
            await office.allocate(name, Netns(5), node="elsewhere" if name == "foreign" else "host")
        await office.allocate("unknown")
        await office.allocate("gateway", client="docker")
        await office.allocate("container", Netns(6), client="docker")

    async def after(office: Office) -> None:
        assert await office.reclaimer.earlier_boots() == Found()
        office.clock.advance(GRACE_S - 1)
        assert await office.reclaimer.earlier_boots() == Found()
        # A report of this boot says nothing about what an earlier one left.
        assert await office.reclaimer.report(office.clock.instant(), Live.of([(1, 0)])) == Found()
        await office.allocate("back")
        office.clock.advance(1)
        assert names((await office.reclaimer.earlier_boots()).released) == ["gone", "unknown", "container"]
        assert office.held() == ["back", "foreign", "gateway"]
        assert office.counts == {"boot": 3}
        assert await office.reclaimer.earlier_boots() == Found()

    run(before, lambda: Office(store, clock))
    clock.boot_id, clock.ns = "boot-2", int(3e9)
    run(after, lambda: Office(store, clock))


RECORD = """{"version": 1, "key": {"node": "%s", "client": "cni", "network": "n", "container_id": "%s",
 "ifname": "eth0"}, "generation": %d, "before": {"boot_id": "%s", "boottime_ns": %d}, "request_id": "feed"}"""


def record(container: str, at: Instant, generation: int = 0, node: str = "host") -> str:
    return RECORD % (node, container, generation, at.boot_id, at.boottime_ns)


def test_release_records_are_replayed_and_removed(tmp_path: Path) -> None:
    async def test(office: Office) -> None:
        held = {name: await office.allocate(name) for name in ("a", "b", "c", "d")}
        at = office.clock.instant()
        await office.allocate("young")
        (tmp_path / "1.json").write_text(record("a", at))
        (tmp_path / "2.json").write_text(record("b", at, node=""))
        (tmp_path / "3.json").write_text(record("young", at))
        (tmp_path / "4.json").write_text(record("absent", at))
        (tmp_path / "5.json").write_text(record("c", at, held["c"].generation))
        (tmp_path / "6.json").write_text(record("d", at, held["d"].generation + 1))
        (tmp_path / ".7.json").write_text(record("d", at))  # being written
        (tmp_path / "8.json.tmp").write_text(record("d", at))
        assert await office.records.replay() == 3
        assert office.held() == ["d", "young"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [".7.json", "8.json.tmp"]
        assert office.counts == {"replay": 3}
        assert await office.records.replay() == 0

    run(test, lambda: Office(records=str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"version": 2, "key": {}, "before": {}}',
        record("a", Instant("boot-1", 1)).replace('"version": 1', '"version": 2').encode(),
        record("", Instant("boot-1", 1)).encode(),
        record("a", Instant("", 1)).encode(),
        record("a", Instant("boot-1", 1), -1).encode(),
        record("a", Instant("boot-1", 1 << 60), 1 << 63).encode(),
        record("a", Instant("boot-1", 1)).replace("1,", '"1",', 1).encode(),
        b'{"version": 1}' + b" " * (1 << 17),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_what_is_no_record_is_set_aside(tmp_path: Path, content: bytes) -> None:
    async def test(office: Office) -> None:
        await office.allocate("a")
        (tmp_path / "x.json").write_bytes(content)
        assert await office.records.replay() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["x.json.bad"]
        assert office.held() == ["a"]

    run(test, lambda: Office(records=str(tmp_path)))


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    async def test(office: Office) -> None:
        target = tmp_path / "target"
        target.write_text(record("a", office.clock.instant(1)))
        await office.allocate("a")
        os.symlink(target, tmp_path / "link.json")
        os.mkfifo(tmp_path / "pipe.json")
        (tmp_path / "directory.json").mkdir()
        assert await office.records.replay() == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "directory.json.bad",
            "link.json.bad",
            "pipe.json.bad",
            "target",
        ]
        assert office.held() == ["a"]

    run(test, lambda: Office(records=str(tmp_path)))


def test_a_missing_directory_is_no_fault(tmp_path: Path) -> None:
    async def test(office: Office) -> None:
        assert await office.records.replay() == 0
        office.records.prepare()
        assert await office.records.replay() == 0

    run(test, lambda: Office(records=str(tmp_path / "run" / "releases")))


def test_a_record_waits_while_the_store_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(office: Office) -> None:
        await office.allocate("a")
        (tmp_path / "1.json").write_text(record("a", office.clock.instant()))

        def fail() -> None:
            raise StoreError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(office.store, "commit", fail)
            assert await office.records.replay() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["1.json"]
        assert office.held() == ["a"]
        assert await office.records.replay() == 1
        assert office.held() == []

    run(test, lambda: Office(records=str(tmp_path)))
