"""By which link and address this host reaches others: as it was told, or as the routes say.

The first of these that is given decides: `interface`, `interface_regex`, `can_reach`, `public_ip` where a link has that
address, and at last the link of the default route, IPv4 before IPv6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from kernel import addr, link, route
from kernel.addr import Address
from kernel.link import Link
from kernel.session import Door
from netd.found import ALIAS
from netd.values import AnyAddress, Underlay

_TEMPORARY, _DEPRECATED = 0x01, 0x20  # include/uapi/linux/if_addr.h; the first means "secondary" to IPv4


class UnderlayError(Exception):
    """This host has no underlay now; the text says what was wanted, what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the operator said. `interface` is a name or an address; `public_ip` has at most one address a family."""

    interface: str = ""
    interface_regex: str = ""
    can_reach: AnyAddress | None = None
    public_ip: tuple[AnyAddress, ...] = ()


def choose(door: Door, choice: Choice, before: Underlay | None = None) -> Underlay:
    """The underlay, as it is now. The link that it was `before` is kept while it is up and has that address: a default
    route that moves must not move every tunnel.

    Raises:
        UnderlayError: there is none.
    """
    links = {one.index: one for one in link.all_links(door) if one.alias != ALIAS}
    addresses = [one for one in addr.all_addresses(door) if one.index in links and _usable(one)]
    if before is not None:
        kept = links.get(before.index)
        own = {one.interface.ip for one in addresses if one.index == before.index}
        if kept is not None and kept.up and kept.name == before.link and own.issuperset(before.local):
            return _underlay(kept, addresses, choice, prefer=before.local)
    chosen, prefer = _link(door, choice, links, addresses)
    if not chosen.up:
        raise UnderlayError(f"the link {chosen.name}, by which other hosts are reached, is down; bring it up")
    return _underlay(chosen, addresses, choice, prefer)


def _link(
    door: Door, choice: Choice, links: dict[int, Link], addresses: list[Address]
) -> tuple[Link, tuple[AnyAddress, ...]]:
    """The link, and the addresses of it that are meant."""
    if choice.interface:
        return _named(choice.interface, links, addresses)
    if choice.interface_regex:
        return _matching(choice.interface_regex, links, addresses), ()
    if choice.can_reach is not None:
        way = route.look_up(door, choice.can_reach)
        if way is None or way.index not in links:
            raise UnderlayError(
                f"can_reach: there is no route to {choice.can_reach}; add one, or name the link with interface"
            )
        return links[way.index], () if way.source is None else (way.source,)
    for one in addresses:
        if one.interface.ip in choice.public_ip:
            return links[one.index], (one.interface.ip,)
    for version in (4, 6):
        routes = [one for one in route.all_routes(door, version) if not one.dst.prefixlen and one.table == route.MAIN]
        for default in sorted(routes, key=lambda one: one.priority):
            if default.index in links:
                return links[default.index], ()
    raise UnderlayError("this host has no default route that tells which link leads to others; name one with interface")


def _named(text: str, links: dict[int, Link], addresses: list[Address]) -> tuple[Link, tuple[AnyAddress, ...]]:
    try:
        wanted = ip_address(text)
    except ValueError:
        found = next((one for one in links.values() if one.name == text), None)
        if found is None:
            raise UnderlayError(f"interface: there is no link {text}; there are {_names(links.values())}") from None
        return found, ()
    for one in addresses:
        if one.interface.ip == wanted:
            return links[one.index], (wanted,)
    raise UnderlayError(f"interface: no link has the address {text}; there are {_names(links.values())}")


def _matching(pattern: str, links: dict[int, Link], addresses: list[Address]) -> Link:
    """The first link, in the order in which they were made, whose name or an address of which matches as a whole."""
    expression = re.compile(pattern)
    for index, one in sorted(links.items()):
        names = [one.name, *(str(found.interface.ip) for found in addresses if found.index == index)]
        if one.up and any(expression.fullmatch(name) for name in names):
            return one
    raise UnderlayError(
        f"interface_regex: no link that is up has a name or an address that {pattern!r} matches as a whole; there are"
        f" {_names(links.values())}"
    )


def _underlay(chosen: Link, addresses: Iterable[Address], choice: Choice, prefer: tuple[AnyAddress, ...]) -> Underlay:
    own = [one.interface for one in addresses if one.index == chosen.index]
    local: dict[int, AnyAddress] = {}
    for address in (*choice.public_ip, *prefer, *(one.ip for one in own)):
        if any(address == one.ip for one in own):
            local.setdefault(address.version, address)
    if choice.public_ip:
        public = choice.public_ip
        for address in public:
            if address.version not in local:
                raise UnderlayError(
                    f"public_ip {address}: the link {chosen.name} has no IPv{address.version} address that packets"
                    " could come from; add one, or name another link with interface"
                )
    else:
        # What was chosen by an IPv6 address alone is still reached by both, the other one second.
        first = prefer[0].version if len(prefer) == 1 else 4
        public = tuple(local[version] for version in (first, 10 - first) if version in local)
    if not public:
        raise UnderlayError(f"the link {chosen.name}, by which other hosts are reached, has no address; give it one")
    return Underlay(
        link=chosen.name,
        index=chosen.index,
        mtu=chosen.mtu,
        addresses=tuple(own),
        public=public,
        local=tuple(local[one.version] for one in public),
    )


def _usable(one: Address) -> bool:
    """Not one that goes again, or that nobody beyond the link knows."""
    if one.interface.is_link_local or one.tentative or one.duplicate:
        return False
    return one.interface.version == 4 or not one.flags & (_TEMPORARY | _DEPRECATED)


def _names(links: Iterable[Link]) -> str:
    return ", ".join(sorted(one.name for one in links))
