"""The outer headers of VXLAN packets, written by the program at a container's port: past the tunnel's end and past the
host's own way out, where netfilter and connection tracking look at each packet.

What the kernel would do otherwise is done alike: the source port from the inner flow, the mark of congestion of the
inner packet, no "don't fragment", and segments of a large packet that are made at the latest by the card. Where
anything is otherwise than it should be, the frame goes to the tunnel's end as it is:
- the time is over until which somebody vouches for this (`Outer.until`);
- the host of the destination is not known;
- the frame, or a segment of it, is larger than the tunnel's end takes, or the way there takes less;
- the way to the host leads by another link, or its MAC is not known, or the kernel may not say (bpf_fib_lookup answers
  where `lo` forwards, as on each host whose containers get out);
- the kernel does not put headers before such a packet (SCTP in large pieces, Linux before 5.13).

Only IPv4 outside, and no outer checksum: programs cannot say that one is to be made for each segment.

Sources: net/core/filter.c (bpf_skb_net_grow, bpf_ipv4_fib_lookup, __bpf_redirect_neigh), drivers/net/vxlan/
vxlan_core.c, net/ipv4/ip_tunnel_core.c (iptunnel_xmit), include/net/inet_ecn.h; RFC 7348.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from kernel.bpf import (
    ADJUST_ROOM,
    CHECK_MTU,
    CLOCK,
    FIB_LOOKUP,
    HASH_OF,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
    RANDOM,
    REDIRECT_NEIGHBOUR,
    SKB_DATA,
    SKB_DATA_END,
    SKB_LENGTH,
    SKB_SEGMENT,
    Assembler,
)
from kernel.vxlan import OVERHEAD_IPV4

_ETHER, _IP, _UDP, _VXLAN = 14, 20, 8, 8
_IP_AT = _ETHER
_UDP_AT = _IP_AT + _IP
_VXLAN_AT = _UDP_AT + _UDP
_INNER_AT = _VXLAN_AT + _VXLAN
_LONGEST = 65_400  # what has no room for outer headers in the 16 bits of their lengths goes by the tunnel's end
_FIRST_PORT, _PORTS = 0xC000, 0x3FFF  # RFC 7348, 5: dynamic ports
_TTL = 64
_DROP = 2  # TC_ACT_SHOT

_SEGMENTS = 1  # BPF_MTU_CHK_SEGS
_AT_MAC = 1  # BPF_ADJ_ROOM_MAC: behind the frame's own MACs
# BPF_F_ADJ_ROOM_: FIXED_GSO, ENCAP_L3_IPV4, ENCAP_L4_UDP, ENCAP_L2_ETH, ENCAP_L2(14)
_ROOM = 1 | 1 << 1 | 1 << 4 | 1 << 6 | _ETHER << 56
_LO = 1  # its index in each namespace

# On the stack; what is above is the caller's.
_LENGTH = -16
_FIB, _FIB_BYTES = -80, 64  # struct bpf_fib_lookup
_FAMILY, _PROTOCOL, _SPORT, _DPORT, _TOTAL, _IFINDEX, _SOURCE, _TARGET = (
    _FIB + offset for offset in (0, 1, 2, 4, 6, 8, 16, 32)
)
_HOP, _HOP_BYTES, _HOP_ROOM = -104, 20, 24  # struct bpf_redir_neigh
_ECN = -112


@dataclass(frozen=True, slots=True)
class Outer:
    """What the packets of a tunnel over IPv4 begin with.

    Attributes:
        link: the index of the link that they leave by.
        local: where they come from.
        vni, port, mtu: the tunnel's end's.
        until: the descriptor of a `bpf.Cell`: until when this is right, in nanoseconds of time.monotonic_ns().
    """

    link: int
    local: IPv4Address
    vni: int
    port: int
    mtu: int
    until: int


def encapsulate(one: Assembler, outer: Outer, tunnel: int, otherwise: str) -> None:
    """Send the frame to the host whose address is in R8, 0 where it is not known; to the label `otherwise`, as it was,
    where that is not to be. R6 is the frame, R7 its beginning, R9 and the stack from -112 to -9 are free. `tunnel` is
    the index of the tunnel's end."""
    _ask(one, outer, tunnel, otherwise)
    _find_way(one, outer, otherwise)
    one.move(R1, R6)
    one.set(R2, OVERHEAD_IPV4)
    one.set(R3, _AT_MAC)
    one.set_wide(R4, _ROOM)
    one.set(R5, 0)
    one.call(ADJUST_ROOM)
    one.jump_if(R0, "!=", 0, otherwise)
    one.call(RANDOM)
    one.move(R5, R0)
    _bounds(one, _INNER_AT + _ETHER, "no room")
    for offset, size in ((0, 4), (4, 4), (8, 4), (12, 2)):  # the inner frame's own
        one.load(R1, R7, offset, size)
        one.store(R7, _INNER_AT + offset, R1, size)
    _write_ip(one, outer)
    _write_rest(one, outer)
    one.store_constant(R10, _HOP, socket.AF_INET, 4)
    one.load(R1, R10, _TARGET, 4)  # the gateway, where there is one
    one.store(R10, _HOP + 4, R1, 4)
    for offset in range(8, _HOP_ROOM, 8):
        one.store_constant(R10, _HOP + offset, 0, 8)
    one.set(R1, outer.link)
    one.move(R2, R10)
    one.calculate(R2, "+", _HOP)
    one.set(R3, _HOP_BYTES)
    one.set(R4, 0)
    one.call(REDIRECT_NEIGHBOUR)
    one.exit()
    one.label("no room")  # never: it was just made
    one.set(R0, _DROP)
    one.exit()


