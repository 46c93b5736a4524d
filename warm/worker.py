"""One warm worker: takes one request at a time and serves it with the code that a cold process runs.

Rules of this file
- Nothing of a request stays: its environment is a value that is handed down, its descriptors are closed, working
  directory, umask and network namespace are the worker's own again afterwards. A worker that cannot prove that it is at
  home ends; its master starts another.
- Work starts after ACCEPTED was sent, and not at all when that failed: the launcher has gone the cold way then.
- An answer counts when DONE came. Giving up on it is shutdown(SHUT_RD) and one more look, as in the launcher: a DONE
  that was sent before is found, and one that is sent later fails over there.
- What the worker keeps open (rtnetlink, nfnetlink, ipamd) was opened at home before the first request. After a request
  that failed the netlink sockets are opened anew.
- SIGTERM lets the request in hand finish. It only sets a flag. The accept(2) below returns on a signal, and once in
  LOOK_S: a signal that came just before it was entered has not interrupted it, and nobody sends another.
"""

import array
import contextlib
import ctypes
import errno
import io
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

from cni import registry, skel, wire
from cni.errors import CniError, Code
from cni.ipam import ipamd
from cni.undo import Undo
from kernel import netns
from kernel.deleter import Deleter
from kernel.session import Session
from telemetry import trace
from warm.board import Board

READ_TIMEOUT_S = 1.0  # for the whole request: a launcher sends it at once, and has given up after that time
DONE_TIMEOUT_S = 10.0  # a runtime that does not read its pipe for so long has lost interest
DEADLINE_S = 60.0
LOOK_S = 1  # in accept(2) at most, then a look at whether SIGTERM came
_AGAIN_S = 5.0  # a step that went on after the deadline is interrupted again
_STDERR_LIMIT = 256 * 1024
_NOT_AT_HOME = 70
_LOOK = struct.pack("@ll", LOOK_S, 0)
_READ_TIMEOUT = struct.pack("@ll", int(READ_TIMEOUT_S), int(READ_TIMEOUT_S % 1 * 1e6))
_PEER = struct.Struct("=iII")
_PLACES = ("/proc/self/ns/net", "/proc/self/ns/mnt", "/proc/self/ns/user", "/")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """`deadline_s`: for a request, up to its answer. `ipamd_socket`: to be connected before the first request."""

    deadline_s: float = DEADLINE_S
    ipamd_socket: str = ""


class NotAtHome(BaseException):
    """This worker may be in a container's namespace; whatever it would do next would be wrong."""


