"""Takes an overlay's bridge away some seconds after its last container here; the tunnel's end follows by itself."""

from __future__ import annotations

import asyncio
import logging

from kernel import link
from kernel.errors import KernelError
from kernel.leftovers import NETD_MARK, delete_idle_bridge
from kernel.record import Records
from kernel.session import Session
from netd.agent import Agent
from netd.reconcile import Reconciler
from telemetry import log

_logger = logging.getLogger("netd")

_EVERY_S = 2.0


class IdleBridges:
    """`run` does it all. A bridge goes when it is idle twice in a row: a container that restarts finds it still."""

    def __init__(self, agent: Agent, run_dir: str) -> None:
        self._agent = agent
        self._records = Records(run_dir)
        self._idle: set[str] = set()

    async def run(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                idle = await asyncio.wrap_future(self._agent.call(_idle))
                for name in idle & self._idle:
                    # A thread of its own: the one for the kernel must not wait for the lock of the records.
                    if await asyncio.to_thread(self._delete, name):
                        log.event(_logger, "info", "no container is on an overlay any more", bridge=name)
                self._idle = idle
            except (KernelError, OSError) as error:
                log.event(_logger, "error", "idle bridges cannot be looked for", error=str(error))

    def _delete(self, name: str) -> bool:
        with Session() as session:
            return delete_idle_bridge(session, self._records, name)


def _idle(reconciler: Reconciler) -> set[str]:
    """The bridges of overlays that have no port but the tunnel's end. In the thread for the kernel."""
    active = reconciler.overlays.active()
    found = set()
    for one in reconciler.overlays.defined():
        index = reconciler.found.indexes.get(one.bridge)
        if one.name in active and index is not None:
            ports = link.all_links(reconciler.session, index)
            if all(port.alias == NETD_MARK for port in ports):
                found.add(one.bridge)
    return found
