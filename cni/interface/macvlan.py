"""The macvlan plugin: an interface with a MAC of its own on top of another one, usually of the host, its master.

What an ADD does, in this order
1. validate the whole configuration, as far as it can be without the master;
2. look the master up: in the host's namespace, or in the container's with `linkInContainer`;
3. ask the IPAM plugin for addresses, where one is named;
4. macvlan, born in the container's namespace under its name;
5. have the addresses; addresses and routes; announcement.
From step 3 on each step has pushed its inverse before the next begins.

Nothing on the host outlives the container's namespace, so there is no attachment record. A macvlan also goes with its
master. Configuration keys and results are those of the reference plugin; differences have a comment that says why.
"""

import binascii
import dataclasses
import errno
from typing import Annotated

import msgspec

from cni import check as verify
from cni import config, delegate
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.interface import container
from cni.interface.configure import configure
from cni.request import Request
from cni.result import DNS, Interface, IPConfig, Result
from cni.undo import Undo
from kernel import link, netns, route
from kernel.errors import Busy, Exists, KernelError, NotFound
from kernel.link import Link, MacvlanSpec
from kernel.session import Session, Visit
from telemetry import trace


class MacvlanConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `master` "" is the interface of the default route."""

    master: str = ""
    mode: str = "bridge"
    mtu: int = 0
    mac: str = ""
    link_in_container: bool = False
    bcqueuelen: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    dns: DNS = DNS()


def parse(request: Request) -> MacvlanConf:
    """The configuration, checked as far as it can be without the kernel.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, MacvlanConf)
    if conf.master:
        config.check_link_name("master", conf.master)
    if not conf.mode:
        conf = msgspec.structs.replace(conf, mode="bridge")
    if conf.mode not in link.MACVLAN_MODES:
        raise config.refused("mode", conf.mode, f"want one of {', '.join(sorted(link.MACVLAN_MODES))}")
    if conf.mtu < 0:
        raise config.refused("mtu", conf.mtu, "want 0, which is the master's, up to the master's")
    return conf


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container to the master's segment.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    mac = container.wanted_mac(request, conf.mac)
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        container.refuse_taken(request, inside)
        master = _find_master(conf, inside if conf.link_in_container else host)
        _check_mtu(conf, master)
        wait = delegate.begin(request, host, inside, undo) if request.ipam_type else Result
        try:
            _make(request, host, inside, _spec(request, conf, master, mac, sandbox), undo)
        except KernelError as error:
            raise _explained(error, conf, master) from error
        eth = link.get(inside, request.ifname)
        if mac and eth.mac != mac:
            # A master that is passed through gives its own MAC; it takes this one, and has its own back at the end.
            link.set_mac(inside, eth.index, mac)
            eth = dataclasses.replace(eth, mac=mac)
        lease = wait()
        # As in the reference: the IPAM plugin's `dns` is not passed on.
        result = Result(
            (Interface(request.ifname, eth.mac, request.netns),),
            tuple(IPConfig(ip.address, ip.gateway, interface=0) for ip in lease.ips),
            lease.routes,
            conf.dns,
        )
        try:
            configure(inside, request.ifname, eth.index, result)
        except KernelError as error:
            raise _explained(error, conf, master, eth.mac) from error
        if result.ips:
            container.announce(inside, eth)
    return result


def _find_master(conf: MacvlanConf, door: Session | Visit) -> Link:
    """The link that is to carry the macvlan.

    Raises:
        CniError: 7, there is none, or it cannot.
    """
    where = "in the container" if conf.link_in_container else "on the host"
    if conf.master:
        master = link.find(door, conf.master)
        if master is None:
            raise config.refused("master", conf.master, f"want an interface that is {where}")
    else:
        master = _default_interface(door)
        if master is None:
            raise config.refused("master", "", f"want a name, as there is no default route {where} to tell one")
    if not master.ethernet:
        raise config.refused("master", master.name, "want an Ethernet interface, which no loopback or tunnel is")
    return master


def _default_interface(door: Session | Visit) -> Link | None:
    """The interface of the default route that counts: IPv4 before IPv6, then the lowest metric."""
    for version in (4, 6):
        defaults = [one for one in route.all_routes(door, version) if not one.dst.prefixlen and one.table == route.MAIN]
        for one in sorted(defaults, key=lambda one: one.priority):
            try:
                return link.by_index(door, one.index)
            except NotFound:  # went meanwhile, and the route with it
                continue
    return None


def _check_mtu(conf: MacvlanConf, master: Link) -> None:
    if conf.mtu > master.mtu:
        raise config.refused("mtu", conf.mtu, f"want at most {master.mtu}, the MTU of master {master.name}")


def _spec(request: Request, conf: MacvlanConf, master: Link, mac: str, sandbox: netns.Netns) -> MacvlanSpec:
    return MacvlanSpec(
        name=request.ifname,
        master=master.index,
        mode=conf.mode,
        netns_fd=-1 if conf.link_in_container else sandbox.fd,
        mtu=conf.mtu,
        # Ours even where none is asked for: then undo knows the interface by it.
        mac="" if conf.mode == "passthru" else mac or container.random_mac(),
        queue=conf.bcqueuelen,
    )


