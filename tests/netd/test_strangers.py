"""Who may begin to talk to which network, from what is known of networks; and what holds while nobody tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from cluster.layout import NetworkRecord
from kernel import libnftables, nft
from kernel.nft import Element
from kernel.record import Records
from kernel.session import Session
from netd import strangers
from netd.agent import Agent
from netd.strangers import CONFIGURED, DEFINED, OWN, Strangers
from netd.underlay import Choice
from netd.values import Network, Node, vtep_mac
from tests.hosts import wait_until
from tests.kernel import spaces
from tests.netd.test_overlays import DEFAULT


def record(name: str, *subnets: str, **keys: Any) -> NetworkRecord:
    return NetworkRecord(name, "bridge", subnets, "", f"nl-{name}", **keys)


def configured(*subnets: str, is_open: bool = False) -> Network:
    return Network("n", tuple(map(ip_network, subnets)), "vxlan", 1, 4789, 0, True, False, is_open)


def pairs(elements: list[Element], name: str) -> set[tuple[str, ...]]:
    return {one.key for one in elements if one.set == name}


def test_a_network_is_reached_from_itself_and_from_those_that_it_is_connected_with() -> None:
    defined = {
        one.name: one
        for one in (
            record("a", "10.1.0.0/16", "fd01::/64", connected=("b", "gone", "wide")),
            record("b", "10.2.0.0/16", "10.3.0.0/16", connected=("a",)),
            record("c", "10.4.0.0/16"),
            record("wide", "10.5.0.0/16", open=True, connected=("a",)),
        )
    }
    found = strangers.of_definitions(defined)
    assert pairs(found, "remote4") == {("0.0.0.0/0", f"10.{n}.0.0/16") for n in (1, 2, 3, 4)}
    assert pairs(found, "remote6") == {("::/0", "fd01::/64")}
    friends = {1: (1, 2, 3, 5), 2: (1, 2, 3), 3: (1, 2, 3), 4: (4,)}
    assert pairs(found, "among4") == {(f"10.{n}.0.0/16", f"10.{to}.0.0/16") for to, of in friends.items() for n in of}
    assert pairs(found, "among6") == {("fd01::/64", "fd01::/64")}


def test_networks_of_the_configuration() -> None:
    found = strangers.of_configuration([configured("10.1.0.0/16", "fd01::/64"), DEFAULT])
    assert found == [
        nft.remote("10.1.0.0/16"),
        nft.among("10.1.0.0/16", "10.1.0.0/16"),
        nft.remote("fd01::/64"),
        nft.among("fd01::/64", "fd01::/64"),
    ]
    assert strangers.of_configuration([configured("10.1.0.0/16", is_open=True), DEFAULT]) == []


# Somebody else's, who makes strangers look like this host.
TRANSLATES = "table ip docker { chain out { type nat hook postrouting priority srcnat; }; }"


@pytest.fixture
def session() -> Iterator[Session]:
    with spaces.fresh() as space, spaces.inside(space), Session() as opened:
        spaces.run("ip", "link", "set", "lo", "up")
        spaces.run("ip", "link", "add", "eth0", "up", "type", "bridge")
        spaces.run("ip", "address", "add", "10.0.0.1/24", "dev", "eth0")
        spaces.run("nft", TRANSLATES)
        yield opened


def in_kernel(session: Session) -> set[Element]:
    return {element for name in nft.standing_sets() for element in nft.all_elements(session, name)}


def beside(agent: Agent, one: Strangers, steps: Callable[[], Coroutine[object, object, None]]) -> None:
    """Takes the steps while it runs."""

    async def run() -> None:
        task = asyncio.create_task(one.run())
        try:
            await steps()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    agent.start()
    try:
        asyncio.run(run())
    finally:
        agent.stop()


@pytest.mark.kernel
def test_what_was_known_holds_until_somebody_tells(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A netd that starts while etcd is away, with another configuration."""
    monkeypatch.setattr(strangers, "_EVERY_S", 0.02)
    old_own, new_own = nft.local("10.1.7.0/24"), nft.local("10.1.8.0/24")
    old = [nft.remote("10.1.0.0/16"), nft.among("10.1.0.0/16", "10.1.0.0/16")]
    mine = [nft.remote("10.8.0.0/16"), nft.among("10.8.0.0/16", "10.8.0.0/16")]
    now = [nft.remote("10.2.0.0/16"), nft.among("10.2.0.0/16", "10.2.0.0/16")]
    records = Records(str(tmp_path))
    records.stand(session, OWN, [old_own])
    records.stand(session, DEFINED, old)
    records.stand(session, CONFIGURED, [nft.remote("10.9.0.0/16")])
    node = Node("host1", (), (ip_network("10.1.8.0/24"),), vtep_mac("host1"))
    agent = Agent(node, Choice("eth0"), (DEFAULT,), (), 0, may_drop=False)
    one = Strangers(agent, str(tmp_path), [configured("10.8.0.0/16"), DEFAULT])
    one.presume({"older": record("older", "10.7.0.0/16")})

    async def until(wanted: list[Element]) -> None:
        await asyncio.to_thread(
            wait_until, lambda: in_kernel(session) == set(wanted), str(wanted), lambda: str(in_kernel(session))
        )

    async def steps() -> None:
        await until([old_own, new_own, *old, *mine])
        one.want({"b": record("b", "10.2.0.0/16")})
        await until([old_own, new_own, *now, *mine])
        await asyncio.wrap_future(agent.call(lambda reconciler: setattr(reconciler, "may_drop", True)))
        one.reload([DEFAULT])
        await until([new_own, *now])

    beside(agent, one, steps)
    # It outlives netd, until somebody wants it gone.
    libnftables.run("delete table inet netloom", "somebody's mistake")
    records.rebuild(session)
    assert in_kernel(session) == {new_own, *now}
    strangers.remove(str(tmp_path))
    assert in_kernel(session) == set()
    assert list((tmp_path / "standing").iterdir()) == []


