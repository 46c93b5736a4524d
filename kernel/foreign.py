"""Other firewalls that drop forwarded packets: one rule of ours stands in front of theirs.

An accept in our table never overrides another base chain's drop. So our forward chain, which runs before theirs, marks
what it lets pass (kernel.nft, kernel.mark), and in `filter FORWARD` of iptables, where Docker, ufw and firewalld's
older backend drop, one rule accepts what is marked. Only a mark crosses over: a match of one of our sets inside an
iptables table would be printed by iptables-save as a rule that accepts everything.

Rules of this file
- Only chains that the iptables command made are written to: FORWARD in the table filter of families ip and ip6, and in
  iptables-legacy's. Nothing happens where there is none, or where it neither drops nor has rules. A table that an
  administrator wrote in nft's own language is theirs; `droppers` finds those that drop.
- Our rules are known by their comment. They are made of expressions that iptables-nft itself writes, so that it prints
  and restores them.
- The administrator's chain (iptablesAdminChainName) is called just before our rule, where it is there.
- The rule goes to the top. Where it is there already, what somebody put in front of it stays in front.
- A change is made for one generation of the whole rule set: whoever else changes it meanwhile, we look again. So any
  number of processes leave one rule, without a lock.
- On the way of an ADD: one look at the chain, one at its rules. Of many only the first are looked at, on a socket of
  their own; what is deeper than the first thousand, never. Closing such a socket waits for all that was deleted from
  nftables lately, for milliseconds (nf_tables_api.c, nft_rcv_nl_event), so a process that saw our rule among many looks
  it up by its handle.
- iptables-legacy can only be asked by its program; whether its tables are in use is in /proc.

Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c, nfnetlink.c (NFNL_BATCH_GENID);
iptables/nft-shared.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kernel import legacy, mark, netlink, nft
from kernel.errors import KernelError, NotFound
from kernel.netlink import Message, attr, attribute_list, attributes, nested, string, text
from kernel.session import Session

FILTER, FORWARD = "filter", "FORWARD"  # iptables' table and chain
ADMIN_CHAIN = "CNI-ADMIN"  # the reference's default for iptablesAdminChainName

_FAMILIES = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
_NAMES = {1: "inet", 2: "ip", 10: "ip6"}
_ACCEPTED = "netloom lets pass"  # the beginning of our accept rule's comment; the mark follows
_ADMIN = "netloom asks first:"  # that of the jump to an administrator's chain, whose name follows
_TRIES = 50
_FEW = 200  # rules come in a few parts
_seen: dict[int, int] = {}  # by IP version, the handle of our accept rule; to be looked up before it is believed
_HOOK_FORWARD = 2

_SUBSYSTEM = 10 << 8
_GETCHAIN, _NEWRULE, _GETRULE, _DELRULE, _GETGEN = (_SUBSYSTEM | number for number in (4, 6, 7, 8, 16))
_BATCH_BEGIN, _BATCH_END = 16, 17
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE, _CHAIN_KIND = 1, 3, 4, 5, 6, 7
_HOOK_NUMBER = 1
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 3, 4, 7
_EXPRESSION, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 1, 2
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_ACCEPT, _JUMP, _DROP = 1, -3, 0
_REGISTER, _VERDICT_REGISTER, _META_MARK, _EQUAL = 1, 0, 3, 0
_HEADER = struct.Struct(">BBH")
_BATCH_BODY = _HEADER.pack(0, 0, 10)


@dataclass(frozen=True, slots=True)
class Dropper:
    """A base chain of somebody else, in nft's own language, that drops forwarded packets it does not know."""

    family: str
    table: str
    chain: str

    @property
    def versions(self) -> tuple[int, ...]:
        """4, 6 or both: whose packets it drops."""
        return {"ip": (4,), "ip6": (6,)}.get(self.family, (4, 6))

    @property
    def remedy(self) -> str:
        """The command that lets pass what our forward chain marked."""
        bit = f"{mark.forward_mark():#x}"
        return f"nft insert rule {self.family} {self.table} {self.chain} meta mark and {bit} == {bit} accept"


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule, as far as we look at it."""

    handle: int
    comment: str

    @property
    def ours(self) -> bool:
        return self.comment.startswith((_ACCEPTED, _ADMIN))

    @property
    def admin_chain(self) -> str:
        """The chain that it calls, for a rule that is such a call of ours; else ""."""
        return self.comment.removeprefix(_ADMIN).strip() if self.comment.startswith(_ADMIN) else ""


@dataclass(frozen=True, slots=True)
class _Chain:
    drops: bool
    rules: int


# What the rest of us calls


def ensure(session: Session, versions: Iterable[int] = (4, 6), admin_chains: Collection[str] = ()) -> bool:
    """See that what our forward chain marked passes the iptables of the calling thread's namespace; True where
    something had to be done for it.

    Args:
        session: at home.
        versions: 4, 6 or both.
        admin_chains: chains that are asked before, where they are there.

    Raises:
        KernelError: the kernel, or iptables-legacy, refused.
    """
    changed = False
    for version in versions:
        chain = _find_chain(session, version, FORWARD)
        if chain is not None:
            changed |= _ensure(session, version, chain, _existing(session, version, admin_chains))
        if legacy.in_use(version, FILTER):
            changed |= _ensure_legacy(version, admin_chains)
    return changed


def settle(session: Session, versions: Iterable[int] = (4, 6)) -> None:
    """Take our rules out again where no attachment of the family wants them any more."""
    for version in versions:
        chain = _find_chain(session, version, FORWARD)
        if (chain is None and not legacy.in_use(version, FILTER)) or nft.forwards(version):
            continue
        asked = remove(session, (version,))
        # Who came meanwhile has put in his elements before he looked for the rule.
        if nft.forwards(version):
            ensure(session, (version,), asked)


def remove(session: Session, versions: Iterable[int] = (4, 6)) -> list[str]:
    """Take our rules out of iptables; the administrators' chains that they called."""
    asked: list[str] = []
    for version in versions:
        chain = _find_chain(session, version, FORWARD)
        if chain is not None and chain.rules:
            asked += _change(session, version, None)[1]
        if legacy.in_use(version, FILTER):
            asked += _remove_legacy(version)
    return asked


