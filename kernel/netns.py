"""Network namespaces: what a path is, entering one, coming back.

Rules of this file
- A namespace is known by (device, inode) of its nsfs file while somebody holds it, and by its cookie for the whole
  boot: the kernel gives inodes out again, cookies never (net/core/net_namespace.c, net_gen_cookie).
- `entered` moves only the calling thread and proves that it came back; a thread that cannot go home ends its process,
  because everything after would be done in a container.
- Inside `entered`: sockets and sysctls only. No thread, no process, no gRPC channel.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kernel.errors import KernelError, from_errno, from_oserror

CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_SO_NETNS_COOKIE = 71
_SELF = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


class NotANamespace(KernelError):  # noqa: N818 - reads as what happened
    """The path is there but is no network namespace."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which namespace a path or descriptor leads to."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Netns:
    """An open network namespace. `path` is what the runtime called it."""

    path: str
    fd: int
    identity: Identity


def identify(path: str) -> Identity:
    """The namespace behind a path.

    Raises:
        NotFound: nothing is there.
        NotANamespace: a plain file, a directory, or another kind of namespace.
    """
    with opened(path) as netns:
        return netns.identity


def own() -> Identity:
    """The namespace of the calling thread."""
    status = os.stat(_SELF)
    return Identity(status.st_dev, status.st_ino)


@contextmanager
def opened(path: str) -> Iterator[Netns]:
    """Open a namespace by path, checked to be one.

    Raises:
        NotFound, NotANamespace: as for `identify`.
    """
    try:
        # O_NONBLOCK: a FIFO under that name must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_oserror(f"open network namespace {path!r}", error) from error
    try:
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError as error:
            raise NotANamespace(f"open network namespace {path!r}", errno.EINVAL, "it is not a namespace") from error
        if kind != CLONE_NEWNET:
            raise NotANamespace(f"open network namespace {path!r}", errno.EINVAL, "it is another kind of namespace")
        status = os.fstat(fd)
        yield Netns(path, fd, Identity(status.st_dev, status.st_ino))
    finally:
        os.close(fd)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace of a descriptor."""
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        raise from_errno("enter a network namespace", ctypes.get_errno())


@contextmanager
def entered(netns: Netns, home_fd: int) -> Iterator[None]:
    """Be in `netns` for the duration of the block, then at home again.

    Args:
        netns: where to go.
        home_fd: the namespace to return to.
    """
    setns(netns.fd)
    try:
        yield
    finally:
        try:
            setns(home_fd)
        except KernelError as error:
            # Nothing can be done right from here, and everything that a caller would do next is wrong.
            sys.stderr.write(f"netloom: cannot leave network namespace {netns.path}: {error}\n")
            sys.stderr.flush()
            os._exit(70)


def cookie() -> int:
    """The calling thread's namespace's cookie, unique for the whole boot; 0 where the kernel has none (before 5.14)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
        except OSError:
            return 0


def cookie_at(netns: Netns, home_fd: int) -> int:
    """The cookie of another namespace."""
    with entered(netns, home_fd):
        return cookie()
