"""The container's end of an attachment, once for all interface plugins: its name, MAC, announcement and end."""

import os
from collections.abc import Sequence

from cni.errors import CniError, Code, shown
from cni.request import Request
from kernel import deleter, link, netns
from kernel.errors import NotFound
from kernel.link import Link
from kernel.session import Session, Visit
from telemetry import trace


def refuse_taken(request: Request, inside: Visit) -> None:
    """Refuse a second ADD before it touches what the first one made.

    Raises:
        CniError: 4, the container has an interface of that name.
    """
    if link.find(inside, request.ifname) is not None:
        raise taken(request.ifname)


def taken(ifname: str) -> CniError:
    """The error for a name that the container has already."""
    return CniError(
        Code.INVALID_ENVIRONMENT,
        f"CNI_IFNAME {ifname}: the container has an interface of that name already",
        "run DEL for it first, or choose another name",
    )


def wanted_mac(request: Request, configured: str = "") -> str:
    """The MAC that runtimeConfig, args.cni or CNI_ARGS ask for, else the configuration's; "" where none does.

    Args:
        request: whose.
        configured: the plugin's own key `mac`, where it has one.

    Raises:
        CniError: 4 or 7, it is none that an interface can have.
    """
    mac, where = request.mac("IP", "GATEWAY")  # those two are the IPAM plugin's
    if not mac:
        mac, where = configured, "$.mac"
    return usable_mac(mac, where) if mac else ""


def usable_mac(mac: str, where: str) -> str:
    """A MAC as the kernel spells it; `where` it stands is for the error.

    Raises:
        CniError: 7, it is none that an interface can have.
    """
    try:
        packed = link.packed_mac(mac.replace("-", ":"))
    except ValueError as error:
        wanted = "want six hexadecimal bytes, such as 02:42:0a:01:00:02"
        raise CniError(Code.INVALID_CONFIG, f"invalid MAC address at {where}: {shown(mac)}", wanted) from error
    if packed[0] & 1 or not any(packed):
        raise CniError(
            Code.INVALID_CONFIG,
            f"invalid MAC address at {where}: {mac} is a multicast or the zero address",
            "an interface needs a unicast one, such as 02:00:00:00:00:01",
        )
    return link.mac_text(packed)


def random_mac() -> str:
    """A locally administered, unicast MAC."""
    return link.mac_text(bytes([0x02, *os.urandom(5)]))


@trace.step("announce")
def announce(inside: Visit, eth: Link) -> None:
    """Gratuitous ARP and unsolicited neighbour advertisements for all addresses of the interface.

    The kernel sends both when a MAC is set, also to what it was (NETDEV_CHANGEADDR with arp_notify and ndisc_notify).
    A packet socket would do too, but closing one waits for RCU, some ten milliseconds.
    """
    link.set_mac(inside, eth.index, eth.mac)


def delete_interfaces(request: Request, host: Session, names: Sequence[str]) -> None:
    """Delete interfaces of the container; nothing to do where they, or their namespace, are gone."""
    try:
        with netns.opened(request.netns) as container, host.visit(container) as inside:
            for name in names:
                found = link.find(inside, name)
                if found is not None:
                    deleter.delete(inside, found)
    except (NotFound, netns.NotANamespace):
        return  # the namespace is gone, and the interface with it
