"""What one process holds open towards its own network namespace: the way home, and one rtnetlink socket.

A Session is opened once, in the host's namespace, before any work; `visit` gives a door to a container's namespace.
Functions of this package that need rtnetlink alone take either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from kernel import netlink, netns
from kernel.errors import from_oserror

if TYPE_CHECKING:
    from kernel.deleter import Deleter


class Door(Protocol):
    """Whoever has an rtnetlink socket."""

    @property
    def rtnl(self) -> netlink.Socket:
        """The socket, in the namespace that the functions act on."""


class Session:
    """An open door to the kernel, for one thread. Use as a context manager, or `close` it.

    `deleter`: who deletes links here, and does not end with the session; None: each deletion is waited for.
    """

    def __init__(self, deleter: Deleter | None = None) -> None:
        self.deleter = deleter
        try:
            self.home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror("open the network namespace of this process", error) from error
        try:
            self._rtnl = netlink.Socket(netlink.ROUTE)
        except BaseException:
            os.close(self.home_fd)
            raise
        self._netfilter: netlink.Socket | None = None

    @property
    def rtnl(self) -> netlink.Socket:
        """The rtnetlink socket of home."""
        return self._rtnl

    @property
    def netfilter(self) -> netlink.Socket:
        """The nfnetlink socket, opened with the first use. Only ask at home: it belongs to where it was opened."""
        if self._netfilter is None:
            self._netfilter = netlink.Socket(netlink.NETFILTER)
        return self._netfilter

    def close(self) -> None:
        """Close everything. Closing twice is harmless."""
        if self.home_fd >= 0:
            self._rtnl.close()
            if self._netfilter is not None:
                self._netfilter.close()
            os.close(self.home_fd)
            self.home_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def visit(self, where: netns.Netns) -> Iterator[Visit]:
        """A door to a container's namespace, for the duration of the block. The thread stays at home."""
        with netns.entered(where, self.home_fd):
            visit = Visit(where, self)
        try:
            yield visit
        finally:
            visit.close()


class Visit:
    """An rtnetlink socket inside a container's namespace; usable from home, as sockets stay where they were made.

    Made by `Session.visit`, in the namespace `where`. `cookie` is its, 0 where the kernel has none.
    """

    def __init__(self, where: netns.Netns, host: Session) -> None:
        self._rtnl = netlink.Socket(netlink.ROUTE)
        self.cookie = self._rtnl.cookie()
        self.where = where
        self._host = host

    @property
    def rtnl(self) -> netlink.Socket:
        """The rtnetlink socket of the container's namespace."""
        return self._rtnl

    def close(self) -> None:
        """Close the socket; it keeps the namespace alive as long as it is open."""
        self._rtnl.close()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be there with the whole thread, for what no socket can do: sysctls. Sockets and sysctls only."""
        with netns.entered(self.where, self._host.home_fd):
            yield

    @property
    def deleter(self) -> Deleter | None:
        """The session's."""
        return self._host.deleter

    def another_socket(self) -> netlink.Socket:
        """One more rtnetlink socket of the container's namespace, for somebody else, who closes it."""
        with self.inside():
            return netlink.Socket(netlink.ROUTE)
