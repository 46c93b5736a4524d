"""nftables: the static tables once, and elements of their sets at any time.

Rules of this file
- Two tables are ours: `inet netloom` and `bridge netloom`. Their chains and sets never change while a version runs;
  everything per container is an element of a set. So the cost of a container does not grow with their number.
- The one exception: what no element can say, a condition in nft's own words, is a chain of that attachment, which an
  element of a verdict map leads to (`Chain`).
- The tables are written by libnftables (in this process, no exec). It costs milliseconds, so it is done only when an
  element was refused because its set is missing.
- Elements go through nfnetlink directly: libnftables' own element commands first read the plain interval sets of the
  table (14 ms beside one of 10,000; 0.05 ms beside our concatenated ones, which it does not read), a batch of ours
  costs tens of microseconds at any size.
- Each batch also adds the element 1 of the set `schema`. It is there already, so nothing happens; where the tables are
  missing or of another version, the batch as a whole is refused with ENOENT, and the caller learns of it for free.
- A batch takes effect as a whole or not at all (nf_tables commits by transaction).

Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c, libnftables(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from kernel import mark, netlink
from kernel.errors import Exists, KernelError, NotFound, from_errno
from kernel.link import packed_mac
from kernel.netlink import Message, attr, attribute_list, attributes, nested, string, text
from kernel.session import Session

TABLE = "netloom"
FLANNEL_TABLE = "netloom_flannel"  # netd's (netd/flannel_rules.py): what it marks is to pass, too
SCHEMA = "schema6"  # raise the number with every change of _TABLES

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
# bridged: (bridge . bridge), each with itself, of networks that are one segment over many hosts. br_netfilter has the
#   frames from the others forwarded as packets, from sources that accept4 does not know.
# internal: bridges, and host's ends, from which nothing goes to any other link than these, nor comes from there.
# guarded: bridge ports whose source MAC is checked; allowed: (port . MAC) that may pass there.
# What no element is in costs one hash look-up a packet.
_TABLES = {
    "inet": f"""
