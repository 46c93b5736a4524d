"""Keeps the fast paths of the overlays that this host is on: which MAC is where, and which ports have a program.

What is on other hosts follows the entries of the bridge at once, in the same step; which ports there are is looked at a
moment after links change: a port gets its program when whoever made it had time to be done. What is not (yet) on the
fast path goes by the bridge.

A container is not on it
- whose traffic is limited, or that has any other queue or filter at its port: it would pass by these;
- whose port is isolated from others;
- whose MAC is not the one that its address stands for here, or that another port has, too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kernel import fastpath, link, qdisc
from kernel.errors import KernelError, NotFound
from kernel.fastpath import TUNNEL, Places
from kernel.leftovers import NETD_MARK
from kernel.link import Link
from kernel.session import Session
from netd.fabric.vxlan import device_name
from netd.found import Found
from netd.overlays import Overlays
from netd.values import BRIDGED, Key, Overlay
from telemetry import log

_logger = logging.getLogger("netd")

_AFTER_S = 1.0  # after links changed
_AGAIN_S = 3.0  # for ports that do not qualify yet
_TRIES = 5
_PORTS, _REST_S = 64, 0.05  # joined at once, and then
_LEAST, _MOST = 256, 1 << 17  # entries of a map


@dataclass(slots=True)
class _Path:
    """Of one overlay."""

    places: Places
    tunnel: int  # index of the tunnel's end
    here: dict[int, str] = field(default_factory=dict)  # port → MAC
    there: set[str] = field(default_factory=set)  # MACs on other hosts
    seen: dict[int, int] = field(default_factory=dict)  # ports that are not on it → how often they were looked at
    full: bool = False


class FastPath:
    """For the thread of the kernel. `due` says when `look` should be called, in time.monotonic()."""

    def __init__(self, session: Session, found: Found, overlays: Overlays, own: Callable[[], str]) -> None:
        """`own`: this host's name."""
        self._session = session
        self._found = found
        self._overlays = overlays
        self._own = own
        self._paths: dict[str, _Path] = {}
        self._by_device: dict[str, str] = {}
        self._refusal = self._logged = ""
        self._cleared = False
        self.enabled = True
        self.due = float("inf")

    def enable(self, enabled: bool) -> None:
        """Whether there are to be any."""
        self.enabled = enabled
        self.look_anew()

    def links_changed(self) -> None:
        """Some link came, went or changed."""
        if self.enabled and (self._paths or self._overlays.active()):
            self.due = min(self.due, time.monotonic() + _AFTER_S)

    def look_anew(self) -> None:
        """Whatever was seen before may be otherwise."""
        self._refusal = ""
        for path in self._paths.values():
            path.seen.clear()
        self.due = 0.0

    def synced(self, keys: Iterable[Key]) -> None:
        """The entries of these keys were put or dropped."""
        for key in keys:
            if key[0] == BRIDGED and (name := self._by_device.get(key[1])) is not None:
                path, mac = self._paths[name], key[2].decode()
                try:
                    self._follow(path, mac, there=self._found.get(key) is not None)
                except KernelError as error:
                    self._give_up(str(error))
                    return

    def look(self) -> None:
        """Bring ports and programs up to date."""
        self.due = float("inf")
        active = self._overlays.active() if self.enabled and not self._refusal else {}
        try:
            if not self.enabled and not self._cleared:
                fastpath.detach_all(self._session)  # an earlier netd's
                self._cleared = True
            for name in self._paths.keys() - active.keys():
                self._end(name)
            wanted = [one for one in self._overlays.defined() if one.name in active]
            queues = _queues(self._session) if wanted else {}
            for one in wanted:
                self._look_at(one, queues)
        except NotFound:  # a link that went meanwhile
            self.due = time.monotonic() + _AFTER_S
        except KernelError as error:
            self._give_up(str(error))

    def ports(self, network: str) -> int:
        """How many containers of this host are on a network's fast path."""
        path = self._paths.get(network)
        return len(path.here) if path is not None else 0

    def problem(self, network: str) -> str:
        """Why a network has none, or one that lacks somebody; "": nothing is wrong."""
        if self._refusal:
            return f"the kernel refuses the fast path: {self._refusal}"
        if (path := self._paths.get(network)) is not None and path.full:
            return "the fast path has no room for all containers; the others are reached by the bridge"
        return ""

    def made(self, devices: Iterable[str]) -> None:
        """These were made and are down: what would lose packets later is done now."""
        mine = {device_name(one.vni) for one in self._overlays.defined()} if self.enabled else set()
        for name in mine.intersection(devices):
            try:
                fastpath.prepare(self._session, self._found.indexes[name])
            except (KeyError, KernelError):  # it is told when the program comes
                continue

    # Inside

    def _look_at(self, one: Overlay, queues: Mapping[int, list[qdisc.Qdisc]]) -> None:
        bridge, tunnel = self._found.indexes.get(one.bridge), self._found.indexes.get(device_name(one.vni))
        path = self._paths.get(one.name)
        if path is not None and path.tunnel != tunnel:
            self._end(one.name)
            path = None
        if bridge is None or tunnel is None or not self._overlays.known(one.name):
            self.due = min(self.due, time.monotonic() + _AFTER_S)
            return
        first = path is None
        path = path or self._begin(one, tunnel)
        ports = {port.index: port for port in link.all_links(self._session, bridge) if port.index != tunnel}
        own = {holder.mac for holder in self._overlays.holders(one.name).values() if holder.node == self._own()}
        for index, mac in list(path.here.items()):
            if not _stays(ports.get(index), mac, own, queues):
                self._leave(path, index)
        path.seen = {index: count for index, count in path.seen.items() if index in ports}
        left = _PORTS
        for index, port in ports.items():
            if index in path.here:
                continue
            if not left:  # others wait for this thread, too
                self.due = min(self.due, time.monotonic() + _REST_S)
                break
            count = path.seen[index] = path.seen.get(index, 0) + 1
            if count > _TRIES:
                continue
            # An earlier netd's program knows what was.
            old = any(held.parent == qdisc.INGRESS for held in queues.get(index, ()))
            if count == 1 and not (first and old):
                self.due = min(self.due, time.monotonic() + _AFTER_S)
            elif self._join(path, port, own, queues):
                left -= 1
            else:
                self.due = min(self.due, time.monotonic() + _AGAIN_S)

    def _begin(self, one: Overlay, tunnel: int) -> _Path:
        room = sum(subnet.num_addresses for subnet in one.subnets)
        path = _Path(Places(min(max(_LEAST, 2 * room), _MOST)), tunnel)
        device = device_name(one.vni)
        try:
            for key in [key for key in self._found.entries if key[:2] == (BRIDGED, device)]:
                self._follow(path, key[2].decode(), there=True)
            mine = self._attach(tunnel, fastpath.load_inward(path.places))
        except KernelError:
            path.places.close()
            raise
        if not mine:
            path.places.close()
            raise KernelError(f"take the entrance of {device}", 0, "somebody else's filters are there")
        self._paths[one.name] = path
        self._by_device[device] = one.name
        return path

    def _end(self, name: str) -> None:
        path = self._paths.pop(name)
        self._by_device = {device: other for device, other in self._by_device.items() if other != name}
        for index in [path.tunnel, *path.here]:
            fastpath.detach(self._session, index)
        path.places.close()

    def _attach(self, index: int, program: int) -> bool:
        try:
            return fastpath.attach(self._session, index, program)
        finally:
            os.close(program)

    def _join(self, path: _Path, port: Link, own: set[str], queues: Mapping[int, list[qdisc.Qdisc]]) -> bool:
        """False: not yet."""
        if not _qualifies(port) or not _is_free(queues.get(port.index, [])):
            return False
        try:
            mac = link.other_end(self._session, port).mac
            if mac not in own or mac in path.there or mac in path.here.values():
                return False
            if not self._attach(port.index, fastpath.load_outward(path.places, path.tunnel, mac)):
                return False
        except NotFound:  # gone meanwhile
            return False
        path.full |= not path.places.put(mac, port.index)
        path.here[port.index] = mac
        path.seen.pop(port.index, None)
        return True

    def _leave(self, path: _Path, index: int) -> None:
        mac = path.here.pop(index)
        fastpath.detach(self._session, index)
        if mac not in path.there:
            path.places.drop(mac)

    def _follow(self, path: _Path, mac: str, *, there: bool) -> None:
        """A MAC is on another host, or is not any more."""
        if there:
            path.there.add(mac)
            path.full |= not path.places.put(mac, TUNNEL)
        elif mac in path.there:
            path.there.discard(mac)
            path.places.drop(mac)
            # Who has it now, here, is looked for.
            self.due = min(self.due, time.monotonic() + _AFTER_S)

    def _give_up(self, reason: str) -> None:
        """All goes by the bridge, until everything is looked at anew."""
        if reason != self._logged:
            log.event(_logger, "warning", "no fast path for overlays", error=reason)
        self._refusal = self._logged = reason
        for name in list(self._paths):
            try:
                self._end(name)
            except KernelError as error:
                log.event(_logger, "error", "a fast path cannot be taken away", network=name, error=str(error))


def _qualifies(port: Link) -> bool:
    return port.kind == "veth" and port.up and not port.isolated and port.peer_netnsid >= 0 and port.alias != NETD_MARK


def _stays(port: Link | None, mac: str, own: set[str], queues: Mapping[int, list[qdisc.Qdisc]]) -> bool:
    """Whether one that is on it stays."""
    held = queues.get(port.index, ()) if port is not None else ()
    entrance = any(one.parent == qdisc.INGRESS for one in held)  # without it, somebody took the program away
    return port is not None and _qualifies(port) and mac in own and entrance and _is_free(held)


def _is_free(held: Iterable[qdisc.Qdisc]) -> bool:
    """Whether nothing waits at a port's exit."""
    return all(one.parent == qdisc.INGRESS or one.handle == 0 for one in held)


def _queues(session: Session) -> dict[int, list[qdisc.Qdisc]]:
    """By the index of their link."""
    found: dict[int, list[qdisc.Qdisc]] = {}
    for one in qdisc.all_qdiscs(session):
        found.setdefault(one.index, []).append(one)
    return found
