"""`netloom trace`: what is kept, in both forms; filters; who may not look."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from telemetry import trace
from tests.cli.conftest import Netloom


def keep(scratch: Path, number: int, total_ns: int = 0, **about: str) -> None:
    """A request with the id "000<number>" that took so long."""
    trace.begin("warm", "receive", total_ns)
    trace.mark("bridge link")
    trace.about(
        **{"id": f"{number:04}", "plugin": "bridge", "verb": "ADD", "network": "web", "ifname": "eth0", **about}
    )
    trace.end(str(scratch), about.get("outcome", "done"), int(about.get("code", "0")), about.get("error", ""))


def test_nothing_is_kept(netloom: Netloom) -> None:
    assert netloom("trace").out == "no request is kept\n"
    assert json.loads(netloom("trace", "--json").out) == {"requests": [], "unreadable": 0}


def test_the_last_ones_newest_last(netloom: Netloom, scratch: Path) -> None:
    for number in range(30):
        keep(scratch, number, 2_000_000, container=f"c{number % 2}")
    lines = netloom("trace").out.splitlines()
    assert lines[0].split()[:2] == ["TIME", "REQUEST"]
    assert [line.split()[1] for line in lines[1:]] == [f"{number:04}" for number in range(10, 30)]
    time, _, *rest = lines[1].split()
    assert time.endswith("Z")
    assert rest[:7] == ["ADD", "bridge", "web", "c0", "eth0", "warm", "done"]
    assert rest[8] == "receive=2.00"
    assert [line.split()[1] for line in netloom("trace", "--last", "2").out.splitlines()[1:]] == ["0028", "0029"]
    ran = netloom("trace", "--last", "2", "--container", "c0")
    assert [line.split()[1] for line in ran.out.splitlines()[1:]] == ["0026", "0028"]


def test_the_slowest_first(netloom: Netloom, scratch: Path) -> None:
    for number, total_ms in enumerate((5, 50, 20, 40)):
        keep(scratch, number, total_ms * 1_000_000)
    found = json.loads(netloom("trace", "--slowest", "--last", "3", "--json").out)["requests"]
    assert [one["request_id"] for one in found] == ["0001", "0003", "0002"]


def test_one_with_all_of_its_steps(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1)
    keep(scratch, 2, 3_000_000, outcome="failed", code="7", error="bad\nvalue", container="c1")
    ran = netloom("trace", "--id", "0002")
    facts = dict(line.split(maxsplit=1) for line in ran.out.split("\n\n")[0].splitlines())
    assert facts["request"] == "0002"
    assert facts["served"] == f"warm, by process {os.getpid()}"
    assert (facts["outcome"], facts["error"]) == ("error 7", "bad\\nvalue")
    steps = ran.out.split("\n\n")[1].splitlines()
    assert steps[0].split() == ["STEP", "MS", "SHARE"]
    assert steps[1].split()[0] == "receive"
    assert steps[2].startswith("bridge link")
    ran = netloom("trace", "--id", "00", "--json")
    assert [one["request_id"] for one in json.loads(ran.out)["requests"]] == ["0001", "0002"]


def test_the_document(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1, 3_000_000, container="c1")
    (one,) = json.loads(netloom("trace", "--json").out)["requests"]
    words = "time request_id verb plugin network container_id ifname way pid outcome code error total_ns steps"
    assert list(one) == words.split(" ")
    assert one["total_ns"] == sum(step["ns"] for step in one["steps"])
    assert [step["step"] for step in one["steps"]] == ["receive", "bridge link"]


def test_an_id_that_is_not_kept(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1)
    ran = netloom("trace", "--id", "ffff")
    assert (ran.status, ran.out) == (1, "")
    assert "no request that is kept has the id ffff" in ran.err


def test_lines_that_cannot_be_read_are_told(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1)
    with (scratch / "trace" / "requests").open("ab") as file:
        file.write(b'{"at_ns": 99999999999999999999999999}\n{"half')
    ran = netloom("trace")
    assert ran.status == 0
    assert ran.out.splitlines()[-1] == "lines that cannot be read: 2"
    assert json.loads(netloom("trace", "--json").out)["unreadable"] == 2


def test_a_time_that_is_none(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1)
    path = scratch / "trace" / "requests"
    document = {**json.loads(path.read_bytes()), "at_ns": 10**18 * 9, "total_ns": -5}
    path.write_text(json.dumps(document))
    assert netloom("trace").status == 0
    assert netloom("trace", "--id", "0001").status == 0


@pytest.mark.parametrize("words", [["--last", "0"], ["--last", "x"]])
def test_wrong_numbers(netloom: Netloom, words: list[str]) -> None:
    assert netloom("trace", *words).status == 2


def test_what_cannot_be_read(netloom: Netloom, scratch: Path) -> None:
    (scratch / "trace" / "requests").mkdir(parents=True)
    ran = netloom("trace")
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert "cannot read the traces" in ran.err


def test_a_run_directory_that_is_none(netloom: Netloom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLOOM_RUN_DIR", "relative")
    assert netloom("trace").status == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_only_root_may_look(netloom: Netloom, scratch: Path) -> None:
    keep(scratch, 1)
    os.seteuid(65534)
    try:
        ran = netloom("trace")
    finally:
        os.seteuid(0)
    assert (ran.status, ran.out) == (4, "")
    assert "only root may" in ran.err
