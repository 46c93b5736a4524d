"""The bridge plugin: a veth pair between a container and a Linux bridge of the host.

What an ADD does, in this order
1. validate the whole configuration;
2. ask the IPAM plugin for addresses;
3. write the attachment record: what this attachment will want of the host's kernel;
4. on a bridge of ours: veth pair, port settings; up, unless a spoof check is to come before the first packet, or the
   MAC with the addresses;
5. have the addresses; write what they want of the kernel into the record;
6. bridge, gateway addresses, forwarding: shared by all containers and never undone; any other bridge gets the pair now;
7. spoof check, masquerade; up, where it is not; addresses, routes;
8. announce the addresses to the segment.
From step 2 on each step has pushed its inverse before the next begins.

Configuration keys and results are those of the reference plugin; differences have a comment that says why.
"""

import contextlib
import dataclasses
import errno
from ipaddress import IPv4Interface, IPv6Interface
from typing import Annotated

import msgspec

from cni import attachment, config, delegate, parsed
from cni import check as verify
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.interface import container, veth
from cni.interface.configure import bring_up, configure
from cni.request import Request
from cni.result import DNS, Interface, IPConfig, Result, Route
from cni.undo import Undo
from kernel import addr, leftovers, link, macs, netns, nft, paths
from kernel.errors import Exists, KernelError
from kernel.link import Link, VethSpec
from kernel.record import Record, Records
from kernel.session import Door, Session, Visit
from telemetry import trace

AnyInterface = IPv4Interface | IPv6Interface
Unsigned = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Trunk(msgspec.Struct, rename="camel"):
    """An entry of `vlanTrunk`; read only to be refused with its value."""

    id: int | None = None


class BridgeConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `ip_masq_backend` is accepted; the backend is nftables."""

    bridge: str = "cni0"
    is_gateway: bool = False
    is_default_gateway: bool = False
    force_address: bool = False
    ip_masq: bool = False
    ip_masq_backend: str = ""
    mtu: Unsigned = 0
    hairpin_mode: bool = False
    promisc_mode: bool = False
    vlan: int = 0
    vlan_trunk: list[Trunk] = []
    preserve_default_vlan: bool = False
    macspoofchk: bool = False
    enabledad: bool = False
    disable_container_interface: bool = False
    port_isolation: bool = False
    mac_from_address: bool = False  # ours: the reference has no such key
    dns: DNS = DNS()

    @property
    def gateway(self) -> bool:
        """Whether the bridge itself gets an address."""
        return self.is_gateway or self.is_default_gateway


def parse(request: Request) -> BridgeConf:
    """The configuration, checked as a whole.

    Raises:
        CniError: 2 or 7, naming key and value.
    """
    conf = config.convert(request.config, BridgeConf)
    config.check_link_name("bridge", conf.bridge)
    veth.check_masquerade_backend(conf.ip_masq_backend)
    if conf.hairpin_mode and conf.promisc_mode:
        raise config.refused("hairpinMode", True, "cannot be set together with promiscMode; drop one of them")
    if conf.disable_container_interface and request.ipam_type:
        raise config.refused("disableContainerInterface", True, "cannot be set together with ipam; drop one of them")
    if conf.vlan or conf.vlan_trunk:
        key, value = ("vlan", conf.vlan) if conf.vlan else ("vlanTrunk", f"{len(conf.vlan_trunk)} entries")
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            f"{key}: {value} is not supported by this version of Netloom",
            "use one bridge per VLAN on top of a VLAN interface, or leave the key out",
        )
    return conf


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container to the bridge.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    return attach(request, host, undo)[0]


def attach(request: Request, host: Session, undo: Undo) -> tuple[Result, Link]:
    """As `add`; the bridge, too."""
    conf = parse(request)
    mac = container.wanted_mac(request)
    mac_follows = conf.mac_from_address and not mac
    mac = mac or container.random_mac()
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        veth.clear_the_way(request, host, records, inside)
        wait = delegate.begin(request, host, inside, undo) if request.ipam_type else Result
        port_name = veth.free_name(host)
        record = dataclasses.replace(
            _record(request, conf, [], port_name, mac), netns_inode=sandbox.identity.inode, netns_cookie=inside.cookie
        )
        attachment.write_record(host, records, record, undo)
        spec = VethSpec(port_name, request.ifname, sandbox.fd, conf.mtu, mac)
        found = link.find(host, conf.bridge)
        # While ipamd works. Somebody else's bridge, and one that is not there yet, is touched only for a container that
        # has its addresses: nobody undoes it.
        ours = found is not None and found.alias == leftovers.BRIDGE_MARK
        bridge = _ensure_bridge(host, conf, found) if ours else None
        eth = _plug_in(host, inside, conf, spec, bridge, undo) if bridge is not None else None
        early = eth is not None and not (conf.disable_container_interface or conf.macspoofchk or mac_follows)
        port = _connect(host, inside, conf, spec, eth) if eth is not None and early else None
        present = _addresses(host, bridge) if bridge is not None and conf.gateway else None
        forwarded = veth.forwarded(one.version for one in present or () if not one.ip.is_link_local)
        lease = wait()
        ips, routes = _with_gateways(conf, lease)
        gateways = [_gateway_interface(ip) for ip in ips] if conf.gateway else []
        if bridge is None or conf.mac_from_address:
            bridge = _bridge_with_mac(host, conf, bridge or found, gateways)
        if conf.gateway:
            _ensure_gateways(host, bridge, conf, gateways, present)
            veth.forward({one.version for one in gateways} - forwarded)
        if mac_follows:
            mac = macs.of_addresses(parsed.interface(ip.address).ip for ip in ips) or mac
            spec = dataclasses.replace(spec, mac=mac)
        if eth is None:
            eth = _plug_in(host, inside, conf, spec, bridge, undo)
        elif mac_follows:
            eth = _with_mac(inside, eth, mac)
        record = attachment.complete_record(records, record, _record(request, conf, ips, port_name, mac))
        with trace.step("nftables"):
            records.apply(host, record)
        result = Result((), tuple(ips), tuple(routes), conf.dns or lease.dns)
        if conf.disable_container_interface:
            port = link.get(host, port_name)
        else:
            port = port or _connect(host, inside, conf, spec, eth)
            configure(inside, request.ifname, eth.index, result, dad=conf.enabledad, is_up=True)
            container.announce(inside, eth)
        if bridge.alias != leftovers.BRIDGE_MARK:
            bridge = link.get(host, conf.bridge)  # once more: somebody else's may take the MAC of a port
    interfaces = (
        Interface(conf.bridge, bridge.mac),
        Interface(port.name, port.mac),
        Interface(request.ifname, eth.mac, request.netns),
    )
    return msgspec.structs.replace(result, interfaces=interfaces), bridge


def _with_gateways(conf: BridgeConf, lease: Result) -> tuple[list[IPConfig], list[Route]]:
    """The addresses with the bridge's as gateway, and the default routes that isDefaultGateway asks for."""
    ips = []
    routes = list(lease.routes)
    for ip in lease.ips:
        interface = parsed.interface(ip.address)
        gateway = ip.gateway
        if not gateway and conf.gateway:
            gateway = str(_first_address(interface))
        if conf.gateway and gateway == str(interface.ip):
            raise CniError(
                Code.INVALID_CONFIG,
                f"address {ip.address} for the container is also the gateway that the bridge would get",
                "exclude the gateway from the pool, or set another gateway in ipam",
            )
        ips.append(IPConfig(ip.address, gateway, interface=2))
        default = "0.0.0.0/0" if interface.version == 4 else "::/0"
        # The reference looks for one with a gateway, and then fails, since one without gets the same gateway.
        if conf.is_default_gateway and not any(route.dst == default for route in routes):
            routes.append(Route(default, gateway))
    return ips, routes


def _first_address(interface: AnyInterface) -> object:
    network = interface.network
    if network.num_addresses == 2:
        # /31, /127: the other one of the two (RFC 3021, RFC 6164).
        return next(address for address in network if address != interface.ip)
    return network.network_address + 1


def _gateway_interface(ip: IPConfig) -> AnyInterface:
    return parsed.interface(f"{ip.gateway}/{parsed.interface(ip.address).network.prefixlen}")


def _record(request: Request, conf: BridgeConf, ips: list[IPConfig], port_name: str, mac: str) -> Record:
    """What this attachment wants of the host's kernel."""
    own, shared = veth.masquerade(request, ips if conf.ip_masq else ())
    if conf.macspoofchk:
        own += nft.spoof_check(port_name, mac, attachment.owner(request))
    return Record(
        attachment.key(request),
        netns=request.netns,
        links=(port_name,),
        bridge=conf.bridge,
        elements=tuple(own),
        shared=tuple(shared),
    )