class Worker:
    """Serves connections of one listening socket until it is told to stop."""

    def __init__(
        self, listener_fd: int, board: Board, slot: int, settings: Settings, on_busy: Callable[[], None] = lambda: None
    ) -> None:
        self._listener_fd = listener_fd
        self._board = board
        self._slot = slot
        self._settings = settings
        self._on_busy = on_busy
        self._home = _places()
        self._home_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._served = 0
        self._interruptible = False
        self._stopping = False
        self._overdue = False
        self._deleter = Deleter()
        self._session = _open_session(self._deleter)
        if settings.ipamd_socket:
            ipamd.keep_connections(settings.ipamd_socket)

    def stop(self) -> None:
        """Finish the request in hand, if there is one, and end. May be called by a signal handler."""
        self._stopping = True

    def _goes_on(self) -> bool:
        # A function of its own: Python runs the handler of a signal that ended accept(2) when a call begins.
        return not self._stopping

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            NotAtHome: the process must end at once.
        """
        signal.signal(signal.SIGALRM, self._late)
        _return_in_time(self._listener_fd)
        self._board.ready(self._slot)
        while self._goes_on():
            fd = _accept(self._listener_fd)
            if fd < 0:
                continue
            trace.begin("warm", "receive")
            self._board.begin(self._slot)
            self._on_busy()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) as launcher:
                self._serve(launcher)
            self._served += 1
            self._board.end(self._slot, self._served)

    def _serve(self, launcher: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            try:
                _check_peer(launcher)
                request = _receive(launcher, descriptors)
                netns_fd = self._enter(request, descriptors)
                _check_netns(request, netns_fd)
            except (wire.WireError, OSError) as error:
                _refuse(launcher, str(error))
                return
            if _send(launcher, self._accepted):
                self._work(launcher, request)
        finally:
            for fd in descriptors:
                os.close(fd)
            os.fchdir(self._home_fd)
            os.umask(0o022)
            self._prove_home()

    @property
    def _accepted(self) -> bytes:
        return wire.frame(wire.KIND_ACCEPTED, [(wire.TAG_DEADLINE, wire.u32(int(self._settings.deadline_s * 1000)))])

    def _enter(self, request: wire.Request, descriptors: list[int]) -> int:
        """Be where the launcher is; its descriptor of CNI_NETNS, or -1."""
        if request.places != self._home:
            raise wire.WireError(f"launcher and worker are in different places: {request.places}, {self._home}")
        if request.program not in registry.PLUGINS:
            raise wire.WireError(f"no plugin is called {request.program!a}")
        wanted = [bit for bit in (wire.DESCRIPTOR_CWD, wire.DESCRIPTOR_NETNS) if request.descriptors & bit]
        if len(wanted) != len(descriptors) or wire.DESCRIPTOR_CWD not in wanted:
            raise wire.WireError(f"{len(descriptors)} descriptors came, {len(wanted)} were announced")
        os.fchdir(descriptors[0])
        os.umask(request.umask & 0o777)
        return descriptors[1] if len(wanted) == 2 else -1

    def _work(self, launcher: socket.socket, request: wire.Request) -> None:
        log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        own_stderr, sys.stderr = sys.stderr, log
        delivered = False

        def deliver(outcome: skel.Outcome) -> None:
            nonlocal delivered
            self._interruptible = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            _respond(launcher, outcome, _written(log))
            _wait_for_done(launcher)
            delivered = True

        self._interruptible = True
        signal.setitimer(signal.ITIMER_REAL, self._settings.deadline_s, _AGAIN_S)
        try:
            outcome = skel.run(
                request.program,
                request.environment,
                lambda: request.stdin or b"",
                lambda: self._session,
                deliver=deliver,
            )
        finally:
            self._interruptible = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stderr = own_stderr
        if not delivered:
            _tell(request, _written(log) + outcome.stderr)
        if outcome.status != 0:
            self._session.close()
            self._session = _open_session(self._deleter)
        if self._overdue:
            self.stop()  # what was interrupted may have left something open

    def _late(self, _number: int, frame: FrameType | None) -> None:
        """SIGALRM: the request has had its time. Not while a step is being undone, nor inside a container's namespace,
        where what runs next must be the way home."""
        if not self._interruptible:
            return
        self._overdue = True
        if _is_undoing(frame):
            return
        if netns.own() != netns.Identity(*self._home[:2]):
            signal.setitimer(signal.ITIMER_REAL, 0.01, _AGAIN_S)
            return
        raise CniError(
            Code.TRY_AGAIN_LATER,
            f"the request did not finish within {self._settings.deadline_s:g} s",
            "what an ADD had done is undone; `--deadline` of netloom-cni.service sets another limit",
        )

    def _prove_home(self) -> None:
        try:
            here = netns.own()
        except OSError as error:
            raise NotAtHome(str(error)) from error
        if (here.device, here.inode) != self._home[:2]:
            raise NotAtHome(f"in network namespace {here.inode}, not in {self._home[1]}")


def _open_session(deleter: Deleter) -> Session:
    session = Session(deleter)
    with contextlib.suppress(OSError):
        session.netfilter.fileno()  # opened now, at home; a kernel without it refuses who asks for it
    return session


def _places() -> tuple[int, ...]:
    """Where this process is, as the launcher tells it of itself."""
    return tuple(number for path in _PLACES for number in _identity(path))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _return_in_time(listener_fd: int) -> None:
    """Let accept(2) return after LOOK_S (socket(7), SO_RCVTIMEO). It is the socket's own, the same for all workers."""
    listener = socket.socket(fileno=listener_fd)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK)
    finally:
        listener.detach()


def _accept(listener_fd: int) -> int:
    """A connection; -1 after a signal, after LOOK_S, or where the peer is gone already.

    Not socket.accept, which goes on after a signal (PEP 475).
    """
    fd = int(_libc.accept4(listener_fd, None, None, socket.SOCK_CLOEXEC))
    if fd < 0 and (number := ctypes.get_errno()) not in (errno.EINTR, errno.ECONNABORTED, errno.EAGAIN):
        raise OSError(number, f"accept a launcher: {os.strerror(number)}")
    return fd


