"""Who comes to ipamd's socket: frame by frame against the door itself, and against a real ipamd both ways."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipamd import door, http2
from ipamd.client import Client, IpamError, Pending
from ipamd.door import Door, Methods
from protos.ipam.v1 import ipam_pb2 as pb
from tests.ipamd.daemon import WAIT_S, Daemon, cidrs, key, own

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ASKED = pb.ReleaseRequest(generation=7).SerializeToString()


class Servicer:
    """Release answers by its generation; all else is not there."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, tuple[tuple[str, str], ...]]] = []
        self.cancelled: list[int] = []
        self.may_answer = asyncio.Event()
        self.size = 0

    def __getattr__(self, _name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        return self._missing

    async def _missing(self, _request: Any, _context: Any) -> Any:
        raise ValueError("100% wrong: ü")

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:  # noqa: N802 - the RPC's
        number = request.generation
        self.begun.append((number, context.invocation_metadata()))
        if number >= 100:
            try:
                await self.may_answer.wait()
            except asyncio.CancelledError:
                self.cancelled.append(number)
                raise
        if number == 99:
            await context.abort(grpc.StatusCode.NOT_FOUND, "ü" * 5000 + "%41", (("x-answered-by", "ipamd"),))
        return pb.ReleaseResponse(released=[pb.Address(cidr=f"{number}", pool="p" * self.size)])


class Caller:
    """Our client's end, frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def next(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream, body; raises IncompleteReadError at the end."""
        async with asyncio.timeout(WAIT_S):
            head = await self.reader.readexactly(9)
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            return kind, flags, stream, await self.reader.readexactly(int.from_bytes(head[:3], "big"))

    async def until(self, kind: int, flags: int = 0) -> tuple[int, int, int, bytes]:
        while True:
            found = await self.next()
            if found[0] == kind and found[1] & flags == flags:
                return found

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """The stream, all headers and the message of the next answer that ends."""
        headers: dict[bytes, bytes] = {}
        data = b""
        while True:
            kind, flags, stream, body = await self.next()
            if kind == HEADERS:
                headers |= http2.read_headers(body)
            elif kind == DATA:
                data += body
            if flags & 1 and kind in (HEADERS, DATA):
                return stream, headers, data


def asking(stream: int, message: bytes = ASKED, *, method: str = "Release", timeout_s: float = 60.0) -> bytes:
    headers = http2.request_headers(f"/netloom.ipam.v1.Ipam/{method}", timeout_s, f"id{stream}")
    data = struct.pack(">BI", 0, len(message)) + message
    return http2.frame(HEADERS, 4, stream, headers) + http2.frame(DATA, 1, stream, data)


def numbered(number: int) -> bytes:
    return pb.ReleaseRequest(generation=number).SerializeToString()


def meant(data: bytes) -> str:
    return pb.ReleaseResponse.FromString(data[5:]).released[0].cidr


@contextlib.asynccontextmanager
async def opened(path: Path, inner: str = "") -> AsyncIterator[tuple[Door, Servicer]]:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    servicer = Servicer()
    made = Door(Methods(pb.DESCRIPTOR.services_by_name["Ipam"], servicer), inner)
    await made.open(listening)
    try:
        yield made, servicer
    finally:
        made.close()
        made.shut()


@contextlib.asynccontextmanager
async def called(path: Path, hello: bytes = http2.HELLO) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(hello)
        yield Caller(reader, writer)
    finally:
        writer.close()


async def reached(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - of what is tested, which has no event for it
            await asyncio.sleep(0.005)


def test_what_is_asked_at_a_time_is_answered_as_it_comes(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer), called(path) as caller:
            caller.send(asking(1, numbered(100)), asking(3, numbered(4)))
            stream, headers, data = await caller.answer()
            assert (stream, headers[b"grpc-status"], meant(data)) == (3, b"0", "4")
            assert headers[b"content-type"] == b"application/grpc"
            servicer.may_answer.set()
            stream, _, data = await caller.answer()
            assert (stream, meant(data)) == (1, "100")
            assert servicer.begun == [(100, (("x-request-id", "id1"),)), (4, (("x-request-id", "id3"),))]

    asyncio.run(run())


def test_byte_by_byte(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path), called(path, b"") as caller:
            for byte in http2.HELLO + http2.frame(99, 0, 0, b"unknown") + asking(1):
                caller.send(bytes([byte]))
                await caller.writer.drain()
                await asyncio.sleep(0)
            assert (await caller.next())[:3] == (SETTINGS, 0, 0)
            assert (await caller.next())[:3] == (SETTINGS, 1, 0)
            assert meant((await caller.answer())[2]) == "7"

    asyncio.run(run())


def test_pings_are_answered_and_windows_given_back(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path), called(path) as caller:
            caller.send(http2.frame(PING, 0, 0, b"12345678"), http2.frame(PING, 1, 0, b"an answ."))
            assert (await caller.until(PING))[1:] == (1, 0, b"12345678")
            large = pb.ReleaseRequest(key=pb.AttachmentKey(network="n" * 15_000)).SerializeToString()
            for number in range(3):
                caller.send(asking(2 * number + 1, large))
            given = await caller.until(WINDOW)
            assert given[3] == struct.pack(">I", 3 * (len(large) + 5))

    asyncio.run(run())


def test_an_answer_waits_until_there_is_room(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer), called(path) as caller:
            servicer.size = 40_000
            caller.send(asking(1), asking(3))
            stream, _, data = await caller.answer()
            assert stream == 1
            caller.send(http2.frame(PING, 0, 0, b"12345678"))
            assert (await caller.next())[0] == PING  # and nothing of the second before it
            caller.send(http2.frame(WINDOW, 0, 3, struct.pack(">I", 1 << 20)))  # room of the stream alone
            caller.send(http2.frame(WINDOW, 0, 0, struct.pack(">I", len(data))))
            stream, _, data = await caller.answer()
            assert (stream, len(pb.ReleaseResponse.FromString(data[5:]).released[0].pool)) == (3, 40_000)

    asyncio.run(run())


def test_what_does_not_fit_into_a_window_is_for_grpc(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer), called(path) as caller:
            servicer.size = 70_000
            caller.send(asking(1))
            stream, headers, data = await caller.answer()
            assert (stream, b"grpc-status" in headers, data) == (1, False, b"")

    asyncio.run(run())


def test_refusals(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path), called(path) as caller:
            caller.send(asking(1, method="Unheard"), asking(3, b"\xff"), asking(5, method="Allocate"))
            found = {stream: headers for stream, headers, _ in [await caller.answer() for _ in range(3)]}
            assert found[1][b"grpc-status"] == b"12"
            assert found[3][b"grpc-status"] == b"13"
            assert found[5][b"grpc-status"] == b"2"
            assert found[5][b"grpc-message"] == b"a fault in ipamd, see its log: 100%25 wrong: %C3%BC"
            caller.send(asking(7, numbered(99)))
            _, headers, _ = await caller.answer()
            assert (headers[b"grpc-status"], headers[b"x-answered-by"]) == (b"5", b"ipamd")
            assert set(headers[b"grpc-message"].split(b"%C3%BC")) == {b""}
            assert len(headers[b"grpc-message"]) <= 8000

    asyncio.run(run())


def test_a_call_ends_with_its_deadline_by_the_clients_word_and_with_its_connection(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer):
            async with called(path) as caller:
                caller.send(asking(1, numbered(101), timeout_s=0.01))
                stream, headers, _ = await caller.answer()
                assert (stream, headers[b"grpc-status"]) == (1, b"4")
                caller.send(asking(3, numbered(102)))
                await reached(lambda: len(servicer.begun) == 2)
                caller.send(http2.frame(RST, 0, 3, struct.pack(">I", 8)))
                caller.send(asking(5, numbered(103)))
                await reached(lambda: len(servicer.begun) == 3)
            await reached(lambda: servicer.cancelled == [101, 102, 103])

    asyncio.run(run())


def test_more_calls_than_are_taken(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer), called(path) as caller:
            caller.send(*(asking(2 * number + 1, numbered(100)) for number in range(17)))
            assert (await caller.until(RST))[2:] == (33, struct.pack(">I", 7))
            servicer.may_answer.set()
            assert {(await caller.answer())[0] for _ in range(16)} == set(range(1, 33, 2))

    asyncio.run(run())


@pytest.mark.parametrize(
    "wrong",
    [
        b"\xff\xff\xff\0\0\0\0\0\1",
        http2.frame(HEADERS, 5, 1, b"\x83"),
        http2.frame(HEADERS, 0, 1, b"\x83"),
        http2.frame(HEADERS, 0xC, 1, b"\0\x83"),
        http2.frame(CONTINUATION, 4, 1, b"\x83"),
        http2.frame(DATA, 1, 1, b"\0\0\0\0\0"),
        http2.frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1)),
        http2.frame(WINDOW, 0, 0, b""),
        asking(2),
        asking(5) + asking(3),
        http2.frame(HEADERS, 4, 1, b"\x83\x86\x04\x81\xff") + http2.frame(DATA, 1, 1, b"\0\0\0\0\0"),
        http2.frame(HEADERS, 4, 1, b"\xbe") + http2.frame(DATA, 1, 1, b"\0\0\0\0\0"),
        http2.frame(HEADERS, 4, 1, b"\x83") + http2.frame(DATA, 0, 1, b"\0\0\0\0\0"),
        http2.frame(HEADERS, 4, 1, b"\x83") + http2.frame(DATA, 1, 1, b"\1\0\0\0\0"),
        http2.frame(HEADERS, 4, 1, b"\x83") + http2.frame(DATA, 1, 1, b"\0\0\0\0\1"),
        http2.frame(HEADERS, 4, 1, http2.literal(b"grpc-timeout", b"1 hour")) + http2.frame(DATA, 1, 1, b"\0" * 5),
        http2.frame(HEADERS, 4, 1, http2.literal(b"x-request-id", b"")[:-1] + b"\x7f")
        + http2.frame(DATA, 1, 1, b"\0" * 5),
        http2.frame(HEADERS, 4, 1, http2.literal(b"x-request-id", b"1") + b"\x83") + http2.frame(DATA, 1, 1, b"\0" * 5),
    ],
)
def test_what_our_client_never_says_ends_the_connection(tmp_path: Path, wrong: bytes) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (_, servicer):
            async with called(path) as caller:
                caller.send(wrong)
                last, code = struct.unpack(">II", (await caller.until(GOAWAY))[3])
                assert (last <= 5, code) == (True, 1)
                with pytest.raises(asyncio.IncompleteReadError):
                    await caller.until(GOAWAY)
            async with called(path) as caller:  # others are served
                caller.send(asking(1))
                assert meant((await caller.answer())[2]) == "7"
            assert len(servicer.begun) <= 3

    asyncio.run(run())


