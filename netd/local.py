"""Networks of a host without etcd: its own ipamd knows them, and is asked now and then."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

from cluster.layout import NetworkRecord
from ipamd.client import Client, IpamError
from netd.agent import Agent
from netd.config import Config
from netd.reconcile import Reconciler
from netd.values import Network
from netd.view import usable

_EVERY_S = 5.0
_TIMEOUT_S = 3.0


class LocalNetworks:
    """`changed` hears of all networks, whenever one is another."""

    def __init__(self, config: Config, agent: Agent, changed: Callable[[Mapping[str, NetworkRecord]], None]) -> None:
        self._config = config
        self._agent = agent
        self._tell = changed
        self._known: dict[str, NetworkRecord] | None = None
        self._now = asyncio.Event()

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self._once()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), _EVERY_S)
            self._now.clear()

    def reload(self, config: Config) -> None:
        """Another configuration; the thread for the kernel has it already."""
        self._config = config
        self._now.set()

    async def _once(self) -> None:
        found = await asyncio.to_thread(_ask, self._config.ipamd_socket)
        if found is not None:
            self._known = found
        if self._known is None:
            return
        *own, default = self._config.networks
        wanted = (*own, *usable(self._known, default, own), default)
        await asyncio.wrap_future(self._agent.call(lambda one: _take(one, wanted)))
        self._tell(self._known)


def _take(reconciler: Reconciler, networks: tuple[Network, ...]) -> None:
    if reconciler.networks != networks:
        reconciler.configure(reconciler.node, reconciler.choice, networks)
        reconciler.full()


def _ask(socket: str) -> dict[str, NetworkRecord] | None:
    """All networks; None where ipamd is not there."""
    if not os.path.exists(socket):
        return None
    try:
        with Client(socket, _TIMEOUT_S) as client:
            found = client.list_networks()
    except IpamError:
        return None
    return {
        one.name: NetworkRecord(
            one.name,
            one.type,
            tuple(one.subnets),
            one.backend,
            one.bridge,
            one.mtu,
            not one.no_masquerade,
            one.open,
            tuple(one.connected),
            one.created_unix_s,
        )
        for one in found
    }
