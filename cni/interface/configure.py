"""Give a container's interface its addresses and routes, once for all interface plugins.

Everything goes in one batch in this order: addresses, up, routes. The kernel works it off in order, so a route finds
the network of its gateway. What needs no address, which is half of the time, may be done before there is one:
`bring_up`. Duplicate address detection is off unless asked for: ipamd never gives an address twice, and detection takes
a second and more.
"""

import contextlib
import errno
import time
from collections.abc import Sequence

from cni import parsed
from cni.errors import CniError, Code
from cni.result import IPConfig, Result
from cni.result import Route as ResultRoute
from kernel import addr, link, route, sysctl
from kernel.errors import KernelError, NotFound
from kernel.netlink import Message
from kernel.session import Visit
from telemetry import trace

# A gateway that nothing leads to, a route or address for the second time, an address that no interface can have.
_NOT_POSSIBLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EEXIST, errno.EINVAL, errno.EADDRNOTAVAIL)
DAD_TIMEOUT_S = 5.0
_U32_MAX = 2**32 - 1


@trace.step("link up")
def bring_up(inside: Visit, ifname: str, index: int, *, dad: bool = False) -> None:
    """Bring the interface up, for `configure` to go on from there.

    Args:
        inside: the container's namespace.
        ifname: the interface's name there.
        index: and its index.
        dad: as for `configure`.
    """
    _set_sysctls(inside, ifname, dad=dad)
    inside.rtnl.execute([link.up_message(index)])


@trace.step("configure")
def configure(
    inside: Visit,
    ifname: str,
    index: int,
    result: Result,
    *,
    dad: bool = False,
    instead: Sequence[route.Route] | None = None,
    is_up: bool = False,
) -> None:
    """Add the result's addresses and routes to the interface and bring it up.

    Args:
        inside: the container's namespace.
        ifname: the interface's name there.
        index: and its index.
        result: all its addresses are taken for this interface.
        dad: let the kernel look for duplicates of IPv6 addresses, and wait for it.
        instead: routes to make before the result's, in place of the kernel's own ones to the addresses' networks;
            None leaves the kernel's.
        is_up: `bring_up` was there before.

    Raises:
        CniError: an IPv6 address is in use on the segment.
        KernelError: the kernel refused something.
    """
    interfaces = [parsed.interface(ip.address) for ip in result.ips]
    has_v6 = any(interface.version == 6 for interface in interfaces)
    if not is_up:
        _set_sysctls(inside, ifname, dad=dad)
    if has_v6:
        _switch_v6_on(inside, ifname)
    messages = [addr.add_message(index, one, dad=dad, prefix_route=instead is None) for one in interfaces]
    if not is_up:
        messages.append(link.up_message(index))
    routes = [route.add_message(one) for one in instead or ()]
    routes += [route.add_message(wanted_route(index, wish, result.ips)) for wish in result.routes]
    if not (dad and has_v6):
        _execute(inside, messages + routes)
        return
    _execute(inside, messages)
    _settle(inside, ifname, index)
    _execute(inside, routes)


def _execute(inside: Visit, messages: Sequence[Message]) -> None:
    """Run the messages; what the kernel will not have is IPAM's addresses and routes.

    Raises:
        CniError: 7, one cannot be.
        KernelError: anything else.
    """
    try:
        inside.rtnl.execute(messages)
    except KernelError as error:
        if error.errno not in _NOT_POSSIBLE or not error.operation.startswith(("add address", "add route")):
            raise
        wish = "correct the addresses or routes in $.ipam; a route's gateway must be in the network of an address"
        raise CniError(Code.INVALID_CONFIG, f"IPAM's wish was refused by the kernel: {error}", wish) from error


