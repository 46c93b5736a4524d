"""gRPC's unary calls over a Unix socket, without gRPC: as much of HTTP/2 as one client needs that asks one thing at a
time.

An ADD or DEL asks ipamd once. gRPC's library costs such a process 60 ms to import, and a worker three threads and more
processor time than all its netlink (docs/adr/0014). Here a call is one send, and whatever the socket then says.

Rules of this file
- The other side is ipamd: `ipamd.door`, which has its frames from here, or gRPC's own server in one of before that.
  Whatever these may say by the standard and never do, such as a header in Huffman's code, is `UnexpectedError`: the
  caller has gRPC itself to ask.
- A connection on which anything went wrong is not used again.
- Sending and receiving are apart, so that other work fits in between.

Sources: RFC 9113 (HTTP/2), RFC 7541 (HPACK), gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import time
from urllib.parse import unquote_to_bytes

LARGEST_REQUEST = 16_000  # bytes of a message; in one frame, below the least that everybody takes
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
HEADER = struct.Struct(">HBBBI")  # length (24 bits, in two parts), kind, flags, stream
SETTING = struct.Struct(">HI")
U32 = struct.Struct(">I")
MESSAGE = struct.Struct(">BI")  # compressed or not, length
WINDOW = 65_535
GIVE_BACK = 32_768
LARGEST_FRAME = 16_384  # without a word of ours, nobody may send more in one
LAST_STREAM = 2**31 - 1
_REFUSED_STREAM = 7
_LONGEST_SUN_PATH = 107

_STATIC_PATH, _STATIC_STATUS = range(4, 6), range(8, 15)  # the entries of HPACK's static table that are one of these
_STATIC_NAMES = 61

OK, CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE = 0, 1, 4, 14  # gRPC's status codes


class LostError(Exception):
    """There is no connection, or it ended before the answer: the request may be repeated where that does no harm."""


class LateError(Exception):
    """No answer in time."""


class UnexpectedError(Exception):
    """The other side said what this file does not know."""


class Answer:
    """What a call came to: gRPC's status code, its text, whether ipamd itself says so, and the message's bytes."""

    __slots__ = ("answered", "code", "message", "text")

    def __init__(self, code: int, text: str, answered: bool, message: bytes) -> None:
        self.code = code
        self.text = text
        self.answered = answered
        self.message = message


class Connection:
    """One connection, for one call at a time."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """Connects and says hello.

        Raises:
            LostError: nobody listens there.
        """
        self._timeout_s = timeout_s
        self._stream = -1
        self._room = WINDOW  # bytes that we may send
        self._taken = 0  # bytes that came and that the other side does not know to be read
        self._closing = False
        self._buffer = b""
        self._headers: dict[bytes, bytes] = {}  # of the answer that is under way
        self._data = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(self._socket, path, timeout_s)
            self._send(HELLO)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Closing twice is harmless."""
        self._socket.close()

    def greet(self) -> None:
        """Wait for the other side's hello, and answer it: one that is not answered in a minute ends the connection.

        Raises:
            LostError, LateError, UnexpectedError
        """
        until = time.monotonic() + self._timeout_s
        while self._next(until)[0] != SETTINGS:
            pass

    def ask(self, headers: bytes, message: bytes) -> None:
        """Send a request; `headers` are from `request_headers`.

        Raises:
            LostError
        """
        size = len(message) + 5
        if self._closing or size > self._room or self._stream > LAST_STREAM - 2:
            raise LostError("the connection is used up")
        self._stream += 2
        self._headers, self._data = {}, b""
        self._room -= size
        self._send(
            frame(HEADERS, END_HEADERS, self._stream, headers)
            + frame(DATA, END_STREAM, self._stream, MESSAGE.pack(0, len(message)) + message)
        )

    def answer(self) -> Answer:
        """Wait for the answer to the request that was sent last. Who was interrupted by a signal may wait again.

        Raises:
            LostError, LateError, UnexpectedError
        """
        until = time.monotonic() + self._timeout_s
        while True:
            kind, flags, stream, body = self._next(until)
            if kind == GOAWAY and number_of(body) & LAST_STREAM < self._stream:
                raise LostError("the server is ending")
            if stream != self._stream:
                continue
            if kind == RST_STREAM:
                number = number_of(body)
                if number == _REFUSED_STREAM:
                    raise LostError("the server refused the stream")
                return Answer(CANCELLED, f"the server reset the stream (HTTP/2 error {number})", False, b"")
            if kind == DATA:
                self._data += _unpadded(flags, body)
                if len(self._data) > WINDOW:
                    raise UnexpectedError("more than there is room for")
            elif kind == HEADERS:
                if not flags & END_HEADERS:
                    raise UnexpectedError("headers in several frames")
                self._headers.update(read_headers(_unpadded(flags, body, priority=flags & _PRIORITY)))
            if flags & END_STREAM and kind in (DATA, HEADERS):
                return _answer(self._headers, self._data)

    def _next(self, until: float) -> tuple[int, int, int, bytes]:
        """The next frame; what is about the connection is seen to."""
        while len(self._buffer) < 9 or len(self._buffer) < 9 + length_of(self._buffer):
            self._buffer += self._receive(until)
        length = length_of(self._buffer)
        _high, _low, kind, flags, stream = HEADER.unpack_from(self._buffer)
        body = self._buffer[9 : 9 + length]
        self._buffer = self._buffer[9 + length :]
        stream &= LAST_STREAM
        if kind == DATA:
            self._taken += length
            if self._taken >= GIVE_BACK:
                self._send(frame(WINDOW_UPDATE, 0, 0, U32.pack(self._taken)))
                self._taken = 0
        elif kind == SETTINGS and not flags & ACK:
            self._send(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, ACK, 0, body))
        elif kind == WINDOW_UPDATE and not stream:
            self._room += number_of(body) & LAST_STREAM
        elif kind == GOAWAY:
            self._closing = True
        return kind, flags, stream, body

    def _receive(self, until: float) -> bytes:
        if time.monotonic() > until:
            raise LateError
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:  # SO_RCVTIMEO
            raise LateError from None
        except OSError as error:
            raise LostError(error.strerror or str(error)) from None
        if not data:
            raise LostError("the connection ended")
        return data

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise LostError(error.strerror or str(error)) from None


