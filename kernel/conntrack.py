"""Connection tracking: forgetting UDP flows of a published port.

The kernel translates a flow as it did the flow's first packet. A client that goes on sending from one port keeps its
flow alive for ever, and so keeps reaching a container that is gone, or nobody, after the port was published anew.

Rules of this file
- Only UDP: a TCP connection of a container that is gone ends by itself, and one of another container is none of ours.
- The kernel filters the list (CTA_FILTER, Linux 5.8): each entry that it sends costs 41 µs. An older kernel ignores the
  filter; therefore every entry is compared here as well.
- An entry is deleted by its tuple and its id, so that one which came to its place meanwhile is spared.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c
(ctnetlink_alloc_filter), include/net/netfilter/nf_conntrack.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import route
from kernel.errors import NotFound
from kernel.netlink import Message, attr, attributes, nested, u32
from kernel.ports import Port
from kernel.session import Session

_SUBSYSTEM = 1 << 8
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC = {4: 1, 6: 3}
_IP_DST = {4: 2, 6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_ORIG_FLAGS, _REPLY_FLAGS = 1, 2
_BY_SOURCE = 1 << 0
_BY_PROTOCOL, _BY_SOURCE_PORT, _BY_DESTINATION_PORT = 1 << 3, 1 << 4, 1 << 5
_HEADER = struct.Struct(">BBH")
_FAMILIES = {4: 2, 6: 10}
_UDP = 17
_FEW = 16  # ports to ask for one by one; beyond, all UDP flows are listed once

AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Flow:
    """A UDP flow: where it was sent to, and from where it is answered. `key` is what deletes it."""

    destination: AnyAddress
    port: int
    source: AnyAddress  # of the answers: the container, where the port was translated
    source_port: int
    key: bytes


def forget_port(session: Session, ports: Iterable[Port]) -> int:
    """Delete the flows to these ports of the host, wherever they lead: to another container, or to the host itself.
    Those that only pass through the host are left alone.

    Returns:
        How many.
    """
    local: dict[AnyAddress, bool] = {}

    def ours(flow: Flow) -> bool:
        if flow.source != flow.destination or flow.source_port != flow.port:
            return True
        if flow.destination not in local:
            local[flow.destination] = route.is_local(session, flow.destination)
        return local[flow.destination]

    wanted: dict[int, dict[int, list[str]]] = {4: {}, 6: {}}
    for port in ports:
        if port.protocol == "udp":
            wanted[port.version].setdefault(port.number, []).append("" if port.everywhere else port.address)

    def match(flow: Flow) -> bool:
        addresses = wanted[flow.destination.version].get(flow.port, ())
        return ("" in addresses or str(flow.destination) in addresses) and ours(flow)

    gone = 0
    for version, numbers in wanted.items():
        requests = [
            _dump(version, _TUPLE_ORIG, _ORIG_FLAGS, _BY_DESTINATION_PORT, port=(_PROTO_DST_PORT, number))
            for number in numbers
        ]
        gone += _delete(session, _flows(session, version, requests), match)
    return gone


def forget_target(session: Session, targets: Collection[tuple[str, int]]) -> int:
    """Delete the flows that were translated to these addresses and ports of containers.

    Returns:
        How many.
    """
    gone = 0
    for version in (4, 6):
        wanted = {(ip_address(address), port) for address, port in targets if (":" in address) == (version == 6)}
        requests = [
            _dump(
                version,
                _TUPLE_REPLY,
                _REPLY_FLAGS,
                # With an IPv6 address the kernel sends all flows but those (ctnetlink_filter_match_tuple).
                _BY_SOURCE_PORT | (_BY_SOURCE if version == 4 else 0),
                address=address if version == 4 else None,
                port=(_PROTO_SRC_PORT, port),
            )
            for address, port in wanted
        ]

        def match(flow: Flow, wanted: Collection[tuple[AnyAddress, int]] = wanted) -> bool:
            translated = (flow.source, flow.source_port) != (flow.destination, flow.port)
            return translated and (flow.source, flow.source_port) in wanted

        gone += _delete(session, _flows(session, version, requests), match)
    return gone


def _dump(
    version: int,
    direction: int,
    flags_kind: int,
    flags: int,
    *,
    port: tuple[int, int] | None = None,
    address: AnyAddress | None = None,
) -> Message:
    """The request for a list; `flags` says which parts of the tuple count."""
    protocol = [attr(_PROTO_NUM, bytes([_UDP]))]
    if port is not None:
        protocol.append(attr(port[0], port[1].to_bytes(2, "big")))
    parts = [nested(_TUPLE_PROTO, *protocol)]
    if address is not None:
        parts.insert(0, nested(_TUPLE_IP, attr(_IP_SRC[version], address.packed)))
    body = _HEADER.pack(_FAMILIES[version], 0, 0) + nested(direction, *parts)
    body += nested(_FILTER, u32(flags_kind, flags | _BY_PROTOCOL))
    return Message(_GET, 0, body, "list UDP flows")


def _flows(session: Session, version: int, requests: Sequence[Message]) -> Iterator[Flow]:
    if len(requests) > _FEW:
        requests = [_dump(version, _TUPLE_ORIG, _ORIG_FLAGS, 0)]
    for request in requests:
        for answer in session.netfilter.dump(request):
            flow = _parse(version, answer)
            if flow is not None:
                yield flow


def _parse(version: int, body: bytes) -> Flow | None:
    found = attributes(body, _HEADER.size)
    there, back = (_tuple(version, found.get(kind, b"")) for kind in (_TUPLE_ORIG, _TUPLE_REPLY))
    if there is None or back is None:
        return None
    key = _HEADER.pack(_FAMILIES[version], 0, 0)
    key += attr(_TUPLE_ORIG | 0x8000, found[_TUPLE_ORIG])
    for kind in (_ID, _ZONE):
        if kind in found:
            key += attr(kind, found[kind])
    return Flow(there.destination, there.destination_port, back.source, back.source_port, key)


@dataclass(frozen=True, slots=True)
class _Tuple:
    source: AnyAddress
    source_port: int
    destination: AnyAddress
    destination_port: int


def _tuple(version: int, data: bytes) -> _Tuple | None:
    """One direction of a UDP flow; None for another protocol's or family's."""
    parts = attributes(data)
    addresses, protocol = attributes(parts.get(_TUPLE_IP, b"")), attributes(parts.get(_TUPLE_PROTO, b""))
    if protocol.get(_PROTO_NUM) != bytes([_UDP]) or _IP_SRC[version] not in addresses:
        return None
    return _Tuple(
        ip_address(addresses[_IP_SRC[version]]),
        int.from_bytes(protocol.get(_PROTO_SRC_PORT, b""), "big"),
        ip_address(addresses[_IP_DST[version]]),
        int.from_bytes(protocol.get(_PROTO_DST_PORT, b""), "big"),
    )


def _delete(session: Session, flows: Iterable[Flow], match: Callable[[Flow], bool]) -> int:
    """Delete those that match; one that ended meanwhile is fine."""
    messages = [
        Message(_DELETE, 0, flow.key, f"forget the UDP flow to {flow.destination} port {flow.port}")
        for flow in flows
        if match(flow)
    ]
    if not messages:
        return 0
    failures = session.netfilter.attempt(messages)
    for failure in failures:
        if failure is not None and not isinstance(failure, NotFound):
            raise failure
    return failures.count(None)
