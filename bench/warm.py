"""The warm way on a host of the benchmark: launchers in /opt/cni/bin, a master with its workers behind them.

The launchers are compiled so that their cold way leads nowhere: a call that no worker took fails, and with it the
measurement. So every time that is reported was made by a worker.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.host import BenchError
from cni.registry import PLUGINS
from tests.hosts import CNI_BIN, ROOT, Host, wait_until

_SOURCE = ROOT / "warm" / "launcher.c"
_MASTER = ROOT / "warm" / "host.py"
SOCKET = "/run/netloom/cni.sock"
_STOP_S = 90
_NO_COLD_WAY = "/nonexistent/cold-is-not-measured-here"


def exists() -> bool:
    """Whether this tree has a warm way at all."""
    return _SOURCE.exists() and _MASTER.exists()


def start(
    host: Host, place: Path, until: ExitStack, arguments: Sequence[str] = (), path: str = SOCKET
) -> subprocess.Popen[str]:
    """Installs the launchers and returns the master once its socket takes connections; the end of `until` stops it.

    Raises BenchError, HostError.
    """
    if not exists():
        raise BenchError(f"there is no warm way yet ({_SOURCE.relative_to(ROOT)}, {_MASTER.relative_to(ROOT)})")
    launcher = _compiled(place)
    for plugin in PLUGINS:
        new = host.path(CNI_BIN) / f"{plugin}.new"
        shutil.copy2(launcher, new)
        new.replace(host.path(CNI_BIN) / plugin)
    log = host.directory / "master.log"
    argv = [sys.executable, "-m", "warm", "--socket", path, *arguments]
    with log.open("a", encoding="utf-8") as file:
        master = host.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    until.callback(_stop, master)

    def said() -> str:
        return log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def serving() -> bool:
        if master.poll() is not None:
            raise BenchError(f"the warm master ended with status {master.returncode}: {said()}")
        return answers(host.path(path)) and len(workers(master.pid)) > 0

    wait_until(serving, "the warm master", said)
    return master


def children(pid: int) -> list[int]:
    """The processes that a process started and that are left (proc(5), children)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]


def workers(master: int) -> list[int]:
    """The workers of a master."""
    return [pid for pid in children(master) if "worker" in _title(pid)]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii")
    except OSError:
        return ""


def _stop(master: subprocess.Popen[str]) -> None:
    """SIGTERM, and wait: killed, it would leave its workers to the host's teardown, which calls that an error."""
    master.terminate()
    try:
        master.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the warm master did not stop within {_STOP_S} s") from None


def answers(path: Path) -> bool:
    """Whether somebody listens on a unix socket, however long its path is (unix(7): 107 bytes)."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(f"/proc/self/fd/{directory}/{path.name}")
            return True
    except OSError:
        return False
    finally:
        os.close(directory)


def _compiled(place: Path) -> Path:
    if shutil.which("cc") is None:
        raise BenchError("no C compiler for the launcher: apt-get install -y gcc libc6-dev")
    program = place / "launcher"
    argv = ["make", "-s", "launcher", f"LAUNCHER={program}", f'LAUNCHER_DEFINES=-DNETLOOM_COLD="\\"{_NO_COLD_WAY}\\""']
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)} exited {done.returncode}: {done.stderr[-2000:]}")
    return program
