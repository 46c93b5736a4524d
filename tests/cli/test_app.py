"""The command as a whole: help, exit statuses, completion."""

import os
import subprocess
import sys

import pytest

from kernel.version import VERSION
from tests.cli.conftest import ROOT, Ipamd, Netloom

COMMANDS = [
    ["status"],
    ["gc"],
    ["trace"],
    ["ip", "list"],
    ["ip", "show"],
    ["ip", "release"],
    ["ip", "reserve"],
    ["ip", "unreserve"],
    ["pool", "list"],
    ["pool", "show"],
    ["pool", "create"],
    ["pool", "delete"],
    ["completion"],
]


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_help_tells_the_exit_statuses(netloom: Netloom, words: list[str]) -> None:
    ran = netloom(*words, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert "Exit status: 0" in ran.out


def test_the_version(netloom: Netloom) -> None:
    assert netloom("--version").out == f"netloom {VERSION}\n"


@pytest.mark.parametrize("words", [[], ["ip"], ["pool"]], ids=" ".join)
def test_a_group_alone_shows_its_help_and_is_wrong_usage(netloom: Netloom, words: list[str]) -> None:
    ran = netloom(*words)
    assert (ran.status, ran.out) == (2, "")
    assert "Commands:" in ran.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["statos"], "Did you mean 'status'?"),
        (["ip", "show"], "Missing argument 'ADDRESS'"),
        (["status", "--jsonn"], "--jsonn"),
        (["completion", "tcsh"], "tcsh"),
        (["gc", "--dry-run", "--rebuild"], "--rebuild changes the kernel"),
    ],
)
def test_wrong_usage(netloom: Netloom, words: list[str], complaint: str) -> None:
    ran = netloom(*words)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("netloom: ")
    assert complaint in ran.err
    assert ran.err.count("\n") == 1


def test_options_before_and_behind_the_subcommand(ipamd: Ipamd, netloom: Netloom, tmp_path: object) -> None:
    socket = str(ipamd.directory / "ipamd.sock")
    documents = {
        netloom("--json", "--socket", socket, "pool", "list").out,
        netloom("pool", "list", "--json", "--socket", socket).out,
        netloom("--socket", "/nowhere", "pool", "list", "--socket", socket, "--json").out,
    }
    assert documents == {'{\n  "pools": []\n}\n'}
    assert netloom("--socket", "/nowhere", "pool", "list").status == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(netloom: Netloom, shell: str) -> None:
    ran = netloom("completion", shell)
    assert (ran.status, ran.err) == (0, "")
    assert "_NETLOOM_COMPLETE" in ran.out
    assert "netloom" in ran.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=ran.out.encode(), check=True)


def _completed(words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from cli.app import main; sys.exit(main())"],
        cwd=ROOT,
        env={
            **os.environ,
            "_NETLOOM_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return {line.partition(",")[2] for line in done.stdout.split("\n") if line}


def test_words_and_names_of_pools_are_completed(ipamd: Ipamd, netloom: Netloom) -> None:
    for name in ("blue", "black", "red"):
        assert netloom("pool", "create", name, "--subnet", "10.1.0.0/24").status == 0
    assert _completed("netloom pool ") == {"list", "show", "create", "delete"}
    assert _completed("netloom pool show bl") == {"blue", "black"}
    assert _completed("netloom ip list --pool r") == {"red"}
    assert _completed(f"netloom --socket {ipamd.directory.parent}/no.sock pool show ") == set()


def test_completion_without_ipamd_is_quiet(scratch: object) -> None:
    assert _completed("netloom pool show ") == set()
