"""host-gw: each peer is the gateway of its containers. Plain routes, nothing encapsulated; all hosts on one segment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from netd.fabric.base import Place, UnreachableError
from netd.values import AnyAddress, AnyNetwork, Entry, Node, Route


def mtu(place: Place) -> int:
    return place.network.mtu or place.underlay.mtu


def own(_place: Place) -> Iterable[Entry]:
    return ()


def towards(place: Place, peer: Node, subnets: Sequence[AnyNetwork]) -> Iterable[Entry]:
    return [Route(place.underlay.link, one, gateway(place, peer, one), onlink=False) for one in subnets]


def gateway(place: Place, peer: Node, subnet: AnyNetwork) -> AnyAddress:
    """The peer's address on the segment. Linux routes IPv4 by an IPv6 gateway, too, but not the other way round.

    Raises:
        UnreachableError: there is none.
    """
    versions = (4, 6) if subnet.version == 4 else (6,)
    addresses = [address for version in versions if (address := peer.address(version)) is not None]
    if not addresses:
        raise UnreachableError(
            f"{subnet} of {peer.name}: a route needs an IPv6 address of that host, and only {peer.addresses[0]} is"
            " known; give it one, or use the backend vxlan"
        )
    for address in addresses:
        if place.underlay.on_link(address):
            return address
    known = ", ".join(str(one) for one in place.underlay.addresses) or "no address"
    raise UnreachableError(
        f"{subnet} of {peer.name}: {addresses[0]} is not on the segment of {place.underlay.link} ({known}), so it is no"
        " gateway; use the backend direct or vxlan"
    )
