"""Executes a lab of docs/labs: each command of its ```console blocks, and compares what it shows.

A block is ```console, for the only host, or ```console NAME. A line that begins with `$ ` is a command, `> ` goes on
with it, what follows is what it prints on both streams: these lines, in this order, `...` being any text; a line `...`
alone stands for any number of lines. Nothing expected: nothing printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts import ROOT

LABS = ROOT / "docs/labs"
Execute = Callable[[str, str], str]  # host, command → output


@dataclass
class Step:
    """One command."""

    host: str
    line: int
    command: str
    expected: list[str] = field(default_factory=list)


def steps(path: Path) -> Iterator[Step]:
    """The commands of a lab, in order."""
    host: str | None = None
    step: Step | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"```console *(\w*)", line)
        if fence:
            host = fence[1]
        elif line == "```":
            if step is not None:
                yield step
            host, step = None, None
        elif host is not None and line.startswith("$ "):
            if step is not None:
                yield step
            step = Step(host, number, line[2:])
        elif host is not None and step is not None:
            if line.startswith("> ") and not step.expected:
                step.command += f"\n{line[2:]}"
            else:
                step.expected.append(line)


def matches(expected: list[str], printed: list[str]) -> bool:
    """Whether the lines are as they should be."""
    if not expected:
        return not printed
    if expected[0] == "...":
        return any(matches(expected[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    if not printed:
        return False
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in re.split(r"\s*\.\.\.\s*", expected[0]))
    return re.fullmatch(pattern, " ".join(printed[0].split())) is not None and matches(expected[1:], printed[1:])


def run(path: Path, execute: Execute) -> None:
    """Raises AssertionError with the line of the lab that does not hold."""
    for step in steps(path):
        printed = execute(step.host, step.command).rstrip("\n")
        lines = printed.split("\n") if printed else []
        assert matches(step.expected, lines), (
            f"{path.name}:{step.line}: $ {step.command}\nwanted:\n"
            + "\n".join(step.expected)
            + f"\nprinted:\n{printed}"
        )
