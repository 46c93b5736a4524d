"""vxlan: what goes to a peer is encapsulated in UDP. Works wherever the hosts reach one another.

One device for each VNI. For each subnet of a peer a route by the subnet's first address, which nobody else has, and the
neighbour of that name: the peer's tunnel end; for each peer one forwarding entry. Nothing is flooded and nothing
learned. The host's own first address on the device is what it speaks from itself, so that answers come back through the
tunnel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_interface

from kernel.vxlan import OVERHEAD_IPV4, OVERHEAD_IPV6
from netd.fabric import host_gw
from netd.fabric.base import Place, UnreachableError
from netd.values import Address, AnyNetwork, Device, Entry, Forward, Neighbour, Node, Route, Underlay


def mtu(place: Place) -> int:
    return min(place.network.mtu or largest(place.underlay), largest(place.underlay))


def own(place: Place) -> Iterable[Entry]:
    network, name = place.network, device_name(place.network.vni)
    yield Device(
        name=name,
        vni=network.vni,
        local=place.underlay.local[0],
        port=network.port,
        link=outer_link(place.underlay),
        mac=place.node.mac,
        mtu=largest(place.underlay),  # networks of several MTUs may share it
        tx_checksum=network.tx_checksum,
        udp_checksum=network.udp_checksum,
    )
    for version in (4, 6):
        first = min((one.network_address for one in place.subnets if one.version == version), default=None, key=int)
        if first is not None:
            yield Address(name, ip_interface(first))


def towards(place: Place, peer: Node, subnets: Sequence[AnyNetwork]) -> Iterable[Entry]:
    if not subnets:
        return ()
    if not peer.takes_vxlan:  # not yet, or no longer: its backend is being changed
        return host_gw.towards(place, peer, subnets)
    name = device_name(place.network.vni)
    version = place.underlay.local[0].version
    outer = peer.address(version)
    if outer is None:
        raise UnreachableError(
            f"{subnets[0]} of {peer.name}: tunnels begin at {place.underlay.local[0]} here, and that host has no"
            f" IPv{version} address; give it one, or set public_ip here to an address of the other family"
        )
    entries: list[Entry] = [Forward(name, peer.mac, outer)]
    for one in subnets:
        entries.append(Neighbour(name, one.network_address, peer.mac))
        entries.append(Route(name, one, one.network_address, onlink=True))
    return entries


def largest(underlay: Underlay) -> int:
    """The largest packet in bytes that fits into a tunnel."""
    return underlay.mtu - (OVERHEAD_IPV4 if underlay.local[0].version == 4 else OVERHEAD_IPV6)


def outer_link(underlay: Underlay) -> int:
    """The link that a tunnel's packets leave by. A loopback's addresses are reached over whichever link leads there."""
    return 0 if underlay.link == "lo" else underlay.index


def device_name(vni: int) -> str:
    """Of the device of a VNI; at most 15 characters."""
    return f"nl-vx{vni}"
