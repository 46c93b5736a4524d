"""Traffic control: the shaper of one link, and the filter that sends what enters a link through another one.

Rules of this file
- Where a message is asked for, nothing has happened yet: callers send several in one batch.
- A rate is in bytes a second, a burst in bytes, a buffer in the kernel's ticks.
- Handles are the reference's: the shaper is 1:, the ingress qdisc ffff:.

Sources: include/uapi/linux/pkt_sched.h, pkt_cls.h, net/sched/sch_api.c, cls_api.c, sch_tbf.c, sch_fq_codel.c,
cls_u32.c, act_mirred.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kernel import netlink
from kernel.errors import KernelError, NotFound
from kernel.link import Link
from kernel.netlink import Message, attr, attribute_list, attributes, nested, string, text, u32
from kernel.session import Door

ROOT = 0xFFFFFFFF
INGRESS = 0xFFFFFFF1
TICK_NS = 64  # include/net/pkt_sched.h, PSCHED_SHIFT; the same on every machine, and what /proc/net/psched says
LATENCY_MS = 25  # how long a packet may wait, as far as the limit in bytes decides over it

_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _GETTFILTER = 44, 46

_ECHO = 0x8  # NLM_F_ECHO

_TCMSG = struct.Struct("=BxxxiIII")
_KIND, _OPTIONS = 1, 2

_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_RATESPEC = struct.Struct("=BBHhHI")  # cell_log, linklayer, overhead, cell_align, mpu, rate
_TBF_QOPT = struct.Struct("=12s12sIII")  # rate, peakrate, limit, buffer, mtu
_U64 = struct.Struct("=Q")

_FQ_CODEL_TARGET, _FQ_CODEL_INTERVAL = 1, 3
_CODEL_TARGET_US, _CODEL_INTERVAL_US = 5_000, 100_000

_U32_CLASSID, _U32_SEL, _U32_ACT = 1, 5, 7
# One key of nothing at offset 0, which every packet has.
_U32_MATCH_ALL = struct.pack("=BBBxHHhHI", 1, 0, 1, 0, 0, 0, 0, 0) + bytes(16)  # 1: TC_U32_TERMINAL
_ACT_KIND, _ACT_OPTIONS = 1, 2
_MIRRED_PARMS = 2
_MIRRED = struct.Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, ifindex
_EGRESS_REDIRECT, _STOLEN = 1, 4

_SHAPER, _BELOW = 0x10000, 0x20000  # 1: and 2:
_INGRESS_HANDLE = 0xFFFF0000
_INGRESS_FILTERS = 0xFFFFFFF2  # ingress and clsact both know this one
_PREFERENCE, _ETH_P_ALL = 1, 0x0003

_U32_MAX = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Tbf:
    """A token bucket: `rate` bytes/s on average, `buffer` ticks' worth of it at once, `limit` bytes waiting.

    `burst` is the size of the bucket in bytes where ticks cannot tell it, else 0.
    """

    rate: int
    limit: int
    buffer: int
    burst: int = 0

    def like(self, other: Tbf) -> bool:
        """Whether the kernel's word for a bucket is this one, but for what is lost in counting ticks.

        Of a buffer that there is no room for the reference cuts the upper bits off: then any will do.
        """
        if (self.rate, self.limit) != (other.rate, other.limit):
            return False
        return self.buffer == _U32_MAX or abs(self.buffer - other.buffer) <= 1 + self.buffer // 10_000


@dataclass(frozen=True, slots=True)
class Qdisc:
    """A queueing discipline as the kernel described it. `tbf` is None for other kinds."""

    index: int  # of its link
    kind: str
    handle: int  # 0: the kernel's default, which nobody asked for
    parent: int
    tbf: Tbf | None


def bucket(rate: int, burst: int, packet: int) -> Tbf:
    """The token bucket for a rate and a burst, reckoned as the reference does it: in whole microseconds.

    Args:
        rate: bytes a second, at least 1.
        burst: bytes. In ticks there is room for 274 seconds' worth; more becomes that much.
        packet: bytes of the largest packet of the link. A bucket that does not hold it would never let it pass, so
            that much is the least; it is told in bytes, which ticks and microseconds are too coarse for.
    """
    size = max(burst, packet)
    limit = min(rate * LATENCY_MS // 1000 + size, _U32_MAX)
    ticks = min(burst * 10**6 // rate * 1000 // TICK_NS, _U32_MAX)
    # What the kernel lets pass as one packet; the nanoseconds have 32 bits there (sch_tbf.c, tbf_change).
    largest = min(ticks * TICK_NS, _U32_MAX) * rate // 10**9
    if largest >= packet:
        return Tbf(rate, limit, ticks)
    # The ticks as the kernel tells them afterwards, whose field has 32 bits, too.
    return Tbf(rate, limit, size * 10**9 // rate // TICK_NS & _U32_MAX, size)


def tbf_message(link: Link, tbf: Tbf) -> Message:
    """The request for a shaper at a link's root. Exists: it has a root qdisc that somebody asked for."""
    rate = _RATESPEC.pack(0, 0, 0, 0, 0, min(tbf.rate, _U32_MAX))
    options = attr(_TBF_PARMS, _TBF_QOPT.pack(rate, bytes(12), tbf.limit, tbf.buffer, 0))
    if tbf.rate > _U32_MAX:
        options += attr(_TBF_RATE64, _U64.pack(tbf.rate))
    if tbf.burst:
        options += u32(_TBF_BURST, tbf.burst)
    return _new_qdisc(link, "tbf", _SHAPER, ROOT, options, f"limit the rate of link {link.name}")


