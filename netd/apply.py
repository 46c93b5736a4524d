"""Makes a plan's changes in the kernel, as many as possible in one system call, and keeps `Found` in step.

Nothing is raised for one entry: what the kernel refuses is returned, and all others are made. For one thread, which
never leaves the host's namespace (a sysctl and an ioctl are of the thread's).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from kernel import addr, fdb, link, neigh, route, sysctl, vxlan
from kernel.errors import Exists, KernelError, NotFound
from kernel.netlink import Message
from kernel.session import Session
from netd.found import ALIAS, PROTOCOL, Found
from netd.plan import Plan, needs_new_device
from netd.values import Address, Device, Entry, Forward, Neighbour, Route, Underlay


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that the kernel did not take, and why."""

    entry: Entry
    reason: str
    exists: bool = False  # something foreign is in its place


def apply_devices(session: Session, found: Found, plan: Plan) -> tuple[list[Refusal], list[str]]:
    """The devices that are wanted; what was refused, and the names of those that are new and so empty."""
    refusals: list[Refusal] = []
    made: list[str] = []
    for want, have in plan.devices:
        try:
            if have is not None and not needs_new_device(want, have):
                vxlan.change(session, _spec(want))
            else:
                if have is not None:
                    link.delete(session, want.name)
                    found.forget_device(want.name)
                vxlan.add(session, _spec(want))
                made.append(want.name)
                found.fresh.add(want.name)
            _finish(want)
        except KernelError as error:
            refusals.append(_device_refusal(session, want, error))
        found.read_device(session, want.name)
    return refusals, made


def apply_entries(session: Session, found: Found, plan: Plan, underlay: Underlay) -> list[Refusal]:
    """All but the devices that are wanted."""
    indexes = {**found.links(), underlay.link: underlay.index}
    refusals: list[Refusal] = []
    todo: list[tuple[Entry, Message, bool]] = []
    for want, have in plan.put:
        index = indexes.get(_device_of(want), 0)
        if index:
            todo.append((want, _put(want, index, exclusive=have is None), True))
        else:
            refusals.append(Refusal(want, f"there is no link {_device_of(want)}"))
    for have in plan.drop:
        index = indexes.get(_device_of(have), 0)
        if index:
            todo.append((have, _drop(have, index), False))
        else:
            found.drop(have.key)  # it went with its link
    refusals += _execute(session, found, todo)
    for device in plan.drop_devices:
        link.delete(session, device.name)
        found.forget_device(device.name)
    return refusals


def _execute(session: Session, found: Found, todo: Sequence[tuple[Entry, Message, bool]]) -> list[Refusal]:
    refusals = []
    errors = session.rtnl.attempt([message for _entry, message, _wanted in todo])
    for (entry, _message, wanted), error in zip(todo, errors, strict=True):
        if error is None or (not wanted and isinstance(error, NotFound)):
            if wanted:
                found.put(entry)
            else:
                found.drop(entry.key)
        else:
            refusals.append(Refusal(entry, str(error), isinstance(error, Exists)))
    return refusals


def _device_of(entry: Entry) -> str:
    return entry.name if isinstance(entry, Device) else entry.device


def _put(entry: Entry, index: int, exclusive: bool) -> Message:
    if isinstance(entry, Route):
        one = _route(entry, index)
        # What replaces would take somebody else's route away, too: only where ours is known to be there.
        return route.add_message(one, exclusive=True) if exclusive else route.replace_message(one)
    if isinstance(entry, Neighbour):
        return neigh.set_message(neigh.Neighbour(index, entry.address, entry.mac))
    if isinstance(entry, Forward):
        return fdb.set_message(fdb.Forward(index, entry.mac, entry.dst))
    if isinstance(entry, Address):
        return addr.add_message(index, entry.interface, prefix_route=False)
    raise TypeError(f"{entry} is no entry of a link")


def _drop(entry: Entry, index: int) -> Message:
    if isinstance(entry, Route):
        return route.delete_message(_route(entry, index))
    if isinstance(entry, Neighbour):
        return neigh.delete_message(neigh.Neighbour(index, entry.address, entry.mac))
    if isinstance(entry, Forward):
        return fdb.delete_message(fdb.Forward(index, entry.mac, entry.dst))
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


def _device_refusal(session: Session, want: Device, error: KernelError) -> Refusal:
    if error.errno == errno.EOPNOTSUPP:
        return Refusal(want, "this kernel has no VXLAN; load its module (modprobe vxlan), or use the backend host-gw")
    if not isinstance(error, Exists):
        return Refusal(want, str(error))
    if link.find(session, want.name) is not None:
        reason = f"there is a link {want.name} already that is not netd's; rename or delete it, or set another vni"
    else:
        reason = f"another VXLAN device has VNI {want.vni} on UDP port {want.port} already; set another vni or port"
    return Refusal(want, reason, exists=True)
