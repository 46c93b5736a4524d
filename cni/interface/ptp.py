"""The ptp plugin: a veth pair between a container and the host, which routes to it.

No bridge: the host's end has the gateway's address and a route to each address of the container, so the host forwards
between containers, and each container asks its own end of the pair for any neighbour.

What an ADD does, in this order
1. validate the whole configuration;
2. ask the IPAM plugin for addresses;
3. write the attachment record: what this attachment will want of the host's kernel;
4. veth pair;
5. have the addresses; write what they want of the kernel into the record;
6. forwarding: shared by all containers and never undone;
7. gateway and routes on the host's end, masquerade, addresses and routes in the container.
From step 2 on each step has pushed its inverse before the next begins.

In the container the address keeps the length of its network, but the kernel makes no route to that network: it would
lead to neighbours that are not on this link. Instead there are two, to the gateway over the link and to the network by
the gateway. The reference deletes the kernel's route afterwards; then it comes back when the link goes down and up.
"""

import dataclasses
from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network
from typing import Annotated

import msgspec

from cni import attachment, config, delegate
from cni import check as verify
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.interface import veth
from cni.interface.configure import configure
from cni.request import Request
from cni.result import DNS, Interface, IPConfig, Result
from cni.undo import Undo
from kernel import addr, link, netns, paths, route
from kernel.errors import Exists, NotFound
from kernel.link import Link, VethSpec
from kernel.record import Record, Records
from kernel.route import Route
from kernel.session import Session, Visit
from telemetry import trace

_SCOPE_HOST = 254  # rtnetlink(7), RT_SCOPE_HOST: as the reference has the host's routes


class PtpConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `ip_masq_backend` is accepted; the backend is nftables."""

    ip_masq: bool = False
    ip_masq_backend: str = ""
    mtu: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    dns: DNS = DNS()


def parse(request: Request) -> PtpConf:
    """The configuration, checked as a whole.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, PtpConf)
    veth.check_masquerade_backend(conf.ip_masq_backend)
    if not request.ipam_type:
        raise config.refused("ipam.type", request.ipam_type, "ptp needs an IPAM plugin: it routes to addresses")
    return conf


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container to the host.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        veth.clear_the_way(request, host, records, inside)
        wait = delegate.begin(request, host, inside, undo)
        port_name = veth.free_name(host)
        record = Record(
            attachment.key(request),
            netns=request.netns,
            netns_inode=sandbox.identity.inode,
            netns_cookie=inside.cookie,
            links=(port_name,),
        )
        attachment.write_record(host, records, record, undo)
        veth.make(host, VethSpec(port_name, request.ifname, sandbox.fd, conf.mtu), undo)
        port = link.get(host, port_name)
        eth = link.get(inside, request.ifname)
        lease = wait()
        ips = tuple(_checked(ip) for ip in lease.ips)
        own, shared = veth.masquerade(request, ips if conf.ip_masq else ())
        wanted = dataclasses.replace(record, elements=tuple(own), shared=tuple(shared))
        record = attachment.complete_record(records, record, wanted)
        veth.forward(ip_address(ip.gateway).version for ip in ips)
        _configure_host(host, port, ips)
        with trace.step("nftables"):
            records.apply(host, record)
        result = Result((), ips, lease.routes, conf.dns or lease.dns)
        configure(inside, request.ifname, eth.index, result, instead=_routes_inside(eth.index, result))
        port = veth.wait_for_carrier(host, port_name)
    interfaces = (Interface(port.name, port.mac), Interface(request.ifname, eth.mac, request.netns))
    return msgspec.structs.replace(result, interfaces=interfaces)


def _checked(ip: IPConfig) -> IPConfig:
    """The address with its interface's number in the result; it needs a gateway that is another one."""
    interface = ip_interface(ip.address)
    if not ip.gateway:
        raise CniError(
            Code.INVALID_CONFIG,
            f"address {ip.address} has no gateway, which ptp puts on the host's end",
            "set one in ipam",
        )
    if ip_address(ip.gateway) == interface.ip:
        raise CniError(
            Code.INVALID_CONFIG,
            f"address {ip.address} for the container is also the gateway that the host's end would get",
            "exclude the gateway from the pool, or set another gateway in ipam",
        )
    return IPConfig(ip.address, ip.gateway, interface=1)


