"""A network that etcd lost, with addresses in use: it is put there again, beside what was defined meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster import layout
from cluster.etcd import Delete, Put
from cluster.layout import NetworkRecord
from ipamd.lease import Ask
from ipamd.store.base import Allocation, Key, Netns
from tests.cluster.loop import looped
from tests.cluster.test_overlay import Lab, found, wanted
from tests.cluster.world import World, worlds
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import key, wait_for

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


async def use(world: World, pool: str, *, confirmed: bool = True) -> Allocation:
    """A container of the world's has an address; etcd may not have said so yet."""
    world.ledger.shared_refusal = ""
    ask = Ask(Key("a", "cni", pool, f"c-{pool}", "eth0"), Netns(1), None, (pool,))
    held, _ = await world.engine.run(lambda: world.ledger.allocate(ask))
    if confirmed:
        world.ledger.unconfirmed.pop(held.generation)
    return held


async def lose(world: World, *names: str) -> None:
    await world.etcd.txn([], [Delete(prefix + name) for name in names for prefix in (layout.NETWORKS, layout.POOLS)])


async def hear(world: World) -> None:
    """All that etcd has now."""
    page = await world.etcd.range(layout.NETWORKS)
    await world.shared._listed(page.pairs, page.revision)


@looped
async def test_it_comes_back_with_its_pool_and_in_order(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        await a.create("free", "198.18.2.0/24")
        await use(a, "blue")
        await lose(a, "blue", "free")
        await b.create("red", "198.18.3.0/24")
        last = await a.etcd.get(layout.LAST_NETWORK)
        red = (await b.shared._state()).networks["red"][0]
        assert red.vni == 256, "blue's own was free again"
        await lose(b, "red")
        await hear(a)
        assert await a.in_etcd("blue") == "network pool"
        assert await a.in_etcd("free") == ""
        after = await a.etcd.get(layout.LAST_NETWORK)
        assert last is not None
        assert after is not None
        assert (after.value, after.mod_revision > last.mod_revision) == (b"blue", True)


@pytest.mark.parametrize("way", ["vni", "subnet", "bridge", "docker", "pool"])
@looped
async def test_what_is_in_its_way_is_named(one: EtcdCluster, tmp_path: Path, way: str) -> None:
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        await a.shared.share("blue", "docker-blue")
        await hear(a)
        await use(a, "blue")
        await lose(a, "blue")
        match way:
            case "vni":
                await b.create("red", "198.18.2.0/24")
            case "subnet":
                await b.create("red", "198.18.1.128/25", "")
            case "bridge":
                await b.create("red", "198.18.2.0/24", "", "nl-blue")
            case "docker":
                await b.create("x", "198.18.4.0/24")
                await b.create("red", "198.18.2.0/24")
                await lose(b, "x")
                await b.shared.share("red", "docker-blue")
            case "pool":
                await b.create("blue", "198.18.2.0/24")
                await b.etcd.delete(layout.NETWORKS + "blue")
        for _ in range(2):
            await hear(a)
            assert list(a.shared.conflicts) == ["blue"]
            expected = {
                "vni": "network red has VNI 256",
                "subnet": "198.18.1.0/24 overlaps 198.18.1.128/25 of network red",
                "bridge": "network red has the bridge nl-blue",
                "docker": "Docker shows network red as docker-blue",
                "pool": "a pool blue with another spec",
            }
            assert expected[way] in a.shared.conflicts["blue"]
            assert "network" not in (await a.in_etcd("blue")).split()
            assert await a.here("blue") == "blue pool", "its containers go on"
        # Once nothing is in its way it comes back, at the next thing that is heard.
        await lose(b, "red", *(["blue"] if way == "pool" else []))
        await a.shared._changed([])
        assert a.shared.conflicts == {}
        assert await a.in_etcd("blue") == "network pool"


@looped
async def test_one_that_is_defined_at_the_same_time(one: EtcdCluster, tmp_path: Path) -> None:
    """After the others were read, and before it is put back."""
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        await use(a, "blue")
        await lose(a, "blue")
        state, looks = a.shared._state, 0

        async def late() -> Any:
            nonlocal looks
            looks += 1
            found = await state()
            if looks == 1:
                await b.create("red", "198.18.2.0/24")
            return found

        a.shared._state = late  # type: ignore[method-assign]
        await hear(a)
        assert looks == 2
        assert "network red has VNI 256" in a.shared.conflicts["blue"]
        assert await a.in_etcd("blue") == ""


@looped
async def test_two_nodes_put_it_back_at_once(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, b):
        for world in (a, b):
            await world.create("blue", "198.18.1.0/24")
            await use(world, "blue")
        await lose(a, "blue")
        await asyncio.gather(hear(a), hear(b))
        assert (a.shared.conflicts, b.shared.conflicts) == ({}, {})
        assert await a.in_etcd("blue") == "network pool"


@looped
async def test_a_claim_under_way_does_not_bring_a_deleted_network_back(one: EtcdCluster, tmp_path: Path) -> None:
    """The ledger chooses before etcd is asked, which refuses as the pool is gone."""
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        await b.create("blue", "198.18.1.0/24")
        held = await use(a, "blue", confirmed=False)
        await b.directory.delete("blue")
        followers = asyncio.gather(a.shared._take([], {"blue"}), a.mirror._list_pools([], 1 << 40))
        await asyncio.sleep(0.3)
        assert not followers.done()
        await a.engine.run(lambda: a.ledger.release(held.key, held.generation))
        await followers
        assert await a.in_etcd("blue") == await a.here("blue") == ""


def test_ip_check_names_it(one: EtcdCluster, tmp_path: Path) -> None:
    with ExitStack() as stack:
        lab = Lab(one, tmp_path, stack)
        with lab.a.client() as client:
            client.create_network(wanted("blue", "198.18.1.0/24"))
            client.allocate(key("c"), pools=["blue"])
            red = NetworkRecord("red", "overlay", ("198.18.1.0/25",), bridge="nl-red", vni=300)
            lab.write(Delete(layout.NETWORKS + "blue"), Put(layout.NETWORKS + "red", layout.encode(red)))
            wait_for("the difference", lambda: found(client) == ["lost-network  False"])
            assert [one.name for one in client.list_networks()] == ["blue", "red"]
            client.delete_network("red")
            wait_for("blue in etcd", lambda: lab.keys(layout.NETWORKS) == ["blue"])
            wait_for("no difference", lambda: found(client) == [])
