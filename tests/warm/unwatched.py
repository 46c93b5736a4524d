"""The master whose helper looks at nothing: `python -m tests.warm.unwatched`, with the master's own arguments.

For tests that break something and look whether CHECK or DEL notice; the helper would have put it back meanwhile.
"""

from __future__ import annotations

import signal
import sys

from warm import host


class Watch:
    """In the place of warm.watch.Watch."""

    def __init__(self, *_: object) -> None:
        pass

    def run(self) -> None:
        while True:
            signal.pause()


if __name__ == "__main__":
    vars(host)["Watch"] = Watch
    sys.exit(host.main())
