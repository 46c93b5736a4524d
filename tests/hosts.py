"""A host: a private network and mount namespace with fixed paths of its own. What the kernel tests and the demo run in.

Rules of this file
- Nothing touches the machine's own links, routes, firewall or fixed paths. A mount point that the machine lacks is made
  on an overlay that only the host sees.
- The namespaces live as long as the two descriptors that this process holds: whatever ends the process, SIGKILL too,
  ends them, with all that was mounted and created inside.
- What can outlive a killed process: its scratch directory, and daemons between two system calls. `sweep` removes both,
  and only those whose owner (process id, start time, boot) is provably dead.
- Teardown collects every error, never stops at the first, and signals by process id only what lives in this host.

A path inside a host is written as the programs see it (`/run/netloom/ipamd.sock`); `Host.path` says where this process
finds the same file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from tests.nft_list import ruleset

_T = TypeVar("_T")
ROOT = Path(__file__).resolve().parent.parent
IPV6 = os.environ.get("NETLOOM_NO_IPV6", "") != "1"
# Generous: a loaded machine with two cores, or one that emulates its processor.
PATIENCE_S = float(os.environ.get("NETLOOM_PATIENCE_S", "60"))
CNI_BIN = "/opt/cni/bin"
PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLONE_NEWNET = 0x40000000  # linux/sched.h
_LIBC = ctypes.CDLL(None, use_errno=True)
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# Short, because the path of a unix socket ends after 107 bytes. Tests of sweeping need a place that nobody else sweeps.
_DISK, _MEMORY = os.environ.get("NETLOOM_SCRATCH", "/tmp"), "/dev/shm"
# The host's own. All of /run, so that locks and sockets of other programs are apart too.
_FIXED = ("/run", "/var/lib/netloom", "/etc/netloom", "/opt/cni/bin", "/etc/cni/net.d", "/var/lib/cni")

# Runs as `unshare`d shell. "$1" is the host's directory; its fs/ holds what is bound over the fixed paths. A mount
# point that the machine lacks: an overlay over the nearest directory above it that exists, with its upper layer on a
# tmpfs of this namespace, as an upper layer cannot lie on another overlay. What is mounted below that directory would
# be hidden and is bound again. Only a kernel without overlayfs gets the mount point really made.
_SET_UP = r"""
set -eu
dir=$1
shift
covered=
cover() {
    above=$1
    while [ ! -d "$above" ]; do above=$(dirname "$above"); done
    if [ -z "$covered" ]; then mount -t tmpfs -o mode=755 netloom "$dir/cover"; covered=1; fi
    layer=$dir/cover/$(echo "$above" | tr / _)
    if [ ! -e "$layer" ]; then
        mkdir "$layer" "$layer/upper" "$layer/work" "$layer/lower"
        chmod 755 "$layer/upper"
        below=$(cut -d " " -f 5 /proc/self/mountinfo | grep "^$above/" || true)
        if [ -n "$below" ]; then mount --rbind "$above" "$layer/lower"; fi
        if mount -t overlay -o "lowerdir=$above,upperdir=$layer/upper,workdir=$layer/work" netloom "$above"; then
            echo "$below" | while read -r escaped; do
                [ -n "$escaped" ] || continue
                point=$(printf %b "$escaped")
                mount --rbind "$layer/lower${point#"$above"}" "$point"
            done
        fi
    fi
    mkdir -p "$1"
}
for path; do
    [ -d "$path" ] || cover "$path"
    mount --bind "$dir/fs$path" "$path"
