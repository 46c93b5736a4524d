"""Puts the daemon together and serves until told to stop."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import msgspec
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ipamd.ballast import BallastFile
from ipamd.check import Checker
from ipamd.clock import BootClock, Clock
from ipamd.config import Config
from ipamd.desk import Desk
from ipamd.door import Door, Methods
from ipamd.engine import Engine, Transaction
from ipamd.errors import IpamdError, StartError
from ipamd.fill import FillWatch, fills
from ipamd.lease import Ledger
from ipamd.listen import SocketPlace, served
from ipamd.member.identity import is_of_cluster, on_disk
from ipamd.member.macs import Macs
from ipamd.member.member import Member
from ipamd.member.networks import SharedNetworks
from ipamd.networks import Directory, Networks, OverlayDesk
from ipamd.reclaim import Reclaimer
from ipamd.records import ReleaseRecords
from ipamd.service import Service
from ipamd.store.base import Rename, Store, StoreError
from ipamd.store.cluster import ClusterStore
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from protos.ipam.v1 import ipam_pb2
from protos.ipam.v1.ipam_pb2_grpc import add_IpamServicer_to_server
from telemetry import log
from telemetry.health import Health, HealthServer, parse_listen
from telemetry.metrics import CONTENT_TYPE, IpamdMetrics, PoolSample

_logger = logging.getLogger("ipamd")

_SERVICE = ipam_pb2.DESCRIPTOR.services_by_name["Ipam"]
_LARGEST_MESSAGE = 64 << 20  # a GC that names 100,000 attachments has 8 MiB
_DRAIN_S = 10.0
# Nothing in hand at so many looks in a row: what had arrived has been begun, and the answers have gone out.
_QUIET = 5
_QUIET_INTERVAL_S = 0.02
_RECORDS_INTERVAL_S = 2.0
_SAMPLES_INTERVAL_S = 5.0
# The commit's thread waits at most this long for the interpreter after the disk answered; the default is 5 ms.
_SWITCH_INTERVAL_S = 0.0005


async def serve(config: Config, stop: asyncio.Event, *, version: str, clock: Clock | None = None) -> None:
    """Serves until `stop` is set, then answers what was taken. Raises StartError before the first request only."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    clock = clock or BootClock()
    metrics = IpamdMetrics(version, config.node)
    store = _store(config)
    try:
        transaction = Transaction(store)
        ledger = _load(transaction, clock, config)
        ballast = BallastFile(f"{config.store_path}.ballast") if config.store_kind != "memory" else None
        engine = Engine(transaction, ballast=ballast, on_commit=metrics.commit)
        try:
            member = await _member(config, transaction, ledger, engine, clock, metrics, version)
            try:
                daemon = _Daemon(config, clock, transaction, ledger, engine, metrics, version, member)
                if member is not None:
                    await member.start()
                await daemon.run(stop)
            finally:
                if member is not None:
                    await member.close()
        finally:
            await engine.close()
    finally:
        store.close()
    log.event(_logger, "info", "ipamd stopped")


def _store(config: Config) -> Store:
    match config.store_kind:
        case "etcd":
            return ClusterStore(config.store_path)
        case "sqlite":
            return SqliteStore(config.store_path)
        case "memory":
            return MemoryStore()


async def _member(
    config: Config,
    transaction: Transaction,
    ledger: Ledger,
    engine: Engine,
    clock: Clock,
    metrics: IpamdMetrics,
    version: str,
) -> Member | None:
    """This node as one of its cluster, where it is to be; else the store must not be of one."""
    try:
        if config.cluster is None:
            await engine.run(lambda: _adopt_node(transaction, config.node))
            _refuse_cluster(transaction.store, ledger, config)
            return None
        identity = await engine.run(lambda: on_disk(transaction, config.node))
        await engine.run(lambda: _adopt_node(transaction, config.node))
    except IpamdError as error:
        raise StartError(f"{config.store_path}: the node's name cannot be kept there: {error}") from None
    return Member(
        config.cluster,
        identity,
        version=version,
        engine=engine,
        ledger=ledger,
        transaction=transaction,
        clock=clock,
        counts=metrics,
    )