def fq_codel_message(link: Link, rate: int, packet: int) -> Message:
    """The request for fair queues with a short delay below a link's shaper. NotFound: this kernel has none.

    Where a packet takes longer than the delay that is aimed for, the aim is one and a half packets (RFC 8289, 4.3: not
    less than one).
    """
    target_us = max(_CODEL_TARGET_US, 1_500_000 * packet // rate)
    options = b""
    if target_us > _CODEL_TARGET_US:
        options += u32(_FQ_CODEL_TARGET, min(target_us, _U32_MAX))
        options += u32(_FQ_CODEL_INTERVAL, min(_CODEL_INTERVAL_US + target_us, _U32_MAX))
    return _new_qdisc(link, "fq_codel", _BELOW, _SHAPER | 1, options, f"add fair queues to link {link.name}")


def ingress_message(link: Link) -> Message:
    """The request for the place where filters see what enters a link. Exists: it has one."""
    return _new_qdisc(link, "ingress", _INGRESS_HANDLE, INGRESS, b"", f"add an ingress qdisc to link {link.name}")


def redirect_message(link: Link, to: Link) -> Message:
    """The request for a filter that sends all that enters a link out by another one instead.

    An ifb device gives it back: the packet goes on behind the filter, late or never. u32 and not matchall, which not
    every kernel has; the reference uses it, too.
    """
    action = nested(
        1,
        string(_ACT_KIND, "mirred"),
        nested(_ACT_OPTIONS, attr(_MIRRED_PARMS, _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, to.index))),
    )
    options = attr(_U32_SEL, _U32_MATCH_ALL) + u32(_U32_CLASSID, _SHAPER | 1) + nested(_U32_ACT, action)
    body = _TCMSG.pack(0, link.index, 0, _INGRESS_HANDLE, _PREFERENCE << 16 | socket.htons(_ETH_P_ALL))
    body += string(_KIND, "u32") + nested(_OPTIONS, options)
    flags = netlink.CREATE | netlink.EXCL
    return Message(_NEWTFILTER, flags, body, f"redirect what enters link {link.name} to {to.name}")


