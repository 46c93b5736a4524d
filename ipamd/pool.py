"""Pools: what they may hand out (`PoolSpec`, validated here), and what of it is touched now (`Pool`).

Rules for a range, those of the reference's host-local where it has any:
- The subnet is a CIDR without host bits. The first and the last address default to the first and last usable one: of
  IPv4 neither the network's own address nor the broadcast address, of IPv6 not the first (the routers' anycast address,
  RFC 4291 section 2.6.1); a /31 and a /127 have two usable addresses (RFC 3021, RFC 6164), a /32 and a /128 one.
- The gateway defaults to the subnet's first usable address. No gateway of a pool is ever handed out from it.
- A range set is of one family and gives one address; its ranges are tried in order. No two ranges of a pool overlap.

All of this is pure. Rows are read once, when a pool is built, and only bitmaps stay in memory.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import msgspec
from msgspec import Struct

from ipamd import blocks
from ipamd.allocator import Block, RangeSet, without
from ipamd.blocks import Grid, Part
from ipamd.errors import InvalidArgumentError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Mode = Literal["local", "node-block", "cluster-address"]
MODES: tuple[Mode, ...] = ("local", "node-block", "cluster-address")

NO_GATEWAY = "none"

_MOST_RANGES = 1024
_MOST_EXCLUDES = 4096
_SHORTEST_BLOCK = {4: 22, 6: 118}  # 1024 addresses
_BITS = {4: 32, 6: 128}


class RangeSpec(Struct, frozen=True):
    """A range as it was asked for; "" stands for the default."""

    subnet: str
    start: str = ""
    end: str = ""
    gateway: str = ""


class PoolSpec(Struct, frozen=True, omit_defaults=True):
    """A pool as it was asked for. `cooldown_ms` None: the daemon's default.

    `mode` says who may hand an address out: "local" this node alone; "node-block" each node out of blocks that it has
    claimed in the cluster, with prefixes of `block_v4` and `block_v6` bits, at most `blocks_per_node` (0: any number)
    of a range set; "cluster-address" every node, each address being claimed in the cluster.
    """

    range_sets: tuple[tuple[RangeSpec, ...], ...]
    excludes: tuple[str, ...] = ()
    cooldown_ms: int | None = None
    mode: Mode = "local"
    block_v4: int = 26
    block_v6: int = 122
    blocks_per_node: int = 0

    def encode(self) -> str:
        """As text, for the store."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "PoolSpec":
        """The inverse of `encode`."""
        return msgspec.json.decode(text, type=cls)


class Range(Struct, frozen=True):
    """A range with its defaults filled in; addresses are integers."""

    version: int
    prefix: int
    first: int
    last: int
    gateway: int | None

    @property
    def family(self) -> Literal["ipv4", "ipv6"]:
        return "ipv4" if self.version == 4 else "ipv6"

    def __str__(self) -> str:
        return f"{address_text(self.version, self.first)}-{address_text(self.version, self.last)}"


class Layout(Struct, frozen=True):
    """A validated spec: the ranges of each set, and what is cut out of them, by IP version.

    `grids`: of a node-block pool, the blocks of each set; "()" of others.
    """

    range_sets: tuple[tuple[Range, ...], ...]
    holes: dict[int, tuple[tuple[int, int], ...]]
    grids: tuple[Grid, ...] = ()

    def build(self) -> tuple[RangeSet, ...]:
        """Allocators with nothing touched."""
        return tuple(
            RangeSet(Block(without(r.first, r.last, self.holes[r.version])) for r in ranges)
            for ranges in self.range_sets
        )


def address_text(version: int, address: int) -> str:
    """The canonical text of an address (RFC 5952 for IPv6)."""
    # Five times as fast as ipaddress, and on the way of every allocation.
    if version == 4:
        return socket.inet_ntop(socket.AF_INET, address.to_bytes(4, "big"))
    return socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, "big"))


def address_number(text: str) -> tuple[int, int]:
    """IP version and number of an address in canonical text."""
    if ":" in text:
        return 6, int.from_bytes(socket.inet_pton(socket.AF_INET6, text), "big")
    return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")


