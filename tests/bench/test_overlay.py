"""What counts as a frame for many on the underlay."""

from __future__ import annotations

import struct

import pytest

from bench.overlay import is_for_many

ONE, OTHER, ALL = bytes.fromhex("024200000001"), bytes.fromhex("024200000002"), b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")


def ethernet(to: bytes, kind: int, body: bytes) -> bytes:
    return to + ONE + struct.pack("!H", kind) + body


def arp(to: bytes, target: tuple[int, ...]) -> bytes:
    return ethernet(to, 0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + ONE + bytes(4) + bytes(6) + bytes(target))


def tunnelled(inner: bytes, to: bytes = OTHER, port: int = 4789) -> bytes:
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + 16 + len(inner), 0, 0, 64, 17, 0, bytes(4), bytes(4))
    return ethernet(to, 0x0800, ip + struct.pack("!HHHH", 40000, port, 16 + len(inner), 0) + bytes(8) + inner)


CONTAINER, HOST = (10, 0, 1, 2), (192, 168, 77, 12)


@pytest.mark.parametrize(
    ("frame", "counts"),
    [
        (tunnelled(arp(ALL, CONTAINER)), True),
        (tunnelled(arp(OTHER, CONTAINER)), False),
        (tunnelled(arp(OTHER, CONTAINER), to=GROUP), True),
        (tunnelled(ethernet(GROUP, 0x86DD, bytes(40))), True),
        (arp(ALL, CONTAINER), True),
        (arp(ALL, HOST), False),
        (ethernet(GROUP, 0x0800, bytes(40)), True),
        (ethernet(GROUP, 0x86DD, bytes(40)), False),
        (tunnelled(arp(ALL, CONTAINER), port=2379), False),
    ],
)
def test_frames_for_many_are_told_from_others(frame: bytes, counts: bool) -> None:
    assert is_for_many(frame) is counts
