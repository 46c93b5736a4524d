"""What a killed run of these tests leaves, the next one removes: daemons, containers, mounts, cgroups, files."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hosts
from tests.hosts import ROOT, wait_until
from tests.runtimes import cgroups

pytestmark = pytest.mark.kernel

VICTIM = """
import sys, time
from pathlib import Path
from tests import hosts
from tests.runtimes import networks
from tests.runtimes.podman import Podman
from tests.runtimes.containerd import Containerd
launcher = Path(sys.argv[1])
with Podman(launcher) as podman, Containerd(launcher) as containerd:
    podman.conflist("web", networks.CHAIN)
    podman.start("a", "--network", "web")
    containerd.conflist("web", networks.CHAIN)
    containerd.ctr_run("a", "-d")
    print(hosts.scratch(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def scratch(launcher: Path) -> Iterator[Path]:
    """Of a run that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(launcher)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        path = Path(victim.stdout.readline().strip())
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    yield path
    hosts.sweep()
    cgroups.sweep()


def test_a_killed_run_leaves_nothing_for_long(scratch: Path) -> None:
    assert scratch.name.startswith("netloom-")
    procs = [file for top in cgroups.tops(scratch.name) for file in top.rglob("cgroup.procs")]
    alive = dict(hosts._processes_in(str(scratch)))
    assert any("conmon" in command for command in alive.values())
    assert any("containerd-shim" in command for command in alive.values())
    containers = {int(pid) for file in procs for pid in file.read_text(encoding="ascii").split()}
    assert sum("httpd" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8") for pid in containers) == 2
    hosts.sweep()
    assert not scratch.exists()
    cgroups.sweep()
    assert not list(cgroups.tops(scratch.name))
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (*alive, *containers)), "the end of them all")
    assert scratch.name not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_a_cgroup_that_goes_while_they_are_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_TOP", tmp_path)
    top = tmp_path / "memory" / cgroups.parent()[1:]
    (top / "stays" / "inner").mkdir(parents=True)
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            (top / "goes").mkdir()
            (top / "goes").rmdir()

    busy = threading.Thread(target=come_and_go)
    busy.start()
    try:
        for _ in range(1000):
            assert set(cgroups.found()) - {"goes"} == {"stays", "stays/inner"}
    finally:
        over.set()
        busy.join()
