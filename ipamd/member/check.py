"""What a check compares in a cluster: this node's rows with what etcd says of it, and etcd's records with one another.

- "orphan-block": a block of a node that the cluster does not know. Mended, where nothing of it is in use: it is free.
- "unpublished": what etcd shows of a block of ours is not what is in use. Mended: it is published again.
- "unclaimed": an address of a cluster-address pool in use here that etcd has for nobody. Mended: it is claimed.
- "unreleased": one that etcd has for this node and nobody here holds. Mended: it is an allocation again, which goes
  once its container is gone.
- "stale-mac": a MAC that was told for an address which its node no longer holds by that allocation. Mended: it goes.
- "lost-network": a network that is in use here and that etcd lost, and what is in the way of putting it there again.
- "unreadable-key": a key that is no UTF-8; all leave it out. A person must delete it.
- "duplicate": one address, or block, of two nodes. A person must decide.

Everything is read from etcd anew, in pages, so that a mistake in what this node remembers shows, too.
"""

import ipaddress
import logging
from collections.abc import AsyncIterator, Mapping
from functools import partial
from itertools import pairwise

from msgspec import Struct

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Get, Pair, absent, unchanged
from cluster.layout import AddressHolder, BlockRecord, LayoutError, MacRecord, NodeRecord, PublishedRecord
from cluster.watch import shown
from ipamd.check import Difference, Further
from ipamd.engine import Engine
from ipamd.errors import PreconditionError, UnavailableError
from ipamd.lease import Ledger
from ipamd.member.blocks import Blocks
from ipamd.member.book import address_key, holder_of, mac_key
from ipamd.member.holdings import Holdings
from ipamd.member.shared import SharedAddresses
from ipamd.store.base import Allocation, Store
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_PAGE = 200
_BLOCKS_AT_ONCE = 32  # a block of 1,024 addresses has some 200 KiB
_KEYS_AT_ONCE = 2000
_SHOWN = 12  # what goes into one answer; the log has them all
# What a comparison reads, but for what it can mend unread.
_COMPARED: dict[str, type[Struct]] = {
    layout.NODES: NodeRecord,
    layout.BLOCKS: BlockRecord,
    layout.PUBLISHED: PublishedRecord,
    layout.ADDRESSES: AddressHolder,
}

Place = tuple[str, str]  # pool, and block or address


