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

from ipamd.allocator import Block, RangeSet, without
from ipamd.errors import InvalidArgumentError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Mode = Literal["local", "node-block", "cluster-address"]
MODES: tuple[Mode, ...] = ("local", "node-block", "cluster-address")

NO_GATEWAY = "none"

_MOST_RANGES = 1024
_MOST_EXCLUDES = 4096
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
    """A validated spec: the ranges of each set, and what is cut out of them, by IP version."""

    range_sets: tuple[tuple[Range, ...], ...]
    holes: dict[int, tuple[tuple[int, int], ...]]

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
        tuple(_range(r, f"range_sets[{i}].ranges[{j}]") for j, r in enumerate(ranges))
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
    return layout


def _range(spec: RangeSpec, what: str) -> Range:
    network = parse_network(spec.subnet, f"{what}.subnet")
    first, last = _usable(network)
    start = _bound(spec.start, network, f"{what}.start")
    end = _bound(spec.end, network, f"{what}.end")
    if start is not None and end is not None and start > end:
        raise InvalidArgumentError(f"{what}: start {spec.start} lies behind end {spec.end}; exchange them")
    gateway: int | None = first
    if spec.gateway == NO_GATEWAY:
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


def _usable(network: Network) -> tuple[int, int]:
    first, last = int(network.network_address), int(network.broadcast_address)
    if last - first <= 1:
        return first, last
    return first + 1, last - 1 if network.version == 4 else last


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
    """A pool in memory: bitmaps and counts. The rows are in the store; `lease` keeps the two in step."""

    __slots__ = ("allocated", "asked", "freed", "layout", "managed", "name", "reserved", "sets", "spec")

    def __init__(self, name: str, spec: PoolSpec, managed: bool, layout: Layout | None = None) -> None:
        """A pool with nothing touched; raises InvalidArgumentError for a spec that cannot be."""
        self.name = name
        self.spec = spec
        self.managed = managed
        self.layout = layout or validate(spec)
        self.sets = self.layout.build()
        self.asked = b""  # the message that the spec came from, so that an unchanged one is known without reading it
        self.allocated = [0] * len(self.sets)  # by range set, like the two below
        self.reserved = [0] * len(self.sets)
        self.freed = [0] * len(self.sets)

    def locate(self, version: int, number: int) -> tuple[int, int] | None:
        """Range set and block that may hand the address out; None: outside, excluded, or a gateway."""
        for index, (ranges, allocators) in enumerate(zip(self.layout.range_sets, self.sets, strict=True)):
            if ranges[0].version == version:
                block = allocators.block_of(number)
                if block >= 0:
                    return index, block
        return None

    def is_gateway(self, version: int, number: int) -> bool:
        """Whether the address is a gateway of one of the ranges."""
        return any(r.version == version and r.gateway == number for ranges in self.layout.range_sets for r in ranges)

    def describe(self, range_set: int) -> str:
        """The ranges of a set, for an error's text."""
        return ", ".join(map(str, self.layout.range_sets[range_set]))
