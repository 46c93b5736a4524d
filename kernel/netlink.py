"""Netlink: messages, attributes, and one synchronous socket.

Our own codec because it is the hot path of every ADD: an address is added in 7 microseconds and nothing need be
imported, where a general library takes 190 and 220 milliseconds of import (docs/adr/0002).

Rules of this file
- A Socket belongs to the network namespace in which it was made, whatever namespace the thread is in later.
- `execute` sends all messages in one system call (many: in several); the kernel works them off in order and
  acknowledges each. The first error is raised after all acknowledgements were read, so the socket is in step again.
- Sequence numbers are checked; answers to an abandoned request are dropped.

Sources: include/uapi/linux/netlink.h, net/netlink/af_netlink.c (netlink_rcv_skb, netlink_ack).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kernel.errors import KernelError, from_errno, from_oserror

ROUTE = 0
NETFILTER = 12

REQUEST = 0x1
MULTI = 0x2
ACK = 0x4
ROOT_MATCH = 0x300  # NLM_F_DUMP
REPLACE = 0x100
EXCL = 0x200
CREATE = 0x400
APPEND = 0x800

_DUMP_INTERRUPTED = 0x10
_DUMP_TRIES = 5
_ERROR = 2
_DONE = 3
_ACK_CAPPED = 0x100
_ACK_TLVS = 0x200
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_I32 = struct.Struct("=i")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")
# One dump part is at most 32 KiB on the kernels of today; room for more. Less than 128 KiB, or each receive would map
# memory for its buffer and unmap it (mallopt(3), M_MMAP_THRESHOLD).
_RECEIVE = 120 << 10
# What fits into a socket's buffers as they are by default (net.core.wmem_default, rmem_default: 208 KiB). In the
# receiving one each acknowledgement takes 768 bytes and more.
_SEND_BYTES = 1 << 16
_SEND_MESSAGES = 64
_ACK_BYTES = 2048
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SO_NETNS_COOKIE = 71


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = len(payload)
    return _ATTR.pack(size + 4, kind) + payload + _PAD[size & 3]


def nested(kind: int, *children: bytes) -> bytes:
    """An attribute that holds attributes."""
    payload = b"".join(children)
    return _ATTR.pack(len(payload) + 4, kind | _NESTED) + payload


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host order."""
    return attr(kind, _U32.pack(value))


def string(kind: int, text: str) -> bytes:
    """A NUL-terminated text attribute."""
    return attr(kind, text.encode() + b"\0")


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by number; the last of a kind wins."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        size, kind = _ATTR.unpack_from(data, offset)
        if size < 4 or offset + size > end:
            break
        found[kind & _TYPE_MASK] = data[offset + 4 : offset + size]
        offset += (size + 3) & ~3
    return found


