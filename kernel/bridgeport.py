"""A tunnel's end as a port of a bridge: it learns nothing, answers for neighbours, and floods only where it is told to.

Sources: include/uapi/linux/if_link.h (IFLA_BRPORT_*), net/bridge/br_netlink.c, net/bridge/br_arp_nd_proxy.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kernel.errors import NotFound
from kernel.netlink import Message, attr, attributes, nested, string, u32
from kernel.session import Door

_NEWLINK, _GETLINK = 16, 18
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_EXT_MASK = 3, 10, 18, 29
_SKIP_STATISTICS = 1 << 3
_SLAVE_KIND, _SLAVE_DATA = 4, 5
_LEARNING, _UNICAST_FLOOD, _MULTICAST_FLOOD, _BROADCAST_FLOOD, _NEIGH_SUPPRESS = 8, 9, 27, 30, 32
_IFINFO = struct.Struct("=BxHiII")


@dataclass(frozen=True, slots=True)
class Port:
    """Attributes:
    bridge: its index.
    answers: the bridge answers for neighbours that it knows behind the port (neigh_suppress).
    floods: unknown unicast, multicast and broadcast leave by it; None: some do.
    """

    bridge: int
    learns: bool
    answers: bool
    floods: bool | None


def find(door: Door, name: str) -> Port | None:
    """What the link of that name is as a port; None where it is none, or there is no link."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    try:
        found = attributes(door.rtnl.get(Message(_GETLINK, 0, body, f"look up link {name}")), _IFINFO.size)
    except NotFound:
        return None
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    data = attributes(info.get(_SLAVE_DATA, b""))
    if _IFLA_MASTER not in found or info.get(_SLAVE_KIND, b"").rstrip(b"\0") != b"bridge":
        return None
    flags = {kind: data.get(kind, b"\0") != b"\0" for kind in (_UNICAST_FLOOD, _MULTICAST_FLOOD, _BROADCAST_FLOOD)}
    return Port(
        int.from_bytes(found[_IFLA_MASTER], "little"),
        data.get(_LEARNING, b"\0") != b"\0",
        data.get(_NEIGH_SUPPRESS, b"\0") != b"\0",
        all(flags.values()) if len(set(flags.values())) == 1 else None,
    )


def messages(index: int, bridge: int, *, floods: bool) -> list[Message]:
    """The requests that make a link such a port of a bridge. As long as the link is down nothing passes it."""
    kinds = (_UNICAST_FLOOD, _MULTICAST_FLOOD, _BROADCAST_FLOOD)
    data = [attr(_LEARNING, b"\0"), attr(_NEIGH_SUPPRESS, b"\1"), *(attr(kind, bytes([floods])) for kind in kinds)]
    header = _IFINFO.pack(0, 0, index, 0, 0)
    flags = header + nested(_IFLA_LINKINFO, string(_SLAVE_KIND, "bridge"), nested(_SLAVE_DATA, *data))
    return [
        Message(_NEWLINK, 0, header + u32(_IFLA_MASTER, bridge), f"make link {index} a port of bridge {bridge}"),
        Message(_NEWLINK, 0, flags, f"set what port {index} learns, answers and floods"),
    ]


def leave_message(index: int) -> Message:
    """The request that makes a link no port of anything."""
    return Message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_MASTER, 0), f"free link {index}")
