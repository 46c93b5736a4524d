"""The way of a packet from this host to an address, and whether each entry of the kernel's that it needs is there.

What is there is looked up in the kernel at that moment, not in what netd remembers.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_network

from kernel import link, route
from kernel.errors import NotFound
from kernel.session import Session
from netd.desired import OWN
from netd.found import PROTOCOL, Found
from netd.reconcile import Reconciler
from netd.values import (
    DEVICE,
    Address,
    AnyAddress,
    AnyNetwork,
    Bridged,
    Device,
    Entry,
    Forward,
    Neighbour,
    Node,
    Port,
    Route,
    route_key,
)


@dataclass(frozen=True, slots=True)
class EntryState:
    """An entry that the way needs. `instead`: what is there in its place."""

    kind: str
    text: str
    present: bool
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """`kind`: "peer", "own", "underlay" or "elsewhere". What does not apply is empty."""

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
    entries: tuple[EntryState, ...] = ()
    kernel: str = ""
    problems: tuple[str, ...] = ()


def explain(reconciler: Reconciler, address: AnyAddress) -> Way:
    """Of one address."""
    session = reconciler.session
    kernel = kernel_route(session, address)
    own = _containing(reconciler.node.subnets, address)
    if own is not None:
        network = reconciler.network_of(own)
        return Way(
            "own",
            reconciler.node.name,
            network.name,
            network.backend,
            str(own),
            mtu=reconciler.mtu(network),
            kernel=kernel,
        )
    for peer in reconciler.peers.values():
        if address in peer.addresses:
            return Way("underlay", peer.name, kernel=kernel, mtu=reconciler.underlay.mtu if reconciler.underlay else 0)
    held = [
        (subnet.prefixlen, peer, subnet)
        for peer in reconciler.peers.values()
        if (subnet := _containing(peer.subnets, address)) is not None
    ]
    if not held:
        return Way("elsewhere", kernel=kernel)
    _length, peer, subnet = max(held, key=lambda one: one[0])
    return _to_peer(reconciler, peer, subnet, kernel)


def kernel_route(session: Session, address: AnyAddress) -> str:
    """What the kernel does with a packet to this address, in the words of `ip route get`."""
    found = route.look_up(session, address)
    if found is None:
        return "unreachable: there is no route"
    try:
        name = link.by_index(session, found.index).name
    except NotFound:
        name = f"link {found.index}"
    via = f" via {found.gateway}" if found.gateway is not None else ""
    source = f" src {found.source}" if found.source is not None else ""
    return f"{address}{via} dev {name}{source}"


def _to_peer(reconciler: Reconciler, peer: Node, subnet: AnyNetwork, kernel: str) -> Way:
    session = reconciler.session
    network = reconciler.network_of(subnet)
    desired = reconciler.desired
    wanted = desired.get(route_key(subnet))
    entries: list[Entry] = []
    device = forward = None
    if isinstance(wanted, Route):
        device = desired.get((DEVICE, wanted.device, b""))
        if isinstance(device, Device):
            entries.append(device)
            entries += [
                one
                for key in sorted(desired.keys_of(OWN))
                if isinstance(one := desired.get(key), Address) and one.device == device.name
                and one.interface.version == subnet.version
            ]  # fmt: skip
            theirs = [desired.get(key) for key in sorted(desired.keys_of(peer.name))]
            entries += [one for one in theirs if isinstance(one, Neighbour) and one.address == wanted.gateway]
            forward = next((one for one in theirs if isinstance(one, Forward) and one.device == device.name), None)
            entries += [forward] if forward is not None else []
        entries.append(wanted)
    found = _look(session, entries)
    return Way(
        kind="peer",
        node=peer.name,
        network=network.name,
        backend=network.backend,
        subnet=str(subnet),
        link=wanted.device if isinstance(wanted, Route) else "",
        next_hop=str(wanted.gateway) if isinstance(wanted, Route) and wanted.gateway is not None else "",
        outer=str(forward.dst) if isinstance(forward, Forward) else "",
        vni=device.vni if isinstance(device, Device) else 0,
        port=device.port if isinstance(device, Device) else 0,
        mtu=reconciler.mtu(network),
        entries=tuple(_state(session, one, found) for one in entries),
        kernel=kernel,
        problems=tuple(reconciler.problems_of(peer.name)),
    )


def _look(session: Session, entries: list[Entry]) -> Found:
    """What of these is in the kernel now."""
    found = Found()
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
    instead = text(there) if there is not None and there != entry else ""
    if there is None and isinstance(entry, Route):
        others = [one for one in route.all_routes(session, entry.dst.version) if one.dst == entry.dst]
        instead = f"a route of protocol {others[0].protocol}" if others else ""
    return EntryState(type(entry).__name__.lower(), text(entry), there == entry, instead)


def text(entry: Entry) -> str:
    """As iproute2 writes it."""
    if isinstance(entry, Device):
        state = "" if entry.up else ", down"
        said = f"{entry.name} vxlan id {entry.vni} local {entry.local} dstport {entry.port} mtu {entry.mtu}{state}"
    elif isinstance(entry, Address):
        said = f"{entry.interface} dev {entry.device}"
    elif isinstance(entry, Neighbour):
        said = f"{entry.address} dev {entry.device} lladdr {entry.mac} PERMANENT"
    elif isinstance(entry, Forward):
        said = f"{entry.mac} dev {entry.device} dst {entry.dst} self permanent"
    elif isinstance(entry, Bridged):
        said = f"{entry.mac} dev {entry.device} master sticky static"
    elif isinstance(entry, Port):
        flood = "on" if entry.flood else "off"
        said = f"{entry.device} master {entry.bridge} neigh_suppress on learning off flood {flood}"
    else:
        via = f" via {entry.gateway}" if entry.gateway is not None else ""
        said = f"{entry.dst}{via} dev {entry.device}{' onlink' if entry.onlink else ''}"
    return said


def _containing(subnets: tuple[AnyNetwork, ...], address: AnyAddress) -> AnyNetwork | None:
    """The smallest subnet with this address."""
    single = ip_network(address)
    held = [one for one in subnets if one.version == address.version and single.subnet_of(one)]  # type: ignore[arg-type]
    return max(held, key=lambda one: one.prefixlen, default=None)
