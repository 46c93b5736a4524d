"""The ends of the benchmark's TCP connections, on this machine's loopback; the port is taken from the system."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from bench import flow


@pytest.fixture
def port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=flow.serve, args=(listener,), daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("do", ["stream", "trips", "connect"])
def test_each_has_a_rate(port: int, do: str) -> None:
    assert flow.answer({"do": do, "to": "127.0.0.1", "seconds": 0.01, "port": port})["rate"] > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_counts_what_arrived(port: int) -> None:
    with flow.connected("127.0.0.1", port, b"S") as connection:
        connection.sendall(bytes(12345))
        connection.shutdown(socket.SHUT_WR)
        assert int.from_bytes(connection.recv(8), "big") == 12345


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    answer = flow.answer({"do": "connect", "to": "127.0.0.1", "seconds": 0.01, "port": free})
    assert "refused" in answer["error"]


def test_it_listens_before_it_answers() -> None:
    assert flow.answer({"do": "listen"}) == {"rate": 0.0}
