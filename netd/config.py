"""netd's configuration: the host's TOML file, and command-line flags that override it.

    [netd]
    socket = "/run/netloom/netd.sock"
    socket_mode = "0600"              # no rights for others: whoever opens the socket sees all hosts
    socket_owner = "root"             # a name or a number; absent: as it comes
    socket_group = "netloom"
    node = "host-1"                   # default: node under [ipamd], else the host's name
    http_listen = "127.0.0.1:9465"    # /metrics and /healthz; absent or "": off
    http_allow_remote = false
    interface = "eth0"                # by which link, or by the link with which address, other hosts are reached
    interface_regex = "eth.*"         # by the first link with such a name or address
    can_reach = "10.0.0.1"            # by the link that leads there; absent, too: by that of the default route
    public_ip = ["10.0.0.11"]         # by what others reach this host, where that is not the link's own address
    subnets = ["10.2.1.0/24"]         # of the containers of this host
    backend = "vxlan"                 # of subnets that are in no [[network]]: vxlan, host-gw, direct or none
    vni = 1                           # the tunnels' number, 1 to 16777215
    port = 4789                       # the tunnels' UDP port
    mtu = 0                           # of the containers' packets; 0: as large as the underlay allows
    tx_checksum = true                # false where the network card spoils checksums inside tunnels
    udp_checksum = false              # of the tunnels' outer packets
    fast_path = true                  # overlays: frames between containers pass by the bridge, by BPF programs
    resync_s = 60                     # how often everything is read and compared, beside all events
    flannel_network = "pods"          # whose part of this host /run/flannel tells; absent: none
    flannel_masquerade = true         # whether netd masquerades what leaves that network

    [[peer]]
    name = "host-2"                   # this host's own name: says what the others know of it
    address = ["10.0.0.12"]           # of the underlay, at most one IPv4 and one IPv6
    subnets = ["10.2.2.0/24"]         # of the containers of that host
    mac = "02:00:00:00:00:02"         # of its tunnel ends; default: worked out from its name

    [[network]]
    name = "pods"
    subnets = ["10.2.0.0/16"]         # in which the hosts' own ones lie
    backend = "vxlan"                 # this and the following: default as under [netd]
    vni = 7
    port = 4789
    mtu = 0
    tx_checksum = true
    udp_checksum = false
    open = false                      # true: who is in no network may reach it through this host

    [etcd]                            # where peers and networks come from, beside this file; as ipamd's
    endpoints = ["10.0.0.1:2379"]
    prefix = "/netloom/"

    [cluster]
    lease_s = 15                      # so long after its netd's last word a host counts as silent

    [log]
    level = "info"
    format = "text"                   # or "json"

Keys may be written with hyphens, too. One file with all hosts as [[peer]] may lie on every host.

The file serves every daemon of the host: tables of the others are left to them, all other names are refused. A wrong
key or value raises ConfigError, which names file and line, the key, what was found and what to do. Flags win over the
file, the file wins over the environment, and that over the defaults.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from cluster.config import EtcdConfig
from cluster.settings import ETCD_KEYS, etcd_config
from kernel import link, paths, settings
from kernel.settings import ConfigError, Schema, Settings, WrongValueError
from netd.fabric.registry import BACKENDS, TUNNELS
from netd.underlay import Choice
from netd.values import AnyAddress, AnyNetwork, Network, Node, vtep_mac
from telemetry.health import parse_listen
from telemetry.log import FORMATS, LEVELS

DEFAULT_NETWORK = "default"  # what subnets in no [[network]] belong to
_WAY = ("backend", "vni", "port", "mtu", "tx_checksum", "udp_checksum")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "netd": (
        *("socket", "socket_mode", "socket_owner", "socket_group", "node", "http_listen", "http_allow_remote"),
        *("interface", "interface_regex", "can_reach", "public_ip", "subnets", *_WAY, "fast_path", "resync_s"),
        *("flannel_network", "flannel_masquerade"),
    ),
    "etcd": ETCD_KEYS,
    "cluster": ("lease_s", "reclaim_nodes_after_s"),
    "log": ("level", "format"),
}
_LISTS: Mapping[str, tuple[str, ...]] = {
    "peer": ("name", "address", "subnets", "mac"),
    "network": ("name", "subnets", *_WAY, "open"),
}
_OTHERS = ("ipamd", "store", "pools", "reclaim", "docker", "cni")
# What a flag sets, under the name that `load` takes it by.
_OVERRIDES: Mapping[str, tuple[str, str]] = {
    "socket": ("netd.socket", "--socket"),
    "node": ("netd.node", "--node"),
    "http_listen": ("netd.http_listen", "--http-listen"),
    "interface": ("netd.interface", "--interface"),
    "interface_regex": ("netd.interface_regex", "--interface-regex"),
    "can_reach": ("netd.can_reach", "--can-reach"),
    "public_ip": ("netd.public_ip", "--public-ip"),
    "backend": ("netd.backend", "--backend"),
    "log_level": ("log.level", "--log-level"),
    "log_format": ("log.format", "--log-format"),
}
_SCHEMA = Schema(tables=_KEYS, lists=_LISTS, others=_OTHERS, flags=_OVERRIDES, hyphens=True)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_LARGEST_MTU = 65535
_LEAST_MTU = 1280  # IPv6 needs it (RFC 8200, section 5)
_DEFAULT_PORT = 4789  # RFC 7348


@dataclass(frozen=True, slots=True)
class Config:
    """What netd runs with. Paths are absolute, times are in seconds. The last of `networks` has no subnets: it takes
    what no other holds."""

    file: str
    socket: str
    socket_mode: int
    socket_owner: int | None
    socket_group: int | None
    http_listen: str | None
    http_allow_remote: bool
    choice: Choice
    node: Node
    networks: tuple[Network, ...]
    peers: tuple[Node, ...]
    fast_path: bool
    resync_s: float
    flannel_network: str  # "": none
    flannel_masquerade: bool
    etcd: EtcdConfig | None  # None: peers are those of the file, and networks ipamd's
    ipamd_socket: str
    lease_s: int
    state_dir: str  # what survives a reboot
    run_dir: str  # where plugins keep what is attached, and look for what netd says
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """netd's command line, read."""

    config: str | None  # the file that was named; None: the default one
    overrides: Mapping[str, object]  # as `load` takes them
    check: bool  # only validate
    remove: bool  # take away what netd made, and stop


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Reads the command line; prints usage and raises SystemExit(2) where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="netd", description="Netloom's network daemon: routes and tunnels to hosts.")
    parser.add_argument("--config", metavar="FILE", help=f"default: $NETLOOM_CONFIG, else {paths.CONFIG_FILE}")
    parser.add_argument("--socket", metavar="PATH", help="listen here instead of the configured socket")
    parser.add_argument("--node", metavar="NAME", help="this node's name; default: the host's name")
    parser.add_argument("--interface", metavar="NAME|ADDRESS", help="the link by which other hosts are reached")
    parser.add_argument("--interface-regex", metavar="REGEX", help="the first link with such a name or address")
    parser.add_argument("--can-reach", metavar="ADDRESS", help="the link that leads there")
    parser.add_argument("--public-ip", metavar="ADDRESS", action="append", help="by what others reach this host")
    parser.add_argument("--backend", metavar="NAME", help=", ".join(BACKENDS))
    parser.add_argument("--log-level", metavar="LEVEL", help=", ".join(LEVELS))
    parser.add_argument("--log-format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--http-listen", metavar="ADDRESS:PORT", help="/metrics and /healthz; an empty word: off")
    parser.add_argument("--check", action="store_true", help="validate the configuration, say so, and stop")
    parser.add_argument("--remove", action="store_true", help="take away every route and tunnel of netd, and stop")
    given = parser.parse_args(argv)
    overrides = {name: value for name in _OVERRIDES if (value := getattr(given, name)) is not None}
    if given.socket:
        overrides["socket"] = os.path.abspath(given.socket)
    return Arguments(given.config, overrides, given.check, given.remove)


