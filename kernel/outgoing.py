"""Whether anybody of this host has a say in what its tunnels send: rules of netfilter for outgoing packets, or IPsec.

Asked for by who would send them past all of that (kernel/encapsulate.py): "" is nobody, else words that say who. What
is not understood counts as a say. A rule has none
- that one of its matches keeps from such packets: by their source, protocol, port, link, or kind of destination;
- or that changes nothing: it counts, accepts, returns, or leads to a chain of such rules.

Our own table's are for containers' packets alone.

Sources: include/uapi/linux/netfilter/nf_tables.h, xt_addrtype.h, include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from kernel import legacy, netlink, nft
from kernel.errors import KernelError
from kernel.netlink import Message, attribute_list, attributes, string, text
from kernel.session import Session

_SUBSYSTEM = 10 << 8
_GETCHAIN, _GETRULE, _GETGEN = (_SUBSYSTEM | number for number in (4, 7, 16))
_HEADER = struct.Struct(">BBH")
_NAMES = {1: "inet", 2: "ip", 5: "netdev"}
_OUTPUT, _POSTROUTING, _EGRESS = 3, 4, 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE, _HOOK_NUMBER = 1, 3, 4, 5, 6, 1
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_NAME, _DATA = 1, 2  # of an expression
_VALUE, _VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_DROPS = 0
_ACCEPT, _CONTINUE, _JUMP, _GOTO, _RETURN = 1, -1, -3, -4, -5
_MOST_CHAINS, _MOST_RULES, _DEEPEST = 500, 100, 8  # of more nobody knows within reasonable time

_XFRM = 6
_GET_SPD, _GET_DEFAULT = 0x25, 0x28
_SPD_INFO, _BLOCK = 1, 1
_LEGACY = ("filter", "nat", "mangle", "raw", "security")

# Expressions that read something, each with its attribute that says that it does more; and those that only match.
_READS = {"payload": 5, "meta": 3, "ct": 4, "fib": 0, "lookup": 3}
_HARMLESS = frozenset(
    ("cmp", "match", "counter", "range", "limit", "quota", "connlimit", "last", "byteorder", "notrack")
)

_UNICAST, _LOCAL = 1, 2  # RTN_*, what the destination and the source are


@dataclass(frozen=True, slots=True)
class Sent:
    """What is known of a tunnel's packets: the name of the link that they leave by, where they come from, and the port
    at the other end."""

    link: str
    local: IPv4Address
    port: int


@dataclass(frozen=True, slots=True)
class _Chain:
    family: int
    table: str
    name: str
    hook: int  # -1: none
    drops: bool
    rules: int  # and jumps here

    def __str__(self) -> str:
        return f"{self.name} of table {_NAMES.get(self.family, self.family)} {self.table}"


def generation(session: Session) -> bytes:
    """Another one whenever a rule, chain, table or element of nftables came or went. Raises KernelError."""
    body = session.netfilter.get(Message(_GETGEN, 0, _HEADER.pack(0, 0, 0), "ask for nftables' generation"))
    return attributes(body, _HEADER.size).get(1, b"")


def unseen() -> str:
    """Who else has a say, of whom `generation` does not tell. Of the calling thread's namespace."""
    if any(legacy.in_use(4, table) for table in _LEGACY):
        return "iptables-legacy has tables"
    return _of_ipsec()


def of_rules(session: Session, sent: Iterable[Sent]) -> str:
    """Whose rule of nftables may concern one of these. Raises KernelError."""
    with netlink.Socket(netlink.NETFILTER) as own:  # a list that is not read to its end
        listed = own.begin_dump(Message(_GETCHAIN, 0, _HEADER.pack(0, 0, 0), "list nftables chains"), _MOST_CHAINS)
    if len(listed) >= _MOST_CHAINS:
        return f"nftables has more than {_MOST_CHAINS} chains"
    chains = [_chain(body) for body in listed]
    known = {(one.family, one.table, one.name): one for one in chains}
    packets = list(sent)
    for one in chains:
        if one.family == 5 and one.hook == _EGRESS:
            return f"chain {one}"
        if one.family not in (1, 2) or one.hook not in (_OUTPUT, _POSTROUTING) or _is_ours(one):
            continue
        if one.drops or any(not _passes(session, known, one, packet, 0) for packet in packets):
            return f"chain {one}"
    return ""


def _is_ours(one: _Chain) -> bool:
    return one.family == 1 and one.table == nft.TABLE


def _passes(session: Session, known: Mapping[tuple[int, str, str], _Chain], at: _Chain, sent: Sent, depth: int) -> bool:
    """Whether a chain does nothing with such a packet."""
    if not at.rules:
        return True
    if depth > _DEEPEST:
        return False
    body = _HEADER.pack(at.family, 0, 0) + string(_RULE_TABLE, at.table) + string(_RULE_CHAIN, at.name)
    with netlink.Socket(netlink.NETFILTER) as own:
        rules = own.begin_dump(Message(_GETRULE, 0, body, f"list rules of {at}"), _MOST_RULES)
    if len(rules) >= _MOST_RULES:
        return False
    for rule in rules:
        harmless, chains = _judge(attributes(rule, _HEADER.size).get(_RULE_EXPRESSIONS, b""), sent)
        if not harmless:
            return False
        for name in chains:
            there = known.get((at.family, at.table, name))
            if there is None or not _passes(session, known, there, sent, depth + 1):
                return False
    return True


