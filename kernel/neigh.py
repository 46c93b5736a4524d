"""Neighbours: which MAC an address has on a link. Only those that are set by hand (permanent) are made here.

Sources: include/uapi/linux/neighbour.h, net/core/neighbour.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import netlink
from kernel.link import mac_text, packed_mac
from kernel.netlink import Message, attr, attributes, u32
from kernel.session import Door

NEWNEIGH, DELNEIGH, _GETNEIGH = 28, 29, 30
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
PERMANENT = 0x80  # NUD_PERMANENT

NDMSG = struct.Struct("=BxxxiHBB")

AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An address on a link and its MAC. `permanent`: set by hand, and it stays."""

    index: int
    address: AnyAddress
    mac: str
    permanent: bool = True


def set_message(neighbour: Neighbour) -> Message:
    """The request that makes a permanent neighbour, in the place of what was known of the address."""
    body = _header(neighbour, PERMANENT) + attr(_NDA_LLADDR, packed_mac(neighbour.mac))
    what = f"set neighbour {neighbour.address} of link {neighbour.index} to {neighbour.mac}"
    return Message(NEWNEIGH, netlink.CREATE | netlink.REPLACE, body, what)


def delete_message(neighbour: Neighbour) -> Message:
    """The request that removes a neighbour."""
    what = f"remove neighbour {neighbour.address} of link {neighbour.index}"
    return Message(DELNEIGH, 0, _header(neighbour, 0), what)


def all_neighbours(door: Door, index: int) -> list[Neighbour]:
    """What is known of one link, both families, without what is set for multicast."""
    found: list[Neighbour] = []
    # AF_UNSPEC would bring those of every family there is.
    for family in (socket.AF_INET, socket.AF_INET6):
        body = NDMSG.pack(family, 0, 0, 0, 0) + u32(_NDA_IFINDEX, index)
        for answer in door.rtnl.dump(Message(_GETNEIGH, 0, body, f"list neighbours of link {index}")):
            found += [one for one in parse(answer) if one.index == index]
    return found


def parse(body: bytes) -> Iterator[Neighbour]:
    """The neighbour in a message of the kernel; none where it is of another kind, or for multicast."""
    family, index, state, _flags, _kind = NDMSG.unpack_from(body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    found = attributes(body, NDMSG.size)
    address = ip_address(found[_NDA_DST]) if _NDA_DST in found else None
    if address is not None and not address.is_multicast:
        yield Neighbour(index, address, mac_text(found.get(_NDA_LLADDR, b"")), bool(state & PERMANENT))


def _header(neighbour: Neighbour, state: int) -> bytes:
    family = socket.AF_INET if neighbour.address.version == 4 else socket.AF_INET6
    return NDMSG.pack(family, neighbour.index, state, 0, 0) + attr(_NDA_DST, neighbour.address.packed)
