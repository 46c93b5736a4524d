"""Who comes to ipamd's socket: our own client is answered here, everybody else is led to gRPC's server.

An ADD and a DEL are one small question each. gRPC's server takes two thirds of the processor time that ipamd has for
such a call: threads of its own that wake for each, and some thirty steps of the event loop. Our own client
(`ipamd.http2`) says so in its hello, and then only what this file knows. A connection that begins in any other way is
copied to gRPC's server and back, byte by byte, so all of gRPC is there for it (docs/adr/0019).

Rules of this file
- Handlers are the same for both ways, and so are their answers: messages, codes, texts, trailing metadata.
- A call ends with its deadline, with its connection, or by the client's word; its handler is cancelled then.
- What a client of ours never says is an error of the connection, which ends then: the client asks gRPC's server.
- At the end connections are told first; what was asked is answered still.

Sources: RFC 9113 (HTTP/2), gRPC's doc/PROTOCOL-HTTP2.md.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Self, cast
from urllib.parse import quote_from_bytes

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ipamd import http2
from telemetry import log

_logger = logging.getLogger("ipamd")

Metadata = tuple[tuple[str, str], ...]
Handler = Callable[[Any, Any], Awaitable[Any]]

_BACKLOG = 4096  # the kernel takes as many as net.core.somaxconn says
_MOST_CALLS = 16  # of one connection at a time; our client has one
_LONGEST_TEXT = 8000  # bytes of an answer's text, with everything else below the size of a frame
_LARGEST_BACKLOG = 1 << 20  # bytes that a client does not read
_KNOWN_HEADERS = 256  # how many of them are kept
_PROTOCOL_ERROR, _REFUSED_STREAM = 1, 7
_UNKNOWN, _UNIMPLEMENTED, _INTERNAL = 2, 12, 13

_HELLO = http2.frame(http2.SETTINGS, 0, 0, b"") + http2.frame(http2.SETTINGS, http2.ACK, 0, b"")
_OK = b"\x88" + http2.literal(b"content-type", b"application/grpc")  # :status 200
_DONE = http2.literal(b"grpc-status", b"0")
_REQUEST_ID = b"\0" + http2.string(b"x-request-id")


class _AbortedError(Exception):
    """A handler ended its call."""

    def __init__(self, code: int, text: str, trailing: Metadata) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.trailing = trailing


class _Context:
    """What handlers use of gRPC's."""

    __slots__ = ("_metadata",)

    def __init__(self, request_id: str) -> None:
        self._metadata: Metadata = (("x-request-id", request_id),) if request_id else ()

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        raise _AbortedError(code.value[0], details, trailing_metadata)


class Methods:
    """The unary methods of a service, by their paths, and what headers say of a call."""

    def __init__(self, service: ServiceDescriptor, servicer: object) -> None:
        self._methods: dict[bytes, tuple[Handler, Callable[[bytes], Any]]] = {
            f"/{service.full_name}/{method.name}".encode(): (
                getattr(servicer, method.name),
                cast(Any, GetMessageClass(method.input_type)).FromString,
            )
            for method in service.methods
            if not method.client_streaming and not method.server_streaming
        }
        self._known: dict[bytes, tuple[tuple[Handler, Callable[[bytes], Any]] | None, float]] = {}

    def read(self, block: bytes) -> tuple[tuple[Handler, Callable[[bytes], Any]] | None, float, str]:
        """The method (None: there is no such), the deadline in seconds (0: none) and the request's id.

        Raises http2.UnexpectedError.
        """
        # Our client's calls of one method differ in the last header only.
        head, _, ending = block.partition(_REQUEST_ID)
        try:
            request_id, at = http2.read_string(ending, 0) if ending else (b"", 0)
        except IndexError:
            raise http2.UnexpectedError("headers that end in the middle") from None
        if at != len(ending):
            raise http2.UnexpectedError("headers behind the last one")
        known = self._known.get(head)
        if known is None:
            headers = http2.read_headers(head)
            known = self._methods.get(headers.get(b":path", b"")), _seconds(headers.get(b"grpc-timeout", b""))
            if len(self._known) < _KNOWN_HEADERS:
                self._known[head] = known
        return *known, request_id.decode("ascii", "replace")


