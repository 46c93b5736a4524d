"""MACs that follow from addresses: whoever knows a container's address knows its MAC, on whichever host it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

AnyAddress = IPv4Address | IPv6Address

_PREFIX = b"\x02\x42"  # locally administered; as Docker has them


def of_address(address: AnyAddress) -> str:
    """ "02:42:0a:00:00:02" of 10.0.0.2; of an IPv6 address the last bytes are from its hash."""
    tail = address.packed if address.version == 4 else hashlib.sha256(address.packed).digest()[:4]
    return (_PREFIX + tail).hex(":")


def of_addresses(addresses: Iterable[AnyAddress]) -> str:
    """Of an interface with these: the first IPv4 address counts, else the first one; "" where there is none."""
    first = min(addresses, key=lambda one: one.version, default=None)
    return of_address(first) if first is not None else ""
