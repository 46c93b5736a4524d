"""The table that people read. Pure functions of rows; characters and colour depend on who watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.stats import Row
from bench.verdict import complaint

_HEAD = ("", "ours", "p95", "peer", "p95", "unit", "ratio", "rounds from - to", "limit", "")
_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Style:
    """What the table is made of."""

    rule: str = "-"
    colour: bool = False


def style(environment: Mapping[str, str], tty: bool) -> Style:
    """Plain ASCII where nobody watches or the locale has no other characters."""
    locale = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or "C"
    if not tty or not locale.lower().endswith(("utf-8", "utf8")):
        return Style()
    return Style("─", not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb")


def number(value: float | None) -> str:
    """Three digits that count, thousands grouped; a dash for what was not measured."""
    if value is None:
        return _ABSENT
    if abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


def table(rows: Sequence[Row], look: Style = Style()) -> list[str]:
    """One line for each row under a head, and below it the notes that they refer to."""
    notes: dict[str, int] = {}
    cells: list[tuple[str, ...]] = [_HEAD]
    for row in rows:
        if row.note:
            notes.setdefault(row.note, len(notes) + 1)
        cells.append(_cells(row, notes.get(row.note)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = [_line(line, widths) for line in cells]
    lines.insert(1, look.rule * max(len(line) for line in lines))
    if look.colour:
        lines[2:] = [
            f"\x1b[31m{line}\x1b[0m" if complaint(row) else line for line, row in zip(lines[2:], rows, strict=True)
        ]
    if notes:
        lines += ["", *(f"[{index}] {note}" for note, index in notes.items())]
    return lines


def _cells(row: Row, note: int | None) -> tuple[str, ...]:
    sign = "<=" if row.better == "lower" else ">="
    verdict = "" if row.limit is None else "OVER" if complaint(row) else "held"
    return (
        row.name + (f" [{note}]" if note else ""),
        number(row.ours),
        number(row.ours_p95),
        number(row.peer) if row.peer is not None else "",
        number(row.peer_p95) if row.peer is not None else "",
        row.unit,
        f"{row.ratio:.2f}" if row.ratio is not None else "",
        f"{number(row.spread[0])} - {number(row.spread[1])}" if row.spread else "",
        f"{sign} {row.limit:g}" if row.limit is not None else "",
        verdict,
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    columns = [first.ljust(widths[0])]
    columns += [
        cell.ljust(width) if head == "unit" else cell.rjust(width)
        for cell, width, head in zip(others, widths[1:], _HEAD[1:], strict=True)
    ]
    return "  ".join(columns).rstrip()
