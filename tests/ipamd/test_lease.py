"""The ledger on both stores, with a clock that is moved by hand."""

import ipaddress
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ipamd import lease
from ipamd.engine import Transaction
from ipamd.errors import (
    AlreadyExistsError,
    CoolingError,
    ExhaustedError,
    InvalidArgumentError,
    IpamdError,
    NotFoundError,
    PreconditionError,
)
from ipamd.lease import Ask, Ledger
from ipamd.pool import PoolSpec, RangeSpec
from ipamd.pools import NetworkSpec
from ipamd.store.base import Allocation, Instant, Key, Netns, Store
from ipamd.store.memory import MemoryStore
from ipamd.store.sqlite import SqliteStore
from tests.ipamd.clock import FakeClock

COOLDOWN_S = 30.0


class Desk:
    """A ledger with its store and clock; `restart` makes a new one of the rows, as a new process would."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self.open_store = open_store
        self.clock = FakeClock()
        self.store = open_store()
        self._begin()

    def _begin(self) -> None:
        self.transaction = Transaction(self.store)
        self.ledger = Ledger(self.transaction, self.clock, COOLDOWN_S)

    def restart(self, boot_id: str = "") -> None:
        self.commit()
        if isinstance(self.store, SqliteStore):
            self.store.close()
            self.store = self.open_store()
        if boot_id:
            self.clock.boot_id, self.clock.ns = boot_id, int(5e9)
        self._begin()

    def commit(self) -> None:
        if self.transaction.dirty:
            self.store.commit()
        self.transaction.committed()

    def pool(self, name: str, *subnets: str, **options: object) -> None:
        self.ledger.create_pool(name, spec(*subnets, **options))
        self.commit()

    def allocate(self, container: str, *requested: str, pools: tuple[str, ...] = ("p",)) -> Allocation:
        allocation, _ = self.ledger.allocate(Ask(key(container), Netns(1), None, pools, None, requested))
        self.commit()
        return allocation

    def network(self, container: str, *subnets: str, network: str = "n", **options: object) -> Allocation:
        wanted = spec(*subnets, **options)
        own = NetworkSpec(wanted.encode().encode(), lambda: wanted)
        allocation, _ = self.ledger.allocate(Ask(key(container, network), Netns(1), None, (), own))
        self.commit()
        return allocation

    def release(self, container: str) -> Allocation | None:
        released = self.ledger.release(key(container))
        self.commit()
        return released


def key(container: str, network: str = "n") -> Key:
    return Key("host", "cni", network, container, "eth0")


def spec(*subnets: str, **options: object) -> PoolSpec:
    """One range set for each subnet; "10.0.0.0/29,10.1.0.0/29" is one with two ranges."""
    sets = tuple(tuple(RangeSpec(subnet) for subnet in one.split(",")) for one in subnets)
    return PoolSpec(sets, **options)  # type: ignore[arg-type]


def ips(allocation: Allocation) -> list[str]:
    return [address.ip for address in allocation.addresses]


@pytest.fixture(params=["memory", "sqlite"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(MemoryStore if request.param == "memory" else lambda: SqliteStore(str(tmp_path / "s.db")))
    yield made
    made.store.close()


def test_first_addresses(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/16", "fd00::/64")
    first = desk.allocate("a")
    assert [a.cidr for a in first.addresses] == ["10.1.0.2/16", "fd00::2/64"]
    assert [a.gateway for a in first.addresses] == ["10.1.0.1", "fd00::1"]
    assert [(a.pool, a.range_set) for a in first.addresses] == [("p", 0), ("p", 1)]
    assert ips(desk.allocate("b")) == ["10.1.0.3", "fd00::3"]


def test_asking_again_gives_the_same_and_is_remembered(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    first = desk.allocate("a")
    desk.clock.advance(5)
    again, created = desk.ledger.allocate(Ask(key("a"), Netns(7, 8, "/x"), desk.clock.instant(-1), ("p",)))
    desk.commit()
    assert not created
    assert again.addresses == first.addresses
    assert again.generation == first.generation
    found = desk.store.find(key("a"))
    assert found is not None
    assert found.netns == Netns(7, 8, "/x")
    assert found.at == desk.clock.instant(-1)


def test_a_moment_of_another_boot_or_of_the_future_becomes_now(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    for number, at in enumerate((Instant("boot-0", 1), desk.clock.instant(60), None)):
        got, _ = desk.ledger.allocate(Ask(key(str(number)), Netns(), at, ("p",)))
        assert got.at == desk.clock.instant()


def test_asking_again_for_something_else_is_refused(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    desk.pool("q", "10.2.0.0/24")
    desk.allocate("a", "10.1.0.9")
    assert ips(desk.allocate("a", "10.1.0.9")) == ["10.1.0.9"]
    with pytest.raises(PreconditionError, match=r"holds 10\.1\.0\.9, and now asks for 10\.1\.0\.8"):
        desk.allocate("a", "10.1.0.8")
    with pytest.raises(PreconditionError, match=r"of pool p, and now asks pool q"):
        desk.allocate("a", pools=("q",))


def test_release_is_idempotent_and_minds_the_generation(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    first = desk.allocate("a")
    assert desk.ledger.release(key("a"), first.generation + 1) is None
    assert desk.release("a") == first
    assert desk.release("a") is None
    second = desk.allocate("a")
    assert second.generation > first.generation
    assert desk.ledger.release(key("a"), first.generation) is None  # a late undo of the first
    assert desk.ledger.release(key("a"), second.generation) == second


def test_release_before_a_moment(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    desk.allocate("a")
    assert desk.ledger.release(key("a"), before=desk.clock.instant(-1)) is None
    assert desk.ledger.release(key("a"), before=desk.clock.instant()) is None
    assert desk.ledger.release(key("a"), before=Instant("boot-0", 1 << 60)) is None  # written before the reboot
    assert desk.ledger.release(key("a"), before=desk.clock.instant(1)) is not None
    desk.commit()
    desk.allocate("b")
    desk.restart("boot-2")
    assert desk.ledger.release(key("b"), before=desk.clock.instant()) is not None


def test_freed_addresses_come_last_and_oldest_first(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/29")  # .2 to .6
    for name in "abc":
        desk.allocate(name)
    for name in "bac":
        desk.release(name)
        desk.clock.advance(1)
    desk.clock.advance(COOLDOWN_S)
    assert [ips(desk.allocate(str(n)))[0] for n in range(5)] == [
        "10.1.0.5",
        "10.1.0.6",
        "10.1.0.3",
        "10.1.0.2",
        "10.1.0.4",
    ]


def test_cooling_and_exhausted_differ(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/30")  # .2 only
    desk.allocate("a")
    with pytest.raises(ExhaustedError, match=r"1 of 1 are allocated"):
        desk.allocate("b")
    desk.release("a")
    desk.clock.advance(COOLDOWN_S - 0.5)
    with pytest.raises(CoolingError, match=r"for 0\.5 s"):
        desk.allocate("b")
    with pytest.raises(CoolingError, match=r"another 0\.5 s"):
        desk.allocate("b", "10.1.0.2")
    desk.clock.wall_s += 10**9  # the wall clock decides nothing
    with pytest.raises(CoolingError):
        desk.allocate("b")
    desk.clock.advance(0.5)
    assert ips(desk.allocate("b")) == ["10.1.0.2"]


def test_probe_tells_what_allocate_would(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/30")
    ask = Ask(key(""), Netns(), None, ("p",))
    desk.ledger.probe(ask)
    desk.allocate("a")
    with pytest.raises(ExhaustedError):
        desk.ledger.probe(ask)
    desk.release("a")
    with pytest.raises(CoolingError):
        desk.ledger.probe(ask)
    desk.clock.advance(COOLDOWN_S)
    desk.ledger.probe(ask)
    assert desk.ledger.usage(desk.ledger.pool("p"))[0].free == 1  # the probe took nothing
    assert ips(desk.allocate("b")) == ["10.1.0.2"]
    with pytest.raises(NotFoundError):
        desk.ledger.probe(Ask(key(""), Netns(), None, ("absent",)))


def test_cooldown_is_kept_across_a_restart_and_counts_anew_from_a_boot(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/30")
    desk.allocate("a")
    desk.release("a")
    desk.clock.advance(10)
    desk.restart()
    with pytest.raises(CoolingError, match=r"for 20\.0 s"):
        desk.allocate("b")
    desk.restart("boot-2")  # five seconds after the machine started
    with pytest.raises(CoolingError, match=r"for 25\.0 s"):
        desk.allocate("b")
    desk.clock.advance(25)
    assert ips(desk.allocate("b")) == ["10.1.0.2"]


def test_a_pools_own_cooldown(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/30", cooldown_ms=0)
    for name in "abc":
        assert ips(desk.allocate(name)) == ["10.1.0.2"]
        desk.release(name)


def test_restart_keeps_everything(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/28")
    held = [desk.allocate(name) for name in "abc"]
    desk.release("b")
    desk.ledger.reserve("p", "10.1.0.9", "printer")
    before = desk.ledger.usage(desk.ledger.pool("p"))
    desk.restart()
    assert desk.ledger.usage(desk.ledger.pool("p")) == before
    assert desk.allocate("a").addresses == held[0].addresses
    # The cursor goes on behind the last one that was handed out.
    assert [ips(desk.allocate(str(n)))[0] for n in range(5)] == [f"10.1.0.{n}" for n in (5, 6, 7, 8, 10)]


def test_ranges_of_a_set_are_tried_in_order(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/30,10.2.0.0/30")
    assert [ips(desk.allocate(n))[0] for n in "ab"] == ["10.1.0.2", "10.2.0.2"]
    with pytest.raises(ExhaustedError):
        desk.allocate("c")


@pytest.mark.parametrize(
    ("subnet", "gateway", "expected"),
    [
        ("10.1.0.0/31", "", ["10.1.0.1"]),
        ("10.1.0.0/31", "none", ["10.1.0.0", "10.1.0.1"]),
        ("10.1.0.0/30", "none", ["10.1.0.1", "10.1.0.2"]),
        ("10.1.0.0/32", "none", ["10.1.0.0"]),
        ("10.1.0.0/32", "169.254.1.1", ["10.1.0.0"]),
        ("fd00::/127", "", ["fd00::1"]),
        ("fd00::/127", "none", ["fd00::", "fd00::1"]),
        ("fd00::/126", "", ["fd00::2", "fd00::3"]),
        ("fd00::5/128", "none", ["fd00::5"]),
    ],
)
def test_small_subnets(desk: Desk, subnet: str, gateway: str, expected: list[str]) -> None:
    desk.ledger.create_pool("p", PoolSpec(((RangeSpec(subnet, gateway=gateway),),)))
    assert [ips(desk.allocate(str(n)))[0] for n in range(len(expected))] == expected
    with pytest.raises(ExhaustedError):
        desk.allocate("more")


@pytest.mark.parametrize("subnet", ["10.0.0.0/8", "fd00::/48"])
def test_large_subnets_cost_nothing(desk: Desk, subnet: str) -> None:
    desk.pool("p", subnet)
    network = ipaddress.ip_network(subnet)
    assert ips(desk.allocate("a")) == [str(network[2])]
    last = str(network[-2] if network.version == 4 else network[-1])
    assert ips(desk.allocate("b", last)) == [last]
    usage = desk.ledger.usage(desk.ledger.pool("p"))[0]
    assert usage.size == network.num_addresses - (3 if network.version == 4 else 2)
    assert usage.free == usage.size - 2
    desk.restart()
    assert ips(desk.allocate("c"))[0] == str(network[2 + 1])  # around the end, to the first cold one


def test_requested_addresses(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24", "fd00::/64", excludes=("10.1.0.64/26", "10.1.0.5"))
    assert ips(desk.allocate("a", "fd00:0::0:9", "10.1.0.9/24")) == ["10.1.0.9", "fd00::9"]
    assert ips(desk.allocate("b", "10.1.0.10")) == ["10.1.0.10", "fd00::2"]
    for wanted, kind, text in (
        ("10.1.0.9", AlreadyExistsError, "held by cni a/eth0 of network n on node host"),
        ("10.1.0.1", InvalidArgumentError, "gateway"),
        ("10.1.0.5", InvalidArgumentError, "excluded, or outside"),
        ("10.1.0.70", InvalidArgumentError, "excluded, or outside"),
        ("10.1.0.255", InvalidArgumentError, "excluded, or outside"),
        ("192.0.2.1", InvalidArgumentError, r"pool p: 10\.1\.0\.1-10\.1\.0\.254"),
        ("nonsense", InvalidArgumentError, "requested: wanted an IP address, found 'nonsense'"),
    ):
        with pytest.raises(kind, match=text):
            desk.allocate("c", wanted)
    with pytest.raises(InvalidArgumentError, match="both of"):
        desk.allocate("c", "10.1.0.20", "10.1.0.21")
    # What was refused took nothing, also where its first half could be had.
    with pytest.raises(AlreadyExistsError):
        desk.allocate("c", "10.1.0.20", "fd00::9")
    assert ips(desk.allocate("c", "10.1.0.20")) == ["10.1.0.20", "fd00::3"]


def test_addresses_of_one_family(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24", "fd00::/64")
    desk.pool("q", "10.2.0.0/24")

    def ask(container: str, family: int, *requested: str, pool: str = "p") -> list[str]:
        wanted = Ask(key(container), Netns(1), None, (pool,), None, requested, family=family)
        return ips(desk.ledger.allocate(wanted)[0])

    assert ask("a", 4) == ["10.1.0.2"]
    assert ask("b", 6) == ["fd00::2"]
    assert ask("c", 6, "fd00::9") == ["fd00::9"]
    for family, requested, pool in ((6, (), "q"), (4, ("fd00::7",), "p")):
        with pytest.raises(InvalidArgumentError, match=f"family: wanted IPv{family} addresses only"):
            ask("d", family, *requested, pool=pool)
    assert ask("d", 0) == ["10.1.0.3", "fd00::3"]


def test_a_workload_names_its_former_address(desk: Desk) -> None:
    """It cools down for everybody else."""
    desk.pool("p", "10.1.0.0/24")

    def ask(container: str, workload: str, ip: str = "10.1.0.9") -> list[str]:
        return ips(desk.ledger.allocate(Ask(key(container), Netns(1), None, ("p",), None, (ip,), workload))[0])

    assert ask("a", "w") == ["10.1.0.9"]
    desk.release("a")
    for workload in ("", "v"):
        with pytest.raises(CoolingError, match=r"10\.1\.0\.9"):
            ask("b", workload)
    assert ask("b", "w") == ["10.1.0.9"]
    with pytest.raises(AlreadyExistsError, match=r"10\.1\.0\.9"):
        ask("c", "w")
    desk.release("b")
    assert ask("c", "w", "10.1.0.10") == ["10.1.0.10"]


def test_a_refused_request_takes_no_address(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/29", "10.2.0.0/30")
    desk.allocate("a")
    before = desk.ledger.usage(desk.ledger.pool("p"))
    for _ in range(10):
        with pytest.raises(ExhaustedError, match=r"10\.2\.0\.1-10\.2\.0\.2"):
            desk.allocate("b")
    assert desk.ledger.usage(desk.ledger.pool("p")) == before


def test_rollback_takes_memory_back(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/29")
    desk.allocate("a")
    desk.allocate("b")
    desk.release("b")
    before = desk.ledger.usage(desk.ledger.pool("p"))
    ask = Ask(key("c"), Netns(), None, ("p",))
    desk.ledger.allocate(ask)
    desk.ledger.release(key("a"))
    desk.ledger.reserve("p", "10.1.0.6", "")
    desk.ledger.create_pool("q", spec("10.9.0.0/24"))
    desk.transaction.abandon()
    assert desk.ledger.usage(desk.ledger.pool("p")) == before
    assert "q" not in desk.ledger.pools
    assert desk.allocate("a").generation == 1
    assert {ips(desk.allocate(n))[0] for n in "cde"} == {"10.1.0.4", "10.1.0.5", "10.1.0.6"}


def test_reservations(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/29")
    desk.ledger.reserve("p", "10.1.0.2", "printer")
    with pytest.raises(AlreadyExistsError, match=r"reserved \(printer\)"):
        desk.allocate("a", "10.1.0.2")
    with pytest.raises(AlreadyExistsError, match="reserved"):
        desk.ledger.reserve("p", "10.1.0.2", "")
    assert ips(desk.allocate("a")) == ["10.1.0.3"]
    with pytest.raises(AlreadyExistsError, match="held by cni a/eth0"):
        desk.ledger.reserve("p", "10.1.0.3", "")
    with pytest.raises(InvalidArgumentError, match="gateway"):
        desk.ledger.reserve("p", "10.1.0.1", "")
    with pytest.raises(NotFoundError):
        desk.ledger.unreserve("p", "10.1.0.4")
    with pytest.raises(NotFoundError):
        desk.ledger.reserve("absent", "10.1.0.4", "")
    desk.ledger.unreserve("p", "10.1.0.2")
    with pytest.raises(CoolingError):  # somebody may still use it
        desk.allocate("b", "10.1.0.2")
    desk.clock.advance(COOLDOWN_S)
    assert ips(desk.allocate("b", "10.1.0.2")) == ["10.1.0.2"]
    desk.release("b")
    desk.ledger.reserve("p", "10.1.0.2", "")
    usage = desk.ledger.usage(desk.ledger.pool("p"))[0]
    assert (usage.allocated, usage.reserved, usage.cooling, usage.free) == (1, 1, 0, 3)


def test_pools_are_made_once_and_deleted_when_empty(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24")
    desk.pool("p", "10.1.0.0/24")
    with pytest.raises(AlreadyExistsError, match="another spec"):
        desk.ledger.create_pool("p", spec("10.2.0.0/24"))
    desk.allocate("a")
    with pytest.raises(PreconditionError, match=r"10\.1\.0\.2 of cni a/eth0"):
        desk.ledger.delete_pool("p")
    desk.release("a")
    desk.ledger.delete_pool("p")
    desk.commit()
    with pytest.raises(NotFoundError, match="no pool p"):
        desk.allocate("a")
    desk.restart()
    assert desk.ledger.pools == {}


def test_a_networks_pool_follows_its_spec(desk: Desk) -> None:
    assert ips(desk.network("a", "10.1.0.0/24")) == ["10.1.0.2"]
    assert desk.ledger.pool("net/n").managed
    # Wider, and IPv6 in front: what is held stays held, what cools goes on cooling.
    desk.network("b", "10.1.0.0/24")
    desk.ledger.release(key("b"))
    assert ips(desk.network("c", "fd00::/64", "10.1.0.0/16")) == ["fd00::2", "10.1.0.4"]
    assert ips(desk.network("a", "fd00::/64", "10.1.0.0/16")) == ["10.1.0.2"]
    usage = desk.ledger.usage(desk.ledger.pool("net/n"))
    assert [(u.family, u.allocated, u.cooling) for u in usage] == [("ipv6", 1, 0), ("ipv4", 2, 1)]
    with pytest.raises(PreconditionError, match=r"leave out 10\.1\.0\.2, which cni a/eth0 of network n.*1 more"):
        desk.network("d", "fd00::/64", "10.9.0.0/16")
    with pytest.raises(PreconditionError, match="leave out"):
        desk.network("d", "fd00::/64", "10.1.0.0/16", excludes=("10.1.0.4",))
    desk.restart()
    assert ips(desk.network("d", "fd00::/64", "10.1.0.0/16")) == ["fd00::3", "10.1.0.5"]
    # A shrink that drops only what cooled down is taken; what cooled there is forgotten.
    for name in "acd":
        desk.ledger.release(key(name))
    assert ips(desk.network("e", "10.9.0.0/24")) == ["10.9.0.2"]
    assert [u.cooling for u in desk.ledger.usage(desk.ledger.pool("net/n"))] == [0]


def test_an_unchanged_spec_is_not_read(desk: Desk) -> None:
    desk.network("a", "10.1.0.0/24")
    wanted = spec("10.1.0.0/24")

    def read() -> PoolSpec:
        raise AssertionError("read")

    own = NetworkSpec(wanted.encode().encode(), read)
    allocation, _ = desk.ledger.allocate(Ask(key("b"), Netns(), None, (), own))
    assert ips(allocation) == ["10.1.0.3"]
    with pytest.raises(AssertionError):
        desk.ledger.allocate(Ask(key("c"), Netns(), None, (), NetworkSpec(b"other", read)))


def test_probe_of_a_network_changes_nothing(desk: Desk) -> None:
    def ask(*subnets: str) -> Ask:
        wanted = spec(*subnets)
        return Ask(key(""), Netns(), None, (), NetworkSpec(wanted.encode().encode(), lambda: wanted))

    desk.ledger.probe(ask("10.1.0.0/30"))
    assert desk.ledger.pools == {}
    with pytest.raises(InvalidArgumentError, match=r"write 10\.1\.0\.0/30"):
        desk.ledger.probe(ask("10.1.0.1/30"))
    desk.network("a", "10.1.0.0/30")
    with pytest.raises(ExhaustedError):
        desk.ledger.probe(ask("10.1.0.0/30"))
    desk.ledger.probe(ask("10.1.0.0/24"))
    with pytest.raises(PreconditionError):
        desk.ledger.probe(ask("10.2.0.0/24"))
    assert desk.ledger.pool("net/n").spec == spec("10.1.0.0/30")


def test_the_queue_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LONGEST_QUEUE", 3)
    desk.pool("p", "10.1.0.0/24")
    for n in range(6):
        desk.allocate(str(n))
    for n in range(6):
        desk.release(str(n))
    # All are still cooling down, so none may be forgotten.
    assert [f.ip for f in desk.store.freed("p")] == [f"10.1.0.{n}" for n in range(2, 8)]
    desk.clock.advance(COOLDOWN_S)
    desk.allocate("x")
    desk.release("x")
    assert [f.ip for f in desk.store.freed("p")] == [f"10.1.0.{n}" for n in (3, 4, 5, 6, 7, 8)]
    assert desk.ledger.pool("p").freed == [6]
    block = desk.ledger.pool("p").sets[0].blocks[0]
    assert not block.is_touched(int(ipaddress.ip_address("10.1.0.2")))


def test_check(desk: Desk) -> None:
    desk.pool("p", "10.1.0.0/24", "fd00::/64")
    held = desk.allocate("a")
    assert desk.ledger.check(key("a"), ("fd00::2/64", "10.1.0.2/24")) == held
    with pytest.raises(PreconditionError, match=r"holds 10\.1\.0\.2/24, fd00::2/64, not 10\.1\.0\.3/24"):
        desk.ledger.check(key("a"), ("10.1.0.3/24",))
    with pytest.raises(NotFoundError):
        desk.ledger.check(key("b"), ())


class Model(RuleBasedStateMachine):
    """Random work on a small pool, beside a model of what must be true of it."""

    SIZE = 12  # 10.1.0.0/28 without network, broadcast, gateway, an excluded one; and one that is reserved at times

    @initialize(kind=st.sampled_from(["memory", "sqlite"]))
    def begin(self, kind: str) -> None:
        self.directory = tempfile.TemporaryDirectory()
        path = f"{self.directory.name}/s.db"
        self.desk = Desk(MemoryStore if kind == "memory" else lambda: SqliteStore(path))
        self.desk.pool("p", "10.1.0.0/28", excludes=("10.1.0.7",))
        self.held: dict[str, tuple[str, int]] = {}
        self.freed: dict[str, int] = {}  # when, ns
        self.reserved: set[str] = set()
        self.generations: set[int] = set()
        self.never: set[str] = {f"10.1.0.{n}" for n in range(2, 15) if n != 7}

    @rule(number=st.integers(0, 14))
    def allocate(self, number: int) -> None:
        name = str(number)
        cold = self.never - self.reserved
        free = {ip for ip, at in self.freed.items() if self.desk.clock.ns - at >= COOLDOWN_S * 1e9}
        try:
            got = self.desk.allocate(name)
        except CoolingError:
            assert name not in self.held
            assert not cold
            assert not free
            assert self.freed
            return
        except ExhaustedError:
            assert name not in self.held
            assert not cold
            assert not self.freed
            return
        (ip,) = ips(got)
        if name in self.held:
            assert self.held[name] == (ip, got.generation)
            return
        assert ip not in {"10.1.0.1", "10.1.0.7", "10.1.0.0", "10.1.0.15"}
        assert ip not in {other for other, _ in self.held.values()}
        assert ip not in self.reserved
        assert got.generation not in self.generations
        if cold:
            assert ip in cold
        else:
            assert ip in free
            assert self.freed[ip] == min(self.freed.values())
        self.generations.add(got.generation)
        self.held[name] = ip, got.generation
        self.never.discard(ip)
        self.freed.pop(ip, None)

    @rule(number=st.integers(0, 14), last=st.integers(0, 15))
    def allocate_requested(self, number: int, last: int) -> None:
        name, ip = str(number), f"10.1.0.{last}"
        try:
            got = self.desk.allocate(name, ip)
        except IpamdError:
            takeable = ip in self.never or self.desk.clock.ns - self.freed.get(ip, 1 << 62) >= COOLDOWN_S * 1e9
            assert name in self.held or ip in self.reserved or not takeable
            return
        assert ips(got) == [ip]
        if name in self.held:
            assert self.held[name] == (ip, got.generation)
            return
        assert ip in self.never or ip in self.freed
        assert ip not in self.reserved
        self.held[name] = ip, got.generation
        self.generations.add(got.generation)
        self.never.discard(ip)
        self.freed.pop(ip, None)

    @rule(number=st.integers(0, 14))
    def release(self, number: int) -> None:
        released = self.desk.release(str(number))
        assert (released is not None) == (str(number) in self.held)
        if released is not None:
            ip, _ = self.held.pop(str(number))
            self.freed[ip] = self.desk.clock.ns

    @rule(last=st.integers(2, 14), back=st.booleans())
    def reserve(self, last: int, back: bool) -> None:
        ip = f"10.1.0.{last}"
        try:
            if back:
                self.desk.ledger.unreserve("p", ip)
            else:
                self.desk.ledger.reserve("p", ip, "")
        except IpamdError:
            self.desk.commit()
            taken = ip in self.reserved or ip in {other for other, _ in self.held.values()} or last == 7
            assert (ip not in self.reserved) if back else taken
            return
        self.desk.commit()
        if back:
            self.reserved.discard(ip)
            self.freed[ip] = self.desk.clock.ns
        else:
            self.reserved.add(ip)
            self.never.discard(ip)
            self.freed.pop(ip, None)

    @rule(seconds=st.sampled_from([0.001, 1.0, 10.0, 29.999, 30.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)

    @rule()
    def fail(self) -> None:
        """A batch that does all sorts of things and cannot be committed."""
        ledger = self.desk.ledger
        for name in ("x", "y"):
            try:
                ledger.allocate(Ask(key(name), Netns(), None, ("p",)))
            except IpamdError:
                break
        for name in list(self.held)[:2]:
            ledger.release(key(name))
        self.desk.transaction.abandon()

    def teardown(self) -> None:
        self.desk.store.close()
        self.directory.cleanup()

    @rule()
    def restart(self) -> None:
        self.desk.restart()

    @invariant()
    def counts(self) -> None:
        pool = self.desk.ledger.pool("p")
        assert pool.allocated == [len(self.held)]
        assert pool.reserved == [len(self.reserved)]
        assert pool.freed == [len(self.freed)]
        usage = self.desk.ledger.usage(pool)[0]
        assert usage.size == self.SIZE
        cooling = sum(self.desk.clock.ns - at < COOLDOWN_S * 1e9 for at in self.freed.values())
        assert usage.cooling == cooling


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
