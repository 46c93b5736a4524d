"""Hashes and programs: what the kernel takes, what it refuses, and in which words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kernel.bpf import R0, R1, R2, Assembler, HashMap, load_classifier
from kernel.errors import KernelError

pytestmark = pytest.mark.kernel


@pytest.fixture
def places() -> Iterator[HashMap]:
    made = HashMap("test", 8, 4, 3)
    yield made
    made.close()


def test_a_hash_holds_what_it_was_told(places: HashMap) -> None:
    assert places.get(b"a" * 8) is None
    places.put(b"a" * 8, b"1111")
    places.put(b"b" * 8, b"2222")
    places.put(b"a" * 8, b"3333")
    assert places.get(b"a" * 8) == b"3333"
    assert places.items() == {b"a" * 8: b"3333", b"b" * 8: b"2222"}
    assert places.drop(b"a" * 8)
    assert not places.drop(b"a" * 8)
    assert places.items() == {b"b" * 8: b"2222"}


def test_a_full_hash_says_so(places: HashMap) -> None:
    for number in range(3):
        places.put(number.to_bytes(8, "big"), b"1111")
    with pytest.raises(KernelError, match="Argument list too long") as caught:
        places.put(b"x" * 8, b"1111")
    assert caught.value.errno == errno.E2BIG
    places.put((2).to_bytes(8, "big"), b"2222")  # what is there can change


def test_jumps_lead_to_their_labels() -> None:
    program = Assembler()
    program.set(R0, 0)
    program.jump_if(R0, "==", 0, "right")
    program.label("wrong")
    program.set(R0, 1)
    program.exit()
    program.label("right")
    program.jump_if_registers(R0, "!=", R0, "wrong", bits=32)
    program.exit()
    code = program.code()
    offsets = [int.from_bytes(code[at + 2 : at + 4], "little", signed=True) for at in range(0, len(code), 8)]
    assert offsets == [0, 2, 0, 0, -3, 0]
    os.close(load_classifier("test", program))


@pytest.mark.parametrize(
    ("offset", "words"),
    [(1 << 12, "invalid bpf_context access"), (-8, "R1 is ctx, but expects|negative offset|access")],
)
def test_the_verifiers_own_words_are_told(offset: int, words: str) -> None:
    program = Assembler()
    program.load(R2, R1, offset, 4)
    program.set(R0, 0)
    program.exit()
    with pytest.raises(KernelError, match=words) as caught:
        load_classifier("test", program)
    assert caught.value.operation == "load BPF program test"


def test_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    made = HashMap("test", 8, 4, 3)
    made.close()
    made.close()
    with pytest.raises(KernelError):
        HashMap("test", 0, 4, 3)
    assert os.listdir("/proc/self/fd") == before
