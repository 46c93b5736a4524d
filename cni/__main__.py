"""The cold entry of every plugin: program name → registry → skel.

A runtime executes `/opt/cni/bin/<type>`, which leads here; `python -m cni <type>` does the same by hand. Standard
output is written with write(2) and an ADD whose result cannot be written is undone. SIGTERM, SIGINT and SIGHUP make
the request fail, so that an ADD undoes itself; a second signal is ignored while that happens.
"""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, Signals, getsignal, signal
from typing import TYPE_CHECKING

from cni import config, skel
from cni.registry import PLUGINS
from telemetry import trace

if TYPE_CHECKING:
    from kernel.session import Session

_SIGNALS = (SIGHUP, SIGINT, SIGTERM)


def main(plugin: str | None = None) -> int:
    """Serve the request of this process.

    Args:
        plugin: a CNI type. None: the program's name, else the first argument.

    Returns:
        The exit status: 0, 1 with an error object on standard output, 2 where no plugin was named.
    """
    # What came before is the interpreter and the imports: processor time, as nobody tells when this process began.
    trace.begin("cold", "start", time.process_time_ns())
    _guard_descriptors()
    name = plugin or _named(sys.argv)
    if name not in PLUGINS:
        _write(2, f"usage: python -m cni TYPE, with TYPE being one of {', '.join(PLUGINS)}; found {name!a}\n".encode())
        return 2
    _fail_on_signals()
    return _serve(name, os.environ)


def _serve(plugin: str, environment: Mapping[str, str]) -> int:
    answered: list[skel.Outcome] = []

    def deliver(outcome: skel.Outcome) -> None:
        _write(1, outcome.stdout)
        answered.append(outcome)

    outcome = skel.run(plugin, environment, _read_stdin, _open_host, deliver=deliver)
    _log(outcome.stderr)
    return outcome.status


def _open_host() -> "Session":
    from kernel.session import Session  # noqa: PLC0415 - VERSION and every refused request do without

    return Session()  # closed by the end of the process


def _named(arguments: list[str]) -> str:
    """The plugin's type: what the program is called, or what stands behind it."""
    program = os.path.basename(arguments[0]) if arguments else ""
    if program in PLUGINS or len(arguments) < 2:
        return program
    return arguments[1]


def _read_stdin() -> bytes:
    """Standard input to its end, or a little more than config.LIMIT bytes of it."""
    parts: list[bytes] = []
    size = 0
    while size <= config.LIMIT:
        part = os.read(0, 65536)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _write(fd: int, data: bytes) -> None:
    """All of `data`. Raises OSError, EPIPE where nobody reads any more (Python ignores SIGPIPE)."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _log(data: bytes) -> None:
    with suppress(OSError):  # nobody to tell
        _write(2, data)


def _guard_descriptors() -> None:
    """Occupy closed standard descriptors, or the next socket would be opened there and get the result written to it.

    Standard output is opened for reading: writing must fail, since nobody will see the result.
    """
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # the lowest free number is this one


def _fail_on_signals() -> None:
    def interrupt(number: int, _frame: object) -> None:
        for one in _SIGNALS:
            signal(one, SIG_IGN)
        raise KeyboardInterrupt(Signals(number).name)

    for one in _SIGNALS:
        if getsignal(one) is not SIG_IGN:  # a caller such as nohup may have meant it
            signal(one, interrupt)


if __name__ == "__main__":
    sys.exit(main())
