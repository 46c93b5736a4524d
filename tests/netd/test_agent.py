"""netd's thread for the kernel, in a real network namespace, on bad days."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kernel import link
from kernel.rtevents import Change, RouteEvents
from kernel.session import Session
from netd import agent
from netd.agent import Agent
from netd.underlay import Choice
from tests.hosts import PATIENCE_S, wait_until
from tests.kernel import spaces
from tests.netd.test_reconcile import DEFAULT, OWN, PEER, routes

pytestmark = pytest.mark.kernel


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
            "ip link add eth0 type bridge",
            "ip address add 10.0.0.1/24 dev eth0",
            "ip link set eth0 up",
            "ip link add other type bridge",
        ):
            spaces.run(*words.split())
        yield


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