def missing(session: Session, versions: Iterable[int] = (4, 6)) -> str:
    """What lacks our rule though it needs one, in words; "" where all is well."""
    for version in versions:
        chain = _find_chain(session, version, FORWARD)
        if chain is not None and _needs(chain, (), top := _top(session, version, chain)) and not _is_right(top, ()):
            return f"{FORWARD} of table {_NAMES[_FAMILIES[version]]} {FILTER}"
        if legacy.in_use(version, FILTER) and _legacy_lacks(_list_legacy(version), ()):
            return f"{FORWARD} of {legacy.PROGRAMS[version]}"
    return ""


def legacy_in_use() -> bool:
    """Whether iptables-legacy filters here, which no event tells of."""
    return any(legacy.in_use(version, FILTER) for version in legacy.PROGRAMS)


def translates(session: Session) -> bool:
    """Whether anybody but us translates addresses here, so that what is forwarded may leave with another source."""
    if any(legacy.in_use(version, "nat") for version in legacy.PROGRAMS):
        return True
    for body in session.netfilter.dump(Message(_GETCHAIN, 0, _HEADER.pack(0, 0, 0), "list nftables chains")):
        parts = attributes(body, _HEADER.size)
        if text(parts.get(_CHAIN_KIND)) == "nat" and text(parts.get(_CHAIN_TABLE)) != nft.TABLE:
            return True
    return False


