"""The frames between launcher and worker: what the bytes mean, and nothing else. Pure.

The constants are those of warm/wire.h under the same names without NETLOOM_; a test compares the two. The rules of the
conversation are in docs/warm-protocol.md.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAGIC = 0x314D4C4E
VERSION = 1
OLDEST = 1

HEADER_SIZE = 16
FIELD_SIZE = 8
FIELD_REQUIRED = 1

STDIN_LIMIT = 1048576
FRAME_LIMIT = 2097152

KIND_REQUEST = 1
KIND_ACCEPTED = 2
KIND_REFUSED = 3
KIND_RESPONSE = 4
KIND_DONE = 5

TAG_PROGRAM = 1
TAG_ENVIRONMENT = 2
TAG_UMASK = 3
TAG_STDIN = 4
TAG_PLACES = 5
TAG_DESCRIPTORS = 6
DESCRIPTOR_CWD = 1
DESCRIPTOR_NETNS = 2
TAG_DEADLINE = 16
TAG_REASON = 17
TAG_STDOUT = 18
TAG_STDERR = 19
TAG_STATUS = 20

_HEADER = struct.Struct("=IHHII")
_FIELD = struct.Struct("=HHI")
_U32 = struct.Struct("=I")
_PLACES = struct.Struct("=8Q")
_KNOWN_IN_REQUEST = frozenset(
    (TAG_PROGRAM, TAG_ENVIRONMENT, TAG_UMASK, TAG_STDIN, TAG_PLACES, TAG_DESCRIPTORS),
)


class WireError(Exception):
    """The other side sent what is no frame, or one that cannot be served here; the text says what."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every frame begins with. `length` is of the body that follows."""

    version: int
    oldest: int
    kind: int
    length: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a launcher asks for.

    `places` is device and inode of its network, mount and user namespace and of its root directory, one after the
    other. `descriptors` says which came along: DESCRIPTOR_CWD, DESCRIPTOR_NETNS. `stdin` is None where the launcher did
    not read it.
    """

    program: str
    environment: dict[str, str]
    umask: int
    stdin: bytes | None
    places: tuple[int, ...]
    descriptors: int


@dataclass(frozen=True, slots=True)
class Response:
    """What a worker answers: what the launcher prints, and its exit status."""

    stdout: bytes
    stderr: bytes
    status: int


def frame(kind: int, fields: Iterable[tuple[int, bytes]] = (), *, required: bool = False) -> bytes:
    """A whole frame, ready to be sent. `required` marks every field as one that must be understood."""
    flags = FIELD_REQUIRED if required else 0
    body = b"".join(part for tag, value in fields for part in (_FIELD.pack(tag, flags, len(value)), value))
    return _HEADER.pack(MAGIC, VERSION, OLDEST, kind, len(body)) + body


def u32(number: int) -> bytes:
    """The value of a field that holds a number."""
    return _U32.pack(number)


def header(data: bytes | bytearray) -> Header:
    """The header at the start of `data`, of which HEADER_SIZE bytes must be there.

    Raises:
        WireError: no header, a body over FRAME_LIMIT, or a version with which this one has nothing in common.
    """
    magic, version, oldest, kind, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"wanted a frame, found {bytes(data[:HEADER_SIZE])!r}")
    if length > FRAME_LIMIT:
        raise WireError(f"wanted a frame of at most {FRAME_LIMIT} bytes, found one of {length}")
    if oldest > VERSION or version < OLDEST:
        raise WireError(f"this side speaks versions {OLDEST} to {VERSION}, the other {oldest} to {version}")
    return Header(version, oldest, kind, length)


def fields(body: bytes | bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Each field's tag, flags and value.

    Raises:
        WireError: the body does not end with a field.
    """
    offset = 0
    end = len(body)
    while offset < end:
        if offset + FIELD_SIZE > end:
            raise WireError("a frame ends within a field")
        tag, flags, length = _FIELD.unpack_from(body, offset)
        offset += FIELD_SIZE
        if offset + length > end:
            raise WireError("a frame ends within a field")
        yield tag, flags, bytes(body[offset : offset + length])
        offset += length


def request(body: bytes | bytearray) -> Request:
    """The request in a frame's body.

    Raises:
        WireError: a field is missing, has another size, or must be understood and is not.
    """
    found: dict[int, bytes] = {}
    for tag, flags, value in fields(body):
        if tag in _KNOWN_IN_REQUEST:
            found[tag] = value
        elif flags & FIELD_REQUIRED:
            raise WireError(f"the request has a field {tag} that must be understood; this worker is too old")
    try:
        return Request(
            program=os.fsdecode(found[TAG_PROGRAM]),
            environment=_environment(found[TAG_ENVIRONMENT]),
            umask=_U32.unpack(found[TAG_UMASK])[0],
            stdin=found.get(TAG_STDIN),
            places=_PLACES.unpack(found[TAG_PLACES]),
            descriptors=_U32.unpack(found[TAG_DESCRIPTORS])[0],
        )
    except KeyError as error:
        raise WireError(f"the request lacks the field {error.args[0]}") from error
    except struct.error as error:
        raise WireError(f"a field of the request has another size: {error}") from error


def request_frame(asked: Request) -> bytes:
    """The frame of a request; longer than FRAME_LIMIT it is none that a worker would take."""
    environment = b"".join(os.fsencode(f"{name}={value}\0") for name, value in asked.environment.items())
    fields = [
        (TAG_PROGRAM, os.fsencode(asked.program)),
        (TAG_PLACES, _PLACES.pack(*asked.places)),
        (TAG_UMASK, u32(asked.umask)),
        (TAG_DESCRIPTORS, u32(asked.descriptors)),
        (TAG_ENVIRONMENT, environment),
    ]
    if asked.stdin is not None:
        fields.append((TAG_STDIN, asked.stdin))
    return frame(KIND_REQUEST, fields)


def deadline_ms(body: bytes | bytearray, default: int) -> int:
    """What a worker allows itself, by the body of ACCEPTED; `default` where it does not say.

    Raises:
        WireError: the body does not end with a field.
    """
    values = [value for tag, _, value in fields(body) if tag == TAG_DEADLINE and len(value) == _U32.size]
    return int(_U32.unpack(values[-1])[0]) if values else default


def response(body: bytes | bytearray) -> Response:
    """The answer in a frame's body.

    Raises:
        WireError: it has no status, or a field that must be understood and is not.
    """
    found = {TAG_STDOUT: b"", TAG_STDERR: b""}
    for tag, flags, value in fields(body):
        if tag in (TAG_STDOUT, TAG_STDERR, TAG_STATUS):
            found[tag] = value
        elif flags & FIELD_REQUIRED:
            raise WireError(f"the response has a field {tag} that must be understood")
    status = found.get(TAG_STATUS, b"")
    if len(status) != _U32.size or _U32.unpack(status)[0] > 255:
        raise WireError("the response has no exit status")
    return Response(found[TAG_STDOUT], found[TAG_STDERR], _U32.unpack(status)[0])


def _environment(block: bytes) -> dict[str, str]:
    """As os.environ would have it: bytes that are no UTF-8 as surrogates, and of a name given twice the first."""
    environment: dict[str, str] = {}
    for item in os.fsdecode(block).split("\0"):
        name, equals, value = item.partition("=")
        if equals and name:
            environment.setdefault(name, value)
    return environment
