"""The measuring client: a small process inside a host's namespaces that executes plugins and says how long each took.

Standard library only; started as `python -I -S runner.py` through nsenter, once for each host, so that what enters the
namespaces is paid once and not with each call. It reads one JSON request per line and answers with one:

    {"width": 1, "limit_s": 60, "calls": [{"argv": ["/opt/cni/bin/bridge"], "env": {"A": "b"}, "stdin": "{}"}]}
    {"wall_ns": 1, "took_ns": [1], "status": [0], "stdout": ["{}"], "stderr": ""}

- Everything is made before the clock starts: environment, pipes, and the whole of standard input, which must fit into a
  pipe. A call's time is from its posix_spawn (vfork in glibc, so this process' size does not matter) to its end.
- `width` calls are in flight at any time. `wall_ns` is from the first start to the last end.
- Standard error of all calls goes to one file in memory. Garbage collection is off.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

_PIPE = 60_000  # bytes that fit into a pipe without anybody reading


class Call:
    """One execution, prepared."""

    def __init__(self, call: Mapping[str, Any], stderr: int) -> None:
        self.argv = [os.fsencode(word) for word in call["argv"]]
        self.env = {os.fsencode(name): os.fsencode(value) for name, value in call["env"].items()}
        text = call["stdin"].encode()
        if len(text) > _PIPE:
            raise ValueError(f"standard input of {len(text)} bytes does not fit into a pipe")
        self.stdin, feed = os.pipe()
        os.write(feed, text)
        os.close(feed)
        self.out, self.stdout = os.pipe()
        self.actions = [
            (os.POSIX_SPAWN_DUP2, self.stdin, 0),
            (os.POSIX_SPAWN_DUP2, self.stdout, 1),
            (os.POSIX_SPAWN_DUP2, stderr, 2),
        ]
        self.began = self.took_ns = 0
        self.status = -1

    def start(self) -> int:
        self.began = time.perf_counter_ns()
        return os.posix_spawn(self.argv[0], self.argv, self.env, file_actions=self.actions)

    def ended(self, status: int) -> None:
        self.took_ns = time.perf_counter_ns() - self.began
        self.status = os.waitstatus_to_exitcode(status)

    def printed(self) -> str:
        """What it wrote to its standard output, of which all our copies are closed here."""
        os.close(self.stdout)
        os.close(self.stdin)
        # A process that it left behind may still hold the other end.
        os.set_blocking(self.out, False)
        parts = []
        try:
            while part := os.read(self.out, 65536):
                parts.append(part)
        except BlockingIOError:
            pass
        os.close(self.out)
        return b"".join(parts).decode(errors="replace")


class TooLongError(Exception):
    """The request's limit is over."""


def too_long(_number: int, _frame: FrameType | None) -> NoReturn:
    raise TooLongError


def run(calls: Sequence[Call], width: int) -> int:
    """Executes all of them; wall time in ns. Kills what runs when the alarm goes off."""
    waiting = list(reversed(calls))
    running: dict[int, Call] = {}
    began = time.perf_counter_ns()
    try:
        while waiting or running:
            while waiting and len(running) < width:
                call = waiting.pop()
                running[call.start()] = call
            pid, status = os.waitpid(-1, 0)
            running.pop(pid).ended(status)
    except TooLongError:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        for pid, call in running.items():
            call.ended(os.waitpid(pid, 0)[1])
    return time.perf_counter_ns() - began


def answer(request: Mapping[str, Any], stderr: int) -> dict[str, Any]:
    calls = [Call(call, stderr) for call in request["calls"]]
    signal.setitimer(signal.ITIMER_REAL, request["limit_s"])
    try:
        wall_ns = run(calls, request["width"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    complaints = os.pread(stderr, 65536, 0).decode(errors="replace")
    os.ftruncate(stderr, 0)
    os.lseek(stderr, 0, os.SEEK_SET)
    return {
        "wall_ns": wall_ns,
        "took_ns": [call.took_ns for call in calls],
        "status": [call.status for call in calls],
        "stdout": [call.printed() for call in calls],
        "stderr": complaints,
    }


def main() -> None:
    gc.disable()
    signal.signal(signal.SIGALRM, too_long)
    stderr = os.memfd_create("stderr")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), stderr)), flush=True)


if __name__ == "__main__":
    main()
