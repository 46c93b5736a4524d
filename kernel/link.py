"""Links: veth pairs, macvlans, ifb devices, bridges and their ports.

Functions take the Door to the namespace in which the link is. A Link is what the kernel said at one moment.

Sources: include/uapi/linux/if_link.h, net/core/rtnetlink.c, net/bridge/br_netlink.c, drivers/net/veth.c,
drivers/net/macvlan.c, drivers/net/ifb.c.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from kernel import netlink
from kernel.errors import KernelError, NotFound
from kernel.netlink import Message, attr, attributes, nested, string, text, u32
from kernel.session import Door

IFNAMSIZ = 16  # with the NUL

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_TXQLEN, _IFLA_OPERSTATE, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD = 13, 16, 18, 20, 28
_IFLA_EXT_MASK, _IFLA_PROMISCUITY, _IFLA_LINK_NETNSID, _IFLA_ALLMULTI = 29, 30, 37, 61
_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES, _IFLA_TARGET_NETNSID = 31, 32, 46
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER = 1
_MACVLAN_MODE, _MACVLAN_BC_QUEUE_LEN = 1, 7
_BRPORT_STATE, _BRPORT_HAIRPIN, _BRPORT_ISOLATED = 1, 4, 33
_SKIP_STATISTICS = 1 << 3  # RTEXT_FILTER_SKIP_STATS: an answer half as long

_IFF_UP, _IFF_PROMISC, _IFF_ALLMULTI = 0x1, 0x100, 0x200
_ARPHRD_ETHER = 1
_IFF_LOOPBACK = 0x8
OPER_UP = 6
BR_FORWARDING = 3
MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
_MACVLAN_NAMES = {number: name for name, number in MACVLAN_MODES.items()}

_IFINFO = struct.Struct("=BxHiII")
_U32 = struct.Struct("=I")
_HEX = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel described it."""

    index: int
    name: str
    kind: str  # "veth", "bridge", "" for devices without one
    mac: str  # "02:42:0a:01:00:02", "" where it has none
    mtu: int
    up: bool  # administratively
    operstate: int
    master: int  # index, 0: none
    peer: int  # IFLA_LINK: the index of a veth's other end, of a macvlan's master; 0: none
    peer_netnsid: int  # the namespace that index belongs to, by this one's number for it; -1: this one itself
    promiscuous: bool
    all_multicast: bool  # as it was asked for
    tx_queue_length: int  # packets
    alias: str
    port_state: int  # of a bridge port, -1: it is none
    hairpin: bool
    isolated: bool
    ethernet: bool  # and no loopback
    macvlan_mode: str  # a key of MACVLAN_MODES, "" where it is none of them
    macvlan_queue: int  # how many broadcasts may wait, as asked for; -1: this kernel does not say


@dataclass(frozen=True, slots=True)
class MacvlanSpec:
    """A macvlan: the master in the Door's namespace, itself where `netns_fd` leads, or beside its master for -1.

    `master` is an index, `mode` a key of MACVLAN_MODES. `mtu` 0 is the master's, `mac` "" lets the kernel choose,
    `queue` 0 is the kernel's length of the queue of broadcasts.
    """

    name: str
    master: int
    mode: str
    netns_fd: int = -1
    mtu: int = 0
    mac: str = ""
    queue: int = 0


@dataclass(frozen=True, slots=True)
class VethSpec:
    """A veth pair: the host's end in the Door's namespace, the container's end where `netns_fd` leads.

    `mtu` 0 is the kernel's default, `mac` "" lets the kernel choose.
    """

    name: str
    peer: str
    netns_fd: int
    mtu: int = 0
    mac: str = ""


def get(door: Door, name: str) -> Link:
    """The link of that name.

    Raises:
        NotFound: there is none.
    """
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    return _parse(door.rtnl.get(Message(_GETLINK, 0, body, f"look up link {name}")))


def find(door: Door, name: str) -> Link | None:
    """The link of that name, or None."""
    try:
        return get(door, name)
    except NotFound:
        return None


def by_index(door: Door, index: int) -> Link:
    """The link of that index.

    Raises:
        NotFound: there is none.
    """
    body = _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    return _parse(door.rtnl.get(Message(_GETLINK, 0, body, f"look up link {index}")))


