"""Which addresses a host-local configuration gives out, and in which order. Pure.

The rules are the reference's (plugins/ipam/host-local/backend/allocator):
- A subnet has no host bits and at least two of them: /31 and /32 (/127 and /128) are refused.
- The gateway is the subnet's first address unless another is given. It is never given out.
- A range goes from the first address after the network's to the last one, of IPv4 to the one before the broadcast
  address; rangeStart and rangeEnd may widen or narrow it within the subnet.
- The ranges of a set are of one family. No two ranges overlap, in one set or in two.
- Of each set an attachment gets one address: the first free one after the last that was given out, round and round.
"""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface

import msgspec

from cni import versions
from cni.errors import CniError, Code, shown

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class RangeConf(msgspec.Struct, frozen=True, rename="camel"):
    """A range as it is written; "" where a key is absent."""

    subnet: str
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""


class Range(msgspec.Struct, frozen=True):
    """A checked range; `first` and `last` belong to it."""

    subnet: Network
    first: Address
    last: Address
    gateway: Address

    def __contains__(self, address: Address) -> bool:
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


class RangeSet(msgspec.Struct, frozen=True):
    """What one address is taken from."""

    ranges: tuple[Range, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.ranges))

    def range_of(self, address: Address) -> Range | None:
        """The range that the address lies in."""
        return next((one for one in self.ranges if address in one), None)

    def spans(self, after: Address | None) -> Iterator[tuple[Range, Address, Address]]:
        """Every address of the set once, as (range, first, last), in the order in which they are to be tried.

        Args:
            after: the address that was given out last; None, or one outside the set: from the beginning.
        """
        start = next((number for number, one in enumerate(self.ranges) if after is not None and after in one), None)
        if start is None or after is None:
            yield from ((one, one.first, one.last) for one in self.ranges)
            return
        here = self.ranges[start]
        if after != here.last:
            yield here, after + 1, here.last
        for one in (*self.ranges[start + 1 :], *self.ranges[:start]):
            yield one, one.first, one.last
        yield here, here.first, after


def parse(sets: Sequence[tuple[str, Sequence[RangeConf]]], version: str) -> tuple[RangeSet, ...]:
    """The range sets of a configuration, checked.

    Args:
        sets: each with the JSON path where it stands.
        version: of the configuration; those before 0.3.0 know one address of each family.

    Raises:
        CniError: 7, in the reference's words.
    """
    if not sets:
        raise _invalid("no IP ranges specified", "give `ranges`, or `subnet`, in $.ipam")
    parsed = tuple(_set(number, at, confs) for number, (at, confs) in enumerate(sets))
    for family in (4, 6):
        of_family = [one for one in parsed if one.ranges[0].first.version == family]
        if len(of_family) > 1 and not versions.at_least(version, "0.3.0"):
            raise _invalid(
                f"CNI version {version} does not support more than 1 address per family",
                f"found {len(of_family)} range sets of IPv{family}; use cniVersion 0.3.0 or newer",
            )
    for number, one in enumerate(parsed):
        for other in range(number + 1, len(parsed)):
            if any(_overlap(left, right) for left in one.ranges for right in parsed[other].ranges):
                here, there = sets[number][0], sets[other][0]
                raise _invalid(
                    f"range set {number} overlaps with {other}", f"{one} at {here}, {parsed[other]} at {there}"
                )
    return parsed


def address(text: str) -> Address:
    """An address as Go reads it: no zone, no leading zeros, an IPv4-mapped one is IPv4. Raises ValueError."""
    return ip_address(versions.canonical_ip(text))


def _set(number: int, at: str, confs: Sequence[RangeConf]) -> RangeSet:
    try:
        found = tuple(_range(conf) for conf in confs)
        _check_set(found)
    except ValueError as error:
        raise _invalid(f"invalid range set {number}: {error}", f"it stands at {at}") from error
    return RangeSet(found)


def _check_set(found: Sequence[Range]) -> None:
    if not found:
        raise ValueError("empty range set")
    if len({one.first.version for one in found}) > 1:
        raise ValueError(f"mixed address families: {', '.join(map(str, found))}")
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            if _overlap(one, other):
                raise ValueError(f"subnets {one} and {other} overlap")


def _range(conf: RangeConf) -> Range:
    network = _subnet(conf.subnet)
    begin = network.network_address
    gateway = _address("gateway", conf.gateway) if conf.gateway else begin + 1
    first = _address("rangeStart", conf.range_start) if conf.range_start else begin + 1
    last = _address("rangeEnd", conf.range_end) if conf.range_end else network.broadcast_address - (begin.version == 4)
    for key, value in (("RangeStart", first), ("RangeEnd", last)):
        if value.version != begin.version or value not in network:
            raise ValueError(f"{key} {value} not in network {network}")
    if int(first) > int(last):
        raise ValueError(f"RangeEnd {last} comes before RangeStart {first}")
    return Range(network, first, last, gateway)


def _subnet(text: str) -> Network:
    try:
        interface = ip_interface(versions.canonical_cidr(text))
    except ValueError:
        interface = None
    if interface is None or versions.is_ipv6(text) != (interface.version == 6):
        raise ValueError(f"subnet {shown(text)} is no CIDR such as 10.1.0.0/16")
    network = interface.network
    if network.prefixlen > network.max_prefixlen - 2:
        raise ValueError(f"Network {network} too small to allocate from")
    if interface.ip != network.network_address:
        raise ValueError(
            f"Network has host bits set. For a subnet mask of length {network.prefixlen} the network address is "
            f"{network.network_address}, found {interface}"
        )
    return network


def _address(key: str, text: str) -> Address:
    try:
        return address(text)
    except ValueError as error:
        raise ValueError(f"{key} {shown(text)} is no IP address") from error


def _overlap(one: Range, other: Range) -> bool:
    if one.first.version != other.first.version:
        return False
    return int(one.first) <= int(other.last) and int(other.first) <= int(one.last)


def _invalid(text: str, details: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: {text}", details)