class ClusterCheck:
    """See the top of this file; what it is asked as is `ipamd.check.Further`."""

    def __init__(
        self,
        etcd: Etcd,
        engine: Engine,
        ledger: Ledger,
        store: Store,
        *,
        identity: BlockRecord,
        holdings: Holdings,
        blocks: Blocks,
        shared: SharedAddresses,
    ) -> None:
        self._etcd = etcd
        self._engine = engine
        self._ledger = ledger
        self._store = store
        self._identity = identity
        self._holdings = holdings
        self._blocks = blocks
        self._shared = shared
        self.lost_networks: Mapping[str, str] = {}  # and why they stay lost
        self._orphans: dict[Place, int] = {}  # mod_revision, as found by the last check
        self._stale: dict[Place, tuple[int, int]] = {}  # of a MAC and (0: there is none) of its address

    async def __call__(self) -> Further:
        """Raises UnavailableError where etcd does not answer: half a comparison would say that all is well.

        PreconditionError, with every key, where records cannot be read; of blocks alone they are differences.
        """
        try:
            await self._refuse_damaged()
            found = [difference async for difference in self._compare()]
        except EtcdError as error:
            raise UnavailableError(f"etcd cannot be read, so nothing was compared with it: {error}") from None
        except LayoutError as error:
            raise PreconditionError(f"{error}; so nothing was compared: delete or correct that key") from None
        return Further(tuple(found), self._count, self._repair)

    async def _compare(self) -> AsyncIterator[Difference]:
        self._count = 0
        self._orphans.clear()
        self._stale.clear()
        for frozen in await self._engine.run(self._blocks.frozen):
            yield Difference(
                "duplicate", frozen.pool, frozen.cidr, self._identity.node,
                f"two nodes have this block: {frozen.reason}; it hands nothing out here. Stop its containers on one of "
                "the two nodes",
            )  # fmt: skip
        for name, why in self.lost_networks.items():
            yield Difference(
                "lost-network", name, "", self._identity.node,
                f"etcd lost it, and addresses of it are in use here: {why}; end its containers here, or delete what is "
                "in its way",
            )  # fmt: skip
        async for difference in self._unreadable():
            yield difference
        async for difference in self._compare_blocks():
            yield difference
        async for difference in self._compare_published():
            yield difference
        for place, text in self._shared.conflicts.items():
            yield Difference("duplicate", *place, self._identity.node, text)
        async for difference in self._compare_addresses():
            yield difference
        async for difference in self._compare_macs():
            yield difference

    async def _refuse_damaged(self) -> None:
        """Of all nodes at once, as each of them would be in the way of the comparison. Raises PreconditionError."""
        damaged: dict[str, str] = {}
        for prefix, kind in _COMPARED.items():
            page = _BLOCKS_AT_ONCE if kind is PublishedRecord else _PAGE
            async for pair in self._walk(prefix, page=page):
                try:
                    layout.decode(kind, pair.key, pair.value)
                except LayoutError as error:
                    damaged[pair.key] = str(error)
        if all(key.startswith(layout.BLOCKS) for key in damaged):
            return
        for key, text in damaged.items():
            log.event(_logger, "error", "a record of the cluster cannot be read", key=key, error=text)
        shown = list(damaged.values())[:_SHOWN]
        if len(damaged) > _SHOWN:
            shown.append(f"{len(damaged) - _SHOWN} more, which the log names")
        raise PreconditionError(
            f"nothing was compared, as etcd has records that cannot be read; delete or correct these keys: "
            f"{'; '.join(shown)}"
        )

    async def _unreadable(self) -> AsyncIterator[Difference]:
        prefix = self._etcd.config.prefix
        async for page in self._etcd.walk("", page=_KEYS_AT_ONCE, keys_only=True):
            for key in page.unreadable:
                yield Difference(
                    "unreadable-key", "", "", "?",
                    f"etcd: {shown(key)}: a key below {prefix} that is no UTF-8; everybody leaves it out: delete it",
                )  # fmt: skip

    # --- blocks

    async def _compare_blocks(self) -> AsyncIterator[Difference]:
        nodes: dict[str, str] = {}
        async for pair in self._walk(layout.NODES):
            record = layout.decode(NodeRecord, pair.key, pair.value)
            nodes[pair.key.removeprefix(layout.NODES)] = record.id
        seen: dict[str, list[tuple[str, BlockRecord]]] = {}
        async for pair in self._walk(layout.BLOCKS):
            self._count += 1
            pool, cidr = layout.split(pair.key.removeprefix(layout.BLOCKS))
            try:
                owner = layout.decode(BlockRecord, pair.key, pair.value)
            except LayoutError as error:
                yield Difference("orphan-block", pool, cidr, "?", f"{error}; delete the key if no node has the block")
                continue
            if not _is_network(cidr):
                yield Difference("orphan-block", pool, cidr, owner.node, "this is no network; delete the key")
                continue
            seen.setdefault(pool, []).append((cidr, owner))
            if nodes.get(owner.node) != owner.node_id:
                yield await self._orphan(pool, cidr, owner, pair)
        for pool, blocks in seen.items():
            for one, other in _overlaps(blocks):
                yield Difference(
                    "duplicate", pool, one[0], one[1].node,
                    f"overlaps block {other[0]} of node {other[1].node}; stop the containers of one of the two",
                )  # fmt: skip

    async def _orphan(self, pool: str, cidr: str, owner: BlockRecord, pair: Pair) -> Difference:
        ending = layout.place(pool, cidr)
        there = await self._etcd.get(layout.PUBLISHED + ending)
        used = 0 if there is None else len(layout.decode(PublishedRecord, there.key, there.value).rows)
        if used:
            text = (
                f"a block of node {owner.node} ({owner.node_id}), which the cluster does not know; {used} addresses of "
                f"it were in use: if that node is gone, netloom node remove {owner.node}"
            )
        else:
            text = (
                f"a block of node {owner.node} ({owner.node_id}), which the cluster does not know; nothing of it was "
                "in use, so a repair frees it"
            )
            self._orphans[pool, cidr] = pair.mod_revision
        return Difference("orphan-block", pool, cidr, owner.node, text, repairable=not used)

    # --- what is published

    async def _compare_published(self) -> AsyncIterator[Difference]:
        """Of our own blocks; what others publish is theirs to compare."""
        for held in await self._engine.run(self._holdings.all):
            key = layout.PUBLISHED + layout.place(held.pool, held.cidr)
            there = await self._etcd.get(key)
            rows = await self._engine.run(partial(self._holdings.rows, held.pool, held.cidr))
            published = () if there is None else layout.decode(PublishedRecord, there.key, there.value).rows
            if rows is None or set(rows) == set(published):
                continue
            missing, extra = len(set(rows) - set(published)), len(set(published) - set(rows))
            yield Difference(
                "unpublished", held.pool, held.cidr, self._identity.node,
                f"the cluster lacks {missing} addresses that are in use, and has {extra} that are not; it hears of a "
                "change within seconds",
                repairable=True,
            )  # fmt: skip

    # --- addresses that are claimed one by one

    async def _compare_addresses(self) -> AsyncIterator[Difference]:
        here = await self._engine.run(self._held_here)
        prefix = f"{layout.OWNED}{self._identity.node}/"
        async for pair in self._walk(prefix, keys_only=True):
            place = layout.split(pair.key.removeprefix(prefix))
            if place not in here:
                there = await self._etcd.get(address_key(place))
                if there is not None and holder_of(there).node_id == self._identity.node_id:
                    yield Difference(
                        "unreleased", *place, self._identity.node,
                        "the cluster has it for this node, and nobody here holds it", repairable=True,
                    )  # fmt: skip
        for place in sorted(here.keys() - self._shared.conflicts.keys()):
            there = await self._etcd.get(address_key(place))
            holder = None if there is None else holder_of(there)
            if holder is None or (holder.node_id, holder.generation) != (self._identity.node_id, here[place]):
                whose = "nobody" if holder is None else f"node {holder.node}, generation {holder.generation}"
                yield Difference(
                    "unclaimed", *place, self._identity.node,
                    f"in use here (generation {here[place]}), and the cluster has it for {whose}", repairable=True,
                    generation=here[place],
                )  # fmt: skip

    async def _compare_macs(self) -> AsyncIterator[Difference]:
        """Of all nodes. Whoever reads a MAC heeds it for its own allocation only, so a stale one is only in the way."""
        async for pair in self._walk(layout.MACS, keys_only=True):
            place = layout.split(pair.key.removeprefix(layout.MACS))
            # Both of one moment, as a release takes both away.
            there, address = (await self._etcd.txn([], [Get(mac_key(place)), Get(address_key(place))])).pairs
            if there is None:
                continue
            holder = None if address is None else holder_of(address)
            try:
                told = layout.decode(MacRecord, there.key, there.value)
            except LayoutError as error:
                node, text = "?", f"{error}; a repair deletes the key"
            else:
                if holder is not None and (holder.node_id, holder.generation) == (told.node_id, told.generation):
                    continue
                node = holder.node if holder is not None else "?"
                text = (
                    f"the MAC {told.mac} was told for an allocation that no longer has the address; a repair deletes it"
                )
            self._stale[place] = there.mod_revision, address.mod_revision if address is not None else 0
            yield Difference("stale-mac", *place, node, text, repairable=True)

    def _held_here(self) -> dict[Place, int]:
        return {
            (pool.name, ip): generation
            for pool in self._ledger.pools.values()
            if pool.is_shared
            for ip, generation in self._store.taken(pool.name)
            if generation and generation not in self._ledger.unconfirmed
        }

    # --- mending

    async def _repair(self, difference: Difference) -> bool:
        place = difference.pool, difference.address
        if difference.kind == "orphan-block":
            return await self._free(place)
        if difference.kind == "stale-mac":
            return await self._drop_mac(place)
        if difference.kind == "unpublished":
            await self._engine.run(partial(self._ledger.changed.__setitem__, place, None))
            return True
        held = await self._engine.run(partial(self._store.holder, *place))
        if difference.kind == "unclaimed" and not isinstance(held, Allocation):
            return False
        self._shared.look_at(place)
        return True

    async def _free(self, place: Place) -> bool:
        revision = self._orphans.get(place)
        if revision is None:
            return False
        ending = layout.place(*place)
        key = layout.BLOCKS + ending
        try:
            done = await self._etcd.txn([unchanged(key, revision)], [Delete(key), Delete(layout.PUBLISHED + ending)])
        except EtcdError as error:
            raise UnavailableError(str(error)) from None
        return done.succeeded

    async def _drop_mac(self, place: Place) -> bool:
        told, held = self._stale.get(place, (0, 0))
        if not told:
            return False
        key = address_key(place)
        conditions = [unchanged(mac_key(place), told), unchanged(key, held) if held else absent(key)]
        try:
            done = await self._etcd.txn(conditions, [Delete(mac_key(place))])
        except EtcdError as error:
            raise UnavailableError(str(error)) from None
        return done.succeeded

    async def _walk(self, prefix: str, *, keys_only: bool = False, page: int = _PAGE) -> AsyncIterator[Pair]:
        async for found in self._etcd.walk(prefix, page=page, keys_only=keys_only):
            for pair in found.pairs:
                yield pair


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _overlaps(
    blocks: list[tuple[str, BlockRecord]],
) -> list[tuple[tuple[str, BlockRecord], tuple[str, BlockRecord]]]:
    """Neighbours in the order of addresses that overlap, of different nodes."""
    ordered = sorted(
        ((network.version, int(network.network_address), int(network.broadcast_address), block)
         for block in blocks if (network := ipaddress.ip_network(block[0]))),
        key=lambda entry: entry[:3],
    )  # fmt: skip
    found = []
    for one, other in pairwise(ordered):
        if one[0] == other[0] and other[1] <= one[2] and one[3][1].node_id != other[3][1].node_id:
            found.append((one[3], other[3]))
    return found
