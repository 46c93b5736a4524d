"""An index of host-local's data directory, kept outside it: who holds what, and what is free, without reading it all.

The directory is the truth, the index only saves looking. It may be lost or out of date at any moment: whoever takes an
address creates its file exclusively, and whoever gives one back reads the file first.

When an index is believed
- All that is done here is done under the directory's lock.
- Whoever changed directory and index sets the directory's modification time to a moment of his own choice, some seconds
  ago, and writes down that stamp, the inode and its change time (which nobody can set).
- Any file that somebody else makes, renames or removes gives the directory the present time. So the next reader finds
  another stamp, and builds the index anew. So he does after a crash between the directory and the stamp, after a backup
  was restored (the change time differs), and after a reboot (the boot id is part of it).
- A time that the kernel gives could be that of our own change, as its clock ticks every few milliseconds only. A chosen
  one in the past cannot be.

What is not noticed is a file that is written in place. Neither implementation does that to the file of an address.
"""

import os
import socket
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

from cni.ipam.ranges import Address

_VERSION = 1
_SCHEMA = """
CREATE TABLE held (key BLOB NOT NULL, name TEXT NOT NULL, PRIMARY KEY (key, name)) WITHOUT ROWID;
CREATE TABLE runs (first BLOB PRIMARY KEY, last BLOB NOT NULL) WITHOUT ROWID;
"""
_LONG_AGO_NS = 10 * 10**9  # more than the coarsest clock of a file system (FAT: 2 s)


