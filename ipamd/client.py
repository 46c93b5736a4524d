"""How plugins and the command line ask ipamd. Synchronous; importing it costs grpc and the messages, nothing else.

- Every call has a deadline. A call that ended because the connection was lost is repeated once over a fresh channel:
  an ipamd that was restarted is found at once, where gRPC's own reconnecting waits for a second. Every
  call of the API may be repeated: asking again gives the same answer.
- Each client has a connection of its own (a local subchannel pool): a global one remembers an earlier failure.
- A socket path of more than 107 bytes (unix(7)) is reached through /proc/self/fd.

A client belongs to the network namespace in which it was made: gRPC's threads stay there.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import grpc

from protos.ipam.v1 import ipam_pb2 as pb

Resp = TypeVar("Resp")

_SERVICE = "/netloom.ipam.v1.Ipam/"
_LONGEST_SUN_PATH = 107
_LARGEST_MESSAGE = 64 << 20
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    # The proxy variables of a runtime's environment are not meant for a Unix socket.
    ("grpc.enable_http_proxy", 0),
)


class IpamError(Exception):
    """ipamd refused, or could not be reached. `message` is ipamd's own text for an operator."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Client:
    """A connection to ipamd, made at the first call. Not to be shared by threads, nor kept across a fork."""

    def __init__(self, socket_path: str, timeout_s: float = 5.0, request_id: str = "") -> None:
        """`timeout_s` is for each call; `request_id` appears in ipamd's log beside each."""
        self._socket_path = socket_path
        self._timeout_s = timeout_s
        self._metadata = (("x-request-id", request_id),) if request_id else ()
        self._channel: grpc.Channel | None = None
        self._directory = -1
        self._calls: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_request_id(self, request_id: str) -> None:
        """For the calls from now on: a worker keeps its connection for many requests."""
        self._metadata = (("x-request-id", request_id),) if request_id else ()

    def close(self) -> None:
        """Lets go of the connection; the next call makes another."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._calls.clear()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def allocate(
        self,
        key: pb.AttachmentKey,
        *,
        netns: pb.Netns | None = None,
        at: pb.Instant | None = None,
        pools: Sequence[str] = (),
        network_pool: pb.NetworkPool | None = None,
        requested: Sequence[str] = (),
    ) -> pb.AllocateResponse:
        """The attachment's addresses, of named pools or of the network's own."""
        request = pb.AllocateRequest(
            key=key, netns=netns, at=at, pools=pools, network_pool=network_pool, requested=requested
        )
        return self._call("Allocate", request, pb.AllocateResponse)

    def release(
        self, key: pb.AttachmentKey, *, generation: int = 0, before: pb.Instant | None = None
    ) -> pb.ReleaseResponse:
        """Gives the attachment's addresses back; nothing to give back is no error."""
        request = pb.ReleaseRequest(key=key, generation=generation, before=before)
        return self._call("Release", request, pb.ReleaseResponse)

    def check(self, key: pb.AttachmentKey, cidrs: Sequence[str]) -> pb.CheckResponse:
        """Raises NOT_FOUND or FAILED_PRECONDITION where the attachment does not hold exactly these."""
        return self._call("Check", pb.CheckRequest(key=key, cidrs=cidrs), pb.CheckResponse)

    def garbage_collect(self, request: pb.GarbageCollectRequest) -> pb.GarbageCollectResponse:
        """Releases what the request's list of valid attachments does not name."""
        return self._call("GarbageCollect", request, pb.GarbageCollectResponse)

    def status(
        self, *, pools: Sequence[str] = (), network: str = "", network_pool: pb.NetworkPool | None = None
    ) -> pb.StatusResponse:
        """Raises what the next `allocate` for these pools would; with none, only asks for the daemon's state."""
        request = pb.StatusRequest(pools=pools, network=network, network_pool=network_pool)
        return self._call("Status", request, pb.StatusResponse)

    def report_liveness(
        self, at: pb.Instant, live: Iterable[pb.LiveNetns], dry_run: bool = False
    ) -> pb.ReportLivenessResponse:
        """Tells every network namespace of the node, as seen from `at` on."""
        request = pb.ReportLivenessRequest(at=at, live=live, dry_run=dry_run)
        return self._call("ReportLiveness", request, pb.ReportLivenessResponse)

    def create_pool(self, name: str, spec: pb.PoolSpec) -> pb.Pool:
        """Makes a named pool; the same again is no error."""
        return self._call("CreatePool", pb.CreatePoolRequest(name=name, spec=spec), pb.Pool)

    def get_pool(self, name: str) -> pb.Pool:
        """A pool by its name; "net/<network>" is the one that ipamd keeps for a network."""
        return self._call("GetPool", pb.GetPoolRequest(name=name), pb.Pool)

    def list_pools(self) -> list[pb.Pool]:
        """Every pool, by name."""
        return list(self._call("ListPools", pb.ListPoolsRequest(), pb.ListPoolsResponse).pools)

    def delete_pool(self, name: str) -> None:
        """Removes a pool from which nothing is allocated."""
        self._call("DeletePool", pb.DeletePoolRequest(name=name), pb.DeletePoolResponse)

    def list_allocations(self, wanted: pb.ListAllocationsRequest | None = None) -> Iterator[pb.Allocation]:
        """Allocations that match, in the order in which they were made; every one where nothing is wanted."""
        path = _SERVICE + "ListAllocations"
        call = self._connect().unary_stream(  # type: ignore[call-arg]
            path,
            request_serializer=pb.ListAllocationsRequest.SerializeToString,
            response_deserializer=pb.Allocation.FromString,
            _registered_method=False,
        )
        try:
            # A long list takes longer than one answer: the deadline is for the whole.
            yield from call(
                wanted or pb.ListAllocationsRequest(), timeout=self._timeout_s * 12, metadata=self._metadata or None
            )
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def reserve(self, pool: str, address: str, note: str = "") -> pb.Reservation:
        """Keeps an address back."""
        return self._call("Reserve", pb.ReserveRequest(pool=pool, address=address, note=note), pb.Reservation)

    def unreserve(self, pool: str, address: str) -> None:
        """Ends a reservation."""
        self._call("Unreserve", pb.UnreserveRequest(pool=pool, address=address), pb.UnreserveResponse)

    def list_reservations(self, pool: str = "") -> list[pb.Reservation]:
        """Reservations (of one pool)."""
        request = pb.ListReservationsRequest(pool=pool)
        return list(self._call("ListReservations", request, pb.ListReservationsResponse).reservations)

    def _call(self, method: str, request: Any, response: type[Resp]) -> Resp:
        answer: Resp
        try:
            answer = self._method(method, response)(request, timeout=self._timeout_s, metadata=self._metadata or None)
        except grpc.RpcError as error:
            if not _is_lost(error):
                raise self._failure(error) from None
            self.close()
            try:
                answer = self._method(method, response)(
                    request, timeout=self._timeout_s, metadata=self._metadata or None
                )
            except grpc.RpcError as again:
                raise self._failure(again) from None
        return answer

    def _method(self, name: str, response: Any) -> Any:
        call = self._calls.get(name)
        if call is None:
            call = self._connect().unary_unary(
                _SERVICE + name,
                request_serializer=_serialize,
                response_deserializer=response.FromString,
            )
            self._calls[name] = call
        return call

    def _connect(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._target(), options=_OPTIONS)
        return self._channel

    def _target(self) -> str:
        path = os.path.abspath(self._socket_path)
        if len(os.fsencode(path)) <= _LONGEST_SUN_PATH:
            return f"unix:{_quoted(path)}"
        directory, name = os.path.split(path)
        try:
            self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise IpamError(
                grpc.StatusCode.UNAVAILABLE, f"ipamd is not reachable at {path}: {error.strerror}; is it running?"
            ) from None
        return f"unix:/proc/self/fd/{self._directory}/{_quoted(name)}"

    def _failure(self, error: grpc.RpcError) -> IpamError:
        code, details = _status_of(error)
        if _is_lost(error):
            code = grpc.StatusCode.UNAVAILABLE
            # gRPC wraps the reason into a report about every address that it tried.
            reason = details.rsplit(" error: ", 1)[-1]
            details = f"ipamd is not reachable at {self._socket_path}; is it running? ({reason})"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"ipamd at {self._socket_path} did not answer within {self._timeout_s:g} s"
        return IpamError(code, details)


def _quoted(path: str) -> str:
    """For gRPC, which reads the target as a URI: "%41" in a directory's name would be taken for "A"."""
    return quote(path, safe="/")


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _is_lost(error: grpc.RpcError) -> bool:
    """Whether the connection failed: ipamd marks an UNAVAILABLE of its own (addresses cooling down, store away).

    A call that reaches a server between its last accept and its end comes back CANCELLED, and was not run.
    """
    call = cast(grpc.Call, error)
    if call.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return False
    return all(key != "x-answered-by" for key, _ in call.trailing_metadata() or ())


def _status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    call = cast(grpc.Call, error)  # what a call raises is a call too; the stubs do not know
    return call.code(), call.details() or ""
