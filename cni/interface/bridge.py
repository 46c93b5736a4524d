"""The bridge plugin: a veth pair between a container and a Linux bridge of the host.

What an ADD does, in this order
1. validate the whole configuration;
2. get addresses from the IPAM plugin;
3. write the attachment record: what this attachment will want of the host's kernel;
4. bridge, gateway addresses, forwarding: shared by all containers and never undone;
5. veth pair, port settings, spoof check, addresses, routes, masquerade;
6. announce the addresses to the segment.
From step 2 on each step has pushed its inverse before the next begins.

Configuration keys and results are those of the reference plugin; differences have a comment that says why.
"""

import contextlib
import dataclasses
import os
import re
import time
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Annotated

import msgspec

from cni import check as verify
from cni import config, delegate
from cni.errors import CniError, Code
from cni.failures import Failures, note
from cni.interface.configure import configure
from cni.living import Observer
from cni.request import Request
from cni.result import DNS, Interface, IPConfig, Result, Route
from cni.undo import Undo
from kernel import addr, leftovers, link, netns, nft, paths, sysctl
from kernel.errors import Exists, NotFound
from kernel.link import Link, VethSpec
from kernel.record import Key, Record, Records
from kernel.session import Session, Visit

TYPE = "bridge"
# As for CNI_IFNAME. The kernel takes more, but makes br0 of br%d, which is then not the bridge that was named.
_NAME = re.compile(r"[A-Za-z0-9_.+@=,~^][A-Za-z0-9_.+@=,~^\-]{0,14}", re.ASCII)
_TRIES = 10
_PORT_TIMEOUT_S = 5.0

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
    if not _NAME.fullmatch(conf.bridge) or conf.bridge in (".", ".."):
        raise _invalid(
            "bridge", conf.bridge, "want an interface name: 1 to 15 ASCII letters, digits and _ . - + @ = , ~ ^"
        )
    if conf.ip_masq_backend not in ("", "iptables", "nftables"):
        raise _invalid("ipMasqBackend", conf.ip_masq_backend, 'want "nftables" or leave it out')
    if conf.hairpin_mode and conf.promisc_mode:
        raise _invalid("hairpinMode", True, "cannot be set together with promiscMode; drop one of them")
    if conf.disable_container_interface and request.ipam_type:
        raise _invalid("disableContainerInterface", True, "cannot be set together with ipam; drop one of them")
    if conf.vlan or conf.vlan_trunk:
        key, value = ("vlan", conf.vlan) if conf.vlan else ("vlanTrunk", f"{len(conf.vlan_trunk)} entries")
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            f"{key}: {value} is not supported by this version of Netloom",
            "use one bridge per VLAN on top of a VLAN interface, or leave the key out",
        )
    return conf


def _invalid(key: str, value: object, reason: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: $.{key}: {reason}, found {config.found(value)}")


def wanted_mac(request: Request) -> str:
    """The MAC that runtimeConfig, args.cni or CNI_ARGS ask for; "" where none does.

    Raises:
        CniError: 4 or 7, it is none that an interface can have.
    """
    mac, where = request.mac("IP", "GATEWAY")  # those two are the IPAM plugin's
    if not mac:
        return ""
    try:
        packed = link.packed_mac(mac.replace("-", ":"))
    except ValueError as error:
        raise CniError(Code.INVALID_CONFIG, f"invalid MAC address at {where}: {error}") from error
    if packed[0] & 1 or not any(packed):
        raise CniError(
            Code.INVALID_CONFIG,
            f"invalid MAC address at {where}: {mac} is a multicast or the zero address",
            "an interface needs a unicast one, such as 02:00:00:00:00:01",
        )
    return link.mac_text(packed)


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container to the bridge.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    mac = wanted_mac(request) or _random_mac()
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as container, host.visit(container) as inside:
        _clear_the_way(request, host, records, inside)
        lease = delegate.add(request, host, undo) if request.ipam_type else Result()
        ips, routes = _with_gateways(conf, lease)
        port_name = _free_name(host)
        record = dataclasses.replace(
            _record(request, conf, ips, port_name, mac),
            netns_inode=container.identity.inode,
            netns_cookie=inside.cookie,
        )
        undo.push("remove the attachment record", lambda: records.remove(host, record))
        records.write(record)
        bridge = _ensure_bridge(host, conf)
        if conf.gateway:
            _ensure_gateways(host, bridge, conf, [_gateway_interface(ip) for ip in ips])
        undo.push(f"delete link {port_name}", lambda: leftovers.delete_port(host, port_name))
        _add_veth(host, conf, VethSpec(port_name, request.ifname, container.fd, conf.mtu, mac), bridge)
        records.apply(host, record)
        eth = link.get(inside, request.ifname)
        result = Result((), tuple(ips), tuple(routes), conf.dns or lease.dns)
        if conf.disable_container_interface:
            port = link.get(host, port_name)
        else:
            configure(inside, request.ifname, eth.index, result, dad=conf.enabledad)
            port = _wait_for_port(host, port_name)
            _announce(inside, eth)
    return msgspec.structs.replace(
        result,
        interfaces=(
            # Once more: somebody else's bridge may take the MAC of a port.
            Interface(conf.bridge, link.get(host, conf.bridge).mac),
            Interface(port.name, port.mac),
            Interface(request.ifname, eth.mac, request.netns),
        ),
    )


def _clear_the_way(request: Request, host: Session, records: Records, inside: Visit) -> None:
    """Refuse a second ADD before it touches what the first one made; remove what an ADD left that nobody undid.

    Raises:
        CniError: 4, the container has an interface of that name.
    """
    if link.find(inside, request.ifname) is not None:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_IFNAME {request.ifname}: the container has an interface of that name already",
            "run DEL for it first, or choose another name",
        )
    left = records.read(Key(request.network, request.container_id, request.ifname, TYPE))
    if left is not None:
        for name in left.links:
            leftovers.delete_port(host, name)
        records.remove(host, left)


