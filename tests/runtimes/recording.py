"""A master that notes each request that its workers serve: what a runtime sent, and that it came the warm way.

One line of JSON for each, appended in one piece to $NETLOOM_TEST_REQUESTS before the runtime gets the answer.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping

from cni import skel
from kernel.session import Session
from warm import host

_run = skel.run


def run(
    plugin: str,
    environment: Mapping[str, str],
    read_stdin: Callable[[], bytes],
    open_host: Callable[[], Session],
    *,
    deliver: skel.Deliver,
) -> skel.Outcome:
    given = b""

    def read() -> bytes:
        nonlocal given
        given = read_stdin()
        return given

    def note_and_deliver(outcome: skel.Outcome) -> None:
        _note(
            {
                "plugin": plugin,
                "environment": {name: value for name, value in environment.items() if name.startswith("CNI_")},
                "stdin": given.decode(errors="replace"),
                "status": outcome.status,
                "stdout": outcome.stdout.decode(errors="replace"),
            }
        )
        deliver(outcome)

    return _run(plugin, environment, read, open_host, deliver=note_and_deliver)


def _note(request: object) -> None:
    log = os.open(os.environ["NETLOOM_TEST_REQUESTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(log, json.dumps(request).encode() + b"\n")
    finally:
        os.close(log)


if __name__ == "__main__":
    skel.run = run  # type: ignore[assignment]
    sys.exit(host.main())
