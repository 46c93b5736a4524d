"""What one process holds open towards its own network namespace: the way home, and one rtnetlink socket.

A Session is opened once, in the host's namespace, before any work; a container's namespace is visited with
`inside`, which gives a Session of that namespace for the duration of the block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from kernel import netlink, netns
from kernel.errors import from_oserror


class Session:
    """An open door to the kernel, for one thread. Use as a context manager, or `close` it."""

    def __init__(self) -> None:
        try:
            self.home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror("open the network namespace of this process", error) from error
        try:
            self.rtnl = netlink.Socket(netlink.ROUTE)
        except BaseException:
            os.close(self.home_fd)
            raise
        self._netfilter: netlink.Socket | None = None

    @property
    def netfilter(self) -> netlink.Socket:
        """The nfnetlink socket, opened with the first use. Only ask at home: it belongs to where it was opened."""
        if self._netfilter is None:
            self._netfilter = netlink.Socket(netlink.NETFILTER)
        return self._netfilter

    def close(self) -> None:
        """Close everything. Closing twice is harmless."""
        if self.home_fd >= 0:
            self.rtnl.close()
            if self._netfilter is not None:
                self._netfilter.close()
            os.close(self.home_fd)
            self.home_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def inside(self, where: netns.Netns) -> Iterator[Session]:
        """Be in a container's namespace, with a Session of its own; back home after the block."""
        with netns.entered(where, self.home_fd), Session() as session:
            yield session
