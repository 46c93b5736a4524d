"""Which rows are over their limit. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from bench.stats import Row


def complaint(row: Row) -> str | None:
    """Why a row does not hold what its limit asks for; None where it does, and where there is no limit.

    A row that has a limit and was not measured does not hold it: else a broken measurement would pass.
    """
    if row.limit is None:
        return None
    value = row.judged
    if value is None:
        return f"{row.name}: has the limit {row.limit:g}, and was not measured ({row.note or 'no reason given'})"
    if row.better == "lower" and value > row.limit:
        sign = ">"
    elif row.better == "higher" and value < row.limit:
        sign = "<"
    else:
        return None
    if row.peer is None:
        return f"{row.name}: {value:.4g} {row.unit} {sign} limit {row.limit:g} {row.unit}"
    return (
        f"{row.name}: ratio {value:.3f} {sign} limit {row.limit:g} "
        f"(ours {row.ours:.4g} {row.unit}, peer {row.peer:.4g} {row.unit})"
    )


def complaints(rows: Iterable[Row]) -> list[str]:
    """Of all rows, in their order."""
    return [text for row in rows if (text := complaint(row)) is not None]
