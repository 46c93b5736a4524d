"""The bridges of overlays on this host: apart from other networks as long as they are there, and gone when idle.

What keeps a network apart is in the records of its containers. Between the last one's DEL and the bridge's end the host
still knows the way to the others of the network, so a record of netd's own has it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping

from cluster.layout import NetworkRecord
from kernel import link, shared
from kernel.errors import KernelError
from kernel.leftovers import BRIDGE_MARK, NETD_MARK, delete_idle_bridge
from kernel.record import Key, Record, Records
from kernel.session import Session
from netd.agent import Agent
from netd.reconcile import Reconciler
from netd.view import OVERLAY
from telemetry import log

_logger = logging.getLogger("netd")

PLUGIN = "netd"  # whose records these are
_EVERY_S = 2.0


class Bridges:
    """`run` does it all. A bridge goes when it is idle twice in a row: a container that restarts finds it still."""

    def __init__(self, agent: Agent, run_dir: str) -> None:
        self._agent = agent
        self._records = Records(run_dir)
        self._idle: set[str] = set()
        self._networks: dict[str, NetworkRecord] | None = None  # None: nobody has told yet
        self._former: set[str] = set()  # bridges of networks that are no more
        self._kept: dict[str, Record] | None = None  # None: what an earlier netd left is not read yet
        self._nudged = asyncio.Event()

    def want(self, networks: Mapping[str, NetworkRecord]) -> None:
        """All networks as they are from now on."""
        before = {one.bridge for one in (self._networks or {}).values() if one.type == OVERLAY}
        self._networks = dict(networks)
        self._former = (self._former | before) - {one.bridge for one in networks.values()}
        self._nudged.set()

    def nudge(self) -> None:
        """A bridge came or went."""
        self._nudged.set()

    async def run(self) -> None:
        """Never returns."""
        looked = 0.0
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), _EVERY_S)
            self._nudged.clear()
            try:
                active = await asyncio.wrap_future(self._agent.call(lambda one: set(one.overlays.active())))
                # Threads of their own: the one for the kernel must not wait for the lock of the records.
                await asyncio.to_thread(self._keep_apart, active)
                if loop.time() - looked >= _EVERY_S:
                    looked = loop.time()
                    await self._take_away()
            except (KernelError, OSError) as error:
                log.event(_logger, "error", "the bridges of overlays cannot be looked after", error=str(error))

    async def _take_away(self) -> None:
        former = frozenset(self._former)
        idle, there = await asyncio.wrap_future(self._agent.call(lambda one: _idle(one, former)))
        for name in idle & self._idle:
            if await asyncio.to_thread(self._delete, name):
                log.event(_logger, "info", "no container is on an overlay any more", bridge=name)
        self._idle = idle
        self._former -= former - there

    def _delete(self, name: str) -> bool:
        with Session() as session:
            return delete_idle_bridge(session, self._records, name)

    def _keep_apart(self, active: Iterable[str]) -> None:
        """Have a record for each of these that is defined, and for no other."""
        if self._kept is None:
            self._kept = {one.key.container_id: one for one in self._records.of_network(PLUGIN, PLUGIN)}
        networks = self._networks or {}
        wanted = {name: _record(networks[name]) for name in active if name in networks}
        # Where nobody has told yet what there is, what an earlier netd knew holds.
        gone = self._kept.keys() - wanted.keys() if self._networks is not None else set()
        changed = {name: one for name, one in wanted.items() if self._kept.get(name) != one}
        if not gone and not changed:
            return
        with Session() as session:
            for name in gone:
                if name not in networks:  # it may have ended while no netd ran
                    self._former.add(self._kept[name].key.ifname)
                self._records.remove(session, self._kept[name])
                del self._kept[name]
            for name, one in changed.items():
                if (before := self._kept.get(name)) is not None and before.key != one.key:
                    self._records.remove(session, before)
                self._records.write(one)
                self._records.apply(session, one)
                self._kept[name] = one


def _record(network: NetworkRecord) -> Record:
    elements = shared.elements(network.subnets, (), is_open=network.open)
    # Not in the record's field for the bridge: an attachment would keep that.
    return Record(Key(PLUGIN, network.name, network.bridge, PLUGIN), shared=tuple(elements))


def _idle(reconciler: Reconciler, former: Iterable[str]) -> tuple[set[str], set[str]]:
    """The bridges of overlays, and of these, that have no port but tunnels' ends; which of them all are there. A
    network may be deleted before its bridge was seen to be idle. In the thread for the kernel."""
    active = reconciler.overlays.active()
    there: dict[str, int] = {}
    for one in reconciler.overlays.defined():
        index = reconciler.found.indexes.get(one.bridge)
        if one.name in active and index is not None:
            there[one.bridge] = index
    for name in former:
        bridge = link.find(reconciler.session, name)
        if bridge is not None and bridge.alias == BRIDGE_MARK:
            there[name] = bridge.index
    idle = set()
    for name, index in there.items():
        if all(port.alias == NETD_MARK for port in link.all_links(reconciler.session, index)):
            idle.add(name)
    return idle, set(there)