@pytest.mark.kernel
def test_nothing_is_tracked_where_nobody_translates(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of ours would cost tunnels a quarter. As soon as somebody translates it is there."""
    monkeypatch.setattr(strangers, "_EVERY_S", 0.02)
    spaces.run("nft", "flush ruleset")
    agent = Agent(Node("host1", (), (), vtep_mac("host1")), Choice("eth0"), (DEFAULT,), (), 0, may_drop=False)
    one = Strangers(agent, str(tmp_path), [DEFAULT])
    one.want({"b": record("b", "10.2.0.0/16")})
    wanted = {nft.remote("10.2.0.0/16"), nft.among("10.2.0.0/16", "10.2.0.0/16")}

    async def steps() -> None:
        await asyncio.to_thread(wait_until, lambda: set(Records(str(tmp_path)).standing()) == wanted, "the records")
        await asyncio.sleep(0.1)
        assert spaces.run("nft", "list", "ruleset") == ""
        spaces.run("nft", TRANSLATES)
        await asyncio.to_thread(wait_until, lambda: in_kernel(session) == wanted, "the elements")

    beside(agent, one, steps)


@pytest.mark.kernel
def test_after_a_boot_what_is_on_the_disk_holds_until_somebody_tells(session: Session, tmp_path: Path) -> None:
    agent = Agent(Node("host1", (), (), vtep_mac("host1")), Choice("eth0"), (DEFAULT,), (), 0, may_drop=False)
    one = Strangers(agent, str(tmp_path), [DEFAULT])
    one.presume({"old": record("old", "10.7.0.0/16")})

    def until(wanted: set[Element], what: str) -> None:
        wait_until(lambda: in_kernel(session) == wanted, what, lambda: str(in_kernel(session)))

    async def steps() -> None:
        for name, subnet in (("old", "10.7.0.0/16"), ("new", "10.6.0.0/16")):
            await asyncio.to_thread(until, {nft.remote(subnet), nft.among(subnet, subnet)}, name)
            one.want({"new": record("new", "10.6.0.0/16")})

    beside(agent, one, steps)
