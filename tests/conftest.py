"""For all tests: a host for who asks for one, a limit for each test, and a machine that stays as it was.

A test that hangs fails after LIMIT_S with every thread's stack; should even that hang, the run ends LAST_RESORT_S
later. SIGTERM ends a run as Ctrl-C does, so that fixtures still clean up; what SIGKILL left, the next run sweeps.

With `-n 3` all this holds for each of the workers, the processes that run the tests: the one that shares out the tests
waits, however it ends, until they have cleaned up. What a worker that died left is swept at the end of the run.

At a desk a test may be skipped for a program that is not installed. In CI the set-up has to install them all: there a
skip is a failure, unless it names a feature that the machine or its kernel lacks. In the virtual machine of tests/vm
any skip is one: a test is there for what that kernel has.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any, NoReturn

import pytest

from tests import hosts
from tests.machine import own_files

LIMIT_S = float(os.environ.get("NETLOOM_TEST_LIMIT_S", "300"))
LAST_RESORT_S = 60.0
_MACHINE = (
    "no IPv6 on this machine",
    "this kernel has no",
    "cgroup2",
    "no tmpfs",
    "made with glibc",
    "is ignored here",
)
# Files of few tests that take long: they begin first, or the run would end with one process at work.
_LONG = (
    "tests/test_build.py",
    "tests/warm/test_faults.py",
    "tests/cni/interface/test_netloom_overlay.py",
    "tests/cni/test_undo.py",
    "tests/cni/chained/test_firewall.py",
    "tests/cni/interface/test_ptp.py",
    "tests/warm/test_host.py",
    "tests/warm/test_worker.py",
    "tests/warm/test_watch.py",
    "tests/test_hosts.py",
    "tests/demo/test_demo.py",
    "tests/cni/test_hostile.py",
)
_FULL_KERNEL = os.environ.get("NETLOOM_FULL_KERNEL") == "1"
_stderr = pytest.StashKey[int]()
_workers = pytest.StashKey[set[Any]]()  # those at work, as xdist's WorkerControllers
_died = pytest.StashKey[bool]()  # whether a worker did
_own_files = pytest.StashKey[frozenset[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # capturing is off at this moment: what is written here is seen
    config.stash[_workers] = set()
    config.stash[_own_files] = own_files()
    if getattr(config.option, "maxworkerrestart", "") is None:
        # A worker that died ends the run: with --dist loadscope its successor would run into the same test.
        config.option.maxworkerrestart = "0"
        config.option.loadscopereorder = False
    # A shell without job control starts what it puts in the background with SIGINT and SIGQUIT ignored.
    if _is_worker(config):
        signal.signal(signal.SIGTERM, _worker_interrupted)
        signal.signal(signal.SIGINT, _worker_interrupted)
    else:
        signal.signal(signal.SIGTERM, _terminated)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection(session: pytest.Session) -> None:
    """Before any test is imported: an example that takes long tells of other work on the machine, not of our code."""
    if session.config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings  # noqa: PLC0415 - not wanted where the plugin is off

        patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.register_profile("netloom", patient)
        settings.load_profile("netloom")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker: the long files, then those with the most tests, as --dist loadscope has them by itself."""
    if _is_worker(config):
        count = Counter(item.path for item in items)
        rank = {hosts.ROOT / name: place for place, name in enumerate(_LONG)}
        items.sort(key=lambda item: (rank.get(item.path, len(rank)), -count[item.path], item.path))


def pytest_unconfigure(config: pytest.Config) -> None:
    hosts.remove_scratch()
    if config.getoption("numprocesses", None):  # the process that shares out the tests
        _sweep(config)
    os.close(config.stash[_stderr])


def pytest_sessionstart(session: pytest.Session) -> None:
    if not _is_worker(session.config):
        _sweep(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.config.stash[_workers].add(node)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_workers].discard(node)
    if error:
        node.config.stash[_died] = True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends workers that are still at work as SIGTERM ends a run: xdist would kill them after 10 s."""
    interrupted = session.config.stash[_workers]
    for node in interrupted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.gateway._rinfo().pid, signal.SIGTERM)
    limit = time.monotonic() + LAST_RESORT_S
    for node in interrupted:
        # What a worker died of is told by xdist.
        with contextlib.suppress(Exception):
            node.channel.waitclose(max(0.0, limit - time.monotonic()))
    if session.config.stash.get(_died, False):
        session.exitstatus = pytest.ExitCode.INTERRUPTED  # not only a test failed: others did not run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    stderr = item.config.stash[_stderr]

    def too_long(_number: int, _frame: FrameType | None) -> NoReturn:
        os.write(stderr, f"\n{item.nodeid} took more than {LIMIT_S:g} s:\n".encode())
        faulthandler.dump_traceback(file=stderr)
        pytest.fail(f"took more than {LIMIT_S:g} s", pytrace=True)

    before = signal.signal(signal.SIGALRM, too_long)
    faulthandler.dump_traceback_later(LIMIT_S + LAST_RESORT_S, file=stderr, exit=True)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test that leaves files on the machine itself fails."""
    yield
    before = item.config.stash[_own_files]
    item.config.stash[_own_files] = after = own_files()
    if after - before:
        came = ", ".join(sorted(after - before))
        pytest.fail(f"on the machine itself, outside of any host, came {came}: by this test or one beside it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        report.skipped
        and (_FULL_KERNEL or os.environ.get("CI") == "true")
        and (_FULL_KERNEL or not any(reason in str(report.longrepr) for reason in _MACHINE))
    ):
        report.outcome = "failed"
        where = "the virtual machine" if _FULL_KERNEL else "CI"
        report.longrepr = f"skipped in {where}, where the set-up must provide what it needs: {report.longrepr}"
    return report


@pytest.fixture
def host() -> Iterator[hosts.Host]:
    """A fresh host. For kernel tests."""
    with hosts.Host() as fresh:
        yield fresh


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _sweep(config: pytest.Config) -> None:
    for what in hosts.sweep():
        os.write(config.stash[_stderr], f"left by a dead run: {what}\n".encode())


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, _nothing)  # once is enough: the next would end the cleaning up
    pytest.exit("terminated", 143)


def _worker_interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Once only: Ctrl-C goes to all processes of a terminal, and SIGTERM comes after it (`pytest_sessionfinish`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _nothing)
    raise KeyboardInterrupt


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Unlike SIG_IGN it does not go on to programs that are started later."""
