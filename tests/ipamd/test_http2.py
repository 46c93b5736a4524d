"""Our own few frames of HTTP/2 against servers that say what they like. The real one is that of the other tests."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from ipamd import http2
from ipamd.client import Client, IpamError, Pending
from protos.ipam.v1 import ipam_pb2 as pb

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ANSWER = pb.ReleaseResponse(released=[pb.Address(cidr="10.1.0.2/16", gateway="10.1.0.1", pool="p")])


def frame(kind: int, body: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def literal(name: str, value: str, first: int = 0x00) -> bytes:
    return bytes([first, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


def trailers(stream: int, *fields: bytes, status: str = "0") -> bytes:
    return frame(HEADERS, literal("grpc-status", status) + b"".join(fields), 0x5, stream)


def whole(stream: int, data: bytes = ANSWER.SerializeToString()) -> bytes:
    return frame(HEADERS, b"\x20\x88", 0x4, stream) + frame(DATA, message(data), 0, stream) + trailers(stream)


class Server:
    """Each connection is served by `script` in a thread, which gets the connection's number, from 1."""

    def __init__(self, path: Path, script: Callable[[Peer, int], None]) -> None:
        self.path = str(path)
        self.connections = 0
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._talk, args=(accepted, self.connections), daemon=True).start()

    def _talk(self, accepted: socket.socket, number: int) -> None:
        with accepted:
            self._script(Peer(accepted), number)

    def close(self) -> None:
        self._listener.close()


