"""Rows of a module that are measured in parts, each with an etcd and hosts of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from bench.host import BenchError
from bench.stats import Row, Spec, absent
from tests.etcd import EtcdMissingError, programs
from tests.hosts import HostError

Part = tuple[Sequence[Spec], Callable[[ExitStack, list[Spec]], Iterator[Row]]]


def in_parts(parts: Sequence[Part], wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterator[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    for part, work in parts:
        mine = [spec for spec in part if wanted(spec)]
        if not mine:
            continue
        say(mine[0].name)
        try:
            programs("3.4")
            with ExitStack() as stack:
                found = {one.name: one for one in work(stack, mine)}
        except EtcdMissingError as error:
            yield from (absent(spec, str(error), excused=True) for spec in mine)
        except (BenchError, HostError, OSError, subprocess.TimeoutExpired) as error:
            yield from (absent(spec, str(error), excused=False) for spec in mine)
        else:
            yield from (found[spec.name] for spec in mine)
