"""Elements of our sets and maps as the kernel has them, and as people write them. Pure: no I/O.

Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from kernel.link import packed_mac
from kernel.netlink import attr, attribute_list, attributes, nested, string, text
from kernel.nft_tables import FAMILIES, HEADER, SETS, TABLE, Set

_WIDTHS = {"ifname": 16, "mac": 6, "protocol": 1, "port": 2}
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}

LIST_TABLE, LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_DATA, _ELEM_USERDATA, _ELEM_KEY_END = 1, 2, 6, 10
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_JUMP = struct.pack(">i", -3)
_UDATA_COMMENT = 0


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
        return SETS[self.set].family


def contains(outer: Element, inner: Element) -> bool:
    """Whether every packet that matches `inner` matches `outer`, and fares the same."""
    if outer.set != inner.set or not _same_data(inner, outer):
        return False
    kinds = SETS[outer.set].key
    for kind, wide, narrow in zip(kinds, outer.key, inner.key, strict=True):
        (low, high), (first, last) = part(kind, wide), part(kind, narrow)
        if not low <= first <= last <= high:
            return False
    return True


def widest(elements: Iterable[Element]) -> list[Element]:
    """Those that lie within no other. A network inside another network, or a network that grew while containers of its
    smaller days live, wants an element that the larger one's already covers, and that the kernel would refuse."""
    distinct = {(element.set, element.key): element for element in elements}
    found: list[Element] = []
    for name in dict.fromkeys(one.set for one in distinct.values()):
        ours = [one for one in distinct.values() if one.set == name]
        found += _widest_of_set(ours) if "network" in SETS[name].key else ours
    return found


def _widest_of_set(elements: Sequence[Element]) -> list[Element]:
    """Looks for each what could be around it: as many pairs of lengths as there are, which are few."""
    size = 8 * SETS[elements[0].set].size
    boxes = {one: tuple(map(ip_network, one.key)) for one in elements}
    there = {tuple((int(net.network_address), net.prefixlen) for net in box) for box in boxes.values()}
    lengths = {tuple(net.prefixlen for net in box) for box in boxes.values()}
    found = []
    for one, box in boxes.items():
        own = tuple(net.prefixlen for net in box)
        around = (
            tuple(
                (int(net.network_address) >> (size - length) << (size - length), length)
                for net, length in zip(box, wide, strict=True)
            )
            for wide in lengths
            if wide != own and all(length <= mine for length, mine in zip(wide, own, strict=True))
        )
        if not any(key in there for key in around):
            found.append(one)
    return found


def owner_of(element: Element) -> str:
    """The comment as it comes back from the kernel."""
    return text(_comment(element)) if element.comment else ""


def body_of(elements: Sequence[Element], *, data: bool = False) -> bytes:
    """The body of a message about elements of one set; `data`: with what a map has for the keys."""
    family = SETS[elements[0].set].family
    return elements_body(family, elements[0].set, [_item(element, data=data) for element in elements])


def elements_body(family: str, set_name: str, items: Iterable[Sequence[bytes]]) -> bytes:
    """The body of a message about elements of any set of ours, each as the attributes that it consists of."""
    return (
        HEADER.pack(FAMILIES[family], 0, 0)
        + string(LIST_TABLE, TABLE)
        + string(LIST_SET, set_name)
        + nested(_LIST_ELEMENTS, *(nested(1, *item) for item in items))
    )


def _item(element: Element, *, data: bool) -> list[bytes]:
    one = SETS[element.set]
    start, end = packed(one.key, element.key)
    parts = [nested(_ELEM_KEY, attr(_DATA_VALUE, start))]
    if end is not None:
        parts.append(nested(_ELEM_KEY_END, attr(_DATA_VALUE, end)))
    if data and one.data == ("verdict",):
        verdict = nested(_DATA_VERDICT, attr(_VERDICT_CODE, _JUMP), string(_VERDICT_CHAIN, element.data[0]))
        parts.append(nested(_ELEM_DATA, verdict))
    elif data and one.data:
        parts.append(nested(_ELEM_DATA, attr(_DATA_VALUE, packed(one.data, element.data)[0])))
    if element.comment:
        comment = _comment(element)
        parts.append(attr(_ELEM_USERDATA, bytes([_UDATA_COMMENT, len(comment)]) + comment))
    return parts


def _comment(element: Element) -> bytes:
    return element.comment.encode()[:127] + b"\0"


def packed(kinds: tuple[str, ...], values: tuple[str, ...]) -> tuple[bytes, bytes | None]:
    """The key's bytes, and those of its end where it is an interval. Each part is padded to four bytes, as
    concatenations are laid out in registers."""
    if len(kinds) != len(values):
        raise ValueError(f"an element of this set has {len(kinds)} parts, not {values!r}")
    start = end = b""
    interval = False
    for kind, value in zip(kinds, values, strict=True):
        low, high = part(kind, value)
        interval |= kind == "network"
        # A set of one type is not padded: its key length is the type's own.
        padding = b"\0" * (-len(low) % 4) if len(kinds) > 1 else b""
        start += low + padding
        end += high + padding
    return start, end if interval else None


def part(kind: str, value: str) -> tuple[bytes, bytes]:
    """The first and the last value of one part of a key, in network order."""
    if kind == "network":
        network = ip_network(value)
        return network.network_address.packed, network.broadcast_address.packed
    match kind:
        case "ip":
            data = ip_address(value).packed
        case "ifname":
            data = value.encode().ljust(16, b"\0")
        case "mac":
            data = packed_mac(value)
        case "protocol":
            data = bytes([_PROTOCOLS[value]])
        case "port":
            data = int(value).to_bytes(2, "big")
        case _:
            data = value.encode()  # the chain of a verdict; never sent like this
    return data, data


def parse(set_name: str, body: bytes) -> list[Element]:
    """The elements in the body of a message about a set."""
    one = SETS[set_name]
    elements = []
    for _kind, item in attribute_list(attributes(body, HEADER.size).get(_LIST_ELEMENTS, b"")):
        found = attributes(item)
        start = attributes(found.get(_ELEM_KEY, b"")).get(_DATA_VALUE, b"")
        end = attributes(found.get(_ELEM_KEY_END, b"")).get(_DATA_VALUE, start)
        userdata = found.get(_ELEM_USERDATA, b"")
        comment = text(userdata[2:]) if userdata[:1] == bytes([_UDATA_COMMENT]) else ""
        elements.append(Element(set_name, _values(one.key, one.size, start, end), comment, _parse_data(one, found)))
    return elements


def _parse_data(one: Set, found: Mapping[int, bytes]) -> tuple[str, ...]:
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


def same_key(wanted: Element, found: Element) -> bool:
    """Whether two elements of one set have the same key."""
    kinds = SETS[wanted.set].key
    return packed(kinds, wanted.key) == packed(kinds, found.key)


def _same_data(wanted: Element, found: Element) -> bool:
    kinds = SETS[wanted.set].data
    return not kinds or packed(kinds, wanted.data) == packed(kinds, found.data)


def same(wanted: Element, found: Element) -> bool:
    """Whether two elements of one key have one owner, and lead to the same place."""
    return owner_of(wanted) == found.comment and _same_data(wanted, found)


MARKER = [nested(_ELEM_KEY, attr(_DATA_VALUE, struct.pack("=I", 1)))]  # the element of the set `schema`
