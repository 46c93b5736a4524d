"""Networks: what happens when they are changed by several at once, and what a failure half way leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import pytest

from cluster.layout import NetworkRecord
from ipamd.desk import Desk
from ipamd.engine import Engine, Transaction
from ipamd.errors import (
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from ipamd.lease import Ask, Ledger
from ipamd.networks import Directory, Networks, bridge_name, disconnected, validated
from ipamd.pool import Mode, PoolSpec, RangeSpec
from ipamd.store.base import Key, Netns
from ipamd.store.memory import MemoryStore
from tests.ipamd.clock import FakeClock

T = TypeVar("T")


class Elsewhere:
    """Where the definitions of all nodes are; it can fail, and let others go first."""

    def __init__(self) -> None:
        self.records: dict[str, NetworkRecord] = {}
        self.end_pool: Callable[[str], Awaitable[object]] | None = None
        self.fails = False

    async def create(self, record: NetworkRecord) -> None:
        await self._wait()
        self.records[record.name] = record

    async def change(self, changes: Sequence[tuple[NetworkRecord, NetworkRecord]]) -> None:
        await self._wait()
        self.records.update({after.name: after for _, after in changes})

    async def gone(self, name: str) -> tuple[bool, bool]:
        await self._wait()
        return name not in self.records, False

    async def delete(self, name: str) -> Sequence[NetworkRecord]:
        await self._wait()
        assert self.end_pool is not None
        await self.end_pool(name)
        self.records.pop(name, None)
        changed = [disconnected(record, name) for record in self.records.values() if name in record.connected]
        self.records.update({record.name: record for record in changed})
        return changed

    async def _wait(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        if self.fails:
            raise UnavailableError("the cluster is away")


class World:
    """A directory of networks with a ledger."""

    def __init__(self, shared: Elsewhere | None = None) -> None:
        self.transaction = Transaction(MemoryStore())
        self.ledger = Ledger(self.transaction, FakeClock(), 30)
        self.ledger.in_cluster = shared is not None
        self.engine = Engine(self.transaction)
        self.desk = desk = Desk(self.engine, self.ledger)
        networks = Networks(self.transaction)
        if shared is None:
            desk.networks = networks
        if shared is not None:
            shared.end_pool = desk.delete_pool
        self.directory = Directory(
            self.engine,
            self.ledger,
            networks,
            create_pool=desk.create_pool,
            delete_pool=desk.delete_pool,
            shared=shared,
        )
        self.mode: Mode = "local" if shared is None else "cluster-address"

    async def create(self, name: str, subnet: str, bridge: str = "") -> NetworkRecord:
        spec = PoolSpec(((RangeSpec(subnet),),), mode=self.mode)
        return await self.directory.create(NetworkRecord(name, subnets=(subnet,), bridge=bridge), spec)

    async def connected(self) -> dict[str, tuple[str, ...]]:
        return {record.name: record.connected for record, _ in await self.directory.all()}


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def whole() -> T:
        return await test()

    return asyncio.run(whole())


async def outcomes(*calls: Awaitable[object]) -> list[str]:
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return ["" if not isinstance(answer, BaseException) else type(answer).__name__ for answer in answers]


def test_two_at_once_cannot_have_one_subnet_or_bridge() -> None:
    async def test() -> None:
        world = World()
        made = await outcomes(world.create("one", "10.1.0.0/16"), world.create("two", "10.1.128.0/17"))
        assert made == ["", "AlreadyExistsError"]
        made = await outcomes(world.create("three", "10.3.0.0/16", "br0"), world.create("four", "10.4.0.0/16", "br0"))
        assert made == ["", "AlreadyExistsError"]
        assert set(world.ledger.pools) == {"one", "three"}

    run(test)


@pytest.mark.parametrize("kind", ["alone", "cluster"])
def test_connections_that_are_made_at_once_are_all_there(kind: str) -> None:
    async def test() -> None:
        shared = Elsewhere() if kind == "cluster" else None
        world = World(shared)
        for number in range(4):
            await world.create(f"n{number}", f"10.{number}.0.0/16")
        await asyncio.gather(*(world.directory.connect("n0", f"n{number}", False) for number in (1, 2, 3)))
        wanted = {"n0": ("n1", "n2", "n3"), "n1": ("n0",), "n2": ("n0",), "n3": ("n0",)}
        assert await world.connected() == wanted
        if shared is not None:
            assert {name: record.connected for name, record in shared.records.items()} == wanted

    run(test)


@pytest.mark.parametrize("kind", ["alone", "cluster"])
def test_a_network_that_is_deleted_while_it_is_connected_stays_deleted(kind: str) -> None:
    async def test() -> None:
        shared = Elsewhere() if kind == "cluster" else None
        world = World(shared)
        await world.create("pods", "10.1.0.0/16")
        await world.create("web", "10.2.0.0/16")
        ended = await outcomes(world.directory.delete("pods"), world.directory.connect("web", "pods", False))
        assert ended == ["", "NotFoundError"]
        assert await world.connected() == {"web": ()}
        assert await outcomes(world.create("pods", "10.1.0.0/16"), world.directory.connect("web", "pods", False),
                              world.directory.delete("pods")) == ["", "", ""]  # fmt: skip
        assert await world.connected() == {"web": ()}
        assert shared is None or set(shared.records) == {"web"}

    run(test)


def test_what_failed_half_way_is_ended_by_trying_again() -> None:
    async def test() -> None:
        shared = Elsewhere()
        world = World(shared)
        shared.fails = True
        with pytest.raises(UnavailableError):
            await world.create("pods", "10.1.0.0/16")
        assert await world.connected() == {}
        shared.fails = False
        await world.create("pods", "10.1.0.0/16")
        await world.create("web", "10.2.0.0/16")
        await world.directory.connect("pods", "web", False)
        shared.fails = True
        with pytest.raises(UnavailableError):
            await world.directory.connect("pods", "web", True)
        assert await world.connected() == {"pods": ("web",), "web": ("pods",)}
        with pytest.raises(UnavailableError):
            await world.directory.delete("pods")
        assert "pods" in world.ledger.pools, "both or none"
        shared.fails = False
        await world.engine.run(lambda: world.ledger.delete_pool("pods"))  # as an older version left it
        await world.create("pods", "10.1.0.0/16")
        assert "pods" in world.ledger.pools, "the same again is a whole network"
        await world.directory.delete("pods")
        assert await world.connected() == {"web": ()}
        with pytest.raises(NotFoundError):
            await world.directory.delete("pods")

    run(test)


def test_a_network_in_use_is_whole_after_an_attempt_to_delete_it() -> None:
    async def test() -> None:
        world = World()
        await world.create("pods", "10.1.0.0/16")
        ask = Ask(Key("n1", "cni", "pods", "a", "eth0"), Netns(11), None, ("pods",))
        await world.engine.run(lambda: world.ledger.allocate(ask))
        with pytest.raises(PreconditionError, match="a/eth0"):
            await world.directory.delete("pods")
        assert await world.connected() == {"pods": ()}
        assert "pods" in world.ledger.pools

    run(test)


def test_a_networks_pool_is_not_deleted_alone() -> None:
    async def test() -> None:
        world = World()
        await world.create("pods", "10.1.0.0/16")
        with pytest.raises(PreconditionError, match="netloom network delete pods"):
            await world.desk.delete_pool("pods")
        assert "pods" in world.ledger.pools
        await world.directory.delete("pods")
        assert (await world.connected(), world.ledger.pools) == ({}, {})

    run(test)


@pytest.mark.parametrize("name", ["net/x", "", "../x", "a b", "x\n", "é", "x" * 64, ".x", "a\0"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="name: "):
        validated(NetworkRecord(name, subnets=("10.1.0.0/16",)))


@pytest.mark.parametrize("bridge", ["a/b", "..", "-x", "brücke", "ééééééééé", "x" * 16, "a b", "br0\n", "br:0"])
def test_bridges_that_cannot_be(bridge: str) -> None:
    with pytest.raises(InvalidArgumentError, match="bridge: "):
        validated(NetworkRecord("pods", subnets=("10.1.0.0/16",), bridge=bridge))


def test_a_bridges_name_fits_whatever_the_networks_is() -> None:
    names = {bridge_name("x" * length) for length in range(1, 64)}
    assert len(names) == 63
    assert max(map(len, names)) == 15
