"""Ports of the host: which attachment has published which, and which process listens where.

Rules of this file
- A port that attachments hold has a file, `<run dir>/ports/<protocol>-<port>`, with its holders; more than one where
  each has an address of its own. So to look whether a port is free costs one open(2), however many are published.
- A claim counts only as long as its holder's attachment record wants that very port. Whoever takes ports writes the
  claims first, then its record, both under the lock (`Ports.take`); whoever gives them back removes the record first.
  So what a killed process leaves is a claim without a record, which stands in nobody's way.
- Two claims are in each other's way as two sockets are, bind(2): same family, protocol and port, and the same address
  or one of them every address. Those of one container are not: a runtime publishes its ports by each of its networks.
- A process that listens is found by binding to the port without listening, which costs three system calls, and only
  where that is refused by asking sock_diag(7), which tells a server from a client that happens to have that port.

Sources: include/uapi/linux/inet_diag.h, sock_diag(7), net/ipv4/inet_connection_sock.c (inet_csk_get_port).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

import msgspec

from kernel import netlink
from kernel.errors import NotFound, from_oserror
from kernel.netlink import Message, attributes
from kernel.nft import Element
from kernel.record import Key, Record, Records

_PUBLISHED = ("dnat", "cond")
_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_SEQPACKET}
_SOCK_DIAG = 4
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_LISTEN, _CLOSE = 10, 7  # of a UDP socket that is not connected: TCP_CLOSE
_REQUEST = struct.Struct("=BBBBI")
_SOCKET_ID = struct.Struct(">HH16s16s")
_ANSWER = struct.Struct("=BBBB")
_ONLY_V6 = 11  # INET_DIAG_SKV6ONLY
_NOBODY = (errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the host. `address` is "0.0.0.0" or "::" for all of a family."""

    protocol: str
    number: int
    address: str

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4

    @property
    def everywhere(self) -> bool:
        """Whether it is the port of every address."""
        return self.address in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound

    def meets(self, other: Port) -> bool:
        """Whether one packet could be for both."""
        return (self.protocol, self.number, self.version) == (other.protocol, other.number, other.version) and (
            self.address == other.address or self.everywhere or other.everywhere
        )

    def __str__(self) -> str:
        where = "" if self.everywhere else f" of {self.address}"
        return f"{self.number}/{self.protocol}{where}"


class _Claim(msgspec.Struct, frozen=True, array_like=True):
    address: str
    holder: Key


@dataclass(frozen=True, slots=True)
class _Holder:
    record: Record
    ports: frozenset[Port]


def of_record(record: Record) -> list[Port]:
    """The ports of the host that an attachment publishes: what its elements translate."""
    return [port for element in record.elements if (port := of_element(element)) is not None]


def of_element(element: Element) -> Port | None:
    """The port that an element translates; None for one of another kind."""
    kind, version = element.set[:-1], element.set[-1:]
    if kind in _PUBLISHED:
        address, protocol, number = element.key
    elif kind.removeprefix("any") in _PUBLISHED:
        address = "0.0.0.0" if version == "4" else "::"  # noqa: S104 - what the map without addresses stands for
        protocol, number = element.key
    else:
        return None
    return Port(protocol, int(number), address)


class Ports:
    """The claims of one host, in its run directory. Any number of processes may use them at once."""

    def __init__(self, records: Records) -> None:
        self._directory = os.path.join(records.run_dir, "ports")
        self._lock = os.path.join(records.run_dir, "ports.lock")
        self._records = records

    def take(self, record: Record) -> list[tuple[Port, Record]]:
        """Claim what the record publishes and write the record; or do neither where others hold a part of it.

        Returns:
            Each port that is held, with its holder's record; none where the ports are the record's now.
        """
        wanted = of_record(record)
        with self._locked():
            known: dict[Key, _Holder | None] = {}
            found: list[tuple[Port, Record]] = []
            claims = {}
            for port in wanted:
                path = self._path(port)
                if path not in claims:
                    claims[path] = [one for one in _load(path) if one.holder != record.key]
                for claim in tuple(claims[path]):
                    theirs = Port(port.protocol, port.number, claim.address)
                    if claim.holder.container_id != record.key.container_id and theirs.meets(port):
                        holder = self._holder(claim.holder, theirs, known)
                        if holder is None:
                            claims[path].remove(claim)
                        else:
                            found.append((port, holder))
            if found:
                return found
            for port in wanted:
                claims[self._path(port)].append(_Claim(port.address, record.key))
            if claims:
                self._make_directory()
            for path, entries in claims.items():
                self._store(path, entries, whole=len(entries) > 1)
            self._records.write(record)
            return []

    def release(self, record: Record) -> set[Key]:
        """Give up what the record claimed; to be called when the record is gone.

        Returns:
            Who else of this container claims one of these ports at the same address: its elements may be missing now.
        """
        wanted = of_record(record)
        others: set[Key] = set()
        if not wanted:
            return others
        with self._locked():
            for port in wanted:
                path = self._path(port)
                before = _load(path)
                after = [one for one in before if (one.address, one.holder) != (port.address, record.key)]
                if len(before) != len(after):  # else it had claimed nothing: an ADD that was refused
                    others |= {one.holder for one in after if one.address == port.address}
                    self._store(path, after, whole=True)
        return {key for key in others if self._records.read(key) is not None}

    def prune(self) -> None:
        """Remove the claims that killed processes left. Looks at every claim."""
        with self._locked():
            known: dict[Key, _Holder | None] = {}
            try:
                names = os.listdir(self._directory)
            except FileNotFoundError:
                return
            for name in names:
                path = os.path.join(self._directory, name)
                protocol, _, number = name.partition("-")
                before = _load(path)
                after = []
                for one in before:
                    if number.isdecimal() and self._holder(one.holder, Port(protocol, int(number), one.address), known):
                        after.append(one)
                if len(after) != len(before) or not before:
                    self._store(path, after, whole=True)

    def _holder(self, key: Key, port: Port, known: dict[Key, _Holder | None]) -> Record | None:
        """Its record, if that wants the port."""
        if key not in known:
            record = self._records.read(key)
            known[key] = _Holder(record, frozenset(of_record(record))) if record is not None else None
        holder = known[key]
        return holder.record if holder is not None and port in holder.ports else None

    def _path(self, port: Port) -> str:
        return os.path.join(self._directory, f"{port.protocol}-{port.number}")

    def _make_directory(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._directory, 0o700)

    def _store(self, path: str, claims: Sequence[_Claim], *, whole: bool) -> None:
        """Write or remove a port's file. `whole`, or not at all, where others' claims are in it: one that breaks off is
        read as no claim."""
        if not claims:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        data = msgspec.json.encode(claims)
        temporary = f"{path}~" if whole else path
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.write(fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
            if temporary != path:
                os.rename(temporary, path)
        except OSError as error:
            raise from_oserror(f"claim a port in {path}", error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._lock), 0o755, exist_ok=True)
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _load(path: str) -> list[_Claim]:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=list[_Claim])
    except (OSError, msgspec.MsgspecError):
        return []


