"""One end of TCP connections: started in a container's namespace as `python -I -S flow.py PROCESSOR`.

It serves every connection to port 7777 and, asked by a JSON line, makes connections itself; one line each answers:

    {"do": "listen"}                                                        → {"rate": 0}, once it does
    {"do": "stream", "to": "10.1.0.2", "seconds": 0.2}                      → {"rate": bytes a second, as received}
    {"do": "trips", "to": "10.1.0.2", "seconds": 0.2}                       → {"rate": round trips of one byte a second}
    {"do": "connect", "to": "10.1.0.2", "port": 7777, "seconds": 0.2}       → {"rate": connections a second}

The first byte of a connection says what the server does with it. Both ends of a connection are tied to a processor of
their own where there are two, or the scheduler's choice would decide. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PORT = 7777
_CHUNK = 1 << 18
_TIMEOUT_S = 10.0


def serve(listener: socket.socket) -> None:
    """Connections one after the other."""
    buffer = bytearray(_CHUNK)
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_TIMEOUT_S)
            kind = connection.recv(1)
            if kind == b"S":
                connection.sendall(sink(connection, buffer).to_bytes(8, "big"))
            elif kind == b"T":
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while connection.recv(1):
                    connection.send(b"x")


def sink(connection: socket.socket, buffer: bytearray) -> int:
    """Bytes a second, from the first to the last that came."""
    received = connection.recv_into(buffer)
    began = last = time.perf_counter()
    first = received
    while count := connection.recv_into(buffer):
        received += count
        last = time.perf_counter()
    return int((received - first) / (last - began)) if last > began else 0


def connected(to: str, port: int, kind: bytes) -> socket.socket:
    made = socket.create_connection((to, port), _TIMEOUT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.sendall(kind)
    return made


def stream(to: str, seconds: float, port: int = PORT) -> float:
    chunk = memoryview(bytes(_CHUNK))
    with connected(to, port, b"S") as connection:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        rate = int.from_bytes(connection.recv(8), "big")
    if rate == 0:
        raise ConnectionError(f"next to nothing came within {seconds:g} s")
    return rate


def trips(to: str, seconds: float, port: int = PORT) -> float:
    """By the median, which a processor that was taken away for a while does not move."""
    took = []
    with connected(to, port, b"T") as connection:
        began = last = time.perf_counter()
        while last - began < seconds:
            connection.send(b"x")
            if not connection.recv(1):
                raise ConnectionError("the server left")
            now = time.perf_counter()
            took.append(now - last)
            last = now
    return 1 / sorted(took)[len(took) // 2]


def connect(to: str, seconds: float, port: int = PORT) -> float:
    """Connections that the server closes at once, each after the one before, or its queue would overflow. The client
    resets its end, so that none lingers in TIME_WAIT. By the median, as `trips`."""
    linger = b"\1\0\0\0\0\0\0\0"
    took = []
    began = last = time.perf_counter()
    while last - began < seconds:
        with socket.socket() as one:
            one.settimeout(_TIMEOUT_S)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            one.connect((to, port))
            one.send(b"C")
            if one.recv(1):
                raise ConnectionError("wanted the server to close, found data")
        now = time.perf_counter()
        took.append(now - last)
        last = now
    return 1 / sorted(took)[len(took) // 2]


def listen() -> float:
    return 0.0  # it did before it read its first line


DO: dict[str, Callable[..., float]] = {"listen": listen, "stream": stream, "trips": trips, "connect": connect}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"rate": DO[request.pop("do")](**request)}
    except OSError as error:
        return {"error": f"{error}: {request}"}


def main() -> None:
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(sys.argv[1]) % len(processors)]})
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", PORT))
    listener.listen(1024)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
