"""The demo as a user starts it: it holds, and leaves nothing, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import IPV6, ROOT, sweep

pytestmark = pytest.mark.kernel
DEMO = [sys.executable, "-m", "demo"]


def left_by(pid: int) -> set[str]:
    """The scratch directories of one process: others may run beside us."""
    return {path.name for path in Path("/tmp").glob(f"netloom-*-{pid}-*")}


def run() -> tuple[int, str]:
    """A demo from beginning to end in the C locale: its process id, and what it printed."""
    with subprocess.Popen(
        DEMO,
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        printed, complaint = process.communicate()
    assert (process.returncode, complaint) == (0, "")
    return process.pid, printed


@pytest.fixture
def started() -> Iterator[subprocess.Popen[str]]:
    """A demo in the middle: one container is attached, the second is about to be."""
    process = subprocess.Popen(DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "to blue" in line:
                break
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        sweep()


def test_all_of_it_holds_and_nothing_stays() -> None:
    pid, printed = run()
    assert printed.isascii()
    assert "\x1b" not in printed
    assert printed.endswith("All of it held.\n")
    assert printed.count(" -> ") == (8 if IPV6 else 4)
    assert not left_by(pid)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_it_removes_everything(started: subprocess.Popen[str], number: signal.Signals, status: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as by nohup")
    assert len(left_by(started.pid)) == 1
    started.send_signal(number)
    started.communicate()
    assert started.returncode == status
    assert not left_by(started.pid)


def test_killed_it_leaves_what_the_next_one_sweeps(started: subprocess.Popen[str]) -> None:
    mine = left_by(started.pid)
    started.kill()
    started.communicate()
    assert left_by(started.pid) == mine
    _, printed = run()
    assert f"left by a dead run: removed /tmp/{mine.pop()}" in printed


def test_a_reader_that_goes_away_is_no_mess(started: subprocess.Popen[str]) -> None:
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, complaint = started.communicate()
    assert (started.returncode, complaint) == (1, "")
    assert not left_by(started.pid)
