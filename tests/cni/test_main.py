"""cni.__main__: real processes, real descriptors."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import BinaryIO

import pytest

from cni.registry import PLUGINS
from kernel.version import VERSION

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", ""),
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/proc/self/ns/net",
    "CNI_NETNS_OVERRIDE": "1",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/nowhere",
}
CONF = b'{"cniVersion": "1.1.0", "name": "net"}'
# The cold entry with a plugin that leaves a mark in the working directory and takes it back when undone.
FAKE = """
import os, sys, time
sys.path.insert(0, os.environ["REPOSITORY"])
from cni import registry, skel
from cni.__main__ import main
from cni.result import IPConfig, Result
from kernel import session

class Fake:
    def add(self, request, host, undo):
        undo.push("remove the mark", lambda: os.unlink("mark"))
        open("mark", "w").close()
        if os.environ.get("BLOCK"):
            print("blocked", file=sys.stderr, flush=True)
            time.sleep(600)
        return Result(ips=(IPConfig("10.0.0.5/24"),))

class Session:
    pass

session.Session = Session
original = skel.run
skel.run = lambda *args, **kwargs: original(*args, load=lambda plugin: Fake(), **kwargs)
"""


@pytest.fixture(autouse=True)
def _own_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the machine's own /run."""
    monkeypatch.setitem(ENVIRONMENT, "NETLOOM_RUN_DIR", str(tmp_path / "run"))


def run_module(*arguments: str, stdin: bytes = CONF, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "cni", *arguments],
        input=stdin,
        capture_output=True,
        env={**ENVIRONMENT, **env},
        cwd=REPOSITORY,
        check=False,
        timeout=120,
    )


def start_fake(
    directory: Path,
    ending: str = "sys.exit(main('bridge'))",
    *,
    stdout: int | BinaryIO = subprocess.PIPE,
    block: bool = False,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", FAKE + ending],
        cwd=directory,
        env={**fake_environment(directory), "BLOCK": "1" if block else ""},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def fake_environment(directory: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "CNI_COMMAND": "ADD", "NETLOOM_RUN_DIR": str(directory), "REPOSITORY": str(REPOSITORY)}


def left(directory: Path) -> set[str]:
    """What is in the directory, but for the empty lock directory and the trace of the request."""
    return {path.name for path in directory.rglob("*")} - {"locks", "trace", "requests"}


def test_the_version_is_that_of_the_project() -> None:
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == VERSION


@pytest.mark.parametrize("plugin", PLUGINS)
def test_version_by_argument(plugin: str) -> None:
    done = run_module(plugin, CNI_COMMAND="VERSION")
    assert done.returncode == 0
    assert json.loads(done.stdout)["cniVersion"] == "1.1.0"
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


@pytest.mark.parametrize("plugin", PLUGINS)
def test_version_by_program_name(plugin: str, tmp_path: Path) -> None:
    program = tmp_path / plugin
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom cni.__main__ import main\nsys.exit(main())\n")
    program.chmod(0o755)
    env = {**ENVIRONMENT, "CNI_COMMAND": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([program, "junk"], capture_output=True, env=env, check=False, timeout=120)
    assert done.returncode == 0
    assert done.stdout == b""
    assert done.stderr.startswith(f"CNI {plugin} plugin v{VERSION}".encode())


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("../bridge",)])
def test_without_a_plugin_it_says_how_to_use_it(arguments: tuple[str, ...]) -> None:
    done = run_module(*arguments, CNI_COMMAND="VERSION")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"usage: python -m cni TYPE" in done.stderr
    assert b"bridge" in done.stderr


def test_an_error_object_and_status_1() -> None:
    done = run_module("bridge", CNI_COMMAND="ADD", CNI_IFNAME="")
    assert done.returncode == 1
    assert json.loads(done.stdout)["msg"] == "required env variables [CNI_IFNAME] missing"
    assert done.stderr == b""


@pytest.mark.parametrize("stdin", [b"", b"{", b"x" * 10_000_000, b"[" * 1_000_000, b"\xff\xfe"])
def test_hostile_stdin(stdin: bytes) -> None:
    done = run_module("bridge", stdin=stdin, CNI_COMMAND="STATUS")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 6


def test_closed_stdin_is_like_an_empty_one() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m cni bridge <&-', sys.executable],
        capture_output=True,
        env={**ENVIRONMENT, "CNI_COMMAND": "STATUS"},
        cwd=REPOSITORY,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 6


def test_a_delivered_add_stays(tmp_path: Path) -> None:
    with start_fake(tmp_path) as process:
        stdout, stderr = process.communicate(CONF, 120)
    assert (process.returncode, stderr) == (0, b"")
    assert json.loads(stdout)["ips"] == [{"address": "10.0.0.5/24"}]
    assert left(tmp_path) == {"mark"}


def test_an_add_whose_reader_is_gone_is_undone(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with start_fake(tmp_path, stdout=writer) as process:
            _, stderr = process.communicate(CONF, 120)
    finally:
        os.close(writer)
    assert process.returncode == 1
    assert b"could not be delivered" in stderr
    assert left(tmp_path) == set()


def test_an_add_without_standard_output_is_undone(tmp_path: Path) -> None:
    # Closed before Python starts, so that the first descriptor that is opened would become number 1.
    (tmp_path / "fake.py").write_text(FAKE + "sys.exit(main('bridge'))")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" fake.py >&-', sys.executable],
        input=CONF,
        stderr=subprocess.PIPE,
        env=fake_environment(tmp_path),
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert b"could not be delivered" in done.stderr
    assert left(tmp_path) - {"fake.py", "__pycache__"} == set()


def test_a_full_standard_output_undoes_the_add(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full, start_fake(tmp_path, stdout=full) as process:
        _, stderr = process.communicate(CONF, 120)
    assert process.returncode == 1
    assert b"No space left" in stderr
    assert left(tmp_path) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_undoes_the_add(tmp_path: Path, number: signal.Signals) -> None:
    with start_fake(tmp_path, block=True) as process:
        try:
            assert process.stdin is not None
            assert process.stderr is not None
            assert process.stdout is not None
            process.stdin.write(CONF)
            process.stdin.close()
            assert process.stderr.readline() == b"blocked\n"
            assert left(tmp_path) == {"mark", "c1@eth0"}
            process.send_signal(number)
            document = json.loads(process.stdout.read())
            assert process.wait(120) == 1
        finally:
            process.kill()
    assert (document["code"], document["msg"]) == (999, f"interrupted by a signal: {number.name}")
    assert left(tmp_path) == set()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    ending = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
status = main('bridge')
sys.exit(status if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else 9)
"""
    with start_fake(tmp_path, ending) as process:
        process.communicate(CONF, 120)
    assert process.returncode == 0


def test_a_cold_start_imports_nothing_heavy() -> None:
    code = "import sys, cni.__main__; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True, timeout=120
    )
    heavy = {"grpc", "google", "asyncio", "logging", "ctypes", "subprocess", "json", "ipaddress", "traceback", "ssl"}
    assert {name.partition(".")[0] for name in done.stdout.split()} & heavy == set()
