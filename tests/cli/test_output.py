"""What people and programs get to see."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cli import output
from tests.cli.conftest import ROOT, Ipamd, Netloom


@pytest.mark.parametrize(
    ("taken", "size", "shown"),
    [
        (0, 10, "[          ]   0%"),
        (1, 65532, "[          ]   1%"),
        (65531, 65532, "[######### ]  99%"),
        (10, 10, "[##########] 100%"),
        (3, 1 << 80, "[          ]   1%"),
        (11, 10, "[##########] 100%"),
        (0, 0, ""),
    ],
)
def test_fill(taken: int, size: int, shown: str) -> None:
    assert output.fill(taken, size) == shown


def test_plain_tables_are_never_cut_and_nothing_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "N"), [("[red]x[/red]" + "y" * 300, "7"), ("a\nb\x1b[2J", "1000")], ("N",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "N"]
    assert lines[1] == "[red]x[/red]" + "y" * 300 + "     7"
    assert lines[2].startswith("a\\nb\\x1b[2J ")
    assert lines[2].endswith("1000")


def _on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    """What the command writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "cli", *words],
            cwd=ROOT,
            stdin=follower,
            stdout=follower,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
        ) as process:
            os.close(follower)
            follower = -1
            written = b""
            while True:
                try:
                    part = os.read(leader, 65536)
                except OSError:  # EIO: the other end is closed
                    break
                if not part:
                    break
                written += part
        assert process.returncode == 0
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)
    return written.decode()


def test_colours_are_for_terminals_that_want_them(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    coloured = _on_a_terminal(["status"], {"NO_COLOR": ""})
    assert "\x1b[1;32mhealthy" in coloured
    assert "blue" in coloured
    plain = _on_a_terminal(["status"], {"NO_COLOR": "1"})
    assert "\x1b[1;32m" not in plain
    assert "healthy" in plain
    assert "\x1b" not in netloom("status").out


def test_hostile_names_do_not_reach_a_terminal(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    assert netloom("ip", "reserve", "blue", "10.1.0.5", "--note", "[bold red]loud[/] gr\u00fcn").status == 0
    written = _on_a_terminal(["ip", "show", "10.1.0.5"], {})
    assert "[bold red]loud[/] gr\u00fcn" in written


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_the_c_locale(ipamd: Ipamd, netloom: Netloom, locale: dict[str, str]) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    assert netloom("ip", "reserve", "blue", "10.1.0.5", "--note", "gr\u00fcn").status == 0
    for words in (["ip", "list", "--reserved"], ["pool", "show", "blue"], ["status"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            cwd=ROOT,
            env={**os.environ, **locale},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), done
    assert done.stdout.isascii()


def test_a_reader_that_stops_reading(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    done = subprocess.run(
        ["sh", "-c", '"$0" -m cli status --json | true', sys.executable], cwd=ROOT, capture_output=True, check=False
    )
    assert done.stderr == b""


def test_a_full_disk_is_an_error_of_one_line(ipamd: Ipamd) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli", "status", "--json"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"netloom: ")
    assert done.stderr.count(b"\n") == 1


def test_streams_that_cannot_be_prepared_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    output.prepare_streams()
