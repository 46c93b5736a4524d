"""The shim in the launcher's place: the same request, and the same promises to the worker."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import wire
from libnetwork import handoff
from libnetwork.chain import Chain
from libnetwork.errors import DriverError
from libnetwork.handoff import LostError
from tests.libnetwork.conftest import Plugins
from tests.warm.conftest import launcher
from tests.warm.launch import Bench, Server, Taken, accepted, done, response, take

__all__ = ["launcher"]

STDIN = b'{"cniVersion": "1.0.0"}'


@pytest.fixture
def bench(tmp_path: Path, launcher: Path) -> Bench:
    return Bench(tmp_path, launcher)


def ask(bench: Bench, stdin: bytes = STDIN, **environment: str) -> wire.Response | None:
    asked = handoff.ask("bridge", {**bench.environment(), **environment}, stdin)
    if asked is None:
        return None
    try:
        return asked.answer()
    finally:
        asked.close()


def saying(*frames: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        take(connection).close()
        for frame in frames:
            connection.sendall(frame)

    return talk


def confirmed(connection: socket.socket, data: bytes) -> bool:
    """Whether who asked took this for an answer."""
    try:
        connection.sendall(data, socket.MSG_NOSIGNAL)
        return done(connection)
    except BrokenPipeError:
        return False


def test_it_asks_what_the_launcher_asks(bench: Bench, tmp_path: Path) -> None:
    seen: list[tuple[wire.Request, list[str], bool]] = []

    def talk(connection: socket.socket) -> None:
        taken: Taken = take(connection)
        where = [os.readlink(f"/proc/self/fd/{fd}") for fd in taken.descriptors]
        taken.close()
        connection.sendall(accepted() + response(b"out", b"err", 3))
        seen.append((taken.request, where, done(connection)))

    netns = tmp_path / "netns"
    netns.write_text("")
    with Server(bench.socket, talk):
        environment = bench.environment(CNI_NETNS=str(netns), EMPTY="", RAW=os.fsdecode(b"\xff"))
        launched = bench.run(environment, STDIN)
        answer = ask(bench, CNI_NETNS=str(netns), EMPTY="", RAW=os.fsdecode(b"\xff"))
    assert answer == wire.Response(launched.stdout, launched.stderr, launched.status)
    assert seen[0] == seen[1]
    assert seen[1][1:] == ([os.getcwd(), str(netns)], True)


@pytest.mark.parametrize(
    "frames",
    [
        (),
        (wire.frame(wire.KIND_REFUSED, [(wire.TAG_REASON, b"no")]),),
        (b"no frame at all, and longer than a header",),
        (accepted()[:-1],),
        (response(b"out"),),
    ],
)
def test_who_is_not_accepted_is_told(bench: Bench, frames: tuple[bytes, ...]) -> None:
    with Server(bench.socket, saying(*frames)):
        assert ask(bench) is None


def test_nobody_there(bench: Bench) -> None:
    assert ask(bench) is None
    bench.socket.write_text("a file")
    assert ask(bench) is None


def test_what_is_too_long_is_the_launchers(bench: Bench) -> None:
    with Server(bench.socket, saying(accepted())):
        assert ask(bench, b" " * (wire.STDIN_LIMIT + 1)) is None
        assert ask(bench, LONG="x" * wire.FRAME_LIMIT) is None


def test_who_does_not_accept_in_time_cannot_start_later(bench: Bench) -> None:
    failed: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.recv(1)  # until it has given up
        try:
            failed.append(connection.send(accepted(), socket.MSG_NOSIGNAL) == 0)
        except OSError:
            failed.append(True)

    with Server(bench.socket, talk):
        assert ask(bench, NETLOOM_CNI_WAIT_MS="50") is None
    assert failed == [True]


def test_what_was_said_before_it_gave_up_counts(bench: Bench) -> None:
    """Who asked does other work before it looks: longer than a worker may take to accept."""
    heard: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        heard.append(confirmed(connection, accepted() + response(b"out")))

    with Server(bench.socket, talk):
        asked = handoff.ask("bridge", {**bench.environment(), "NETLOOM_CNI_WAIT_MS": "1"}, STDIN)
        assert asked is not None
        asked._connection.setblocking(True)
        asked._connection.recv(1, socket.MSG_PEEK)
        asked._until = 0
        answer = asked.answer()
        asked.close()
    assert answer == wire.Response(b"out", b"", 0)
    assert heard == [True]


@pytest.mark.parametrize(
    "frames",
    [
        (),
        (response(b"x" * 100)[:-1],),
        (accepted(),),
        (wire.frame(wire.KIND_RESPONSE, [(wire.TAG_STDOUT, b"no status")]),),
        (wire.frame(wire.KIND_RESPONSE, [(wire.TAG_STATUS, wire.u32(256))]),),
        (wire.frame(wire.KIND_RESPONSE, [(999, b"")], required=True),),
    ],
)
def test_a_worker_that_is_lost_is_an_error_and_no_second_attempt(bench: Bench, frames: tuple[bytes, ...]) -> None:
    with Server(bench.socket, saying(accepted(), *frames)), pytest.raises(LostError, match=r"was lost; the log of"):
        ask(bench)


def test_an_answer_that_nobody_waits_for_is_not_confirmed(bench: Bench) -> None:
    heard: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        heard.append(confirmed(connection, accepted() + response(b"out")))

    with Server(bench.socket, talk):
        asked = handoff.ask("bridge", bench.environment(), STDIN)
        assert asked is not None
        asked.close()
    assert heard == [False]


def test_which_files_are_launchers(bench: Bench, tmp_path: Path) -> None:
    assert handoff.is_launcher(str(bench.program))
    link = tmp_path / "link"
    link.symlink_to(bench.program)
    assert handoff.is_launcher(str(link))
    stripped = tmp_path / "stripped"
    shutil.copy(bench.program, stripped)
    subprocess.run(["strip", stripped], check=True)
    assert handoff.is_launcher(str(stripped))
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n# not netloom-cni.service\n")
    for other in ("/bin/sh", str(script), str(tmp_path / "nothing"), str(tmp_path)):
        assert not handoff.is_launcher(other), other
    # Another file in its place.
    shutil.copy("/bin/true", tmp_path / "new")
    os.rename(tmp_path / "new", bench.program)
    assert not handoff.is_launcher(str(bench.program))


# A network's plugins


def served(plugins: Plugins, launcher: Path, *types: str) -> Chain:
    """Launchers under these names, the other plugins as they are."""
    for name in types:
        shutil.copy(launcher, plugins.directory / name)
    return Chain("web", ({"type": "bridge"}, {"type": "firewall"}), (str(plugins.directory),))


def test_a_chain_asks_workers_and_executes_the_others(
    plugins: Plugins,
    bench: Bench,
    launcher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[wire.Request] = []

    def talk(connection: socket.socket) -> None:
        taken = take(connection)
        taken.close()
        asked.append(taken.request)
        connection.sendall(accepted() + response(b'{"by": "a worker"}'))
        assert done(connection)

    monkeypatch.setenv("NETLOOM_CNI_SOCKET", str(bench.socket))
    with Server(bench.socket, talk):
        assert served(plugins, launcher, "bridge").add("c1", "", "eth0", {})["by"] == "firewall"
    assert plugins.calls() == ["ADD firewall"]
    assert plugins.conf(0)["prevResult"] == {"by": "a worker"}
    assert [(one.program, one.environment["CNI_COMMAND"]) for one in asked] == [("bridge", "ADD")]


def test_what_is_done_meanwhile_is_done_beside_the_second_plugin(
    plugins: Plugins,
    bench: Bench,
    launcher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And where it fails, the second plugin's answer is not confirmed, and all is taken back."""
    said: list[tuple[str, str, bool]] = []

    def talk(connection: socket.socket) -> None:
        taken = take(connection)
        taken.close()
        heard = confirmed(connection, accepted() + response(b"{}"))
        said.append((taken.request.program, taken.request.environment["CNI_COMMAND"], heard))

    def fails() -> None:
        raise DriverError("no way")

    monkeypatch.setenv("NETLOOM_CNI_SOCKET", str(bench.socket))
    chain = served(plugins, launcher, "bridge", "firewall")
    with Server(bench.socket, talk):
        confirmed_before: list[bool] = []
        chain.add("c1", "", "eth0", {}, meanwhile=lambda: confirmed_before.append(("firewall", "ADD", True) in said))
        assert confirmed_before == [False]
        with pytest.raises(DriverError, match="no way"):
            chain.add("c1", "", "eth0", {}, meanwhile=fails)
    add = [("bridge", "ADD", True), ("firewall", "ADD", True)]
    undone = [("bridge", "ADD", True), ("firewall", "ADD", False), ("firewall", "DEL", True), ("bridge", "DEL", True)]
    assert said == add + undone
