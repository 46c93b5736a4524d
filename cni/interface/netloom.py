"""The netloom plugin: attaches a container to a network that ipamd knows by name, with all that belongs to it.

Only the network's name stands in the configuration; what it is, ipamd says. One execution does what otherwise a chain
of four does, by their own code: bridge with masquerade, portmap, firewall, bandwidth. Each of them keeps its own record
of the attachment; this plugin's own record has what all attachments of the network want together: no masquerade between
hosts, and who may reach whom.

An ADD, in this order: the network's definition; its own record; bridge; portmap and bandwidth where the runtime gives
ports or limits; firewall; for an overlay network netd's device on the bridge (cni.interface.overlay). A DEL goes by the
records, the other way round, and asks nobody for the definition.
"""

import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from cni import attachment, config
from cni import check as verify
from cni.chained import bandwidth, firewall, portmap
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.interface import bridge, container, overlay, veth
from cni.ipam import ipamd
from cni.request import Request
from cni.result import DNS, Result
from cni.undo import Undo
from kernel import leftovers, netns, paths, shared
from kernel.nft import Element
from kernel.record import Record, Records
from kernel.session import Session
from telemetry import trace

if TYPE_CHECKING:
    from protos.ipam.v1 import ipam_pb2 as pb

_LEAST_MTU = 68  # RFC 791
_OTHERWISE = "default"  # netd's word for networks that it does not know, or not yet
_ETHERNET_MTU = 1500
_TUNNEL_OVERHEAD = 70  # bytes, over IPv6; 50 over IPv4

# What comes after the bridge, and the capability without which it is left out.
_CHAIN: tuple[tuple[str, ModuleType], ...] = (("portmap", portmap), ("firewall", firewall), ("bandwidth", bandwidth))
_CAPABILITY = {"portmap": "portMappings", "firewall": "", "bandwidth": "bandwidth"}


class NetloomConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys. `network`: its name for ipamd, if it is not the configuration's own."""

    network: str = ""
    is_default_gateway: bool = True
    mtu: int = 0
    sticky: bool | str = False
    socket: str = ""
    timeout: float = ipamd.DEADLINE_S
    dns: DNS = DNS()


class _Fabric(msgspec.Struct, frozen=True):
    """What netd says of a network."""

    mtu: int = 0
    backend: str = ""


class _Fabrics(msgspec.Struct, frozen=True):
    """What netd wrote; nothing where it never ran."""

    networks: dict[str, _Fabric] = {}


def parse(request: Request) -> NetloomConf:
    """The configuration, checked as far as it needs nobody else.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, NetloomConf)
    if conf.mtu and not _LEAST_MTU <= conf.mtu <= 65521:
        raise config.refused("mtu", conf.mtu, f"want {_LEAST_MTU} to 65521, or 0 for the network's own")
    if conf.socket and (not conf.socket.startswith("/") or "\0" in conf.socket):
        raise config.refused("socket", conf.socket, "want an absolute path")
    if not 0 < conf.timeout <= 300:
        raise config.refused("timeout", conf.timeout, "want seconds between 0 and 300")
    if request.config.get("ipam") and not overlay.is_static(request):
        wish = "the network has its own pool; leave the key out (for an overlay, type static may name addresses of it)"
        raise config.refused("ipam", request.config["ipam"], wish)
    return conf


def _name(request: Request, conf: NetloomConf) -> str:
    return conf.network or request.network


def _with(request: Request, plugin: str, keys: Mapping[str, object], result: Result | None) -> Request:
    """The request as another plugin would get it: what all plugins of a list see, and its own keys."""
    common = {name: value for name, value in request.config.items() if name in ("name", "runtimeConfig", "args")}
    return msgspec.structs.replace(request, plugin=plugin, config={**common, **keys}, prev_result=result)


def _for_bridge(
    request: Request, conf: NetloomConf, network: "pb.Network", fabrics: _Fabrics, result: Result | None
) -> Request:
    keys: dict[str, object] = {
        "bridge": network.bridge,
        "isGateway": True,
        "isDefaultGateway": conf.is_default_gateway and not network.internal,
        "ipMasq": not network.no_masquerade and not network.internal,
        "mtu": _mtu(conf, network, fabrics),
        "ipam": request.config["ipam"] if overlay.is_static(request) else _ipam(conf, network.pool),
    }
    if network.type == overlay.TYPE:
        keys["macFromAddress"] = True
    if conf.dns:
        keys["dns"] = conf.dns
    return _with(request, "bridge", keys, result)


def _ipam(conf: NetloomConf, pool: str) -> dict[str, object]:
    keys: dict[str, object] = {"type": "ipamd", "pool": pool, "sticky": conf.sticky, "timeout": conf.timeout}
    if conf.socket:
        keys["socket"] = conf.socket
    return keys


def _fabrics(request: Request, conf: NetloomConf, network: "pb.Network") -> _Fabrics:
    """What netd says of the host's networks, as far as anything of it is wanted; empty where no netd runs."""
    if (conf.mtu or network.mtu) and network.type != overlay.TYPE:
        return _Fabrics()
    try:
        with open(os.path.join(paths.run_dir(request.environment), "fabric.json"), "rb") as stream:
            return msgspec.json.decode(stream.read(), type=_Fabrics)
    except (OSError, ValueError):  # what msgspec raises are ValueErrors
        return _Fabrics()


