"""How a run of pytest ends, in one process and with workers: interrupted, by a test that hangs, a worker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import PATIENCE_S, ROOT, wait_until

pytestmark = pytest.mark.kernel
ALONE: tuple[str, ...] = ()
TWO = ("-p", "xdist", "-n", "2", "--dist", "loadscope")
both_ways = pytest.mark.parametrize("workers", [ALONE, TWO], ids=["alone", "two"])
WAITS = """
import time
from pathlib import Path
import pytest
from tests.test_hosts import busy

def tell(what, text=""):
    half = Path(__file__).with_suffix(".half")
    half.write_text(text)
    half.rename(half.with_suffix(what))

@pytest.fixture
def slow(host):
    busy(host)
    yield host
    tell(".ending")
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.01)
    tell(".done")

def test_waits(slow):
    tell(".host", str(slow.directory))
    time.sleep(1000)
"""


def command(directory: Path, workers: tuple[str, ...]) -> list[str]:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", str(directory)]
    return [*argv, *workers, f"--rootdir={directory}", f"--basetemp={directory}/tmp"]


def environment(**more: str) -> dict[str, str]:
    """Without what the run that we are in tells its workers, and without plugins that nobody here needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **more}


def run(directory: Path, workers: tuple[str, ...], test: str, **more: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(test)
    return subprocess.run(
        command(directory, workers), capture_output=True, text=True, cwd=ROOT, check=False, env=environment(**more)
    )


@both_ways
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up_behind_itself(
    tmp_path: Path, workers: tuple[str, ...], number: signal.Signals
) -> None:
    names = ["a", "b"] if workers is TWO else ["a"]
    for name in names:
        (tmp_path / f"test_{name}.py").write_text(WAITS)
    if workers is TWO:  # so that it need not take xdist's 10 s until it kills those that still clean up
        (tmp_path / "conftest.py").write_text("from xdist import workermanage as w\nw.NodeManager.EXIT_TIMEOUT = 0.5\n")

    def all_are(what: str) -> bool:
        return all((tmp_path / f"test_{name}.{what}").exists() for name in names)

    with (tmp_path / "output").open("w+") as output:
        # A group of its own, as a shell makes it for what runs in the foreground of a terminal.
        running = subprocess.Popen(
            command(tmp_path, workers),
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
        try:
            wait_until(lambda: all_are("host") or running.poll() is not None, "the tests")
            directories = [Path((tmp_path / f"test_{name}.host").read_text()) for name in names]
            assert all(directory.exists() for directory in directories)
            if number == signal.SIGINT:  # Ctrl-C goes to all of them
                os.killpg(running.pid, number)
            else:
                running.send_signal(number)
            wait_until(lambda: all_are("ending") or running.poll() is not None, "the end of the tests")
            if number == signal.SIGTERM:
                running.send_signal(number)
            (tmp_path / "go").touch()
            assert running.wait(PATIENCE_S) != 0
        finally:
            running.kill()
            running.wait()
        output.seek(0)
        assert all_are("done"), output.read()
    assert not any(directory.parent.exists() for directory in directories)


@both_ways
def test_a_test_that_hangs_fails_and_the_run_goes_on(tmp_path: Path, workers: tuple[str, ...]) -> None:
    hangs = "import time\ndef test_hangs():\n    time.sleep(1000)\ndef test_next():\n    pass\n"
    done = run(tmp_path, workers, hangs, NETLOOM_TEST_LIMIT_S="1")
    assert "1 failed, 1 passed" in done.stdout
    assert "test_hangs took more than 1 s" in done.stderr


def test_a_worker_that_dies_ends_the_run_and_what_it_left_is_swept(tmp_path: Path) -> None:
    dies = (
        "import os, signal\nfrom pathlib import Path\n"
        "def test_dies(host):\n    Path(__file__).with_suffix('.host').write_text(str(host.directory))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_next():\n    pass\n"
    )
    done = run(tmp_path, TWO, dies)
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert "1 failed in" in done.stdout
    directory = Path((tmp_path / "test_it.host").read_text()).parent
    assert not directory.exists()


def test_a_test_that_leaves_files_on_the_machine_itself_fails(tmp_path: Path) -> None:
    (tmp_path / "machines").mkdir()
    leaves = (
        "from pathlib import Path\nfrom tests import machine\n"
        f"machine._DIRECTORIES = ({str(tmp_path / 'machines')!r},)\n"
        "def test_leaves():\n    Path(machine._DIRECTORIES[0], 'left').touch()\n"
        "def test_next():\n    pass\n"
    )
    done = run(tmp_path, ALONE, leaves)
    assert "2 passed, 1 error" in done.stdout
    assert f"came {tmp_path}/machines/left" in done.stdout
