"""The CNI plugins of a Docker network: from its options, or from a conflist of the host. Pure but for reading that."""

import os
from collections.abc import Mapping
from ipaddress import ip_interface
from typing import Any

import msgspec

from libnetwork.chain import VERSION, Chain, Plugin
from libnetwork.errors import DriverError
from libnetwork.options import OVERLAY
from libnetwork.state import Endpoint, Network

CONF_DIR = "/etc/cni/net.d"


def adopt(network: Network, conf_dir: str = CONF_DIR) -> Network:
    """The network with the plugins of the conflist that it names, if it names one.

    Raises:
        DriverError: there is none of that name, or it makes no interface.
    """
    wanted = network.options.conflist
    if not wanted:
        return network
    document = read(wanted, conf_dir)
    if all(plugin.get("type") == "portmap" for plugin in document["plugins"]):
        raise DriverError(f"conflist {wanted}: it has no plugin that makes an interface")
    return msgspec.structs.replace(
        network, plugins=tuple(document["plugins"]), version=str(document.get("cniVersion", VERSION))
    )


def lost(network: Network) -> list[str]:
    """What the network's plugins do inside a container that Docker's taking over the interface undoes, in words."""
    reasons = {
        "tuning": "sysctls of the interface and of its namespace",
        "sbr": "its routing tables and rules",
        "vrf": "its VRF",
    }
    return [
        f"plugin {kind}: {reasons[kind]}" for plugin in network.plugins if (kind := str(plugin.get("type"))) in reasons
    ]


def chain(network: Network, endpoint: Endpoint, path: tuple[str, ...]) -> Chain:
    """What attaches one endpoint. Published ports are not among it: they come and go while it stays attached."""
    if network.plugins:
        plugins = tuple(plugin for plugin in network.plugins if plugin.get("type") != "portmap")
        if endpoint.addresses:
            plugins = ({**plugins[0], "ipam": static(network, endpoint)}, *plugins[1:])
        return Chain(name(network), plugins, path, network.version)
    if network.options.type == OVERLAY:
        # It does all of it by itself, by the network's definition.
        attach = {"type": "netloom", "network": network.options.network, "ipam": static(network, endpoint)}
        return Chain(name(network), ({**attach, "capabilities": {"mac": True}},), path)
    # Docker sets the policy of forwarded packets to drop: without the firewall plugin nothing would leave the host.
    internal = {"internal": True} if network.options.internal else {}
    after: dict[str, tuple[Plugin, ...]] = {
        "bridge": ({"type": "firewall", "ingressPolicy": "same-bridge", **internal},),
        "ptp": ({"type": "firewall", "apart": list(network.pools), **internal},),
        "macvlan": (),
    }
    return Chain(name(network), (_interface(network, endpoint), *after[network.options.type]), path)


def ports(network: Network, path: tuple[str, ...]) -> Chain:
    """What publishes the ports of an endpoint."""
    plugin: Mapping[str, Any] = {"type": "portmap", "snat": True}
    plugin = next((one for one in network.plugins if one.get("type") == "portmap"), plugin)
    return Chain(name(network), ({**plugin, "capabilities": {"portMappings": True}},), path)


def name(network: Network) -> str:
    """The network's name towards plugins and ipamd."""
    return f"docker-{network.id[:12]}"


def bridge(network: Network) -> str:
    """The bridge of a network of type bridge."""
    return network.options.bridge or f"nl-{network.id[:12]}"


def static(network: Network, endpoint: Endpoint) -> dict[str, Any]:
    """An `ipam` object that gives the addresses which Docker chose."""
    addresses = []
    routes = []
    for text in endpoint.addresses:
        version = ip_interface(text).version
        gateway = gateway_of(network, version)
        addresses.append({"address": text, **({"gateway": gateway} if gateway else {})})
        if gateway and not network.options.internal:
            routes.append({"dst": "0.0.0.0/0" if version == 4 else "::/0"})
    return {"type": "static", "addresses": addresses, "routes": routes}


def gateway_of(network: Network, version: int) -> str:
    """The gateway's address of a family, "" where there is none."""
    found = (ip_interface(text) for text in network.gateways)
    return next((str(gateway.ip) for gateway in found if gateway.version == version), "")


def _interface(network: Network, endpoint: Endpoint) -> dict[str, Any]:
    options = network.options
    ipam = static(network, endpoint)
    common: dict[str, Any] = {"type": options.type, "ipam": ipam, "capabilities": {"mac": True}}
    if options.mtu:
        common["mtu"] = options.mtu
    match options.type:
        case "bridge":
            return common | {
                "bridge": bridge(network),
                "isGateway": bool(network.gateways),
                "ipMasq": options.masquerade and not options.internal,
                "hairpinMode": True,
                "portIsolation": not options.icc,
            }
        case "ptp":
            return common | {"ipMasq": options.masquerade and not options.internal}
        case _:
            return common | {"master": options.parent, "mode": options.macvlan_mode}


def read(wanted: str, directory: str) -> dict[str, Any]:
    """The conflist of this name, from whichever file of the directory has it.

    Raises:
        DriverError: there is none, or the directory cannot be read.
    """
    names = []
    try:
        files = sorted(os.listdir(directory))
    except OSError as error:
        raise DriverError(f"conflist {wanted}: {directory}: {error.strerror}") from error
    for file in files:
        if not file.endswith(".conflist"):
            continue
        try:
            with open(os.path.join(directory, file), "rb") as opened:
                document = msgspec.json.decode(opened.read())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue
        if not isinstance(document, dict) or not _are_plugins(document.get("plugins")):
            continue
        names.append(str(document.get("name")))
        if names[-1] == wanted:
            return document
    raise DriverError(
        f"conflist {wanted}: no .conflist in {directory} has this name; there are {', '.join(names) or 'none'}"
    )


def _are_plugins(found: Any) -> bool:
    """Whether this is a list of objects, as far as a runtime must know."""
    return isinstance(found, list) and bool(found) and all(isinstance(one, dict) for one in found)
