"""The blocks of node-block pools: which there are, what they hand out, and the ledger's part in them."""

import contextlib
import hashlib
import ipaddress
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipamd.blocks import Grid
from ipamd.engine import Transaction
from ipamd.errors import AlreadyExistsError, InvalidArgumentError, NeedsBlockError, PreconditionError, UnavailableError
from ipamd.lease import Ask, Ledger
from ipamd.member.flow import Flow
from ipamd.member.holdings import Holdings
from ipamd.pool import Pool, PoolSpec, RangeSpec, validate
from ipamd.store.base import Allocation, Key, Netns, Reservation
from ipamd.store.memory import MemoryStore
from tests.ipamd.clock import FakeClock


def node_block(*ranges: RangeSpec, **more: object) -> PoolSpec:
    """One range set."""
    return PoolSpec((ranges,), mode="node-block", **more)  # type: ignore[arg-type]


def texts(addresses: Sequence[int]) -> list[str]:
    return [str(ipaddress.ip_address(address)) for address in addresses]


def handed_out(spec: PoolSpec, cidr: str) -> list[str]:
    _, block = Pool("p", spec, managed=False).add_block(cidr)
    return texts(list(block.addresses()))


@pytest.mark.parametrize(
    ("ranges", "bits", "blocks"),
    [
        ([RangeSpec("10.1.0.0/24")], 26, ["10.1.0.0/26", "10.1.0.64/26", "10.1.0.128/26", "10.1.0.192/26"]),
        ([RangeSpec("10.1.0.0/27")], 26, ["10.1.0.0/27"]),
        ([RangeSpec("10.1.0.0/24", "10.1.0.70", "10.1.0.130")], 26, ["10.1.0.64/26", "10.1.0.128/26"]),
        ([RangeSpec("10.1.0.0/26"), RangeSpec("10.0.0.0/26")], 27,
         ["10.1.0.0/27", "10.1.0.32/27", "10.0.0.0/27", "10.0.0.32/27"]),
        # Two ranges of one subnet share a block.
        ([RangeSpec("10.1.0.0/24", "10.1.0.10", "10.1.0.20"), RangeSpec("10.1.0.0/24", "10.1.0.40", "10.1.0.70")], 26,
         ["10.1.0.0/26", "10.1.0.64/26"]),
    ],
)  # fmt: skip
def test_which_blocks_there_are(ranges: list[RangeSpec], bits: int, blocks: list[str]) -> None:
    (grid,) = validate(node_block(*ranges, block_v4=bits)).grids
    assert [grid.cidr(number) for number in range(grid.total)] == blocks


