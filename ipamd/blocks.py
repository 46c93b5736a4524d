"""The blocks of a node-block pool: which there are, and what each may hand out. Pure; addresses are integers.

A block is an aligned CIDR, of the prefix that the pool says or, where a subnet is smaller, that subnet; it counts where
it overlaps one of the range set's ranges. It is used as a subnet of its own: neither its network's own nor its
broadcast address is handed out, and its gateway is its first usable address, unless the pool has none. Blocks are
numbered in the order of the ranges; there may be more of them than fit into memory.
"""

import ipaddress
import random
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise

from msgspec import Struct

from ipamd.allocator import without
from ipamd.errors import InvalidArgumentError

_BITS = {4: 32, 6: 128}
_TRIES = 64
# Up to so many blocks are looked at one by one for one that is free.
_FEW = 1 << 16


class Stretch(Struct, frozen=True):
    """Neighbouring blocks. Addresses are those of the first block's beginning and the last one's."""

    version: int
    prefix: int
    first: int
    last: int
    ranges: tuple[tuple[int, int], ...]  # what may be handed out of them, both included, rising
    with_gateway: bool

    @property
    def step(self) -> int:
        """How many addresses a block has, usable or not."""
        return 1 << (_BITS[self.version] - self.prefix)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return (self.last - self.first) // self.step + 1


class Block(Struct, frozen=True):
    """One block: its beginning, prefix and gateway (None: there is none), and what it may hand out."""

    version: int
    prefix: int
    base: int
    gateway: int | None
    stretches: tuple[tuple[int, int], ...]


class Grid:
    """The blocks of one range set."""

    def __init__(self, stretches: Sequence[Stretch], holes: Sequence[tuple[int, int]]) -> None:
        """`holes` are never handed out: (first, last), both included."""
        self.stretches = tuple(stretches)
        self.total = sum(stretch.count for stretch in stretches)
        self._holes = tuple(holes)

    def cidr(self, number: int) -> str:
        """The block's CIDR."""
        for stretch in self.stretches:
            if number < stretch.count:
                return cidr_text(stretch.version, stretch.first + number * stretch.step, stretch.prefix)
            number -= stretch.count
        raise IndexError(number)

    def block(self, cidr: str) -> Block | None:
        """What a CIDR may hand out; None where it is no block of this range set."""
        network = ipaddress.ip_network(cidr)
        base = int(network.network_address)
        for stretch in self.stretches:
            if (network.version, network.prefixlen) == (stretch.version, stretch.prefix) and (
                stretch.first <= base <= stretch.last
            ):
                return self._block(stretch, base)
        return None

    def covering(self, version: int, address: int) -> str:
        """The block that an address lies in, "" where it lies in none."""
        for stretch in self.stretches:
            if version == stretch.version and stretch.first <= address < stretch.last + stretch.step:
                return cidr_text(version, address - address % stretch.step, stretch.prefix)
        return ""

    def _block(self, stretch: Stretch, base: int) -> Block:
        first, last = usable(stretch.version, base, base + stretch.step - 1)
        gateway = first if stretch.with_gateway else None
        holes = self._holes if gateway is None else (*self._holes, (gateway, gateway))
        stretches: list[tuple[int, int]] = []
        for low, high in stretch.ranges:
            if low <= last and high >= first:
                stretches += without(max(low, first), min(high, last), holes)
        return Block(stretch.version, stretch.prefix, base, gateway, tuple(stretches))

    def choose(self, seed: int, claimed: Container[str], *, spread: bool = False) -> str:
        """A block that is not among the claimed and has an address to give; "" where there is none.

        Where `seed` points, else the next behind it; with `spread`, any. So nodes that claim at the same time, each
        with a seed of its own, rarely meet, and those who met part.
        """
        if not self.total:
            return ""
        for attempt in range(_TRIES):
            number = random.randrange(self.total) if spread or attempt else seed % self.total  # noqa: S311 (no secret)
            if self._is_free(cidr := self.cidr(number), claimed):
                return cidr
            if not spread and attempt == 0:
                for further in range(1, min(_TRIES, self.total)):
                    if self._is_free(cidr := self.cidr((number + further) % self.total), claimed):
                        return cidr
        if self.total > _FEW:
            return ""
        free = [cidr for number in range(self.total) if self._is_free(cidr := self.cidr(number), claimed)]
        return random.choice(free) if free else ""  # noqa: S311

    def _is_free(self, cidr: str, claimed: Container[str]) -> bool:
        if cidr in claimed:
            return False
        block = self.block(cidr)
        return block is not None and bool(block.stretches)


def usable(version: int, first: int, last: int) -> tuple[int, int]:
    """The first and the last usable address of a subnet that has these as its ends."""
    if last - first <= 1:
        return first, last
    return first + 1, last - 1 if version == 4 else last


def cidr_text(version: int, base: int, prefix: int) -> str:
    """A CIDR in canonical text."""
    address = ipaddress.IPv4Address(base) if version == 4 else ipaddress.IPv6Address(base)
    return f"{address}/{prefix}"


class Part(Struct, frozen=True):
    """A range of a node-block pool."""

    range_set: int
    version: int
    prefix: int  # the subnet's
    first: int
    last: int
    with_gateway: bool


def stretches_of(parts: Iterable[Part], block_v4: int, block_v6: int) -> list[list[Stretch]]:
    """The blocks of ranges, by range set; raises InvalidArgumentError where a block would belong to two."""
    cut = [_cut(part, block_v4 if part.version == 4 else block_v6) for part in parts]
    sets: list[list[Stretch]] = [[] for _ in range(1 + max(index for index, _ in cut))]
    for index, stretch in cut:
        _join(sets[index], stretch)
    every = sorted(
        ((stretch.version, stretch.first, stretch.last + stretch.step - 1, stretch) for s in sets for stretch in s),
        key=lambda entry: entry[:2],
    )
    for one, other in pairwise(every):
        if one[0] == other[0] and other[1] <= one[2]:
            block = cidr_text(other[0], other[1], other[3].prefix)
            raise InvalidArgumentError(
                f"block {block} would belong to two ranges or range sets; choose smaller blocks, or ranges that end "
                "where a block does"
            )
    return sets


def _cut(part: Part, bits: int) -> tuple[int, Stretch]:
    prefix = max(bits, part.prefix)
    step = 1 << (_BITS[part.version] - prefix)
    first, last = part.first - part.first % step, part.last - part.last % step
    return part.range_set, Stretch(part.version, prefix, first, last, ((part.first, part.last),), part.with_gateway)


def _join(stretches: list[Stretch], new: Stretch) -> None:
    """Ranges of one set may share a block where they agree on what it looks like."""
    for number, old in enumerate(stretches):
        alike = (old.version, old.prefix, old.with_gateway) == (new.version, new.prefix, new.with_gateway)
        if alike and new.first <= old.last and old.first <= new.last:
            del stretches[number]
            joined = Stretch(
                old.version,
                old.prefix,
                min(old.first, new.first),
                max(old.last, new.last),
                tuple(sorted((*old.ranges, *new.ranges))),
                old.with_gateway,
            )
            _join(stretches, joined)
            return
    stretches.append(new)
