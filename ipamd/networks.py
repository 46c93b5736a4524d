"""Networks: what a container is attached to, defined once for all nodes.

A network has a pool of its own name, a bridge on each host, and names of networks that it is connected with. The
definitions are a note in the store; in a cluster etcd has them for all nodes, and the note is this node's copy.

`Networks` is synchronous and runs inside a batch of `engine`, as `lease` does; `Directory` is what the API calls.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from cluster.layout import NetworkRecord
from ipamd import overlay
from ipamd.engine import Engine, Transaction
from ipamd.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    IpamdError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from ipamd.lease import Ledger
from ipamd.messages import check_name
from ipamd.overlay import OVERLAY, Parts
from ipamd.pool import Network, PoolSpec, address_text, parse_address, parse_network
from ipamd.pools import check_pool_name
from ipamd.store.base import Allocation, Note, Reservation, Store
from kernel.errors import KernelError

T = TypeVar("T")

BACKENDS = ("", "host-gw", "vxlan", "direct", "none")
_NOTE = "networks"
_LONGEST_LINK = 15  # IFNAMSIZ without the NUL
_BRIDGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_LEAST_MTU, _MOST_MTU = 1280, 65521  # what IPv6 asks of every link (RFC 8200, section 5); the largest of a veth


# Fills in what a new overlay network leaves open: beside the others, and apart from all that is taken.
Choice = Callable[[NetworkRecord, Iterable[NetworkRecord], Iterable[Network]], NetworkRecord]


class Shared(Protocol):
    """Where all nodes read the definitions from. Raises IpamdError."""

    async def create(self, record: NetworkRecord) -> None:
        """Keeps a new definition; AlreadyExistsError where one is there."""

    async def change(self, changes: Sequence[tuple[NetworkRecord, NetworkRecord]]) -> None:
        """Keeps other definitions of what is there, (before, after); UnavailableError where one is not as before."""

    async def gone(self, name: str) -> tuple[bool, bool]:
        """Whether there is no such network, and no such pool, now."""

    async def delete(self, name: str) -> Sequence[NetworkRecord]:
        """Removes it with its pool, both or none; what is not there is no error.

        Returns the networks that were connected with it, as they are then. Raises PreconditionError that names a user.
        """


class Overlays(Protocol):
    """The same for what only overlay networks have. Raises IpamdError."""

    async def create_overlay(
        self, record: NetworkRecord, spec: PoolSpec, choice: Choice
    ) -> tuple[NetworkRecord, PoolSpec]:
        """Keeps a new definition with its pool, both as they are then; the same again is no error.

        AlreadyExistsError where it cannot be beside others, ExhaustedError where nothing is left to choose.
        """

    async def share(self, name: str, docker: str) -> NetworkRecord:
        """As `Directory.share`."""


class Macs(Protocol):
    """The MACs of addresses in overlay networks."""

    async def set(self, pool: str, ip: str, mac: str) -> None:
        """Tells all hosts the MAC of an address that this node holds; "": the one that follows from the address.

        Raises NotFoundError where nobody has the address, PreconditionError where another node has it.
        """


@dataclass(frozen=True, slots=True)
class OverlayDesk:
    """What a cluster has for overlay networks. `parts`: where their subnets are chosen from."""

    networks: Overlays
    macs: Macs
    parts: Parts


class Networks:
    """The definitions that this node knows."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        text = transaction.store.note(_NOTE)
        found = msgspec.json.decode(text, type=list[NetworkRecord]) if text else []
        self._known = {record.name: record for record in found}

    def all(self) -> list[NetworkRecord]:
        """By name."""
        return [record for _, record in sorted(self._known.items())]

    def get(self, name: str) -> NetworkRecord:
        """Raises NotFoundError."""
        record = self._known.get(name)
        if record is None:
            known = ", ".join(sorted(self._known)) or "none"
            raise NotFoundError(f"there is no network {name}; create it (netloom network create). Known: {known}")
        return record

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def is_overlay(self, name: str) -> bool:
        """Whether there is an overlay network of this name: its pool has the same."""
        record = self._known.get(name)
        return record is not None and record.type == OVERLAY

    @property
    def store(self) -> Store:
        """Where this node's copy is."""
        return self._transaction.store

    def holder(self, pool: str, ip: str) -> Allocation | Reservation | None:
        """Who has an address on this node."""
        return self._transaction.store.holder(pool, ip)

    def reachable(self, record: NetworkRecord) -> list[str]:
        """The subnets of the networks that it is connected with."""
        return [subnet for name in record.connected if name in self._known for subnet in self._known[name].subnets]

    def refresh(self, record: NetworkRecord) -> None:
        """Replaces a definition, unless the network is gone meanwhile."""
        if record.name in self._known:
            self.keep([record])

    def keep(self, records: Iterable[NetworkRecord], without: Iterable[str] = ()) -> None:
        """Adds or replaces definitions and removes others, in one change of the store."""
        after = {**self._known, **{record.name: record for record in records}}
        for name in without:
            after.pop(name, None)
        if after == self._known:
            return
        encoded = msgspec.json.encode([record for _, record in sorted(after.items())]).decode()
        self._transaction.apply(Note(_NOTE, encoded if after else ""))
        self._transaction.on_undo(setattr, self, "_known", self._known)
        self._known = after


