"""netd's thread for the kernel, in a real network namespace, on bad days."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from kernel import link, macs
from kernel.rtevents import Change, RouteEvents
from kernel.session import Session
from netd import agent
from netd.agent import Agent
from netd.underlay import Choice
from netd.values import Holder, Overlay
from tests.hosts import IPV6, PATIENCE_S, wait_until
from tests.kernel import spaces
from tests.netd.test_overlays import bridge, fdb, shown_bridge, shown_device
from tests.netd.test_reconcile import DEFAULT, OWN, PEER, routes

pytestmark = pytest.mark.kernel
OV1 = Overlay("ov1", (ip_network("10.9.0.0/24"),), 256, "nl-ov1", 4789, 0, False, True, False)
MACS = [macs.of_address(ip_address(f"10.9.0.{number}")) for number in (2, 9)]
HOLDERS = [Holder(ip_address("10.9.0.2"), MACS[0], "b"), Holder(ip_address("10.9.0.9"), MACS[1], "a")]
# What somebody does by hand, or a program that knows nothing of netd; each may fail after another one.
DAMAGE = (
    "ip neigh flush dev nl-ov1 nud permanent",
    "ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:98 dev nl-ov1 nud permanent",
    f"bridge fdb del {MACS[0]} dev nl-vx256 self",
    f"bridge fdb del {MACS[0]} dev nl-vx256 master",
    "bridge fdb add 02:00:00:00:00:77 dev nl-vx256 self dst 10.0.0.3",
    "bridge link set dev nl-vx256 neigh_suppress off flood on",
    "ip link set nl-vx256 nomaster",
    "ip link set nl-vx256 down",
    "ip link set nl-vx256 down name mine",
    "ip link set nl-vx256 mtu 1300",
    "ip link del nl-vx256",
    "ip address del 10.9.0.1/24 dev nl-ov1",
    "ip link set nl-ov1 address 02:00:00:00:00:99",
    "ip link set nl-ov1 down",
    "ip link set nl-ov1 down name other1",
    "ip link del nl-ov1",
    "ip route flush proto 110",
    "ip link set nl-vx1 address 02:00:00:00:00:54",
    "ip link set nl-vx1 down",
    "ip link set nl-vx1 down name mine1",
    "ip link del nl-vx1",
    "ip address del 10.0.0.1/24 dev eth0",
    "ip link set eth0 down",
    "ip link del eth0",
)

ENDS = (
    "ip neigh show dev nl-vx1 nud permanent",
    "bridge fdb show dev nl-vx1",
    "ip -4 -br address show dev nl-vx1",
)


class Endless(RouteEvents):
    """Each event that is read has another one come, as in a storm that is quicker than its reader."""

    raging = True

    def __init__(self) -> None:
        super().__init__()
        self._session = Session()

    def close(self) -> None:
        self._session.close()
        super().close()

    def _parse(self, data: bytes) -> Iterator[Change]:
        if Endless.raging:
            other = link.get(self._session, "other")
            self._session.rtnl.execute([link.mtu_message(other.index, 1400 if other.mtu == 1300 else 1300)])
        yield from super()._parse(data)


@pytest.fixture
def host() -> Iterator[None]:
    with spaces.fresh() as space, spaces.inside(space):
        for words in (
            "ip link set lo up",
            "ip link add other type bridge",
        ):
            spaces.run(*words.split())
        underlay()
        yield


def attempt(words: str) -> None:
    """It may fail: after another one there may be nothing to be spoiled."""
    spaces.run("sh", "-c", f"{words} 2>/dev/null || true")


def underlay() -> None:
    attempt("ip link add eth0 type bridge")
    if IPV6:
        attempt("ip link set eth0 addrgenmode none")
    attempt("ip address add 10.0.0.1/24 dev eth0")
    attempt("ip link set eth0 up")


def shown() -> list[object]:
    """All of netd's, as far as it is there."""
    names = {line.split()[1].partition("@")[0].rstrip(":") for line in spaces.run("ip", "-o", "link").splitlines()}
    if not {"nl-ov1", "nl-vx256", "nl-vx1"} <= names or names & {"mine", "mine1"}:
        return [sorted(names)]
    try:
        ends = [spaces.run(*words.split()) for words in ENDS]
        return [shown_bridge(), sorted(fdb()), shown_device(), routes(), ends]
    except (AssertionError, IndexError, ValueError, subprocess.CalledProcessError) as error:
        return [str(error)]  # it was made, or went, in between


