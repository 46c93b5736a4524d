"""The master with a fault in one request: `python -m tests.warm.faulty`, with the master's own arguments.

A request whose environment has NETLOOM_TEST_AT=<n> meets the fault of NETLOOM_TEST_DO at its nth step, or at the first
that has this name. A step is the moment before, and the one after, each thing that the world can see: a netlink
message, an RPC, an attachment record, the lock, the answer. Its name is written to NETLOOM_TEST_WHERE. The code under
test does not know of any of this.

kill: SIGKILL to the worker. launcher: SIGKILL to the launcher. pause: make the file NETLOOM_TEST_PAUSED, go on when it
is gone. astray: stay in the container's namespace. NETLOOM_TEST_COUNT names a file for the number of steps there were.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cni import lock, skel, wire
from ipamd import client
from kernel import netlink, netns, record
from warm import host, worker


class Fault:
    """Of the request in hand."""

    environment: Mapping[str, str] = {}
    launcher: socket.socket | None = None
    at = ""
    steps = 0

    def step(self, name: str) -> None:
        self.steps += 1
        if self.at in (str(self.steps), name):
            self.at = ""
            if "NETLOOM_TEST_WHERE" in self.environment:
                Path(self.environment["NETLOOM_TEST_WHERE"]).write_text(name, encoding="ascii")
            self.happen()

    def happen(self) -> None:
        match self.environment["NETLOOM_TEST_DO"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "launcher":
                assert self.launcher is not None
                pid = struct.unpack("=iII", self.launcher.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                with contextlib.suppress(ProcessLookupError):  # it is done
                    os.kill(pid, signal.SIGKILL)
                while _runs(pid):
                    time.sleep(0.001)
            case "pause":
                paused = Path(self.environment["NETLOOM_TEST_PAUSED"])
                paused.touch()
                while paused.exists():
                    time.sleep(0.002)
            case "astray":
                with netns.opened(self.environment["CNI_NETNS"]) as container:
                    netns.setns(container.fd)


fault = Fault()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stepped(owner: Any, name: str) -> None:
    """Make a function's beginning and end steps."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def with_steps(*args: Any, **kwargs: Any) -> Any:
        fault.step(f"before {name}")
        result = plain(*args, **kwargs)
        fault.step(f"after {name}")
        return result

    setattr(owner, name, with_steps)


def counted(run: Callable[..., skel.Outcome]) -> Callable[..., skel.Outcome]:
    @functools.wraps(run)
    def with_count(plugin: str, environment: Mapping[str, str], *args: Any, **kwargs: Any) -> skel.Outcome:
        fault.environment = environment
        fault.at, fault.steps = environment.get("NETLOOM_TEST_AT", ""), 0
        try:
            return run(plugin, environment, *args, **kwargs)
        finally:
            if "NETLOOM_TEST_COUNT" in environment:
                Path(environment["NETLOOM_TEST_COUNT"]).write_text(str(fault.steps), encoding="ascii")
            fault.at = ""

    return with_count


def received(receive: Callable[..., wire.Request]) -> Callable[..., wire.Request]:
    @functools.wraps(receive)
    def with_launcher(launcher: socket.socket, *args: Any) -> wire.Request:
        fault.launcher = launcher
        return receive(launcher, *args)

    return with_launcher


def main() -> int:
    stepped(netlink.Socket, "_send")
    stepped(client.Pending, "ask")
    stepped(client.Pending, "result")
    stepped(record.Records, "write")
    stepped(record.Records, "remove")
    stepped(lock.AttachmentLock, "__enter__")
    stepped(lock.AttachmentLock, "__exit__")
    stepped(worker, "_respond")
    stepped(worker, "_wait_for_done")
    worker._receive = received(worker._receive)
    skel.run = counted(skel.run)
    return host.main()


if __name__ == "__main__":
    sys.exit(main())
