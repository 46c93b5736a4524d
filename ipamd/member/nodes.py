"""The nodes of the cluster: who they are, how one is drained, and how one that is gone is forgotten with all it had."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Compare, Delete, Etcd, Get, Pair, Put, absent, equals, unchanged
from cluster.layout import AddressRecord, AliveRecord, BlockRecord, FreedRecord, LayoutError, NodeRecord
from ipamd.clock import Clock
from ipamd.errors import IpamdError, NotFoundError, PreconditionError, UnavailableError
from ipamd.member.book import address_key, freed_key, mac_key, workload_of
from ipamd.member.unclaims import Leases
from ipamd.store.base import Allocation
from telemetry import log

_logger = logging.getLogger("ipamd.member")

# Of one transaction, which has at most 100 changes: two for each block, up to four for each address.
_BLOCKS, _ADDRESSES = 50, 25
_TRIES = 5
_NETD = "netd/"


class NodeView(Struct, frozen=True):
    """A node, as the cluster sees it."""

    name: str
    record: NodeRecord
    alive: AliveRecord | None
    blocks: int
    addresses: int


class Removed(Struct, frozen=True):
    """What came back with a node."""

    blocks: int
    addresses: int


class _Counted(Struct):
    node: str
    rows: list[msgspec.Raw]


class Nodes:
    """See the top of this file. `cooldown_s`: a pool's cool-down, in seconds."""

    def __init__(self, etcd: Etcd, own: str, cooldown_s: Callable[[str], float]) -> None:
        self._etcd = etcd
        self._own = own
        self._cooldown_s = cooldown_s
        self._leases = Leases(etcd)

    async def all(self, name: str = "") -> list[NodeView]:
        """All nodes by name, or one; raises NotFoundError where there is no such node."""
        try:
            nodes = {pair.key.removeprefix(layout.NODES): pair for pair in await self._walk(layout.NODES)}
            alive = {pair.key.removeprefix(layout.ALIVE): pair for pair in await self._walk(layout.ALIVE)}
            blocks, addresses = await self._count()
        except EtcdError as error:
            raise _away(error) from None
        if name and name not in nodes:
            raise NotFoundError(f"the cluster has no node {name}; see netloom node list")
        return [
            NodeView(
                node,
                layout.decode(NodeRecord, pair.key, pair.value),
                layout.decode(AliveRecord, alive[node].key, alive[node].value) if node in alive else None,
                blocks[node],
                addresses[node],
            )
            for node, pair in sorted(nodes.items())
            if name in ("", node)
        ]

    async def _count(self) -> tuple[Counter[str], Counter[str]]:
        blocks: Counter[str] = Counter()
        addresses: Counter[str] = Counter()
        for pair in await self._walk(layout.BLOCKS):
            blocks[layout.decode(BlockRecord, pair.key, pair.value).node] += 1
        async for page in self._etcd.walk(layout.PUBLISHED, page=50):
            for pair in page.pairs:
                counted = layout.decode(_Counted, pair.key, pair.value)
                addresses[counted.node] += len(counted.rows)
        async for page in self._etcd.walk(layout.OWNED, keys_only=True):
            addresses.update(pair.key.removeprefix(layout.OWNED).partition("/")[0] for pair in page.pairs)
        return blocks, addresses

    async def _walk(self, prefix: str) -> Sequence[Pair]:
        return [pair async for page in self._etcd.walk(prefix) for pair in page.pairs]

    async def drain(self, name: str, undo: bool = False) -> NodeView:
        """Has a node give no new addresses of the cluster's pools, and give its empty blocks back."""
        key = layout.NODES + name
        try:
            for _ in range(_TRIES):
                pair = await self._etcd.get(key)
                if pair is None:
                    raise NotFoundError(f"the cluster has no node {name}; see netloom node list")
                record = layout.decode(NodeRecord, key, pair.value)
                if record.draining == (not undo):
                    break
                changed = layout.encode_over(pair.value, msgspec.structs.replace(record, draining=not undo))
                done = await self._etcd.txn([unchanged(key, pair.mod_revision)], [Put(key, changed)], repeatable=True)
                if done.succeeded:
                    break
        except EtcdError as error:
            raise _away(error) from None
        (view,) = await self.all(name)
        return view

    async def remove(self, name: str, *, force: bool = False) -> Removed:
        """Forgets a node, its blocks and its addresses; they can be claimed by others then.

        Addresses of cluster-address pools once they have cooled down, as after a release.
        """
        if name == self._own:
            raise PreconditionError(f"this is node {name} itself; stop its ipamd, and remove it from another node")
        try:
            pair = await self._etcd.get(layout.NODES + name)
            alive = await self._etcd.get(layout.ALIVE + name)
            if pair is None:
                raise NotFoundError(f"the cluster has no node {name}; see netloom node list")
            if alive is not None and not force:
                raise PreconditionError(
                    f"node {name} is alive; drain it, stop its ipamd and wait until its lease is over. By force, its "
                    "addresses could be handed out to others while its containers use them"
                )
            guard = [] if force else [absent(layout.ALIVE + name)]
            record = layout.decode(NodeRecord, pair.key, pair.value)
            return await self._remove(name, record, pair, guard)
        except EtcdError as error:
            raise _away(error) from None

    async def _remove(self, name: str, record: NodeRecord, node: Pair, guard: list[Compare]) -> Removed:
        _, addresses = await self._count()
        blocks = [
            pair
            for pair in await self._walk(layout.BLOCKS)
            if layout.decode(BlockRecord, pair.key, pair.value).node_id == record.id
        ]
        for some in _batches(blocks, _BLOCKS):
            published = [layout.PUBLISHED + pair.key.removeprefix(layout.BLOCKS) for pair in some]
            await self._delete(
                name, [equals(p.key, p.value) for p in some], [*[p.key for p in some], *published], guard
            )
        prefix = f"{layout.OWNED}{name}/"
        owned = await self._walk(prefix)
        for some in _batches(owned, _ADDRESSES):
            await self._free(name, record, some, guard)
        gone = [node.key, layout.ALIVE + name, _NETD + name]
        await self._delete(name, [unchanged(node.key, node.mod_revision)], gone, guard)
        log.event(_logger, "warning", "node removed", removed=name, blocks=len(blocks), addresses=addresses[name])
        return Removed(len(blocks), addresses[name])

    async def _free(self, name: str, record: NodeRecord, owned: Sequence[Pair], guard: list[Compare]) -> None:
        """Deletes addresses and has them cool down: a container of the node may still use them."""
        places = [layout.split(p.key.removeprefix(f"{layout.OWNED}{name}/")) for p in owned]
        held = (await self._etcd.txn([], [Get(address_key(place)) for place in places])).pairs
        compares = [unchanged(p.key, p.mod_revision) for p in owned]
        then: list[Put | Delete] = [Delete(p.key) for p in owned]
        for place, pair in zip(places, held, strict=True):
            key = address_key(place)
            compares.append(unchanged(key, pair.mod_revision) if pair is not None else absent(key))
            then += [Delete(key), Delete(mac_key(place))]
            lease = await self._lease(place[0])
            if lease:
                freed = FreedRecord(name, record.id, _workload(pair))
                then.append(Put(freed_key(place), layout.encode(freed), lease))
        await self._change(name, compares, then, guard)

    async def _lease(self, pool: str) -> int:
        try:
            return await self._leases.get(self._cooldown_s(pool))
        except EtcdError:
            self._leases.forget()
            raise

    async def _delete(self, name: str, compares: list[Compare], keys: list[str], guard: list[Compare]) -> None:
        await self._change(name, compares, [Delete(key) for key in keys], guard)

    async def _change(
        self, name: str, compares: list[Compare], then: Sequence[Put | Delete], guard: list[Compare]
    ) -> None:
        done = await self._etcd.txn([*guard, *compares], then)
        if not done.succeeded:
            raise PreconditionError(f"node {name} came back meanwhile, or another node removes it too; look again")


