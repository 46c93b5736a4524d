"""The nftables tables: their text, what the elements of each set are made of, and writing them where they are missing.

- Two tables are ours: `inet netloom` and `bridge netloom`. Their chains and sets never change while a version runs.
- They are written by libnftables. It costs milliseconds, so it is done only when an element was refused because its set
  is missing.

Sources: include/uapi/linux/netfilter/nf_tables.h, nft(8).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kernel import libnftables, mark, netlink
from kernel.errors import NotFound
from kernel.netlink import Message, string
from kernel.session import Session

TABLE = "netloom"
FLANNEL_TABLE = "netloom_flannel"  # netd's (netd/flannel_rules.py): what it marks is to pass, too
SCHEMA = "schema9"  # raise the number with every change of _TABLES

# masq4, masq6: containers whose traffic leaves under the host's address.
# nomasq4, nomasq6: (source network . destination network) where it does not. No element may lie within another: the
#   kernel refuses that, as the set has intervals.
# dnat4, dnat6: published ports of one host address, (host address . protocol . port) to (container address . port);
#   anydnat4, anydnat6: those of all, (protocol . port).
# cond4 and its like: the same with conditions, to the attachment's own chain. A map has one verdict for a key, and what
#   the chain does not translate goes on to the next rule.
# published4, published6: every such target, (container address . protocol . container port).
# hairpin4, hairpin6: those of them that the network's own containers, and the host by 127.0.0.1, reach under the host's
#   address, as replies would not come back this way otherwise; within4, within6: (network . network) of these networks.
# masqall4, masqall6: targets that everybody reaches under the host's address.
#   All this takes no mark: a target that somebody else's DNAT leads to as well is no worse off.
# accept4, accept6: containers that may talk to whom they like and get answers, whatever another firewall says. With
#   br_netfilter a bridge's own packets are forwarded ones, neighbour discovery among them.
#   Errors about whatever DNAT led somewhere pass as well: no set can tell whose they are, and who does not hear that a
#   packet is too large sends it again for ever.
# separated: bridges whose traffic does not go to another such bridge; same: (bridge . bridge), each with itself;
#   isolated: (bridge . bridge), where not even that passes. A published port is there for everybody: it is reached from
#   another such bridge, by the host's address.
# apart4, apart6: (any source . network): networks of whose addresses nobody begins to talk to one; joined4, joined6:
#   (network . network) but for these. A published port is there for everybody. What leaves such a network through a
#   tunnel of netd's (nl-vx…) keeps its source: the other host judges by it, and an address of the tunnel's end lies in
#   some network of containers.
# remote4, remote6: (any source . network): all networks of the cluster, whether they are on this host or not; among4,
#   among6: (network . network) of who may begin to talk to whom; local4, local6: (any source . subnet): this host's own
#   parts, for which apart4 speaks. What this host would pass on to others leaves under its own address where somebody
#   masquerades, and they let the host in: so it is judged here. What DNAT led there is for a published port. Who has no
#   conntrack entry has no `ct status` either.
# bridged: (bridge . bridge), each with itself, of networks that are one segment over many hosts. br_netfilter has the
#   frames from the others forwarded as packets, from sources that accept4 does not know.
# internal: bridges, and host's ends, from which nothing goes to any other link than these, nor comes from there.
# guarded: bridge ports whose source MAC is checked; allowed: (port . MAC) that may pass there.
# hold: families whose new connections wait, while the sets are being filled (kernel/nft_write.py).
# What no element is in costs one hash look-up a packet.
_TABLES = {
    "inet": f"""
