"""The API's handlers for networks: messages in, values to `networks`, and back."""

# ruff: noqa: N802 (the handlers bear the names of the RPCs)

import logging
import time
from collections.abc import Sequence

from cluster.layout import NetworkRecord
from ipamd import messages, overlay
from ipamd.errors import InvalidArgumentError
from ipamd.handlers import Handlers, unary
from ipamd.networks import Directory
from ipamd.overlay import OVERLAY
from protos.ipam.v1 import ipam_pb2 as pb
from telemetry import log
from telemetry.metrics import IpamdMetrics

_logger = logging.getLogger("ipamd")


class NetworkHandlers(Handlers):
    """See the top of this file."""

    def __init__(self, metrics: IpamdMetrics, directory: Directory) -> None:
        super().__init__(metrics)
        self._directory = directory

    @unary
    async def CreateNetwork(self, request: pb.CreateNetworkRequest, request_id: str) -> pb.Network:
        wanted = request.network
        record = NetworkRecord(
            wanted.name,
            wanted.type,
            tuple(wanted.subnets),
            wanted.backend,
            wanted.bridge,
            wanted.mtu,
            not wanted.no_masquerade,
            wanted.open,
            (),
            int(time.time()),
            wanted.vni,
            wanted.internal,
            wanted.flood,
        )
        if wanted.docker:
            raise InvalidArgumentError(
                f"docker: found {wanted.docker[:80]!r}; create the network first, then share it (docker network create)"
            )
        is_overlay = wanted.type == OVERLAY
        if is_overlay:
            for name in ("block_v4", "block_v6", "blocks_per_node"):
                if getattr(request, name):
                    raise InvalidArgumentError(
                        f"{name}: found {getattr(request, name)} with type overlay, which has no blocks; leave it out"
                    )
        spec = messages.spec_of(
            pb.PoolSpec(
                range_sets=[pb.RangeSet(ranges=[pb.Range(subnet=subnet)]) for subnet in wanted.subnets],
                excludes=request.excludes,
                mode=request.mode,
                block_v4=request.block_v4,
                block_v6=request.block_v6,
                blocks_per_node=request.blocks_per_node,
            ),
            "cluster-address" if is_overlay else self.mode,
        )
        made = await self._directory.create(record, spec)
        log.event(_logger, "info", "network created", network=made.name, subnets=",".join(made.subnets),
                  type=made.type, backend=made.backend, vni=made.vni, request_id=request_id)  # fmt: skip
        return network_message(made)

    @unary
    async def GetNetwork(self, request: pb.GetNetworkRequest, _request_id: str) -> pb.Network:
        return network_message(*await self._directory.get(request.name))

    @unary
    async def ListNetworks(self, _request: pb.ListNetworksRequest, _request_id: str) -> pb.ListNetworksResponse:
        return pb.ListNetworksResponse(networks=[network_message(*one) for one in await self._directory.all()])

    @unary
    async def DeleteNetwork(self, request: pb.DeleteNetworkRequest, request_id: str) -> pb.DeleteNetworkResponse:
        await self._directory.delete(request.name)
        log.event(_logger, "info", "network deleted", network=request.name, request_id=request_id)
        return pb.DeleteNetworkResponse()

    @unary
    async def ConnectNetworks(self, request: pb.ConnectNetworksRequest, request_id: str) -> pb.ConnectNetworksResponse:
        changed = await self._directory.connect(request.one, request.other, request.undo)
        log.event(_logger, "info", "networks disconnected" if request.undo else "networks connected",
                  one=request.one, other=request.other, request_id=request_id)  # fmt: skip
        return pb.ConnectNetworksResponse(
            networks=[network_message(*await self._directory.get(record.name)) for record in changed]
        )

    @unary
    async def ShareNetwork(self, request: pb.ShareNetworkRequest, request_id: str) -> pb.Network:
        shared = await self._directory.share(request.name, request.docker)
        log.event(_logger, "info", "network shared" if shared.docker else "network no longer shared",
                  network=shared.name, docker=shared.docker, request_id=request_id)  # fmt: skip
        return network_message(shared)

    @unary
    async def SetMac(self, request: pb.SetMacRequest, request_id: str) -> pb.SetMacResponse:
        await self._directory.set_mac(request.pool, request.address, request.mac)
        log.event(_logger, "info", "MAC of an address told", pool=request.pool, address=request.address,
                  mac=request.mac, request_id=request_id)  # fmt: skip
        return pb.SetMacResponse()


def network_message(record: NetworkRecord, reachable: Sequence[str] = ()) -> pb.Network:
    """A network, and the subnets that it is connected with."""
    return pb.Network(
        name=record.name,
        type=record.type,
        subnets=record.subnets,
        backend=record.backend,
        bridge=record.bridge,
        mtu=record.mtu,
        no_masquerade=not record.masquerade,
        open=record.open,
        connected=record.connected,
        reachable=reachable,
        pool=record.name,
        created_unix_s=record.created_unix_s,
        vni=record.vni,
        internal=record.internal,
        flood=record.flood,
        docker=record.docker,
        gateways=overlay.gateways(record),
    )
