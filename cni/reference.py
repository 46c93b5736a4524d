"""Changing over from the reference plugins with containers running: what they left for an attachment goes with our DEL
and GC. The how is in kernel/reference.py; this file says what each of our plugins has to look for.

To be called where an attachment has no record of ours: what we attached, the reference has no part in.
"""

import contextlib
from ipaddress import ip_interface

from cni.chained import chain
from cni.failures import Failures
from cni.request import Request
from kernel import addr, leftovers, link, netns, reference
from kernel.errors import NotFound
from kernel.session import Session


def forget(request: Request, host: Session, failures: Failures) -> None:
    """Remove what the reference's plugin of this type left for the attachment."""
    owner = reference.Owner(request.network, request.container_id, request.ifname)
    if request.plugin in ("bridge", "ptp"):
        if not request.netns:
            failures.attempt(_delete_port, request, host)
        failures.attempt(reference.remove_masquerade, host, owner)
    if request.plugin == "bridge":
        failures.attempt(reference.remove_spoof_check, host, owner)
    if request.plugin == "portmap":
        failures.attempt(reference.remove_published, host, owner)
    if request.plugin == "firewall":
        failures.attempt(_forget_addresses, request, host)


def _delete_port(request: Request, host: Session) -> None:
    """Delete the host's end that the result names, where it still is that one: without the container's namespace there
    is no other way to it, and the container must not send any more from an address that is given back."""
    for known in chain.on_host(request.prev_result) if request.prev_result is not None else ():
        found = link.find(host, known.name)
        if found is not None and found.kind == "veth" and found.mac == known.mac.lower():
            leftovers.delete_port(host, known.name)


def _forget_addresses(request: Request, host: Session) -> None:
    """The rules name nothing but the address: the result's, or else those that the interface still has."""
    found = []
    if request.prev_result is not None:
        found = [ip_interface(ip.address).ip for ip in request.prev_result.ips]
    elif request.netns:
        with (
            contextlib.suppress(NotFound, netns.NotANamespace),
            netns.opened(request.netns) as sandbox,
            host.visit(sandbox) as inside,
        ):
            eth = link.get(inside, request.ifname)
            found = [one.interface.ip for one in addr.all_addresses(inside, eth.index)]
    reference.remove_accepted(host, (address for address in found if not address.is_link_local))


def collect(request: Request, host: Session, failures: Failures) -> None:
    """Remove what the reference's plugin of this type left for attachments of the network that the runtime does not
    know any more, as far as it can be told whose it is."""
    valid = {(attachment.container_id, attachment.ifname) for attachment in request.valid_attachments}
    if request.plugin in ("bridge", "ptp"):
        failures.attempt(reference.collect_masquerade, host, request.network, valid)
    if request.plugin == "bridge":
        failures.attempt(reference.collect_spoof_checks, host)
    if request.plugin == "portmap":
        failures.attempt(reference.collect_published, host, request.network, valid)
    if request.plugin == "firewall":
        failures.attempt(reference.collect_isolation, host)
