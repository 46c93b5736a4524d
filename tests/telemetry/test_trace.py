"""Steps add up, lines are kept whole, and whatever stands in the way is nobody's failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from telemetry import trace, traces

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_request() -> Iterator[None]:
    trace.drop()
    yield
    trace.drop()


def end(run_dir: Path, **about: str) -> None:
    """A whole request."""
    trace.begin("warm", "receive")
    trace.about(**about)
    trace.end(str(run_dir), "done")


def only(run_dir: Path) -> traces.Trace:
    (found,) = traces.read(str(run_dir)).requests
    return found


def spin(clock: Clock, ns: int) -> None:
    clock.now += ns


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# Steps


def test_time_belongs_to_the_innermost_step_and_adds_up(tmp_path: Path, clock: Clock) -> None:
    @trace.step("inner")
    def inner() -> str:
        spin(clock, 5)
        return "value"

    trace.begin("cold", "start", earlier_ns=7)
    trace.mark("plugin")
    spin(clock, 1)
    with trace.step("outer"):
        spin(clock, 2)
        assert inner() == "value"
        spin(clock, 3)
        trace.mark("told otherwise")
        spin(clock, 4)
    spin(clock, 6)
    trace.end(str(tmp_path), "done")
    found = only(tmp_path)
    assert found.steps == {"start": 7, "plugin": 7, "outer": 5, "inner": 5, "told otherwise": 4}
    assert found.total_ns == sum(found.steps.values()) == 28
    assert found.way == "cold"


def test_a_step_that_raises_ends(tmp_path: Path, clock: Clock) -> None:
    @trace.step("function")
    def function() -> None:
        spin(clock, 1)
        raise ValueError("inside")

    trace.begin("warm", "receive")
    with pytest.raises(ValueError, match="inside"), trace.step("block"):
        function()
    spin(clock, 2)
    trace.end(str(tmp_path), "failed", 7, "why")
    found = only(tmp_path)
    assert (found.steps["function"], found.steps["receive"]) == (1, 2)
    assert (found.outcome, found.code, found.error) == ("failed", 7, "why")


def test_a_decorated_function_is_itself() -> None:
    assert trace.step("x")(spin).__name__ == "spin"


def test_without_a_request_nothing_happens(tmp_path: Path) -> None:
    assert trace.mark("step") == ""
    trace.about(id="x")
    with trace.step("step"):
        pass
    trace.end(str(tmp_path), "done")
    trace.begin("warm", "receive")
    trace.drop()
    trace.end(str(tmp_path), "done")
    assert os.listdir(tmp_path) == []


def test_the_next_request_knows_nothing_of_the_one_before(tmp_path: Path) -> None:
    trace.begin("warm", "receive")
    trace.mark("left behind")
    trace.about(error="x", network="old")
    end(tmp_path, id="2")
    found = only(tmp_path)
    assert (found.id, found.network, list(found.steps)) == ("2", "", ["receive"])


# The file


def test_only_its_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        end(tmp_path)
    finally:
        os.umask(before)
    directory = tmp_path / trace.DIRECTORY
    assert (directory.stat().st_mode & 0o777, (directory / trace.FILE).stat().st_mode & 0o777) == (0o700, 0o600)


def test_hostile_values_are_one_line_and_short(tmp_path: Path) -> None:
    values = {"container": "c\n{\x00\x1b" * 1000, "network": "\udcff\u2028é", "ifname": '"}'}
    trace.begin("warm", "receive")
    trace.about(**values)
    trace.end(str(tmp_path), "failed", 999, "x" * 100_000)
    raw = (tmp_path / trace.DIRECTORY / trace.FILE).read_bytes()
    assert raw.strip().count(b"\n") == 0
    assert len(raw) < 4096
    found = only(tmp_path)
    assert found.container.startswith("c\n{\x00\x1b")
    assert (found.network, found.ifname) == ("\\udcff\u2028é", '"}')


def test_the_file_is_set_aside_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LIMIT", 2000)
    directory = tmp_path / trace.DIRECTORY
    count = 0
    # Lines are as long as their times have digits: the last of so many may fill the file, too.
    while count < 100 or not (directory / trace.FILE).exists():
        end(tmp_path, id=str(count))
        count += 1
    assert count <= 101
    assert sorted(os.listdir(directory)) == [trace.FILE, trace.FULL]
    assert all(one.stat().st_size < 2400 for one in directory.iterdir())
    ids = [int(one.id) for one in traces.read(str(tmp_path)).requests]
    assert ids == list(range(ids[0], count))
    assert len(ids) >= 10


_WRITER = """
import sys
import time
from telemetry import trace
trace.LIMIT = int(sys.argv[3])
sys.stdin.read()
for number in range(int(sys.argv[4])):
    trace.begin("warm", "receive")
    trace.about(id=f"{sys.argv[2]}-{number}", container="x" * (number % 150))
    trace.end(sys.argv[1], "done")
