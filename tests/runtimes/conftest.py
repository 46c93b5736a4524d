from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtimes import cgroups
from tests.warm.conftest import launcher

__all__ = ["launcher"]


@pytest.fixture(scope="session", autouse=True)
def swept(launcher: Path) -> Iterator[None]:
    """What a killed run left in the machine's cgroups goes; hosts.sweep has ended its processes."""
    cgroups.sweep()
    yield
    cgroups.remove()
