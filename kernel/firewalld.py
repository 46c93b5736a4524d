"""firewalld: sources of its zones, asked for over the system bus.

firewalld 2.1 and newer owns its table, so nobody else can put a rule in front of its drops; a container's address that
is a source of a zone fares as that zone says. These are settings of the running firewalld: its reload forgets them.

Rules of this file
- The four calls that we need, over a connection for each use: Hello, NameHasOwner, and two methods of a zone. No D-Bus
  library, which would be one more dependency of every plugin.
- No bus, one that does not let us in, or nobody under firewalld's name: it does not run.
- Who connects is root in the host's mount namespace; the bus is a file there, whatever the network namespace.

Sources: D-Bus specification, "Message Protocol" and "Authentication Protocol"; firewalld.dbus(5).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kernel.errors import KernelError

BUS = "/run/dbus/system_bus_socket"
ZONE = "trusted"  # the reference's default for firewalldZone

_NAME = "org.fedoraproject.FirewallD1"
_PATH = "/org/fedoraproject/FirewallD1"
_ZONE_INTERFACE = f"{_NAME}.zone"
_BUS_NAME = "org.freedesktop.DBus"
_BUS_PATH = "/org/freedesktop/DBus"

_TIMEOUT_S = 25.0  # as D-Bus libraries have it; a reload of firewalld takes seconds
_LARGEST = 1 << 20
METHOD_CALL, METHOD_RETURN, ERROR = 1, 2, 3
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)
_FIELD_TYPES = {PATH: "o", REPLY_SERIAL: "u", SIGNATURE: "g"}

Value = str | int | bool


class Refused(KernelError):  # noqa: N818 - reads as what happened
    """firewalld, or the bus, answered with an error; `name` is its D-Bus name."""

    def __init__(self, operation: str, name: str, told: str) -> None:
        super().__init__(operation, 0, told or name)
        self.name = name
        self.told = told


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message that came: its kind, its header fields, its first arguments as far as they are strings and numbers."""

    kind: int
    serial: int
    fields: dict[int, Value]
    arguments: tuple[Value, ...]