class LeftForDead:
    """Removes nodes that were not alive for the grace, as this node saw it without a gap. Never returns."""

    def __init__(self, etcd: Etcd, nodes: Nodes, clock: Clock, own: str, after_s: float) -> None:
        self._etcd = etcd
        self._nodes = nodes
        self._clock = clock
        self._own = own
        self._after_ns = int(after_s * 1e9)
        self._interval_s = min(30.0, after_s / 20)
        self._missing: dict[str, int] = {}
        self._looked_ns = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except EtcdError:
                self._missing.clear()
            except (IpamdError, LayoutError) as error:
                log.event(_logger, "warning", "a node that is gone could not be removed", error=str(error))

    async def look(self) -> None:
        """One round."""
        nodes = [pair.key.removeprefix(layout.NODES) for pair in await self._keys(layout.NODES)]
        alive = {pair.key.removeprefix(layout.ALIVE) for pair in await self._keys(layout.ALIVE)}
        now = self._clock.now_ns()
        if now - self._looked_ns > 3 * self._interval_s * 1e9:
            self._missing.clear()  # nobody looked meanwhile
        self._looked_ns = now
        self._missing = {n: self._missing.get(n, now) for n in nodes if n not in alive and n != self._own}
        for name, since_ns in list(self._missing.items()):
            if now - since_ns >= self._after_ns:
                log.event(_logger, "warning", "a node was not alive for so long that all it has is taken back",
                          removed=name, seconds=round((now - since_ns) / 1e9))  # fmt: skip
                await self._nodes.remove(name)

    async def _keys(self, prefix: str) -> Sequence[Pair]:
        return [pair async for page in self._etcd.walk(prefix, keys_only=True) for pair in page.pairs]


def _batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _workload(pair: Pair | None) -> str:
    """Which workload may have an address back before it has cooled down, "" for none."""
    if pair is None:
        return ""
    try:
        record = layout.decode(AddressRecord, pair.key, pair.value)
        return workload_of(msgspec.json.decode(record.allocation, type=Allocation))
    except (ValueError, msgspec.MsgspecError):  # it goes nevertheless
        return ""


def _away(error: EtcdError) -> UnavailableError:
    return UnavailableError(f"the cluster cannot be asked: {error}")
