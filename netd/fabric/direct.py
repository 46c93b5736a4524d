"""direct: host-gw towards peers on the segment, vxlan towards all others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from netd.fabric import host_gw, vxlan
from netd.fabric.base import Place, UnreachableError
from netd.values import AnyNetwork, Entry, Node


def mtu(place: Place) -> int:
    return vxlan.mtu(place)  # a container does not know which way a packet will go


def own(place: Place) -> Iterable[Entry]:
    return vxlan.own(place)


def towards(place: Place, peer: Node, subnets: Sequence[AnyNetwork]) -> Iterable[Entry]:
    entries: list[Entry] = []
    distant: list[AnyNetwork] = []
    for one in subnets:
        try:
            entries += host_gw.towards(place, peer, [one])
        except UnreachableError:
            distant.append(one)
    return [*entries, *vxlan.towards(place, peer, distant)]
