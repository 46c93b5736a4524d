"""`netloom import flannel`: the network that flannel's configuration in etcd describes, made one of Netloom's.

- etcd is only read: `<prefix>/config` once, and `<prefix>/subnets/` for who else has to move.
- The network is made through ipamd, in blocks as large as flannel's subnets; the same again is no error.
- The subnet that flannel gave this host is claimed for this node, by the address that netd holds of it: so what is
  attached here, and a docker0 of that subnet, stay as they are. Of an IPv6 subnet only the beginning can be a block;
  the whole is this host's where the configuration says so, which is told.
"""

import asyncio
import dataclasses
import json
import os
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network, summarize_address_range
from typing import Any, TypedDict, TypeVar

import click
import msgspec

from cli import output
from cli.failure import Failure, Status
from cli.options import Choices, command, pass_choices
from cluster.config import EtcdConfig
from cluster.errors import EtcdError
from cluster.etcd import Etcd, Pair
from cluster.settings import ETCD_KEYS, etcd_config
from cni.errors import CniError
from cni.interface.flannel import SUBNET_FILE, read_subnet
from ipamd.client import Client
from kernel import paths, settings
from kernel.settings import ConfigError, Schema, Settings
from netd.flannel import subnet_key
from protos.ipam.v1 import ipam_pb2

_Subnet = IPv4Network | IPv6Network
N = TypeVar("N", IPv4Network, IPv6Network)
_PREFIX = "/coreos.com/network"
_BACKENDS = ("vxlan", "host-gw")
_DEFAULT_BACKEND = "udp"  # flannel's, where the configuration names none
_LARGEST_BLOCK = {4: 22, 6: 118}  # ipamd's
_SCHEMA = Schema(
    tables={"etcd": ETCD_KEYS},
    lists={},
    others=("ipamd", "store", "pools", "reclaim", "docker", "cni", "netd", "peer", "network", "cluster", "log"),
    flags={"endpoints": ("etcd.endpoints", "--endpoint")},
)
_TRIES = 5


class FlannelBackend(msgspec.Struct, frozen=True, rename="pascal"):
    """What is of use of flannel's `Backend`."""

    type: str = _DEFAULT_BACKEND
    direct_routing: bool = False
    mtu: int = msgspec.field(default=0, name="MTU")


class FlannelConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """What is of use of flannel's configuration."""

    network: str = ""
    subnet_len: int = 0
    subnet_min: str = ""
    subnet_max: str = ""
    enable_ipv4: bool = msgspec.field(default=True, name="EnableIPv4")
    enable_ipv6: bool = msgspec.field(default=False, name="EnableIPv6")
    ipv6_network: str = msgspec.field(default="", name="IPv6Network")
    ipv6_subnet_len: int = msgspec.field(default=0, name="IPv6SubnetLen")
    backend: FlannelBackend = FlannelBackend()


class Lease(TypedDict):
    """Which part of the network flannel gave to whom."""

    subnet: str
    host: str
    here: bool


class _Found(msgspec.Struct, frozen=True):
    config: FlannelConfig
    leases: tuple[tuple[str, str], ...]


@click.group("import", short_help="Take over what other network daemons have set up.")
def take_over() -> None:
    """Take over what other network daemons have set up."""


@command(take_over, "flannel")
@click.option("--name", metavar="NAME", default="pods", show_default=True, help="Of the network that is made.")
@click.option("--endpoint", "endpoints", metavar="ADDRESS:PORT", multiple=True, help="etcd's.  [default: [etcd]]")
@click.option("--etcd-prefix", metavar="PREFIX", default=_PREFIX, show_default=True, help="flannel's keys in etcd.")
@click.option("--subnet-file", metavar="PATH", default=SUBNET_FILE, show_default=True, help="flannel's, of this host.")
@pass_choices
def flannel(choices: Choices, name: str, endpoints: tuple[str, ...], etcd_prefix: str, subnet_file: str) -> None:
    """Make flannel's network one of Netloom's, and keep this host's subnet.

    Run it on each host that flannel serves, before netd starts there; running it again is no error.

    \b
    netloom import flannel
    netloom import flannel --endpoint https://10.0.0.1:2379 --name pods
    """
    found = _read(_etcd(endpoints, etcd_prefix))
    request = _request(name, found.config)
    parts = _parts(subnet_file)
    own = _own(subnet_file, parts, request)
    narrowed = [str(part) for part, block in zip(parts, own, strict=True) if part != block]
    with choices.ipamd() as ipamd:
        network = ipamd.create_network(request)
        if own:
            _claim(ipamd, network, own)
    here = {str(block) for block in own}
    leases = [Lease(subnet=subnet, host=host, here=_is_here(subnet, own)) for subnet, host in found.leases]
    if choices.as_json:
        output.document(
            {"name": name, "backend": network.backend, "subnets": list(network.subnets), "claimed": sorted(here),
             "narrowed": narrowed, "leases": leases}
        )  # fmt: skip
        return
    output.line(f"network {name} ({', '.join(network.subnets)}), backend {network.backend}")
    output.line(
        f"claimed for this host: {', '.join(map(str, own))}" if own else f"{subnet_file} is not there: nothing claimed"
    )
    for subnet in narrowed:
        output.line(
            f"of {subnet} only that is a block; before flannel_network is set, have all of it:"
            f" subnets = [{json.dumps(subnet)}] under [netd] of this host"
        )
    if leases:
        output.table(("SUBNET", "HOST", "NEXT"), [(one["subnet"], one["host"], _next(one)) for one in leases])