def request_headers(path: str, timeout_s: float, request_id: str = "") -> bytes:
    """The headers of a call, encoded: literals without an index, so that neither side remembers any.

    Args:
        path: such as /netloom.ipam.v1.Ipam/Allocate.
        timeout_s: how long the answer is of use.
        request_id: "" for none.
    """
    block = _method_headers(path, timeout_s)
    return block + b"\0" + _REQUEST_ID + string(request_id.encode()) if request_id else block


@functools.lru_cache(maxsize=16)
def _method_headers(path: str, timeout_s: float) -> bytes:
    """Those that each call of a method has."""
    block = b"\x83\x86" + b"\x04" + string(path.encode()) + b"\x01" + string(b"localhost")  # POST, http
    fields = {"te": "trailers", "content-type": "application/grpc", "grpc-timeout": f"{int(timeout_s * 1000)}m"}
    return block + b"".join(b"\0" + string(name.encode()) + string(value.encode()) for name, value in fields.items())


def _connect(connecting: socket.socket, path: str, timeout_s: float) -> None:
    timeout = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    # Not settimeout, which adds a poll to each call.
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    path = os.path.abspath(path)
    directory_fd = -1
    try:
        if len(os.fsencode(path)) > _LONGEST_SUN_PATH:
            directory, name = os.path.split(path)
            directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{directory_fd}/{name}"
        connecting.connect(path)
    except OSError as error:
        late = error.errno == errno.EAGAIN
        raise LostError("nobody takes the connection" if late else error.strerror or str(error)) from None
    finally:
        if directory_fd >= 0:
            os.close(directory_fd)


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return HEADER.pack(len(body) >> 8, len(body) & 0xFF, kind, flags, stream) + body