def _random_mac() -> str:
    # Locally administered, unicast.
    return link.mac_text(bytes([0x02, *os.urandom(5)]))


def _with_gateways(conf: BridgeConf, lease: Result) -> tuple[list[IPConfig], list[Route]]:
    """The addresses with the bridge's as gateway, and the default routes that isDefaultGateway asks for."""
    ips = []
    routes = list(lease.routes)
    for ip in lease.ips:
        interface = ip_interface(ip.address)
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
    return ip_interface(f"{ip.gateway}/{ip_interface(ip.address).network.prefixlen}")


def _record(request: Request, conf: BridgeConf, ips: list[IPConfig], port_name: str, mac: str) -> Record:
    """What this attachment wants of the host's kernel."""
    owner = _owner(request)
    own: list[nft.Element] = []
    shared: list[nft.Element] = []
    if conf.ip_masq:
        for ip in ips:
            interface = ip_interface(ip.address)
            own.append(nft.masquerade(str(interface.ip), owner))
            shared.append(nft.no_masquerade(str(interface.network)))
    if conf.macspoofchk:
        own += nft.spoof_check(port_name, mac, owner)
    return Record(
        Key(request.network, request.container_id, request.ifname, TYPE),
        netns=request.netns,
        links=(port_name,),
        bridge=conf.bridge,
        elements=tuple(own),
        shared=tuple(shared),
    )


def _owner(request: Request) -> str:
    return f"{request.network} {request.container_id[:64]} {request.ifname}"


def _ensure_bridge(host: Session, conf: BridgeConf) -> Link:
    bridge = link.find(host, conf.bridge)
    if bridge is None:
        try:
            link.add_bridge(host, conf.bridge, _random_mac(), mtu=conf.mtu, alias=leftovers.BRIDGE_MARK)
            # Routers on the segment do not decide over this host's routes. Somebody else's bridge is left as it is: it
            # may be how the host itself gets its addresses.
            _try_sysctl("0", "ipv6", "conf", conf.bridge, "accept_ra")
        except Exists:
            pass  # another ADD was faster
        bridge = link.get(host, conf.bridge)
    if bridge.kind != "bridge":
        raise _invalid("bridge", conf.bridge, f"is a link of kind {bridge.kind or 'device'}; name another or remove it")
    if not bridge.up:
        link.set_up(host, bridge.index)
    if conf.promisc_mode and not bridge.promiscuous:
        link.set_promiscuous(host, bridge.index, True)
    return bridge


def _try_sysctl(value: str, *parts: str) -> None:
    """Set a sysctl of IPv6 where this kernel has IPv6."""
    try:
        sysctl.ensure(value, *parts)
    except NotFound:
        return


