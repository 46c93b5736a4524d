"""Puts the daemon together and serves until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.layout import NetworkRecord
from ipamd.errors import StartError
from ipamd.listen import SocketPlace, served
from kernel.errors import KernelError
from kernel.settings import ConfigError
from netd.agent import Agent
from netd.attached import Attached
from netd.bridges import Bridges
from netd.config import Config
from netd.disk import Directory, DirectoryError
from netd.firewall import Firewall
from netd.flannel import Flannel
from netd.local import LocalNetworks
from netd.metrics import NetdMetrics, Sample
from netd.overlay_status import holders_by_place
from netd.reconcile import Reconciler
from netd.registry import Registry
from netd.service import Service, Source
from netd.strangers import Strangers
from protos.node.v1 import node_pb2
from protos.node.v1.node_pb2_grpc import add_NodeServicer_to_server
from telemetry import log
from telemetry.health import Health, HealthServer, parse_listen
from telemetry.metrics import CONTENT_TYPE

_logger = logging.getLogger("netd")

_SERVICE = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name
_SAMPLE_INTERVAL_S = 5.0
_DRAIN_S = 5.0


async def serve(
    config: Config, reload: Callable[[], Config], stop: asyncio.Event, changed: asyncio.Event, *, version: str
) -> None:
    """Serves until `stop` is set; reads the configuration again when `changed` is. Raises StartError before the first
    request only."""
    agent = Agent(
        config.node,
        config.choice,
        config.networks,
        config.peers,
        config.resync_s,
        may_drop=config.etcd is None,
        fast_path=config.fast_path,
    )
    loop = asyncio.get_running_loop()
    try:
        await loop.run_in_executor(None, agent.start)
    except KernelError as error:
        raise StartError(f"the kernel cannot be spoken to: {error}; netd runs as root") from None
    try:
        registry = None
        if config.etcd is not None:
            try:
                registry = Registry(config.etcd, config.lease_s, config, agent, config.state_dir, version)
            except (DirectoryError, OSError) as error:
                raise StartError(f"{config.state_dir} cannot be used: {error}") from None
        firewall = Firewall(config.run_dir)
        firewall.start()
        try:
            await _Daemon(config, agent, registry, version).run(reload, stop, changed)
        finally:
            await loop.run_in_executor(None, firewall.stop)
    finally:
        await loop.run_in_executor(None, agent.stop)
    log.event(_logger, "info", "netd stopped; what it made stays")


class _Daemon:
    def __init__(self, config: Config, agent: Agent, registry: Registry | None, version: str) -> None:
        self._config = config
        self._agent = agent
        self._registry = registry
        self._source: Source = registry or Source()
        self._flannel = Flannel(config, agent)
        self._service = Service(agent, self._source, version, self._flannel.problems)
        self._sample = Sample()
        self._unwell = ""
        self._metrics = NetdMetrics(version, config.node.name, lambda: self._sample)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs leave it out
        self._written = ""
        self._failed = False
        self._news = asyncio.Event()  # the snapshot is old
        self._attached = Attached(config.run_dir, config.resync_s)
        self._bridges = Bridges(agent, config.run_dir)
        self._strangers = Strangers(agent, config.run_dir, config.networks)
        self._local = LocalNetworks(config, agent, self._hear) if registry is None else None
        if registry is not None:
            registry.changed = self._hear
            self._strangers.presume(registry.definitions())
            registry.bridges_changed = self._bridges.nudge

    def _hear(self, networks: Mapping[str, NetworkRecord]) -> None:
        self._attached.want(networks)
        self._bridges.want(networks)
        self._strangers.want(networks)
        self._flannel.nudge()
        self._news.set()

    async def run(self, reload: Callable[[], Config], stop: asyncio.Event, changed: asyncio.Event) -> None:
        """Listens, serves, and drains."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            place = stack.enter_context(SocketPlace(config.socket, "netd"))
            server = self._server()
            try:
                server.add_insecure_port(f"unix:{place.address}")
            except RuntimeError as error:
                raise StartError(f"{config.socket}: cannot be bound: {error}") from None
            await self._look()
            if config.http_listen:
                await stack.enter_async_context(self._pages(config.http_listen))
            await server.start()
            place.publish(config.socket_mode, config.socket_owner, config.socket_group)
            await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
            await self._health.set(_SERVICE, health_pb2.HealthCheckResponse.SERVING)
            log.event(_logger, "info", "netd serves", socket=config.socket, node=config.node.name)
            following = asyncio.create_task(self._follow(stop))
            try:
                await self._until(stop, changed, reload)
                if self._failed:
                    raise StartError("networks are followed no more; see above")
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                place.remove()
                await self._health.enter_graceful_shutdown()
                await server.stop(_DRAIN_S)

    async def _follow(self, stop: asyncio.Event) -> None:
        """Peers and networks; without that following, nothing is up to date, and the daemon had better start again."""
        source = self._registry or self._local
        try:
            work = [self._attached.run(), self._flannel.run(), self._bridges.run(), self._strangers.run()]
            work += [source.run()] if source is not None else []
            await asyncio.gather(*work)
        except Exception as error:  # noqa: BLE001 - whatever it was
            log.event(_logger, "critical", "networks are followed no more", error=str(error), exc_info=True)
            self._failed = True
            stop.set()

    async def _until(self, stop: asyncio.Event, changed: asyncio.Event, reload: Callable[[], Config]) -> None:
        """Waits for `stop`; meanwhile looks after the configuration and the snapshot."""
        while not stop.is_set():
            waits = [asyncio.create_task(event.wait()) for event in (stop, changed, self._news)]
            await asyncio.wait(waits, timeout=_SAMPLE_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if changed.is_set():
                changed.clear()
                await self._reload(reload)
            self._news.clear()
            await self._look()

    async def _reload(self, reload: Callable[[], Config]) -> None:
        try:
            config = reload()
        except ConfigError as error:
            log.event(_logger, "error", "the configuration is not taken; the one before stays", error=str(error))
            return
        all_peers = self._registry is None
        changed = await asyncio.wrap_future(self._agent.call(lambda one: _take(one, config, all_peers)))
        if self._registry is not None:
            await self._registry.reload(config)
        if self._local is not None:
            self._local.reload(config)
        self._flannel.reload(config)
        self._strangers.reload(config.networks)
        log.event(_logger, "info", "the configuration was read again", changed=changed)

    async def _look(self) -> None:
        """A snapshot for /metrics, /healthz and the state file; each is made without waiting for the thread then."""
        self._sample, self._unwell, document = await asyncio.wrap_future(self._agent.call(self._snapshot))
        if document != self._written:
            try:
                with contextlib.closing(Directory(self._config.run_dir)) as directory:
                    directory.write("fabric.json", document.encode(), mode=0o644)
                self._written = document
            except (OSError, DirectoryError) as error:
                log.event(_logger, "error", "the state file cannot be written", error=str(error))

    def _snapshot(self, reconciler: Reconciler) -> tuple[Sample, str, str]:
        counts, problems = reconciler.counts, self._service.problems(reconciler)
        kinds = Counter(map(type, reconciler.found.entries.values()))  # tens of thousands, each few seconds
        states = Counter(self._source.peer_state(name) for name in reconciler.peers)
        sample = Sample(
            counts.full,
            counts.changes,
            counts.repairs,
            counts.full_s,
            len(problems),
            {kind.__name__.lower(): number for kind, number in kinds.items()},
            dict(states),
            holders_by_place(reconciler),
        )
        unwell = problems[0] if reconciler.underlay is None and problems else ""
        return sample, unwell, json.dumps(_document(reconciler), indent=1) + "\n"

    def _server(self) -> aio.Server:
        server = aio.server(options=[("grpc.so_reuseport", 0)])
        add_NodeServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _pages(self, listen: str) -> AbstractAsyncContextManager[None]:
        where = parse_listen(listen, self._config.http_allow_remote)
        pages = HealthServer(
            where,
            metrics=self._metrics.render,
            health=lambda: Health(not self._unwell, self._unwell),
            content_type=CONTENT_TYPE,
        )
        return served(pages, listen)


def _take(reconciler: Reconciler, config: Config, all_peers: bool) -> int:
    """In the thread: from now on this configuration. `all_peers`: there are no others than the file's."""
    if all_peers:
        reconciler.configure(config.node, config.choice, config.networks)
    else:  # own subnets and networks are the registry's to add to
        reconciler.configure(replace(config.node, subnets=reconciler.node.subnets), config.choice, reconciler.networks)
    wanted = {one.name: one for one in config.peers}
    for name in [name for name in reconciler.peers if all_peers and name not in wanted]:
        reconciler.drop_peer(name)
    for peer in wanted.values():
        if reconciler.peers.get(peer.name) != peer:
            reconciler.put_peer(peer)
    reconciler.fast.enable(config.fast_path)
    return reconciler.full()


def _document(reconciler: Reconciler) -> dict[str, object]:
    """What plugins and scripts of this host want to know of its networks, without asking."""
    return {
        "node": reconciler.node.name,
        "networks": {
            one.name: {
                "backend": one.backend,
                "mtu": reconciler.mtu(one),
                "subnets": [str(subnet) for subnet in one.subnets],
                "own": [str(subnet) for subnet in reconciler.node.subnets if reconciler.network_of(subnet) is one],
            }
            for one in reconciler.networks
        }
        | {
            one.name: {
                "type": "overlay",
                "mtu": reconciler.overlays.mtu(one),
                "subnets": [str(subnet) for subnet in one.subnets],
                "own": [],
                "vni": one.vni,
                "bridge": one.bridge,
            }
            for one in reconciler.overlays.defined()
        },
    }
