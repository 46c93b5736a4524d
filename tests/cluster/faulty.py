"""ipamd that, once it got SIGUSR1, kills itself at one step of a claim or of a release.

`python -m tests.cluster.faulty <step>`, with ipamd's own arguments behind. The steps: "before-claim", "after-claim",
"before-unclaim", "after-unclaim" (before and after etcd has done it), and "before-settle" (etcd has done it, and the
store is about to strike the errand off).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from cluster import layout
from cluster.etcd import Delete, Etcd, Put, TxnResult
from ipamd import __main__ as ipamd
from ipamd.shared import SharedPools

STEPS = ("before-claim", "after-claim", "before-unclaim", "after-unclaim", "before-settle")


def _kind(then: Sequence[Any]) -> str:
    for operation in then:
        if operation.key.startswith(layout.ADDRESSES):
            return {Put: "claim", Delete: "unclaim"}.get(type(operation), "")
    return ""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(step: str) -> None:
    """From now on this process dies at that step."""
    txn, settle = Etcd.txn, SharedPools.settle

    async def watched(self: Etcd, compares: Any, then: Any, *more: Any, **options: Any) -> TxnResult:
        kind = _kind(then)
        if step == f"before-{kind}":
            _die()
        done = await txn(self, compares, then, *more, **options)
        if step == f"after-{kind}":
            _die()
        return done

    def settled(self: SharedPools, seqs: Iterable[int]) -> None:
        if step == "before-settle":
            _die()
        settle(self, seqs)

    Etcd.txn, SharedPools.settle = watched, settled  # type: ignore[method-assign]


if __name__ == "__main__":
    step = sys.argv.pop(1)
    signal.signal(signal.SIGUSR1, lambda _number, _frame: arm(step))
    sys.exit(ipamd.main())
