"""Overlay networks: what can be asked for, and what is chosen where nothing is said. Pure, but for `host_networks`.

The gateway of a subnet is its first usable address, on every host that has a container of the network.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable

import msgspec
from msgspec import Struct

from cluster.layout import NetworkRecord
from ipamd import blocks
from ipamd.errors import ExhaustedError, InvalidArgumentError
from ipamd.pool import Network, PoolSpec, RangeSpec
from ipamd.store.base import Allocation
from kernel import addr, macs, route
from kernel.session import Session

OVERLAY = "overlay"
MOST_VNI = (1 << 24) - 1
_FIRST_VNI = 256  # below are what people choose by hand, and netd's own tunnels, which have 1
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NO_MAC = "00:00:00:00:00:00"
_DEVICE = re.compile(r"nl-vx([1-9][0-9]{0,7})")
_DEFAULT_ROUTE = 1  # 0.0.0.0/0; what stands in for it are 0.0.0.0/1 and 128.0.0.0/1


class Parts(Struct, frozen=True):
    """From where subnets are chosen: the parts of `whole` that have prefixes of `length` bits."""

    whole: Network
    length: int

    def __str__(self) -> str:
        return f"{self.whole},{self.length}"


DEFAULT_PARTS = Parts(ipaddress.ip_network("10.0.0.0/8"), 24)


def longest_prefix(version: int) -> int:
    """Of a subnet with two usable addresses, a gateway and a container's."""
    return 31 if version == 4 else 127


def parts_of(text: str) -> Parts:
    """Of "10.0.0.0/8,24"; raises ValueError that says what is wrong and what to do."""
    cidr, comma, length_text = (piece.strip() for piece in text.partition(","))
    try:
        whole = ipaddress.ip_network(cidr)
    except ValueError as error:
        raise ValueError(f'wanted a CIDR and the length of its parts, such as "10.0.0.0/8,24" ({error})') from None
    most = longest_prefix(whole.version)
    if not comma or not re.fullmatch(r"[0-9]{1,3}", length_text):
        raise ValueError(f'the length of its parts is missing: write "{whole},{min(max(24, whole.prefixlen), most)}"')
    if "/" not in cidr or not whole.prefixlen <= int(length_text) <= most:
        raise ValueError(f"parts of {whole} have a prefix length of {whole.prefixlen} to {most}, found {length_text}")
    return Parts(whole, int(length_text))


def device_name(vni: int) -> str:
    """Of the VXLAN device on each host."""
    return f"nl-vx{vni}"


def check(record: NetworkRecord, networks: Iterable[Network]) -> None:
    """Raises InvalidArgumentError for what an overlay network cannot be, or only one can be."""
    if record.type != OVERLAY:
        for name in ("vni", "internal", "flood"):
            if getattr(record, name):
                raise InvalidArgumentError(
                    f"{name}: found {getattr(record, name)} with type routed; only a network of type overlay has it"
                )
        return
    if record.backend:
        raise InvalidArgumentError(
            f"backend: found {record.backend[:80]!r} with type overlay, which has VXLAN devices of its own; leave it "
            "out"
        )
    if not 0 <= record.vni <= MOST_VNI:
        raise InvalidArgumentError(f"vni: wanted 1 to {MOST_VNI}, or 0 for one that is free, found {record.vni}")
    if record.internal and record.open:
        raise InvalidArgumentError(
            "open: found with internal; a network without a way out cannot answer everybody; leave one of the two out"
        )
    for index, network in enumerate(networks):
        if network.prefixlen > longest_prefix(network.version):
            raise InvalidArgumentError(
                f"subnets[{index}]: {network} has one address, and the gateway takes it; wanted a prefix length of at "
                f"most {longest_prefix(network.version)}"
            )


def gateways(record: NetworkRecord) -> list[str]:
    """With the subnet's length: "10.0.0.1/24"."""
    found = []
    for network in map(ipaddress.ip_network, record.subnets if record.type == OVERLAY else ()):
        first, _ = blocks.usable(network.version, int(network.network_address), int(network.broadcast_address))
        found.append(blocks.cidr_text(network.version, first, network.prefixlen))
    return found


