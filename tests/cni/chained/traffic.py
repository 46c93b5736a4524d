"""Servers in containers that say who they are and whom they see, and clients that ask them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests.hosts import Host, Netns, wait_until

# Arguments: a name, then "tcp:80", "udp:53"; each listens at [::], and so at 0.0.0.0 too. Answers "name peer-address".
_SERVER = """
import selectors, socket, sys
name, *specs = sys.argv[1:]
chosen = selectors.DefaultSelector()
for spec in specs:
    protocol, port = spec.split(":")
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    try:
        one = socket.socket(socket.AF_INET6, kind)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        where = "::"
    except OSError:
        one, where = socket.socket(socket.AF_INET, kind), "0.0.0.0"
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((where, int(port)))
    if protocol == "tcp":
        one.listen(64)
    chosen.register(one, selectors.EVENT_READ, protocol)
print("ready", flush=True)
while True:
    for key, _ in chosen.select():
        if key.data == "tcp":
            other, peer = key.fileobj.accept()
            other.settimeout(5)
            with other:
                other.sendall(f"{name} {peer[0].removeprefix('::ffff:')}".encode())
        else:
            _, peer = key.fileobj.recvfrom(100)
            key.fileobj.sendto(f"{name} {peer[0].removeprefix('::ffff:')}".encode(), peer)
"""

# Reads [[protocol, address, port, source port, source address], ...] and prints the answers, "" where none came.
_CLIENT = """
import json, socket, sys
timeout, tries = float(sys.argv[1]), int(sys.argv[2])
answers = []
for protocol, address, port, own, source in json.load(sys.stdin):
    answer = ""
    for _ in range(tries):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as one:
            one.settimeout(timeout)
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if own or source:
                    one.bind((source, own))
                one.connect((address, port))
                if protocol == "udp":
                    one.send(b"who?")
                answer = one.recv(100).decode()
            except OSError:
                continue
        if answer:
            break
    answers.append(answer)
print(json.dumps(answers))
"""

Query = tuple[str, str, int] | tuple[str, str, int, int] | tuple[str, str, int, int, str]


@contextlib.contextmanager
def serving(where: Netns | Host, name: str, *specs: str) -> Iterator[int]:
    """A server for the duration of the block; its process id."""
    process = where.popen(
        [sys.executable, "-I", "-S", "-c", _SERVER, name, *specs], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(where: Netns | Host, *queries: Query) -> list[str]:
    """The answers; each question is repeated until one comes, within reason."""
    return _ask(where, queries, "2", "10")


def no_answer(where: Netns | Host, *queries: Query) -> list[str]:
    """As `ask`, but waits for a moment only: what comes is wrong, and [""] is right."""
    return _ask(where, queries, "0.3", "1")


def _ask(where: Netns | Host, queries: Sequence[Query], timeout: str, tries: str) -> list[str]:
    filled = [(*query, *(0, "")[len(query) - 3 :]) for query in queries]
    argv = [sys.executable, "-I", "-S", "-c", _CLIENT, timeout, tries]
    found: list[str] = json.loads(where.run(argv, input=json.dumps(filled)).stdout)
    return found


def until(where: Netns | Host, query: Query, answer: str) -> None:
    """Asks until that is the answer."""
    wait_until(lambda: _ask(where, [query], "0.5", "1") == [answer], f"{answer!r} from {query}")
