"""The bundle: what is inside, what it needs, and that it needs nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from cni.registry import PLUGINS
from kernel.version import VERSION
from tests.build.places import GLIBC, Chroot
from tests.hosts import IPV6, PROGRAM_PATH, ROOT, Host

OLDEST = (2, 36)  # Debian 12's glibc
PROGRAMS = ("netloom-cni", "netloom-warm", "ipamd", "netd", "netloom", "netloom-docker")
CONF = {
    "cniVersion": "1.1.0",
    "name": "web",
    "type": "bridge",
    "bridge": "web0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "ipamd", "ranges": [[{"subnet": "10.7.0.0/24"}], *([[{"subnet": "fd07::/64"}]] if IPV6 else [])]},
}


def elf_files(bundle: Path) -> list[Path]:
    files = [path for path in bundle.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.open("rb").read(4) == b"\x7fELF"]


def readelf(option: str, path: Path) -> str:
    return subprocess.run(["readelf", "--wide", option, path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plugin_answers_under_its_name(bundle: Path, plugin: str) -> None:
    """As the launcher executes it: its own path as argv[0], nothing else."""
    done = subprocess.run(
        [f"/opt/cni/bin/{plugin}"],
        executable=bundle / "netloom-cni",
        env={"CNI_COMMAND": "VERSION"},
        input=b"{}",
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["supportedVersions"][-1] == "1.1.0"
    assert done.stderr == b""


def test_every_plugins_module_is_inside(bundle: Path) -> None:
    modules = {entry.module for entry in PLUGINS.values()}
    modules |= {"ipamd.client", "kernel.nft", "libnetwork.http", "warm.worker"}
    missing = [name for name in modules if not (bundle / "_internal" / f"{name.replace('.', '/')}.pyc").exists()]
    assert missing == []


def test_build_names_types_and_glibc(bundle: Path) -> None:
    facts = dict(line.split("=", 1) for line in (bundle / "BUILD").read_text().splitlines())
    assert facts["build"].startswith(f"{VERSION}-")
    assert facts["types"].split() == sorted(PLUGINS)
    assert re.fullmatch(r"2\.\d+", facts["glibc"])


def test_each_library_is_inside_once_and_no_other_than_glibcs_is_outside(bundle: Path) -> None:
    inside = {path.name for path in elf_files(bundle)}
    needed = defaultdict(set)
    for path in elf_files(bundle):
        for name in re.findall(r"\(NEEDED\).*\[(.+)]", readelf("--dynamic", path)):
            needed[name].add(path.name)
    assert "libnftables.so.1" in inside
    assert {name: users for name, users in needed.items() if name not in inside and name not in GLIBC} == {}
    copies = defaultdict(list)
    for path in elf_files(bundle / "_internal"):
        copies[hashlib.sha256(path.read_bytes()).hexdigest()].append(path.name)
    assert [names for names in copies.values() if len(names) > 1] == []


def test_what_tests_and_tools_need_is_not_inside(bundle: Path) -> None:
    present = {path.name.partition(".")[0] for path in (bundle / "_internal").iterdir()}
    assert present.isdisjoint({"tests", "pytest", "_pytest", "tkinter", "setuptools", "pip", "mypy", "grpc_tools"})
    assert not list(bundle.rglob("*.py"))
    assert not list(bundle.rglob("roots.pem"))


def test_the_glibc_that_is_needed_is_the_one_that_is_stated(bundle: Path) -> None:
    wanted = {
        tuple(map(int, version.split(".")))
        for path in elf_files(bundle)
        for version in re.findall(r"\bGLIBC_(\d+(?:\.\d+)+)", readelf("--version-info", path))
    }
    stated = re.search(r"^glibc=(.*)$", (bundle / "BUILD").read_text(), re.MULTILINE)
    assert stated is not None
    assert max(wanted) == tuple(map(int, stated[1].split(".")))
    here = tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))  # type: ignore[union-attr]
    if here > OLDEST:
        pytest.skip(f"made with glibc {here}: releases are made on Debian 12")
    assert max(wanted) <= OLDEST


def test_it_is_made_again_only_when_something_changed(bundle: Path, tmp_path: Path) -> None:
    def name(root: Path, **environment: str) -> str:
        script = "import bundle; print(bundle.build_name(bundle.libnftables()))"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(root / "build"), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    copy = tmp_path / "copy"
    for package in ("build", "cli", "cni", "ipamd", "kernel", "libnetwork", "protos", "telemetry", "warm"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    before = name(copy)
    assert name(copy) == before
    (copy / "tests").mkdir()
    (copy / "tests/test_x.py").write_text("")
    assert name(copy) == before
    (copy / "cni/new.py").write_text("")
    after = name(copy)
    assert after != before
    library = tmp_path / "libnftables.so.1"
    library.write_bytes(b"another")
    assert name(copy, NETLOOM_LIBNFTABLES=str(library)) != after


def test_the_command_and_the_daemon_say_who_they_are(bundle: Path) -> None:
    def printed(*argv: str) -> str:
        return subprocess.run([bundle / argv[0], *argv[1:]], capture_output=True, text=True, check=True).stdout

    assert printed("netloom", "--version") == f"netloom {VERSION}\n"
    assert "Container networking" in printed("netloom", "--help")
    assert "address daemon" in printed("ipamd", "--help")
    assert "network daemon" in printed("netd", "--help")
    assert "warm workers" in printed("netloom-warm", "--help").lower()
    assert "Docker" in printed("netloom-docker", "--help")


def test_a_name_that_is_no_plugin(bundle: Path) -> None:
    done = subprocess.run([bundle / "netloom-cni"], env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bridge" in done.stderr


@pytest.mark.kernel
class TestAlone:
    """In a root directory that has glibc, what the kernel provides, and the bundle."""

    @pytest.fixture
    def alone(self, host: Host, bundle: Path, launcher: Path) -> Chroot:
        chroot = Chroot.empty(host)
        shutil.copytree(bundle, chroot.root / "usr/lib/netloom", symlinks=True)
        (chroot.root / "opt/cni/bin").mkdir(parents=True)
        for plugin in PLUGINS:
            shutil.copy(launcher, chroot.root / "opt/cni/bin" / plugin)
        return chroot

    def start_ipamd(self, alone: Chroot) -> None:
        alone.serve(["/usr/lib/netloom/ipamd", "--node", "alone"], "/run/netloom/ipamd.sock")

    def test_version(self, alone: Chroot) -> None:
        netns = alone.host.netns()
        assert alone.cni("VERSION", "bridge", {}, netns, cold=True)["cniVersion"] == "1.1.0"

    def test_one_attachment_from_add_to_nothing(self, alone: Chroot) -> None:
        self.start_ipamd(alone)
        host, netns = alone.host, alone.host.netns()
        printed = alone.cni("ADD", "bridge", CONF, netns, cold=True)
        cidrs = [ip["address"] for ip in printed["ips"]]
        assert sorted(netns.addresses()["eth0"]) == sorted(cidrs)
        netns.run(["ip", "link", "set", "lo", "up"])
        netns.ping("10.7.0.1")
        assert "masq4" in json.dumps(host.nft())
        alone.cni("CHECK", "bridge", {**CONF, "prevResult": printed}, netns, cold=True)
        alone.cni("DEL", "bridge", {**CONF, "prevResult": printed}, netns, cold=True)
        assert "eth0" not in netns.links()

    def test_warm(self, alone: Chroot) -> None:
        self.start_ipamd(alone)
        netns = alone.host.netns()
        alone.serve(["/usr/lib/netloom/netloom-warm", "--workers", "1"], "/run/netloom/cni.sock")
        printed = alone.cni("ADD", "bridge", CONF, netns, NETLOOM_CNI_WAIT_MS="60000")
        assert sorted(netns.addresses()["eth0"]) == sorted(ip["address"] for ip in printed["ips"])
        alone.cni("DEL", "bridge", {**CONF, "prevResult": printed}, netns, NETLOOM_CNI_WAIT_MS="60000")
        assert "eth0" not in netns.links()

    def test_the_command_draws_its_tables(self, alone: Chroot) -> None:
        """On a terminal, where more of its libraries is used than in a pipe."""
        self.start_ipamd(alone)
        netns = alone.host.netns()
        printed = alone.cni("ADD", "bridge", CONF, netns, cold=True)
        address = printed["ips"][0]["address"].partition("/")[0]
        ours, theirs = pty.openpty()
        shown = b""
        try:
            environment = {"PATH": PROGRAM_PATH, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
            process = alone.popen(
                ["/usr/lib/netloom/netloom", "ip", "list"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
            )
            process.wait()
            os.set_blocking(ours, False)
            shown = os.read(ours, 65536)
        finally:
            os.close(ours)
            os.close(theirs)
        assert process.returncode == 0, shown
        assert address.encode() in shown


@pytest.mark.kernel
@pytest.mark.parametrize("theirs", [None, "/their/libraries"])
def test_a_plugin_of_others_gets_the_callers_environment(
    host: Host, bundle: Path, launcher: Path, theirs: str | None
) -> None:
    """And nothing of what PyInstaller's bootloader adds to its own."""
    plugins = host.path("/opt/cni/bin")
    shutil.copy(launcher, plugins / "bridge")
    foreign = plugins / "foreign"
    foreign.write_text(
        '#!/bin/sh\nenv >/run/seen\necho \'{"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]}\'\n'
    )
    foreign.chmod(0o755)
    environment = {"NETLOOM_CNI_COLD": str(bundle / "netloom-cni"), "HOME": "/nowhere"}
    if theirs is not None:
        environment["LD_LIBRARY_PATH"] = theirs
    conf = {"cniVersion": "1.0.0", "name": "n", "type": "bridge", "ipam": {"type": "foreign"}}
    netns = host.netns()
    host.cni("ADD", "bridge", conf, netns=netns, env=environment).ok()
    seen = dict(line.split("=", 1) for line in host.path("/run/seen").read_text().splitlines())
    assert seen.get("LD_LIBRARY_PATH") == theirs
    assert seen["HOME"] == "/nowhere"
    assert [name for name in seen if name.startswith(("_PYI", "LD_LIBRARY_PATH_"))] == []
    host.cni("DEL", "bridge", conf, netns=netns, env=environment).ok()
