"""The shim, as systemd runs it: started again at once when it is killed. And it kills itself where a test says.

/run/fault names the place, `CALL:POINT`, once: the file is removed first. CALL is Docker's, as "Join"; what follows
after its answer belongs to it. POINT is

- before, after: the call was not begun; it is done, and not answered;
- added, deleted: the plugins have run ADD, or DEL;
- moved: the interface is in dockerd's namespace;
- writing, written: the state is about to be written down; it is;
- forgetting: it is about to be removed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libnetwork import __main__ as shim
from libnetwork import http
from libnetwork.chain import Chain
from libnetwork.network_driver import NetworkDriver
from libnetwork.state import State
from tests.docker import hasty

FAULT = Path("/run/fault")
_PR_SET_PDEATHSIG = 1
_call = threading.local()


def reached(point: str) -> None:
    """Ends the process if this is the place."""
    try:
        if FAULT.read_text(encoding="ascii") != f"{getattr(_call, 'name', '')}:{point}":
            return
        FAULT.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _around(owner: Any, name: str, before: str = "", after: str = "") -> None:
    wrapped: Callable[..., Any] = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        if before:
            reached(before)
        found = wrapped(*arguments, **options)
        if after:
            reached(after)
        return found

    setattr(owner, name, staticmethod(replacement) if name == "_move_out" else replacement)


def _serve() -> None:
    hasty.install()
    served = http._call

    def call(name: str, *arguments: Any) -> Any:
        _call.name = name.rpartition(".")[2]
        reached("before")
        found = served(name, *arguments)
        reached("after")
        return found

    finished = NetworkDriver._finish

    def finish(self: NetworkDriver, id: str) -> None:  # noqa: A002
        _call.name = "DeleteEndpoint"
        finished(self, id)

    http._call = call  # type: ignore[assignment]
    NetworkDriver._finish = finish  # type: ignore[method-assign]
    _around(Chain, "add", after="added")
    _around(Chain, "delete", after="deleted")
    _around(NetworkDriver, "_move_out", after="moved")
    _around(State, "put", before="writing", after="written")
    _around(State, "remove", before="forgetting")


def main() -> int:
    """Returns when the shim was told to end."""
    ended = False
    child = 0

    def end(number: int, _: object) -> None:
        nonlocal ended
        ended = True
        os.kill(child, number)

    while not ended:
        # A fork, not a new program: the restart takes no second, and so Docker's patience is not what is tested.
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _serve()
            os._exit(shim.main(sys.argv[1:]))
        signal.signal(signal.SIGTERM, end)
        _, status = os.waitpid(child, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return os.waitstatus_to_exitcode(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
