"""The blocks that this node holds, in ledger and store. Runs inside a batch of the engine, as the ledger does."""

from collections.abc import Iterable

from msgspec import Struct

from cluster.layout import PublishedRow
from ipamd.allocator import Block
from ipamd.engine import Transaction
from ipamd.lease import Ledger
from ipamd.pool import Pool, address_number, address_text
from ipamd.pools import frozen_note
from ipamd.store.base import Change, DropBlock, Forget, Freed, Note, PutBlock, Reservation, Reserve, Use


class Held(Struct, frozen=True):
    """A block of this node. `closed`: it hands nothing out."""

    pool: str
    cidr: str
    held: int
    closed: bool


class Holdings:
    """See the top of this file."""

    def __init__(self, transaction: Transaction, ledger: Ledger) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._ledger = ledger

    def all(self) -> list[Held]:
        """Every block of every pool."""
        return [held for pool in self._ledger.pools.values() for held in self.of(pool)]

    def of(self, pool: Pool) -> list[Held]:
        """Every block of a pool."""
        return [
            Held(pool.name, cidr, block.held, block.closed)
            for index, cidrs in enumerate(pool.cidrs)
            for cidr, block in zip(cidrs, pool.sets[index].blocks, strict=True)
        ]

    def one(self, name: str, cidr: str) -> Held | None:
        """One block; None where this node does not hold it."""
        pool = self._ledger.pools.get(name)
        found = pool.find_block(cidr) if pool else None
        if pool is None or found is None:
            return None
        block = pool.sets[found[0]].blocks[found[1]]
        return Held(name, cidr, block.held, block.closed)

    def add(self, name: str, cidrs: Iterable[str], reserved: Iterable[Reservation] = ()) -> None:
        """The node holds these, too; those that it holds already stay as they are.

        `reserved`: all reservations of the pool, as the cluster knows them at least since the blocks are this node's.
        """
        pool = self._ledger.pool(name)
        mark = self._transaction.mark()
        try:
            changes: list[Change] = []
            known = {row.ip for row in self._store.reservations(name)}
            for row in reserved:
                if row.ip not in known and self._store.holder(name, row.ip) is None:
                    changes.append(Reserve(row))
                    known.add(row.ip)
            for cidr in cidrs:
                if pool.find_block(cidr) is None:
                    index, block = pool.add_block(cidr)
                    self._transaction.on_undo(pool.remove_block, cidr)
                    self._touch(pool, index, block, known)
                    changes.append(PutBlock(name, cidr))
                    self._ledger.changed[name, cidr] = None
            if changes:
                self._transaction.apply(*changes)
        except Exception:
            self._transaction.unwind(mark)
            raise

    def _touch(self, pool: Pool, index: int, block: Block, reserved: Iterable[str]) -> None:
        for ip in reserved:
            version, number = address_number(ip)
            if pool.family(index) == f"ipv{version}" and number in block:
                block.touch(number)
                self._count(pool.reserved, index, 1)

    def retire(self, name: str, cidr: str, *, hot: bool = False) -> bool:
        """Gives an empty block up; False where it is in use, or one of its addresses cools down (unless `hot`)."""
        pool = self._ledger.pool(name)
        found = pool.find_block(cidr)
        if found is None:
            return False
        index, number = found
        block = pool.sets[index].blocks[number]
        if block.held:
            return False
        if not hot and self._is_cooling(pool, index, block):
            return False
        freed, reserved = self._rows_in(pool, index, block)
        mark = self._transaction.mark()
        try:
            pool.remove_block(cidr)
            self._transaction.on_undo(pool.add_block, cidr, block)
            self._count(pool.freed, index, -len(freed))
            self._count(pool.reserved, index, -reserved)
            self._transaction.apply(DropBlock(name, cidr, tuple(row.ip for row in freed)),
                                    Note(frozen_note(name, cidr), ""))  # fmt: skip
        except Exception:
            self._transaction.unwind(mark)
            raise
        return True

    def at_rest(self, places: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of these blocks, (pool, CIDR), of which no address cools down."""
        found = []
        for name, cidr in places:
            pool = self._ledger.pool(name)
            where = pool.find_block(cidr)
            if where is not None and not self._is_cooling(pool, where[0], pool.sets[where[0]].blocks[where[1]]):
                found.append((name, cidr))
        return found

    def _is_cooling(self, pool: Pool, index: int, block: Block) -> bool:
        """Whether one of its addresses is. Mostly the first that was freed is, and then the others are not read: this
        is asked of every empty block, again and again."""
        version = 4 if pool.family(index) == "ipv4" else 6
        for number in block.addresses():
            if block.is_touched(number):
                row = self._store.find_freed(pool.name, address_text(version, number))
                if row is not None and self._ledger.is_cooling(pool, row):
                    return True
        return False

    def _rows_in(self, pool: Pool, index: int, block: Block) -> tuple[list[Freed], int]:
        """Freed addresses of a block, and how many of it are reserved."""
        version = 4 if pool.family(index) == "ipv4" else 6
        freed, reserved = [], 0
        for number in block.addresses():
            if block.is_touched(number):
                ip = address_text(version, number)
                row = self._store.find_freed(pool.name, ip)
                if row is not None:
                    freed.append(row)
                elif isinstance(self._store.holder(pool.name, ip), Reservation):
                    reserved += 1
        return freed, reserved

    def freeze(self, name: str, cidr: str, reason: str) -> bool:
        """Has a block hand nothing out, also after a restart; False where it did so already."""
        pool = self._ledger.pool(name)
        found = pool.find_block(cidr)
        if found is None or pool.sets[found[0]].blocks[found[1]].closed:
            return False
        index, number = found
        block = pool.sets[index].blocks[number]
        freed, _ = self._rows_in(pool, index, block)
        mark = self._transaction.mark()
        try:
            block.closed = True
            self._transaction.on_undo(block.open)
            self._count(pool.freed, index, -len(freed))
            self._transaction.apply(Forget(name, tuple(row.ip for row in freed)), Note(frozen_note(name, cidr), reason))
        except Exception:
            self._transaction.unwind(mark)
            raise
        return True

    def thaw(self, name: str, cidr: str) -> bool:
        """The inverse; addresses that were freed meanwhile are cold again, but for those that others still have."""
        pool = self._ledger.pool(name)
        found = pool.find_block(cidr)
        if found is None or not pool.sets[found[0]].blocks[found[1]].closed:
            return False
        index, number = found
        block = pool.sets[index].blocks[number]
        block.open()
        self._transaction.on_undo(_close, block)
        version = 4 if pool.family(index) == "ipv4" else 6
        for address in block.addresses():
            if block.is_touched(address) and self._store.holder(name, address_text(version, address)) is None:
                block.untouch(address)
                self._transaction.on_undo(block.touch, address)
        self._transaction.apply(Note(frozen_note(name, cidr), ""))
        return True

    def frozen(self, name: str, cidr: str) -> str:
        """Why a block hands nothing out, "" where it does."""
        return self._store.note(frozen_note(name, cidr))

    def rows(self, name: str, cidr: str) -> tuple[PublishedRow, ...] | None:
        """What is in use of a block; None where it is not this node's."""
        pool = self._ledger.pools.get(name)
        found = pool.find_block(cidr) if pool else None
        if pool is None or found is None:
            return None
        index, number = found
        block = pool.sets[index].blocks[number]
        if not block.held:
            return ()
        version = 4 if pool.family(index) == "ipv4" else 6
        touched = [address_text(version, address) for address in block.addresses() if block.is_touched(address)]
        return tuple([_row(use) for use in self._store.uses(name, touched)])

    def _count(self, counts: list[int], index: int, by: int) -> None:
        counts[index] += by
        self._transaction.on_undo(_add, counts, index, -by)


def _row(use: Use) -> PublishedRow:
    return PublishedRow(
        use.address.cidr,
        use.address.gateway,
        use.address.range_set,
        use.generation,
        use.client,
        use.network,
        use.container_id,
        use.ifname,
        use.created_unix_s,
        use.workload,
    )


def _add(counts: list[int], index: int, by: int) -> None:
    counts[index] += by


def _close(block: Block) -> None:
    block.closed = True
