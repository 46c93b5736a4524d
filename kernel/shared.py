"""What all attachments of a network want of the host's kernel together, and how those that live hear of a change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_network

from kernel import nft
from kernel.nft import Element
from kernel.record import Records
from kernel.session import Session

PLUGIN = "netloom"  # whose records these elements are in


def elements(subnets: Iterable[str], reachable: Sequence[str], *, is_open: bool) -> list[Element]:
    """Who may reach the attachments of a network, and that packets between hosts keep their source. The first element
    is the network's alone.

    `reachable`: subnets of the networks that it is connected with. `is_open`: everybody may reach them.
    """
    found = []
    for subnet in subnets:
        found.append(nft.no_masquerade(subnet))
        if not is_open:
            found += [nft.keep_apart(subnet), nft.join(subnet, subnet)]
        for other in reachable:
            if ip_network(other).version == ip_network(subnet).version:
                # Both ways, so that it does not matter which of the networks learns of it first.
                found += [nft.no_masquerade(subnet, other), nft.no_masquerade(other, subnet)]
                found += [nft.join(other, subnet), nft.join(subnet, other)]
    return found


def tell(session: Session, records: Records, networks: Iterable[Sequence[Element]]) -> None:
    """Have what is attached to networks want these elements from now on, those of one network each as `elements` gives
    them. Where it wants them already, its records are looked at, no more."""
    wanted = {one[0]: one for one in networks if one}
    attached = {element for one in records.all() if one.key.plugin == PLUGIN for element in one.shared}
    for element in attached & wanted.keys():
        records.change_shared(session, element, wanted[element], PLUGIN)