def load(path: str | None, overrides: Mapping[str, object], environment: Mapping[str, str]) -> Config:
    """Reads and validates the configuration.

    `path` is a file that the operator named and that must exist; None means the default file, which need not. A file
    named by NETLOOM_CONFIG must exist too. `overrides` holds values that win over the file's. Raises ConfigError.
    """
    try:
        file = path or paths.config_file(environment)
        required = path is not None or bool(environment.get("NETLOOM_CONFIG"))
        found = Settings(file, settings.read(file, required), _SCHEMA, overrides)
        run_dir = paths.run_dir(environment)
        socket_path = found.take("netd.socket", settings.absolute_path) or f"{run_dir}/netd.sock"
        state_dir = f"{paths.state_dir(environment)}/netd"
        ipamd_socket = paths.ipamd_socket(environment)
    except paths.PathError as error:
        raise ConfigError(str(error)) from None
    name = found.take("netd.node", settings.node) or _node_of_ipamd(found) or settings.default_node("netd")
    networks = _networks(found)
    peers, own = _peers(found, name)
    choice = Choice(
        interface=found.take("netd.interface", settings.string) or "",
        interface_regex=found.take("netd.interface_regex", _regex) or "",
        can_reach=found.take("netd.can_reach", _address),
        public_ip=found.take("netd.public_ip", _addresses) or (),
    )
    own_subnets = tuple(dict.fromkeys((*(found.take("netd.subnets", _subnets) or ()), *(own.subnets if own else ()))))
    if own is not None and own.addresses and choice == Choice():
        choice = Choice(public_ip=own.addresses)
    allow_remote = found.take("netd.http_allow_remote", settings.boolean) or False
    mode = found.take("netd.socket_mode", settings.socket_mode("whoever opens the socket sees all hosts"))
    fast_path = found.take("netd.fast_path", settings.boolean)
    resync_s = found.take("netd.resync_s", settings.seconds)
    masquerade = found.take("netd.flannel_masquerade", settings.boolean)
    return Config(
        file=file,
        socket=socket_path,
        socket_mode=0o600 if mode is None else mode,
        socket_owner=found.take("netd.socket_owner", settings.user),
        socket_group=found.take("netd.socket_group", settings.group),
        http_listen=found.take("netd.http_listen", settings.listen(parse_listen, allow_remote)) or None,
        http_allow_remote=allow_remote,
        choice=choice,
        node=Node(name, choice.public_ip, own_subnets, own.mac if own else vtep_mac(name)),
        networks=networks,
        peers=peers,
        fast_path=True if fast_path is None else fast_path,
        resync_s=60.0 if resync_s is None else resync_s,
        flannel_network=found.take("netd.flannel_network", _defined_name) or "",
        flannel_masquerade=True if masquerade is None else masquerade,
        etcd=etcd_config(found),
        ipamd_socket=str(found.other("ipamd", "socket") or ipamd_socket),
        lease_s=found.take("cluster.lease_s", settings.whole(5, 3600)) or 15,
        state_dir=state_dir,
        run_dir=run_dir,
        log_level=found.take("log.level", settings.one_of(LEVELS)) or "info",
        log_format=found.take("log.format", settings.one_of(FORMATS)) or "text",
    )


