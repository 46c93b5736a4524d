"""Properties of the pure allocator: bitmap, blocks, range sets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ipamd.allocator import Bitmap, Block, RangeSet, without

SIZES = st.sampled_from([1, 2, 3, 1023, 1024, 1025, 3000, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 80])


@st.composite
def _members(draw: st.DrawFn) -> tuple[int, list[tuple[bool, int]]]:
    size = draw(SIZES)
    # Near each other and near the edges of words, where mistakes live.
    near = draw(st.integers(0, size - 1))
    member = st.one_of(
        st.integers(0, size - 1), st.integers(max(0, near - 1100), min(size - 1, near + 1100)), st.just(size - 1)
    )
    return size, draw(st.lists(st.tuples(st.booleans(), member), max_size=60))


@given(_members(), st.data())
def test_bitmap_is_a_set(case: tuple[int, list[tuple[bool, int]]], data: st.DataObject) -> None:
    size, steps = case
    bitmap, model = Bitmap(size), set[int]()
    for add, member in steps:
        if add:
            bitmap.add(member)
            model.add(member)
        else:
            bitmap.discard(member)
            model.discard(member)
    for _, member in steps:
        assert (member in bitmap) == (member in model)
    start = data.draw(st.integers(0, size - 1))
    gap = start
    while gap in model:
        gap += 1
    assert bitmap.first_gap(start) == gap


@given(st.integers(1, 3000), st.data())
@settings(max_examples=30)
def test_bitmap_across_full_words(length: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 5000))
    bitmap = Bitmap(1 << 24)
    for member in range(first, first + length):
        bitmap.add(member)
    assert bitmap.first_gap(first) == first + length
    hole = data.draw(st.integers(first, first + length - 1))
    bitmap.discard(hole)
    assert bitmap.first_gap(first) == hole
    assert bitmap.first_gap(hole + 1) == first + length
    bitmap.add(hole)
    assert bitmap.first_gap(first) == first + length


def test_full_bitmap_has_no_gap_below_its_size() -> None:
    for size in (1, 1024, 2048, 5000):
        bitmap = Bitmap(size)
        for member in range(size):
            bitmap.add(member)
        assert bitmap.first_gap(0) >= size


@st.composite
def _blocks(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    first = draw(st.integers(0, 2000))
    last = first + draw(st.integers(0, 200))
    hole = st.integers(max(0, first - 5), last + 5)
    holes = draw(st.lists(st.tuples(hole, st.integers(0, 10)), max_size=8))
    return first, last, [(low, low + length) for low, length in holes]


@given(_blocks())
def test_without_is_the_difference(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    first, last, holes = case
    left = {a for low, high in without(first, last, holes) for a in range(low, high + 1)}
    assert left == {a for a in range(first, last + 1) if not any(low <= a <= high for low, high in holes)}


@given(_blocks())
def test_every_address_once_and_no_hole(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    first, last, holes = case
    block = Block(without(first, last, holes))
    free = {a for a in range(first, last + 1) if not any(low <= a <= high for low, high in holes)}
    assert block.size == len(free)
    taken = [block.take_cold() for _ in free]
    assert len(set(taken)) == len(taken)
    assert set(taken) == free
    assert block.take_cold() is None
    assert not block.has_cold()


@given(_blocks(), st.data())
def test_next_fit(case: tuple[int, int, list[tuple[int, int]]], data: st.DataObject) -> None:
    """The next address is the first cold one behind the last that was taken, around the end."""
    first, last, holes = case
    block = Block(without(first, last, holes))
    free = sorted(a for a in range(first, last + 1) if a in block)
    touched: set[int] = set()
    cursor = first
    steps = data.draw(st.lists(st.booleans(), max_size=60))
    for give_back in steps:
        if touched and give_back:
            back = data.draw(st.sampled_from(sorted(touched)))
            block.untouch(back)
            touched.discard(back)
            continue
        got = block.take_cold()
        cold = [a for a in free if a not in touched]
        expected = next((a for a in cold if a >= cursor), cold[0] if cold else None)
        assert got == expected
        if got is not None:
            touched.add(got)
            cursor = got + 1


@given(st.lists(st.integers(0, 400), unique=True, max_size=40))
def test_touched_is_never_taken(touched: list[int]) -> None:
    block = Block([(0, 400)])
    for address in touched:
        block.touch(address)
    taken = []
    while (got := block.take_cold()) is not None:
        taken.append(got)
    assert set(taken) == set(range(401)) - set(touched)


def test_range_set_tries_ranges_in_order() -> None:
    ranges = RangeSet([Block([(10, 11)]), Block([(20, 21)])])
    assert [ranges.take_cold() for _ in range(5)] == [(10, 0), (11, 0), (20, 1), (21, 1), None]
    assert ranges.block_of(21) == 1
    assert ranges.block_of(15) == -1
    ranges.blocks[0].untouch(11)
    assert ranges.take_cold() == (11, 0)


def test_cost_does_not_grow_with_size_or_fill() -> None:
    """Work is counted, not time: how many words a search looks at."""

    class Counting(dict[int, int]):
        looks = 0

        def get(self, key: int, default: int = 0) -> int:  # type: ignore[override]
            Counting.looks += 1
            return super().get(key, default)

    bitmap = Bitmap(1 << 24)
    bitmap._levels = tuple(Counting() for _ in bitmap._levels)
    for member in range(1 << 17):
        bitmap.add(member)
    Counting.looks = 0
    assert bitmap.first_gap(0) == 1 << 17
    assert Counting.looks <= 2 * len(bitmap._levels)


def test_many_holes_are_stepped_over_at_once() -> None:
    """With every stretch but the last full, a search from the start finds that one without visiting each."""
    block = Block([(2 * n, 2 * n) for n in range(20_000)])
    for n in range(19_999):
        block.touch(2 * n)
    block.start_after(-1)
    assert block.take_cold() == 2 * 19_999
    assert block.take_cold() is None


def test_a_large_range_needs_no_room() -> None:
    block = Block([(1, (1 << 80) - 1)])
    assert [block.take_cold() for _ in range(5)] == [1, 2, 3, 4, 5]
    block.touch(1 << 79)
    assert block.is_touched(1 << 79)
    assert sum(len(level) for _, _, bitmap in block._stretches for level in bitmap._levels) <= 2