table inet {TABLE} {{
	set @SCHEMA@ {{
		type mark
		elements = {{ 1 }}
	}}
	set hold {{
		type nf_proto
		flags timeout
		@HOLD@
	}}
@SETS@
	chain guard {{
		type filter hook prerouting priority raw; policy accept;
		ip saddr 127.0.0.0/8 iifname != "lo" drop
		ip daddr 127.0.0.0/8 iifname != "lo" drop
	}}
	chain ports {{
		dnat ip to ip daddr . meta l4proto . th dport map @dnat4
		ip daddr . meta l4proto . th dport vmap @cond4
		meta nfproto ipv4 dnat ip to meta l4proto . th dport map @anydnat4
		meta nfproto ipv4 meta l4proto . th dport vmap @anycond4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @dnat6
		ip6 daddr . meta l4proto . th dport vmap @cond6
		meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @anydnat6
		meta nfproto ipv6 meta l4proto . th dport vmap @anycond6
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump ports
	}}
	chain output {{
		type nat hook output priority -100; policy accept;
		fib daddr type local jump ports
	}}
	chain published {{
		ip daddr . meta l4proto . th dport @masqall4 masquerade
		ip saddr 127.0.0.0/8 ip daddr . meta l4proto . th dport @hairpin4 masquerade
		ip saddr . ip daddr @within4 ip daddr . meta l4proto . th dport @hairpin4 masquerade
		ip6 daddr . meta l4proto . th dport @masqall6 masquerade
		ip6 saddr . ip6 daddr @within6 ip6 daddr . meta l4proto . th dport @hairpin6 masquerade
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat jump published
		oifname "nl-vx*" ip daddr . ip saddr @apart4 accept
		oifname "nl-vx*" ip6 daddr . ip6 saddr @apart6 accept
		ip saddr @masq4 ip daddr != 224.0.0.0/4 ip saddr . ip daddr != @nomasq4 masquerade
		ip6 saddr @masq6 ip6 daddr != ff00::/8 ip6 saddr . ip6 daddr != @nomasq6 masquerade
	}}
	chain accepted {{
		meta mark set meta mark | @MARK@
	}}
	chain strangers {{
		ip saddr . ip daddr @remote4 ip saddr . ip daddr != @among4 ip saddr . ip daddr != @local4 drop
		ip6 saddr . ip6 daddr @remote6 ip6 saddr . ip6 daddr != @among6 ip6 saddr . ip6 daddr != @local6 drop
	}}
	chain forward {{
		type filter hook forward priority filter - 10; policy accept;
		ct state new meta nfproto @hold drop
		iifname @internal oifname != @internal drop
		oifname @internal iifname != @internal drop
		iifname . oifname @isolated drop
		iifname . oifname @bridged goto accepted
		ct status dnat ip daddr . meta l4proto . th dport @published4 goto accepted
		ct status dnat ct direction reply ip saddr . meta l4proto . th sport @published4 goto accepted
		ct status dnat ip6 daddr . meta l4proto . th dport @published6 goto accepted
		ct status dnat ct direction reply ip6 saddr . meta l4proto . th sport @published6 goto accepted
		ct state invalid,new ip saddr . ip daddr @apart4 ip saddr . ip daddr != @joined4 drop
		ct state invalid,new ip6 saddr . ip6 daddr @apart6 ip6 saddr . ip6 daddr != @joined6 drop
		ct state new ct status ! dnat jump strangers
		ct state invalid,untracked jump strangers
		iifname @separated oifname @separated iifname . oifname != @same drop
		ip saddr @accept4 goto accepted
		ip6 saddr @accept6 goto accepted
		ct state established,related ip daddr @accept4 goto accepted
		ct state established,related ip6 daddr @accept6 goto accepted
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 daddr @accept6 goto accepted
		ct status dnat ct state related meta l4proto {{ icmp, ipv6-icmp }} goto accepted
	}}
}}
""",
    # A kernel may lack nftables for bridges; only who asks for a spoof check needs it.
    "bridge": f"""
