"""What `netloom doctor` finds."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """`level`: "ok", "warning" (it works, or may), "problem" (it does not)."""

    check: str
    level: str
    text: str
    remedy: str = ""


def some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
