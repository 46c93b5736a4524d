"""ipamd's API: messages in, values to `engine`, `lease` and `reclaim`, and back. Nothing is decided here.

Each handler waits until what it answers is durable. Exceptions become status codes in one place, `handlers.unary`.
"""

# ruff: noqa: N802 (the handlers bear the names of the RPCs)

import asyncio
import functools
import logging
from collections.abc import AsyncIterator

from ipamd import backup, messages
from ipamd.allocate import Underway, allocate, release
from ipamd.check import Checker, KernelAddress
from ipamd.clock import Clock
from ipamd.desk import Desk
from ipamd.engine import Engine
from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    IpamdError,
    NeedsBlockError,
    PreconditionError,
    UnavailableError,
)
from ipamd.events import Events
from ipamd.handlers import Context, abort, unary
from ipamd.lease import Ask, Ledger
from ipamd.member.handlers import NodeHandlers, add_state
from ipamd.member.listing import listing
from ipamd.member.member import Member
from ipamd.networks import Directory
from ipamd.pool import Pool, address_text, parse_address
from ipamd.pools import check_pool_name
from ipamd.reclaim import Live, Reclaimer, log_release
from ipamd.store.base import Allocation, Filter, Store
from protos.ipam.v1 import ipam_pb2 as pb
from protos.ipam.v1.ipam_pb2_grpc import IpamServicer
from telemetry import log
from telemetry.metrics import AllocationResult, IpamdMetrics

_logger = logging.getLogger("ipamd")

_PAGE = 500  # allocations of a list that are read at once: under 10 ms of the event loop

# How an Allocate that failed is counted.
_RESULTS: tuple[tuple[type[IpamdError], AllocationResult], ...] = (
    (CoolingError, "cooling"),
    (ExhaustedError, "exhausted"),
    (AlreadyExistsError, "conflict"),
    (PreconditionError, "conflict"),
    (UnavailableError, "error"),
    (IpamdError, "refused"),
)


