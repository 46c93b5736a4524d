"""Probes: does a host answer, with packets of which size, and do checksums arrive. Raw sockets, so root.

Blocking, with a limit; many hosts are asked at once. In the namespace of the calling thread.

Sources: RFC 792, 4443, 793, 826, 4861.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address

AnyAddress = IPv4Address | IPv6Address
Probe = tuple[AnyAddress, int]  # whom to ask, and the whole packet's size in bytes; 0: small

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PROBE = 10, 23, 3  # include/uapi/linux/in.h: never fragmented, whatever is known
_LEAST = 64
_TRIES = 3
_HEADERS = {4: 20 + 8, 6: 40 + 8}
_TCP_HEADER = 20
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
_ARP_REQUEST = b"\x08\x06\0\1\x08\0\6\4\0\1"  # the EtherType, and ARP's beginning for IPv4 over Ethernet
_ARP_REPLY = _ARP_REQUEST[:-1] + b"\2"
_ARP_LENGTH = 14 + 28
_IPV6 = b"\x86\xdd"
_SOLICITATION, _ADVERTISEMENT, _SOURCE_MAC = 135, 136, 1  # RFC 4861
_ADVERTISEMENT_LENGTH = 14 + 40 + 24
_DISCARD = 9  # the port of a service that nobody has: the answer is a reset


def echo(wanted: Iterable[Probe], wait_s: float = 1.0) -> Mapping[Probe, float | None]:
    """Ask each for an echo with a packet of that size that nobody may fragment; milliseconds, or None for no answer.

    Raises:
        PermissionError: this needs root.
    """
    probes = list(dict.fromkeys(wanted))
    found: dict[Probe, float | None] = dict.fromkeys(probes)
    sockets: dict[int, socket.socket] = {}
    for version in {address.version for address, _ in probes}:
        try:
            sockets[version] = _socket(version)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6: nobody answers
                raise
    try:
        for _ in range(_TRIES):
            left = [probe for probe in probes if found[probe] is None and probe[0].version in sockets]
            if left:
                found.update(_round(sockets, left, wait_s))
    finally:
        for one in sockets.values():
            one.close()
    return found


def largest(address: AnyAddress, low: int, high: int) -> int:
    """The largest packet that gets there and back, where one of `low` bytes does and one of `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        if echo([(address, middle)], 0.3)[address, middle] is None:
            high = middle
        else:
            low = middle
    return low


def tcp_answers(address: AnyAddress, wait_s: float = 1.0) -> bool:
    """Whether a TCP connection attempt of the kernel's is answered: a refusal is an answer. Its checksum is worked out
    where every container's are: in the device, where that does it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for _ in range(_TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(wait_s)
            try:
                probe.connect((str(address), _DISCARD))
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    return True
                continue
            return True
    return False


def tcp_answers_checked(address: IPv4Address, source: IPv4Address, wait_s: float = 1.0) -> bool:
    """The same with a packet whose checksum is worked out here, so that no device has to."""
    port = 20000 + secrets.randbelow(10000)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.setblocking(False)
        for _ in range(_TRIES):
            head = struct.pack("!HHIIBBHHH", port, _DISCARD, 1, 0, (_TCP_HEADER // 4) << 4, _SYN, 1024, 0, 0)
            pseudo = source.packed + address.packed + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head))
            head = head[:16] + struct.pack("!H", _checksum(pseudo + head)) + head[18:]
            with contextlib.suppress(OSError):
                raw.sendto(head, (str(address), 0))
            deadline = time.monotonic() + wait_s
            while (left := deadline - time.monotonic()) > 0 and select.select([raw], [], [], left)[0]:
                packet, sender = raw.recvfrom(2048)
                segment = packet[(packet[0] & 0xF) * 4 :]
                if sender[0] == str(address) and struct.unpack_from("!HH", segment) == (_DISCARD, port):
                    return bool(segment[13] & (_RST | _ACK))
    return False


def neighbours(
    device: str, sources: Iterable[tuple[AnyAddress, str]], targets: Mapping[AnyAddress, str], wait_s: float = 1.0
) -> set[AnyAddress]:
    """Who of these, each with its MAC, answers an ARP request or a neighbour solicitation that goes to it alone, out of
    a port of a bridge: its kernel does, whatever its firewall thinks of pings.

    Args:
        device: a tunnel's end. The answer is seen as it comes out of it, whoever it is for.
        sources: addresses and MACs of containers behind that bridge, one of each family that is to be asked. They get
            the answers, too, which tell them nothing new.
        targets: containers beyond the tunnel.
        wait_s: for how long to wait for those that have not answered, after each of the tries.

    Raises:
        OSError: this needs root, and the device.
    """
    own = {address.version: (address, _packed(mac)) for address, mac in sources}
    requests = {
        address: _neighbour_request(*own[address.version], address, _packed(mac))
        for address, mac in targets.items()
        if address.version in own
    }
    macs = {mac for _, mac in own.values()}
    found: set[AnyAddress] = set()
    # Of every protocol: a bridge takes what comes by its port before those who listen for one protocol are asked.
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ALL)) as raw:
        raw.bind((device, _ETH_P_ALL))
        raw.setblocking(False)
        for _ in range(_TRIES):
            for address in requests.keys() - found:
                with contextlib.suppress(OSError):
                    raw.send(requests[address])
            deadline = time.monotonic() + wait_s
            while requests.keys() - found and (left := deadline - time.monotonic()) > 0:
                if select.select([raw], [], [], left)[0]:
                    with contextlib.suppress(OSError):
                        frame = raw.recv(2048)
                        answered = _neighbour_answered(frame)
                        if frame[:6] in macs and answered in requests:
                            found.add(answered)
            if not requests.keys() - found:
                break
    return found


def _neighbour_request(source: AnyAddress, own: bytes, target: AnyAddress, mac: bytes) -> bytes:
    if source.version == 4:
        return mac + own + _ARP_REQUEST + own + source.packed + bytes(6) + target.packed
    body = bytes(4) + target.packed + bytes((_SOURCE_MAC, 1)) + own
    ends, size = source.packed + target.packed, len(body) + 4
    head = struct.pack("!BBH", _SOLICITATION, 0, 0)
    checksum = _checksum(ends + struct.pack("!II", size, socket.IPPROTO_ICMPV6) + head + body)
    packet = struct.pack("!IHBB", 6 << 28, size, socket.IPPROTO_ICMPV6, 255) + ends
    return mac + own + _IPV6 + packet + struct.pack("!BBH", _SOLICITATION, 0, checksum) + body


def _neighbour_answered(frame: bytes) -> AnyAddress | None:
    """Whose answer a frame is; None: it is none."""
    if frame[12:22] == _ARP_REPLY and len(frame) >= _ARP_LENGTH:
        return IPv4Address(frame[28:32])
    # The next header, and the type: advertisements have no extension headers.
    if frame[12:14] == _IPV6 and len(frame) >= _ADVERTISEMENT_LENGTH and frame[20] == socket.IPPROTO_ICMPV6:
        return IPv6Address(frame[62:78]) if frame[54] == _ADVERTISEMENT else None
    return None


def _round(sockets: Mapping[int, socket.socket], probes: list[Probe], wait_s: float) -> dict[Probe, float | None]:
    """Send all, and collect until all have answered or the time is over."""
    identifier = secrets.randbelow(0x10000)
    sent: dict[tuple[int, int], tuple[Probe, float]] = {}
    for number, (address, size) in enumerate(probes):
        packet = _request(address.version, identifier, number & 0xFFFF, max(size, _LEAST))
        # No route, no neighbour, too large for the link: the same as no answer.
        with contextlib.suppress(OSError):
            sockets[address.version].sendto(packet, (str(address), 0))
            sent[address.version, number & 0xFFFF] = (address, size), time.monotonic()
    found: dict[Probe, float | None] = {}
    deadline = time.monotonic() + wait_s
    while len(found) < len(sent) and (left := deadline - time.monotonic()) > 0:
        for readable in select.select(list(sockets.values()), [], [], left)[0]:
            with contextlib.suppress(OSError):
                packet, sender = readable.recvfrom(1 << 16)
                version = 4 if readable.family == socket.AF_INET else 6
                number = _answered(version, packet, identifier)
                probe, began = sent.get((version, number), ((ip_address("::"), 0), 0.0))
                if str(probe[0]) == sender[0].partition("%")[0]:
                    found.setdefault(probe, (time.monotonic() - began) * 1000)
    return found


def _socket(version: int) -> socket.socket:
    if version == 4:
        made = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMP)
        made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PROBE)
    else:
        made = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PROBE)
    made.setblocking(False)
    return made


def _request(version: int, identifier: int, number: int, size: int) -> bytes:
    kind = 8 if version == 4 else 128
    payload = os.urandom(max(0, size - _HEADERS[version]))
    head = struct.pack("!BBHHH", kind, 0, 0, identifier, number)
    # The kernel works ICMPv6's out.
    return struct.pack("!BBHHH", kind, 0, _checksum(head + payload), identifier, number) + payload


def _answered(version: int, packet: bytes, identifier: int) -> int:
    """The number of the request that this answers; -1: none of ours."""
    if version == 4:
        packet = packet[(packet[0] & 0xF) * 4 :]
    kind, _, _, whose, number = struct.unpack_from("!BBHHH", packet)
    return int(number) if (kind, whose) == (0 if version == 4 else 129, identifier) else -1


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071."""
    data += b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
