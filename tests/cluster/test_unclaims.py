"""Errands, where the work on them was broken off."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

from cluster.layout import BlockRecord
from ipamd.member.book import Book
from ipamd.member.unclaims import Unclaims
from ipamd.store.base import Errand
from tests.cluster.loop import looped, until


@looped
async def test_work_that_was_broken_off_is_taken_up_again() -> None:
    """A fault elsewhere ends all that follows addresses, and all of it begins anew: the wake-up must not be lost."""
    errands = [Errand(1, "claim", "p", "10.1.0.2", 7)]
    begun, first = asyncio.Event(), True

    async def run(work: Callable[[], Any], **_options: Any) -> Any:
        nonlocal first
        if first:
            first = False
            begun.set()
            await asyncio.Event().wait()
        return work()

    ledger = Mock(unconfirmed={}, errands_written=False)
    ledger.settle.side_effect = lambda _seqs: errands.clear()
    store = Mock()
    store.errands.side_effect = lambda _limit: list(errands)
    # Of what it is made of only the engine and the store are asked for this.
    unclaims = Unclaims(Mock(), Mock(run=run), ledger, store, Book(BlockRecord("a", "1")))
    broken_off = asyncio.create_task(unclaims.run())
    await begun.wait()
    broken_off.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await broken_off
    anew = asyncio.create_task(unclaims.run())
    try:

        async def told() -> bool:
            return not errands and not unclaims.pending

        await until(told, "the errand")
    finally:
        anew.cancel()
        await asyncio.gather(anew, return_exceptions=True)
