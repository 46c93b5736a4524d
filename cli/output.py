"""How the command speaks: tables for people, one JSON document for programs.

- On a terminal, rich sets the tables; NO_COLOR is honoured. Anywhere else they are plain columns, never cut and without
  colours, for grep and awk.
- Nothing that came from a container's side reaches a terminal unescaped: control characters are shown as escapes, and
  no text is taken for markup.
- Our own words are ASCII, so that the C locale shows them; what others named is escaped where a stream cannot hold it.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_RICH_ROWS = 500  # rich takes a second for 5,000 rows; plain columns take 20 ms
_STYLES = {"healthy": "bold green", "degraded": "bold red", "unreachable": "bold red"}


def prepare_streams() -> None:
    """Makes standard output and error take any text: what the locale cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def document(value: Mapping[str, object]) -> None:
    """Prints one JSON document."""
    click.echo(json.dumps(value, indent=2))


def document_line(value: Mapping[str, object]) -> None:
    """Prints one JSON document of many, on a line of its own and at once."""
    click.echo(json.dumps(value))
    sys.stdout.flush()


def line(text: str) -> None:
    """Prints a line."""
    click.echo(visible(text))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line."""
    rows = [(name, visible(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    if not _is_terminal():
        for name, value in rows:
            click.echo(f"{name:<{width}}  {value}".rstrip())
        return
    console = _console()
    for name, value in rows:
        console.print(Text(f"{name:<{width}}  ", style="dim"), Text(value, style=_STYLES.get(value, "")), sep="")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints a table; the columns named in `right` hold numbers."""
    shown = [tuple(visible(cell) for cell in row) for row in rows]
    if not _is_terminal() or len(shown) > _RICH_ROWS:
        _plain_table(columns, shown, right)
        return
    rich_table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        rich_table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in shown:
        rich_table.add_row(*(Text(cell) for cell in row))
    _console().print(rich_table)


def fill(taken: int, size: int) -> str:
    """A bar of ten places and a percentage. One address in use is never shown as none, one free never as all used."""
    if size <= 0:
        return ""
    percent = min(99, max(1, round(100 * taken / size))) if 0 < taken < size else 100 * (taken >= size)
    return f"[{'#' * (percent // 10):<10}] {percent:>3}%"


def visible(text: str) -> str:
    """Text without control characters and line breaks, which are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for row in (columns, *rows):
        cells = (
            f"{cell:>{width}}" if column in right else f"{cell:<{width}}"
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    click.echo("\n".join(lines))


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
