"""nftables: elements of our tables' sets at any time, and attachments' chains.

Rules of this file
- What the tables are, and when they are written, is in kernel/nft_tables.py; how elements are laid out, in
  kernel/nft_codec.py. Everything per container is an element of a set. So the cost of a container does not grow with
  their number.
- The one exception: what no element can say, a condition in nft's own words, is a chain of that attachment, which an
  element of a verdict map leads to (`Chain`).
- Elements go through nfnetlink directly: libnftables' own element commands first read the plain interval sets of the
  table (14 ms beside one of 10,000; 0.05 ms beside our concatenated ones, which it does not read), a batch of ours
  costs tens of microseconds at any size.
- Each batch also adds the element 1 of the set `schema`. It is there already, so nothing happens; where the tables are
  missing or of another version, the batch as a whole is refused with ENOENT, and the caller learns of it for free.
- A batch takes effect as a whole or not at all (nf_tables commits by transaction).

Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from kernel import libnftables, netlink
from kernel.errors import Exists, NotFound
from kernel.netlink import Message, attributes, string, text
from kernel.nft_codec import (
    LIST_SET,
    LIST_TABLE,
    MARKER,
    Element,
    body_of,
    contains,
    elements_body,
    owner_of,
    parse,
    same,
    same_key,
)
from kernel.nft_tables import (
    FAMILIES,
    FLANNEL_TABLE,
    FORWARDING,
    HEADER,
    SCHEMA,
    SETS,
    TABLE,
    check_table,
    current,
    delete_tables,
    element_sets,
    ensure_tables,
    has_table,
    schema,
    shared_sets,
    standing_sets,
    table,
)
from kernel.session import Session

# Beside what is defined here: who uses nftables needs no other module.
__all__ = [
    "FLANNEL_TABLE",
    "FORWARDING",
    "SCHEMA",
    "TABLE",
    "Element",
    "check_table",
    "contains",
    "current",
    "delete_tables",
    "element_sets",
    "ensure_tables",
    "has_table",
    "schema",
    "shared_sets",
    "standing_sets",
]

_SUBSYSTEM = 10 << 8
_GETCHAIN, _DELCHAIN = _SUBSYSTEM | 4, _SUBSYSTEM | 5
_GETRULE, _DELRULE = _SUBSYSTEM | 7, _SUBSYSTEM | 8
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN = 1, 2
_NEWSETELEM, _GETSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
_BATCH_BEGIN, _BATCH_END = 16, 17
# In one message: an attribute's length has 16 bits, and the largest element with its comment takes under 240 bytes.
_BATCH_ELEMENTS = 256
_TRIES = 3
ANYBODY = {4: "0.0.0.0/0", 6: "::/0"}
CHAIN_PREFIX = "c_"  # of attachments' chains
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)


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
    return Element(f"apart{version}", (ANYBODY[version], network))


def join(source: str, destination: str) -> Element:
    """What lets a network's addresses talk to those of one that is kept apart; a network is joined with itself, too."""
    return Element(f"joined{ip_network(source).version}", (source, destination))


def remote(network: str) -> Element:
    """What keeps everybody from being passed on to an address of a network, on any host, but for `among`, `local`, and
    what was translated."""
    whole = ip_network(network)
    return Element(f"remote{whole.version}", (ANYBODY[whole.version], str(whole)))


def among(source: str, destination: str) -> Element:
    """What lets a network's addresses be passed on to those of one that is `remote`; also to its own."""
    return Element(f"among{ip_network(source).version}", (str(ip_network(source)), str(ip_network(destination))))


def local(subnet: str) -> Element:
    """What leaves it to `keep_apart` who reaches a part of a `remote` network: one that is on this host."""
    part = ip_network(subnet)
    return Element(f"local{part.version}", (ANYBODY[part.version], str(part)))


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


def _holds_any(set_name: str) -> bool:
    body = HEADER.pack(FAMILIES["inet"], 0, 0) + string(LIST_TABLE, TABLE) + string(LIST_SET, set_name)
    try:
        with netlink.Socket(netlink.NETFILTER) as own:  # a list that is not read to its end
            bodies = own.begin_dump(Message(_GETSETELEM, 0, body, f"look into set {set_name}"))
    except NotFound:
        return False
    return any(parse(set_name, one) for one in bodies)


def add(session: Session, elements: Sequence[Element], write: Callable[[], None] | None = None) -> None:
    """Add elements; makes the tables where they are missing. `write` does that, with what others want; else they hold
    nothing besides.

    One with a comment has one owner: where it is there under another's, it becomes this one's, so that what a dead
    container left and what a living one wants are told apart.

    Raises:
        Exists: a network lies within another one of its set, or around it.
    """
    if not elements:
        return
    there: list[Element] = []
    for _ in range(_TRIES):
        try:
            _change(session, there, elements)
        except NotFound:
            families = {element.family for element in elements}
            # Where they are there, it was somebody who removed one meanwhile.
            if write is not None and not all(current(session, family) for family in families):
                write()
            ensure_tables(session, families)
        except Exists:
            pass
        else:
            return
        there = [element for element in elements if element.comment and present(session, element)]
    _change(session, there, elements)


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
    return found is not None and (not element.comment or found.comment == owner_of(element))


