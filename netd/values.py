"""What netd knows of hosts and networks, and what it wants of the kernel: frozen values, no I/O.

An entry of the kernel's is found again by its `key`: there is at most one with it. Links are named, as a device that is
wanted may have no index yet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_interface

AnyAddress = IPv4Address | IPv6Address
AnyInterface = IPv4Interface | IPv6Interface
AnyNetwork = IPv4Network | IPv6Network
Key = tuple[int, str, bytes]

DEVICE, ADDRESS, NEIGHBOUR, FORWARD, ROUTE, PORT, BRIDGED, BRIDGE = range(8)
NOBODY_KNOWN = "00:00:00:00:00:00"  # where frames go to MACs that have no entry


@dataclass(frozen=True, slots=True)
class Underlay:
    """The link by which this host reaches others.

    Attributes:
        addresses: those of the link, with the length of their networks.
        public: by which the others reach this host, at most one of each family; the first is where tunnels begin.
        local: the link's own address of each family in `public`; another one where somebody translates on the way.
    """

    link: str
    index: int
    mtu: int
    addresses: tuple[AnyInterface, ...]
    public: tuple[AnyAddress, ...]
    local: tuple[AnyAddress, ...]

    def on_link(self, address: AnyAddress) -> bool:
        """Whether the address is a neighbour of the link."""
        return any(address in one.network for one in self.addresses)


@dataclass(frozen=True, slots=True)
class Network:
    """A network of containers over several hosts. `mtu` 0: worked out from the underlay. `open`: everybody may reach
    it; said of the configuration's own only, what others are stands in their records."""

    name: str
    subnets: tuple[AnyNetwork, ...]
    backend: str
    vni: int
    port: int
    mtu: int
    tx_checksum: bool
    udp_checksum: bool
    open: bool = False

    def holds(self, subnet: AnyNetwork) -> bool:
        """Whether the subnet lies in this network."""
        return any(
            one.version == subnet.version and subnet.subnet_of(one)  # type: ignore[arg-type]  # of one family
            for one in self.subnets
        )


@dataclass(frozen=True, slots=True)
class Overlay:
    """One layer-2 network over several hosts, with a bridge of this name on each that has a container on it.

    `mtu` 0: worked out from the underlay. `flood`: what is for nobody known goes to every host that is on it.
    `internal`: it has no way out; nothing of netd's follows from that.
    """

    name: str
    subnets: tuple[AnyNetwork, ...]
    vni: int
    bridge: str
    port: int
    mtu: int
    flood: bool
    tx_checksum: bool
    udp_checksum: bool
    internal: bool = False

    def subnet_of(self, address: AnyAddress) -> AnyNetwork | None:
        """Its subnet with this address."""
        return next((one for one in self.subnets if address in one), None)

    @property
    def gateways(self) -> tuple[AnyAddress, ...]:
        """The first usable address of each subnet, which each host that is on it has."""
        return tuple(one[0] if one.num_addresses <= 2 else one[1] for one in self.subnets)

    @property
    def gateway_interfaces(self) -> tuple[AnyInterface, ...]:
        """The same as its bridges have them, each with the length of its subnet."""
        pairs = zip(self.gateways, self.subnets, strict=True)
        return tuple(ip_interface((gateway, subnet.prefixlen)) for gateway, subnet in pairs)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has an address of an overlay: the MAC, and the host's name."""

    address: AnyAddress
    mac: str
    node: str


@dataclass(frozen=True, slots=True)
class Node:
    """A host: its underlay addresses, its containers' subnets, its tunnel ends' MAC, and whether it has tunnel ends.

    `down`: it is silent and does not answer, so nothing is to lead there.
    """

    name: str
    addresses: tuple[AnyAddress, ...]
    subnets: tuple[AnyNetwork, ...]
    mac: str
    takes_vxlan: bool = True
    down: bool = False

    def address(self, version: int) -> AnyAddress | None:
        """Its underlay address of this family."""
        return next((one for one in self.addresses if one.version == version), None)


@dataclass(frozen=True, slots=True)
class Device:
    """A tunnel's end. `link`: the underlay's index, 0 for any; `up` and `learns` (from packets, where a MAC is) are how
    it was found."""

    name: str
    vni: int
    local: AnyAddress
    port: int
    link: int
    mac: str
    mtu: int
    tx_checksum: bool
    udp_checksum: bool
    up: bool = True
    learns: bool = False

    @property
    def key(self) -> Key:
        return DEVICE, self.name, b""


@dataclass(frozen=True, slots=True)
class Address:
    """The address that this host itself speaks from through a tunnel; a gateway's of an overlay is on its bridge, and
    the way to all of its network (`prefix_route`)."""

    device: str
    interface: AnyInterface
    prefix_route: bool = False

    @property
    def key(self) -> Key:
        return ADDRESS, self.device, self.interface.ip.packed


@dataclass(frozen=True, slots=True)
class Neighbour:
    device: str
    address: AnyAddress
    mac: str

    @property
    def key(self) -> Key:
        return NEIGHBOUR, self.device, self.address.packed


@dataclass(frozen=True, slots=True)
class Forward:
    device: str
    mac: str
    dst: AnyAddress

    @property
    def key(self) -> Key:
        # Those for unknown MACs are as many as there are hosts.
        return FORWARD, self.device, self.mac.encode() + (self.dst.packed if self.mac == NOBODY_KNOWN else b"")


@dataclass(frozen=True, slots=True)
class Port:
    """A tunnel's end as a port of an overlay's bridge, which answers for neighbours. `plain` is how it was found:
    without anything else than ours have."""

    device: str
    bridge: str
    flood: bool
    plain: bool = True

    @property
    def key(self) -> Key:
        return PORT, self.device, b""


@dataclass(frozen=True, slots=True)
class Bridged:
    """Frames to a MAC leave the overlay's bridge by the tunnel's end."""

    device: str
    mac: str

    @property
    def key(self) -> Key:
        return BRIDGED, self.device, self.mac.encode()


@dataclass(frozen=True, slots=True)
class Route:
    """`plain` is how it was found: without an MTU, a source or whatever else ours have not."""

    device: str
    dst: AnyNetwork
    gateway: AnyAddress | None
    onlink: bool
    plain: bool = True

    @property
    def key(self) -> Key:
        return route_key(self.dst)


@dataclass(frozen=True, slots=True)
class Bridge:
    """An overlay's bridge, which a plugin made. `mac`: that of its gateways, which containers know."""

    device: str
    mac: str
    up: bool = True

    @property
    def key(self) -> Key:
        return BRIDGE, self.device, b""


Entry = Device | Address | Neighbour | Forward | Route | Port | Bridged | Bridge


def route_key(dst: AnyNetwork) -> Key:
    """Of the route to a network, whatever link it leads to."""
    return ROUTE, "", dst.network_address.packed + bytes([dst.prefixlen])


def vtep_mac(node: str) -> str:
    """The MAC of a node's tunnel ends: the same on every host that works it out and after each reboot, so that nobody's
    entries go stale. Locally administered, one of 2^46."""
    digest = bytearray(hashlib.sha256(f"netloom vtep {node}".encode()).digest()[:6])
    digest[0] = digest[0] & 0xFC | 0x02
    return digest.hex(":")