class AddressIndex:
    """Two tables: names of files by their content, and the addresses that are taken, as runs without a gap.

    Raises sqlite3.Error from every method where the file is damaged or the disk is full: then another one is needed.
    """

    def __init__(self, path: str = ":memory:") -> None:
        """A new one in memory; or an existing one in a file."""
        if path == ":memory:":
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(_SCHEMA)
        else:
            self._db = sqlite3.connect(f"file:{_quoted(path)}?mode=rw", uri=True, isolation_level=None)
        # What a crash damages is rebuilt; the lock of the directory is the only one needed.
        self._db.execute("PRAGMA journal_mode = MEMORY")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("BEGIN")

    def held(self, key: bytes) -> list[str]:
        """The files with this content, in no order."""
        return [name for (name,) in self._db.execute("SELECT name FROM held WHERE key = ?", (key,))]

    def first_free(self, first: Address, last: Address) -> Address | None:
        """The lowest address from `first` to `last` that no file has."""
        run = self._run_at(_point(first))
        if run is None:
            return first
        after = int.from_bytes(run[1][1:], "big") + 1
        return None if after > int(last) else first + (after - int(first))

    def take(self, address: Address) -> None:
        """There is a file for this address."""
        point = _point(address)
        if self._run_at(point) is not None:
            return
        before = self._run_at(_moved(point, -1))
        after = self._run_at(_moved(point, +1))
        for run in (before, after):
            if run is not None:
                self._db.execute("DELETE FROM runs WHERE first = ?", (run[0],))
        self._put(before[0] if before else point, after[1] if after else point)

    def free(self, address: Address) -> None:
        """There is no file for this address any more."""
        point = _point(address)
        run = self._run_at(point)
        if run is None:
            return
        first, last = run
        self._db.execute("DELETE FROM runs WHERE first = ?", (first,))
        if first != point:
            self._put(first, _moved(point, -1))
        if last != point:
            self._put(_moved(point, +1), last)

    def hold(self, key: bytes, name: str) -> None:
        """The file has this content."""
        self._db.execute("INSERT OR REPLACE INTO held VALUES (?, ?)", (key, name))

    def drop(self, key: bytes, name: str) -> None:
        """It has it no more."""
        self._db.execute("DELETE FROM held WHERE key = ? AND name = ?", (key, name))

    def fill(self, taken: Iterable[bytes], held: Iterable[tuple[bytes, str]]) -> None:
        """Into an empty one; `taken` as `point_named` has them."""
        runs: list[list[bytes]] = []
        beside = b""
        for point in sorted(taken):
            if point == beside:
                runs[-1][1] = point
            else:
                runs.append([point, point])
            beside = _moved(point, +1)
        self._db.executemany("INSERT INTO runs VALUES (?, ?)", runs)
        self._db.executemany("INSERT INTO held VALUES (?, ?)", sorted(held))

    def commit(self) -> None:
        """Make what was said so far the file's content."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def save(self, path: str) -> None:
        """Write a copy to a file that nobody has opened."""
        self._db.execute("COMMIT")
        self._db.execute("VACUUM INTO ?", (path,))
        self._db.execute("BEGIN")

    def close(self) -> None:
        """What was not committed is forgotten."""
        self._db.close()

    def _run_at(self, point: bytes) -> tuple[bytes, bytes] | None:
        row: tuple[bytes, bytes] | None = self._db.execute(
            "SELECT first, last FROM runs WHERE first <= ? ORDER BY first DESC LIMIT 1", (point,)
        ).fetchone()
        return row if row is not None and row[1] >= point else None

    def _put(self, first: bytes, last: bytes) -> None:
        self._db.execute("INSERT INTO runs VALUES (?, ?)", (first, last))


class Shelf:
    """Where the index of one data directory is kept. To be used under the directory's lock only."""

    def __init__(self, run_dir: str, directory_fd: int, boot_id: str) -> None:
        self._fd = directory_fd
        self._boot_id = boot_id
        status = os.fstat(directory_fd)
        self._top = os.path.join(run_dir, "host-local")
        #: The beginning of the names of all files that belong to this data directory.
        self.base = os.path.join(self._top, f"{status.st_dev:x}-{status.st_ino:x}")

    def load(self) -> AddressIndex | None:
        """The index, if it is to be believed."""
        try:
            with open(f"{self.base}.stamp", encoding="ascii") as file:
                if file.read(500) != self._stamp():
                    return None
            return AddressIndex(f"{self.base}.db")
        except (OSError, ValueError, sqlite3.Error):
            return None

    def store(self, fresh: AddressIndex) -> AddressIndex:
        """Keep an index that was built anew; what is to be used from now on. Where nothing can be kept, the same."""
        with suppress(OSError, sqlite3.Error):
            self.make()
            for name in (f"{self.base}.stamp", f"{self.base}.new"):
                with suppress(FileNotFoundError):
                    os.unlink(name)
            fresh.save(f"{self.base}.new")
            os.rename(f"{self.base}.new", f"{self.base}.db")
            kept = AddressIndex(f"{self.base}.db")
            fresh.close()
            return kept
        return fresh

    def seal(self, index: AddressIndex) -> None:
        """Index and directory agree from now on. Where that cannot be written down, the next one builds it anew."""
        with suppress(OSError, sqlite3.Error):
            with suppress(FileNotFoundError):
                os.unlink(f"{self.base}.stamp")  # so that a commit that is cut short is not believed
            index.commit()
            status = os.fstat(self._fd)
            chosen_ns = status.st_ctime_ns - _LONG_AGO_NS - int.from_bytes(os.urandom(4), "big") % 10**9
            os.utime(self._fd, ns=(status.st_atime_ns, chosen_ns))
            with open(f"{self.base}.stamp", "w", encoding="ascii") as file:
                file.write(self._stamp())

    def make(self) -> None:
        """Make the directory that `base` lies in. Raises OSError."""
        if not os.path.isdir(self._top):
            os.makedirs(os.path.dirname(self._top), 0o755, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self._top, 0o700)

    def _stamp(self) -> str:
        status = os.fstat(self._fd)
        return f"{_VERSION} {self._boot_id} {status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _point(address: Address) -> bytes:
    """As bytes whose order is that of the addresses, IPv4 before IPv6."""
    return b"%d" % address.version + address.packed


def _moved(point: bytes, by: int) -> bytes:
    """The address beside it; one beyond the family's first or last is none that is ever taken."""
    value = int.from_bytes(point[1:], "big") + by
    if not 0 <= value < 1 << 8 * (len(point) - 1):
        return b""
    return point[:1] + value.to_bytes(len(point) - 1, "big")


def _quoted(path: str) -> str:
    """A path within SQLite's URI."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def point_named(name: str) -> bytes | None:
    """As `_point`, of the address that a file of this name stands for; None where it is no address in the reference's
    spelling."""
    try:
        if ":" not in name:
            packed = socket.inet_pton(socket.AF_INET, name)
            return b"4" + packed if socket.inet_ntop(socket.AF_INET, packed) == name else None
        # The C library spells ::102:304 as ::1.2.3.4, Go and Python do not.
        address = IPv6Address(name)
    except (OSError, ValueError):
        return None
    return b"6" + address.packed if str(address) == name and "%" not in name else None


def named(name: str) -> Address | None:
    """The address itself; None likewise."""
    point = point_named(name)
    if point is None:
        return None
    return IPv4Address(point[1:]) if point[:1] == b"4" else IPv6Address(point[1:])
