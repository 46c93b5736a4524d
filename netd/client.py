"""How the command line asks netd. Synchronous; every call has a deadline."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import grpc

from protos.node.v1 import node_pb2 as pb
from protos.node.v1.node_pb2_grpc import NodeStub

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
_LARGEST_MESSAGE = 64 << 20


class NodeError(Exception):
    """netd refused, or could not be reached. `message` is netd's own text for an operator."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Client:
    """A connection to netd, made at the first call."""

    def __init__(self, socket_path: str, timeout_s: float = 10.0) -> None:
        options = (*_OPTIONS, ("grpc.max_receive_message_length", _LARGEST_MESSAGE))
        self._channel = grpc.insecure_channel(f"unix:{socket_path}", options)
        self._stub = NodeStub(self._channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closing twice is harmless."""
        self._channel.close()

    def status(self) -> pb.StatusResponse:
        """What netd knows and has made. Raises NodeError, as all methods."""
        try:
            return self._stub.Status(pb.StatusRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _refusal(error) from None

    def explain(self, address: str) -> pb.ExplainResponse:
        """The way of a packet to an address."""
        try:
            return self._stub.Explain(pb.ExplainRequest(address=address), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _refusal(error) from None

    def sync(self) -> pb.SyncResponse:
        """Has netd compare everything now."""
        try:
            return self._stub.Sync(pb.SyncRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _refusal(error) from None


def _refusal(error: grpc.RpcError) -> NodeError:
    return NodeError(error.code(), error.details() or "")
