"""Two paths of TCP side by side, each between two network namespaces: a process `python -I -S pair.py`.

One thread holds both ends of both connections: sockets stay in the namespace in which they were made. So the same code,
the same memory and the same processor carry both sides, no scheduler decides when the other end goes on, and all that
differs is what the kernel does between the namespaces. Windows of half a millisecond alternate, ours, peer, peer, ours
and the other way round; what else the machine does hits both, and makes outliers that a median leaves out.

It reads one JSON request for each round and answers with one line:

    {"do": "stream", "ours": WAY, "peer": WAY, "windows": 40}   WAY: {"source": path, "target": path, "address": "::1"}
    {"ours": [rates], "peer": [rates], "ours_cpu": [rates], "peer_cpu": [rates]}    or {"error": text}

`source` and `target` are paths of namespaces, `address` is the target's. A rate is bytes (stream) or round trips of one
byte (trips) a second; with `_cpu`, a second of this thread's processor time. A round has connections of its own, with
buffers of a fixed size, which are warm before the first window. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_CLONE_NEWNET = 0x40000000
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # include/uapi/asm-generic/socket.h
_BUFFER = 4 << 20
_CHUNK = 1 << 16
_FLIGHT = 1 << 20  # bytes that may be under way: a window of a slow path ends soon all the same
_TIMEOUT_S = 10  # without any progress
_WINDOW_S = 0.0005  # shorter than what a scheduler gives to others at a time
_LONGEST_S = 0.25  # what a window of a slow path may take
_ROUND_S = 2.0
_WARM_UP = 8
_SMALLEST = {"stream": _CHUNK, "trips": 10}

_libc = ctypes.CDLL(None, use_errno=True)
_chunk = memoryview(bytes(_CHUNK))
_sink = bytearray(1 << 20)


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """This thread is in the network namespace at that path. Raises OSError."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(path, os.O_RDONLY)
        try:
            _setns(there, path)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(own, "the first namespace")
    finally:
        os.close(own)


def _setns(descriptor: int, what: str) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {what}")


class Ends:
    """Both ends of a connection. What is counted begins when all that was sent before has come."""

    def __init__(self, way: Mapping[str, str]) -> None:
        address = way["address"]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(way["target"]):
            listener = socket.socket(family)
        with listener:
            _prepare(listener)
            listener.bind((address, 0))
            listener.listen(1)
            with inside(way["source"]):
                self.near = socket.socket(family)
            try:
                _prepare(self.near)
                self.near.connect(listener.getsockname())
                self.far, _ = listener.accept()
            except BaseException:
                self.near.close()
                raise
        _prepare(self.far)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self.near.close()
        self.far.close()

    def stream(self, amount: int) -> int:
        """So many bytes through, or fewer on a slow path; how many."""
        sent = got = 0
        end = time.perf_counter() + _LONGEST_S
        while got < amount:
            idle = True
            if sent < amount and sent - got < _FLIGHT:
                with contextlib.suppress(BlockingIOError):
                    sent += self.near.send(_chunk[: amount - sent], socket.MSG_DONTWAIT)
                    idle = False
            with contextlib.suppress(BlockingIOError):
                count = self.far.recv_into(_sink, 0, socket.MSG_DONTWAIT)
                if not count:
                    raise ConnectionError("the connection ended")
                got += count
                idle = False
            if idle and not select.select([self.far], [], [], _TIMEOUT_S)[0]:
                raise TimeoutError(f"nothing came within {_TIMEOUT_S} s")
            if sent < amount and time.perf_counter() > end:
                amount = sent
        return got

    def trips(self, amount: int) -> int:
        """So many round trips, or fewer on a slow path; how many."""
        near, far = self.near, self.far
        end = time.perf_counter() + _LONGEST_S
        for number in range(amount):
            near.send(b"x")
            there = far.recv(1)
            far.send(b"x")
            if not (there and near.recv(1)):
                raise ConnectionError("the connection ended")
            if time.perf_counter() > end:
                return number + 1
        return amount


def _prepare(one: socket.socket) -> None:
    # Fixed buffers: what the kernel would grow them to depends on luck in the first milliseconds.
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        one.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Not settimeout, which makes two system calls of each.
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        one.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _TIMEOUT_S, 0))


Work = Callable[[int], int]


def timed(work: Work, amount: int) -> tuple[float, float]:
    """What a window has of it in a second, and in a second of processor time."""
    cpu, began = time.thread_time(), time.perf_counter()
    done = work(amount)
    ended, cpu_ended = time.perf_counter(), time.thread_time()
    return done / (ended - began), done / max(cpu_ended - cpu, 1e-9)


def warm_up(works: tuple[Work, Work], smallest: int) -> int:
    """How much makes a window on the slower side; both are warm then."""
    amount = smallest
    for _ in range(2):
        slower = min(max(timed(work, amount)[0] for _ in range(_WARM_UP)) for work in works)
        amount = max(smallest, int(slower * _WINDOW_S))
    return amount


def round_of(do: str, ours: Ends, peer: Ends, windows: int) -> dict[str, list[float]]:
    """At least so many windows of each; fewer, and at least two, where a path is slow."""
    works: tuple[Work, Work] = (ours.stream, peer.stream) if do == "stream" else (ours.trips, peer.trips)
    end = time.perf_counter() + _ROUND_S
    amount = warm_up(works, _SMALLEST[do])
    found: tuple[list[tuple[float, float]], ...] = ([], [])
    for number in range((windows + 1) // 2):
        for side in (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1):
            found[side].append(timed(works[side], amount))
        if time.perf_counter() > end:
            break
    (first, first_cpu), (second, second_cpu) = (map(list, zip(*one, strict=True)) for one in found)
    return {"ours": first, "peer": second, "ours_cpu": first_cpu, "peer_cpu": second_cpu}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        with Ends(request["ours"]) as ours, Ends(request["peer"]) as peer:
            return dict(round_of(request["do"], ours, peer, request["windows"]))
    except OSError as error:
        return {"error": f"{error}: {dict(request)}"}


def main() -> None:
    gc.disable()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
