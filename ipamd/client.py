"""How plugins and the command line ask ipamd. Synchronous; importing it costs the messages, and gRPC only who needs it.

- What every ADD and DEL asks goes over a connection of our own (`ipamd.http2`); the other methods, and whatever that
  connection does not know, go through gRPC's library.
- A `Pending` call is asked first and answered later; other work fits in between.
- Every call has a deadline. A call that ended because the connection was lost is repeated once over a fresh channel:
  an ipamd that was restarted is found at once, where gRPC's own reconnecting waits for a second. Every
  call of the API may be repeated: asking again gives the same answer.
- Each client has connections of its own (a local subchannel pool): a global one remembers an earlier failure.
- A socket path of more than 107 bytes (unix(7)) is reached through /proc/self/fd.

A client belongs to the network namespace in which it was made: gRPC's threads stay there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast
from urllib.parse import quote

from google.protobuf.message import DecodeError

from ipamd import http2
from protos.ipam.v1 import ipam_pb2 as pb

if TYPE_CHECKING:
    import grpc

Resp = TypeVar("Resp")

_SERVICE = "/netloom.ipam.v1.Ipam/"
# Whose answers fit into a stream's first window.
_SMALL = frozenset({"Allocate", "Release", "Check", "GetNetwork", "Status"})
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
        self._request_id = request_id
        self._connection: http2.Connection | None = None
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
        self._request_id = request_id
        self._metadata = (("x-request-id", request_id),) if request_id else ()

    def close(self) -> None:
        """Lets go of the connections; the next call makes another."""
        self.hang_up()
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
        workload: str = "",
        family: int = 0,
    ) -> pb.AllocateResponse:
        """The attachment's addresses, of named pools or of the network's own; of one `family` (4, 6), or all."""
        request = pb.AllocateRequest(
            key=key,
            netns=netns,
            at=at,
            pools=pools,
            network_pool=network_pool,
            requested=requested,
            workload=workload,
            family=family,
        )
        return self._call("Allocate", request, pb.AllocateResponse)

    def prepare_allocate(
        self,
        key: pb.AttachmentKey,
        *,
        netns: pb.Netns | None = None,
        at: pb.Instant | None = None,
        pools: Sequence[str] = (),
        network_pool: pb.NetworkPool | None = None,
        requested: Sequence[str] = (),
        workload: str = "",
    ) -> Pending[pb.AllocateResponse]:
        """As `allocate`, to be asked and answered when the caller likes."""
        request = pb.AllocateRequest(
            key=key, netns=netns, at=at, pools=pools, network_pool=network_pool, requested=requested, workload=workload
        )
        return Pending(self, "Allocate", request, pb.AllocateResponse)

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
        # A long list takes longer than one answer: the deadline is for the whole.
        yield from self._stream("ListAllocations", wanted or pb.ListAllocationsRequest(), pb.Allocation)

    def watch_allocations(self, after: int = 0) -> Iterator[pb.AllocationEvents]:
        """What happens to allocations, from behind a revision or (0) from now on, until the caller ends it.

        Each answer has the revision to go on from; the first has no events and comes at once. Raises OUT_OF_RANGE.
        """
        request = pb.WatchAllocationsRequest(after=after)
        yield from self._stream("WatchAllocations", request, pb.AllocationEvents, endless=True)

    def create_network(self, request: pb.CreateNetworkRequest) -> pb.Network:
        """Makes a network with its pool; the same again is no error."""
        return self._call("CreateNetwork", request, pb.Network)

    def get_network(self, name: str) -> pb.Network:
        """A network by its name."""
        return self._call("GetNetwork", pb.GetNetworkRequest(name=name), pb.Network)

    def list_networks(self) -> list[pb.Network]:
        """Every network, by name."""
        return list(self._call("ListNetworks", pb.ListNetworksRequest(), pb.ListNetworksResponse).networks)

    def delete_network(self, name: str) -> None:
        """Ends a network that nobody uses, with its pool."""
        self._call("DeleteNetwork", pb.DeleteNetworkRequest(name=name), pb.DeleteNetworkResponse)

    def connect_networks(self, one: str, other: str, *, undo: bool = False) -> list[pb.Network]:
        """Lets the containers of two networks reach one another, or ends that; returns both."""
        request = pb.ConnectNetworksRequest(one=one, other=other, undo=undo)
        return list(self._call("ConnectNetworks", request, pb.ConnectNetworksResponse).networks)

    def share_network(self, name: str, docker: str) -> pb.Network:
        """Has every host's Docker show an overlay network under a name, or ("") no longer."""
        return self._call("ShareNetwork", pb.ShareNetworkRequest(name=name, docker=docker), pb.Network)

    def set_mac(self, pool: str, address: str, mac: str) -> None:
        """Tells all hosts the MAC of an address that this node holds."""
        self._call("SetMac", pb.SetMacRequest(pool=pool, address=address, mac=mac), pb.SetMacResponse)

    def list_nodes(self, name: str = "") -> list[pb.Node]:
        """The nodes of the cluster, by name; or one of them."""
        return list(self._call("ListNodes", pb.ListNodesRequest(name=name), pb.ListNodesResponse).nodes)

    def drain_node(self, name: str, *, undo: bool = False) -> pb.Node:
        """Has a node give no new addresses of the cluster's pools."""
        return self._call("DrainNode", pb.DrainNodeRequest(name=name, undo=undo), pb.Node)

    def remove_node(self, name: str, *, force: bool = False) -> pb.RemoveNodeResponse:
        """Forgets a node with all that it holds."""
        return self._call("RemoveNode", pb.RemoveNodeRequest(name=name, force=force), pb.RemoveNodeResponse)

    def export_store(self) -> Iterator[bytes]:
        """A backup of all that the store holds, in pieces."""
        for answer in self._stream("ExportStore", pb.ExportStoreRequest(), pb.ExportStoreResponse):
            yield answer.piece

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

    def check_store(self, request: pb.CheckStoreRequest) -> pb.CheckStoreResponse:
        """Every difference between the store, the kernel as the request describes it, and the cluster."""
        return self._call("CheckStore", request, pb.CheckStoreResponse)

    def _stream(self, method: str, request: Any, response: type[Resp], *, endless: bool = False) -> Iterator[Resp]:
        """A call with any number of answers; unless endless, all come within twelve times the deadline of one."""
        import grpc  # noqa: PLC0415

        call = self._connect().unary_stream(  # type: ignore[call-arg]
            _SERVICE + method,
            request_serializer=_serialize,
            response_deserializer=cast(Any, response).FromString,
            _registered_method=False,
        )(request, timeout=None if endless else self._timeout_s * 12, metadata=self._metadata or None)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._failure(error) from None
        finally:
            cast(Any, call).cancel()

    def _call(self, method: str, request: Any, response: type[Resp]) -> Resp:
        return Pending(self, method, request, response).result()

    def ask(self, method: str, message: bytes) -> http2.Connection:
        """Send a request over our own connection, which is made where there is none.

        Raises:
            http2.LostError
        """
        connection, self._connection = self._connection, None
        if connection is None:
            connection = http2.Connection(self._socket_path, self._timeout_s)
        try:
            connection.ask(http2.request_headers(_SERVICE + method, self._timeout_s, self._request_id), message)
        except BaseException:
            connection.close()
            raise
        return connection

    def keep(self, connection: http2.Connection) -> None:
        """An answer came over it: the next request may go there too."""
        self.hang_up()
        self._connection = connection

    def hang_up(self) -> None:
        """Lets go of our own connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call_with_grpc(self, method: str, request: Any, response: type[Resp]) -> Resp:
        """A call through gRPC's library."""
        import grpc  # noqa: PLC0415 - 60 ms that most processes do not pay

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

    def lost(self, reason: str) -> IpamError:
        """The error for an ipamd that cannot be reached."""
        return _error(http2.UNAVAILABLE, f"ipamd is not reachable at {self._socket_path}; is it running? ({reason})")

    def late(self) -> IpamError:
        """The error for one that does not answer."""
        return _error(
            http2.DEADLINE_EXCEEDED, f"ipamd at {self._socket_path} did not answer within {self._timeout_s:g} s"
        )

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
            import grpc  # noqa: PLC0415

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
            raise self.lost(error.strerror or str(error)) from None
        return f"unix:/proc/self/fd/{self._directory}/{_quoted(name)}"

    def _failure(self, error: grpc.RpcError) -> IpamError:
        call = cast("grpc.Call", error)  # what a call raises is a call too; the stubs do not know
        code, details = call.code().value[0], call.details() or ""
        if _is_lost(error):
            # gRPC wraps the reason into a report about every address that it tried.
            return self.lost(details.rsplit(" error: ", 1)[-1])
        return self.late() if code == http2.DEADLINE_EXCEEDED else _error(code, details)


