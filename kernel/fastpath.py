"""The fast path of an overlay: frames between containers pass by the bridge, and what hangs on it.

A program at the tunnel's end hands what comes for a container of this host right to the container; one at each
container's port sends what is for another host right into the tunnel, and what is for a neighbour right to it. Both
look into one hash, MAC to where it is. Whatever they do not know, and all that is no unicast IP, goes on as if they
were not there: to the bridge. So nothing depends on them, and an old entry that leads to a link that is gone does no
harm.

- What leaves a port has that container's own MAC, or goes the long way.
- A link is asked for before a frame is sent to it (bpf_check_mtu says when it is gone, or when the frame is too large).
- Frames pass neither netfilter's hooks for bridges nor, with br_netfilter, those of the host.
- What is for another host may pass by the tunnel's end, too (kernel/encapsulate.py), as long as somebody says so.

- Programs are filters of traffic control, at an ingress qdisc. The newer way (bpf_link, tcx) needs none, but waits for
  RCU under the lock of all links whenever one comes or goes, some 20 ms.

Sources: net/core/filter.c (bpf_redirect_peer, bpf_check_mtu), net/sched/cls_bpf.c, drivers/net/veth.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Literal

from kernel import netlink, qdisc
from kernel.bpf import (
    CHANGE_TYPE,
    CHECK_MTU,
    MAP_LOOKUP,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R10,
    REDIRECT,
    REDIRECT_PEER,
    SKB_DATA,
    SKB_DATA_END,
    SKB_PROTOCOL,
    SKB_VLAN_PRESENT,
    Assembler,
    HashMap,
    load_classifier,
)
from kernel.encapsulate import Outer, encapsulate
from kernel.errors import Exists, KernelError, NotFound
from kernel.link import packed_mac
from kernel.netlink import Message, attributes, nested, string, text, u32
from kernel.session import Door

NAME = "netloom"  # of our filters, by which they are known again
TUNNEL = 0  # where a MAC of another host leads

_KEY_BYTES, _VALUE = 8, struct.Struct("=I4s")  # of the map: where, and at which host, of none where that is not known
_ETHER_BYTES, _SOURCE_AT = 14, 6
_IPV4, _IPV6 = (socket.htons(kind) for kind in (0x0800, 0x86DD))
_ON = -1  # TC_ACT_UNSPEC: as if the program were not there
_MAC_AT, _LENGTH_AT = -8, -16  # on the stack
_PACKET_HOST = 0

_NEWQDISC, _NEWTFILTER, _DELTFILTER, _GETTFILTER = 36, 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")
_KIND, _OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_PREFERENCE, _ETH_P_ALL, _HANDLE = 1, 0x0003, 1
_INFO = _PREFERENCE << 16 | socket.htons(_ETH_P_ALL)
_INGRESS, _INGRESS_HANDLE, _FILTERS = "ingress", 0xFFFF0000, 0xFFFFFFF2


class Places:
    """Where the MACs of an overlay are: 0 is the tunnel, all else the index of a port, whose other end has the MAC."""

    def __init__(self, entries: int) -> None:
        """At most `entries` of them. Raises KernelError."""
        self._map = HashMap("netloom_macs", _KEY_BYTES, _VALUE.size, entries)

    @property
    def fd(self) -> int:
        """The map."""
        return self._map.fd

    def put(self, mac: str, where: int, host: IPv4Address | None = None) -> bool:
        """A MAC is there from now on, beyond the tunnel at this host; False: the map is full, and it is looked for on
        the long way."""
        try:
            self._map.put(_key(mac), _VALUE.pack(where, host.packed if host is not None else bytes(4)))
        except KernelError as error:
            if error.errno not in (errno.E2BIG, errno.ENOMEM):
                raise
            self._map.drop(_key(mac))  # what it said before is wrong
            return False
        return True

    def drop(self, mac: str) -> None:
        """Nobody has this MAC any more."""
        self._map.drop(_key(mac))

    def all(self) -> dict[str, int]:
        """As the kernel has them."""
        return {key[:6].hex(":"): _VALUE.unpack(value)[0] for key, value in self._map.items().items()}

    def hosts(self) -> dict[str, IPv4Address]:
        """Those of other hosts, of which it is known at which one they are."""
        found = {key[:6].hex(":"): _VALUE.unpack(value)[1] for key, value in self._map.items().items()}
        return {mac: IPv4Address(host) for mac, host in found.items() if any(host)}

    def clear(self) -> None:
        """Nobody is anywhere: all goes the long way, whatever programs there are. Raises KernelError."""
        for key in self._map.items():
            self._map.drop(key)

    def close(self) -> None:
        """The programs keep it."""
        self._map.close()


def load_inward(places: Places) -> int:
    """The program of a tunnel's end; its descriptor, which the caller closes: filters keep it. Raises KernelError: this
    kernel has no such programs."""
    return load_classifier("netloom_in", _inward(places.fd))


def load_outward(places: Places, tunnel: int, mac: str, outer: Outer | None = None) -> int:
    """The program of the port of the container with this MAC; as `load_inward`. `tunnel` is the index of the tunnel's
    end, which with `outer` has nothing to do with what can be sent without it."""
    return load_classifier("netloom_out", _outward(places.fd, tunnel, packed_mac(mac), outer))


def prepare(door: Door, index: int) -> None:
    """Make the place where a program sees what enters a link, if there is none. While that comes or goes, the kernel
    drops what leaves by a link that is up (net/sched/sch_api.c, qdisc_graft): a few packets within some 100 µs."""
    with suppress(Exists):
        body = _TCMSG.pack(0, index, _INGRESS_HANDLE, qdisc.INGRESS, 0) + string(_KIND, _INGRESS) + nested(_OPTIONS)
        what = f"add an ingress qdisc to link {index}"
        door.rtnl.execute([Message(_NEWQDISC, netlink.CREATE | netlink.EXCL, body, what)])


def attach(door: Door, index: int, program: int) -> bool:
    """Have a program see what enters a link, in the place of an earlier one of ours; False: somebody else does, and
    nothing was done. Raises KernelError."""
    found = state(door, index)
    if found == "foreign":
        return False
    if found == "none":
        prepare(door, index)
    options = nested(_OPTIONS, u32(_BPF_FD, program), string(_BPF_NAME, NAME), u32(_BPF_FLAGS, _DIRECT_ACTION))
    flags = netlink.CREATE | (netlink.REPLACE if found == "ours" else netlink.EXCL)
    body = _TCMSG.pack(0, index, _HANDLE, _FILTERS, _INFO) + string(_KIND, "bpf") + options
    door.rtnl.execute([Message(_NEWTFILTER, flags, body, f"have a program see what enters link {index}")])
    return True


def detach(door: Door, index: int) -> bool:
    """Take our program away from a link, without a packet that is lost; False: there is none, or no such link. What
    somebody else has there stays."""
    if NAME not in (_filters(door, index) or ()):
        return False
    body = _TCMSG.pack(0, index, _HANDLE, _FILTERS, _INFO) + string(_KIND, "bpf")
    with suppress(NotFound):
        door.rtnl.execute([Message(_DELTFILTER, 0, body, f"have no program see what enters link {index}")])
    return True


def detach_all(door: Door, *, places: bool = False) -> int:
    """Take our programs away from all links of the namespace, and with `places` what `prepare` made for them; from how
    many."""
    links = [one.index for one in qdisc.all_qdiscs(door) if one.kind == _INGRESS]
    gone = [index for index in links if detach(door, index)]
    if places:
        for index in gone:
            if state(door, index) == "empty":
                qdisc.delete(door, index, qdisc.INGRESS)
    return len(gone)


def state(door: Door, index: int) -> Literal["ours", "none", "empty", "foreign"]:
    """Who sees what enters a link; "empty": nobody, and the place for it is there."""
    entrance = qdisc.get(door, index, qdisc.INGRESS)
    if entrance is None:
        return "none"
    found = _filters(door, index)
    if found is None:
        return "none"
    if entrance.kind != _INGRESS:
        return "foreign"
    if not found:
        return "empty"
    return "ours" if set(found) == {NAME} else "foreign"


def _filters(door: Door, index: int) -> list[str] | None:
    """The names of the filters at a link's entrance, "" of those that are no programs; None: there is no entrance."""
    what = f"list filters at the entrance of link {index}"
    message = Message(_GETTFILTER, 0, _TCMSG.pack(0, index, 0, _FILTERS, 0), what)
    try:
        found = [attributes(body, _TCMSG.size) for body in door.rtnl.dump(message)]
    except NotFound:
        return None
    # Each list begins with the filter's kind alone.
    return [
        text(attributes(one[_OPTIONS]).get(_BPF_NAME)) if text(one.get(_KIND)) == "bpf" else ""
        for one in found
        if _OPTIONS in one
    ]