def other_end(door: Door, veth: Link) -> Link:
    """The other end of a veth pair, in whichever namespace it is.

    Raises:
        NotFound: it is gone, or in a namespace that this one has no number for.
    """
    body = _IFINFO.pack(0, 0, veth.peer, 0, 0) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    if veth.peer_netnsid >= 0:
        body += u32(_IFLA_TARGET_NETNSID, veth.peer_netnsid)
    try:
        return _parse(door.rtnl.get(Message(_GETLINK, 0, body, f"look up the other end of link {veth.name}")))
    except KernelError as error:
        if error.errno == errno.EINVAL:
            raise NotFound(error.operation, error.errno, error.detail) from None
        raise


def all_links(door: Door, master: int = 0) -> list[Link]:
    """Every link of the namespace, or only the ports of one bridge."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)
    if master:
        body += u32(_IFLA_MASTER, master)
    return [_parse(answer) for answer in door.rtnl.dump(Message(_GETLINK, 0, body, "list links"))]


def add_bridge(door: Door, name: str, mac: str, *, mtu: int = 0, alias: str = "") -> None:
    """Make a bridge and bring it up.

    Its MAC is given at birth, which pins it: a bridge without an address of its own takes the lowest of its ports'
    (net/bridge/br_stp_if.c, br_stp_recalculate_bridge_id), and its neighbours' caches would go stale with each port.

    Raises:
        Exists: a link of that name is there.
    """
    body = _IFINFO.pack(0, 0, 0, _IFF_UP, _IFF_UP) + string(_IFLA_IFNAME, name) + attr(_IFLA_ADDRESS, packed_mac(mac))
    if mtu:
        body += u32(_IFLA_MTU, mtu)
    body += nested(_IFLA_LINKINFO, string(_INFO_KIND, "bridge"))
    flags = netlink.CREATE | netlink.EXCL
    messages = [Message(_NEWLINK, flags, body, f"add bridge {name}")]
    if alias:
        # A link's creation ignores the alias (net/core/rtnetlink.c, rtnl_create_link): it takes a second message.
        named = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name) + string(_IFLA_IFALIAS, alias)
        messages.append(Message(_SETLINK, 0, named, f"set the alias of bridge {name}"))
    door.rtnl.execute(messages)


def add_veth(door: Door, spec: VethSpec, master: int = 0) -> None:
    """Make a veth pair whose far end is born in the container's namespace under its final name.

    The host's end is up and a port of `master` when this returns; the container's end is down.

    Raises:
        Exists: one of the two names is taken. Which one, the kernel does not say.
    """
    # One queue each way, which is what a pair uses anyhow. Not asked for, it is born with one for each processor, and
    # the kernel waits for RCU to go back to one, twice (drivers/net/veth.c, veth_init_queues).
    queues = u32(_IFLA_NUM_TX_QUEUES, 1) + u32(_IFLA_NUM_RX_QUEUES, 1)
    # The peer's own header: nothing set, so that it stays down until it is wanted.
    peer = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, spec.peer) + u32(_IFLA_NET_NS_FD, spec.netns_fd) + queues
    own = _IFINFO.pack(0, 0, 0, _IFF_UP, _IFF_UP) + string(_IFLA_IFNAME, spec.name) + queues
    if spec.mtu:
        peer += u32(_IFLA_MTU, spec.mtu)
        own += u32(_IFLA_MTU, spec.mtu)
    if spec.mac:
        peer += attr(_IFLA_ADDRESS, packed_mac(spec.mac))
    if master:
        own += u32(_IFLA_MASTER, master)
    own += nested(_IFLA_LINKINFO, string(_INFO_KIND, "veth"), nested(_INFO_DATA, attr(_VETH_INFO_PEER | 0x8000, peer)))
    what = f"add veth pair {spec.name} and {spec.peer}"
    door.rtnl.execute([Message(_NEWLINK, netlink.CREATE | netlink.EXCL, own, what)])


def add_macvlan(door: Door, spec: MacvlanSpec) -> None:
    """Make a macvlan, born in its namespace under its name, down.

    Kernels before 6.15 look the name up in the Door's namespace and not in the one that it is for
    (net/core/rtnetlink.c, rtnl_newlink): there a link of that name in either is in the way.

    Raises:
        Exists: the name is taken.
        Busy: the master is a port of a bridge, or another driver takes its packets.
        KernelError: EINVAL, the master is passed through to another macvlan already, or is to be and has others.
    """
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, spec.name) + u32(_IFLA_LINK, spec.master)
    if spec.netns_fd >= 0:
        body += u32(_IFLA_NET_NS_FD, spec.netns_fd)
    if spec.mtu:
        body += u32(_IFLA_MTU, spec.mtu)
    if spec.mac:
        body += attr(_IFLA_ADDRESS, packed_mac(spec.mac))
    data = u32(_MACVLAN_MODE, MACVLAN_MODES[spec.mode])
    if spec.queue:
        data += u32(_MACVLAN_BC_QUEUE_LEN, spec.queue)
    body += nested(_IFLA_LINKINFO, string(_INFO_KIND, "macvlan"), nested(_INFO_DATA, data))
    what = f"add macvlan {spec.name} on link {spec.master}"
    door.rtnl.execute([Message(_NEWLINK, netlink.CREATE | netlink.EXCL, body, what)])


def add_ifb(door: Door, name: str, mtu: int) -> None:
    """Make an ifb device, down and without a queue of its own: what its qdisc holds is all that waits.

    Raises:
        Exists: a link of that name is there.
    """
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name) + u32(_IFLA_MTU, mtu) + u32(_IFLA_TXQLEN, 0)
    body += nested(_IFLA_LINKINFO, string(_INFO_KIND, "ifb"))
    door.rtnl.execute([Message(_NEWLINK, netlink.CREATE | netlink.EXCL, body, f"add ifb {name}")])


def rename(door: Door, index: int, name: str) -> None:
    """Give a link that is down another name.

    Raises:
        Exists: the name is taken.
    """
    body = _IFINFO.pack(0, 0, index, 0, 0) + string(_IFLA_IFNAME, name)
    door.rtnl.execute([Message(_SETLINK, 0, body, f"rename link {index} to {name}")])


def move(door: Door, index: int, netns_fd: int, name: str) -> None:
    """Move a link to another namespace under this name. It loses its addresses, routes and the up state.

    Raises:
        Exists: the name is taken there.
    """
    body = _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_NET_NS_FD, netns_fd) + string(_IFLA_IFNAME, name)
    door.rtnl.execute([Message(_NEWLINK, 0, body, f"move link {index} to another namespace as {name}")])


def delete(door: Door, name: str) -> bool:
    """Delete a link by name; False where there was none. A veth's other end goes with it."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + string(_IFLA_IFNAME, name)
    try:
        door.rtnl.execute([Message(_DELLINK, 0, body, f"delete link {name}")])
    except NotFound:
        return False
    return True


