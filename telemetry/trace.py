"""Where the time of one request goes: named steps, kept for `netloom trace` after the request.

Rules of this file
- One request at a time in a process. Time belongs to the innermost step, so that the steps add up to the total; what no
  step is named for belongs to the one around it.
- A step costs two looks at the clock. All that is written is one line at the end, after the caller has its answer.
- A request never fails because of it: a full disk, a directory that is somebody else's or a signal lose the line.
- Nothing heavy is imported: a cold process pays for it in every request.

The lines go to `<run dir>/trace/requests`, appended with one write(2) each: the kernel puts O_APPEND writes of several
processes one after the other, so that warm workers and cold processes need no lock and no slot of their own. Whoever
fills the file renames it to `requests.1`, so both together hold the last few thousand requests in at most 2 MiB. They
are never synced: what a power cut ends is of no interest after it. telemetry/traces.py reads them.
"""

import contextlib
import errno
import fcntl
import functools
import os
import stat
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

import msgspec

P = ParamSpec("P")
R = TypeVar("R")
Way = Literal["warm", "cold"]

DIRECTORY = "trace"  # of the run directory
FILE = "requests"
FULL = "requests.1"
LIMIT = 1 << 20  # bytes; the file is renamed when it has so many
_LONGEST_TEXT = 200  # characters of one value
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: for a FIFO without a reader.
_OPEN_FILE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Request:
    """The request in hand."""

    __slots__ = ("about", "began_ns", "name", "since_ns", "spent_ns", "wall_ns", "way")

    def __init__(self, way: Way, name: str, earlier_ns: int) -> None:
        now = time.monotonic_ns()
        self.way = way
        self.name = name
        self.wall_ns = time.time_ns() - earlier_ns
        self.began_ns = self.since_ns = now - earlier_ns
        self.spent_ns: dict[str, int] = {}  # by step, in the order of their first ends
        self.about: dict[str, str] = {}


_request: _Request | None = None


def begin(way: Way, step: str, earlier_ns: int = 0) -> None:
    """A request begins with this step; one that was never ended is forgotten.

    Args:
        way: who serves it.
        step: the first one's name.
        earlier_ns: so long ago.
    """
    global _request  # noqa: PLW0603 - one request a process
    _request = _Request(way, step, earlier_ns)


def about(**what: str) -> None:
    """What is known of the request: its id, plugin, verb, network, container, ifname."""
    if _request is not None:
        _request.about.update(what)


def mark(name: str) -> str:
    """Another step begins; returns the name of the one that ends."""
    request = _request
    if request is None:
        return ""
    now = time.monotonic_ns()
    before = request.name
    spent = request.spent_ns
    spent[before] = spent.get(before, 0) + now - request.since_ns
    request.since_ns = now
    request.name = name
    return before


class step:  # noqa: N801 - read as a word: `with trace.step("veth")`, `@trace.step("veth")`
    """A step as a block, or as a function; after it the step around it goes on."""

    __slots__ = ("_around", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._around = ""

    def __enter__(self) -> None:
        self._around = mark(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        mark(self._around)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        name = self._name

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            around = mark(name)
            try:
                return function(*args, **kwargs)
            finally:
                mark(around)

        return timed


def end(run_dir: str, outcome: str, code: int = 0, error: str = "") -> None:
    """The request is over and its caller has the answer: write it down.

    Args:
        run_dir: where the directory of traces is, or will be made.
        outcome: "done", "failed" or "undelivered".
        code: the CNI error's.
        error: in words, as far as there is one.
    """
    global _request
    # Even a signal: all that it could still stop is this line.
    with contextlib.suppress(BaseException):
        mark("")
        request, _request = _request, None
        if request is None:
            return
        document = {
            "at_ns": request.wall_ns,
            **{key: _short(text) for key, text in request.about.items()},
            "way": request.way,
            "pid": os.getpid(),
            "outcome": outcome,
            "code": code,
            "error": _short(error),
            "total_ns": request.since_ns - request.began_ns,
            "steps": request.spent_ns,
        }
        # A line feed in front, too: what a full disk cut off before is a line of its own then.
        _append(f"{run_dir}/{DIRECTORY}", b"\n" + msgspec.json.encode(document) + b"\n")


def drop() -> None:
    """Nothing of this request is kept."""
    global _request  # noqa: PLW0603
    _request = None


def _short(text: str) -> str:
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}..."
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _append(directory: str, line: bytes) -> None:
    directory_fd = _open_directory(directory)
    try:
        fd = os.open(FILE, _OPEN_FILE, 0o600, dir_fd=directory_fd)
        try:
            os.write(fd, line)
            if os.fstat(fd).st_size >= LIMIT:
                _set_aside(directory_fd, fd)
        finally:
            os.close(fd)
    finally:
        os.close(directory_fd)


def _open_directory(path: str) -> int:
    try:
        fd = os.open(path, _OPEN_DIRECTORY)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        fd = os.open(path, _OPEN_DIRECTORY)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        raise PermissionError(errno.EPERM, "somebody else may write there", path)
    return fd


def _set_aside(directory_fd: int, fd: int) -> None:
    """Rename the full file; once, whoever else found it full."""
    fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    there, mine = os.stat(FILE, dir_fd=directory_fd, follow_symlinks=False), os.fstat(fd)
    if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
        os.rename(FILE, FULL, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
