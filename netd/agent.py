"""netd's one thread for the kernel: full reconciles, events, and what others ask for, one after the other.

Rules of this file
- The thread opens its sockets in the namespace in which it begins, and never leaves it.
- An event leads to a repair of what it is about after QUIET_S: what comes together is repaired together. Where events
  say that anything may have happened, everything is read. Each waits at least RATIO times as long as the one of its
  kind before took, so that no storm of events takes more than a fraction of a processor; and a repair never waits for
  the rest after everything was read, which takes seconds with thousands of peers.
- In a storm of events, such as a router's whole table, who asks for something is answered in between; repairs wait for
  its end, but not longer than LATE_S.
- Should something undo repairs again and again, they become seldom, and the log says so: two daemons must not fight at
  full speed.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kernel.errors import KernelError
from kernel.rtevents import RouteEvents
from kernel.session import Session
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.values import Key, Network, Node
from netd.way import text
from telemetry import log

T = TypeVar("T")

QUIET_S = 0.003
FULL_QUIET_S = 0.02
MOST_EVENTS = 2000  # read at once: some 50 ms, in which nobody is answered
RATIO = 5
LATE_S = 1.0
_FIGHT_ROUNDS, _FIGHT_WINDOW_S, _FIGHT_PAUSE_S = 30, 10.0, 2.0
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0

_logger = logging.getLogger("netd")


class Agent:
    """Starts the thread on `start`; `call` has it do something between two rounds."""

    def __init__(
        self,
        node: Node,
        choice: Choice,
        networks: tuple[Network, ...],
        peers: tuple[Node, ...],
        resync_s: float,
        *,
        may_drop: bool = True,
        fast_path: bool = True,
    ) -> None:
        """`may_drop`: False where these are not all peers; see `Reconciler`. `fast_path`: whether overlays have one."""
        self._node, self._choice, self._networks, self._peers = node, choice, networks, peers
        self._resync_s = resync_s
        self._may_drop = may_drop
        self._fast_path = fast_path
        self._asked: queue.SimpleQueue[Callable[[Reconciler], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="netd-kernel", daemon=True)
        self._dirty: set[Key] = set()
        self._dirty_at = self._full_at = self._retry_at = float("inf")
        self._retry_s = _RETRY_FIRST_S
        self._rest_until = self._full_rest_until = 0.0  # no repair, no full one before that
        self._rounds: collections.deque[float] = collections.deque(maxlen=_FIGHT_ROUNDS)

    def start(self) -> None:
        """Returns after the first full reconcile. Raises KernelError where the kernel's doors cannot be opened."""
        self._thread.start()
        self._ready.result()

    def stop(self) -> None:
        """Ends the thread. What it made stays: packets flow on while nobody watches."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def call(self, what: Callable[[Reconciler], T]) -> Future[T]:
        """Has the thread call `what`; its result, or what it raised."""
        answer: Future[T] = Future()

        def do(reconciler: Reconciler) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(what(reconciler))
            except BaseException as error:  # noqa: BLE001 - it is raised where the answer is read
                answer.set_exception(error)

        self._asked.put(do)
        os.eventfd_write(self._wake, 1)
        return answer

    def _run(self) -> None:
        try:
            with Session() as session, contextlib.closing(RouteEvents()) as events:
                reconciler = Reconciler(session, self._node, self._choice, self._networks)
                reconciler.may_drop = self._may_drop
                reconciler.fast.enable(self._fast_path)
                for peer in self._peers:
                    reconciler.put_peer(peer)
                self._full(reconciler)
                self._ready.set_result(None)
                while not self._stopping:
                    self._round(reconciler, events)
        except BaseException as error:  # noqa: BLE001 - whatever it was, the daemon is of no use without this thread
            if self._ready.done():
                log.event(_logger, "critical", "netd's thread for the kernel ended", error=str(error), exc_info=True)
                os._exit(70)  # a daemon that watches nothing must not look alive; systemd starts it again
            self._ready.set_exception(error)

    def _round(self, reconciler: Reconciler, events: RouteEvents) -> None:
        self._wait(reconciler, events)
        while not self._asked.empty():
            self._asked.get()(reconciler)
        try:
            self._see(reconciler, events)
            # What is not read yet may be that all is well again.
            if not events.pending or time.monotonic() >= min(self._dirty_at, self._full_at) + LATE_S:
                self._act(reconciler)
        except KernelError as error:
            log.event(_logger, "error", "the kernel cannot be compared", error=str(error))
            self._full_at = time.monotonic() + self._retry_s

    def _wait(self, reconciler: Reconciler, events: RouteEvents) -> None:
        events.watched = reconciler.watched()
        lingering_s = reconciler.next_s()
        now = time.monotonic()
        repair_at, full_at = max(self._rest_until, self._dirty_at), max(self._full_rest_until, self._full_at)
        due = min(repair_at, full_at, self._retry_at, reconciler.fast.due)
        if lingering_s is not None:
            due = min(due, now + lingering_s)
        poll = select.poll()
        poll.register(events, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        # Rounded up: a wait that ends a moment early would go round once more for nothing.
        wait_ms = max(0.0, due - now) * 1000 + 1 if due > now else 0
        poll.poll(wait_ms if wait_ms < float("inf") else None)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _see(self, reconciler: Reconciler, events: RouteEvents) -> None:
        changes = events.read(MOST_EVENTS)
        if not changes:
            return
        keys = reconciler.note(changes)
        if new := reconciler.take_new():
            reconciler.sync(new)
        now = time.monotonic()
        if keys is None:
            self._full_at = min(self._full_at, now + FULL_QUIET_S)
        elif keys:
            self._dirty |= keys
            self._dirty_at = min(self._dirty_at, now + QUIET_S)

    def _act(self, reconciler: Reconciler) -> None:
        now = time.monotonic()
        if now >= max(self._full_at, self._full_rest_until):
            self._full(reconciler)
        elif now >= max(self._dirty_at, self._rest_until):
            keys, self._dirty, self._dirty_at = self._dirty, set(), float("inf")
            # By now it may be well again.
            keys = {key for key in keys if reconciler.desired.get(key) != reconciler.found.get(key)}
            self._repair(reconciler, keys)
        if now >= self._retry_at:
            reconciler.sync(reconciler.refused())
            self._retry_s = min(2 * self._retry_s, _RETRY_LAST_S)
            self._plan_retry(reconciler)
        elif self._retry_at == float("inf") and reconciler.refused():  # of what somebody asked for
            self._plan_retry(reconciler)
        if outstayed := reconciler.outstayed():
            reconciler.sync(outstayed)
        if now >= reconciler.fast.due:
            reconciler.fast.look()

    def _full(self, reconciler: Reconciler) -> None:
        began = time.monotonic()
        first = not reconciler.settled
        changed = reconciler.full()
        self._dirty, self._dirty_at = set(), float("inf")
        now = time.monotonic()
        self._full_rest_until = now + RATIO * (now - began)
        self._full_at = now + (self._resync_s or float("inf"))
        if changed and not first:
            reconciler.counts.repairs += changed
        if changed or first:
            log.event(_logger, "info", "everything compared", changed=changed, took_ms=round((now - began) * 1e3, 1))
        self._plan_retry(reconciler)

    def _repair(self, reconciler: Reconciler, keys: set[Key]) -> None:
        if not keys:
            return
        began = time.monotonic()
        changed = reconciler.sync(keys)
        now = time.monotonic()
        self._rest_until = now + RATIO * (now - began)
        reconciler.counts.repairs += changed
        if changed:
            log.event(_logger, "info", "put back what somebody changed", changed=changed, of=_shown(reconciler, keys))
        if len(self._rounds) == _FIGHT_ROUNDS and now - self._rounds[0] < _FIGHT_WINDOW_S:
            log.event(_logger, "warning", "something changes netd's entries again and again; repairs are seldom now")
            self._rest_until = now + _FIGHT_PAUSE_S
        self._rounds.append(now)
        self._plan_retry(reconciler)

    def _plan_retry(self, reconciler: Reconciler) -> None:
        if not reconciler.refused() and reconciler.underlay is not None:
            self._retry_at, self._retry_s = float("inf"), _RETRY_FIRST_S
            return
        at = time.monotonic() + self._retry_s
        if reconciler.underlay is None:
            self._full_at = min(self._full_at, at)
            self._retry_at = float("inf")
        else:
            self._retry_at = at


def _shown(reconciler: Reconciler, keys: set[Key]) -> str:
    """The first few entries, as iproute2 writes them."""
    entries = [reconciler.desired.get(key) for key in sorted(keys)[:5]]
    return "; ".join(text(entry) for entry in entries if entry is not None)