def _next(lease: Lease) -> str:
    return "flannel_network under [netd]" if lease["here"] else "netloom import flannel there"


# etcd


def _etcd(endpoints: Sequence[str], prefix: str) -> EtcdConfig:
    try:
        file = paths.config_file(os.environ)
        overrides = {"endpoints": list(endpoints)} if endpoints else {}
        found = etcd_config(Settings(file, settings.read(file, required=False), _SCHEMA, overrides))
    except (ConfigError, paths.PathError) as error:
        raise Failure(str(error), Status.USAGE) from None
    if found is None:
        raise Failure(f"{file} names no etcd; say where flannel's is with --endpoint", Status.USAGE)
    return dataclasses.replace(found, prefix=f"{prefix.rstrip('/')}/")


def _read(config: EtcdConfig) -> _Found:
    try:
        pair, leases = asyncio.run(_ask(config))
    except EtcdError as error:
        raise Failure(str(error), Status.UNREACHABLE) from None
    if pair is None:
        raise Failure(f"etcd has no key {config.prefix}config; say where flannel's keys are with --etcd-prefix")
    try:
        known = msgspec.json.decode(pair.value, type=FlannelConfig)
    except msgspec.MsgspecError as error:
        raise Failure(f"{config.prefix}config is no configuration of flannel's: {error}") from None
    return _Found(known, tuple(_lease(one) for one in leases))


async def _ask(config: EtcdConfig) -> tuple[Pair | None, list[Pair]]:
    etcd = Etcd(config)
    try:
        pair = await etcd.get("config")
        leases = [one async for page in etcd.walk("subnets/") for one in page.pairs]
    finally:
        await etcd.close()
    return pair, leases


def _lease(pair: Pair) -> tuple[str, str]:
    """A key such as subnets/10.5.52.0-24, or subnets/10.5.52.0-24&fd00::-64."""
    subnets = pair.key.partition("/")[2].split("&")
    try:
        value: Any = msgspec.json.decode(pair.value)
        host = value.get("PublicIP") or value.get("PublicIPv6") or "?"
    except (msgspec.MsgspecError, AttributeError):
        host = "?"
    return ", ".join("/".join(one.rsplit("-", 1)) for one in subnets), str(host)


# What flannel says, as ipamd takes it


def _request(name: str, config: FlannelConfig) -> ipam_pb2.CreateNetworkRequest:
    four = _network("Network", config.network, IPv4Network) if config.enable_ipv4 else None
    six = _network("IPv6Network", config.ipv6_network, IPv6Network) if config.enable_ipv6 else None
    subnets: list[_Subnet] = [one for one in (four, six) if one is not None]
    if not subnets:
        raise Failure("flannel's configuration has no network: neither EnableIPv4 nor EnableIPv6")
    backend = config.backend.type.lower()
    if backend not in _BACKENDS:
        raise Failure(
            f"Backend: flannel's is {config.backend.type}, and Netloom has {', '.join(_BACKENDS)} of flannel's; make "
            "the network by hand (netloom network create), or change flannel's first"
        )
    return ipam_pb2.CreateNetworkRequest(
        network=ipam_pb2.Network(
            name=name,
            subnets=map(str, subnets),
            backend="direct" if backend == "vxlan" and config.backend.direct_routing else backend,
            mtu=config.backend.mtu,
        ),
        mode="node-block",
        block_v4=_block(config.subnet_len or _default_length(four), four),
        # Smaller than flannel's: what ipamd keeps account of has an end.
        block_v6=max(config.ipv6_subnet_len or 64, six.prefixlen, _LARGEST_BLOCK[6]) if six is not None else 0,
        excludes=_outside(config, four) if four is not None else (),
    )


