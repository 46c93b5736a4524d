"""Tests that are coroutines, and what they wait with."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

from cluster.etcd import Etcd, EtcdConfig
from tests.hosts import PATIENCE_S

P = ParamSpec("P")


def looped(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs the test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def connected(endpoints: tuple[str, ...], prefix: str = "/netloom/", **options: Any) -> AsyncIterator[Etcd]:
    """A client, patient unless `timeout_s` says otherwise."""
    etcd = Etcd(EtcdConfig(endpoints, prefix=prefix, **{"timeout_s": PATIENCE_S, **options}))
    try:
        yield etcd
    finally:
        await etcd.close()


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Polls until the condition holds. Raises AssertionError at the limit."""
    deadline = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        await asyncio.sleep(0.05)
