"""One end of TCP connections: started in a container's namespace as `python -I -S flow.py PROCESSOR`.

It closes every connection to port 7777 and, asked by a JSON line, makes connections itself; one line each answers:

    {"do": "listen"}                                                        → {"rate": 0}, once it does
    {"do": "connect", "to": "10.1.0.2", "port": 7777, "seconds": 0.2}       → {"rate": connections a second}

Both ends of a connection are tied to a processor of their own where there are two, or the scheduler's choice would
decide. Standard library only. What a path does to bytes is `bench/pair.py`'s affair.
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
_TIMEOUT_S = 10.0


def serve(listener: socket.socket) -> None:
    """Connections one after the other; each ends once its first byte is there."""
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_TIMEOUT_S)
            connection.recv(1)


def connect(to: str, seconds: float, port: int = PORT) -> float:
    """Connections that the server closes at once, each after the one before, or its queue would overflow. The client
    resets its end, so that none lingers in TIME_WAIT. By the median, which a processor that was taken away for a while
    does not move."""
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


DO: dict[str, Callable[..., float]] = {"listen": listen, "connect": connect}


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
