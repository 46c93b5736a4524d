"""Announcements in somebody else's name: gratuitous ARP requests, unsolicited neighbour advertisements.

Who has the address in its cache takes the new MAC; who has not does nothing. A bridge passes them on to its ports, but
for those with neigh_suppress (net/bridge/br_arp_nd_proxy.c).

Sources: RFC 826, RFC 5227 (section 3), RFC 4861 (sections 4.4 and 7.2.6); packet(7).
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from kernel.errors import from_oserror
from kernel.link import packed_mac

AnyAddress = IPv4Address | IPv6Address

_IPV4, _ARP, _IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"
_EVERYBODY, _ALL_NODES_MAC = b"\xff" * 6, bytes.fromhex("333300000001")
_ALL_NODES = IPv6Address("ff02::1").packed
_ADVERTISEMENT, _OVERRIDE, _TARGET_MAC, _ICMPV6 = 136, 1 << 29, 2, 58


class Announcer:
    """Sends them. For one thread, in the namespace in which it was made.

    Its socket is to be kept: closing one waits for RCU, some ten milliseconds.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)  # receives nothing
        except OSError as error:
            raise from_oserror("open a packet socket for announcements", error) from error

    def close(self) -> None:
        """Close the socket. Closing twice is harmless."""
        self._socket.close()

    def send(self, name: str, address: AnyAddress, mac: str) -> None:
        """Tell all who are behind a link that this address has this MAC.

        Raises:
            KernelError: such as that the link is gone, or down.
        """
        try:
            self._socket.sendto(frame(address, mac), (name, 0))
        except OSError as error:
            raise from_oserror(f"announce {address} on {name}", error) from error


def frame(address: AnyAddress, mac: str) -> bytes:
    """The Ethernet frame."""
    packed = packed_mac(mac)
    if address.version == 4:
        arp = struct.pack("!H2sBBH", 1, _IPV4, 6, 4, 1) + packed + address.packed + bytes(6) + address.packed
        return _EVERYBODY + packed + _ARP + arp
    body = struct.pack("!I", _OVERRIDE) + address.packed + bytes((_TARGET_MAC, 1)) + packed
    size, ends = len(body) + 4, address.packed + _ALL_NODES
    checked = _checksum(ends + struct.pack("!II", size, _ICMPV6) + struct.pack("!BBH", _ADVERTISEMENT, 0, 0) + body)
    header = struct.pack("!IHBB", 6 << 28, size, _ICMPV6, 255) + ends
    return _ALL_NODES_MAC + packed + _IPV6 + header + struct.pack("!BBH", _ADVERTISEMENT, 0, checked) + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
