"""dockerd and the shim on a host of the tests, at the places where they are on a real host."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2
from tests.docker.hasty import GRACE
from tests.hosts import PATIENCE_S, ROOT, Host, HostError, Snapshot, wait_until
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import OWN, RuntimeHost

DOCKER = "/usr/bin/docker"  # Debian's, of dockerd's own age; a newer one may come first in PATH
STATE = "/var/lib/netloom/docker"
HASTY = "tests.docker.hasty"
_DOCKER_OWN = ("/var/lib/docker", "/etc/docker")
# Where etcd, or ipamd, was silent for too long, as they are where many share the processors.
_LATER = re.compile("ask again later|did not answer within")
_PAUSE_S = 0.5
Done = TypeVar("Done")


def patiently(step: Callable[[], Done], again: Callable[[], Done] | None = None) -> Done:
    """Does a step, and where it is refused for now it once more, or what is to be done `again`, as a user would.

    Raises the step's HostError where the reason is another one, or where it lasts.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return step()
        except HostError as error:
            if not _LATER.search(str(error)) or time.monotonic() > deadline:
                raise
        step = again or step
        time.sleep(_PAUSE_S)


class Docker(RuntimeHost):
    """Use as a context manager: a host with ipamd, warm workers, the shim and dockerd, and one image."""

    def __init__(self, name: str, launcher: Path, dockerd: Sequence[str] = ()) -> None:
        super().__init__(name, launcher)
        self.host = Host(name, own=(*OWN, *_DOCKER_OWN))
        self._dockerd_arguments = list(dockerd)
        self.shim_module = "libnetwork"
        self.is_patient = False  # whether `docker` asks again where it is told to, as on a host of a cluster
        self.grace = "60"  # seconds; what a busy machine takes to start a container
        self.dockerd: subprocess.Popen[str] | None = None
        self.shim: subprocess.Popen[str] | None = None

    def _set_up(self) -> None:
        super()._set_up()
        self.host.path("/run/docker/plugins").mkdir(parents=True)
        self.start_shim()
        self.start_dockerd()
        archive = self.host.directory / "root.tar"
        archive.write_bytes(images.root_tar())
        self.docker("import", "-c", f"CMD {json.dumps(images.SERVE)}", str(archive), images.NAME)

    def reboot(self) -> None:
        """The power goes, with containers running, and comes back, with everything that starts at boot."""
        self.shim = self.dockerd = None
        super().reboot()
        self.host.path("/run/docker/plugins").mkdir(parents=True)
        self.start_shim()
        self.start_dockerd()

    def __exit__(self, *error: Any) -> None:
        try:
            if self.dockerd is not None:
                with contextlib.suppress(HostError, subprocess.TimeoutExpired):
                    self.remove_all()
                self.stop_dockerd()
            self.stop_shim()
        finally:
            super().__exit__(*error)

    # The shim

    def start_shim(self, *arguments: str) -> None:
        """Returns when it serves."""
        argv = [
            sys.executable,
            "-m",
            self.shim_module,
            "--log-level",
            "debug",
            "--interval",
            "1",
            "--grace",
            self.grace,
            *arguments,
        ]
        with (self.host.directory / "shim.log").open("a", encoding="utf-8") as log:
            served = self.shim_log().count("serving Docker")
            self.shim = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: self._is_up(served), "the shim", self.shim_log)

    def _is_up(self, served: int) -> bool:
        assert self.shim is not None
        if self.shim.poll() is not None:
            raise HostError(f"the shim ended with status {self.shim.returncode}: {self.shim_log()[-4000:]}")
        return self.shim_log().count("serving Docker") > served

    def stop_shim(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        if self.shim is None:
            return 0
        process, self.shim = self.shim, None
        process.send_signal(number)
        return process.wait(60)

    @contextlib.contextmanager
    def hurry(self) -> Iterator[None]:
        """Meanwhile the shim, if it is HASTY, removes what Docker lacks for a second. Nothing may be starting."""
        self._set_grace("1")
        try:
            yield
        finally:
            self._set_grace(self.grace)

    def _set_grace(self, seconds: str) -> None:
        file = self.host.path(GRACE)
        new = file.with_suffix(".new")  # so that nobody reads half of it
        new.write_text(seconds, encoding="ascii")
        new.rename(file)

    def shim_log(self) -> str:
        file = self.host.directory / "shim.log"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """One call as dockerd makes it. Raises HostError with what was refused."""
        script = [sys.executable, "-I", "-S", str(ROOT / "tests/docker/call.py"), name, json.dumps(arguments)]
        answer = json.loads(self.host.run(script).stdout)
        assert isinstance(answer, dict)
        if answer.get("Err"):
            raise HostError(f"{name}: {answer['Err']}")
        return answer

    # dockerd

    def start_dockerd(self) -> None:
        """Returns when it answers."""
        for pid_file in ("/run/docker.pid", "/run/docker/containerd/containerd.pid"):
            self.host.path(pid_file).unlink(missing_ok=True)
        # vfs needs nothing of the file system below.
        argv = ["dockerd", "--storage-driver", "vfs", "--cgroup-parent", cgroups.parent(), *self._dockerd_arguments]
        with (self.host.directory / "dockerd.log").open("a", encoding="utf-8") as log:
            self.dockerd = self.host.popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Its containerd writes there what it did when it is slow.
                env={**self.environment, "TMPDIR": str(self.host.directory)},
                cwd="/",
            )
        wait_until(self.host.path("/run/docker.sock").is_socket, "dockerd's socket", self._dockerd_log)
        wait_until(lambda: self.docker("version", check=False).returncode == 0, "dockerd", self._dockerd_log)

    def stop_dockerd(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Returns when it and its containerd have ended."""
        assert self.dockerd is not None
        process, self.dockerd = self.dockerd, None
        process.send_signal(number)
        process.wait(60)
        wait_until(
            lambda: not any(command.startswith("containerd --config") for command in self.host.processes().values()),
            "the end of dockerd's containerd",
        )

    def _dockerd_log(self) -> str:
        return (self.host.directory / "dockerd.log").read_text(encoding="utf-8")[-4000:]

    # What an operator types

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`docker ARGUMENTS`."""

        def once() -> subprocess.CompletedProcess[str]:
            done = self.run([DOCKER, *arguments], check=check)
            if self.is_patient and done.returncode != 0 and _LATER.search(done.stderr):
                raise HostError(done.stderr)  # whatever is wanted of it, it is not this
            return done

        return patiently(once) if self.is_patient else once()

    def network(self, name: str, *arguments: str, ipam: str = "netloom") -> str:
        """`docker network create -d netloom`; its id. `ipam` "": Docker's own."""
        driver = ["--ipam-driver", ipam] if ipam else []
        return self.docker("network", "create", "-d", "netloom", *driver, *arguments, name).stdout.strip()

    def start(self, name: str, *arguments: str, command: Sequence[str] = ()) -> None:
        """A container that serves its host name on port 80."""
        # As the first process of a namespace it does not hear SIGTERM, and dockerd waits 10 s before it insists.
        named = ["--name", name, "--hostname", name, "--stop-signal", "KILL"]
        run = (DOCKER, "run", "-d", *named, *arguments, images.NAME, *command)
        if self.is_patient:  # what was refused an address is there, and not started
            patiently(partial(self.run, run), partial(self.run, (DOCKER, "start", name)))
        else:
            self.run(run)

    def inside(self, container: str, *command: str, check: bool = True) -> str:
        """What a program prints in a container."""
        return self.docker("exec", container, *command, check=check).stdout.strip()

    def inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self.docker("inspect", container).stdout)
        assert isinstance(found, dict)
        return found

    def address(self, container: str, network: str) -> str:
        """The IPv4 address that Docker says the container has."""
        return str(self.inspect(container)["NetworkSettings"]["Networks"][network]["IPAddress"])

    def remove_all(self) -> None:
        """Every container, and every network that is not Docker's own."""
        containers = self.docker("ps", "-aq").stdout.split()
        if containers:
            self.docker("rm", "-f", *containers)
        networks = self.docker("network", "ls", "-q", "-f", "type=custom").stdout.split()
        if networks:
            self.docker("network", "rm", *networks)

    # What the shim and ipamd know

    def assert_agreement(self) -> None:
        """Waits until the shim has the endpoints of Docker's running containers, and ipamd their addresses."""
        wanted: tuple[set[str], set[str]] = (set(), set())
        found = wanted

        def agree() -> bool:
            nonlocal wanted, found
            wanted = (set(), set())
            ids = self.docker("network", "ls", "-q", "-f", "driver=netloom", "--no-trunc").stdout.split()
            for network in json.loads(self.docker("network", "inspect", *ids).stdout) if ids else ():
                length = network["IPAM"]["Config"][0]["Subnet"].partition("/")[2]
                gateway = network["IPAM"]["Config"][0].get("Gateway", "")
                wanted[1].add(f"{gateway or next(ip_network(network['IPAM']['Config'][0]['Subnet']).hosts())}/{length}")
                for one in network["Containers"].values():
                    wanted[0].add(one["EndpointID"])
                    wanted[1].add(one["IPv4Address"])
            found = (set(self.state()["endpoints"]), set(self.held()))
            return found == wanted

        # A release is answered before ipamd has it; one that a power cut met comes with a look after the grace.
        with self.hurry():
            wait_until(agree, "agreement", lambda: f"Docker: {wanted}\nours: {found}\n{self.shim_log()[-4000:]}")
        # Every end is in its container; a name is nl and hexadecimal digits, a bridge's has a dash after nl.
        left = [link for link in self.host.links() if re.match("nl[0-9a-f]", link)]
        assert not left, left

    def state(self) -> dict[str, list[str]]:
        """The ids in the shim's state, by kind."""
        top = self.host.path(STATE)
        return {
            kind: sorted(path.stem for path in (top / kind).glob("*.json"))
            for kind in ("networks", "endpoints", "pools")
        }

    def held(self, *, cluster: bool = False) -> list[str]:
        """The addresses that ipamd has given away, `cluster`: and those of all other hosts."""
        with self.client() as client:
            listed = client.list_allocations(ipam_pb2.ListAllocationsRequest(cluster=cluster))
            return sorted(address.cidr for one in listed for address in one.addresses)

    def client(self) -> Client:
        """To ask ipamd as `netloom` does, without the half second of a processor that a program takes to begin."""
        return Client(str(self.host.path(self.ipamd.socket)), PATIENCE_S)

    def assert_clean(self, *passed_over: str) -> None:
        """As of every host."""
        with self.hurry():
            super().assert_clean(*passed_over)

    def snapshot(self) -> Snapshot:
        """Without the staging namespaces, which stay for the next container."""
        return Snapshot(frozenset(fact for fact in super().snapshot().facts if "/run/netloom/staging" not in fact))

    def _facts(self) -> Iterator[str]:
        # Docker makes and removes its own directories' mounts as it likes.
        for fact in super()._facts():
            if not fact.startswith(("process dockerd", "process containerd", "mount /run/docker/netns/default")):
                yield fact
        for kind, ids in self.state().items():
            for one in ids:
                yield f"{kind} {one}"
        for address in self.held():
            yield f"address {address}"


@contextlib.contextmanager
def settled(name: str, launcher: Path, *dockerd: str, shim: str = HASTY) -> Iterator[Docker]:
    """A host on which the first container has come and gone, with all that it makes for later ones.

    `shim`: the module to run as the shim.
    """
    docker = Docker(name, launcher, dockerd)
    docker.shim_module = shim
    with docker:
        docker.network("first", "--subnet", "10.99.0.0/24")
        docker.start("first", "--network", "first")
        docker.remove_all()
        docker.settle()
        yield docker
