"""The tuning plugin: sysctls of the container's network namespace, and attributes of its interface.

It acts on the interface of CNI_IFNAME, whatever made it, and on nothing of the host. What an ADD does, in this order
1. validate the whole configuration, and compare the sysctls with the host's allow-list;
2. read what is about to be changed; a sysctl that is not there is refused now;
3. write the attachment record, then the backup: from these DEL and GC know what there was;
4. set the sysctls in one visit, then the attributes in one batch.
A failure restores everything, in reverse.

/proc/sys/net shows the namespace of whoever looks, and a part of a key is neither empty nor `..`, so no key leads out
of it. What the kernel has once for the whole host is not there in a container's, or read-only (net/sysctl_net.c,
ensure_safe_net_sysctl).

Configuration keys, results and backups are those of the reference plugin; differences have a comment that says why.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Annotated

import msgspec

from cni import attachment, config
from cni import check as verify
from cni.chained import chain, tuning_backup
from cni.chained.tuning_backup import Backup, Own, Place
from cni.errors import CniError, Code, shown
from cni.failures import Failures
from cni.interface import container
from cni.living import boot_id
from cni.request import Command, Request
from cni.result import Interface, Result
from cni.undo import Undo
from kernel import leftovers, link, netns, paths, sysctl
from kernel.errors import Denied, KernelError, NotFound
from kernel.link import Link
from kernel.netlink import Message
from kernel.record import Record, Records
from kernel.session import Session, Visit
from telemetry import trace

ALLOWLIST = "/etc/cni/tuning/allowlist.conf"

_NO_SYSCTL = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)

Mtu = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
QueueLength = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class TuningConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `promisc` false leaves the mode as it is."""

    sysctl: dict[str, str] = {}
    mac: str = ""
    mtu: Mtu = 0
    promisc: bool = False
    allmulti: bool | None = None
    tx_q_len: QueueLength | None = None
    data_dir: str = tuning_backup.DATA_DIR


class Arguments(msgspec.Struct, frozen=True, rename="camel"):
    """What args.cni may say instead."""

    sysctl: dict[str, str] | None = None
    mac: str | None = None
    mtu: Mtu | None = None
    promisc: bool | None = None
    allmulti: bool | None = None
    tx_q_len: QueueLength | None = None


class _Args(msgspec.Struct, frozen=True):
    cni: Arguments = Arguments()


class _Whole(TuningConf, frozen=True):
    args: _Args = _Args()


class Sysctl(msgspec.Struct, frozen=True):
    """A sysctl that is asked for.

    Attributes:
        key: as it was written, which is what the allow-list is about.
        at: the object that it stands in, "sysctl" or "args.cni.sysctl".
        parts: where it is below /proc/sys/net.
        value: what it is to be.
    """

    key: str
    at: str
    parts: tuple[str, ...]
    value: str

    def refused(self, reason: str) -> CniError:
        """The error for it."""
        return config.refused(f"{self.at}[{config.found(self.key, 120)}]", self.value, reason)


class Wishes(msgspec.Struct, frozen=True):
    """The configuration with everything taken into account. An attribute at its default is left as it is.

    `overridden` are the keys whose value is args.cni's.
    """

    data_dir: str
    sysctls: tuple[Sysctl, ...]
    mac: str
    mtu: int
    promisc: bool
    allmulti: bool | None
    tx_q_len: int | None
    overridden: frozenset[str]

    @property
    def of_link(self) -> bool:
        """Whether the interface is to be changed."""
        return bool(self.mac or self.mtu or self.promisc or self.allmulti is not None or self.tx_q_len is not None)

    def refused(self, key: str, value: object, reason: str) -> CniError:
        """The error for an attribute."""
        return config.refused(f"args.cni.{key}" if key in self.overridden else key, value, reason)


_ATTRIBUTES = {"mtu": "mtu", "promisc": "promisc", "allmulti": "allmulti", "tx_q_len": "txQLen"}


