"""A request to a warm worker, without a launcher in between.

Executing a launcher costs as much as a millisecond, for a process that says over a socket what its caller could have
said. So the shim speaks to the workers itself where the executable in CNI_PATH is our launcher, by the launcher's rules
(docs/warm-protocol.md):

- Until a worker says ACCEPTED, whatever goes wrong leads to the execution of the launcher. After that it never does.
- Giving up on a worker is shutdown(SHUT_RD) and one more look, so that no worker starts that was given up.
- DONE goes out once the answer is here; an ADD whose worker does not hear it is undone there, and has failed.

Who asks may do other work before it wants the answer.
"""

import array
import contextlib
import functools
import os
import re
import socket
import struct
import time
from collections.abc import Mapping

from cni import wire
from kernel import paths

SOCKET_NAME = "cni.sock"
_ACCEPT_WAIT_MS = 1000
_ANSWER_GRACE_MS = 15_000  # after the deadline that the worker names in ACCEPTED
_ANSWER_WAIT_MS = 60_000  # where it names none
_LONGEST_WAIT_MS = 3_600_000
_LONGEST_SUN_PATH = 107
_PIECE = 1 << 16
_PEER = struct.Struct("=iII")
_PLACES = ("/proc/thread-self/ns/net", "/proc/thread-self/ns/mnt", "/proc/thread-self/ns/user", "/")
# By which `make install` knows it, too; in the text for a worker that was lost.
_SIGN = b"netloom-cni.service"
_LARGEST_LAUNCHER = 8 << 20
_UMASK = re.compile(r"^Umask:\s+([0-7]+)$", re.MULTILINE)


class LostError(Exception):
    """A worker took the request, and no answer came: what it did of an ADD is undone by a DEL."""


def is_launcher(path: str) -> bool:
    """Whether this executable is our launcher, under whatever name. Of a file that stays the same, known at once."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return _is_launcher(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=64)
def _is_launcher(path: str, identity: tuple[int, ...]) -> bool:
    if identity[2] > _LARGEST_LAUNCHER:
        return False
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        return False
    return content.startswith(b"\x7fELF") and _SIGN in content


def ask(program: str, environment: Mapping[str, str], stdin: bytes) -> "Asked | None":
    """Hand a request to the workers; None where nobody is there to take it.

    Args:
        program: the plugin's name.
        environment: that of the plugin, with CNI_* and NETLOOM_*.
        stdin: its configuration.
    """
    if len(stdin) > wire.STDIN_LIMIT:
        return None
    until = time.monotonic() + _accept_wait_ms(environment) / 1000
    descriptors: list[int] = []
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        descriptors.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        frame = _frame(program, environment, stdin, descriptors)
        connection.setblocking(False)  # a full queue is a refusal
        _connect(connection, _socket_path(environment))
        _check_peer(connection)
    except (OSError, ValueError):
        connection.close()
        return None
    else:
        # One that refuses early, or is killed, makes sending fail; what it said last counts all the same.
        with contextlib.suppress(OSError):
            _send(connection, frame, descriptors, until)
        return Asked(connection, until)
    finally:
        for fd in descriptors:
            os.close(fd)


class Asked:
    """A request that was sent, to be closed by who asked: an ADD whose answer nobody waited for is undone."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection = connection
        self._until = until
        self._received = bytearray()

    def close(self) -> None:
        """Closing twice is harmless."""
        self._connection.close()

    def answer(self) -> wire.Response | None:
        """What the worker answered; None: nobody took the request, and nobody will.

        Raises:
            LostError
        """
        allowed_ms = self._accepted()
        if allowed_ms is None:
            return None
        until = time.monotonic() + (min(allowed_ms, _LONGEST_WAIT_MS) + _ANSWER_GRACE_MS) / 1000
        try:
            kind, body = self._frame(until) or (0, b"")
            answer = wire.response(body) if kind == wire.KIND_RESPONSE else None
        except wire.WireError:
            answer = None
        if answer is None:
            raise LostError("the worker that served the request was lost; the log of netloom-cni.service tells why")
        if not self._done() and answer.status == 0:
            raise LostError("the worker did not learn that its answer arrived, and undoes what it did")
        return answer

    def _accepted(self) -> int | None:
        """What the worker allows itself, in milliseconds; None where it does not start."""
        try:
            found = self._frame(self._until)
            if found is None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RD)
                while self._receive(self._until):
                    pass
                found = self._first()
            # A worker sends all of ACCEPTED in one call or does not start, so a piece of it is no ACCEPTED.
            if found is None or found[0] != wire.KIND_ACCEPTED:
                return None
            return wire.deadline_ms(found[1], _ANSWER_WAIT_MS)
        except wire.WireError:
            return None

    def _frame(self, until: float) -> tuple[int, bytes] | None:
        """Kind and body of the next frame; None where there will be none, or not in time."""
        while True:
            found = self._first()
            if found is not None or not self._receive(until):
                return found

    def _first(self) -> tuple[int, bytes] | None:
        if len(self._received) < wire.HEADER_SIZE:
            return None
        head = wire.header(self._received)
        size = wire.HEADER_SIZE + head.length
        if len(self._received) < size:
            return None
        body = bytes(self._received[wire.HEADER_SIZE : size])
        del self._received[:size]
        return head.kind, body

    def _receive(self, until: float) -> bool:
        """Wait for more; False where no more comes, or not in time. What is there already counts at any time."""
        try:
            self._connection.settimeout(max(until - time.monotonic(), 0))
            data = self._connection.recv(_PIECE)
        except OSError:
            return False
        self._received += data
        return bool(data)

    def _done(self) -> bool:
        data = wire.frame(wire.KIND_DONE)
        try:
            return self._connection.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT) == len(data)
        except OSError:
            return False


