"""For tests of plugins in a real host: `lab`, which each test must leave as it found it.

Tests in interface/, chained/ and ipam/ that ask for a lab are served as installed, through a launcher by a warm worker;
`test_every_verb`, and what is marked `both_ways`, by a cold process too, in two versions of the specification. A test
that asks for faults, or for the calls that a request made, is served in process, and so is what is marked so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

from tests.cni.lab import Lab, Way
from tests.hosts import Host
from tests.warm.conftest import launcher as launcher  # noqa: PLC0414 - a fixture here, too

_FOLDERS = ("interface", "chained", "ipam")
_COLD_VERSIONS = ("0.4.0", "1.1.0")  # a cold request takes a fifth of a second


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lab" not in metafunc.fixturenames or metafunc.definition.path.parent.name not in _FOLDERS:
        return
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "in_process" in marks or _looks_inside(metafunc.function.__code__):
        ways = ["in process"]
    elif "both_ways" in marks or metafunc.function.__name__ == "test_every_verb":
        ways = ["warm", "cold"]
    else:
        ways = ["warm"]
    metafunc.parametrize("way", ways)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _cold_once_more(item)]


def _cold_once_more(item: pytest.Item) -> bool:
    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return values.get("way") == "cold" and values.get("version", _COLD_VERSIONS[0]) not in _COLD_VERSIONS


def _looks_inside(code: CodeType) -> bool:
    """Whether a function speaks of faults or calls, or one inside it does."""
    words = {*code.co_names, *(word for one in code.co_consts if isinstance(one, tuple) for word in one)}
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return bool(words & {"faults", "calls", "undo_calls"}) or any(_looks_inside(one) for one in inner)


@pytest.fixture
def way() -> Way:
    """How the lab serves; replaced by the parameter of that name."""
    return "in process"


@pytest.fixture(scope="module")
def _ended_lab(module_lab: Lab) -> Iterator[Lab]:
    """The module's lab, whose workers end before its host does."""
    yield module_lab
    module_lab.close()


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest, way: Way) -> None:
    """Before the lab's own fixture looks at the host: a master makes files, too."""
    if "module_lab" in request.fixturenames:
        lab: Lab = request.getfixturevalue("_ended_lab")
        path: Path | None = request.getfixturevalue("launcher") if way != "in process" else None
        lab.serve(way, path)


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