class Door:
    """See the top of this file. `inner`: the path of gRPC's own socket."""

    def __init__(self, methods: Methods, inner: str) -> None:
        self.methods = methods
        self.inner = inner
        self.callers: set[_Caller] = set()
        self.copying: set[asyncio.BaseTransport] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.is_closing = False
        self._server: asyncio.Server | None = None

    async def open(self, listening: socket.socket) -> None:
        """Takes connections of a bound socket, which is this object's from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Caller(self), sock=listening, backlog=_BACKLOG)

    def close(self) -> None:
        """Takes no connection any more, and tells those who are there."""
        self.is_closing = True
        if self._server is not None:
            self._server.close()
        for caller in self.callers:
            caller.say_goodbye()

    def shut(self) -> None:
        """Ends all connections."""
        for caller in tuple(self.callers):
            caller.close()
        for transport in tuple(self.copying):
            transport.close()


class _Caller(asyncio.Protocol):
    """A connection: one of our client's, or not known yet."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._buffer = b""
        self._is_ours = False
        self._blocks: dict[int, bytes] = {}  # the headers of calls whose message is still to come
        self._calls: dict[int, tuple[asyncio.Task[None], asyncio.TimerHandle | None]] = {}
        self._last = 0  # the newest stream
        self._room = http2.WINDOW  # bytes that we may send
        self._taken = 0  # bytes that came and that the other side does not know to be read
        self._held_back: list[tuple[int, bytes]] = []  # answers for which there is no room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._door.callers.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self._door.callers.discard(self)
        for stream in tuple(self._calls):
            self._cancel(stream)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if not self._is_ours:
            if not buffer.startswith(http2.HELLO):
                if http2.HELLO.startswith(buffer):
                    self._buffer = buffer
                else:
                    self._lead_on(buffer)
                return
            self._is_ours = True
            self._transport.write(_HELLO)
            if self._door.is_closing:
                self.say_goodbye()
            buffer = buffer[len(http2.HELLO) :]
        at = 0
        try:
            while len(buffer) - at >= http2.HEADER.size:
                high, low, kind, flags, stream = http2.HEADER.unpack_from(buffer, at)
                body_at = at + http2.HEADER.size
                end = body_at + http2.checked_length(high << 8 | low)
                if end > len(buffer):
                    break
                self._take(kind, flags, stream & http2.LAST_STREAM, buffer[body_at:end])
                at = end
        except http2.UnexpectedError as error:
            log.event(_logger, "warning", "a connection was ended for what it said", error=str(error))
            self._transport.write(_goodbye(self._last, _PROTOCOL_ERROR))
            self.close()
            return
        self._buffer = buffer[at:]
        if self._transport.get_write_buffer_size() > _LARGEST_BACKLOG:
            self._transport.abort()

    def say_goodbye(self) -> None:
        """Nothing more is to be asked here. What is on its way already is answered."""
        if self._is_ours:
            self._transport.write(_goodbye(http2.LAST_STREAM, 0))

    def close(self) -> None:
        """Ends the connection, and what is asked over it."""
        self._transport.close()

    # --- frames

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == http2.HEADERS:
            self._take_headers(flags, stream, body)
        elif kind == http2.DATA:
            self._take_message(flags, stream, body)
        elif kind == http2.PING:
            if not flags & http2.ACK:
                self._transport.write(http2.frame(http2.PING, http2.ACK, 0, body))
        elif kind == http2.SETTINGS:
            if not flags & http2.ACK:
                raise http2.UnexpectedError("settings that change")
        elif kind == http2.WINDOW_UPDATE:
            if not stream:
                self._room += http2.number_of(body) & http2.LAST_STREAM
                self._send_held_back()
        elif kind == http2.RST_STREAM:
            self._blocks.pop(stream, None)
            self._cancel(stream)
        elif kind == http2.CONTINUATION:
            raise http2.UnexpectedError("headers in several frames")

    def _take_headers(self, flags: int, stream: int, body: bytes) -> None:
        if flags != http2.END_HEADERS:
            raise http2.UnexpectedError(f"headers with flags {flags:#x}")
        if stream <= self._last or not stream & 1:
            raise http2.UnexpectedError(f"stream {stream} after {self._last}")
        self._last = stream
        if len(self._calls) + len(self._blocks) >= _MOST_CALLS:
            self._transport.write(http2.frame(http2.RST_STREAM, 0, stream, http2.U32.pack(_REFUSED_STREAM)))
        else:
            self._blocks[stream] = body

    def _take_message(self, flags: int, stream: int, body: bytes) -> None:
        if stream > self._last:
            raise http2.UnexpectedError("a message without headers")
        self._taken += len(body)
        if self._taken >= http2.GIVE_BACK:
            self._transport.write(http2.frame(http2.WINDOW_UPDATE, 0, 0, http2.U32.pack(self._taken)))
            self._taken = 0
        block = self._blocks.pop(stream, None)
        if block is None:
            return
        if flags != http2.END_STREAM or len(body) < 5 or http2.MESSAGE.unpack_from(body) != (0, len(body) - 5):
            raise http2.UnexpectedError("no whole message that is not compressed")
        method, timeout_s, request_id = self._door.methods.read(block)
        if method is None:
            self._refuse(stream, _UNIMPLEMENTED, "Method not found!")
            return
        handler, parse = method
        try:
            request = parse(body[5:])
        except DecodeError:
            self._refuse(stream, _INTERNAL, "Exception deserializing request!")
            return
        task = self._loop.create_task(self._answer(stream, handler, request, request_id))
        self._calls[stream] = task, self._loop.call_later(timeout_s, self._be_late, stream) if timeout_s else None

    # --- calls

    async def _answer(self, stream: int, handler: Handler, request: Any, request_id: str) -> None:
        try:
            response = await handler(request, _Context(request_id))
        except _AbortedError as aborted:
            self._forget(stream)
            self._refuse(stream, aborted.code, aborted.text, aborted.trailing)
        except Exception as error:  # noqa: BLE001 (a fault in one call must not end the others)
            self._forget(stream)
            log.event(_logger, "error", "a call failed for no known reason", exc_info=error, request_id=request_id)
            self._refuse(stream, _UNKNOWN, f"a fault in ipamd, see its log: {error}")
        else:
            self._forget(stream)
            self._send(stream, response.SerializeToString())

    def _forget(self, stream: int) -> None:
        _, timer = self._calls.pop(stream, (None, None))
        if timer is not None:
            timer.cancel()

    def _cancel(self, stream: int) -> None:
        task, timer = self._calls.pop(stream, (None, None))
        if task is not None:
            task.cancel()
        if timer is not None:
            timer.cancel()

    def _be_late(self, stream: int) -> None:
        self._cancel(stream)
        self._refuse(stream, http2.DEADLINE_EXCEEDED, "Deadline Exceeded")

    # --- answers

    def _send(self, stream: int, message: bytes) -> None:
        size = len(message) + 5
        if size > http2.WINDOW:
            # No status: the client asks gRPC's server then.
            both = http2.END_HEADERS | http2.END_STREAM
            self._transport.write(http2.frame(http2.HEADERS, both, stream, _OK))
            return
        data = http2.MESSAGE.pack(0, len(message)) + message
        frames = [http2.frame(http2.HEADERS, http2.END_HEADERS, stream, _OK)]
        frames += [
            http2.frame(http2.DATA, 0, stream, data[start : start + http2.LARGEST_FRAME])
            for start in range(0, size, http2.LARGEST_FRAME)
        ]
        frames.append(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, _DONE))
        self._held_back.append((size, b"".join(frames)))
        self._send_held_back()

    def _send_held_back(self) -> None:
        while self._held_back and self._held_back[0][0] <= self._room:
            size, answer = self._held_back.pop(0)
            self._room -= size
            self._transport.write(answer)

    def _refuse(self, stream: int, code: int, text: str, trailing: Sequence[tuple[str, str]] = ()) -> None:
        # A "%" and two digits are not to be taken apart.
        quoted = quote_from_bytes(text.encode(errors="replace"), safe=_SAFE)[:_LONGEST_TEXT].encode()
        if b"%" in quoted[-2:]:
            quoted = quoted[: quoted.rindex(b"%")]
        block = _OK + http2.literal(b"grpc-status", str(code).encode()) + http2.literal(b"grpc-message", quoted)
        block += b"".join(http2.literal(name.encode(), value.encode()) for name, value in trailing)
        self._transport.write(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, block))

    # --- others

    def _lead_on(self, first: bytes) -> None:
        self._door.callers.discard(self)
        self._transport.pause_reading()
        task = self._loop.create_task(_copy(self._door, self._transport, first))
        self._door.tasks.add(task)
        task.add_done_callback(self._door.tasks.discard)


