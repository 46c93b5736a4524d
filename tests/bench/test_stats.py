"""From samples to rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import Row, Spec, absent, interval, median, quantile, row

times = st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=1, max_size=30)


def test_median_of_odd_and_even_numbers_of_samples() -> None:
    assert median([5, 1, 3]) == 3
    assert median([4, 1, 3, 2]) == 2.5


def test_quantile_is_a_sample_and_counts_from_the_smallest() -> None:
    samples = [float(n) for n in range(20, 0, -1)]
    assert quantile(samples, 0.95) == 19
    assert quantile(samples, 1.0) == 20
    assert quantile([7.0], 0.95) == 7


@pytest.mark.parametrize("function", [median, lambda samples: quantile(samples, 0.5)])
def test_nothing_has_neither(function: object) -> None:
    with pytest.raises(ValueError, match="nothing"):
        function([])  # type: ignore[operator]


@given(times)
def test_half_of_the_samples_lie_on_each_side_of_the_median(samples: list[float]) -> None:
    middle = median(samples)
    assert 2 * sum(sample < middle for sample in samples) <= len(samples)
    assert 2 * sum(sample > middle for sample in samples) <= len(samples)


@given(times)
def test_at_most_a_twentieth_exceeds_the_p95(samples: list[float]) -> None:
    top = quantile(samples, 0.95)
    assert top in samples
    assert sum(sample > top for sample in samples) <= 0.05 * len(samples)


def test_the_interval_of_the_median() -> None:
    """The ranks are those of the tables for the sign test at 5 %."""
    for count, rank in ((5, 1), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (25, 8), (50, 18)):
        samples = [float(n) for n in range(count, 0, -1)]
        assert interval(samples) == (rank, count + 1 - rank)
    assert interval([4.0]) == (4.0, 4.0)
    with pytest.raises(ValueError, match="nothing"):
        interval([])


@given(times)
def test_the_interval_has_the_median_in_it(samples: list[float]) -> None:
    low, high = interval(samples)
    assert low <= median(samples) <= high


def test_the_ratio_is_taken_within_each_round() -> None:
    """The machine became three times slower after the first round: that is in no ratio."""
    found = row(Spec("x", "ms", limit=1.0), [[1, 1, 9], [3], [6]], [[2], [6], [6]])
    assert found.ratio == 0.5
    assert found.spread == (0.5, 1.0)
    assert (found.ours, found.peer) == (3, 6)
    assert (found.ours_p95, found.peer_p95) == (9, 6)
    assert (found.rounds, found.limit) == (3, 1.0)


def test_without_a_peer_the_spread_is_of_ours() -> None:
    found = row(Spec("x", "1/s", "higher", 2000), [[2500], [1500], [2100]])
    assert (found.ours, found.ratio, found.peer, found.spread) == (2100, None, None, (1500, 2500))
    assert found.judged == 2100
    assert found.better == "higher"


@given(st.lists(st.tuples(times, times), min_size=1, max_size=9))
def test_the_ratio_lies_within_its_spread(rounds: list[tuple[list[float], list[float]]]) -> None:
    found = row(Spec("x", "ms"), [ours for ours, _ in rounds], [peer for _, peer in rounds])
    assert found.spread is not None
    assert found.ratio is not None
    assert found.spread[0] <= found.ratio <= found.spread[1]
    assert found.judged == found.ratio


def test_rounds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds of ours, 1 of the peer"):
        row(Spec("x", "ms"), [[1], [2]], [[1]])


def test_a_peer_that_took_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        row(Spec("x", "ms"), [[1.0]], [[0.0]])


def test_what_is_absent_keeps_its_limit_unless_it_is_excused() -> None:
    spec = Spec("x", "ms", limit=0.5, note="n")
    assert absent(spec, "why", excused=False) == Row("x", "ms", limit=0.5, note="n; not measured: why")
    assert absent(spec, "why", excused=True).limit is None
