"""Overlays: what this host's kernel should hold of each layer-2 network that a container here is on. Pure: no I/O.

For each overlay whose bridge is there: the tunnel's end, which is a port of that bridge, and for each container on
another host a neighbour of the bridge, an entry of the bridge and one of the tunnel's end. The bridge answers for
neighbours out of the first, so nothing is asked on the underlay, and nothing is flooded unless the network says so.

The tunnel's end comes up when all holders are known: nothing passes it before, and whoever waits for it knows that the
container can be reached and can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from ipaddress import ip_address

from kernel import macs
from netd.desired import Desired
from netd.fabric.vxlan import device_name, largest, outer_link
from netd.found import Found
from netd.values import (
    DEVICE,
    FORWARD,
    NEIGHBOUR,
    NOBODY_KNOWN,
    PORT,
    Address,
    AnyAddress,
    Bridge,
    Bridged,
    Device,
    Entry,
    Forward,
    Holder,
    Key,
    Neighbour,
    Node,
    Overlay,
    Port,
    Underlay,
)

_OWNER = "overlay/"  # no host's name has a slash
_BRIDGE = "bridge"  # what is wanted of the bridge itself
_SHOWN = 3  # of the same kind, of a network
_FORGOTTEN_LATE = 1000  # addresses that nobody has any more, of a network


def is_bridges_own(entry: Entry | None) -> bool:
    """Whether it is the plugin's that made the bridge: put back where it is missing, and never taken away."""
    return isinstance(entry, Bridge) or (isinstance(entry, Address) and entry.prefix_route)


def is_owner(name: str) -> bool:
    """Whether entries that somebody wants are an overlay's."""
    return name.startswith(_OWNER)


