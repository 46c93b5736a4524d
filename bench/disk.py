"""Where the benchmark keeps state, whether that is a disk, and how fast the disk makes data durable."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.host import BenchError

# What lives in memory, or syncs to nowhere; names as in /proc/filesystems.
_NO_DISK = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_PAGE = 4096
_FRAME = 4120  # a page in SQLite's log: 24 bytes of header (https://sqlite.org/fileformat2.html, section 4)
_FRAMES = 4  # pages of a small commit
_LOG = 2000 * _FRAME  # bytes after which the log is begun anew, over the same blocks


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty directory `parent`/bench-state, removed afterwards.

    Raises BenchError while another run is there: two at once would measure each other. The lock ends with the process.
    """
    place = parent / "bench-state"
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(lock, place)
        for left in place.iterdir():  # by a run that was killed
            _remove(left)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, place: Path) -> None:
    other = BenchError(f"another benchmark runs in {place}: wait for its end")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other one's end may have taken the directory away between the two calls.
        if not os.path.samestat(os.fstat(descriptor), os.stat(place)):
            raise other
    except (BlockingIOError, FileNotFoundError):
        raise other from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that a path lies on, out of the text of /proc/self/mountinfo (proc(5))."""
    found, longest = "unknown", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode().decode("unicode_escape")
        inside = point == "/" or path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(longest):
            found, longest = after.split(" ")[0], point
    return found


def require_disk(path: Path) -> str:
    """The file system's type. Raises BenchError where nothing is durable."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        kind = file_system(path.resolve(), file.read())
    if kind in _NO_DISK:
        raise BenchError(f"{path} lies on {kind}, where a sync costs nothing: name a directory on a disk with --state")
    return kind


class Syncs:
    """Two loops of small durable writes, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._append = os.open(directory / "append", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(self._log, bytes(_LOG))
        os.fsync(self._log)
        self._at = 0

    def append(self, count: int) -> list[float]:
        """Milliseconds of each append of a page with fdatasync: the file grows, so its metadata is written too."""
        return [self._timed(self._append, None) for _ in range(count)]

    def overwrite(self, count: int) -> list[float]:
        """Milliseconds of each small commit into blocks that are there already, as a log that is used again does."""
        took = []
        for _ in range(count):
            took.append(self._timed(self._log, self._at))
            self._at = (self._at + _FRAMES * _FRAME) % (_LOG - _FRAMES * _FRAME)
        return took

    @staticmethod
    def _timed(fd: int, at: int | None) -> float:
        data = os.urandom(_PAGE if at is None else _FRAMES * _FRAME)
        began = time.perf_counter_ns()
        if at is None:
            os.write(fd, data)
        else:
            os.pwrite(fd, data, at)
        os.fdatasync(fd)
        return (time.perf_counter_ns() - began) / 1e6

    def close(self) -> None:
        os.close(self._append)
        os.close(self._log)
