"""What Status and the metrics say of overlays. Reads memory only; in the thread for the kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from operator import attrgetter

from netd.fabric.vxlan import device_name
from netd.reconcile import Reconciler
from netd.values import Holder, Overlay
from protos.node.v1 import node_pb2 as pb

_SOME = 3
_NODE = attrgetter("node")


def overlay_messages(reconciler: Reconciler, peer_state: Callable[[str], str]) -> list[pb.Overlay]:
    """Of every overlay, by name. `peer_state`: of a host's name, as Status has it."""
    return [_message(reconciler, one, peer_state) for one in reconciler.overlays.defined()]


def holders_by_place(reconciler: Reconciler) -> dict[str, int]:
    """How many addresses containers hold of the overlays that this host is on: "here" and on "other" hosts."""
    overlays, own = reconciler.overlays, reconciler.node.name
    held = Counter(map(_NODE, chain.from_iterable(overlays.holders(name).values() for name in overlays.active())))
    here = held.pop(own, 0)
    return {"here": here, "other": held.total()}


def _message(reconciler: Reconciler, overlay: Overlay, peer_state: Callable[[str], str]) -> pb.Overlay:
    overlays = reconciler.overlays
    by_node: dict[str, list[Holder]] = {}
    for holder in overlays.holders(overlay.name).values():
        by_node.setdefault(holder.node, []).append(holder)
    keys = overlays.all_keys(overlay.name)
    hosts = [_host(reconciler, name, held, peer_state) for name, held in sorted(by_node.items())]
    return pb.Overlay(
        name=overlay.name,
        subnets=map(str, overlay.subnets),
        vni=overlay.vni,
        bridge=overlay.bridge,
        device=device_name(overlay.vni),
        port=overlay.port,
        mtu=overlays.mtu(overlay),
        flood=overlay.flood,
        internal=overlay.internal,
        here=overlay.name in overlays.active(),
        known=overlays.known(overlay.name),
        addresses=sum(map(len, by_node.values())),
        containers=sum(one.containers for one in hosts),
        hosts=hosts,
        wanted=len(keys),
        present=sum(reconciler.found.get(key) == reconciler.desired.get(key) for key in keys),
        fast_path=reconciler.fast.enabled,
        fast=reconciler.fast.ports(overlay.name),
        fast_problem=reconciler.fast.problem(overlay.name),
        problems=[*reconciler.refusals(keys), *overlays.problems(overlay.name), *overlays.disputes(keys)],
    )


def _host(reconciler: Reconciler, name: str, held: list[Holder], peer_state: Callable[[str], str]) -> pb.OverlayHost:
    own = name == reconciler.node.name
    return pb.OverlayHost(
        name=name,
        outer="" if own else str(reconciler.overlays.outer(name) or ""),
        state="here" if own else peer_state(name) if name in reconciler.peers else "unknown",
        addresses=len(held),
        containers=len({one.mac for one in held}),
        some=[
            pb.OverlayHolder(address=str(one.address), mac=one.mac)
            for one in sorted(held, key=lambda one: (one.address.version, int(one.address)))[:_SOME]
        ],
    )
