"""What the reference plugins leave in the host's firewall for an attachment, recognised and removed.

A host changes over with containers running: the reference did their ADD, our DEL is to take back all that it made. Its
names are computed as it does that (containernetworking/plugins, pkg/utils/utils.go): a prefix and a SHA-512 of network
and container id.

| of | in iptables | in nftables |
|---|---|---|
| ipMasq | nat: chain CNI-<hash>, a jump in POSTROUTING | inet cni_plugins_masquerade: rules with a comment |
| macspoofchk | | bridge nat: chains cni-br-iface-<id>-<ifname>[-mac], a jump in PREROUTING |
| portmap | nat: chains CNI-DN-<hash>, CNI-SN-<hash>, jumps in CNI-HOSTPORT-DNAT, -SNAT | ip, ip6 cni_hostport: rules |
| firewall | filter: rules with the address in CNI-FORWARD; per bridge in CNI-ISOLATION-STAGE-1 and -2 | |

Rules of this file
- What is shared stays, as with the reference: CNI-FORWARD, CNI-ADMIN, the CNI-HOSTPORT- chains and their jumps.
- A host where the reference never worked pays for one list of table names; nothing is executed.
- The tables of iptables-nft are nftables' own, so they are changed by netlink, by handle, and as one transaction; an
  expression of iptables' (xt) need not be understood for that.
- iptables-legacy can only be asked by its program; only where /proc says that the table is in use.

Sources: include/uapi/linux/netfilter/nf_tables.h; containernetworking/plugins v1.1.1 to v1.9.1.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from kernel import legacy, link
from kernel.errors import Busy, KernelError, NotFound
from kernel.netlink import Message, attr, attribute_list, attributes, string, text
from kernel.session import Session

AnyAddress = IPv4Address | IPv6Address

_MASQUERADE_TABLE, _MASQUERADE_CHAIN = "cni_plugins_masquerade", "masq_checks"
_HOSTPORT_TABLE = "cni_hostport"
_HOSTPORT_CHAINS = ("hostports", "hostip_hostports", "masquerading")
_FORWARD = "CNI-FORWARD"
_ISOLATION = ("CNI-ISOLATION-STAGE-1", "CNI-ISOLATION-STAGE-2")
_CHAIN_LENGTH = 28
# How a jump's comment names its attachment: ipMasq has nothing in front, portmap `dnat ` and, long ago, `snat `.
_COMMENT = re.compile(rb'(?:[ds]nat )?name: "([\w.-]+)" id: "([\w.-]+)"', re.ASCII)
_SPOOF = "macspoofchk-"

_FAMILIES = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
_VERSIONS = {"ip": 4, "ip6": 6}  # of iptables' families
_NAMES = {number: name for name, number in _FAMILIES.items()}
_SUBSYSTEM = 10 << 8
_GETTABLE, _GETCHAIN, _DELCHAIN, _GETRULE, _DELRULE = (_SUBSYSTEM | number for number in (1, 4, 5, 7, 8))
_BATCH_BEGIN, _BATCH_END = 16, 17
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 3, 4, 7
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_ACCEPT = 1
_HEADER = struct.Struct(">BBH")
_BATCH_BODY = _HEADER.pack(0, 0, 10)
_TRIES = 5
# A kernel without nftables, or without this part of it, has nothing of it either.
_NO_NFTABLES = (errno.EINVAL, errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose things."""

    network: str
    container_id: str
    ifname: str