def parse_address(text: str, what: str) -> tuple[int, int]:
    """IP version and number of an address that somebody wrote; raises InvalidArgumentError that names `what`."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidArgumentError(f"{what}: wanted an IP address, found {text!r}") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise InvalidArgumentError(f"{what}: wanted an address without a zone, found {text!r}; drop the part after %")
    return address.version, int(address)


def parse_network(text: str, what: str) -> Network:
    """A CIDR that somebody wrote; raises InvalidArgumentError that names `what` and, for host bits, the right value."""
    if "/" not in text or "%" in text:
        raise InvalidArgumentError(f"{what}: wanted a CIDR such as 10.1.0.0/16, found {text!r}")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise InvalidArgumentError(f"{what}: wanted a CIDR such as 10.1.0.0/16, found {text!r}") from None
    if interface.ip != interface.network.network_address:
        raise InvalidArgumentError(f"{what}: {text!r} has host bits set; write {interface.network}")
    return interface.network


def validate(spec: PoolSpec) -> Layout:
    """Fills in the defaults; raises InvalidArgumentError that names the field, the value and what to do."""
    if not spec.range_sets:
        raise InvalidArgumentError("range_sets: wanted at least one range set, found none")
    if sum(map(len, spec.range_sets)) > _MOST_RANGES or len(spec.excludes) > _MOST_EXCLUDES:
        raise InvalidArgumentError(f"a pool has at most {_MOST_RANGES} ranges and {_MOST_EXCLUDES} excludes")
    range_sets = tuple(
        tuple(_range(r, f"range_sets[{i}].ranges[{j}]", spec.mode) for j, r in enumerate(ranges))
        for i, ranges in enumerate(spec.range_sets)
    )
    for i, ranges in enumerate(range_sets):
        if not ranges:
            raise InvalidArgumentError(f"range_sets[{i}]: wanted at least one range, found none")
        if len({r.version for r in ranges}) > 1:
            raise InvalidArgumentError(
                f"range_sets[{i}]: IPv4 and IPv6 ranges in one set, which gives one address; make a set for each "
                f"family of {', '.join(map(str, ranges))}"
            )
    _refuse_overlaps([r for ranges in range_sets for r in ranges])
    layout = Layout(range_sets, _holes(range_sets, spec.excludes))
    for i, (ranges, built) in enumerate(zip(range_sets, layout.build(), strict=True)):
        if not built.size:
            raise InvalidArgumentError(
                f"range_sets[{i}]: no address of {', '.join(map(str, ranges))} can be handed out: gateway and excludes "
                'take them all; widen the range, or set the gateway to "none"'
            )
    return msgspec.structs.replace(layout, grids=_grids(spec, layout)) if spec.mode == "node-block" else layout


def _grids(spec: PoolSpec, layout: Layout) -> tuple[Grid, ...]:
    for version, bits in ((4, spec.block_v4), (6, spec.block_v6)):
        if not _SHORTEST_BLOCK[version] <= bits <= _BITS[version]:
            raise InvalidArgumentError(
                f"block_v{version}: wanted a prefix length of {_SHORTEST_BLOCK[version]} to {_BITS[version]}, found "
                f"{bits}"
            )
    parts = [
        Part(i, r.version, ipaddress.ip_network(asked.subnet).prefixlen, r.first, r.last, asked.gateway != NO_GATEWAY)
        for i, ranges in enumerate(layout.range_sets)
        for asked, r in zip(spec.range_sets[i], ranges, strict=True)
    ]
    grids = []
    for i, stretches in enumerate(blocks.stretches_of(parts, spec.block_v4, spec.block_v6)):
        grid = Grid(stretches, layout.holes[stretches[0].version])
        if not grid.choose(0, ()):
            raise InvalidArgumentError(
                f"range_sets[{i}]: no block has an address to hand out: gateways and excludes take them all; widen the "
                'range, make the blocks larger, or set the gateway to "none"'
            )
        grids.append(grid)
    return tuple(grids)


def _range(spec: RangeSpec, what: str, mode: Mode) -> Range:
    network = parse_network(spec.subnet, f"{what}.subnet")
    first, last = blocks.usable(network.version, int(network.network_address), int(network.broadcast_address))
    start = _bound(spec.start, network, f"{what}.start")
    end = _bound(spec.end, network, f"{what}.end")
    if start is not None and end is not None and start > end:
        raise InvalidArgumentError(f"{what}: start {spec.start} lies behind end {spec.end}; exchange them")
    gateway: int | None = first
    if mode == "node-block":
        if spec.gateway not in ("", NO_GATEWAY):
            raise InvalidArgumentError(
                f"{what}.gateway: found {spec.gateway}; each block of a node-block pool has a gateway of its own, its "
                'first usable address; leave it out, or set it to "none"'
            )
        gateway = None
    elif spec.gateway == NO_GATEWAY:
        gateway = None
    elif spec.gateway:
        version, gateway = parse_address(spec.gateway, f"{what}.gateway")
        if version != network.version:
            raise InvalidArgumentError(f"{what}.gateway: {spec.gateway} is not of the family of {spec.subnet}")
    # A bound on the network's own or broadcast address is taken, but that address is never handed out.
    low, high = max(first, first if start is None else start), min(last, last if end is None else end)
    if low > high:
        raise InvalidArgumentError(
            f"{what}: {spec.start or first}-{spec.end or last} holds no usable address of {network}"
        )
    return Range(network.version, network.prefixlen, low, high, gateway)


def _bound(text: str, network: Network, what: str) -> int | None:
    if not text:
        return None
    version, number = parse_address(text, what)
    if version != network.version or not int(network.network_address) <= number <= int(network.broadcast_address):
        raise InvalidArgumentError(f"{what}: {text} lies outside {network}")
    return number


def _refuse_overlaps(ranges: Sequence[Range]) -> None:
    ordered = sorted(ranges, key=lambda r: (r.version, r.first))
    for one, other in pairwise(ordered):
        if one.version == other.version and other.first <= one.last:
            raise InvalidArgumentError(f"ranges {one} and {other} overlap; every address belongs to one range only")


def _holes(range_sets: Iterable[Iterable[Range]], excludes: Iterable[str]) -> dict[int, tuple[tuple[int, int], ...]]:
    holes: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    for r in (r for ranges in range_sets for r in ranges):
        if r.gateway is not None:
            holes[r.version].append((r.gateway, r.gateway))
    for i, text in enumerate(excludes):
        what = f"excludes[{i}]"
        if "/" in text:
            network = parse_network(text, what)
            holes[network.version].append((int(network.network_address), int(network.broadcast_address)))
        else:
            version, number = parse_address(text, what)
            holes[version].append((number, number))
    return {version: tuple(sorted(found)) for version, found in holes.items()}


class Pool:
    """A pool in memory: bitmaps and counts. The rows are in the store; `lease` keeps the two in step.

    `whole` is all that the spec says, `layout` what this node may hand out of it: the same, but for a node-block pool,
    which has the blocks here that this node holds; `cidrs` names those, by range set and in the layout's order.

    `is_shared`: each of its addresses is claimed in the cluster. `has_blocks`: it hands addresses out of blocks that
    the node holds. `early`: with so few addresses of a range set left, the next block is to be claimed; as many as
    `ahead` says, and more where blocks are wanted fast.
    """

    __slots__ = (
        "_places",
        "allocated",
        "asked",
        "cidrs",
        "early",
        "elsewhere",
        "freed",
        "has_blocks",
        "is_shared",
        "layout",
        "managed",
        "name",
        "reserved",
        "sets",
        "spec",
        "whole",
    )

    def __init__(self, name: str, spec: PoolSpec, managed: bool, layout: Layout | None = None) -> None:
        """A pool with nothing touched, without blocks; raises InvalidArgumentError for a spec that cannot be."""
        self.name = name
        self.spec = spec
        self.managed = managed
        self.is_shared = spec.mode == "cluster-address"
        self.whole = layout or validate(spec)
        self.has_blocks = bool(self.whole.grids)
        self.layout = self.whole
        if self.whole.grids:
            self.layout = Layout(tuple(() for _ in self.whole.range_sets), self.whole.holes)
        self.cidrs: list[tuple[str, ...]] = [() for _ in self.whole.grids]
        self._places: dict[str, tuple[int, int]] = {}  # of each block: its range set, and its number there
        self.early = [self.ahead(index) for index in range(len(self.whole.grids))]
        self.sets = self.layout.build()
        self.asked = b""  # the message that the spec came from, so that an unchanged one is known without reading it
        self.allocated = [0] * len(self.sets)  # by range set, like the two below
        self.reserved = [0] * len(self.sets)
        self.freed = [0] * len(self.sets)
        self.elsewhere = [0] * len(self.sets)  # cluster-address: held by other nodes

    def family(self, range_set: int) -> Literal["ipv4", "ipv6"]:
        """The family of a range set."""
        return self.whole.range_sets[range_set][0].family

    def locate(self, version: int, number: int) -> tuple[int, int] | None:
        """Range set and block that may hand the address out; None: outside, excluded, or a gateway."""
        for index, (ranges, allocators) in enumerate(zip(self.whole.range_sets, self.sets, strict=True)):
            if ranges[0].version == version:
                block = allocators.block_of(number)
                if block >= 0:
                    return index, block
        return None

    def is_gateway(self, version: int, number: int) -> bool:
        """Whether the address is a gateway of one of the ranges."""
        for grid in self.whole.grids:
            cidr = grid.covering(version, number)
            block = grid.block(cidr) if cidr else None
            if block is not None and block.gateway == number:
                return True
        return any(r.version == version and r.gateway == number for ranges in self.whole.range_sets for r in ranges)

    def describe(self, range_set: int) -> str:
        """The ranges of a set, for an error's text."""
        return ", ".join(map(str, self.whole.range_sets[range_set]))

    # --- blocks

    def count_untouched(self, range_set: int) -> int:
        """How many addresses were never handed out since their block came; never too low."""
        touched = self.allocated[range_set] + self.reserved[range_set] + self.freed[range_set]
        return self.sets[range_set].size - touched

    def ahead(self, range_set: int) -> int:
        """With so few addresses left, the next block is to be claimed, where there is no rush: a quarter of one."""
        bits = self.spec.block_v4 if self.family(range_set) == "ipv4" else self.spec.block_v6
        return max(1, 1 << (_BITS[4 if self.family(range_set) == "ipv4" else 6] - bits) >> 2)

    def home(self, cidr: str) -> int | None:
        """The range set that a block is of; None where it is no block of this pool."""
        found = self._find_home(cidr)
        return found[0] if found else None

    def _find_home(self, cidr: str) -> tuple[int, blocks.Block] | None:
        for index, grid in enumerate(self.whole.grids):
            block = grid.block(cidr)
            if block is not None:
                return index, block
        return None

    def block_for(self, version: int, number: int) -> tuple[int, str] | None:
        """Range set and block of a node-block pool that would hand the address out, whoever holds that block."""
        for index, grid in enumerate(self.whole.grids):
            cidr = grid.covering(version, number)
            block = grid.block(cidr) if cidr else None
            if block is not None and any(first <= number <= last for first, last in block.stretches):
                return index, cidr
        return None

    def find_block(self, cidr: str) -> tuple[int, int] | None:
        """Range set and number of a block that this node holds."""
        return self._places.get(cidr)

    def add_block(self, cidr: str, allocator: Block | None = None) -> tuple[int, Block]:
        """This node holds a block more; returns its range set and its allocator, with nothing touched if it is new.

        Raises InvalidArgumentError where it is no block of this pool.
        """
        found = self._find_home(cidr)
        if found is None:
            raise InvalidArgumentError(f"{cidr} is no block of pool {self.name}")
        index, block = found
        low = block.stretches[0][0] if block.stretches else block.base
        high = block.stretches[-1][1] if block.stretches else block.base
        allocator = allocator or Block(block.stretches)
        self.sets[index].add(allocator)
        self._lay(index, (*self.layout.range_sets[index], Range(block.version, block.prefix, low, high, block.gateway)))
        self._places[cidr] = index, len(self.cidrs[index])
        self.cidrs[index] = (*self.cidrs[index], cidr)
        return index, allocator

    def remove_block(self, cidr: str) -> None:
        """This node no longer holds a block. Counts are the caller's."""
        place = self._places.pop(cidr, None)
        if place is None:
            return
        index, number = place
        self.sets = tuple(s.without(number) if i == index else s for i, s in enumerate(self.sets))
        ranges = self.layout.range_sets[index]
        self._lay(index, (*ranges[:number], *ranges[number + 1 :]))
        self.cidrs[index] = (*self.cidrs[index][:number], *self.cidrs[index][number + 1 :])
        for later in range(number, len(self.cidrs[index])):
            self._places[self.cidrs[index][later]] = index, later

    def _lay(self, index: int, ranges: tuple[Range, ...]) -> None:
        sets = self.layout.range_sets
        self.layout = Layout((*sets[:index], ranges, *sets[index + 1 :]), self.layout.holes)
