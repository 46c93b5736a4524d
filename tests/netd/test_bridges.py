"""The bridges of overlays in a real network namespace, and netd's own records: what is left once they are gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cluster.layout import NetworkRecord
from kernel.record import Records
from netd import bridges
from netd.agent import Agent
from netd.bridges import PLUGIN, Bridges
from netd.underlay import Choice
from tests.hosts import PATIENCE_S
from tests.kernel import spaces
from tests.netd.test_overlays import DEFAULT, OV1, OWN, PEERS, bridge

pytestmark = pytest.mark.kernel
DEFINED = {"ov1": NetworkRecord("ov1", "overlay", tuple(map(str, OV1.subnets)), bridge=OV1.bridge, vni=OV1.vni)}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setattr(bridges, "_EVERY_S", 0.05)
    with spaces.fresh() as space, spaces.inside(space):
        spaces.run("ip", "link", "set", "lo", "up")
        spaces.run("ip", "link", "add", "eth0", "type", "bridge")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        made = Agent(OWN, Choice("eth0"), (DEFAULT,), tuple(PEERS), 0)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@contextlib.asynccontextmanager
async def running(agent: Agent, run_dir: Path) -> AsyncIterator[Bridges]:
    made = Bridges(agent, str(run_dir))
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def define(agent: Agent, made: Bridges, networks: Mapping[str, NetworkRecord]) -> None:
    """As netd's registry does where etcd tells of networks."""
    await asyncio.wrap_future(agent.call(lambda one: one.define_overlays([OV1] if "ov1" in networks else [])))
    await asyncio.wrap_future(agent.call(lambda one: one.full()))
    made.want(networks)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():  # noqa: ASYNC110 - the kernel and files say nothing by themselves
            await asyncio.sleep(0.02)


def is_there(name: str) -> bool:
    return f"{name}:" in spaces.run("ip", "-o", "link", "show")


def records(run_dir: Path) -> list[str]:
    return [one.key.container_id for one in Records(str(run_dir)).of_network(PLUGIN, PLUGIN)]


def hold_port(name: str = "nl-ov1") -> None:
    """A container's, so that the bridge is not idle."""
    spaces.run("ip", "link", "add", "port", "type", "veth", "peer", "name", "inside")
    spaces.run("ip", "link", "set", "port", "master", name)


@pytest.mark.parametrize("others", [{}, {"other": NetworkRecord("other", "routed", ("10.77.0.0/24",), bridge="nl-o")}])
def test_a_network_that_ends_with_its_last_container(
    agent: Agent, tmp_path: Path, others: dict[str, NetworkRecord]
) -> None:
    """It is deleted before the bridge was seen to be idle: bridge and record go, also where it was the only network."""

    async def run() -> None:
        async with running(agent, tmp_path) as made:
            bridge()
            hold_port()
            await define(agent, made, {**DEFINED, **others})
            await until(lambda: records(tmp_path) == ["ov1"])
            spaces.run("ip", "link", "delete", "port")
            await define(agent, made, others)
            await until(lambda: not records(tmp_path))
            await until(lambda: not is_there("nl-ov1"))

    asyncio.run(run())


def test_a_start_without_etcd_keeps_the_record(agent: Agent, tmp_path: Path) -> None:
    """Nobody has told which networks there are: what an earlier netd wrote holds until somebody does."""

    async def run() -> None:
        async with running(agent, tmp_path) as made:
            bridge()
            hold_port()
            await define(agent, made, DEFINED)
            await until(lambda: records(tmp_path) == ["ov1"])
        async with running(agent, tmp_path) as again:
            before = again._idle  # replaced by each look
            await until(lambda: again._idle is not before)
            assert records(tmp_path) == ["ov1"]

    asyncio.run(run())


def test_a_network_that_ends_while_no_netd_runs(agent: Agent, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(agent, tmp_path) as made:
            bridge()
            hold_port()
            await define(agent, made, DEFINED)
            await until(lambda: records(tmp_path) == ["ov1"])
        spaces.run("ip", "link", "delete", "port")
        async with running(agent, tmp_path) as again:
            await define(agent, again, {})
            await until(lambda: not records(tmp_path))
            await until(lambda: not is_there("nl-ov1"))

    asyncio.run(run())
