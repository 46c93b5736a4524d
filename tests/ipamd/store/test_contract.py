"""What every store must do: one suite, run on each."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ipamd.store.base import (
    Address,
    Allocation,
    Change,
    ConflictError,
    Drop,
    DropPool,
    Filter,
    Forget,
    Freed,
    Grant,
    Instant,
    Key,
    Netns,
    Note,
    PoolRow,
    PutBlock,
    PutPool,
    Regroup,
    Rename,
    Reservation,
    Reserve,
    Store,
    StoreError,
    Touch,
    Unreserve,
    Use,
    former_name,
)
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore

NOW = Instant("boot-1", 5_000)
POOL = PoolRow("p", "{}", managed=False)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(str(tmp_path / "s.db"))
    yield made
    made.close()


def commit(store: Store, *changes: Change) -> int:
    store.begin()
    generation = store.apply(changes)
    store.commit()
    return generation


def allocation(container: str, *ips: str, pool: str = "p", network: str = "n", node: str = "host") -> Allocation:
    return Allocation(
        Key(node, "cni", network, container, "eth0"),
        tuple(Address(f"{ip}/24", "10.0.0.1", pool, number) for number, ip in enumerate(ips)),
        Netns(4026531840, (1 << 64) - 1, "/run/netns/x"),
        NOW,
        1_700_000_000,
    )


def freed(ip: str, range_set: int = 0, at: Instant = NOW, pool: str = "p") -> Freed:
    return Freed(pool, range_set, ip, at)


def grant(store: Store, new: Allocation) -> Allocation:
    return msgspec.structs.replace(new, generation=commit(store, Grant(new)))


def state(store: Store) -> object:
    """All that can be read."""
    pools = store.pools()
    return (
        pools,
        store.allocations(Filter()),
        [sorted(store.taken(row.name)) for row in pools],
        [list(store.freed(row.name)) for row in pools],
        list(store.reservations()),
    )


def test_grant_is_found_by_all_ways(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    held = grant(store, allocation("a", "10.0.0.2", "fd00::2"))
    assert held.generation > 0
    assert store.find(held.key) == held
    assert store.holder("p", "10.0.0.2") == held
    assert store.holder("p", "fd00::2") == held
    assert store.holder("p", "10.0.0.3") is None
    assert store.holder("q", "10.0.0.2") is None
    assert store.count() == 1
    assert sorted(store.taken("p")) == [("10.0.0.2", held.generation), ("fd00::2", held.generation)]


def test_uses_of_addresses(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    two = grant(store, msgspec.structs.replace(allocation("a", "10.0.0.2", "fd00::2"), workload="w"))
    one = grant(store, allocation("b", "10.0.0.4"))
    grant(store, allocation("c", "10.0.0.5", pool="q"))
    grant(store, allocation("d", "10.0.0.6"))
    commit(store, Reserve(Reservation("p", "10.0.0.9", "r")))
    commit(store, Drop(grant(store, allocation("e", "10.0.0.8")), (freed("10.0.0.8"),)))
    asked = ["10.0.0.4", "10.0.0.5", "10.0.0.9", "10.0.0.2", "10.0.0.8", "fd00::2", "10.0.0.3"]
    assert store.uses("p", asked) == [
        Use(held.addresses[number], held.generation, "cni", "n", held.key.container_id, "eth0", 1_700_000_000,
            held.workload)
        for held, number in ((one, 0), (two, 0), (two, 1))
    ]  # fmt: skip
    assert store.uses("p", []) == []


def test_generations_rise_and_are_never_used_again(store: Store) -> None:
    first = grant(store, allocation("a", "10.0.0.2"))
    commit(store, Drop(first, ()))
    second = grant(store, allocation("a", "10.0.0.2"))
    assert second.generation > first.generation


def test_a_key_and_an_address_have_one_holder(store: Store) -> None:
    grant(store, allocation("a", "10.0.0.2"))
    before = state(store)
    for other in (allocation("a", "10.0.0.3"), allocation("b", "10.0.0.9", "10.0.0.2")):
        store.begin()
        with pytest.raises(ConflictError):
            store.apply([Grant(other)])
        store.commit()
    assert state(store) == before
    # Another pool has addresses of its own.
    grant(store, allocation("b", "10.0.0.2", pool="q"))


def test_a_group_is_all_or_nothing_and_others_go_on(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    store.begin()
    store.apply([Grant(allocation("a", "10.0.0.2"))])
    with pytest.raises(ConflictError):
        store.apply([Grant(allocation("b", "10.0.0.3")), Grant(allocation("a", "10.0.0.4"))])
    store.apply([Grant(allocation("c", "10.0.0.5"))])
    store.commit()
    assert [a.key.container_id for a in store.allocations(Filter())] == ["a", "c"]
    assert sorted(ip for ip, _ in store.taken("p")) == ["10.0.0.2", "10.0.0.5"]


def test_reads_see_what_is_not_committed_and_rollback_takes_it_back(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    kept = grant(store, allocation("a", "10.0.0.2"))
    commit(store, Drop(grant(store, allocation("b", "10.0.0.7")), (freed("10.0.0.7"), freed("10.0.0.6"))))
    commit(store, Reserve(Reservation("p", "10.0.0.8", "printer")))
    before = state(store)
    store.begin()
    new = allocation("c", "10.0.0.7")
    store.apply([Grant(new)])
    found = store.find(new.key)
    assert found is not None
    assert store.find_freed("p", "10.0.0.7") is None
    store.apply([Drop(kept, (freed("10.0.0.2"),)), Unreserve(freed("10.0.0.8"))])
    store.apply([PutPool(PoolRow("q", "{}", managed=True), new=True), Touch(found.generation, Netns(), NOW)])
    assert store.find(kept.key) is None
    store.rollback()
    assert state(store) == before
    assert [f.ip for f in store.freed("p")] == ["10.0.0.7", "10.0.0.6"]
    store.begin()
    store.commit()
    assert state(store) == before


def test_touch(store: Store) -> None:
    held = grant(store, allocation("a", "10.0.0.2"))
    netns, at = Netns(1 << 63, 7, "/elsewhere"), Instant("boot-2", 9)
    commit(store, Touch(held.generation, netns, at))
    assert store.find(held.key) == msgspec.structs.replace(held, netns=netns, at=at)


@pytest.mark.parametrize(
    "change",
    [
        Touch(99, Netns(), NOW),
        Drop(msgspec.structs.replace(allocation("x", "10.0.0.2"), generation=99), ()),
        PutPool(PoolRow("absent", "{}", managed=False), new=False),
        PutPool(POOL, new=True),
        DropPool("absent"),
        DropPool("p"),  # it has an allocation
        Reserve(Reservation("p", "10.0.0.2", "")),
        Reserve(Reservation("p", "10.0.0.8", "again")),
        Unreserve(freed("10.0.0.2")),
        Grant(allocation("z", "10.0.0.8")),  # it is reserved
    ],
    ids=lambda change: type(change).__name__,
)
def test_preconditions(store: Store, change: Change) -> None:
    commit(store, PutPool(POOL, new=True))
    grant(store, allocation("a", "10.0.0.2"))
    commit(store, Reserve(Reservation("p", "10.0.0.8", "")))
    before = state(store)
    store.begin()
    with pytest.raises(ConflictError) as caught:
        store.apply([change])
    assert str(caught.value)
    store.commit()
    assert state(store) == before


def test_freed_addresses_queue_in_order(store: Store) -> None:
    for ip in ("10.0.0.9", "10.0.0.3", "10.0.0.7"):
        commit(store, Drop(grant(store, allocation(ip, ip)), (freed(ip),)))
    assert [f.ip for f in store.freed("p")] == ["10.0.0.9", "10.0.0.3", "10.0.0.7"]
    assert store.oldest_freed("p", 0) == freed("10.0.0.9")
    assert store.oldest_freed("p", 1) is None
    assert [store.oldest_freed("p", 0, skip=n) for n in range(4)] == [
        *map(freed, ("10.0.0.9", "10.0.0.3", "10.0.0.7")), None
    ]  # fmt: skip
    grant(store, allocation("again", "10.0.0.9"))
    assert store.oldest_freed("p", 0) == freed("10.0.0.3")
    assert store.find_freed("p", "10.0.0.9") is None
    commit(store, Forget("p", ("10.0.0.3", "10.0.0.250")))
    assert [f.ip for f in store.freed("p")] == ["10.0.0.7"]


def test_an_address_that_is_freed_again_goes_to_the_end(store: Store) -> None:
    for ip in ("10.0.0.9", "10.0.0.3", "10.0.0.9"):
        commit(store, Drop(grant(store, allocation("c", ip)), (freed(ip),)))
    assert [f.ip for f in store.freed("p")] == ["10.0.0.3", "10.0.0.9"]


def test_regroup_keeps_the_order(store: Store) -> None:
    for number, ip in enumerate(("fd00::9", "10.0.0.9", "fd00::3", "10.0.0.3")):
        commit(store, Drop(grant(store, allocation(ip, ip)), (freed(ip, number % 2),)))
    commit(store, Regroup("p", (("fd00::9", 1), ("10.0.0.9", 0), ("fd00::3", 1), ("10.0.0.3", 0))))
    assert store.oldest_freed("p", 0) == freed("10.0.0.9", 0)
    assert store.oldest_freed("p", 1) == freed("fd00::9", 1)
    assert [f.ip for f in store.freed("p")] == ["fd00::9", "10.0.0.9", "fd00::3", "10.0.0.3"]


def test_count_freed_since(store: Store) -> None:
    for ip, at in (("10.0.0.2", 1), ("10.0.0.3", 5), ("10.0.0.4", 9)):
        commit(store, Drop(grant(store, allocation(ip, ip)), (freed(ip, at=Instant("boot-1", at)),)))
    assert store.count_freed("p", 0, Instant("boot-1", 5)) == 2
    assert store.count_freed("p", 0, Instant("boot-2", 0)) == 0
    assert store.count_freed("p", 1, Instant("boot-1", 0)) == 0


def test_reservations(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    one, two = Reservation("p", "10.0.0.8", "printer"), Reservation("q", "10.0.0.8", "")
    commit(store, Reserve(one), Reserve(two))
    assert list(store.reservations()) == [one, two]
    assert list(store.reservations("q")) == [two]
    assert store.holder("p", "10.0.0.8") == one
    assert list(store.taken("p")) == [("10.0.0.8", 0)]
    commit(store, Unreserve(freed("10.0.0.8")))
    assert store.holder("p", "10.0.0.8") is None
    assert store.oldest_freed("p", 0) == freed("10.0.0.8")


def test_drop_pool_takes_all_that_is_of_it(store: Store) -> None:
    commit(store, PutPool(POOL, new=True), PutPool(PoolRow("q", "{}", managed=True), new=True))
    commit(store, Reserve(Reservation("p", "10.0.0.8", "")), Reserve(Reservation("q", "10.0.0.8", "")))
    commit(store, Drop(grant(store, allocation("a", "10.0.0.2")), (freed("10.0.0.2"),)))
    commit(store, DropPool("p"))
    assert [row.name for row in store.pools()] == ["q"]
    assert list(store.freed("p")) == []
    assert list(store.taken("p")) == []
    assert [row.pool for row in store.reservations()] == ["q"]


def test_put_pool_replaces(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    changed = PoolRow("p", '{"x":1}', managed=True)
    commit(store, PutPool(changed, new=False))
    assert store.pools() == [changed]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), ["a", "b", "c", "d"]),
        (Filter(network="m"), ["c"]),
        (Filter(node="host"), ["a", "b", "c"]),
        (Filter(client="docker"), []),
        (Filter(container_id="b"), ["b"]),
        (Filter(pool="q"), ["b"]),
        (Filter(ip="10.0.0.2"), ["a", "b"]),
        (Filter(ip="10.0.0.2", pool="q"), ["b"]),
        (Filter(ip="10.0.0.2", pool="r"), []),
        (Filter(not_boot_id="boot-1"), ["d"]),
        (Filter(network="n", ip="10.0.0.2", pool="p"), ["a"]),
    ],
)
def test_filters(store: Store, wanted: Filter, expected: list[str]) -> None:
    commit(store, PutPool(POOL, new=True), PutPool(PoolRow("q", "{}", managed=True), new=True))
    grant(store, allocation("a", "10.0.0.2"))
    grant(store, allocation("b", "10.0.0.2", pool="q"))
    grant(store, allocation("c", "10.0.0.4", network="m"))
    other = allocation("d", "10.0.0.5", node="elsewhere")
    grant(store, msgspec.structs.replace(other, at=Instant("boot-0", 1)))
    found = store.allocations(wanted)
    assert [a.key.container_id for a in found] == expected
    assert all(wanted.matches(a) for a in found)


def test_pages(store: Store) -> None:
    made = [grant(store, allocation(str(n), f"10.0.0.{n}")) for n in range(2, 12)]
    seen: list[Allocation] = []
    while page := store.allocations(Filter(), seen[-1].generation if seen else 0, 3):
        assert len(page) <= 3
        seen += page
    assert seen == made


def test_rename_and_the_remembered_node(store: Store) -> None:
    assert store.remembered_node() == ""
    grant(store, allocation("a", "10.0.0.2"))
    store.begin()
    store.apply([Rename("host", "other")])
    store.remember_node("other")
    store.commit()
    assert store.remembered_node() == "other"
    assert [a.key.node for a in store.allocations(Filter())] == ["other"]
    found = store.find(Key("other", "cni", "n", "a", "eth0"))
    assert found is not None
    assert store.find(Key("host", "cni", "n", "a", "eth0")) is None
    store.begin()
    store.remember_node("third")
    store.rollback()
    assert store.remembered_node() == "other"


def test_sqlite_keeps_all_of_it(tmp_path: Path) -> None:
    path = str(tmp_path / "s.db")
    store = SqliteStore(path)
    commit(store, PutPool(POOL, new=True))
    grant(store, allocation("a", "10.0.0.2", "fd00::2"))
    commit(store, Drop(grant(store, allocation("b", "10.0.0.3")), (freed("10.0.0.3"),)))
    commit(store, Reserve(Reservation("p", "10.0.0.8", "note")))
    before = state(store)
    last = grant(store, allocation("c", "10.0.0.4"))
    commit(store, Drop(last, ()))
    store.close()
    again = SqliteStore(path)
    assert state(again) == before
    assert grant(again, allocation("d", "10.0.0.5")).generation > last.generation
    again.close()


def test_a_former_address_is_the_one_that_nobody_had_since(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    mine = msgspec.structs.replace(allocation("a", "10.0.0.2"), workload="default/web-0")
    mine = msgspec.structs.replace(mine, generation=commit(store, Grant(mine)))
    name = former_name("default/web-0", "eth0")
    assert store.former("p", 0, name) == "10.0.0.2"
    commit(store, Drop(mine, (Freed("p", 0, "10.0.0.2", NOW),)))
    assert store.former("p", 0, name) == "10.0.0.2"
    assert store.former("p", 1, name) == ""
    assert store.former("p", 0, former_name("default/web-0", "eth1")) == ""
    other = allocation("b", "10.0.0.2")
    commit(store, Grant(other))
    assert store.former("p", 0, name) == ""


def test_a_former_address_moves_with_its_workload(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    name = former_name("w", "eth0")
    for ip in ("10.0.0.2", "10.0.0.3"):
        commit(store, Grant(msgspec.structs.replace(allocation(ip, ip), workload="w")))
    assert store.former("p", 0, name) == "10.0.0.3"
    commit(store, Forget("p", ("10.0.0.2",)))
    assert store.former("p", 0, name) == "10.0.0.3"
    commit(store, Forget("p", ("10.0.0.3",)))
    assert store.former("p", 0, name) == ""


def test_a_former_address_comes_back_with_a_rollback(store: Store) -> None:
    commit(store, PutPool(POOL, new=True))
    mine = msgspec.structs.replace(allocation("a", "10.0.0.2"), workload="w")
    mine = msgspec.structs.replace(mine, generation=commit(store, Grant(mine)))
    commit(store, Drop(mine, (Freed("p", 0, "10.0.0.2", NOW),)))
    store.begin()
    store.apply([Grant(msgspec.structs.replace(allocation("b", "10.0.0.2"), workload="x"))])
    assert store.former("p", 0, former_name("x", "eth0")) == "10.0.0.2"
    store.rollback()
    assert store.former("p", 0, former_name("x", "eth0")) == ""
    assert store.former("p", 0, former_name("w", "eth0")) == "10.0.0.2"


def test_a_snapshot_is_of_one_moment_and_makes_the_same_store_again(store: Store, tmp_path: Path) -> None:
    commit(
        store, PutPool(POOL, new=True), Reserve(Reservation("p", "10.0.0.99", "printer")), PutBlock("p", "10.0.0.0/26")
    )
    one = grant(store, msgspec.structs.replace(allocation("one", "10.0.0.2", "10.0.0.3"), workload="default/web"))
    two = grant(store, allocation("two", "10.0.0.4"))
    commit(store, Drop(two, (freed("10.0.0.4"),)), Note("cluster", "c1"))
    before = state(store)
    snapshot = store.snapshot()
    later = grant(store, allocation("later", "10.0.0.5"))
    copied = SqliteStore(str(tmp_path / "copy.db"))
    try:
        copied.load(snapshot.copy())
        assert state(copied) == before
        assert copied.find(one.key) == one
        assert copied.blocks() == [("p", "10.0.0.0/26")]
        assert copied.note("cluster") == "c1"
        assert copied.former("p", 0, former_name("default/web", "eth0")) == "10.0.0.2"
        assert grant(copied, allocation("new", "10.0.0.6")).generation > later.generation, "never used again"
        assert copied.events(0)[-1].revision > store.event_bounds()[1]
        with pytest.raises(StoreError, match="wanted an empty store"):
            copied.load(snapshot.copy())
    finally:
        copied.close()
        snapshot.close()
