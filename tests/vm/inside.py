"""What tests/vm/suite starts in the virtual machine: the tests of a list, by two pytests, as there are two processors.

`python -m tests.vm.inside LIST [ARGUMENT...]`: arguments go to both. Files are dealt in turn; a file's tests stay
together. Lines appear as they come; what follows the tests, such as failures, once its pytest ends. Exit status: the
worse of both.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

_HANDS = 2
_NO_TESTS = 5  # pytest's status


def nodes(text: str) -> list[str]:
    """The lines of a list, without comments."""
    return [line for one in text.splitlines() if (line := one.partition("#")[0].strip())]


def dealt(wanted: Iterable[str], hands: int = _HANDS) -> list[list[str]]:
    """The same for each hand."""
    turns: dict[str, int] = {}
    found: list[list[str]] = [[] for _ in range(hands)]
    for node in wanted:
        turn = turns.setdefault(node.partition("::")[0], len(turns) % hands)
        found[turn].append(node)
    return [hand for hand in found if hand]


def worst(statuses: Iterable[int]) -> int:
    """Arguments may leave nothing for one of them; for all of them is an error."""
    found = set(statuses)
    return max(found - {_NO_TESTS} or found)


class Run:
    """One pytest."""

    _printing = threading.Lock()

    def __init__(self, tests: Sequence[str], arguments: Sequence[str]) -> None:
        argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=5", *tests, *arguments]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        assert self._process.stdout is not None
        kept: list[str] = []
        for line in self._process.stdout:
            if kept or (line.startswith("===") and "test session starts" not in line):
                kept.append(line)
            else:
                self._print(line)
        self._print("".join(kept))

    def _print(self, text: str) -> None:
        with self._printing:
            sys.stdout.write(text)
            sys.stdout.flush()

    def status(self) -> int:
        self._thread.join()
        return self._process.wait()


def main() -> int:
    listed, *arguments = sys.argv[1:]
    runs = [Run(hand, arguments) for hand in dealt(nodes(Path(listed).read_text(encoding="utf-8")))]
    return worst([run.status() for run in runs])


if __name__ == "__main__":
    sys.exit(main())