def _network(key: str, text: str, kind: type[N]) -> N:
    try:
        return kind(text, strict=False)
    except ValueError as error:
        raise Failure(f"{key} of flannel's configuration is no network: {error}") from None


def _default_length(network: IPv4Network | None) -> int:
    """Flannel's, where its configuration does not say: a /24 for each host, or a quarter of a small network."""
    if network is None:
        return 0
    return 24 if network.prefixlen <= 22 else network.prefixlen + 2


def _block(length: int, network: IPv4Network | None) -> int:
    if network is None:
        return 0
    least = max(_LARGEST_BLOCK[4], network.prefixlen)
    if not least <= length <= 30:
        raise Failure(
            f"SubnetLen: flannel gives each host of {network} a /{length}, and a block of Netloom's is /{least} to "
            "/30; such a network cannot be taken over with its subnets"
        )
    return length


def _outside(config: FlannelConfig, network: IPv4Network) -> list[str]:
    """What lies before SubnetMin and behind SubnetMax."""
    found: list[IPv4Network] = []
    if config.subnet_min:
        first = _network("SubnetMin", config.subnet_min, IPv4Network).network_address
        if first > network.network_address:
            found += summarize_address_range(network.network_address, first - 1)
    if config.subnet_max:
        length = config.subnet_len or _default_length(network)
        last = _network("SubnetMax", f"{config.subnet_max}/{length}", IPv4Network).broadcast_address
        if last < network.broadcast_address:
            found += summarize_address_range(last + 1, network.broadcast_address)
    return [str(one) for one in found]


# This host


def _parts(path: str) -> list[_Subnet]:
    """Flannel's subnets of this host; none where flannel left no file."""
    if not os.path.exists(path):
        return []
    try:
        return [ip_network(subnet) for _, subnet in read_subnet(path).parts]
    except CniError as error:
        raise Failure(str(error)) from None


def _own(path: str, parts: Sequence[_Subnet], request: ipam_pb2.CreateNetworkRequest) -> list[_Subnet]:
    """The block that each of flannel's subnets of this host is, or begins with."""
    whole = [ip_network(text) for text in request.network.subnets]
    found: list[_Subnet] = []
    for part in parts:
        length = request.block_v4 if part.version == 4 else request.block_v6
        inside = any(one.version == part.version and part.subnet_of(one) for one in whole)  # type: ignore[arg-type]
        if not inside or part.prefixlen > length or (part.version == 4 and part.prefixlen != length):
            raise Failure(
                f"{path}: this host's subnet {part} is none of {', '.join(map(str, whole))} in parts of /{length}, as "
                "flannel's configuration has it; is the file an old one? Then remove it"
            )
        found.append(ip_network(f"{part.network_address}/{length}"))
    return found


def _claim(ipamd: Client, network: ipam_pb2.Network, own: Sequence[_Subnet]) -> None:
    """Hold an address of each block, the last one: containers have the first ones."""
    key = subnet_key(network.name)
    mine = ipam_pb2.ListAllocationsRequest(client=key.client, network=key.network, container_id=key.container_id)
    wanted = [str(block[-2 if block.version == 4 else -1]) for block in own]
    for attempt in range(_TRIES):
        held = [
            ip_network(address.cidr, strict=False) for one in ipamd.list_allocations(mine) for address in one.addresses
        ]
        if all(block in held for block in own):
            return
        if held and attempt < _TRIES - 1:
            ipamd.release(key)  # netd asked before, and got another block
        elif not held:
            ipamd.allocate(key, pools=[network.pool], requested=wanted)
    raise Failure(f"ipamd gave netd other subnets each time; stop netd, and run this again. Wanted: {own}")


def _is_here(subnet: str, own: Sequence[_Subnet]) -> bool:
    """Whether a lease is this host's."""
    try:
        leased = [ip_network(one) for one in subnet.split(", ")]
    except ValueError:
        return False
    return any(a.version == b.version and a.overlaps(b) for a in leased for b in own)