def attribute_list(data: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """Attributes in order, repeated kinds kept."""
    found: list[tuple[int, bytes]] = []
    end = len(data)
    while offset + 4 <= end:
        size, kind = _ATTR.unpack_from(data, offset)
        if size < 4 or offset + size > end:
            break
        found.append((kind & _TYPE_MASK, data[offset + 4 : offset + size]))
        offset += (size + 3) & ~3
    return found


def text(data: bytes | None) -> str:
    """A NUL-terminated text attribute's value; "" where it is absent."""
    return data.split(b"\0", 1)[0].decode(errors="replace") if data else ""


@dataclass(frozen=True, slots=True)
class Message:
    """One request. `what` is for the error text: "add veth veth12ab"."""

    kind: int
    flags: int
    body: bytes
    what: str


class Socket:
    """A netlink socket of one protocol, for one thread at a time."""

    def __init__(self, protocol: int, *, timeout_s: float = 30.0) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise from_oserror("open a netlink socket", error) from error
        try:
            # Not bound: the kernel does that with the first message (netlink_autobind).
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            if protocol == ROUTE:
                # Without it the kernel ignores the filter in a dump request and sends everything.
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            # A lost acknowledgement must end as an error, not as a hang. SO_RCVTIMEO keeps the socket blocking for
            # the kernel, where settimeout would add a poll to every receive.
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            )
        except OSError as error:
            self._socket.close()
            raise from_oserror("set up a netlink socket", error) from error
        self._sequence = 0

    def fileno(self) -> int:
        """The descriptor, for polls."""
        return self._socket.fileno()

    def cookie(self) -> int:
        """The cookie of the namespace that the socket belongs to; 0 where the kernel has none (before 5.14)."""
        try:
            return int(_U64.unpack(self._socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
        except OSError:
            return 0

    def close(self) -> None:
        """Close it. Closing twice is harmless."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def execute(self, messages: Sequence[Message]) -> None:
        """Run the messages in order; all are attempted; the first failure is raised.

        Raises:
            KernelError: the first message that the kernel refused.
        """
        first: KernelError | None = None
        for error in self.attempt(messages):
            if error is not None and first is None:
                first = error
        if first is not None:
            raise first

    def attempt(self, messages: Sequence[Message]) -> list[KernelError | None]:
        """Run the messages in order and return each one's failure or None."""
        results: list[KernelError | None] = []
        while len(results) < len(messages):
            results += self._attempt_some(messages, len(results))
        return results

    def _attempt_some(self, messages: Sequence[Message], first: int) -> list[KernelError | None]:
        """As many messages from number `first` on as both buffers have room for."""
        start = self._sequence + 1
        outgoing = bytearray()
        end = first
        while end < len(messages) and end - first < _SEND_MESSAGES and len(outgoing) < _SEND_BYTES:
            message = messages[end]
            self._sequence += 1
            size = 16 + len(message.body)
            outgoing += _HEADER.pack(size, message.kind, message.flags | REQUEST | ACK, self._sequence, 0)
            outgoing += message.body
            end += 1
        return self._collect(outgoing, start, messages[first:end])

    def transact(self, begin: Message, messages: Sequence[Message], end: Message) -> list[KernelError | None]:
        """Run nfnetlink messages as one batch: all take effect, or none.

        The kernel acknowledges the messages only if the batch as a whole was taken; an error of `begin` itself
        (missing right, unknown subsystem) is returned for every message.
        """
        start = self._sequence + 1
        outgoing = bytearray()
        for message, acknowledged in ((begin, 0), *((m, ACK) for m in messages), (end, 0)):
            self._sequence += 1
            outgoing += _HEADER.pack(
                16 + len(message.body), message.kind, message.flags | REQUEST | acknowledged, self._sequence, 0
            )
            outgoing += message.body
        self._make_room(len(outgoing), len(messages))
        return self._collect(outgoing, start + 1, messages, begin_sequence=start)

    def _make_room(self, size: int, acknowledgements: int) -> None:
        """Let the buffers hold a batch that cannot be split, and all of its acknowledgements."""
        try:
            if size > _SEND_BYTES:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * size)
            if acknowledgements > _SEND_MESSAGES:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ACK_BYTES * acknowledgements)
        except OSError as error:
            raise from_oserror("enlarge a netlink socket's buffers", error) from error

    def _collect(
        self, outgoing: bytes | bytearray, start: int, messages: Sequence[Message], begin_sequence: int = -1
    ) -> list[KernelError | None]:
        self._send(outgoing, messages[0].what)
        results: list[KernelError | None] = [None] * len(messages)
        waiting = set(range(start, start + len(messages)))
        while waiting:
            for kind, _flags, sequence, body in self._receive(messages[0].what):
                if kind != _ERROR:
                    continue
                if sequence == begin_sequence:
                    number, detail = _failure(_flags, body)
                    if number:
                        return [from_errno(m.what, number, detail) for m in messages]
                elif sequence in waiting:
                    waiting.discard(sequence)
                    number, detail = _failure(_flags, body)
                    if number:
                        results[sequence - start] = from_errno(messages[sequence - start].what, number, detail)
        return results

    def get(self, message: Message) -> bytes:
        """Ask for one object; its body without the netlink header.

        Raises:
            NotFound: there is no such object.
        """
        self._sequence += 1
        wanted = self._sequence
        self._send(
            _HEADER.pack(16 + len(message.body), message.kind, message.flags | REQUEST, wanted, 0) + message.body,
            message.what,
        )
        while True:
            for kind, flags, sequence, body in self._receive(message.what):
                if sequence != wanted:
                    continue
                if kind == _ERROR:
                    number, detail = _failure(flags, body)
                    raise from_errno(message.what, number, detail)
                return body

    def dump(self, message: Message) -> Iterator[bytes]:
        """Ask for all objects; each one's body without the netlink header.

        The kernel says when things changed while it was listing them; it is asked again then, but not for ever.
        """
        for _ in range(_DUMP_TRIES):
            bodies, interrupted = self._dump(message)
            if not interrupted:
                break
        return iter(bodies)

    def begin_dump(self, message: Message, enough: int = 1) -> list[bytes]:
        """Ask for all objects and read only so much of the answer as has this many: the cost does not grow with what
        there is beyond.

        The socket is good for nothing afterwards but to be closed.

        Returns:
            The bodies of the first ones.
        """
        wanted = self._ask_for_all(message)
        bodies: list[bytes] = []
        complete = False
        while len(bodies) < enough and not complete:
            for kind, flags, sequence, body in self._receive(message.what):
                if sequence != wanted:
                    continue
                if kind == _ERROR:
                    number, detail = _failure(flags, body)
                    raise from_errno(message.what, number, detail)
                if kind == _DONE:
                    number = -_I32.unpack_from(body)[0] if len(body) >= 4 else 0
                    if number > 0:
                        raise from_errno(message.what, number)
                    complete = True
                else:
                    bodies.append(body)
        return bodies

    def _ask_for_all(self, message: Message) -> int:
        """Send a dump request; its sequence number."""
        self._sequence += 1
        self._send(
            _HEADER.pack(16 + len(message.body), message.kind, message.flags | REQUEST | ROOT_MATCH, self._sequence, 0)
            + message.body,
            message.what,
        )
        return self._sequence

    def _dump(self, message: Message) -> tuple[list[bytes], bool]:
        """The bodies, and whether the list is inconsistent."""
        wanted = self._ask_for_all(message)
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, sequence, body in self._receive(message.what):
                if sequence != wanted:
                    continue
                interrupted |= bool(flags & _DUMP_INTERRUPTED)
                if kind == _DONE:
                    number = -_I32.unpack_from(body)[0] if len(body) >= 4 else 0
                    if number > 0:
                        raise from_errno(message.what, number)
                    return bodies, interrupted
                if kind == _ERROR:
                    number, detail = _failure(flags, body)
                    raise from_errno(message.what, number, detail)
                bodies.append(body)

    def _send(self, data: bytes | bytearray, what: str) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise from_oserror(what, error) from error

    def _receive(self, what: str) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(_RECEIVE)
        except OSError as error:
            raise from_oserror(f"{what}: read the kernel's answer", error) from error
        offset = 0
        while offset + 16 <= len(data):
            size, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
            if size < 16:
                break
            yield kind, flags, sequence, data[offset + 16 : offset + size]
            offset += (size + 3) & ~3


def _failure(flags: int, body: bytes) -> tuple[int, str]:
    """(positive error number or 0, the kernel's own words) of an NLMSG_ERROR."""
    number = -_I32.unpack_from(body)[0]
    if not number or not flags & _ACK_TLVS:
        return number, ""
    # The original message follows the error number: its header only when capped, else all of it.
    length = 16 if flags & _ACK_CAPPED else _U32.unpack_from(body, 4)[0]
    return number, text(attributes(body, 4 + ((length + 3) & ~3)).get(1))
