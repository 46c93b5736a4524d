"""The master: forks clean, replaces the dead, drains, is upgraded and restarted under load without a failed request."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.hosts import ROOT, Host, wait_until
from tests.warm.service import SOCKET, Service, bridge
from warm.host import Master, Options, one_more_helps

CLIENTS = 32
RESULT = """echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.7.0.5/24"}]}'"""
CLEAN = """
import os
from warm import host
def count():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
before = count()
host.preload()
print(before == count(), count()[1])
"""

kernel = pytest.mark.kernel


def test_after_all_imports_there_is_one_task_and_no_descriptor_more() -> None:
    done = subprocess.run([sys.executable, "-c", CLEAN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"]


@pytest.mark.parametrize(
    "arguments", [["--workers", "0"], ["--workers", "5", "--max-workers", "4"], ["--deadline", "0"]]
)
def test_options_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    argv = [sys.executable, "-m", "warm", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "wanted" in done.stderr


@pytest.fixture
def service(host: Host, launcher: Path) -> Iterator[Service]:
    one = Service(host, launcher, ["--workers", "3", "--max-workers", "12"])
    directory = host.path("/run/foreign")
    directory.mkdir()
    script = f'#!/bin/sh\necho "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> /run/calls\n{RESULT}\n'
    (directory / "counted").write_text(script, encoding="ascii")
    (directory / "waiting").write_text(
        f"#!/bin/sh\ntouch /run/waits\nwhile [ -e /run/waits ]; do sleep 0.02; done\n{RESULT}\n", encoding="ascii"
    )
    for name in ("counted", "waiting"):
        (directory / name).chmod(0o755)
    yield one
    if one.process is not None and one.process.poll() is None:
        assert one.stop() == 0


def replaced(service: Service, victims: set[int]) -> bool:
    workers = set(service.workers())
    return len(workers) >= 3 and not victims & workers


def replaced_some(service: Service, before: set[int]) -> bool:
    return len(before & set(service.workers())) < len(before)


def network(ipam: str) -> dict[str, object]:
    return bridge(ipam={"type": ipam}, isDefaultGateway=False, ipMasq=False)


@kernel
def test_more_workers_only_where_processors_are_left_or_requests_hang() -> None:
    second = 10**9
    now, just, long_ago = 50.0, 50 * second - 1, 49 * second
    assert not one_more_helps([just, 0], now, useful=4)  # one is idle
    assert one_more_helps([just, just], now, useful=4)
    assert not one_more_helps([just] * 4, now, useful=4)
    assert one_more_helps([just] * 3 + [long_ago], now, useful=4)
    assert not one_more_helps([just] * 4 + [long_ago] * 9, now, useful=4)
    assert one_more_helps([long_ago] * 9, now, useful=1)


def test_a_killed_worker_is_replaced(service: Service) -> None:
    service.start()
    wait_until(lambda: len(service.workers()) == 3, "three workers")
    for _ in range(3):
        victim = service.workers()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(partial(replaced, service, {victim}), "another worker")
        service.call("VERSION", {}).ok()
    assert service.cold() == []


@kernel
def test_workers_that_die_at_once_are_not_forked_without_a_pause(host: Host, launcher: Path) -> None:
    service = Service(host, launcher, ["--workers", "2"], module="tests.warm.dying")
    log = host.directory / "dying.log"
    with log.open("w", encoding="utf-8") as file:
        process = host.popen([sys.executable, "-m", "tests.warm.dying"], stdout=file, stderr=file)
    wait_until(lambda: log.read_text(encoding="utf-8").count("ended: exit status 1") >= 8, "eight dead workers")
    pauses = [float(number) for number in re.findall(r"pause (\d+\.\d{6})\n", log.read_text(encoding="utf-8"))]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]
    service.call("VERSION", {}, env={"NETLOOM_CNI_WAIT_MS": "100"}).ok()
    assert service.cold() == ["bridge VERSION"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@kernel
def test_sigterm_lets_requests_in_hand_finish(service: Service) -> None:
    service.start()
    c1 = service.host.netns("c1")
    answers: list[int] = []
    request = threading.Thread(
        target=lambda: answers.append(service.call("ADD", network("waiting"), netns=c1, path="/run/foreign").status)
    )
    request.start()
    wait_until(service.host.path("/run/waits").exists, "the request to be in hand")
    service.signal(signal.SIGTERM)
    wait_until(lambda: len(service.workers()) == 1, "the idle workers to end")
    service.host.path("/run/waits").unlink()
    request.join()
    assert answers == [0]
    assert service.process is not None
    assert service.process.wait(60) == 0
    assert c1.addresses()["eth0"] == ["10.7.0.5/24"]
    assert service.cold() == []
    service.call("VERSION", {}).ok()
    assert service.cold() == ["bridge VERSION"]


@kernel
def test_sigterm_just_before_accept_is_not_lost(service: Service, tmp_path: Path) -> None:
    """It interrupts nothing, and Python learns of it when accept(2) returns."""
    library = tmp_path / "late_signal.so"
    source = ROOT / "tests/warm/late_signal.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    service.start({"LD_PRELOAD": str(library), "NETLOOM_TEST_SIGNAL": "/run/signal"})
    signalled = service.host.path("/run/signal")
    for _ in range(3):
        wait_until(lambda: len(service.workers()) == 3, "three workers")
        before = set(service.workers())
        signalled.touch()
        service.call("VERSION", {}).ok()  # whoever serves it goes into accept(2) again
        wait_until(lambda: not signalled.exists(), "the signal")
        wait_until(partial(replaced_some, service, before), "the end of one worker")
    assert service.cold() == []


@kernel
def test_sigterm_that_comes_with_an_upgrade_is_not_lost(service: Service) -> None:
    service.start()
    service.signal(signal.SIGSTOP)
    service.signal(signal.SIGHUP)
    service.signal(signal.SIGTERM)
    service.signal(signal.SIGCONT)
    assert service.process is not None
    assert service.process.wait(60) == 0
    assert "cannot execute" not in service.log()


@kernel
def test_workers_do_not_outlive_a_killed_master(service: Service) -> None:
    service.start()
    workers = service.workers()
    service.signal(signal.SIGKILL)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the end of the workers")
    service.start()  # its socket is in the way, and nobody listens there
    assert service.cold() == []


@kernel
def test_a_worker_whose_master_died_before_it_asked_to_be_told_ends(host: Host) -> None:
    argv = [sys.executable, "-m", "tests.warm.orphaned"]
    assert host.popen(argv).wait(60) == -signal.SIGKILL
    wait_until(lambda: not any("orphaned" in command for command in host.processes().values()), "the worker's end")


@kernel
def test_a_second_master_is_refused(service: Service) -> None:
    service.start()
    done = service.host.run([sys.executable, "-m", "warm"], check=False)
    assert done.returncode == 1
    assert "another master" in done.stderr
    service.call("VERSION", {}).ok()
    assert service.cold() == []


@kernel
def test_an_inherited_socket_is_served_and_ready_is_told(service: Service) -> None:
    host = service.host
    activate = f"""
import os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind({SOCKET!r})
listener.listen(100)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", NOTIFY_SOCKET="/run/notify")
told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
told.bind("/run/notify")
pid = os.fork()
if pid == 0:
    told.settimeout(60)
    print(told.recv(1000).decode().split()[0], flush=True)
    os._exit(0)
os.execv(sys.executable, [sys.executable, "-m", "warm"])
"""
    service.process = host.popen([sys.executable, "-c", activate], stdout=subprocess.PIPE)
    assert service.process.stdout is not None
    assert service.process.stdout.readline() == "READY=1\n", "ended before it was ready"
    service.call("VERSION", {}).ok()
    assert service.cold() == []


class Load:
    """Clients that attach and detach without a pause."""

    def __init__(self, service: Service, rounds: int) -> None:
        self.service = service
        self.rounds = rounds
        self.done = 0
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._client, args=(f"l{i}",)) for i in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()

    def _client(self, name: str) -> None:
        try:
            netns = self.service.host.netns(name)
            for turn in range(self.rounds):
                for verb in ("ADD", "DEL"):
                    call = self.service.call(
                        verb,
                        network("counted"),
                        netns=netns,
                        container_id=name,
                        ifname=f"e{turn}",
                        path="/run/foreign",
                    )
                    call.ok()
                self.done += 1
        except BaseException as error:
            self.failures.append(error)

    def has_done(self, count: int) -> bool:
        return self.done >= count or bool(self.failures)

    def check(self) -> None:
        """No request failed, and none ran twice."""
        assert not self.failures, self.failures[0]
        calls = self.service.host.path("/run/calls").read_text(encoding="ascii").splitlines()
        assert len(calls) == len(set(calls)) == CLIENTS * self.rounds * 2


@kernel
def test_upgrade_under_load(service: Service) -> None:
    service.start()
    pid = service.pid
    with Load(service, 6) as load:
        for turn in range(1, 4):
            wait_until(partial(load.has_done, turn * CLIENTS), "some rounds")
            before = set(service.workers())
            service.signal(signal.SIGHUP)
            wait_until(partial(replaced, service, before), "new workers in the place of the old", service.log)
    load.check()
    assert service.pid == pid
    assert service.process is not None
    assert service.process.poll() is None
    assert service.cold() == []


@kernel
def test_restart_under_load(service: Service) -> None:
    service.start()
    with Load(service, 3) as load:
        for turn in range(1, 3):
            wait_until(partial(load.has_done, turn * CLIENTS // 2), "some rounds")
            assert service.stop() == 0
            assert not service.workers()
            service.start()
    load.check()


def test_two_helpers_do_not_work_side_by_side(tmp_path: Path) -> None:
    """Of different versions they would write their tables in answer to one another."""
    with socket.socket(socket.AF_UNIX) as listener:
        first = Master(Options(str(tmp_path / "s")), listener)
        second = Master(Options(str(tmp_path / "s")), listener, {1})
    wanted = [first._wants_watch, second._wants_watch]
    second._state.announced = True  # a worker is ready: the old ones are told to end
    wanted.append(second._wants_watch)
    second._state.watch = 2
    wanted.append(second._wants_watch)
    assert wanted == [True, False, True, False]