def _refuse_cluster(store: Store, ledger: Ledger, config: Config) -> None:
    shared = sorted(pool.name for pool in ledger.pools.values() if pool.spec.mode != "local")
    if is_of_cluster(store) and shared:
        raise StartError(
            f'{config.store_path}: this node is one of a cluster, with pools {", ".join(shared)}: set kind = "etcd" '
            "under [store]; to take it out of the cluster, see docs/operations.md"
        )


def _load(transaction: Transaction, clock: Clock, config: Config) -> Ledger:
    try:
        return Ledger(transaction, clock, config.cooldown_s)
    except (StoreError, IpamdError, msgspec.DecodeError, ValueError, OSError) as error:
        # ValueError, OSError: an address in a row that is none (socket.inet_pton).
        raise StartError(
            f"{config.store_path}: its rows cannot be read ({error}); restore a copy of the file, or move it away to "
            "begin anew"
        ) from None


def _adopt_node(transaction: Transaction, node: str) -> None:
    """The store is this node's own: should the node have got another name, its allocations go with it."""
    known = transaction.store.remembered_node()
    if known == node:
        return
    changes = [Rename(known, node)] if known else []
    transaction.apply(*changes)
    transaction.store.remember_node(node)
    if known:
        log.event(_logger, "warning", "the node has another name now; its allocations follow", was=known, now=node)


