"""rtnetlink events: what happened to links, addresses, routes, neighbours and forwarding entries.

The kernel tells each change in order. It does not tell all that follows from one: IPv4 routes that go with a link which
is taken down, or with their source address, go silently (net/ipv4/fib_trie.c, fib_table_flush). What the reader missed
(ENOBUFS) is told as Lost.

Sources: include/uapi/linux/rtnetlink.h, net/core/rtnetlink.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kernel import fdb, neigh, route
from kernel.errors import from_oserror
from kernel.fdb import Bridged, Forward
from kernel.neigh import Neighbour
from kernel.netlink import REPLACE, ROUTE, attributes, text
from kernel.route import Route

_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_GROUPS = (1, 3, 5, 7, 9, 11)  # RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE = 16, 17, 20, 21, 24, 25
_IFLA_IFNAME = 3
_IFF_UP = 0x1
_SO_RCVBUFFORCE = 33
_BUFFER = 1 << 24
_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_INDEX_AT = 4  # of ifinfomsg, ifaddrmsg and ndmsg alike


@dataclass(frozen=True, slots=True)
class LinkChange:
    """A link came, went or changed. `up`: administratively."""

    index: int
    name: str
    gone: bool
    up: bool


@dataclass(frozen=True, slots=True)
class AddressChange:
    """An address of a link came or went."""

    index: int
    gone: bool


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route came (`replaced`: in the place of another one) or went."""

    route: Route
    gone: bool
    replaced: bool


@dataclass(frozen=True, slots=True)
class NeighbourChange:
    neighbour: Neighbour
    gone: bool


@dataclass(frozen=True, slots=True)
class ForwardChange:
    forward: Forward | Bridged
    gone: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """Events were missed: anything may have happened."""


Change = LinkChange | AddressChange | RouteChange | NeighbourChange | ForwardChange | Lost


class RouteEvents:
    """The changes of the namespace in which it was made. For one thread.

    Set `watched` to the indexes of the links whose neighbours and forwarding entries matter: a host with many
    containers tells of others all the time.
    """

    def __init__(self) -> None:
        self.watched: frozenset[int] = frozenset()
        self.pending = False  # whether the last `read` left some
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, ROUTE)
        except OSError as error:
            raise from_oserror("open a netlink socket for events", error) from error
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:  # in a user namespace
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 0))
            for number in _GROUPS:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, number)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise from_oserror("listen to rtnetlink events", error) from error

    def fileno(self) -> int:
        """The descriptor, for polls."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket. Closing twice is harmless."""
        self._socket.close()

    def read(self, most: int = 0) -> list[Change]:
        """What happened since the last call; it does not wait. `most`: so many messages of the kernel's, and the others
        with the next call; 0: all, however long they keep coming.

        Raises:
            KernelError: the socket cannot be read.
        """
        changes: list[Change] = []
        left = most
        while not most or left:
            left -= 1
            self.pending = most > 0 and not left
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                self.pending = False
                return changes
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise from_oserror("read rtnetlink events", error) from error
                changes.append(Lost())
                continue
            changes += self._parse(data)
        return changes

    def _parse(self, data: bytes) -> Iterator[Change]:
        offset = 0
        while offset + 16 <= len(data):
            size, kind, flags, _sequence, _port = _HEADER.unpack_from(data, offset)
            if size < 16:
                break
            yield from self._changes(kind, flags, data[offset + 16 : offset + size])
            offset += (size + 3) & ~3

    def _changes(self, kind: int, flags: int, body: bytes) -> Iterator[Change]:
        if kind in (_NEWROUTE, _DELROUTE):
            for one in route.parse(body):
                yield RouteChange(one, kind == _DELROUTE, bool(flags & REPLACE))
        elif kind in (neigh.NEWNEIGH, neigh.DELNEIGH):
            if int.from_bytes(body[_INDEX_AT : _INDEX_AT + 4], "little") in self.watched:
                gone = kind == neigh.DELNEIGH
                for neighbour in neigh.parse(body):
                    yield NeighbourChange(neighbour, gone)
                for forward in fdb.parse(body):
                    yield ForwardChange(forward, gone)
        elif kind in (_NEWLINK, _DELLINK):
            _family, _hardware, index, link_flags, _change = _IFINFO.unpack_from(body)
            # Bridges tell of their ports in their own family: what a port learns and floods there only, and with
            # RTM_DELLINK that it is one no longer.
            of_port = body[0] == socket.AF_BRIDGE and kind == _NEWLINK and index in self.watched
            if body[0] == socket.AF_UNSPEC or of_port:
                name = text(attributes(body, _IFINFO.size).get(_IFLA_IFNAME))
                yield LinkChange(index, name, kind == _DELLINK, bool(link_flags & _IFF_UP))
        elif kind in (_NEWADDR, _DELADDR):
            yield AddressChange(_IFADDR.unpack_from(body)[4], kind == _DELADDR)
