"""Peers and networks from etcd: followed, kept on the disk, and handed to the thread for the kernel.

- What is on the disk is believed until etcd has said all of it: so a start without etcd finds its peers, and nothing is
  withdrawn before etcd has answered. While etcd is away nothing is withdrawn at all.
- A peer whose lease is lost is silent, not gone. Its entries go only when it does not answer probes either, PROBES
  times in a row, and at most a fifth of all peers (but one at least) in WINDOW_S: when many are silent at once, it is
  rather this host or etcd that is cut off.
- What etcd lost is not withdrawn either: netd/lost.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec

from cluster import layout
from cluster.config import EtcdConfig
from cluster.errors import EtcdError
from cluster.etcd import Etcd, Event, Pair
from cluster.layout import NetworkRecord
from ipamd.member.follow import Follower
from netd import probe
from netd.agent import Agent
from netd.config import Config
from netd.disk import Directory
from netd.fabric.registry import TUNNELS
from netd.holders import Holders, ask
from netd.lost import Loss
from netd.member import Member
from netd.reconcile import Reconciler
from netd.service import Source, UnknownHolderError
from netd.values import AnyAddress, Holder, Network, Node
from netd.view import NETD, PREFIXES, NetdRecord, State, View, read_state
from telemetry import log

_logger = logging.getLogger("netd")

PROBES = 2
WINDOW_S = 60.0
_SHARE = 5  # one of so many
_ID, _PEERS = "id", "peers.json"  # files
_KEEP_S = 1.0  # between two writes to the disk
_PROBE_WAIT_S = 1.0
_ASK_S = 3.0


class Registry(Source):
    """What etcd says, and what follows from it."""

    name = "etcd"

    def __init__(
        self, etcd: EtcdConfig, lease_s: int, config: Config, agent: Agent, directory: str, version: str
    ) -> None:
        """`directory` keeps this host's id and what is known of the others; it is made where it is missing.

        Raises DirectoryError, OSError.
        """
        self._disk = Directory(directory, own=True)
        self._etcd = Etcd(etcd)
        self._config = config
        self._agent = agent
        self._version = version
        self._lease_s = lease_s
        self._id = _id_on_disk(self._disk)
        known = _state_on_disk(self._disk) or State()
        self._view = View(known)
        self._loss = Loss(lease_s, self._lost)
        self._member = Member(self._etcd, config.node.name, f"{self._id} {_boot_id()}", lease_s, self._own_record)
        self._member.missing = self._loss.begin
        self._followers = {prefix: self._follower(prefix) for prefix in PREFIXES}
        self._followers[NETD].reached = known.revision
        self.changed: Callable[[Mapping[str, NetworkRecord]], None] = lambda _: None  # hears of all networks
        self.bridges_changed: Callable[[], None] = lambda: None  # an overlay's bridge came or went
        self._confirmed = False
        self._overlay_holders = Holders(self._etcd, self._ask)
        self._changed = asyncio.Event()
        self._failed: dict[str, int] = {}  # silent peer → probes in a row that nobody answered
        self._down: set[str] = set()
        self._withdrawn: dict[str, float] = {}  # of hosts that are still away, when
        self._excess = 0

    # What the API tells

    def state(self) -> str:
        now = self._etcd.state
        return "connected" if now.connected else f"not connected: {now.reason or 'not yet'}"

    def peer_state(self, name: str) -> str:
        if name in self._down:
            return "down"
        static = any(peer.name == name for peer in self._config.peers)
        return "up" if static or name in self._view.alive else "silent"

    def peer_version(self, name: str) -> str:
        record = self._view.records.get(name)
        return record.version if record is not None else ""

    async def holder(self, network: str, address: AnyAddress) -> Holder | None:
        try:
            async with asyncio.timeout(_ASK_S):
                return await ask(self._etcd, network, address)
        except TimeoutError:
            raise UnknownHolderError(f"etcd has not said within {_ASK_S:g} s who has {address}") from None
        except (EtcdError, ValueError) as error:  # LayoutError is one
            raise UnknownHolderError(f"etcd has not said who has {address}: {error}") from None

    def definitions(self) -> dict[str, NetworkRecord]:
        """Of the networks, as far as they are known; before etcd has told, those on the disk."""
        return self._view.definitions()

    def problems(self) -> list[str]:
        found = [self._member.problem] if self._member.problem else []
        found += [f"etcd: {key} is left out: {why}" for key, why in list(self._view.broken.items())[:5]]
        if kept := self._kept():
            found.append(f"etcd lost its data: {kept}")
        if self._excess:
            found.append(
                f"{self._excess} more hosts are silent and do not answer; their entries are kept for now, as it may be"
                " this host that is cut off; look at its underlay"
            )
        return found

    # Work

    async def run(self) -> None:
        """Follows etcd until it is cancelled."""
        await self._push(set(self._view.records), networks=True)
        loop, holders = asyncio.get_running_loop(), self._overlay_holders

        def tell(active: Mapping[str, int]) -> None:
            loop.call_soon_threadsafe(holders.want, active)
            loop.call_soon_threadsafe(self.bridges_changed)

        await self._ask(lambda reconciler: reconciler.on_active(tell))
        work: list[Coroutine[Any, Any, None]] = [
            *(follower.run() for follower in self._followers.values()),
            self._member.run(),
            holders.run(),
            self._keep(),
            self._sweep(),
        ]
        tasks = [asyncio.create_task(one) for one in work]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._write()
            await self._etcd.close()

    async def reload(self, config: Config) -> None:
        """Another configuration: names, own subnets, networks, static peers."""
        before = {peer.name for peer in self._config.peers}
        self._config = config
        await self._push({*self._view.records, *before}, networks=True)
        self._member.nudge()

    def _follower(self, prefix: str) -> Follower:
        async def listed(pairs: Sequence[Pair], _revision: int) -> None:
            if prefix != NETD:
                await self._followers[NETD].synced.wait()  # whether anything was lost is seen there first
            elif self._lacks_own(pairs):
                self._followers[NETD].went_back = True
            lost, before = self._followers[prefix].went_back, len(self._view.kept)
            if lost:
                self._loss.begin()
            await self._take(prefix, self._view.listed(prefix, pairs, lost=lost))
            if len(self._view.kept) > before:
                log.event(_logger, "warning", f"etcd lost its data: {self._kept()}")
            others = [other for end, other in self._followers.items() if end != prefix]
            if not self._confirmed and all(other.synced.is_set() for other in others):
                self._confirmed = True
                await self._ask(_confirm)

        async def changed(events: Sequence[Event]) -> None:
            await self._take(prefix, self._view.changed(events))

        return Follower(self._etcd, prefix, listed, changed)

    def _lacks_own(self, pairs: Sequence[Pair]) -> bool:
        """Whether this host's record, which is permanent, is not there any more."""
        own = self._config.node.name
        return own in self._view.records and all(pair.key != NETD + own for pair in pairs)

    def _lost(self) -> None:
        """etcd lost its data: all of it is read anew, and this host says again who it is."""
        for follower in self._followers.values():
            follower.again()
        self._overlay_holders.again()
        self._member.again()

    def _kept(self) -> str:
        """What is there although etcd no longer has it, in words; "" where there is none."""
        kept, holders = self._view.kept - {NETD + self._config.node.name}, self._overlay_holders.kept
        if not kept and not holders:
            return ""
        hosts, blocks, networks = (
            sum(key.startswith(one) for key in kept) for one in (NETD, layout.BLOCKS, layout.NETWORKS)
        )
        what = f"{hosts} hosts, {blocks} blocks, {networks} networks and {holders} addresses of overlays"
        if self._loss.active:
            return f"this host keeps {what} until {self._loss.until}; then hosts that do not answer go"
        return (
            f"this host still keeps {what}, as long as their hosts answer: start netd and ipamd there, or restore"
            " etcd's data"
        )

    async def _take(self, prefix: str, concerned: set[str]) -> None:
        own = self._config.node.name
        await self._push(concerned - {own}, networks=prefix == layout.NETWORKS or own in concerned)
        if prefix == layout.NETWORKS:
            self.changed(self._view.definitions())
        if own in concerned and prefix == NETD:
            self._member.nudge()
        self._changed.set()

    async def _push(self, names: Iterable[str], *, networks: bool = False) -> None:
        """Hands peers, and where it is said networks and own subnets, to the thread for the kernel."""
        static = {peer.name for peer in self._config.peers} | {self._config.node.name}
        for name in [name for name in names if name in self._view.alive]:
            self._down.discard(name)
            self._withdrawn.pop(name, None)
            self._failed.pop(name, None)
        peers = {name: self._peer(name) for name in names if name not in static}
        config, defined = self._config, self._networks()
        overlays = self._view.overlays(defined)
        own = tuple(dict.fromkeys((*config.node.subnets, *self._view.subnets(config.node.name))))

        def take(reconciler: Reconciler) -> None:
            node = replace(config.node, subnets=own)
            others = node.subnets != reconciler.node.subnets or defined != reconciler.networks
            differs = networks and (others or overlays != reconciler.overlays.defined())
            if differs:
                reconciler.configure(node, config.choice, defined)
                reconciler.define_overlays(overlays)
            keys = set()
            for name, peer in peers.items():
                if peer is None:
                    keys |= reconciler.drop_peer(name)
                elif reconciler.peers.get(name) != peer:
                    keys |= reconciler.put_peer(peer)
            if differs:
                reconciler.full()
            else:
                reconciler.sync(keys)

        await self._ask(take)
        if networks:
            self._member.nudge()

    def _peer(self, name: str) -> Node | None:
        node = self._view.node(name)
        if node is None or name not in self._down:
            return node
        return replace(node, subnets=(), down=True)

    def _networks(self) -> tuple[Network, ...]:
        *own, default = self._config.networks
        return (*own, *self._view.networks(default, own), default)

    async def _ask(self, what: Callable[[Reconciler], None]) -> None:
        future: Future[None] = self._agent.call(what)
        await asyncio.wrap_future(future)

    async def _own_record(self) -> NetdRecord | None:
        def look(reconciler: Reconciler) -> NetdRecord | None:
            if reconciler.underlay is None:
                return None
            return NetdRecord(
                id=self._id,
                addresses=tuple(map(str, reconciler.underlay.public)),
                mac=reconciler.node.mac,
                subnets=tuple(map(str, self._config.node.subnets)),
                # Only once it is there: peers send through it as soon as they read this.
                takes_vxlan=reconciler.has_tunnels() and any(one.backend in TUNNELS for one in reconciler.networks),
                version=self._version,
            )

        return await asyncio.wrap_future(self._agent.call(look))

    # The disk

    async def _keep(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._confirmed:
                self._write()
            await asyncio.sleep(_KEEP_S)

    def _write(self) -> None:
        """Whoever reads it finds the old one or the new one. It need not survive a power cut: etcd has it all."""
        if not self._confirmed:
            return
        try:
            self._disk.write(_PEERS, msgspec.json.encode(self._view.state(self._followers[NETD].reached)))
        except OSError as error:
            log.event(_logger, "error", "what is known of other hosts cannot be kept on the disk", error=str(error))

    # Silent peers

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            # Without etcd nobody knows who is alive; nor where it has only begun to hear that again.
            if self._confirmed and self._etcd.state.connected and not self._loss.active:
                await self._look_at_silent()
                if self._view.kept or self._overlay_holders.kept:
                    await self._settle()

    async def _settle(self) -> None:
        """Gives up what etcd lost and nobody puts back; see netd/lost.py."""
        try:
            alive = {
                pair.key.removeprefix(layout.ALIVE)
                async for page in self._etcd.walk(layout.ALIVE, keys_only=True)
                for pair in page.pairs
            }
        except EtcdError:
            return  # another time
        told = self._loss.told(alive)
        gone = {name for name in self._down if NETD + name in self._view.kept}
        await self._overlay_holders.settle(gone | told)
        before = set(self._view.kept)
        concerned = self._view.settle(gone, told)
        if self._view.kept == before:
            return
        for name in gone:
            self._down.discard(name)
            self._failed.pop(name, None)
            log.event(_logger, "warning", "a host that etcd lost did not come back; it is forgotten", host=name)
        await self._push(concerned - {self._config.node.name}, networks=True)
        self.changed(self._view.definitions())
        self._changed.set()

    async def _look_at_silent(self) -> None:
        own = self._config.node.name
        silent = [name for name in self._view.records if name not in self._view.alive and name != own]
        answered = await asyncio.get_running_loop().run_in_executor(None, self._probe, silent)
        for name in silent:
            self._failed[name] = 0 if name in answered else self._failed.get(name, 0) + 1
        self._failed = {name: number for name, number in self._failed.items() if name in silent}
        back = {name for name in self._down if name in answered or name not in silent}
        self._down -= back
        now = time.monotonic()
        self._withdrawn = {
            name: when for name, when in self._withdrawn.items() if now - when < WINDOW_S and name not in back
        }
        allowed = max(1, len(self._view.records) // _SHARE) - len(self._withdrawn)
        dead = [name for name, number in self._failed.items() if number >= PROBES and name not in self._down]
        going = dead[: max(0, allowed)]
        self._excess = len(dead) - len(going)
        for name in going:
            self._down.add(name)
            self._withdrawn[name] = now
            log.event(
                _logger, "warning", "a host is silent and does not answer; what leads there is taken away", host=name
            )
        for name in back:
            log.event(_logger, "info", "a host answers again", host=name)
        if going or back:
            await self._push({*going, *back})

    def _probe(self, names: Sequence[str]) -> set[str]:
        """Who of these answers: itself, or its tunnel's end. In another thread, in this host's namespace."""
        targets = {}
        for name in names:
            node = self._view.node(name)
            if node is not None:
                ends = tuple(one.network_address for one in node.subnets[:2])
                targets.update(dict.fromkeys(((address, 0) for address in (*node.addresses, *ends)), name))
        answers = probe.echo(targets, _PROBE_WAIT_S) if targets else {}
        return {targets[one] for one, took in answers.items() if took is not None}


def _confirm(reconciler: Reconciler) -> None:
    """Everything was listed: from now on what nobody wants may go."""
    reconciler.may_drop = True
    reconciler.full()


def _id_on_disk(disk: Directory) -> str:
    found = (disk.read(_ID) or b"").decode(errors="replace").strip()
    if not found:
        found = str(uuid.uuid4())
        disk.write(_ID, f"{found}\n".encode(), durable=True)
    return found


def _state_on_disk(disk: Directory) -> State | None:
    try:
        data = disk.read(_PEERS)
        return read_state(data) if data is not None else None
    except (OSError, ValueError) as error:
        log.event(_logger, "warning", "what was known of other hosts cannot be read; etcd has it", error=str(error))
        return None


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
