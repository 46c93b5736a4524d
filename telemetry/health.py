"""A very small HTTP server for two pages: /metrics and /healthz. Standard library only, on asyncio's streams.

It has no authentication, so it listens on loopback; another address is refused unless the operator says so. Everything
a client can make it spend is bounded: the request's size, its time, and how many are served at once. Each connection
carries one request (`Connection: close`), and a request's body is never read. RFC 9112.

The two pages are made by callables that run in the event loop: they must not block.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Self

_REQUEST_LIMIT = 8192  # bytes of request line and headers
_TIME_LIMIT_S = 5.0  # for the whole of a request, from accept to the last byte of the answer
_AT_ONCE = 32

_TEXT = "text/plain; charset=utf-8"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the daemon can do its work now; `reason` says why not, for an operator to act on."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on. Port 0: the kernel chooses."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str, allow_remote: bool = False) -> Listen:
    """Reads "127.0.0.1:9464", "[::1]:9464" or "localhost:9464".

    Raises ValueError whose text says what was wanted and what to do; an address that others can reach is refused unless
    `allow_remote`. Other names than localhost are refused: what they resolve to may change.
    """
    wanted = f"wanted an address and a port such as 127.0.0.1:9464 or [::1]:9464, found {text!r}"
    host, colon, port_text = text.rpartition(":")
    if not colon or not port_text.isascii() or not port_text.isdigit() or not 0 <= int(port_text[:6]) <= 65535:
        raise ValueError(wanted)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{wanted}; put an IPv6 address in brackets")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(wanted) from None
    if not address.is_loopback and not allow_remote:
        raise ValueError(
            f"{text!r} can be reached from other hosts, and this endpoint asks nobody who they are; "
            "use 127.0.0.1 or [::1], or allow it explicitly"
        )
    return Listen(str(address), int(port_text))


class HealthServer:
    """Serves GET and HEAD of /metrics and /healthz until closed; an asynchronous context manager.

    `metrics` gives the page's bytes and `content_type` names their form. `health` is asked at each /healthz: 200 where
    it is ok, else 503 with the reason. Where either raises, the answer is 500 and the fault is logged.
    """

    def __init__(
        self,
        listen: Listen,
        *,
        metrics: Callable[[], bytes],
        health: Callable[[], Health],
        content_type: str = _TEXT,
        time_limit_s: float = _TIME_LIMIT_S,
    ) -> None:
        self._listen = listen
        self._metrics = metrics
        self._health = health
        self._content_type = content_type
        self._time_limit_s = time_limit_s
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def address(self) -> Listen:
        """Where it listens, with the port that the kernel chose; raises RuntimeError before `start`."""
        if self._server is None:
            raise RuntimeError("the health server was not started")
        host, port, *_ = self._server.sockets[0].getsockname()
        return Listen(host, port)

    async def start(self) -> None:
        """Listens; raises OSError whose text names the address (in use, not of this host)."""
        self._server = await asyncio.start_server(
            self._serve, self._listen.host, self._listen.port, limit=_REQUEST_LIMIT
        )

    async def close(self) -> None:
        """Stops listening and drops what is being served. May be called twice."""
        if self._server is None:
            return
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= _AT_ONCE:
            writer.transport.abort()  # nothing is owed to the one that came on top of all others
            return
        self._clients.add(task)
        try:
            async with asyncio.timeout(self._time_limit_s):
                await self._answer(reader, writer)
        except (TimeoutError, OSError):
            writer.transport.abort()  # a client that is slow or gone; what else it sent does not matter
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            response = _text(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {_REQUEST_LIMIT} bytes"
            )
        except asyncio.IncompleteReadError:
            response = _text(HTTPStatus.BAD_REQUEST, "the request ended before its empty line")
        else:
            response = self._respond(head)
        writer.write(response.encode())
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        # Closing with unread bytes in the socket sends a reset that may overtake the answer (RFC 9112 section 9.6).
        for _ in range(16):
            if not await reader.read(_REQUEST_LIMIT):
                break

    def _respond(self, head: bytes) -> "_Response":
        try:
            method, target, version = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
        except ValueError:
            return _text(HTTPStatus.BAD_REQUEST, "this is no HTTP request")
        if not version.startswith("HTTP/1."):
            return _text(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is spoken here")
        page = {"/metrics": self._metrics_page, "/healthz": self._health_page}.get(target.partition("?")[0])
        if page is None:
            return _text(HTTPStatus.NOT_FOUND, "there are /metrics and /healthz here")
        if method not in ("GET", "HEAD"):
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only", allow="GET, HEAD")
        try:
            response = page()
        except Exception:
            _logger.exception("a page of the health server cannot be made")
            response = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "the page cannot be made; see the log")
        return response if method == "GET" else response.without_body()

    def _metrics_page(self) -> "_Response":
        return _Response(HTTPStatus.OK, self._metrics(), self._content_type)

    def _health_page(self) -> "_Response":
        health = self._health()
        if health.ok:
            return _text(HTTPStatus.OK, "ok")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, health.reason or "not able to work now")


@dataclass(frozen=True, slots=True)
class _Response:
    status: HTTPStatus
    body: bytes
    content_type: str
    allow: str = ""
    head_only: bool = False

    def without_body(self) -> "_Response":
        return _Response(self.status, self.body, self.content_type, self.allow, head_only=True)

    def encode(self) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        ]
        if self.allow:
            lines.append(f"Allow: {self.allow}")
        head = "\r\n".join([*lines, "", ""]).encode("ascii")
        return head if self.head_only else head + self.body


def _text(status: HTTPStatus, message: str, allow: str = "") -> _Response:
    return _Response(status, f"{message}\n".encode("utf-8", "backslashreplace"), _TEXT, allow)
