"""The launcher against workers that are missing, hostile, slow, old or lost. No root, no namespaces."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import wire
from tests.warm.launch import Bench, Launched, Server, Taken, accepted, done, response, take


def answering(stdout: bytes = b"out", stderr: bytes = b"", status: int = 0) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted())
        connection.sendall(response(stdout, stderr, status))
        assert done(connection)

    return talk


# What comes back


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_answer_is_printed_byte_for_byte(bench: Bench, status: int) -> None:
    stdout = bytes(range(256)) * 3000  # more than a pipe holds
    with Server(bench.socket, answering(stdout, b"\x00err\xff", status)):
        assert bench.run() == Launched(status, stdout, b"\x00err\xff", "")


def test_the_request_is_what_a_process_would_see(bench: Bench, tmp_path: Path) -> None:
    there = tmp_path / "somewhere"
    there.mkdir()
    netns = tmp_path / "netns"
    netns.touch()
    seen: list[tuple[Taken, str, tuple[int, int]]] = []

    def talk(connection: socket.socket) -> None:
        taken = take(connection)
        status = os.fstat(taken.descriptors[1])
        seen.append((taken, os.readlink(f"/proc/self/fd/{taken.descriptors[0]}"), (status.st_dev, status.st_ino)))
        taken.close()
        connection.sendall(accepted() + response(b"x"))
        assert done(connection)

    environment = bench.environment(CNI_NETNS=str(netns), RAW="\udcff=", EMPTY="")
    with Server(bench.socket, talk):
        launched = bench.run(environment, b'{"a": 1}\0', cwd=there, umask=0o027)
    assert launched.stdout == b"x"
    request = seen[0][0].request
    assert (request.program, request.umask, request.stdin) == ("bridge", 0o027, b'{"a": 1}\0')
    assert request.environment == environment
    assert seen[0][1] == str(there)
    assert seen[0][2] == (netns.stat().st_dev, netns.stat().st_ino)
    paths = ("/proc/self/ns/net", "/proc/self/ns/mnt", "/proc/self/ns/user", "/")
    own = tuple(number for path in paths for number in (os.stat(path).st_dev, os.stat(path).st_ino))
    assert request.places == own


def test_a_netns_that_is_not_there_comes_without_a_descriptor(bench: Bench) -> None:
    seen: list[int] = []

    def talk(connection: socket.socket) -> None:
        taken = take(connection)
        seen.append(taken.request.descriptors)
        assert len(taken.descriptors) == 1
        taken.close()
        connection.sendall(accepted() + response())
        assert done(connection)

    with Server(bench.socket, talk):
        assert bench.run(bench.environment(CNI_NETNS="/nonexistent")).status == 0
    assert seen == [wire.DESCRIPTOR_CWD]


def test_a_fifo_as_netns_does_not_hang(bench: Bench, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Server(bench.socket, answering()):
        assert bench.run(bench.environment(CNI_NETNS=str(tmp_path / "fifo"))).stdout == b"out"


def test_a_deep_socket_path_is_reached(bench: Bench, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with Server(deep / "cni.sock", answering()):
        assert bench.run(bench.environment(NETLOOM_CNI_SOCKET=str(deep / "cni.sock"))).stdout == b"out"


def test_the_socket_is_in_the_run_directory_unless_told(bench: Bench) -> None:
    environment = bench.environment(NETLOOM_RUN_DIR=str(bench.directory))
    del environment["NETLOOM_CNI_SOCKET"]
    with Server(bench.socket, answering()):
        assert bench.run(environment).stdout == b"out"


# The cold way


def cold_cases() -> dict[str, Callable[[socket.socket], None]]:
    def refuse(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(wire.frame(wire.KIND_REFUSED, [(wire.TAG_REASON, b"no")]))

    def leave(connection: socket.socket) -> None:
        take(connection).close()

    def leave_unread(connection: socket.socket) -> None:
        connection.sendall(b"")  # closing with unread data is a reset

    def garbage(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def other_version(connection: socket.socket) -> None:
        take(connection).close()
        newer = struct.pack("=IHHII", wire.MAGIC, wire.VERSION + 2, wire.VERSION + 1, wire.KIND_ACCEPTED, 0)
        connection.sendall(newer)

    def half(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted()[:11])

    def unasked(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(response(b"too early"))

    def too_long(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(
            struct.pack("=IHHII", wire.MAGIC, wire.VERSION, wire.OLDEST, wire.KIND_ACCEPTED, wire.FRAME_LIMIT + 1)
        )

    return {
        "refused": refuse,
        "closed": leave,
        "reset": leave_unread,
        "garbage": garbage,
        "another version": other_version,
        "half of ACCEPTED": half,
        "an answer without ACCEPTED": unasked,
        "a frame over the limit": too_long,
    }


@pytest.mark.parametrize("case", list(cold_cases()))
def test_whatever_happens_before_accepted_leads_to_the_cold_way(bench: Bench, case: str) -> None:
    with Server(bench.socket, cold_cases()[case]):
        bench.run().went_cold()


def test_without_a_socket(bench: Bench) -> None:
    bench.run().went_cold()


def test_with_a_socket_that_nobody_listens_on(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(bench.socket))
    bench.run().went_cold()


def test_with_a_path_too_long_for_anybody(bench: Bench) -> None:
    bench.run(bench.environment(NETLOOM_CNI_SOCKET="/" + "x" * 200)).went_cold()
    bench.run(bench.environment(NETLOOM_CNI_SOCKET="/" + "x/" * 3000)).went_cold()


def test_with_a_full_queue_it_does_not_wait(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(bench.socket))
        listener.listen(0)
        first.connect(str(bench.socket))
        bench.run().went_cold()  # would wait for 30 s otherwise, in which the pytest limit is not meant to pass


def test_with_a_socket_where_nobody_accepts(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(bench.socket))
        listener.listen(16)
        bench.run(bench.environment(NETLOOM_CNI_WAIT_MS="50")).went_cold()
        # A request that does not fit into the socket's buffer waits for a reader no longer than that.
        bench.run(bench.environment(NETLOOM_CNI_WAIT_MS="50"), stdin=b" " * (1 << 20)).went_cold()


def test_with_arguments(bench: Bench) -> None:
    with Server(bench.socket, answering()):
        launched = bench.run(argv=["--help"])
    launched.went_cold()
    assert "arg --help\n" in launched.cold


def test_an_environment_beyond_the_frame_goes_cold(bench: Bench) -> None:
    more = {f"V{i}": "x" * 100_000 for i in range(22)}
    with Server(bench.socket, answering()):
        # A quarter of it is what an environment may take (execve(2)).
        process = bench.start(bench.environment(**more), preexec_fn=_with_a_large_stack)
        bench.finish(process).went_cold()


def _with_a_large_stack() -> None:
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 26, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def test_the_cold_program_gets_the_same_environment_input_and_name(bench: Bench) -> None:
    stdin = b'{"long": "' + b"x" * 300_000 + b'"}'
    launched = bench.run(bench.environment("DEL", CNI_ARGS="A=B;C"), stdin)
    launched.went_cold()
    lines = launched.cold.splitlines()
    assert lines[0] == str(bench.cold / "bridge")
    assert f"stdin {stdin.decode()}" in lines
    assert {"CNI_COMMAND=DEL", "CNI_ARGS=A=B;C", f"NETLOOM_CNI_SOCKET={bench.socket}"} <= set(lines)


def test_a_bundle_is_executed_under_the_plugins_name(bench: Bench) -> None:
    bundle = bench.directory / "bundle"
    os.symlink("/bin/sh", bundle)
    # A shell that is told nothing reads its script from standard input, and $0 is argv[0].
    launched = bench.run(bench.environment(NETLOOM_CNI_COLD=str(bundle)), b'echo "$0"\n')
    assert launched.stdout.decode().strip() == str(bench.program)


def test_without_a_bundle_the_error_says_what_to_do(bench: Bench) -> None:
    error = bench.run(bench.environment(NETLOOM_CNI_COLD="/nonexistent")).error()
    assert error["code"] == 5
    assert "No such file or directory" in error["details"]
    assert "netloom-cni.service" in error["details"]


# After ACCEPTED


def lost_cases() -> dict[str, bytes]:
    broken = bytearray(response(b"text"))
    broken[wire.HEADER_SIZE + 4] = 200  # a field beyond the frame
    unknown = wire.frame(wire.KIND_RESPONSE, [(999, b"")], required=True)
    return {
        "nothing": b"",
        "half a response": response(b"text")[:-3],
        "garbage": b"\xff" * 100,
        "a broken response": bytes(broken),
        "a response without status": wire.frame(wire.KIND_RESPONSE, [(wire.TAG_STDOUT, b"x")]),
        "a status that is none": response(b"x", status=256),
        "a refusal": wire.frame(wire.KIND_REFUSED),
        "accepted twice": accepted(),
        "a field that must be understood": unknown,
    }


@pytest.mark.parametrize("case", list(lost_cases()))
@pytest.mark.parametrize("verb", ["ADD", "DEL"])
def test_a_worker_lost_after_accepted_is_code_11_and_nothing_runs_cold(bench: Bench, case: str, verb: str) -> None:
    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted())
        connection.sendall(lost_cases()[case])

    with Server(bench.socket, talk):
        error = bench.run(bench.environment(verb), b'{"cniVersion" : "0.4.0"}').error()
    assert error["code"] == 11
    assert error["cniVersion"] == "0.4.0"
    assert "lost" in error["msg"]


def test_a_worker_at_work_is_waited_for_and_learns_when_the_launcher_is_killed(bench: Bench) -> None:
    ready = threading.Event()

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted(0))
        ready.set()
        assert not done(connection)

    with Server(bench.socket, talk):
        process = bench.start()
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert ready.wait(60)
        assert process.poll() is None
        process.terminate()
        assert bench.finish(process, None).status == -15


# DONE


def test_done_comes_after_standard_output_was_written(bench: Bench) -> None:
    said = threading.Event()
    stdout = b"x" * (1 << 20)  # cannot be written before somebody reads

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted() + response(stdout))
        assert done(connection)
        said.set()

    with Server(bench.socket, talk):
        process = bench.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdin = None
        assert not said.wait(0.3)
        assert process.stdout.read() == stdout
        assert said.wait(60)
        assert bench.finish(process, None).status == 0


def test_nobody_reads_standard_output(bench: Bench) -> None:
    heard: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted() + response(b"x"))
        heard.append(done(connection))

    read, write = os.pipe()
    os.close(read)
    with Server(bench.socket, talk):
        process = bench.start(stdout=write)
        os.close(write)
        assert bench.finish(process).status == 1
    assert heard == [False]


@pytest.mark.parametrize(("verb", "status"), [("ADD", 1), ("DEL", 0)])
def test_a_worker_that_does_not_hear_done_makes_an_add_fail(bench: Bench, verb: str, status: int) -> None:
    gone = threading.Event()

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted() + response(b"x" * (1 << 18)))
        connection.close()
        gone.set()

    with Server(bench.socket, talk):
        process = bench.start(bench.environment(verb))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdin = None
        assert gone.wait(60)
        assert len(process.stdout.read()) == 1 << 18
        assert bench.finish(process, None).status == status


# Standard input


def test_more_than_a_mebibyte_is_code_6_and_nobody_is_asked(bench: Bench) -> None:
    with Server(bench.socket, answering()):
        error = bench.run(stdin=b'{"cniVersion":"0.3.1"}' + b" " * (1 << 20)).error()
        assert (error["code"], error["cniVersion"]) == (6, "0.3.1")
        assert bench.run(stdin=b" " * (1 << 20)).stdout == b"out"


@pytest.mark.parametrize("text", [b'"cniVersion"', b'"cniVersion":', b'"cniVersion":"1.0.0', b'"cniVersion":"\\"x"'])
def test_a_version_that_cannot_be_read_is_the_newest(bench: Bench, text: bytes) -> None:
    assert bench.run(stdin=b" " * (1 << 20) + text).error()["cniVersion"] == "1.1.0"


@pytest.mark.parametrize("environment", [{"CNI_COMMAND": "VERSION"}, {"CNI_COMMAND": "FOO"}, {"CNI_COMMAND": ""}])
def test_a_verb_without_input_does_not_wait_for_it(bench: Bench, environment: dict[str, str]) -> None:
    seen: list[bytes | None] = []

    def talk(connection: socket.socket) -> None:
        taken = take(connection)
        seen.append(taken.request.stdin)
        taken.close()
        connection.sendall(accepted() + response(b"v"))
        assert done(connection)

    read, write = os.pipe()
    with Server(bench.socket, talk):
        process = bench.start(bench.environment(**environment), stdin=read)
        assert bench.finish(process, None).stdout == b"v"
    os.close(read)
    os.close(write)
    assert seen == [None]


def test_closed_descriptors_do_not_become_the_socket(bench: Bench) -> None:
    heard: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        connection.sendall(accepted() + response(b"result", b"log"))
        heard.append(done(connection))

    with Server(bench.socket, talk):
        shell = ["sh", "-c", f'exec "{bench.program}" <&- >&- 2>&-']
        assert subprocess.run(shell, env=bench.environment(), check=False, timeout=60).returncode == 1
    assert heard == [False]  # nobody will see the result


# Giving up


def test_a_request_is_never_both_accepted_and_run_cold(bench: Bench) -> None:
    """A worker that accepts in the moment in which the launcher gives up: one of the two happens, never both."""
    chance = random.Random(7)
    wait_ms = 12
    outcomes = {"warm": 0, "cold": 0, "lost": 0}
    started: list[bool] = []

    def talk(connection: socket.socket) -> None:
        take(connection).close()
        time.sleep(max(0.0, chance.gauss(wait_ms, 1.5) / 1000))
        try:
            connection.send(accepted(), socket.MSG_NOSIGNAL)
        except OSError:
            started.append(False)
            return
        started.append(True)
        try:
            connection.send(response(b"warm"), socket.MSG_NOSIGNAL)
            done(connection)
        except OSError:
            pass  # it had given up: code 11 over there, and a worker would undo

    environment = bench.environment(NETLOOM_CNI_WAIT_MS=str(wait_ms))
    with Server(bench.socket, talk):
        for turn in range(150):
            launched = bench.run(environment)
            deadline = time.monotonic() + 60
            while len(started) <= turn and time.monotonic() < deadline:
                time.sleep(0.001)
            if launched.cold:
                launched.went_cold()
                assert not started[turn], "ran cold although a worker had started"
                outcomes["cold"] += 1
            elif launched.stdout == b"warm":
                assert started[turn]
                outcomes["warm"] += 1
            else:
                assert launched.error()["code"] == 11
                assert started[turn]
                outcomes["lost"] += 1
    assert outcomes["cold"], outcomes


# Built


def test_a_hundred_thousand_hostile_answers_do_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-s", "fuzz-launcher", "FUZZ_INPUTS=100000", f"FUZZER={tmp_path}/fuzzer"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
