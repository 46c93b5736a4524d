"""cni.lock, with real processes."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cni.errors import CniError, Code
from cni.lock import attachment_lock

REPOSITORY = Path(__file__).parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    prelude = "import os, sys, time\nfrom cni.errors import CniError\nfrom cni.lock import attachment_lock\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


HOLD = """
with attachment_lock(sys.argv[1], "c1", "eth0", "(bridge ADD)"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def held(run_dir: Path) -> subprocess.Popen[str]:
    """A process that has the lock of c1/eth0."""
    process = start(HOLD, run_dir)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_nothing_is_left_and_the_directory_is_ours(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "run"
    with attachment_lock(str(run_dir), "c1", "eth0"):
        assert os.listdir(run_dir / "locks") == ["c1@eth0"]
        assert stat.S_IMODE((run_dir / "locks").stat().st_mode) == 0o700
        assert stat.S_IMODE((run_dir / "locks" / "c1@eth0").stat().st_mode) == 0o600
    assert os.listdir(run_dir / "locks") == []


def test_released_also_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), attachment_lock(str(tmp_path), "c1", "eth0"):
        raise RuntimeError
    with attachment_lock(str(tmp_path), "c1", "eth0", deadline_s=0):
        pass


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    with attachment_lock(str(tmp_path), "c0", "eth0"):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with attachment_lock(str(tmp_path), "c1", "eth0"), pytest.raises(CniError):
            attachment_lock(str(tmp_path), "c1", "eth0", deadline_s=0).__enter__()
    assert len(os.listdir("/proc/self/fd")) == before


def test_waiting_ends_at_the_deadline_and_names_the_holder(tmp_path: Path) -> None:
    process = held(tmp_path)
    try:
        with pytest.raises(CniError) as caught, attachment_lock(str(tmp_path), "c1", "eth0", deadline_s=0.05):
            pytest.fail("two holders")
        assert caught.value.code == Code.TRY_AGAIN_LATER
        assert f"pid {process.pid} (bridge ADD)" in caught.value.details
        assert "c1/eth0" in caught.value.msg
    finally:
        end(process)


def test_other_attachments_do_not_wait(tmp_path: Path) -> None:
    process = held(tmp_path)
    try:
        for container_id, ifname in (("c1", "eth1"), ("c2", "eth0")):
            with attachment_lock(str(tmp_path), container_id, ifname, deadline_s=0):
                pass
    finally:
        end(process)


def test_a_waiter_gets_the_lock_when_the_holder_lets_go(tmp_path: Path) -> None:
    holder = held(tmp_path)
    waiter = start(HOLD, tmp_path)
    try:
        assert holder.stdin is not None
        assert waiter.stdout is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert waiter.stdout.readline() == "held\n"
        assert holder.wait(60) == 0
    finally:
        end(holder)
        end(waiter)


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    end(held(tmp_path))
    assert os.listdir(tmp_path / "locks") == ["c1@eth0"]
    with attachment_lock(str(tmp_path), "c1", "eth0", deadline_s=0):
        pass
    assert os.listdir(tmp_path / "locks") == []


def test_never_two_holders_while_files_come_and_go(tmp_path: Path) -> None:
    # Exclusive creation of `witness` fails as soon as two hold the lock at once.
    code = """
    witness = sys.argv[1] + "/witness"
    for _ in range(150):
        with attachment_lock(sys.argv[1], "c1", "eth0"):
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
            os.sched_yield()
            os.unlink(witness)
    """
    processes = [start(code, tmp_path) for _ in range(4)]
    try:
        assert [process.wait(240) for process in processes] == [0, 0, 0, 0]
    finally:
        for process in processes:
            end(process)
    assert os.listdir(tmp_path / "locks") == []


def test_a_lock_on_an_unlinked_file_does_not_count(tmp_path: Path) -> None:
    # The race, step by step: a waiter has opened the file that its holder then unlinks, and a third makes a new one.
    first = attachment_lock(str(tmp_path), "c1", "eth0")
    with first:
        os.unlink(tmp_path / "locks" / "c1@eth0")
        with attachment_lock(str(tmp_path), "c1", "eth0", deadline_s=0):
            assert not first._leads_to(first._fd)


def test_long_names_are_hashed_and_distinct(tmp_path: Path) -> None:
    names = set()
    for container_id in ("a" * 300, "a" * 301, "b" * 300):
        with attachment_lock(str(tmp_path), container_id, "eth0", deadline_s=0):
            (name,) = os.listdir(tmp_path / "locks")
            assert len(name) <= 255
            names.add(name)
    assert len(names) == 3


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    with pytest.raises(CniError, match="nobody else may write to") as caught:
        attachment_lock(str(tmp_path), "c1", "eth0").__enter__()
    assert caught.value.code == Code.IO_FAILURE


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CniError) as caught:
        attachment_lock(str(tmp_path), "c1", "eth0").__enter__()
    assert caught.value.code == Code.IO_FAILURE
    (tmp_path / "locks").unlink()
    (tmp_path / "locks").mkdir(0o700)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "locks" / "c1@eth0").symlink_to(tmp_path / "victim")
    with pytest.raises(CniError) as caught:
        attachment_lock(str(tmp_path), "c1", "eth0").__enter__()
    assert caught.value.code == Code.IO_FAILURE
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_run_directory_that_is_a_file_is_code_5(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CniError) as caught:
        attachment_lock(str(tmp_path / "run"), "c1", "eth0").__enter__()
    assert caught.value.code == Code.IO_FAILURE
