"""Compares what the store says with what the kernel shows, and with what the cluster was told; mends what is safe.

Each difference has a kind:
- "leaked": an allocation whose container's interface has lost the address, or is gone. Mended: it is released.
- "missing": an interface has an address of a pool that nobody holds. Mended: it is reserved, with a note that says for
  whom, so that nobody else gets it; unreserve it once the container is gone.
- "duplicate": two hold one address, or two namespaces have it on an interface. Not mended: a person must decide.
- in a cluster those of `ipamd.member`, asked through `Further`.

An observation of the kernel and the store's rows are not of one moment. So nothing is mended that was not found before,
at least the grace ago, and rows younger than the observation are not judged. Findings are kept in memory.
"""

import functools
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from ipamd.clock import Clock
from ipamd.engine import Engine
from ipamd.errors import InvalidArgumentError, IpamdError
from ipamd.lease import Ledger
from ipamd.pool import Pool, address_number
from ipamd.store.base import Allocation, Filter, Instant, Store
from telemetry import log

_logger = logging.getLogger("ipamd.check")

_PAGE = 500
_CNI = "cni"  # whose allocations are a container's, with an interface in a namespace

Kind = Literal[
    "leaked",
    "missing",
    "duplicate",
    "orphan-block",
    "unclaimed",
    "unreleased",
    "unpublished",
    "stale-mac",
    "lost-network",
    "unreadable-key",
]


class KernelAddress(Struct, frozen=True):
    """An address that an interface has."""

    ip: str
    netns_inode: int
    ifname: str


class Difference(Struct, frozen=True):
    """One finding. `text` says what was found where, and what to do."""

    kind: Kind
    pool: str
    address: str  # or a block's CIDR
    node: str
    text: str
    repairable: bool = False
    repaired: bool = False
    generation: int = 0


Repair = Callable[[Difference], Awaitable[bool]]


class Further(Struct, frozen=True):
    """What another part of ipamd found, and how it mends that."""

    differences: tuple[Difference, ...]
    blocks: int
    repair: Repair


class Report(Struct, frozen=True):
    """What a check came to."""

    differences: tuple[Difference, ...]
    allocations: int
    blocks: int


