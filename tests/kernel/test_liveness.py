"""Which network namespaces live: each way to hold one, for real."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernel import liveness
from kernel.errors import NotFound
from kernel.liveness import LiveNetns
from kernel.netns import NotANamespace

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
# What a holder prints when it holds: the inode and the cookie of the namespace, as seen from inside.
IDENTITY = """
import ctypes, os, socket, struct, sys, threading, time
sys.path.insert(0, "")
from kernel import netns
libc = ctypes.CDLL(None, use_errno=True)
def tell():
    print(netns.own().inode, netns.cookie(), flush=True)
def leave(flags=0x40000000):
    assert libc.unshare(flags) == 0, os.strerror(ctypes.get_errno())
"""
BY_PROCESS = "leave(); tell(); time.sleep(600)"
BY_THREAD = """
def work():
    leave(); tell(); time.sleep(600)
threading.Thread(target=work).start()
"""
# The first thread has ended: what /proc has under the process's own number is empty, its other thread lives.
BY_THREAD_OF_A_DEAD_LEADER = """
def work():
    time.sleep(0.1); leave(); tell(); time.sleep(600)
threading.Thread(target=work).start()
libc.syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
BY_DESCRIPTOR = """
home = os.open("/proc/self/ns/net", os.O_RDONLY)
leave(); held = os.open("/proc/self/ns/net", os.O_RDONLY); mine = netns.own(), netns.cookie()
netns.setns(home)
print(mine[0].inode, mine[1], flush=True); time.sleep(600)
"""
BY_MOUNT = """
leave(0x20000)
assert libc.mount(None, b"/", None, 0x44000, None) == 0  # private, recursively
home = os.open("/proc/self/ns/net", os.O_RDONLY)
place = os.fsencode(sys.argv[1])
leave(); mine = netns.own(), netns.cookie()
assert libc.mount(b"/proc/self/ns/net", place, None, 0x1000, None) == 0, os.strerror(ctypes.get_errno())
netns.setns(home); os.close(home)
print(mine[0].inode, mine[1], flush=True); time.sleep(600)
"""


@contextlib.contextmanager
def _holder(program: str, *arguments: str) -> Iterator[tuple[int, LiveNetns]]:
    """A process that holds a namespace of its own; its number and what it said of the namespace."""
    command = [sys.executable, "-c", IDENTITY + program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout
            inode, cookie = process.stdout.readline().split()
            yield process.pid, LiveNetns(int(inode), int(cookie))
        finally:
            process.kill()


def _eventually(held: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not held():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "program", [BY_PROCESS, BY_THREAD, BY_THREAD_OF_A_DEAD_LEADER, BY_DESCRIPTOR, BY_MOUNT], ids=lambda text: text[-30:]
)
def test_a_held_namespace_is_seen_with_its_cookie_and_not_longer(program: str, tmp_path: Path) -> None:
    place = tmp_path / "a name\twith spaces"
    place.touch()
    with _holder(program, str(place)) as (_, namespace):
        assert namespace.cookie > 0
        assert namespace in liveness.observe()
    # The kernel takes a namespace down in its own time after the last holder is gone.
    _eventually(lambda: namespace not in liveness.observe())


def test_the_own_namespace_is_seen_and_not_left() -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with _holder(BY_PROCESS) as (pid, namespace):
        seen = liveness.observe()
        assert liveness.netns_cookie(f"/proc/{pid}/ns/net") == namespace.cookie
    assert os.readlink("/proc/thread-self/ns/net") == before
    own = LiveNetns(os.stat("/proc/thread-self/ns/net").st_ino, liveness.netns_cookie("/proc/thread-self/ns/net"))
    assert own in seen
    assert list(seen) == sorted(set(seen))
    assert len({entry.inode for entry in seen}) == len(seen)


def test_two_namespaces_have_two_cookies_by_path_and_by_descriptor() -> None:
    with _holder(BY_PROCESS) as (first, one), _holder(BY_PROCESS) as (second, two):
        assert liveness.netns_cookie(f"/proc/{first}/ns/net") == one.cookie
        descriptor = os.open(f"/proc/{second}/ns/net", os.O_RDONLY)
        try:
            assert liveness.netns_cookie(descriptor) == two.cookie != one.cookie
        finally:
            os.close(descriptor)


def test_what_is_no_namespace(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        liveness.netns_cookie(str(tmp_path / "none"))
    with pytest.raises(NotANamespace):
        liveness.netns_cookie("/proc/self/ns/mnt")
    with pytest.raises(NotANamespace):
        liveness.netns_cookie(str(tmp_path))


def test_a_mount_that_hides_behind_another_is_alive_all_the_same(tmp_path: Path) -> None:
    """The inode is known from the table of mounts, although no path leads there any more."""
    place = tmp_path / "place"
    place.touch()
    over = BY_MOUNT.replace("print(", 'assert libc.mount(b"/dev/null", place, None, 0x1000, None) == 0\nprint(')
    with _holder(over, str(place)) as (_, namespace):
        assert LiveNetns(namespace.inode, 0) in liveness.observe()


def test_processes_that_come_and_go_meanwhile_do_no_harm() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            subprocess.run(["unshare", "-n", "true"], check=True)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    with _holder(BY_PROCESS) as (_, namespace):
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                assert namespace in liveness.observe()
        finally:
            stop.set()
            for thread in threads:
                thread.join()


OBSERVE = "from kernel import liveness; print('seen', len(liveness.observe()))"
VISIT = "from kernel import liveness; print('seen', 1 + len(liveness.visit_others(lambda inode: inode)))"


@pytest.mark.parametrize("observe", [OBSERVE, VISIT], ids=["observe", "visit"])
@pytest.mark.parametrize(
    ("others", "outcome"),
    [
        ("sleep 600 &", "seen 1"),  # hidden, but where we are ourselves
        ('unshare --net="$place" sleep 600 &', "seen 2"),  # hidden, but its namespace is mounted as well
        ("unshare --net sleep 600 &", "kernel.errors.Denied: observe network namespaces: Permission denied"),
    ],
)
def test_processes_that_may_not_be_looked_at(others: str, outcome: str, observe: str, tmp_path: Path) -> None:
    """In a process tree of its own, where all but the observer have a capability that the observer lacks."""
    place = tmp_path / "place"
    place.touch()
    script = f"""
        {others}
        until grep -qsx sleep /proc/[0-9]*/comm; do :; done
        setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace "$python" -c "$observe" 2>&1 | tail -n 1
    """
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", script]
    environment = {**os.environ, "place": str(place), "python": sys.executable, "observe": observe}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout.startswith(outcome), done
