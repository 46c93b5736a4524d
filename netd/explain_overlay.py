"""The way to an address of an overlay's subnet: who holds it, and whether what leads there is in the kernel now.

Only the hosts that are on an overlay know its holders. Elsewhere, and before etcd has told them, the way is of kind
"unknown": whoever asked then asks etcd for the one holder, and `explain_held` says the rest.
"""

from __future__ import annotations

from dataclasses import replace

from kernel import fdb, link, route
from netd.fabric.vxlan import device_name
from netd.reconcile import Reconciler
from netd.values import BRIDGED, DEVICE, FORWARD, NEIGHBOUR, PORT, AnyAddress, Holder, Key, Overlay
from netd.way import Way, kernel_route, name_of, states

_ORDER = (DEVICE, PORT, NEIGHBOUR, BRIDGED, FORWARD)  # as a frame passes them


def explain_overlay(reconciler: Reconciler, overlay: Overlay, address: AnyAddress) -> Way:
    """Of an address in one of the overlay's subnets. Of kind "unknown" where the holder has to be asked for."""
    way = _common(reconciler, overlay, address)
    if address in overlay.gateways:
        return _gateway(reconciler, overlay, address, way)
    if reconciler.overlays.known(overlay.name):
        return explain_held(reconciler, way, address, reconciler.overlays.holders(overlay.name).get(address))
    return way


def explain_held(reconciler: Reconciler, way: Way, address: AnyAddress, holder: Holder | None) -> Way:
    """`way`, made for this address by `explain_overlay`, with what follows from who holds it; None: nobody does."""
    overlay = next((one for one in reconciler.overlays.defined() if one.name == way.network), None)
    if overlay is None:
        return replace(way, problems=(f"network {way.network} was deleted meanwhile",))
    if holder is None:
        return replace(way, kind="nobody", note="", problems=(f"nobody holds {address}: no container has it",))
    way = replace(way, node=holder.node, mac=holder.mac)
    if holder.node == reconciler.node.name:
        return _own(reconciler, overlay, way)
    return _remote(reconciler, overlay, way, holder)


def _common(reconciler: Reconciler, overlay: Overlay, address: AnyAddress) -> Way:
    here = overlay.name in reconciler.overlays.active()
    return Way(
        "unknown",
        network=overlay.name,
        backend="overlay",
        subnet=str(overlay.subnet_of(address) or ""),
        vni=overlay.vni,
        port=overlay.port,
        mtu=reconciler.overlays.mtu(overlay),
        bridge=overlay.bridge,
        note="" if here else f"no container of this host is on {overlay.name}, so nothing here leads to it",
        kernel=kernel_route(reconciler.session, address),
    )


def _gateway(reconciler: Reconciler, overlay: Overlay, address: AnyAddress, way: Way) -> Way:
    here = overlay.name in reconciler.overlays.active()
    way = replace(way, kind="gateway", node=reconciler.node.name if here else "", link=overlay.bridge if here else "")
    if not here:
        return replace(way, note=f"no container of this host is on {overlay.name}, so its gateway is not here")
    if not route.is_local(reconciler.session, address):
        why = (
            f"bridge {overlay.bridge} lacks the gateway {address}: it is put there for the first container of this host"
            " that has an address of its subnet"
        )
        return replace(way, problems=(why,))
    return way


def _own(reconciler: Reconciler, overlay: Overlay, way: Way) -> Way:
    """A container of this host; the bridge knows its port while it has heard of it lately."""
    session = reconciler.session
    bridge = link.find(session, overlay.bridge)
    if bridge is None:
        why = f"this host holds it, and has no bridge {overlay.bridge}: the container is being attached, or gone"
        return replace(way, kind="own", note="", problems=(why,))
    port = fdb.port_of(session, bridge.index, way.mac)
    name = name_of(session, port) if port else ""
    if name == device_name(overlay.vni):
        why = f"{overlay.bridge} sends {way.mac} into the tunnel, though this host has it"
        return replace(way, kind="own", note="", problems=(why,))
    return replace(way, kind="own", link=name)


def _remote(reconciler: Reconciler, overlay: Overlay, way: Way, holder: Holder) -> Way:
    overlays = reconciler.overlays
    outer, unreachable = overlays.outer(holder.node), overlays.unreachable(holder.node)
    problems = [f"{holder.address} is on {holder.node}, {unreachable}"] if unreachable else []
    if outer is None and not unreachable:
        peer = reconciler.peers.get(holder.node)
        down = f"{holder.node} is silent and does not answer: nothing leads there until it does"
        problems.append(down if peer is not None and peer.down else "this host has no underlay now")
    way = replace(way, kind="overlay", outer=str(outer or ""))
    if overlay.name not in overlays.active():
        return replace(way, problems=tuple(problems))
    if not overlays.known(overlay.name):
        problems.append(f"etcd has not told yet who is on {overlay.name}: nothing is made before it does")
    keys = overlays.keys_of(overlay.name) | overlays.keys_of(overlay.name, holder.address)
    wanted = [reconciler.desired.get(key) for key in sorted(keys, key=_order)]
    return replace(
        way,
        link=device_name(overlay.vni),
        entries=states(reconciler.session, [one for one in wanted if one is not None]),
        problems=(*problems, *reconciler.refusals(keys), *overlays.disputes(keys)),
    )


def _order(key: Key) -> int:
    return _ORDER.index(key[0])
