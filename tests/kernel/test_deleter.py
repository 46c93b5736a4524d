"""Deleting links without waiting for the kernel's memory: gone when it returns, whatever the threads do."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from kernel import deleter, link, netns
from kernel.deleter import Deleter
from kernel.errors import KernelError
from kernel.link import VethSpec
from kernel.netns import opened
from kernel.session import Session
from tests.hosts import wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("most", [0, 1, 8])
def test_gone_with_its_other_end_and_both_names_free(home: Space, container: Space, most: int) -> None:
    """Also when more are deleted than threads wait."""
    del home
    with Session(Deleter(most)) as session, opened(container.path) as where, session.visit(where) as inside:
        for _ in range(20):
            link.add_veth(session, VethSpec("veth1", "eth0", where.fd))
            found = link.get(session, "veth1")
            deleter.delete(session, found)
            assert link.find(session, "veth1") is None
            assert link.find(inside, "eth0") is None
            deleter.delete(session, found)  # nothing to do


def test_in_the_containers_namespace(home: Space, container: Space) -> None:
    del home
    with Session(Deleter()) as session, opened(container.path) as where, session.visit(where) as inside:
        before = None
        for number in range(5):
            link.add_veth(session, VethSpec(f"veth{number}", "eth0", where.fd))
            deleter.delete(inside, link.get(inside, "eth0"))
            assert link.find(inside, "eth0") is None
            assert link.find(session, f"veth{number}") is None
            wait_until(lambda: _waiting(session) == 0, "the kernel's acknowledgement")
            descriptors = len(os.listdir("/proc/self/fd"))
            assert before in (None, descriptors)
            before = descriptors


def test_the_namespace_goes_once_the_kernel_is_done(home: Space) -> None:
    del home
    with Session(Deleter()) as session:
        link.add_bridge(session, "br0", "02:00:00:00:00:01")
        with spaces.fresh() as space, opened(space.path) as where, session.visit(where) as inside:
            link.add_veth(session, VethSpec("veth1", "eth0", where.fd))
            link.add_veth(session, VethSpec("veth2", "eth1", where.fd))
            deleter.delete(inside, link.get(inside, "eth0"))
        wait_until(lambda: link.find(session, "veth2") is None, "the end of the namespace")


def test_what_the_kernel_refuses(home: Space) -> None:
    del home
    with Session(Deleter()) as session:
        for _ in range(3):
            with pytest.raises(KernelError) as refused:
                deleter.delete(session, link.get(session, "lo"))
            assert refused.value.errno == errno.EOPNOTSUPP


def test_threads_wait_at_home_and_are_used_again(home: Space, container: Space) -> None:
    ours = Deleter()
    with Session(ours) as session, opened(container.path) as where:
        before = set(os.listdir("/proc/self/task"))
        for number in range(5):
            link.add_veth(session, VethSpec(f"veth{number}", "eth0", where.fd))
            with session.visit(where) as inside:
                deleter.delete(inside, link.get(inside, "eth0"))
            wait_until(lambda: _waiting(session) == 0, "the kernel's acknowledgement")
        (thread,) = set(os.listdir("/proc/self/task")) - before
        status = os.stat(f"/proc/self/task/{thread}/ns/net")
        assert netns.Identity(status.st_dev, status.st_ino) == netns.identify(home.path)
        lines = Path(f"/proc/self/task/{thread}/status").read_text(encoding="ascii").splitlines()
        blocked = next(line for line in lines if line.startswith("SigBlk"))
        assert int(blocked.split()[1], 16) & 1 << (signal.SIGALRM - 1), (
            "SIGALRM must reach the thread that serves requests"
        )


def test_a_session_that_was_closed_meanwhile(home: Space, container: Space) -> None:
    """A worker closes its session after a request that failed; the deleter goes on."""
    del home
    ours = Deleter()
    with opened(container.path) as where:
        for number in range(3):
            with Session(ours) as session:
                link.add_veth(session, VethSpec(f"veth{number}", "eth0", where.fd))
                deleter.delete(session, link.get(session, f"veth{number}"))
        with Session(ours) as session:
            assert [one.kind for one in link.all_links(session)].count("veth") == 0
    wait_until(lambda: ours.waiting == 0, "the kernel's acknowledgement")


def test_no_descriptor_stays_open(home: Space, container: Space) -> None:
    del home
    ours = Deleter()
    with Session(ours) as session, opened(container.path) as where:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(8):
            link.add_veth(session, VethSpec(f"veth{number}", f"eth{number}", where.fd))
        for number in range(8):
            deleter.delete(session, link.get(session, f"veth{number}"))
        wait_until(lambda: ours.waiting == 0, "the kernel's acknowledgements")
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "the sockets to be closed")


def test_without_threads_the_caller_waits(home: Space, container: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    del home
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Session(Deleter()) as session, opened(container.path) as where, session.visit(where) as inside:
        before = len(os.listdir("/proc/self/fd"))
        link.add_veth(session, VethSpec("veth1", "eth0", where.fd))
        deleter.delete(inside, link.get(inside, "eth0"))
        assert link.find(session, "veth1") is None
        assert len(os.listdir("/proc/self/fd")) == before


def _waiting(session: Session) -> int:
    assert session.deleter is not None
    return session.deleter.waiting
