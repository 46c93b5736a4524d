"""Routes.

Sources: include/uapi/linux/rtnetlink.h, net/ipv4/fib_frontend.c, net/ipv6/route.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from kernel import netlink
from kernel.errors import KernelError, NotFound
from kernel.netlink import Message, attr, attributes, nested, u32
from kernel.session import Door

_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 5, 6, 7, 8
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 9, 15, 18
_RTAX_MTU, _RTAX_ADVMSS = 2, 8
_RTN_UNICAST, _RTN_LOCAL = 1, 2
BOOT = 3  # RTPROT_BOOT
_FLAG_CLONED = 0x200
_NEXTHOP_ONLINK = 4  # RTNH_F_ONLINK
MAIN = 254
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253

_RTMSG = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop
_U16 = struct.Struct("=H")

AnyNetwork = IPv4Network | IPv6Network
AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route.

    `table` None is the main table; `scope` None lets the kernel's rule decide: link without a gateway, universe with
    one; `priority`, `mtu` and `advmss` 0 are unset; `source` is the address that the host itself then speaks from, None
    lets the kernel choose; an IPv4 route may have an IPv6 `gateway`; `protocol` says who made it (rtm_protocol); with
    `onlink` nobody checks that the gateway is a neighbour.
    """

    dst: AnyNetwork
    index: int
    gateway: AnyAddress | None = None
    priority: int = 0
    table: int | None = None
    scope: int | None = None
    mtu: int = 0
    advmss: int = 0
    source: AnyAddress | None = None
    protocol: int = BOOT
    onlink: bool = False


def add_message(route: Route, *, exclusive: bool = False) -> Message:
    """The request that adds a route; a second one to the same destination becomes a further next hop of it, or is
    refused where it is to be the only one."""
    what = f"add route {route.dst} via {route.gateway or 'link'} on link {route.index}"
    return Message(_NEWROUTE, netlink.CREATE | (netlink.EXCL if exclusive else netlink.APPEND), _pack(route), what)


def add(door: Door, route: Route, *, exclusive: bool = False) -> None:
    """Add a route.

    Raises:
        Exists: it is there; or, where it is to be the only one, another to the same destination with the same metric.
    """
    door.rtnl.execute([add_message(route, exclusive=exclusive)])


def replace_message(route: Route) -> Message:
    """The request that puts a route in the place of the one to the same destination with the same metric, whoever made
    that, without a moment in between; or adds it."""
    what = f"replace route {route.dst} by one via {route.gateway or 'link'} on link {route.index}"
    return Message(_NEWROUTE, netlink.CREATE | netlink.REPLACE, _pack(route), what)


def delete(door: Door, route: Route) -> bool:
    """Remove a route; False where it was not there."""
    try:
        door.rtnl.execute([delete_message(route)])
    except NotFound:
        return False
    return True


def delete_message(route: Route) -> Message:
    """The request that removes a route; the kernel compares protocol, link and gateway too."""
    return Message(_DELROUTE, 0, _pack(route), f"remove route {route.dst}")


def all_routes(door: Door, family: int, index: int = 0, protocol: int = 0) -> list[Route]:
    """Every unicast route of one family (4 or 6), all tables, without cached ones, or only those over one link, or of
    one protocol; one for each next hop."""
    number = socket.AF_INET if family == 4 else socket.AF_INET6
    body = _RTMSG.pack(number, 0, 0, 0, 0, protocol, 0, 0, 0) + (u32(_RTA_OIF, index) if index else b"")
    request = Message(_GETROUTE, 0, body, "list routes")
    found: list[Route] = []
    for answer in door.rtnl.dump(request):
        found += parse(answer)
    # A kernel without strict checking ignores the filter, and a route may have next hops over other links too.
    return [
        route for route in found if (not index or route.index == index) and (not protocol or route.protocol == protocol)
    ]


def parse(body: bytes) -> Iterator[Route]:
    """The routes in a message of the kernel, one for each next hop; none where it is not a unicast one, or cached."""
    header = _RTMSG.unpack_from(body)
    if header[7] == _RTN_UNICAST and not header[8] & _FLAG_CLONED:
        yield from _parse(body)


def is_local(door: Door, address: AnyAddress) -> bool:
    """Whether the host takes packets to this address for its own."""
    answer = _look_up(door, address)
    return answer is not None and _RTMSG.unpack_from(answer)[7] == _RTN_LOCAL


def link_to(door: Door, address: AnyAddress) -> int:
    """The index of the link over which packets to this address go; 0 where there is no route."""
    answer = _look_up(door, address)
    return _number(attributes(answer, _RTMSG.size).get(_RTA_OIF)) if answer is not None else 0