def delete_message(index: int) -> Message:
    """The request that deletes a link by index."""
    return Message(_DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0), f"delete link {index}")


def set_up(door: Door, index: int) -> None:
    """Bring a link up."""
    door.rtnl.execute([up_message(index)])


def up_message(index: int) -> Message:
    """The request that brings a link up, to be batched with others."""
    return Message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, _IFF_UP, _IFF_UP), f"bring link {index} up")


def set_down(door: Door, index: int) -> None:
    """Take a link down."""
    door.rtnl.execute([Message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, _IFF_UP), f"take link {index} down")])


def set_promiscuous(door: Door, index: int, on: bool) -> None:
    """Switch promiscuous mode."""
    door.rtnl.execute([promiscuous_message(index, on)])


def promiscuous_message(index: int, on: bool) -> Message:
    """The request that switches promiscuous mode."""
    body = _IFINFO.pack(0, 0, index, _IFF_PROMISC if on else 0, _IFF_PROMISC)
    return Message(_NEWLINK, 0, body, f"switch promiscuous mode of link {index}")


def all_multicast_message(index: int, on: bool) -> Message:
    """The request that lets a link take all multicast packets, or no longer."""
    body = _IFINFO.pack(0, 0, index, _IFF_ALLMULTI if on else 0, _IFF_ALLMULTI)
    return Message(_NEWLINK, 0, body, f"switch all-multicast mode of link {index}")


def mtu_message(index: int, mtu: int) -> Message:
    """The request that sets a link's MTU."""
    return Message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_MTU, mtu), f"set MTU {mtu} on link {index}")