class Pending(Generic[Resp]):
    """A call: not asked yet, asked, or answered. Calls of one client in between go over another connection."""

    def __init__(self, client: Client, method: str, request: Any, response: type[Resp]) -> None:
        self._client = client
        self._method = method
        self._request = request
        self._response = response
        self._message: bytes = request.SerializeToString()
        self._connection: http2.Connection | None = None
        self._with_grpc = method not in _SMALL or len(self._message) > http2.LARGEST_REQUEST
        self.asked = False
        self.answer: Resp | None = None

    def ask(self) -> None:
        """Sends the request, if it has not been sent; what fails is for `result` to say."""
        if self.asked:
            return
        self.asked = True
        if not self._with_grpc:
            with contextlib.suppress(http2.LostError):
                self._connection = self._client.ask(self._method, self._message)

    def result(self) -> Resp:
        """Waits for the answer, which is `answer` from then on. Who was interrupted may wait again.

        Raises:
            IpamError: ipamd refused, or could not be reached, or does not answer.
        """
        self.ask()
        if not self._with_grpc:
            try:
                answer = self._answer()
            except http2.UnexpectedError:
                pass  # asked again, by one who knows all of the protocol
            else:
                if answer.code != http2.OK:
                    raise _error(answer.code, answer.text)
                with contextlib.suppress(DecodeError):  # gRPC knows what to say of it
                    self.answer = cast(Resp, cast(Any, self._response).FromString(answer.message))
                    return self.answer
        self.answer = self._client.call_with_grpc(self._method, self._request, self._response)
        return self.answer

    def _answer(self) -> http2.Answer:
        """The answer, over a second connection where the first was lost."""
        for last in (False, True):
            connection, self._connection = self._connection, None
            try:
                if connection is None:
                    connection = self._client.ask(self._method, self._message)
                answer = connection.answer()
            except http2.LostError as error:
                if connection is not None:
                    connection.close()
                if last:
                    raise self._client.lost(str(error)) from None
                continue
            except http2.LateError:
                if connection is not None:
                    connection.close()
                raise self._client.late() from None
            except http2.UnexpectedError:
                if connection is not None:
                    connection.close()
                raise
            except BaseException:
                self._connection = connection
                raise
            if answer.answered or answer.code not in (http2.UNAVAILABLE, http2.CANCELLED):
                self._client.keep(connection)
                return answer
            # Not ipamd says so, but a server between its last accept and its end: the call was not run.
            connection.close()
            if last:
                raise self._client.lost(answer.text)
        raise AssertionError("unreachable")


def _error(code: int, text: str) -> IpamError:
    import grpc  # noqa: PLC0415 - only who failed needs its codes

    found = next((one for one in grpc.StatusCode if one.value[0] == code), grpc.StatusCode.UNKNOWN)
    return IpamError(found, text)


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
    call = cast("grpc.Call", error)
    if call.code().value[0] not in (http2.UNAVAILABLE, http2.CANCELLED):
        return False
    return all(key != "x-answered-by" for key, _ in call.trailing_metadata() or ())
