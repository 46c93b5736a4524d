"""MACs that were told: the last one counts, whatever comes in between, and one that follows from its address goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import layout
from cluster.errors import UnavailableError as AwayError
from cluster.etcd import Delete, Etcd, Pair, Put, TxnResult
from cluster.layout import BlockRecord, MacRecord
from ipamd.errors import UnavailableError
from ipamd.member.book import Book
from ipamd.member.macs import Macs
from ipamd.shared import Place
from tests.cluster.loop import connected, looped
from tests.cluster.test_network_lost import use
from tests.cluster.world import World
from tests.etcd import EtcdCluster

pytestmark = pytest.mark.kernel

FIRST, LAST = "02:00:00:00:00:01", "02:00:00:00:00:02"


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@dataclass(frozen=True)
class Held:
    """An address of an overlay network that a node holds, and its MACs."""

    etcd: Etcd
    world: World
    ip: str
    default: str

    def macs(self) -> Macs:
        """As after a start."""
        return Macs(self.etcd, self.world.engine, self.world.transaction, "id-a")

    async def told(self) -> str:
        pair = await self.etcd.get(layout.MACS + layout.place("blue", self.ip))
        return layout.decode(MacRecord, pair.key, pair.value).mac if pair is not None else ""


@asynccontextmanager
async def held(one: EtcdCluster, directory: Path) -> AsyncIterator[Held]:
    async with connected(one.sockets, f"/{directory.name}/") as etcd:
        world = World(etcd)
        try:
            await world.create("blue", "198.18.1.0/24")
            allocation = await use(world, "blue")
            ip = allocation.addresses[0].ip
            record = Book(BlockRecord("a", "id-a")).record(allocation)
            await etcd.put(layout.ADDRESSES + layout.place("blue", ip), record)
            yield Held(etcd, world, ip, "02:42:" + ":".join(f"{int(byte):02x}" for byte in ip.split(".")))
        finally:
            await world.engine.close()


@looped
async def test_the_last_one_counts(one: EtcdCluster, tmp_path: Path) -> None:
    async with held(one, tmp_path) as address:
        macs, directory = address.macs(), address.world.directory
        for mac in (FIRST, LAST):
            await macs.set("blue", address.ip, mac)
            assert await address.told() == mac
        assert await macs.look() == await address.macs().look() == 0
        await address.etcd.delete(layout.MACS, prefix=True)
        assert await address.macs().look() == 1
        assert await address.told() == LAST
        await directory.set_mac("blue", address.ip, FIRST)
        await directory.set_mac("blue", address.ip, address.default)
        assert await address.told() == ""
        await address.macs().look()
        assert await address.told() == ""


@looped
async def test_nothing_is_asked_of_etcd_where_nothing_was_told(one: EtcdCluster, tmp_path: Path) -> None:
    async with held(one, tmp_path) as address:

        async def never(*_: Any, **__: Any) -> TxnResult:
            raise AwayError("asked")

        address.etcd.txn = never  # type: ignore[method-assign]
        await address.world.directory.set_mac("blue", address.ip, address.default)
        with pytest.raises(UnavailableError):
            await address.world.directory.set_mac("blue", address.ip, FIRST)


@looped
async def test_a_look_puts_no_older_one_back(one: EtcdCluster, tmp_path: Path) -> None:
    """One is told while the node looks at what etcd lost."""
    async with held(one, tmp_path) as address:

        class Slow(Macs):
            async def _read(self, places: Sequence[Place]) -> Iterable[tuple[Place, Pair | None, Pair | None]]:
                found = await super()._read(places)
                self.telling = asyncio.create_task(self.set("blue", address.ip, LAST))
                for _ in range(20):  # it gets as far as it can
                    await asyncio.sleep(0.005)
                return found

            async def _put(self, *arguments: Any) -> bool:
                done = await super()._put(*arguments)
                await asyncio.sleep(0.3)  # the answer takes its time
                return done

        slow = Slow(address.etcd, address.world.engine, address.world.transaction, "id-a")
        await slow.set("blue", address.ip, FIRST)
        await address.etcd.delete(layout.MACS, prefix=True)
        await slow.look()
        await slow.telling
        assert await address.told() == LAST


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("last", [LAST, ""])
@looped
async def test_a_node_that_dies_while_it_tells(one: EtcdCluster, tmp_path: Path, last: str, done: bool) -> None:
    """Whether etcd was told or not, a restarted one goes by what was asked last."""
    async with held(one, tmp_path) as address:
        await address.macs().set("blue", address.ip, FIRST)
        txn = address.etcd.txn

        async def lost(compares: Any, then: Any, *more: Any, **options: Any) -> TxnResult:
            if not any(isinstance(one, Put | Delete) for one in then):
                return await txn(compares, then, *more, **options)
            if done:
                await txn(compares, then, *more, **options)
            raise AwayError("no answer")

        address.etcd.txn = lost  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await address.macs().set("blue", address.ip, last)
        address.etcd.txn = txn  # type: ignore[method-assign]
        again = address.macs()
        await again.look()
        assert await address.told() == last
        # And what is asked again then is what there is.
        await again.set("blue", address.ip, last)
        assert await address.told() == last