@trace.step("bridge link")
def _ensure_bridge(host: Session, conf: BridgeConf, bridge: Link | None, mac: str = "") -> Link:
    """The bridge, made where it was not found, with this MAC where one is given."""
    if bridge is None:
        try:
            born_with = mac or container.random_mac()
            link.add_bridge(host, conf.bridge, born_with, mtu=conf.mtu, alias=leftovers.BRIDGE_MARK)
            # Routers on the segment do not decide over this host's routes. Somebody else's bridge is left as it is: it
            # may be how the host itself gets its addresses.
            veth.try_sysctl("0", "ipv6", "conf", conf.bridge, "accept_ra")
            if mac:
                # Bridges of other hosts may be on the segment with the same MAC, and so link-local address.
                veth.try_sysctl("0", "ipv6", "conf", conf.bridge, "accept_dad")
        except Exists:
            pass  # another ADD was faster
        except KernelError as error:
            if error.errno != errno.EINVAL or not conf.mtu:
                raise
            raise veth.refused_mtu(conf.mtu, error) from error
        bridge = link.get(host, conf.bridge)
    if bridge.kind != "bridge":
        raise config.refused(
            "bridge", conf.bridge, f"is a link of kind {bridge.kind or 'device'}; name another or remove it"
        )
    if not bridge.up:
        link.set_up(host, bridge.index)
    if conf.promisc_mode and not bridge.promiscuous:
        link.set_promiscuous(host, bridge.index, True)
    return bridge


def _bridge_with_mac(host: Session, conf: BridgeConf, bridge: Link | None, gateways: list[AnyInterface]) -> Link:
    """The bridge, made where it was not found; with macFromAddress, ours has the gateway's MAC."""
    mac = macs.of_addresses(one.ip for one in gateways) if conf.mac_from_address else ""
    if bridge is None or bridge.alias != leftovers.BRIDGE_MARK:
        bridge = _ensure_bridge(host, conf, bridge, mac)
    return _with_mac(host, bridge, mac) if mac and bridge.alias == leftovers.BRIDGE_MARK else bridge


def _with_mac(door: Door, one: Link, mac: str) -> Link:
    """The link after it got this MAC, where it had another."""
    if one.mac == mac:
        return one
    link.set_mac(door, one.index, mac)
    return dataclasses.replace(one, mac=mac)


@trace.step("gateway")
def _ensure_gateways(
    host: Session,
    bridge: Link,
    conf: BridgeConf,
    gateways: list[AnyInterface],
    present: set[AnyInterface] | None = None,
) -> None:
    """Put the gateways' addresses on the bridge.

    As in the reference, another IPv4 address, or an overlapping IPv6 one, is an error unless forceAddress replaces it.
    Unlike there, the several addresses of one container may have a gateway each.
    """
    present = _addresses(host, bridge) if present is None else present
    for gateway in gateways:
        if gateway in present:
            continue
        for other in sorted(present, key=str):
            if other in gateways or not _conflict(other, gateway):
                continue
            # A network whose range changed keeps its gateway under another prefix. On our own bridge that is a change,
            # not a conflict; the containers of its earlier days go by the same gateway.
            regrown = other.ip == gateway.ip and bridge.alias == leftovers.BRIDGE_MARK
            if not (conf.force_address or regrown):
                raise CniError(
                    Code.INVALID_CONFIG,
                    f"bridge {bridge.name} has the address {other}, and {gateway} is wanted",
                    "remove that address, name another bridge, or set forceAddress to have it replaced",
                )
            addr.delete(host, bridge.index, other)
            present.discard(other)
        if gateway.version == 6:
            veth.try_sysctl("0", "ipv6", "conf", bridge.name, "disable_ipv6")
        with contextlib.suppress(Exists):  # another ADD was faster
            addr.add(host, bridge.index, gateway)
        if bridge.alias != leftovers.BRIDGE_MARK:
            # Pins the MAC of a bridge that was made without one; ours has its own from birth, and netd's neighbours on
            # it would go (net/core/neighbour.c, neigh_changeaddr).
            link.set_mac(host, bridge.index, bridge.mac)


def _addresses(host: Session, bridge: Link) -> set[AnyInterface]:
    return {address.interface for address in addr.all_addresses(host, bridge.index)}


def _conflict(present: AnyInterface, wanted: AnyInterface) -> bool:
    if present.version != wanted.version or present.ip.is_link_local:
        return False
    return present.version == 4 or present.network.overlaps(wanted.network)