def _node_of_ipamd(found: Settings) -> str:
    """One host has one name. What is wrong with it there, ipamd says."""
    value = found.other("ipamd", "node")
    try:
        return settings.node(value) if value is not None else ""
    except WrongValueError:
        return ""


def _networks(found: Settings) -> tuple[Network, ...]:
    default = _way(found, "netd", None)
    networks: list[Network] = []
    for entry in found.entries("network"):
        name = found.take(f"{entry}.name", _name)
        subnets = found.take(f"{entry}.subnets", _subnets)
        if name is None or not subnets:
            found.refuse(entry, 'a network needs a name and subnets, such as subnets = ["10.2.0.0/16"]')
        for other in networks:
            if other.name == name:
                found.refuse(f"{entry}.name", f"found {name!r} twice; give each network a name of its own")
            for one in subnets:
                if any(one.overlaps(theirs) for theirs in other.subnets):
                    found.refuse(
                        f"{entry}.subnets", f"{one} overlaps a subnet of {other.name}; each network has its own"
                    )
        is_open = found.take(f"{entry}.open", settings.boolean) or False
        networks.append(replace(_way(found, entry, default, name, subnets), open=is_open))
    if all(one.name != DEFAULT_NETWORK for one in networks):
        networks.append(default)
    else:
        found.refuse("network", f"the name {DEFAULT_NETWORK} is for subnets in no [[network]]; choose another")
    _check_devices(found, networks)
    return tuple(networks)


def _way(
    found: Settings,
    table: str,
    default: Network | None,
    name: str = DEFAULT_NETWORK,
    subnets: tuple[AnyNetwork, ...] = (),
) -> Network:
    def take(key: str, convert: Callable[[object], settings.T], otherwise: settings.T) -> settings.T:
        value = found.take(f"{table}.{key}", convert)
        return value if value is not None else getattr(default, key, otherwise)

    return Network(
        name=name,
        subnets=subnets,
        backend=take("backend", settings.one_of(tuple(BACKENDS)), "vxlan"),
        vni=take("vni", settings.whole(1, (1 << 24) - 1), 1),
        port=take("port", settings.whole(1, 65535), _DEFAULT_PORT),
        mtu=take("mtu", _mtu, 0),
        tx_checksum=take("tx_checksum", settings.boolean, True),
        udp_checksum=take("udp_checksum", settings.boolean, False),
    )


