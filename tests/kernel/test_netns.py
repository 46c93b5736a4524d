"""What a path is, going in, coming home."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel import link, netns
from kernel.errors import KernelError, NotFound
from kernel.netns import NotANamespace
from kernel.session import Session
from tests.hosts import ROOT
from tests.kernel import spaces
from tests.kernel.spaces import Space


def test_what_is_no_namespace(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (plain, tmp_path, fifo, Path("/dev/null")):
        with pytest.raises(NotANamespace, match="it is not a namespace"):
            netns.identify(str(path))
    for other in ("uts", "mnt", "user"):
        with pytest.raises(NotANamespace, match="it is another kind of namespace"):
            netns.identify(f"/proc/self/ns/{other}")
    with pytest.raises(NotFound, match=r"open network namespace '.*nothing'"):
        netns.identify(str(tmp_path / "nothing"))
    with pytest.raises(NotFound):
        netns.identify("")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(NotANamespace):
            netns.identify(str(tmp_path / "plain"))
        netns.identify("/proc/self/ns/net")
        netns.cookie()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_own_namespace() -> None:
    assert netns.identify("/proc/thread-self/ns/net") == netns.own()
    assert netns.cookie() == netns.cookie()


@pytest.mark.kernel
def test_there_and_home_again(home: Space, container: Space) -> None:
    here = netns.own()
    assert here == netns.identify(home.path)
    cookie = netns.cookie()
    with netns.opened(container.path) as where:
        assert where.identity != here
        with netns.entered(where, home.fd):
            assert netns.own() == where.identity
            assert netns.cookie() != cookie or cookie == 0
            theirs = netns.cookie()
        assert netns.own() == here
        assert netns.cookie_at(where, home.fd) == theirs
        with pytest.raises(ZeroDivisionError), netns.entered(where, home.fd):
            raise ZeroDivisionError
    assert netns.own() == here


@pytest.mark.kernel
def test_cookies_are_not_given_out_again(home: Space) -> None:
    if netns.cookie() == 0:
        pytest.skip("this kernel has no namespace cookies (before 5.14)")
    seen = set()
    for _ in range(20):
        with spaces.fresh() as space, netns.opened(space.path) as where:
            seen.add(netns.cookie_at(where, home.fd))
    assert len(seen) == 20


@pytest.mark.kernel
def test_a_session_belongs_to_where_it_was_opened(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    with netns.opened(container.path) as where, session.visit(where) as inside:
        assert {one.name for one in link.all_links(inside)} == {"lo"}
        assert {one.name for one in link.all_links(session)} == {"lo", "br0"}
        assert inside.cookie == netns.cookie_at(where, session.home_fd)
        socket = inside.rtnl
    assert socket.fileno() == -1


@pytest.mark.kernel
def test_a_thread_that_cannot_go_home_ends_its_process(home: Space, container: Space) -> None:
    # With the wrong descriptor as home: all that came after would be done in the container.
    program = (
        "import os, sys; from kernel import netns\n"
        "with netns.opened(sys.argv[1]) as where:\n"
        "    with netns.entered(where, os.open('/dev/null', os.O_RDONLY)): pass\n"
        "print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, container.path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 70
    assert done.stdout == ""
    assert "cannot leave network namespace" in done.stderr


@pytest.mark.kernel
def test_entering_what_is_closed_is_an_error(home: Space) -> None:
    closed = netns.Netns("/gone", 987654, netns.Identity(0, 0))
    with pytest.raises(KernelError) as caught, netns.entered(closed, home.fd):
        pass
    assert caught.value.errno == errno.EBADF
    assert netns.own() == netns.identify(home.path)
