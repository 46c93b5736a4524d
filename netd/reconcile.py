"""Wanted, found, plan, apply: the work of netd's one thread, step by step. What calls it when is netd/agent.py.

Rules of this file
- A peer's change costs what that peer has; an event costs what it is about. Only `full` reads everything.
- Nobody's failure stops the others: what cannot be done is a problem in words, kept until it can.
- A device that is not wanted any more stays for LINGER_S: peers whose backend is changed a moment later still send to
  it. What goes out takes the new way at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from kernel import link, route, sysctl
from kernel.announce import Announcer
from kernel.errors import KernelError, NotFound
from kernel.rtevents import AddressChange, Change, LinkChange
from kernel.session import Session
from netd.apply import Refusal, apply_bridges, apply_devices, apply_entries, bring_up
from netd.desired import OWN, Desired
from netd.fabric.base import Place, UnreachableError
from netd.fabric.registry import BACKENDS
from netd.fastpath import FastPath
from netd.found import Found
from netd.overlays import Overlays, is_bridges_own, is_owner
from netd.plan import Plan, plan
from netd.underlay import Choice, UnderlayError, choose
from netd.values import (
    BRIDGE,
    DEVICE,
    FORWARD,
    PORT,
    AnyAddress,
    AnyNetwork,
    Device,
    Entry,
    Key,
    Network,
    Node,
    Overlay,
    Route,
    Underlay,
)
from telemetry import log

LINGER_S = 30.0

_logger = logging.getLogger("netd")


@dataclass(slots=True)
class Counts:
    """Since the start."""

    full: int = 0
    changes: int = 0  # entries put or dropped
    repairs: int = 0  # of these, because somebody else had changed them
    full_s: float = 0.0  # how long the last full one took
    last_change: float = 0.0  # time.time() of it, 0: none yet


@dataclass(slots=True)
class _Lingering:
    deadlines: dict[Key, float] = field(default_factory=dict)

    def expired(self, now: float) -> list[Key]:
        return [key for key, deadline in self.deadlines.items() if deadline <= now]

    def next_s(self, now: float) -> float | None:
        return max(0.0, min(self.deadlines.values()) - now) if self.deadlines else None


class Reconciler:
    """Keeps the kernel as it should be. For one thread, in the host's network namespace."""

    def __init__(self, session: Session, node: Node, choice: Choice, networks: Sequence[Network]) -> None:
        self.session = session
        self.choice = choice
        self.node = node
        self.networks = tuple(networks)
        self.peers: dict[str, Node] = {}
        self.underlay: Underlay | None = None
        self.found = Found()
        self.desired = Desired()
        self.overlays = Overlays(self.desired, self.found, self._rival)
        self.fast = FastPath(session, self.found, self.overlays, lambda: self.node.name)
        self.counts = Counts()
        self.settled = False  # whether there was a full one
        self.may_drop = True  # False while it is not known yet who the peers are: nothing is taken away
        self._places: tuple[Place, ...] = ()
        self._problems: dict[tuple[str, str], str] = {}
        self._refused: dict[Key, Refusal] = {}
        self._lingering = _Lingering()
        self._holders: dict[AnyAddress, dict[str, None]] = {}  # in the order in which they came
        self._new: set[Key] = set()
        self._announcer: Announcer | None = None
        self._tell_active: Callable[[Mapping[str, int]], None] = lambda _: None
        self._told_active: Mapping[str, int] = {}

    # What is wanted

    def configure(self, node: Node, choice: Choice, networks: Sequence[Network]) -> None:
        """Other networks, or another self. Takes effect with the next `full`."""
        if choice != self.choice:
            self.underlay = None
        self.node, self.choice, self.networks = node, choice, tuple(networks)

    def define_overlays(self, overlays: Sequence[Overlay]) -> None:
        """These are all overlays. Takes effect with the next `full`."""
        self.overlays.define(overlays)

    def on_active(self, tell: Callable[[Mapping[str, int]], None]) -> None:
        """Have it told, in this thread, which overlays this host is on, now and whenever that changes; see `active`."""
        self._tell_active, self._told_active = tell, self.overlays.active()
        tell(self._told_active)

    def put_peer(self, peer: Node) -> set[Key]:
        """A peer is new or has changed; the keys to be synced."""
        before = self.peers.get(peer.name)
        self.peers[peer.name] = peer
        others = self._file(before, peer)
        if self.underlay is None:
            return set()
        keys = self._want(peer).union(*(self._want(self.peers[name]) for name in others))
        if before is None or (before.addresses, before.down) != (peer.addresses, peer.down):
            keys |= self.overlays.peer_changed(peer.name)
        return keys.union(*(self.overlays.peer_changed(name) for name in others))

    def drop_peer(self, name: str) -> set[Key]:
        """A peer is gone; the keys to be synced."""
        others = self._file(self.peers.pop(name, None), None)
        self._clear_problems(name)
        changed = self.desired.remove(name) if name in self.desired.owners() else set()
        changed |= self.overlays.peer_changed(name)
        if self.underlay is None:
            return set()
        changed = changed.union(*(self._want(self.peers[other]) for other in others))
        return changed.union(*(self.overlays.peer_changed(other) for other in others))

    def problems(self) -> list[str]:
        """What is not as it should be, in words."""
        found = list(self._problems.values())
        for key, owners in self.desired.disputes():
            if key[0] == FORWARD and is_owner(owners[0]):
                continue  # see below
            found.append(f"{' and '.join(owners)} claim the same subnet or tunnel end: {_shown(self.desired, key)}")
        found += self.refusals(self._refused.keys())
        return found + self.overlays.problems() + self.overlays.disputes()

    def problems_of(self, name: str) -> list[str]:
        """Those of one peer."""
        found = [text for (owner, _network), text in self._problems.items() if owner == name]
        return found + self.refusals(self.desired.keys_of(name))

    def refusals(self, keys: Set[Key]) -> list[str]:
        """Why the kernel did not take these, as far as it did not; but what follows from a device that it refused."""
        refused = ((key, one) for key, one in self._refused.items() if key in keys)
        return [one.reason for key, one in refused if not self._lacks_device(one.entry)]

    def mtu(self, network: Network) -> int:
        """The largest packet of a network's containers; 0 while there is no underlay."""
        return next((BACKENDS[one.network.backend].mtu(one) for one in self._places if one.network is network), 0)

    def network_of(self, subnet: AnyNetwork) -> Network:
        """Where a subnet belongs: the first network that holds it, else the one without subnets of its own."""
        named = next((one for one in self.networks if one.subnets and one.holds(subnet)), None)
        return named or next(one for one in self.networks if not one.subnets)

    # What is done

    def full(self) -> int:
        """Read everything, and make it as it should be; how many entries had to be changed."""
        began = time.monotonic()
        self.found.read(self.session)
        before = self.underlay
        try:
            self.underlay = choose(self.session, self.choice, before)
            self._problems.pop((OWN, "underlay"), None)
        except (UnderlayError, KernelError) as error:
            # What is there may still work, and what leads nowhere harms nobody: nothing is withdrawn.
            self._problems[OWN, "underlay"] = str(error)
            return 0
        places = tuple(self._place(network) for network in self.networks)
        if places != self._places or before is None:  # of hosts that came without an underlay nothing is wanted yet
            self._places = places
            self._want_all()
        self._forward()
        self.overlays.place(self.underlay, self.node, self.peers, anew=before is None)
        self._note_active()
        changed = self.sync({*self.desired.keys(), *self.found.entries})
        self.fast.look_anew()
        self.settled = True
        self.counts.full += 1
        self.counts.full_s = time.monotonic() - began
        return changed

    def sync(self, keys: Iterable[Key]) -> int:
        """Make the entries of these keys as they should be; how many had to be changed."""
        todo = set(keys)
        if self.underlay is None or not todo:
            return 0
        for key in todo:
            self._refused.pop(key, None)
        devices = plan((key for key in todo if key[0] == DEVICE), self.desired.get, self.found.get)
        late = {want.name for want, have in devices.devices if self._comes_up_late(want, have)}
        refusals, made = apply_devices(self.session, self.found, devices, late)
        bridges = plan((key for key in todo if key[0] == BRIDGE), self.desired.get, self.found.get)
        refused, changed_bridges = apply_bridges(self.session, self.found, bridges)
        refusals += refused
        if made or changed_bridges:
            todo.update(key for key in tuple(self.desired.keys()) if self._is_on(key, {*made, *changed_bridges}))
        # Once more from here: what was on a device went with it.
        rest = plan((key for key in todo if key[0] not in (DEVICE, BRIDGE)), self.desired.get, self.found.get)
        # What is on a device that is not wanted any more stays as long as that, and goes with it: without an address of
        # its own a link takes nothing whose way back is another (net/ipv4/fib_frontend.c, __fib_validate_source).
        drop = [one for one in rest.drop if self._goes(one)]
        going = Plan([], rest.put, drop, self._outstayed(devices.drop_devices) if self.may_drop else [])
        refusals += apply_entries(self.session, self.found, going, self.underlay)
        refusals += bring_up(self.session, self.found, late)
        for one in refusals:
            self._refused[one.entry.key] = self._explained(one)
        self.fast.synced(todo)
        changed = (
            len(devices.devices)
            + len(changed_bridges)
            + len(going.put)
            + len(going.drop)
            + len(going.drop_devices)
            - len(refusals)
        )
        if changed > 0:
            self.counts.changes += changed
            self.counts.last_change = time.time()
        return changed

    def note(self, changes: Iterable[Change]) -> set[Key] | None:
        """Take over what events tell: the keys that are not as they should be, or None where `full` is due."""
        dirty: set[Key] = set()
        for change in changes:
            if isinstance(change, LinkChange):
                self.fast.links_changed()
            if self._note_bridge(change):
                continue
            keys = None if self._shakes(change) else self.found.note(self.session, change)
            if keys is None:
                return None
            dirty |= keys
        return {key for key in dirty if self._differs(key)}

    def take_new(self) -> set[Key]:
        """Keys of what is wanted since an overlay's bridge came or went, to be synced now."""
        new, self._new = self._new, set()
        return new

    def announce(self) -> None:
        """Tell this host's containers whose MAC is another: what they keep of it leads nowhere, for up to a minute."""
        for one in self.overlays.take_news():
            try:
                self._announcer = self._announcer or Announcer()
                self._announcer.send(one.device, one.address, one.mac)
            except KernelError as error:  # they ask again, later
                log.event(_logger, "warning", "containers are not told of another's new MAC", error=str(error))

    def refused(self) -> set[Key]:
        """What the kernel did not take, to be tried again."""
        return set(self._refused)

    def outstayed(self) -> list[Key]:
        """Devices that were kept for a while and are to go now."""
        return self._lingering.expired(time.monotonic())

    def next_s(self) -> float | None:
        """When `outstayed` has something, in seconds; None: never."""
        return self._lingering.next_s(time.monotonic())

    def watched(self) -> frozenset[int]:
        """The links whose neighbours and forwarding entries matter."""
        return frozenset(self.found.indexes.values())

    def has_tunnels(self) -> bool:
        """Whether this host has every tunnel's end that it should have."""
        wanted = [key for key in self.desired.keys_of(OWN) if key[0] == DEVICE]
        return bool(wanted) and all(self.found.get(key) is not None for key in wanted)

    # Inside

    def _differs(self, key: Key) -> bool:
        want, have = self.desired.get(key), self.found.get(key)
        return want != have and not (want is None and is_bridges_own(have))

    def _lacks_device(self, entry: Entry) -> bool:
        """Whether it is on a device that the kernel refused."""
        key = _device_key(entry)
        return not isinstance(entry, Device) and key in self._refused and self.found.get(key) is None

    def _comes_up_late(self, want: Device, have: Device | None) -> bool:
        """Whether a tunnel's end is to pass nothing before all else is there: one that is a port."""
        return want.up and not (have is not None and have.up) and self.desired.get((PORT, want.name, b"")) is not None

    def _goes(self, entry: Entry) -> bool:
        """Whether an entry that is not wanted is to go now."""
        overlays = self.overlays.may_drop(entry)
        if overlays is not None:
            return overlays and self.may_drop  # who the holders are may be known before where their hosts are
        return self.may_drop and (isinstance(entry, Route) or self.desired.get(_device_key(entry)) is not None)

    def _note_bridge(self, change: Change) -> bool:
        """Whether it was an overlay's bridge that came or went; `new` has what follows."""
        if not isinstance(change, LinkChange):
            return False
        before = self.found.name_of(change.index)
        before = before if before in self.found.bridges else ""
        after = change.name if change.name in self.found.bridges and not change.gone else ""
        if before == after:
            return False
        if before:  # it may have another name now
            self.found.forget_device(before)
        if after:
            self.found.read_bridge(self.session, after)
        self._new |= self.overlays.bridges_changed()
        self._note_active()
        return True

    def _note_active(self) -> None:
        active = self.overlays.active()
        if active != self._told_active:
            self._told_active = active
            self._tell_active(active)

    def _place(self, network: Network) -> Place:
        if self.underlay is None:
            raise UnderlayError("there is no underlay")
        subnets = tuple(one for one in self.node.subnets if self.network_of(one) is network)
        return Place(network, self.node, subnets, self.underlay)

    def _want_all(self) -> None:
        entries: list[Entry] = []
        for place in self._places:
            entries += BACKENDS[place.network.backend].own(place)
        self.desired.replace(OWN, entries)
        gone = [one for one in self.desired.owners() if one != OWN and one not in self.peers and not is_owner(one)]
        for name in gone:
            self.desired.remove(name)
        for peer in self.peers.values():
            self._want(peer)

    def _want(self, peer: Node) -> set[Key]:
        """What leads to a peer; problems with it are kept."""
        self._clear_problems(peer.name)
        by_network: dict[str, list[AnyNetwork]] = {}
        for subnet in peer.subnets:
            overlapping = next((one for one in self.node.subnets if one.overlaps(subnet)), None)
            if overlapping is not None:
                self._problems[peer.name, str(subnet)] = (
                    f"{peer.name} claims {subnet}, and {overlapping} is this host's own: give one of them another"
                )
            else:
                by_network.setdefault(self.network_of(subnet).name, []).append(subnet)
        if rival := self._rival(peer):
            self._problems[peer.name, "address"] = (
                f"{peer.name} claims the underlay address of {rival}, and nothing leads there: give one of them"
                " another, or remove the one that is gone (netloom node remove)"
            )
            by_network.clear()
        entries: list[Entry] = []
        for place in self._places:
            subnets = by_network.get(place.network.name)
            if subnets:
                try:
                    entries += BACKENDS[place.network.backend].towards(place, peer, subnets)
                except UnreachableError as error:
                    self._problems[peer.name, place.network.name] = str(error)
        return self.desired.replace(peer.name, entries)

    def _rival(self, peer: Node) -> str:
        """Who had one of the peer's underlay addresses before it, with the address; "" where nobody has."""
        for address in peer.addresses:
            if self.underlay is not None and address in self.underlay.public:
                return f"this host, {self.node.name}: {address}"
            first = next(iter(self._holders.get(address, ())), peer.name)
            if first != peer.name:
                return f"{first}: {address}"
        return ""

    def _file(self, before: Node | None, after: Node | None) -> set[str]:
        """Note who has which underlay address; the others that have one of those that changed hands."""
        old, new = set(before.addresses if before else ()), set(after.addresses if after else ())
        others: set[str] = set()
        for address in old ^ new:
            holders = self._holders.setdefault(address, {})
            if address in new and after is not None:
                holders[after.name] = None
            elif before is not None:
                holders.pop(before.name, None)
            others.update(holders)
            if not holders:
                del self._holders[address]
        return others - {one.name for one in (before, after) if one is not None}

    def _clear_problems(self, owner: str) -> None:
        for key in [key for key in self._problems if key[0] == owner]:
            del self._problems[key]

    def _is_on(self, key: Key, devices: Set[str]) -> bool:
        entry = self.desired.get(key)
        return entry is not None and not isinstance(entry, Device) and entry.device in devices

    def _outstayed(self, devices: Sequence[Device]) -> list[Device]:
        """Those that were not wanted for long enough; the others stay for a while."""
        now = time.monotonic()
        settled = [
            key
            for key in self._lingering.deadlines
            if self.desired.get(key) is not None or self.found.get(key) is None  # somebody else deleted it
        ]
        for key in settled:
            del self._lingering.deadlines[key]
        gone = []
        for device in devices:
            if self.overlays.may_go(device.name):
                gone.append(device)
            elif self._lingering.deadlines.setdefault(device.key, now + LINGER_S) <= now:
                del self._lingering.deadlines[device.key]
                gone.append(device)
        return gone

    def _shakes(self, change: Change) -> bool:
        """Whether an event of a link that is not ours means that everything has to be looked at."""
        if not isinstance(change, LinkChange | AddressChange):
            return False
        if self.underlay is None or (OWN, "underlay") in self._problems:
            return True  # it may have come: under its name, with another index
        if change.index != self.underlay.index:
            return False
        if isinstance(change, AddressChange) or change.gone or not change.up:
            return True
        try:
            found = link.by_index(self.session, change.index)
        except NotFound:
            return True
        return (found.name, found.mtu) != (self.underlay.link, self.underlay.mtu)

    def _forward(self) -> None:
        """The host passes on what is for its containers."""
        versions = {one.version for node in (self.node, *self.peers.values()) for one in node.subnets}
        try:
            if 4 in versions:
                sysctl.ensure("1", "ipv4", "ip_forward")
            if 6 in versions and self.underlay is not None:
                conf = ("ipv6", "conf")
                # A router does not take a default route from another one, unless told so: accept_ra 2.
                if sysctl.read(*conf, self.underlay.link, "accept_ra") == "1":
                    sysctl.write("2", *conf, self.underlay.link, "accept_ra")
                sysctl.ensure("1", *conf, "all", "forwarding")
            self._problems.pop((OWN, "forwarding"), None)
        except KernelError as error:
            self._problems[OWN, "forwarding"] = f"this host does not forward packets: {error}"

    def _explained(self, refusal: Refusal) -> Refusal:
        """With what is in the way, where that is another route."""
        entry = refusal.entry
        if not refusal.exists or not isinstance(entry, Route):
            return refusal
        others = route.all_routes(self.session, entry.dst.version)
        other = next((one for one in others if one.dst == entry.dst and one.table == route.MAIN), None)
        if other is None:
            return refusal
        way = f"via {other.gateway}" if other.gateway is not None else f"over link {other.index}"
        reason = (
            f"{entry.dst}: there is a route {way} of protocol {other.protocol} already, which netd did not make and"
            f" does not touch; remove it with: ip route del {entry.dst}"
        )
        return Refusal(entry, reason, exists=True)


def _device_key(entry: Entry) -> Key:
    return DEVICE, entry.name if isinstance(entry, Device) else entry.device, b""


def _shown(desired: Desired, key: Key) -> str:
    return str(getattr(desired.get(key), "dst", "") or getattr(desired.get(key), "mac", "") or key)