"""


def write_at_once(run_dir: Path, limit: int, each: int) -> list[str]:
    """Four processes that write; the ids that can be read after."""
    argv = [sys.executable, "-c", _WRITER, str(run_dir)]
    writers = [
        subprocess.Popen([*argv, name, str(limit), str(each)], cwd=ROOT, stdin=subprocess.PIPE) for name in "abcd"
    ]
    for one in writers:
        assert one.stdin is not None
        one.stdin.close()
    assert [one.wait(60) for one in writers] == [0] * 4
    found = traces.read(str(run_dir))
    assert found.unreadable == 0
    return [one.id for one in found.requests]


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    found = write_at_once(tmp_path, 1 << 30, 400)
    assert sorted(found) == sorted(f"{name}-{number}" for name in "abcd" for number in range(400))
    for name in "abcd":
        assert [one for one in found if one[0] == name] == [f"{name}-{number}" for number in range(400)]


def test_writers_set_a_full_file_aside_once(tmp_path: Path) -> None:
    # Had two of them renamed one after the other, the second would have thrown a full file away for a fresh one.
    found = write_at_once(tmp_path, 20_000, 400)
    size = sum(one.stat().st_size for one in (tmp_path / trace.DIRECTORY).iterdir())
    assert 20_000 <= size <= 42_000
    assert len(found) == len(set(found))


# What stands in the way


def a_file_for_a_directory(run_dir: Path) -> None:
    (run_dir / "trace").write_text("")


def a_link_to_elsewhere(run_dir: Path) -> None:
    (run_dir / "victim").mkdir(mode=0o700)
    (run_dir / "trace").symlink_to("victim")


def everybody_may_write(run_dir: Path) -> None:
    (run_dir / "trace").mkdir()
    (run_dir / "trace").chmod(0o777)


def a_link_for_a_file(run_dir: Path) -> None:
    (run_dir / "trace").mkdir(mode=0o700)
    (run_dir / "trace" / "requests").symlink_to("../victim")


def a_directory_for_a_file(run_dir: Path) -> None:
    (run_dir / "trace" / "requests").mkdir(mode=0o700, parents=True)
    (run_dir / "trace").chmod(0o700)


def a_pipe_for_a_file(run_dir: Path) -> None:
    (run_dir / "trace").mkdir(mode=0o700)
    os.mkfifo(run_dir / "trace" / "requests")


def no_run_directory(run_dir: Path) -> None:
    run_dir.rmdir()


@pytest.mark.parametrize(
    "obstacle",
    [
        a_file_for_a_directory,
        a_link_to_elsewhere,
        everybody_may_write,
        a_link_for_a_file,
        a_directory_for_a_file,
        a_pipe_for_a_file,
        no_run_directory,
    ],
    ids=lambda obstacle: obstacle.__name__,
)
def test_what_stands_in_the_way_fails_nobody_and_is_left_alone(tmp_path: Path, obstacle: object) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert callable(obstacle)
    obstacle(run_dir)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    end(run_dir)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert all(path.stat().st_size == 0 for path in tmp_path.rglob("*") if path.is_file())


def test_a_name_that_cannot_be_renamed_over_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LIMIT", 100)
    (tmp_path / "trace" / trace.FULL / "x").mkdir(parents=True)
    (tmp_path / "trace").chmod(0o700)
    for number in range(3):
        end(tmp_path, id=str(number))
    lines = (tmp_path / "trace" / trace.FILE).read_bytes().split()
    assert [json.loads(line)["id"] for line in lines] == ["0", "1", "2"]


# Reading


def test_lines_that_cannot_be_read_are_counted_and_take_no_other_with_them(tmp_path: Path) -> None:
    end(tmp_path, id="first")
    path = tmp_path / trace.DIRECTORY / trace.FILE
    whole = path.read_bytes().strip()
    with path.open("ab") as file:
        file.write(b"\n" + whole[: len(whole) // 2])  # a full disk
    end(tmp_path, id="second")
    with path.open("ab") as file:
        file.write(b"\xff\xfe\x00garbage\n[]\n{}\n" + b"\0" * 4096 + b"\n" + b'{"at_ns": "x"}\n')
    end(tmp_path, id="third")
    with path.open("ab") as file:
        file.write(whole.replace(b'"way"', b'"new key": [1], "way"'))  # a later version's
    found = traces.read(str(tmp_path))
    assert [one.id for one in found.requests] == ["first", "second", "third", "first"]
    assert found.unreadable == 5


def test_nothing_to_read(tmp_path: Path) -> None:
    assert traces.read(str(tmp_path)) == traces.Traces([], 0)
    assert traces.read(str(tmp_path / "nowhere")) == traces.Traces([], 0)
    (tmp_path / "trace").write_text("")
    assert traces.read(str(tmp_path)) == traces.Traces([], 0)
