"""Makes a plan's changes in the kernel, as many as possible in one system call, and keeps `Found` in step.

Nothing is raised for one entry: what the kernel refuses is returned, and all others are made. For one thread, which
never leaves the host's namespace (a sysctl and an ioctl are of the thread's).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from kernel import addr, bridgeport, fdb, link, neigh, route, sysctl, vxlan
from kernel.errors import Exists, KernelError, NotFound
from kernel.netlink import Message
from kernel.session import Session
from netd.found import ALIAS, PROTOCOL, Found
from netd.plan import Plan, needs_new_device
from netd.values import DEVICE, Address, Bridge, Bridged, Device, Entry, Forward, Neighbour, Port, Route, Underlay


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that the kernel did not take, and why."""

    entry: Entry
    reason: str
    exists: bool = False  # something foreign is in its place


def apply_devices(session: Session, found: Found, plan: Plan, late: Set[str]) -> tuple[list[Refusal], list[str]]:
    """The devices that are wanted, but none of `late` is brought up; what was refused, and the names of those that are
    new and so empty, or have changed, and lack neighbours if it was the MAC."""
    refusals: list[Refusal] = []
    touched: list[str] = []
    for want, have in plan.devices:
        try:
            if have is not None and not needs_new_device(want, have):
                up = want.up and want.name not in late
                vxlan.change(session, _spec(want), up=up, learning=have.learns)
                if have.up and not want.up:
                    link.set_down(session, found.indexes[want.name])
            else:
                if have is not None:
                    link.delete(session, want.name)
                    found.forget_device(want.name)
                for other in _in_the_way(found, want):
                    link.delete(session, other)
                    found.forget_device(other)
                vxlan.add(session, _spec(want), up=want.up and want.name not in late)
                found.fresh.add(want.name)
            _finish(want)
        except KernelError as error:
            refusals.append(_device_refusal(session, found, want, error))
        touched.append(want.name)
        found.read_device(session, want.name)
    return refusals, touched


def _in_the_way(found: Found, want: Device) -> list[str]:
    """Devices of ours with its VNI and port: somebody gave it another name."""
    others = (found.get((DEVICE, name, b"")) for name in found.indexes)
    return [one.name for one in others if isinstance(one, Device) and (one.vni, one.port) == (want.vni, want.port)]


def apply_bridges(session: Session, found: Found, plan: Plan) -> tuple[list[Refusal], list[str]]:
    """The bridges of overlays, as far as they are there; what was refused, and the names of those that were changed.

    With its MAC a link loses all neighbours, also permanent ones (net/core/neighbour.c, neigh_changeaddr).
    """
    refusals: list[Refusal] = []
    changed: list[str] = []
    for want, have in plan.put:
        index = found.indexes.get(want.device) if isinstance(want, Bridge) else None
        if not isinstance(want, Bridge) or index is None:
            continue
        try:
            if not isinstance(have, Bridge) or have.mac != want.mac:
                link.set_mac(session, index, want.mac)
            if want.up:
                link.set_up(session, index)
        except KernelError as error:
            refusals.append(Refusal(want, str(error)))
        found.read_bridge(session, want.device)
        changed.append(want.device)
    return refusals, changed


def apply_entries(session: Session, found: Found, plan: Plan, underlay: Underlay) -> list[Refusal]:
    """All but the devices that are wanted."""
    indexes = {**found.links(), underlay.link: underlay.index}
    refusals: list[Refusal] = []
    todo: list[tuple[Entry, Message, bool]] = []
    for want, have in plan.put:
        missing = next((name for name in _links_of(want) if name not in indexes), None)
        if missing is not None:
            refusals.append(Refusal(want, f"there is no link {missing}"))
        elif isinstance(want, Port):
            steps = bridgeport.messages(indexes[want.device], indexes[want.bridge], floods=want.flood)
            todo += [(want, message, True) for message in steps]
        else:
            if isinstance(want, Address) and want.prefix_route and want.interface.version == 6:
                with contextlib.suppress(KernelError):  # as the plugin does; what follows says what is wrong
                    sysctl.ensure("0", "ipv6", "conf", want.device, "disable_ipv6")
            todo.append((want, _put(want, indexes[_link_of(want)], exclusive=have is None), True))
    for have in plan.drop:
        index = indexes.get(_link_of(have), 0)
        if index:
            todo.append((have, _drop(have, index), False))
        else:
            found.drop(have.key)  # it went with its link
    refusals += _execute(session, found, todo)
    for device in plan.drop_devices:
        link.delete(session, device.name)
        found.forget_device(device.name)
    return refusals


