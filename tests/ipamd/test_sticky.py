"""Workloads that get their former address back, on both stores."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ipamd import lease
from ipamd.lease import Ask
from ipamd.store.base import Allocation, Netns
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from tests.ipamd.test_lease import COOLDOWN_S, Desk, ips, key


@pytest.fixture(params=["memory", "sqlite"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(MemoryStore if request.param == "memory" else lambda: SqliteStore(str(tmp_path / "s.db")))
    made.pool("p", "10.1.0.0/28", "fd00::/64")
    yield made
    made.store.close()


def allocate(desk: Desk, container: str, workload: str, *requested: str, ifname: str = "eth0") -> Allocation:
    of = msgspec.structs.replace(key(container), ifname=ifname)
    allocation, _ = desk.ledger.allocate(Ask(of, Netns(1), None, ("p",), None, requested, workload))
    desk.commit()
    return allocation


def test_a_workload_gets_its_address_back_while_it_cools_down(desk: Desk) -> None:
    first = allocate(desk, "a", "default/web-0")
    allocate(desk, "other", "")
    desk.release("a")
    desk.clock.advance(1)
    again = allocate(desk, "b", "default/web-0")
    assert ips(again) == ips(first)
    assert again.workload == "default/web-0"
    assert again.generation > first.generation
    usage = desk.ledger.usage(desk.ledger.pool("p"))
    assert [(one.allocated, one.cooling) for one in usage] == [(2, 0), (2, 0)]


def test_a_late_release_of_the_former_container_frees_nothing(desk: Desk) -> None:
    first = allocate(desk, "a", "w")
    desk.release("a")
    again = allocate(desk, "b", "w")
    assert desk.release("a") is None
    assert desk.ledger.release(key("b"), first.generation) is None
    assert desk.store.find(key("b")) == again


def test_it_survives_a_restart_and_another_boot(desk: Desk) -> None:
    first = allocate(desk, "a", "w")
    for boot_id in ("", "boot-2"):
        desk.release("a")
        desk.restart(boot_id)
        assert ips(allocate(desk, "a", "w")) == ips(first)


def test_while_the_former_container_lives_another_address_is_given_and_remembered(desk: Desk) -> None:
    allocate(desk, "a", "w")
    second = allocate(desk, "b", "w")
    assert ips(second) == ["10.1.0.3", "fd00::3"]
    desk.release("a")
    desk.release("b")
    assert ips(allocate(desk, "c", "w")) == ips(second)


def test_what_another_had_since_is_not_taken_out_of_its_cooldown(desk: Desk) -> None:
    allocate(desk, "a", "w")
    desk.release("a")
    desk.clock.advance(COOLDOWN_S)
    allocate(desk, "b", "x", "10.1.0.2", "fd00::2")
    desk.release("b")
    assert ips(allocate(desk, "c", "w")) == ["10.1.0.3", "fd00::3"]


def test_a_reserved_address_is_not_given_back(desk: Desk) -> None:
    allocate(desk, "a", "w")
    desk.release("a")
    desk.ledger.reserve("p", "10.1.0.2", "printer")
    desk.commit()
    assert ips(allocate(desk, "b", "w")) == ["10.1.0.3", "fd00::2"]


def test_interfaces_of_one_workload_have_addresses_of_their_own(desk: Desk) -> None:
    first = [allocate(desk, "a", "w", ifname=ifname) for ifname in ("eth0", "net1")]
    for held in first:
        desk.ledger.release(held.key)
    again = [allocate(desk, "b", "w", ifname=ifname) for ifname in ("net1", "eth0")]
    assert [ips(one) for one in again] == [ips(one) for one in reversed(first)]


def test_an_address_that_is_asked_for_wins(desk: Desk) -> None:
    allocate(desk, "a", "w")
    desk.release("a")
    assert ips(allocate(desk, "b", "w", "10.1.0.9")) == ["10.1.0.9", "fd00::2"]


def test_a_batch_that_fails_leaves_the_address_cooling(desk: Desk) -> None:
    allocate(desk, "a", "w")
    desk.release("a")
    before = desk.ledger.usage(desk.ledger.pool("p"))
    desk.ledger.allocate(Ask(key("b"), Netns(1), None, ("p",), None, (), "w"))
    desk.transaction.abandon()
    assert desk.ledger.usage(desk.ledger.pool("p")) == before
    assert ips(allocate(desk, "c", "w")) == ["10.1.0.2", "fd00::2"]


def test_what_left_the_queue_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LONGEST_QUEUE", 1)
    allocate(desk, "a", "w")
    allocate(desk, "b", "x")
    desk.release("a")
    desk.clock.advance(COOLDOWN_S)
    desk.release("b")
    assert desk.store.former("p", 0, "w eth0") == ""
    assert desk.store.former("p", 0, "x eth0") == "10.1.0.3"