def tx_queue_message(index: int, length: int) -> Message:
    """The request that sets the length of a link's transmit queue, in packets."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_TXQLEN, length)
    return Message(_NEWLINK, 0, body, f"set transmit queue length {length} on link {index}")


def set_mac(door: Door, index: int, mac: str) -> None:
    """Set a MAC. Also for the same one again: that pins a bridge's, and announces a container's (arp_notify)."""
    door.rtnl.execute([mac_message(index, mac)])


def mac_message(index: int, mac: str) -> Message:
    """The request that sets a MAC."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + attr(_IFLA_ADDRESS, packed_mac(mac))
    return Message(_NEWLINK, 0, body, f"set MAC {mac} on link {index}")


def set_port(door: Door, index: int, *, hairpin: bool, isolated: bool) -> None:
    """Set a bridge port's hairpin and isolation."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + nested(
        _IFLA_LINKINFO,
        string(_INFO_SLAVE_KIND, "bridge"),
        nested(
            _INFO_SLAVE_DATA,
            attr(_BRPORT_HAIRPIN, bytes([hairpin])),
            attr(_BRPORT_ISOLATED, bytes([isolated])),
        ),
    )
    door.rtnl.execute([Message(_NEWLINK, 0, body, f"set hairpin and isolation of port {index}")])


def packed_mac(mac: str) -> bytes:
    """Six bytes of "02:42:0a:01:00:02".

    Raises:
        ValueError: it is no MAC.
    """
    parts = mac.split(":")
    # int() alone takes signs, blanks and the digits of every script.
    if len(parts) != 6 or not all(1 <= len(part) <= 2 and _HEX.issuperset(part) for part in parts):
        raise ValueError(f"{mac!r} is no MAC address: want six hexadecimal bytes, such as 02:42:0a:01:00:02")
    return bytes(int(part, 16) for part in parts)


def mac_text(data: bytes) -> str:
    """ "02:42:0a:01:00:02" of six bytes."""
    return data.hex(":")


def _parse(body: bytes) -> Link:
    _family, hardware, index, flags, _change = _IFINFO.unpack_from(body)
    found = attributes(body, _IFINFO.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    port = attributes(info.get(_INFO_SLAVE_DATA, b"")) if text(info.get(_INFO_SLAVE_KIND)) == "bridge" else {}
    kind = text(info.get(_INFO_KIND))
    macvlan = attributes(info.get(_INFO_DATA, b"")) if kind == "macvlan" else {}
    return Link(
        index=index,
        name=text(found.get(_IFLA_IFNAME)),
        kind=kind,
        mac=mac_text(found.get(_IFLA_ADDRESS, b"")),
        mtu=_number(found, _IFLA_MTU),
        up=bool(flags & _IFF_UP),
        operstate=found.get(_IFLA_OPERSTATE, b"\0")[0],
        master=_number(found, _IFLA_MASTER),
        peer=_number(found, _IFLA_LINK),
        peer_netnsid=_number(found, _IFLA_LINK_NETNSID) if _IFLA_LINK_NETNSID in found else -1,
        promiscuous=bool(flags & _IFF_PROMISC) or _number(found, _IFLA_PROMISCUITY) > 0,
        all_multicast=bool(flags & _IFF_ALLMULTI),
        tx_queue_length=_number(found, _IFLA_TXQLEN),
        alias=text(found.get(_IFLA_IFALIAS)),
        port_state=port[_BRPORT_STATE][0] if _BRPORT_STATE in port else -1,
        hairpin=port.get(_BRPORT_HAIRPIN, b"\0") != b"\0",
        isolated=port.get(_BRPORT_ISOLATED, b"\0") != b"\0",
        ethernet=hardware == _ARPHRD_ETHER and not flags & _IFF_LOOPBACK,
        macvlan_mode=_MACVLAN_NAMES.get(_number(macvlan, _MACVLAN_MODE), ""),
        macvlan_queue=_number(macvlan, _MACVLAN_BC_QUEUE_LEN) if _MACVLAN_BC_QUEUE_LEN in macvlan else -1,
    )


def _number(found: dict[int, bytes], kind: int) -> int:
    data = found.get(kind)
    return int(_U32.unpack(data)[0]) if data and len(data) == 4 else 0
