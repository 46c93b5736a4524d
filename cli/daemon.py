"""The way from the command to ipamd: find its socket, speak to it, and turn what it refuses into a Failure.

The socket is tried by hand first: connect(2) says whether there is nothing, nobody or no permission, where gRPC says
for each that it is unavailable.
"""

import errno
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc

from cli.failure import Failure, Status
from ipamd.client import Client, IpamError
from kernel import paths, settings

TIMEOUT_S = 10.0


def socket_path(flag: str | None, environment: Mapping[str, str]) -> str:
    """Where ipamd listens: --socket, else the host's configuration, else the environment, else the default."""
    if flag:
        return os.path.abspath(flag)
    try:
        return settings.ipamd_socket(environment)
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


@contextmanager
def connected(path: str, timeout_s: float = TIMEOUT_S) -> Iterator[Client]:
    """A client of ipamd for the duration of the block. `timeout_s` is for each call.

    What ipamd refuses within the block becomes a Failure in its own words. Raises Failure (status 3) where nobody
    answers.
    """
    try:
        knock(path, timeout_s)
    except OSError as error:
        raise Failure(unreachable(path, error), Status.UNREACHABLE) from None
    # The request id is written to ipamd's log beside what this command made it do.
    with Client(path, timeout_s, secrets.token_hex(8)) as client:
        try:
            yield client
        except IpamError as error:
            raise refusal(error) from None


def refusal(error: IpamError) -> Failure:
    """What ipamd's refusal means for the operator."""
    text = error.message or "ipamd gave no reason; see its log"
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Failure(text, Status.UNREACHABLE)
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return Failure(text, Status.USAGE)
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return Failure(f"ipamd is of another version than this command ({text}); install one version of both")
    if error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return Failure(f"ipamd failed ({text}); see its log")
    return Failure(text)


def knock(path: str, timeout_s: float) -> None:
    """Connects and hangs up. A socket's path has at most 107 bytes (unix(7)); through the directory's descriptor any
    path is a short one."""
    directory = os.open(os.path.dirname(path) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(timeout_s)
            probe.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)


def unreachable(path: str, error: OSError, daemon: str = "ipamd") -> str:
    """Why nobody answers on a daemon's socket, and what to do."""
    shown = repr(path)[1:-1]
    if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
        return f"{daemon} does not take connections on {shown}: it is overloaded or stopped; see its log"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{daemon} is not running: there is no socket {shown}; start it, or name its socket with --socket"
    if error.errno == errno.ECONNREFUSED:
        return f"{daemon} is not running: nobody listens on {shown}; start it and see its log"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"you may not open {shown}; run this as root, or join the group that the socket belongs to"
    return f"cannot reach {daemon} on {shown}: {error.strerror or error}; is it the right path?"