@pytest.mark.parametrize(
    ("spec", "cidr", "first", "last", "count"),
    [
        (node_block(RangeSpec("10.1.0.0/24")), "10.1.0.64/26", "10.1.0.66", "10.1.0.126", 61),
        (node_block(RangeSpec("10.1.0.0/24", gateway="none")), "10.1.0.64/26", "10.1.0.65", "10.1.0.126", 62),
        (node_block(RangeSpec("fd00::/64")), "fd00::40/122", "fd00::42", "fd00::7f", 62),
        (node_block(RangeSpec("10.1.0.0/24"), block_v4=31), "10.1.0.2/31", "10.1.0.3", "10.1.0.3", 1),
        (node_block(RangeSpec("10.1.0.0/24", gateway="none"), block_v4=32), "10.1.0.9/32", "10.1.0.9", "10.1.0.9", 1),
        (node_block(RangeSpec("10.1.0.0/24", "10.1.0.70")), "10.1.0.64/26", "10.1.0.70", "10.1.0.126", 57),
        (node_block(RangeSpec("10.1.0.0/24"), excludes=("10.1.0.66/31",)), "10.1.0.64/26", "10.1.0.68", "10.1.0.126",
         59),
    ],
)  # fmt: skip
def test_what_a_block_hands_out(spec: PoolSpec, cidr: str, first: str, last: str, count: int) -> None:
    found = handed_out(spec, cidr)
    assert (found[0], found[-1], len(found)) == (first, last, count)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (node_block(RangeSpec("10.0.0.0/8"), block_v4=21), "block_v4: wanted a prefix length of 22 to 32, found 21"),
        (node_block(RangeSpec("fd00::/64"), block_v6=64), "block_v6: wanted a prefix length of 118 to 128, found 64"),
        (node_block(RangeSpec("10.1.0.0/24", gateway="10.1.0.9")), "each block of a node-block pool has a gateway"),
        (node_block(RangeSpec("10.1.0.0/24"), block_v4=32), "no block has an address to hand out"),
        (node_block(RangeSpec("10.1.0.0/24", "10.1.0.1", "10.1.0.1")), "no block has an address to hand out"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", "10.1.0.1", "10.1.0.9"),), (RangeSpec("10.1.0.0/24", "10.1.0.20"),)),
                  mode="node-block"), "block 10.1.0.0/26 would belong to two ranges or range sets"),
        (node_block(RangeSpec("10.1.0.0/27"), RangeSpec("10.1.0.0/24", "10.1.0.40")), "would belong to two ranges"),
    ],
)  # fmt: skip
def test_what_no_pool_can_be(spec: PoolSpec, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        validate(spec)


@given(st.integers(22, 30), st.integers(0, 255), st.integers(0, 255), st.data())
def test_each_address_belongs_to_one_block_at_most(bits: int, low: int, high: int, data: st.DataObject) -> None:
    low, high = sorted((low, high))
    spec = RangeSpec("10.1.0.0/22", f"10.1.0.{low}", f"10.1.3.{high}")
    (grid,) = validate(node_block(spec, block_v4=bits)).grids
    seen: Counter[int] = Counter()
    for number in range(grid.total):
        block = grid.block(grid.cidr(number))
        assert block is not None
        network = ipaddress.ip_network(grid.cidr(number))
        for first, last in block.stretches:
            seen.update(range(first, last + 1))
            assert int(network[1]) < first <= last < int(network[-1])
    assert set(seen.values()) <= {1}
    assert all(int(ipaddress.ip_address(spec.start)) <= address for address in seen)
    address = data.draw(st.sampled_from(sorted(seen))) if seen else None
    if address is not None:
        assert Pool("p", node_block(spec, block_v4=bits), False).block_for(4, address) == (0, grid.covering(4, address))


def test_the_choice_spreads_and_finds_the_last_one() -> None:
    (grid,) = validate(node_block(RangeSpec("10.0.0.0/16"))).grids
    assert grid.choose(7, ()) == grid.choose(7 + grid.total, ()) == "10.0.1.192/26"
    taken: set[str] = set()
    while cidr := grid.choose(7, taken, spread=len(taken) % 2 == 1):
        assert cidr not in taken
        taken.add(cidr)
    assert len(taken) == grid.total == 1024
    (huge,) = validate(node_block(RangeSpec("fd00::/32"))).grids
    assert huge.total == 1 << 90
    assert huge.block(huge.choose(123456789 << 50, ())) is not None


def test_a_thousand_nodes_at_once_meet_rarely() -> None:
    """Each chooses without knowing of the others, and learns of a conflict only where it met one."""
    (grid,) = validate(node_block(RangeSpec("10.0.0.0/16", gateway="none"), block_v4=26)).grids
    conflicts = _rush(grid, 1000)
    assert sorted(conflicts)[500] <= 5


def _rush(grid: Grid, nodes: int) -> list[int]:
    taken: set[str] = set()
    known: list[set[str]] = [set() for _ in range(nodes)]
    tries = [0] * nodes
    waiting = list(range(nodes))
    while waiting:
        left = []
        for node in waiting:
            seed = int.from_bytes(hashlib.blake2b(b"%d" % node, digest_size=8).digest(), "big")
            cidr = grid.choose(seed, known[node], spread=tries[node] > 0)
            if cidr in taken:
                tries[node] += 1
                known[node].add(cidr)
                if tries[node] % 3 == 0:
                    known[node] = set(taken)  # read anew
                left.append(node)
            taken.add(cidr)
        waiting = left
    return tries


class World:
    """A ledger with a pool of two blocks of 16."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore()
        self.transaction = Transaction(self.store)
        self.ledger = Ledger(self.transaction, self.clock, 30.0)
        self.ledger.in_cluster = True
        self.holdings = Holdings(self.transaction, self.ledger)
        self.spec = node_block(RangeSpec("10.1.0.0/24"), block_v4=28)
        self.ledger.create_pool("p", self.spec)

    @property
    def pool(self) -> Pool:
        return self.ledger.pools["p"]

    def allocate(self, name: str, *requested: str) -> Allocation:
        ask = Ask(Key("n", "cni", "net", name, "eth0"), Netns(), None, ("p",), None, requested)
        return self.ledger.allocate(ask)[0]

    def commit(self) -> None:
        if self.transaction.dirty:
            self.store.commit()
        self.transaction.committed()

    def reopened(self) -> Ledger:
        self.commit()
        return Ledger(Transaction(self.store), self.clock, 30.0)

    def counts(self) -> tuple[int, ...]:
        (usage,) = self.ledger.usage(self.pool)
        return usage.size, usage.allocated, usage.reserved, usage.cooling, usage.free, usage.blocks


def test_without_a_block_one_is_wanted() -> None:
    world = World()
    with pytest.raises(NeedsBlockError) as error:
        world.allocate("a")
    assert (error.value.pool, error.value.range_set, error.value.cidr) == ("p", 0, "")
    with pytest.raises(NeedsBlockError) as error:
        world.allocate("a", "10.1.0.40")
    assert error.value.cidr == "10.1.0.32/28"
    with pytest.raises(InvalidArgumentError, match=r"10.1.0.33 is a gateway of pool p"):
        world.allocate("a", "10.1.0.33")
    assert world.counts() == (0, 0, 0, 0, 0, 0)


def test_addresses_come_from_the_blocks_in_order_with_their_gateways() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.32/28", "10.1.0.0/28"], [Reservation("p", "10.1.0.34", "r")])
    found = [world.allocate(f"c{n}").addresses[0] for n in range(25)]
    assert (found[0].cidr, found[0].gateway) == ("10.1.0.35/28", "10.1.0.33")
    assert (found[12].cidr, found[12].gateway) == ("10.1.0.2/28", "10.1.0.1")
    assert len({address.cidr for address in found}) == 25
    assert world.counts() == (26, 25, 1, 0, 0, 2)
    with pytest.raises(NeedsBlockError):
        world.allocate("more")
    again = world.reopened()
    assert again.pools["p"].cidrs == [("10.1.0.0/28", "10.1.0.32/28")]
    assert (again.pools["p"].allocated, again.pools["p"].reserved) == ([25], [1])
    assert sorted(block.held for block in again.pools["p"].sets[0].blocks) == [12, 13]


def test_what_was_done_to_blocks_can_be_taken_back() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.0/28"])
    kept = world.allocate("kept")
    world.commit()
    before = world.counts(), world.pool.cidrs
    world.holdings.add("p", ["10.1.0.16/28"])
    world.holdings.freeze("p", "10.1.0.0/28", "test")
    assert world.allocate("other").addresses[0].ip == "10.1.0.18"
    world.ledger.drop(kept)
    world.transaction.abandon()
    assert (world.counts(), world.pool.cidrs) == before
    assert [block.held for block in world.pool.sets[0].blocks] == [1]
    assert world.allocate("next").addresses[0].ip == "10.1.0.3"


def test_a_block_goes_back_when_nothing_of_it_is_in_use_or_cools_down() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.0/28", "10.1.0.16/28"])
    held = world.allocate("a")
    assert not world.holdings.retire("p", "10.1.0.0/28")
    world.ledger.drop(held)
    assert not world.holdings.retire("p", "10.1.0.0/28")
    world.clock.advance(31.0)
    assert world.holdings.retire("p", "10.1.0.0/28")
    assert not world.holdings.retire("p", "10.1.0.0/28")
    assert world.counts() == (13, 0, 0, 0, 13, 1)
    world.holdings.add("p", ["10.1.0.0/28"])
    assert world.allocate("b", "10.1.0.2").addresses[0].ip == "10.1.0.2"
    assert world.reopened().pools["p"].allocated == [1]


def test_a_frozen_block_hands_nothing_out_until_it_is_thawed() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.0/28"])
    first, second = world.allocate("a"), world.allocate("b")
    world.ledger.drop(first)
    assert world.holdings.freeze("p", "10.1.0.0/28", "node z claims it, too")
    assert not world.holdings.freeze("p", "10.1.0.0/28", "again")
    world.clock.advance(60.0)
    for wanted in ((), ("10.1.0.9",)):
        with pytest.raises((NeedsBlockError, AlreadyExistsError)):
            world.allocate("c", *wanted)
    world.ledger.drop(second)
    assert world.holdings.frozen("p", "10.1.0.0/28") == "node z claims it, too"
    again = world.reopened()
    with pytest.raises(NeedsBlockError):
        again.allocate(Ask(Key("n", "cni", "net", "c", "eth0"), Netns(), None, ("p",)))
    assert world.holdings.thaw("p", "10.1.0.0/28")
    assert {world.allocate(f"d{n}").addresses[0].ip for n in range(13)} == {f"10.1.0.{n}" for n in range(2, 15)}


def test_reservations_outside_of_the_own_blocks() -> None:
    world = World()
    world.ledger.reserve("p", "10.1.0.20", "elsewhere")
    with pytest.raises(InvalidArgumentError):
        world.ledger.reserve("p", "10.2.0.20", "outside")
    assert world.counts() == (0, 0, 0, 0, 0, 0)
    world.holdings.add("p", ["10.1.0.16/28"])
    assert world.counts() == (13, 0, 1, 0, 12, 1)
    with pytest.raises(AlreadyExistsError, match="is reserved"):
        world.allocate("a", "10.1.0.20")
    world.ledger.unreserve("p", "10.1.0.20")
    assert world.counts() == (13, 0, 0, 1, 12, 1)


def test_refusals_concern_new_addresses_of_shared_pools_only() -> None:
    world = World()
    world.ledger.create_pool("own", PoolSpec(((RangeSpec("10.2.0.0/24"),),)))
    world.holdings.add("p", ["10.1.0.0/28"])
    held = world.allocate("a")
    world.ledger.refusal = lambda: PreconditionError("drained")
    assert world.allocate("a").addresses == held.addresses
    with pytest.raises(PreconditionError, match="drained"):
        world.allocate("b")
    world.ledger.allocate(Ask(Key("n", "cni", "net", "c", "eth0"), Netns(), None, ("own",)))
    world.ledger.drop(held)
    world.ledger.refusal = lambda: UnavailableError("silent")
    with pytest.raises(UnavailableError, match="silent"):
        world.ledger.probe(Ask(Key("n", "", "", "", ""), Netns(), None, ("p",)))


def test_scarce_and_changed_blocks_are_noted() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.0/28"])
    world.ledger.changed.clear()
    for n in range(8):
        world.allocate(f"c{n}")
    assert world.ledger.scarce == {}
    assert world.ledger.changed == {("p", "10.1.0.0/28"): None}
    world.allocate("c8")
    assert world.ledger.scarce == {("p", 0): None}


@given(st.lists(st.sampled_from(["take", "drop", "wait", "block", "reserve"]), max_size=60), st.integers(0, 20))
def test_whether_more_can_be_handed_out_is_known_without_counting(steps: list[str], than: int) -> None:
    world = World()
    held: list[Allocation] = []
    blocks = ["10.1.0.0/28", "10.1.0.16/28"]
    for number, step in enumerate(steps):
        if step == "block" and blocks:
            world.holdings.add("p", [blocks.pop()])
        elif step == "wait":
            world.clock.advance(16.0)
        elif step == "drop" and held:
            world.ledger.drop(held.pop(0))
        elif step == "reserve":
            with contextlib.suppress(AlreadyExistsError):
                world.ledger.reserve("p", f"10.1.0.{2 + number % 12}", "r")
        elif step == "take":
            with contextlib.suppress(NeedsBlockError):
                held.append(world.allocate(f"c{number}"))
    (usage,) = world.ledger.usage(world.pool)
    # A reservation in a block that the node does not hold is in no count.
    assert world.ledger.has_more(world.pool, 0, than) == (usage.free > than)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
def test_each_block_is_found_in_its_place(steps: list[tuple[bool, int]]) -> None:
    pool = Pool("p", PoolSpec(((RangeSpec("10.1.0.0/26"),), (RangeSpec("10.2.0.0/26"),)), mode="node-block",
                              block_v4=28), managed=False)  # fmt: skip
    every = [grid.cidr(number) for grid in pool.whole.grids for number in range(grid.total)]
    for adds, number in steps:
        if adds and pool.find_block(every[number]) is None:
            pool.add_block(every[number])
        elif not adds:
            pool.remove_block(every[number])
    held = {cidr: (index, number) for index, cidrs in enumerate(pool.cidrs) for number, cidr in enumerate(cidrs)}
    assert {cidr: place for cidr in every if (place := pool.find_block(cidr))} == held
    for cidr, (index, number) in held.items():
        block = pool.sets[index].blocks[number]
        assert pool.block_for(4, block.first) == (index, cidr)


@pytest.mark.parametrize(
    ("claimed", "lasted_s", "wanted"),
    [(1, 9.0, 1), (1, 0.4, 1), (1, 0.1, 5), (1, 0.0, 16), (16, 0.5, 16), (16, 2.0, 4)],
)
def test_as_many_blocks_are_claimed_at_once_as_last_half_a_second(claimed: int, lasted_s: float, wanted: int) -> None:
    flow = Flow()
    assert flow.wanted(100.0) == 1
    assert not flow.is_rush(100.0)
    flow.note(claimed, 100.0)
    assert flow.wanted(100.0 + lasted_s) == wanted
    assert flow.is_rush(100.0 + lasted_s) == (lasted_s < 1.0)


def test_what_is_published_of_a_block() -> None:
    world = World()
    world.holdings.add("p", ["10.1.0.0/28"])
    assert world.holdings.rows("p", "10.1.0.0/28") == ()
    held = world.allocate("a")
    other = world.allocate("b")
    world.ledger.reserve("p", "10.1.0.9", "r")
    world.ledger.drop(other)
    (row,) = world.holdings.rows("p", "10.1.0.0/28") or ()
    assert (row.cidr, row.gateway, row.container_id, row.generation) == (
        "10.1.0.2/28", "10.1.0.1", "a", held.generation
    )  # fmt: skip
    assert world.holdings.rows("p", "10.1.0.16/28") is None