table bridge {TABLE} {{
	set @SCHEMA@ {{
		type mark
		elements = {{ 1 }}
	}}
@SETS@
	chain prerouting {{
		type filter hook prerouting priority dstnat; policy accept;
		iifname @guarded iifname . ether saddr != @allowed counter drop
	}}
}}
""",
}

FAMILIES = {"inet": 1, "bridge": 7}


@dataclass(frozen=True, slots=True)
class Set:
    """What the elements of a set or map are made of.

    `shared`: its elements are wanted by networks, not by single attachments.
    """

    family: str
    key: tuple[str, ...]
    size: int = 4  # of an address, in bytes
    data: tuple[str, ...] = ()
    shared: bool = False

    @property
    def declaration(self) -> str:
        """Its type, as nft writes it."""
        address = "ipv4_addr" if self.size == 4 else "ipv6_addr"
        names = {"ip": address, "network": address, **_TYPE_NAMES}
        words = " . ".join(names[kind] for kind in self.key)
        if self.data:
            words += " : " + " . ".join(names[kind] for kind in self.data)
        return words + ("; flags interval" if "network" in self.key else "")


_TYPE_NAMES = {
    "ifname": "ifname",
    "mac": "ether_addr",
    "protocol": "inet_proto",
    "port": "inet_service",
    "verdict": "verdict",
}


def _per_family() -> dict[str, Set]:
    sets: dict[str, Set] = {}
    target, port = ("ip", "protocol", "port"), ("protocol", "port")
    for version, size in (("4", 4), ("6", 16)):
        sets |= {
            f"masq{version}": Set("inet", ("ip",), size),
            f"nomasq{version}": Set("inet", ("network", "network"), size, shared=True),
            f"dnat{version}": Set("inet", target, size, ("ip", "port")),
            f"anydnat{version}": Set("inet", port, size, ("ip", "port")),
            f"cond{version}": Set("inet", target, size, ("verdict",)),
            f"anycond{version}": Set("inet", port, size, ("verdict",)),
            f"published{version}": Set("inet", target, size),
            f"hairpin{version}": Set("inet", target, size),
            f"masqall{version}": Set("inet", target, size),
            f"within{version}": Set("inet", ("network", "network"), size, shared=True),
            f"accept{version}": Set("inet", ("ip",), size),
            f"apart{version}": Set("inet", ("network", "network"), size, shared=True),
            f"joined{version}": Set("inet", ("network", "network"), size, shared=True),
            f"remote{version}": Set("inet", ("network", "network"), size, shared=True),
            f"among{version}": Set("inet", ("network", "network"), size, shared=True),
            f"local{version}": Set("inet", ("network", "network"), size, shared=True),
        }
    return sets


SETS: dict[str, Set] = {
    **_per_family(),
    "separated": Set("inet", ("ifname",), shared=True),
    "same": Set("inet", ("ifname", "ifname"), shared=True),
    "isolated": Set("inet", ("ifname", "ifname"), shared=True),
    "internal": Set("inet", ("ifname",), shared=True),
    "bridged": Set("inet", ("ifname", "ifname"), shared=True),
    "guarded": Set("bridge", ("ifname",)),
    "allowed": Set("bridge", ("ifname", "mac")),
}

# What makes our forward chain mark packets, by IP version.
FORWARDING = {version: (f"accept{version}", f"published{version}") for version in (4, 6)}

_SUBSYSTEM = 10 << 8
_GETSET = _SUBSYSTEM | 10
_GETTABLE, _TABLE_NAME = _SUBSYSTEM | 1, 1
_SET_TABLE, _SET_NAME = 1, 2
HEADER = struct.Struct(">BBH")  # struct nfgenmsg


def schema() -> str:
    """The set whose name tells the version of our tables, and the bit of the mark where it is another than usual."""
    bit = mark.forward_bit()
    return SCHEMA if bit == mark.DEFAULT_BIT else f"{SCHEMA}_bit{bit}"


def element_sets() -> list[str]:
    """The sets that hold what attachments want."""
    return list(SETS)


def shared_sets(families: Collection[str] = tuple(FAMILIES)) -> list[str]:
    """Those of them whose elements belong to networks, not to single attachments."""
    return [name for name, one in SETS.items() if one.shared and one.family in families]


def standing_sets() -> list[str]:
    """Those whose elements are wanted by the host as a whole, whatever is attached."""
    return [f"{name}{version}" for name in ("remote", "among", "local") for version in (4, 6)]


def ensure_tables(session: Session, families: Collection[str]) -> bool:
    """Write our tables of these families where they are missing or of another version; True where one was.

    The elements of a table of another version go with it; `kernel.record` puts them back.
    """
    written = False
    for family in sorted(families):
        if not current(session, family):
            libnftables.run(removal(family) + table(family), f"write the table {family} {TABLE}")
            written = True
    return written


def table(family: str, elements: Mapping[str, Sequence[str]] | None = None, held_s: int = 0) -> str:
    """The text of a table.

    Args:
        family: "inet" or "bridge".
        elements: those of each set, as nft reads them.
        held_s: how long nothing is to begin that would be forwarded; 0: not at all.
    """
    sets = ""
    for name, one in SETS.items():
        if one.family == family:
            found = (elements or {}).get(name)
            filled = f" elements = {{ {', '.join(found)} }};" if found else ""
            sets += f"\t{'map' if one.data else 'set'} {name} {{ type {one.declaration};{filled} }}\n"
    text = _TABLES[family].replace("@SETS@\n", sets).replace("@SCHEMA@", schema())
    hold = f"elements = {{ ipv4 timeout {held_s}s, ipv6 timeout {held_s}s }}" if held_s else ""
    text = text.replace("\t\t@HOLD@\n", f"\t\t{hold}\n" if hold else "")
    return text.replace("@MARK@", f"{mark.forward_mark():#x}")


def delete_tables() -> None:
    """Remove our tables, if they are there, from the calling thread's namespace."""
    for family in _TABLES:
        libnftables.run(removal(family), f"remove the table {family} {TABLE}")


def removal(family: str) -> str:
    """Commands that remove a table, whether it is there or not."""
    # Naming it first makes the deletion succeed where it is not there.
    return f"table {family} {TABLE}\ndelete table {family} {TABLE}\n"


def current(session: Session, family: str) -> bool:
    """Whether the table is there, and of this version."""
    body = HEADER.pack(FAMILIES[family], 0, 0) + string(_SET_TABLE, TABLE) + string(_SET_NAME, schema())
    try:
        session.netfilter.get(Message(_GETSET, 0, body, f"look for the table {family} {TABLE}"))
    except NotFound:
        return False
    return True


def check_table(session: Session) -> None:
    """Whether table inet netloom is there, or could be made.

    Raises:
        KernelError: no; with the reason.
    """
    if not current(session, "inet"):
        libnftables.run(removal("inet") + table("inet"), f"write the table inet {TABLE}", check=True)


def has_table(name: str) -> bool:
    """Whether there is a table inet of this name, in the calling thread's namespace."""
    body = HEADER.pack(FAMILIES["inet"], 0, 0) + string(_TABLE_NAME, name)
    try:
        with netlink.Socket(netlink.NETFILTER) as own:
            own.get(Message(_GETTABLE, 0, body, f"look for table {name}"))
    except NotFound:
        return False
    return True
