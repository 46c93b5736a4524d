"""Addresses about which etcd and the store differ, and etcd that did not answer once, in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import layout
from cluster.etcd import Etcd, Pair, UnavailableError
from cluster.layout import BlockRecord
from ipamd.allocate import LostError
from ipamd.lease import Ask
from ipamd.member import addresses as addresses_module
from ipamd.member.book import Book, address_key
from ipamd.member.shared import SharedAddresses
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.store.base import Key, Netns
from tests.cluster.loop import connected, looped, until
from tests.cluster.relay import Relay
from tests.cluster.world import World, worlds
from tests.etcd import EtcdCluster

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


class _Slow:
    """An etcd that makes no change before it may; and how often it was asked for a key."""

    def __init__(self, etcd: Etcd) -> None:
        self.may = asyncio.Event()
        self.gets = 0
        self._etcd = etcd

    async def txn(self, *arguments: Any, **options: Any) -> Any:
        await self.may.wait()
        return await self._etcd.txn(*arguments, **options)

    async def get(self, key: str) -> Pair | None:
        self.gets += 1
        return await self._etcd.get(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._etcd, name)


@looped
async def test_one_that_is_claimed_while_it_is_looked_at(
    one: EtcdCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In use here, and etcd has it for another node: that is said once the claim has ended, which says nothing."""
    monkeypatch.setattr(addresses_module, "_PAUSE_S", 0.05)
    monkeypatch.setattr(addresses_module, "_GRACE_S", 0.2)
    async with worlds(one, tmp_path) as (a, _):
        spec = PoolSpec(((RangeSpec("10.1.0.0/24"),),), mode="cluster-address")
        await a.mirror.create_pool("p", spec)
        await a.etcd.put(f"{layout.NODES}a", b"")
        a.ledger.shared_refusal = ""
        key = Key("a", "cni", "n", "one", "eth0")
        held, _created = await a.engine.run(lambda: a.ledger.allocate(Ask(key, Netns(), None, ("p",))), grows=True)
        a.ledger.unconfirmed.clear()  # etcd had it as this node's
        place = "p", held.addresses[0].ip
        await a.etcd.put(address_key(place), Book(BlockRecord("b", "id-b")).record(held))
        slow: Any = _Slow(a.etcd)
        identity = BlockRecord("a", "id-a")
        shared = SharedAddresses(slow, a.engine, a.ledger, a.transaction.store, identity, a.mirror.pools)
        claim = shared._claims.begin(held, again=True)
        running = asyncio.create_task(shared.run())
        try:
            await until(lambda: asyncio.sleep(0, slow.gets), "a look at it")
            await asyncio.sleep(0.2)
            assert not shared.conflicts
            slow.may.set()
            with pytest.raises(LostError):
                await claim.future
            await until(lambda: asyncio.sleep(0, shared.conflicts), "the complaint")
            assert list(shared.conflicts) == [place]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@looped
async def test_etcd_that_did_not_answer_once_is_asked_again(one: EtcdCluster, tmp_path: Path) -> None:
    """By whoever is refused for that: nobody else asks it, as on a node at rest."""
    async with (
        Relay(one.sockets[0]) as relay,
        connected((relay.endpoint,), f"/{tmp_path.name}/", timeout_s=5.0) as etcd,
    ):
        world = World(etcd)
        shared = SharedAddresses(
            etcd, world.engine, world.ledger, world.transaction.store, BlockRecord("a", "id-a"), world.mirror.pools
        )
        shared._addresses.known.set()

        async def refused() -> bool:
            await shared.ready()
            return bool(world.ledger.shared_refusal)

        async def served() -> bool:
            return not await refused()

        try:
            await etcd.get("a")
            assert await served()
            relay.cut()
            with pytest.raises(UnavailableError):
                await etcd.get("a")
            await until(refused, "more than a doubt")
            relay.heal()
            await until(served, "an answer")
        finally:
            await world.engine.close()
