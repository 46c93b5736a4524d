"""The shim, with a grace that a test may change while it runs: /run/grace, where it is there, has the seconds.

So nothing is taken from a container that takes long to start, as on a busy machine, and who waits for what Docker could
not give back does not wait long: nothing is being started then.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from libnetwork import __main__ as shim
from libnetwork.reconcile import Comparison, Reconciler

GRACE = "/run/grace"


def install() -> None:
    """From now on the grace is the test's."""
    compare = Reconciler._compare

    def replacement(self: Reconciler, dry_run: bool) -> Comparison:
        with contextlib.suppress(FileNotFoundError):
            self._grace_s = float(Path(GRACE).read_text(encoding="ascii"))
        return compare(self, dry_run)

    Reconciler._compare = replacement  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    sys.exit(shim.main(sys.argv[1:]))
