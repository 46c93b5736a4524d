"""For kernel tests: a host's namespace that the test is in, a container's that it is not in, a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space


@pytest.fixture
def home() -> Iterator[Space]:
    """The test runs in a network namespace of its own, with `lo` up."""
    with spaces.fresh() as space, spaces.inside(space):
        spaces.run("ip", "link", "set", "lo", "up")
        yield space


@pytest.fixture
def container() -> Iterator[Space]:
    """Another namespace."""
    with spaces.fresh() as space:
        yield space


@pytest.fixture
def session(home: Space) -> Iterator[Session]:
    """Opened in `home`."""
    with Session() as opened:
        yield opened
