"""Clients of ipamd, as many as are asked for: `python -m bench.load`, inside a host.

- A client is a process with a connection of its own and one request at a time, as a warm worker is; it uses the
  client library that the plugins use, and sends what they send. Clients share the machine's processors with ipamd, as
  they do on a real host, so the numbers are of both together.
- This process has no connection itself: it forks clients, tells them what to do and adds up what they say. It reads one
  JSON request per line and answers with one (see `Master.answer`).
- Garbage collection is off in the clients. A run begins for all at the same moment and ends at the same moment; what
  is still under way then is finished, but not counted.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb

_TIMEOUT_S = 30.0
_LEAD_S = 0.05  # from the word to all clients until the run begins


class Worker:
    """One client, in a process of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._clients: dict[str, Client] = {}
        self._held: list[tuple[pb.AttachmentKey, int]] = []
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self._boot_id = file.read().strip()

    def serve(self) -> None:
        """Until the pipe ends."""
        gc.disable()
        while True:
            try:
                request = self._pipe.recv()
            except EOFError:
                return
            try:
                self._pipe.send(getattr(self, request.pop("do"))(**request))
            except IpamError as error:
                self._pipe.send({"error": f"{error.code.name}: {error.message}"})

    def connect(self, socket: str) -> dict[str, Any]:
        """So that making the connection is no part of a run."""
        if socket not in self._clients:
            self._clients[socket] = Client(socket, timeout_s=_TIMEOUT_S)
        self._clients[socket].status()
        return {}

    def pool(self, socket: str, pool: str, subnet: str, mode: str = "") -> dict[str, Any]:
        """Makes a pool of one subnet."""
        spec = pb.PoolSpec(range_sets=[pb.RangeSet(ranges=[pb.Range(subnet=subnet)])], mode=mode)
        self._clients[socket].create_pool(pool, spec)
        return {}

    def run(self, socket: str, pool: str, begin_s: float, end_s: float) -> dict[str, Any]:
        """Allocates from `begin_s` to `end_s` (time.monotonic): microseconds of each answer that came by then."""
        client = self._clients[socket]
        took: list[float] = []
        time.sleep(max(0.0, begin_s - time.monotonic()))
        used_s = _cpu_s()
        while True:
            began = time.perf_counter_ns()
            self._allocate(client, pool)
            ended = time.perf_counter_ns()
            if time.monotonic() > end_s:
                return {"took_us": took, "cpu_s": _cpu_s() - used_s}
            took.append((ended - began) / 1000)

    def fill(self, socket: str, pool: str, count: int, spare: int = 0) -> dict[str, Any]:
        """Allocates so many, for good, but for `spare` of them, which are given back."""
        for _ in range(count):
            self._allocate(self._clients[socket], pool)
        self._held = random.sample(self._held, spare)
        self.release(socket)
        return {}

    def release(self, socket: str) -> dict[str, Any]:
        """Gives back what `run` took: microseconds of each answer."""
        client = self._clients[socket]
        took = []
        for key, generation in self._held:
            began = time.perf_counter_ns()
            client.set_request_id(os.urandom(8).hex())
            client.release(key, generation=generation)
            took.append((time.perf_counter_ns() - began) / 1000)
        self._held.clear()
        return {"took_us": took}

    def read(self, socket: str) -> dict[str, Any]:
        """Reads every allocation and keeps none."""
        began = time.perf_counter()
        first = count = 0.0
        for _ in self._clients[socket].list_allocations():
            first = first or time.perf_counter() - began
            count += 1
        return {"count": count, "first_ms": first * 1000, "last_ms": (time.perf_counter() - began) * 1000}

    def _allocate(self, client: Client, pool: str) -> None:
        """What the ipamd plugin does in an ADD. Real container ids have 64 random hexadecimal digits."""
        key = pb.AttachmentKey(client="cni", network="bench", container_id=os.urandom(32).hex(), ifname="eth0")
        client.set_request_id(os.urandom(8).hex())
        answer = client.allocate(
            key,
            netns=pb.Netns(inode=4026532000, cookie=7, path=f"/var/run/netns/cni-{key.container_id[:36]}"),
            at=pb.Instant(boot_id=self._boot_id, boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME)),
            pools=(pool,),
        )
        self._held.append((key, answer.generation))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Master:
    """Holds the clients."""

    def __init__(self) -> None:
        self._fork = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`do` is one of:

        run: `clients`, `socket`, `pool`, `seconds` → took_us of all clients, cpu_s of all clients
        release: `clients`, `socket` → took_us, wall_s
        fill: `clients`, `socket`, `pool`, `count`, `spare` → {}: so many, of which the spare ones are given back
        pool: `socket`, `pool`, `subnet`, `mode` → {}: makes the pool
        read: `socket` → count, first_ms, last_ms: every allocation, and when the first and the last came
        page: `port` → text: /metrics of an ipamd of this host

        `socket` may be a list: clients take turns in taking one.
        """
        do = str(request["do"])
        if do == "page":
            return {"text": _page(int(request["port"]))}
        clients = self._clients(int(request.get("clients", 1)))
        given = request["socket"]
        sockets = [given] if isinstance(given, str) else given
        to = [{"socket": sockets[index % len(sockets)]} for index in range(len(clients))]
        _all(clients, [{"do": "connect", **one} for one in to])
        if do in ("pool", "read"):
            more = {key: request[key] for key in ("pool", "subnet", "mode") if key in request}
            return _all(clients[:1], [{"do": do, **to[0], **more}])[0]
        if do == "run":
            begin_s = time.monotonic() + _LEAD_S
            order = {"do": "run", "pool": request["pool"], "begin_s": begin_s, "end_s": begin_s + request["seconds"]}
            found = _all(clients, [{**order, **one} for one in to])
            return {"took_us": _joined(found), "cpu_s": sum(one["cpu_s"] for one in found)}
        if do == "fill":
            counts = _shares(int(request["count"]), len(clients))
            spares = _shares(int(request.get("spare", 0)), len(clients))
            orders = [
                {"do": "fill", "pool": request["pool"], "count": count, "spare": spare, **one}
                for count, spare, one in zip(counts, spares, to, strict=True)
            ]
            _all(clients, orders)
            return {}
        began = time.perf_counter()
        found = _all(clients, [{"do": "release", **one} for one in to])
        return {"took_us": _joined(found), "wall_s": time.perf_counter() - began}

    def _clients(self, count: int) -> list[Connection]:
        while len(self._pipes) < count:
            ours, theirs = self._fork.Pipe()
            self._fork.Process(target=_serve, args=(theirs, [*self._pipes, ours]), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)
        return self._pipes[:count]


def _serve(pipe: Connection, others: list[Connection]) -> None:
    for other in others:
        other.close()  # else a client would live on for as long as its siblings do
    # SIGTERM or SIGKILL of the master: nobody is left to tell anything.
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        Worker(pipe).serve()


def _all(clients: list[Connection], orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every client's answer to its order. Raises RuntimeError with the first error that one told."""
    for pipe, order in zip(clients, orders, strict=True):
        pipe.send(order)
    found: list[dict[str, Any]] = [pipe.recv() for pipe in clients]
    for one in found:
        if "error" in one:
            raise RuntimeError(one["error"])
    return found


def _shares(count: int, parts: int) -> list[int]:
    each, rest = divmod(count, parts)
    return [each + (index < rest) for index in range(parts)]


def _joined(found: list[dict[str, Any]]) -> list[float]:
    return [took for one in found for took in one["took_us"]]


def _page(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def main() -> None:
    master = Master()
    for line in sys.stdin:
        try:
            answer = master.answer(json.loads(line))
        except (RuntimeError, EOFError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
