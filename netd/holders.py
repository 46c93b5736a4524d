"""Who has which address of the overlays that this host is on: followed in etcd, handed to the thread for the kernel.

An address is known here as soon as ipamd has it in etcd, which is before the container has it. Its MAC follows from the
allocation's addresses (kernel/macs.py), unless a MacRecord of the same allocation says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from ipaddress import ip_address

from msgspec import Struct
from msgspec.structs import replace

from cluster import layout
from cluster.etcd import Etcd, Event, Pair
from cluster.layout import LayoutError, MacRecord
from ipamd.member.follow import Follower
from kernel import link, macs
from netd.reconcile import Reconciler
from netd.values import AnyAddress, Holder
from telemetry import log

_logger = logging.getLogger("netd")

Ask = Callable[[Callable[[Reconciler], None]], Awaitable[None]]


class _Address(Struct, frozen=True, array_like=True):
    cidr: str


class _Allocation(Struct, frozen=True):
    addresses: tuple[_Address, ...] = ()


class _Record(Struct, frozen=True):
    """What is read of an AddressRecord."""

    node: str
    node_id: str
    generation: int
    allocation: _Allocation


async def ask(etcd: Etcd, network: str, address: AnyAddress) -> Holder | None:
    """Who holds one address of an overlay, whether or not this host is on it; None: nobody.

    Raises EtcdError; LayoutError or ValueError for a record that this version cannot read.
    """
    where = layout.place(network, str(address))
    found, own = await asyncio.gather(etcd.get(layout.ADDRESSES + where), etcd.get(layout.MACS + where))
    if found is None:
        return None
    record = layout.decode(_Record, found.key, found.value)
    return _holder(address, record, layout.decode(MacRecord, own.key, own.value) if own is not None else None)


class Holders:
    """`want` says which overlays count; `run` does the rest."""

    def __init__(self, etcd: Etcd, ask: Ask) -> None:
        self._etcd = etcd
        self._ask = ask
        self._wanted: Mapping[str, int] = {}
        self._networks: dict[str, _Network] = {}
        self._changed = asyncio.Event()

    def want(self, active: Mapping[str, int]) -> None:
        """These from now on, as `Overlays.active` has them."""
        self._wanted = active
        self._changed.set()

    @property
    def kept(self) -> int:
        """How many addresses have a holder here although etcd lost them."""
        return sum(len(one.kept) for one in self._networks.values())

    def again(self) -> None:
        """etcd lost its data: what is there is read anew, and what is not there any more stays until `settle`."""
        for one in self._networks.values():
            one.again()

    async def settle(self, over: Set[str]) -> None:
        """Drops what is kept and on these hosts."""
        for one in list(self._networks.values()):
            await one.settle(over)

    async def run(self) -> None:
        """Never returns."""
        following: dict[str, tuple[int, asyncio.Task[None]]] = {}
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for name, (number, task) in list(following.items()):
                    if self._wanted.get(name) != number:
                        del following[name], self._networks[name]
                        await _cancel(task)
                for name, number in self._wanted.items():
                    if name not in following:
                        self._networks[name] = _Network(name, self._etcd, self._ask)
                        task = asyncio.create_task(self._networks[name].run())
                        following[name] = number, task
        finally:
            for _number, task in following.values():
                await _cancel(task)


class _Network:
    """The holders of one overlay."""

    def __init__(self, name: str, etcd: Etcd, ask: Ask) -> None:
        self.kept: set[AnyAddress] = set()  # of the holders, those that etcd lost
        self._name = name
        self._ask = ask
        self._records: dict[AnyAddress, _Record] = {}
        self._macs: dict[AnyAddress, MacRecord] = {}
        self._told = False  # whether all holders were handed on; what comes after that is handed on by itself
        start = layout.place(name, "")
        self._mac_follower = Follower(etcd, layout.MACS + start, self._macs_listed, self._macs_changed)
        self._follower = Follower(etcd, layout.ADDRESSES + start, self._listed, self._took)

    async def run(self) -> None:
        """Never returns."""
        await asyncio.gather(self._mac_follower.run(), self._follower.run())

    def again(self) -> None:
        self._mac_follower.again()
        self._follower.again()

    async def settle(self, over: Set[str]) -> None:
        going = [address for address in self.kept if self._records[address].node in over]
        for address in going:
            del self._records[address]
            self.kept.discard(address)
        await self._put(going)

    async def _listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        await self._mac_follower.synced.wait()
        before, self._records = self._records, {}
        lacking = {*before} if self._follower.went_back else self.kept
        self.kept = set()
        for pair in pairs:
            self._take(pair)
        # One that is there again, and cannot be read, is not lost.
        self.kept = lacking - {_address(pair.key) for pair in pairs}
        self._records |= {address: before[address] for address in self.kept}
        holders = [self._holder(address) for address in self._records]
        network = self._name
        self._told = True  # at once: a MAC may come while they are handed on
        await self._ask(lambda one: _do(one, one.overlays.replace(network, [two for two in holders if two])))

    async def _took(self, events: Sequence[Event]) -> None:
        addresses = []
        for event in events:
            if event.kind == "put":
                addresses.append(self._take(event.pair))
            elif (address := _address(event.pair.key)) is not None:
                self._records.pop(address, None)
                self.kept.discard(address)
                addresses.append(address)
        await self._put(one for one in addresses if one is not None)

    async def _macs_listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        before = self._macs
        self._macs = {one: mac for one, mac in before.items() if self._mac_follower.went_back or one in self.kept}
        for pair in pairs:
            self._take_mac(pair)
        await self._put({*before, *self._macs})

    async def _macs_changed(self, events: Sequence[Event]) -> None:
        addresses = []
        for event in events:
            if event.kind == "put":
                addresses.append(self._take_mac(event.pair))
            elif (address := _address(event.pair.key)) is not None:
                self._macs.pop(address, None)
                addresses.append(address)
        await self._put(one for one in addresses if one is not None)

    async def _put(self, addresses: Iterable[AnyAddress]) -> None:
        changes = {address: self._holder(address) for address in addresses}
        network = self._name
        if changes and self._told:
            await self._ask(lambda one: _do(one, one.overlays.put(network, changes)))

    def _holder(self, address: AnyAddress) -> Holder | None:
        record = self._records.get(address)
        if record is None:
            return None
        return _holder(address, record, self._macs.get(address))

    def _take(self, pair: Pair) -> AnyAddress | None:
        address = _address(pair.key)
        if address is None:
            return None
        self.kept.discard(address)
        try:
            record = layout.decode(_Record, pair.key, pair.value)
            for one in record.allocation.addresses:
                ip_address(one.cidr.partition("/")[0])
            self._records[address] = record
        except (LayoutError, ValueError) as error:
            self._records.pop(address, None)
            _skip(pair.key, error)
        return address

    def _take_mac(self, pair: Pair) -> AnyAddress | None:
        address = _address(pair.key)
        if address is None:
            return None
        try:
            record = layout.decode(MacRecord, pair.key, pair.value)
            self._macs[address] = replace(record, mac=_single_mac(record.mac))
        except (LayoutError, ValueError) as error:
            self._macs.pop(address, None)
            _skip(pair.key, error)
        return address


def _do(reconciler: Reconciler, keys: set[tuple[int, str, bytes]]) -> None:
    reconciler.sync(keys)
    reconciler.announce()
    for text in reconciler.overlays.take_false_news():
        log.event(_logger, "error", "an address of an overlay is left out", error=text)


def _holder(address: AnyAddress, record: _Record, own: MacRecord | None) -> Holder:
    if own is not None and (own.node_id, own.generation) == (record.node_id, record.generation):
        return Holder(address, own.mac, record.node)
    addresses = [ip_address(one.cidr.partition("/")[0]) for one in record.allocation.addresses]
    return Holder(address, macs.of_addresses(addresses or [address]), record.node)


def _address(key: str) -> AnyAddress | None:
    try:
        return ip_address(layout.split(key)[1])
    except ValueError as error:
        _skip(key, error)
        return None


def _single_mac(text: str) -> str:
    """As the kernel writes it, which is compared with it. Raises ValueError where no interface can have it."""
    packed = link.packed_mac(text)
    if packed[0] & 1 or not any(packed):
        raise ValueError(f"{text} is no MAC of a single interface")
    return link.mac_text(packed)


def _skip(key: str, error: Exception) -> None:
    log.event(_logger, "error", "an address of an overlay is left out", key=key, error=str(error))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