def test_who_does_not_read_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_LARGEST_BACKLOG", 1000)

    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (made, _), called(path) as caller:
            await caller.until(SETTINGS, 1)
            caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
            ping = http2.frame(PING, 0, 0, b"12345678") * 1000
            with pytest.raises(OSError):
                async with asyncio.timeout(WAIT_S):
                    while True:
                        caller.send(ping)
                        await caller.writer.drain()
                        await asyncio.sleep(0)
            await reached(lambda: not made.callers)

    asyncio.run(run())


def test_at_the_end_what_was_asked_is_answered(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path) as (made, servicer), called(path) as caller:
            caller.send(asking(1, numbered(100)))
            await reached(lambda: servicer.begun)
            made.close()
            assert (await caller.until(GOAWAY))[3] == struct.pack(">II", 2**31 - 1, 0)
            caller.send(asking(3))
            servicer.may_answer.set()
            assert {(await caller.answer())[0] for _ in range(2)} == {1, 3}
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(str(path))
            made.shut()
            with pytest.raises(asyncio.IncompleteReadError):
                await caller.next()

    asyncio.run(run())


@pytest.mark.parametrize("hello", [http2.PREFACE + http2.frame(SETTINGS, 0, 0, b""), b"GET / HTTP/1.1\r\n\r\n", b"PRX"])
def test_another_hello_is_led_to_the_inner_socket(tmp_path: Path, hello: bytes) -> None:
    """Both ways, however much it is and whoever reads slowly, and the ends with it."""
    path, inner = tmp_path / "s", tmp_path / "inner"
    much = bytes(range(256)) * 20_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write(b"the end")
        writer.close()

    async def run() -> None:
        async with (
            await asyncio.start_unix_server(echo, str(inner)),
            opened(path, str(inner)) as (made, servicer),
            called(path, hello[:2]) as caller,
        ):
            await caller.writer.drain()
            caller.send(hello[2:], much)
            caller.writer.write_eof()
            async with asyncio.timeout(WAIT_S):
                assert await caller.reader.read() == hello + much + b"the end"
            caller.writer.close()
            await reached(lambda: not made.copying)
            assert (servicer.begun, made.callers) == ([], set())

    asyncio.run(run())


