"""The cgroups of the containers that tests start: all below one directory of each hierarchy.

It bears the name of the run's scratch directory, so that it says whose it is, and those of a killed run are found.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests import hosts
from tests.hosts import wait_until

_TOP = Path("/sys/fs/cgroup")
_STRANGER = 0  # how the kernel lists a process of a pid namespace that we do not see into


def parent() -> str:
    """What to give to a runtime as the parent of its cgroups."""
    return f"/{hosts.scratch().name}"


def found() -> list[str]:
    """The cgroups of this run, without the one above all."""
    # os.walk passes over what goes while it looks, as cgroups of containers that end do; Path.rglob raises.
    return sorted(
        {
            os.path.relpath(os.path.join(directory, name), top)
            for top in tops(parent()[1:])
            for directory, names, _ in os.walk(top)
            for name in names
        }
    )


def remove(name: str = "") -> None:
    """Those of this run, or of the run whose scratch directory had that name, with every process in them.

    A container that lost its shim has nothing mounted that would tell whose it is: its cgroup does.
    """
    name = name or parent()[1:]
    wait_until(lambda: not _kill(name), f"the end of all in the cgroups {name}")
    for top in tops(name):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def sweep() -> list[str]:
    """Removes those of runs whose scratch directory is gone, and says which. Where one has processes of another pid
    namespace, it is of a container that shares our cgroups and not our /tmp."""
    names = {path.name for path in tops(f"netloom-{os.geteuid()}-*")}
    dead = [name for name in sorted(names) if not any(Path(base, name).exists() for base in ("/tmp", "/dev/shm"))]
    done = [name for name in dead if _STRANGER not in _processes(name)]
    for name in done:
        remove(name)
    return [f"removed cgroups {name}" for name in done]


def _kill(name: str) -> set[int]:
    """Who is there still, and has been told to end."""
    pids = _processes(name) - {_STRANGER}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _processes(name: str) -> set[int]:
    pids = set()
    for top in tops(name):
        for directory, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in (Path(directory) / "cgroup.procs").read_text(encoding="ascii").split()}
    return pids


def tops(pattern: str) -> Iterator[Path]:
    """Where a run's cgroups begin, by its name. Version 1 has a hierarchy for each controller; version 2 has one,
    mounted there or at `unified`."""
    yield from _TOP.glob(pattern)
    yield from _TOP.glob(f"*/{pattern}")


def has_version1() -> bool:
    """Whether the machine has hierarchies of version 1 mounted at their places."""
    return (_TOP / "pids").is_dir() or (_TOP / "cpu").is_dir()


def forget(name: str) -> None:
    """Removes one of this run that a runtime left behind. Its processes must have ended."""
    for top in tops(parent()[1:]):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(top / name)