def checked_length(length: int) -> int:
    """A frame's length; raises UnexpectedError where it has more than anybody takes."""
    if length > LARGEST_FRAME:
        raise UnexpectedError("a frame larger than we take")
    return length


def length_of(buffer: bytes) -> int:
    return checked_length(buffer[0] << 16 | buffer[1] << 8 | buffer[2])


def number_of(body: bytes) -> int:
    """The first number of a frame's body."""
    if len(body) < U32.size:
        raise UnexpectedError("a frame that ends in the middle")
    return int(U32.unpack_from(body)[0])


def _unpadded(flags: int, body: bytes, *, priority: int = 0) -> bytes:
    if flags & _PADDED:
        if len(body) <= (body[0] if body else 0):
            raise UnexpectedError("more padding than there is of the frame")
        body = body[1 : len(body) - body[0]]
    return body[5:] if priority else body


# No table of headers: each answer can be read by itself. Nobody pushes. And a setting of our own, which gRPC's server
# does not know and skips: ipamd answers itself who says so, see `ipamd.door`.
HELLO = PREFACE + frame(SETTINGS, 0, 0, SETTING.pack(1, 0) + SETTING.pack(2, 0) + SETTING.pack(0x4E4C, 1))


def _answer(headers: dict[bytes, bytes], data: bytes) -> Answer:
    status = headers.get(b"grpc-status", b"")
    if not status.isdigit() or len(status) > 9:
        raise UnexpectedError(f"no gRPC status, but :status {headers.get(b':status', b'')!r}")
    code = int(status)
    text = unquote_to_bytes(headers.get(b"grpc-message", b"")).decode(errors="replace")
    message = b""
    if code == OK:
        if len(data) < 5 or MESSAGE.unpack_from(data) != (0, len(data) - 5):
            raise UnexpectedError("no whole message that is not compressed")
        message = data[5:]
    return Answer(code, text, b"x-answered-by" in headers, message)


# HPACK


def string(data: bytes) -> bytes:
    return _integer(len(data), 7) + data


def literal(name: bytes, value: bytes) -> bytes:
    """A header that neither side is to remember."""
    return b"\0" + string(name) + string(value)


def _integer(value: int, bits: int) -> bytes:
    largest = (1 << bits) - 1
    if value < largest:
        return bytes([value])
    encoded = bytearray([largest])
    value -= largest
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_REQUEST_ID = string(b"x-request-id")


def read_headers(block: bytes) -> dict[bytes, bytes]:
    """Those that have a name of their own; the static table's names are of no interest but for `:status`."""
    found: dict[bytes, bytes] = {}
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _read_integer(block, at, 7)
                if not 0 < index <= _STATIC_NAMES:
                    raise UnexpectedError(f"header number {index} of a table that is empty")
                continue
            if first & 0xE0 == 0x20:  # the table's size
                _size, at = _read_integer(block, at, 5)
                continue
            index, at = _read_integer(block, at, 6 if first & 0x40 else 4)
            name = b""
            if index > _STATIC_NAMES:
                raise UnexpectedError(f"name number {index} of a table that is empty")
            if index in _STATIC_STATUS:
                name = b":status"
            elif index in _STATIC_PATH:
                name = b":path"
            elif not index:
                name, at = read_string(block, at)
            value, at = read_string(block, at)
            if name:
                found[name] = value
    except IndexError:
        raise UnexpectedError("headers that end in the middle") from None
    return found


def _read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    largest = (1 << bits) - 1
    value = block[at] & largest
    at += 1
    if value < largest:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 28:
            raise UnexpectedError("a number without an end")


def read_string(block: bytes, at: int) -> tuple[bytes, int]:
    coded = block[at] & 0x80
    length, at = _read_integer(block, at, 7)
    if coded:
        raise UnexpectedError("a header in Huffman's code")
    if at + length > len(block):
        raise UnexpectedError("headers that end in the middle")
    return block[at : at + length], at + length