def _ask(one: Assembler, outer: Outer, tunnel: int, otherwise: str) -> None:
    """Whether this is the way of such a frame. R9 is its length then, and the mark of congestion is kept."""
    one.jump_if(R8, "==", 0, otherwise)
    one.load(R9, R6, SKB_LENGTH, 4)
    one.jump_if(R9, ">", _LONGEST, otherwise)
    one.call(CLOCK)
    one.set_cell(R1, outer.until)
    one.load(R1, R1, 0, 8)
    one.jump_if_registers(R0, ">", R1, otherwise)
    one.load(R1, R6, SKB_SEGMENT, 4)
    one.jump_if(R1, "!=", 0, "segments")
    one.jump_if(R9, ">", outer.mtu + _ETHER, otherwise)
    one.jump("fits")
    one.label("segments")
    one.store_constant(R10, _LENGTH, 0, 4)
    one.move(R1, R6)
    one.set(R2, tunnel)
    one.move(R3, R10)
    one.calculate(R3, "+", _LENGTH)
    one.set(R4, 0)
    one.set(R5, _SEGMENTS)
    one.call(CHECK_MTU)
    one.jump_if(R0, "!=", 0, otherwise)
    one.label("fits")
    _bounds(one, _ETHER + 2, otherwise)
    one.load(R1, R7, _ETHER, 1)
    one.load(R2, R7, _ETHER + 1, 1)
    one.calculate(R1, "&", 0xF0)
    one.jump_if(R1, "==", 0x40, "congestion")
    one.calculate(R2, ">>", 4)  # IPv6 has it half a byte further on
    one.label("congestion")
    one.calculate(R2, "&", 3)
    one.jump_if(R2, "!=", 3, "keep")  # what met congestion before did not meet it here (INET_ECN_encapsulate)
    one.set(R2, 2)
    one.label("keep")
    one.store(R10, _ECN, R2, 8)


