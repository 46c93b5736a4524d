"""The demo as a user starts it: it holds, and leaves nothing, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.hosts import IPV6, ROOT, sweep

pytestmark = pytest.mark.kernel
DEMO = [sys.executable, "-m", "demo"]


def left() -> set[str]:
    return {path.name for path in Path("/tmp").glob("netloom-*")}


def run(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        DEMO,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


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
    before = left()
    done = run({"LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert done.stdout.endswith("All of it held.\n")
    assert done.stdout.count(" -> ") == (8 if IPV6 else 4)
    assert left() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_it_removes_everything(started: subprocess.Popen[str], number: signal.Signals, status: int) -> None:
    mine = {name for name in left() if f"-{started.pid}-" in name}
    assert len(mine) == 1
    started.send_signal(number)
    started.communicate()
    assert started.returncode == status
    assert not mine & left()


def test_killed_it_leaves_what_the_next_one_sweeps(started: subprocess.Popen[str]) -> None:
    mine = {name for name in left() if f"-{started.pid}-" in name}
    started.kill()
    started.communicate()
    assert mine <= left()
    done = run({})
    assert done.returncode == 0
    assert f"left by a dead run: removed /tmp/{mine.pop()}" in done.stdout


def test_a_reader_that_goes_away_is_no_mess(started: subprocess.Popen[str]) -> None:
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, complaint = started.communicate()
    assert (started.returncode, complaint) == (1, "")
    assert not {name for name in left() if f"-{started.pid}-" in name}
