"""What happened to allocations, told to who wants to hear, from any revision that the store remembers.

A watcher reads pages of the store's events and sleeps in between until something was committed. Nothing is queued for
it: who reads slowly, or not at all, costs no memory, and hears that it is too late once the store has forgotten what
it has not read.
"""

import asyncio
from collections.abc import AsyncIterator

from ipamd.engine import Engine
from ipamd.errors import OutOfRangeError
from ipamd.store.base import Event, Store

_PAGE = 200
_GATHER_S = 0.02  # between a commit and the read: many commits a second must not mean as many reads by each watcher


class Events:
    """See the top of this file."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._committed = asyncio.Event()
        engine.after_commit(self._wake)

    async def follow(self, after: int) -> AsyncIterator[tuple[int, list[Event]]]:
        """Pages of events with a revision above `after`, each with its last revision; 0: from now on. Never ends.

        The first page is empty and comes at once: from then on nothing is missed. Raises OutOfRangeError.
        """
        if after:
            await self._read(after)
        else:
            _, after = await self._engine.run(self._store.event_bounds)
        yield after, []
        while True:
            committed = self._committed
            page = await self._read(after)
            if page:
                after = page[-1].revision
                yield after, page
            else:
                await committed.wait()
                await asyncio.sleep(_GATHER_S)

    def _wake(self) -> None:
        self._committed.set()
        self._committed = asyncio.Event()

    async def _read(self, after: int) -> list[Event]:
        return await self._engine.run(lambda: self._page(after))

    def _page(self, after: int) -> list[Event]:
        oldest, newest = self._store.event_bounds()
        if after < oldest - 1:
            raise OutOfRangeError(
                f"revision {after} is no longer remembered: the oldest is {oldest}; list the allocations, then watch "
                f"from {newest}",
                newest,
            )
        if after > newest:
            raise OutOfRangeError(
                f"revision {after} is yet to come, the newest is {newest}: the store is another one, or an older copy; "
                f"list the allocations, then watch from {newest}",
                newest,
            )
        return self._store.events(after, _PAGE) if after < newest else []
