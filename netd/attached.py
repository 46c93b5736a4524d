"""Tells what is attached on this host what its networks have become: who may reach it, and with which source.

An ADD takes the definition from ipamd, and writes it into its record. When a definition changes, the records of those
that live are changed, and the kernel with them. An ADD in the same moment may have asked before and write after: so
this is done once more a little later, and again at every full comparison.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping

from cluster.layout import NetworkRecord
from kernel import shared
from kernel.errors import KernelError
from kernel.record import Records
from kernel.session import Session
from telemetry import log

_logger = logging.getLogger("netd")

_AGAIN_S = 5.0  # longer than an ADD may take from its question to its record


class Attached:
    """`want` says what the networks are; `run` does the rest."""

    def __init__(self, run_dir: str, resync_s: float) -> None:
        self._records = Records(run_dir)
        self._resync_s = resync_s
        self._networks: dict[str, NetworkRecord] | None = None  # None: nobody knows yet
        self._changed = asyncio.Event()

    def want(self, networks: Mapping[str, NetworkRecord]) -> None:
        """All networks as they are from now on."""
        if self._networks != networks:
            self._networks = dict(networks)
            self._changed.set()

    async def run(self) -> None:
        """Never returns."""
        await self._changed.wait()
        while True:
            again = self._changed.is_set()
            self._changed.clear()
            # A thread of its own: the lock of the records may be taken, and the thread for the kernel must not wait.
            again |= not await asyncio.to_thread(self._tell, dict(self._networks or {}))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _AGAIN_S if again else self._resync_s or None)

    def _tell(self, networks: Mapping[str, NetworkRecord]) -> bool:
        wanted = []
        for one in networks.values():
            reachable = [subnet for name in one.connected if name in networks for subnet in networks[name].subnets]
            wanted.append(shared.elements(one.subnets, reachable, is_open=one.open))
        try:
            with Session() as session:
                shared.tell(session, self._records, wanted)
        except (KernelError, OSError) as error:
            log.event(_logger, "error", "what is attached cannot be told of its networks", error=str(error))
            return False
        return True