class Directory:
    """What the API calls. `create_pool` and `delete_pool` are what it does for pools: in a cluster they go to etcd."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        networks: Networks,
        *,
        create_pool: Callable[[str, PoolSpec], Awaitable[object]],
        delete_pool: Callable[[str], Awaitable[object]],
        shared: Shared | None = None,
        overlays: OverlayDesk | None = None,
    ) -> None:
        """`shared` and `overlays`: there in a cluster."""
        self._engine = engine
        self._ledger = ledger
        self._networks = networks
        self._create_pool = create_pool
        self._delete_pool = delete_pool
        self._shared = shared
        self._overlays = overlays
        self._changing = asyncio.Lock()  # each change is judged by what the one before left

    async def get(self, name: str) -> tuple[NetworkRecord, list[str]]:
        """A definition, and the subnets that it is connected with."""
        record = await self._engine.run(lambda: self._networks.get(name))
        return record, self._networks.reachable(record)

    async def all(self) -> list[tuple[NetworkRecord, list[str]]]:
        """Every one."""
        return await self._engine.run(
            lambda: [(record, self._networks.reachable(record)) for record in self._networks.all()]
        )

    async def create(self, record: NetworkRecord, spec: PoolSpec) -> NetworkRecord:
        """Makes a network with its pool; the same again is no error. Raises IpamdError."""
        record = validated(record)
        if record.type == OVERLAY:
            return await self._create_overlay(record, spec)
        if self._shared is not None and spec.mode == "local":
            raise InvalidArgumentError(
                "mode: a cluster's network has a pool of all nodes; take node-block or cluster-address"
            )
        async with self._changing:
            there = await self._engine.run(lambda: judge(record, self._networks.all()))
            if there is None or record.name not in self._ledger.pools:
                # The pool first: a pool without a network harms nobody, and is taken over when the caller tries again.
                # A network without one is what is left of a deletion that failed half way.
                await self._create_pool(record.name, spec)
            if there is not None:
                return there
            if self._shared is not None:
                try:
                    await self._shared.create(record)
                except AlreadyExistsError:
                    with contextlib.suppress(IpamdError):  # left over, it harms nobody
                        await self._delete_pool(record.name)
                    raise
            await self._keep(record)
            return record

    async def _create_overlay(self, record: NetworkRecord, spec: PoolSpec) -> NetworkRecord:
        desk = self._desk("type: found overlay")
        overlay.check_spec(spec)
        async with self._changing:
            there = self._ledger.pools.get(record.name)
            if there is not None and there.spec.mode == "local":
                raise AlreadyExistsError(f"this node has a pool {record.name} of its own; take another name")
            taken = [] if record.subnets else await self._taken_here()

            def choose(
                asked: NetworkRecord, others: Iterable[NetworkRecord], elsewhere: Iterable[Network]
            ) -> NetworkRecord:
                return overlay.complete(asked, others, desk.parts, [*taken, *elsewhere])

            made, its_pool = await desk.networks.create_overlay(record, spec, choose)
            # etcd has both; this node is not to wait until it hears of them.
            await self._engine.run(lambda: self._ledger.create_pool(made.name, its_pool), grows=True)
            await self._keep(made)
            return made

    async def _keep(self, *records: NetworkRecord) -> None:
        """Keeps what was just defined, unless another node deleted it since and this one has heard of that already."""
        await self._engine.run(lambda: self._networks.keep(records), grows=True)
        if self._shared is None:
            return
        for record in records:
            with contextlib.suppress(UnavailableError):  # it was there a moment ago
                network_gone, pool_gone = await self._shared.gone(record.name)
                if network_gone:
                    await self._engine.run(partial(self._forget, record.name, pool=pool_gone))

    def _forget(self, name: str, *, pool: bool) -> None:
        there = self._ledger.pools.get(name)
        if pool and there is not None and there.spec.mode != "local":
            with contextlib.suppress(PreconditionError):  # in use: it is put there again
                self._ledger.delete_pool(name)
        self._networks.keep((), without=[name])

    async def _taken_here(self) -> list[Network]:
        """Where no subnet is to be chosen: this node's own pools, and what the host reaches."""
        found = [
            ipaddress.ip_network(one.subnet)
            for pool in self._ledger.pools.values()
            for ranges in pool.spec.range_sets
            for one in ranges
        ]
        try:
            return found + await asyncio.to_thread(overlay.host_networks)
        except KernelError as error:
            raise UnavailableError(
                f"subnets: this host's addresses and routes cannot be read ({error}), so none can be chosen; name one "
                "(--subnet)"
            ) from None

    def _desk(self, what: str) -> OverlayDesk:
        if self._overlays is None:
            raise PreconditionError(
                f"{what}, and this ipamd keeps its addresses for itself: overlay networks want a cluster; set [store] "
                'kind = "etcd" (docs/cluster.md)'
            )
        return self._overlays

    async def share(self, name: str, docker: str) -> NetworkRecord:
        """Has every host's Docker show an overlay network under a name, or ("") no longer.

        Raises AlreadyExistsError where another network has that name there, and PreconditionError where a container of
        Docker's has an address of it, or it has another name there.
        """
        check_name(docker, "docker")
        if docker != docker.strip():
            raise InvalidArgumentError(f"docker: found {docker!r}; leave the spaces around the name out")
        async with self._changing:
            if self._overlays is None:
                await self._engine.run(lambda: self._networks.get(name))
            record = await self._desk("docker: hosts share overlay networks only").networks.share(name, docker)
            await self._keep(record)
            return record

    async def set_mac(self, pool: str, address: str, mac: str) -> None:
        """Tells all hosts the MAC of an address that this node holds, where it is not what follows from the address.

        Raises NotFoundError where nobody has the address, PreconditionError where another node has it.
        """
        ip = address_text(*parse_address(address, "address"))
        mac = overlay.parse_mac(mac)
        macs = self._desk("pool: only addresses of overlay networks have a MAC").macs
        record = await self._engine.run(lambda: self._networks.get(pool))
        if record.type != OVERLAY:
            raise PreconditionError(
                f"pool: network {pool} is {record.type}; only an overlay network's addresses have MACs of their own"
            )
        if mac in overlay.gateway_macs(record):
            raise InvalidArgumentError(f"mac: {mac} is the gateway's of network {pool}; give the container another")
        held = await self._engine.run(lambda: self._networks.holder(pool, ip))
        if isinstance(held, Allocation) and mac == overlay.default_mac(held):
            mac = ""
        await macs.set(pool, ip, mac)

    async def delete(self, name: str) -> None:
        """Ends a network that nobody uses, with its pool. Raises PreconditionError that names a user."""
        async with self._changing:
            await self._engine.run(lambda: self._networks.get(name))
            pool = self._ledger.pools.get(name)
            if self._shared is None or (pool is not None and pool.spec.mode == "local"):
                await self._engine.run(lambda: self._end(name))
            if self._shared is not None:
                changed = await self._shared.delete(name)
                await self._engine.run(lambda: self._networks.keep(changed, without=[name]))

    def _end(self, name: str) -> None:
        """Inside a batch: of this node's own network both go; of a cluster's the pool that only this node has."""
        if name in self._ledger.pools:
            self._ledger.delete_pool(name)  # refused while somebody holds an address of it
        if self._shared is None:
            connected = [record for record in self._networks.all() if name in record.connected]
            self._networks.keep((disconnected(record, name) for record in connected), without=[name])

    async def connect(self, one: str, other: str, undo: bool) -> list[NetworkRecord]:
        """Lets the containers of two networks reach one another, or ends that; returns both."""
        if one == other:
            raise InvalidArgumentError(f"other: found {other} again; a network's own containers reach one another")
        async with self._changing:
            first, second = await self._engine.run(lambda: (self._networks.get(one), self._networks.get(other)))
            for record in (first, second):
                if record.type == OVERLAY:
                    raise PreconditionError(
                        f"network {record.name} is an overlay, which is kept apart from others; connect the container "
                        "to both networks"
                    )
            change = disconnected if undo else connected
            changed = [change(first, other), change(second, one)]
            if self._shared is not None:
                await self._shared.change(list(zip((first, second), changed, strict=True)))
            await self._keep(*changed)
        return changed


