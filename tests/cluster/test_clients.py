"""Clients and judge together, on stores that know nothing of one another: sound where it is sound, caught where not."""

from __future__ import annotations

import pytest

from tests.cluster.judge import Verdict
from tests.cluster.nodes import Fleet, empty, fill, pool

pytestmark = pytest.mark.kernel


def owning(fleet: Fleet) -> Verdict:
    """Of a fleet at rest whose clients own something; each of a client's few slots does half of the time."""
    while True:
        with fleet.load(0):
            fleet.until_heard(20)
        verdict = fleet.assert_sound()
        if verdict.owned:
            return verdict


def test_one_host_that_is_killed_again_and_again() -> None:
    with Fleet(None, 1, {"one": pool("10.1.0.0/26", cooldown_ms=10)}, ask_for={"one": "10.1.0.0/26"}) as fleet:
        node = fleet.nodes["n1"]
        with fleet.load(0):
            for _ in range(2):
                fleet.until_heard(60)
                node.ipamd.kill()
                fleet.until_heard(1, "no")
                node.ipamd.start()
            fleet.until_served()
        assert fleet.assert_sound().refused["UNAVAILABLE"]
        held = sum(map(len, owning(fleet).owned.values()))
        # .0, .63 and the gateway are nobody's.
        assert len(fill(fleet.nodes, "one")) == 61 - held
        empty(fleet.nodes)
        fleet.assert_sound()


def test_hosts_that_share_a_subnet_without_a_cluster_are_caught() -> None:
    with Fleet(None, 2, {"one": pool("10.1.0.0/28")}) as fleet:
        with fleet.load(0):
            fleet.until_heard(100)
        with pytest.raises(AssertionError, match="had two owners"):
            fleet.assert_sound()


def test_what_is_released_behind_the_owner_is_found() -> None:
    with Fleet(None, 1, {"one": pool("10.1.0.0/24")}) as fleet:
        verdict = owning(fleet)
        _, key = next(iter(verdict.owned))
        with fleet.nodes["n1"].client() as client:
            entry = next(one for one in client.list_allocations() if one.key.container_id == key)
            client.release(entry.key)
        assert verdict.compare(fleet.nodes["n1"].held())[0].startswith("lost: n1/")