def _judge(expressions: bytes, sent: Sent) -> tuple[bool, list[str]]:
    """Whether a rule leaves such a packet alone, but for the chains that it may lead to."""
    registers: dict[int, bytes] = {}  # what is known of them
    harmless, chains = True, []
    for _, element in attribute_list(expressions):
        parts = attributes(element)
        name, data = text(parts.get(_NAME)), attributes(parts.get(_DATA, b""))
        if (name == "cmp" and _differs(data, registers)) or (name == "match" and _is_other_type(data)):
            return harmless, []
        if name == "immediate":
            passes, chain = _verdict(data)
            harmless &= passes
            chains += chain
        elif name == "bitwise":
            _mask(data, registers)
        elif name in _READS:
            # With a source it changes the packet, or what is known of it.
            harmless &= _READS[name] not in data
            _load(name, data, registers, sent)
        else:
            harmless &= name in _HARMLESS
            if name not in ("cmp", "match", "counter"):
                registers.clear()  # maybe it wrote there
    return harmless, chains


def _verdict(data: Mapping[int, bytes]) -> tuple[bool, list[str]]:
    """Whether it changes nothing, and the chain that it leads to."""
    verdict = attributes(attributes(data.get(2, b"")).get(_VERDICT, b""))
    code = int.from_bytes(verdict.get(_VERDICT_CODE, b""), "big", signed=True)
    if code in (_JUMP, _GOTO):
        return True, [text(verdict.get(_VERDICT_CHAIN))]
    return code in (_ACCEPT, _CONTINUE, _RETURN), []


def _load(name: str, data: Mapping[int, bytes], registers: dict[int, bytes], sent: Sent) -> None:
    value: bytes | None = None
    if name == "payload":
        base, offset, length = (_number(data.get(kind)) for kind in (2, 3, 4))
        value = _of_packet(sent, base, offset, length)
    elif name == "meta":
        value = {
            6: bytes(16),  # NFT_META_IIFNAME: it came in nowhere
            7: sent.link.encode().ljust(16, b"\0"),  # OIFNAME
            15: b"\2",  # NFPROTO
            16: b"\x11",  # L4PROTO
        }.get(_number(data.get(2)))
    elif name == "fib" and (_number(data.get(2)), _number(data.get(3))) == (3, 2):  # the type of the destination
        value = struct.pack("=I", _UNICAST)
    registers.clear()  # some are parts of others
    if value is not None:
        registers[_number(data.get(1))] = value


def _of_packet(sent: Sent, base: int, offset: int, length: int) -> bytes | None:
    """Bytes of its headers, as far as they are known."""
    if base == 1 and offset >= 12 and offset + length <= 16:
        return sent.local.packed[offset - 12 : offset - 12 + length]
    if (base, offset, length) == (1, 9, 1):
        return b"\x11"
    if (base, offset, length) == (2, 2, 2):
        return sent.port.to_bytes(2, "big")
    return None


def _mask(data: Mapping[int, bytes], registers: dict[int, bytes]) -> None:
    mask, flip = (attributes(data.get(kind, b"")).get(_VALUE, b"") for kind in (4, 5))
    value = registers.get(_number(data.get(1)))
    registers.clear()
    if value is None or _number(data.get(6)) or not len(mask) == len(flip) <= len(value):
        return
    triples = zip(value, mask, flip, strict=False)
    registers[_number(data.get(2))] = bytes(one & two ^ three for one, two, three in triples)


def _differs(data: Mapping[int, bytes], registers: Mapping[int, bytes]) -> bool:
    """Whether a comparison fails, of what is known."""
    value = registers.get(_number(data.get(1)))
    wanted = attributes(data.get(3, b"")).get(_VALUE, b"")
    operation = _number(data.get(2))
    if value is None or operation not in (0, 1) or not 0 < len(wanted) <= len(value):
        return False
    return (value[: len(wanted)] == wanted) == bool(operation)


def _is_other_type(data: Mapping[int, bytes]) -> bool:
    """Whether iptables' match of kinds of addresses fails: these go to one host, from this one."""
    if _number(data.get(2)) != 1 or len(data.get(3, b"")) < 8:
        return False
    source, target, flags = struct.unpack_from("=HHI", data[3])
    inverted = bool(flags & 1), bool(flags & 2)
    return any(
        wanted and bool(wanted & 1 << kind) == is_inverted
        for wanted, kind, is_inverted in zip((source, target), (_LOCAL, _UNICAST), inverted, strict=True)
    )


def _of_ipsec() -> str:
    try:
        with netlink.Socket(_XFRM) as door:
            found = attributes(door.get(Message(_GET_SPD, 0, bytes(4), "count IPsec policies")), 4)
            counts = struct.unpack_from("=III", found.get(_SPD_INFO, bytes(12)))
            if counts[1]:
                return "there are policies of IPsec for what goes out"
            return "IPsec's default is to block" if _default(door)[2] == _BLOCK else ""
    except KernelError:  # no IPsec in this kernel
        return ""


def _default(door: netlink.Socket) -> bytes:
    try:
        return door.get(Message(_GET_DEFAULT, 0, bytes(4), "ask for IPsec's default")).ljust(3, b"\0")
    except KernelError:  # Linux before 5.14
        return bytes(3)


def _chain(body: bytes) -> _Chain:
    parts = attributes(body, _HEADER.size)
    hook = attributes(parts[_CHAIN_HOOK]).get(_HOOK_NUMBER) if _CHAIN_HOOK in parts else None
    return _Chain(
        body[0],
        text(parts.get(_CHAIN_TABLE)),
        text(parts.get(_CHAIN_NAME)),
        _number(hook) if hook is not None else -1,
        hook is not None and _number(parts.get(_CHAIN_POLICY, b"\1")) == _DROPS,
        _number(parts.get(_CHAIN_USE)),
    )


def _number(data: bytes | None) -> int:
    return int.from_bytes(data, "big") if data else 0
