"""The command line, and the file of results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import __main__ as main
from bench.addresses import OTHER_LOAD, counters
from bench.host import BenchError
from bench.stats import Row, Spec
from tests.hosts import ROOT

ROWS = [
    Row("a", "ms", 1.0, 2.0, 0.5, 0.65, 0.4, (0.4, 0.6), 1.5, 2.5, "lower", 9, "n"),
    Row("b", "1/s", 10.0, limit=20.0, better="higher"),
]
SPECS = main._specs(main._plan(main.arguments([])))


def test_rows_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "out" / "bench.json"
    main.write(file, ROWS)
    assert main.read(file) == ROWS
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]


def test_the_file_is_a_list_of_rows_with_these_keys(tmp_path: Path) -> None:
    main.write(tmp_path / "bench.json", ROWS)
    document = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    keys = {"name", "unit", "ours", "peer", "ratio", "limit", "spread", "better", "note"}
    assert all(keys <= set(row) for row in document)
    assert document[0]["spread"] == [0.4, 0.6]


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(BenchError, match="run the benchmark again"):
        main.read(file)


def test_check_reads_the_last_run_and_names_what_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "OUT", tmp_path)
    main.write(tmp_path / "bench.json", ROWS)
    assert main.main(["--check"]) == 1
    seen = capsys.readouterr()
    assert "over its limit: b: 10 1/s < limit 20 1/s" in seen.err
    assert "1 of 2 limits hold" in seen.err
    assert "a [1]" in seen.out
    main.write(tmp_path / "bench.json", ROWS[:1])
    assert main.main(["--check"]) == 0


def test_a_busy_machine_is_said_beside_what_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "OUT", tmp_path)
    for load, said in ((3.0, False), (60.0, True)):
        main.write(tmp_path / "bench.json", [*ROWS, Row(OTHER_LOAD, "%", load)])
        assert main.main(["--check"]) == 1
        assert ("60 % of the processors" in capsys.readouterr().err) is said


def test_check_runs_first_where_there_is_nothing_to_read_or_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "OUT", tmp_path)
    ran: list[bool] = []

    def run(_given: object, _wanted: object) -> list[Row]:
        ran.append(True)
        return ROWS[:1]

    monkeypatch.setattr(main, "run", run)
    assert main.main(["--check"]) == 0
    assert main.main(["--check"]) == 0
    assert len(ran) == 1
    assert main.main(["--check", "--run"]) == 0
    assert len(ran) == 2


def test_a_part_and_a_quick_run_do_not_replace_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "OUT", tmp_path)
    monkeypatch.setattr(main, "run", lambda _given, _wanted: ROWS)
    for argv in (["--only", "a"], ["--quick"]):
        main.main(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"bench-part.json", "bench-quick.json"}


def test_a_pattern_is_a_part_of_a_name_or_has_wildcards() -> None:
    spec = Spec("bridge ipMasq ADD, cold", "ms")
    for pattern in (None, "ipmasq", "bridge*cold", "BRIDGE"):
        assert main.matcher(pattern)(spec), pattern
    for pattern in ("DEL", "bridge*warm"):
        assert not main.matcher(pattern)(spec), pattern


def test_list_names_every_row_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SPECS)
    assert any(line.startswith("ipamd allocations, 8 clients, 100,000 taken") and ">= 2000" in line for line in lines)


def test_names_of_rows_are_unique() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)


def test_counters_of_a_metrics_page() -> None:
    page = '# HELP a_sum x\n# TYPE a histogram\na_bucket{le="1"} 3\na_sum 2.5\na_count 3.0\n'
    assert counters(page) == {"a_sum": 2.5, "a_count": 3.0}


def test_every_row_is_documented() -> None:
    text = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.partition("| rows |")[2].splitlines()[2:] if line.startswith("|")]
    words = [word for cell in rows for word in re.findall(r"`([^`]+)`", cell)]
    commands = {"kill -9", "ip"}
    assert [word for word in words if not any(word in spec.name for spec in SPECS) and word not in commands] == []
    # ipMasq and the like are words of other rows, too: each row needs one of its own kind.
    assert [spec.name for spec in SPECS if not any(word in spec.name for word in words)] == []
