"""What CHECK verifies, once for all plugins. Each function raises CniError on the first thing that is wrong."""

from collections.abc import Iterable
from ipaddress import ip_interface, ip_network

from cni.errors import CniError, Code
from cni.interface.configure import wanted_route
from cni.request import Request
from cni.result import Interface, Result
from kernel import addr, link, nft, route
from kernel.link import Link
from kernel.session import Session, Visit

# What the kernel makes of larger ones (net/ipv4/metrics.c, ip_metrics_convert).
_LARGEST_MTU, _LARGEST_ADVMSS = 65535 - 15, 65535 - 40


def broken(what: str, remedy: str = "") -> CniError:
    """The error of a failed CHECK. The specification has no code of its own for it."""
    return CniError(Code.INTERNAL, f"CHECK: {what}", remedy)


def required_result(request: Request) -> Result:
    """The prevResult, which CHECK cannot do without.

    Raises:
        CniError: 7, there is none.
    """
    if request.prev_result is None:
        raise CniError(
            Code.INVALID_CONFIG, "required prevResult missing", "CHECK compares with what ADD reported; pass it on"
        )
    return request.prev_result


def container_link(inside: Visit, request: Request, result: Result, *, kind: str, up: bool = True) -> Link:
    """The container's interface, compared with what ADD reported of it."""
    known = next((i for i in result.interfaces if i.name == request.ifname and i.sandbox), None)
    if known is None:
        raise broken(f"prevResult has no interface {request.ifname} with a sandbox")
    if known.sandbox != request.netns:
        raise broken(f"prevResult has {request.ifname} in sandbox {known.sandbox}, but CNI_NETNS is {request.netns}")
    found = link.find(inside, request.ifname)
    if found is None:
        raise broken(f"interface {request.ifname} is gone from the container")
    if found.kind != kind:
        raise broken(f"interface {request.ifname} is of kind {found.kind or 'device'}, not {kind}")
    if known.mac and known.mac.lower() != found.mac:
        raise broken(f"interface {request.ifname} has the MAC {found.mac}; ADD reported {known.mac}")
    if up and not found.up:
        raise broken(f"interface {request.ifname} of the container is down", f"ip link set {request.ifname} up")
    return found


def addresses(inside: Visit, request: Request, eth: Link, result: Result) -> None:
    """Every address that the result gives to this interface is on it."""
    present = {address.interface for address in addr.all_addresses(inside, eth.index)}
    for ip in result.ips:
        if not _belongs(ip.interface, result.interfaces, request):
            continue
        if ip_interface(ip.address) not in present:
            raise broken(f"interface {request.ifname} lacks the address {ip.address}")


def _belongs(index: int | None, interfaces: tuple[Interface, ...], request: Request) -> bool:
    if index is None or not 0 <= index < len(interfaces):
        return False
    return interfaces[index].name == request.ifname and bool(interfaces[index].sandbox)


def routes(inside: Visit, eth: Link, result: Result) -> None:
    """Every route of the result is there. Metrics and scope are compared only where the result names them."""
    for version in (4, 6):
        wishes = [wish for wish in result.routes if ip_network(wish.dst, strict=False).version == version]
        if not wishes:
            continue
        present: dict[object, list[route.Route]] = {}
        for one in route.all_routes(inside, version):
            present.setdefault(one.dst, []).append(one)
        for wish in wishes:
            wanted = wanted_route(eth.index, wish, result.ips)
            if not any(_matches(wanted, found) for found in present.get(wanted.dst, ())):
                via = f" via {wanted.gateway}" if wanted.gateway is not None else ""
                raise broken(f"the route to {wanted.dst}{via} on {eth.name} is gone")


def _matches(wanted: route.Route, found: route.Route) -> bool:
    return (
        (found.dst, found.gateway, found.index) == (wanted.dst, wanted.gateway, wanted.index)
        and (not wanted.table or found.table == wanted.table)
        and (not wanted.priority or found.priority == wanted.priority)
        and (not wanted.mtu or found.mtu == min(wanted.mtu, _LARGEST_MTU))
        and (not wanted.advmss or found.advmss == min(wanted.advmss, _LARGEST_ADVMSS))
    )


def elements(host: Session, wanted: Iterable[nft.Element]) -> None:
    """Every nftables element that the attachment wants is in its set."""
    for element in wanted:
        if not nft.holds(host, element):
            raise broken(
                f"nftables set {element.set} of table {element.family} {nft.TABLE} lacks {' . '.join(element.key)}",
                "run `netloom gc --rebuild`",
            )