@trace.step("gateway")
def _configure_host(host: Session, port: Link, ips: tuple[IPConfig, ...]) -> None:
    """The gateways on the host's end, and a route to each address over it.

    Raises:
        CniError: 101, the host has a route to one of the addresses already.
    """
    gateways = _gateways(ips)
    if any(gateway.version == 6 for gateway in gateways):
        # A host may have IPv6 off by default, for its own interfaces.
        veth.try_sysctl("0", "ipv6", "conf", port.name, "disable_ipv6")
        # Forwarding asks for neighbours under the link-local address: not after the second that detection takes.
        veth.try_sysctl("0", "ipv6", "conf", port.name, "accept_dad")
    routes = _routes_on_host(port.index, ips)
    messages = [addr.add_message(port.index, gateway) for gateway in gateways]
    messages += [route.add_message(one, exclusive=True) for one in routes]
    failures = host.rtnl.attempt(messages)
    for error in failures[: len(gateways)]:
        if error is not None:
            raise error
    for one, error in zip(routes, failures[len(gateways) :], strict=True):
        if isinstance(error, Exists):
            raise CniError(
                Code.ADDRESS_UNAVAILABLE,
                f"the host has a route to {one.dst} already, and the container would get that address",
                f"look at `ip route show {one.dst}`; remove it or exclude the address from the pool",
            ) from error
        if error is not None:
            raise error


def _gateways(ips: Iterable[IPConfig]) -> list[addr.AnyInterface]:
    """The gateways as the host's end has them, alone in their networks; each once."""
    return list(dict.fromkeys(ip_interface(ip.gateway) for ip in ips))


def _routes_on_host(index: int, ips: Iterable[IPConfig]) -> list[Route]:
    return [Route(ip_network(ip_interface(ip.address).ip), index, scope=_SCOPE_HOST) for ip in ips]


def _routes_inside(index: int, result: Result) -> list[Route]:
    """To each gateway over the link, then to each network by its gateway; where the result has a route to the same
    destination in the main table, that one counts."""
    wished = {ip_network(wish.dst, strict=False) for wish in result.routes if wish.table in (None, route.MAIN)}
    found: dict[object, Route] = {}
    for ip in result.ips:
        interface, gateway = ip_interface(ip.address), ip_address(ip.gateway)
        direct = Route(ip_network(gateway), index, scope=route.SCOPE_LINK, source=interface.ip)
        found.setdefault(direct.dst, direct)
        if interface.network.num_addresses > 1 and interface.network not in wished:
            around = Route(interface.network, index, gateway=gateway, source=interface.ip)
            found.setdefault(around.dst, around)
    # IPv4 takes a gateway only once there is a route to it.
    return sorted(found.values(), key=lambda one: one.gateway is not None)


# DEL


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do."""
    veth.delete(request, host)


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify everything that ADD made, as far as later plugins may not change it.

    Raises:
        CniError: names the first thing that is wrong.
    """
    conf = parse(request)
    result = verify.required_result(request)
    delegate.check(request, host)
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        eth = verify.container_link(inside, request, result, kind="veth")
        verify.addresses(inside, request, eth, result)
        verify.routes(inside, eth, result)
        own = tuple(ip for ip in result.ips if ip.gateway and _is_inside(ip, request, result))
        _check_routes(inside, eth, _routes_inside(eth.index, msgspec.structs.replace(result, ips=own)))
    port = _check_port(host, eth)
    present = {address.interface for address in addr.all_addresses(host, port.index)}
    for gateway in _gateways(own):
        if gateway not in present:
            raise verify.broken(f"host's end {port.name} lacks the gateway address {gateway}")
    _check_routes(host, port, _routes_on_host(port.index, own))
    elements, shared = veth.masquerade(request, own if conf.ip_masq else ())
    verify.elements(host, [*elements, *shared])


def _is_inside(ip: IPConfig, request: Request, result: Result) -> bool:
    """Whether the address is this interface's; a later plugin may have added others."""
    if ip.interface is None or not 0 <= ip.interface < len(result.interfaces):
        return False
    known = result.interfaces[ip.interface]
    return known.name == request.ifname and known.sandbox == request.netns


def _check_port(host: Session, eth: Link) -> Link:
    """The host's end: the veth whose peer is the container's interface."""
    try:
        port = link.by_index(host, eth.peer)
    except NotFound:
        port = None
    if port is None or port.kind != "veth" or port.peer != eth.index:
        raise verify.broken(f"interface {eth.name} of the container has no other end on the host")
    if not port.up:
        raise verify.broken(f"host's end {port.name} is down", f"ip link set {port.name} up")
    return port


def _check_routes(door: Session | Visit, over: Link, wanted: Iterable[Route]) -> None:
    for one in wanted:
        present = route.all_routes(door, one.dst.version, over.index)
        if not any((found.dst, found.gateway) == (one.dst, one.gateway) for found in present):
            via = f" via {one.gateway}" if one.gateway is not None else ""
            raise verify.broken(f"the route to {one.dst}{via} on {over.name} is gone")


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more."""
    parse(request)
    with Failures() as failures:
        veth.collect(request, host, failures)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now: whether IPAM could serve it."""
    parse(request)
    delegate.status(request, host)