def parse(request: Request) -> Wishes:
    """The configuration, checked as far as it can be without the kernel.

    Precedence is the reference's: args.cni, then the capability `mac`, then CNI_ARGS, then the keys.

    Raises:
        CniError: 4 or 7, naming key and value.
    """
    conf = config.convert(request.config, _Whole)
    arguments = conf.args.cni
    mac, where = _wanted_mac(request, conf)
    given = {name: value for name in _ATTRIBUTES if (value := getattr(arguments, name)) is not None}
    conf = msgspec.structs.replace(conf, **given)
    if conf.data_dir and not _is_usable(conf.data_dir):
        raise config.refused("dataDir", conf.data_dir, "want an absolute path")
    return Wishes(
        data_dir=conf.data_dir or tuning_backup.DATA_DIR,
        sysctls=_wanted_sysctls(request, conf),
        mac=container.usable_mac(mac, where) if mac else "",
        mtu=conf.mtu,
        promisc=conf.promisc,
        allmulti=conf.allmulti,
        tx_q_len=conf.tx_q_len,
        overridden=frozenset(_ATTRIBUTES[name] for name in given),
    )


def _wanted_mac(request: Request, conf: _Whole) -> tuple[str, str]:
    """The MAC and where it stands; "" where none is asked for. An empty one in args.cni takes the others away."""
    if conf.args.cni.mac is not None:
        request.arguments("MAC", "IP", "GATEWAY")
        return conf.args.cni.mac, "$.args.cni.mac"
    mac, where = request.mac("IP", "GATEWAY")  # those two are the IPAM plugin's
    return (mac, where) if mac else (conf.mac, "$.mac")


# Sysctls


def _wanted_sysctls(request: Request, conf: _Whole) -> tuple[Sysctl, ...]:
    """In the configuration's order: one may be what makes the next possible.

    Raises:
        CniError: 7, a key that is none, or two values for one sysctl.
    """
    if conf.sysctl and request.command is Command.ADD:
        _refuse_duplicates(request.stdin)
    found: dict[tuple[str, ...], Sysctl] = {}
    for key, value in conf.sysctl.items():
        one = _sysctl(key, value, "sysctl", request.ifname)
        other = found.setdefault(one.parts, one)
        if other.value != value:
            # The reference sets both, in random order.
            raise one.refused(f"want one value, {config.found(other.key, 120)} is the same sysctl")
    for key, value in (conf.args.cni.sysctl or {}).items():
        one = _sysctl(key, value, "args.cni.sysctl", request.ifname)
        found[one.parts] = one
    return tuple(found.values())


def _sysctl(key: str, value: str, at: str, ifname: str) -> Sysctl:
    # As the reference reads it: a dot is a slash, but for those of the interface's name.
    path = key.replace(".", "/").replace("IFNAME", ifname or "IFNAME", 1)
    parts = tuple(part for part in path.split("/") if part)
    one = Sysctl(key, at, parts[1:], value)
    if len(parts) < 2 or parts[0] != "net" or not path.isprintable():
        raise one.refused("want a key below net, such as net.ipv4.conf.IFNAME.arp_notify")
    return one


def _refuse_duplicates(stdin: bytes) -> None:
    """Refuse a key that stands twice; decoding has kept the last one only.

    Raises:
        CniError: 7.
    """
    seen = set()
    for key in _KEYS.findall(msgspec.json.decode(stdin, type=_RawSysctls).sysctl):
        text = msgspec.json.decode(key, type=str)
        if text in seen:
            # The reference's words.
            raise config.refused("sysctl", text, "duplicated sysctl keys are not allowed")
        seen.add(text)


class _RawSysctls(msgspec.Struct):
    sysctl: msgspec.Raw = msgspec.Raw(b"{}")


# The values are strings: what a colon follows is a key.
_KEYS = re.compile(rb'("(?:[^"\\]|\\.)*")\s*:')