def judge(record: NetworkRecord, others: Iterable[NetworkRecord]) -> NetworkRecord | None:
    """The network, where there is the very same; raises AlreadyExistsError where it cannot be made beside others."""
    for other in others:
        if other.name == record.name:
            if _same(record, other):
                return other
            raise AlreadyExistsError(
                f"there is a network {record.name} with another definition; delete it first, or take another name"
            )
        if other.bridge == record.bridge:
            raise AlreadyExistsError(f"bridge: network {other.name} has the bridge {other.bridge}; name another")
        _judge_vni(record, other)
        for one in record.subnets:
            for two in other.subnets:
                if _overlap(one, two):
                    raise AlreadyExistsError(
                        f"subnets: {one} overlaps {two} of network {other.name}; take one that does not"
                    )
    return None


def _same(record: NetworkRecord, there: NetworkRecord) -> bool:
    """Whether a definition that is asked for is the one that is there; what it leaves open is as it is there."""
    if record.type == OVERLAY and there.type == OVERLAY:
        record = msgspec.structs.replace(
            record, vni=record.vni or there.vni, subnets=record.subnets or there.subnets, docker=there.docker
        )
    return record == msgspec.structs.replace(there, connected=record.connected, created_unix_s=record.created_unix_s)


def _judge_vni(record: NetworkRecord, other: NetworkRecord) -> None:
    if record.vni and record.vni == other.vni:
        raise AlreadyExistsError(f"vni: network {other.name} has VNI {other.vni}; name another, or none")
    for one, two in ((record, other), (other, record)):
        if one.vni and two.bridge == overlay.device_name(one.vni):
            raise AlreadyExistsError(
                f"vni: the device of VNI {one.vni}, of network {one.name}, would have the name of the bridge of "
                f"network {two.name}, {two.bridge}; name another VNI or bridge"
            )