def gateway_macs(record: NetworkRecord) -> list[str]:
    """Of its bridge, which has one of them."""
    return [macs.of_address(ipaddress.ip_interface(gateway).ip) for gateway in gateways(record)]


def default_mac(held: Allocation) -> str:
    """Of the interface that has the allocation's addresses, where nobody gave it another."""
    return macs.of_addresses(ipaddress.ip_address(address.ip) for address in held.addresses)


def parse_mac(text: str) -> str:
    """In the form "02:42:0a:00:00:02"; raises InvalidArgumentError."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == _NO_MAC:
        raise InvalidArgumentError(
            f"mac: wanted one of a single interface, such as 02:42:0a:00:00:02, found {text[:80]!r}"
        )
    return mac


def check_spec(spec: PoolSpec) -> None:
    """Raises InvalidArgumentError where the pool cannot be an overlay network's."""
    if spec.mode != "cluster-address":
        raise InvalidArgumentError(
            f"mode: found {spec.mode} with type overlay, where any host may have any address; leave it out, or take "
            "cluster-address"
        )


def spec_of(record: NetworkRecord, spec: PoolSpec) -> PoolSpec:
    """The pool's, for the network's subnets."""
    return msgspec.structs.replace(spec, range_sets=tuple((RangeSpec(subnet),) for subnet in record.subnets))


def complete(
    record: NetworkRecord, others: Iterable[NetworkRecord], parts: Parts, taken: Iterable[Network]
) -> NetworkRecord:
    """With a VNI and a subnet that nobody has. `taken`: beside the other networks' own. Raises ExhaustedError."""
    others = list(others)
    vni = record.vni or _choose_vni(_taken_vnis(others))
    if record.subnets:
        return msgspec.structs.replace(record, vni=vni)
    subnets = [ipaddress.ip_network(subnet) for other in others for subnet in other.subnets]
    subnet = choose_subnet(parts, [*subnets, *taken])
    return msgspec.structs.replace(record, vni=vni, subnets=(str(subnet),))


def choose_subnet(parts: Parts, taken: Iterable[Network]) -> Network:
    """The first part that overlaps nothing that is taken. Raises ExhaustedError."""
    whole = parts.whole
    step = 1 << (whole.max_prefixlen - parts.length)
    first = int(whole.network_address)
    ordered = sorted(
        (int(one.network_address), int(one.broadcast_address)) for one in taken if one.version == whole.version
    )
    for low, high in ordered:
        if low >= first + step:
            break
        if high >= first:
            first = (high // step + 1) * step
    if first > int(whole.broadcast_address):
        raise ExhaustedError(
            f"subnets: each part of {whole} with length {parts.length} overlaps a network, a pool, or an address or "
            "route of a host; name a subnet (--subnet), or set another overlay_subnets under [ipamd]"
        )
    return type(whole)((first, parts.length))


def _taken_vnis(others: Iterable[NetworkRecord]) -> set[int]:
    found = set()
    for other in others:
        found.add(other.vni)
        bridge = _DEVICE.fullmatch(other.bridge)
        if bridge:  # the device would have the bridge's name
            found.add(int(bridge[1]))
    return found


def _choose_vni(taken: Collection[int]) -> int:
    vni = _FIRST_VNI
    while vni in taken:
        vni += 1
    if vni > MOST_VNI:
        raise ExhaustedError(f"vni: all from {_FIRST_VNI} to {MOST_VNI} are taken; name a lower one (--vni)")
    return vni


def host_networks() -> list[Network]:
    """Where this host has an address or a route to, other than the default one. Raises KernelError."""
    with Session() as session:
        found: list[Network] = [one.interface.network for one in addr.all_addresses(session)]
        for family in (4, 6):
            found += (one.dst for one in route.all_routes(session, family) if one.dst.prefixlen > _DEFAULT_ROUTE)
    return found
