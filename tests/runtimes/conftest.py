from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hosts
from tests.build.conftest import bundle
from tests.build.places import Tree
from tests.runtimes import cgroups
from tests.warm.conftest import launcher

__all__ = ["bundle", "launcher"]


@pytest.fixture(scope="session", autouse=True)
def swept() -> Iterator[None]:
    """What a killed run left in the machine's cgroups goes; hosts.sweep has ended its processes."""
    cgroups.sweep()
    yield
    cgroups.remove()


@pytest.fixture(scope="session")
def installed(bundle: Path, launcher: Path) -> Path:
    """Where `make install DESTDIR=` put everything."""
    tree = Tree.make(hosts.scratch() / "tree", bundle, launcher)
    destination = hosts.scratch() / "installed"
    destination.mkdir()
    done = tree.run("install", destination)
    assert done.returncode == 0, done.stderr
    return destination