def validated(record: NetworkRecord) -> NetworkRecord:
    """With its defaults filled in; raises InvalidArgumentError that names the field, the value and what to do."""
    check_pool_name(record.name)
    if record.type not in ("", "routed", OVERLAY):
        raise InvalidArgumentError(f"type: wanted routed or overlay, found {record.type[:80]!r}")
    networks = [parse_network(text, f"subnets[{index}]") for index, text in enumerate(record.subnets)]
    versions = [network.version for network in networks]
    chosen = record.type == OVERLAY and not networks
    if len(set(versions)) < len(versions) or not (networks or chosen):
        raise InvalidArgumentError(
            f"subnets: wanted one IPv4 or IPv6 subnet, or one of each, found {', '.join(record.subnets) or 'none'}"
        )
    if record.backend not in BACKENDS:
        raise InvalidArgumentError(f"backend: wanted one of {', '.join(BACKENDS[1:])}, found {record.backend[:80]!r}")
    if record.mtu and not _LEAST_MTU <= record.mtu <= _MOST_MTU:
        raise InvalidArgumentError(
            f"mtu: wanted {_LEAST_MTU} to {_MOST_MTU}, or 0 for what the hosts' network allows, found {record.mtu}"
        )
    bridge = record.bridge or bridge_name(record.name)
    if len(bridge) > _LONGEST_LINK or not _BRIDGE.fullmatch(bridge):
        raise InvalidArgumentError(
            f"bridge: wanted at most {_LONGEST_LINK} letters, digits, '.', '_' and '-', found {bridge[:80]!r}"
        )
    overlay.check(record, networks)
    return msgspec.structs.replace(
        record, type=record.type or "routed", subnets=tuple(map(str, networks)), bridge=bridge, connected=()
    )


def bridge_name(network: str) -> str:
    """The bridge of a network that names none: from its name, with a part of its hash where that is too long."""
    name = f"nl-{network}"
    if len(name) <= _LONGEST_LINK:
        return name
    return f"{name[: _LONGEST_LINK - 5]}-{hashlib.sha256(network.encode()).hexdigest()[:4]}"


def connected(record: NetworkRecord, other: str) -> NetworkRecord:
    """A network that is connected with another one."""
    return msgspec.structs.replace(record, connected=tuple(sorted({*record.connected, other})))


def disconnected(record: NetworkRecord, other: str) -> NetworkRecord:
    """A network that no longer is."""
    return msgspec.structs.replace(record, connected=tuple(name for name in record.connected if name != other))


def refuse_shown(record: NetworkRecord) -> None:
    """Raises PreconditionError for a network that Docker shows: it is not to be deleted."""
    if record.docker:
        raise PreconditionError(
            f"network {record.name}: every host's Docker shows it as {record.docker}; remove it there first (docker "
            f"network rm {record.docker})"
        )


def _overlap(one: str, two: str) -> bool:
    first, second = ipaddress.ip_network(one), ipaddress.ip_network(two)
    return first.version == second.version and first.overlaps(second)
