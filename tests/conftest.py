"""For all tests: a host for who asks for one, a limit for each test, and a machine that stays as it was.

A test that hangs fails after LIMIT_S with every thread's stack; should even that hang, the run ends LAST_RESORT_S
later. SIGTERM ends a run as Ctrl-C does, so that fixtures still clean up; what SIGKILL left, the next run sweeps.

At a desk a test may be skipped for a program that is not installed. In CI the set-up has to install them all: there a
skip is a failure, unless it names a feature that the machine or its kernel lacks. In the virtual machine of tests/vm
any skip is one: a test is there for what that kernel has.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Generator, Iterator
from types import FrameType
from typing import NoReturn

import pytest

from tests import hosts

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
_FULL_KERNEL = os.environ.get("NETLOOM_FULL_KERNEL") == "1"
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # capturing is off at this moment: what is written here is seen
    signal.signal(signal.SIGTERM, _terminated)
    # A shell without job control starts what it puts in the background with these two ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_unconfigure(config: pytest.Config) -> None:
    hosts.remove_scratch()
    os.close(config.stash[_stderr])


def pytest_sessionstart(session: pytest.Session) -> None:
    for what in hosts.sweep():
        os.write(session.config.stash[_stderr], f"left by a dead run: {what}\n".encode())


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


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    pytest.exit("terminated", 143)
