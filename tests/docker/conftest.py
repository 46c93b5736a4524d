"""Files of this group run side by side. Those that take long begin, so that no processor waits for the last of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.engine import Docker
from tests.runtimes.conftest import swept
from tests.warm.conftest import launcher

__all__ = ["launcher", "swept"]
_HERE = Path(__file__).parent
_LONG = ("test_overlay_many", "test_faults", "test_overlay_three", "test_labs_of_hosts", "test_many_times")


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    """The module's `shared` one; nothing is left when a test is over."""
    shared.forget()
    yield shared
    shared.remove_all()
    shared.assert_clean()


def pytest_configure(config: pytest.Config) -> None:
    # Else those with many tests begin, which are short ones here.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        name = item.path.stem if item.path.is_relative_to(_HERE) else ""
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=turn)
