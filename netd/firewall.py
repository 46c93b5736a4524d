"""Puts back what somebody took out of our nftables tables, on hosts where nobody else does.

The warm workers' helper does that within milliseconds, and more (warm/watch.py). Where plugins run cold there is none:
then netd does it, GRACE_S later. Events tell who changed what, so it is known whether the helper was there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

from kernel import nft
from kernel.errors import KernelError
from kernel.events import Change, Events
from kernel.record import Records
from kernel.session import Session
from telemetry import log

_logger = logging.getLogger("netd")

HELPER = "netloom-watch"  # the name of the workers' helper, as the kernel tells it
GRACE_S = 1.0
_LOOK_S = 1.0


class Firewall:
    """A thread of its own: reading everything may take long on a busy host. `start`, and `stop` at the end."""

    def __init__(self, run_dir: str) -> None:
        self._records = Records(run_dir)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="netd-nftables", daemon=True)

    def start(self) -> None:
        """In the namespace of the caller."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is under way."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        complaint = ""
        while not self._stopping.is_set():
            try:
                with Session() as session:
                    self._follow(session, Events())
            except (KernelError, OSError) as error:
                if str(error) != complaint:
                    log.event(_logger, "error", "nftables cannot be looked after", error=str(error))
                complaint = str(error)
                self._stopping.wait(_LOOK_S)

    def _follow(self, session: Session, events: Events) -> None:
        try:
            self._rebuild(session, anew=False)
            while not self._stopping.is_set():
                seen = [change for change in events.wait(_LOOK_S) if _matters(change)]
                if not seen:
                    continue
                end = time.monotonic() + GRACE_S
                while (left := end - time.monotonic()) > 0 and not self._stopping.is_set():
                    seen += [change for change in events.wait(left) if _matters(change)]
                if not any(change.process == HELPER for change in seen):
                    self._see_to(session, seen)
        finally:
            events.close()

    def _see_to(self, session: Session, seen: Sequence[Change]) -> None:
        if any(change.structure or change.elements for change in seen):
            # A chain or rule may be missing in a table that is there; only writing them all again mends that.
            self._rebuild(session, anew=any(change.structure for change in seen))
        elif self._records.let_pass(session):
            log.event(_logger, "info", "put back the rule that lets packets pass another firewall")

    def _rebuild(self, session: Session, *, anew: bool) -> None:
        attached = any(record.elements or record.shared for record in self._records.all())
        if not attached:
            self._records.attend(session)
            if not nft.current(session, "inet"):
                return
        missing, stale = self._records.rebuild(session, anew=anew)
        if missing or stale or anew:
            log.event(
                _logger, "info", "nftables: put back what somebody took out", missing=missing, stale=stale, rules=anew
            )


def _matters(change: Change) -> bool:
    """Not our own, nor a worker's: those took what was no longer wanted. The helper's show that it is there."""
    # The kernel names the thread that did it (nf_tables_fill_gen_info, task_pid_nr), which is not the process' first.
    own = os.path.exists(f"/proc/self/task/{change.pid}")
    if own or (change.process.startswith("netloom-") and change.process != HELPER):
        return False
    return change.structure or change.elements or change.forward
