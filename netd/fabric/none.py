"""none: somebody else sees to the routes (a router, an operator, a cloud). Nothing is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from netd.fabric.base import Place
from netd.values import AnyNetwork, Entry, Node


def mtu(place: Place) -> int:
    return place.network.mtu or place.underlay.mtu


def own(_place: Place) -> Iterable[Entry]:
    return ()


def towards(_place: Place, _peer: Node, _subnets: Sequence[AnyNetwork]) -> Iterable[Entry]:
    return ()