table inet {TABLE} {{
	set @SCHEMA@ {{
		type mark
		elements = {{ 1 }}
	}}
@SETS@
	chain guard {{
		type filter hook prerouting priority raw; policy accept;
		iifname != "lo" ip saddr 127.0.0.0/8 drop
		iifname != "lo" ip daddr 127.0.0.0/8 drop
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
	chain forward {{
		type filter hook forward priority filter - 10; policy accept;
		iifname @internal oifname != @internal drop
		oifname @internal iifname != @internal drop
		iifname . oifname @isolated drop
		iifname . oifname @bridged goto accepted
		ct status dnat ip daddr . meta l4proto . th dport @published4 goto accepted
		ct status dnat ct direction reply ip saddr . meta l4proto . th sport @published4 goto accepted
		ct status dnat ip6 daddr . meta l4proto . th dport @published6 goto accepted
		ct status dnat ct direction reply ip6 saddr . meta l4proto . th sport @published6 goto accepted
		ct state new ip saddr . ip daddr @apart4 ip saddr . ip daddr != @joined4 drop
		ct state new ip6 saddr . ip6 daddr @apart6 ip6 saddr . ip6 daddr != @joined6 drop
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

_FAMILIES = {"inet": 1, "bridge": 7}


@dataclass(frozen=True, slots=True)
class _Set:
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
_WIDTHS = {"ifname": 16, "mac": 6, "protocol": 1, "port": 2}
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}


def _per_family() -> dict[str, _Set]:
    sets: dict[str, _Set] = {}
    target, port = ("ip", "protocol", "port"), ("protocol", "port")
    for version, size in (("4", 4), ("6", 16)):
        sets |= {
            f"masq{version}": _Set("inet", ("ip",), size),
            f"nomasq{version}": _Set("inet", ("network", "network"), size, shared=True),
            f"dnat{version}": _Set("inet", target, size, ("ip", "port")),
            f"anydnat{version}": _Set("inet", port, size, ("ip", "port")),
            f"cond{version}": _Set("inet", target, size, ("verdict",)),
            f"anycond{version}": _Set("inet", port, size, ("verdict",)),
            f"published{version}": _Set("inet", target, size),
            f"hairpin{version}": _Set("inet", target, size),
            f"masqall{version}": _Set("inet", target, size),
            f"within{version}": _Set("inet", ("network", "network"), size, shared=True),
            f"accept{version}": _Set("inet", ("ip",), size),
            f"apart{version}": _Set("inet", ("network", "network"), size, shared=True),
            f"joined{version}": _Set("inet", ("network", "network"), size, shared=True),
        }
    return sets


_SETS: dict[str, _Set] = {
    **_per_family(),
    "separated": _Set("inet", ("ifname",), shared=True),
    "same": _Set("inet", ("ifname", "ifname"), shared=True),
    "isolated": _Set("inet", ("ifname", "ifname"), shared=True),
    "internal": _Set("inet", ("ifname",), shared=True),
    "bridged": _Set("inet", ("ifname", "ifname"), shared=True),
    "guarded": _Set("bridge", ("ifname",)),
    "allowed": _Set("bridge", ("ifname", "mac")),
}

# What makes our forward chain mark packets, by IP version.
FORWARDING = {version: (f"accept{version}", f"published{version}") for version in (4, 6)}

_SUBSYSTEM = 10 << 8
_GETCHAIN, _DELCHAIN = _SUBSYSTEM | 4, _SUBSYSTEM | 5
_GETRULE, _DELRULE = _SUBSYSTEM | 7, _SUBSYSTEM | 8
_GETSET = _SUBSYSTEM | 10
_GETTABLE, _TABLE_NAME = _SUBSYSTEM | 1, 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN = 1, 2
_SET_NAME = 2
_NEWSETELEM, _GETSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
_BATCH_BEGIN, _BATCH_END = 16, 17
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_DATA, _ELEM_USERDATA, _ELEM_KEY_END = 1, 2, 6, 10
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_JUMP = struct.pack(">i", -3)
_UDATA_COMMENT = 0
_HEADER = struct.Struct(">BBH")
# In one message: an attribute's length has 16 bits, and the largest element with its comment takes under 240 bytes.
_BATCH_ELEMENTS = 256
_TRIES = 3
CHAIN_PREFIX = "c_"  # of attachments' chains
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)


@dataclass(frozen=True, slots=True)
class Element:
    """An element of one of our sets and maps. `key` is as people write it: ("10.1.0.2",) or ("veth12",
    "02:42:0a:01:00:02") or ("tcp", "8080").

    `comment` names the owner, in `nft list table inet netloom` and for us; "" where several attachments share it.
    `data` is what a map has for the key: ("10.1.0.2", "80"), or the name of the chain to jump to.
    """

    set: str
    key: tuple[str, ...]
    comment: str = ""
    data: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The table's family: "inet" or "bridge"."""
        return _SETS[self.set].family


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of one attachment, in table inet netloom: its name, and its rules in nft's syntax."""

    name: str
    rules: tuple[str, ...]


def masquerade(address: str, owner: str) -> Element:
    """What makes the traffic of a container's address leave under the host's. `owner` is for the comment."""
    return Element(f"masq{ip_address(address).version}", (address,), owner)


def no_masquerade(network: str, destination: str = "") -> Element:
    """What exempts the traffic within a network ("10.1.0.0/16"), or from it to another, from masquerade."""
    return Element(f"nomasq{ip_network(network).version}", (network, destination or network))


def spoof_check(port: str, mac: str, owner: str) -> list[Element]:
    """What drops frames that enter a bridge port with another source MAC than this."""
    return [Element("allowed", (port, mac), owner), Element("guarded", (port,), owner)]


def publish(  # noqa: PLR0913 - what a published port is
    host_ip: str,
    protocol: str,
    host_port: int,
    address: str,
    port: int,
    owner: str,
    *,
    snat: bool = True,
    all: bool = False,  # noqa: A002
    chain: str = "",
) -> list[Element]:
    """What leads a port of the host to one of a container.

    Args:
        host_ip: the host address that it is published at; "" for every one.
        protocol: "tcp", "udp" or "sctp".
        host_port: the host's port.
        address: the container's address; decides over the family.
        port: the container's port.
        owner: for the comment.
        snat: hide the network's own containers, and the host as 127.0.0.1, behind the host's address.
        all: hide everybody.
        chain: the chain that decides who gets there, and leads them; "" where everybody may.
    """
    version = ip_address(address).version
    target = (address, protocol, str(port))
    key = (protocol, str(host_port))
    data = (chain,) if chain else (address, str(port))
    kind = ("" if host_ip else "any") + ("cond" if chain else "dnat")
    elements = [
        Element(f"{kind}{version}", (host_ip, *key) if host_ip else key, owner, data),
        Element(f"published{version}", target, owner),
    ]
    if all:
        elements.append(Element(f"masqall{version}", target, owner))
    elif snat:
        elements.append(Element(f"hairpin{version}", target, owner))
    return elements


def within(network: str) -> Element:
    """What lets the containers of a network ("10.1.0.0/16") reach one another by published ports."""
    return Element(f"within{ip_network(network).version}", (network, network))


def accept(address: str, owner: str) -> Element:
    """What lets a container talk to whom it likes and get answers, whatever another firewall says."""
    return Element(f"accept{ip_address(address).version}", (address,), owner)


def separate(bridge: str, *, isolated: bool = False) -> list[Element]:
    """What keeps the traffic of a bridge from other bridges that want the same; `isolated`: and from the bridge itself,
    where it is forwarded."""
    elements = [Element("same", (bridge, bridge)), Element("separated", (bridge,))]
    if isolated:
        elements.append(Element("isolated", (bridge, bridge)))
    return elements


def keep_apart(network: str) -> Element:
    """What keeps everybody from beginning to talk to an address of a network ("10.2.0.0/16"), but for `join`."""
    version = ip_network(network).version
    return Element(f"apart{version}", ("0.0.0.0/0" if version == 4 else "::/0", network))


def join(source: str, destination: str) -> Element:
    """What lets a network's addresses talk to those of one that is kept apart; a network is joined with itself, too."""
    return Element(f"joined{ip_network(source).version}", (source, destination))


def bridged(bridge: str) -> Element:
    """What lets pass, whatever another firewall says, the packets that stay on a bridge."""
    return Element("bridged", (bridge, bridge))


def internal(link: str) -> Element:
    """What keeps a bridge, or the host's end of a container, from every link that is not such a one."""
    return Element("internal", (link,))


def forwards(version: int) -> bool:
    """Whether anybody wants packets of this family, 4 or 6, to pass where other firewalls drop them: in the calling
    thread's namespace. Constant cost."""
    return any(_holds_any(name) for name in FORWARDING[version]) or has_table(FLANNEL_TABLE)


def has_table(name: str) -> bool:
    """Whether there is a table inet of this name, in the calling thread's namespace."""
    body = _HEADER.pack(_FAMILIES["inet"], 0, 0) + string(_TABLE_NAME, name)
    try:
        with netlink.Socket(netlink.NETFILTER) as own:
            own.get(Message(_GETTABLE, 0, body, f"look for table {name}"))
    except NotFound:
        return False
    return True


def _holds_any(set_name: str) -> bool:
    body = _HEADER.pack(_FAMILIES["inet"], 0, 0) + string(_LIST_TABLE, TABLE) + string(_LIST_SET, set_name)
    try:
        with netlink.Socket(netlink.NETFILTER) as own:  # a list that is not read to its end
            bodies = own.begin_dump(Message(_GETSETELEM, 0, body, f"look into set {set_name}"))
    except NotFound:
        return False
    return any(_parse(set_name, one) for one in bodies)


def add(session: Session, elements: Sequence[Element]) -> bool:
    """Add elements; makes the tables where they are missing, and says True then: what others want is missing, too.

    One with a comment has one owner: where it is there under another's, it becomes this one's, so that what a dead
    container left and what a living one wants are told apart.

    Raises:
        Exists: a network lies within another one of its set, or around it.
    """
    if not elements:
        return False
    there: list[Element] = []
    anew = False
    for _ in range(_TRIES):
        try:
            _change(session, there, elements)
        except NotFound:
            anew |= ensure_tables(session, {element.family for element in elements})
        except Exists:
            pass
        else:
            return anew
        there = [element for element in elements if element.comment and present(session, element)]
    _change(session, there, elements)
    return anew


def delete(session: Session, elements: Iterable[Element]) -> None:
    """Remove elements; those that are not there, or by now are somebody else's, are left alone.

    They are looked up first: a batch that names a missing one fails as a whole, and waits for RCU (15 ms).
    """
    wanted = list(elements)
    for _ in range(_TRIES):
        there = [element for element in wanted if _is_owned(session, element)]
        with contextlib.suppress(NotFound):  # somebody else removed one meanwhile
            if there:
                _change(session, there, [])
            return


def present(session: Session, element: Element) -> bool:
    """Whether the set holds an element of this very key, whoever owns it and wherever it leads."""
    return _find(session, element) is not None


def find(session: Session, element: Element) -> Element | None:
    """What the set or map has for an element's key: with its owner, and with where it leads."""
    return _find(session, element)


def _is_owned(session: Session, element: Element) -> bool:
    found = _find(session, element)
    return found is not None and (not element.comment or found.comment == _owner(element))


def is_anothers(session: Session, element: Element) -> bool:
    """Whether the set holds the element's key, and somebody else than its owner wants it."""
    found = _find(session, element)
    return found is not None and found.comment != _owner(element)


def _owner(element: Element) -> str:
    """The comment as it comes back from the kernel."""
    return text(_comment(element)) if element.comment else ""


def _find(session: Session, element: Element) -> Element | None:
    message = Message(_GETSETELEM, 0, _body([element]), f"look up {element.key} in set {element.set}")
    try:
        body = session.netfilter.get(message)
    except NotFound:
        return None
    return next((found for found in _parse(element.set, body) if _same_key(element, found)), None)


def holds(session: Session, element: Element) -> bool:
    """Whether the set holds this element, or one that contains it (a network around this one), whoever owns it."""
    message = Message(_GETSETELEM, 0, _body([element]), f"look up {element.key} in set {element.set}")
    try:
        body = session.netfilter.get(message)
    except NotFound:
        return False
    return any(contains(found, element) for found in _parse(element.set, body))


def contains(outer: Element, inner: Element) -> bool:
    """Whether every packet that matches `inner` matches `outer`, and fares the same."""
    if outer.set != inner.set or not _same_data(inner, outer):
        return False
    kinds = _SETS[outer.set].key
    for kind, wide, narrow in zip(kinds, outer.key, inner.key, strict=True):
        (low, high), (first, last) = _part(kind, wide), _part(kind, narrow)
        if not low <= first <= last <= high:
            return False
    return True


def converge(session: Session, sets: Iterable[str], elements: Iterable[Element]) -> tuple[int, int]:
    """Make the sets hold exactly these elements, in one transaction: no packet sees them in between.

    The tables of the elements' families must be there. Of several elements with one key that which is there stays.

    Returns:
        How many elements were missing (or somebody else's), and how many too many.
    """
    present = {(element.set, element.key): element for name in sets for element in all_elements(session, name)}
    wanted: dict[tuple[str, tuple[str, ...]], Element] = {}
    for element in elements:
        key = (element.set, element.key)
        if key not in wanted or (key in present and _same(element, present[key])):
            wanted[key] = element
    foreign = [present[key] for key in wanted.keys() & present.keys() if not _same(wanted[key], present[key])]
    missing = [e for key, e in wanted.items() if key not in present or not _same(e, present[key])]
    stale = [element for key, element in present.items() if key not in wanted]
    try:
        if missing or stale:
            _change(session, [*stale, *foreign], missing)
    except (NotFound, Exists):  # somebody adds and removes at the same time
        delete(session, stale)
        add(session, missing)
    return len(missing), len(stale)


def all_elements(session: Session, set_name: str) -> list[Element]:
    """Every element of one of our sets; none where the table is missing.

    While the kernel resizes a hash after many additions, its list may miss elements (rhashtable_walk_next).
    """
    family = _FAMILIES[_SETS[set_name].family]
    body = _HEADER.pack(family, 0, 0) + string(_LIST_TABLE, TABLE) + string(_LIST_SET, set_name)
    try:
        parts = list(session.netfilter.dump(Message(_GETSETELEM, 0, body, f"list set {set_name}")))
    except NotFound:
        return []
    return [element for part in parts for element in _parse(set_name, part)]


def add_chain(session: Session, chain: Chain) -> bool:
    """Make an attachment's chain, or give it these rules; makes the table where it is missing, and says True then.

    Raises:
        KernelError: libnftables refused a rule; with its own words.
    """
    anew = False
    for _ in range(_TRIES):
        anew |= ensure_tables(session, {"inet"})
        try:
            run(_commands(chain), f"write chain {chain.name}")
        except NotFound:  # somebody took the table away meanwhile
            continue
        return anew
    run(_commands(chain), f"write chain {chain.name}")
    return anew


def check_chain(chain: Chain) -> None:
    """Let libnftables read a chain without making it, with table and all.

    Raises:
        KernelError: as `add_chain`.
    """
    run(_table("inet") + _commands(chain), f"read chain {chain.name}", check=True)


def _commands(chain: Chain) -> str:
    where = f"inet {TABLE} {chain.name}"
    rules = "".join(f"add rule {where} {rule}\n" for rule in chain.rules)
    return f"add chain {where}\nflush chain {where}\n{rules}"


def delete_chains(session: Session, names: Iterable[str]) -> None:
    """Remove attachments' chains; those that are not there are left alone. No element may lead there any more."""
    for name in names:
        header = _HEADER.pack(_FAMILIES["inet"], 0, 0)
        chain = header + string(_CHAIN_TABLE, TABLE) + string(_CHAIN_NAME, name)
        rules = header + string(_RULE_TABLE, TABLE) + string(_RULE_CHAIN, name)
        with contextlib.suppress(NotFound):
            session.netfilter.get(Message(_GETCHAIN, 0, chain, f"look for chain {name}"))
            _transact(
                session,
                [Message(_DELRULE, 0, rules, f"empty chain {name}"), Message(_DELCHAIN, 0, chain, f"remove {name}")],
            )


def count_rules(session: Session, name: str) -> int:
    """How many rules an attachment's chain has; -1 where it is not there."""
    header = _HEADER.pack(_FAMILIES["inet"], 0, 0)
    chain = header + string(_CHAIN_TABLE, TABLE) + string(_CHAIN_NAME, name)
    rules = header + string(_RULE_TABLE, TABLE) + string(_RULE_CHAIN, name)
    try:
        session.netfilter.get(Message(_GETCHAIN, 0, chain, f"look for chain {name}"))
        return len(list(session.netfilter.dump(Message(_GETRULE, 0, rules, f"list chain {name}"))))
    except NotFound:
        return -1


def chains(session: Session) -> list[str]:
    """The names of all attachments' chains."""
    body = _HEADER.pack(_FAMILIES["inet"], 0, 0) + string(_CHAIN_TABLE, TABLE)
    try:
        parts = [attributes(part, _HEADER.size) for part in session.netfilter.dump(Message(_GETCHAIN, 0, body, "list"))]
    except NotFound:
        return []
    # Kernels before 6.2 do not know the filter.
    names = [text(part.get(_CHAIN_NAME)) for part in parts if text(part.get(_CHAIN_TABLE)) == TABLE]
    return [name for name in names if name.startswith(CHAIN_PREFIX)]


def schema() -> str:
    """The set whose name tells the version of our tables, and the bit of the mark where it is another than usual."""
    bit = mark.forward_bit()
    return SCHEMA if bit == mark.DEFAULT_BIT else f"{SCHEMA}_bit{bit}"


def element_sets() -> list[str]:
    """The sets that hold what attachments want."""
    return list(_SETS)


def shared_sets(families: Collection[str] = tuple(_FAMILIES)) -> list[str]:
    """Those of them whose elements belong to networks, not to single attachments."""
    return [name for name, one in _SETS.items() if one.shared and one.family in families]


def ensure_tables(session: Session, families: Collection[str]) -> bool:
    """Write our tables of these families where they are missing or of another version; True where one was.

    The elements of a table of another version go with it; `kernel.record` puts them back.
    """
    written = False
    for family in sorted(families):
        if not _current(session, family):
            run(_removal(family) + _table(family), f"write the table {family} {TABLE}")
            written = True
    return written


def _table(family: str) -> str:
    sets = "".join(
        f"\t{'map' if one.data else 'set'} {name} {{ type {one.declaration}; }}\n"
        for name, one in _SETS.items()
        if one.family == family
    )
    text = _TABLES[family].replace("@SETS@\n", sets).replace("@SCHEMA@", schema())
    return text.replace("@MARK@", f"{mark.forward_mark():#x}")


def delete_tables() -> None:
    """Remove our tables, if they are there, from the calling thread's namespace."""
    for family in _TABLES:
        run(_removal(family), f"remove the table {family} {TABLE}")


def _removal(family: str) -> str:
    # Naming it first makes the deletion succeed where it is not there.
    return f"table {family} {TABLE}\ndelete table {family} {TABLE}\n"


def _current(session: Session, family: str) -> bool:
    body = _HEADER.pack(_FAMILIES[family], 0, 0) + string(_LIST_TABLE, TABLE) + string(_SET_NAME, schema())
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
    if not _current(session, "inet"):
        run(_removal("inet") + _table("inet"), f"write the table inet {TABLE}", check=True)


def run(commands: str, what: str, *, check: bool = False) -> None:
    """Let libnftables run commands in the calling thread's namespace, as one transaction; `check`: only look whether
    they could be run.

    Raises:
        KernelError: it is not installed, or it refused; with its own words.
    """
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise KernelError(what, errno.ENOMEM, "libnftables gave no context")
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_set_dry_run(context, check)
        if library.nft_run_cmd_from_buffer(context, commands.encode()) != 0:
            words = library.nft_ctx_get_error_buffer(context) or b""
            first = words.decode(errors="replace").strip().splitlines()
            number = next(
                (n for n in (errno.EPERM, errno.ENOENT) if os.strerror(n) in words.decode(errors="replace")), 0
            )
            raise from_errno(what, number, first[0] if first else "libnftables refused")
    finally:
        library.nft_ctx_free(context)


_loaded: ctypes.CDLL | None = None


def _library() -> ctypes.CDLL:
    global _loaded  # noqa: PLW0603 - one library a process
    if _loaded is None:
        try:
            library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise KernelError("load libnftables", errno.ENOENT, f"{error}; install the package libnftables1") from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
        library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        _loaded = library
    return _loaded


def _change(session: Session, removed: Sequence[Element], added: Sequence[Element]) -> None:
    """Remove elements, then add others, in one transaction.

    Raises:
        NotFound: a table, or an element to be removed, is missing.
        Exists: an element with an owner is there.
    """
    # Only what is added needs the right tables: a wrong configuration must not keep anything from being removed.
    version = schema() if added else ""
    messages = [
        Message(_NEWSETELEM, netlink.CREATE, _elements(family, version, [_MARKER]), f"check the table {family} {TABLE}")
        for family in sorted({element.family for element in added})
    ]
    messages += _messages(_DELSETELEM, removed, "remove")
    messages += _messages(_NEWSETELEM, added, "add")
    _transact(session, messages)


def _transact(session: Session, messages: Sequence[Message]) -> None:
    """Send a batch; the first failure is raised."""
    begin = Message(_BATCH_BEGIN, 0, _BATCH_BODY, "begin an nftables batch")
    end = Message(_BATCH_END, 0, _BATCH_BODY, "end an nftables batch")
    for error in session.netfilter.transact(begin, messages, end):
        if error is not None:
            raise error


def _messages(kind: int, elements: Sequence[Element], verb: str) -> list[Message]:
    messages = []
    for start in range(0, len(elements), _BATCH_ELEMENTS):
        groups: dict[tuple[str, int], list[Element]] = {}
        for element in elements[start : start + _BATCH_ELEMENTS]:
            flags = 0
            if kind == _NEWSETELEM:
                flags = netlink.CREATE | (netlink.EXCL if element.comment else 0)
            groups.setdefault((element.set, flags), []).append(element)
        for (name, flags), members in groups.items():
            first = " . ".join(members[0].key) + (f" and {len(members) - 1} more" if len(members) > 1 else "")
            body = _body(members, data=kind == _NEWSETELEM)
            messages.append(Message(kind, flags, body, f"{verb} {first} in nftables set {name}"))
    return messages


def _body(elements: Sequence[Element], *, data: bool = False) -> bytes:
    """The body of a message about elements of one set; `data`: with what a map has for the keys."""
    family = _SETS[elements[0].set].family
    return _elements(family, elements[0].set, [_item(element, data=data) for element in elements])


def _elements(family: str, set_name: str, items: Iterable[Sequence[bytes]]) -> bytes:
    return (
        _HEADER.pack(_FAMILIES[family], 0, 0)
        + string(_LIST_TABLE, TABLE)
        + string(_LIST_SET, set_name)
        + nested(_LIST_ELEMENTS, *(nested(1, *item) for item in items))
    )


def _item(element: Element, *, data: bool) -> list[bytes]:
    one = _SETS[element.set]
    start, end = _packed(one.key, element.key)
    parts = [nested(_ELEM_KEY, attr(_DATA_VALUE, start))]
    if end is not None:
        parts.append(nested(_ELEM_KEY_END, attr(_DATA_VALUE, end)))
    if data and one.data == ("verdict",):
        verdict = nested(_DATA_VERDICT, attr(_VERDICT_CODE, _JUMP), string(_VERDICT_CHAIN, element.data[0]))
        parts.append(nested(_ELEM_DATA, verdict))
    elif data and one.data:
        parts.append(nested(_ELEM_DATA, attr(_DATA_VALUE, _packed(one.data, element.data)[0])))
    if element.comment:
        comment = _comment(element)
        parts.append(attr(_ELEM_USERDATA, bytes([_UDATA_COMMENT, len(comment)]) + comment))
    return parts


def _comment(element: Element) -> bytes:
    return element.comment.encode()[:127] + b"\0"


def _packed(kinds: tuple[str, ...], values: tuple[str, ...]) -> tuple[bytes, bytes | None]:
    """The key's bytes, and those of its end where it is an interval. Each part is padded to four bytes, as
    concatenations are laid out in registers."""
    if len(kinds) != len(values):
        raise ValueError(f"an element of this set has {len(kinds)} parts, not {values!r}")
    start = end = b""
    interval = False
    for kind, value in zip(kinds, values, strict=True):
        low, high = _part(kind, value)
        interval |= kind == "network"
        # A set of one type is not padded: its key length is the type's own.
        padding = b"\0" * (-len(low) % 4) if len(kinds) > 1 else b""
        start += low + padding
        end += high + padding
    return start, end if interval else None


def _part(kind: str, value: str) -> tuple[bytes, bytes]:
    if kind == "network":
        network = ip_network(value)
        return network.network_address.packed, network.broadcast_address.packed
    match kind:
        case "ip":
            packed = ip_address(value).packed
        case "ifname":
            packed = value.encode().ljust(16, b"\0")
        case "mac":
            packed = packed_mac(value)
        case "protocol":
            packed = bytes([_PROTOCOLS[value]])
        case "port":
            packed = int(value).to_bytes(2, "big")
        case _:
            packed = value.encode()  # the chain of a verdict; never sent like this
    return packed, packed


def _parse(set_name: str, body: bytes) -> list[Element]:
    one = _SETS[set_name]
    elements = []
    for _kind, item in attribute_list(attributes(body, _HEADER.size).get(_LIST_ELEMENTS, b"")):
        found = attributes(item)
        start = attributes(found.get(_ELEM_KEY, b"")).get(_DATA_VALUE, b"")
        end = attributes(found.get(_ELEM_KEY_END, b"")).get(_DATA_VALUE, start)
        userdata = found.get(_ELEM_USERDATA, b"")
        comment = text(userdata[2:]) if userdata[:1] == bytes([_UDATA_COMMENT]) else ""
        elements.append(Element(set_name, _values(one.key, one.size, start, end), comment, _parse_data(one, found)))
    return elements


def _parse_data(one: _Set, found: Mapping[int, bytes]) -> tuple[str, ...]:
    if not one.data:
        return ()
    data = attributes(found.get(_ELEM_DATA, b""))
    if one.data == ("verdict",):
        return (text(attributes(data.get(_DATA_VERDICT, b"")).get(_VERDICT_CHAIN, b"")),)
    value = data.get(_DATA_VALUE, b"")
    return _values(one.data, one.size, value, value)


def _values(kinds: tuple[str, ...], size: int, start: bytes, end: bytes) -> tuple[str, ...]:
    """The parts of a key or of data as people write them; `size` of an address in bytes."""
    values = []
    offset = 0
    for kind in kinds:
        width = _WIDTHS.get(kind, size)
        low, high = start[offset : offset + width], end[offset : offset + width]
        match kind:
            case "network":
                bits = (int.from_bytes(low, "big") ^ int.from_bytes(high, "big")).bit_length()
                values.append(f"{ip_address(low)}/{size * 8 - bits}")
            case "ip":
                values.append(str(ip_address(low)))
            case "ifname":
                values.append(text(low))
            case "protocol":
                values.append(_PROTOCOL_NAMES.get(low[0], str(low[0])))
            case "port":
                values.append(str(int.from_bytes(low, "big")))
            case _:
                values.append(low.hex(":"))
        offset += (width + 3) & ~3
    return tuple(values)


def _same_key(wanted: Element, found: Element) -> bool:
    kinds = _SETS[wanted.set].key
    return _packed(kinds, wanted.key) == _packed(kinds, found.key)


def _same_data(wanted: Element, found: Element) -> bool:
    kinds = _SETS[wanted.set].data
    return not kinds or _packed(kinds, wanted.data) == _packed(kinds, found.data)


def _same(wanted: Element, found: Element) -> bool:
    """Whether two elements of one key have one owner, and lead to the same place."""
    return _owner(wanted) == found.comment and _same_data(wanted, found)


_MARKER = [nested(_ELEM_KEY, attr(_DATA_VALUE, struct.pack("=I", 1)))]
