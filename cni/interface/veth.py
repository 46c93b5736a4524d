"""The host's end of a veth pair, once for the plugins that make one.

Rules of this file
- The record is on disk before the kernel is touched; from it DEL and GC know what there is without asking anybody.
- Names of host ends are random, so whatever has the name in a record is that attachment's.
"""

import errno
import os
import time
from collections.abc import Iterable

from cni import attachment, config, delegate, parsed
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.interface import container
from cni.request import Request
from cni.result import IPConfig
from cni.undo import Undo
from kernel import leftovers, link, nft, paths, sysctl
from kernel.errors import KernelError, NotFound
from kernel.link import Link, VethSpec
from kernel.record import Record, Records
from kernel.session import Session, Visit
from telemetry import trace

_TRIES = 10
_CARRIER_TIMEOUT_S = 5.0
_FORWARDING = {4: ("ipv4", "ip_forward"), 6: ("ipv6", "conf", "all", "forwarding")}


def check_masquerade_backend(backend: str) -> None:
    """Refuse what is no backend. Which one is asked for makes no difference: it is nftables.

    Raises:
        CniError: 7.
    """
    if backend not in ("", "iptables", "nftables"):
        raise config.refused("ipMasqBackend", backend, 'want "nftables" or leave it out')


def masquerade(request: Request, ips: Iterable[IPConfig]) -> tuple[list[nft.Element], list[nft.Element]]:
    """The elements that let the traffic of the addresses leave under the host's: the attachment's own, and those that
    all attachments of the network share."""
    interfaces = [parsed.interface(ip.address) for ip in ips]
    own = [nft.masquerade(str(interface.ip), attachment.owner(request)) for interface in interfaces]
    return own, [nft.no_masquerade(str(interface.network)) for interface in interfaces]


# ADD


@trace.step("look")
def clear_the_way(request: Request, host: Session, records: Records, inside: Visit) -> None:
    """Refuse a second ADD; remove what an ADD left that nobody undid.

    Raises:
        CniError: 4, the container has an interface of that name.
    """
    container.refuse_taken(request, inside)
    left = records.read(attachment.key(request))
    if left is not None:
        leftovers.discard(host, records, left)


def free_name(host: Session) -> str:
    """A name for the host's end, as the reference makes them."""
    for _ in range(_TRIES):
        name = f"veth{os.urandom(4).hex()}"
        if link.find(host, name) is None:
            return name
    raise CniError(Code.INTERNAL, f"no free name for the host's end of a veth pair after {_TRIES} tries")


@trace.step("veth")
def make(host: Session, spec: VethSpec, undo: Undo, master: int = 0) -> None:
    """Make the pair; `undo` deletes it.

    Raises:
        CniError: 7, no veth can have that MTU.
    """
    undo.push(f"delete link {spec.name}", lambda: leftovers.delete_port(host, spec.name))
    try:
        link.add_veth(host, spec, master)
    except KernelError as error:
        if error.errno != errno.EINVAL or not spec.mtu:
            raise
        raise refused_mtu(spec.mtu, error) from error
    # Routers among the containers do not decide over this host's routes.
    try_sysctl("0", "ipv6", "conf", spec.name, "accept_ra")


def refused_mtu(mtu: int, error: KernelError) -> CniError:
    """The error for an MTU that no veth or bridge can have."""
    return config.refused("mtu", mtu, f"was refused by the kernel, which takes 68 to 65535 ({error})")


@trace.step("carrier")
def wait_for_carrier(host: Session, name: str) -> Link:
    """The host's end once packets pass; on the kernels of today at the first look."""
    deadline = time.monotonic() + _CARRIER_TIMEOUT_S
    while True:
        port = link.get(host, name)
        if port.operstate == link.OPER_UP:
            return port
        if time.monotonic() > deadline:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                f"host's end {name} has no carrier after {_CARRIER_TIMEOUT_S:.0f} s (operstate {port.operstate})",
                "look at both ends with `ip -d link`",
            )
        time.sleep(0.001)


@trace.step("forwarding")
def forward(versions: Iterable[int]) -> None:
    """Let the host forward packets of these families, 4 and 6."""
    for version in set(versions):
        sysctl.ensure("1", *_FORWARDING[version])


def forwarded(versions: Iterable[int]) -> set[int]:
    """Those of the families whose packets the host forwards already."""
    return {version for version in set(versions) if sysctl.read(*_FORWARDING[version]) == "1"}


def try_sysctl(value: str, *parts: str) -> None:
    """Set a sysctl of IPv6 where this kernel has IPv6."""
    try:
        sysctl.ensure(value, *parts)
    except NotFound:
        return


# DEL and GC


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do.

    Everything is attempted, but for what must not go before the link; the first failure is raised at the end, so that
    the runtime tries again.
    """
    records = Records(paths.run_dir(request.environment))
    record = records.read(attachment.key(request))
    gone: list[str] = []
    with Failures() as failures:
        if record is not None:
            for name in record.links:
                failures.attempt(_delete_port, host, name, gone)
        if request.netns and not gone and (record is not None or not records.elsewhere(attachment.key(request))):
            # Where the host's end was not known: the record is lost, or another engine made it. But not where the name
            # is another network's: runtimes send a DEL after an ADD that was refused for just that.
            failures.attempt(container.delete_interfaces, request, host, (request.ifname,))
        if failures.any and (record is None or any(link.find(host, name) for name in record.links)):
            return  # connected still: it keeps its addresses, and the record by which the next DEL finds it
        if record is not None:
            failures.attempt(records.remove, host, record)
        else:
            from cni import reference  # noqa: PLC0415 - what we attached ourselves has nothing of it

            reference.forget(request, host, failures)
        # After the link: nobody may get the address while a container can still send from it.
        if request.ipam_type:
            failures.attempt(delegate.delete, request, host)


def _delete_port(host: Session, name: str, gone: list[str]) -> None:
    if leftovers.delete_port(host, name):
        gone.append(name)


def collect(request: Request, host: Session, failures: Failures) -> list[Record]:
    """Remove what attachments left that the runtime does not know any more, then let the IPAM plugin do the same.

    Returns:
        The records that the network had.
    """
    from cni import reference  # noqa: PLC0415 - GC alone needs it

    found = attachment.collect(request, host, failures)
    reference.collect(request, host, failures)
    if request.ipam_type:
        failures.attempt(delegate.gc, request, host)
    return found
