"""What chained plugins need of the result that they were given, once for all of them. Pure."""

from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

from cni.errors import CniError, Code
from cni.request import Request
from cni.result import Interface, Result

AnyInterface = IPv4Interface | IPv6Interface


def previous(request: Request) -> Result:
    """The result of the plugins before this one.

    Raises:
        CniError: 7, there is none: the plugin stands alone, or first in its list.
    """
    if request.prev_result is None:
        raise CniError(
            Code.INVALID_CONFIG,
            "required prevResult missing: must be called as chained plugin",
            f"put {request.plugin} after the plugin that makes the interface, in the `plugins` of a .conflist",
        )
    return request.prev_result


def in_container(request: Request, result: Result) -> Interface | None:
    """The container's interface: the one of CNI_IFNAME with a sandbox, else the first with a sandbox."""
    inside = [interface for interface in result.interfaces if interface.sandbox]
    named = [interface for interface in inside if interface.name == request.ifname]
    return next(iter(named or inside), None)


def on_host(result: Result) -> list[Interface]:
    """The interfaces without a sandbox, in the result's order: a bridge comes before its port."""
    return [interface for interface in result.interfaces if not interface.sandbox]


def container_ips(result: Result) -> Sequence[AnyInterface]:
    """The addresses of the container, with prefix length. One without an interface counts: results of old versions
    have none. One of a host's interface does not. Each counts once."""
    found: dict[object, AnyInterface] = {}
    for ip in result.ips:
        if (
            ip.interface is None
            or not 0 <= ip.interface < len(result.interfaces)
            or result.interfaces[ip.interface].sandbox
        ):
            one = ip_interface(ip.address)
            found.setdefault(one.ip, one)
    return list(found.values())
