"""The package on a system that systemd runs: this machine's files, booted in namespaces of their own.

systemd is process 1 of a pid namespace, in a cgroup namespace below a cgroup that the test makes and removes. What it
could reach of the machine is closed: /sys and /proc/sys (but for the namespace's own net) are read-only, /dev holds six
devices, and every unit that is not needed is masked.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.build.places import Chroot
from tests.hosts import PROGRAM_PATH, wait_until

UNITS = "netloom-ipamd.service netloom-cni.service netloom-cni.socket"
CONF = {
    "cniVersion": "1.1.0",
    "name": "web",
    "type": "bridge",
    "bridge": "web0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "ipamd", "ranges": [[{"subnet": "10.7.0.0/24"}]]},
}
MASKED = """
    systemd-udevd.service systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-udev-trigger.service
    systemd-sysctl.service systemd-modules-load.service kmod-static-nodes.service systemd-random-seed.service
    systemd-timesyncd.service systemd-remount-fs.service systemd-hwdb-update.service systemd-binfmt.service
    systemd-update-utmp.service systemd-firstboot.service systemd-machine-id-commit.service systemd-sysusers.service
    keyboard-setup.service console-setup.service networking.service nftables.service apparmor.service
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount
    sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount
    getty.target dbus.socket dbus.service systemd-logind.service
"""
TARGET = f"[Unit]\nDescription=test\nRequires=basic.target\nWants={UNITS}\n"
BOOT = r"""
root=$1
echo $$ >"$2/cgroup.procs"
exec unshare --cgroup --pid --fork --mount --uts --ipc --kill-child sh -ec '
root=$1
umount -R "$root/proc" "$root/sys" "$root/dev" "$root/run"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t proc proc "$root/mnt"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --bind "$root/mnt/sys/net" "$root/proc/sys/net"
umount "$root/mnt"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for name in run dev; do mount -t tmpfs -o mode=755 netloom "$root/$name"; done
for device in null zero full random urandom tty; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/dev/shm" "$root/dev/pts" "$root/.below"
cd "$root"
pivot_root . .below
umount -l /.below
rmdir /.below
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=netloom \
    /lib/systemd/systemd --unit=test.target --log-target=journal --show-status=no
' sh "$root"
"""


@dataclass(frozen=True, slots=True)
class Booted:
    """A system; `pid` is that of its systemd."""

    pid: int

    def sh(self, script: str) -> str:
        """What a shell in the system prints, also on standard error. Whether it succeeds is not asked."""
        environment = {"PATH": PROGRAM_PATH, "LC_ALL": "C", "SYSTEMD_PAGER": "", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-C", "-i", "-u", "-r", "-w", "sh", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout

    def active(self) -> bool:
        return self.sh(f"systemctl is-active {UNITS}").split() == ["active"] * 3

    def main_pid(self, unit: str) -> str:
        return self.sh(f"systemctl show --property MainPID --value {unit}").strip()

    def journal(self) -> str:
        return self.sh("journalctl | tail -n 50")

    def build(self, unit: str) -> str:
        """The build that the unit's process was started from."""
        return Path(self.sh(f"readlink /proc/{self.main_pid(unit)}/exe")).parent.name

    def cni(self, verb: str, conf: Mapping[str, Any]) -> dict[str, Any]:
        """By a warm worker: the cold way is closed."""
        environment = f"CNI_COMMAND={verb} CNI_CONTAINERID=c1 CNI_IFNAME=eth0 CNI_NETNS=/run/netns/c1"
        environment += " CNI_PATH=/opt/cni/bin NETLOOM_CNI_COLD=/nonexistent NETLOOM_CNI_WAIT_MS=60000"
        printed = self.sh(f"echo '{json.dumps(conf)}' | env {environment} /opt/cni/bin/bridge")
        found: dict[str, Any] = json.loads(printed) if printed else {}
        assert "code" not in found, printed
        return found