def _awaited_fabrics(request: Request, conf: NetloomConf, network: "pb.Network") -> _Fabrics:
    """The same for an ADD: netd may hear of an overlay a moment later than ipamd, which says that there is one.

    Without that its MTU would be guessed, and nobody waited for its device.
    """
    found = _fabrics(request, conf, network)
    if network.type == overlay.TYPE and found.networks and network.name not in found.networks:
        found = overlay.wait_until_known(
            lambda: _fabrics(request, conf, network), lambda one: network.name in one.networks, network.name
        )
    return found


def _mtu(conf: NetloomConf, network: "pb.Network", fabrics: _Fabrics) -> int:
    """The MTU of the network's links; 0, the kernel's default, where nobody says."""
    if conf.mtu:
        return conf.mtu
    known = fabrics.networks.get(network.name) or _Fabric()
    otherwise = fabrics.networks.get(_OTHERWISE) or _Fabric()
    if network.type != overlay.TYPE:
        return network.mtu or (known if network.name in fabrics.networks else otherwise).mtu
    # Of an overlay netd knows the network's own, too, and how much of it the tunnel carries.
    wanted = known.mtu or network.mtu
    if wanted or otherwise.backend == "vxlan" or not fabrics.networks:
        return wanted or otherwise.mtu
    # netd is about to learn of the network, or of the underlay; all that is known is that packets are to fit a tunnel.
    return max((otherwise.mtu or _ETHERNET_MTU) - _TUNNEL_OVERHEAD, _LEAST_MTU)


def _for_chain(request: Request, name: str, network: "pb.Network | None", result: Result | None) -> Request:
    """The request for a plugin that comes after the bridge."""
    keys: dict[str, object] = {}
    if name == "firewall" and network is not None and network.type == overlay.TYPE:
        keys = {"bridged": True, "internal": network.internal}
    return _with(request, name, keys, result)


@trace.step("network")
def _definition(request: Request, conf: NetloomConf) -> "pb.Network":
    """What ipamd knows of the network.

    Raises:
        CniError: 7, there is none of that name, or the configuration's addresses are none of it; 11, ipamd is away.
    """
    network = ipamd.network(_for_ipamd(request, conf), _name(request, conf))
    if overlay.is_static(request):
        overlay.check_addresses(request, network)
    return network


def _for_ipamd(request: Request, conf: NetloomConf) -> Request:
    return _with(request, request.plugin, {"ipam": _ipam(conf, "")}, None)


def _shared(network: "pb.Network") -> list[Element]:
    return shared.elements(network.subnets, network.reachable, is_open=network.open)


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container to the network.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    _check_early(request)
    network = _definition(request, conf)
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as sandbox:
        record = Record(
            attachment.key(request),
            netns=request.netns,
            netns_inode=sandbox.identity.inode,
            netns_cookie=netns.cookie_at(sandbox, host.home_fd),
            shared=tuple(_shared(network)),
        )
    left = records.read(record.key)
    if left is not None:
        leftovers.discard(host, records, left)
    attachment.write_record(host, records, record, undo)
    with trace.step("nftables"):
        records.apply(host, record)
    fabrics = _awaited_fabrics(request, conf, network)
    result, its_bridge = bridge.attach(_for_bridge(request, conf, network, fabrics, None), host, undo)
    if network.type == overlay.TYPE:
        _tell_macs(request, conf, network, result, again=left is not None)
    for name, module in _wanted(request):
        with trace.step(name):
            result = module.add(_for_chain(request, name, network, result), host, undo)
    if network.type == overlay.TYPE and network.name in fabrics.networks:
        overlay.wait_until_ready(host, its_bridge, network)  # last: netd works meanwhile
    return result


