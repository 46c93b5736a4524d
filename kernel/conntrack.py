"""Connection tracking: forgetting UDP flows of a published port.

The kernel translates a flow as it did the flow's first packet. A client that goes on sending from one port keeps its
flow alive for ever, and so keeps reaching a container that is gone, or nobody, after the port was published anew.

Rules of this file
- Only UDP: a TCP connection of a container that is gone ends by itself, and one of another container is none of ours.
- The kernel filters the list (CTA_FILTER, Linux 5.8): each entry that it sends costs 41 µs. An older kernel ignores the
  filter; therefore every entry is compared here as well.
- For each list the kernel walks over its whole table, 4 ms with 262,144 buckets however few flows there are. So many
  ports, or two families, are one list of everything where that is cheaper; with no flow at all there is none.
- An entry is deleted by its tuple and its id, so that one which came to its place meanwhile is spared.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c
(ctnetlink_alloc_filter), include/net/netfilter/nf_conntrack.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernel import route, sysctl
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
_BY_PROTOCOL, _BY_SOURCE_PORT, _BY_DESTINATION_PORT = 1 << 3, 1 << 4, 1 << 5
_HEADER = struct.Struct(">BBH")
_FAMILIES = {4: 2, 6: 10}  # AF_INET, AF_INET6
_VERSIONS = {family: version for version, family in _FAMILIES.items()}
_UDP = 17
_WALK_US, _FLOW_US = 4000, 41  # of a list: for the walk, and for each flow that is sent

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

    requests = [
        _dump(version, _TUPLE_ORIG, _ORIG_FLAGS, _BY_DESTINATION_PORT, (_PROTO_DST_PORT, number))
        for version, numbers in wanted.items()
        for number in numbers
    ]
    return _delete(session, _flows(session, requests), match)


def forget_target(session: Session, targets: Collection[tuple[str, int]]) -> int:
    """Delete the flows that were translated to these addresses and ports of containers.

    Returns:
        How many.
    """
    wanted = {(ip_address(address), port) for address, port in targets}
    # Not by address: with one of IPv6 the kernel sends all flows but those (ctnetlink_filter_match_tuple).
    requests = [
        _dump(version, _TUPLE_REPLY, _REPLY_FLAGS, _BY_SOURCE_PORT, (_PROTO_SRC_PORT, number))
        for version, number in sorted({(address.version, number) for address, number in wanted})
    ]

    def match(flow: Flow) -> bool:
        translated = (flow.source, flow.source_port) != (flow.destination, flow.port)
        return translated and (flow.source, flow.source_port) in wanted

    return _delete(session, _flows(session, requests), match)


def _dump(version: int, direction: int, flags_kind: int, flag: int, port: tuple[int, int]) -> Message:
    """The request for the UDP flows of one family with this port; `flag` says that it counts."""
    protocol = nested(_TUPLE_PROTO, attr(_PROTO_NUM, bytes([_UDP])), attr(port[0], port[1].to_bytes(2, "big")))
    body = _HEADER.pack(_FAMILIES[version], 0, 0) + nested(direction, protocol)
    body += nested(_FILTER, u32(flags_kind, flag | _BY_PROTOCOL))
    return Message(_GET, 0, body, "list UDP flows")


def _flows(session: Session, requests: Sequence[Message]) -> Iterator[Flow]:
    count = _count() if requests else 0
    if count * _FLOW_US < (len(requests) - 1) * _WALK_US:
        requests = [Message(_GET, 0, _HEADER.pack(0, 0, 0), "list UDP flows")]
    for request in requests if count else ():
        for answer in session.netfilter.dump(request):
            flow = _parse(answer)
            if flow is not None:
                yield flow


def _count() -> int:
    """How many flows the thread's namespace has; a kernel without connection tracking has none."""
    try:
        return int(sysctl.read("netfilter", "nf_conntrack_count"))
    except NotFound:
        return 0


def _parse(body: bytes) -> Flow | None:
    version = _VERSIONS.get(body[0])
    if version is None:
        return None
    found = attributes(body, _HEADER.size)
    there, back = (_tuple(version, found.get(kind, b"")) for kind in (_TUPLE_ORIG, _TUPLE_REPLY))
    if there is None or back is None:
        return None
    key = _HEADER.pack(body[0], 0, 0)
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
