"""The units: what they may say, what systemd thinks of them, and that the programs live with it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from libnetwork.__main__ import SOCKET as docker_socket  # noqa: N811
from tests.build.places import Chroot
from tests.hosts import CNI_BIN, PROGRAM_PATH, ROOT, Host, wait_until

UNITS = (
    "netloom-ipamd.service",
    "netloom-cni.socket",
    "netloom-cni.service",
    "netloom-docker.socket",
    "netloom-docker.service",
    "netloom-netd.service",
)


def unit(name: str) -> list[tuple[str, str]]:
    lines = (ROOT / "build/systemd" / name).read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and not line.startswith("#")]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["netloom-cni.service", "netloom-docker.service"])
def test_the_workers_and_the_shim_have_no_option_that_changes_what_a_plugin_may_do_or_sees(name: str) -> None:
    """A list of what is harmless, as systemd.exec(5) gets new options that make a mount namespace: each addition is to
    be looked up there."""
    harmless = {
        "Type", "ExecStart", "ExecReload", "KillMode", "TimeoutStopSec", "Restart", "RestartSec", "OOMScoreAdjust",
        "LimitNOFILE", "TasksMax", "Description", "Documentation", "Requires", "After", "Wants", "WantedBy", "Also",
        "StartLimitIntervalSec", "Before",
    }  # fmt: skip
    assert {option for option, _ in unit(name)} <= harmless


def test_dockers_socket_is_roots_and_where_docker_looks() -> None:
    settings = dict(unit("netloom-docker.socket"))
    assert settings["SocketMode"] == "0600"
    assert settings["ListenStream"] == docker_socket
    assert settings["Before"] == dict(unit("netloom-docker.service"))["Before"] == "docker.service"


def test_the_socket_is_roots_and_where_launchers_look(launcher: Path) -> None:
    settings = dict(unit("netloom-cni.socket"))
    assert settings["SocketMode"] == "0600"
    directory, _, name = settings["ListenStream"].rpartition("/")
    content = launcher.read_bytes()
    assert directory.encode() + b"\0" in content
    assert name.encode() + b"\0" in content


def test_the_programs_that_units_start_are_in_the_bundle(bundle: Path) -> None:
    started = [value for name in UNITS for key, value in unit(name) if key == "ExecStart"]
    assert started
    for command in started:
        assert os.access(command.replace("@LIB@", str(bundle)), os.X_OK)


@pytest.mark.kernel
class TestInstalled:
    """Installed in a copy of this machine's root, as `make install` without DESTDIR does it."""

    @pytest.fixture
    def installed(self, chroot: Chroot, bundle: Path, launcher: Path) -> Chroot:
        from tests.build.places import Tree  # noqa: PLC0415

        Tree.make(chroot.host.directory / "repository", bundle, launcher)
        # The chroot sees /tmp of below, and so the repository.
        chroot.sh(f"cd '{chroot.host.directory}/repository' && PATH={PROGRAM_PATH} sh build/install")
        return chroot

    def test_systemd_has_nothing_to_say(self, installed: Chroot) -> None:
        paths = [f"/lib/systemd/system/{name}" for name in UNITS]
        done = installed.run(["systemd-analyze", "verify", "--man=no", *paths], check=False)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")

    def test_ipamd_is_exposed_little(self, installed: Chroot) -> None:
        argv = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "netloom-ipamd.service"]
        done = installed.run(argv, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr

    def test_user_and_directories_are_as_systemd_would_make_them(self, installed: Chroot) -> None:
        shown = "stat -c '%n %F %a %U %G' /run/netloom /run/netloom/* /var/lib/netloom; "
        shown += "getent passwd netloom | cut -d : -f 1,5-; id -Gn netloom"
        ours = installed.sh(shown)
        assert "/run/netloom directory 1770 root netloom" in ours
        assert "/run/netloom/releases directory 700 netloom netloom" in ours
        installed.sh("userdel netloom; rm -r /run/netloom /var/lib/netloom")
        installed.sh("systemd-sysusers netloom.conf; systemd-tmpfiles --create netloom.conf")
        assert installed.sh(shown) == ours

    def test_twice_and_uninstall(self, installed: Chroot) -> None:
        repository = f"cd '{installed.host.directory}/repository' && PATH={PROGRAM_PATH}"
        installed.sh(f"{repository} sh build/install")
        assert "netloom " in installed.sh("/usr/bin/netloom --version")
        installed.sh(f"{repository} sh build/uninstall")
        left = installed.sh(
            "ls -d /opt/cni/bin/* /usr/lib/netloom /usr/bin/netloom /etc/netloom /lib/systemd/system/netl*", False
        )
        assert left == ""

    def test_ipamd_needs_no_more_than_its_unit_grants(self, installed: Chroot) -> None:
        """As its user, without capabilities, with no memory both writable and executable (prctl(2), PR_SET_MDWE), and
        only with system calls of the unit's filter."""
        calls = installed.host.directory / "calls"
        script = "import ctypes, os, sys\nctypes.CDLL(None).prctl(65, 1, 0, 0, 0)\nos.execvp(sys.argv[1], sys.argv[1:])"
        limits = ["--no-new-privs", "--bounding-set=-all", "--reuid=netloom", "--regid=netloom", "--init-groups"]
        limited = installed.command(["setpriv", *limits, "/usr/lib/netloom/ipamd"])
        limited = [sys.executable, "-I", "-c", script, *limited]
        log = installed.host.directory / "log"
        with log.open("w") as output:
            traced = installed.host.popen(
                ["strace", "-f", "-qq", "-e", "signal=none", "-e", "abbrev=all", "-o", str(calls), *limited],
                stdout=output,
                stderr=output,
                cwd="/",
            )
        wait_until(lambda: installed.host.path("/run/netloom/ipamd.sock").exists(), "ipamd", log.read_text)
        printed = installed.sh("/usr/bin/netloom status")
        assert "problem" not in printed
        owner = installed.sh("stat -c '%U %G %a' /run/netloom/ipamd.sock /var/lib/netloom/ipamd.db")
        assert owner == "netloom netloom 660\nnetloom netloom 600\n"
        self._end(installed, traced)
        after_exec = calls.read_text().rpartition('execve("/usr/lib/netloom')[2]
        used = set(re.findall(r"^\d+ +(?:<\.\.\. )?([a-z_0-9]+)[( ]", after_exec, re.MULTILINE))
        assert len(used) > 30
        assert used - self._granted(installed) - {"resumed", "execve"} == set()

    def _end(self, installed: Chroot, traced: subprocess.Popen[str]) -> None:
        for pid, command in installed.host.processes().items():
            if command.startswith("/usr/lib/netloom/ipamd"):
                os.kill(pid, 15)
        assert traced.wait() == 0

    def _granted(self, installed: Chroot) -> set[str]:
        groups: dict[str, set[str]] = {}
        name = ""
        for line in installed.sh("systemd-analyze syscall-filter --no-pager").splitlines():
            if line.startswith("@"):
                name = line.strip()
                groups[name] = set()
            elif name and line.strip() and not line.strip().startswith("#"):
                groups[name].add(line.strip())

        def members(group: str) -> set[str]:
            return {call for one in groups[group] for call in (members(one) if one.startswith("@") else {one})}

        granted: set[str] = set()
        for key, value in unit("netloom-ipamd.service"):
            if key == "SystemCallFilter":
                for group in value.lstrip("~").split():
                    granted = granted - members(group) if value.startswith("~") else granted | members(group)
        return granted | members("@default")


@pytest.mark.kernel
class TestSocketActivation:
    """netloom-cni.socket listens, netloom-cni.service inherits."""

    @pytest.fixture
    def activated(self, host: Host, bundle: Path, launcher: Path) -> Iterator[Host]:
        (host.path(CNI_BIN) / "bridge").unlink()
        (host.path(CNI_BIN) / "bridge").write_bytes(launcher.read_bytes())
        (host.path(CNI_BIN) / "bridge").chmod(0o755)
        log = (host.directory / "log").open("w")
        argv = [
            "systemd-socket-activate",
            "--listen=/run/netloom/cni.sock",
            str(bundle / "netloom-warm"),
            "--workers=1",
        ]
        environment = {"PATH": PROGRAM_PATH}
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        wait_until(lambda: host.path("/run/netloom/cni.sock").exists(), "the socket")
        yield host
        process.terminate()  # its workers end with it
        process.wait()
        log.close()

    def test_a_request_is_served_warm(self, activated: Host) -> None:
        warm = {"NETLOOM_CNI_COLD": "/nonexistent", "NETLOOM_CNI_WAIT_MS": "60000"}
        for _ in range(2):
            call = activated.cni("VERSION", "bridge", {}, env=warm)
            assert json.loads(call.stdout)["cniVersion"] == "1.1.0", call

    def test_readiness_is_told(self, host: Host, bundle: Path) -> None:
        """Type=notify: READY=1 once a worker waits for requests, and RELOADING=1 before an upgrade."""
        path = host.path("/run/netloom/notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(path))
            told.settimeout(60)
            process = host.popen(
                [str(bundle / "netloom-warm"), "--workers=1"],
                env={"PATH": PROGRAM_PATH, "NOTIFY_SOCKET": "/run/netloom/notify"},
            )
            assert "READY=1" in told.recv(1000).decode()
            process.send_signal(1)
            assert "RELOADING=1" in told.recv(1000).decode()
            assert "READY=1" in told.recv(1000).decode()
            process.terminate()
            assert process.wait() == 0


@pytest.mark.kernel
class TestDockersSocketActivation:
    """netloom-docker.socket listens, netloom-docker.service inherits: the first call starts it."""

    @pytest.fixture
    def activated(self, host: Host, bundle: Path) -> Iterator[Host]:
        host.start_ipamd()
        host.path("/run/docker/plugins").mkdir(parents=True)
        argv = ["systemd-socket-activate", f"--listen={docker_socket}", str(bundle / "netloom-docker")]
        log = (host.directory / "log").open("w")
        environment = {"PATH": PROGRAM_PATH, "NETLOOM_CNI_COLD": str(bundle / "netloom-cni")}
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        wait_until(lambda: host.path(docker_socket).exists(), "the socket")
        yield host
        process.terminate()
        assert process.wait() == 0, (host.directory / "log").read_text()
        log.close()

    def call(self, host: Host, name: str, **arguments: object) -> dict[str, object]:
        script = [sys.executable, "-I", "-S", str(ROOT / "tests/docker/call.py"), name, json.dumps(arguments)]
        answer: dict[str, object] = json.loads(host.run(script).stdout)
        assert "Err" not in answer, answer
        return answer

    def test_a_container_is_attached_by_the_bundled_program(self, activated: Host) -> None:
        assert self.call(activated, "Plugin.Activate") == {"Implements": ["NetworkDriver", "IpamDriver", "authz"]}
        pool = self.call(activated, "IpamDriver.RequestPool", Pool="10.71.0.0/24")["PoolID"]
        gateway = {"RequestAddressType": "com.docker.network.gateway"}
        assert (
            self.call(activated, "IpamDriver.RequestAddress", PoolID=pool, Options=gateway)["Address"] == "10.71.0.1/24"
        )
        given = self.call(activated, "IpamDriver.RequestAddress", PoolID=pool)["Address"]
        network, ends = {"NetworkID": "n1"}, {"NetworkID": "n1", "EndpointID": "e1"}
        data = [{"Pool": "10.71.0.0/24", "Gateway": "10.71.0.1/24"}]
        self.call(activated, "NetworkDriver.CreateNetwork", **network, IPv4Data=data)
        self.call(activated, "NetworkDriver.CreateEndpoint", **ends, Interface={"Address": given})
        joined = self.call(activated, "NetworkDriver.Join", **ends, SandboxKey="/none")
        assert joined["InterfaceName"] == {"SrcName": "nle1", "DstPrefix": "eth"}
        assert {"nle1", "nl-n1"} <= set(activated.links())
        self.call(activated, "NetworkDriver.DeleteEndpoint", **ends)
        # What it made goes after the answer (docs/adr/0016-docker-calls-answered-early.md).
        wait_until(lambda: "nle1" not in activated.links(), "the end of the interface")
        self.call(activated, "NetworkDriver.DeleteNetwork", **network)