@dataclass(frozen=True, slots=True)
class _Rule:
    handle: int
    chain: str
    raw: bytes  # the whole of it, as the kernel sent it
    expressions: tuple[tuple[str, dict[int, bytes]], ...]
    comment: str  # nftables' own; iptables' is a match

    @property
    def leads_to(self) -> str:
        """The chain that it jumps to, or ""."""
        for name, data in self.expressions:
            if name == "immediate":
                verdict = attributes(attributes(data.get(2, b"")).get(_DATA_VERDICT, b""))
                return text(verdict.get(_VERDICT_CHAIN))
        return ""

    @property
    def accepts(self) -> bool:
        name, data = self.expressions[-1] if self.expressions else ("", {})
        verdict = attributes(attributes(data.get(2, b"")).get(_DATA_VERDICT, b"")) if name == "immediate" else {}
        return int.from_bytes(verdict.get(_VERDICT_CODE, b""), "big") == _ACCEPT

    def interfaces(self) -> set[str]:
        """The names that it compares the packet's interfaces with."""
        found, meta = set(), False
        for name, data in self.expressions:
            if name == "cmp" and meta:
                found.add(text(attributes(data.get(3, b"")).get(_DATA_VALUE)))
            meta = name == "meta" and int.from_bytes(data.get(2, b""), "big") in (6, 7)  # IIFNAME, OIFNAME
        return found


def chain_name(network: str, container_id: str, prefix: str = "") -> str:
    """The chain of an attachment in iptables' table nat. `prefix` is portmap's "DN-" or "SN-", "" for ipMasq."""
    return f"CNI-{prefix}{_digest(network + container_id)}"[:_CHAIN_LENGTH]


def _digest(what: str) -> str:
    return hashlib.sha512(what.encode()).hexdigest()


def _mark(owner: Owner) -> str:
    """The beginning of the comment of an attachment's rules for ipMasq in nftables."""
    return f"{_digest(owner.network)[:16]}-{_digest(f'{owner.ifname}:{owner.container_id}')[:16]}"


# What an attachment has


def remove_masquerade(session: Session, owner: Owner) -> None:
    """Take back ipMasq of bridge and ptp.

    Raises:
        KernelError: the kernel, or iptables-legacy, refused.
    """
    tables = _tables(session)
    name = chain_name(owner.network, owner.container_id)
    for family in ("ip", "ip6"):
        if (family, "nat") in tables:
            _remove_chains(session, family, "nat", [name], "POSTROUTING")
        _remove_legacy_chains(family, {name: "POSTROUTING"})
    if ("inet", _MASQUERADE_TABLE) in tables:
        mark = _mark(owner)
        _remove_rules(
            session, "inet", _MASQUERADE_TABLE, [_MASQUERADE_CHAIN], lambda rule: rule.comment.startswith(mark)
        )


def remove_spoof_check(session: Session, owner: Owner) -> None:
    """Take back macspoofchk of bridge.

    Raises:
        KernelError: the kernel refused.
    """
    if ("bridge", "nat") in _tables(session):
        _remove_spoof_check(session, f"{owner.container_id}-{owner.ifname}")


def _remove_spoof_check(session: Session, name: str) -> None:
    # The second is called by the first alone.
    _remove_chains(session, "bridge", "nat", [f"cni-br-iface-{name}", f"cni-br-iface-{name}-mac"], "PREROUTING")


def remove_published(session: Session, owner: Owner) -> None:
    """Take back portmap. In nftables its rules name the container alone, so those of its other networks go as well, as
    with the reference.

    Raises:
        KernelError: the kernel, or iptables-legacy, refused.
    """
    tables = _tables(session)
    chains = {
        chain_name(owner.network, owner.container_id, prefix): caller
        for prefix, caller in (("DN-", "CNI-HOSTPORT-DNAT"), ("SN-", "CNI-HOSTPORT-SNAT"))
    }
    for family in ("ip", "ip6"):
        for name, caller in chains.items() if (family, "nat") in tables else ():
            _remove_chains(session, family, "nat", [name], caller)
        _remove_legacy_chains(family, chains)
        if (family, _HOSTPORT_TABLE) in tables:
            _remove_rules(
                session, family, _HOSTPORT_TABLE, _HOSTPORT_CHAINS, lambda rule: rule.comment == owner.container_id
            )


