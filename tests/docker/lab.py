"""Executes a lab of docs/labs: each command of its ```console blocks, and compares what it shows.

A block is ```console, for the only host, or ```console NAME. A line that begins with `$ ` is a command, `> ` goes on
with it, what follows is what it prints on both streams: these lines, in this order, `...` being any text; a line `...`
alone stands for any number of lines. Nothing expected: nothing printed. A command that only looks is repeated until it
shows that: what a command before it has begun may take a moment, as a server in a container does, or a release.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts import PATIENCE_S, ROOT

LABS = ROOT / "docs/labs"
_LOOKS = re.compile(
    r"(docker exec \w+ |docker run --rm --network (host|container:\w+) box |ip netns exec \w+ )?"
    r"(ip (-\S+ )*(addr|link|route|neigh)( show.*)?$|bridge (link|fdb show)|ping -c1 |wget -qO- |cat /|nft list"
    r"|netloom (ip list|topology|route|network show)|docker network (ls|inspect))"
)
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


def looks(command: str) -> bool:
    """Whether a command changes nothing."""
    return _LOOKS.match(command) is not None and re.search(r";|\n", command) is None


def run(path: Path, execute: Execute) -> None:
    """Raises AssertionError with the line of the lab that does not hold."""
    for step in steps(path):
        deadline = time.monotonic() + (PATIENCE_S if looks(step.command) else 0)
        while True:
            printed = execute(step.host, step.command).rstrip("\n")
            if matches(step.expected, printed.split("\n") if printed else []):
                break
            assert time.monotonic() < deadline, (
                f"{path.name}:{step.line}: $ {step.command}\nwanted:\n"
                + "\n".join(step.expected)
                + f"\nprinted:\n{printed}"
            )
            time.sleep(0.2)