def _ensure_gateways(host: Session, bridge: Link, conf: BridgeConf, gateways: list[AnyInterface]) -> None:
    """Put the gateways' addresses on the bridge and let the host forward.

    As in the reference, another IPv4 address, or an overlapping IPv6 one, is an error unless forceAddress replaces it.
    Unlike there, the several addresses of one container may have a gateway each.
    """
    present = {address.interface for address in addr.all_addresses(host, bridge.index)}
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
            _try_sysctl("0", "ipv6", "conf", bridge.name, "disable_ipv6")
        with contextlib.suppress(Exists):  # another ADD was faster
            addr.add(host, bridge.index, gateway)
        # Pins the MAC of a bridge that was made without one; ours has its own from birth.
        link.set_mac(host, bridge.index, bridge.mac)
    for version in {gateway.version for gateway in gateways}:
        if version == 4:
            sysctl.ensure("1", "ipv4", "ip_forward")
        else:
            sysctl.ensure("1", "ipv6", "conf", "all", "forwarding")


def _conflict(present: AnyInterface, wanted: AnyInterface) -> bool:
    if present.version != wanted.version or present.ip.is_link_local:
        return False
    return present.version == 4 or present.network.overlaps(wanted.network)


def _free_name(host: Session) -> str:
    """A name for the host's end, as the reference makes them."""
    for _ in range(_TRIES):
        name = f"veth{os.urandom(4).hex()}"
        if link.find(host, name) is None:
            return name
    raise CniError(Code.INTERNAL, f"no free name for the host's end of a veth pair after {_TRIES} tries")


def _add_veth(host: Session, conf: BridgeConf, spec: VethSpec, bridge: Link) -> None:
    link.add_veth(host, spec, bridge.index)
    _try_sysctl("0", "ipv6", "conf", spec.name, "accept_ra")
    if conf.hairpin_mode or conf.port_isolation:
        port = link.get(host, spec.name)
        link.set_port(host, port.index, hairpin=conf.hairpin_mode, isolated=conf.port_isolation)


def _wait_for_port(host: Session, name: str) -> Link:
    """The port once packets pass; on the kernels of today at the first look."""
    deadline = time.monotonic() + _PORT_TIMEOUT_S
    while True:
        port = link.get(host, name)
        if port.operstate == link.OPER_UP:
            return port
        if time.monotonic() > deadline:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                f"bridge port {name} has no carrier after {_PORT_TIMEOUT_S:.0f} s (operstate {port.operstate})",
                "look at both ends with `ip -d link`",
            )
        time.sleep(0.001)


def _announce(inside: Visit, eth: Link) -> None:
    """Gratuitous ARP and unsolicited neighbour advertisements for all addresses of the interface.

    The kernel sends both when a MAC is set, also to what it was (NETDEV_CHANGEADDR with arp_notify and ndisc_notify).
    A packet socket would do too, but closing one waits for RCU, some ten milliseconds.
    """
    link.set_mac(inside, eth.index, eth.mac)


# DEL


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do.

    Everything is attempted; the first failure is raised at the end, so that the runtime tries again.
    """
    records = Records(paths.run_dir(request.environment))
    record = records.read(Key(request.network, request.container_id, request.ifname, TYPE))
    with Failures() as failures:
        if record is not None:
            for name in record.links:
                failures.attempt(leftovers.delete_port, host, name)
        if request.netns:
            failures.attempt(_delete_inside, request, host)
        if record is not None:
            failures.attempt(records.remove, host, record)
        # After the link: nobody may get the address while a container can still send from it.
        if request.ipam_type:
            failures.attempt(delegate.delete, request, host)


def _delete_inside(request: Request, host: Session) -> None:
    """Delete the container's end where the host's was not known: the record is lost, or another engine made it."""
    try:
        with netns.opened(request.netns) as container, host.visit(container) as inside:
            link.delete(inside, request.ifname)
    except (NotFound, netns.NotANamespace):
        return  # the namespace is gone, and the interface with it


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
    with netns.opened(request.netns) as container, host.visit(container) as inside:
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
    """Remove what attachments left that the runtime does not know any more, then let the IPAM plugin do the same.

    An attachment whose interface still lives in its namespace is reported and left alone: its container runs.
    """
    valid = {(attachment.container_id, attachment.ifname) for attachment in request.valid_attachments}
    records = Records(paths.run_dir(request.environment))
    observer = Observer(host)
    bridges = {parse(request).bridge}
    with Failures() as failures:
        for record in list(records.of_network(request.network, TYPE)):
            bridges.add(record.bridge)
            if (record.key.container_id, record.key.ifname) in valid:
                continue
            if observer.attached(record.netns, record.netns_inode, record.netns_cookie, record.key.ifname):
                note(f"GC: {record.key.container_id} {record.key.ifname} is not in the list, but its interface lives")
                continue
            for name in record.links:
                failures.attempt(leftovers.delete_port, host, name)
            failures.attempt(records.remove, host, record)
        if request.ipam_type:
            failures.attempt(delegate.gc, request, host)
        for name in sorted(bridges):
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
