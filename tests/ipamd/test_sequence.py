"""A release that comes late, or twice, frees nothing that has a new owner: on both stores, over restarts and boots."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipamd.lease import Ask
from ipamd.store.base import Allocation, Netns
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from tests.ipamd.test_lease import COOLDOWN_S, Desk, ips, key


@pytest.fixture(params=["memory", "sqlite"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(MemoryStore if request.param == "memory" else lambda: SqliteStore(str(tmp_path / "s.db")))
    made.pool("p", "10.1.0.0/30")  # one address
    yield made
    made.store.close()


def turn(desk: Desk, container: str) -> Allocation:
    """The only address goes to the container, and is freed."""
    held = desk.allocate(container)
    assert desk.ledger.release(held.key, held.generation) == held
    desk.commit()
    desk.clock.advance(COOLDOWN_S)
    return held


@pytest.mark.parametrize("boot_id", ["", "boot-2"])
def test_of_the_same_container_with_the_same_address(desk: Desk, boot_id: str) -> None:
    old = turn(desk, "a")
    desk.restart(boot_id)
    desk.clock.advance(COOLDOWN_S)
    new = desk.allocate("a")
    assert ips(new) == ips(old)
    for _ in range(2):
        assert desk.ledger.release(old.key, old.generation) is None
    desk.commit()
    desk.restart()
    assert desk.store.find(new.key) == new


def test_of_another_container_with_the_same_address(desk: Desk) -> None:
    old = turn(desk, "a")
    new = desk.allocate("b")
    assert ips(new) == ips(old)
    assert desk.ledger.release(old.key) is None
    assert desk.ledger.release(old.key, old.generation) is None
    assert desk.ledger.release(new.key, old.generation) is None
    assert desk.store.find(new.key) == new


def test_a_generation_is_not_used_again_after_a_batch_that_failed(desk: Desk) -> None:
    seen = {turn(desk, "a").generation}
    lost, _ = desk.ledger.allocate(Ask(key("b"), Netns(1), None, ("p",)))
    desk.transaction.abandon()
    new = desk.allocate("b")
    assert new.generation not in seen
    # Nobody was told of the generation that was taken back, so it may be the new one.
    assert new.generation >= lost.generation


def test_whatever_the_order(desk: Desk) -> None:
    chance = random.Random(6)
    told: list[Allocation] = []
    held: Allocation | None = None
    for step in range(300):
        if held is None:
            held = desk.allocate(chance.choice("abc"))
            assert all(held.generation > earlier.generation for earlier in told)
            told.append(held)
        for old in chance.choices(told, k=3):
            if old.generation == held.generation:
                continue
            assert desk.ledger.release(old.key, old.generation) is None
            assert desk.ledger.release(held.key, old.generation) is None
        desk.commit()
        assert desk.store.find(held.key) == held
        if chance.random() < 0.5:
            assert desk.ledger.release(held.key, held.generation) == held
            desk.commit()
            held = None
            desk.clock.advance(COOLDOWN_S)
        if step % 50 == 49:
            desk.restart(f"boot-{step}")
            desk.clock.advance(COOLDOWN_S)
