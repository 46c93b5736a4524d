"""Follows what stands in etcd under a prefix: all of it once, then each change, whatever happens to connections."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from cluster.errors import CompactedError, EtcdError
from cluster.etcd import Etcd, Event, Pair
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
        self._etcd = etcd
        self._prefix = prefix
        self._listed = listed
        self._changed = changed

    async def run(self) -> None:
        """Never returns."""
        while True:
            try:
                await self._once()
            except CompactedError:
                log.event(_logger, "info", "etcd forgot what came in between; read anew", prefix=self._prefix)
            except EtcdError as error:
                log.event(_logger, "debug", "etcd cannot be followed", prefix=self._prefix, error=str(error))
                await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)
            except Exception as error:  # noqa: BLE001 (a fault in one change must not end the following)
                log.event(_logger, "error", "what etcd says cannot be used; it is read anew", prefix=self._prefix,
                          error=str(error), exc_info=error)  # fmt: skip
                await asyncio.sleep(_PAUSE_S)

    async def _once(self) -> None:
        pairs: list[Pair] = []
        revision = 0
        async for page in self._etcd.walk(self._prefix):
            pairs += page.pairs
            revision = page.revision
        await self._listed(pairs, revision)
        self.synced.set()
        async for batch in self._etcd.watch(self._prefix, revision + 1):
            if batch.events:
                await self._changed(batch.events)
