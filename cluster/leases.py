"""Keeps one lease alive, and says when it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from cluster.errors import EtcdError
from cluster.etcd import Etcd, Lease

_RETRY_S = 0.5

_logger = logging.getLogger(__name__)


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Renews a lease every third of its time until it is closed, or the lease is lost.

    Lost is what etcd says is gone. While etcd does not answer, nobody knows: etcd's clock decides, and a new leader
    begins all leases anew. `last_renewed_ns` is what such a decision goes by: CLOCK_BOOTTIME, before the last question
    that was answered with yes, so the lease lives at least until that moment and its time.
    """

    def __init__(
        self,
        etcd: Etcd,
        lease: Lease,
        on_lost: Callable[[int], None] | None = None,
        *,
        granted_ns: int = 0,
        clock_ns: Callable[[], int] = boottime_ns,
    ) -> None:
        """`on_lost` is called once, with `last_renewed_ns`. `granted_ns`: taken before the lease was asked for."""
        self.lease = lease
        self.last_renewed_ns = granted_ns or clock_ns()
        self.is_lost = False
        self._etcd = etcd
        self._on_lost = on_lost
        self._clock_ns = clock_ns
        self._lost = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"lease-{lease.id:x}")

    async def lost(self) -> None:
        """Returns when the lease is lost."""
        await self._lost.wait()

    async def close(self) -> None:
        """Stops renewing. The lease lives on for its time."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        pause = self.lease.ttl_s / 3
        level = logging.WARNING
        while True:
            await asyncio.sleep(pause)
            asked_ns = self._clock_ns()
            try:
                ttl_s = await self._etcd.keep_alive_once(self.lease.id)
            except EtcdError as error:
                _logger.log(level, "etcd: lease %x could not be renewed: %s", self.lease.id, error)
                level = logging.DEBUG  # once is enough
                pause = min(_RETRY_S, self.lease.ttl_s / 6)
                continue
            if ttl_s <= 0:
                break
            self.last_renewed_ns = asked_ns
            level = logging.WARNING
            pause = ttl_s / 3
        self.is_lost = True
        _logger.warning("etcd: lease %x is lost", self.lease.id)
        self._lost.set()
        if self._on_lost is not None:
            self._on_lost(self.last_renewed_ns)
