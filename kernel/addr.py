"""Addresses on links.

Sources: include/uapi/linux/if_addr.h, net/ipv4/devinet.c, net/ipv6/addrconf.c.
"""

from __future__ import annotations

import functools
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

from kernel import netlink
from kernel.errors import NotFound
from kernel.netlink import Message, attr, attributes, u32
from kernel.session import Door

_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
NODAD, DADFAILED, TENTATIVE, NOPREFIXROUTE = 0x02, 0x08, 0x40, 0x200

_IFADDR = struct.Struct("=BBBBI")

AnyInterface = IPv4Interface | IPv6Interface


@dataclass(frozen=True, slots=True)
class Address:
    """An address on a link. `interface` keeps the host part: 10.1.0.2/16."""

    interface: AnyInterface
    index: int
    flags: int

    @property
    def tentative(self) -> bool:
        """Duplicate address detection is not over."""
        return bool(self.flags & TENTATIVE)

    @property
    def duplicate(self) -> bool:
        """Somebody else on the segment has it."""
        return bool(self.flags & DADFAILED)


def add_message(index: int, interface: AnyInterface, *, dad: bool = False, prefix_route: bool = True) -> Message:
    """The request that adds an address to a link.

    IPv4 gets a broadcast address, as `ip addr add … brd +` and the reference plugins do. IPv6 is usable at once unless
    `dad` asks the kernel to look for a duplicate first (a second and more). Without `prefix_route` the kernel makes no
    route to the address's network, now or when the link comes up again.
    """
    flags = 0 if prefix_route else NOPREFIXROUTE
    packed = interface.ip.packed
    length = interface.network.prefixlen
    if interface.version == 4:
        body = _IFADDR.pack(socket.AF_INET, length, 0, 0, index) + attr(_IFA_LOCAL, packed) + attr(_IFA_ADDRESS, packed)
        if length < 31:
            body += attr(_IFA_BROADCAST, interface.network.broadcast_address.packed)
    else:
        body = _IFADDR.pack(socket.AF_INET6, length, 0, 0, index) + attr(_IFA_LOCAL, packed)
        body += attr(_IFA_ADDRESS, packed)
        if not dad:
            flags |= NODAD
    if flags:
        body += u32(_IFA_FLAGS, flags)
    return Message(_NEWADDR, netlink.CREATE | netlink.EXCL, body, f"add address {interface} to link {index}")


def add(door: Door, index: int, interface: AnyInterface, *, dad: bool = False) -> None:
    """Add an address.

    Raises:
        Exists: the link has it already.
    """
    door.rtnl.execute([add_message(index, interface, dad=dad)])


def delete(door: Door, index: int, interface: AnyInterface) -> bool:
    """Remove an address; False where it was not there."""
    try:
        door.rtnl.execute([delete_message(index, interface)])
    except NotFound:
        return False
    return True


def delete_message(index: int, interface: AnyInterface) -> Message:
    """The request that removes an address from a link."""
    family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    packed = interface.ip.packed
    body = _IFADDR.pack(family, interface.network.prefixlen, 0, 0, index)
    body += attr(_IFA_LOCAL, packed) + attr(_IFA_ADDRESS, packed)
    return Message(_DELADDR, 0, body, f"remove address {interface} from link {index}")


def all_addresses(door: Door, index: int = 0, family: int = 0) -> list[Address]:
    """Every address of the namespace, or of one link and one family (4 or 6)."""
    family_number = {0: 0, 4: socket.AF_INET, 6: socket.AF_INET6}[family]
    try:
        answers = door.rtnl.dump(Message(_GETADDR, 0, _IFADDR.pack(family_number, 0, 0, 0, index), "list addresses"))
    except NotFound:
        return []
    return [_parse(body) for body in answers]


def _parse(body: bytes) -> Address:
    family, length, flags, _scope, index = _IFADDR.unpack_from(body)
    found = attributes(body, _IFADDR.size)
    packed = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]
    # The byte in the header has the lower eight flags only.
    flags = int.from_bytes(found[_IFA_FLAGS], "little") if _IFA_FLAGS in found else flags
    return Address(_interface(family, packed, length), index, flags)


@functools.lru_cache(maxsize=64)  # every ADD sees the gateways of its bridge again
def _interface(family: int, packed: bytes, length: int) -> AnyInterface:
    if family == socket.AF_INET:
        return IPv4Interface((packed[:4], length))
    return IPv6Interface((packed[:16], length))
