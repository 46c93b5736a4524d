"""For verbs that must go on after a failure: DEL and GC attempt everything and report the first cause at the end."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self

from telemetry import trace

P = ParamSpec("P")


def note(text: str) -> None:
    """One line for the runtime's log."""
    print(f"netloom: {text}", file=sys.stderr)  # noqa: T201 - standard error is the log of a CNI plugin


class Failures:
    """Collects failures; at the end of the block the first is raised, the others are noted."""

    def __init__(self) -> None:
        self._failures: list[Exception] = []

    def attempt(self, step: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a step; remember its failure and go on."""
        around = trace.mark(getattr(step, "__name__", "step").replace("_", " "))
        try:
            step(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other steps must run
            self._failures.append(error)
        finally:
            trace.mark(around)

    @property
    def any(self) -> bool:
        """Whether a step has failed."""
        return bool(self._failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None and self._failures:
            for other in self._failures[1:]:
                note(f"also: {other}")
            raise self._failures[0]
