"""The ends of the benchmark's TCP connections, on this machine's loopback; the port is taken from the system."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from bench import flow


@pytest.fixture
def port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener's end
            flow.serve(listener)

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_connections_have_a_rate(port: int) -> None:
    assert flow.answer({"do": "connect", "to": "127.0.0.1", "seconds": 0.05, "port": port})["rate"] > 0


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    answer = flow.answer({"do": "connect", "to": "127.0.0.1", "seconds": 0.01, "port": free})
    assert "refused" in answer["error"]


def test_it_listens_before_it_answers() -> None:
    assert flow.answer({"do": "listen"}) == {"rate": 0.0}