def bring_up(session: Session, found: Found, names: Iterable[str]) -> list[Refusal]:
    """Devices on which everything is by now."""
    refusals = []
    for name in names:
        device = found.get((DEVICE, name, b""))
        if isinstance(device, Device):
            try:
                link.set_up(session, found.indexes[name])
                found.put(replace(device, up=True))
            except KernelError as error:
                refusals.append(Refusal(device, str(error)))
    return refusals


def _execute(session: Session, found: Found, todo: Sequence[tuple[Entry, Message, bool]]) -> list[Refusal]:
    refusals = []
    errors = session.rtnl.attempt([message for _entry, message, _wanted in todo])
    refused = set()
    for (entry, _message, wanted), error in zip(todo, errors, strict=True):
        if entry.key in refused:  # an earlier step of the same
            continue
        # A gateway's address may be a plugin's, which was faster.
        is_there = isinstance(error, Exists) and isinstance(entry, Address) and found.has_address(session, entry)
        if error is None or is_there or (not wanted and isinstance(error, NotFound)):
            if wanted:
                found.put(entry)
            else:
                found.drop(entry.key)
        else:
            refused.add(entry.key)
            if isinstance(entry, Port):  # its other step may have been taken
                found.drop(entry.key)
            refusals.append(Refusal(entry, str(error), isinstance(error, Exists)))
    return refusals


def _link_of(entry: Entry) -> str:
    return entry.name if isinstance(entry, Device) else entry.device


def _links_of(entry: Entry) -> list[str]:
    """The links that it needs."""
    return [_link_of(entry), *([entry.bridge] if isinstance(entry, Port) else [])]


def _put(entry: Entry, index: int, exclusive: bool) -> Message:
    if isinstance(entry, Route):
        one = _route(entry, index)
        # What replaces would take somebody else's route away, too: only where ours is known to be there.
        return route.add_message(one, exclusive=True) if exclusive else route.replace_message(one)
    if isinstance(entry, Neighbour):
        return neigh.set_message(neigh.Neighbour(index, entry.address, entry.mac))
    if isinstance(entry, Forward):
        return fdb.set_message(fdb.Forward(index, entry.mac, entry.dst))
    if isinstance(entry, Bridged):
        return fdb.set_bridged_message(fdb.Bridged(index, entry.mac))
    if isinstance(entry, Address):
        return addr.add_message(index, entry.interface, prefix_route=entry.prefix_route)
    raise TypeError(f"{entry} is no entry of a link")


def _drop(entry: Entry, index: int) -> Message:
    if isinstance(entry, Route):
        return route.delete_message(_route(entry, index))
    if isinstance(entry, Neighbour):
        return neigh.delete_message(neigh.Neighbour(index, entry.address, entry.mac))
    if isinstance(entry, Forward):
        return fdb.delete_message(fdb.Forward(index, entry.mac, entry.dst))
    if isinstance(entry, Bridged):
        return fdb.delete_bridged_message(fdb.Bridged(index, entry.mac))
    if isinstance(entry, Port):
        return bridgeport.leave_message(index)
    if isinstance(entry, Address):
        return addr.delete_message(index, entry.interface)
    raise TypeError(f"{entry} is no entry of a link")


def _route(entry: Route, index: int) -> route.Route:
    return route.Route(entry.dst, index, entry.gateway, protocol=PROTOCOL, onlink=entry.onlink)


def _spec(device: Device) -> vxlan.Vxlan:
    return vxlan.Vxlan(
        name=device.name,
        vni=device.vni,
        local=device.local,
        port=device.port,
        link=device.link,
        mac=device.mac,
        mtu=device.mtu,
        udp_checksum=device.udp_checksum,
        alias=ALIAS,
    )


def _finish(device: Device) -> None:
    if vxlan.tx_checksum(device.name) != device.tx_checksum:
        vxlan.set_tx_checksum(device.name, device.tx_checksum)
    # A peer that has no subnet of its own yet speaks from its underlay address: strict filtering would drop that. The
    # larger of this and "all" counts, and loose is the larger one (net/ipv4/fib_frontend.c, IN_DEV_RPFILTER).
    with contextlib.suppress(NotFound):
        sysctl.ensure("2", "ipv4", "conf", device.name, "rp_filter")


def _device_refusal(session: Session, found: Found, want: Device, error: KernelError) -> Refusal:
    if error.errno == errno.EOPNOTSUPP and found.get(want.key) is None:
        remedy = "load its module (modprobe vxlan), or use the backend host-gw; overlays need VXLAN"
        return Refusal(want, f"this kernel has no VXLAN; {remedy}")
    if not isinstance(error, Exists):
        return Refusal(want, str(error))
    if link.find(session, want.name) is not None:
        reason = f"there is a link {want.name} already that is not netd's; rename or delete it, or set another vni"
    else:
        reason = f"another VXLAN device has VNI {want.vni} on UDP port {want.port} already; set another vni or port"
    return Refusal(want, reason, exists=True)
