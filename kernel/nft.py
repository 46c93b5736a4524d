"""nftables: the static tables once, and elements of their sets at any time.

Rules of this file
- Two tables are ours: `inet netloom` and `bridge netloom`. Their chains and sets never change while a version runs;
  everything per container is an element of a set. So the cost of a container does not grow with their number.
- The tables are written by libnftables (in this process, no exec). It costs milliseconds, so it is done only when an
  element was refused because its set is missing.
- Elements go through nfnetlink directly: libnftables' own element commands first read the plain interval sets of the
  table (14 ms beside one of 10,000; 0.05 ms beside our concatenated ones, which it does not read), a batch of ours
  costs tens of microseconds at any size.
- Each batch also adds the element 1 of the set `SCHEMA`. It is there already, so nothing happens; where the tables are
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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from kernel import netlink
from kernel.errors import Exists, KernelError, NotFound, from_errno
from kernel.link import packed_mac
from kernel.netlink import Message, attr, attribute_list, attributes, nested, string, text
from kernel.session import Session

TABLE = "netloom"
SCHEMA = "schema1"  # raise the number with every change of _TABLES

# masq4, masq6: containers whose traffic leaves under the host's address.
# nomasq4, nomasq6: (source network . destination network) where it does not. No element may lie within another: the
#   kernel refuses that, as the set has intervals.
# guarded: bridge ports whose source MAC is checked; allowed: (port . MAC) that may pass there.
# A port without an entry in `guarded` costs one hash look-up.
_TABLES = {
    "inet": f"""
table inet {TABLE} {{
	set {SCHEMA} {{
		type mark
		elements = {{ 1 }}
	}}
	set masq4 {{
		type ipv4_addr
	}}
	set masq6 {{
		type ipv6_addr
	}}
	set nomasq4 {{
		type ipv4_addr . ipv4_addr
		flags interval
	}}
	set nomasq6 {{
		type ipv6_addr . ipv6_addr
		flags interval
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @masq4 ip daddr != 224.0.0.0/4 ip saddr . ip daddr != @nomasq4 masquerade
		ip6 saddr @masq6 ip6 daddr != ff00::/8 ip6 saddr . ip6 daddr != @nomasq6 masquerade
	}}
}}
""",
    # A kernel may lack nftables for bridges; only who asks for a spoof check needs it.
    "bridge": f"""
table bridge {TABLE} {{
	set {SCHEMA} {{
		type mark
		elements = {{ 1 }}
	}}
	set guarded {{
		type ifname
	}}
	set allowed {{
		type ifname . ether_addr
	}}
	chain prerouting {{
		type filter hook prerouting priority dstnat; policy accept;
		iifname @guarded iifname . ether saddr != @allowed counter drop
	}}
}}
""",
}

_FAMILIES = {"inet": 1, "bridge": 7}

# What each set's key is made of.
_SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "masq4": ("inet", ("ip",)),
    "masq6": ("inet", ("ip",)),
    "nomasq4": ("inet", ("network", "network")),
    "nomasq6": ("inet", ("network", "network")),
    "guarded": ("bridge", ("ifname",)),
    "allowed": ("bridge", ("ifname", "mac")),
}

_SUBSYSTEM = 10 << 8
_GETSET = _SUBSYSTEM | 10
_SET_NAME = 2
_NEWSETELEM, _GETSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
_BATCH_BEGIN, _BATCH_END = 16, 17
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_USERDATA, _ELEM_KEY_END = 1, 6, 10
_DATA_VALUE = 1
_UDATA_COMMENT = 0
_HEADER = struct.Struct(">BBH")
# In one message: an attribute's length has 16 bits, and the largest element with its comment takes under 240 bytes.
_BATCH_ELEMENTS = 256
_TRIES = 3
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)


@dataclass(frozen=True, slots=True)
class Element:
    """An element of one of our sets. `key` is as people write it: ("10.1.0.2",) or ("veth12", "02:42:0a:01:00:02").

    `comment` names the owner, in `nft list table inet netloom` and for us; "" where several attachments share it.
    """

    set: str
    key: tuple[str, ...]
    comment: str = ""

    @property
    def family(self) -> str:
        """The table's family: "inet" or "bridge"."""
        return _SETS[self.set][0]


