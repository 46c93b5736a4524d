"""What of ours is in the kernel: read once as a whole, then kept by events, so that one change costs one change.

Ours are routes of the protocol PROTOCOL in the main table, VXLAN devices with the alias ALIAS, and on those devices
every address, permanent neighbour and forwarding entry, and what they are as a port; on the bridges of overlays, every
permanent neighbour, and the gateways' addresses, whoever put them there. For one thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernel import addr, bridgeport, fdb, link, macs, neigh, route, vxlan
from kernel.errors import NotFound
from kernel.leftovers import BRIDGE_MARK, NETD_MARK
from kernel.rtevents import AddressChange, Change, ForwardChange, LinkChange, Lost, NeighbourChange, RouteChange
from kernel.session import Door
from netd.values import (
    ADDRESS,
    BRIDGE,
    DEVICE,
    PORT,
    Address,
    AnyInterface,
    Bridge,
    Bridged,
    Device,
    Entry,
    Forward,
    Key,
    Neighbour,
    Port,
    Route,
    route_key,
)

PROTOCOL = 110  # rtm_protocol: nobody's in /etc/iproute2/rt_protos
ALIAS = NETD_MARK
_IPV6_METRIC = 1024  # IP6_RT_PRIO_USER: what an IPv6 route without one gets


class Found:
    """Entries by key, and which index a link has."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.indexes: dict[str, int] = {}  # of our devices, and of overlays' bridges
        # Of all overlays, also of those that are not here, with their gateways.
        self.bridges: Mapping[str, tuple[AnyInterface, ...]] = {}
        self.fresh: set[str] = set()  # devices that were just made
        self._names: dict[int, str] = {}

    def get(self, key: Key) -> Entry | None:
        """What is there of this key."""
        return self.entries.get(key)

    def links(self) -> dict[str, int]:
        """The index of each link that ours are on, or lead to."""
        return {name: index for index, name in self._names.items()}

    def read(self, door: Door) -> None:
        """Read all of it."""
        self.entries, self.indexes, self._names = {}, {}, {}
        self.fresh.clear()  # of their making nothing may have been heard
        for name in self.bridges:  # first: ports name them
            self.read_bridge(door, name)
        for one in vxlan.all_vxlans(door):
            if one.vxlan is not None and one.vxlan.alias == ALIAS:
                self._read_device(door, one)
        self._read_routes(door)

    def read_device(self, door: Door, name: str) -> None:
        """Read a device of ours anew, with what is on it and the routes over it."""
        self.forget_device(name)
        one = vxlan.find(door, name)
        if one is not None and one.vxlan is not None and one.vxlan.alias == ALIAS:
            self._read_device(door, one)
            self._read_routes(door, one.index)

    def read_bridge(self, door: Door, name: str) -> None:
        """Read an overlay's bridge anew, where it is there and ours."""
        self.forget_device(name)
        one = link.find(door, name)
        if one is not None and one.kind == "bridge" and one.alias == BRIDGE_MARK:
            self.indexes[name], self._names[one.index] = one.index, name
            self._put_bridge(one)
            self._read_gateways(door, name, one.index)
            self._read_neighbours(door, name, one.index)

    def forget_device(self, name: str) -> None:
        """The device, or the bridge, is gone, and all that was on it."""
        index = self.indexes.pop(name, 0)
        self._names.pop(index, None)
        gone = [key for key, entry in self.entries.items() if name in (key[1], getattr(entry, "device", ""))]
        for key in gone:
            del self.entries[key]

    def name_of(self, index: int) -> str:
        """Of a device of ours, or an overlay's bridge; "" where it is neither."""
        name = self._names.get(index, "")
        return name if name in self.indexes else ""

    def has_address(self, door: Door, entry: Address) -> bool:
        """Whether it is there now, whoever put it there; asks the kernel."""
        index = self.indexes.get(entry.device, 0)
        return any(one.interface == entry.interface for one in addr.all_addresses(door, index)) if index else False

    def put(self, entry: Entry) -> None:
        """An entry is there now."""
        self.entries[entry.key] = entry

    def drop(self, key: Key) -> None:
        """An entry is there no more."""
        self.entries.pop(key, None)

    def note(self, door: Door, change: Change) -> set[Key] | None:
        """Take over what an event tells; the keys that it is about, or None where all has to be read again."""
        if isinstance(change, RouteChange):
            return self._note_route(door, change)
        if isinstance(change, NeighbourChange):
            return self._note_neighbour(change)
        if isinstance(change, ForwardChange):
            return self._note_forward(change)
        if isinstance(change, Lost):
            return None
        if name := self.name_of(change.index):
            return (
                self._note_bridge(door, name, change) if name in self.bridges else self._note_link(door, name, change)
            )
        return set()

    def _note_link(self, door: Door, name: str, change: LinkChange | AddressChange) -> set[Key] | None:
        if isinstance(change, AddressChange):
            return None if change.gone else set()
        fresh = name in self.fresh  # its own making is told step by step
        if change.up:
            self.fresh.discard(name)
        if change.gone or change.name != name or not (change.up or fresh):
            return None
        known = self.entries.get((DEVICE, name, b""))
        one = vxlan.find(door, name)
        if one is None or one.index != change.index or _device(one) != known:
            return None
        self._read_port(door, name)
        return {(PORT, name, b"")}

    def _note_bridge(self, door: Door, name: str, change: LinkChange | AddressChange) -> set[Key]:
        if isinstance(change, AddressChange):
            return self._read_gateways(door, name, change.index)
        one = link.find(door, name)
        if one is None or one.index != change.index:  # that is told next
            return set()
        self._put_bridge(one)
        return {(BRIDGE, name, b"")}

    def _note_route(self, door: Door, change: RouteChange) -> set[Key]:
        if not _counts(change.route):
            return set()
        key = route_key(change.route.dst)
        known = self.entries.get(key)
        if change.route.protocol == PROTOCOL:
            entry = self.route(door, change.route)
            if not change.gone:
                self.entries[key] = entry
            elif known == entry:
                del self.entries[key]
        elif change.replaced:
            self.entries.pop(key, None)
        return {key}

    def _note_neighbour(self, change: NeighbourChange) -> set[Key]:
        one = change.neighbour
        entry = Neighbour(self._names.get(one.index, ""), one.address, one.mac)
        key = entry.key
        if change.gone or not one.permanent:
            known = self.entries.get(key)
            # The event of an exchange that is known already may come late.
            if known is not None and (one.mac in ("", "00:00:00:00:00:00") or known == entry):
                del self.entries[key]
        else:
            self.entries[key] = entry
        return {key}

    def _note_forward(self, change: ForwardChange) -> set[Key]:
        one = change.forward
        name = self._names.get(one.index, "")
        entry: Entry = Forward(name, one.mac, one.dst) if isinstance(one, fdb.Forward) else Bridged(name, one.mac)
        if not change.gone:
            self.entries[entry.key] = entry
        elif self.entries.get(entry.key) == entry:
            del self.entries[entry.key]
        return {entry.key}

    def _read_device(self, door: Door, one: vxlan.Found) -> None:
        device = _device(one)
        if device is None:  # gone meanwhile
            return
        name, index = device.name, one.index
        self.indexes[name], self._names[index] = index, name
        self.put(device)
        for address in addr.all_addresses(door, index):
            if not address.interface.is_link_local:
                self.put(Address(name, address.interface))
        self._read_neighbours(door, name, index)
        self._read_port(door, name)
        for forward in fdb.all_forwards(door, index):
            if isinstance(forward, fdb.Bridged):
                self.put(Bridged(name, forward.mac))
            elif not forward.dst.is_unspecified:
                self.put(Forward(name, forward.mac, forward.dst))

    def _put_bridge(self, one: link.Link) -> None:
        """With the MAC that a bridge of these gateways has where it has that of any of them: a container's ADD sets
        that of the gateways which the container has."""
        gateways = [gateway.ip for gateway in self.bridges[one.name]]
        mac = macs.of_addresses(gateways) if one.mac in map(macs.of_address, gateways) else one.mac
        self.put(Bridge(one.name, mac, one.up))

    def _read_gateways(self, door: Door, name: str, index: int) -> set[Key]:
        """The addresses of gateways; the keys of those that came or went."""
        there = {one.interface for one in addr.all_addresses(door, index)}
        changed = set()
        for interface in self.bridges[name]:
            key = (ADDRESS, name, interface.ip.packed)
            if (key in self.entries) == (interface in there):
                continue
            changed.add(key)
            if interface in there:
                self.put(Address(name, interface, prefix_route=True))
            else:
                self.drop(key)
        return changed

    def _read_routes(self, door: Door, index: int = 0) -> None:
        for version in (4, 6):
            for entry in route.all_routes(door, version, index, PROTOCOL):
                if _counts(entry):
                    self.put(self.route(door, entry))

    def _read_neighbours(self, door: Door, name: str, index: int) -> None:
        for neighbour in neigh.all_neighbours(door, index):
            if neighbour.permanent:
                self.put(Neighbour(name, neighbour.address, neighbour.mac))

    def _read_port(self, door: Door, name: str) -> None:
        one = bridgeport.find(door, name)
        if one is None:
            self.drop((PORT, name, b""))
            return
        plain = one.answers and not one.learns and one.floods is not None
        self.put(Port(name, self._names.get(one.bridge, f"link {one.bridge}"), bool(one.floods), plain))

    def route(self, door: Door, one: route.Route) -> Route:
        """The route as an entry."""
        if one.index not in self._names:
            try:
                self._names[one.index] = link.by_index(door, one.index).name
            except NotFound:
                self._names[one.index] = ""
        plain = not (one.mtu or one.advmss or one.source)
        return Route(self._names[one.index], one.dst, one.gateway, one.onlink, plain)


def _counts(one: route.Route) -> bool:
    """Whether a route has the table and the metric of ours, so that it and ours exclude one another."""
    return one.table == route.MAIN and one.priority == (0 if one.dst.version == 4 else _IPV6_METRIC)


def _device(one: vxlan.Found) -> Device | None:
    """As the plan compares it; None where it is none, or went."""
    spec = one.vxlan
    if spec is None or spec.local is None:
        return None
    try:
        tx_checksum = vxlan.tx_checksum(spec.name)
    except NotFound:
        return None
    return Device(
        spec.name,
        spec.vni,
        spec.local,
        spec.port,
        spec.link,
        spec.mac,
        spec.mtu,
        tx_checksum,
        spec.udp_checksum,
        one.up,
        spec.learning,
    )