class Peer:
    """The server's end of a connection."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.socket.settimeout(60)
        self.seen: list[tuple[int, int, int, bytes]] = []
        self._file = accepted.makefile("rb")
        assert self._file.read(len(HELLO)) in (HELLO, b"")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def until(self, kind: int, flags: int = 0) -> bytes:
        """The body of the next frame of that kind with those flags; b"" at the end."""
        while head := self._file.read(9):
            found, found_flags, stream = struct.unpack(">BBI", head[3:])
            body = self._file.read(struct.unpack(">I", b"\0" + head[:3])[0])
            self.seen.append((found, found_flags, stream, body))
            if found == kind and found_flags & flags == flags:
                return body
        return b""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[Peer, int], None]], Server]]:
    servers: list[Server] = []

    def start(script: Callable[[Peer, int], None]) -> Server:
        servers.append(Server(tmp_path / f"{len(servers)}.sock", script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


Serve = Callable[[Callable[[Peer, int], None]], Server]
KEY = pb.AttachmentKey(client="cni", network="n", container_id="c", ifname="eth0")


def released(server: Server, timeout_s: float = 20.0) -> pb.ReleaseResponse:
    with Client(server.path, timeout_s=timeout_s) as client:
        return client.release(KEY)


def test_what_is_sent(serve: Serve) -> None:
    peers: list[Peer] = []

    def script(peer: Peer, _number: int) -> None:
        peers.append(peer)
        peer.until(DATA)
        peer.send(frame(SETTINGS) + whole(1))
        peer.until(SETTINGS, 0x1)

    server = serve(script)
    with Client(server.path, request_id="r" * 300) as client:
        assert client.release(KEY, generation=7) == ANSWER
    settings, headers, data = peers[0].seen[:3]
    assert settings == (SETTINGS, 0, 0, struct.pack(">HIHIHI", 1, 0, 2, 0, 0x4E4C, 1))
    assert headers[:3] == (HEADERS, 0x4, 1)
    assert b"/netloom.ipam.v1.Ipam/Release" in headers[3]
    assert b"r" * 300 in headers[3]
    assert b"\x0cgrpc-timeout\x055000m" in headers[3]
    assert data[:3] == (DATA, 0x1, 1)
    assert pb.ReleaseRequest.FromString(data[3][5:]) == pb.ReleaseRequest(key=KEY, generation=7)


@pytest.mark.parametrize(
    "pieces",
    [
        [whole(1)],
        [whole(1)[:4], whole(1)[4:30], whole(1)[30:]],
        [bytes([byte]) for byte in whole(1)],
        [frame(SETTINGS) + frame(WINDOW, b"\0\0\1\0") + frame(99, b"unknown"), whole(1)],
        [frame(HEADERS, b"\x02" + b"\0" * 5 + b"\x88" + b"\0" * 2, 0x2C, 1), whole(1)[11:]],
        [
            frame(HEADERS, b"\x88", 0x4, 1),
            frame(DATA, b"\x03" + message(ANSWER.SerializeToString()) + b"\0" * 3, 0x8, 1),
            trailers(1, literal("later", "x", 0x40), literal("never", "y", 0x10), b"\x48\x03" + b"200"),
        ],
        [frame(GOAWAY, struct.pack(">II", 1, 0)), whole(1)],
        [trailers(77, status="9"), whole(1)],
    ],
    ids=[
        "at once",
        "in pieces",
        "byte by byte",
        "others first",
        "padding",
        "ways to write a header",
        "ending",
        "another stream",
    ],
)
def test_answers(serve: Serve, pieces: list[bytes]) -> None:
    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        for piece in pieces:
            peer.send(piece)
            time.sleep(0.001)
        peer.until(GOAWAY)

    assert released(serve(script)) == ANSWER


def test_one_connection_for_many_calls_until_the_server_ends_it(serve: Serve) -> None:
    def script(peer: Peer, number: int) -> None:
        for stream in (1, 3, 5):
            if not peer.until(DATA):
                return
            peer.send(whole(stream))
        if number == 1:
            peer.send(frame(GOAWAY, struct.pack(">II", 5, 0)))

    server = serve(script)
    with Client(server.path) as client:
        assert [client.release(KEY) for _ in range(5)] == [ANSWER] * 5
    assert server.connections == 2


def test_calls_that_overlap_have_a_connection_each(serve: Serve) -> None:
    def script(peer: Peer, number: int) -> None:
        peer.until(DATA)
        peer.send(whole(1, pb.AllocateResponse(generation=number).SerializeToString()))
        peer.until(DATA)

    server = serve(script)
    with Client(server.path) as client:
        first = client.prepare_allocate(KEY)
        first.ask()
        assert client.prepare_allocate(KEY).result().generation == 2
        assert first.result().generation == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        frame(SETTINGS)[:5],
        frame(GOAWAY, struct.pack(">II", 0, 0)),
        frame(RST, struct.pack(">I", 7), 0, 1),
        frame(RST, struct.pack(">I", 8), 0, 1),
        trailers(1, status="14"),
        trailers(1, status="1"),
    ],
    ids=["nothing", "half a frame", "the server ends", "refused", "reset", "gRPC's UNAVAILABLE", "gRPC's CANCELLED"],
)
def test_a_lost_connection_is_tried_once_more(serve: Serve, answer: bytes) -> None:
    def once(peer: Peer, number: int) -> None:
        peer.until(DATA)
        peer.send(answer if number == 1 else whole(1))

    def always(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(answer)

    assert released(serve(once)) == ANSWER
    server = serve(always)
    with pytest.raises(IpamError) as caught:
        released(server)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.message.startswith(f"ipamd is not reachable at {server.path}; is it running? (")
    assert server.connections == 2


def test_a_refusal_is_ipamds_own_and_not_repeated(serve: Serve) -> None:
    def script(peer: Peer, _number: int) -> None:
        for stream in (1, 3):
            peer.until(DATA)
            mark = literal("x-answered-by", "ipamd")
            peer.send(trailers(stream, literal("grpc-message", "no room%0A: 100%25"), mark, status="14"))

    server = serve(script)
    with Client(server.path) as client:
        for _ in range(2):
            with pytest.raises(IpamError) as caught:
                client.release(KEY)
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert caught.value.message == "no room\n: 100%"
    assert server.connections == 1


def test_who_was_interrupted_waits_again(serve: Serve) -> None:
    class StopError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise StopError

    go_on = threading.Event()

    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        answer = whole(1)
        peer.send(answer[:-3])
        go_on.wait(60)
        peer.send(answer[-3:])
        peer.until(GOAWAY)

    before = signal.signal(signal.SIGALRM, interrupt)
    server = serve(script)
    try:
        with Client(server.path) as client:
            pending: Pending[pb.ReleaseResponse] = Pending(client, "Release", pb.ReleaseRequest(), pb.ReleaseResponse)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(StopError):
                pending.result()
            go_on.set()
            assert pending.result() == ANSWER
    finally:
        signal.signal(signal.SIGALRM, before)
    assert server.connections == 1


def test_too_late(serve: Serve) -> None:
    done = threading.Event()

    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(frame(SETTINGS))
        done.wait(60)

    server = serve(script)
    with pytest.raises(IpamError) as caught:
        released(server, timeout_s=0.2)
    done.set()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.message == f"ipamd at {server.path} did not answer within 0.2 s"


def test_who_only_chats_is_late_too(serve: Serve) -> None:
    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        with contextlib.suppress(OSError):
            while True:
                peer.send(frame(SETTINGS, flags=0x1))
                time.sleep(0.01)

    with pytest.raises(IpamError) as caught:
        released(serve(script), timeout_s=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_pings_are_answered_and_windows_given_back(serve: Serve) -> None:
    came: list[bytes] = []
    done = threading.Event()

    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(frame(PING, b"12345678") + whole(1))
        came.append(peer.until(PING, 0x1))
        peer.until(DATA)
        peer.send(frame(DATA, b"\0" * 16_384, 0, 99) * 3 + whole(3))
        came.append(peer.until(WINDOW))
        done.set()

    server = serve(script)
    with Client(server.path) as client:
        assert client.release(KEY) == ANSWER
        assert client.release(KEY) == ANSWER
        assert done.wait(60)
    assert came == [b"12345678", struct.pack(">I", 2 * 16_384 + 5 + len(ANSWER.SerializeToString()))]


@pytest.mark.parametrize(
    "answer",
    [
        frame(HEADERS, b"\x00\x8bgrpc-status", 0x5, 1),
        frame(HEADERS, b"\xbe", 0x5, 1),
        frame(HEADERS, b"\x7e\x01x", 0x5, 1),
        frame(HEADERS, b"\xff" + b"\xff" * 9, 0x5, 1),
        frame(HEADERS, b"\x00\x0bgrpc", 0x5, 1),
        frame(HEADERS, b"\x88", 0x0, 1),
        frame(HEADERS, b"\x48\x03404", 0x5, 1),
        frame(DATA, struct.pack(">BI", 1, 3) + b"zip", 0, 1) + trailers(1),
        frame(DATA, struct.pack(">BI", 0, 9) + b"short", 0, 1) + trailers(1),
        trailers(1),
        frame(GOAWAY),
        frame(RST, b"\0", 0, 1),
        frame(WINDOW, b"\0\0"),
        frame(DATA, b"", 0x8, 1),
        frame(HEADERS, b"\x09short", 0xD, 1),
        b"\xff\xff\xff\0\0\0\0\0\0",
        frame(DATA, bytes(16_384), 0, 1) * 5,
        trailers(1, status="9" * 40),
    ],
    ids=[
        "Huffman",
        "number",
        "name's number",
        "endless number",
        "cut",
        "continued",
        "no gRPC",
        "compressed",
        "half",
        "no message",
        "empty goodbye",
        "short reset",
        "short window",
        "no padding",
        "too much padding",
        "16 MB in a frame",
        "more than the window",
        "long status",
    ],
)
def test_the_unexpected(tmp_path: Path, serve: Serve, answer: bytes) -> None:
    """The connection says so and the client asks with gRPC, which here finds nobody who speaks it."""

    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(answer)
        peer.until(GOAWAY)

    server = serve(script)
    connection = http2.Connection(server.path, 20.0)
    connection.ask(http2.request_headers("/x", 1.0), b"")
    with pytest.raises(http2.UnexpectedError):
        connection.answer()
    connection.close()


def test_without_what_we_know_grpc_is_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def with_grpc(_self: Client, method: str, _request: object, _response: object) -> object:
        asked.append(method)
        return ANSWER

    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(frame(HEADERS, b"\xbe", 0x5, 1))

    monkeypatch.setattr(Client, "call_with_grpc", with_grpc)
    with Client(serve(script).path) as client:
        assert client.release(KEY) == ANSWER
        client.allocate(KEY, pools=["p" * 100] * 200)
        client.get_pool("p")
    assert asked == ["Release", "Allocate", "GetPool"]


def test_an_answer_that_is_no_message_is_for_grpc(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(peer: Peer, _number: int) -> None:
        peer.until(DATA)
        peer.send(whole(1, b"\xff\xff"))
        peer.until(GOAWAY)

    monkeypatch.setattr(Client, "call_with_grpc", lambda *_: ANSWER)
    with Client(serve(script).path) as client:
        assert client.release(KEY) == ANSWER


def test_numbers_of_every_length() -> None:
    for value in (0, 1, 126, 127, 128, 254, 255, 16_383, 2**20):
        encoded = http2._integer(value, 7)
        assert http2._read_integer(encoded, 0, 7) == (value, len(encoded))
    assert http2._integer(1337, 5) == bytes([31, 154, 10])  # RFC 7541 C.1.2
