"""Keeps the fast paths of the overlays that this host is on: which MAC is where, and which ports have a program.

What is on other hosts follows the entries of the bridge at once, in the same step; which ports there are is looked at a
moment after links change: a port gets its program when whoever made it had time to be done. What is not (yet) on the
fast path goes by the bridge.

A container is not on it
- whose traffic is limited, or that has any other queue or filter at its port: it would pass by these;
- whose port is isolated from others;
- whose MAC is not the one that its address stands for here, or that the bridge knows at another port, or another port
  has, too: a container may set its MAC as it likes.

What is for another host leaves as it will be on the wire, past the tunnel's end and the host's netfilter, where that is
the same in the end: see `_outer`, kernel/encapsulate.py, and netd/vouch.py for how long.

Programs that an earlier netd left know what was then: those that this one does not take over are taken away.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from kernel import fastpath, fdb, link, macs, qdisc, route
from kernel.encapsulate import Outer
from kernel.errors import KernelError, NotFound
from kernel.fastpath import TUNNEL, Places
from kernel.leftovers import NETD_MARK
from kernel.link import Link
from kernel.outgoing import Sent
from kernel.session import Session
from kernel.vxlan import OVERHEAD_IPV4
from netd.fabric.vxlan import device_name
from netd.found import Found
from netd.overlays import Overlays
from netd.values import BRIDGED, DEVICE, FORWARD, AnyAddress, Device, Forward, Key, Overlay
from netd.vouch import Vouch
from telemetry import log

_logger = logging.getLogger("netd")

_AFTER_S = 1.0  # after links changed
_AGAIN_S = 3.0  # for ports that do not qualify yet
_TRIES = 5
_CHECKED, _REST_S = 16, 0.05  # looked at closely at once, and then
# Ports join for so long, but one at least, and then others have their turn: the first program of a port waits for RCU,
# 20 to 90 ms, and each later one is some 8 ms of work.
_JOIN_S, _JOIN_REST_S = 0.03, 0.1
_MAC_CHARACTERS = 17
_ROUTES = 64  # that are looked at when it is vouched for what they carry: some 30 µs each
_LEAST, _MOST = 256, 1 << 17  # entries of a map


@dataclass(slots=True)
class _Path:
    """Of one overlay."""

    places: Places
    bridge: int  # index
    tunnel: int  # index of the tunnel's end
    device: str  # its name
    outer: Outer | None  # None: all that is for other hosts goes through the tunnel's end
    sent: Sent | None  # the same for who looks at rules
    here: dict[int, str] = field(default_factory=dict)  # port → MAC
    there: dict[str, IPv4Address | None] = field(default_factory=dict)  # MACs on other hosts → at which of them
    seen: dict[int, int] = field(default_factory=dict)  # ports that are not on it → how often they were looked at
    unsure: set[int] = field(default_factory=set)  # ports that are on it and are to be looked at closely
    full: bool = False

    def fits(self, mac: str, index: int) -> bool:
        """Whether no other port, and no other host, has the MAC."""
        return mac not in self.there and all(mac != other for at, other in self.here.items() if at != index)


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
        self._anew = False
        self._earlier: set[int] | None = None  # links that may have a program of an earlier netd; None: not known yet
        self._foreign: set[str] = set()  # networks at whose tunnel's end somebody else has filters
        self._vouch = Vouch(session)
        self._mtus: dict[
            IPv4Address, int
        ] = {}  # what routes to hosts say, 0: nothing; the first was asked for longest ago
        self._simple = False  # this kernel takes no programs that write outer headers
        self.enabled = True
        self._look_at_s = self._check_at_s = self._vouch_at_s = float("inf")

    @property
    def due(self) -> float:
        """When `look` is to be called."""
        return min(self._look_at_s, self._check_at_s, self._vouch_at_s)

    def enable(self, enabled: bool) -> None:
        """Whether there are to be any."""
        self.enabled = enabled
        self.look_anew()

    def links_changed(self) -> None:
        """Some link came, went or changed."""
        if self.enabled and (self._paths or self._overlays.active()):
            self._look_at_s = min(self._look_at_s, time.monotonic() + _AFTER_S)

    def look_anew(self) -> None:
        """Whatever was seen before may be otherwise."""
        self._refusal = ""
        self._anew = True
        self._mtus.clear()
        for path in self._paths.values():
            path.seen.clear()
            path.unsure = {path.tunnel, *path.here}
        self._check_at_s = 0.0
        self._look_at_s = 0.0

    def synced(self, keys: Iterable[Key]) -> None:
        """The entries of these keys were put or dropped."""
        for key in keys:
            if key[0] not in (BRIDGED, FORWARD) or len(key[2]) != _MAC_CHARACTERS:
                continue
            if (name := self._by_device.get(key[1])) is not None:
                try:
                    self._follow(self._paths[name], key[2].decode())
                except KernelError as error:
                    self._give_up(str(error))
                    return

    def look(self) -> None:
        """Bring ports and programs up to date, as far as that is due."""
        try:
            if time.monotonic() >= self._look_at_s:
                self._look()
            if time.monotonic() >= self._check_at_s:
                self._check()
            if time.monotonic() >= self._vouch_at_s:
                self._look_at_routes()
                packets = frozenset(path.sent for path in self._paths.values() if path.sent is not None)
                self._vouch_at_s = time.monotonic() + self._vouch.look(packets)
        except NotFound:  # a link that went meanwhile
            self._look_at_s = time.monotonic() + _AFTER_S
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
        if network in self._foreign:
            return "there is no fast path: somebody else's filters are at the entrance of the tunnel's end"
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

    def _look(self) -> None:
        self._look_at_s = float("inf")
        active = self._overlays.active() if self.enabled and not self._refusal else {}
        if not self.enabled and not self._cleared:
            fastpath.detach_all(self._session)  # an earlier netd's
            self._cleared = True
        for name in self._paths.keys() - active.keys():
            self._end(name)
        if self._anew:
            self._compare()
        wanted = [one for one in self._overlays.defined() if one.name in active]
        queues = _queues(self._session) if wanted else {}
        if wanted and self._earlier is None:
            self._earlier = {index for index, held in queues.items() if _has_entrance(held)}
        self._foreign.clear()
        done = [self._look_at(one, queues) for one in wanted]
        if done and all(done):
            self._sweep()

    def _look_at(self, one: Overlay, queues: Mapping[int, list[qdisc.Qdisc]]) -> bool:
        """False: there is more to do."""
        bridge, tunnel = self._found.indexes.get(one.bridge), self._found.indexes.get(device_name(one.vni))
        path = self._paths.get(one.name)
        outer, sent = self._outer(device_name(one.vni), queues.get(tunnel or 0, ()))
        if path is not None and (path.tunnel, path.bridge, path.outer, path.sent) != (tunnel, bridge, outer, sent):
            self._end(one.name)
            path = None
        if bridge is None or tunnel is None or not self._overlays.known(one.name):
            self._look_at_s = min(self._look_at_s, time.monotonic() + _AFTER_S)
            return False
        path = path or self._begin(one, bridge, tunnel, outer, sent)
        if path is None:
            return True
        ports = {port.index: port for port in link.all_links(self._session, bridge) if port.index != tunnel}
        own = {holder.mac for holder in self._overlays.holders(one.name).values() if holder.node == self._own()}
        own -= set(map(macs.of_address, one.gateways))
        for index, mac in list(path.here.items()):
            if not _stays(ports.get(index), mac, own, queues):
                self._leave(path, index)
        path.seen = {index: count for index, count in path.seen.items() if index in ports}
        return self._join_all(path, ports, own, queues)

    def _join_all(
        self, path: _Path, ports: Mapping[int, Link], own: set[str], queues: Mapping[int, list[qdisc.Qdisc]]
    ) -> bool:
        """False: there are more."""
        until, earlier = time.monotonic() + _JOIN_S, self._earlier or set()
        for index, port in ports.items():
            if index in path.here:
                continue
            if time.monotonic() >= until:  # others wait for this thread, too
                self._look_at_s = min(self._look_at_s, time.monotonic() + _JOIN_REST_S)
                return False
            count = path.seen[index] = path.seen.get(index, 0) + 1
            if count > _TRIES:
                continue
            if count == 1 and index not in earlier:
                self._look_at_s = min(self._look_at_s, time.monotonic() + _AFTER_S)
                continue
            joined = self._join(path, port, own, queues)
            if not joined:
                self._look_at_s = min(self._look_at_s, time.monotonic() + _AGAIN_S)
                if index in earlier:
                    fastpath.detach(self._session, index)
            earlier.discard(index)
        return True

    def _check(self) -> None:
        """Look closely at some that are on it."""
        self._check_at_s = float("inf")
        left = _CHECKED
        for name, path in list(self._paths.items()):
            path.unsure &= {path.tunnel, *path.here}
            while path.unsure:
                if not left:
                    self._check_at_s = time.monotonic() + _REST_S
                    return
                left -= 1
                index = path.unsure.pop()
                if self._is_alone(path, index):
                    continue
                if index == path.tunnel:
                    self._look_at_s = 0.0
                    self._end(name)
                    break
                self._look_at_s = min(self._look_at_s, time.monotonic() + _AGAIN_S)
                self._leave(path, index)

    def _is_alone(self, path: _Path, index: int) -> bool:
        """Whether ours is still the only filter at a link, and the MAC of a port there; of neither an event tells."""
        if (mac := path.here.get(index)) and fdb.port_of(self._session, path.bridge, mac) not in (0, index):
            return False
        return fastpath.state(self._session, index) == "ours"

    def _compare(self) -> None:
        """What was missed of what is on other hosts: a step that failed in its middle, or events that were lost."""
        self._anew = False
        for device, name in self._by_device.items():
            path = self._paths[name]
            there = {key[2].decode() for key in self._found.entries if key[:2] == (BRIDGED, device)}
            for mac in path.there.keys() | there:
                self._follow(path, mac)

    def _sweep(self) -> None:
        """Take an earlier netd's programs from links that are on no path."""
        used = {index for path in self._paths.values() for index in (path.tunnel, *path.here)}
        for index in (self._earlier or set()) - used:
            fastpath.detach(self._session, index)
        self._earlier = set()

    def _outer(self, device: str, queues: Iterable[qdisc.Qdisc]) -> tuple[Outer | None, Sent | None]:
        """What a program at a port can write before a frame, in the place of the tunnel's end; None where only that can
        do it, or somebody has a queue there."""
        one = self._found.get((DEVICE, device, b""))
        if self._simple or not isinstance(one, Device) or not isinstance(one.local, IPv4Address) or not one.link:
            return None, None
        if one.udp_checksum or not one.tx_checksum or not _is_free(queues):
            return None, None
        try:
            under = link.by_index(self._session, one.link)
            until = self._vouch.until()
        except KernelError:
            return None, None
        if not under.ethernet:
            return None, None
        outer = Outer(under.index, one.local, one.vni, one.port, one.mtu, until)
        return outer, Sent(under.name, one.local, one.port)

    def _begin(self, one: Overlay, bridge: int, tunnel: int, outer: Outer | None, sent: Sent | None) -> _Path | None:
        if fastpath.state(self._session, tunnel) == "foreign":
            self._foreign.add(one.name)
            return None
        room = sum(subnet.num_addresses for subnet in one.subnets)
        device = device_name(one.vni)
        path = _Path(Places(min(max(_LEAST, 2 * room), _MOST)), bridge, tunnel, device, outer, sent)
        try:
            for key in [key for key in self._found.entries if key[:2] == (BRIDGED, device)]:
                self._follow(path, key[2].decode())
            if not self._attach(tunnel, fastpath.load_inward(path.places)):
                raise NotFound(f"take the entrance of {device}", 0, "it changed meanwhile")
        except KernelError:
            path.places.close()
            raise
        self._paths[one.name] = path
        self._by_device[device] = one.name
        self._vouch_at_s = 0.0
        return path

    def _end(self, name: str) -> None:
        path = self._paths.pop(name)
        if self._earlier is not None:  # they need not wait, should there be one again
            self._earlier.update(path.here)
        self._by_device = {device: other for device, other in self._by_device.items() if other != name}
        try:
            for index in [path.tunnel, *path.here]:
                fastpath.detach(self._session, index)
        except KernelError:
            path.places.clear()  # programs that stay do nothing
            raise
        finally:
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
            if mac not in own or not path.fits(mac, port.index):
                # One of the two that have it is not whom it belongs to, maybe the one that is on it.
                path.unsure.update(index for index, other in path.here.items() if other == mac)
                self._check_at_s = 0.0
                return False
            if fdb.port_of(self._session, path.bridge, mac) not in (0, port.index):
                return False
            if not self._attach(port.index, self._program(path, mac)):
                return False
        except NotFound:  # gone meanwhile
            return False
        path.here[port.index] = mac
        path.full |= not path.places.put(mac, port.index)
        path.seen.pop(port.index, None)
        return True

    def _program(self, path: _Path, mac: str) -> int:
        if path.outer is not None:
            try:
                return fastpath.load_outward(path.places, path.tunnel, mac, path.outer)
            except KernelError as error:
                log.event(_logger, "info", "packets of tunnels go out through netfilter", reason=str(error))
                self._simple = True
                path.outer = path.sent = None
        return fastpath.load_outward(path.places, path.tunnel, mac)

    def _leave(self, path: _Path, index: int) -> None:
        mac = path.here.pop(index)
        if mac not in path.there:
            path.places.drop(mac)
        fastpath.detach(self._session, index)

    def _follow(self, path: _Path, mac: str) -> None:
        """A MAC is on another host, is on yet another, or is not any more."""
        there = self._found.get((BRIDGED, path.device, mac.encode())) is not None
        if there:
            forward = self._found.get((FORWARD, path.device, mac.encode()))
            at = self._host(path, forward.dst) if isinstance(forward, Forward) else None
            if mac not in path.there or path.there[mac] != at:
                path.there[mac] = at
                path.full |= not path.places.put(mac, TUNNEL, at)
        elif mac in path.there:
            del path.there[mac]
            path.places.drop(mac)
            # Who has it now, here, is looked for.
            self._look_at_s = min(self._look_at_s, time.monotonic() + _AFTER_S)

    def _host(self, path: _Path, address: AnyAddress) -> IPv4Address | None:
        """Where programs may send packets for this host to; None: they leave it to the tunnel's end, which heeds the
        MTU of a route, as they do not (net/ipv4/route.c, ip_mtu_from_fib_result)."""
        if path.outer is None or not isinstance(address, IPv4Address):
            return None
        if address not in self._mtus:
            self._mtus[address] = self._mtu_to(address)
        mtu = self._mtus[address]
        return address if not mtu or mtu >= path.outer.mtu + OVERHEAD_IPV4 else None

    def _mtu_to(self, address: IPv4Address) -> int:
        found = route.look_up(self._session, address)
        return found.mtu if found is not None else 0

    def _look_at_routes(self) -> None:
        """A few at a time, round and round."""
        changed = False
        for address in list(self._mtus)[:_ROUTES]:
            before = self._mtus.pop(address)
            self._mtus[address] = self._mtu_to(address)
            changed |= self._mtus[address] != before
        if changed:
            for path in self._paths.values():
                for mac in list(path.there):
                    self._follow(path, mac)

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
        try:
            fastpath.detach_all(self._session)  # also an earlier netd's: nobody tells them what changes
            self._earlier = set()
        except KernelError as error:
            log.event(_logger, "error", "programs of the fast path cannot be taken away", error=str(error))
            self._earlier = None


def _qualifies(port: Link) -> bool:
    return port.kind == "veth" and port.up and not port.isolated and port.peer_netnsid >= 0 and port.alias != NETD_MARK


def _stays(port: Link | None, mac: str, own: set[str], queues: Mapping[int, list[qdisc.Qdisc]]) -> bool:
    """Whether one that is on it stays."""
    held = queues.get(port.index, ()) if port is not None else ()
    # Without an entrance, somebody took the program away.
    return port is not None and _qualifies(port) and mac in own and _has_entrance(held) and _is_free(held)


def _has_entrance(held: Iterable[qdisc.Qdisc]) -> bool:
    """Whether a program may see what enters a port."""
    return any(one.parent == qdisc.INGRESS for one in held)


def _is_free(held: Iterable[qdisc.Qdisc]) -> bool:
    """Whether nothing waits at a port's exit."""
    return all(one.parent == qdisc.INGRESS or one.handle == 0 for one in held)


def _queues(session: Session) -> dict[int, list[qdisc.Qdisc]]:
    """By the index of their link."""
    found: dict[int, list[qdisc.Qdisc]] = {}
    for one in qdisc.all_qdiscs(session):
        found.setdefault(one.index, []).append(one)
    return found
