"""The plugin protocol over a Unix socket: whatever is asked, Docker gets an answer it can show."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from ipamd.client import IpamError
from kernel.errors import Busy
from libnetwork import http as shim
from libnetwork import messages
from libnetwork.errors import DriverError


class Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("plugin", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def ask(path: str, name: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    connection = Connection(path)
    try:
        connection.request("POST", f"/{name}", body=body)
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "application/vnd.docker.plugins.v1.2+json"
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@contextmanager
def serving(application: web.Application, path: str) -> Iterator[None]:
    """Listens at a path while the block lasts."""
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(application)
        await runner.setup()
        await web.UnixSite(runner, path).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def answering(path: str, calls: Mapping[str, shim.Handler], *immediate: str) -> Iterator[None]:
    with ThreadPoolExecutor(4) as executor, serving(shim.application(calls, executor, immediate), path):
        yield


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # the path of a socket has 107 bytes
    return "s"


def taking(message: type, handler: shim.Handler) -> shim.Handler:
    """The handler, annotated."""

    def annotated(asked: Any) -> Mapping[str, Any]:
        return handler(asked)

    annotated.__annotations__["asked"] = message
    return annotated


def raising(error: Exception) -> shim.Handler:
    def handler(_: Any) -> Mapping[str, Any]:
        raise error

    return handler


def refusal(status: int, answer: dict[str, Any]) -> str:
    assert status in (200, 404, 413)
    assert set(answer) == {"Err", "Error"}
    assert answer["Err"] == answer["Error"]
    return str(answer["Err"])


def test_answers(path: str) -> None:
    seen: list[Any] = []

    def note(message: Any) -> dict[str, Any]:
        seen.append(message)
        return {"Value": {}}

    with answering(path, {"A.Empty": taking(messages.Empty, note), "A.Ref": taking(messages.NetworkRef, note)}):
        assert ask(path, "A.Empty") == (200, {"Value": {}})
        assert ask(path, "A.Empty", b"{}") == (200, {"Value": {}})
        assert ask(path, "A.Ref", b'{"NetworkID": "n"}') == (200, {"Value": {}})
    assert seen == [messages.Empty(), messages.Empty(), messages.NetworkRef("n")]


def test_refusals(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    noted = DriverError("first")
    noted.add_note("second")
    calls = {
        "A.Driver": taking(messages.Empty, raising(noted)),
        "A.Ipamd": taking(messages.Empty, raising(IpamError(grpc.StatusCode.RESOURCE_EXHAUSTED, "pool web is full"))),
        "A.Kernel": taking(messages.Empty, raising(Busy("move link", 16))),
        "A.Os": taking(messages.Empty, raising(OSError(28, "No space left on device", "/var/lib/x"))),
        "A.Bug": taking(messages.Empty, raising(ZeroDivisionError("by zero"))),
        "A.Ref": taking(messages.NetworkRef, raising(AssertionError("never called"))),
    }
    with answering(path, calls):
        assert refusal(*ask(path, "A.Driver")) == "first; also: second"
        assert refusal(*ask(path, "A.Ipamd")) == "A.Ipamd: ipamd: pool web is full"
        assert refusal(*ask(path, "A.Kernel")) == "A.Kernel: move link: Device or resource busy"
        assert "No space left on device: '/var/lib/x'" in refusal(*ask(path, "A.Os"))
        assert "A.Bug: a fault of netloom-docker: ZeroDivisionError('by zero')" in refusal(*ask(path, "A.Bug"))
        assert "A.Ref: Object missing required field `NetworkID`" in refusal(*ask(path, "A.Ref", b"{}"))
        assert "A.Ref: it came without its arguments, after a connection that was cut" in refusal(*ask(path, "A.Ref"))
        for malformed in (b"{", b"[]", b'{"NetworkID": 7}', b'{"NetworkID": "\xff"}', b"\0"):
            assert refusal(*ask(path, "A.Ref", malformed)).startswith("A.Ref: ")
        status, answer = ask(path, "NetworkDriver.FreeNetwork")
        assert (status, refusal(status, answer)) == (404, "netloom-docker knows no call NetworkDriver.FreeNetwork")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_body_without_end(path: str) -> None:
    with answering(path, {"A.Ref": taking(messages.NetworkRef, raising(AssertionError("never called")))}):
        status, answer = ask(path, "A.Ref", b'{"NetworkID": "' + b"x" * shim._LARGEST + b'"}')
        assert status == 413
        assert "a request of more than 4194304 bytes" in refusal(status, answer)


def test_one_call_does_not_wait_for_another(path: str) -> None:
    arrived, go = threading.Event(), threading.Event()

    def slow(_: Any) -> dict[str, Any]:
        arrived.set()
        assert go.wait(30)
        return {}

    calls = {"A.Slow": taking(messages.Empty, slow), "A.Fast": taking(messages.Empty, lambda _: {"Value": {}})}
    with answering(path, calls), ThreadPoolExecutor(1) as other:
        waiting = other.submit(ask, path, "A.Slow")
        assert arrived.wait(30)
        assert ask(path, "A.Fast") == (200, {"Value": {}})
        assert not waiting.done()
        go.set()
        assert waiting.result() == (200, {})


def test_what_waits_for_nothing_is_answered_while_all_threads_are_busy(path: str) -> None:
    arrived, go = threading.Barrier(5), threading.Event()

    def slow(_: Any) -> dict[str, Any]:
        arrived.wait(30)
        assert go.wait(30)
        return {}

    calls = {"A.Slow": taking(messages.Empty, slow), "A.Fast": taking(messages.Empty, lambda _: {"Value": {}})}
    with answering(path, calls, "A.Fast"), ThreadPoolExecutor(4) as others:
        waiting = [others.submit(ask, path, "A.Slow") for _ in range(4)]
        arrived.wait(30)
        assert ask(path, "A.Fast") == (200, {"Value": {}})
        go.set()
        assert [one.result() for one in waiting] == [(200, {})] * 4
