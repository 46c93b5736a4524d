"""The measuring client: it needs no rights, so it is run here as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bench


class Runner:
    def __init__(self) -> None:
        program = Path(bench.__file__).with_name("runner.py")
        argv = [sys.executable, "-I", "-S", str(program)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *calls: dict[str, Any], width: int = 1, limit_s: float = 120) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"width": width, "limit_s": limit_s, "calls": calls}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture
def runner() -> Iterator[Runner]:
    one = Runner()
    with one.process:
        yield one
        one.process.kill()


def sh(script: str, stdin: str = "", **env: str) -> dict[str, Any]:
    return {"argv": ["/bin/sh", "-c", script], "env": env, "stdin": stdin}


def test_a_call_gets_its_own_input_and_environment(runner: Runner) -> None:
    answer = runner.run(sh("cat; echo $A; echo complaint >&2", "one", A="1"), sh("cat; echo $A; exit 3", "two", A="2"))
    assert answer["stdout"] == ["one1\n", "two2\n"]
    assert answer["status"] == [0, 3]
    assert answer["stderr"] == "complaint\n"


def test_nothing_is_left_for_the_next_request(runner: Runner) -> None:
    runner.run(sh("echo complaint >&2"))
    assert runner.run(sh("true"))["stderr"] == ""


def test_calls_run_side_by_side_up_to_the_width(runner: Runner, tmp_path: Path) -> None:
    """Two that wait for each other end only when they run at the same time."""
    wait = "touch $MINE; while [ ! -e $OTHER ]; do sleep 0.01; done"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    calls = (sh(wait, MINE=a, OTHER=b, PATH="/usr/bin:/bin"), sh(wait, MINE=b, OTHER=a, PATH="/usr/bin:/bin"))
    assert runner.run(*calls, width=2)["status"] == [0, 0]


def test_one_after_the_other_with_a_width_of_one(runner: Runner, tmp_path: Path) -> None:
    script = "mkdir $LOCK && sleep 0.02 && rmdir $LOCK"
    calls = [sh(script, LOCK=str(tmp_path / "lock"), PATH="/usr/bin:/bin") for _ in range(5)]
    answer = runner.run(*calls)
    assert answer["status"] == [0] * 5
    assert all(took > 20e6 for took in answer["took_ns"])
    assert answer["wall_ns"] >= sum(answer["took_ns"])


def test_what_hangs_is_killed_at_the_limit(runner: Runner) -> None:
    answer = runner.run(sh("true"), sh("exec sleep 1000", PATH="/usr/bin:/bin"), limit_s=1)
    assert answer["status"] == [0, -9]
    assert runner.run(sh("echo on"))["stdout"] == ["on\n"]


def test_what_a_call_leaves_behind_does_not_hold_the_answer(runner: Runner) -> None:
    answer = runner.run(sh("sleep 1000 & echo $!", PATH="/usr/bin:/bin"))
    subprocess.run(["kill", answer["stdout"][0].strip()], check=True)
    assert answer["status"] == [0]