def _tell_macs(request: Request, conf: NetloomConf, network: "pb.Network", result: Result, *, again: bool) -> None:
    """Tell the other hosts the MACs that they would not expect. What is told ends with the address: nothing to undo.

    Where the address was here before (`again`: an ADD without a DEL in between; or it is the caller's own), another
    MAC may have been told of it, so that of an expected one is told, too: that it is that.
    """
    mac = next(one.mac for one in result.interfaces if one.sandbox)
    is_static = overlay.is_static(request)
    unexpected = overlay.unexpected(result.ips, mac, together=not is_static)
    for address in unexpected:
        with trace.step("overlay mac"):
            ipamd.set_mac(_for_ipamd(request, conf), network.pool, address, mac)
    for ip in result.ips if is_static or again else ():
        address = ip.address.partition("/")[0]
        if address not in unexpected:
            with trace.step("overlay mac"):
                ipamd.set_mac(_for_ipamd(request, conf), network.pool, address, mac, expected=True)


def _check_early(request: Request) -> None:
    """Refuse a MAC, ports and limits that cannot be before anything is done."""
    container.wanted_mac(request)
    portmap.parse(_with(request, "portmap", {}, None))
    bandwidth.parse(_with(request, "bandwidth", {}, None))


def _wanted(request: Request) -> list[tuple[str, ModuleType]]:
    """The plugins that come after the bridge, in the order of a list."""
    asked = request.config.get("runtimeConfig")
    given = asked if isinstance(asked, Mapping) else {}
    return [(name, module) for name, module in _CHAIN if _CAPABILITY[name] in given or not _CAPABILITY[name]]


# DEL


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do."""
    records = Records(paths.run_dir(request.environment))
    with Failures() as failures:
        for name, module in reversed(_CHAIN):
            if records.read(attachment.key(_with(request, name, {}, None))) is not None:
                failures.attempt(module.delete, _with(request, name, {}, request.prev_result), host)
        failures.attempt(veth.delete, _for_release(request), host)
        own = records.read(attachment.key(request))
        if own is not None:
            failures.attempt(leftovers.discard, host, records, own)


def _for_release(request: Request) -> Request:
    """For what the bridge plugin removes, which needs no definition."""
    try:
        conf = parse(request)
    except CniError:
        conf = NetloomConf()  # an ADD with it was refused
    # Addresses of the caller's own are the caller's to give back.
    ipam = {"type": "static"} if overlay.is_static(request) else _ipam(conf, _name(request, conf))
    return _with(request, "bridge", {"ipam": ipam}, request.prev_result)


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify what each of the parts made.

    Raises:
        CniError: names the first thing that is wrong.
    """
    conf = parse(request)
    result = verify.required_result(request)
    network = _definition(request, conf)
    verify.elements(host, _shared(network))
    fabrics = _fabrics(request, conf, network)
    bridge.check(_for_bridge(request, conf, network, fabrics, result), host)
    if network.type == overlay.TYPE:
        overlay.check(request, host, network, result, _mtu(conf, network, fabrics))
    for name, module in _wanted(request):
        module.check(_for_chain(request, name, network, result), host)


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more."""
    with Failures() as failures:
        for name, _ in reversed(_CHAIN):
            attachment.collect(_with(request, name, {}, None), host, failures)
        used = veth.collect(_for_release(request), host, failures)
        records = Records(paths.run_dir(request.environment))
        for name in sorted({record.bridge for record in used} | _bridge_of(request)):
            failures.attempt(leftovers.delete_idle_bridge, host, records, name)
        attachment.collect(request, host, failures)


def _bridge_of(request: Request) -> set[str]:
    """The network's bridge, also where no record names it any more; none where ipamd does not say."""
    try:
        conf = parse(request)
        return {ipamd.network(_for_ipamd(request, conf), _name(request, conf)).bridge}
    except CniError:
        return set()


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, with what is missing.
    """
    conf = parse(request)
    try:
        network = _definition(request, conf)
    except CniError as error:
        raise CniError(Code.NOT_AVAILABLE, f"network {_name(request, conf)} cannot be used now", str(error)) from error
    fabrics = _fabrics(request, conf, network)
    if network.type == overlay.TYPE and network.name not in fabrics.networks:
        raise overlay.unknown_to_netd(network.name, runs=bool(fabrics.networks))
    bridge.status(_for_bridge(request, conf, network, fabrics, None), host)
    for name, module in _CHAIN:
        module.status(_for_chain(request, name, network, None), host)
