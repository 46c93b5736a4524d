"""The demo as a user starts it: it holds, and leaves nothing, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import IPV6, ROOT, sweep

pytestmark = pytest.mark.kernel
DEMO = [sys.executable, "-m", "demo"]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where only these demos write and sweep: other runs begin at any time, and sweep then."""
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        monkeypatch.setenv("NETLOOM_SCRATCH", directory)
        yield Path(directory)


def run() -> str:
    """What a demo prints in the C locale from beginning to end."""
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
    return printed


@pytest.fixture
def started(place: Path) -> Iterator[subprocess.Popen[str]]:
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
        sweep(str(place))


def test_all_of_it_holds_and_nothing_stays(place: Path) -> None:
    printed = run()
    assert printed.isascii()
    assert "\x1b" not in printed
    assert printed.endswith("All of it held.\n")
    assert printed.count(" -> ") == (8 if IPV6 else 4)
    assert not list(place.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_it_removes_everything(
    place: Path, started: subprocess.Popen[str], number: signal.Signals, status: int
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as by nohup")
    assert len(list(place.iterdir())) == 1
    started.send_signal(number)
    started.communicate()
    assert started.returncode == status
    assert not list(place.iterdir())


def test_killed_it_leaves_what_the_next_one_sweeps(place: Path, started: subprocess.Popen[str]) -> None:
    (left,) = place.iterdir()
    started.kill()
    started.communicate()
    assert list(place.iterdir()) == [left]
    assert f"left by a dead run: removed {left}\n" in run()
    assert not list(place.iterdir())


def test_a_reader_that_goes_away_is_no_mess(place: Path, started: subprocess.Popen[str]) -> None:
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, complaint = started.communicate()
    assert (started.returncode, complaint) == (1, "")
    assert not list(place.iterdir())
