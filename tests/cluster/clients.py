"""A node's clients: allocate and release without end, and write down when they sent and heard what.

    python -m tests.cluster.clients SOCKET LOG NODE POOL=[SUBNET]...

One thread with a connection of its own for each POOL. It has slots, each with a key that it uses again and again, as
restarted containers do. It picks a slot at random: an empty one allocates, a held one releases. Now and then it asks
for an address of SUBNET by its number, asks again for what it has, or repeats a release of a generation that is long
gone, which must free nothing. After each answer it rests for a random time, of `--rest` seconds at most.

Lines on standard input: "go" begins; "stop" ends it: what has no clear outcome is released, again and again until that
is answered, and what it owns stays owned; then "stopped" is printed. The log is as `judge` wants it; each line is
written at once, so that nothing is lost with the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path

from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.hosts import PATIENCE_S, ROOT, HostError

NETWORK = "faults"
_PAUSE_S = 0.05  # after a refusal: else a client that has no server takes all of a processor
_LIMIT_S = 120.0  # for the end


class Log:
    """One file for all threads of a process."""

    def __init__(self, path: Path, node: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._node = node

    def write(self, number: int, kind: str, key: str, **more: object) -> None:
        """The moment is taken here, so before a request is sent and after its answer came."""
        event = {"t": time.monotonic_ns(), "node": self._node, "n": number, "e": kind, "k": key, **more}
        os.write(self._file, json.dumps(event, separators=(",", ":")).encode() + b"\n")


class Slot:
    """A key and what is known of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = pb.AttachmentKey(client="test", network=NETWORK, container_id=name, ifname="eth0")
        self.state = "empty"  # held, or unknown
        self.generation = 0
        self.former = 0  # the generation before this one


class Thread:
    """One client with one connection and one request at a time."""

    def __init__(self, given: argparse.Namespace, log: Log, index: int) -> None:
        self._client = Client(given.socket, timeout_s=given.timeout)
        self._log = log
        self._rest_s: float = given.rest
        self._next = iter(range(index, sys.maxsize, len(given.pools)))
        self._pool, _, subnet = given.pools[index].partition("=")
        self._random = random.Random(f"{given.node} {index}")
        self._addresses = ip_network(subnet) if subnet else None
        self._slots = [Slot(f"c{index}-{slot}") for slot in range(given.slots)]

    def work(self, stop: threading.Event) -> None:
        while not stop.is_set():
            slot = self._random.choice(self._slots)
            luck = self._random.random()
            if slot.state == "empty" or (slot.state == "unknown" and luck < 0.5) or luck < 0.05:
                done = self.allocate(slot, luck)
            elif slot.former and luck < 0.1:
                done = self.release_late(slot)
            else:
                done = self.release(slot)
            if not done:
                stop.wait(_PAUSE_S)
            elif self._rest_s:
                stop.wait(self._rest_s * self._random.random())

    def finish(self) -> None:
        """Raises TimeoutError where something keeps being refused."""
        deadline = time.monotonic() + _LIMIT_S
        for slot in self._slots:
            while slot.state == "unknown" and not self.release(slot):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{slot.name} could not be released within {_LIMIT_S:g} s")
                time.sleep(_PAUSE_S)

    def allocate(self, slot: Slot, luck: float) -> bool:
        number = next(self._next)
        wanted: tuple[str, ...] = ()
        if self._addresses is not None and slot.state == "empty" and luck < 0.2:
            wanted = (str(self._addresses[self._random.randrange(2, self._addresses.num_addresses - 1)]),)
        before = slot.state
        self._log.write(number, "ask", slot.name, p=self._pool)
        try:
            answer = self._client.allocate(slot.key, pools=(self._pool,), requested=wanted)
        except IpamError as error:
            self._refused(number, slot, error)
            if before == "empty" and error.code.name in ("RESOURCE_EXHAUSTED", "ALREADY_EXISTS"):
                return error.code.name == "ALREADY_EXISTS"  # the address that was asked for is another's: go on
            slot.state = "unknown" if before != "held" else before
            return False
        addresses = [address.cidr.partition("/")[0] for address in answer.addresses]
        more = {"g": answer.generation, "new": answer.created, "a": addresses}
        self._log.write(number, "got", slot.name, p=self._pool, **more)
        if answer.generation != slot.generation:
            slot.former, slot.generation = slot.generation, answer.generation
        slot.state = "held"
        return True

    def release(self, slot: Slot) -> bool:
        number = next(self._next)
        generation = slot.generation if slot.state == "held" else 0
        self._log.write(number, "free", slot.name, g=generation)
        slot.state = "unknown"
        try:
            self._client.release(slot.key, generation=generation)
        except IpamError as error:
            self._refused(number, slot, error)
            return False
        self._log.write(number, "freed", slot.name)
        slot.state = "empty"
        return True

    def release_late(self, slot: Slot) -> bool:
        number = next(self._next)
        self._log.write(number, "late", slot.name, g=slot.former)
        try:
            self._client.release(slot.key, generation=slot.former)
        except IpamError as error:
            self._refused(number, slot, error)
            return False
        self._log.write(number, "freed", slot.name)
        return True

    def _refused(self, number: int, slot: Slot, error: IpamError) -> None:
        self._log.write(number, "no", slot.name, p=self._pool, c=error.code.name, m=error.message)


class Clients:
    """The clients of one node, as a process; for the test. They end with the test's process."""

    def __init__(self, node: str, socket: Path, log: Path, pools: Mapping[str, str], rest_s: float = 0.0) -> None:
        """`pools`: name → subnet of which they ask for single addresses; "": they do not."""
        self.node = node
        self.log = log
        argv = [sys.executable, "-m", "tests.cluster.clients", str(socket), str(log), node, f"--rest={rest_s}"]
        argv += [f"{name}={subnet}" for name, subnet in pools.items()]
        # Real ones share no processor with etcd, whose leader would be lost for want of time.
        argv = ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "15", *argv]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def go(self) -> None:
        self._say("go")

    def stop(self) -> None:
        """Returns at once."""
        self._say("stop")

    def stopped(self) -> None:
        """Waits for it. Raises HostError unless all that was unclear could be released."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            answer = self._process.stdout.readline() if selector.select(_LIMIT_S + PATIENCE_S) else "nothing\n"
        if answer != "stopped\n":
            raise HostError(f"the clients of {self.node}: {answer.strip() or 'they ended'}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("socket", "log", "node"):
        parser.add_argument(name)
    parser.add_argument("pools", nargs="+")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rest", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=5.0)  # a plugin's
    return parser.parse_args()


def main() -> int:
    given = arguments()
    log = Log(Path(given.log), given.node)
    clients = [Thread(given, log, index) for index in range(len(given.pools))]
    running: list[threading.Thread] = []
    stop = threading.Event()
    failed: list[BaseException] = []

    def run(client: Thread) -> None:
        try:
            client.work(stop)
            client.finish()
        except BaseException as error:
            failed.append(error)

    for line in sys.stdin:
        if line == "go\n":
            stop.clear()
            running = [threading.Thread(target=run, args=(client,)) for client in clients]
            for thread in running:
                thread.start()
        else:
            stop.set()
            for thread in running:
                thread.join()
            print(f"failed: {failed[0]!r}" if failed else "stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
