"""The HTTP endpoints, spoken to with raw sockets."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from telemetry.health import Health, HealthServer, Listen, parse_listen

LOOPBACK = Listen("127.0.0.1", 0)
LIMIT_S = 20.0


def _metrics() -> bytes:
    return b"m 1\n"


def _run(
    use: Callable[[HealthServer], Awaitable[None]],
    *,
    metrics: Callable[[], bytes] = _metrics,
    health: Callable[[], Health] = lambda: Health(True),
    time_limit_s: float = LIMIT_S,
) -> None:
    async def main() -> None:
        async with (
            asyncio.timeout(LIMIT_S * 2),
            HealthServer(LOOPBACK, metrics=metrics, health=health, time_limit_s=time_limit_s) as server,
        ):
            await use(server)

    asyncio.run(main())


async def _say(server: HealthServer, request: bytes, end: bool = False) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    with closing(writer):
        writer.write(request)
        if end:
            writer.write_eof()
        answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    return int(status.split(" ")[1]), dict(line.split(": ", 1) for line in headers), body


def _get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_pages() -> None:
    async def use(server: HealthServer) -> None:
        status, headers, body = await _say(server, _get("/metrics"))
        assert (status, body, headers["Connection"]) == (200, b"m 1\n", "close")
        assert headers["Content-Length"] == "4"
        assert (await _say(server, _get("/healthz?verbose")))[::2] == (200, b"ok\n")
        status, headers, body = await _say(server, _get("/metrics", "HEAD"))
        assert (status, headers["Content-Length"], body) == (200, "4", b"")

    _run(use)


def test_unhealthy_says_why() -> None:
    async def use(server: HealthServer) -> None:
        assert (await _say(server, _get("/healthz")))[::2] == (503, b"the disk is full\n")

    _run(use, health=lambda: Health(False, "the disk is full"))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (_get("/"), 404),
        (_get("/metrics/../healthz"), 404),
        (_get("/metrics", "POST"), 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\xff\xfe / HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 505),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
    ],
)
def test_odd_requests_get_a_proper_answer(request_bytes: bytes, status: int) -> None:
    async def use(server: HealthServer) -> None:
        answer, headers, body = await _say(server, request_bytes, end=True)
        assert answer == status
        assert headers["Content-Length"] == str(len(body))

    _run(use)


def test_a_request_cut_short() -> None:
    async def use(server: HealthServer) -> None:
        assert (await _say(server, b"GET /metr", end=True))[0] == 400
        assert (await _say(server, _get("/metrics")))[0] == 200

    _run(use)


def test_a_client_that_says_nothing_is_dropped() -> None:
    async def use(server: HealthServer) -> None:
        reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
        with closing(writer), pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)

    _run(use, time_limit_s=0.2)


def test_silent_clients_cannot_take_more_than_their_share() -> None:
    async def use(server: HealthServer) -> None:
        silent = [await asyncio.open_connection(server.address.host, server.address.port) for _ in range(32)]
        try:
            with pytest.raises((ConnectionResetError, IndexError, ValueError)):
                await _say(server, _get("/metrics"))
        finally:
            for _, writer in silent:
                writer.close()
        for _ in range(500):
            try:
                status, _, _ = await _say(server, _get("/metrics"))
            except (ConnectionResetError, IndexError, ValueError):
                await asyncio.sleep(0.02)
            else:
                assert status == 200
                return
        pytest.fail("the places of the clients that left were not given back")

    _run(use)


def test_a_page_that_fails_is_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bytes:
        raise RuntimeError("no")

    async def use(server: HealthServer) -> None:
        with caplog.at_level(logging.ERROR):
            assert (await _say(server, _get("/metrics")))[0] == 500
        assert "cannot be made" in caplog.text
        assert (await _say(server, _get("/healthz")))[0] == 200

    _run(use, metrics=broken)


def test_closing_drops_a_client_in_the_middle() -> None:
    async def main() -> None:
        server = HealthServer(LOOPBACK, metrics=_metrics, health=lambda: Health(True))
        await server.start()
        host, port = server.address.host, server.address.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET ")
        await writer.drain()
        async with asyncio.timeout(LIMIT_S):
            await server.close()
            await server.close()
        with closing(writer), pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, port)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("127.0.0.1:9464", "127.0.0.1", 9464, "127.0.0.1:9464"),
        ("localhost:0", "127.0.0.1", 0, "127.0.0.1:0"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("127.3.2.1:65535", "127.3.2.1", 65535, "127.3.2.1:65535"),
    ],
)
def test_addresses_to_listen_on(text: str, host: str, port: int, shown: str) -> None:
    listen = parse_listen(text)
    assert (listen.host, listen.port, str(listen)) == (host, port, shown)


@pytest.mark.parametrize(
    "text",
    ["", "9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "host:1", "a:²"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="wanted an address and a port"):
        parse_listen(text)


@pytest.mark.parametrize("text", ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:1", "[fe80::1]:1"])
def test_an_address_that_others_reach_needs_the_operators_word(text: str) -> None:
    with pytest.raises(ValueError, match="other hosts"):
        parse_listen(text)
    assert parse_listen(text, allow_remote=True).port > 0
