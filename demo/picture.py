"""What the demo shows at its end: boxes and tables made of plain text, pure functions of what was seen.

Two alphabets: with line-drawing characters, and ASCII for a terminal or a locale that has no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The characters that lines are drawn with, and the mark of a step that held."""

    corners: tuple[str, str, str, str]  # upper left, upper right, lower left, lower right
    across: str
    down: str
    leg: str  # where a line leaves a box downwards
    joint: str  # where it meets the bridge
    arrow: str
    held: str


UNICODE = Alphabet(("┌", "┐", "└", "┘"), "─", "│", "┬", "┴", "→", "✓")
ASCII = Alphabet(("+", "+", "+", "+"), "-", "|", "+", "+", "->", "ok")


def alphabet(environment: Mapping[str, str]) -> Alphabet:
    """By the locale; not by Python, which writes UTF-8 in the C locale too, where the terminal may not read it."""
    locale = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or "C"
    return UNICODE if locale.lower().endswith(("utf-8", "utf8")) else ASCII


@dataclass(frozen=True, slots=True)
class Container:
    """One namespace as it was found: not what the plugins said, but what the kernel lists."""

    name: str
    netns: str
    interface: str
    mac: str
    addresses: tuple[str, ...]
    host_interface: str


@dataclass(frozen=True, slots=True)
class Bridge:
    """The bridge in the host's namespace."""

    name: str
    mac: str
    addresses: tuple[str, ...]


def topology(containers: Sequence[Container], bridge: Bridge, marks: Alphabet) -> list[str]:
    """Boxes for the containers, side by side, and the bridge that they hang on."""
    boxes = [_box(container, marks) for container in containers]
    lines = ["   ".join(row) for row in zip(*boxes, strict=True)]
    width = len(lines[0])
    legs = [len(box[0]) // 2 + sum(len(other[0]) + 3 for other in boxes[:index]) for index, box in enumerate(boxes)]
    names = list(" " * width)
    for leg, container in zip(legs, containers, strict=True):
        names[leg] = marks.down
        names[leg + 2 : leg + 2 + len(container.host_interface)] = container.host_interface
    rail = [marks.across] * width
    for leg in legs:
        rail[leg] = marks.joint
    about = f"bridge {bridge.name}   {'   '.join(bridge.addresses)}   {bridge.mac}"
    return [*lines, "".join(names).rstrip(), "".join(rail), about]


def _box(container: Container, marks: Alphabet) -> list[str]:
    rows = [
        f"{container.name}  {container.netns}",
        f"{container.interface}  {container.mac}",
        *(f"      {address}" for address in container.addresses),
    ]
    width = max(len(row) for row in rows) + 2
    upper_left, upper_right, lower_left, lower_right = marks.corners
    half = width // 2
    bottom = marks.across * half + marks.leg + marks.across * (width - half - 1)
    return [
        f"{upper_left}{marks.across * width}{upper_right}",
        *(f"{marks.down} {row.ljust(width - 1)}{marks.down}" for row in rows),
        f"{lower_left}{bottom}{lower_right}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first one to the left, the others to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return lines
