"""The way of a packet from this host to an address, and whether each entry of the kernel's that it needs is there.

What is there is looked up in the kernel at that moment, not in what netd remembers.
"""

from __future__ import annotations

from ipaddress import ip_network

from netd.desired import OWN
from netd.explain_overlay import explain_overlay
from netd.reconcile import Reconciler
from netd.values import (
    DEVICE,
    Address,
    AnyAddress,
    AnyNetwork,
    Device,
    Entry,
    Forward,
    Neighbour,
    Node,
    Route,
    route_key,
)
from netd.way import Way, kernel_route, states


def explain(reconciler: Reconciler, address: AnyAddress) -> Way:
    """Of one address."""
    session = reconciler.session
    kernel = kernel_route(session, address)
    own = _containing(reconciler.node.subnets, address)
    if own is not None:
        network = reconciler.network_of(own)
        return Way(
            "own",
            reconciler.node.name,
            network.name,
            network.backend,
            str(own),
            mtu=reconciler.mtu(network),
            kernel=kernel,
        )
    for peer in reconciler.peers.values():
        if address in peer.addresses:
            return Way("underlay", peer.name, kernel=kernel, mtu=reconciler.underlay.mtu if reconciler.underlay else 0)
    for overlay in reconciler.overlays.defined():
        if overlay.subnet_of(address) is not None:
            return explain_overlay(reconciler, overlay, address)
    held = [
        (subnet.prefixlen, peer, subnet)
        for peer in reconciler.peers.values()
        if (subnet := _containing(peer.subnets, address)) is not None
    ]
    if not held:
        return Way("elsewhere", kernel=kernel)
    _length, peer, subnet = max(held, key=lambda one: one[0])
    return _to_peer(reconciler, peer, subnet, kernel)


def _to_peer(reconciler: Reconciler, peer: Node, subnet: AnyNetwork, kernel: str) -> Way:
    session = reconciler.session
    network = reconciler.network_of(subnet)
    desired = reconciler.desired
    wanted = desired.get(route_key(subnet))
    entries: list[Entry] = []
    device = forward = None
    if isinstance(wanted, Route):
        device = desired.get((DEVICE, wanted.device, b""))
        if isinstance(device, Device):
            entries.append(device)
            entries += [
                one
                for key in sorted(desired.keys_of(OWN))
                if isinstance(one := desired.get(key), Address) and one.device == device.name
                and one.interface.version == subnet.version
            ]  # fmt: skip
            theirs = [desired.get(key) for key in sorted(desired.keys_of(peer.name))]
            entries += [one for one in theirs if isinstance(one, Neighbour) and one.address == wanted.gateway]
            forward = next((one for one in theirs if isinstance(one, Forward) and one.device == device.name), None)
            entries += [forward] if forward is not None else []
        entries.append(wanted)
    return Way(
        kind="peer",
        node=peer.name,
        network=network.name,
        backend=network.backend,
        subnet=str(subnet),
        link=wanted.device if isinstance(wanted, Route) else "",
        next_hop=str(wanted.gateway) if isinstance(wanted, Route) and wanted.gateway is not None else "",
        outer=str(forward.dst) if isinstance(forward, Forward) else "",
        vni=device.vni if isinstance(device, Device) else 0,
        port=device.port if isinstance(device, Device) else 0,
        mtu=reconciler.mtu(network),
        entries=states(session, entries),
        kernel=kernel,
        problems=tuple(reconciler.problems_of(peer.name)),
    )


def _containing(subnets: tuple[AnyNetwork, ...], address: AnyAddress) -> AnyNetwork | None:
    """The smallest subnet with this address."""
    single = ip_network(address)
    held = [one for one in subnets if one.version == address.version and single.subnet_of(one)]  # type: ignore[arg-type]
    return max(held, key=lambda one: one.prefixlen, default=None)
