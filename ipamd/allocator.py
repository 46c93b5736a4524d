"""Which address comes next. Pure: no clock, no store, no I/O; addresses are integers.

An address is *touched* when it cannot be handed out as new: allocated, freed but still remembered, or reserved. What
was never touched is *cold*. Cold addresses go first, in rising order from a cursor (next fit), so that an address rests
as long as possible before it comes again. Freed addresses stay touched; the queue of them is rows in the store, from
which `lease` takes when no cold address is left. Excluded addresses and gateways are cut out of the ranges beforehand.

The cost of an operation depends neither on the size of a range nor on how much of it is touched: an IPv6 /48 is a
sparse tree of 1024-bit words, in which a bit of an upper word says that the whole word below it is touched.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence

_SHIFT = 10
_WORD = 1 << _SHIFT
_MASK = _WORD - 1
_FULL = (1 << _WORD) - 1
_MOST_BLOCKS = 1 << 20


class Bitmap:
    """A sparse set of integers in [0, size) that finds its first gap in time that depends on neither."""

    __slots__ = ("_levels",)

    def __init__(self, size: int) -> None:
        # Bit i of a word at level n+1 is set exactly when word i of level n is full. 2^80 members: eight levels.
        depth = max(1, -(-(size - 1).bit_length() // _SHIFT))
        self._levels: tuple[dict[int, int], ...] = tuple({} for _ in range(depth))

    def __contains__(self, member: int) -> bool:
        return bool(self._levels[0].get(member >> _SHIFT, 0) >> (member & _MASK) & 1)

    def add(self, member: int) -> None:
        """Adds a member; adding it again changes nothing."""
        for level in self._levels:
            index = member >> _SHIFT
            word = level.get(index, 0) | 1 << (member & _MASK)
            level[index] = word
            if word != _FULL:
                return
            member = index

    def discard(self, member: int) -> None:
        """Removes a member; removing what is not there changes nothing."""
        for level in self._levels:
            index = member >> _SHIFT
            old = level.get(index, 0)
            word = old & ~(1 << (member & _MASK))
            if word:
                level[index] = word
            else:
                level.pop(index, None)
            if old != _FULL:
                return
            member = index

    def first_gap(self, start: int) -> int:
        """The smallest integer >= start that is no member; it may lie at or beyond the size."""
        position = start
        for number, level in enumerate(self._levels):
            offset = position & _MASK
            gaps = ~(level.get(position >> _SHIFT, 0) >> offset) & ((1 << (_WORD - offset)) - 1)
            if gaps:
                return self._descend(number, position + _lowest(gaps))
            position = (position >> _SHIFT) + 1
        return position << _SHIFT * len(self._levels)

    def _descend(self, number: int, position: int) -> int:
        for level in reversed(self._levels[:number]):
            position = position << _SHIFT | _lowest(~level.get(position, 0))
        return position


def _lowest(bits: int) -> int:
    """The number of the lowest set bit."""
    return (bits & -bits).bit_length() - 1


class Block:
    """One range: the addresses first … last without the holes, and a cursor.

    `held`: how many of its addresses are allocated, where somebody counts that. A `closed` one hands nothing out.
    """

    __slots__ = ("_cursor", "_full", "_starts", "_stretches", "closed", "held", "size", "spent")

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        """`stretches` are (first, last), both included, rising and apart; what lies between them is a hole."""
        self.closed = False
        self.held = 0
        self.spent: tuple[Bitmap, int] | None = None  # where its range set notes that no cold address is left
        self._starts = [first for first, _ in stretches]
        self._stretches = [(first, last - first + 1, Bitmap(last - first + 1)) for first, last in stretches]
        self._full = Bitmap(len(stretches))
        self._cursor = self._starts[0] if stretches else 0
        self.size = sum(size for _, size, _ in self._stretches)

    def _find(self, address: int) -> int:
        """The number of the stretch that holds the address, or -1."""
        number = bisect_right(self._starts, address) - 1
        if number >= 0:
            first, size, _ = self._stretches[number]
            if address - first < size:
                return number
        return -1

    def __contains__(self, address: int) -> bool:
        return self._find(address) >= 0

    @property
    def first(self) -> int:
        """The lowest address; the block must have one."""
        return self._starts[0]

    def addresses(self) -> Iterator[int]:
        """Every address, rising."""
        for first, size, _ in self._stretches:
            yield from range(first, first + size)

    def is_touched(self, address: int) -> bool:
        """Whether an address of this block is touched."""
        first, _, touched = self._stretches[self._find(address)]
        return address - first in touched

    def touch(self, address: int) -> None:
        """Marks an address of this block."""
        number = self._find(address)
        first, size, touched = self._stretches[number]
        touched.add(address - first)
        if touched.first_gap(0) >= size:
            self._full.add(number)

    def untouch(self, address: int) -> None:
        """Makes an address of this block cold again."""
        number = self._find(address)
        first, _, touched = self._stretches[number]
        touched.discard(address - first)
        self._full.discard(number)
        if self.spent is not None:
            self.spent[0].discard(self.spent[1])

    def start_after(self, address: int) -> None:
        """Puts the cursor behind an address of this block (after a restart: behind the last one handed out)."""
        self._cursor = address + 1

    def open(self) -> None:
        """The inverse of being closed."""
        self.closed = False
        if self.spent is not None:
            self.spent[0].discard(self.spent[1])

    def has_cold(self) -> bool:
        """Whether `take_cold` would find one."""
        return self._next_cold() is not None

    def take_cold(self) -> int | None:
        """Touches the next cold address and returns it; None where there is none."""
        address = self._next_cold()
        if address is not None:
            self.touch(address)
            self._cursor = address + 1
        return address

    def _next_cold(self) -> int | None:
        if self.closed:
            return None
        count = len(self._stretches)
        here = bisect_right(self._starts, self._cursor) - 1
        if here >= 0:
            first, size, touched = self._stretches[here]
            gap = touched.first_gap(self._cursor - first) if self._cursor - first < size else size
            if gap < size:
                return first + gap
        number = self._full.first_gap(here + 1)
        if number >= count:
            number = self._full.first_gap(0)
        if number >= count:
            return None
        first, _, touched = self._stretches[number]
        return first + touched.first_gap(0)


class RangeSet:
    """Ranges of one family that together give one address; they are tried in order.

    `size`: how many addresses it may hand out at most.
    """

    __slots__ = ("_ordered", "_spent", "blocks", "size")

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.size = 0
        self._ordered: list[tuple[int, int]] = []  # (first address, number), rising
        self._spent = Bitmap(_MOST_BLOCKS)
        for block in blocks:
            self.add(block)

    def add(self, block: Block) -> None:
        """Takes one more, behind the others."""
        number = len(self.blocks)
        block.spent = (self._spent, number)
        if block.size:
            insort(self._ordered, (block.first, number))
        self.blocks = (*self.blocks, block)
        self.size += block.size

    def without(self, number: int) -> "RangeSet":
        """The same but for one; those behind it move up. This one must not be used any more."""
        return RangeSet(block for n, block in enumerate(self.blocks) if n != number)

    def block_of(self, address: int) -> int:
        """The number of the block that may hand out the address, or -1 (outside, excluded, a gateway)."""
        at = bisect_right(self._ordered, (address, _MOST_BLOCKS)) - 1
        if at >= 0:
            number = self._ordered[at][1]
            if address in self.blocks[number]:
                return number
        return -1

    def take_cold(self) -> tuple[int, int] | None:
        """Touches the next cold address; returns it and its block's number, or None where no cold one is left."""
        blocks, spent = self.blocks, self._spent
        number = spent.first_gap(0)
        while number < len(blocks):
            address = blocks[number].take_cold()
            if address is not None:
                return address, number
            spent.add(number)
            number = spent.first_gap(number + 1)
        return None

    def has_cold(self) -> bool:
        """Whether `take_cold` would find one."""
        number = self._spent.first_gap(0)
        while number < len(self.blocks):
            if self.blocks[number].has_cold():
                return True
            self._spent.add(number)
            number = self._spent.first_gap(number + 1)
        return False


def without(first: int, last: int, holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What remains of first … last (both included) once the holes are cut out, rising."""
    stretches = []
    for low, high in sorted(holes):
        if high < first or low > last:
            continue
        if low > first:
            stretches.append((first, low - 1))
        first = max(first, high + 1)
    if first <= last:
        stretches.append((first, last))
    return stretches