def is_anothers(session: Session, element: Element) -> bool:
    """Whether the set holds the element's key, and somebody else than its owner wants it."""
    found = _find(session, element)
    return found is not None and found.comment != owner_of(element)


def _find(session: Session, element: Element) -> Element | None:
    message = Message(_GETSETELEM, 0, body_of([element]), f"look up {element.key} in set {element.set}")
    try:
        body = session.netfilter.get(message)
    except NotFound:
        return None
    return next((found for found in parse(element.set, body) if same_key(element, found)), None)


def holds(session: Session, element: Element) -> bool:
    """Whether the set holds this element, or one that contains it (a network around this one), whoever owns it."""
    message = Message(_GETSETELEM, 0, body_of([element]), f"look up {element.key} in set {element.set}")
    try:
        body = session.netfilter.get(message)
    except NotFound:
        return False
    return any(contains(found, element) for found in parse(element.set, body))


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
        if key not in wanted or (key in present and same(element, present[key])):
            wanted[key] = element
    foreign = [present[key] for key in wanted.keys() & present.keys() if not same(wanted[key], present[key])]
    missing = [e for key, e in wanted.items() if key not in present or not same(e, present[key])]
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
    family = FAMILIES[SETS[set_name].family]
    body = HEADER.pack(family, 0, 0) + string(LIST_TABLE, TABLE) + string(LIST_SET, set_name)
    try:
        parts = list(session.netfilter.dump(Message(_GETSETELEM, 0, body, f"list set {set_name}")))
    except NotFound:
        return []
    return [element for part in parts for element in parse(set_name, part)]


def add_chain(session: Session, chain: Chain, write: Callable[[], None] | None = None) -> None:
    """Make an attachment's chain, or give it these rules; makes the table where it is missing, as `add`.

    Raises:
        KernelError: libnftables refused a rule; with its own words.
    """
    for _ in range(_TRIES):
        if write is not None and not current(session, "inet"):
            write()
        ensure_tables(session, {"inet"})
        try:
            libnftables.run(_commands(chain), f"write chain {chain.name}")
        except NotFound:  # somebody took the table away meanwhile
            continue
        return
    libnftables.run(_commands(chain), f"write chain {chain.name}")


def check_chain(chain: Chain) -> None:
    """Let libnftables read a chain without making it, with table and all.

    Raises:
        KernelError: as `add_chain`.
    """
    libnftables.run(table("inet") + _commands(chain), f"read chain {chain.name}", check=True)


def _commands(chain: Chain) -> str:
    where = f"inet {TABLE} {chain.name}"
    return f"add chain {where}\nflush chain {where}\n{rules(chain)}"


def rules(chain: Chain) -> str:
    """Commands that give an attachment's chain its rules."""
    return "".join(f"add rule inet {TABLE} {chain.name} {rule}\n" for rule in chain.rules)


def delete_chains(session: Session, names: Iterable[str]) -> None:
    """Remove attachments' chains; those that are not there are left alone. No element may lead there any more."""
    for name in names:
        header = HEADER.pack(FAMILIES["inet"], 0, 0)
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
    header = HEADER.pack(FAMILIES["inet"], 0, 0)
    chain = header + string(_CHAIN_TABLE, TABLE) + string(_CHAIN_NAME, name)
    rules = header + string(_RULE_TABLE, TABLE) + string(_RULE_CHAIN, name)
    try:
        session.netfilter.get(Message(_GETCHAIN, 0, chain, f"look for chain {name}"))
        return len(list(session.netfilter.dump(Message(_GETRULE, 0, rules, f"list chain {name}"))))
    except NotFound:
        return -1


def chains(session: Session) -> list[str]:
    """The names of all attachments' chains."""
    return [name for name in all_chains(session, "inet") if name.startswith(CHAIN_PREFIX)]


def all_chains(session: Session, family: str) -> list[str]:
    """The names of all chains of one of our tables; none where it is missing."""
    body = HEADER.pack(FAMILIES[family], 0, 0) + string(_CHAIN_TABLE, TABLE)
    try:
        parts = [attributes(part, HEADER.size) for part in session.netfilter.dump(Message(_GETCHAIN, 0, body, "list"))]
    except NotFound:
        return []
    # Kernels before 6.2 do not know the filter.
    return [text(part.get(_CHAIN_NAME)) for part in parts if text(part.get(_CHAIN_TABLE)) == TABLE]


def _change(session: Session, removed: Sequence[Element], added: Sequence[Element]) -> None:
    """Remove elements, then add others, in one transaction.

    Raises:
        NotFound: a table, or an element to be removed, is missing.
        Exists: an element with an owner is there.
    """
    # Only what is added needs the right tables: a wrong configuration must not keep anything from being removed.
    version = schema() if added else ""
    messages = [
        Message(
            _NEWSETELEM, netlink.CREATE, elements_body(family, version, [MARKER]), f"check the table {family} {TABLE}"
        )
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
            body = body_of(members, data=kind == _NEWSETELEM)
            messages.append(Message(kind, flags, body, f"{verb} {first} in nftables set {name}"))
    return messages