def _frame(program: str, environment: Mapping[str, str], stdin: bytes, descriptors: list[int]) -> bytes:
    """The request; CNI_NETNS, where it can be opened, is appended to the descriptors.

    Raises:
        ValueError: it is none that a worker would take.
    """
    which = wire.DESCRIPTOR_CWD
    if environment.get("CNI_NETNS"):
        with contextlib.suppress(OSError):
            # O_NONBLOCK: a FIFO under that name must not hang us.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            descriptors.append(os.open(environment["CNI_NETNS"], flags))
            which |= wire.DESCRIPTOR_NETNS
    places = tuple(number for path in _PLACES for number in _identity(path))
    frame = wire.request_frame(wire.Request(program, dict(environment), _umask(), stdin, places, which))
    if len(frame) - wire.HEADER_SIZE > wire.FRAME_LIMIT:
        raise ValueError("longer than a worker takes")
    return frame


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@functools.cache
def _umask() -> int:
    """This process's, which never changes it. umask(2) tells it by setting another, for all threads."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        found = _UMASK.search(file.read())
    return int(found[1], 8) if found else 0o022


def _accept_wait_ms(environment: Mapping[str, str]) -> int:
    given = environment.get("NETLOOM_CNI_WAIT_MS", "")
    value = int(given) if given.isascii() and given.isdigit() else 0
    return value if 0 < value <= 60_000 else _ACCEPT_WAIT_MS


def _socket_path(environment: Mapping[str, str]) -> str:
    return environment.get("NETLOOM_CNI_SOCKET") or f"{paths.run_dir(environment)}/{SOCKET_NAME}"


def _connect(connection: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= _LONGEST_SUN_PATH:
        connection.connect(path)
        return
    directory, name = os.path.split(path)
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{held}/{name}")
    finally:
        os.close(held)


def _check_peer(connection: socket.socket) -> None:
    """Raises PermissionError where the workers are neither root's nor ours."""
    _pid, uid, _gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid not in (0, os.geteuid()):
        raise PermissionError(f"user {uid} listens there")


def _send(connection: socket.socket, data: bytes, descriptors: list[int], until: float) -> None:
    rest = memoryview(data)
    # The descriptors go with the first bytes.
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    while rest:
        connection.settimeout(max(until - time.monotonic(), 0))
        sent = connection.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
        rest, ancillary = rest[sent:], []