def test_without_the_inner_socket_the_connection_ends(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path, str(tmp_path / "missing")) as (made, _), called(path, b"GET / HTTP/1.1") as caller:
            async with asyncio.timeout(WAIT_S):
                assert await caller.reader.read() == b""
            await reached(lambda: not made.copying)

    asyncio.run(run())


def test_both_ways_get_the_same_answers(tmp_path: Path) -> None:
    """The real ipamd's, through our own connection and through gRPC's library, in turn."""

    def asked(client: Client, name: str, method: str, request: Any, response: type[Any]) -> tuple[object, str]:
        try:
            if name == "grpc":
                return client.call_with_grpc(method, request, response), ""
            return Pending(client, method, request, response).result(), ""
        except IpamError as error:
            return error.code, error.message

    with Daemon(tmp_path) as daemon, daemon.client() as client:
        pool = own("10.1.0.0/24")
        first = client.allocate(key("a"), network_pool=pool)
        assert cidrs(first) == ["10.1.0.2/24"]
        many = [f"10.1.{number // 250}.{number % 250}/24" for number in range(500)]
        for method, request, response in (
            ("Allocate", pb.AllocateRequest(key=key("a"), network_pool=pool), pb.AllocateResponse),
            ("Allocate", pb.AllocateRequest(key=key("b"), pools=["100% häßlich"]), pb.AllocateResponse),
            ("Allocate", pb.AllocateRequest(key=pb.AttachmentKey(client="x\n")), pb.AllocateResponse),
            ("Check", pb.CheckRequest(key=key("a"), cidrs=many), pb.CheckResponse),
            ("Check", pb.CheckRequest(key=key("nobody")), pb.CheckResponse),
            ("Release", pb.ReleaseRequest(key=key("nobody")), pb.ReleaseResponse),
            ("GetNetwork", pb.GetNetworkRequest(name="missing"), pb.Network),
        ):
            ours, grpcs = (asked(client, way, method, request, response) for way in ("ours", "grpc"))
            assert ours == grpcs, method
            assert ours[1] or isinstance(ours[0], response)


def test_our_own_client_is_not_led_to_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that could ask gRPC's server only would not notice a hello that the door does not know."""

    def fail(*_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(door, "_copy", fail)
    monkeypatch.setattr(Client, "call_with_grpc", fail)

    async def run() -> None:
        path = tmp_path / "s"
        async with opened(path):
            with Client(str(path), timeout_s=WAIT_S) as client:
                for number in range(1, 4):
                    answer = await asyncio.to_thread(client.release, key("a"), generation=number)
                    assert answer.released[0].cidr == str(number)

    asyncio.run(run())