done
[ "$(readlink -f /var/run)" = /run ] || mount --bind /run /var/run
ip link set lo up
echo ready
read -r _ || true
"""


class HostError(AssertionError):
    """The harness could not do its work, or found what should not be there; the text says what."""


# What the first request on a host makes and every later one uses; what is in the directories counts.
_FURNITURE = frozenset(
    (
        *(f"/run/netloom/{name}" for name in ("attachments", "attachments.lock", "locks", "shared")),
        *(f"/run/netloom/{name}" for name in ("ports", "ports.lock")),
        *(f"/run/netloom/{name}" for name in ("trace", "trace/requests", "trace/requests.1")),
        "/run/cni/tuning",
    )
)


@dataclass(frozen=True, slots=True)
class CniCall:
    """What one execution of a plugin gave back. `json` is None when stdout is not JSON."""

    verb: str
    status: int
    stdout: str
    stderr: str
    json: Any
    took_s: float

    def result(self) -> dict[str, Any]:
        """The printed object of a call that had to succeed. Raises HostError with all that was printed otherwise."""
        self.ok()
        if not isinstance(self.json, dict):
            raise HostError(f"{self.verb}: wanted a JSON object on stdout, found {self.stdout!r}")
        return self.json

    def ok(self) -> None:
        """Raises HostError with all that was printed unless the plugin exited 0."""
        if self.status != 0:
            raise HostError(f"{self.verb} exited {self.status}\nstdout: {self.stdout}\nstderr: {self.stderr}")

    def code(self) -> int:
        """The CNI error code of a call that had to fail. Raises HostError unless it printed a CNI error."""
        if self.status == 0 or not isinstance(self.json, dict) or not isinstance(self.json.get("code"), int):
            raise HostError(f"{self.verb}: wanted a CNI error, found {self}")
        return int(self.json["code"])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a host that an attachment may change, in comparable form: lines, one for each fact."""

    facts: frozenset[str]

    def minus(self, other: Snapshot) -> list[str]:
        return sorted(self.facts - other.facts)


