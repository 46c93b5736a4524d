"""A backup of a store: JSON lines, which a person can read, and which every kind of store can be made from again.

The first line says what it is, the last one how many there were, so that a piece of a backup is known as one:
    {"netloom_backup": 1, "store": "sqlite", "node": "n1", "created_unix_s": 1795248000, "generation": 9, …}
    {"pool": {…}}  {"reservation": {…}}  {"allocation": {…}}  {"freed": {…}}  {"former": {…}}  {"block": [pool, CIDR]}
    {"note": {…}}  {"etcd": {"key": "pools/blue", "value": "…"}}
    {"end": 6}
In a cluster the lines `etcd` are what the cluster knows, all of one revision; values are base64.
"""

import io
from collections.abc import Iterable, Iterator
from typing import IO

import msgspec
from msgspec import Struct

from ipamd.errors import InvalidArgumentError
from ipamd.pool import PoolSpec, validate
from ipamd.store.base import Allocation, Copy, Former, Freed, Note, PoolRow, Reservation

VERSION = 1

_LONGEST_LINE = 16 << 20
_PIECE = 256 << 10


class BackupError(Exception):
    """This is no backup that can be used; the text names the line and what is wrong with it."""


class Head(Struct, frozen=True):
    """What a backup is of."""

    netloom_backup: int
    store: str
    node: str
    created_unix_s: int
    generation: int = 0
    revision: int = 0


class Shared(Struct, frozen=True):
    """A key of the cluster's store, without the prefix."""

    key: str
    value: bytes


class _Line(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    pool: PoolRow | None = None
    reservation: Reservation | None = None
    allocation: Allocation | None = None
    freed: Freed | None = None
    former: Former | None = None
    block: tuple[str, str] | None = None
    note: Note | None = None
    etcd: Shared | None = None
    end: int | None = None


class Backup(Struct, frozen=True):
    """A backup that was read and found whole."""

    head: Head
    copy: Copy
    shared: tuple[Shared, ...]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


def written(head: Head, copy: Copy, shared: Iterable[Shared] = ()) -> Iterator[bytes]:
    """The backup in pieces of some 256 KiB."""
    piece = io.BytesIO()
    piece.write(_encode(head) + b"\n")
    count = 0
    for line in _lines(copy, shared):
        piece.write(_encode(line) + b"\n")
        count += 1
        if piece.tell() >= _PIECE:
            yield piece.getvalue()
            piece = io.BytesIO()
    piece.write(_encode(_Line(end=count)) + b"\n")
    yield piece.getvalue()


def read(stream: IO[bytes], name: str) -> Backup:
    """Reads a whole backup. Raises BackupError; `name` is what to call it."""
    head = _read_head(stream, name)
    lines = list(_read_lines(stream, name))
    return Backup(
        head,
        Copy(
            pools=[line.pool for line in lines if line.pool is not None],
            reservations=[line.reservation for line in lines if line.reservation is not None],
            allocations=[line.allocation for line in lines if line.allocation is not None],
            freed=[line.freed for line in lines if line.freed is not None],
            former=[line.former for line in lines if line.former is not None],
            blocks=[line.block for line in lines if line.block is not None],
            notes=[line.note for line in lines if line.note is not None],
            generation=head.generation,
            revision=head.revision,
        ),
        tuple(line.etcd for line in lines if line.etcd is not None),
    )


def _lines(copy: Copy, shared: Iterable[Shared]) -> Iterator[_Line]:
    yield from (_Line(pool=row) for row in copy.pools)
    yield from (_Line(reservation=row) for row in copy.reservations)
    yield from (_Line(allocation=row) for row in copy.allocations)
    yield from (_Line(freed=row) for row in copy.freed)
    yield from (_Line(former=row) for row in copy.former)
    yield from (_Line(block=row) for row in copy.blocks)
    yield from (_Line(note=row) for row in copy.notes)
    yield from (_Line(etcd=row) for row in shared)


def _check_pool(pool: PoolRow, place: str) -> None:
    """Raises BackupError for one with which ipamd would not start."""
    try:
        validate(PoolSpec.decode(pool.spec))
    except (msgspec.DecodeError, InvalidArgumentError) as error:
        raise BackupError(f"{place}: pool {pool.name} cannot be: {error}; take another backup") from None


def _read_head(stream: IO[bytes], name: str) -> Head:
    try:
        head = msgspec.json.decode(stream.readline(_LONGEST_LINE), type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BackupError(f"{name}: this is no backup of Netloom: its first line does not say so") from None
    if head.netloom_backup != VERSION:
        raise BackupError(
            f"{name}: wanted a backup of version {VERSION}, found {head.netloom_backup}; the netloom that wrote it is "
            "newer, and can read it"
        )
    return head


def _read_lines(stream: IO[bytes], name: str) -> Iterator[_Line]:
    count = 0
    for number, text in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), 2):
        try:
            line = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BackupError(f"{name}:{number}: {error}; the file is damaged or cut off: take another") from None
        if line.end is not None:
            if line.end != count or stream.read(1):
                raise BackupError(
                    f"{name}:{number}: wanted the end behind {line.end} lines, found it behind {count}; take another"
                )
            return
        if line.pool is not None:
            _check_pool(line.pool, f"{name}:{number}")
        count += 1
        yield line
    raise BackupError(f"{name}: it ends after {count} lines without saying so: it was cut off; take another")
