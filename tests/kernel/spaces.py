"""Network namespaces for the tests of kernel/: this thread goes in, and comes home whatever happens.

Nothing is mounted: a namespace is known by the path of the descriptor that holds it, /proc/<pid>/fd/<n>, which leads
there like any other path. Only the calling thread moves; programs that it starts begin where it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernel import netns

_CLONE_NEWNET = 0x40000000
_SELF = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Space:
    """A network namespace that lives as long as the descriptor."""

    fd: int

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"


@contextlib.contextmanager
def fresh() -> Iterator[Space]:
    """A new namespace with its loopback down. This thread is where it was."""
    with _going_home():
        if _libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        fd = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Space(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(space: Space) -> Iterator[None]:
    """This thread is in that namespace for the duration of the block."""
    with _going_home():
        netns.setns(space.fd)
        yield


@contextlib.contextmanager
def _going_home() -> Iterator[None]:
    home = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        netns.setns(home)
        os.close(home)


def run(*argv: str) -> str:
    """A program in this thread's namespace; its output. Raises CalledProcessError."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def ip(*arguments: str) -> list[dict[str, Any]]:
    """`ip -j` in this thread's namespace, without the empty entries that ip prints for what it filtered out."""
    found: list[dict[str, Any]] = json.loads(run("ip", "-j", *arguments) or "[]")
    return [entry for entry in found if entry]