class Netns:
    """A container's namespace, named under the host's /run/netns."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        self.path = f"/run/netns/{name}"

    def command(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """As `Host.run`, inside the container's network namespace (mounts are the host's)."""
        return self.host.run(self.command(argv), **options)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return self.host.popen(self.command(argv), **options)

    def links(self) -> dict[str, dict[str, Any]]:
        return self.host.links(self)

    def addresses(self) -> dict[str, list[str]]:
        return self.host.addresses(self)

    def routes(self) -> list[dict[str, Any]]:
        return self.host.routes(self)

    def ping(self, target: str, limit_s: float = PATIENCE_S) -> float:
        """Round trip to a numeric address in milliseconds; asks again until answered. Raises HostError at the limit."""
        return self.host.ping(target, limit_s, self)

    def delete(self) -> None:
        """As a runtime does it, also when the namespace is gone already."""
        self.host.run(["ip", "netns", "delete", self.name], check=False)


class Ipamd:
    """ipamd as a process of a host. Its output goes to `log()`."""

    def __init__(self, host: Host, config: Mapping[str, Mapping[str, object]]) -> None:
        self.host = host
        self.socket = str(config.get("ipamd", {}).get("socket", "/run/netloom/ipamd.sock"))
        self._log = host.directory / "ipamd.log"
        self._process: subprocess.Popen[str] | None = None
        self.env: dict[str, str] = {}  # beyond this process' own
        host.path("/etc/netloom/netloom.toml").write_text(_toml(config), encoding="utf-8")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise HostError("ipamd does not run")
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Returns once the health service says SERVING. Raises HostError with the log when it ends before."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Returns at once."""
        argv = [sys.executable, "-m", "ipamd", "--config", "/etc/netloom/netloom.toml"]
        env = {**os.environ, **self.env} if self.env else None
        with self._log.open("a", encoding="utf-8") as log:
            self._process = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    def wait(self) -> None:
        """Until it serves."""
        wait_until(self._serving, "ipamd serving", lambda: self.log()[-4000:])

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: no chance to finish anything."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise HostError(f"ipamd did not end on {number.name}; its log:\n{self.log()[-4000:]}") from None

    def _serving(self) -> bool:
        import grpc  # noqa: PLC0415 - most tests of the harness do without
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

        if self._process is not None and self._process.poll() is not None:
            raise HostError(f"ipamd ended with status {self._process.returncode}; its log:\n{self.log()[-4000:]}")
        socket = self.host.path(self.socket)
        if not socket.exists():
            return False
        with grpc.insecure_channel(f"unix:{socket}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass
class Host:
    """One host; use it as a context manager. Two hosts share nothing but the machine's files that no host covers.

    `plugins` says whether /opt/cni/bin is filled with ours. `sysfs` mounts a sysfs that shows this host's devices;
    the machine's cgroups below /sys are then hidden. `own`: further directories that are to be the host's own.
    """

    name: str = "host"
    plugins: bool = True
    sysfs: bool = False
    own: tuple[str, ...] = ()
    directory: Path = field(init=False)
    _net: int = field(init=False, default=-1)
    _mnt: int = field(init=False, default=-1)
    _started: list[subprocess.Popen[str]] = field(init=False, default_factory=list)
    _ipamd: Ipamd | None = field(init=False, default=None)

    def __enter__(self) -> Self:
        if any(f"{ROOT}/".startswith(f"{fixed}/") for fixed in self._fixed):
            raise HostError(f"{ROOT} is below a path that each host has to itself: clone the repository elsewhere")
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name[:12]}-", dir=scratch()))
        try:
            # Programs that are not root look into a host too, whatever the umask is.
            self.directory.chmod(0o755)
            for path in self._fixed:
                _make(self.path(path))
            _make(self.directory / "cover")
            _make(self.path("/run/netns"))
            _make(self.path("/run/netloom"))
            _make(self.path("/run/lock"), 0o1777)
            if self.plugins:
                shutil.copytree(_dev_bin(), self.path(CNI_BIN), dirs_exist_ok=True)
            self._open_namespaces()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = self._remove()
        if problems and error is None:
            raise HostError(f"host {self.name}: " + "; ".join(problems))

    @property
    def _fixed(self) -> tuple[str, ...]:
        return (*_FIXED, *self.own)

    def path(self, inside: str) -> Path:
        """Where this process finds a file that the host sees under one of its own fixed paths."""
        if inside.startswith("/var/run/"):
            inside = inside[4:]
        if not any(inside == fixed or inside.startswith(fixed + "/") for fixed in self._fixed):
            raise HostError(f"{inside} is not below any path that a host has to itself: {', '.join(self._fixed)}")
        return self.directory / "fs" / inside[1:]

    @property
    def netns_path(self) -> str:
        """The host's network namespace, for programs anywhere on the machine, as long as this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._net}"

    def command(self, argv: Sequence[str], cwd: str | Path = ROOT) -> list[str]:
        """The command line that runs `argv` in this host: one execve more, no process more."""
        own = f"/proc/{os.getpid()}/fd"
        return ["nsenter", f"--net={own}/{self._net}", f"--mount={own}/{self._mnt}", f"--wdns={cwd}", "--", *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess calls it
        env: Mapping[str, str] | None = None,
        check: bool = True,
        cwd: str | Path = ROOT,
        timeout: float = 2 * PATIENCE_S,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program in the host to its end. Raises HostError with its output when `check` and its status is not 0.

        Output that is not UTF-8 comes with replacement characters.
        """
        raw = input.encode() if isinstance(input, str) else input
        # No input is an empty one: a program that reads the terminal would wait for it.
        done = subprocess.run(
            self.command(argv, cwd), env=env, input=raw or b"", capture_output=True, check=False, timeout=timeout
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode != 0:
            raise HostError(f"{' '.join(argv)} exited {done.returncode}\nstdout: {out}\nstderr: {err}")
        return subprocess.CompletedProcess(list(argv), done.returncode, out, err)

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
    ) -> subprocess.Popen[str]:
        """Starts a program that teardown ends, and the kernel when this process dies (prctl(2), PR_SET_PDEATHSIG).

        To be called in the main thread: that signal comes when the calling *thread* ends.
        """
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.command(argv, cwd)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=True,
        )
        self._started.append(process)
        return process

    def netns(self, name: str = "") -> Netns:
        """A new named namespace, as container runtimes make them. Its loopback is down."""
        name = name or f"c{secrets.token_hex(4)}"
        self.run(["ip", "netns", "add", name])
        return Netns(self, name)

    def cni(
        self,
        verb: str,
        type: str,  # noqa: A002 - the spec's word
        conf: Mapping[str, Any] | bytes,
        *,
        container_id: str = "c1",
        netns: Netns | str = "",
        ifname: str = "eth0",
        args: str = "",
        path: str = CNI_BIN,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 2 * PATIENCE_S,
        directory: str = CNI_BIN,
    ) -> CniCall:
        """Executes <directory>/<type> as a runtime does: one execve, `conf` on stdin, only CNI_* and PATH set.

        `env` adds variables, or removes them where the value is None.
        """
        environment: dict[str, str | None] = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns.path if isinstance(netns, Netns) else netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": path,
            "PATH": PROGRAM_PATH,
            **(env or {}),
        }
        stdin = conf if isinstance(conf, bytes) else json.dumps(conf).encode()
        began = time.monotonic()
        done = self.run(
            [f"{directory}/{type}"],
            input=stdin,
            env={name: value for name, value in environment.items() if value is not None},
            check=False,
            cwd="/",
            timeout=timeout,
        )
        took_s = time.monotonic() - began
        try:
            printed = json.loads(done.stdout)
        except ValueError:
            printed = None
        return CniCall(verb, done.returncode, done.stdout, done.stderr, printed, took_s)

    def start_ipamd(self, **tables: Mapping[str, object]) -> Ipamd:
        """Starts ipamd and waits until it serves. Tables of netloom.toml: `start_ipamd(pools={"cooldown_s": 0})`."""
        node = {"node": self.name, **tables.get("ipamd", {})}
        self._ipamd = Ipamd(self, {**tables, "ipamd": node})
        self._ipamd.start()
        return self._ipamd

    def links(self, netns: Netns | None = None) -> dict[str, dict[str, Any]]:
        """`ip -j -d link`, by name."""
        return {str(link["ifname"]): link for link in self._ip(["-d", "link"], netns)}

    def addresses(self, netns: Netns | None = None) -> dict[str, list[str]]:
        """The addresses of each interface, as CIDRs; link-local IPv6 (which comes when it likes) left out."""
        return {str(link["ifname"]): _cidrs(link) for link in self._ip(["address"], netns)}

    def routes(self, netns: Netns | None = None) -> list[dict[str, Any]]:
        """Routes of all tables, IPv4 then IPv6; IPv6 link-local and multicast (which come when they like) left out."""
        found = self._ip(["-4", "route", "show", "table", "all"], netns)
        if IPV6:
            found += self._ip(["-6", "route", "show", "table", "all"], netns)
        return [route for route in found if not str(route["dst"]).startswith(("fe80:", "ff00:", "multicast"))]

    def ping(self, target: str, limit_s: float = PATIENCE_S, netns: Netns | None = None) -> float:
        """As `Netns.ping`, from the host itself or from one of its containers."""
        argv = [sys.executable, "-I", "-S", str(ROOT / "tests/ping.py"), target, str(limit_s)]
        done = self.run(netns.command(argv) if netns else argv, check=False, timeout=limit_s + PATIENCE_S)
        if done.returncode != 0:
            where = netns.name if netns else self.name
            raise HostError(f"no answer from {target} to {where} within {limit_s:g} s {done.stderr}")
        return float(done.stdout)

    def nft(self) -> list[dict[str, Any]]:
        """The rule set, one object each, as `nft -j list ruleset` prints it; without the entry about nft itself."""
        printed = self._inside(ruleset)
        document = json.loads(printed) if printed.strip() else {"nftables": []}
        return [entry for entry in document["nftables"] if "metainfo" not in entry]

    def snapshot(self) -> Snapshot:
        """Links, addresses, routes, nftables, files and (while ipamd runs) allocations, for `assert_clean`."""
        return Snapshot(frozenset(self._facts()))

    def assert_clean(self, before: Snapshot, keep: Iterable[str] = (), ruleset: bool = True) -> None:
        """Raises HostError naming every fact that came or went since `before`.

        `keep` names interfaces that may have come: a bridge is shared by all containers and stays. Take `before` after
        a first ADD and DEL; else the static tables, which stay too, count as come, unless `ruleset` is false.
        """
        after = self.snapshot()
        kept = tuple(f"{kind} {name}: " for name in keep for kind in ("link", "address", "route"))
        kept += () if ruleset else ("nft ",)
        came = [fact for fact in after.minus(before) if not fact.startswith(kept)]
        went = before.minus(after)
        if came or went:
            difference = [*(f"+ {fact}" for fact in came), *(f"- {fact}" for fact in went)]
            raise HostError("the host is not as before:\n" + "\n".join(difference))

    def boot_id(self, new: str) -> None:
        """From now on this host's processes read another boot id: one of the two marks of a reboot (see `reboot`)."""
        file = self.directory / "boot_id"
        fresh = not file.exists()
        file.write_text(f"{new}\n", encoding="ascii")
        if fresh:
            self.run(["mount", "--bind", str(file), BOOT_ID])

    def reboot(self, boot_id: str = "") -> None:
        """The power goes and comes back: processes, links, namespaces and /run gone, another boot id; files stay."""
        problems = self._end_processes()
        self._close_namespaces()
        shutil.rmtree(self.path("/run"))
        for path, mode in (("/run", 0o755), ("/run/netns", 0o755), ("/run/netloom", 0o755), ("/run/lock", 0o1777)):
            _make(self.path(path), mode)
        (self.directory / "boot_id").unlink(missing_ok=True)
        self._open_namespaces()
        self.boot_id(boot_id or str(uuid.uuid4()))
        if problems:
            raise HostError("; ".join(problems))

    def processes(self) -> dict[int, str]:
        """Who lives in this host's mount namespace: process id → command line."""
        return dict(_processes_in(str(self.directory)))

    def _ip(self, arguments: Sequence[str], netns: Netns | None) -> list[dict[str, Any]]:
        argv = ["ip", "-j", *arguments]
        printed = self.run(netns.command(argv)).stdout if netns else self._inside(lambda: _printed(argv))
        found: list[dict[str, Any]] = json.loads(printed or "[]")
        return [entry for entry in found if entry]  # ip 6.1 prints {} where it filtered something out

    def _inside(self, work: Callable[[], _T]) -> _T:
        """What `work` returns. It is called in a thread in the host's network namespace, so what it starts is there,
        too; the mounts are this process's. Cheaper than a program that enters: many tests look at all of the host."""

        def entered() -> _T:
            if _LIBC.setns(self._net, CLONE_NEWNET) != 0:
                raise HostError(f"cannot enter host {self.name}: {os.strerror(ctypes.get_errno())}")
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(entered).result()

    def _facts(self) -> Iterator[str]:
        for link in self._ip(["-d", "address"], None):
            name = link["ifname"]
            kind = link.get("linkinfo", {}).get("info_kind", "")
            up = "up" if "UP" in link["flags"] else "down"
            yield f"link {name}: {kind} {up} mtu {link['mtu']} master {link.get('master', '-')}"
            for address in _cidrs(link):
                yield f"address {name}: {address}"
        for route in self.routes():
            # Flags (linkdown, dead) follow the carrier.
            yield f"route {route.get('dev', '-')}: {json.dumps({k: v for k, v in route.items() if k != 'flags'})}"
        for entry in self.nft():
            yield f"nft {json.dumps(_without(entry, {'handle', 'packets', 'bytes', 'expires'}), sort_keys=True)}"
        for top in ("/run/netloom", "/var/lib/cni", "/run/cni", "/run/netns"):
            for file in self.path(top).rglob("*"):
                inside = f"{top}/{file.relative_to(self.path(top))}"
                if not file.is_socket() and inside not in _FURNITURE:
                    yield f"file {inside}"
        if self._ipamd is not None and self._ipamd._process is not None:
            for allocation in self.allocations():
                yield f"allocation {allocation}"

    def allocations(self) -> list[str]:
        """What ipamd holds for containers, one line each, as its API lists it."""
        import grpc  # noqa: PLC0415 - most tests of the harness do without

        from protos.ipam.v1 import ipam_pb2, ipam_pb2_grpc  # noqa: PLC0415

        if self._ipamd is None:
            raise HostError("this host has no ipamd")
        with grpc.insecure_channel(f"unix:{self.path(self._ipamd.socket)}") as channel:
            stub = ipam_pb2_grpc.IpamStub(channel)
            found = stub.ListAllocations(ipam_pb2.ListAllocationsRequest(), timeout=PATIENCE_S)
            return sorted(" ".join(str(entry).split()) for entry in found)

    def _open_namespaces(self) -> None:
        argv = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", _SET_UP, "sh"]
        with subprocess.Popen(
            [*argv, str(self.directory), *self._fixed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": PROGRAM_PATH, "LC_ALL": "C"},
        ) as maker:
            assert maker.stdout is not None
            assert maker.stdin is not None
            if maker.stdout.readline() == "ready\n":
                self._net = os.open(f"/proc/{maker.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                self._mnt = os.open(f"/proc/{maker.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            _, complaint = maker.communicate("\n")
        if self._mnt < 0:
            raise HostError(f"cannot make host {self.name}: {complaint.strip()}")
        if self.sysfs:
            self.run(["mount", "-t", "sysfs", "sysfs", "/sys"])

    def _close_namespaces(self) -> None:
        for descriptor in (self._net, self._mnt):
            if descriptor >= 0:
                os.close(descriptor)
        self._net = self._mnt = -1

    def _end_processes(self) -> list[str]:
        """Kills what lives in this host. Daemons that nobody here started a handle for are an error of the test."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._started.clear()
        if self._ipamd is not None:
            self._ipamd._process = None
        return _kill_all_in(str(self.directory))

    def _remove(self) -> list[str]:
        problems = self._end_processes()
        self._close_namespaces()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory, onerror=lambda _f, path, info: problems.append(f"{path}: {info[1]}"))
        return problems


def wait_until(
    condition: Callable[[], object], what: str, explain: Callable[[], str] = str, limit_s: float = PATIENCE_S
) -> None:
    """Polls until the condition holds. Raises HostError with `what` and the explanation at the limit."""
    deadline = time.monotonic() + limit_s
    pause_s = 0.005
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"waited {limit_s:g} s for {what} {explain()}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.2)


_own_scratch: dict[int, Path] = {}


def keep_in_memory() -> bool:
    """From now on hosts are made on a tmpfs, as /run is on a real host, where a file costs a tenth of one on a disk; to
    be called before the first host. False, and they stay on the disk, where there is no tmpfs that programs can run on.
    What must be on a disk needs a path of its own then."""
    fields = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    usable = any(f[1] == _MEMORY and f[2] == "tmpfs" and "noexec" not in f[3].split(",") for f in fields)
    if usable and os.getpid() not in _own_scratch:
        _make_scratch(_MEMORY)
    return usable


def scratch() -> Path:
    """The directory for all that this process's hosts write, made at first use: /tmp/netloom-<uid>-<pid>-<random>.

    NETLOOM_SCRATCH names another place than /tmp.
    """
    if os.getpid() not in _own_scratch:
        _make_scratch(_DISK)
    return _own_scratch[os.getpid()]


def _make_scratch(base: str) -> None:
    pid = os.getpid()
    path = Path(tempfile.mkdtemp(prefix=f"netloom-{os.geteuid()}-{pid}-", dir=base))
    path.chmod(0o755)
    (path / "owner").write_text(_identity(pid), encoding="ascii")
    _own_scratch[pid] = path


def remove_scratch() -> None:
    """At the end of a run: removes the directory that `scratch` made. Its hosts must be gone."""
    path = _own_scratch.pop(os.getpid(), None)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def sweep(*places: str) -> list[str]:
    """Removes what dead runs of this user left behind, and says what that was. Safe beside runs that are alive.

    `places`: where it looks, instead of everywhere.
    """
    done = []
    left = [path for base in places or (_DISK, _MEMORY) for path in Path(base).glob(f"netloom-{os.geteuid()}-*")]
    for path in sorted(left):
        with contextlib.suppress(FileNotFoundError):  # swept by another run in the same moment
            if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.geteuid() or _owner_lives(path):
                continue
            done += [f"killed {what}" for what in _kill_all_in(str(path))]
            shutil.rmtree(path, ignore_errors=True)
            done.append(f"removed {path}")
    return done


def _owner_lives(path: Path) -> bool:
    pid = int(path.name.split("-")[2]) if path.name.count("-") >= 3 and path.name.split("-")[2].isdigit() else 0
    try:
        owner = (path / "owner").read_text(encoding="ascii")
    except OSError:
        return pid == 0 or Path(f"/proc/{pid}").exists()  # died, or is, between mkdtemp and the owner's file
    boot, pid_namespace, *_ = owner.split() or ["", ""]
    if boot != _boot():
        return False
    if pid_namespace != os.readlink("/proc/self/ns/pid"):
        return True  # a container that shares our /tmp: its process ids say nothing here
    try:
        return owner == _identity(pid)
    except OSError:
        return False


def _identity(pid: int) -> str:
    """Boot, pid namespace, pid and start time (proc(5), stat field 22): never the same for two processes."""
    start = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    return f"{_boot()} {os.readlink('/proc/self/ns/pid')} {pid} {start}"


def _boot() -> str:
    return Path(BOOT_ID).read_text(encoding="ascii").strip()


def _processes_in(directory: str) -> Iterator[tuple[int, str]]:
    """Processes that see something of `directory` mounted: only those of its hosts, as it is mounted nowhere else."""
    own = os.readlink("/proc/self/ns/mnt")
    # The root of a mount is told within its file system, which may begin at any directory above.
    base = next((base for base in (_DISK, _MEMORY) if directory.startswith(f"{base}/")), "")
    mark = f"{directory.removeprefix(base)}/"
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/ns/mnt") == own:
                continue
            mounts = Path(f"/proc/{entry}/mountinfo").read_text(encoding="utf-8", errors="replace")
            if any(mark in line.split(" ", 4)[3] for line in mounts.splitlines()):
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
                yield int(entry), command.decode(errors="replace").strip()
        except OSError:
            continue  # ended meanwhile


def _kill_all_in(directory: str) -> list[str]:
    """SIGKILL to each process in a host below `directory`, until there is none; says who that was."""
    killed: dict[int, str] = {}

    def gone() -> bool:
        alive = [(pid, command) for pid, command in _processes_in(directory) if command]  # no command: a zombie
        for pid, command in alive:
            killed[pid] = command
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not alive

    wait_until(gone, f"the end of all processes in {directory}")
    return [f"process {pid} was still running: {command}" for pid, command in killed.items()]


def _make(path: Path, mode: int = 0o755) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)


def _dev_bin() -> Path:
    """Our plugins as executables, written once in each run."""
    directory = scratch() / "bin"
    if not directory.exists():
        subprocess.run([sys.executable, "-I", str(ROOT / "build/devbin.py"), str(directory)], check=True)
    return directory


def _printed(argv: Sequence[str]) -> str:
    """By a program that needs no mounts of a host. Raises HostError with its output when its status is not 0."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S
    )
    if done.returncode != 0:
        raise HostError(f"{' '.join(argv)} exited {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}")
    return done.stdout


def _cidrs(link: Mapping[str, Any]) -> list[str]:
    """The addresses in an entry of `ip -j address`, without IPv6 link-local ones."""
    return [
        f"{address['local']}/{address['prefixlen']}"
        for address in link.get("addr_info", ())
        if not (address["family"] == "inet6" and address["scope"] == "link")
    ]


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(inner, keys) for inner in value]
    return value


def _toml(tables: Mapping[str, Mapping[str, object]]) -> str:
    """Tables of strings, numbers, booleans and lists of them, whose spelling TOML shares with JSON."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