class Overlays:
    """Keeps `desired` in step with definitions, bridges, holders and hosts.

    Each method that is told something returns the keys to be synced.
    """

    def __init__(self, desired: Desired, found: Found, rival: Callable[[Node], str] = lambda _: "") -> None:
        """`rival`: who had an underlay address of a host before it, in words; "" where nobody had."""
        self._desired = desired
        self._found = found
        self._rival = rival
        self._defined: dict[str, Overlay] = {}
        self._by_link: dict[str, str] = {}  # bridge, or tunnel's end → network
        self._holders: dict[str, dict[AnyAddress, Holder]] = {}
        self._by_node: dict[str, dict[str, set[AnyAddress]]] = {}  # host → network → addresses
        self._known: set[str] = set()  # networks all of whose holders were told
        self._macs: dict[str, dict[AnyAddress, str]] = {}  # network → the last MAC, also of who is gone
        self._news: list[Neighbour] = []
        self._false: dict[str, set[AnyAddress]] = {}  # network → who has what is the gateway's
        self._false_news: list[str] = []
        self._active: dict[str, int] = {}
        self._activations = 0
        self._underlay: Underlay | None = None
        self._own = ""
        self._mac = ""
        self._peers: Mapping[str, Node] = {}

    # What there is

    def defined(self) -> list[Overlay]:
        """By name."""
        return [one for _, one in sorted(self._defined.items())]

    def active(self) -> Mapping[str, int]:
        """The networks that this host is on, and for each a number that is another after it was not on it."""
        return dict(self._active)

    def known(self, network: str) -> bool:
        """Whether all holders of an active network were told."""
        return network in self._known

    def holders(self, network: str) -> Mapping[AnyAddress, Holder]:
        """Of an active network, also those of this host."""
        return self._holders.get(network, {})

    def mtu(self, overlay: Overlay) -> int:
        """The largest packet in bytes that a container may send; 0 while there is no underlay."""
        if self._underlay is None:
            return 0
        most = largest(self._underlay)
        return min(overlay.mtu or most, most)

    def outer(self, node: str) -> AnyAddress | None:
        """Where the tunnel's end of a host is; None: unknown, or it is down, or another host has the address."""
        peer = self._peers.get(node)
        if peer is None or peer.down or self._underlay is None or self._rival(peer):
            return None
        return peer.address(self._underlay.local[0].version)

    def keys_of(self, network: str, address: AnyAddress | None = None) -> frozenset[Key]:
        """What leads to one holder; without an address, what the network needs on this host whoever is on it."""
        return self._desired.keys_of(_owner(network, "" if address is None else str(address)))

    def all_keys(self, network: str) -> set[Key]:
        """All that an active network needs on this host, and what leads to its holders."""
        owners = ["", _BRIDGE, *map(str, self.holders(network)), *(f"@{node}" for node in self._by_node)]
        return {key for owner in owners for key in self._desired.keys_of(_owner(network, owner))}

    def may_drop(self, entry: Entry) -> bool | None:
        """Whether an entry that nobody wants may go; None: it is no overlay's."""
        network = self._by_link.get(entry.name if isinstance(entry, Device) else entry.device)
        if network is None or isinstance(entry, Device):
            return None
        if is_bridges_own(entry):
            return False
        return network in self._known or network not in self._active

    def may_go(self, device: str) -> bool:
        """Whether a tunnel's end that nobody wants may go at once: it was an overlay's, and its bridge is gone; or the
        overlay has another VNI by now, and with two of them a bridge that floods would be a loop between hosts."""
        port = self._found.get((PORT, device, b""))
        return device in self._by_link or (isinstance(port, Port) and port.bridge in self._by_link)

    def problems(self, only: str = "") -> list[str]:
        """Holders that nothing can lead to, one sentence for each network, or for one, and host."""
        found = []
        for node, networks in sorted(self._by_node.items()):
            why = self.unreachable(node)
            for network, addresses in sorted(networks.items()) if why else ():
                if network in self._active and addresses and network == (only or network):
                    some = ", ".join(str(one) for one in sorted(addresses, key=int)[:3])
                    found.append(f"network {network}: {len(addresses)} addresses, such as {some}, are on {node}, {why}")
        for network, false in sorted(self._false.items()):
            if network == (only or network):
                found += (self._say_false(network, one) for one in sorted(false, key=int)[:_SHOWN])
        return found

    def take_false_news(self) -> list[str]:
        """Who has what is the gateway's, and had it not at the last call; one sentence for each."""
        news, self._false_news = self._false_news, []
        return news

    def unreachable(self, node: str) -> str:
        """Why no tunnel can lead to a host, and the remedy; "" where one can, or could if the host were not down."""
        peer = self._peers.get(node)
        if node == self._own or self._underlay is None or (peer is not None and peer.down):
            return ""
        if peer is None:
            return "of which no underlay address is known: start netd there"
        if rival := self._rival(peer):
            remedy = "give one of them another, or remove the one that is gone (netloom node remove)"
            return f"which claims the underlay address of {rival}: {remedy}"
        version = self._underlay.local[0].version
        if peer.address(version) is not None:
            return ""
        return (
            f"which has no IPv{version} underlay address, as tunnels have here: give it one, or set public_ip to an"
            " address of the other family on all hosts"
        )

    def take_news(self) -> list[Neighbour]:
        """Who is new, or has another MAC, since the last call: containers here keep what they learned of an address,
        also after it was given back, and one that asked in vain asks again only after a second. Not who is on this
        host: such a container tells of itself."""
        news, self._news = self._news, []
        return news

    def disputes(self, keys: Set[Key] | None = None) -> list[str]:
        """Holders of one MAC on several hosts, as far as these keys say so, or all."""
        found = []
        for key, owners in self._desired.disputes():
            if key[0] == FORWARD and is_owner(owners[0]) and (keys is None or key in keys):
                network = owners[0].removeprefix(_OWNER).partition("/")[0]
                addresses = [ip_address(one.rpartition("/")[2]) for one in owners]
                holders = [one for address in addresses if (one := self.holders(network).get(address)) is not None]
                where = " and ".join(f"{one.address} on {one.node}" for one in holders)
                found.append(
                    f"network {network}: {where} have one MAC, {key[2].decode()}, so only the first of them can be"
                    " reached: attach the others with another MAC"
                )
        return found

    # What happens

    def define(self, overlays: Iterable[Overlay]) -> set[Key]:
        """These are all there are."""
        defined = {one.name: one for one in overlays}
        gone = self._defined.keys() - defined.keys()
        changed = {name for name, one in defined.items() if self._defined.get(name) != one} | gone
        self._defined = defined
        self._by_link = {one.bridge: one.name for one in defined.values()}
        self._by_link |= {device_name(one.vni): one.name for one in defined.values()}
        self._found.bridges = {one.bridge: one.gateway_interfaces for one in defined.values()}
        return self._refresh(changed)

    def place(self, underlay: Underlay | None, own: Node, peers: Mapping[str, Node], *, anew: bool = False) -> set[Key]:
        """Where this host is, who it is, and the other hosts (a mapping that is kept, and may change later). `anew`: it
        may have changed without `peer_changed`."""
        self._peers = peers
        if (underlay, own.name, own.mac) == (self._underlay, self._own, self._mac) and not anew:
            return self._refresh(())
        self._underlay, self._own, self._mac = underlay, own.name, own.mac
        return self._refresh(self._defined)

    def bridges_changed(self) -> set[Key]:
        """A bridge came or went, as `found` has it."""
        return self._refresh(())

    def replace(self, network: str, holders: Sequence[Holder]) -> set[Key]:
        """All holders of a network."""
        if network not in self._active:
            return set()
        new = {one.address: one for one in holders}
        first = network not in self._known
        keys = self.put(network, {**dict.fromkeys(self._holders.get(network, {}).keys() - new.keys()), **new})
        self._known.add(network)
        if first:
            # What is there and nobody wants may go now, and the tunnel's end comes up.
            keys |= self._want(network)
            keys |= {key for key, one in self._found.entries.items() if self._is_on(one, network)}
        return keys

    def put(self, network: str, changes: Mapping[AnyAddress, Holder | None]) -> set[Key]:
        """Addresses have other holders, or none any more."""
        if network not in self._active:
            return set()
        known = self._holders.setdefault(network, {})
        keys: set[Key] = set()
        nodes: set[str] = set()
        for address, holder in changes.items():
            before = known.get(address)
            if before == holder:
                continue
            if before is not None:
                self._by_node[before.node][network].discard(address)
                nodes.add(before.node)
            if holder is None:
                del known[address]
                self._false.get(network, set()).discard(address)
                keys |= self._drop(_owner(network, str(address)))
                continue
            known[address] = holder
            self._note_mac(network, holder, is_new=before is None and network in self._known)
            self._by_node.setdefault(holder.node, {}).setdefault(network, set()).add(address)
            nodes.add(holder.node)
            keys |= self._want_holder(network, holder)
        if self._own in nodes:
            keys |= self._want_bridge(network)
        if (one := self._defined.get(network)) is not None and one.flood:
            for node in nodes:
                keys |= self._want_flood(network, node)
        return keys

    def peer_changed(self, name: str) -> set[Key]:
        """A host has another address, is down, or is no more."""
        keys: set[Key] = set()
        for network, addresses in self._by_node.get(name, {}).items():
            if network in self._active:
                for address in addresses:
                    keys |= self._want_holder(network, self._holders[network][address])
                keys |= self._want_flood(network, name)
        return keys

    # Inside

    def _refresh(self, networks: Iterable[str]) -> set[Key]:
        """After other bridges; and where the definition, or this host, is another, for these networks."""
        there = {name for name, one in self._defined.items() if one.bridge in self._found.indexes}
        active = there if self._underlay is not None else self._active.keys() & self._defined.keys()
        todo = {*networks} | (active ^ self._active.keys())
        keys: set[Key] = set()
        for name in self._active.keys() - active:
            keys |= self._forget(name)
            del self._active[name]
        for name in active - self._active.keys():
            self._activations += 1
            self._active[name] = self._activations
        for name in todo & active:
            keys |= self._want(name) | self._want_bridge(name)
            for holder in list(self._holders.get(name, {}).values()):
                keys |= self._want_holder(name, holder)
            for node in [node for node, networks in self._by_node.items() if networks.get(name)]:
                keys |= self._want_flood(name, node)
        return keys

    def _forget(self, network: str) -> set[Key]:
        keys = self._drop(_owner(network, "")) | self._drop(_owner(network, _BRIDGE))
        self._macs.pop(network, None)
        self._false.pop(network, None)
        for address in self._holders.pop(network, {}):
            keys |= self._drop(_owner(network, str(address)))
        for node, networks in self._by_node.items():
            if networks.pop(network, None):
                keys |= self._drop(_owner(network, f"@{node}"))
        self._by_node = {node: networks for node, networks in self._by_node.items() if networks}
        self._known.discard(network)
        return keys

    def _note_mac(self, network: str, holder: Holder, *, is_new: bool) -> None:
        known, bridge = self._macs.setdefault(network, {}), self._defined[network].bridge
        there = self._found.get((NEIGHBOUR, bridge, holder.address.packed))  # after a start of this daemon
        before = known.get(holder.address) or (there.mac if isinstance(there, Neighbour) else holder.mac)
        known[holder.address] = holder.mac
        if (is_new or before != holder.mac) and holder.node != self._own:
            self._news.append(Neighbour(bridge, holder.address, holder.mac))
        held = self._holders[network]
        if len(known) > 2 * len(held) + _FORGOTTEN_LATE:
            self._macs[network] = {address: one.mac for address, one in held.items()}

    def _want(self, network: str) -> set[Key]:
        """What the network needs whoever is on it."""
        one = self._defined[network]
        if self._underlay is None:
            return set()
        name = device_name(one.vni)
        there, port = self._found.get((DEVICE, name, b"")), self._found.get((PORT, name, b""))
        # One of an earlier bridge of that name waits until all holders are known, as a new one does.
        works = isinstance(there, Device) and there.up and isinstance(port, Port) and port.bridge == one.bridge
        device = Device(
            name=name,
            vni=one.vni,
            local=self._underlay.local[0],
            port=one.port,
            link=outer_link(self._underlay),
            mac=self._mac,
            mtu=largest(self._underlay),
            tx_checksum=one.tx_checksum,
            udp_checksum=one.udp_checksum,
            up=network in self._known or works,
        )
        return self._desired.replace(_owner(network, ""), [device, Port(name, one.bridge, one.flood)])

    def _want_bridge(self, network: str) -> set[Key]:
        """Up, with its MAC, and with the gateways that containers here were given."""
        one = self._defined[network]
        own = self._by_node.get(self._own, {}).get(network, ())
        versions = {address.version for address in own}
        gateways = [Address(one.bridge, each, True) for each in one.gateway_interfaces if each.version in versions]
        entries: list[Entry] = [Bridge(one.bridge, macs.of_addresses(one.gateways)), *gateways]
        return self._desired.replace(_owner(network, _BRIDGE), entries)

    def _want_holder(self, network: str, holder: Holder) -> set[Key]:
        false = self._false.setdefault(network, set())
        gateways = self._defined[network].gateways
        # ipamd gives nobody these; what else stands in etcd must not take the gateway away from every host.
        is_false = holder.address in gateways or holder.mac in map(macs.of_address, gateways)
        if not is_false or holder.node == self._own:
            false.discard(holder.address)
        elif holder.address not in false:
            false.add(holder.address)
            self._false_news.append(self._say_false(network, holder.address))
        return self._desired.replace(_owner(network, str(holder.address)), self._towards(network, holder))

    def _towards(self, network: str, holder: Holder) -> Iterator[Entry]:
        outer = self.outer(holder.node)
        if holder.node == self._own or outer is None:
            return
        if holder.address in self._false[network]:
            return
        one = self._defined[network]
        name = device_name(one.vni)
        yield Neighbour(one.bridge, holder.address, holder.mac)
        yield Forward(name, holder.mac, outer)
        yield Bridged(name, holder.mac)

    def _say_false(self, network: str, address: AnyAddress) -> str:
        holder = self._holders[network][address]
        if address in self._defined[network].gateways:
            what, key = "is the gateway's own address", "addresses"
        else:
            what, key = f"has the gateway's MAC, {holder.mac}", "macs"
        return (
            f"network {network}: {address} on {holder.node} {what}, so nothing leads there: end its container there, or"
            f" delete {key}/{network}#{address} in etcd where there is none"
        )

    def _want_flood(self, network: str, node: str) -> set[Key]:
        one, outer = self._defined[network], self.outer(node)
        on_it = bool(self._by_node.get(node, {}).get(network))
        wanted = one.flood and on_it and node != self._own and outer is not None
        owner = _owner(network, f"@{node}")
        if not wanted or outer is None:
            return self._drop(owner)
        return self._desired.replace(owner, [Forward(device_name(one.vni), NOBODY_KNOWN, outer)])

    def _drop(self, owner: str) -> set[Key]:
        return self._desired.remove(owner) if owner in self._desired.owners() else set()

    def _is_on(self, entry: Entry, network: str) -> bool:
        return not isinstance(entry, Device) and self._by_link.get(entry.device) == network


def _owner(network: str, what: str) -> str:
    return f"{_OWNER}{network}/{what}"
