"""The judge finds what is wrong in logs that were made up, and nothing in those of a sound run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.judge import Tail, Verdict, judge, read


def log(*lines: str) -> list[dict[str, Any]]:
    """ "t node n e k ..." as events: ask; got g a; free g; freed; late g; no c."""
    events = []
    for line in lines:
        t, node, n, kind, key, *rest = line.split()
        event: dict[str, Any] = {"t": int(t), "node": node, "n": int(n), "e": kind, "k": key}
        if kind in ("got", "free", "late"):
            event["g"] = int(rest.pop(0))
        if kind == "got":
            event["a"] = rest
        if kind == "no":
            event |= {"c": rest[0], "m": "why"}
        events.append(event)
    return events


def verdict(*lines: str) -> Verdict:
    return judge(log(*lines))


def test_a_sound_run() -> None:
    found = verdict(
        "1 n1 1 ask c1",
        "2 n1 1 got c1 1 10.0.0.2 fd00::2",
        "3 n1 2 free c1 1",
        "4 n2 1 ask c1",
        "5 n2 1 got c1 1 10.0.0.2",  # before the Release's answer, after it was sent
        "6 n1 2 freed c1",
        "7 n1 3 ask c2",
        "8 n1 3 no c2 RESOURCE_EXHAUSTED",
    )
    found.assert_clean()
    assert found.owned == {("n2", "c1"): frozenset({"10.0.0.2"})}
    assert found.unknown == set()
    assert found.refused == {"RESOURCE_EXHAUSTED": 1}
    assert found.slowest_ns == 3
    assert found.granted(2, 5) == {"n1": 1}
    assert found.granted(2, 6) == {"n1": 1, "n2": 1}
    assert found.granted(2, 6, "another pool") == {}
    assert found.refusals(0, 9) == {"RESOURCE_EXHAUSTED": 1}


@pytest.mark.parametrize(
    "second",
    [
        ("5 n2 1 got c9 1 10.0.0.2",),  # while the first owns it
        ("9 n1 2 free c1 1", "8 n2 1 got c9 1 10.0.0.2"),  # one moment too early
        ("5 n1 9 got c9 2 10.0.0.2",),  # on the same node
        ("5 n2 1 got c9 1 10.0.0.2", "6 n2 2 free c9 1"),  # within the other's time
    ],
)
def test_two_owners(second: tuple[str, ...]) -> None:
    events = log("1 n1 1 ask c1", "2 n1 1 got c1 1 10.0.0.2", *second)
    found = judge(sorted(events, key=lambda event: event["t"]))
    assert "10.0.0.2 had two owners: n1/c1" in found.problems[0]
    with pytest.raises(AssertionError, match="two owners"):
        found.assert_clean()


def test_an_overlap_that_a_third_one_hides() -> None:
    found = verdict(
        "1 n1 1 got c1 1 10.0.0.2",
        "2 n2 1 got c2 1 10.0.0.2",
        "3 n2 2 free c2 1",
        "4 n3 1 got c3 1 10.0.0.2",  # begins after the second's end, and within the first's time
    )
    assert len(found.problems) == 2


def test_another_answer_for_what_is_owned() -> None:
    found = verdict("1 n1 1 got c1 1 10.0.0.2", "2 n1 2 got c1 2 10.0.0.3")
    assert "asked again and got generation 2" in found.problems[0]
    assert verdict("1 n1 1 got c1 1 10.0.0.2", "2 n1 2 got c1 1 10.0.0.2").problems == []
    assert "without an address" in verdict("1 n1 1 got c1 1").problems[0]


def test_an_error_that_no_fault_explains() -> None:
    found = verdict("1 n1 1 ask c1", "2 n1 1 no c1 INTERNAL")
    assert found.problems == ["n1/c1: ask was refused: INTERNAL: why"]


def test_what_ipamd_knows() -> None:
    found = verdict(
        "1 n1 1 got c1 1 10.0.0.2",
        "1 n1 2 got c2 2 10.0.0.3",
        "1 n1 3 got c3 3 10.0.0.4",
        "2 n1 4 ask c4",
        "3 n1 4 no c4 UNAVAILABLE",  # perhaps done, perhaps not
        "3 n1 5 free c3 3",
        "4 n1 5 freed c3",
    )
    assert found.unknown == {("n1", "c4")}
    right = {("n1", "c1"): frozenset({"10.0.0.2"}), ("n1", "c2"): frozenset({"10.0.0.3"})}
    assert found.compare(right) == []
    assert found.compare({**right, ("n1", "c4"): frozenset({"10.0.0.9"})}) == []
    assert found.compare({("n1", "c1"): frozenset({"10.0.0.2"})})[0].startswith("lost: n1/c2")
    assert found.compare({**right, ("n1", "c3"): frozenset({"10.0.0.4"})})[0].startswith("leaked: n1/c3")
    assert found.compare({**right, ("n1", "c1"): frozenset({"10.0.0.8"})})[0].startswith("changed: n1/c1")


def test_a_late_release_ends_nothing() -> None:
    found = verdict("1 n1 1 got c1 2 10.0.0.2", "2 n1 2 late c1 1", "3 n1 2 freed c1", "4 n2 1 got c9 1 10.0.0.2")
    assert len(found.problems) == 1


def test_logs_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_text(json.dumps(log("5 n1 1 got c1 1 10.0.0.2")[0]) + '\n{"t": 6, "no')
    second.write_text(
        "".join(json.dumps(event) + "\n" for event in log("3 n2 1 got c1 1 10.0.0.2", "5 n2 2 free c1 1"))
    )
    assert [(event["t"], event["e"]) for event in read([first, second])] == [(3, "got"), (5, "free"), (5, "got")]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=60), st.integers(0, 200))
def test_one_address_too_many_is_always_found(steps: list[tuple[int, int]], thief_at: int) -> None:
    """A sound history of three addresses, and one holding that was put into it."""
    lines: list[str] = []
    held: dict[int, int] = {}
    for t, (owner, address) in enumerate(steps, 1):
        if owner in held:
            lines.append(f"{2 * t} n{owner} {t} free c {t}")
            del held[owner]
        elif address not in held.values():
            lines.append(f"{2 * t} n{owner} {t} got c {t} 10.0.0.{address}")
            held[owner] = address
    assert verdict(*lines).problems == []
    for owner, address in held.items():
        at = 2 * len(steps) + 1 + thief_at
        assert len(verdict(*lines, f"{at} thief 1 got c 1 10.0.0.{address}").problems) == 1, owner


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    """Each line once, when it is whole; nothing of what was there before, and of no log nothing."""
    file = tmp_path / "log"
    assert Tail(file).read() == []
    file.write_text('{"t":1}\n')
    tail = Tail(file)
    with file.open("a") as log:
        for text, wanted in (('{"t":2}\n{"t"', [{"t": 2}]), (":3", []), ('}\n{"t":4}\n', [{"t": 3}, {"t": 4}])):
            log.write(text)
            log.flush()
            assert tail.read() == wanted
    assert tail.read() == []
