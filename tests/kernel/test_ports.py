"""Claims of ports on disk, whatever was left there; and who listens at a port, as the kernel says it."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel import nft, ports
from kernel.errors import KernelError
from kernel.ports import Port, Ports
from kernel.record import Key, Record, Records
from tests.hosts import IPV6
from tests.kernel.spaces import Space


def record(container_id: str, *wanted: tuple[str, str, int], network: str = "net") -> Record:
    """A container that publishes these ports, (host address, protocol, number), at its port 80."""
    elements = [
        element
        for address, protocol, number in wanted
        for element in nft.publish(
            "" if address in ("", "::") else address,
            protocol,
            number,
            "fd00::2" if ":" in address else "10.1.0.2",
            80,
            "o",
        )
    ]
    return Record(Key(network, container_id, "eth0", "portmap"), elements=tuple(dict.fromkeys(elements)))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(str(tmp_path / "run"))


@pytest.fixture
def claims(records: Records) -> Ports:
    return Ports(records)


def test_a_port_and_what_it_meets() -> None:
    def meets(one: str, two: str) -> bool:
        return Port("tcp", 80, one).meets(Port("tcp", 80, two))

    assert meets("0.0.0.0", "192.0.2.1")
    assert meets("192.0.2.1", "0.0.0.0")
    assert meets("192.0.2.1", "192.0.2.1")
    assert meets("::", "fd00::1")
    assert not meets("192.0.2.1", "192.0.2.2")
    assert not meets("0.0.0.0", "::")
    assert not meets("::", "192.0.2.1")
    assert not Port("tcp", 80, "0.0.0.0").meets(Port("udp", 80, "0.0.0.0"))
    assert not Port("tcp", 80, "0.0.0.0").meets(Port("tcp", 81, "0.0.0.0"))
    assert (str(Port("tcp", 80, "::")), str(Port("udp", 53, "192.0.2.1"))) == ("80/tcp", "53/udp of 192.0.2.1")


def test_what_a_record_publishes_is_what_its_elements_say() -> None:
    one = record("c1", ("", "tcp", 80), ("192.0.2.1", "udp", 53), ("::", "sctp", 9), ("fd00::1", "tcp", 1))
    assert ports.of_record(one) == [
        Port("tcp", 80, "0.0.0.0"),
        Port("udp", 53, "192.0.2.1"),
        Port("sctp", 9, "::"),
        Port("tcp", 1, "fd00::1"),
    ]
    jump = nft.publish("", "tcp", 80, "10.1.0.2", 80, "o", chain="c_x")
    assert [ports.of_element(element) for element in jump] == [Port("tcp", 80, "0.0.0.0"), None, None]
    assert ports.of_record(Record(Key("n", "c", "e", "bridge"), elements=(nft.masquerade("10.1.0.2", "o"),))) == []


def test_ports_are_taken_and_given_back(claims: Ports, records: Records, tmp_path: Path) -> None:
    one, two = record("c1", ("", "tcp", 80), ("192.0.2.1", "udp", 53)), record("c2", ("192.0.2.1", "tcp", 80))
    three = record("c3", ("192.0.2.2", "udp", 53), ("", "udp", 80))
    assert claims.take(one) == []
    assert claims.take(one) == []  # again: its own is in nobody's way
    assert claims.take(two) == [(Port("tcp", 80, "192.0.2.1"), one)]
    assert records.read(two.key) is None
    assert claims.take(three) == []
    assert sorted(os.listdir(tmp_path / "run/ports")) == ["tcp-80", "udp-53", "udp-80"]
    assert len(json.loads((tmp_path / "run/ports/udp-53").read_bytes())) == 2
    os.unlink(records._path(one.key))
    assert claims.release(one) == set()
    assert claims.release(one) == set()
    assert claims.take(two) == []
    for gone in (two, three):
        os.unlink(records._path(gone.key))
        claims.release(gone)
    assert os.listdir(tmp_path / "run/ports") == []


def test_a_claim_without_its_record_counts_for_nothing(claims: Ports, records: Records, tmp_path: Path) -> None:
    """A process was killed between the two, or something else took the record."""
    one, two = record("c1", ("", "tcp", 80), ("", "tcp", 81)), record("c2", ("", "tcp", 80))
    claims.take(one)
    os.unlink(records._path(one.key))
    assert claims.take(two) == []
    # The same attachment came back with other ports: its old claim is none.
    records.write(record("c1", ("", "tcp", 82)))
    assert claims.take(record("c3", ("", "tcp", 81))) == []
    (tmp_path / "run/ports/tcp-7").write_text("not JSON")
    assert claims.take(record("c4", ("", "tcp", 7))) == []
    (tmp_path / "run/ports/stray").write_text("")
    (tmp_path / "run/ports/tcp-8~").write_text("[")
    claims.prune()
    assert sorted(os.listdir(tmp_path / "run/ports")) == ["tcp-7", "tcp-80", "tcp-81"]
    held = [json.loads((tmp_path / f"run/ports/tcp-{number}").read_bytes()) for number in (80, 81)]
    assert [[claim[1]["container_id"] for claim in one] for one in held] == [["c2"], ["c3"]]


def test_a_release_that_breaks_off_keeps_the_claims_of_others(
    claims: Ports, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = record("c1", ("192.0.2.1", "tcp", 80)), record("c2", ("192.0.2.2", "tcp", 80))
    assert claims.take(one) == claims.take(two) == []
    os.unlink(records._path(one.key))

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for work in (lambda: claims.release(one), claims.prune):
        with monkeypatch.context() as patch, pytest.raises(KernelError, match="No space"):
            patch.setattr(os, "write", full)
            work()
        assert claims.take(record("c3", ("", "tcp", 80))) == [(Port("tcp", 80, "0.0.0.0"), two)]


def test_one_container_shares_with_itself(claims: Ports, records: Records) -> None:
    first, second = record("c1", ("", "tcp", 80)), record("c1", ("", "tcp", 80), network="second")
    assert claims.take(first) == claims.take(second) == []
    other = record("c2", ("", "tcp", 80))
    assert {holder.key for _, holder in claims.take(other)} == {first.key, second.key}
    assert claims.release(other) == set()  # it was refused, and nothing of theirs is missing
    os.unlink(records._path(second.key))
    assert claims.release(second) == {first.key}
    os.unlink(records._path(first.key))
    assert claims.release(first) == set()


def _race(
    run_dir: str, number: int, start: multiprocessing.synchronize.Barrier, won: multiprocessing.Queue[str]
) -> None:
    records = Records(run_dir)
    start.wait()
    for port in range(50):
        if not Ports(records).take(record(f"c{number}", ("", "tcp", port + 1), network=f"n{port}")):
            won.put(f"{port}")


def test_of_many_at_once_one_gets_the_port(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), number, start, won)) for number in range(4)]
    for racer in racers:
        racer.start()
    winners = [won.get(timeout=60) for _ in range(50)]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert sorted(winners, key=int) == [str(port) for port in range(50)]
    assert won.empty()


# Listeners


@contextlib.contextmanager
def sockets(*made: socket.socket) -> Iterator[None]:
    try:
        yield
    finally:
        for one in made:
            one.close()


def bound(kind: int, address: str, number: int, *, only_six: bool = False) -> socket.socket:
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    if ":" in address:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_six)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((address, number))
    return one


def inode(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino


@pytest.mark.kernel
def test_who_listens(home: Space) -> None:
    tcp = bound(socket.SOCK_STREAM, "0.0.0.0", 8080)
    tcp.listen()
    udp = bound(socket.SOCK_DGRAM, "127.0.0.1", 53)
    with sockets(tcp, udp):
        everywhere = [Port("tcp", 8080, "0.0.0.0"), Port("udp", 53, "0.0.0.0"), Port("tcp", 53, "0.0.0.0")]
        found = ports.listeners(everywhere)
        assert [(one.port.number, one.address, one.inode) for one in found] == [
            (8080, "0.0.0.0", inode(tcp)),
            (53, "127.0.0.1", inode(udp)),
        ]
        (process,) = ports.owners([inode(tcp)])[inode(tcp)]
        assert process.pid == os.getpid()
        assert process.arguments
        assert ports.owners([]) == {}
        assert ports.owners([1]) == {1: []}
        # Not this host's address, another address, another protocol, no such protocol.
        free = [Port("tcp", 8080, "192.0.2.1"), Port("udp", 53, "127.0.0.2"), Port("udp", 8080, "0.0.0.0")]
        assert ports.listeners([*free, Port("sctp", 8080, "0.0.0.0")]) == []
    assert ports.listeners(everywhere) == []


@pytest.mark.kernel
@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_who_listens_in_both_families(home: Space) -> None:
    four, six, exact = Port("tcp", 80, "0.0.0.0"), Port("tcp", 80, "::"), Port("tcp", 80, "127.0.0.1")
    for address, only, seen_by in (
        ("::", False, (True, True, True)),
        ("::", True, (False, True, False)),
        ("::ffff:127.0.0.1", False, (True, False, True)),
        ("::1", False, (False, True, False)),
    ):
        one = bound(socket.SOCK_STREAM, address, 80, only_six=only)
        one.listen()
        with sockets(one):
            assert tuple(bool(ports.listeners([port])) for port in (four, six, exact)) == seen_by, address


@pytest.mark.kernel
def test_a_client_does_not_listen(home: Space) -> None:
    server = bound(socket.SOCK_STREAM, "127.0.0.1", 80)
    server.listen()
    client = bound(socket.SOCK_STREAM, "127.0.0.1", 40000)
    client.connect(("127.0.0.1", 80))
    asker = bound(socket.SOCK_DGRAM, "127.0.0.1", 40001)
    asker.connect(("127.0.0.1", 53))
    asked = [Port("tcp", 40000, "0.0.0.0"), Port("udp", 40001, "0.0.0.0"), Port("udp", 40001, "127.0.0.1")]
    with sockets(server, client, asker):
        assert all(ports._is_bound(port) for port in asked[1:])
        assert ports.listeners(asked) == []
    # A connection that is being closed keeps its port for a while.
    accepted = bound(socket.SOCK_STREAM, "127.0.0.1", 81)
    accepted.listen()
    with sockets(accepted):
        caller = socket.create_connection(("127.0.0.1", 81))
        answering, _ = accepted.accept()
        answering.close()
        caller.close()
    assert ports.listeners([Port("tcp", 81, "0.0.0.0")]) == []
