"""What a daemon takes while nothing happens: memory, and processor time once it is done with what it was told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.host import BenchError
from tests.hosts import wait_until

_LOOK_S, _BUSY_S = 2.0, 0.05  # netd looks at some things each 2 s


def resident_mb(pid: int) -> float:
    """Resident memory in 2^20 bytes (proc(5), status, VmRSS). Raises BenchError."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} is gone")


def idle_percent(pid: int, log: Callable[[], str], seconds: float) -> float:
    """Processor time of a daemon at rest, in percent of one processor, over so many seconds."""
    wait(pid, log)
    before, at = _processor_s(pid), time.perf_counter()
    time.sleep(seconds)
    return 100 * (_processor_s(pid) - before) / (time.perf_counter() - at)


def wait(pid: int, log: Callable[[], str]) -> None:
    """Returns once a daemon is at rest: it hears of each entry that it made itself, which is part of making it."""
    wait_until(lambda: _rests(pid), "a daemon at rest", log)


def _rests(pid: int) -> bool:
    before = _processor_s(pid)
    time.sleep(_LOOK_S)
    return _processor_s(pid) - before < _BUSY_S


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