def _inward(places: int) -> Assembler:
    """Of the tunnel's end: what comes for a container here goes right to it."""
    one = Assembler()
    _begin(one)
    _look_up(one, places)
    one.jump_if(R8, "==", TUNNEL, "on")  # another host's, once more: the bridge knows what to do
    _to_port(one)
    _end(one)
    return one


def _outward(places: int, tunnel: int, mac: bytes, outer: Outer | None = None) -> Assembler:
    """Of a container's port: what is for a MAC that is known goes where that is."""
    one = Assembler()
    _begin(one)
    high, low = struct.unpack("=iH", mac)
    one.load(R1, R7, _SOURCE_AT, 4)
    one.jump_if(R1, "!=", high, "on", bits=32)
    one.load(R1, R7, _SOURCE_AT + 4, 2)
    one.jump_if(R1, "!=", low, "on")
    _look_up(one, places)
    one.jump_if(R8, "==", TUNNEL, "other host")
    _to_port(one)
    one.label("other host")
    if outer is not None:
        one.load(R8, R0, 4, 4)
        encapsulate(one, outer, tunnel, "tunnel")
    one.label("tunnel")
    # Made anew it has another index, and to one that nobody has frames would be lost. What is too large for it is sent
    # in fragments.
    one.set(R2, tunnel)
    _check(one)
    one.jump_if(R0, "==", -errno.ENODEV, "on")
    one.set(R1, tunnel)
    one.set(R2, 0)
    one.call(REDIRECT)
    one.exit()
    _end(one)
    return one


