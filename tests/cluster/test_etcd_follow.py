"""Who follows a prefix: nothing is listed anew where the connection breaks, and a stranger's key ends nothing."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from cluster.etcd import Etcd, Event, Pair
from cluster.watch import shown
from ipamd.member.addresses import changes
from ipamd.member.follow import Follower
from tests.cluster.loop import connected, looped, until
from tests.cluster.relay import relayed
from tests.etcd import VERSIONS, EtcdCluster

pytestmark = pytest.mark.kernel

# As a program gets it among its arguments.
STRANGE = "\udcff\udcfe"


@pytest.fixture(scope="module", params=VERSIONS)
def three(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with EtcdCluster(3, request.param) as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    return f"/{uuid.uuid4()}/"


class Seen:
    """What a follower of n/ was told, and how often etcd was asked for what is there."""

    def __init__(self, etcd: Etcd) -> None:
        self.lists: list[list[str]] = []
        self.went_back: list[bool] = []  # at each list
        self.changes: list[str] = []
        self.ranges = 0
        self.follower = Follower(etcd, "n/", self._listed, self._changed)
        call = etcd._endpoints.call

        async def counted(method: str, *arguments: Any, **options: Any) -> Any:
            self.ranges += method == "Range"
            return await call(method, *arguments, **options)

        etcd._call = etcd._endpoints.call = counted  # type: ignore[method-assign]

    async def _listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        self.lists.append([pair.key for pair in pairs])
        self.went_back.append(self.follower.went_back)

    async def _changed(self, events: Sequence[Event]) -> None:
        self.changes += [f"{event.kind} {event.pair.key}" for event in events]

    async def until_listed(self, times: int) -> None:
        await until(lambda: asyncio.sleep(0, len(self.lists) == times), f"list {times}")

    async def until(self, *wanted: str) -> None:
        async def told() -> bool:
            return self.changes == list(wanted)

        await until(told, f"{wanted}, told: {self.changes}")


@asynccontextmanager
async def following(etcd: Etcd) -> AsyncIterator[Seen]:
    seen = Seen(etcd)
    task = asyncio.create_task(seen.follower.run())
    try:
        await seen.follower.synced.wait()
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@looped
async def test_a_broken_connection_costs_no_list(three: EtcdCluster, prefix: str) -> None:
    async with relayed(three.sockets, prefix) as (relay, etcd, writer):
        await writer.put("n/old", b"")
        async with following(etcd) as seen:
            wanted = []
            for number in range(3):
                await writer.put(f"n/{number}", b"")
                wanted.append(f"put n/{number}")
                await seen.until(*wanted)
                relay.cut()
                await writer.put(f"n/{number}", b"again")
                await writer.delete(f"n/{number}")
                relay.heal()
                wanted += [f"put n/{number}", f"delete n/{number}"]
                await seen.until(*wanted)
            assert relay.connections >= 4
            assert (seen.lists, seen.ranges) == ([["n/old"]], 1)
            # Only where history is gone.
            relay.cut()
            revision = await writer.put("n/new", b"")
            await writer.compact(await writer.put("n/new", b"2"))
            assert revision
            relay.heal()
            await seen.until_listed(2)
            assert (seen.lists[1], seen.ranges) == (["n/new", "n/old"], 2)


@looped
async def test_a_member_that_dies_costs_no_list(three: EtcdCluster, prefix: str) -> None:
    async with (
        connected(three.sockets, prefix) as writer,
        connected(three.sockets, prefix) as etcd,
        following(etcd) as seen,
    ):
        await writer.put("n/1", b"")
        await seen.until("put n/1")
        gone = next(one for one in three.members.values() if one.socket == etcd.state.endpoint)
        three.kill(gone)
        try:
            await writer.put("n/2", b"", repeatable=True)
            await seen.until("put n/1", "put n/2")
        finally:
            three.start(gone)
        # A member that lags behind is asked how far it is; that lists nothing.
        assert len(seen.lists) == 1


@looped
async def test_addresses_go_on_from_where_they_were(three: EtcdCluster, prefix: str) -> None:
    """They come and go with their watch; each time from the revision that they had."""
    async with connected(three.sockets, prefix) as etcd:
        seen = Seen(etcd)
        told: list[str] = []
        revision = await etcd.put("n/0", b"")
        for turn in range(3):
            for number in range(20):
                await etcd.put(f"n/{turn}-{number}", b"")
            revision = await changes(
                etcd, "n/", revision, lambda events: told.extend(event.pair.key for event in events)
            )
        assert told == [f"n/{turn}-{number}" for turn in range(3) for number in range(20)]
        assert seen.ranges == 0


@looped
async def test_a_key_that_is_no_text_is_left_out(
    three: EtcdCluster, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with connected(three.sockets, prefix) as etcd:
        for number in range(3):
            await etcd.put(f"n/{number}", b"")
            three.etcdctl("put", f"{prefix}n/{number}{STRANGE}", "x")
        # Also where it is the last one of a page, or the page.
        for page in (1, 2, 3, 500):
            pages = [one async for one in etcd.walk("n/", page=page)]
            assert [pair.key for one in pages for pair in one.pairs] == ["n/0", "n/1", "n/2"]
            assert [key for one in pages for key in one.unreadable] == [
                f"{prefix}n/{number}{STRANGE}".encode(errors="surrogateescape") for number in range(3)
            ]
        behind = await etcd.range("n/", after="n/0")
        assert ([pair.key for pair in behind.pairs], len(behind.unreadable)) == (["n/1", "n/2"], 3)
        async with following(etcd) as seen:
            for _ in range(2):
                three.etcdctl("put", f"{prefix}n/later{STRANGE}", "x")
                three.etcdctl("del", f"{prefix}n/later{STRANGE}")
            await etcd.put("n/3", b"")
            await seen.until("put n/3")
            assert seen.lists == [["n/0", "n/1", "n/2"]]
        async with aclosing(etcd.watch("n/")) as watch:
            before = (await anext(watch)).revision
            three.etcdctl("put", f"{prefix}n/0{STRANGE}", "y")
            batch = await asyncio.wait_for(anext(watch), 60)
            assert (batch.events, batch.revision > before) == ([], True)
    texts = [record.getMessage() for record in caplog.records if record.name == "cluster.watch"]
    assert len(texts) == 4, "each once"
    assert f"the key {prefix}n/later\\xff\\xfe is no UTF-8" in texts[3]


def test_a_key_as_it_is_shown() -> None:
    assert shown(b"/netloom/n/\xff\x1b[1m\n") == r"/netloom/n/\xff\x1b[1m\x0a"


@looped
async def test_a_history_that_went_back_is_said_and_listed_once_more(three: EtcdCluster, prefix: str) -> None:
    """By another who noticed: here etcd goes on, so that this follower cannot notice."""
    async with connected(three.sockets, prefix) as etcd:
        await etcd.put("n/a", b"")
        async with following(etcd) as seen:
            seen.follower.again()
            await seen.until_listed(2)
            await etcd.put("n/b", b"")
            await seen.until("put n/b")
            assert (seen.went_back, seen.follower.went_back) == ([False, True], False)


@looped
async def test_a_history_that_went_back_is_noticed() -> None:
    with EtcdCluster(1) as cluster:
        async with connected(cluster.sockets) as etcd:
            for number in range(9):
                await etcd.put(f"n/{number}", b"")
            async with following(etcd) as seen:
                cluster.kill("m1")
                cluster.members["m1"].host.run(["rm", "-r", "/run/etcd/member"])
                cluster.start("m1")
                await seen.until_listed(2)
                await etcd.put("n/new", b"")
                await seen.until("put n/new")
                assert (seen.went_back, seen.follower.went_back, seen.lists[1]) == ([False, True], False, [])
