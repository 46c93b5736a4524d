"""A network and its pool end together: whatever comes in between, and wherever the node that does it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import layout
from cluster.errors import UnavailableError as AwayError
from cluster.etcd import Delete, Put, TxnResult
from cluster.layout import NetworkRecord
from ipamd.errors import IpamdError, NotFoundError, PreconditionError, UnavailableError
from ipamd.pool import PoolSpec
from tests.cluster.loop import looped
from tests.cluster.world import nothing, worlds
from tests.etcd import EtcdCluster

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@looped
async def test_both_go_andnothing_else(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, _):
        await a.create("blue", "198.18.1.0/24")
        for name, subnet in (("web", "10.1.0.0/16"), ("db", "10.2.0.0/16"), ("log", "10.3.0.0/16")):
            await a.create(name, subnet, "")
        await a.directory.connect("web", "db", False)
        await a.directory.connect("web", "log", False)
        for name in ("blue", "web"):
            await a.directory.delete(name)
            assert await a.in_etcd(name) == await a.here(name) == ""
        assert await a.in_etcd("db") == "network pool"
        assert [record.connected for record in a.networks.all()] == [(), ()]
        assert all(record.connected == () for record in (await a.shared._state()).records)
        with pytest.raises(NotFoundError):
            await a.directory.delete("web")


@looped
async def test_a_name_in_docker_that_comes_in_between(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        a.before_mark = lambda: b.shared.share("blue", "docker-blue")
        with pytest.raises(PreconditionError, match="docker network rm docker-blue"):
            await a.directory.delete("blue")
        assert (await a.in_etcd("blue"), await a.here("blue")) == ("network pool", "blue pool")
        a.before_mark = nothing
        await b.shared.share("blue", "")
        refused: list[IpamdError] = []

        async def share() -> None:
            with pytest.raises(UnavailableError, match="is being deleted") as caught:
                await b.shared.share("blue", "docker-blue")
            refused.append(caught.value)

        a.before_end = share
        await a.directory.delete("blue")
        assert len(refused) == 1
        assert await a.in_etcd("blue") == ""


@looped
async def test_a_change_that_comes_in_between_is_looked_at(one: EtcdCluster, tmp_path: Path) -> None:
    """A node connects another network with the one that goes, after what goes was read."""
    async with worlds(one, tmp_path) as (a, b):
        for world in (a, b):
            for name, subnet in (("web", "10.1.0.0/16"), ("db", "10.2.0.0/16")):
                await world.create(name, subnet, "")
        state, looks = a.shared._state, 0

        async def late() -> Any:
            nonlocal looks
            looks += 1
            found = await state()
            if looks == 1:
                await b.directory.connect("web", "db", False)
            return found

        a.shared._state = late  # type: ignore[method-assign]
        await a.directory.delete("web")
        assert looks == 2
        assert await a.in_etcd("web") == ""
        assert [(record.name, record.connected) for record in (await state()).records] == [("db", ())]


@looped
async def test_two_who_delete_it_at_once(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, b):
        for number in range(6):
            name = f"n{number}"
            for world in (a, b):
                await world.create(name, f"198.18.{number}.0/24")
            outcomes = await asyncio.gather(*(world.directory.delete(name) for world in (a, b)), return_exceptions=True)
            assert all(one is None or isinstance(one, IpamdError) for one in outcomes), outcomes
            left = await a.in_etcd(name)
            assert left in ("", "network pool"), left
            if left:  # each was in the other's way
                await a.directory.delete(name)


@pytest.mark.parametrize("what", ["create", "share", "connect"])
@looped
async def test_one_that_another_node_deletes_before_this_one_has_kept_it(
    one: EtcdCluster, tmp_path: Path, what: str
) -> None:
    """Who follows etcd has heard of its end by then, and nobody would tell it again."""
    async with worlds(one, tmp_path) as (a, b):
        for world in (a, b) if what != "create" else (b,):
            await world.create("blue", "198.18.1.0/24", "" if what == "connect" else "overlay")
            await world.create("web", "198.18.2.0/24", "")
        change = "create_overlay" if what == "create" else "change" if what == "connect" else "share"
        done = getattr(a.shared, change)

        async def late(*arguments: Any) -> Any:
            answer = await done(*arguments)
            if what == "share":
                await b.shared.share("blue", "")
            await b.directory.delete("blue")
            # As the follower hears of it.
            await a.shared._take([], {"blue"})
            await a.mirror._list_pools((await a.etcd.range(layout.POOLS)).pairs, 1 << 40)
            return answer

        setattr(a.shared, change, late)
        match what:
            case "create":
                await a.create("blue", "198.18.1.0/24")
            case "share":
                await a.directory.share("blue", "x")
            case "connect":
                await a.directory.connect("blue", "web", False)
        assert await a.in_etcd("blue") == await a.here("blue") == ""


@looped
async def test_wherever_etcd_goes_away_both_are_there_or_none(one: EtcdCluster, tmp_path: Path) -> None:
    """Each time one step further; what was asked for is done, and its answer lost."""
    async with worlds(one, tmp_path) as (a, b):
        txn = a.etcd.txn
        done, seen = False, set()
        for step in range(12):
            await a.create("blue", "198.18.1.0/24")
            calls = 0

            async def lost(compares: Any, then: Any, *more: Any, step: int = step, **options: Any) -> TxnResult:
                nonlocal calls
                if any(isinstance(one, Put | Delete) for one in then):
                    calls += 1
                    if calls > step:
                        if calls == step + 1:
                            await txn(compares, then, *more, **options)
                        raise AwayError("away")
                return await txn(compares, then, *more, **options)

            a.etcd.txn = lost  # type: ignore[method-assign]
            try:
                await a.directory.delete("blue")
                done = True
            except UnavailableError:
                pass
            a.etcd.txn = txn  # type: ignore[method-assign]
            left = await a.in_etcd("blue")
            seen.add(left)
            assert left in ("", "network pool", "network pool deleting")
            if left:
                with pytest.raises(UnavailableError, match="is being deleted; ask again, or delete it again"):
                    await b.create("blue", "198.18.1.0/24")
                await a.directory.delete("blue")
            else:
                await a.shared._take([], {"blue"})  # as it hears of it
                await a.mirror._list_pools([], 1 << 40)
            assert await a.in_etcd("blue") == await a.here("blue") == ""
            if done:
                break
        assert done
        assert seen == {"", "network pool deleting"}


@looped
async def test_a_pool_goes_with_its_network_only(one: EtcdCluster, tmp_path: Path) -> None:
    async with worlds(one, tmp_path) as (a, b):
        await a.create("blue", "198.18.1.0/24")
        with pytest.raises(PreconditionError, match="netloom network delete blue"):
            await b.mirror.delete_pool("blue")
        assert await a.in_etcd("blue") == "network pool"
        # A routed network whose pool goes before the network is there.
        create = a.shared.create

        async def late(record: NetworkRecord) -> None:
            await b.mirror.delete_pool("web")
            await create(record)

        a.shared.create = late  # type: ignore[method-assign]
        with pytest.raises(PreconditionError, match="network web has no pool"):
            await a.create("web", "10.1.0.0/16", "")
        assert await a.in_etcd("web") == ""


@pytest.mark.parametrize("who", [0, 1], ids=["its maker", "another node"])
@looped
async def test_half_a_network_of_an_older_version(one: EtcdCluster, tmp_path: Path, who: int) -> None:
    """It is made whole by creating it again, and can be deleted."""
    async with worlds(one, tmp_path) as both:
        a, b = both
        await a.create("blue", "198.18.1.0/24")
        await a.etcd.delete(layout.POOLS + "blue")
        await both[who].shared.create_overlay(
            NetworkRecord("blue", "overlay", ("198.18.1.0/24",), bridge="nl-blue"),
            PoolSpec(mode="cluster-address", range_sets=()),
            lambda record, _others, _taken: record,
        )
        assert await a.in_etcd("blue") == "network pool"
        await a.etcd.delete(layout.POOLS + "blue")
        with pytest.raises(PreconditionError, match="has no pool"):
            await b.shared.share("blue", "x")
        await a.directory.delete("blue")
        assert await a.in_etcd("blue") == ""