def _plug_in(host: Session, inside: Visit, conf: BridgeConf, spec: VethSpec, bridge: Link, undo: Undo) -> Link:
    """Make the pair; the container's end."""
    veth.make(host, spec, undo, bridge.index)
    if conf.hairpin_mode or conf.port_isolation:
        port = link.get(host, spec.name)
        link.set_port(host, port.index, hairpin=conf.hairpin_mode, isolated=conf.port_isolation)
    return link.get(inside, spec.peer)


def _connect(host: Session, inside: Visit, conf: BridgeConf, spec: VethSpec, eth: Link) -> Link:
    """Bring the container's end up; the host's end, through which packets pass then."""
    bring_up(inside, spec.peer, eth.index, dad=conf.enabledad)
    return veth.wait_for_carrier(host, spec.name)


# DEL


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do. The bridge stays."""
    veth.delete(request, host)


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify everything that ADD made, as far as later plugins may not change it.

    Raises:
        CniError: names the first thing that is wrong.
    """
    conf = parse(request)
    result = verify.required_result(request)
    if request.ipam_type:
        delegate.check(request, host)
    bridge = _check_bridge(conf, host, result)
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        eth = verify.container_link(inside, request, result, kind="veth", up=not conf.disable_container_interface)
        verify.addresses(inside, request, eth, result)
        verify.routes(inside, eth, result)
    port = _check_port(conf, host, bridge, eth)
    record = _record(request, conf, list(result.ips) if request.ipam_type else [], port.name, eth.mac)
    verify.elements(host, [*record.elements, *record.shared])


def _check_bridge(conf: BridgeConf, host: Session, result: Result) -> Link:
    bridge = link.find(host, conf.bridge)
    if bridge is None or bridge.kind != "bridge":
        raise verify.broken(f"bridge {conf.bridge} is gone", "run DEL and ADD for its containers")
    if not bridge.up:
        raise verify.broken(f"bridge {conf.bridge} is down", f"ip link set {conf.bridge} up")
    known = next((i for i in result.interfaces if i.name == conf.bridge and not i.sandbox), None)
    # Somebody else's bridge may have the lowest MAC of its ports, which come and go.
    ours = bridge.alias == leftovers.BRIDGE_MARK
    if ours and known is not None and known.mac and known.mac.lower() != bridge.mac:
        raise verify.broken(f"bridge {conf.bridge} has the MAC {bridge.mac}; ADD reported {known.mac}")
    if conf.promisc_mode and not bridge.promiscuous:
        raise verify.broken(f"bridge {conf.bridge} is not in promiscuous mode", f"ip link set {conf.bridge} promisc on")
    if conf.gateway:
        present = {address.interface for address in addr.all_addresses(host, bridge.index)}
        for ip in result.ips:
            if ip.gateway and _gateway_interface(ip) not in present:
                raise verify.broken(f"bridge {conf.bridge} lacks the gateway address {_gateway_interface(ip)}")
    return bridge


def _check_port(conf: BridgeConf, host: Session, bridge: Link, eth: Link) -> Link:
    """The host's end: the port of the bridge whose peer is the container's interface."""
    ports = link.all_links(host, bridge.index)
    port = next((p for p in ports if p.kind == "veth" and (p.index, p.peer) == (eth.peer, eth.index)), None)
    if port is None:
        raise verify.broken(f"interface {eth.name} of the container has no port on bridge {bridge.name}")
    if not port.up:
        raise verify.broken(f"bridge port {port.name} is down", f"ip link set {port.name} up")
    if conf.hairpin_mode and not port.hairpin:
        raise verify.broken(f"hairpin is off on bridge port {port.name}", f"bridge link set dev {port.name} hairpin on")
    if conf.port_isolation and not port.isolated:
        raise verify.broken(
            f"isolation is off on bridge port {port.name}", f"bridge link set dev {port.name} isolated on"
        )
    return port


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more, and an idle bridge of ours."""
    bridge = parse(request).bridge
    with Failures() as failures:
        used = veth.collect(request, host, failures)
        records = Records(paths.run_dir(request.environment))
        for name in sorted({bridge, *(record.bridge for record in used)}):
            failures.attempt(leftovers.delete_idle_bridge, host, records, name)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, with what is missing.
    """
    conf = parse(request)
    bridge = link.find(host, conf.bridge)
    if bridge is not None and bridge.kind != "bridge":
        raise CniError(
            Code.NOT_AVAILABLE,
            f"link {conf.bridge} is of kind {bridge.kind or 'device'}, no bridge",
            "name another in `bridge`, or remove it",
        )
    if request.ipam_type:
        delegate.status(request, host)
