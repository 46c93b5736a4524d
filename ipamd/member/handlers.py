"""The API's handlers for the nodes of a cluster: messages in, values to `nodes`, and back."""

# ruff: noqa: N802 (the handlers bear the names of the RPCs)

import logging
import time

from ipamd.errors import InvalidArgumentError, PreconditionError
from ipamd.handlers import unary
from ipamd.member.member import Member
from ipamd.member.nodes import Nodes, NodeView
from ipamd.network_handlers import NetworkHandlers
from ipamd.networks import Directory
from protos.ipam.v1 import ipam_pb2 as pb
from telemetry import log
from telemetry.metrics import IpamdMetrics

_logger = logging.getLogger("ipamd")


class NodeHandlers(NetworkHandlers):
    """See the top of this file. `member` is None where the store belongs to one host."""

    def __init__(self, metrics: IpamdMetrics, directory: Directory, member: Member | None) -> None:
        super().__init__(metrics, directory)
        self._member = member
        if member is not None:
            self.mode = "node-block"

    @unary
    async def ListNodes(self, request: pb.ListNodesRequest, _request_id: str) -> pb.ListNodesResponse:
        return pb.ListNodesResponse(nodes=[_message(node) for node in await self._nodes().all(request.name)])

    @unary
    async def DrainNode(self, request: pb.DrainNodeRequest, request_id: str) -> pb.Node:
        view = await self._nodes().drain(_named(request.name), request.undo)
        log.event(_logger, "info", "node no longer drained" if request.undo else "node drained", drained=request.name,
                  request_id=request_id)  # fmt: skip
        return _message(view)

    @unary
    async def RemoveNode(self, request: pb.RemoveNodeRequest, _request_id: str) -> pb.RemoveNodeResponse:
        removed = await self._nodes().remove(_named(request.name), force=request.force)
        return pb.RemoveNodeResponse(blocks=removed.blocks, addresses=removed.addresses)

    def _nodes(self) -> Nodes:
        if self._member is None:
            raise PreconditionError(
                'this ipamd is not one of a cluster; [store] kind = "etcd" makes it one (docs/operations.md)'
            )
        return self._member.nodes


async def add_state(answer: pb.StatusResponse, member: Member, *, with_endpoints: bool) -> None:
    """What a status says of the cluster."""
    state = member.state
    answer.etcd_reachable = state.connected
    answer.etcd_since_s = time.monotonic() - state.since
    answer.draining = member.draining
    answer.unpublished = member.unpublished
    if with_endpoints:
        answer.etcd.extend(
            pb.EtcdEndpoint(
                endpoint=one.endpoint,
                version=one.version,
                leader=one.leader,
                db_bytes=one.db_bytes,
                alarms=one.alarms,
                error=one.error,
            )
            for one in await member.endpoints()
        )


def _named(name: str) -> str:
    if not name:
        raise InvalidArgumentError("name: wanted a node's name, found nothing")
    return name


def _message(node: NodeView) -> pb.Node:
    alive = node.alive
    return pb.Node(
        name=node.name,
        id=node.record.id,
        hostname=node.record.hostname,
        alive=alive is not None,
        draining=node.record.draining,
        created_unix_s=node.record.created_unix_s,
        alive_since_unix_s=alive.since_unix_s if alive else 0,
        version=alive.version if alive else "",
        blocks=node.blocks,
        addresses=node.addresses,
        boot_id=alive.boot_id if alive else "",
    )
