"""The way from the command to ipamd: find its socket, speak to it, and turn what it refuses into a Failure.

The socket is tried by hand first: connect(2) says whether there is nothing, nobody or no permission, where gRPC says
for each that it is unavailable.
"""

import errno
import os
import secrets
import socket
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Protocol, Self, TypeVar
from urllib.parse import quote

import grpc

from cli.failure import Failure, Status
from kernel import paths
from protos.ipam.v1 import ipam_pb2_grpc

Q_contra = TypeVar("Q_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")
Metadata = tuple[tuple[str, str | bytes], ...]

TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 120.0  # a list of 100,000 allocations through a slow pipe
# A pool of many ranges, or a report of many namespaces, is more than gRPC's default of 4 MiB.
_LARGEST_MESSAGE = 64 << 20


class Unary(Protocol[Q_contra, R_co]):
    """A method of the stub that takes one message and gives one."""

    def __call__(self, request: Q_contra, timeout: float | None = ..., metadata: Metadata | None = ...) -> R_co: ...


def socket_path(flag: str | None, environment: Mapping[str, str]) -> str:
    """Where ipamd listens: --socket, else the host's configuration, else the environment, else the default."""
    if flag:
        return os.path.abspath(flag)
    try:
        return _configured(paths.config_file(environment)) or paths.ipamd_socket(environment)
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


def _configured(file: str) -> str:
    """The socket that the configuration names, or "". ipamd itself says what is wrong with a file; here it is passed
    over, since the command has to work just then."""
    try:
        with open(file, "rb") as stream:
            table = tomllib.load(stream).get("ipamd", {})
    except (OSError, ValueError):
        return ""
    value = table.get("socket", "") if isinstance(table, dict) else ""
    return value if isinstance(value, str) and value.startswith("/") else ""


class Daemon:
    """A channel to ipamd, as a context manager. Entering raises Failure (status 3) where nobody answers."""

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self._timeout_s = timeout_s
        # Written to ipamd's log beside what this command made it do.
        self._metadata: Metadata = (("x-request-id", secrets.token_hex(8)),)
        self._directory = -1
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        try:
            # A socket's path has at most 107 bytes (unix(7)); the directory's descriptor makes any path a short one.
            self._directory = os.open(os.path.dirname(self.path) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            name = os.path.basename(self.path)
            self._knock(f"/proc/self/fd/{self._directory}/{name}")
        except OSError as error:
            self.close()
            raise Failure(_unreachable(self.path, error), Status.UNREACHABLE) from None
        except BaseException:
            self.close()
            raise
        # The target is a URI, so the name is quoted; the authority stands in a header and must not hold the path.
        self._channel = grpc.insecure_channel(
            f"unix:/proc/self/fd/{self._directory}/{quote(name)}",
            [
                ("grpc.default_authority", "localhost"),
                ("grpc.enable_retries", 0),
                ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
                ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ],
        )
        self.stub = ipam_pb2_grpc.IpamStub(self._channel)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channel. Closing twice is harmless."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def call(self, method: Unary[Q_contra, R], request: Q_contra) -> R:
        """One call. Raises Failure with ipamd's own words."""
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise refusal(error, self.path, self._timeout_s) from None

    def stream(self, method: Unary[Q_contra, Iterable[R]], request: Q_contra) -> Iterator[R]:
        """The messages of a streamed answer as they come. Raises Failure, also in the middle."""
        try:
            yield from method(request, timeout=STREAM_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise refusal(error, self.path, STREAM_TIMEOUT_S) from None

    def _knock(self, short_path: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(self._timeout_s)
            probe.connect(short_path)


def _unreachable(path: str, error: OSError) -> str:
    shown = repr(path)[1:-1]
    remedies = {
        errno.ENOENT: f"ipamd is not running: there is no socket {shown}; start it, or name its socket with --socket",
        errno.ENOTDIR: f"ipamd is not running: there is no socket {shown}; start it, or name its socket with --socket",
        errno.ECONNREFUSED: f"ipamd is not running: nobody listens on {shown}; start it and see its log",
        errno.EACCES: f"you may not open {shown}; run this as root, or join the group that the socket belongs to",
        errno.EPERM: f"you may not open {shown}; run this as root, or join the group that the socket belongs to",
    }
    if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
        return f"ipamd does not take connections on {shown}: it is overloaded or stopped; see its log"
    found = error.strerror or str(error)
    return remedies.get(error.errno or 0, f"cannot reach ipamd on {shown}: {found}; is it the right path?")


def refusal(error: grpc.RpcError, path: str, timeout_s: float) -> Failure:
    """What a failed call means for the operator."""
    code, details = error.code(), error.details() or "no reason was given"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text = f"ipamd on {path} did not answer within {timeout_s:g} s; see its log, or try again"
        return Failure(text, Status.UNREACHABLE)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Failure(f"ipamd cannot do this now: {details}", Status.UNREACHABLE)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Failure(details, Status.USAGE)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Failure(f"ipamd on {path} is of another version than this command: {details}; install one version")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return Failure(f"ipamd failed: {details}; see its log")
    return Failure(details)
