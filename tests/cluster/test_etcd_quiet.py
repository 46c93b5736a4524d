"""Watches on which nothing happens: they stay, and what becomes of one says nothing wrong about etcd."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

import cluster.watch as watch_module
from cluster.etcd import Batch
from tests.cluster.loop import connected, looped, until
from tests.cluster.relay import relayed
from tests.etcd import EtcdCluster
from tests.hosts import PATIENCE_S

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    return f"/{uuid.uuid4()}/"


@asynccontextmanager
async def _awaited(watch: AsyncGenerator[Batch, None]) -> AsyncIterator[asyncio.Future[Batch]]:
    """What it tells next, while something else is done."""
    task = asyncio.ensure_future(asyncio.wait_for(anext(watch), PATIENCE_S))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Late:
    """A call whose writing of a question returns only after its answer was read, as on a machine with much to do."""

    def __init__(self, call: Any) -> None:
        self.questions = 0
        self._call = call
        self._read = asyncio.Event()

    async def write(self, request: Any) -> None:
        self._read.clear()
        await self._call.write(request)
        if request.HasField("progress_request"):
            self.questions += 1
            await self._read.wait()
            await asyncio.sleep(0.01)

    async def read(self) -> Any:
        answer = await self._call.read()
        self._read.set()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


@looped
async def test_an_answer_that_is_read_before_its_question_is_written(
    one: EtcdCluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "QUIET_S", 1.5)
    async with connected(one.sockets, prefix) as etcd:
        await etcd.get("a")
        (endpoint,) = etcd._endpoints.all
        watch, calls = endpoint.watch, list[_Late]()

        def late(**options: Any) -> _Late:
            calls.append(_Late(watch(**options)))
            return calls[-1]

        endpoint.watch = late
        async with aclosing(etcd.watch("n/")) as batches:
            await anext(batches)
            async with _awaited(batches) as following:
                await until(lambda: asyncio.sleep(0, sum(call.questions for call in calls) == 2), "a second question")
                assert len(calls) == 1, "it was taken for gone, and begun anew"
                await etcd.put("n/a", b"")
                assert [event.pair.key for event in (await following).events] == ["n/a"]


@looped
async def test_a_watch_that_is_back_says_that_etcd_is(one: EtcdCluster, prefix: str) -> None:
    """Without any call, as on a node at rest."""
    async with relayed(one.sockets, prefix) as (relay, etcd, _), aclosing(etcd.watch("n/")) as watch:
        await anext(watch)
        assert etcd.state.connected
        async with _awaited(watch):
            relay.cut()
            await until(lambda: asyncio.sleep(0, not etcd.state.connected), "the end of the connection")
            relay.heal()
            await until(lambda: asyncio.sleep(0, etcd.state.connected), "the watch")
            assert etcd.state.endpoint == relay.endpoint


@looped
async def test_a_connection_that_was_left_says_nothing_about_the_next(
    one: EtcdCluster, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is closed a while later, with the watches that are still on it."""
    caplog.set_level(logging.INFO)
    async with (
        connected(one.sockets, prefix) as etcd,
        aclosing(etcd.watch("n/")) as watch,
        aclosing(etcd.watch("n/")) as other,
    ):
        await etcd.get("a")
        await anext(watch)
        await anext(other)
        (endpoint,) = etcd._endpoints.all
        async with _awaited(watch) as first, _awaited(other) as second:
            endpoint.forget()
            await endpoint._forgotten[0].close(None)
            await until(lambda: asyncio.sleep(0, _texts(caplog, "the watch on n/ ended") == 2), "the end of both")
            await etcd.put("n/a", b"")
            for following in (first, second):
                assert [event.pair.key for event in (await following).events] == ["n/a"]
        assert _texts(caplog, "etcd: left") == 0


@looped
async def test_a_silent_connection_is_left_once(
    one: EtcdCluster, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By two watches, who notice one after the other: the second one does not end what came after it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(watch_module, "QUIET_S", 1.5)
    async with (
        relayed(one.sockets, prefix) as (relay, etcd, writer),
        aclosing(etcd.watch("n/")) as watch,
        aclosing(etcd.watch("n/")) as other,
    ):
        await anext(watch)
        await anext(other)
        relay.silence()
        await writer.put("n/a", b"")
        for one_of_them in await asyncio.wait_for(asyncio.gather(anext(watch), anext(other)), PATIENCE_S):
            assert [event.pair.key for event in one_of_them.events] == ["n/a"]
        assert _texts(caplog, "the watch on n/ ended") == 2
        assert (_texts(caplog, "etcd: left"), relay.connections) == (1, 2)


def _texts(caplog: pytest.LogCaptureFixture, begin: str) -> int:
    return sum(begin in record.getMessage() for record in caplog.records)