def droppers(session: Session) -> list[Dropper]:
    """The base chains in nft's own language that drop forwarded packets by their policy."""
    found = []
    for body in session.netfilter.dump(Message(_GETCHAIN, 0, _HEADER.pack(0, 0, 0), "list nftables chains")):
        parts = attributes(body, _HEADER.size)
        table, chain = text(parts.get(_CHAIN_TABLE)), text(parts.get(_CHAIN_NAME))
        hook = attributes(parts.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
        family = _NAMES.get(body[0], "")
        if not family or hook is None or int.from_bytes(hook, "big") != _HOOK_FORWARD:
            continue
        iptables = family != "inet" and (table, chain) == (FILTER, FORWARD)
        if not iptables and _number(parts.get(_CHAIN_POLICY), 1) == _DROP and not _lets_pass(body[0], table, chain):
            found.append(Dropper(family, table, chain))
    return found


def _lets_pass(family: int, table: str, chain: str) -> bool:
    """Whether a rule among the chain's first accepts what is marked, as `Dropper.remedy` has it."""
    body = _HEADER.pack(family, 0, 0) + string(_RULE_TABLE, table) + string(_RULE_CHAIN, chain)
    try:
        with netlink.Socket(netlink.NETFILTER) as own:
            rules = own.begin_dump(Message(_GETRULE, 0, body, f"look at the first rules of {chain}"))
    except NotFound:
        return False
    bit = struct.pack("=I", mark.forward_mark())
    value, verdict = attr(_DATA_VALUE, bit), _be32(_VERDICT_CODE, _ACCEPT)
    return any(value in rule and verdict in rule for rule in rules)


# iptables-nft's chains


def _ensure(session: Session, version: int, chain: _Chain, admin_chains: Collection[str]) -> bool:
    if not chain.drops and not chain.rules and not admin_chains:
        return False
    if chain.rules > _FEW and not admin_chains and _is_still_there(session, version):
        return False
    top = _top(session, version, chain)
    _seen.update((version, rule.handle) for rule in top if rule.comment == _accept_comment())
    if not _needs(chain, admin_chains, top) or _is_right(top, admin_chains):
        return False
    return _change(session, version, admin_chains)[0]


def _is_still_there(session: Session, version: int) -> bool:
    """Whether our accept rule is where this process saw it last."""
    what = Message(_GETRULE, 0, _locate(_FAMILIES[version], _seen.get(version, 0)), "look up our rule in FORWARD")
    if version not in _seen:
        return False
    try:
        (found,) = _parse([session.netfilter.get(what)])
    except NotFound:
        return False
    return found.comment == _accept_comment()


def _needs(chain: _Chain, admin_chains: Collection[str], top: Sequence[_Rule]) -> bool:
    """Whether anybody but us decides there."""
    return chain.drops or bool(admin_chains) or chain.rules > sum(rule.ours for rule in top)


def _is_right(rules: Sequence[_Rule], admin_chains: Collection[str]) -> bool:
    """Whether our accept rule is there, once, after the calls of these chains."""
    ours = [rule.comment for rule in rules if rule.ours]
    if [comment for comment in ours if comment.startswith(_ACCEPTED)] != [_accept_comment()]:
        return False
    before = ours[: ours.index(_accept_comment())]
    return all(_admin_comment(name) in before for name in admin_chains)


def _change(session: Session, version: int, admin_chains: Collection[str] | None) -> tuple[bool, list[str]]:
    """Put our rules on top of FORWARD: calls of these chains and of those that were called before, and the accept
    rule. None: take ours out.

    Returns:
        Whether there was something to do, and the administrators' chains that were called before.
    """
    family, where = _FAMILIES[version], f"{FORWARD} of table {_NAMES[_FAMILIES[version]]} {FILTER}"
    for _ in range(_TRIES):
        generation = _generation(session)
        chain = _find_chain(session, version, FORWARD)
        if chain is None:
            return False, []
        rules = _rules(session, version, chain)
        ours = [rule for rule in rules if rule.ours]
        asked = [rule.admin_chain for rule in ours if rule.admin_chain]
        if not ours if admin_chains is None else _is_right(rules, admin_chains):
            return False, asked
        messages = [
            Message(_DELRULE, 0, _locate(family, rule.handle), f"remove our rule from {where}") for rule in ours
        ]
        if admin_chains is not None:
            # Each goes to the top: the last one first.
            wanted = [*(_call(name) for name in dict.fromkeys([*asked, *admin_chains])), _accept()]
            messages += [
                Message(_NEWRULE, netlink.CREATE, _locate(family) + rule, f"put our rule into {where}")
                for rule in reversed(wanted)
            ]
        begin = Message(_BATCH_BEGIN, 0, _BATCH_BODY + attr(1, generation), "begin an nftables batch")
        end = Message(_BATCH_END, 0, _BATCH_BODY, "end an nftables batch")
        failures = [error for error in session.netfilter.transact(begin, messages, end) if error is not None]
        if not failures:
            return True, asked
        if failures[0].errno not in (errno.ERESTART, errno.ENOENT):
            raise failures[0]
    raise KernelError(f"change {where}", errno.EAGAIN, f"others changed nftables {_TRIES} times meanwhile")


def _find_chain(session: Session, version: int, name: str) -> _Chain | None:
    """A chain of table filter; None where there is none."""
    body = _HEADER.pack(_FAMILIES[version], 0, 0) + string(_CHAIN_TABLE, FILTER) + string(_CHAIN_NAME, name)
    try:
        found = attributes(session.netfilter.get(Message(_GETCHAIN, 0, body, f"look for chain {name}")), _HEADER.size)
    except NotFound:
        return None
    hooked = _CHAIN_HOOK in found
    return _Chain(hooked and _number(found.get(_CHAIN_POLICY), 1) == _DROP, _number(found.get(_CHAIN_USE), 0))


def _existing(session: Session, version: int, chains: Collection[str]) -> list[str]:
    return [name for name in chains if _find_chain(session, version, name) is not None]


def _locate(family: int, handle: int = 0) -> bytes:
    """The beginning of a message about rules of FORWARD, or about one of them."""
    body = _HEADER.pack(family, 0, 0) + string(_RULE_TABLE, FILTER) + string(_RULE_CHAIN, FORWARD)
    return body + attr(_RULE_HANDLE, handle.to_bytes(8, "big")) if handle else body


def _rules(session: Session, version: int, chain: _Chain, enough: int = 1000) -> list[_Rule]:
    """The first rules of FORWARD; `enough`: how many are read where there are more than a few."""
    what = Message(_GETRULE, 0, _locate(_FAMILIES[version]), "look at the first rules of FORWARD")
    try:
        if chain.rules <= _FEW:
            bodies = list(session.netfilter.dump(what))
        else:
            with netlink.Socket(netlink.NETFILTER) as own:  # a list that is not read to its end
                bodies = own.begin_dump(what, enough)
    except NotFound:  # somebody removed it meanwhile
        return []
    return list(_parse(bodies))


def _top(session: Session, version: int, chain: _Chain) -> list[_Rule]:
    """The first dozen, at least."""
    return _rules(session, version, chain, 1)


def _parse(bodies: Iterable[bytes]) -> Iterator[_Rule]:
    for body in bodies:
        found = attributes(body, _HEADER.size)
        if text(found.get(_RULE_CHAIN)) == FORWARD:
            yield _Rule(_number(found.get(_RULE_HANDLE), 0), _comment(found))


def _comment(rule: dict[int, bytes]) -> str:
    """A rule's comment: nftables' own, or iptables' match, whichever the program that wrote it chose."""
    data = rule.get(_RULE_USERDATA, b"")
    while len(data) >= 2:
        kind, size = data[0], data[1]
        if kind == 0:  # NFTNL_UDATA_RULE_COMMENT
            return text(data[2 : 2 + size])
        data = data[2 + size :]
    for _kind, element in attribute_list(rule.get(_RULE_EXPRESSIONS, b"")):
        expression = attributes(element)
        if text(expression.get(_EXPRESSION_NAME)) == "match":
            match = attributes(expression.get(_EXPRESSION_DATA, b""))
            if text(match.get(1)) == "comment":
                return text(match.get(3))
    return ""


def _generation(session: Session) -> bytes:
    """The number of the rule set's present state, as the kernel writes it."""
    body = session.netfilter.get(Message(_GETGEN, 0, _HEADER.pack(0, 0, 0), "ask for nftables' generation"))
    return attributes(body, _HEADER.size).get(1, b"")


def _number(data: bytes | None, absent: int) -> int:
    return int.from_bytes(data, "big") if data else absent


# The rules themselves


def _accept_comment() -> str:
    return f"{_ACCEPTED} {mark.forward_mark():#x}"


def _admin_comment(chain: str) -> str:
    return f"{_ADMIN} {chain}"


def _accept() -> bytes:
    """`-m mark --mark 0x1000000/0x1000000 -j ACCEPT`, with a comment."""
    bit = struct.pack("=I", mark.forward_mark())
    return _rule(
        _accept_comment(),
        _expression("meta", _be32(1, _REGISTER), _be32(2, _META_MARK)),
        _expression(
            "bitwise",
            _be32(1, _REGISTER),
            _be32(2, _REGISTER),
            _be32(3, len(bit)),
            nested(4, attr(_DATA_VALUE, bit)),
            nested(5, attr(_DATA_VALUE, bytes(len(bit)))),
        ),
        _expression("cmp", _be32(1, _REGISTER), _be32(2, _EQUAL), nested(3, attr(_DATA_VALUE, bit))),
        verdict=nested(_DATA_VERDICT, _be32(_VERDICT_CODE, _ACCEPT)),
    )


def _call(chain: str) -> bytes:
    """`-j chain`, with a comment."""
    return _rule(
        _admin_comment(chain),
        verdict=nested(_DATA_VERDICT, _be32(_VERDICT_CODE, _JUMP), string(_VERDICT_CHAIN, chain)),
    )


def _rule(comment: str, *expressions: bytes, verdict: bytes) -> bytes:
    """With a counter, as all rules of iptables have one."""
    told = comment.encode() + b"\0"
    return nested(
        _RULE_EXPRESSIONS,
        *expressions,
        _expression("counter"),
        _expression("immediate", _be32(1, _VERDICT_REGISTER), nested(2, verdict)),
    ) + attr(_RULE_USERDATA, bytes([0, len(told)]) + told)


def _expression(name: str, *data: bytes) -> bytes:
    return nested(_EXPRESSION, string(_EXPRESSION_NAME, name), nested(_EXPRESSION_DATA, *data))


def _be32(kind: int, value: int) -> bytes:
    return attr(kind, (value & 0xFFFFFFFF).to_bytes(4, "big"))


# iptables-legacy


def _ensure_legacy(version: int, admin_chains: Collection[str]) -> bool:
    listed = _list_legacy(version)
    existing = [name for name in admin_chains if f"-N {name}" in listed]
    if not _legacy_lacks(listed, existing):
        return False
    asked = _remove_legacy(version)
    # Each goes to the top: the last one first.
    _legacy(version, "-I", FORWARD, *_legacy_accept())
    for name in reversed(list(dict.fromkeys([*asked, *existing]))):
        _legacy(version, "-I", FORWARD, *_legacy_call(name))
    return True


def _legacy_lacks(listed: Sequence[str], admin_chains: Collection[str]) -> bool:
    rules = [line for line in listed if line.startswith(f"-A {FORWARD} ")]
    ours = [_Rule(0, comment) for line in rules if (comment := _legacy_comment(line))]
    foreign = len(rules) > sum(rule.ours for rule in ours)
    drops = f"-P {FORWARD} DROP" in listed
    return (drops or foreign or bool(admin_chains)) and not _is_right(ours, admin_chains)


def _remove_legacy(version: int) -> list[str]:
    asked: list[str] = []
    if not legacy.path_of(legacy.PROGRAMS[version]):
        return asked  # no rule of ours has come there, and no DEL fails for it
    for line in _list_legacy(version):
        rule = _Rule(0, _legacy_comment(line) if line.startswith(f"-A {FORWARD} ") else "")
        if rule.ours:
            own = _legacy_call(rule.admin_chain) if rule.admin_chain else _legacy_accept(rule.comment)
            _legacy(version, "-D", FORWARD, *own)
            asked += [rule.admin_chain] if rule.admin_chain else []
    return asked


def _list_legacy(version: int) -> list[str]:
    return _legacy(version, "-S").splitlines()


def _legacy_comment(line: str) -> str:
    """Of a rule as iptables -S prints it; ours have blanks, so they come in quotes."""
    _, found, rest = line.partition('--comment "')
    return rest.partition('"')[0] if found else ""


def _legacy_accept(comment: str = "") -> list[str]:
    comment = comment or _accept_comment()
    bit = comment.removeprefix(_ACCEPTED).strip()
    return ["-m", "mark", "--mark", f"{bit}/{bit}", "-m", "comment", "--comment", comment, "-j", "ACCEPT"]


def _legacy_call(chain: str) -> list[str]:
    return ["-m", "comment", "--comment", _admin_comment(chain), "-j", chain]


def _legacy(version: int, *arguments: str) -> str:
    return legacy.run(legacy.PROGRAMS[version], *arguments)
