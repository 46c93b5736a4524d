"""The package, installed, upgraded, removed and purged with dpkg, in a copy of this machine's root.

The copy is an overlay in a mount namespace of its own; a test at the end asserts that the machine's dpkg knows nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.registry import PLUGINS
from tests.build.places import Chroot
from tests.hosts import PROGRAM_PATH, wait_until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages for Debian are made on Debian"),
]

CONF = {
    "cniVersion": "1.1.0",
    "name": "web",
    "type": "bridge",
    "bridge": "web0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "ipamd", "ranges": [[{"subnet": "10.7.0.0/24"}]]},
}
Packages = tuple[Path, Path]


@pytest.fixture(scope="module", autouse=True)
def untouched() -> Iterator[None]:
    """Whatever happens here, this machine's own system has not changed."""
    watched = ("/var/lib/dpkg/status", "/var/lib/dpkg/diversions", "/etc/passwd", "/etc/group")
    before = {path: Path(path).read_bytes() for path in watched if Path(path).exists()}
    there = {
        path: os.path.lexists(path) for path in ("/usr/lib/netloom", "/opt/cni/bin", "/usr/bin/netloom", "/etc/netloom")
    }
    yield
    assert {path: Path(path).read_bytes() for path in before} == before
    assert {path: os.path.lexists(path) for path in there} == there


@pytest.fixture
def machine(chroot: Chroot) -> Chroot:
    """One without Netloom, whatever the machine itself has."""
    chroot.sh(f"PATH={PROGRAM_PATH}; if dpkg-query -W netloom; then dpkg --purge netloom; fi", check=False)
    return chroot


