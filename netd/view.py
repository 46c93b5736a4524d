"""What the cluster says of its hosts and networks, as values. Pure: no I/O.

    netd/<node>         NetdRecord: by what a host is reached; permanent
    netd-alive/<node>   who it is, under a lease: its netd runs and reaches etcd
    underlay/<address>  whose underlay address it is, under the same lease
    blocks/…            which blocks of addresses a host's ipamd has (cluster/layout.py)
    networks/<name>     NetworkRecord (cluster/layout.py)

A record that this version cannot read is as if it were not there, and is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from ipaddress import ip_address, ip_network

import msgspec
from msgspec import Struct

from cluster import layout
from cluster.etcd import Event, Pair
from cluster.layout import BlockRecord, LayoutError, NetworkRecord
from kernel import link
from netd.fabric.registry import BACKENDS, TUNNELS
from netd.values import AnyNetwork, Network, Node, Overlay

NETD = "netd/"
NETD_ALIVE = "netd-alive/"
UNDERLAY = "underlay/"
PREFIXES = (NETD, NETD_ALIVE, layout.BLOCKS, layout.NETWORKS)

OVERLAY = "overlay"  # NetworkRecord.type
_LINK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,14}", re.ASCII)
_VERSION = re.compile(r"[\w.+-]{0,40}")


class NetdRecord(Struct, frozen=True, omit_defaults=True):
    """By what a host is reached. `id` is made by its netd at the first start and kept on its disk."""

    id: str
    addresses: tuple[str, ...]
    mac: str
    subnets: tuple[str, ...] = ()  # beside its blocks
    takes_vxlan: bool = True
    version: str = ""


class State(Struct, frozen=True):
    """All of it, for the disk: a host that starts while etcd is away knows its peers."""

    records: dict[str, NetdRecord] = {}
    blocks: dict[str, str] = {}  # key's end → node
    networks: dict[str, NetworkRecord] = {}
    kept: tuple[str, ...] = ()
    revision: int = 0  # etcd's


class View:
    """What etcd last said. Each method that takes something returns the nodes that it concerns; see `networks` after a
    change of those."""

    def __init__(self, state: State | None = None) -> None:
        kept = state or State()
        self.records: dict[str, NetdRecord] = dict(kept.records)
        self.alive: set[str] = set()
        self.broken: dict[str, str] = {}  # key → why it cannot be used
        self.kept: set[str] = set()  # keys that etcd lost; what they said counts until `settle`
        self._blocks: dict[str, str] = dict(kept.blocks)
        self._networks: dict[str, NetworkRecord] = dict(kept.networks)
        self._blocks_of: dict[str, set[AnyNetwork]] = {}
        for place, node in self._blocks.items():
            self._blocks_of.setdefault(node, set()).add(_cidr(place))
        self.kept = {key for prefix in PREFIXES for key in self._keys(prefix)} & {*kept.kept}

    def state(self, revision: int = 0) -> State:
        """For the disk."""
        return State(dict(self.records), dict(self._blocks), dict(self._networks), tuple(sorted(self.kept)), revision)

    def listed(self, prefix: str, pairs: Sequence[Pair], *, lost: bool = False) -> set[str]:
        """All that is there under a prefix; what is known beyond that is gone, or, where etcd `lost` its data, kept.
        But not who lives: that counts only under a lease."""
        there = {pair.key for pair in pairs}
        concerned: set[str] = set()
        missing = [key for key in self._keys(prefix) if key not in there]
        if lost and prefix != NETD_ALIVE:
            self.kept.update(key for key in missing if key not in self.broken)
        for key in missing:
            if key not in self.kept:
                concerned |= self._drop(key)
        for pair in pairs:
            concerned |= self._put(pair)
        return concerned

    def changed(self, events: Iterable[Event]) -> set[str]:
        """What happened since."""
        concerned: set[str] = set()
        for event in events:
            concerned |= self._put(event.pair) if event.kind == "put" else self._drop(event.pair.key)
        return concerned

    def settle(self, gone: Set[str], told: Set[str]) -> set[str]:
        """Drops what is kept of hosts that are `gone`, and what would be back by now where ipamd has `told` all that is
        in use there; a network may be in use anywhere. Returns the nodes that it concerns."""
        concerned: set[str] = set()
        rest = self.records.keys() - gone
        for key in sorted(self.kept):
            prefix, end = _split(key)
            if prefix == NETD:
                over = end in gone
            elif prefix == layout.BLOCKS:
                over = self._blocks[end] in gone or self._blocks[end] in told
            else:
                over = rest <= told
            if over:
                concerned |= self._drop(key)
        return concerned

    def subnets(self, name: str) -> tuple[AnyNetwork, ...]:
        """The blocks of a node, in order."""
        return tuple(sorted(self._blocks_of.get(name, ()), key=lambda one: (one.version, int(one.network_address))))

    def node(self, name: str) -> Node | None:
        """A host as the reconciler wants it; None where it said nothing that can be used."""
        record = self.records.get(name)
        if record is None:
            return None
        addresses = tuple(ip_address(text) for text in record.addresses)
        own = tuple(ip_network(text) for text in record.subnets)
        return Node(name, addresses, tuple(dict.fromkeys((*own, *self.subnets(name)))), record.mac, record.takes_vxlan)

    def networks(self, default: Network, taken: Sequence[Network]) -> list[Network]:
        """The defined networks; see `usable`."""
        return usable(self._networks, default, taken)

    def overlays(self, routed: Sequence[Network]) -> list[Overlay]:
        """The defined layer-2 networks; what the configuration leaves open is as in the last of `routed`. One with the
        VNI of a routed network's tunnels is left out, and told as broken: a device cannot be both."""
        default = routed[-1]
        taken = {one.vni: one.name for one in routed if one.backend in TUNNELS}
        for name, one in self._networks.items():
            key = layout.NETWORKS + name
            if one.type == OVERLAY and one.vni in taken:
                self.broken[key] = (
                    f"its VNI {one.vni} is that of the tunnels of network {taken[one.vni]} here; make it anew with"
                    " another --vni, or set another vni under [netd] on all hosts"
                )
            elif one.type == OVERLAY:
                self.broken.pop(key, None)
        return [
            Overlay(
                name=name,
                subnets=tuple(ip_network(text) for text in one.subnets),
                vni=one.vni,
                bridge=one.bridge,
                port=default.port,
                mtu=one.mtu or default.mtu,
                flood=one.flood,
                tx_checksum=default.tx_checksum,
                udp_checksum=default.udp_checksum,
                internal=one.internal,
            )
            for name, one in sorted(self._networks.items())
            if one.type == OVERLAY and one.vni not in taken
        ]

    def definitions(self) -> dict[str, NetworkRecord]:
        """Of the networks, as they stand in etcd."""
        return dict(self._networks)

    def _keys(self, prefix: str) -> list[str]:
        known = {
            NETD: self.records,
            NETD_ALIVE: self.alive,
            layout.BLOCKS: self._blocks,
            layout.NETWORKS: self._networks,
        }[prefix]
        return [prefix + end for end in known] + [key for key in self.broken if key.startswith(prefix)]

    def _put(self, pair: Pair) -> set[str]:
        self.broken.pop(pair.key, None)
        self.kept.discard(pair.key)
        try:
            return self._take(pair)
        except (LayoutError, ValueError) as error:
            concerned = self._drop(pair.key)
            self.broken[pair.key] = str(error)
            return concerned

    def _take(self, pair: Pair) -> set[str]:
        prefix, end = _split(pair.key)
        if prefix == NETD_ALIVE:
            self.alive.add(end)
        elif prefix == NETD:
            record = layout.decode(NetdRecord, pair.key, pair.value)
            _check(record)
            self.records[end] = record
        elif prefix == layout.BLOCKS:
            node = layout.decode(BlockRecord, pair.key, pair.value).node
            cidr = _cidr(end)
            concerned = self._forget_block(end)
            self._blocks[end] = node
            self._blocks_of.setdefault(node, set()).add(cidr)
            return {*concerned, node}
        elif prefix == layout.NETWORKS:
            network = layout.decode(NetworkRecord, pair.key, pair.value)
            for text in network.subnets:
                ip_network(text)
            if network.backend and network.backend not in BACKENDS:
                raise ValueError(f"the backend {network.backend!r} of network {end} is not known here")
            if network.type == OVERLAY and not (0 < network.vni < 1 << 24 and _LINK.fullmatch(network.bridge)):
                raise ValueError(f"the overlay {end} has the VNI {network.vni} and the bridge {network.bridge[:40]!r}")
            self._networks[end] = network
            return set()
        return {end}

    def _drop(self, key: str) -> set[str]:
        self.broken.pop(key, None)
        self.kept.discard(key)
        prefix, end = _split(key)
        if prefix == NETD_ALIVE:
            self.alive.discard(end)
        elif prefix == NETD:
            self.records.pop(end, None)
        elif prefix == layout.BLOCKS:
            return self._forget_block(end)
        else:
            self._networks.pop(end, None)
            return set()
        return {end}

    def _forget_block(self, place: str) -> set[str]:
        node = self._blocks.pop(place, None)
        if node is None:
            return set()
        cidr = _cidr(place)
        # Another pool may have the same block, of the same node.
        if not any(owner == node and _cidr(other) == cidr for other, owner in self._blocks.items()):
            self._blocks_of[node].discard(cidr)
            if not self._blocks_of[node]:
                del self._blocks_of[node]
        return {node}