class Service(NodeHandlers, IpamServicer):
    """The handlers. One instance serves all requests, in the event loop. `in_hand`: how many it has yet to answer."""

    def __init__(  # noqa: PLR0913 - what the handlers call
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        store: Store,
        reclaimer: Reclaimer,
        checker: Checker,
        directory: Directory,
        desk: Desk,
        member: Member | None,
        clock: Clock,
        metrics: IpamdMetrics,
        node: str,
        version: str,
    ) -> None:
        super().__init__(metrics, directory, member)
        self._desk = desk
        self._underway = Underway()
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._reclaimer = reclaimer
        self._checker = checker
        self._clock = clock
        self._node = node
        self._version = version
        self._began_ns = clock.now_ns()
        self._events = Events(engine, store)

    @unary
    async def Allocate(self, request: pb.AllocateRequest, request_id: str) -> pb.AllocateResponse:
        try:
            ask = messages.ask_of(request, self._node)
            allocation, created = await allocate(self._engine, self._ledger, self._member, self._underway, ask)
        except IpamdError as error:
            self.metrics.allocation(next(result for kind, result in _RESULTS if isinstance(error, kind)))
            raise
        self.metrics.allocation("created" if created else "repeated")
        # A line costs a twentieth of a request: it is written while the answer is already on its way.
        asyncio.get_running_loop().call_soon(_log_allocated, allocation, created, request_id)
        return pb.AllocateResponse(
            addresses=messages.address_messages(allocation.addresses),
            created=created,
            generation=allocation.generation,
        )

    @unary
    async def Release(self, request: pb.ReleaseRequest, request_id: str) -> pb.ReleaseResponse:
        key = messages.key_of(request.key, self._node)
        before = messages.instant_of(request.before) if request.HasField("before") else None
        held = await self._engine.run(lambda: release(self._ledger, self._underway, key, request.generation, before))
        if held is None:
            return pb.ReleaseResponse()
        asyncio.get_running_loop().call_soon(log_release, held, "request", request_id)
        self.metrics.released("request")
        return pb.ReleaseResponse(released=messages.address_messages(held.addresses))

    @unary
    async def Check(self, request: pb.CheckRequest, _request_id: str) -> pb.CheckResponse:
        key = messages.key_of(request.key, self._node)
        held = await self._engine.run(lambda: self._ledger.check(key, tuple(request.cidrs)))
        return pb.CheckResponse(generation=held.generation)

    @unary
    async def GarbageCollect(self, request: pb.GarbageCollectRequest, request_id: str) -> pb.GarbageCollectResponse:
        if not request.HasField("before"):
            raise InvalidArgumentError("before: wanted the moment when the client's request began, found nothing")
        with log.request(request_id):
            found = await self._reclaimer.collect(
                request.client,
                request.network,
                frozenset((attachment.container_id, attachment.ifname) for attachment in request.valid),
                messages.instant_of(request.before),
                node=request.node,
                living=frozenset(request.living),
                dry_run=request.dry_run,
            )
        return pb.GarbageCollectResponse(
            released=[messages.allocation_message(a, "not among the valid attachments") for a in found.released],
            living=[messages.allocation_message(a, "not valid, but its interface lives") for a in found.kept],
        )

    @unary
    async def ReportLiveness(self, request: pb.ReportLivenessRequest, request_id: str) -> pb.ReportLivenessResponse:
        if not request.HasField("at"):
            raise InvalidArgumentError("at: wanted the moment when the observation began, found nothing")
        live = Live.of((netns.inode, netns.cookie) for netns in request.live)
        with log.request(request_id):
            found = await self._reclaimer.report(messages.instant_of(request.at), live, request.dry_run)
        return pb.ReportLivenessResponse(
            released=[messages.allocation_message(a, "its network namespace is gone") for a in found.released],
            suspected=[messages.allocation_message(a, "its network namespace is missing") for a in found.kept],
        )

    @unary
    async def Status(self, request: pb.StatusRequest, _request_id: str) -> pb.StatusResponse:
        ask = messages.probe_of(request, self._node)
        member = self._member
        try:
            answer = await self._engine.run(lambda: self._status(ask))
        except NeedsBlockError as need:
            if member is None:
                raise
            member.blocks.foresee(need)
            answer = await self._engine.run(lambda: self._status(None))
        if member is not None:
            await add_state(answer, member, with_endpoints=ask is None)
        return answer

    def _status(self, ask: Ask | None) -> pb.StatusResponse:
        if ask is not None:
            if self._engine.disk_full:
                raise ExhaustedError(
                    "the disk of ipamd's database is full: new allocations are refused; free some room"
                )
            self._ledger.probe(ask)
        return pb.StatusResponse(
            version=self._version,
            node=self._node,
            store=self._store.kind,
            boot_id=self._clock.boot_id,
            allocations=self._store.count(),
            pools=len(self._ledger.pools),
            uptime_s=(self._clock.now_ns() - self._began_ns) / 1e9,
            schema=self._store.schema,
        )

    @unary
    async def CreatePool(self, request: pb.CreatePoolRequest, request_id: str) -> pb.Pool:
        check_pool_name(request.name)
        spec = messages.spec_of(request.spec, self.mode)
        pool = await self._desk.create_pool(request.name, spec)
        answer = await self._engine.run(lambda: self._describe(pool))
        log.event(_logger, "info", "pool created", pool=request.name, spec=spec.encode(), request_id=request_id)
        return answer

    @unary
    async def GetPool(self, request: pb.GetPoolRequest, _request_id: str) -> pb.Pool:
        return await self._engine.run(lambda: self._describe(self._ledger.pool(request.name)))

    @unary
    async def ListPools(self, _request: pb.ListPoolsRequest, _request_id: str) -> pb.ListPoolsResponse:
        return await self._engine.run(
            lambda: pb.ListPoolsResponse(pools=[self._describe(pool) for _, pool in sorted(self._ledger.pools.items())])
        )

    @unary
    async def DeletePool(self, request: pb.DeletePoolRequest, request_id: str) -> pb.DeletePoolResponse:
        await self._desk.delete_pool(request.name)
        log.event(_logger, "info", "pool deleted", pool=request.name, request_id=request_id)
        return pb.DeletePoolResponse()

    async def ListAllocations(
        self, request: pb.ListAllocationsRequest, context: Context
    ) -> AsyncIterator[pb.Allocation]:
        try:
            ip = address_text(*parse_address(request.address, "address")) if request.address else ""
        except IpamdError as error:
            await abort(context, error)
        wanted = Filter(request.node, request.client, request.network, request.container_id, request.pool, ip)
        self.in_hand += 1
        try:
            async for allocation in self._of_all_nodes(wanted) if request.cluster else self._of_this_node(wanted):
                yield messages.allocation_message(allocation)
        except IpamdError as error:
            await abort(context, error)
        finally:
            self.in_hand -= 1

    async def _of_this_node(self, wanted: Filter) -> AsyncIterator[Allocation]:
        after = 0
        while True:
            page = await self._engine.run(functools.partial(self._store.allocations, wanted, after, _PAGE))
            for allocation in page:
                yield allocation
            if len(page) < _PAGE:
                return
            after = page[-1].generation

    def _of_all_nodes(self, wanted: Filter) -> AsyncIterator[Allocation]:
        if self._member is None:
            raise PreconditionError(
                'this ipamd belongs to no cluster ([store] kind = "etcd" makes it a member); list without the cluster'
            )
        return listing(self._member.etcd, wanted)

    async def WatchAllocations(
        self, request: pb.WatchAllocationsRequest, context: Context
    ) -> AsyncIterator[pb.AllocationEvents]:
        # Not counted in `in_hand`: it never ends, and is taken up again elsewhere.
        try:
            async for revision, events in self._events.follow(request.after):
                yield messages.events_message(revision, events)
        except IpamdError as error:
            await abort(context, error)

    @unary
    async def CheckStore(self, request: pb.CheckStoreRequest, request_id: str) -> pb.CheckStoreResponse:
        kernel = [KernelAddress(one.address, one.netns_inode, one.ifname) for one in request.kernel]
        at = messages.instant_of(request.at) if request.HasField("at") else None
        with log.request(request_id):
            report = await self._checker.check(kernel, at, request.repair)
        return pb.CheckStoreResponse(
            differences=[
                pb.Difference(kind=d.kind, pool=d.pool, address=d.address, node=d.node, text=d.text,
                              repairable=d.repairable, repaired=d.repaired)
                for d in report.differences
            ],
            allocations=report.allocations,
            blocks=report.blocks,
        )  # fmt: skip

    async def ExportStore(
        self, _request: pb.ExportStoreRequest, context: Context
    ) -> AsyncIterator[pb.ExportStoreResponse]:
        self.in_hand += 1
        try:
            try:
                snapshot = await self._engine.run_alone(self._store.snapshot)
            except IpamdError as error:
                await abort(context, error)
            try:
                shared = await self._shared()
                copy = snapshot.copy()
                head = backup.Head(backup.VERSION, self._store.kind, self._node, self._clock.unix_s(),
                                   copy.generation, copy.revision)  # fmt: skip
                pieces = backup.written(head, copy, shared)
                # In a thread: a piece takes some 5 ms, and meanwhile others are served.
                while piece := await asyncio.to_thread(next, pieces, b""):
                    yield pb.ExportStoreResponse(piece=piece)
            except IpamdError as error:
                await abort(context, error)
            finally:
                snapshot.close()
        finally:
            self.in_hand -= 1

    async def _shared(self) -> list[backup.Shared]:
        """What the cluster knows; nothing where there is none. Raises UnavailableError."""
        return [] if self._member is None else await self._member.records()

    @unary
    async def Reserve(self, request: pb.ReserveRequest, request_id: str) -> pb.Reservation:
        messages.check_name(request.note, "note")
        made = await self._desk.reserve(request.pool, request.address, request.note)
        log.event(_logger, "info", "reserved", pool=made.pool, address=made.ip, note=made.note, request_id=request_id)
        return pb.Reservation(pool=made.pool, address=made.ip, note=made.note)

    @unary
    async def Unreserve(self, request: pb.UnreserveRequest, request_id: str) -> pb.UnreserveResponse:
        await self._desk.unreserve(request.pool, request.address)
        log.event(_logger, "info", "unreserved", pool=request.pool, address=request.address, request_id=request_id)
        return pb.UnreserveResponse()

    @unary
    async def ListReservations(
        self, request: pb.ListReservationsRequest, _request_id: str
    ) -> pb.ListReservationsResponse:
        rows = await self._engine.run(lambda: list(self._store.reservations(request.pool)))
        return pb.ListReservationsResponse(
            reservations=[pb.Reservation(pool=row.pool, address=row.ip, note=row.note) for row in rows]
        )

    def _describe(self, pool: Pool) -> pb.Pool:
        return messages.pool_message(pool, self._ledger.usage(pool))


def _log_allocated(allocation: Allocation, created: bool, request_id: str) -> None:
    key = allocation.key
    log.event(
        _logger,
        "info",
        "allocated" if created else "allocated before",
        client=key.client,
        network=key.network,
        container_id=key.container_id,
        ifname=key.ifname,
        addresses=",".join([address.cidr for address in allocation.addresses]),
        generation=allocation.generation,
        request_id=request_id,
    )
