"""The stream of events: what a watcher hears, from where it may go on, and that nothing is kept for it."""

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from ipamd import events
from ipamd.client import IpamError
from ipamd.engine import Engine, Transaction
from ipamd.errors import OutOfRangeError
from ipamd.events import Events
from ipamd.lease import Ask, Ledger
from ipamd.store import base, memory, sqlite
from ipamd.store.base import Event, Netns, Store
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from tests.ipamd.clock import FakeClock
from tests.ipamd.daemon import Daemon, key, own, wait_for
from tests.ipamd.test_lease import key as key_of
from tests.ipamd.test_lease import spec

LIMIT_S = 60.0
Stream = AsyncIterator[tuple[int, list[Event]]]


class Office:
    """An engine with a ledger that has one large pool, and its events."""

    def __init__(self, store: Store) -> None:
        transaction = Transaction(store)
        self.store = store
        self.engine = Engine(transaction)
        self.ledger = Ledger(transaction, FakeClock(), 0.0)
        self.events = Events(self.engine, store)

    async def open(self) -> None:
        await self.engine.run(lambda: self.ledger.create_pool("p", spec("10.0.0.0/8")))

    async def turn(self, *containers: str) -> None:
        """Each container comes and goes."""
        for container in containers:
            ask = Ask(key_of(container), Netns(), None, ("p",))
            await self.engine.run(lambda ask=ask: self.ledger.allocate(ask))  # type: ignore[misc]
            await self.engine.run(lambda ask=ask: self.ledger.release(ask.key))  # type: ignore[misc]


@contextlib.asynccontextmanager
async def office(kind: str, path: Path) -> AsyncIterator[Office]:
    store: Store = MemoryStore() if kind == "memory" else SqliteStore(str(path / "s.db"))
    made = Office(store)
    try:
        await made.open()
        yield made
    finally:
        await made.engine.close()
        store.close()


async def take(stream: Stream, count: int) -> list[Event]:
    """The next events; waits for them."""
    found: list[Event] = []
    async with asyncio.timeout(LIMIT_S):
        while len(found) < count:
            _, page = await anext(stream)
            found += page
    assert len(found) == count
    return found


@pytest.fixture(params=["memory", "sqlite"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_watcher_hears_all_from_now_on_in_order(kind: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with office(kind, tmp_path) as desk:
            await desk.turn("before")
            stream = desk.events.follow(0)
            revision, first = await anext(stream)
            assert not first
            assert revision == desk.store.event_bounds()[1]
            hearing = asyncio.create_task(take(stream, 6))
            await desk.turn("a", "b", "c")
            heard = await hearing
            assert [(e.kind, e.allocation.key.container_id) for e in heard] == [
                (kind, container) for container in "abc" for kind in ("allocated", "released")
            ]
            revisions = [event.revision for event in heard]
            assert revisions == sorted(set(revisions))
            assert revisions[0] > revision

    asyncio.run(story())


def test_it_goes_on_from_any_revision_that_is_remembered(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_PAGE", 3)

    async def story() -> None:
        async with office(kind, tmp_path) as desk:
            await desk.turn(*"abcd")
            every = await take(desk.events.follow(1), 7)
            assert [event.revision for event in every] == list(range(2, 9))
            for after in range(2, 8):
                assert await take(desk.events.follow(after), 8 - after) == every[after - 1 :]

    asyncio.run(story())


def test_what_is_forgotten_or_to_come_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, memory, sqlite):
        monkeypatch.setattr(module, "EVENTS_KEPT", 4)

    async def story() -> None:
        async with office(kind, tmp_path) as desk:
            late = desk.events.follow(0)
            await anext(late)
            await desk.turn(*"abcdef")
            oldest, newest = desk.store.event_bounds()
            assert oldest > 2
            with pytest.raises(OutOfRangeError, match=f"the oldest is {oldest}; list .* watch from {newest}") as caught:
                await take(desk.events.follow(oldest - 2), 1)
            assert caught.value.newest == newest
            assert len(await take(desk.events.follow(oldest - 1), newest - oldest + 1)) == newest - oldest + 1
            with pytest.raises(OutOfRangeError, match="yet to come"):
                await take(desk.events.follow(newest + 1), 1)
            # Who has not read in time is told so, and not left with a gap.
            with pytest.raises(OutOfRangeError, match="no longer remembered"):
                await take(late, 1)

    asyncio.run(story())


def test_watchers_that_do_not_read_cost_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with office("sqlite", tmp_path) as desk:
            streams = [desk.events.follow(0) for _ in range(200)]
            for stream in streams:
                await anext(stream)
            tracemalloc.start()
            try:
                await desk.turn(*map(str, range(50)))
                before, _ = tracemalloc.get_traced_memory()
                await desk.turn(*map(str, range(500)))
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            # 1,000 events, each of more than 300 bytes: one queue for all would be 300 KB, one for each 60 MB.
            assert after - before < 100_000
            assert len(await take(streams[7], 1100)) == 1100

    asyncio.run(story())


# Over the socket


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("ipamd")) as running:
        yield running


def test_watch_over_the_socket_and_over_a_restart(daemon: Daemon) -> None:
    with daemon.client() as client, daemon.client() as other:
        pages = client.watch_allocations()
        begin = next(pages)
        assert not begin.events
        made = other.allocate(key("a"), network_pool=own("10.9.0.0/16"))
        (event,) = next(pages).events
        assert event.kind == "allocated"
        assert event.allocation.generation == made.generation
        assert [a.cidr for a in event.allocation.addresses] == ["10.9.0.2/16"]
        assert event.unix_s > 1_500_000_000
        other.release(key("a"))
        assert daemon.stop() == 0
        heard = []
        with pytest.raises(IpamError) as caught:
            heard = [event.kind for page in pages for event in page.events]
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert heard in ([], ["released"])
    daemon.start()
    with daemon.client() as client:
        pages = client.watch_allocations(event.revision)
        again = [one for _, page in zip(range(2), pages, strict=False) for one in page.events]
        assert [(one.kind, one.revision) for one in again] == [("released", event.revision + 1)]


def test_a_revision_of_another_store_is_refused(daemon: Daemon) -> None:
    with daemon.client() as client, pytest.raises(IpamError, match="list the allocations, then watch from") as caught:
        next(client.watch_allocations(1 << 40))
    assert caught.value.code is grpc.StatusCode.OUT_OF_RANGE


def test_a_watcher_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with Daemon(tmp_path) as running, running.client() as client:
        next(client.watch_allocations())
        assert running.stop() == 0
        wait_for("the end", lambda: running.process is not None and running.process.poll() == 0)
