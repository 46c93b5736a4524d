"""The requests that telemetry/trace.py wrote down, read back.

A line that cannot be read is passed over: a full disk or a crash cut it off, or another version wrote it. Its number is
told, so that nobody takes what is shown for all there was.
"""

import os

import msgspec

from telemetry.trace import DIRECTORY, FILE, FULL

_LARGEST = 1 << 24  # bytes that are read of a file; ours have a sixteenth of that


class Trace(msgspec.Struct, frozen=True, omit_defaults=False):
    """One request. `at_ns` is CLOCK_REALTIME at its begin, `outcome` is "done", "failed" or "undelivered", `code` the
    CNI error's, and `steps` has nanoseconds by name, in the order in which they ended first."""

    at_ns: int
    way: str
    outcome: str
    total_ns: int
    steps: dict[str, int]
    id: str = ""
    plugin: str = ""
    verb: str = ""
    network: str = ""
    container: str = ""
    ifname: str = ""
    pid: int = 0
    code: int = 0
    error: str = ""


class Traces(msgspec.Struct, frozen=True):
    """What is kept, oldest end first, and how many lines could not be read."""

    requests: list[Trace]
    unreadable: int


def read(run_dir: str) -> Traces:
    """All that is kept.

    Raises:
        PermissionError: only who serves requests may look, which is root.
        OSError: it is there and cannot be read.
    """
    found: list[Trace] = []
    unreadable = 0
    decoder = msgspec.json.Decoder(Trace)
    for name in (FULL, FILE):
        for line in _content(os.path.join(run_dir, DIRECTORY, name)).split(b"\n"):
            if not line.strip(b"\0 "):
                continue
            try:
                found.append(decoder.decode(line))
            except msgspec.MsgspecError:
                unreadable += 1
    return Traces(found, unreadable)


def _content(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    with open(fd, "rb") as file:
        return file.read(_LARGEST)
