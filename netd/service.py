"""netd's API: messages in, questions to the thread for the kernel, and back. Nothing is decided here."""

# ruff: noqa: N802 (the handlers bear the names of the RPCs)

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, TypeVar

import grpc
from grpc import aio

from netd.agent import Agent
from netd.explain import explain
from netd.explain_overlay import explain_held
from netd.fabric.registry import TUNNELS
from netd.fabric.vxlan import device_name
from netd.overlay_status import overlay_messages
from netd.reconcile import Reconciler
from netd.values import AnyAddress, Holder, Node, Route
from netd.way import Way
from protos.node.v1 import node_pb2 as pb
from protos.node.v1.node_pb2_grpc import NodeServicer
from telemetry import log

Req = TypeVar("Req")
Resp = TypeVar("Resp")
Context = aio.ServicerContext[Any, Any]

_logger = logging.getLogger("netd")


class RefusedError(Exception):
    """The request can never work; the text says why."""


class UnknownHolderError(Exception):
    """It cannot be told now who holds an address; the text says why."""


class Source:
    """Where peers come from; what it says beside what the kernel has. The file's says nothing."""

    name = "file"

    def state(self) -> str:
        """Of the store: "connected", or why not; empty where there is none."""
        return ""

    def peer_state(self, _name: str) -> str:
        """ "up", "silent" or "refused"."""
        return "up"

    def peer_version(self, _name: str) -> str:
        """Of Netloom on that host; empty where nobody said."""
        return ""

    async def holder(self, _network: str, address: AnyAddress) -> Holder | None:
        """Who holds an address of an overlay, in the words of the store; None: nobody. Raises UnknownHolderError."""
        raise UnknownHolderError(f"who has {address} only a netd with etcd knows: set endpoints under [etcd]")

    def problems(self) -> list[str]:
        """What is wrong beside the kernel."""
        return []


def _unary(handler: Callable[[Service, Req], Awaitable[Resp]]) -> Callable[[Service, Req, Context], Awaitable[Resp]]:
    """Around a handler: answers what it raises."""

    @functools.wraps(handler)
    async def answer(self: Service, request: Req, context: Context) -> Resp:
        try:
            return await handler(self, request)
        except RefusedError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it was, the asker gets words
            log.event(_logger, "error", "a request failed", method=handler.__name__, error=str(error), exc_info=True)
            await context.abort(grpc.StatusCode.INTERNAL, f"netd failed: {error}")
        raise AssertionError("abort returned")

    return answer


class Service(NodeServicer):
    """The handlers."""

    def __init__(self, agent: Agent, source: Source, version: str, others: Callable[[], list[str]] = list) -> None:
        """`others`: what else is wrong beside the kernel."""
        self._agent = agent
        self._source = source
        self._version = version
        self._others = others
        self._began = time.monotonic()

    @_unary
    async def Status(self, _request: pb.StatusRequest) -> pb.StatusResponse:
        return await asyncio.wrap_future(self._agent.call(self._status))

    @_unary
    async def Explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        try:
            address = ip_address(request.address)
        except ValueError:
            raise RefusedError(
                f"address: wanted an IPv4 or IPv6 address without a length, found {request.address!r}"
            ) from None
        way = await asyncio.wrap_future(self._agent.call(lambda reconciler: explain(reconciler, address)))
        if way.kind == "unknown":
            way = await self._ask_for_holder(way, address)
        return _way(way)

    async def _ask_for_holder(self, way: Way, address: AnyAddress) -> Way:
        """Of an overlay whose holders this host does not follow, or not yet."""
        try:
            holder = await self._source.holder(way.network, address)
        except UnknownHolderError as error:
            return replace(way, problems=(*way.problems, str(error)))
        return await asyncio.wrap_future(
            self._agent.call(lambda reconciler: explain_held(reconciler, way, address, holder))
        )

    @_unary
    async def Sync(self, _request: pb.SyncRequest) -> pb.SyncResponse:
        def sync(reconciler: Reconciler) -> pb.SyncResponse:
            return pb.SyncResponse(changed=reconciler.full(), problems=reconciler.problems())

        return await asyncio.wrap_future(self._agent.call(sync))

    def problems(self, reconciler: Reconciler) -> list[str]:
        """All that is wrong, in words."""
        return [*self._source.problems(), *reconciler.problems(), *self._others()]

    def _status(self, reconciler: Reconciler) -> pb.StatusResponse:
        counts, underlay = reconciler.counts, reconciler.underlay
        return pb.StatusResponse(
            version=self._version,
            node=reconciler.node.name,
            uptime_s=time.monotonic() - self._began,
            settled=reconciler.settled,
            underlay=pb.Underlay(
                link=underlay.link,
                mtu=underlay.mtu,
                addresses=map(str, underlay.addresses),
                public=map(str, underlay.public),
            )
            if underlay is not None
            else None,
            networks=[
                pb.Network(
                    name=one.name,
                    subnets=map(str, one.subnets),
                    backend=one.backend,
                    vni=one.vni,
                    port=one.port,
                    mtu=reconciler.mtu(one),
                    own_subnets=[str(s) for s in reconciler.node.subnets if reconciler.network_of(s) is one],
                    device=device_name(one.vni) if one.backend in TUNNELS else "",
                    tx_checksum=one.tx_checksum,
                )
                for one in reconciler.networks
            ],
            peers=[self._peer(reconciler, one) for _, one in sorted(reconciler.peers.items())],
            problems=self.problems(reconciler),
            counts=pb.Counts(
                full=counts.full,
                changes=counts.changes,
                repairs=counts.repairs,
                last_full_s=counts.full_s,
                last_change_unix_s=counts.last_change,
                entries=len(reconciler.found.entries),
            ),
            mac=reconciler.node.mac,
            source=self._source.name,
            store_state=self._source.state(),
            overlays=overlay_messages(reconciler, self._source.peer_state),
        )

    def _peer(self, reconciler: Reconciler, peer: Node) -> pb.Peer:
        keys = reconciler.desired.keys_of(peer.name)
        return pb.Peer(
            name=peer.name,
            addresses=map(str, peer.addresses),
            subnets=map(str, peer.subnets),
            mac=peer.mac,
            state=self._source.peer_state(peer.name),
            problems=reconciler.problems_of(peer.name),
            wanted=len(keys),
            present=sum(reconciler.found.get(key) == reconciler.desired.get(key) for key in keys),
            version=self._source.peer_version(peer.name),
            takes_vxlan=peer.takes_vxlan,
            links=sorted({one.device for key in keys if isinstance(one := reconciler.desired.get(key), Route)}),
        )


def _way(way: Way) -> pb.ExplainResponse:
    return pb.ExplainResponse(
        kind=way.kind,
        node=way.node,
        network=way.network,
        backend=way.backend,
        subnet=way.subnet,
        way=_how(way),
        link=way.link,
        next_hop=way.next_hop,
        outer=way.outer,
        vni=way.vni,
        port=way.port,
        mtu=way.mtu,
        entries=[
            pb.EntryState(kind=one.kind, text=one.text, present=one.present, instead=one.instead) for one in way.entries
        ],
        kernel=way.kernel,
        problems=way.problems,
        bridge=way.bridge,
        mac=way.mac,
        note=way.note,
    )


def _how(way: Way) -> str:
    if way.kind not in ("peer", "overlay") or not way.link:
        return ""
    return "tunnel" if way.outer or way.kind == "overlay" else "route"
