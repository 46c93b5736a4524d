"""The client against one member of each version: pairs, transactions, leases, watches, limits."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import pytest

import cluster.watch as watch_module
from cluster.etcd import (
    Batch,
    CompactedError,
    Delete,
    EtcdError,
    Event,
    Get,
    List,
    Put,
    QuotaError,
    TooLargeError,
    absent,
    equals,
    present,
    unchanged,
)
from cluster.leases import LeaseKeeper
from tests.cluster.loop import connected, looped, until
from tests.cluster.relay import relayed
from tests.etcd import VERSIONS, EtcdCluster, Version
from tests.hosts import PATIENCE_S

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=VERSIONS)
def one(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    """A member that tells watchers every second how far they are."""
    with EtcdCluster(1, request.param, arguments=["--experimental-watch-progress-notify-interval=1s"]) as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    return f"/{uuid.uuid4()}/"


@looped
async def test_pairs(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd, connected(one.sockets, prefix[:-1]) as outside:
        assert etcd.state.endpoint == ""
        assert await etcd.get("a") is None
        assert (etcd.state.connected, etcd.state.endpoint) == (True, one.sockets[0])
        revision = await etcd.put("a", b"\x00\xff")
        pair = await etcd.get("a")
        assert pair is not None
        assert (pair.key, pair.value, pair.version, pair.lease) == ("a", b"\x00\xff", 1, 0)
        assert pair.create_revision == pair.mod_revision == revision
        # Keys are below the prefix, and what is not is not seen.
        assert await outside.get("/a") == pair.__class__("/a", b"\x00\xff", revision, revision, 1, 0)
        await outside.put("0", b"neighbour")
        assert await etcd.count("") == 1
        for number in range(9):
            await etcd.put(f"b/{number}", b"")
        await etcd.put("b0", b"")
        page = await etcd.range("b/", limit=4)
        assert [pair.key for pair in page.pairs] == ["b/0", "b/1", "b/2", "b/3"]
        assert page.more
        page = await etcd.range("b/", after="b/6", keys_only=True)
        assert [pair.key for pair in page.pairs] == ["b/7", "b/8"]
        assert not page.more
        assert await etcd.count("b/") == 9
        assert await etcd.delete("b/0") == 1
        assert await etcd.delete("b/0") == 0
        assert await etcd.delete("b/", prefix=True) == 8
        assert [pair.key for pair in (await etcd.range("")).pairs] == ["a", "b0"]


@looped
async def test_a_walk_shows_one_moment(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        for number in range(10):
            await etcd.put(f"k/{number}", b"old")
        seen, revisions = [], set()
        async for page in etcd.walk("k/", page=3):
            seen += page.pairs
            revisions.add(page.revision)
            await etcd.delete("k/9")
            await etcd.put("k/5", b"new")
            await etcd.put("k/55", b"new")
        assert [pair.key for pair in seen] == [f"k/{number}" for number in range(10)]
        assert {pair.value for pair in seen} == {b"old"}
        assert len(revisions) == 1
        assert [page.pairs async for page in etcd.walk("nothing/")] == [[]]
        # What was compacted away meanwhile cannot be walked on.
        with pytest.raises(CompactedError):
            async for _ in etcd.walk("k/", page=3):
                await etcd.compact(await etcd.put("x", b""))


@looped
async def test_transactions(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        first = await etcd.txn([absent("a")], [Put("a", b"1"), Put("b", b"2")], [Get("a")])
        assert first.succeeded
        second = await etcd.txn([absent("a")], [Put("a", b"3")], [Get("b"), Get("none"), Get("a")])
        assert not second.succeeded
        assert [pair and pair.value for pair in second.pairs] == [b"2", None, b"1"]
        # As it is when the transaction is over; what it changed is in it.
        third = await etcd.txn([], [Put("l/2", b"y"), List("l/", 9), Put("l/1", b"x"), List("l/", 1), List("m/", 9)])
        assert [[(pair.key, pair.value) for pair in page.pairs] for page in third.pages] == [
            [("l/2", b"y")], [("l/1", b"x")], []
        ]  # fmt: skip
        assert [(page.revision, page.more) for page in third.pages] == [
            (third.revision, False), (third.revision, True), (third.revision, False)
        ]  # fmt: skip
        assert await etcd.delete("l/", prefix=True) == 2
        assert second.pairs[0] is not None
        assert second.pairs[0].mod_revision == first.revision
        assert (await etcd.txn([present("a"), equals("b", b"2"), unchanged("a", first.revision)], [])).succeeded
        for refused in (present("none"), equals("b", b"x"), unchanged("a", first.revision - 1), absent("a")):
            assert not (await etcd.txn([refused], [Put("no", b"")])).succeeded
        third = await etcd.txn([], [Delete("a"), Put("c/1", b""), Get("b")])
        assert (third.deleted, len(third.pairs)) == (1, 1)
        assert (await etcd.txn([], [Delete("c/", prefix=True), Delete("none")])).deleted == 1
        assert [pair.key for pair in (await etcd.range("")).pairs] == ["b"]


@looped
async def test_what_is_too_large(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        with pytest.raises(TooLargeError, match="max-request-bytes"):
            await etcd.put("a", b"x" * (2 << 20))
        with pytest.raises(TooLargeError, match="max-txn-ops"):
            await etcd.txn([], [Put(f"{number}", b"") for number in range(129)])
        with pytest.raises(EtcdError, match="duplicate key"):
            await etcd.txn([], [Put("a", b""), Put("a", b"")])
        assert await etcd.count("") == 0


@looped
async def test_a_lease_ends_with_its_keys(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        lease = await etcd.grant(1)
        await etcd.put("a", b"", lease.id)
        kept = await etcd.grant(60)
        await etcd.put("b", b"", kept.id)
        assert await etcd.keep_alive_once(kept.id) == 60
        assert 0 < await etcd.time_to_live(kept.id) <= 60

        async def gone() -> bool:
            return await etcd.get("a") is None

        await until(gone, "the end of a lease")
        assert await etcd.keep_alive_once(lease.id) == 0
        assert await etcd.time_to_live(lease.id) == 0
        await etcd.revoke(kept.id)
        await etcd.revoke(kept.id)
        assert await etcd.count("") == 0
        with pytest.raises(EtcdError, match="lease not found"):
            await etcd.put("c", b"", kept.id)


@looped
async def test_a_kept_lease_lives_and_its_loss_is_told(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        told: list[int] = []
        lease = await etcd.grant(2)
        await etcd.put("a", b"", lease.id)
        keeper = LeaseKeeper(etcd, lease, told.append)
        begun = keeper.last_renewed_ns
        lives = (lease.ttl_s + 3) * 10**9

        async def long_enough() -> bool:
            return keeper.last_renewed_ns > begun + lives

        await until(long_enough, "renewals")
        assert await etcd.get("a") is not None
        await etcd.revoke(lease.id)
        await asyncio.wait_for(keeper.lost(), PATIENCE_S)
        assert keeper.is_lost
        assert told == [keeper.last_renewed_ns]
        await keeper.close()


async def _next(watch: AsyncGenerator[Batch, None]) -> Batch:
    return await asyncio.wait_for(anext(watch), PATIENCE_S)


async def _events(watch: AsyncGenerator[Batch, None], count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        events += (await _next(watch)).events
    return events


@looped
async def test_a_watch_tells_what_happens(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd, aclosing(etcd.watch("n/")) as watch:
        assert (await _next(watch)).events == []
        first = await etcd.put("n/a", b"1")
        await etcd.put("other", b"")
        await etcd.put("n/a", b"2")
        await etcd.delete("n/a")
        created, changed, deleted = await _events(watch, 3)
        assert (created.kind, created.pair.key, created.pair.value, created.previous) == ("put", "n/a", b"1", None)
        assert (changed.kind, changed.pair.value) == ("put", b"2")
        assert changed.previous is not None
        assert changed.previous.mod_revision == first
        assert (deleted.kind, deleted.pair.key) == ("delete", "n/a")
        assert deleted.previous is not None
        assert deleted.previous.value == b"2"
        # All of one transaction comes in one batch.
        done = await etcd.txn([], [Put(f"n/{number}", b"") for number in range(50)])
        batch = await _next(watch)
        while not batch.events:
            batch = await _next(watch)
        assert (len(batch.events), batch.revision) == (50, done.revision)
        # And from the past.
        async with aclosing(etcd.watch("n/", first)) as past:
            assert len(await _events(past, 53)) == 53


@looped
async def test_a_quiet_watch_hears_how_far_it_is(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd, aclosing(etcd.watch("n/")) as watch:
        begun = (await _next(watch)).revision
        far = await etcd.put("other", b"")
        assert far > begun
        batch = await _next(watch)
        assert batch.events == []
        assert batch.revision >= far


@looped
async def test_fragments_are_put_together(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd, aclosing(etcd.watch("")) as watch:
        await _next(watch)
        for filler in (b"x", b"y"):
            # With what was there before, the second is more than etcd sends in one piece.
            done = await etcd.txn([], [Put(f"{number}", filler * 100_000) for number in range(14)])
        batches = [batch for batch in (await _next(watch), await _next(watch)) if batch.events]
        while sum(len(batch.events) for batch in batches) < 28:
            batches.append(await _next(watch))
        last = batches[-1].events[-14:]
        assert {event.pair.mod_revision for event in last} == {done.revision}
        assert all(event.previous and event.previous.value[:1] == b"x" for event in last)
        assert len({event.pair.key for event in last}) == 14


@looped
async def test_history_that_is_gone(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd:
        old = await etcd.put("n/a", b"1")
        now = await etcd.put("n/a", b"2")
        async with aclosing(etcd.watch("n/")) as running:
            await _next(running)
            await etcd.compact(now)
            await etcd.compact(now)  # the same again is no fault
            # One that is there already goes on.
            await etcd.put("n/a", b"3")
            assert (await _events(running, 1))[0].pair.value == b"3"
        async with aclosing(etcd.watch("n/", old)) as late:
            with pytest.raises(CompactedError) as caught:
                await _events(late, 1)
        assert caught.value.revision == now
        with pytest.raises(CompactedError):
            await etcd.range("n/", revision=old)


@pytest.mark.parametrize("version", VERSIONS)
@looped
async def test_a_watch_over_restarts_of_etcd(version: Version) -> None:
    with EtcdCluster(1, version) as cluster:
        async with connected(cluster.sockets) as etcd, connected(cluster.sockets) as writer:
            seen: list[tuple[int, bytes]] = []
            written: list[tuple[int, bytes]] = []
            total = 600

            async def follow() -> None:
                async with aclosing(etcd.watch("n/", 1)) as watch:
                    async for batch in watch:
                        assert all(event.pair.mod_revision <= batch.revision for event in batch.events)
                        seen.extend((event.pair.mod_revision, event.pair.value) for event in batch.events)
                        if len(seen) >= total:
                            return

            async def write() -> None:
                for number in range(total):
                    value = b"%d" % number
                    done = await writer.txn([], [Put("n/a", value)])
                    written.append((done.revision, value))
                    if number % 200 == 100:
                        await asyncio.to_thread(cluster.stop, "m1")
                        cluster._launch("m1")

            # In this thread, as a process that ends with its parent ends with the thread that started it.
            await asyncio.wait_for(asyncio.gather(follow(), write()), 4 * PATIENCE_S)
            assert seen == written


@looped
async def test_a_watch_whose_history_went_while_it_was_away(one: EtcdCluster, prefix: str) -> None:
    async with relayed(one.sockets, prefix) as (relay, etcd, writer), aclosing(etcd.watch("n/")) as watch:
        await _next(watch)
        relay.cut()
        for number in range(5):
            revision = await writer.put("n/a", b"%d" % number)
        await writer.compact(revision)
        relay.heal()
        with pytest.raises(CompactedError) as caught:
            await _events(watch, 1)
        assert caught.value.revision == revision


@pytest.mark.parametrize("version", VERSIONS)
@looped
async def test_a_watch_when_etcd_begins_anew(version: Version) -> None:
    with EtcdCluster(1, version) as cluster:
        async with connected(cluster.sockets) as etcd, aclosing(etcd.watch("n/")) as watch:
            await _next(watch)
            for number in range(10):
                await etcd.put("n/a", b"%d" % number)
            await _events(watch, 10)
            cluster.stop("m1")
            cluster.members["m1"].host.run(["rm", "-rf", "/run/etcd/member"])
            cluster.start("m1")
            # It would wait in vain for revisions that come again.
            with pytest.raises(CompactedError, match="restored from a backup, or begun anew"):
                await _events(watch, 1)


@looped
async def test_a_watch_that_hears_nothing_looks_elsewhere(
    one: EtcdCluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "QUIET_S", 2.0)
    async with relayed(one.sockets, prefix) as (relay, etcd, writer), aclosing(etcd.watch("n/")) as watch:
        await _next(watch)
        connections = relay.connections
        # Nothing comes any more, the pings' answers neither; a new connection is like the first.
        relay.silence()
        await writer.put("n/a", b"1")
        assert [event.pair.key for event in await _events(watch, 1)] == ["n/a"]
        assert relay.connections > connections


@looped
async def test_a_closed_client(one: EtcdCluster, prefix: str) -> None:
    async with connected(one.sockets, prefix) as etcd, aclosing(etcd.watch("n/")) as watch:
        await _next(watch)
        waiting = asyncio.create_task(_next(watch))
        await asyncio.sleep(0)
        await etcd.close()
        with pytest.raises(EtcdError, match="closed"):
            await waiting
        with pytest.raises(EtcdError, match="closed"):
            await etcd.get("a")


@pytest.mark.parametrize("version", VERSIONS)
@looped
async def test_the_quota(version: Version) -> None:
    with EtcdCluster(1, version, quota_bytes=16 << 20) as cluster:
        async with connected(cluster.sockets) as etcd:
            await asyncio.to_thread(cluster.fill, "/netloom/fill/")
            for attempt in (etcd.put("a", b""), etcd.txn([absent("a")], [Put("a", b"")]), etcd.grant(10)):
                with pytest.raises(QuotaError, match=r"defragment every member.*disarm the alarm"):
                    await attempt
            assert await etcd.get("a") is None
            (status,) = await etcd.status()
            assert status.alarms == ("NOSPACE",)
            assert status.version.startswith(version)
            assert status.leader
            full = status.db_bytes
            assert await etcd.delete("fill/", prefix=True) > 0
            await etcd.compact((await etcd.status())[0].revision)
            await etcd.defragment(cluster.sockets[0])
            await etcd.disarm()
            (status,) = await etcd.status()
            assert status.alarms == ()
            assert status.db_bytes < full / 2
            await etcd.put("a", b"")
