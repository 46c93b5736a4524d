"""A host with a runtime's own directories, our plugins before the workers, ipamd, and a network outside.

Rules of this file
- What a runtime keeps on disk, and its sockets, are the host's own, at the places where they are on a real host: no
  option of a runtime is set but those that an operator sets.
- All cgroups are below one directory that bears the name of the run (`images.CGROUPS`), so that a sweep finds those of
  a killed one.
- Each request that came the warm way is on record. There is no other way: what is not on record failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.hosts import CNI_BIN, PROGRAM_PATH, ROOT, Host, HostError, Ipamd, Netns, Snapshot, wait_until
from tests.runtimes import cgroups
from tests.warm.service import COLD, Service

NET_D = "/etc/cni/net.d"
# What podman and containerd write, besides /run and /var/lib/cni. /dev/shm has podman's locks.
OWN = (
    "/etc/containers",
    "/etc/containerd",
    "/opt/containerd",
    "/var/lib/containers",
    "/var/lib/containerd",
    "/var/tmp",
    "/dev/shm",
)
_LIB = "/usr/lib/netloom"
_REQUESTS = "/run/requests"
_CACHE = "file /run/netloom/host-local"  # host-local's index; the addresses themselves are in /var/lib/cni
# What is in the first counts. The second is mounted on itself by podman, now and then.
_FURNITURE = ("file /var/lib/cni/networks", "mount /var/lib/containers/storage/overlay")
OUTSIDE = "192.0.2.2"  # who reaches the host from elsewhere
HOST_OUTSIDE = "192.0.2.1"


@dataclass(frozen=True, slots=True)
class Request:
    """One request that a worker served."""

    plugin: str
    environment: Mapping[str, str]
    conf: Mapping[str, Any]
    status: int
    stdout: str

    @property
    def verb(self) -> str:
        return self.environment.get("CNI_COMMAND", "")

    @property
    def container_id(self) -> str:
        return self.environment.get("CNI_CONTAINERID", "")

    @property
    def netns(self) -> str:
        return self.environment.get("CNI_NETNS", "")

    @property
    def ifname(self) -> str:
        return self.environment.get("CNI_IFNAME", "")

    @property
    def args(self) -> dict[str, str]:
        """CNI_ARGS."""
        return dict(pair.split("=", 1) for pair in self.environment.get("CNI_ARGS", "").split(";") if "=" in pair)

    @property
    def runtime_config(self) -> Mapping[str, Any]:
        found = self.conf.get("runtimeConfig", {})
        assert isinstance(found, dict)
        return found

    def result(self) -> dict[str, Any]:
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found

    def __str__(self) -> str:
        network = self.conf.get("name", "")
        return f"{self.verb} {self.plugin} {network} {self.ifname} of {self.container_id[:12]}: {self.status}"


class RuntimeHost:
    """Use as a context manager.

    `launcher`: the built launcher, before workers that run this checkout. Or a directory that `make install` wrote to:
    then its launchers, its workers and its programs for the cold way are at their places, and nobody notes requests
    but they themselves (`netloom trace`). `cgroup2`: the host has only cgroup v2, as newer systems do. `liveness_s`:
    how often the workers' helper looks for what died; else so rarely that DEL has to do everything by itself.
    """

    workers = "tests.runtimes.recording"  # the module of the master; "warm" records nothing and costs nothing

    def __init__(self, name: str, launcher: Path, cgroup2: bool = False, liveness_s: float = 3600) -> None:
        self.installed = launcher.is_dir()
        self.host = Host(name, plugins=not self.installed, own=(*OWN, *([_LIB] if self.installed else [])))
        self.cgroup2 = cgroup2
        self._arguments = ["--liveness-interval", str(liveness_s)]
        self._launcher = launcher
        self._master: subprocess.Popen[str] | None = None
        self._before: Snapshot | None = None
        self._service: Service | None = None
        self.ipamd: Ipamd
        self.outside: Netns

    def __enter__(self) -> Self:
        self.host.__enter__()
        try:
            self._set_up()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.end_service()  # its children, too, so that what the host still finds running is a runtime's
        finally:
            try:
                self.host.__exit__(*error)
            finally:
                cgroups.remove()

    def _set_up(self) -> None:
        host = self.host
        for path in ("/var/tmp", "/dev/shm"):
            host.path(path).chmod(0o1777)
        if self.installed:
            shutil.copytree(self._launcher / CNI_BIN[1:], host.path(CNI_BIN), dirs_exist_ok=True)
        else:
            self._service = Service(host, self._launcher, self._arguments, self.workers)
        self._boot()

    def _boot(self) -> None:
        """What a host has to do each time."""
        host = self.host
        if self.cgroup2:
            host.run(["umount", "-R", "/sys/fs/cgroup"])
            host.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"])
        if self.installed:
            host.run(["mount", "--bind", str(self._launcher / _LIB[1:]), _LIB])
        self.ipamd = host.start_ipamd(pools={"cooldown_s": 0}, reclaim={"grace_s": 1, "interval_s": 1})
        self.begin_service()
        self.outside = host.netns("outside")
        for command in (
            f"ip link add outside type veth peer name eth0 netns {self.outside.name}",
            f"ip addr add {HOST_OUTSIDE}/24 dev outside",
            "ip link set outside up",
            f"ip -n {self.outside.name} addr add {OUTSIDE}/24 dev eth0",
            f"ip -n {self.outside.name} link set lo up",
            f"ip -n {self.outside.name} link set eth0 up",
        ):
            host.run(command.split())

    def reboot(self) -> None:
        """The power goes, with containers running, and comes back."""
        with contextlib.suppress(HostError):  # which names who was still running
            self.host.reboot()
        cgroups.remove()
        for file in self.host.path("/dev/shm").iterdir():
            file.unlink()
        self._boot()

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def begin_service(self) -> None:
        """Starts the master."""
        if not self.installed:
            self.service.start({**os.environ, "NETLOOM_TEST_REQUESTS": _REQUESTS})
            return
        socket = self.host.path("/run/netloom/cni.sock")
        socket.unlink(missing_ok=True)  # of the one before
        with (self.host.directory / "warm.log").open("a", encoding="utf-8") as log:
            self._master = self.host.popen(
                [f"{_LIB}/netloom-warm", *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        wait_until(socket.is_socket, "the installed workers' socket")

    def end_service(self) -> None:
        """Stops it; all its processes have ended then."""
        if self._master is not None:
            master, self._master = self._master, None
            master.terminate()
            master.wait(60)
        elif self._service is not None and self._service.process is not None:
            self._service.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What a runtime's process has. Workers on a busy machine may be slow to accept. Of a checkout: a cold way
        that is counted."""
        cold = {} if self.installed else {"NETLOOM_CNI_COLD": COLD}
        return {"PATH": PROGRAM_PATH, "HOME": "/root", "NETLOOM_CNI_WAIT_MS": "30000", **cold}

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return self.host.run(argv, **{"env": self.environment, "cwd": "/", **options})

    def ask(
        self,
        address: str,
        port: int = 80,
        *,
        netns: Netns | None = None,
        protocol: str = "tcp",
        limit_s: float = 30,
        source: int = 0,
    ) -> str:
        """What the server there says, asked again until it does, from the host or a namespace. Raises HostError."""
        program = [sys.executable, "-I", "-S", str(ROOT / "tests/runtimes/ask.py")]
        done = (netns or self.host).run(
            [*program, protocol, address, str(port), str(limit_s), str(source)], check=False
        )
        if done.returncode != 0:
            where = netns.name if netns else self.host.name
            raise HostError(f"no answer from {address} {protocol} {port} to {where}: {done.stderr}")
        return done.stdout.strip()

    def silent(self, address: str, port: int = 80, *, netns: Netns | None = None, protocol: str = "tcp") -> bool:
        """Whether nobody answers there."""
        try:
            self.ask(address, port, netns=netns, protocol=protocol, limit_s=0)
        except HostError:
            return True
        return False

    # What the workers were asked

    def requests(self, container_id: str = "", verb: str = "") -> list[Request]:
        """What was served, in order; VERSION only where it is asked for by name."""
        file = self.host.path(_REQUESTS)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = []
        for line in lines:
            entry = json.loads(line)
            conf = json.loads(entry["stdin"]) if entry["stdin"] else {}
            one = Request(entry["plugin"], entry["environment"], conf, entry["status"], entry["stdout"])
            if one.container_id.startswith(container_id) and (one.verb == verb or (not verb and one.verb != "VERSION")):
                found.append(one)
        return found

    def forget(self) -> None:
        """The record of requests begins anew."""
        self.host.path(_REQUESTS).unlink(missing_ok=True)

    def verbs(self, container_id: str = "") -> list[str]:
        """In order: `ADD bridge`."""
        return [f"{request.verb} {request.plugin}" for request in self.requests(container_id)]

    # Nothing may be left

    def settle(self) -> None:
        """What is there now is what has to be there after each scenario."""
        before = self.snapshot()
        left = [fact for fact in before.facts if fact.startswith(("allocation ", "file /run/netloom/attachments/"))]
        assert left == [], "what was attached and detached until now is not gone"
        self._before = before

    def snapshot(self) -> Snapshot:
        return Snapshot(self.host.snapshot().facts | frozenset(self._facts()))

    def assert_clean(self, *passed_over: str) -> None:
        """Waits until the host is as `settle` found it. Facts that begin with one of `passed_over` may differ."""
        before = self._before
        assert before is not None
        difference: list[str] = []

        def clean() -> bool:
            nonlocal difference
            now = self.snapshot()
            difference = [f"+ {fact}" for fact in now.minus(before)] + [f"- {fact}" for fact in before.minus(now)]
            difference = [
                line
                for line in difference
                if not line[2:].startswith((_CACHE, *passed_over)) and line[2:] not in _FURNITURE
            ]
            return not difference

        wait_until(clean, "the host to be as it was before", lambda: "\n".join(["", *difference]), limit_s=20)

    def _facts(self) -> Iterator[str]:
        mounts = self.host.run(["cat", "/proc/self/mountinfo"]).stdout
        for line in mounts.splitlines():
            yield f"mount {line.split()[4]}"
        for command in self.host.processes().values():
            yield f"process {command}"
        for cgroup in cgroups.found():
            yield f"cgroup {cgroup}"

    # The other side

    def netloom(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [f"{_LIB}/netloom"] if self.installed else [sys.executable, "-m", "cli"]
        return self.host.run([*command, *arguments], check=check)

    def traced(self) -> list[tuple[str, str, str]]:
        """What `netloom trace` tells of all requests: verb, plugin, way."""
        found = json.loads(self.netloom("trace", "--json", "--last", "1000").stdout)["requests"]
        return [(one["verb"], one["plugin"], one["way"]) for one in found]

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """A process of this host."""
        if pid not in self.host.processes():
            raise HostError(f"process {pid} is not one of this host")
        os.kill(pid, number)

    def conflist(self, name: str, plugins: Sequence[Mapping[str, Any]], version: str = "1.0.0", file: str = "") -> Path:
        """Writes a network's configuration, and says where."""
        path = self.host.path(f"{NET_D}/{file or name}.conflist")
        path.write_text(json.dumps({"cniVersion": version, "name": name, "plugins": list(plugins)}), encoding="utf-8")
        return path

    def delete_network(self, name: str, bridge: str = "") -> None:
        """What a network has on a host until somebody removes the network itself: bridge, host-local's directory."""
        if bridge:
            self.host.run(["ip", "link", "delete", bridge])
        directory = self.host.path(f"/var/lib/cni/networks/{name}")
        if directory.exists():
            left = {file.name for file in directory.iterdir()}
            assert left == {"lock", "last_reserved_ip.0"}, left
            shutil.rmtree(directory)