@trace.step("macvlan link")
def _make(request: Request, host: Session, inside: Visit, spec: MacvlanSpec, undo: Undo) -> None:
    """Make the macvlan; `undo` deletes it.

    Raises:
        CniError: the name is taken.
        KernelError: the master cannot carry it.
    """
    temporary = _temporary_name(request)
    undo.push(f"delete {spec.name} in the container", lambda: _unmake(request, host, spec, temporary))
    in_container = spec.netns_fd < 0
    try:
        try:
            link.add_macvlan(inside if in_container else host, spec)
        except Exists:
            if in_container:
                raise
            # Before 6.15 also a host's interface of that name is in the way, which is no reason to fail.
            link.add_macvlan(host, dataclasses.replace(spec, name=temporary))
            link.rename(inside, link.get(inside, temporary).index, spec.name)
    except Exists as error:
        raise container.taken(spec.name) from error


def _explained(error: KernelError, conf: MacvlanConf, master: Link, mac: str = "") -> Exception:
    """The kernel's refusal of the macvlan, or with its MAC of bringing it up, as what is wrong in the configuration."""
    if mac:
        if error.errno != errno.EADDRINUSE:
            return error
        what = f"invalid MAC address: {mac} is in use on master {master.name}"
        return CniError(Code.INVALID_CONFIG, f"{what} ({error})", "ask for another")
    if isinstance(error, Busy):
        wish = f"want an interface that is no port of a bridge or the like ({error})"
        return config.refused("master", master.name, wish)
    if error.errno == errno.EINVAL and "mtu" in error.detail:
        return config.refused("mtu", conf.mtu, f"want 0, which is the master's, or 68 to {master.mtu} ({error})")
    if error.errno == errno.EINVAL:
        # The kernel says no more. The other macvlans may be in any namespace, so nobody can look.
        wish = f"want a mode that master {master.name} can have beside its other macvlans ({error})"
        refusal = config.refused("mode", conf.mode, wish)
        return CniError(refusal.code, refusal.msg, "passthru wants the master for one container alone")
    return error


def _temporary_name(request: Request) -> str:
    """A name for the moment between birth and renaming; the same in ADD and DEL of an attachment."""
    return f"nl{binascii.crc32(f'{request.container_id}@{request.ifname}'.encode()):08x}"


def _unmake(request: Request, host: Session, spec: MacvlanSpec, temporary: str) -> None:
    """Delete what `_make` made, and nothing that came under its name from elsewhere."""
    try:
        with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
            link.delete(inside, temporary)
            found = link.find(inside, spec.name)
            if found is not None and found.kind == "macvlan" and spec.mac in ("", found.mac):
                link.delete(inside, spec.name)
    except (NotFound, netns.NotANamespace):
        return  # the namespace is gone, and the interface with it


# DEL


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do. Needs no master and no valid configuration.

    A failure leaves the addresses, and the runtime tries again.
    """
    with Failures() as failures:
        if request.netns:
            names = (request.ifname, _temporary_name(request))
            failures.attempt(container.delete_interfaces, request, host, names)
        # After the link: nobody may get the address while a container can still send from it.
        if request.ipam_type and not failures.any:
            failures.attempt(delegate.delete, request, host)


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
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        # Whatever the interface of the default route is by now: without a name nothing is known of the master.
        master = None
        if conf.master:
            master = link.find(inside if conf.link_in_container else host, conf.master)
            if master is None:
                raise verify.broken(f"master {conf.master} is gone", "run DEL and ADD once it is back")
        eth = verify.container_link(inside, request, result, kind="macvlan")
        if eth.macvlan_mode != conf.mode:
            raise verify.broken(f"interface {eth.name} has the mode {eth.macvlan_mode}, not {conf.mode}")
        if conf.bcqueuelen and eth.macvlan_queue not in (-1, conf.bcqueuelen):
            raise verify.broken(f"interface {eth.name} has a bcqueuelen of {eth.macvlan_queue}, not {conf.bcqueuelen}")
        if master is not None and not _carries(master, eth, conf, request):
            raise verify.broken(f"interface {eth.name} has another master than {master.name}")
        verify.addresses(inside, request, eth, result)
        verify.routes(inside, eth, result)


def _carries(master: Link, eth: Link, conf: MacvlanConf, request: Request) -> bool:
    # On top of a macvlan the kernel takes that one's own master (drivers/net/macvlan.c, macvlan_common_newlink).
    index, netnsid = (master.peer, master.peer_netnsid) if master.kind == "macvlan" else (master.index, -1)
    if eth.peer != index:
        return False
    if conf.link_in_container:
        return eth.peer_netnsid == netnsid
    return eth.peer_netnsid >= 0 or request.netns_override


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Let the IPAM plugin free what the runtime does not know any more. There is nothing else: an interface goes with
    its namespace."""
    parse(request)
    if request.ipam_type:
        delegate.gc(request, host)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, with what is missing.
    """
    conf = parse(request)
    if not conf.link_in_container:
        try:
            _check_mtu(conf, _find_master(conf, host))
        except CniError as error:
            raise CniError(Code.NOT_AVAILABLE, error.msg, error.details) from error
    if request.ipam_type:
        delegate.status(request, host)