class _Half(asyncio.Protocol):
    """One side of a connection that is copied to another one."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._has_ended = False
        self._transport: asyncio.Transport
        self._other: _Half

    def join(self, other: Self) -> None:
        """What comes here goes to `other`."""
        self._other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._door.copying.add(self._transport)

    def data_received(self, data: bytes) -> None:
        self._other.write(data)

    def eof_received(self) -> bool:
        self._has_ended = True
        return self._other.end()

    def connection_lost(self, _error: Exception | None) -> None:
        self._door.copying.discard(self._transport)
        self._other.close()

    def pause_writing(self) -> None:
        self._other.pause()

    def resume_writing(self) -> None:
        self._other.resume()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def end(self) -> bool:
        """Nothing comes from the other side any more; whether something may still go there."""
        if self._has_ended or self._transport.is_closing():
            return False  # closes the other one, and that closes this one
        self._transport.write_eof()
        return True

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        self._transport.resume_reading()

    def close(self) -> None:
        self._transport.close()


async def _copy(door: Door, outer: asyncio.Transport, first: bytes) -> None:
    """Joins a connection with a new one to gRPC's server, which gets what came already."""
    theirs, ours = _Half(door), _Half(door)
    ours.join(theirs)
    try:
        await asyncio.get_running_loop().create_unix_connection(lambda: ours, door.inner)
    except OSError as error:
        if not door.is_closing:
            log.event(_logger, "warning", "gRPC's server takes no connection", error=str(error))
        outer.close()
        return
    theirs.join(ours)
    theirs.connection_made(outer)
    outer.set_protocol(theirs)
    ours.write(first)
    if outer.is_closing():
        ours.close()
    else:
        outer.resume_reading()


# Printable ASCII but for "%" (gRPC's doc/PROTOCOL-HTTP2.md, Percent-Encoded).
_SAFE = bytes(byte for byte in range(0x20, 0x7F) if byte != ord("%"))


def _goodbye(last: int, code: int) -> bytes:
    return http2.frame(http2.GOAWAY, 0, 0, http2.U32.pack(last) + http2.U32.pack(code))


_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def _seconds(timeout: bytes) -> float:
    """gRPC's grpc-timeout; 0 for none."""
    if not timeout:
        return 0.0
    number, unit = timeout[:-1], _UNITS.get(timeout[-1:])
    if unit is None or not number.isdigit() or len(number) > 8:
        raise http2.UnexpectedError(f"grpc-timeout: found {timeout[:20]!r}")
    return int(number) * unit
