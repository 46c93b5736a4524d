"""Clients and judge together, on stores that know nothing of one another: sound where it is sound, caught where not."""

from __future__ import annotations

import time

import pytest

from tests.cluster.nodes import Fleet, empty, fill, pool

pytestmark = pytest.mark.kernel


def test_one_host_that_is_killed_again_and_again() -> None:
    with Fleet(None, 1, {"one": pool("10.1.0.0/26", cooldown_ms=10)}, ask_for={"one": "10.1.0.0/26"}) as fleet:
        node = fleet.nodes["n1"]
        with fleet.load(4):
            for _ in range(2):
                time.sleep(1)
                node.ipamd.kill()
                node.ipamd.start()
        verdict = fleet.assert_sound()
        assert len(verdict.answers) > 100
        assert verdict.owned
        assert verdict.refused["UNAVAILABLE"]
        with fleet.load(1):
            pass
        held = sum(map(len, fleet.assert_sound().owned.values()))
        # .0, .63 and the gateway are nobody's.
        assert len(fill(fleet.nodes, "one")) == 61 - held
        empty(fleet.nodes)
        fleet.assert_sound()


def test_hosts_that_share_a_subnet_without_a_cluster_are_caught() -> None:
    with Fleet(None, 2, {"one": pool("10.1.0.0/28")}) as fleet:
        with fleet.load(1):
            pass
        with pytest.raises(AssertionError, match="had two owners"):
            fleet.assert_sound()


def test_what_is_released_behind_the_owner_is_found() -> None:
    with Fleet(None, 1, {"one": pool("10.1.0.0/24")}) as fleet:
        with fleet.load(1):
            pass
        verdict = fleet.assert_sound()
        _, key = next(iter(verdict.owned))
        with fleet.nodes["n1"].client() as client:
            entry = next(one for one in client.list_allocations() if one.key.container_id == key)
            client.release(entry.key)
        assert verdict.compare(fleet.nodes["n1"].held())[0].startswith("lost: n1/")