def _begin(one: Assembler) -> None:
    """R6 is the frame, R7 where it begins. All but untagged IP goes on."""
    one.move(R6, R1)
    one.load(R1, R6, SKB_VLAN_PRESENT, 4)
    one.jump_if(R1, "!=", 0, "on")
    one.load(R1, R6, SKB_PROTOCOL, 4)
    one.jump_if(R1, "==", _IPV4, "ip")
    one.jump_if(R1, "!=", _IPV6, "on")
    one.label("ip")
    one.load(R7, R6, SKB_DATA, 4)
    one.load(R2, R6, SKB_DATA_END, 4)
    one.move(R3, R7)
    one.calculate(R3, "+", _ETHER_BYTES)
    one.jump_if_registers(R3, ">", R2, "on")


def _look_up(one: Assembler, places: int) -> None:
    """R8 is where the frame's destination is; on where it is not known."""
    one.load(R1, R7, 0, 4)
    one.load(R2, R7, 4, 2)
    one.store(R10, _MAC_AT, R1, 4)
    one.store(R10, _MAC_AT + 4, R2, 4)
    one.set_map(R1, places)
    one.move(R2, R10)
    one.calculate(R2, "+", _MAC_AT)
    one.call(MAP_LOOKUP)
    one.jump_if(R0, "==", 0, "on")
    one.load(R8, R0, 0, 4)


def _to_port(one: Assembler) -> None:
    """To the other end of the port in R8; on where that is gone, or the frame is too large for it."""
    one.move(R2, R8)
    _check(one)
    one.jump_if(R0, "!=", 0, "on")
    # At the host's end a frame is for another MAC than the link's, and kernels from before the summer of 2025 keep that
    # in mind when it changes its link: the container would drop it as another host's.
    one.move(R1, R6)
    one.set(R2, _PACKET_HOST)
    one.call(CHANGE_TYPE)
    one.move(R1, R8)
    one.set(R2, 0)
    one.call(REDIRECT_PEER)
    one.exit()


def _check(one: Assembler) -> None:
    """R0 is 0 where the link with the index in R2 is there, and takes a frame as large as this one."""
    one.store_constant(R10, _LENGTH_AT, 0, 4)
    one.move(R1, R6)
    one.move(R3, R10)
    one.calculate(R3, "+", _LENGTH_AT)
    one.set(R4, 0)
    one.set(R5, 0)
    one.call(CHECK_MTU)


def _end(one: Assembler) -> None:
    one.label("on")
    one.set(R0, _ON)
    one.exit()


def _key(mac: str) -> bytes:
    return packed_mac(mac) + bytes(_KEY_BYTES - 6)
