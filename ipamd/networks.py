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
from typing import Protocol, TypeVar

import msgspec

from cluster.layout import NetworkRecord
from ipamd.engine import Engine, Transaction
from ipamd.errors import AlreadyExistsError, InvalidArgumentError, IpamdError, NotFoundError
from ipamd.lease import Ledger
from ipamd.pool import PoolSpec, parse_network
from ipamd.pools import check_pool_name
from ipamd.store.base import Note

T = TypeVar("T")

BACKENDS = ("", "host-gw", "vxlan", "direct", "none")
_NOTE = "networks"
_LONGEST_LINK = 15  # IFNAMSIZ without the NUL
_BRIDGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_LEAST_MTU, _MOST_MTU = 1280, 65521  # what IPv6 asks of every link (RFC 8200, section 5); the largest of a veth


class Shared(Protocol):
    """Where all nodes read the definitions from. Raises IpamdError."""

    async def create(self, record: NetworkRecord) -> None:
        """Keeps a new definition; AlreadyExistsError where one is there."""

    async def change(self, changes: Sequence[tuple[NetworkRecord, NetworkRecord]]) -> None:
        """Keeps other definitions of what is there, (before, after); UnavailableError where one is not as before."""

    async def delete(self, record: NetworkRecord) -> None:
        """Removes it; what is not there is no error. UnavailableError where it is another by now."""


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

    def reachable(self, record: NetworkRecord) -> list[str]:
        """The subnets of the networks that it is connected with."""
        return [subnet for name in record.connected if name in self._known for subnet in self._known[name].subnets]

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
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._networks = networks
        self._create_pool = create_pool
        self._delete_pool = delete_pool
        self._shared = shared
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
            await self._engine.run(lambda: self._networks.keep([record]), grows=True)
            return record

    async def delete(self, name: str) -> None:
        """Ends a network that nobody uses, with its pool. Raises PreconditionError that names a user."""
        async with self._changing:
            await self._engine.run(lambda: self._networks.get(name))
            if name in self._ledger.pools:
                await self._delete_pool(name)  # refused while somebody holds an address of it
            record, others = await self._engine.run(lambda: (self._networks.get(name), self._networks.all()))
            changes = [(other, _connected(other, name, undo=True)) for other in others if name in other.connected]
            if self._shared is not None:
                await self._shared.change(changes)
                await self._shared.delete(record)
            await self._engine.run(lambda: self._networks.keep((after for _, after in changes), without=[name]))

    async def connect(self, one: str, other: str, undo: bool) -> list[NetworkRecord]:
        """Lets the containers of two networks reach one another, or ends that; returns both."""
        if one == other:
            raise InvalidArgumentError(f"other: found {other} again; a network's own containers reach one another")
        async with self._changing:
            first, second = await self._engine.run(lambda: (self._networks.get(one), self._networks.get(other)))
            changed = [_connected(first, other, undo), _connected(second, one, undo)]
            if self._shared is not None:
                await self._shared.change(list(zip((first, second), changed, strict=True)))
            await self._engine.run(lambda: self._networks.keep(changed))
        return changed


def judge(record: NetworkRecord, others: Iterable[NetworkRecord]) -> NetworkRecord | None:
    """The network, where there is the very same; raises AlreadyExistsError where it cannot be made beside others."""
    for other in others:
        if other.name == record.name:
            plain = msgspec.structs.replace(other, connected=record.connected, created_unix_s=record.created_unix_s)
            if plain == record:
                return other
            raise AlreadyExistsError(
                f"there is a network {record.name} with another definition; delete it first, or take another name"
            )
        if other.bridge == record.bridge:
            raise AlreadyExistsError(f"bridge: network {other.name} has the bridge {other.bridge}; name another")
        for one in record.subnets:
            for two in other.subnets:
                if _overlap(one, two):
                    raise AlreadyExistsError(
                        f"subnets: {one} overlaps {two} of network {other.name}; take one that does not"
                    )
    return None


def validated(record: NetworkRecord) -> NetworkRecord:
    """With its defaults filled in; raises InvalidArgumentError that names the field, the value and what to do."""
    check_pool_name(record.name)
    if record.type not in ("", "routed"):
        raise InvalidArgumentError(f"type: wanted routed, found {record.type[:80]!r}")
    networks = [parse_network(text, f"subnets[{index}]") for index, text in enumerate(record.subnets)]
    versions = [network.version for network in networks]
    if not networks or len(set(versions)) < len(versions):
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
    return msgspec.structs.replace(
        record, type="routed", subnets=tuple(map(str, networks)), bridge=bridge, connected=()
    )


def bridge_name(network: str) -> str:
    """The bridge of a network that names none: from its name, with a part of its hash where that is too long."""
    name = f"nl-{network}"
    if len(name) <= _LONGEST_LINK:
        return name
    return f"{name[: _LONGEST_LINK - 5]}-{hashlib.sha256(network.encode()).hexdigest()[:4]}"


def _connected(record: NetworkRecord, other: str, undo: bool) -> NetworkRecord:
    names = {*record.connected} - {other} if undo else {*record.connected, other}
    return msgspec.structs.replace(record, connected=tuple(sorted(names)))


def _overlap(one: str, two: str) -> bool:
    first, second = ipaddress.ip_network(one), ipaddress.ip_network(two)
    return first.version == second.version and first.overlaps(second)