def test_a_storm_of_events(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks is answered, and what somebody deletes comes back, though there is always one more to be read."""
    monkeypatch.setattr(Endless, "raging", True)
    monkeypatch.setattr(agent, "MOST_EVENTS", 20)
    monkeypatch.setattr(agent, "LATE_S", 0.05)
    monkeypatch.setattr(agent, "RouteEvents", Endless)
    made = Agent(OWN, Choice("eth0"), (DEFAULT,), (PEER,), 0)
    made.start()
    try:
        spaces.run("ip", "link", "set", "other", "up")  # its first event
        for _ in range(3):
            spaces.run("ip", "route", "del", "10.2.2.0/24")
            wait_until(lambda: "10.2.2.0/24" in routes(), "the route")
            counts: Any = made.call(lambda reconciler: reconciler.counts).result(PATIENCE_S)
        assert counts.repairs >= 3
    finally:
        Endless.raging = False
        made.stop()


def test_a_repair_does_not_wait_for_the_rest_after_everything(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of peers that rest takes as long as several repairs of everything; here for minutes."""
    monkeypatch.setattr(agent, "RATIO", 1e5)
    made = Agent(OWN, Choice("eth0"), (DEFAULT,), (PEER,), 0)
    made.start()
    try:
        spaces.run("ip", "route", "del", "10.2.2.0/24")
        wait_until(lambda: "10.2.2.0/24" in routes(), "the route")
        assert made.call(lambda reconciler: reconciler.counts.full).result(PATIENCE_S) == 1
    finally:
        made.stop()


def test_whatever_is_undone_comes_back(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several things at once, in any order, also while netd mends what came before: by events alone."""
    monkeypatch.setattr(agent, "_FIGHT_ROUNDS", 1000)
    chosen = random.Random(4)
    peer = replace(PEER, name="b")
    with ThreadPoolExecutor(1) as etcd:
        made = Agent(OWN, Choice("eth0"), (DEFAULT,), (peer,), 0)
        made.start()

        def tell() -> None:
            made.call(lambda reconciler: reconciler.sync(reconciler.overlays.replace("ov1", HOLDERS))).result(
                PATIENCE_S
            )

        def follow(active: Mapping[str, int]) -> None:
            if active:
                etcd.submit(tell)

        try:
            made.call(lambda reconciler: reconciler.define_overlays([OV1])).result(PATIENCE_S)
            made.call(lambda reconciler: reconciler.full()).result(PATIENCE_S)
            made.call(lambda reconciler: reconciler.on_active(follow)).result(PATIENCE_S)
            bridge()
            wait_until(lambda: len(shown()) > 1 and "10.9.0.1/24" in str(shown()), "all of it", lambda: str(shown()))
            before = shown()
            for _ in range(12):
                damage = chosen.sample(DAMAGE, chosen.randint(1, 4))
                for words in damage:
                    attempt(words)
                    time.sleep(chosen.choice((0, 0, 0.003, 0.02)))
                attempt("ip link del other1")
                underlay()
                if "nl-ov1:" not in spaces.run("ip", "-o", "link"):
                    bridge()  # as the next ADD does
                wait_until(lambda: shown() == before, f"all to be as before {damage}", lambda: str(shown()))
            assert made.call(lambda reconciler: reconciler.full()).result(PATIENCE_S) == 0
            assert made.call(lambda reconciler: reconciler.problems()).result(PATIENCE_S) == []
        finally:
            made.stop()
