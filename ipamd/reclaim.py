"""Takes back what nobody will release: most runtimes never call GC, and a host that lost power calls no DEL.

Three ways in; each releases through `lease`, in pages, so that the event loop is never held for long:
- `collect`: a client names what is still valid (CNI's GC). What is younger than the client's request is not touched.
- `report`: root names the network namespaces that live. An allocation whose namespace is missing in two reports, with
  the grace between them, is released. Suspicions are kept in memory: a restart only makes them begin anew.
- `earlier_boots`: no namespace outlives the boot. What an earlier boot asked for, and nobody asked for again since this
  daemon started and a grace has passed, is released; but not what belongs to no namespace and no CNI runtime: Docker's
  networks outlive the boot, and so do their gateways.

A namespace is known by its cookie where both sides have it (never used twice in one boot), else by its inode; an
allocation with neither is never judged by a report.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from msgspec import Struct

from ipamd.clock import Clock
from ipamd.engine import Engine
from ipamd.errors import InvalidArgumentError
from ipamd.lease import Ledger
from ipamd.store.base import Allocation, Filter, Instant, Netns, Store
from telemetry import log

_logger = logging.getLogger("ipamd.reclaim")

_PAGE = 200  # allocations that are judged, and perhaps released, at once: some 10 ms of the event loop

_CNI = "cni"  # the client of the plugin; what it holds is a container's

Verdict = Literal["", "released", "kept"]
OnRelease = Callable[[str, int], None]


class Found(Struct, frozen=True):
    """What a look at the allocations came to: released (or would be, in a dry run), and noticed but kept."""

    released: tuple[Allocation, ...] = ()
    kept: tuple[Allocation, ...] = ()


class Live(Struct, frozen=True):
    """The namespaces that live."""

    inodes: frozenset[int]
    cookies: frozenset[int]
    inodes_without_cookie: frozenset[int]

    @classmethod
    def of(cls, namespaces: Iterable[tuple[int, int]]) -> "Live":
        """From (inode, cookie) pairs; 0 where one is unknown."""
        pairs = list(namespaces)
        return cls(
            frozenset(inode for inode, _ in pairs if inode),
            frozenset(cookie for _, cookie in pairs if cookie),
            frozenset(inode for inode, cookie in pairs if inode and not cookie),
        )

    def may_hold(self, netns: Netns) -> bool:
        """False only where the namespace is known and is not among these."""
        if netns.cookie and self.cookies:
            return netns.cookie in self.cookies or netns.inode in self.inodes_without_cookie
        return not netns.inode or netns.inode in self.inodes


class Reclaimer:
    """See the top of this file."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        store: Store,
        clock: Clock,
        *,
        node: str,
        grace_s: float,
        on_release: OnRelease = lambda _reason, _count: None,
    ) -> None:
        """The first look at what earlier boots left is now. `on_release` gets a reason and a count, for metrics."""
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._clock = clock
        self._node = node
        self._grace_ns = int(grace_s * 1e9)
        self._on_release = on_release
        self._began_ns = clock.now_ns()
        self._suspected: dict[int, int] = {}  # generation → when it was first missing, CLOCK_BOOTTIME ns
        self._earlier_boots_done = False

    async def collect(
        self,
        client: str,
        network: str,
        valid: frozenset[tuple[str, str]],
        before: Instant,
        *,
        node: str = "",
        living: frozenset[int] = frozenset(),
        dry_run: bool = False,
    ) -> Found:
        """Releases the client's allocations of a network that `valid` (container id, interface) does not name.

        Those in `living` (generations) are reported in `kept` instead. Raises InvalidArgumentError.
        """
        self._want_this_boot(before, "before")
        if not client or not network:
            raise InvalidArgumentError(
                "client and network: wanted both, as a GC touches only its own; found an empty one"
            )

        def judge(held: Allocation) -> Verdict:
            if (held.key.container_id, held.key.ifname) in valid or not self._ledger.is_before(held, before):
                return ""
            return "kept" if held.generation in living else "released"

        wanted = Filter(node=node or self._node, client=client, network=network)
        found = await self._sweep(wanted, judge, dry_run)
        self._report_releases(found.released, "gc", "not among the valid attachments of a GC", dry_run)
        return found

    async def report(self, at: Instant, live: Live, dry_run: bool = False) -> Found:
        """Releases what was missing before, at least the grace ago, and is missing now; `kept` is under suspicion.

        `at` is when the look at the namespaces began; what was asked for later is not judged. Raises
        InvalidArgumentError.
        """
        self._want_this_boot(at, "at")
        if not live.inodes and not live.cookies:
            raise InvalidArgumentError(
                "live: wanted every network namespace of the node, found none; the host's own is always there, so this "
                "list is not whole"
            )
        now_ns = at.boottime_ns
        suspected: dict[int, int] = {}

        def judge(held: Allocation) -> Verdict:
            if held.at.boot_id != at.boot_id or held.at.boottime_ns >= now_ns or live.may_hold(held.netns):
                return ""
            first_ns = self._suspected.get(held.generation, now_ns)
            if first_ns <= held.at.boottime_ns:
                first_ns = now_ns  # asked for again since: the suspicion begins anew
            if self._suspected and first_ns < now_ns and now_ns - first_ns >= self._grace_ns:
                return "released"
            suspected[held.generation] = first_ns
            return "kept"

        found = await self._sweep(Filter(node=self._node), judge, dry_run)
        if not dry_run:
            self._suspected = suspected
        self._report_releases(found.released, "netns", "its network namespace is gone", dry_run)
        return found

    async def earlier_boots(self) -> Found:
        """Releases what earlier boots left, once the grace since the start is over. Cheap when there is nothing."""
        if self._earlier_boots_done or self._clock.now_ns() - self._began_ns < self._grace_ns:
            return Found()
        wanted = Filter(node=self._node, not_boot_id=self._clock.boot_id)
        found = await self._sweep(wanted, lambda held: "released" if _ends_with_boot(held) else "", dry_run=False)
        # Every Allocate is of this boot, so nothing of an earlier one can come again.
        self._earlier_boots_done = True
        self._report_releases(found.released, "boot", "it was of an earlier boot", dry_run=False)
        return found

    async def _sweep(self, wanted: Filter, judge: Callable[[Allocation], Verdict], dry_run: bool) -> Found:
        released: list[Allocation] = []
        kept: list[Allocation] = []
        after = 0

        def page() -> tuple[int, list[Allocation], list[Allocation]]:
            last, gone, noticed = 0, [], []
            for held in self._store.allocations(wanted, after, _PAGE):
                last = held.generation
                verdict = judge(held)
                if verdict == "kept":
                    noticed.append(held)
                elif verdict == "released":
                    gone.append(held)
                    if not dry_run:
                        self._ledger.drop(held)
            return last, gone, noticed

        while True:
            last, gone, noticed = await self._engine.run(page)
            released += gone
            kept += noticed
            if not last:
                return Found(tuple(released), tuple(kept))
            after = last

    def _want_this_boot(self, at: Instant, what: str) -> None:
        if at.boot_id != self._clock.boot_id:
            raise InvalidArgumentError(
                f"{what}: wanted a moment of this boot ({self._clock.boot_id}), found one of boot "
                f"{at.boot_id or '(none)'}"
            )

    def _report_releases(self, released: Iterable[Allocation], reason: str, text: str, dry_run: bool) -> None:
        count = 0
        for held in () if dry_run else released:
            count += 1
            log_release(held, text)
        if count:
            self._on_release(reason, count)


def _ends_with_boot(held: Allocation) -> bool:
    return held.key.client == _CNI or held.netns.inode != 0 or held.netns.cookie != 0


def log_release(held: Allocation, reason: str, request_id: str = "") -> None:
    """One line for one released allocation."""
    key = held.key
    log.event(
        _logger,
        "info",
        "released",
        reason=reason,
        client=key.client,
        network=key.network,
        container_id=key.container_id,
        ifname=key.ifname,
        addresses=",".join([address.cidr for address in held.addresses]),
        generation=held.generation,
        request_id=request_id,
    )
