"""Messages and attributes as bytes, and a socket that stays in step whatever the kernel refuses."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import addr, link, netlink, nft
from kernel.errors import Denied, Exists, KernelError, NotFound
from kernel.netlink import Message
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space

attribute = st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=300))


@given(st.lists(attribute, max_size=20))
def test_attributes_come_back_in_order(wanted: list[tuple[int, bytes]]) -> None:
    packed = b"".join(netlink.attr(kind, payload) for kind, payload in wanted)
    assert len(packed) % 4 == 0
    assert netlink.attribute_list(packed) == wanted
    assert netlink.attributes(packed) == dict(wanted)


@given(st.binary(max_size=400), st.integers(0, 40))
def test_any_bytes_are_parsed_without_a_fault(data: bytes, offset: int) -> None:
    found = netlink.attribute_list(data, offset)
    assert sum(4 + len(payload) for _, payload in found) <= max(0, len(data) - offset)


@given(st.lists(attribute, max_size=5))
def test_nested_attributes_hold_attributes(wanted: list[tuple[int, bytes]]) -> None:
    packed = netlink.nested(18, *(netlink.attr(kind, payload) for kind, payload in wanted))
    assert struct.unpack_from("=HH", packed) == (len(packed), 18 | 0x8000)
    assert netlink.attribute_list(netlink.attributes(packed)[18]) == wanted


def test_texts_end_with_a_nul() -> None:
    assert netlink.string(3, "eth0") == struct.pack("=HH", 9, 3) + b"eth0\0\0\0\0"
    assert netlink.text(b"eth0\0rest") == "eth0"
    assert netlink.text(b"\xff\xfe") == "\ufffd\ufffd"
    assert netlink.text(None) == ""


@pytest.mark.kernel
def test_an_error_in_a_batch_leaves_the_socket_in_step(session: Session) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    index = link.get(session, "br0").index
    good = [addr.add_message(index, ip_interface(f"10.0.0.{n}/24")) for n in range(1, 6)]
    bad = Message(16, 0, struct.pack("=BxHiII", 0, 0, 99999, 1, 1), "bring link 99999 up")
    results = session.rtnl.attempt([good[0], bad, good[1], good[0], good[2]])
    assert [type(result) for result in results] == [type(None), NotFound, type(None), Exists, type(None)]
    assert "bring link 99999 up" in str(results[1])
    # Each later answer belongs to its own question.
    assert link.get(session, "br0").index == index
    with pytest.raises(NotFound, match="bring link 99999 up"):
        session.rtnl.execute([good[3], bad, good[3]])
    assert link.get(session, "lo").name == "lo"
    present = [str(address.interface) for address in addr.all_addresses(session, index, 4)]
    assert present == ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24", "10.0.0.4/24"]


@pytest.mark.kernel
def test_the_kernels_own_words_are_in_the_error(session: Session) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    body = struct.pack("=BxHiII", 0, 0, link.get(session, "br0").index, 0, 0) + netlink.u32(4, 1)
    with pytest.raises(KernelError) as caught:
        session.rtnl.execute([Message(16, 0, body, "set the MTU of br0 to 1")])
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == "set the MTU of br0 to 1: Invalid argument (mtu less than device minimum)"


@pytest.mark.kernel
def test_an_empty_batch_asks_nothing(session: Session) -> None:
    session.rtnl.execute([])
    assert session.rtnl.attempt([]) == []


@pytest.mark.kernel
def test_a_large_batch_is_acknowledged_to_its_end(session: Session) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    index = link.get(session, "br0").index
    wanted = [ip_interface(f"10.{n >> 8}.{n & 255}.1/32") for n in range(2000)]
    session.rtnl.execute([addr.add_message(index, one) for one in wanted])
    assert {address.interface for address in addr.all_addresses(session, index, 4)} == set(wanted)


@pytest.mark.kernel
def test_a_socket_stays_where_it_was_made(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    with spaces.inside(container), netlink.Socket(netlink.ROUTE) as theirs:
        assert link.get(session, "br0").name == "br0"
        home = theirs
    assert home.fileno() == -1


@pytest.mark.kernel
def test_an_unknown_nfnetlink_subsystem_is_an_error_of_every_message(session: Session) -> None:
    begin = Message(16, 0, struct.pack(">BBH", 0, 0, 10), "begin")
    lost = Message((10 << 8) | 12, netlink.CREATE, b"\0\0\0\0", "add an element to nowhere")
    end = Message(17, 0, struct.pack(">BBH", 0, 0, 10), "end")
    results = session.netfilter.transact(begin, [lost, lost], end)
    assert all(isinstance(result, KernelError) for result in results)
    assert "add an element to nowhere" in str(results[0])
    assert nft.all_elements(session, "masq4") == []


@pytest.mark.kernel
def test_without_the_right_the_error_says_so(session: Session) -> None:
    # CAP_NET_ADMIN is looked for in the user namespace that owns the network namespace; a thread may drop it.
    import ctypes  # noqa: PLC0415
    import threading  # noqa: PLC0415

    caught: list[BaseException] = []

    def without() -> None:
        # capset(2): version 3, this thread, no capability.
        assert ctypes.CDLL(None).capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)) == 0
        try:
            with Session() as poor:
                link.add_bridge(poor, "br0", "02:00:00:00:00:01")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=without)
    thread.start()
    thread.join()
    assert isinstance(caught[0], Denied)
    assert "add bridge br0" in str(caught[0])


def test_a_list_that_changed_meanwhile_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answers(self: netlink.Socket, _what: str) -> Iterator[tuple[int, int, int, bytes]]:
        asked.append(self._sequence)
        interrupted = 0x10 if len(asked) < 3 else 0  # NLM_F_DUMP_INTR
        yield 16, 2 | interrupted, self._sequence, b"body %d" % len(asked)
        yield 3, 2, self._sequence, bytes(4)

    monkeypatch.setattr(netlink.Socket, "_receive", answers)
    monkeypatch.setattr(netlink.Socket, "_send", lambda *_: None)
    with netlink.Socket(netlink.ROUTE) as socket:
        assert list(socket.dump(Message(18, 0, b"", "list links"))) == [b"body 3"]
        assert len(set(asked)) == 3
        asked.clear()
        monkeypatch.setattr(netlink, "_DUMP_TRIES", 2)
        assert list(socket.dump(Message(18, 0, b"", "list links"))) == [b"body 2"]
