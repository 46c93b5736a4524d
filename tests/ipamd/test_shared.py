"""What a ledger does with a pool of mode cluster-address, told by hand what etcd would say; on both stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from ipamd.lease import Ask
from ipamd.shared import Rest
from ipamd.store.base import Allocation, Netns
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from tests.ipamd.test_lease import Desk, ips, key


@pytest.fixture(params=["memory", "sqlite"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(MemoryStore if request.param == "memory" else lambda: SqliteStore(str(tmp_path / "s.db")))
    made.ledger.in_cluster = True
    made.pool("p", "10.1.0.0/29", mode="cluster-address")  # .2 to .6
    join(made)
    yield made
    made.store.close()


def join(desk: Desk) -> None:
    """As a member of a cluster whose state was read; the search begins at the first address."""
    desk.ledger.node = "here"
    desk.ledger.shared_refusal = ""


def usage(desk: Desk) -> tuple[int, int, int, int]:
    """Allocated here, cooling, elsewhere, free."""
    (one,) = desk.ledger.usage(desk.ledger.pool("p"))
    return one.allocated, one.cooling, one.elsewhere, one.free


def allocate(desk: Desk, container: str, workload: str) -> Allocation:
    allocation, _ = desk.ledger.allocate(Ask(key(container), Netns(1), None, ("p",), None, (), workload))
    desk.commit()
    return allocation


def told(desk: Desk) -> None:
    """The cluster hears of everything."""
    for errand in desk.store.errands():
        desk.ledger.settle([errand.seq])
        if errand.kind == "unclaim":
            desk.ledger.left(errand.pool, errand.ip)
    desk.commit()


def test_a_choice_waits_for_its_confirmation_over_a_restart(desk: Desk) -> None:
    first = desk.allocate("a")
    assert list(desk.ledger.unconfirmed) == [first.generation]
    assert [(e.kind, e.ip, e.generation) for e in desk.store.errands()] == [("claim", "10.1.0.2", first.generation)]
    desk.restart()
    assert list(desk.ledger.unconfirmed) == [first.generation]


def test_what_others_hold_is_not_chosen_and_is_named(desk: Desk) -> None:
    desk.ledger.hold_elsewhere("p", "10.1.0.2", "there")
    desk.ledger.hold_elsewhere("p", "10.1.0.2", "there")
    desk.ledger.hold_elsewhere("p", "10.1.0.4", "there")
    assert usage(desk) == (0, 0, 2, 3)
    assert [ips(desk.allocate(name))[0] for name in "ab"] == ["10.1.0.3", "10.1.0.5"]
    with pytest.raises(AlreadyExistsError, match=r"10\.1\.0\.4 of pool p is held on node there"):
        desk.allocate("c", "10.1.0.4")
    desk.ledger.let_go_elsewhere("p", "10.1.0.4")
    assert ips(desk.allocate("c", "10.1.0.4")) == ["10.1.0.4"]
    assert usage(desk) == (3, 0, 1, 1)


def test_a_release_leaves_an_errand_and_the_address_comes_back_when_etcd_says_so(desk: Desk) -> None:
    first = desk.allocate("a")
    told(desk)
    desk.release("a")
    assert [(e.kind, e.generation) for e in desk.store.errands()] == [("unclaim", first.generation)]
    assert usage(desk) == (0, 1, 0, 4)
    with pytest.raises(CoolingError, match="cools down"):
        desk.allocate("b", "10.1.0.2")
    desk.restart()
    join(desk)
    assert usage(desk) == (0, 1, 0, 4)
    desk.ledger.rest("p", "10.1.0.2", Rest("here", 7))
    told(desk)
    assert usage(desk) == (0, 1, 0, 4)
    desk.ledger.rested("p", "10.1.0.2", 6)  # of an earlier time
    assert usage(desk) == (0, 1, 0, 4)
    desk.ledger.rested("p", "10.1.0.2", 8)
    assert usage(desk) == (0, 0, 0, 5)
    assert ips(desk.allocate("b", "10.1.0.2")) == ["10.1.0.2"]


def test_cooling_and_exhausted_differ(desk: Desk) -> None:
    for number in range(2, 6):
        desk.ledger.hold_elsewhere("p", f"10.1.0.{number}", "there")
    desk.allocate("a")
    with pytest.raises(ExhaustedError, match=r"1 of 5 are allocated here, 4 by other nodes"):
        desk.allocate("b")
    desk.ledger.let_go_elsewhere("p", "10.1.0.2")
    desk.ledger.rest("p", "10.1.0.2", Rest("there", 3))
    with pytest.raises(CoolingError, match="1 are cooling down"):
        desk.allocate("b")


def test_a_batch_that_fails_takes_back_what_it_did_and_nothing_that_etcd_said(desk: Desk) -> None:
    held = desk.allocate("a")
    told(desk)
    desk.ledger.unconfirmed.clear()
    before = usage(desk)
    desk.ledger.release(held.key)
    desk.ledger.allocate(Ask(key("b"), Netns(1), None, ("p",)))
    desk.transaction.abandon()
    assert usage(desk) == before
    assert not desk.ledger.unconfirmed
    assert not desk.store.errands()
    assert desk.store.find(held.key) == held
    assert ips(desk.allocate("b", "10.1.0.3")) == ["10.1.0.3"]


def test_a_workload_of_another_node_gets_its_address_out_of_the_cooldown(desk: Desk) -> None:
    desk.ledger.rest("p", "10.1.0.5", Rest("there", 3, "default/web-0 eth0"))
    desk.ledger.rest("p", "10.1.0.6", Rest("there", 3, "default/web-1 eth0"))
    assert ips(allocate(desk, "x", "other")) == ["10.1.0.2"]
    assert ips(allocate(desk, "a", "default/web-0")) == ["10.1.0.5"]
    assert ips(allocate(desk, "b", "default/web-0")) == ["10.1.0.3"]  # the first one is in use
    desk.ledger.rested("p", "10.1.0.5", 4)
    assert usage(desk) == (3, 1, 0, 1)
    assert ips(desk.allocate("c")) == ["10.1.0.4"]
    with pytest.raises(CoolingError):
        desk.allocate("d")


def test_a_former_address_that_another_workload_had_since_is_not_taken_out_of_its_cooldown(desk: Desk) -> None:
    allocate(desk, "a", "w")
    told(desk)
    desk.release("a")
    told(desk)
    desk.ledger.rest("p", "10.1.0.2", Rest("there", 9, "x eth0"))
    assert ips(allocate(desk, "b", "w")) == ["10.1.0.3"]


def test_facts_come_before_the_pool_and_outlive_its_deletion(desk: Desk) -> None:
    desk.ledger.hold_elsewhere("q", "10.2.0.2", "there")
    desk.ledger.rest("q", "10.2.0.3", Rest("there", 1))
    desk.pool("q", "10.2.0.0/29", mode="cluster-address")
    assert ips(desk.allocate("a", pools=("q",))) == ["10.2.0.4"]
    desk.release("a")
    told(desk)
    desk.ledger.delete_pool("q")
    desk.commit()
    desk.pool("q", "10.2.0.0/29", mode="cluster-address")
    assert ips(desk.allocate("b", pools=("q",))) == ["10.2.0.4"]


def test_a_reservation_goes_beside_what_others_hold(desk: Desk) -> None:
    desk.ledger.hold_elsewhere("p", "10.1.0.2", "there")
    with pytest.raises(AlreadyExistsError, match="node there"):
        desk.ledger.reserve("p", "10.1.0.2", "")
    desk.ledger.reserve("p", "10.1.0.3", "printer")
    desk.commit()
    assert ips(desk.allocate("a")) == ["10.1.0.4"]
    desk.ledger.unreserve("p", "10.1.0.3")
    desk.commit()
    assert desk.store.find_freed("p", "10.1.0.3") is None
    assert ips(desk.allocate("b", "10.1.0.3")) == ["10.1.0.3"]


def test_nothing_is_chosen_before_etcd_was_read_but_what_is_held_is_answered(desk: Desk) -> None:
    held = desk.allocate("a")
    desk.restart()
    desk.ledger.node = "here"
    with pytest.raises(UnavailableError, match="asked of etcd"):
        desk.allocate("b")
    assert desk.allocate("a").addresses == held.addresses
    assert desk.release("a") is not None


def test_pools_of_two_modes_are_not_asked_together(desk: Desk) -> None:
    desk.pool("own", "10.3.0.0/24")
    with pytest.raises(InvalidArgumentError, match="of one mode"):
        desk.allocate("a", pools=("p", "own"))


def test_what_the_store_forgot_is_adopted(desk: Desk) -> None:
    held = desk.allocate("a")
    desk.release("a")
    told(desk)
    adopted = desk.ledger.adopt(held)
    desk.commit()
    assert adopted.generation > held.generation
    assert adopted.addresses == held.addresses
    assert adopted.generation in desk.ledger.unconfirmed
    assert usage(desk) == (1, 0, 0, 4)
    with pytest.raises(AlreadyExistsError):
        desk.ledger.adopt(held)
    desk.release("a")
    told(desk)
    desk.ledger.hold_elsewhere("p", "10.1.0.2", "there")
    with pytest.raises(AlreadyExistsError, match="node there"):
        desk.ledger.adopt(held)
    desk.ledger.let_go_elsewhere("p", "10.1.0.2")
    outside = Allocation(held.key, (held.addresses[0].__class__("10.9.0.2/29", "", "p", 0),), held.netns, held.at, 0)
    with pytest.raises(PreconditionError):
        desk.ledger.adopt(outside)
    assert usage(desk) == (0, 0, 0, 5)


def test_nodes_begin_at_places_of_their_own(desk: Desk) -> None:
    desk.pool("large", "10.64.0.0/10", mode="cluster-address")
    first = set()
    for node in ("a", "b", "c", "d"):
        desk.ledger.join(node)
        first.add(ips(desk.allocate(node, pools=("large",)))[0])
        desk.release(node)
        told(desk)
    assert len(first) > 1
