"""For tests of plugins in a real host: `lab`, which each test must leave as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cni.lab import Lab
from tests.hosts import Host


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    """One host for the tests of a module, with all that a first ADD makes."""
    with Host() as host:
        lab = Lab(host)
        assert lab.ipamd.pid
        lab.warm_up()
        yield lab


@pytest.fixture
def lab(module_lab: Lab) -> Iterator[Lab]:
    """The module's host. After the test: nothing is left of it but bridges, which are then removed."""
    before = module_lab.host.snapshot()
    yield module_lab
    module_lab.tidy(before)