def dpkg(machine: Chroot, *argv: str) -> str:
    # The root below is also seen as /tmp, so a package is where it is.
    environment = {"PATH": PROGRAM_PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = machine.run(["dpkg", "--force-confold", *argv], env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(machine: Chroot) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """What systemd does: ipamd as its user, and the workers."""
    account = ["setpriv", "--reuid=netloom", "--regid=netloom", "--init-groups"]
    ipamd = machine.serve([*account, "/usr/lib/netloom/ipamd", "--node", "n"], "/run/netloom/ipamd.sock")
    workers = machine.serve(["/usr/lib/netloom/netloom-warm", "--workers", "1"], "/run/netloom/cni.sock")
    return ipamd, workers


def build_of(process: subprocess.Popen[str]) -> str:
    return Path(os.readlink(f"/proc/{process.pid}/exe")).parent.name


def theirs(directory: Path, version: str, also: str = "opt/cni/bin/x") -> Path:
    """A package of others that has a plugin called bridge, and one file more."""
    root = directory / f"cni-{version}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "DEBIAN").mkdir(parents=True)
    (root / "opt/cni/bin").mkdir(parents=True)
    (root / "opt/cni/bin/bridge").write_text(f"#!/bin/sh\necho {version}\n")
    (root / "opt/cni/bin/bridge").chmod(0o755)
    (root / also).parent.mkdir(parents=True, exist_ok=True)
    (root / also).write_text("theirs")
    (root / "DEBIAN/control").write_text(
        f"Package: kubernetes-cni\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: them <t@example.com>\nDescription: x\n"
    )
    package = directory / f"cni-{version}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, package], check=True, capture_output=True
    )
    return package


def test_content_is_that_of_make_install(packages: Packages) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", packages[0]], capture_output=True, text=True, check=True).stdout
    paths = {line.split()[5].rstrip("/") for line in listed.splitlines()}
    assert {f"./opt/cni/bin/{plugin}" for plugin in PLUGINS} <= paths
    assert "./usr/lib/netloom/package/netloom-cni" in paths
    assert "./lib/systemd/system/netloom-ipamd.service" in paths
    assert all(line.split()[1] == "root/root" for line in listed.splitlines())
    fields = subprocess.run(["dpkg-deb", "--field", packages[0]], capture_output=True, text=True, check=True).stdout
    assert "Version: 0.0.9-1\n" in fields
    assert "Depends: libc6 (>= 2." in fields


def test_it_takes_the_names_of_others_and_gives_them_back(machine: Chroot, packages: Packages) -> None:
    place = machine.host.directory
    dpkg(machine, "-i", str(theirs(place, "1.0")))
    machine.sh("mkdir -p /opt/cni/bin; echo nobodys >/opt/cni/bin/loopback; chmod 755 /opt/cni/bin/loopback")
    before = machine.sh("ls -l /opt/cni/bin; cat /opt/cni/bin/*")
    dpkg(machine, "-i", str(packages[0]))
    assert machine.sh("/opt/cni/bin/bridge.before-netloom") == "1.0\n"
    assert machine.sh("cat /opt/cni/bin/loopback.before-netloom") == "nobodys\n"
    version = machine.run(["/opt/cni/bin/bridge"], env={"PATH": PROGRAM_PATH, "CNI_COMMAND": "VERSION"}).stdout
    assert json.loads(version)["supportedVersions"][-1] == "1.1.0"
    # Their upgrade goes to where theirs is now; ours goes on.
    dpkg(machine, "-i", str(theirs(place, "1.1")))
    assert machine.sh("/opt/cni/bin/bridge.before-netloom") == "1.1\n"
    dpkg(machine, "-i", str(packages[1]))
    assert machine.sh("/opt/cni/bin/bridge.before-netloom") == "1.1\n"
    dpkg(machine, "--remove", "netloom")
    assert machine.sh("/opt/cni/bin/bridge") == "1.1\n"
    dpkg(machine, "--purge", "netloom")
    dpkg(machine, "-i", str(theirs(place, "1.0")))
    assert machine.sh("ls -l /opt/cni/bin; cat /opt/cni/bin/*") == before
    assert machine.sh("dpkg-divert --list '*netloom*'") == ""


def test_an_upgrade_keeps_containers_connected_and_the_database(machine: Chroot, packages: Packages) -> None:
    dpkg(machine, "-i", str(packages[0]))
    ipamd, workers = start(machine)
    netns = machine.host.netns()
    printed = machine.cni("ADD", "bridge", CONF, netns, NETLOOM_CNI_WAIT_MS="60000")
    conf = {**CONF, "prevResult": printed}
    address = printed["ips"][0]["address"].partition("/")[0]
    netns.run(["ip", "link", "set", "lo", "up"])
    netns.ping("10.7.0.1")
    assert build_of(workers).startswith("0.0.9-1-")
    held = machine.sh("/usr/bin/netloom --version && /usr/bin/netloom ip list --json")

    dpkg(machine, "-i", str(packages[1]))
    netns.ping("10.7.0.1")
    # The programs that run are whole: nothing was taken from under them.
    machine.cni("CHECK", "bridge", conf, netns, NETLOOM_CNI_WAIT_MS="60000")
    machine.cni("CHECK", "bridge", conf, netns, cold=True)
    # What postinst lets systemd do where that runs: reload the workers, restart ipamd.
    workers.send_signal(signal.SIGHUP)
    wait_until(lambda: build_of(workers).startswith("1.0.0-1-"), "the new build", lambda: build_of(workers))
    ipamd.terminate()
    assert ipamd.wait() == 0
    account = ["setpriv", "--reuid=netloom", "--regid=netloom", "--init-groups"]
    machine.serve([*account, "/usr/lib/netloom/ipamd", "--node", "n"], "/run/netloom/ipamd.sock")

    assert machine.sh("/usr/bin/netloom --version && /usr/bin/netloom ip list --json") == held
    assert address in held
    machine.cni("CHECK", "bridge", conf, netns, NETLOOM_CNI_WAIT_MS="60000")
    netns.ping("10.7.0.1")
    machine.cni("DEL", "bridge", conf, netns, NETLOOM_CNI_WAIT_MS="60000")
    assert "eth0" not in netns.links()
    assert address not in machine.sh("/usr/bin/netloom ip list --json")


def test_an_operators_configuration_survives_an_upgrade(machine: Chroot, packages: Packages) -> None:
    dpkg(machine, "-i", str(packages[0]))
    machine.sh("printf '[pools]\\ncooldown_s = 7\\n' >/etc/netloom/netloom.toml")
    dpkg(machine, "-i", str(packages[1]))
    assert "cooldown_s = 7" in machine.sh("cat /etc/netloom/netloom.toml")
    dpkg(machine, "--remove", "netloom")
    assert "cooldown_s = 7" in machine.sh("cat /etc/netloom/netloom.toml")


def test_purge_leaves_nothing(machine: Chroot, packages: Packages) -> None:
    shown = (
        "cat /etc/passwd /etc/group; ls -A /opt /etc /var/lib /usr/lib /usr/bin /lib/systemd/system /etc/systemd/system"
    )
    shown += " /usr/lib/sysusers.d /usr/lib/tmpfiles.d /usr/share/doc /run"
    machine.sh("rmdir /run/netloom; touch /mark")
    before = machine.sh(shown)
    dpkg(machine, "-i", str(packages[0]))
    ipamd, workers = start(machine)
    netns = machine.host.netns()
    printed = machine.cni("ADD", "bridge", CONF, netns, NETLOOM_CNI_WAIT_MS="60000")
    machine.cni("DEL", "bridge", {**CONF, "prevResult": printed}, netns, NETLOOM_CNI_WAIT_MS="60000")
    for process in (workers, ipamd):
        process.terminate()
        process.wait()
    dpkg(machine, "-i", str(packages[1]))
    dpkg(machine, "--purge", "netloom")
    machine.host.run(["ip", "netns", "delete", netns.name])
    machine.sh("rmdir /run/netns", check=False)
    left = machine.sh("find / -xdev -path /tmp -prune -o -newer /mark -iname '*netloom*' -print", check=False)
    assert left == ""
    assert machine.sh("grep -l netloom /var/lib/dpkg/status /var/lib/dpkg/diversions", check=False) == ""
    assert machine.sh(shown, check=False).replace("netns\n", "") == before.replace("netns\n", "")


def test_what_is_given_up_half_way_leaves_the_plugins_of_others(machine: Chroot, packages: Packages) -> None:
    """dpkg does not unpack what another package has; by then preinst has made its diversions."""
    dpkg(machine, "-i", str(theirs(machine.host.directory, "1.0", also="usr/lib/netloom/settle")))
    machine.sh("echo nobodys >/opt/cni/bin/loopback")
    shown = "ls /opt/cni/bin /usr/lib/netloom; cat /opt/cni/bin/bridge /opt/cni/bin/loopback; "
    shown += "dpkg-divert --list '/opt/cni/*'"
    before = machine.sh(shown)
    done = machine.run(["dpkg", "-i", str(packages[0])], env={"PATH": PROGRAM_PATH, "LC_ALL": "C"}, check=False)
    assert "trying to overwrite '/usr/lib/netloom/settle'" in done.stderr
    assert machine.sh(shown) == before
