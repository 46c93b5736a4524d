"""The contract of a backend: one module, with these three functions, that does no I/O and keeps no state.

What they return for the same arguments is the same. What they no longer return is taken away; routes to one network
that differ are exchanged in one step. A network's entries are those of `own` and, for each peer, of `towards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from netd.values import AnyNetwork, Entry, Network, Node, Underlay


class UnreachableError(Exception):
    """A peer cannot be reached in this way; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a backend works: one network on one host, with the host's own subnets of that network."""

    network: Network
    node: Node
    subnets: Sequence[AnyNetwork]
    underlay: Underlay


class Backend(Protocol):
    """A way to other hosts."""

    def mtu(self, place: Place) -> int:
        """The largest packet in bytes that a container may send to any other host."""

    def own(self, place: Place) -> Iterable[Entry]:
        """What the host needs whoever the peers are."""

    def towards(self, place: Place, peer: Node, subnets: Sequence[AnyNetwork]) -> Iterable[Entry]:
        """What leads to these subnets of a peer.

        Raises:
            UnreachableError: nothing does.
        """
