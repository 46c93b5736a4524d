"""Where state lies."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from bench import disk
from bench.host import BenchError

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /tmp rw - tmpfs tmpfs rw
24 22 0:22 / /tmp\040x rw master:2 - xfs /dev/vdb rw
25 23 254:0 /data /tmp/data rw - ext4 /dev/vda rw
26 25 0:23 / /tmp/data rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib", "ext4"),
        ("/", "ext4"),
        ("/tmp", "tmpfs"),
        ("/tmp/a/b", "tmpfs"),
        ("/tmpfile", "ext4"),
        ("/tmp x/y", "xfs"),
        ("/tmp/data/z", "tmpfs"),  # mounted over: the later one counts
    ],
)
def test_the_file_system_is_the_nearest_mount_above(path: str, kind: str) -> None:
    assert disk.file_system(Path(path), MOUNTS) == kind


def test_memory_is_refused() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or disk.file_system(shm, Path("/proc/self/mountinfo").read_text("utf-8")) != "tmpfs":
        pytest.skip("no tmpfs on /dev/shm")
    with pytest.raises(BenchError, match="tmpfs"):
        disk.require_disk(shm)


def test_scratch_is_empty_and_goes_away(tmp_path: Path) -> None:
    (tmp_path / "bench-state" / "cold").mkdir(parents=True)
    (tmp_path / "bench-state" / "of-a-dead-run").touch()
    with disk.scratch(tmp_path) as place:
        assert not list(place.iterdir())
        (place / "x").touch()
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with disk.scratch(tmp_path) as place:
        (place / "kept").touch()
        with pytest.raises(BenchError, match="another benchmark"), disk.scratch(tmp_path):
            pass
        assert (place / "kept").exists()


def test_a_lock_on_a_directory_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run ends after this one opened the directory and before it locks it."""
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        (tmp_path / "bench-state").rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BenchError, match="another benchmark"), disk.scratch(tmp_path):
        pass


def test_syncs_are_timed_one_by_one_and_the_log_does_not_grow(tmp_path: Path) -> None:
    syncs = disk.Syncs(tmp_path)
    size = (tmp_path / "log").stat().st_size
    assert len(syncs.append(3)) == 3
    assert all(took > 0 for took in syncs.overwrite(600))
    syncs.close()
    assert (tmp_path / "append").stat().st_size == 3 * 4096
    assert (tmp_path / "log").stat().st_size == size
