"""The loopback plugin: brings `lo` up in the container's namespace, whatever CNI_IFNAME says."""

from cni import check as verify
from cni.errors import CniError, Code
from cni.request import Request
from cni.result import Interface, IPConfig, Result
from cni.undo import Undo
from kernel import addr, link, netns
from kernel.errors import NotFound
from kernel.session import Session

_LO = "lo"


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Bring `lo` up. A prevResult is passed on unchanged, as the reference does.

    Raises:
        CniError: `lo` has an address that is no loopback address.
    """
    with netns.opened(request.netns) as container, host.visit(container) as inside:
        lo = link.get(inside, _LO)
        if not lo.up:
            undo.push("take lo down", lambda: _down(request, host))
            link.set_up(inside, lo.index)
        addresses = [address.interface for address in addr.all_addresses(inside, lo.index)]
    for address in addresses:
        if not address.ip.is_loopback:
            raise CniError(Code.INTERNAL, f"loopback interface found with non-loopback address {address}")
    if request.prev_result is not None:
        return request.prev_result
    # As the reference: at most one address of each family.
    firsts = [next((a for a in addresses if a.version == version), None) for version in (4, 6)]
    return Result(
        interfaces=(Interface(_LO, "00:00:00:00:00:00", request.netns),),
        ips=tuple(IPConfig(str(address), interface=0) for address in firsts if address is not None),
    )


def delete(request: Request, host: Session) -> None:
    """Take `lo` down; nothing to do where the namespace is gone."""
    if request.netns:
        _down(request, host)


def _down(request: Request, host: Session) -> None:
    try:
        with netns.opened(request.netns) as container, host.visit(container) as inside:
            link.set_down(inside, link.get(inside, _LO).index)
    except (NotFound, netns.NotANamespace):
        return


def check(request: Request, host: Session) -> None:
    """Verify that `lo` is up."""
    with netns.opened(request.netns) as container, host.visit(container) as inside:
        if not link.get(inside, _LO).up:
            raise verify.broken("loopback interface is down", "ip link set lo up, inside the container")


def gc(request: Request, host: Session) -> None:
    """Nothing of this plugin outlives its namespace."""


def status(request: Request, host: Session) -> None:
    """Ready as soon as it can be executed."""