class Firewalld:
    """A connection to a firewalld that runs. Made by `connected`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def add_source(self, zone: str, address: str) -> None:
        """Make an address ("10.1.0.2/32") a source of a zone; so it may be one already.

        Raises:
            Refused: there is no such zone, or it is another zone's source.
        """
        try:
            self._call("addSource", zone, address)
        except Refused as error:
            if "ZONE_ALREADY_SET" not in error.told:
                raise

    def remove_source(self, zone: str, address: str) -> None:
        """Undo that; nothing where it is no source of the zone."""
        try:
            self._call("removeSource", zone, address)
        except Refused as error:
            if not any(word in error.told for word in ("UNKNOWN_SOURCE", "NOT_ENABLED", "INVALID_ZONE")):
                raise

    def has_source(self, zone: str, address: str) -> bool:
        """Whether it is one.

        Raises:
            Refused: there is no such zone.
        """
        return self._call("querySource", zone, address) == (True,)

    def _call(self, method: str, zone: str, address: str) -> tuple[Value, ...]:
        what = f"{method} {address} of zone {zone} in firewalld"
        return self._bus.call(what, _NAME, _PATH, _ZONE_INTERFACE, method, zone, address)


@contextmanager
def connected(path: str = BUS) -> Iterator[Firewalld | None]:
    """firewalld for the duration of the block; None where it does not run."""
    bus = None
    try:
        try:
            bus = Bus(path)
            (owned,) = bus.call("look for firewalld", _BUS_NAME, _BUS_PATH, _BUS_NAME, "NameHasOwner", _NAME)
        except (KernelError, OSError, ValueError):
            owned = False
        yield Firewalld(bus) if bus is not None and owned else None
    finally:
        if bus is not None:
            bus.close()


class Bus:
    """A connection to a message bus, for one thread. Calls wait for their answer.

    Raises OSError where nobody listens, KernelError where the bus does not let us in.
    """

    def __init__(self, path: str) -> None:
        self._serial = 0
        self._data = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(path)
            user = str(os.geteuid()).encode().hex().encode()
            self._socket.sendall(b"\0AUTH EXTERNAL " + user + b"\r\nBEGIN\r\n")
            self._be_let_in(path)
            self.call("greet the bus", _BUS_NAME, _BUS_PATH, _BUS_NAME, "Hello")
        except BaseException:
            self._socket.close()
            raise

    def _be_let_in(self, path: str) -> None:
        while b"\r\n" not in self._data:
            self._read()
        answer, _, self._data = self._data.partition(b"\r\n")
        if not answer.startswith(b"OK"):
            raise KernelError(f"connect to {path}", errno.EACCES, answer.decode(errors="replace"))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(
        self, what: str, destination: str, path: str, interface: str, member: str, *arguments: Value
    ) -> tuple[Value, ...]:
        """Call a method; what it answers, as far as these are strings and numbers.

        Raises:
            Refused: the answer is an error.
            KernelError: no answer came, or none that can be read.
        """
        fields: dict[int, Value] = {PATH: path, INTERFACE: interface, MEMBER: member, DESTINATION: destination}
        try:
            serial = self.send(METHOD_CALL, fields, *arguments)
            while True:
                message = self.receive()
                if message.fields.get(REPLY_SERIAL) == serial and message.kind in (METHOD_RETURN, ERROR):
                    break
        except TimeoutError as error:
            raise KernelError(what, errno.ETIMEDOUT, f"no answer within {_TIMEOUT_S:g} s") from error
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise KernelError(what, getattr(error, "errno", 0) or 0, str(error)) from error
        if message.kind == ERROR:
            told = message.arguments[0] if message.arguments else ""
            raise Refused(what, str(message.fields.get(ERROR_NAME, "")), str(told))
        return message.arguments

    def send(self, kind: int, fields: dict[int, Value], *arguments: Value) -> int:
        """Send a message; its serial number."""
        self._serial += 1
        self._socket.sendall(encode(kind, self._serial, fields, arguments))
        return self._serial

    def receive(self) -> Incoming:
        """The next message. Raises ValueError for one that is none."""
        while len(self._data) < 16:
            self._read()
        size = _size(self._data)
        while len(self._data) < size:
            self._read()
        message, self._data = self._data[:size], self._data[size:]
        return decode(message)

    def _read(self) -> None:
        more = self._socket.recv(1 << 16)
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "the bus closed the connection")
        self._data += more
        if len(self._data) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes of an answer")


def encode(kind: int, serial: int, fields: dict[int, Value], arguments: tuple[Value, ...]) -> bytes:
    """A message. Arguments are strings, booleans and 32-bit numbers."""
    body = b""
    for argument in arguments:
        body = _padded(body, 4) + _packed(argument)
    if arguments:
        letters = ("b" if isinstance(one, bool) else "s" if isinstance(one, str) else "u" for one in arguments)
        fields = {**fields, SIGNATURE: "".join(letters)}
    listed = b""
    for number, value in fields.items():
        letter = _FIELD_TYPES.get(number, "s")
        listed = _padded(listed, 8) + bytes([number, 1]) + letter.encode() + b"\0"
        if letter == "g":
            listed += bytes([len(str(value))]) + str(value).encode() + b"\0"
        else:
            listed += _packed(value)  # at a multiple of four already: the header of a field has four bytes
    head = struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), serial, len(listed)) + listed
    return _padded(head, 8) + body


def _packed(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", len(value.encode())) + value.encode() + b"\0"
    return struct.pack("<I", value)


def _padded(data: bytes, to: int) -> bytes:
    return data + b"\0" * (-len(data) % to)


def _order(data: bytes) -> str:
    if data[:1] not in (b"l", b"B"):
        raise ValueError(f"this is no D-Bus message: {data[:16]!r}")
    return "<" if data[:1] == b"l" else ">"


def _size(data: bytes) -> int:
    """Of a whole message, by its first 16 bytes."""
    body, _serial, fields = struct.unpack_from(f"{_order(data)}III", data, 4)
    return int(16 + fields + (-fields % 8) + body)


def decode(data: bytes) -> Incoming:
    """A whole message. Raises ValueError or struct.error where it is none."""
    order = _order(data)
    _body, serial, length = struct.unpack_from(f"{order}III", data, 4)
    fields: dict[int, Value] = {}
    offset, end = 16, 16 + length
    while offset < end:
        number, size = data[offset], data[offset + 1]
        letter = data[offset + 2 : offset + 2 + size].decode()
        value, offset = _value(data, offset + 3 + size, order, letter)
        fields[number] = value
        offset += -offset % 8
    offset = end + -end % 8
    arguments: list[Value] = []
    for letter in str(fields.get(SIGNATURE, "")):
        if letter not in "sogbu":
            break
        value, offset = _value(data, offset, order, letter)
        arguments.append(value)
    return Incoming(data[1], int(serial), fields, tuple(arguments))


def _value(data: bytes, offset: int, order: str, letter: str) -> tuple[Value, int]:
    """The value of a basic type, and where the next one begins."""
    if letter == "g":
        size = data[offset]
        return data[offset + 1 : offset + 1 + size].decode(), offset + 2 + size
    offset += -offset % 4
    (number,) = struct.unpack_from(f"{order}I", data, offset)
    if letter in "so":
        return data[offset + 4 : offset + 4 + number].decode(), offset + 5 + number
    if letter in "bu":
        return (bool(number) if letter == "b" else number), offset + 4
    raise ValueError(f"a header field of type {letter!r}")
