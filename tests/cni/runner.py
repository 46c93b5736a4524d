"""Serves CNI requests inside a host without a process for each: `python -m tests.cni.runner`, one JSON object a line.

Each request goes through cni.skel.run exactly as the cold entry does it, with a Session of its own. A request may ask
for faults: at the n-th call to the kernel, to the records or to an IPAM plugin, this fails before or after it did its
work; and likewise at the n-th call of the undo. What was called is part of the answer.

Input:  {"plugin", "env", "stdin": base64, "faults": [{"at", "when": "before"|"after", "kind", "undo": bool}]}
Output: {"status", "stdout", "stderr", "calls": [text], "undo_calls": [text]}
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cni import delegate, skel, undo, versions
from cni.chained import tuning_backup
from cni.skel import Outcome
from ipamd.client import Client, Pending
from kernel import libnftables, netlink, netns, ports, record, sysctl
from kernel.errors import KernelError
from kernel.session import Session


class Faults:
    """Counts calls, and fails where it was told to."""

    def __init__(self) -> None:
        self.wanted: list[dict[str, Any]] = []
        self.calls: dict[bool, list[str]] = {False: [], True: []}
        self.undoing = False
        self.busy = False

    def begin(self, wanted: list[dict[str, Any]]) -> None:
        self.wanted = wanted
        self.calls = {False: [], True: []}
        self.undoing = self.busy = False

    def around(self, label: str, real: Callable[[], Any]) -> Any:
        if self.busy:  # a call within a call is part of it
            return real()
        self.calls[self.undoing].append(label)
        number = len(self.calls[self.undoing])
        fault = next((f for f in self.wanted if f["at"] == number and bool(f.get("undo")) == self.undoing), None)
        if fault is not None and fault["when"] == "before":
            raise self.error(fault, label)
        self.busy = True
        try:
            return real()
        finally:
            self.busy = False
            if fault is not None:
                raise self.error(fault, label)

    @staticmethod
    def error(fault: dict[str, Any], label: str) -> BaseException:
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["kind"] == "signal":
            return KeyboardInterrupt("SIGTERM")
        return KernelError(f"INJECTED {label}", errno.EIO)


FAULTS = Faults()


def watch(owner: Any, name: str, label: Callable[..., str]) -> None:
    """From now on calls of owner.name are counted and may fail."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def watched(*args: Any, **more: Any) -> Any:
        return FAULTS.around(label(*args, **more), lambda: real(*args, **more))

    setattr(owner, name, watched)


def watch_everything() -> None:
    watch(netlink.Socket, "attempt", lambda _self, messages: " + ".join(message.what for message in messages))
    watch(netlink.Socket, "transact", lambda _self, _begin, messages, _end: " + ".join(m.what for m in messages))
    watch(netlink.Socket, "get", lambda _self, message: message.what)
    watch(netlink.Socket, "dump", lambda _self, message: message.what)
    watch(netlink, "Socket", lambda *_args, **_more: "open a netlink socket")
    watch(sysctl, "read", lambda *parts: f"read sysctl {'.'.join(parts)}")
    watch(sysctl, "write", lambda value, *parts: f"set sysctl {'.'.join(parts)} to {value}")
    watch(libnftables, "run", lambda _commands, what, **_more: what)
    watch(netns, "cookie", lambda: "read the namespace's cookie")
    watch(record.Records, "write", lambda _self, _record: "write the record")
    watch(record.Records, "read", lambda _self, _key: "read the record")
    watch(ports.Ports, "_store", lambda _self, path, _claims, **_more: f"write claim {path.rpartition('/')[2]}")
    watch(Pending, "ask", lambda *_args, **_more: "ask for addresses")
    watch(Pending, "result", lambda *_args, **_more: "allocate")
    watch(Client, "release", lambda *_args, **_more: "release")
    watch(delegate, "_communicate", lambda executable, *_more: f"execute {executable}")
    watch(tuning_backup, "write", lambda _path, _backup: "write tuning's backup")
    watch(tuning_backup, "replace", lambda _path, _backup: "replace tuning's backup")
    watch(tuning_backup, "remove", lambda _path: "remove tuning's backup")
    watch(versions, "encode", lambda _result, _version: "encode the result")
    unwind = undo.Undo.unwind

    def unwinding(self: undo.Undo) -> list[str]:
        FAULTS.undoing = True
        return unwind(self)

    undo.Undo.unwind = unwinding  # type: ignore[method-assign]


def serve(request: dict[str, Any]) -> dict[str, Any]:
    FAULTS.begin(request.get("faults", []))
    stdin = base64.b64decode(request["stdin"])
    sessions: list[Session] = []

    def open_host() -> Session:
        sessions.append(Session())
        return sessions[-1]

    log = io.StringIO()
    outcome = Outcome(b"", b"", 70)
    with contextlib.redirect_stderr(log):
        try:
            outcome = skel.run(request["plugin"], request["env"], lambda: stdin, open_host)
        finally:
            for session in sessions:
                session.close()
    return {
        "status": outcome.status,
        "stdout": outcome.stdout.decode("utf-8", "replace"),
        "stderr": log.getvalue() + outcome.stderr.decode("utf-8", "replace"),
        "calls": FAULTS.calls[False],
        "undo_calls": FAULTS.calls[True],
    }


def main() -> None:
    watch_everything()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(serve(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