class _Daemon:
    def __init__(
        self,
        config: Config,
        clock: Clock,
        transaction: Transaction,
        ledger: Ledger,
        engine: Engine,
        metrics: IpamdMetrics,
        version: str,
        member: Member | None,
    ) -> None:
        desk = Desk(engine, ledger, member.mirror if member else None)
        self._member = member
        store = transaction.store
        self._config = config
        self._ledger = ledger
        self._engine = engine
        self._metrics = metrics
        self._reclaimer = Reclaimer(
            engine,
            ledger,
            store,
            clock,
            node=config.node,
            grace_s=config.reclaim_grace_s,
            on_release=metrics.released,
        )
        self._records = ReleaseRecords(
            config.release_dir, engine, ledger, node=config.node, on_release=metrics.released
        )
        desk.networks = networks = Networks(transaction)
        shared = SharedNetworks(member.etcd, engine, ledger, networks, member.mirror.delete_pool) if member else None
        overlays: OverlayDesk | None = None
        if member and shared:
            macs = Macs(member.etcd, engine, transaction, member.identity.node_id)
            overlays = OverlayDesk(shared, macs, config.overlay_subnets)
            member.followers.append(shared.follower)
            member.check.lost_networks = shared.conflicts
            member.also.append(macs.run)
            ledger.has_macs = networks.is_overlay
        self._directory = Directory(
            engine,
            ledger,
            networks,
            create_pool=desk.create_pool,
            delete_pool=desk.delete_pool,
            shared=shared,
            overlays=overlays,
        )
        self._checker = Checker(
            engine,
            ledger,
            store,
            clock,
            node=config.node,
            grace_s=config.reclaim_grace_s,
            reserve=desk.reserve,
            further=[member.check] if member else (),
        )
        self._service = Service(
            engine=engine,
            ledger=ledger,
            store=store,
            reclaimer=self._reclaimer,
            checker=self._checker,
            directory=self._directory,
            desk=desk,
            member=member,
            clock=clock,
            metrics=metrics,
            node=config.node,
            version=version,
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs leave it out
        self._samples: list[PoolSample] = []
        metrics.watch_pools(lambda: self._samples)
        if member is not None:
            metrics.watch_cluster(member.sample)

    async def run(self, stop: asyncio.Event) -> None:
        """Listens, serves, and drains."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            place = stack.enter_context(SocketPlace(config.socket))
            server = self._server()
            listening = _bind(server, place, config.socket)
            stack.callback(listening.close)
            door = Door(Methods(_SERVICE, self._service), place.hide())
            stack.callback(door.shut)
            if config.http_listen:
                await stack.enter_async_context(self._pages(config.http_listen))
            self._records.prepare()
            await self._records.replay()
            await server.start()
            await door.open(listening)
            place.publish(config.socket_mode, config.socket_owner, config.socket_group)
            await self._serve(server, door, place, stop)

    async def _serve(self, server: aio.Server, door: Door, place: SocketPlace, stop: asyncio.Event) -> None:
        config = self._config
        tasks = [asyncio.create_task(work()) for work in (self._replay_records, self._reclaim, self._sample_pools)]
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(_SERVICE.full_name, health_pb2.HealthCheckResponse.SERVING)
        log.event(_logger, "info", "ipamd serves", socket=config.socket, node=config.node, store=config.store_kind)
        try:
            await stop.wait()
        finally:
            log.event(_logger, "info", "ipamd is stopping: it answers what it took")
            place.remove()
            await self._health.enter_graceful_shutdown()
            await self._drain(server, door)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, server: aio.Server, door: Door) -> None:
        """Takes nothing any more, answers what is in hand.

        gRPC alone would wait for connections to be closed, too; those of idle workers stay until their next request.
        """
        door.close()
        stopping = asyncio.create_task(server.stop(_DRAIN_S))
        quiet = 0
        while quiet < _QUIET and not stopping.done():
            await asyncio.sleep(_QUIET_INTERVAL_S)
            quiet = 0 if self._service.in_hand else quiet + 1
        await server.stop(None)
        await stopping
        door.shut()

    def _server(self) -> aio.Server:
        server = aio.server(
            options=[
                ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.bdp_probe", 0),  # a ping with each request, to learn how fast the line is
            ]
        )
        add_IpamServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((_SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _pages(self, listen: str) -> AbstractAsyncContextManager[None]:
        where = parse_listen(listen, self._config.http_allow_remote)
        pages = HealthServer(where, metrics=self._metrics.render, health=self._state, content_type=CONTENT_TYPE)
        return served(pages, listen)

    def _state(self) -> Health:
        if self._engine.disk_full:
            return Health(False, "the disk of the database is full: new allocations are refused")
        if self._member is not None and self._member.refusal:
            return Health(False, self._member.refusal)
        return Health(True, self._member.trouble() if self._member is not None else "")

    async def _sample_pools(self) -> None:
        """A scrape happens beside the batches and must not use the store, so it gets what was read a moment ago."""
        watch = FillWatch()
        while True:
            watch.look(fills(self._ledger))
            if self._config.http_listen:
                await _guard(self._sample_pools_once, "the pools' fill cannot be read")
            await asyncio.sleep(_SAMPLES_INTERVAL_S)

    async def _sample_pools_once(self) -> None:
        self._samples = await self._engine.run(
            lambda: [
                PoolSample(
                    pool.name,
                    usage.family,
                    usage.size,
                    usage.allocated,
                    usage.reserved,
                    usage.cooling,
                    usage.elsewhere,
                    (usage.blocks, usage.blocks_claimed, usage.blocks_total) if pool.has_blocks else None,
                )
                for pool in self._ledger.pools.values()
                for usage in self._ledger.usage(pool)
            ]
        )

    async def _replay_records(self) -> None:
        while True:
            await asyncio.sleep(_RECORDS_INTERVAL_S)
            await _guard(self._records.replay, "release records cannot be replayed")

    async def _reclaim(self) -> None:
        if not self._config.reclaim_interval_s:
            return
        await asyncio.sleep(self._config.reclaim_grace_s)
        while True:
            await _guard(self._reclaimer.earlier_boots, "allocations of earlier boots cannot be released")
            await asyncio.sleep(self._config.reclaim_interval_s)


def _bind(server: aio.Server, place: SocketPlace, path: str) -> socket.socket:
    """Binds both sockets, gRPC's own and the one that everybody comes to, which is returned. Raises StartError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.add_insecure_port(f"unix:{place.inner}")
        listening.bind(place.address)
    except (RuntimeError, OSError) as error:
        listening.close()
        raise StartError(f"{path}: cannot be bound: {error}") from None
    return listening


async def _guard(work: Callable[[], Awaitable[object]], what: str) -> None:
    """Runs one round of work that goes on for ever: a failure is logged, and the next round tries again."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001 (whatever it was must not end the rounds)
        log.event(_logger, "error", what, error=str(error), exc_info=not isinstance(error, IpamdError))