def _new_qdisc(link: Link, kind: str, handle: int, parent: int, options: bytes, what: str) -> Message:
    body = _TCMSG.pack(0, link.index, handle, parent, 0) + string(_KIND, kind) + nested(_OPTIONS, options)
    return Message(_NEWQDISC, netlink.CREATE | netlink.EXCL, body, what)


def get(door: Door, index: int, parent: int = ROOT) -> Qdisc | None:
    """The qdisc at a link's root, or at INGRESS; None where there is none, or no such link."""
    what = f"look up the {'root' if parent == ROOT else 'ingress'} qdisc of link {index}"
    # The answer is a notification, which whoever asks gets as an echo only; of a built-in one the kernel tells nothing
    # but that it has heard (kernels before 6.5: EINVAL).
    message = Message(_GETQDISC, _ECHO | netlink.ACK, _TCMSG.pack(0, index, 0, parent, 0), what)
    try:
        return _qdisc(door.rtnl.get(message))
    except NotFound:
        return None
    except KernelError as error:
        if error.errno in (0, errno.EINVAL):
            return None
        raise


def all_qdiscs(door: Door) -> list[Qdisc]:
    """Every qdisc of the namespace. The kernel has no list for one link."""
    return [_qdisc(body) for body in door.rtnl.dump(Message(_GETQDISC, 0, _TCMSG.pack(0, 0, 0, 0, 0), "list qdiscs"))]


def redirects(door: Door, index: int) -> set[int]:
    """The indexes of the links to which filters send what enters a link."""
    message = Message(_GETTFILTER, 0, _TCMSG.pack(0, index, 0, _INGRESS_FILTERS, 0), f"list filters of link {index}")
    try:
        return {target for body in door.rtnl.dump(message) for target in _targets(body)}
    except NotFound:
        return set()


def delete(door: Door, index: int, parent: int = ROOT) -> bool:
    """Delete the qdisc at a link's root, or at INGRESS, with the filters there; False where there is none that
    somebody asked for, or no such link."""
    what = f"delete the {'root' if parent == ROOT else 'ingress'} qdisc of link {index}"
    try:
        door.rtnl.execute([Message(_DELQDISC, 0, _TCMSG.pack(0, index, 0, parent, 0), what)])
    except NotFound:
        return False
    return True


def _qdisc(body: bytes) -> Qdisc:
    _family, index, handle, parent, _info = _TCMSG.unpack_from(body)
    found = attributes(body, _TCMSG.size)
    kind = text(found.get(_KIND))
    return Qdisc(index, kind, handle, parent, _tbf(found.get(_OPTIONS, b"")) if kind == "tbf" else None)


def _tbf(options: bytes) -> Tbf | None:
    found = attributes(options)
    parameters = found.get(_TBF_PARMS, b"")
    if len(parameters) < _TBF_QOPT.size:
        return None
    spec, _peak, limit, buffer, _mtu = _TBF_QOPT.unpack_from(parameters)
    rate = _RATESPEC.unpack(spec)[5]
    if _TBF_RATE64 in found:
        rate = _U64.unpack(found[_TBF_RATE64])[0]
    return Tbf(rate, limit, buffer)


def _targets(body: bytes) -> Iterator[int]:
    """Where a filter's actions redirect to. Each classifier has its own number for its actions; what is inside is the
    same for all, so every attribute that may be a list of actions is looked into."""
    for _number, option in attribute_list(attributes(body, _TCMSG.size).get(_OPTIONS, b"")):
        for _order, action in attribute_list(option):
            found = attributes(action)
            if text(found.get(_ACT_KIND)) != "mirred":
                continue
            parameters = attributes(found.get(_ACT_OPTIONS, b"")).get(_MIRRED_PARMS, b"")
            if len(parameters) >= _MIRRED.size:
                *_, kind, index = _MIRRED.unpack_from(parameters)
                if kind == _EGRESS_REDIRECT:
                    yield index
