"""Forwarding entries: of a VXLAN device, to which host a frame with this MAC goes; of its bridge, that it goes there.

Sources: include/uapi/linux/neighbour.h, net/core/rtnetlink.c (rtnl_fdb_add), drivers/net/vxlan/vxlan_core.c,
net/bridge/br_fdb.c.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import netlink
from kernel.errors import KernelError, NotFound
from kernel.link import mac_text, packed_mac
from kernel.neigh import DELNEIGH, NDMSG, NEWNEIGH, PERMANENT
from kernel.netlink import Message, attr, attributes, u32
from kernel.session import Door

_GETNEIGH = 30
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX, _NDA_MASTER = 1, 2, 8, 9
_SELF, _MASTER, _STICKY = 0x02, 0x04, 0x40  # NTF_*: the device's own table, its bridge's
_STATIC = 0x40  # NUD_NOARP: does not age
_NOBODY_KNOWN = "00:00:00:00:00:00"  # where frames to MACs without an entry go, as many hosts as it has entries

AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Forward:
    """Frames to `mac` go to the host `dst`; those to MACs without an entry where "00:00:00:00:00:00" goes."""

    index: int
    mac: str
    dst: AnyAddress


@dataclass(frozen=True, slots=True)
class Bridged:
    """Frames to `mac` leave the bridge by this port, whoever else sends with that MAC."""

    index: int
    mac: str


def set_message(forward: Forward) -> Message:
    """The request that makes an entry, in the place of the MAC's earlier one; for all unknown MACs, beside others."""
    what = f"forward {forward.mac} on link {forward.index} to {forward.dst}"
    how = netlink.APPEND if forward.mac == _NOBODY_KNOWN else netlink.REPLACE
    return Message(NEWNEIGH, netlink.CREATE | how, _pack(forward), what)


def delete_message(forward: Forward) -> Message:
    """The request that removes an entry."""
    what = f"no longer forward {forward.mac} on link {forward.index} to {forward.dst}"
    return Message(DELNEIGH, 0, _pack(forward), what)


def set_bridged_message(bridged: Bridged) -> Message:
    """The request that makes an entry of a bridge, in the place of the MAC's earlier one."""
    what = f"have {bridged.mac} leave by port {bridged.index}"
    return Message(NEWNEIGH, netlink.CREATE | netlink.REPLACE, _pack_bridged(bridged), what)


def delete_bridged_message(bridged: Bridged) -> Message:
    """The request that removes an entry of a bridge."""
    return Message(DELNEIGH, 0, _pack_bridged(bridged), f"no longer have {bridged.mac} leave by port {bridged.index}")


def all_forwards(door: Door, index: int) -> list[Forward | Bridged]:
    """Every entry of one VXLAN device, and those of its bridge that lead to it and do not age."""
    body = NDMSG.pack(socket.AF_BRIDGE, 0, 0, 0, 0) + u32(_NDA_IFINDEX, index)
    found: list[Forward | Bridged] = []
    for answer in door.rtnl.dump(Message(_GETNEIGH, 0, body, f"list forwarding entries of link {index}")):
        found += [one for one in parse(answer) if one.index == index]
    return found


def port_of(door: Door, bridge: int, mac: str) -> int:
    """The index of the port by which a bridge sends frames to a MAC, learned or set; 0: it does not know it, or it is
    the bridge itself. Kernels before 5.0 do not tell."""
    body = (
        NDMSG.pack(socket.AF_BRIDGE, 0, 0, _MASTER, 0) + attr(_NDA_LLADDR, packed_mac(mac)) + u32(_NDA_MASTER, bridge)
    )
    try:
        answer = door.rtnl.get(Message(_GETNEIGH, 0, body, f"look up the port of {mac} on bridge {bridge}"))
    except NotFound:
        return 0
    except KernelError as error:
        if error.errno == errno.EOPNOTSUPP:
            return 0
        raise
    _family, index, _state, _flags, _kind = NDMSG.unpack_from(answer)
    return int(index) if index != bridge else 0


def parse(body: bytes) -> Iterator[Forward | Bridged]:
    """The entry in a message of the kernel; none where it is of another kind, such as what a bridge has learned."""
    family, index, state, flags, _kind = NDMSG.unpack_from(body)
    if family != socket.AF_BRIDGE:
        return
    found = attributes(body, NDMSG.size)
    if _NDA_LLADDR not in found:
        return
    mac = mac_text(found[_NDA_LLADDR])
    if flags & _SELF:
        if _NDA_DST in found:
            yield Forward(index, mac, ip_address(found[_NDA_DST]))
    elif _NDA_MASTER in found and state & _STATIC and flags & _STICKY:
        yield Bridged(index, mac)


def _pack_bridged(bridged: Bridged) -> bytes:
    # Sticky: a container that sends with another host's MAC gets nothing of what is for that.
    body = NDMSG.pack(socket.AF_BRIDGE, bridged.index, _STATIC, _MASTER | _STICKY, 0)
    return body + attr(_NDA_LLADDR, packed_mac(bridged.mac))


def _pack(forward: Forward) -> bytes:
    body = NDMSG.pack(socket.AF_BRIDGE, forward.index, PERMANENT, _SELF, 0)
    return body + attr(_NDA_LLADDR, packed_mac(forward.mac)) + attr(_NDA_DST, forward.dst.packed)