def remove_accepted(session: Session, addresses: Iterable[AnyAddress]) -> None:
    """Take back what firewall accepts from and to a container's addresses.

    Raises:
        KernelError: the kernel, or iptables-legacy, refused.
    """
    wanted = set(addresses)
    if not wanted:
        return
    tables = _tables(session)
    for family, version in (("ip", 4), ("ip6", 6)):
        own = {address for address in wanted if address.version == version}
        if own and (family, "filter") in tables:
            _remove_rules(session, family, "filter", [_FORWARD], functools.partial(_is_about, {a.packed for a in own}))
        if own:
            _remove_legacy_accepted(family, own)


def _is_about(addresses: Collection[bytes], rule: _Rule) -> bool:
    """Whether this is `-s address -j ACCEPT` or `-d address -m conntrack --ctstate ... -j ACCEPT`."""
    if not rule.accepts or [name for name, _ in rule.expressions[:2]] != ["payload", "cmp"]:
        return False
    load, compare = (data for _, data in rule.expressions[:2])
    base, offset = (int.from_bytes(load.get(number, b""), "big") for number in (2, 3))
    equal = not int.from_bytes(compare.get(2, b""), "big")
    value = attributes(compare.get(3, b"")).get(_DATA_VALUE, b"")
    # The network header's source and destination (IPv4: 12, 16; IPv6: 8, 24).
    return base == 1 and equal and value in addresses and offset in ((12, 16) if len(value) == 4 else (8, 24))


# What those have that the runtime does not know any more


def collect_masquerade(session: Session, network: str, valid: Collection[tuple[str, str]]) -> None:
    """Take back ipMasq of this network's attachments that are not in the list, of (container id, ifname).

    Raises:
        KernelError: the kernel refused.
    """
    tables = _tables(session)
    containers = {container_id for container_id, _ in valid}
    _collect_chains(session, tables, network, containers, "POSTROUTING", ("",))
    if ("inet", _MASQUERADE_TABLE) in tables:
        own = f"{_digest(network)[:16]}-"
        kept = tuple(_mark(Owner(network, container_id, ifname)) for container_id, ifname in valid)
        _remove_rules(
            session,
            "inet",
            _MASQUERADE_TABLE,
            [_MASQUERADE_CHAIN],
            lambda rule: rule.comment.startswith(own) and not rule.comment.startswith(kept),
        )


def collect_published(session: Session, network: str, valid: Collection[tuple[str, str]]) -> None:
    """The same of portmap, in iptables. Its rules in nftables do not name their network.

    Raises:
        KernelError: the kernel refused.
    """
    tables = _tables(session)
    containers = {container_id for container_id, _ in valid}
    _collect_chains(session, tables, network, containers, "CNI-HOSTPORT-DNAT", ("DN-",))
    _collect_chains(session, tables, network, containers, "CNI-HOSTPORT-SNAT", ("SN-",))


def _collect_chains(
    session: Session,
    tables: Collection[tuple[str, str]],
    network: str,
    valid: Collection[str],
    caller: str,
    prefixes: Iterable[str],
) -> None:
    for family in ("ip", "ip6"):
        if (family, "nat") not in tables:
            continue
        gone = set()
        for rule in _rules(session, family, "nat", caller):
            match = _COMMENT.search(rule.raw)
            if match is None or match[1].decode() != network or (container_id := match[2].decode()) in valid:
                continue
            # Only what has the name that the reference would give it.
            if rule.leads_to in {chain_name(network, container_id, prefix) for prefix in prefixes}:
                gone.add(rule.leads_to)
        for name in sorted(gone):
            _remove_chains(session, family, "nat", [name], caller)


def collect_spoof_checks(session: Session) -> None:
    """Take back macspoofchk of ports that are gone, whatever their network was.

    Raises:
        KernelError: the kernel refused.
    """
    if ("bridge", "nat") not in _tables(session):
        return
    for rule in list(_rules(session, "bridge", "nat", "PREROUTING")):
        ports = rule.interfaces()
        if rule.comment.startswith(_SPOOF) and ports and not any(link.find(session, port) for port in ports):
            _remove_spoof_check(session, rule.comment.removeprefix(_SPOOF))