def usable(records: Mapping[str, NetworkRecord], default: Network, taken: Sequence[Network]) -> list[Network]:
    """The defined networks that do not contradict the configuration's own ones."""
    found = []
    for name, record in sorted(records.items()):
        if record.type == OVERLAY:  # nothing of it is routed
            continue
        subnets = tuple(ip_network(text) for text in record.subnets)
        clash = any(one.name == name or any(a.overlaps(b) for a in subnets for b in one.subnets) for one in taken)
        if subnets and not clash:
            found.append(
                Network(
                    name=name,
                    subnets=subnets,
                    backend=record.backend or default.backend,
                    vni=default.vni,
                    port=default.port,
                    mtu=record.mtu or default.mtu,
                    tx_checksum=default.tx_checksum,
                    udp_checksum=default.udp_checksum,
                )
            )
    return found


def read_state(data: bytes) -> State:
    """Raises ValueError where it is none that this version wrote."""
    try:
        return msgspec.json.decode(data, type=State)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None


def _check(record: NetdRecord) -> None:
    """Raises ValueError. Whoever may write to etcd must not make this host crash, or write to its terminal."""
    for address in record.addresses:
        ip_address(address)
    for subnet in record.subnets:
        ip_network(subnet)
    link.packed_mac(record.mac)
    if not record.addresses:
        raise ValueError("a host without an underlay address")
    if not _VERSION.fullmatch(record.version):
        raise ValueError("a version that is none")


def _split(key: str) -> tuple[str, str]:
    prefix, slash, end = key.partition("/")
    return prefix + slash, end


def _cidr(place: str) -> AnyNetwork:
    return ip_network(layout.split(place)[1])
