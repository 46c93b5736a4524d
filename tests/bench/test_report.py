"""The table."""

from __future__ import annotations

import pytest

from bench.report import Style, number, style, table
from bench.stats import Row

ROWS = [
    Row("bridge ADD", "ms", 4.2, 8.4, 0.5, 0.65, 0.4, (0.45, 0.55), 5.1, 9.9, rounds=9, note="durable"),
    Row("allocations", "1/s", 1500.0, limit=2000, better="higher", spread=(1400.0, 1600.0), rounds=9, note="durable"),
    Row("warm", "ms", note="not measured: none here"),
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (12345.6, "12,346"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (-150.0, "-150")],
)
def test_numbers_have_three_digits_that_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_each_row_has_a_line_with_both_sides_and_its_verdict() -> None:
    head, rule, bridge, rate, warm, *_ = table(ROWS)
    assert head.split() == ["ours", "p95", "peer", "p95", "unit", "ratio", "rounds", "from", "-", "to", "limit"]
    assert set(rule) == {"-"}
    assert bridge.split() == (
        [
            "bridge",
            "ADD",
            "[1]",
            "4.20",
            "5.10",
            "8.40",
            "9.90",
            "ms",
            "0.50",
            "0.450",
            "-",
            "0.550",
            "<=",
            "0.65",
            "held",
        ]
    )
    assert rate.endswith(">= 2000  OVER")
    assert "-" in warm


def test_a_note_is_printed_once_for_all_rows_that_have_it() -> None:
    lines = table(ROWS)
    assert lines[-3:] == ["", "[1] durable", "[2] not measured: none here"]


def test_plain_ascii_without_a_terminal_or_in_the_c_locale() -> None:
    utf8 = {"LANG": "en_US.UTF-8", "TERM": "xterm"}
    assert style(utf8, tty=False) == Style()
    assert style({"LANG": "C", "TERM": "xterm"}, tty=True) == Style()
    assert style({**utf8, "LC_ALL": "C"}, tty=True) == Style()
    assert style({}, tty=True) == Style()
    "\n".join(table(ROWS)).encode("ascii")


def test_colour_only_for_eyes_that_want_it() -> None:
    utf8 = {"LANG": "en_US.UTF-8", "TERM": "xterm"}
    assert style(utf8, tty=True).colour
    assert not style({**utf8, "NO_COLOR": "1"}, tty=True).colour
    assert not style({**utf8, "TERM": "dumb"}, tty=True).colour
    red = [line for line in table(ROWS, style(utf8, tty=True)) if "\x1b[31m" in line]
    assert len(red) == 1
    assert "allocations" in red[0]
