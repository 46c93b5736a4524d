"""What the netloom plugin does for overlay networks beyond what it does for all: one layer-2 network over many hosts.

Whoever knows an address in it knows its MAC (kernel.macs), so a container gets the MAC that follows from its addresses;
where the runtime wants another, ipamd tells the other hosts. What leads to those is netd's: a VXLAN device on the
bridge, which it brings up once the way to all containers is known. So a container whose ADD has seen it up is reached
by everybody, and reaches everybody. The device is waited for, never made here.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from cni import check as verify
from cni import config, parsed
from cni.errors import CniError, Code
from cni.failures import note
from cni.request import Request
from cni.result import IPConfig, Result
from kernel import link, macs, netns
from kernel.link import Link
from kernel.session import Session
from telemetry import trace

if TYPE_CHECKING:
    from protos.ipam.v1 import ipam_pb2 as pb

T = TypeVar("T")

TYPE = "overlay"
READY_TIMEOUT_S = 3.0
_LOOK_INTERVAL_S = 0.003


def device(vni: int) -> str:
    """The name of netd's VXLAN device for a network, on every host."""
    return f"nl-vx{vni}"


# Addresses of the caller's own


def is_static(request: Request) -> bool:
    """Whether the configuration itself gives the addresses."""
    ipam = request.config.get("ipam")
    return isinstance(ipam, Mapping) and ipam.get("type") == "static"


def check_addresses(request: Request, network: "pb.Network") -> None:
    """Refuse addresses of the configuration, or of the runtime, that no container of the network can have.

    Args:
        request: whose `ipam` is of type static.
        network: what ipamd knows of it.

    Raises:
        CniError: 7, naming the address and what the network has.
    """
    if network.type != TYPE:
        raise config.refused(
            "ipam", request.config["ipam"], f"network {network.name} has its own pool and is no overlay; leave it out"
        )
    from cni.ipam import static  # noqa: PLC0415 - for few requests, and each import is paid for by every cold process

    ips = static.parse(request).ips
    if not ips:
        wish = "add one that was taken from the network's pool, or leave ipam out"
        raise CniError(Code.INVALID_CONFIG, "invalid network config: $.ipam.addresses: there is no address", wish)
    for ip in ips:
        _check_address(ip, network)


def _check_address(ip: IPConfig, network: "pb.Network") -> None:
    interface = parsed.interface(ip.address)
    gateways = {parsed.interface(text).network: parsed.interface(text).ip for text in network.gateways}
    known = ", ".join(network.subnets)
    if interface.network not in gateways:
        raise _refused(ip.address, f"is not of network {network.name}", f"want one of {known}, with that length")
    gateway = gateways[interface.network]
    if interface.ip == gateway:
        raise _refused(ip.address, f"is the gateway of network {network.name}", "want an address of its pool")
    ends = (interface.network.network_address, interface.network[-1])
    if interface.version == 4 and interface.network.prefixlen < 31 and interface.ip in ends:
        raise _refused(ip.address, f"is none that an interface can have in {interface.network}", "want another")
    if ip.gateway and parsed.address(ip.gateway) != gateway:
        wish = f"network {network.name} has {gateway}, on every host; correct it or leave it out"
        raise _refused(ip.address, f"has the gateway {ip.gateway}", wish)


def _refused(address: str, why: str, wish: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: $.ipam: address {address} {why}", wish)


# MACs


def unexpected(ips: Iterable[IPConfig], mac: str, *, together: bool) -> list[str]:
    """Those of an interface's addresses, without lengths, whose MAC other hosts would take to be another than this.

    `together`: they are one allocation, and so have one MAC; else each of them is one.
    """
    addresses = [parsed.interface(ip.address).ip for ip in ips]
    own = macs.of_addresses(addresses) if together else ""
    return [str(address) for address in addresses if (own or macs.of_address(address)) != mac]


# The way to the others


@trace.step("overlay unknown")
def wait_until_known(look: Callable[[], T], knows: Callable[[T], bool], name: str) -> T:
    """What netd says once it knows the network `name`; not for ever: then what it says without."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        found = look()
        if knows(found):
            return found
        if time.monotonic() > deadline:
            note(
                f"ADD: network {name}: netd of this host does not know it after {READY_TIMEOUT_S:g} s; containers of "
                "other hosts are not reached before it does: `netloom doctor`"
            )
            return found
        time.sleep(_LOOK_INTERVAL_S)


@trace.step("overlay")
def wait_until_ready(host: Session, bridge: Link, network: "pb.Network") -> None:
    """Wait until netd has brought the network's VXLAN device up on the bridge; not for ever: that may come later."""
    name = device(network.vni)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        found = link.find(host, name)
        if found is not None and found.up and found.master == bridge.index:
            return
        if time.monotonic() > deadline:
            with trace.step("overlay not ready"):
                note(
                    f"ADD: network {network.name}: netd has not brought {name} up on bridge {bridge.name} within "
                    f"{READY_TIMEOUT_S:g} s; containers of other hosts are not reached before it does: `netloom doctor`"
                )
            return
        time.sleep(_LOOK_INTERVAL_S)


# CHECK and STATUS


def check(request: Request, host: Session, network: "pb.Network", result: Result, mtu: int) -> None:
    """Verify what an overlay asks of a container's interface and of the bridge, beyond what plugin bridge verifies.

    Args:
        request: its.
        host: the host's namespace.
        network: what ipamd knows of it.
        result: what ADD reported.
        mtu: the largest that the network carries; 0: not known.

    Raises:
        CniError: names the first thing that is wrong.
    """
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        eth = verify.container_link(inside, request, result, kind="veth")
    if mtu and eth.mtu > mtu:
        raise verify.broken(
            f"interface {eth.name} has the MTU {eth.mtu}, and network {network.name} carries {mtu}",
            f"ip link set {eth.name} mtu {mtu} in the container, or run DEL and ADD",
        )
    bridge = link.find(host, network.bridge)
    wanted = macs.of_addresses(parsed.interface(text).ip for text in network.gateways)
    if bridge is not None and bridge.mac != wanted:
        raise verify.broken(
            f"bridge {network.bridge} has the MAC {bridge.mac}; on every host the gateway's is {wanted}",
            f"ip link set {network.bridge} address {wanted}",
        )


def unknown_to_netd(name: str, *, runs: bool) -> CniError:
    """The error of STATUS for a network that netd of this host does not know.

    `runs`: it does know others.
    """
    if runs:
        wish = "netd learns of networks from etcd: is it connected (netloom doctor), and of this version?"
    else:
        wish = "start it: systemctl enable --now netloom-netd"
    what = "does not know it yet" if runs else "has never run here"
    return CniError(Code.NOT_AVAILABLE, f"overlay network {name} cannot be used now: netd {what}", wish)