def collect_isolation(session: Session) -> None:
    """Take back what firewall's ingressPolicy says about bridges that are gone; the reference never does.

    Raises:
        KernelError: the kernel refused.
    """
    tables = _tables(session)

    def is_gone(rule: _Rule) -> bool:
        bridges = rule.interfaces()
        return bool(bridges) and not any(link.find(session, bridge) for bridge in bridges)

    for family in ("ip", "ip6"):
        if (family, "filter") in tables:
            _remove_rules(session, family, "filter", _ISOLATION, is_gone)


# nftables


def _tables(session: Session) -> set[tuple[str, str]]:
    """(family, name) of every table."""
    what = Message(_GETTABLE, 0, _HEADER.pack(0, 0, 0), "list nftables' tables")
    try:
        bodies = list(session.netfilter.dump(what))
    except KernelError as error:
        if error.errno in _NO_NFTABLES:
            return set()
        raise
    return {(_NAMES.get(body[0], ""), text(attributes(body, _HEADER.size).get(_TABLE_NAME))) for body in bodies}


def _exists(session: Session, family: str, table: str, chain: str) -> bool:
    body = _HEADER.pack(_FAMILIES[family], 0, 0) + string(_CHAIN_TABLE, table) + string(_CHAIN_NAME, chain)
    try:
        session.netfilter.get(Message(_GETCHAIN, 0, body, f"look for chain {family} {table} {chain}"))
    except NotFound:
        return False
    return True


def _rules(session: Session, family: str, table: str, chain: str) -> Iterator[_Rule]:
    """The rules of a chain; none where there is none."""
    body = _HEADER.pack(_FAMILIES[family], 0, 0) + string(_RULE_TABLE, table) + string(_RULE_CHAIN, chain)
    try:
        bodies = list(session.netfilter.dump(Message(_GETRULE, 0, body, f"list chain {family} {table} {chain}")))
    except NotFound:
        return
    for one in bodies:
        found = attributes(one, _HEADER.size)
        # Kernels that do not know the filter send more.
        if text(found.get(_RULE_TABLE)) == table and text(found.get(_RULE_CHAIN)) == chain:
            handle = int.from_bytes(found.get(_RULE_HANDLE, b""), "big")
            expressions = tuple(_expressions(found.get(_RULE_EXPRESSIONS, b"")))
            yield _Rule(handle, chain, one, expressions, _comment(found.get(_RULE_USERDATA, b"")))


def _expressions(data: bytes) -> Iterator[tuple[str, dict[int, bytes]]]:
    for _kind, element in attribute_list(data):
        found = attributes(element)
        yield text(found.get(_EXPRESSION_NAME)), attributes(found.get(_EXPRESSION_DATA, b""))


def _comment(userdata: bytes) -> str:
    """Of type, length and value in a row, the value of type 0 (libnftnl, NFTNL_UDATA_RULE_COMMENT)."""
    while len(userdata) >= 2:
        kind, size = userdata[0], userdata[1]
        if kind == 0:
            return text(userdata[2 : 2 + size])
        userdata = userdata[2 + size :]
    return ""


def _remove_chains(session: Session, family: str, table: str, names: Sequence[str], caller: str) -> None:
    """Remove chains of one attachment, and the jumps to the first of them from the chain `caller`."""
    if not any(_exists(session, family, table, name) for name in names):
        return

    def messages() -> list[Message]:
        header = _HEADER.pack(_FAMILIES[family], 0, 0)
        there = [name for name in names if _exists(session, family, table, name)]
        jumps = [rule for rule in _rules(session, family, table, caller) if rule.leads_to in names]
        found = [_deletion(family, table, rule) for rule in jumps]
        for name in there:
            rules = header + string(_RULE_TABLE, table) + string(_RULE_CHAIN, name)
            found.append(Message(_DELRULE, 0, rules, f"empty chain {family} {table} {name}"))
        for name in there:
            chain = header + string(_CHAIN_TABLE, table) + string(_CHAIN_NAME, name)
            found.append(Message(_DELCHAIN, 0, chain, f"remove chain {family} {table} {name}"))
        return found

    try:
        _change(session, messages)
    except Busy:
        # An administrator's rule leads there. Empty it does nothing, and a DEL must not fail for ever.
        _change(session, lambda: [message for message in messages() if message.kind != _DELCHAIN])


