"""Forwarding entries of a VXLAN device: to which host a frame with this MAC goes.

Sources: include/uapi/linux/neighbour.h, net/core/rtnetlink.c (rtnl_fdb_add), drivers/net/vxlan/vxlan_core.c.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import netlink
from kernel.link import mac_text, packed_mac
from kernel.neigh import DELNEIGH, NDMSG, NEWNEIGH, PERMANENT
from kernel.netlink import Message, attr, attributes, u32
from kernel.session import Door

_GETNEIGH = 30
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_SELF = 0x02  # NTF_SELF: the device's own table, not its bridge's

AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Forward:
    """Frames to `mac` go to the host `dst`."""

    index: int
    mac: str
    dst: AnyAddress


def set_message(forward: Forward) -> Message:
    """The request that makes an entry, in the place of the MAC's earlier one."""
    what = f"forward {forward.mac} on link {forward.index} to {forward.dst}"
    return Message(NEWNEIGH, netlink.CREATE | netlink.REPLACE, _pack(forward), what)


def delete_message(forward: Forward) -> Message:
    """The request that removes an entry."""
    what = f"no longer forward {forward.mac} on link {forward.index} to {forward.dst}"
    return Message(DELNEIGH, 0, _pack(forward), what)


def all_forwards(door: Door, index: int) -> list[Forward]:
    """Every entry of one VXLAN device."""
    body = NDMSG.pack(socket.AF_BRIDGE, 0, 0, 0, 0) + u32(_NDA_IFINDEX, index)
    found: list[Forward] = []
    for answer in door.rtnl.dump(Message(_GETNEIGH, 0, body, f"list forwarding entries of link {index}")):
        found += [one for one in parse(answer) if one.index == index]
    return found


def parse(body: bytes) -> Iterator[Forward]:
    """The entry in a message of the kernel; none where it is of another kind, such as one of a bridge."""
    family, index, _state, flags, _kind = NDMSG.unpack_from(body)
    if family != socket.AF_BRIDGE or not flags & _SELF:
        return
    found = attributes(body, NDMSG.size)
    if _NDA_DST in found and _NDA_LLADDR in found:
        yield Forward(index, mac_text(found[_NDA_LLADDR]), ip_address(found[_NDA_DST]))


def _pack(forward: Forward) -> bytes:
    body = NDMSG.pack(socket.AF_BRIDGE, forward.index, PERMANENT, _SELF, 0)
    return body + attr(_NDA_LLADDR, packed_mac(forward.mac)) + attr(_NDA_DST, forward.dst.packed)