def masquerade(address: str, owner: str) -> Element:
    """What makes the traffic of a container's address leave under the host's. `owner` is for the comment."""
    return Element(f"masq{ip_address(address).version}", (address,), owner)


def no_masquerade(network: str) -> Element:
    """What exempts the traffic within a network ("10.1.0.0/16") from masquerade."""
    return Element(f"nomasq{ip_network(network).version}", (network, network))


def spoof_check(port: str, mac: str, owner: str) -> list[Element]:
    """What drops frames that enter a bridge port with another source MAC than this."""
    return [Element("allowed", (port, mac), owner), Element("guarded", (port,), owner)]


def add(session: Session, elements: Sequence[Element]) -> None:
    """Add elements; makes the tables where they are missing.

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
            ensure_tables(session, {element.family for element in elements})
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
    """Whether the set holds exactly this element, whoever owns it."""
    return _find(session, element) is not None


def _is_owned(session: Session, element: Element) -> bool:
    found = _find(session, element)
    return found is not None and (not element.comment or found.comment == _owner(element))


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
    """Whether every packet that matches `inner` matches `outer`."""
    if outer.set != inner.set:
        return False
    kinds = _SETS[outer.set][1]
    for kind, wide, narrow in zip(kinds, outer.key, inner.key, strict=True):
        (low, high), (first, last) = _part(kind, wide), _part(kind, narrow)
        if not low <= first <= last <= high:
            return False
    return True


def converge(session: Session, sets: Iterable[str], elements: Iterable[Element]) -> tuple[int, int]:
    """Make the sets hold exactly these elements, in one transaction: no packet sees them in between.

    The tables of the elements' families must be there.

    Returns:
        How many elements were missing (or somebody else's), and how many too many.
    """
    wanted = {(element.set, element.key): element for element in elements}
    present = {(element.set, element.key): element for name in sets for element in all_elements(session, name)}
    missing = [e for key, e in wanted.items() if key not in present or _owner(e) != present[key].comment]
    stale = [element for key, element in present.items() if key not in wanted]
    foreign = [present[key] for key in wanted.keys() & present.keys() if _owner(wanted[key]) != present[key].comment]
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
    family = _FAMILIES[_SETS[set_name][0]]
    body = _HEADER.pack(family, 0, 0) + string(_LIST_TABLE, TABLE) + string(_LIST_SET, set_name)
    try:
        parts = list(session.netfilter.dump(Message(_GETSETELEM, 0, body, f"list set {set_name}")))
    except NotFound:
        return []
    return [element for part in parts for element in _parse(set_name, part)]


def element_sets() -> list[str]:
    """The sets that hold what attachments want."""
    return list(_SETS)


def network_sets() -> list[str]:
    """Those of them whose elements are networks."""
    return [name for name, (_, kinds) in _SETS.items() if "network" in kinds]


def ensure_tables(session: Session, families: Collection[str]) -> None:
    """Write our tables of these families where they are missing or of another version.

    The elements of a table of another version go with it; `kernel.record` puts them back.
    """
    for family in sorted(families):
        if not _current(session, family):
            run(_removal(family) + _TABLES[family], f"write the table {family} {TABLE}")


def delete_tables() -> None:
    """Remove our tables, if they are there, from the calling thread's namespace."""
    for family in _TABLES:
        run(_removal(family), f"remove the table {family} {TABLE}")


def _removal(family: str) -> str:
    # Naming it first makes the deletion succeed where it is not there.
    return f"table {family} {TABLE}\ndelete table {family} {TABLE}\n"


def _current(session: Session, family: str) -> bool:
    body = _HEADER.pack(_FAMILIES[family], 0, 0) + string(_LIST_TABLE, TABLE) + string(_SET_NAME, SCHEMA)
    try:
        session.netfilter.get(Message(_GETSET, 0, body, f"look for the table {family} {TABLE}"))
    except NotFound:
        return False
    return True


def run(commands: str, what: str) -> None:
    """Let libnftables run commands in the calling thread's namespace, as one transaction.

    Raises:
        KernelError: it is not installed, or it refused; with its own words.
    """
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise KernelError(what, errno.ENOMEM, "libnftables gave no context")
    try:
        library.nft_ctx_buffer_error(context)
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
    messages = [
        Message(_NEWSETELEM, netlink.CREATE, _elements(family, SCHEMA, [_MARKER]), f"check the table {family} {TABLE}")
        for family in sorted({element.family for element in (*removed, *added)})
    ]
    messages += _messages(_DELSETELEM, removed, "remove")
    messages += _messages(_NEWSETELEM, added, "add")
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
            messages.append(Message(kind, flags, _body(members), f"{verb} {first} in nftables set {name}"))
    return messages


def _body(elements: Sequence[Element]) -> bytes:
    """The body of a message about elements of one set."""
    family, kinds = _SETS[elements[0].set]
    return _elements(family, elements[0].set, [_item(kinds, element) for element in elements])


def _elements(family: str, set_name: str, items: Iterable[Sequence[bytes]]) -> bytes:
    return (
        _HEADER.pack(_FAMILIES[family], 0, 0)
        + string(_LIST_TABLE, TABLE)
        + string(_LIST_SET, set_name)
        + nested(_LIST_ELEMENTS, *(nested(1, *item) for item in items))
    )


def _item(kinds: tuple[str, ...], element: Element) -> list[bytes]:
    start, end = _key(kinds, element.key)
    parts = [nested(_ELEM_KEY, attr(_DATA_VALUE, start))]
    if end is not None:
        parts.append(nested(_ELEM_KEY_END, attr(_DATA_VALUE, end)))
    if element.comment:
        comment = _comment(element)
        parts.append(attr(_ELEM_USERDATA, bytes([_UDATA_COMMENT, len(comment)]) + comment))
    return parts


def _comment(element: Element) -> bytes:
    return element.comment.encode()[:127] + b"\0"


def _key(kinds: tuple[str, ...], values: tuple[str, ...]) -> tuple[bytes, bytes | None]:
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
    if kind == "ip":
        packed = ip_address(value).packed
    elif kind == "ifname":
        packed = value.encode().ljust(16, b"\0")
    else:
        packed = packed_mac(value)
    return packed, packed


def _parse(set_name: str, body: bytes) -> list[Element]:
    _family, kinds = _SETS[set_name]
    elements = []
    for _kind, item in attribute_list(attributes(body, _HEADER.size).get(_LIST_ELEMENTS, b"")):
        found = attributes(item)
        start = attributes(found.get(_ELEM_KEY, b"")).get(_DATA_VALUE, b"")
        end = attributes(found.get(_ELEM_KEY_END, b"")).get(_DATA_VALUE, start)
        data = found.get(_ELEM_USERDATA, b"")
        comment = text(data[2:]) if data[:1] == bytes([_UDATA_COMMENT]) else ""
        elements.append(Element(set_name, _values(kinds, set_name, start, end), comment))
    return elements


def _values(kinds: tuple[str, ...], set_name: str, start: bytes, end: bytes) -> tuple[str, ...]:
    size = 16 if set_name.endswith("6") else 4
    sizes = {"network": size, "ip": size, "ifname": 16, "mac": 6}
    values = []
    offset = 0
    for kind in kinds:
        low, high = start[offset : offset + sizes[kind]], end[offset : offset + sizes[kind]]
        if kind == "network":
            width = (int.from_bytes(low, "big") ^ int.from_bytes(high, "big")).bit_length()
            values.append(f"{ip_address(low)}/{size * 8 - width}")
        elif kind == "ip":
            values.append(str(ip_address(low)))
        elif kind == "ifname":
            values.append(text(low))
        else:
            values.append(low.hex(":"))
        offset += (sizes[kind] + 3) & ~3
    return tuple(values)


def _same_key(wanted: Element, found: Element) -> bool:
    kinds = _SETS[wanted.set][1]
    return _key(kinds, wanted.key) == _key(kinds, found.key)


_MARKER = [nested(_ELEM_KEY, attr(_DATA_VALUE, struct.pack("=I", 1)))]
