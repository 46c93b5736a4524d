"""VXLAN devices that learn nothing: where a frame goes, kernel/fdb.py says.

Sources: include/uapi/linux/if_link.h, drivers/net/vxlan/vxlan_core.c, net/ethtool/ioctl.c; RFC 7348.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import netlink
from kernel.errors import NotFound, from_oserror
from kernel.link import mac_text, packed_mac
from kernel.netlink import Message, attr, attributes, nested, string, text, u32
from kernel.session import Door

OVERHEAD_IPV4, OVERHEAD_IPV6 = 50, 70  # outer IP, UDP and VXLAN headers and the inner Ethernet one

_NEWLINK, _GETLINK, _SETLINK = 16, 18, 19
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_AF_SPEC = 1, 3, 4, 18, 20, 26
_IFLA_EXT_MASK = 29
_SKIP_STATISTICS = 1 << 3
_INFO_KIND, _INFO_DATA = 1, 2
_ID, _LINK, _LOCAL, _LEARNING, _PORT, _LOCAL6, _UDP_CSUM, _ZERO_CSUM6_TX, _ZERO_CSUM6_RX = (
    1,
    3,
    4,
    7,
    15,
    17,
    18,
    19,
    20,
)
_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE = 8, 1
_IFF_UP = 0x1
_IFINFO = struct.Struct("=BxHiII")

_SIOCETHTOOL = 0x8946
_GET_TX_CHECKSUM, _SET_TX_CHECKSUM = 0x16, 0x17

AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN device.

    Attributes:
        vni: the network's number, 24 bits.
        local: the address that its packets come from; None: the kernel chooses.
        port: UDP, of both ends.
        link: the index of the link that its packets leave by; 0: any.
        udp_checksum: whether the outer header has a checksum. Without one, IPv6 packets are taken without one too.
        learning: whether it learns from packets where a MAC is.
    """

    name: str
    vni: int
    local: AnyAddress | None
    port: int
    link: int
    mac: str
    mtu: int
    udp_checksum: bool = False
    learning: bool = False
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A link that has a name which was looked for. `vxlan` None: it is of another kind."""

    index: int
    up: bool
    vxlan: Vxlan | None


def add(door: Door, spec: Vxlan, *, up: bool = True) -> None:
    """Make the device, with its alias and without a link-local address, which nobody could be told of.

    Raises:
        Exists: the name is taken, or another device has this VNI and port.
    """
    data = [u32(_ID, spec.vni), attr(_LEARNING, bytes([spec.learning])), attr(_PORT, spec.port.to_bytes(2, "big"))]
    if spec.link:
        data.append(u32(_LINK, spec.link))
    if spec.local is not None:
        data.append(attr(_LOCAL if spec.local.version == 4 else _LOCAL6, spec.local.packed))
    if spec.local is not None and spec.local.version == 6:
        data += [attr(kind, bytes([not spec.udp_checksum])) for kind in (_ZERO_CSUM6_TX, _ZERO_CSUM6_RX)]
    else:
        data.append(attr(_UDP_CSUM, bytes([spec.udp_checksum])))
    named = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, spec.name)
    body = named + attr(_IFLA_ADDRESS, packed_mac(spec.mac)) + u32(_IFLA_MTU, spec.mtu)
    body += nested(_IFLA_LINKINFO, string(_INFO_KIND, "vxlan"), nested(_INFO_DATA, *data))
    flags = netlink.CREATE | netlink.EXCL
    door.rtnl.execute([Message(_NEWLINK, flags, body, f"add vxlan {spec.name} with VNI {spec.vni}")])
    # A kernel without IPv6 refuses this one, and makes no such address either.
    silent = nested(_IFLA_AF_SPEC, nested(socket.AF_INET6, attr(_INET6_ADDR_GEN_MODE, bytes([_GEN_MODE_NONE]))))
    door.rtnl.attempt([Message(_SETLINK, 0, named + silent, f"no link-local address on {spec.name}")])
    # A link's creation ignores the alias (net/core/rtnetlink.c, rtnl_create_link).
    finish = [Message(_SETLINK, 0, named + string(_IFLA_IFALIAS, spec.alias), f"set the alias of {spec.name}")]
    if up:
        flags_up = _IFINFO.pack(0, 0, 0, _IFF_UP, _IFF_UP) + string(_IFLA_IFNAME, spec.name)
        finish.append(Message(_SETLINK, 0, flags_up, f"bring {spec.name} up"))
    door.rtnl.execute(finish)


def change(door: Door, spec: Vxlan, *, up: bool = True, learning: bool = False) -> None:
    """Give a device that is there its MTU, MAC and alias, and bring it up, or leave that as it is; with `learning` also
    whether it learns. What else differs takes a new device."""
    flags = _IFF_UP if up else 0
    named = _IFINFO.pack(0, 0, 0, flags, flags) + string(_IFLA_IFNAME, spec.name)
    body = named + attr(_IFLA_ADDRESS, packed_mac(spec.mac)) + u32(_IFLA_MTU, spec.mtu)
    body += string(_IFLA_IFALIAS, spec.alias)
    messages = [Message(_SETLINK, 0, body, f"change {spec.name}")]
    if learning:  # by itself: with an MTU the kernel takes nothing (drivers/net/vxlan/vxlan_core.c, vxlan_nl2conf)
        data = nested(_INFO_DATA, attr(_LEARNING, bytes([spec.learning])))
        named = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, spec.name)
        body = named + nested(_IFLA_LINKINFO, string(_INFO_KIND, "vxlan"), data)
        messages.append(Message(_NEWLINK, 0, body, f"set whether {spec.name} learns"))
    door.rtnl.execute(messages)


def find(door: Door, name: str) -> Found | None:
    """The link of that name, or None."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    try:
        return _parse(door.rtnl.get(Message(_GETLINK, 0, body, f"look up link {name}")))
    except NotFound:
        return None


