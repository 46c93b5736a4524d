"""firewalld over a real bus; the firewalld itself is one of the tests."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from kernel import firewalld
from kernel.errors import KernelError
from kernel.firewalld import Bus, Refused, connected
from tests.hosts import Host
from tests.kernel import bus

_SCRIPT = """
from kernel import firewalld
with firewalld.connected() as asked:
    assert asked is not None
    print(asked.has_source("trusted", "10.1.0.2/32"))
    asked.add_source("trusted", "10.1.0.2/32")
    asked.add_source("trusted", "10.1.0.2/32")
    asked.add_source("trusted", "fd00::2/128")
    print(asked.has_source("trusted", "10.1.0.2/32"), asked.has_source("public", "10.1.0.2/32"))
    for zone in ("public", "nothing"):
        try:
            asked.add_source(zone, "10.1.0.2/32")
        except firewalld.Refused as error:
            print(error.told)
    asked.remove_source("trusted", "10.1.0.2/32")
    asked.remove_source("trusted", "10.1.0.2/32")
    asked.remove_source("nothing", "10.1.0.2/32")
    print(asked.has_source("trusted", "10.1.0.2/32"))
"""


@pytest.mark.kernel
def test_sources_over_a_real_bus(host: Host) -> None:
    ask = [bus.PYTHON, "-c", "from kernel import firewalld\nwith firewalld.connected() as one: print(one)"]
    assert host.run(ask).stdout == "None\n"
    with bus.running(host):
        assert host.run(ask).stdout == "None\n"
        with bus.firewalld_running(host) as calls:
            printed = host.run([bus.PYTHON, "-c", _SCRIPT]).stdout.splitlines()
            assert printed == [
                "False",
                "True False",
                "ZONE_CONFLICT: '10.1.0.2/32' already bound to 'trusted'",
                "INVALID_ZONE: nothing",
                "False",
            ]
            assert calls()[:2] == ["querySource trusted 10.1.0.2/32", "addSource trusted 10.1.0.2/32"]
            assert "addSource trusted fd00::2/128" in calls()
        assert host.run(ask).stdout == "None\n"


def serve(path: Path, *answers: bytes) -> threading.Thread:
    """Listens at a socket and says these, one after each piece that comes; then ends."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def talk() -> None:
        with listening, listening.accept()[0] as one:
            one.settimeout(60)
            for answer in answers:
                if not one.recv(65536):
                    return
                one.sendall(answer)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "answers",
    [
        (b"REJECTED EXTERNAL\r\n",),
        (b"OK 1234",),
        (b"OK 1234\r\n", b"this is no message, whatever it may be"),
        (b"OK 1234\r\n" + b"l\x02\x00\x01" + b"\xff" * 12, b""),
        (b"",),
    ],
)
def test_who_is_no_bus_counts_as_no_firewalld(tmp_path: Path, answers: tuple[bytes, ...]) -> None:
    thread = serve(tmp_path / "bus", *answers)
    with connected(str(tmp_path / "bus")) as found:
        assert found is None
    thread.join(60)


def test_a_silent_bus_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewalld, "_TIMEOUT_S", 0.1)
    hello = firewalld.encode(firewalld.METHOD_RETURN, 1, {firewalld.REPLY_SERIAL: 1}, (":1.1",))
    owned = firewalld.encode(firewalld.METHOD_RETURN, 2, {firewalld.REPLY_SERIAL: 2}, (True,))
    serve(tmp_path / "bus", b"OK 1234\r\n", hello, owned)
    with connected(str(tmp_path / "bus")) as found:
        assert found is not None
        with pytest.raises(KernelError, match=r"addSource 10\.1\.0\.2/32 of zone trusted in firewalld"):
            found.add_source("trusted", "10.1.0.2/32")


def test_an_answer_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    hello = firewalld.encode(firewalld.METHOD_RETURN, 1, {firewalld.REPLY_SERIAL: 1}, (":1.1",))
    owned = firewalld.encode(firewalld.METHOD_RETURN, 2, {firewalld.REPLY_SERIAL: 2}, (True,))
    # Its header tells of an argument, and nothing follows.
    cut = struct.pack("<cBBBIII", b"l", firewalld.METHOD_RETURN, 0, 1, 0, 3, 7) + bytes([firewalld.SIGNATURE, 1])
    serve(tmp_path / "bus", b"OK 1234\r\n", hello, owned, cut + b"g\0\1g\0\0")
    with connected(str(tmp_path / "bus")) as found:
        assert found is not None
        with pytest.raises(KernelError, match=r"addSource 10\.1\.0\.2/32 of zone trusted in firewalld"):
            found.add_source("trusted", "10.1.0.2/32")


def test_messages_come_back_as_they_were_written() -> None:
    for arguments in ((), ("",), ("trusted", "10.1.0.2/32"), (True, "ä" * 9, 7, False)):
        fields: dict[int, firewalld.Value] = {firewalld.PATH: "/a/b", firewalld.MEMBER: "m", firewalld.REPLY_SERIAL: 9}
        message = firewalld.encode(firewalld.ERROR, 5, fields, arguments)
        assert firewalld._size(message) == len(message)
        found = firewalld.decode(message)
        assert (found.kind, found.serial, found.arguments) == (firewalld.ERROR, 5, arguments)
        assert {key: found.fields[key] for key in fields} == fields


def test_no_bus_and_no_right(tmp_path: Path) -> None:
    with connected(str(tmp_path / "nothing")) as found:
        assert found is None
    (tmp_path / "file").touch()
    with connected(str(tmp_path / "file")) as found:
        assert found is None
    with pytest.raises(OSError):
        Bus(os.fspath(tmp_path))
    assert issubclass(Refused, KernelError)