def unified() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    parent = unified()
    if parent is None or not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs systemd and a mounted cgroup2 hierarchy")
    path = parent / f"netloom-test-{secrets.token_hex(4)}"
    path.mkdir()
    yield path

    def removed() -> bool:
        for directory, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):  # somebody is still on the way out
                os.rmdir(directory)
        return not path.exists()

    wait_until(removed, f"the end of all in {path}")


@pytest.fixture
def booted(cgroup: Path, chroot: Chroot, packages: tuple[Path, Path]) -> Iterator[Booted]:
    """With the older package installed before the boot, as the machine's image would have it."""
    place = chroot.root / "srv"
    for number, package in enumerate(packages):
        chroot.host.run(["cp", str(package), str(place / f"{number}.deb")])
    chroot.sh(f"rm -f /usr/sbin/policy-rc.d; : >/etc/fstab; PATH={PROGRAM_PATH} dpkg -i /srv/0.deb")
    chroot.sh(f"cd /etc/systemd/system; printf '{TARGET}' >test.target; for i in {' '.join(MASKED.split())}; do "
              "ln -sf /dev/null $i; done")  # fmt: skip
    log = chroot.host.directory / "log"
    with log.open("w") as output:
        process = chroot.host.popen(
            ["sh", "-ec", BOOT, "sh", str(chroot.root), str(cgroup)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
        )
    found: list[Booted] = []

    def boots() -> bool:
        assert process.poll() is None, log.read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found[:] = [Booted(int(pid)) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "systemd\n"]
        return bool(found) and found[0].active()

    try:
        wait_until(boots, "systemd and the units", lambda: found[0].sh("journalctl | tail -n 50") if found else "")
        yield found[0]
    finally:
        for one in found:
            os.kill(one.pid, signal.SIGKILL)  # and with it all of its pid namespace
        process.wait()


def check_netd(booted: Booted) -> None:
    """Nobody's default; it lives with its unit's restrictions, and what it made outlives it."""
    assert booted.sh("systemctl is-enabled netloom-netd.service") == "disabled\n"
    booted.sh("ip link add under0 type bridge; ip addr add 10.0.0.11/24 dev under0; ip link set under0 up")
    booted.sh("cp /etc/netloom/netloom.toml /srv/kept.toml")
    lines = ["[netd]", 'node = "a"', 'interface = "under0"', 'subnets = ["10.2.1.0/24"]', "[[peer]]", 'name = "b"']
    lines += ['address = "10.0.0.12"', 'subnets = ["10.2.2.0/24"]']
    booted.sh(f"printf '%s\\n' {' '.join(shlex.quote(line) for line in lines)} >/etc/netloom/netloom.toml")
    booted.sh("systemctl start netloom-netd.service")
    try:
        wait_until(lambda: "10.2.2.0 dev nl-vx1" in booted.sh("ip route"), "the route", booted.journal)
        assert "NoNewPrivs:\t1\n" in booted.sh(f"cat /proc/{booted.main_pid('netloom-netd')}/status")
        assert booted.sh("stat -c '%a %U' /run/netloom/netd.sock") == "600 root\n"
        wait_until(lambda: "1 of 1 hosts reached" in booted.sh("netloom status"), "its answer", booted.journal)
        before = booted.main_pid("netloom-netd")
        booted.sh("sed -i 's/10.2.2.0/10.2.3.0/' /etc/netloom/netloom.toml; systemctl reload netloom-netd.service")
        wait_until(lambda: "10.2.3.0 dev nl-vx1" in booted.sh("ip route"), "the other route", booted.journal)
        assert booted.main_pid("netloom-netd") == before
        assert booted.sh("cat /proc/sys/net/ipv4/ip_forward") == "1\n"
        booted.sh("systemctl stop netloom-netd.service")
        assert "10.2.3.0 dev nl-vx1" in booted.sh("ip route")
        assert booted.sh("/usr/lib/netloom/netd --remove") == "removed 2 routes and tunnels\n"
    finally:
        booted.sh("systemctl stop netloom-netd.service; cp /srv/kept.toml /etc/netloom/netloom.toml")


@pytest.mark.kernel
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages for Debian are made on Debian")
def test_boot_attach_upgrade_purge(booted: Booted) -> None:
    """One boot for all, as it takes seconds."""
    # ipamd lives with its unit's restrictions, as its user; a request of root's finds a worker in the same namespaces.
    booted.sh("ip link set lo up; ip netns add c1")
    printed = booted.cni("ADD", CONF)
    conf = {**CONF, "prevResult": printed}
    address = printed["ips"][0]["address"].partition("/")[0]
    assert address in booted.sh("netloom ip list")
    assert "NoNewPrivs:\t1\n" in booted.sh(f"cat /proc/{booted.main_pid('netloom-ipamd')}/status")
    assert booted.sh("stat -c %U /run/netloom/ipamd.sock /var/lib/netloom/ipamd.db") == "netloom\nnetloom\n"

    # An upgrade: another ipamd, the same master with the new program, the same addresses.
    before = {unit: booted.main_pid(unit) for unit in ("netloom-ipamd", "netloom-cni")}
    assert "Setting up netloom (1.0.0-1)" in booted.sh("dpkg -i /srv/1.deb")
    wait_until(
        lambda: all(booted.build(unit).startswith("1.0.0-1-") for unit in before),
        "the new build",
        booted.sh("ps ax").strip,
    )
    wait_until(booted.active, "the units")
    assert booted.main_pid("netloom-cni") == before["netloom-cni"]
    assert booted.main_pid("netloom-ipamd") != before["netloom-ipamd"]
    wait_until(lambda: address in booted.sh("netloom ip list"), "ipamd")
    booted.cni("CHECK", conf)
    booted.cni("DEL", conf)
    assert address not in booted.sh("netloom ip list")

    # Killed: systemd starts it again. Stopped: the next request starts it through the socket.
    master = booted.main_pid("netloom-cni")
    booted.sh("systemctl kill --signal KILL netloom-cni.service")
    wait_until(lambda: booted.main_pid("netloom-cni") not in (master, "0") and booted.active(), "another master")
    booted.cni("VERSION", CONF)
    booted.sh("systemctl stop netloom-cni.service")
    booted.cni("VERSION", CONF)
    wait_until(booted.active, "the units")

    # The Docker shim is nobody's default. Enabled, its socket is there first, and an upgrade restarts it.
    assert booted.sh("systemctl is-enabled netloom-docker.socket netloom-docker.service") == "disabled\n" * 2
    booted.sh("systemctl enable --now netloom-docker.socket")
    assert booted.sh("stat -c '%a %U' /run/docker/plugins /run/docker/plugins/netloom.sock") == "700 root\n600 root\n"
    booted.sh("systemctl start netloom-docker.service")
    wait_until(lambda: booted.build("netloom-docker").startswith("1.0.0-1-"), "the shim", booted.journal)
    owned = "stat -c '%a %U' /run/netloom/staging /var/lib/netloom/docker"
    wait_until(lambda: booted.sh(owned) == "700 root\n" * 2, "the shim's directories", booted.journal)
    # Its namespaces are mounts; the purge below takes them away.
    booted.sh("touch /run/netloom/staging/one; mount --bind /proc/self/ns/net /run/netloom/staging/one")
    assert "/run/netloom/staging/one" in booted.sh("cat /proc/mounts")

    check_netd(booted)

    # Disabled by an operator: an upgrade does not enable it.
    booted.sh("systemctl disable netloom-ipamd.service; dpkg --force-downgrade -i /srv/0.deb")
    assert booted.sh("systemctl is-enabled netloom-ipamd.service") == "disabled\n"
    assert booted.sh("systemctl is-enabled netloom-docker.socket") == "enabled\n"
    wait_until(lambda: booted.build("netloom-docker").startswith("0.0.9-1-"), "the shim's other build", booted.journal)

    booted.sh("dpkg --purge netloom")
    assert booted.sh("systemctl list-units --no-legend 'netloom*'") == ""
    left = booted.sh("find /etc /var/lib /usr/lib/netloom /opt /run -iname '*netloom*' ! -path '/var/lib/apt/*' 2>&-")
    assert left == ""
    assert booted.sh("getent passwd netloom; getent group netloom; ps ax | grep [n]etloom-") == ""
