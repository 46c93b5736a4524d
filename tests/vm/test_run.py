"""tests/vm/run: statuses, output, and what the command finds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hosts import ROOT, wait_until
from tests.vm import inside, machine

pytestmark = pytest.mark.kernel

RUN = str(ROOT / "tests/vm/run")


def run(*argv: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Skips where there can be no virtual machine."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run([RUN, *argv], env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode == machine.CANNOT and env is None:
        pytest.skip(done.stderr)
    return done


def test_the_command_and_its_status(tmp_path: Path) -> None:
    """One boot for all that a command may look at."""
    looks = """
        echo "$0 $1"; pwd; id -u; uname -r; echo "$NETLOOM_WORD"; echo complaint >&2
        tc qdisc add dev lo root fq_codel && tc qdisc show dev lo | cut -d " " -f 2
        ip netns add inner && ip netns exec inner ip link set lo up && echo nested
        mount -t overlay -o lowerdir=/etc,upperdir=$(mktemp -d),workdir=$(mktemp -d) none /mnt && echo overlay
        python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/run/here")' && ls /run/here
        echo gone >README.md; echo changed >/usr/mark; ls -A /tmp | grep -c pytest
        seq 20000
        sleep 1000 &
        exit 5
    """
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    word = """it's "a word" $HOME"""
    os.environ["NETLOOM_WORD"] = word
    try:
        done = run("--", "sh", "-c", looks, "one two", "three")
    finally:
        del os.environ["NETLOOM_WORD"]
    assert done.returncode == 5, done
    lines = done.stdout.splitlines()
    assert lines[:3] == ["one two three", str(ROOT), "0"]
    assert lines[3].endswith("-amd64")
    assert lines[4:11] == [word, "complaint", "fq_codel", "nested", "overlay", "/run/here", "0"]
    assert lines[11:] == [str(number) for number in range(1, 20001)]
    assert done.stderr == ""
    assert (ROOT / "README.md").read_text(encoding="utf-8") == before
    assert not Path("/usr/mark").exists()


def test_a_command_that_takes_too_long_is_ended() -> None:
    done = run("-t", "3", "--", "sh", "-c", "echo begun; sleep 1000")
    assert (done.returncode, done.stdout) == (machine.TIME_OVER, "begun\n")
    assert "did not end within 3 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_machine_ends_with_who_started_it(number: signal.Signals, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([RUN, "--", "sleep", "1000"], cwd=ROOT, env=env) as process:
        # The kernel's console is a file there, which QEMU makes when it starts.
        wait_until(lambda: process.poll() is not None or list(tmp_path.glob("*/console")), "QEMU")
        if process.poll() == machine.CANNOT:
            pytest.skip("no virtual machine here")
        (qemu,) = children(process.pid)
        process.send_signal(number)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), "the end of QEMU")
    assert not list(tmp_path.iterdir()) or number == signal.SIGKILL


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def test_a_machine_that_dies_is_told() -> None:
    done = run("--", "sh", "-c", "echo last words >/dev/console; sleep 2; echo b >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == machine.DIED
    assert "ended by itself" in done.stderr
    assert "last words" in done.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    (tmp_path / "sh").symlink_to("/bin/sh")
    done = run("--", "true", env={"PATH": str(tmp_path), "NETLOOM_PYTHON": sys.executable})
    assert done.returncode == machine.CANNOT
    assert "missing: qemu-system-x86_64 (package qemu-system-x86), modprobe (package kmod)" in done.stderr


def test_no_kernel_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOTS", (tmp_path,))
    with pytest.raises(machine.CannotError, match="no kernel in out/vm or /boot: sh build/setup vm"):
        machine.find_kernel()
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-1.2-cloud").touch()
    with pytest.raises(machine.CannotError, match=r"kernel 1\.2-cloud has no module virtio_pci"):
        machine.find_kernel()


def test_a_clone_below_tmp(tmp_path: Path) -> None:
    """/tmp is empty inside, but for the clone."""
    clone = tmp_path / 'a folder, it\'s "so"'
    (clone / "tests").mkdir(parents=True)
    (clone / "out").mkdir()
    # Inside a link would lead nowhere where this clone is below /tmp, too.
    how = "-al" if ROOT.stat().st_dev == tmp_path.stat().st_dev else "-a"
    subprocess.run(["cp", how, str(ROOT / "out/vm"), str(clone / "out")], check=True)
    subprocess.run(["cp", "-a", str(ROOT / "tests/vm"), str(clone / "tests")], check=True)
    (clone / "hello").write_text("from below\n")
    argv = [str(clone / "tests/vm/run"), "--", "sh", "-c", "echo begun; sleep 5; cat hello"]
    with subprocess.Popen(argv, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        # Who works on the clone meanwhile is in nobody's way.
        (clone / "hello").write_text("something else\n")
        out, err = process.communicate()
    if process.returncode == machine.CANNOT:
        pytest.skip(err)
    assert (process.returncode, first + out) == (0, "begun\nfrom below\n"), err


def test_every_listed_test_exists() -> None:
    """The function; which parameters there are, pytest says."""
    for node in inside.nodes((ROOT / "tests/vm/selection").read_text(encoding="utf-8")):
        path, _, name = node.partition("::")
        assert (ROOT / path).exists(), node
        if name:
            assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), node


def test_a_file_stays_with_one_of_two() -> None:
    found = inside.dealt(inside.nodes("a::1  # why\n\n# b\nb\na::2\nc\n"))
    assert found == [["a::1", "a::2", "c"], ["b"]]


def test_the_worse_status_counts() -> None:
    assert [inside.worst(pair) for pair in ((0, 0), (0, 5), (5, 1), (2, 0), (5, 5))] == [0, 0, 1, 2, 5]