class Checker:
    """See the top of this file. `reserve` keeps an address of a pool back, with a note: in a cluster for all nodes.
    `further` is asked in each check."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        store: Store,
        clock: Clock,
        *,
        node: str,
        grace_s: float,
        reserve: Callable[[str, str, str], Awaitable[object]],
        further: Sequence[Callable[[], Awaitable[Further]]] = (),
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._clock = clock
        self._node = node
        self._grace_ns = int(grace_s * 1e9)
        self._reserve = reserve
        self._further = further
        self._found_ns: dict[tuple[str, str, str, str, int], int] = {}  # CLOCK_BOOTTIME of when it was found first

    async def check(self, kernel: Sequence[KernelAddress], at: Instant | None, repair: bool) -> Report:
        """Every difference. `at`: when the look at the kernel began; None: nobody looked."""
        if at is not None and at.boot_id != self._clock.boot_id:
            raise InvalidArgumentError(f"at: wanted a moment of this boot ({self._clock.boot_id}), found {at.boot_id}")
        seen = _by_address(kernel)
        found: list[Difference] = []
        allocations = 0
        holders: dict[str, list[int]] = {}  # address → inodes of those that hold it, in whatever pool
        held: dict[str, int] = {}  # address → generation, of what was looked at
        after = 0
        while True:
            page = await self._engine.run(functools.partial(self._store.allocations, Filter(), after, _PAGE))
            for allocation in page:
                found += self._judge(allocation, seen, at, held)
                for address in allocation.addresses:
                    if len(seen.get(address.ip, ())) > 1:
                        holders.setdefault(address.ip, []).append(allocation.netns.inode)
            allocations += len(page)
            if len(page) < _PAGE:
                break
            after = page[-1].generation
        if at is not None:
            found += self._duplicates_in_kernel(seen, holders)
            found += await self._engine.run(lambda: list(self._missing(seen, held)))
        repairs: dict[int, Repair] = {}
        blocks = 0
        for ask in self._further:
            more = await ask()
            repairs.update({id(difference): more.repair for difference in more.differences})
            found += more.differences
            blocks += more.blocks
        return Report(tuple(await self._mend(found, repairs, at, repair)), allocations, blocks)

    def _judge(
        self, allocation: Allocation, seen: dict[str, list[KernelAddress]], at: Instant | None, held: dict[str, int]
    ) -> Iterator[Difference]:
        for address in allocation.addresses:
            other = held.setdefault(f"{address.pool} {address.ip}", allocation.generation)
            if other != allocation.generation:
                yield Difference(
                    "duplicate", address.pool, address.ip, allocation.key.node,
                    f"the store has it twice: generations {other} and {allocation.generation} ({allocation.key}); "
                    "release the one whose container is gone",
                    generation=allocation.generation,
                )  # fmt: skip
        if at is None or allocation.key.client != _CNI or not self._ledger.is_before(allocation, at):
            return
        inode = allocation.netns.inode
        for address in allocation.addresses:
            where = seen.get(address.ip, [])
            if inode and any(one.netns_inode == inode for one in where):
                continue
            if not inode and where:
                continue
            yield Difference(
                "leaked", address.pool, address.ip, allocation.key.node,
                f"held by {allocation.key}, but no interface in its namespace has it"
                + (f" (namespace {where[0].netns_inode}, {where[0].ifname}, has)" if where else "")
                + "; if the container is gone, release it",
                repairable=not where, generation=allocation.generation,
            )  # fmt: skip

    def _missing(self, seen: dict[str, list[KernelAddress]], held: dict[str, int]) -> Iterator[Difference]:
        for ip, where in seen.items():
            for pool in self._pools_with(ip):
                if f"{pool.name} {ip}" in held or self._store.holder(pool.name, ip) is not None:
                    break
            else:
                for pool in self._pools_with(ip):
                    yield Difference(
                        "missing", pool.name, ip, self._node,
                        f"in use on {where[0].ifname} in namespace {where[0].netns_inode}, but nobody holds it; it is "
                        "reserved by a repair so that nobody gets it, until that container is gone",
                        repairable=True,
                    )  # fmt: skip

    def _pools_with(self, ip: str) -> list[Pool]:
        number = address_number(ip)
        return [pool for pool in self._ledger.pools.values() if pool.locate(*number) is not None]

    def _duplicates_in_kernel(
        self, seen: dict[str, list[KernelAddress]], holders: dict[str, list[int]]
    ) -> Iterator[Difference]:
        for ip, where in seen.items():
            namespaces = sorted({one.netns_inode for one in where})
            known = holders.get(ip, [])
            # Pools of networks apart may have the same ranges: then each has a holder of its own.
            strangers = len(set(namespaces) - set(known)) - known.count(0)
            pools = self._pools_with(ip) if len(namespaces) > 1 and strangers > 0 else []
            for pool in pools:
                yield Difference(
                    "duplicate", pool.name, ip, self._node,
                    f"in use in several namespaces: {', '.join(map(str, namespaces))}; stop all but the one that "
                    "'netloom ip show' names",
                )  # fmt: skip

    async def _mend(
        self, found: Iterable[Difference], repairs: dict[int, Repair], at: Instant | None, repair: bool
    ) -> list[Difference]:
        now = self._clock.now_ns()
        before, self._found_ns = self._found_ns, {}
        answer = []
        for difference in found:
            print_ = (difference.kind, difference.pool, difference.address, difference.node, difference.generation)
            first = self._found_ns[print_] = before.get(print_, now)
            if repair and difference.repairable and first < now and now - first >= self._grace_ns:
                here = functools.partial(self._repair_here, at)
                answer.append(await self._repair(difference, repairs.get(id(difference), here)))
            else:
                answer.append(difference)
        return answer

    async def _repair(self, difference: Difference, how: Repair) -> Difference:
        try:
            repaired = await how(difference)
        except IpamdError as error:
            return msgspec.structs.replace(difference, text=f"{difference.text}; not mended: {error}")
        if repaired:
            log.event(_logger, "warning", "mended", kind=difference.kind, pool=difference.pool,
                      address=difference.address, node=difference.node, was=difference.text)  # fmt: skip
        return msgspec.structs.replace(difference, repaired=repaired)

    async def _repair_here(self, at: Instant | None, difference: Difference) -> bool:
        if difference.kind == "leaked":
            return await self._engine.run(lambda: self._release(difference, at))
        note = f"found in use by a check: {difference.text.partition(',')[0].removeprefix('in use on ')}"
        await self._reserve(difference.pool, difference.address, note)
        return True

    def _release(self, difference: Difference, at: Instant | None) -> bool:
        holder = self._store.holder(difference.pool, difference.address)
        if not isinstance(holder, Allocation) or holder.generation != difference.generation:
            return False
        if at is None or not self._ledger.is_before(holder, at):
            return False  # asked for again since the look: its generation stays, its namespace is a new one
        self._ledger.drop(holder)
        return True


def _by_address(kernel: Iterable[KernelAddress]) -> dict[str, list[KernelAddress]]:
    seen: dict[str, list[KernelAddress]] = {}
    for one in kernel:
        try:
            address = ipaddress.ip_address(one.ip)
        except ValueError:
            raise InvalidArgumentError(f"kernel: wanted an IP address, found {one.ip[:80]!r}") from None
        if not (address.is_link_local or address.is_loopback or address.is_multicast):
            seen.setdefault(str(address), []).append(one)
    return seen
