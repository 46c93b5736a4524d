"""Follows what stands in etcd under a prefix: all of it once, then each change, whatever happens to connections."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from cluster.errors import AnotherHistoryError, CompactedError, EtcdError
from cluster.etcd import Batch, Etcd, Event, Pair
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_PAUSE_S = 1.0

Listed = Callable[[Sequence[Pair], int], Awaitable[None]]
Changed = Callable[[Sequence[Event]], Awaitable[None]]


class Follower:
    """`listed` gets the whole state and its revision, at first and again where the history was lost; `changed` what
    happens then.

    Both are awaited in turn. Where one raises, the state is listed anew.
    """

    def __init__(self, etcd: Etcd, prefix: str, listed: Listed, changed: Changed) -> None:
        self.synced = asyncio.Event()
        self.reached = 0  # all up to this revision is known
        # Where the state is listed: whether etcd's history is another than the one that was followed.
        self.went_back = False
        self._etcd = etcd
        self._prefix = prefix
        self._listed = listed
        self._changed = changed
        self._again = False
        self._step: asyncio.Future[Batch] | None = None

    def again(self) -> None:
        """Somebody else noticed that etcd's history is another one: the state is listed anew. A watch does not notice
        where the new one is as long as the old one was by now."""
        self.went_back = self._again = True
        if self._step is not None:
            self._step.cancel()

    async def run(self) -> None:
        """Never returns."""
        while True:
            try:
                await self._once()
            except CompactedError as error:
                self.went_back |= isinstance(error, AnotherHistoryError)
                log.event(_logger, "info", "etcd forgot what came in between; read anew", prefix=self._prefix)
            except EtcdError as error:
                log.event(_logger, "debug", "etcd cannot be followed", prefix=self._prefix, error=str(error))
                await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)
            except Exception as error:  # noqa: BLE001 (a fault in one change must not end the following)
                log.event(_logger, "error", "what etcd says cannot be used; it is read anew", prefix=self._prefix,
                          error=str(error), exc_info=error)  # fmt: skip
                await asyncio.sleep(_PAUSE_S)

    async def _once(self) -> None:
        self._again = False
        pairs: list[Pair] = []
        revision = 0
        async for page in self._etcd.walk(self._prefix):
            pairs += page.pairs
            revision = page.revision
        self.went_back |= revision < self.reached
        await self._listed(pairs, revision)
        self.went_back = self._again
        self.reached = revision
        self.synced.set()
        async with aclosing(self._etcd.watch(self._prefix, revision + 1)) as batches:
            while not self._again and (batch := await self._next(batches)) is not None:
                if batch.events:
                    await self._changed(batch.events)
                self.reached = batch.revision

    async def _next(self, batches: AsyncGenerator[Batch, None]) -> Batch | None:
        """None: `again` was called."""
        self._step = asyncio.ensure_future(anext(batches))
        try:
            return await self._step
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None
        finally:
            self._step = None