def look_up(door: Door, address: AnyAddress, index: int = 0) -> Route | None:
    """The route that a packet to this address takes now, or would take over one link; None where there is none. Its
    `dst` is the address itself; a route of type local leads to the link `lo`."""
    answer = _look_up(door, address, index)
    return next(_parse(answer), None) if answer is not None else None


def _look_up(door: Door, address: AnyAddress, index: int = 0) -> bytes | None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0) + attr(_RTA_DST, address.packed)
    body += u32(_RTA_OIF, index) if index else b""
    try:
        return door.rtnl.get(Message(_GETROUTE, 0, body, f"look up the route to {address}"))
    except KernelError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ESRCH):
            return None  # none, or one of type unreachable, prohibit, blackhole
        raise


def _pack(route: Route) -> bytes:
    family = socket.AF_INET if route.dst.version == 4 else socket.AF_INET6
    scope = route.scope
    if scope is None:
        scope = SCOPE_UNIVERSE if route.gateway is not None or route.dst.version == 6 else SCOPE_LINK
    table = MAIN if route.table is None else route.table
    flags = _NEXTHOP_ONLINK if route.onlink else 0
    # The header has one byte for the table; the attribute holds what is larger.
    body = _RTMSG.pack(
        family, route.dst.prefixlen, 0, 0, table if table < 256 else 0, route.protocol, scope, _RTN_UNICAST, flags
    )
    body += attr(_RTA_DST, route.dst.network_address.packed) + u32(_RTA_OIF, route.index) + u32(_RTA_TABLE, table)
    if route.gateway is not None and route.gateway.version == route.dst.version:
        body += attr(_RTA_GATEWAY, route.gateway.packed)
    elif route.gateway is not None:  # struct rtvia: the family, and the address (include/uapi/linux/rtnetlink.h)
        body += attr(_RTA_VIA, _U16.pack(socket.AF_INET6) + route.gateway.packed)
    if route.source is not None:
        body += attr(_RTA_PREFSRC, route.source.packed)
    if route.priority:
        body += u32(_RTA_PRIORITY, route.priority)
    metrics = [u32(kind, value) for kind, value in ((_RTAX_MTU, route.mtu), (_RTAX_ADVMSS, route.advmss)) if value]
    if metrics:
        body += nested(_RTA_METRICS, *metrics)
    return body


def _parse(body: bytes) -> Iterator[Route]:
    family, length, _source, _tos, table, protocol, scope, _kind, flags = _RTMSG.unpack_from(body)
    found = attributes(body, _RTMSG.size)
    any_address = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104 - a destination, not a listener
    dst = ip_address(found[_RTA_DST]) if _RTA_DST in found else any_address
    metrics = attributes(found.get(_RTA_METRICS, b""))
    for index, gateway, hop_flags in _next_hops(found, flags):
        yield Route(
            dst=ip_network(f"{dst}/{length}"),
            index=index,
            gateway=ip_address(gateway) if gateway else None,
            priority=_number(found.get(_RTA_PRIORITY)),
            table=_number(found[_RTA_TABLE]) if _RTA_TABLE in found else table,
            scope=scope,
            mtu=_number(metrics.get(_RTAX_MTU)),
            advmss=_number(metrics.get(_RTAX_ADVMSS)),
            source=ip_address(found[_RTA_PREFSRC]) if _RTA_PREFSRC in found else None,
            protocol=protocol,
            onlink=bool(hop_flags & _NEXTHOP_ONLINK),
        )


def _next_hops(found: dict[int, bytes], flags: int) -> Iterator[tuple[int, bytes, int]]:
    """(link, gateway or b"", flags) of each. IPv6 reports all routes to one destination as one of several next hops."""
    if _RTA_MULTIPATH not in found:
        yield _number(found.get(_RTA_OIF)), _gateway(found), flags
        return
    data = found[_RTA_MULTIPATH]
    offset = 0
    while offset + _NEXTHOP.size <= len(data):
        size, hop_flags, _hops, index = _NEXTHOP.unpack_from(data, offset)
        if size < _NEXTHOP.size:
            return
        yield index, _gateway(attributes(data[offset : offset + size], _NEXTHOP.size)), hop_flags
        offset += (size + 3) & ~3


def _gateway(found: dict[int, bytes]) -> bytes:
    return found.get(_RTA_GATEWAY, b"") or found.get(_RTA_VIA, b"")[_U16.size :]


def _number(data: bytes | None) -> int:
    return int.from_bytes(data, "little") if data else 0
