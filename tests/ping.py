"""One echo request in the namespace where this runs, repeated until it is answered: `python -I ping.py TARGET SECONDS`.

Prints the round trip in milliseconds and exits 0; exits 1 when nobody answered in time. Needs no ping program; raw
sockets (raw(7), icmp(7), RFC 792, RFC 4443), so root. A script of its own because a process, unlike a thread of the
test, can live in another namespace without harm.
"""

import contextlib
import os
import select
import socket
import struct
import sys
import time

ICMP_ECHO, ICMP_ECHOREPLY = 8, 0  # linux/icmp.h
ICMPV6_ECHO, ICMPV6_ECHOREPLY = 128, 129  # linux/icmpv6.h
AGAIN_S = 0.2


def checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071. (For ICMPv6 the kernel computes it, with its pseudo header.)"""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(family: int, identifier: int, sequence: int) -> bytes:
    kind = ICMPV6_ECHO if family == socket.AF_INET6 else ICMP_ECHO
    payload = b"netloom ping...."
    head = struct.pack("!BBHHH", kind, 0, 0, identifier, sequence)
    return struct.pack("!BBHHH", kind, 0, checksum(head + payload), identifier, sequence) + payload


def answered(family: int, packet: bytes, identifier: int, sequence: int) -> bool:
    if family == socket.AF_INET:
        packet = packet[(packet[0] & 0xF) * 4 :]  # a raw IPv4 socket hands out the IP header too
    wanted = ICMPV6_ECHOREPLY if family == socket.AF_INET6 else ICMP_ECHOREPLY
    kind, _, _, its_identifier, its_sequence = struct.unpack_from("!BBHHH", packet)
    return (kind, its_identifier, its_sequence) == (wanted, identifier, sequence)


def round_trip(target: str, limit_s: float) -> float | None:
    """Milliseconds, or None when nobody answered within the limit."""
    family, _, _, _, address = socket.getaddrinfo(target, 0, flags=socket.AI_NUMERICHOST)[0]
    protocol = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    identifier = os.getpid() & 0xFFFF
    deadline = time.monotonic() + limit_s
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.setblocking(False)
        for sequence in range(1, 0x10000):
            sent = time.monotonic()
            # No route, no carrier, a tentative source address: may be so now and not in a moment.
            with contextlib.suppress(OSError):
                raw.sendto(request(family, identifier, sequence), address)
            while (left := min(sent + AGAIN_S, deadline) - time.monotonic()) > 0:
                if not select.select([raw], [], [], left)[0]:
                    continue
                with contextlib.suppress(OSError):
                    packet, source = raw.recvfrom(2048)
                    if source[0] == address[0] and answered(family, packet, identifier, sequence):
                        return (time.monotonic() - sent) * 1000
            if time.monotonic() >= deadline:
                return None
    return None


if __name__ == "__main__":
    taken = round_trip(sys.argv[1], float(sys.argv[2]))
    if taken is None:
        raise SystemExit(1)
    print(f"{taken:.3f}")