def _refuse_forbidden(sysctls: tuple[Sysctl, ...]) -> None:
    """Compare with the host's allow-list, where it has one: regular expressions, one a line, found anywhere in the key.

    Raises:
        CniError: 7.
    """
    if not sysctls:
        return
    try:
        with open(ALLOWLIST, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        return
    except OSError as error:
        raise CniError(Code.INVALID_CONFIG, f"cannot read {ALLOWLIST}: {error.strerror or error}") from error
    allowed = [_expression(line, number) for number, line in enumerate(lines, 1) if line]
    for one in sysctls:
        if not any(expression.search(one.key) for expression in allowed):
            raise one.refused(f"the host allows only what {ALLOWLIST} has")


def _expression(line: str, number: int) -> re.Pattern[str]:
    """A line of the allow-list. What Go understands and Python takes for something else is refused."""
    reason = "no POSIX classes, write [a-z]" if "[[:" in line else ""
    try:
        if not reason:
            return re.compile(line, re.ASCII)
    except re.error as error:
        reason = str(error)
    raise CniError(
        Code.INVALID_CONFIG,
        f"{ALLOWLIST}: line {number}: want a regular expression, found {config.found(line)}",
        reason,
    )


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Set what is asked for.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    wishes = parse(request)
    result = chain.previous(request)
    _refuse_forbidden(wishes.sysctls)
    if not wishes.of_link and not wishes.sysctls:
        return result
    path = tuning_backup.path_of(wishes.data_dir, request.container_id, request.ifname)
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        place = Place(boot_id(), sandbox.identity.inode, inside.cookie, 0)
        _make_up_for_a_missed_del(request, host, records, inside, place, path)
        eth = link.find(inside, request.ifname)
        if eth is None and wishes.of_link:
            raise _no_interface(request.ifname)
        place = msgspec.structs.replace(place, ifindex=eth.index if eth else 0)
        old = Own(place, request.began_ns, _read_sysctls(inside, wishes))
        backup = _backup(wishes, eth, old)
        record = Record(
            attachment.key(request),
            netns=request.netns,
            netns_inode=place.netns_inode,
            netns_cookie=place.netns_cookie,
            files=(path,),
        )
        attachment.write_record(host, records, record, undo)
        undo.push("restore what tuning changed", lambda: _undo(request, host, backup, path))
        tuning_backup.write(path, backup)
        _write_sysctls(inside, wishes)
        if eth is not None:
            _change(inside, wishes, eth)
    return _updated(result, request.ifname, wishes)


def _no_interface(ifname: str) -> CniError:
    return CniError(
        Code.INVALID_ENVIRONMENT,
        f"CNI_IFNAME {ifname}: the container has no interface of that name",
        "put tuning after the plugin that makes it, in the `plugins` of a .conflist",
    )


def _make_up_for_a_missed_del(
    request: Request, host: Session, records: Records, inside: Visit, place: Place, path: str
) -> None:
    """Restore what an earlier ADD of this attachment changed in this very namespace, and forget it; what belongs to an
    earlier container is forgotten only."""
    record = records.read(attachment.key(request))
    with Failures() as failures:
        for one in dict.fromkeys((*(record.files if record else ()), path)):
            backup = tuning_backup.read(one)
            if backup is not None and backup.netloom is not None and backup.netloom.place.same_netns(place):
                failures.attempt(_restore, request, inside, backup, one)
            failures.attempt(tuning_backup.remove, one)
        if record is not None:
            failures.attempt(leftovers.discard, host, records, record)


def _backup(wishes: Wishes, eth: Link | None, own: Own) -> Backup:
    if eth is None:
        return Backup(netloom=own)
    return Backup(
        mac=eth.mac if wishes.mac else "",
        promisc=eth.promiscuous if wishes.promisc else None,
        mtu=eth.mtu if wishes.mtu else 0,
        allmulti=None if wishes.allmulti is None else eth.all_multicast,
        tx_q_len=None if wishes.tx_q_len is None else eth.tx_queue_length,
        netloom=own,
    )


def _read_sysctls(inside: Visit, wishes: Wishes) -> dict[str, str]:
    """The values that there are, by path. What can only be written, such as net.ipv4.route.flush, has none.

    Raises:
        CniError: 7, one is not there.
    """
    values = {}
    if wishes.sysctls:
        with inside.inside():
            for one in wishes.sysctls:
                try:
                    values["/".join(one.parts)] = sysctl.read(*one.parts)
                except KernelError as error:
                    if isinstance(error, NotFound) or error.errno in _NO_SYSCTL:
                        raise _not_there(one) from error
                    # What can only be written, or IPv6's secret as long as it has none.
                    if not isinstance(error, Denied) and one.parts[-1] != "stable_secret":
                        raise
    return values


@trace.step("sysctls")
def _write_sysctls(inside: Visit, wishes: Wishes) -> None:
    if wishes.sysctls:
        with inside.inside():
            for one in wishes.sysctls:
                try:
                    _write(one.value, one.parts)
                except NotFound as error:
                    raise _not_there(one) from error
                except Denied as error:
                    raise one.refused("want a sysctl that a network namespace has of its own") from error
                except KernelError as error:
                    raise one.refused(f"was refused by the kernel ({error})") from error


def _write(value: str, parts: tuple[str, ...]) -> None:
    # Nothing at all would leave a list such as ip_local_reserved_ports as it is; a line end empties it.
    sysctl.write(value or "\n", *parts)


def _not_there(one: Sysctl) -> CniError:
    where = shown(f"/proc/sys/net/{'/'.join(one.parts)}")
    return one.refused(f"want a sysctl that the container's network namespace has, and there is no {where}")


def _changes(wishes: Wishes, eth: Link) -> Iterator[tuple[str, object, Message]]:
    """Key, value and request of each attribute, in the reference's order."""
    if wishes.mac:
        yield "mac", wishes.mac, link.mac_message(eth.index, wishes.mac)
    if wishes.promisc:
        yield "promisc", True, link.promiscuous_message(eth.index, on=True)
    if wishes.mtu:
        yield "mtu", wishes.mtu, link.mtu_message(eth.index, wishes.mtu)
    if wishes.allmulti is not None:
        yield "allmulti", wishes.allmulti, link.all_multicast_message(eth.index, wishes.allmulti)
    if wishes.tx_q_len is not None:
        yield "txQLen", wishes.tx_q_len, link.tx_queue_message(eth.index, wishes.tx_q_len)


@trace.step("link")
def _change(inside: Visit, wishes: Wishes, eth: Link) -> None:
    """Set the interface's attributes.

    Raises:
        CniError: 7, the kernel refused one.
    """
    changes = list(_changes(wishes, eth))
    if not changes:
        return
    refusals = inside.rtnl.attempt([message for _, _, message in changes])
    for (key, value, _), error in zip(changes, refusals, strict=True):
        if error is not None:
            raise wishes.refused(key, value, f"was refused by the kernel for {eth.name} ({error})") from error


def _updated(result: Result, ifname: str, wishes: Wishes) -> Result:
    """The result with the MAC as it is now, and the MTU where a plugin before this one named it."""

    def update(interface: Interface) -> Interface:
        if interface.name != ifname or not interface.sandbox:
            return interface
        mtu = wishes.mtu if wishes.mtu and interface.mtu else interface.mtu
        return msgspec.structs.replace(interface, mac=wishes.mac or interface.mac, mtu=mtu)

    return msgspec.structs.replace(result, interfaces=tuple(update(interface) for interface in result.interfaces))


# Restoring


def _undo(request: Request, host: Session, backup: Backup, path: str) -> None:
    """Restore everything. Where that fails the backup stays, for the DEL that follows a failed ADD."""
    _restore_at(request, host, backup)
    tuning_backup.remove(path)


def _restore_at(request: Request, host: Session, backup: Backup, path: str = "") -> None:
    """Restore in the request's namespace, where that is still there and the backup is about it; then remove the file
    `path`, if one is given."""
    try:
        with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
            own = backup.netloom
            here = Place(boot_id(), sandbox.identity.inode, inside.cookie, 0)
            if own is None or own.place.same_netns(here):
                _restore(request, inside, backup, path)
    except (NotFound, netns.NotANamespace):
        return


def _restore(request: Request, inside: Visit, backup: Backup, path: str) -> None:
    """Put back what differs from the backup. All is attempted; raises the first failure.

    Args:
        request: whose.
        inside: the namespace that the backup is about.
        backup: what there was.
        path: on DEL the backup's, which is removed whatever fails: the next DEL must not fail for the same reason. ""
            in an undo.
    """
    own = backup.netloom
    eth = link.find(inside, request.ifname)
    if own is not None and eth is not None and own.place.ifindex != eth.index:
        eth = None  # another one under its name
    with Failures() as failures:
        if eth is not None:
            # Before the sysctls: below an MTU of 1280 an interface has none of IPv6.
            messages = list(_reversions(backup, eth))
            if messages:
                failures.attempt(inside.rtnl.execute, messages)
        if own is not None and own.sysctls:
            values = own.sysctls
            if path:
                values = _without_heirs(request, inside, own, failures)
            with inside.inside():
                for name, value in reversed(values.items()):
                    if eth is not None or not _is_of(name, request.ifname):
                        failures.attempt(_restore_sysctl, value, tuple(name.split("/")))
        if path:
            failures.attempt(tuning_backup.remove, path)


def _is_of(name: str, ifname: str) -> bool:
    """Whether a sysctl is one of an interface."""
    return ifname in name.split("/")


def _reversions(backup: Backup, eth: Link) -> Iterator[Message]:
    if backup.mtu and backup.mtu != eth.mtu:
        yield link.mtu_message(eth.index, backup.mtu)
    if backup.mac and backup.mac != eth.mac:
        yield link.mac_message(eth.index, backup.mac)
    if backup.promisc is not None and backup.promisc != eth.promiscuous:
        yield link.promiscuous_message(eth.index, backup.promisc)
    if backup.allmulti is not None and backup.allmulti != eth.all_multicast:
        yield link.all_multicast_message(eth.index, backup.allmulti)
    if backup.tx_q_len is not None and backup.tx_q_len != eth.tx_queue_length:
        yield link.tx_queue_message(eth.index, backup.tx_q_len)


def _restore_sysctl(value: str, parts: tuple[str, ...]) -> None:
    try:
        if sysctl.read(*parts) != value:
            _write(value, parts)
    except NotFound:
        return  # the interface went, and its sysctls with it


def _without_heirs(request: Request, inside: Visit, own: Own, failures: Failures) -> dict[str, str]:
    """The old values that are to be set now.

    Where another attachment of the container has set one of the namespace's sysctls after this one, its value stays,
    and ours becomes what its DEL restores.
    """
    shared = {name: value for name, value in own.sysctls.items() if not _is_of(name, request.ifname)}
    if not shared:
        return own.sysctls
    left = dict(own.sysctls)
    for path, heir, theirs in _later(request, inside, own):
        inherited = {name: value for name, value in shared.items() if name in theirs.sysctls and name in left}
        if inherited:
            longer = msgspec.structs.replace(theirs, sysctls={**theirs.sysctls, **inherited})
            failures.attempt(tuning_backup.replace, path, msgspec.structs.replace(heir, netloom=longer))
            for name in inherited:
                del left[name]
    return left


def _later(request: Request, inside: Visit, own: Own) -> list[tuple[str, Backup, Own]]:
    """The backups of the container's other attachments that came after this one, the oldest first."""
    found = []
    directory = _data_dir(request)
    for one in link.all_links(inside):
        path = tuning_backup.path_of(directory, request.container_id, one.name)
        backup = tuning_backup.read(path) if one.name != request.ifname else None
        theirs = backup.netloom if backup is not None else None
        if backup is None or theirs is None:
            continue
        if theirs.place.same_netns(own.place) and theirs.began_ns > own.began_ns:
            found.append((path, backup, theirs))
    return sorted(found, key=lambda one: one[2].began_ns)


# DEL


def delete(request: Request, host: Session) -> None:
    """Restore what ADD changed; success where there is nothing left to do. Needs no valid configuration.

    What the kernel refuses is reported once: the next DEL finds no backup and succeeds.
    """
    records = Records(paths.run_dir(request.environment))
    record = records.read(attachment.key(request))
    usual = tuning_backup.path_of(_data_dir(request), request.container_id, request.ifname)
    backups = list(dict.fromkeys((*(record.files if record else ()), usual)))
    with Failures() as failures:
        for path in backups:
            failures.attempt(_take_back, request, host, path)
        # While a backup is left, the record says so.
        if record is not None and not any(os.path.lexists(path) for path in backups):
            failures.attempt(records.remove, host, record)


def _take_back(request: Request, host: Session, path: str) -> None:
    backup = tuning_backup.read(path)
    if backup is not None and request.netns:
        _restore_at(request, host, backup, path)
    tuning_backup.remove(path)


def _data_dir(request: Request) -> str:
    """The directory of the backups, also where the configuration is wrong."""
    directory = request.config.get("dataDir")
    return directory if isinstance(directory, str) and _is_usable(directory) else tuning_backup.DATA_DIR


def _is_usable(directory: str) -> bool:
    return directory.startswith("/") and "\0" not in directory


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify that everything is as ADD set it.

    Raises:
        CniError: names the first thing that is not.
    """
    wishes = parse(request)
    verify.required_result(request)
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        if wishes.sysctls:
            with inside.inside():
                for one in wishes.sysctls:
                    _check_sysctl(one)
        if wishes.of_link:
            eth = link.find(inside, request.ifname)
            if eth is None:
                raise verify.broken(f"interface {request.ifname} is gone from the container")
            _check_link(eth, wishes)


def _check_sysctl(one: Sysctl) -> None:
    name = f"sysctl net.{'.'.join(one.parts)}"
    try:
        found = sysctl.read(*one.parts)
    except NotFound as error:
        raise verify.broken(f"{name} is gone") from error
    except Denied:
        return  # it can only be written
    # The kernel puts tabs between numbers.
    if found.split() != one.value.split():
        raise verify.broken(f"{name} is {config.found(found)}, not {config.found(one.value)}")


def _check_link(eth: Link, wishes: Wishes) -> None:
    wanted: list[tuple[str, object, object]] = []
    if wishes.mac:
        wanted.append(("mac", wishes.mac, eth.mac))
    if wishes.promisc:
        wanted.append(("promisc", True, eth.promiscuous))
    if wishes.mtu:
        wanted.append(("mtu", wishes.mtu, eth.mtu))
    if wishes.allmulti is not None:
        wanted.append(("allmulti", wishes.allmulti, eth.all_multicast))
    if wishes.tx_q_len is not None:
        wanted.append(("txQLen", wishes.tx_q_len, eth.tx_queue_length))
    for key, value, found in wanted:
        if value != found:
            raise verify.broken(f"{key} of {eth.name} is {config.found(found)}, not {config.found(value)}")


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove the backups of attachments that the runtime does not know any more. What they say is gone with their
    namespaces."""
    with Failures() as failures:
        attachment.collect(request, host, failures)


def status(request: Request, host: Session) -> None:  # noqa: ARG001 - the signature is cni.skel.Plugin's
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, the host does not allow what is asked for.
    """
    wishes = parse(request)
    try:
        _refuse_forbidden(wishes.sysctls)
    except CniError as error:
        raise CniError(Code.NOT_AVAILABLE, error.msg, error.details) from error