def _remove_rules(
    session: Session, family: str, table: str, chains: Iterable[str], unwanted: Callable[[_Rule], bool]
) -> None:
    """Remove the unwanted rules of some chains."""
    _change(
        session,
        lambda: [
            _deletion(family, table, rule)
            for chain in chains
            for rule in _rules(session, family, table, chain)
            if unwanted(rule)
        ],
    )


def _deletion(family: str, table: str, rule: _Rule) -> Message:
    body = _HEADER.pack(_FAMILIES[family], 0, 0) + string(_RULE_TABLE, table) + string(_RULE_CHAIN, rule.chain)
    body += attr(_RULE_HANDLE, rule.handle.to_bytes(8, "big"))
    return Message(_DELRULE, 0, body, f"remove a rule of {family} {table} {rule.chain}")


def _change(session: Session, messages: Callable[[], list[Message]]) -> None:
    """Run the messages as one transaction; where somebody removed something meanwhile, look again."""
    begin = Message(_BATCH_BEGIN, 0, _BATCH_BODY, "begin an nftables batch")
    end = Message(_BATCH_END, 0, _BATCH_BODY, "end an nftables batch")
    failures: list[KernelError] = []
    for _ in range(_TRIES):
        wanted = messages()
        if not wanted:
            return
        failures = [error for error in session.netfilter.transact(begin, wanted, end) if error is not None]
        if not failures:
            return
        if not isinstance(failures[0], NotFound):
            break
    raise failures[0]


# iptables-legacy


def _remove_legacy_chains(family: str, chains: Mapping[str, str]) -> None:
    """Remove chains of table nat, and the jumps to each from the chain that is named with it."""
    if not legacy.in_use(_VERSIONS[family], "nat"):
        return
    listed = _legacy(family, ["-t", "nat", "-S"]).splitlines()
    commands = []
    for name, caller in chains.items():
        if f"-N {name}" in listed:
            jumps = [line for line in listed if line.startswith(f"-A {caller} ") and line.endswith(f" -j {name}")]
            commands += [*(f"-D{line[2:]}" for line in jumps), f"-F {name}", f"-X {name}"]
    if commands:
        try:
            _restore(family, "nat", commands)
        except KernelError:  # as above; iptables does not say which it was
            _restore(family, "nat", [command for command in commands if not command.startswith("-X ")])


def _remove_legacy_accepted(family: str, addresses: Collection[AnyAddress]) -> None:
    if not legacy.in_use(_VERSIONS[family], "filter"):
        return
    listed = _legacy(family, ["-t", "filter", "-S"]).splitlines()
    starts = tuple(
        f"-A {_FORWARD} {way} {address}/{address.max_prefixlen} " for address in addresses for way in ("-s", "-d")
    )
    rules = [line for line in listed if line.startswith(starts) and line.endswith(" -j ACCEPT")]
    if rules:
        _restore(family, "filter", [f"-D{line[2:]}" for line in rules])


def _restore(family: str, table: str, commands: Iterable[str]) -> None:
    """Run commands as one transaction of one table."""
    document = "\n".join([f"*{table}", *commands, "COMMIT", ""])
    _legacy(family, ["--noflush"], "-restore", document)


def _legacy(family: str, arguments: Sequence[str], kind: str = "", stdin: str = "") -> str:
    """Run iptables-legacy, or what `kind` makes of its name; what it prints. An absent one has nothing to say."""
    program = legacy.PROGRAMS[_VERSIONS[family]] + kind
    return legacy.run(program, *arguments, stdin=stdin) if legacy.path_of(program) else ""