def _check_peer(launcher: socket.socket) -> None:
    _pid, uid, _gid = _PEER.unpack(launcher.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != 0:
        raise wire.WireError(f"only root may ask, found user {uid}")


def _receive(launcher: socket.socket, descriptors: list[int]) -> wire.Request:
    """The request; what came along is appended to `descriptors`, also when it raises."""
    until = time.monotonic() + READ_TIMEOUT_S
    launcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _READ_TIMEOUT)
    data, ancillary, _flags, _address = launcher.recvmsg(65536, 64, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors.extend(numbers)
    received = bytearray(data)
    while data and len(received) < wire.HEADER_SIZE:
        data = _more(launcher, until)
        received += data
    if len(received) < wire.HEADER_SIZE:
        raise wire.WireError("the launcher left")
    head = wire.header(received)
    if head.kind != wire.KIND_REQUEST:
        raise wire.WireError(f"wanted a request, found a frame of kind {head.kind}")
    size = wire.HEADER_SIZE + head.length
    while data and len(received) < size:
        data = _more(launcher, until)
        received += data
    if len(received) != size:
        raise wire.WireError(f"wanted a request of {size} bytes, found {len(received)}")
    return wire.request(memoryview(received)[wire.HEADER_SIZE :].tobytes())


def _more(launcher: socket.socket, until: float) -> bytes:
    if time.monotonic() > until:
        raise wire.WireError(f"the request did not arrive within {READ_TIMEOUT_S:g} s")
    return launcher.recv(1 << 18)


def _check_netns(request: wire.Request, netns_fd: int) -> None:
    """CNI_NETNS must lead a worker to what it leads the launcher to: /proc/self/fd/3 does not."""
    path = request.environment.get("CNI_NETNS", "")
    if not path:
        return
    try:
        here = os.stat(path)
    except (OSError, ValueError):
        if netns_fd < 0:
            return  # gone for both; the plugin decides what that means
        raise wire.WireError(f"CNI_NETNS {path!a} is there for the launcher and not for the worker") from None
    if netns_fd < 0:
        raise wire.WireError(f"CNI_NETNS {path!a} is there for the worker and not for the launcher")
    there = os.fstat(netns_fd)
    if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        raise wire.WireError(f"CNI_NETNS {path!a} is not the same for launcher and worker")


def _refuse(launcher: socket.socket, reason: str) -> None:
    reason_text = reason.encode("utf-8", "backslashreplace")[:1000]
    _send(launcher, wire.frame(wire.KIND_REFUSED, [(wire.TAG_REASON, reason_text)]))


def _send(launcher: socket.socket, data: bytes) -> bool:
    """Whether all of it went out, in one call."""
    try:
        return launcher.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT) == len(data)
    except OSError:
        return False


def _respond(launcher: socket.socket, outcome: skel.Outcome, log: bytes) -> None:
    """Send the answer.

    Raises:
        OSError: the launcher left.
    """
    stderr = log + outcome.stderr
    if len(stderr) > _STDERR_LIMIT:
        stderr = stderr[:_STDERR_LIMIT] + b"\nnetloom: more was written; only the beginning is shown\n"
    response = wire.frame(
        wire.KIND_RESPONSE,
        [
            (wire.TAG_STDOUT, outcome.stdout),
            (wire.TAG_STDERR, stderr),
            (wire.TAG_STATUS, wire.u32(outcome.status)),
        ],
    )
    launcher.settimeout(DONE_TIMEOUT_S)
    launcher.sendall(response, socket.MSG_NOSIGNAL)


def _wait_for_done(launcher: socket.socket) -> None:
    """Returns when the launcher has printed the answer.

    Raises:
        OSError: it has not, and whoever waits for its DONE learns that it failed.
    """
    try:
        done = launcher.recv(wire.HEADER_SIZE)
    except TimeoutError:
        launcher.shutdown(socket.SHUT_RD)
        done = launcher.recv(wire.HEADER_SIZE)
    if len(done) != wire.HEADER_SIZE or _kind_of(done) != wire.KIND_DONE:
        raise ConnectionError("the launcher left before it had printed the answer")


def _kind_of(data: bytes) -> int:
    try:
        return wire.header(data).kind
    except wire.WireError:
        return 0


def _written(log: io.TextIOWrapper) -> bytes:
    buffer = log.buffer
    return buffer.getvalue() if isinstance(buffer, io.BytesIO) else b""


def _tell(request: wire.Request, log: bytes) -> None:
    """What a launcher did not get to print goes to the service's log."""
    environment: Mapping[str, str] = request.environment
    who = f"{request.program} {environment.get('CNI_COMMAND', '')} {environment.get('CNI_CONTAINERID', '')}"
    with contextlib.suppress(OSError):
        os.write(2, f"netloom: {who!a}: the launcher left\n".encode() + log)


def _is_undoing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is Undo.unwind.__code__:
            return True
        frame = frame.f_back
    return False