# Processes


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket of the host that a published port would take the packets from.

    `inode` names it in /proc/<pid>/fd; `exact` is false where the kernel did not say more than that there is one.
    """

    port: Port
    address: str
    inode: int
    exact: bool = True


def listeners(ports: Iterable[Port]) -> list[Listener]:
    """Who listens at these ports in the calling thread's network namespace; at most one for each.

    A UDP socket counts as listening where it is not connected. A protocol that the kernel lacks has no listeners.
    """
    return [found for port in ports if _is_bound(port) and (found := _ask(port)) is not None]


def _is_bound(port: Port) -> bool:
    """Whether bind(2) says that somebody has it. Nothing is waited for, and no connection is accepted."""
    family = socket.AF_INET if port.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, _KINDS[port.protocol] | socket.SOCK_CLOEXEC, _NUMBERS[port.protocol]) as probe:
            if port.version == 6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port.protocol == "tcp":
                # Spares the question about connections that are being closed. With UDP it would let us share.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((port.address, port.number))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return True
        # No such address here, no IPv6, no SCTP: nobody can listen there.
        if error.errno in (*_NOBODY, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL):
            return False
        raise from_oserror(f"look whether port {port} is free", error) from error
    return False


def _ask(port: Port) -> Listener | None:
    """The socket that listens there, None where all of them are clients'."""
    state = _CLOSE if port.protocol == "udp" else _LISTEN
    try:
        with netlink.Socket(_SOCK_DIAG) as diag:
            for family in (socket.AF_INET, socket.AF_INET6):
                body = _REQUEST.pack(family, _NUMBERS[port.protocol], 0, 0, 1 << state)
                body += _SOCKET_ID.pack(port.number, 0, b"", b"") + bytes(12)
                for answer in diag.dump(Message(_BY_FAMILY, 0, body, f"ask who listens at port {port}")):
                    found = _listener(port, family, answer)
                    if found is not None:
                        return found
    except NotFound:  # this kernel has no inet_diag for the protocol
        return Listener(port, port.address, 0, exact=False)
    return None


def _listener(port: Port, family: int, answer: bytes) -> Listener | None:
    """The socket of an inet_diag_msg, if it is in the port's way."""
    number, _peer_port, source, _peer = _SOCKET_ID.unpack_from(answer, _ANSWER.size)
    if number != port.number:
        return None
    (inode,) = struct.unpack_from("=I", answer, 68)
    if family == socket.AF_INET:
        bound = [ip_address(source[:4])]
    else:
        six = IPv6Address(source)
        only_six = attributes(answer, 72).get(_ONLY_V6, b"\0")[0]
        if six.ipv4_mapped is not None:
            bound = [six.ipv4_mapped]
        else:
            bound = [six] if only_six or not six.is_unspecified else [six, ip_address("0.0.0.0")]  # noqa: S104
    for address in bound:
        if Port(port.protocol, port.number, str(address)).meets(port):
            return Listener(
                port, str(ip_address(source[:4]) if family == socket.AF_INET else IPv6Address(source)), inode
            )
    return None


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has a socket open. `arguments` is its command line."""

    pid: int
    name: str
    arguments: tuple[str, ...]


def owners(inodes: Iterable[int]) -> dict[int, list[Process]]:
    """The processes that have these sockets open, by inode. Looks at every descriptor of every process."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes if inode}
    found: dict[int, list[Process]] = {inode: [] for inode in wanted.values()}
    for pid in os.listdir("/proc") if wanted else ():
        if not pid.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it ended, or hides
            links = {_target(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            for link in links & wanted.keys():
                found[wanted[link]].append(_process(int(pid)))
    return found


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _process(pid: int) -> Process:
    with open(f"/proc/{pid}/comm", "rb") as file:
        name = file.read().decode(errors="replace").strip()
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        arguments = tuple(part.decode(errors="replace") for part in file.read().split(b"\0") if part)
    return Process(pid, name, arguments)
