"""Echo requests at a steady pace: `python -I pinger.py TARGET SECONDS`, until standard input says anything or ends; the
line "forget" there only begins the count anew.

Prints "answered" after the first answer, and in the end how many were sent since, and how many of these had no answer
LAST_S after the last. The first answer begins the count: what came before says nothing about losses.
"""

import contextlib
import os
import select
import socket
import struct
import sys
import time

LAST_S = 2.0


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(family: int, identifier: int, sequence: int) -> bytes:
    kind = 128 if family == socket.AF_INET6 else 8
    payload = b"netloom pinger.."
    head = struct.pack("!BBHHH", kind, 0, 0, identifier, sequence)
    return struct.pack("!BBHHH", kind, 0, checksum(head + payload), identifier, sequence) + payload


def main(target: str, interval_s: float) -> None:
    family, _, _, _, address = socket.getaddrinfo(target, 0, flags=socket.AI_NUMERICHOST)[0]
    protocol = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    identifier = os.getpid() & 0xFFFF
    sent: set[int] = set()
    counting = stopping = False
    sequence = 0
    due = time.monotonic()
    deadline = float("inf")
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.setblocking(False)
        now = due
        while now < deadline and not (stopping and not sent):
            now = time.monotonic()  # what has come by then is read below, however long after the deadline that is
            if not stopping and now >= due:
                sequence += 1
                due += interval_s
                if counting:
                    sent.add(sequence & 0xFFFF)
                with contextlib.suppress(OSError):  # no route now
                    raw.sendto(request(family, identifier, sequence & 0xFFFF), address)
            wait_s = max(0.0, min(due, deadline) - time.monotonic()) if not stopping else 0.1
            readable = select.select([raw, *([] if stopping else [sys.stdin])], [], [], wait_s)[0]
            if sys.stdin in readable:
                if sys.stdin.readline() == "forget\n":
                    first = sequence
                    sent.clear()
                else:
                    stopping, deadline = True, time.monotonic() + LAST_S
            while raw in readable:
                try:
                    packet, source = raw.recvfrom(2048)
                except OSError:
                    break
                if family == socket.AF_INET:
                    packet = packet[(packet[0] & 0xF) * 4 :]
                kind, _, _, whose, number = struct.unpack_from("!BBHHH", packet)
                if source[0] == address[0] and whose == identifier and kind in (0, 129):
                    sent.discard(number)
                    if not counting:
                        counting, first = True, sequence
                        print("answered", flush=True)
    print(sequence - first if counting else 0, len(sent))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
