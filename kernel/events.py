"""nftables events: whether somebody took something out of our tables, or changed what another firewall forwards.

The kernel tells each change of a transaction, then who made it (NFT_MSG_NEWGEN, with process id and name). What the
reader misses (ENOBUFS) counts as a loss: it cannot know.

Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c (nf_tables_gen_notify).
"""

from __future__ import annotations

import dataclasses
import errno
import select
import socket
import struct
from dataclasses import dataclass

from kernel.errors import from_oserror
from kernel.foreign import FILTER, FORWARD
from kernel.netlink import NETFILTER, attributes, text
from kernel.nft import TABLE

_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10 << 8
_NEWGEN = _SUBSYSTEM | 15
_DELSETELEM = _SUBSYSTEM | 14
_LOSSES = frozenset(_SUBSYSTEM | number for number in (2, 5, 8, 11))  # table, chain, rule, set deleted
_DELTABLE, _NEWCHAIN, _DELCHAIN, _DELRULE = (_SUBSYSTEM | number for number in (2, 3, 5, 8))
_NEWTABLE, _NEWRULE = _SUBSYSTEM, _SUBSYSTEM | 6
_IPTABLES = (2, 10)  # the families ip and ip6
_FIREWALLD = "firewalld"  # its table, in any family
_GEN_PID, _GEN_NAME = 2, 3
_RULE_CHAIN = 2
_HEADER = struct.Struct("=IHHII")
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h: beyond net.core.rmem_max, for CAP_NET_ADMIN
_BUFFER = 1 << 26  # bytes at most: ten thousand published ports that are put back are 10 MB of events


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction. `pid` is 0 where the kernel did not say.

    Attributes:
        structure: it took a table, chain, rule or set of ours, and did not write the table anew.
        elements: it took elements of ours.
        forward: what iptables forwards may have changed, or which chains its table filter has.
        firewalld: firewalld made its table.
        lost: events were missed, so all of this may be so.
        pid, process: who did it.
    """

    structure: bool = False
    elements: bool = False
    forward: bool = False
    firewalld: bool = False
    lost: bool = False
    pid: int = 0
    process: str = ""


class Events:
    """The changes of the namespace in which it was made. For one thread."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
        except OSError as error:
            raise from_oserror("open a netlink socket for nftables events", error) from error
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:  # in a user namespace
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise from_oserror("listen to nftables events", error) from error
        self._seen = Change()

    def close(self) -> None:
        """Close the socket. Closing twice is harmless."""
        self._socket.close()

    def wait(self, timeout_s: float) -> list[Change]:
        """The changes since the last call; waits for the first of them.

        Raises:
            KernelError: the socket cannot be read.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)
        changes: list[Change] = []
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return changes
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise from_oserror("read nftables events", error) from error
                changes.append(Change(structure=True, elements=True, forward=True, firewalld=True, lost=True))
                continue
            changes += self._parse(data)

    def _parse(self, data: bytes) -> list[Change]:
        changes = []
        offset = 0
        while offset + 20 <= len(data):
            size, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, offset)
            if size < 20:
                break
            body = attributes(data[offset : offset + size], 20)
            if kind == _NEWGEN:
                if self._seen != Change():
                    who = _number(body.get(_GEN_PID)), text(body.get(_GEN_NAME))
                    changes.append(dataclasses.replace(self._seen, pid=who[0], process=who[1]))
                self._seen = Change()
            else:
                self._see(kind, data[offset + 16], body)
            offset += (size + 3) & ~3
        return changes

    def _see(self, kind: int, family: int, body: dict[int, bytes]) -> None:
        """Note what one message tells."""
        table = text(body.get(1))  # of chains, rules, sets and elements, too, the table's name is attribute 1
        seen = self._seen
        if table == TABLE:
            if kind in _LOSSES:
                seen = dataclasses.replace(seen, structure=True)
            elif kind == _DELSETELEM:
                seen = dataclasses.replace(seen, elements=True)
            elif kind == _NEWTABLE and seen.structure:
                # Removed and written as a whole, as our plugins do it (kernel.nft_tables, ensure_tables).
                seen = dataclasses.replace(seen, structure=False, elements=True)
        elif table == FILTER and family in _IPTABLES:
            of_forward = kind in (_NEWRULE, _DELRULE) and text(body.get(_RULE_CHAIN)) == FORWARD
            if of_forward or kind in (_NEWCHAIN, _DELCHAIN, _DELTABLE):
                seen = dataclasses.replace(seen, forward=True)
        elif table == _FIREWALLD and kind == _NEWTABLE:
            seen = dataclasses.replace(seen, firewalld=True)
        self._seen = seen


def _number(data: bytes | None) -> int:
    return int.from_bytes(data, "big") if data and len(data) == 4 else 0
