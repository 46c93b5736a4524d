"""The way to ipamd: which socket, and what is said when nobody answers."""

import os
import signal
import socket
from pathlib import Path

import pytest

from cli.daemon import connected, socket_path
from cli.failure import Failure, Status
from tests.cli.conftest import Ipamd, Netloom


def test_which_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "netloom.toml"
    environment = {"NETLOOM_CONFIG": str(config), "NETLOOM_RUN_DIR": "/r", "NETLOOM_IPAMD_SOCKET": "/e.sock"}
    assert socket_path("f.sock", environment) == f"{tmp_path}/f.sock"
    assert socket_path(None, environment) == "/e.sock"
    config.write_text("[ipamd]\nsocket = '/c.sock'\n")
    assert socket_path(None, environment) == "/c.sock"
    for useless in ("[ipamd]\nsocket = 3\n", "ipamd = 3\n", "[ipamd", "\udcff", "[ipamd]\nsocket = 'relative'\n"):
        config.write_text(useless, errors="surrogateescape")
        assert socket_path(None, environment) == "/e.sock"
    with pytest.raises(Failure, match="NETLOOM_RUN_DIR") as caught:
        socket_path(None, {"NETLOOM_CONFIG": str(config), "NETLOOM_RUN_DIR": "r"})
    assert caught.value.status == Status.USAGE


def _refusal(path: str) -> str:
    with pytest.raises(Failure) as caught, connected(path, 1.0):
        pass
    assert caught.value.status == Status.UNREACHABLE
    return caught.value.message


def test_nothing_nobody_no_permission(tmp_path: Path) -> None:
    assert "there is no socket" in _refusal(f"{tmp_path}/no/ipamd.sock")
    assert "there is no socket" in _refusal(f"{tmp_path}/ipamd.sock")
    (tmp_path / "file").touch()
    assert "there is no socket" in _refusal(f"{tmp_path}/file/ipamd.sock")
    assert "nobody listens" in _refusal(f"{tmp_path}/file")
    assert "\x1b" not in _refusal(f"{tmp_path}/\x1b[2J")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to stop being root")
def test_a_socket_that_may_not_be_opened() -> None:
    path = f"/tmp/netloom-test-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            listener.listen()
            os.chmod(path, 0o600)
            os.seteuid(65534)
            try:
                assert "join the group" in _refusal(path)
            finally:
                os.seteuid(0)
        finally:
            os.unlink(path)


def test_a_daemon_that_does_not_answer(ipamd: Ipamd, scratch: Path) -> None:
    ipamd.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Failure) as caught, connected(f"{scratch}/ipamd.sock", 0.5) as stopped:
            stopped.status()
        assert caught.value.status == Status.UNREACHABLE
        assert "did not answer within 0.5 s" in caught.value.message
    finally:
        ipamd.process.send_signal(signal.SIGCONT)


def test_a_socket_that_was_left_behind(scratch: Path, netloom: Netloom) -> None:
    directory = os.open(scratch, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory}/ipamd.sock")
        os.close(directory)
    ran = netloom("status")
    assert (ran.status, ran.out) == (3, "")
    assert "nobody listens" in ran.err
