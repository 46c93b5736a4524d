"""What an ADD did, so that it can be undone.

Each step pushes its inverse; unless committed, they run in reverse. An inverse must succeed where there is nothing left
to do, because it may be pushed before the step that it undoes. A failing inverse does not stop those before it.
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Undo:
    """A stack of inverses. As a context manager it unwinds at the end of the block unless `commit` was called."""

    def __init__(self) -> None:
        self._inverses: list[tuple[str, Callable[[], object]]] = []

    def push(self, what: str, inverse: Callable[[], object]) -> None:
        """Remember how to undo a step. `what` names the inverse for the log: "delete link veth12ab"."""
        self._inverses.append((what, inverse))

    def commit(self) -> None:
        """Everything is done and known to the runtime: nothing is undone any more."""
        self._inverses.clear()

    def unwind(self) -> list[str]:
        """Run the inverses in reverse; what failed, in words."""
        failures = []
        while self._inverses:
            what, inverse = self._inverses.pop()
            try:
                inverse()
            except Exception as error:  # noqa: BLE001 - the others must still run
                failures.append(f"{what}: {error}")
        return failures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for failure in self.unwind():
            print(f"netloom: undoing a failed ADD: {failure}", file=sys.stderr)  # noqa: T201 - the runtime's log
