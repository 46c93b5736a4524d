"""The way of a packet, as it is explained: which entries of the kernel's it needs, and which of them are there now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernel import fdb, link, route
from kernel.errors import NotFound
from kernel.session import Session
from netd.found import PROTOCOL, Found
from netd.values import Address, AnyAddress, Bridge, Bridged, Device, Entry, Forward, Neighbour, Port, Route


@dataclass(frozen=True, slots=True)
class EntryState:
    """An entry that the way needs. `instead`: what is there in its place."""

    kind: str
    text: str
    present: bool
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """What does not apply is empty. `kind` is one of those that protos/node/v1/node.proto has for ExplainResponse;
    `note` what is well and yet to be told."""

    kind: str
    node: str = ""
    network: str = ""
    backend: str = ""
    subnet: str = ""
    link: str = ""
    next_hop: str = ""
    outer: str = ""
    vni: int = 0
    port: int = 0
    mtu: int = 0
    bridge: str = ""
    mac: str = ""
    note: str = ""
    entries: tuple[EntryState, ...] = ()
    kernel: str = ""
    problems: tuple[str, ...] = ()


def kernel_route(session: Session, address: AnyAddress) -> str:
    """What the kernel does with a packet to this address, in the words of `ip route get`."""
    found = route.look_up(session, address)
    if found is None:
        return "unreachable: there is no route"
    via = f" via {found.gateway}" if found.gateway is not None else ""
    source = f" src {found.source}" if found.source is not None else ""
    return f"{address}{via} dev {name_of(session, found.index)}{source}"


def states(session: Session, entries: Sequence[Entry]) -> tuple[EntryState, ...]:
    """Each of these as it is in the kernel now."""
    found = _look(session, entries)
    return tuple(_state(session, one, found) for one in entries)


def name_of(session: Session, index: int) -> str:
    """Of a link."""
    try:
        return link.by_index(session, index).name
    except NotFound:
        return f"link {index}"


def text(entry: Entry) -> str:
    """As iproute2 writes it."""
    if isinstance(entry, Device):
        state = f"{' learning' if entry.learns else ''}{'' if entry.up else ', down'}"
        said = f"{entry.name} vxlan id {entry.vni} local {entry.local} dstport {entry.port} mtu {entry.mtu}{state}"
    elif isinstance(entry, Address):
        said = f"{entry.interface} dev {entry.device}"
    elif isinstance(entry, Neighbour):
        said = f"{entry.address} dev {entry.device} lladdr {entry.mac} PERMANENT"
    elif isinstance(entry, Forward):
        said = f"{entry.mac} dev {entry.device} dst {entry.dst} self permanent"
    elif isinstance(entry, Bridged):
        said = f"{entry.mac} dev {entry.device} master sticky static"
    elif isinstance(entry, Bridge):
        said = f"{entry.device} address {entry.mac} {'up' if entry.up else 'down'}"
    elif isinstance(entry, Port):
        flags = (
            f"neigh_suppress on learning off flood {'on' if entry.flood else 'off'}" if entry.plain else "other flags"
        )
        said = f"{entry.device} master {entry.bridge} {flags}"
    else:
        via = f" via {entry.gateway}" if entry.gateway is not None else ""
        said = f"{entry.dst}{via} dev {entry.device}{' onlink' if entry.onlink else ''}"
    return said


def _look(session: Session, entries: Sequence[Entry]) -> Found:
    """What of these is in the kernel now."""
    found = Found()
    found.bridges = {one.bridge: () for one in entries if isinstance(one, Port)}
    for name in found.bridges:  # first: ports name them
        found.read_bridge(session, name)
    for name in {one.name for one in entries if isinstance(one, Device)}:
        found.read_device(session, name)
    for one in entries:
        if isinstance(one, Route):
            for there in route.all_routes(session, one.dst.version, protocol=PROTOCOL):
                if there.dst == one.dst:
                    found.put(found.route(session, there))
    return found


def _state(session: Session, entry: Entry, found: Found) -> EntryState:
    there = found.get(entry.key)
    instead = _instead(session, entry, found) if there is None else text(there) if there != entry else ""
    return EntryState(type(entry).__name__.lower(), text(entry), there == entry, instead)


def _instead(session: Session, entry: Entry, found: Found) -> str:
    """What somebody else has in the place of an entry that is missing."""
    if isinstance(entry, Route):
        others = [one for one in route.all_routes(session, entry.dst.version) if one.dst == entry.dst]
        return f"a route of protocol {others[0].protocol}" if others else ""
    if isinstance(entry, Device):
        other = link.find(session, entry.name)
        return f"a link of that name that is not netd's, {other.kind or 'of no kind'}" if other is not None else ""
    if isinstance(entry, Bridged):
        bridge = next((index for name, index in found.indexes.items() if name in found.bridges), 0)
        port = fdb.port_of(session, bridge, entry.mac) if bridge else 0
        return f"the bridge has it at {name_of(session, port)}" if port else ""
    return ""
