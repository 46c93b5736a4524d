"""Start, stop, socket and lock of a real process."""

import asyncio
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from ipamd import server
from ipamd.client import Client, IpamError
from ipamd.config import load
from ipamd.listen import SocketPlace
from protos.ipam.v1 import ipam_pb2 as pb
from tests.ipamd.daemon import ROOT, WAIT_S, Daemon, cidrs, key, now, own, wait_for
from tests.ipamd.test_reclaim import RECORD


def test_a_clean_stop_and_a_new_start(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        first = client.allocate(key("a"), network_pool=own("10.1.0.0/24"))
        assert daemon.stop() == 0
        assert not os.path.exists(daemon.socket)
        assert os.listdir(os.path.dirname(daemon.socket)) == ["releases"]
        with pytest.raises(IpamError) as caught:
            client.status()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert "is it running?" in caught.value.message
        daemon.start()
        # The same client object finds the new daemon at once, by its one repetition.
        again = client.allocate(key("a"), network_pool=own("10.1.0.0/24"))
        assert (again.created, cidrs(again), again.generation) == (False, cidrs(first), first.generation)


def test_connections_that_stay_open_do_not_hold_up_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker keeps its connection for the next request, and does not look at it before."""
    monkeypatch.setattr(server, "_DRAIN_S", 1e6)
    path = tmp_path / "ipamd.sock"
    file = tmp_path / "netloom.toml"
    file.write_text(f'[ipamd]\nnode = "n"\nsocket = "{path}"\n[store]\nkind = "memory"\n')
    environment = {"NETLOOM_RUN_DIR": str(tmp_path / "run")}

    async def allocate_and_stop() -> None:
        stop = asyncio.Event()
        serving = asyncio.create_task(server.serve(load(str(file), {}, environment), stop, version="0"))
        with Client(str(path), timeout_s=WAIT_S) as client:
            while not path.exists():
                assert not serving.done()
                await asyncio.sleep(0.01)
            answer = await asyncio.to_thread(client.allocate, key("a"), network_pool=own("10.1.0.0/24"))
            assert cidrs(answer) == ["10.1.0.2/24"]
            stop.set()
            await asyncio.wait_for(serving, WAIT_S)

    asyncio.run(allocate_and_stop())


def test_a_client_survives_a_restart_between_two_calls(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        for _ in range(3):
            assert client.status().node == "host"
            daemon.kill()
            daemon.start()


def test_stop_answers_what_was_taken(tmp_path: Path) -> None:
    """Whoever got an answer has it durably, whoever did not was told; and the status is 0."""
    answered: dict[str, list[str]] = {}
    refused: list[grpc.StatusCode] = []

    def work(daemon: Daemon, name: str) -> None:
        with daemon.client() as client:
            for number in range(100_000):
                try:
                    answer = client.allocate(key(f"{name}-{number}"), network_pool=own("10.0.0.0/8"))
                except IpamError as error:
                    refused.append(error.code)
                    return
                answered[f"{name}-{number}"] = cidrs(answer)

    with Daemon(tmp_path) as daemon:
        threads = [threading.Thread(target=work, args=(daemon, f"w{n}")) for n in range(4)]
        for thread in threads:
            thread.start()
        wait_for("some answers", lambda: len(answered) > 100)
        status = daemon.stop()
        for thread in threads:
            thread.join(WAIT_S)
        assert status == 0
        assert refused == [grpc.StatusCode.UNAVAILABLE] * 4
        daemon.start()
        with daemon.client() as client:
            found = {a.key.container_id: cidrs(a) for a in client.list_allocations()}
        assert answered == {name: found.get(name) for name in answered}
        assert len(found) <= len(answered) + 4


def test_a_second_daemon_on_the_same_database(tmp_path: Path) -> None:
    with Daemon(tmp_path / "one") as first:
        second = Daemon(tmp_path / "two", store=first.database)
        assert second.spawn().wait(WAIT_S) == 1
        assert first.process is not None
        assert f"another ipamd (process {first.process.pid}) uses this database" in second.log.read_text()
        with first.client() as client:
            assert client.status().node == "host"


def test_a_second_daemon_on_the_same_socket(tmp_path: Path) -> None:
    with Daemon(tmp_path) as first:
        second = Daemon(tmp_path / "two")
        second.config.write_text(second.config.read_text().replace(second.socket, first.socket))
        assert second.spawn().wait(WAIT_S) == 1
        assert "another ipamd listens there" in second.log.read_text()
        with first.client() as client:
            assert client.status().node == "host"


def test_what_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        daemon.kill()
        assert os.path.exists(daemon.socket)
        inode = os.stat(daemon.socket).st_ino
        process = daemon.process = daemon.spawn()
        wait_for("another socket", lambda: process.poll() is None and os.stat(daemon.socket).st_ino != inode)
        with daemon.client() as client:
            assert client.status().node == "host"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    os.makedirs(os.path.dirname(daemon.socket))
    Path(daemon.socket).write_text("precious")
    assert daemon.spawn().wait(WAIT_S) == 1
    assert "no socket" in daemon.log.read_text()
    assert Path(daemon.socket).read_text() == "precious"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_deep_paths_and_any_umask(tmp_path: Path, umask: int) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60) / "with spaces"
    prefix = (sys.executable, "-c", f"import os, sys; os.umask({umask}); os.execv(sys.argv[1], sys.argv[1:])")
    with Daemon(deep, prefix=prefix) as daemon, daemon.client() as client:
        assert len(daemon.socket) > 107
        assert cidrs(client.allocate(key("a"), network_pool=own("10.1.0.0/24"))) == ["10.1.0.2/24"]
        assert stat.S_IMODE(os.stat(daemon.socket).st_mode) == 0o660
        assert stat.S_IMODE(os.stat(os.path.dirname(daemon.socket)).st_mode) == 0o755
        assert stat.S_IMODE(os.stat(daemon.database).st_mode) == 0o600
        assert daemon.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_owner_group_and_mode(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    text = 'node = "host"\nsocket_owner = "1234"\nsocket_group = "4321"\nsocket_mode = "0600"'
    daemon.config.write_text(daemon.config.read_text().replace('node = "host"', text))
    with daemon:
        status = os.stat(daemon.socket)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o600)


def test_the_socket_is_never_there_with_other_rights(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    old = os.umask(0)
    try:
        with SocketPlace(path) as place, socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.address)
            assert not os.path.exists(path)
            (private,) = os.listdir(tmp_path)
            assert stat.S_IMODE(os.stat(tmp_path / private).st_mode) == 0o700
            place.publish(0o660, None, None)
            assert os.listdir(tmp_path) == ["s.sock"]
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    finally:
        os.umask(old)
    assert os.listdir(tmp_path) == []


def test_another_daemons_socket_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with SocketPlace(path) as place, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(place.address)
        place.publish(0o660, None, None)
        os.unlink(path)
        Path(path).write_text("another")
    assert Path(path).read_text() == "another"


def test_a_wrong_configuration_stops_the_start(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "[pools]\ncooldown_s = -1\n")
    assert daemon.spawn().wait(WAIT_S) == 1
    text = daemon.log.read_text()
    assert f"{daemon.config}:10: pools.cooldown_s" in text
    assert not os.path.exists(daemon.database)


def test_check_only_validates(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    command = [sys.executable, "-m", "ipamd", "--config", str(daemon.config), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (result.returncode, result.stdout) == (0, "the configuration is valid\n")
    assert not os.path.exists(daemon.database)


def test_records_are_replayed_before_the_first_request_and_later(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        directory = Path(daemon.socket).parent / "releases"

        def write(name: str, container: str) -> None:
            at = now()
            temporary = directory / f"{name}.tmp"
            temporary.write_text(RECORD % ("", container, 0, at.boot_id, at.boottime_ns))
            temporary.rename(directory / f"{name}.json")

        with daemon.client() as client:
            for name in ("a", "b"):
                client.allocate(key(name), network_pool=own("10.1.0.0/24"))
        daemon.kill()
        write("1", "a")
        daemon.start()
        assert list(directory.iterdir()) == []
        with daemon.client() as client:
            assert [a.key.container_id for a in client.list_allocations()] == ["b"]
            write("2", "b")
            wait_for("the second record", lambda: not list(directory.iterdir()))
            assert list(client.list_allocations()) == []


def test_the_nodes_name_may_change(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        with daemon.client() as client:
            client.allocate(key("a"), network_pool=own("10.1.0.0/24"))
        assert daemon.stop() == 0
        daemon.config.write_text(daemon.config.read_text().replace('node = "host"', 'node = "renamed"'))
        daemon.start()
        with daemon.client() as client:
            assert [a.key.node for a in client.list_allocations()] == ["renamed"]
            assert client.release(key("a")).released


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE taken SET ip = 'nonsense'",
        "UPDATE pool SET spec = '{'",
        """UPDATE pool SET spec = '{"range_sets": []}'""",
        "DROP TABLE freed",
    ],
)
def test_rows_that_cannot_be_read_stop_the_start(tmp_path: Path, damage: str) -> None:
    with Daemon(tmp_path) as daemon:
        with daemon.client() as client:
            client.allocate(key("a"), network_pool=own("10.1.0.0/24"))
        assert daemon.stop() == 0
        with sqlite3.connect(daemon.database) as db:
            db.execute(damage)
        db.close()
        assert daemon.spawn().wait(WAIT_S) == 1
        assert "restore a copy" in daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()


def test_memory_store(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.config.write_text(daemon.config.read_text().replace("[store]", '[store]\nkind = "memory"'))
    with daemon, daemon.client() as client:
        assert client.status().store == "memory"
        assert cidrs(client.allocate(key("a"), network_pool=own("10.1.0.0/24"))) == ["10.1.0.2/24"]
        assert not os.path.exists(daemon.database)


def test_sigint_stops_too(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(WAIT_S) == 0


def test_importing_the_client_stays_small() -> None:
    code = (
        "import sys, ipamd.client; heavy = {'sqlite3', 'prometheus_client', 'msgspec', 'ipamd.lease',"
        " 'protos.ipam.v1.ipam_pb2_grpc', 'grpc'}; print(*(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert result.stdout.split() == []


def test_nobody_there(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/absent.sock", f"{tmp_path}/{'d' * 100}/absent.sock"):
        with Client(path, timeout_s=WAIT_S) as client, pytest.raises(IpamError) as caught:
            client.allocate(key("a"), network_pool=pb.NetworkPool())
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert path in caught.value.message