def _find_way(one: Assembler, outer: Outer, otherwise: str) -> None:
    """Whether the kernel sends to that host by this link; the gateway, or the host, is at _TARGET then."""
    for offset in range(0, _FIB_BYTES, 8):
        one.store_constant(R10, _FIB + offset, 0, 8)
    one.store_constant(R10, _FAMILY, socket.AF_INET, 1)
    one.store_constant(R10, _PROTOCOL, socket.IPPROTO_UDP, 1)
    one.move(R1, R6)
    one.call(HASH_OF)
    one.move(R1, R0)
    one.calculate(R1, ">>", 16)
    one.calculate_registers(R0, "^", R1)
    one.calculate(R0, "&", _PORTS)
    one.calculate(R0, "|", _FIRST_PORT)
    one.to_network(R0, 16)
    one.store(R10, _SPORT, R0, 2)
    one.store_constant(R10, _DPORT, socket.htons(outer.port), 2)
    one.store_constant(R10, _TOTAL, outer.mtu + OVERHEAD_IPV4, 2)
    one.store_constant(R10, _IFINDEX, _LO, 4)
    one.store_constant(R10, _SOURCE, _signed(outer.local.packed), 4)
    one.store(R10, _TARGET, R8, 4)
    one.move(R1, R6)
    one.move(R2, R10)
    one.calculate(R2, "+", _FIB)
    one.set(R3, _FIB_BYTES)
    one.set(R4, 0)
    one.call(FIB_LOOKUP)
    one.jump_if(R0, "!=", 0, otherwise)
    one.load(R1, R10, _IFINDEX, 4)
    one.jump_if(R1, "!=", outer.link, otherwise)
    one.load(R1, R10, _FAMILY, 1)
    one.jump_if(R1, "!=", socket.AF_INET, otherwise)  # by a gateway of IPv6


def _write_ip(one: Assembler, outer: Outer) -> None:
    """R5 has an identification. Sums are of 16 bits as they lie in memory: their order does not matter (RFC 1071)."""
    constant = struct.pack("!BBBB", 0x45, 0, _TTL, socket.IPPROTO_UDP) + outer.local.packed
    one.load(R3, R10, _ECN, 8)
    one.calculate(R3, "|", 0x4500)
    one.to_network(R3, 16)
    one.store(R7, _IP_AT, R3, 2)
    one.move(R1, R9)
    one.calculate(R1, "+", OVERHEAD_IPV4 - _ETHER)
    one.to_network(R1, 16)
    one.store(R7, _IP_AT + 2, R1, 2)
    one.calculate(R5, "&", 0xFFFF)
    one.store(R7, _IP_AT + 4, R5, 2)
    one.store_constant(R7, _IP_AT + 6, 0, 2)
    one.store_constant(R7, _IP_AT + 8, _short(constant[2:4]), 2)
    one.store_constant(R7, _IP_AT + 12, _signed(outer.local.packed), 4)
    one.store(R7, _IP_AT + 16, R8, 4)
    one.move(R2, R8)
    one.calculate(R2, ">>", 16)
    one.calculate(R8, "&", 0xFFFF)
    for part in (R8, R1, R3, R5):
        one.calculate_registers(R2, "+", part)
    one.calculate(R2, "+", sum(struct.unpack("=HHH", constant[2:])))
    for _ in range(2):
        one.move(R1, R2)
        one.calculate(R1, ">>", 16)
        one.calculate(R2, "&", 0xFFFF)
        one.calculate_registers(R2, "+", R1)
    one.calculate(R2, "^", 0xFFFF)
    one.store(R7, _IP_AT + 10, R2, 2)


def _write_rest(one: Assembler, outer: Outer) -> None:
    one.load(R1, R10, _SPORT, 2)
    one.store(R7, _UDP_AT, R1, 2)
    one.store_constant(R7, _UDP_AT + 2, _short(struct.pack("!H", outer.port)), 2)
    one.move(R1, R9)
    one.calculate(R1, "+", _UDP + _VXLAN)
    one.to_network(R1, 16)
    one.store(R7, _UDP_AT + 4, R1, 2)
    one.store_constant(R7, _UDP_AT + 6, 0, 2)
    one.store_constant(R7, _VXLAN_AT, _signed(b"\x08\0\0\0"), 4)
    one.store_constant(R7, _VXLAN_AT + 4, _signed(struct.pack("!I", outer.vni << 8)), 4)


def _bounds(one: Assembler, size: int, otherwise: str) -> None:
    """R7 is the frame's beginning, of which so many bytes can be looked at."""
    one.load(R7, R6, SKB_DATA, 4)
    one.load(R2, R6, SKB_DATA_END, 4)
    one.move(R3, R7)
    one.calculate(R3, "+", size)
    one.jump_if_registers(R3, ">", R2, otherwise)


def _signed(four: bytes) -> int:
    return int(struct.unpack("=i", four)[0])


def _short(two: bytes) -> int:
    return int(struct.unpack("=h", two)[0])