def wanted_route(index: int, wish: ResultRoute, ips: tuple[IPConfig, ...]) -> route.Route:
    """A route of the result as the kernel is to have it: without a gateway of its own it goes by the first one of its
    family, unless its scope says that the destination is on the link.

    Raises:
        CniError: 7, a value that no route can have.
    """
    dst = parsed.network(wish.dst)
    gateway = parsed.address(wish.gw) if wish.gw else None
    _check_route(wish, dst, gateway)
    if gateway is None and (wish.scope is None or wish.scope < route.SCOPE_LINK):
        gateway = first_gateway(ips, dst.version)
    return route.Route(
        dst=dst,
        index=index,
        gateway=gateway,
        priority=wish.priority,
        table=wish.table,
        scope=wish.scope,
        mtu=wish.mtu,
        advmss=wish.advmss,
    )


def _check_route(wish: ResultRoute, dst: route.AnyNetwork, gateway: route.AnyAddress | None) -> None:
    limits = {"mtu": _U32_MAX, "advmss": _U32_MAX, "priority": _U32_MAX, "table": _U32_MAX, "scope": 255}
    for key, limit in limits.items():
        value = getattr(wish, key)
        if value is not None and not 0 <= value <= limit:
            raise CniError(Code.INVALID_CONFIG, f"route to {dst}: {key}: wanted 0 to {limit}, found {value}")
    if gateway is not None and gateway.version != dst.version:
        raise CniError(Code.INVALID_CONFIG, f"route to {dst}: gateway {gateway} is of the other address family")


def first_gateway(ips: tuple[IPConfig, ...], version: int) -> route.AnyAddress | None:
    """The first gateway of a family among addresses, or None."""
    gateways = (parsed.address(ip.gateway) for ip in ips if ip.gateway)
    return next((gateway for gateway in gateways if gateway.version == version), None)


def _set_sysctls(inside: Visit, ifname: str, *, dad: bool) -> None:
    with inside.inside():
        # Neighbours learn at once where an address went (arp_notify: gratuitous ARP, ndisc_notify: unsolicited NA).
        sysctl.write("1", "ipv4", "conf", ifname, "arp_notify")
        with contextlib.suppress(NotFound):  # a kernel without IPv6
            sysctl.write("1", "ipv6", "conf", ifname, "ndisc_notify")
            sysctl.write("1" if dad else "0", "ipv6", "conf", ifname, "accept_dad")
            if dad:
                sysctl.write("1", "ipv6", "conf", ifname, "enhanced_dad")


def _switch_v6_on(inside: Visit, ifname: str) -> None:
    with inside.inside():
        try:
            # A runtime may have switched IPv6 off for the whole namespace (Docker does).
            sysctl.ensure("0", "ipv6", "conf", "lo", "disable_ipv6")
            sysctl.ensure("0", "ipv6", "conf", ifname, "disable_ipv6")
            sysctl.write("1", "ipv6", "conf", ifname, "keep_addr_on_down")
        except NotFound as error:
            raise CniError(
                Code.INVALID_CONFIG,
                "the pool gives an IPv6 address, but this kernel has IPv6 switched off",
                f"{error}; boot without ipv6.disable=1, or take the IPv6 range out of ipam",
            ) from error


def _settle(inside: Visit, ifname: str, index: int) -> None:
    """Wait until no IPv6 address is tentative any more."""
    deadline = time.monotonic() + DAD_TIMEOUT_S
    while True:
        addresses = addr.all_addresses(inside, index, 6)
        for address in addresses:
            if address.duplicate:
                raise CniError(
                    Code.ADDRESS_UNAVAILABLE,
                    f"IPv6 address {address.interface} of {ifname} is in use by another host on the segment",
                    "duplicate address detection failed; find the other host or exclude the address from the pool",
                )
        if not any(address.tentative for address in addresses):
            return
        if time.monotonic() > deadline:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                f"IPv6 addresses of {ifname} are still tentative after {DAD_TIMEOUT_S:.0f} s",
                "duplicate address detection does not end; is the bridge port forwarding?",
            )
        time.sleep(0.02)