def all_vxlans(door: Door) -> list[Found]:
    """Every VXLAN device of the namespace."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + nested(_IFLA_LINKINFO, string(_INFO_KIND, "vxlan"))
    found = [_parse(answer) for answer in door.rtnl.dump(Message(_GETLINK, 0, body, "list vxlan devices"))]
    return [one for one in found if one.vxlan is not None]


def tx_checksum(name: str) -> bool:
    """Whether the kernel may leave the checksums of packets over this link to the network card. Of the calling thread's
    namespace.

    Raises:
        NotFound: there is no such link.
    """
    return bool(_ethtool(name, _GET_TX_CHECKSUM, 0))


def set_tx_checksum(name: str, on: bool) -> None:
    """Switch that, as `ethtool -K NAME tx on` does."""
    _ethtool(name, _SET_TX_CHECKSUM, int(on))


def _ethtool(name: str, command: int, value: int) -> int:
    # struct ifreq: the name, and a pointer to a struct ethtool_value.
    request = (ctypes.c_uint32 * 2)(command, value)
    asked = struct.pack("16sP16x", name.encode(), ctypes.addressof(request))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            fcntl.ioctl(probe, _SIOCETHTOOL, asked)
    except OSError as error:
        raise from_oserror(f"ask {name} about checksum offload", error) from error
    return int(request[1])


def _parse(body: bytes) -> Found:
    _family, _hardware, index, flags, _change = _IFINFO.unpack_from(body)
    found = attributes(body, _IFINFO.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    if text(info.get(_INFO_KIND)) != "vxlan":
        return Found(index, bool(flags & _IFF_UP), None)
    data = attributes(info.get(_INFO_DATA, b""))
    packed = data.get(_LOCAL) or data.get(_LOCAL6)
    local = ip_address(packed) if packed else None
    checksum = data.get(_ZERO_CSUM6_TX, b"\0") == b"\0" if _LOCAL6 in data else data.get(_UDP_CSUM, b"\0") != b"\0"
    vxlan = Vxlan(
        name=text(found.get(_IFLA_IFNAME)),
        vni=_number(data.get(_ID)),
        local=local,
        port=int.from_bytes(data.get(_PORT, b""), "big"),
        link=_number(data.get(_LINK)),
        mac=mac_text(found.get(_IFLA_ADDRESS, b"")),
        mtu=_number(found.get(_IFLA_MTU)),
        udp_checksum=checksum,
        learning=data.get(_LEARNING, b"\0") != b"\0",
        alias=text(found.get(_IFLA_IFALIAS)),
    )
    return Found(index, bool(flags & _IFF_UP), vxlan)


def _number(data: bytes | None) -> int:
    return int.from_bytes(data, "little") if data else 0