def _check_devices(found: Settings, networks: Sequence[Network]) -> None:
    """Networks with one VNI share a device, which can be of one kind only."""
    first: dict[int, Network] = {}
    for number, one in enumerate(networks, 1):
        if one.backend not in TUNNELS:
            continue
        other = first.setdefault(one.vni, one)
        ours = (one.port, one.tx_checksum, one.udp_checksum)
        if ours != (other.port, other.tx_checksum, other.udp_checksum):
            key = f"network.{number}" if one.subnets else "netd"
            found.refuse(f"{key}.vni", f"{one.name} and {other.name} share vni {one.vni}, but not port and checksums;"
                        " give one of them another vni")  # fmt: skip


def _peers(found: Settings, own_name: str) -> tuple[tuple[Node, ...], Node | None]:
    """The others, and what is said of this host."""
    peers: dict[str, Node] = {}
    addresses: dict[AnyAddress, str] = {}
    subnets: dict[AnyNetwork, str] = {}
    for entry in found.entries("peer"):
        name = found.take(f"{entry}.name", settings.node)
        if name is None:
            found.refuse(entry, 'a peer needs a name, such as name = "host-2"')
        own = name == own_name
        peer = Node(
            name=name,
            addresses=found.take(f"{entry}.address", _addresses) or (),
            subnets=found.take(f"{entry}.subnets", _subnets) or (),
            mac=found.take(f"{entry}.mac", _mac) or vtep_mac(name),
        )
        if not peer.addresses and not own:
            found.refuse(entry, f'{name} needs an address of the underlay, such as address = "10.0.0.12"')
        if peers.setdefault(name, peer) is not peer:
            found.refuse(f"{entry}.name", f"found {name!r} twice; give each host a name of its own")
        for address in peer.addresses:
            if addresses.setdefault(address, name) != name:
                found.refuse(f"{entry}.address", f"{name} and {addresses[address]} both have {address}; correct one")
        for subnet in peer.subnets:
            if subnets.setdefault(subnet, name) != name:
                found.refuse(f"{entry}.subnets", f"{name} and {subnets[subnet]} both have {subnet}; correct one")
    return tuple(one for one in peers.values() if one.name != own_name), peers.get(own_name)


def _name(value: object) -> str:
    if not _NAME.fullmatch(settings.string(value)):
        raise WrongValueError("wanted a network's name: 1 to 63 letters, digits, '.', '_' and '-', not '-' first")
    return str(value)


def _defined_name(value: object) -> str:
    if value != "" and _name(value) == DEFAULT_NETWORK:
        raise WrongValueError(f"{DEFAULT_NETWORK} has no subnets of its own; wanted a defined network")
    return str(value)


def _mac(value: object) -> str:
    text = settings.string(value).lower()
    try:
        packed = link.packed_mac(text)
    except ValueError:
        raise WrongValueError("wanted a MAC address such as 02:00:00:00:00:02") from None
    if packed[0] & 1 or not any(packed):
        raise WrongValueError("wanted the MAC address of one host: its first byte is even, and it is not all zero")
    return link.mac_text(packed)


def _mtu(value: object) -> int:
    mtu = settings.whole(0, _LARGEST_MTU)(value)
    if 0 < mtu < _LEAST_MTU:
        raise WrongValueError(f"wanted 0, or at least {_LEAST_MTU}, which IPv6 needs")
    return mtu


def _regex(value: object) -> str:
    text = settings.string(value)
    try:
        re.compile(text)
    except re.error as error:
        raise WrongValueError(f"wanted a regular expression: {error}") from None
    return text


def _address(value: object) -> AnyAddress:
    try:
        address = ip_address(settings.string(value))
    except ValueError:
        raise WrongValueError("wanted an IPv4 or IPv6 address without a length") from None
    if address.is_unspecified or address.is_multicast or (address.version == 6 and address.scope_id):
        raise WrongValueError("wanted the address of a host")
    return address


def _addresses(value: object) -> tuple[AnyAddress, ...]:
    found = tuple(_address(one) for one in settings.strings(value))
    if len({one.version for one in found}) < len(found):
        raise WrongValueError("wanted at most one IPv4 and one IPv6 address")
    return found


def _subnets(value: object) -> tuple[AnyNetwork, ...]:
    return tuple(_subnet(one) for one in settings.strings(value))


def _subnet(text: str) -> AnyNetwork:
    try:
        found = ip_network(text, strict=False)
    except ValueError:
        raise WrongValueError(f"wanted a network such as 10.2.1.0/24, this is {text!r}") from None
    if "/" not in text or str(found.network_address) != str(ip_address(text.partition("/")[0])):
        raise WrongValueError(f"wanted a network, {text} is an address in one; did you mean {found}?")
    if not found.prefixlen or found.is_multicast or found.is_loopback or found.is_link_local:
        raise WrongValueError(f"wanted a network that containers may have, {found} is none")
    return found
