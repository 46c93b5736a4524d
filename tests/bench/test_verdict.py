"""Which rows are over their limit, in both directions."""

from __future__ import annotations

import pytest

from bench.stats import Row
from bench.verdict import complaint, complaints


@pytest.mark.parametrize(
    ("better", "value", "limit", "holds"),
    [
        ("lower", 0.65, 0.65, True),
        ("lower", 0.651, 0.65, False),
        ("lower", 0.1, None, True),
        ("higher", 2000.0, 2000.0, True),
        ("higher", 1999.0, 2000.0, False),
        ("higher", 9000.0, 2000.0, True),
    ],
)
def test_a_limit_without_a_peer_is_for_ours(better: str, value: float, limit: float | None, holds: bool) -> None:
    found = complaint(Row("x", "u", ours=value, limit=limit, better=better))  # type: ignore[arg-type]
    assert (found is None) is holds


def test_a_limit_with_a_peer_is_for_the_ratio() -> None:
    slow_both = Row("x", "ms", ours=500.0, peer=1000.0, ratio=0.5, limit=0.65)
    assert complaint(slow_both) is None
    quick_ours = Row("y", "ms", ours=0.5, peer=0.5, ratio=1.0, limit=0.65)
    text = complaint(quick_ours)
    assert text is not None
    assert "y: ratio 1.000 > limit 0.65 (ours 0.5 ms, peer 0.5 ms)" in text


def test_a_limit_on_what_was_not_measured_does_not_hold() -> None:
    text = complaint(Row("x", "ms", limit=0.5, note="not measured: it did not start"))
    assert text is not None
    assert "it did not start" in text


def test_all_that_is_over_is_named_in_order() -> None:
    rows = [Row("a", "u", ours=2.0, limit=1.0), Row("b", "u", ours=1.0, limit=1.0), Row("c", "u", ours=3.0, limit=1.0)]
    assert [text.split(":")[0] for text in complaints(rows)] == ["a", "c"]
