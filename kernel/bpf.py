"""BPF: a small assembler, programs for traffic control, and hash maps. bpf(2), without any library.

Rules of this file
- Programs are of a dozen instructions, written here in Python: nothing is compiled, and no compiler is needed.
- Descriptors are the caller's. A map lives as long as a program that uses it, a program as long as a filter that does.

Sources: include/uapi/linux/bpf.h, Documentation/bpf/standardization/instruction-set.rst, kernel/bpf/syscall.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kernel.errors import KernelError, NotFound, from_errno

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT, _PROG_LOAD = 0, 1, 2, 3, 4, 5
_HASH, _ARRAY, _NO_PREALLOC = 1, 2, 1
_SCHED_CLS = 3
_LOG_BYTES = 1 << 16
_ATTR_BYTES = 144  # of the kernel's union, as of 6.6; what is zero may be longer than an older kernel knows

# Registers. R1 has the context at first; R1 to R5 are a helper's arguments and are lost by its call; R10 is the stack.
R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)

# Helpers, by their numbers.
MAP_LOOKUP, RANDOM, REDIRECT, CHANGE_TYPE, HASH_OF, ADJUST_ROOM, FIB_LOOKUP = 1, 7, 23, 32, 34, 50, 69
REDIRECT_NEIGHBOUR, REDIRECT_PEER, CLOCK, CHECK_MTU = 152, 155, 160, 163

# Fields of struct __sk_buff.
SKB_LENGTH, SKB_PROTOCOL, SKB_VLAN_PRESENT, SKB_IFINDEX, SKB_DATA, SKB_DATA_END = 0, 16, 20, 40, 76, 80
SKB_SEGMENT = 176  # the payload of each segment that this is cut into, 0: it is not

_LOADS = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}
_STORES = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}
_CONST_STORES = {1: 0x72, 2: 0x6A, 4: 0x62, 8: 0x7A}
_OPERATIONS = {"+": 0x00, "|": 0x40, "&": 0x50, "<<": 0x60, ">>": 0x70, "^": 0xA0}
_JUMPS = {"==": 0x10, ">": 0x20, "!=": 0x50}
_JMP, _JMP32, _BY_REGISTER = 0x05, 0x06, 0x08


@dataclass(frozen=True, slots=True)
class _Instruction:
    code: int
    dst: int = 0
    src: int = 0
    offset: int = 0
    constant: int = 0
    label: str = ""  # where a jump leads


class Assembler:
    """Instructions in their order; each method adds one. `code` is what the kernel takes."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}

    def load(self, dst: int, src: int, offset: int, size: int) -> None:
        """dst = the `size` bytes at src + offset."""
        self._add(_LOADS[size], dst, src, offset)

    def store(self, dst: int, offset: int, src: int, size: int) -> None:
        """The `size` bytes at dst + offset = src."""
        self._add(_STORES[size], dst, src, offset)

    def store_constant(self, dst: int, offset: int, constant: int, size: int) -> None:
        """The `size` bytes at dst + offset = constant."""
        self._add(_CONST_STORES[size], dst, 0, offset, constant)

    def move(self, dst: int, src: int) -> None:
        """dst = src."""
        self._add(0xBF, dst, src)

    def set(self, dst: int, constant: int) -> None:
        """dst = constant, of 32 bits with sign."""
        self._add(0xB7, dst, 0, 0, constant)

    def set_wide(self, dst: int, constant: int) -> None:
        """dst = constant, of 64 bits without sign."""
        low, high = struct.unpack("=ii", struct.pack("=II", constant & 0xFFFFFFFF, constant >> 32))
        self._add(0x18, dst, 0, 0, low)
        self._add(0, 0, 0, 0, high)

    def calculate(self, dst: int, operation: str, constant: int) -> None:
        """dst = dst "+", "|", "&", "<<", ">>" (without sign) or "^" a constant, of 32 bits with sign."""
        self._add(0x07 | _OPERATIONS[operation], dst, 0, 0, constant)

    def calculate_registers(self, dst: int, operation: str, src: int) -> None:
        """As `calculate`, with a register."""
        self._add(0x0F | _OPERATIONS[operation], dst, src)

    def to_network(self, dst: int, bits: int) -> None:
        """The lowest `bits` of dst as a packet has them; the others are 0."""
        self._add(0xDC, dst, 0, 0, bits)

    def set_map(self, dst: int, descriptor: int) -> None:
        """dst = a map."""
        self._add(0x18, dst, 1, 0, descriptor)  # 1: BPF_PSEUDO_MAP_FD
        self._add(0)

    def set_cell(self, dst: int, descriptor: int) -> None:
        """dst = where the number of a `Cell` lies."""
        self._add(0x18, dst, 2, 0, descriptor)  # 2: BPF_PSEUDO_MAP_VALUE, at the offset of the next
        self._add(0)

    def call(self, helper: int) -> None:
        """R0 = a helper's answer."""
        self._add(0x85, 0, 0, 0, helper)

    def jump_if(self, dst: int, comparison: str, constant: int, label: str, *, bits: int = 64) -> None:
        """To the label where "==", "!=" or ">" (without sign) holds."""
        self._add(_JUMPS[comparison] | (_JMP if bits == 64 else _JMP32), dst, 0, 0, constant, label)

    def jump_if_registers(self, dst: int, comparison: str, src: int, label: str, *, bits: int = 64) -> None:
        """As `jump_if`, with a register."""
        self._add(_JUMPS[comparison] | _BY_REGISTER | (_JMP if bits == 64 else _JMP32), dst, src, 0, 0, label)

    def jump(self, label: str) -> None:
        """To the label."""
        self._add(_JMP, label=label)

    def label(self, name: str) -> None:
        """The next instruction is where this label leads."""
        self._labels[name] = len(self._instructions)

    def exit(self) -> None:
        """The program's answer is R0."""
        self._add(0x95)

    def code(self) -> bytes:
        """All of it, with offsets in the place of labels."""
        return b"".join(self._packed())

    def _packed(self) -> Iterator[bytes]:
        for at, one in enumerate(self._instructions):
            offset = self._labels[one.label] - at - 1 if one.label else one.offset
            # Two fields of bits, whose order is the machine's, too.
            registers = one.dst | one.src << 4 if sys.byteorder == "little" else one.dst << 4 | one.src
            yield struct.pack("=BBhi", one.code, registers, offset, one.constant)

    def _add(self, code: int, dst: int = 0, src: int = 0, offset: int = 0, constant: int = 0, label: str = "") -> None:
        self._instructions.append(_Instruction(code, dst, src, offset, constant, label))


class HashMap:
    """A hash of the kernel. `close` it: programs that were loaded with it keep it."""

    _kind, _flags = _HASH, _NO_PREALLOC

    def __init__(self, name: str, key_bytes: int, value_bytes: int, entries: int) -> None:
        """At most `entries` of them. Memory is taken with each. Raises KernelError."""
        attributes = struct.pack(
            "=IIIIII4x16s", self._kind, key_bytes, value_bytes, entries, self._flags, 0, _object_name(name)
        )
        self.fd = _bpf(_MAP_CREATE, attributes, f"make BPF map {name}")
        self._what = f"BPF map {name}"
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        self._next = ctypes.create_string_buffer(key_bytes)

    def put(self, key: bytes, value: bytes) -> None:
        """Set what a key leads to. Raises KernelError: E2BIG where the map is full."""
        self._key.raw, self._value.raw = key, value
        _bpf(_MAP_UPDATE, self._attributes(self._value), f"set {key.hex()} in {self._what}")

    def drop(self, key: bytes) -> bool:
        """Remove a key; False: it was not there. Raises KernelError."""
        self._key.raw = key
        try:
            _bpf(_MAP_DELETE, self._attributes(None), f"remove {key.hex()} from {self._what}")
        except NotFound:
            return False
        return True

    def get(self, key: bytes) -> bytes | None:
        """What a key leads to. Raises KernelError."""
        self._key.raw = key
        try:
            _bpf(_MAP_LOOKUP, self._attributes(self._value), f"look {key.hex()} up in {self._what}")
        except NotFound:
            return None
        return self._value.raw

    def items(self) -> Mapping[bytes, bytes]:
        """All of it, for people and tests: one that changes meanwhile may be told twice, or not at all."""
        found: dict[bytes, bytes] = {}
        key: bytes | None = None
        while (key := self._after(key)) is not None and key not in found:
            if (value := self.get(key)) is not None:
                found[key] = value
        return found

    def close(self) -> None:
        """Give the descriptor back. Twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _after(self, key: bytes | None) -> bytes | None:
        if key is not None:
            self._key.raw = key
        where = ctypes.addressof(self._key) if key is not None else 0
        try:
            _bpf(
                _MAP_NEXT,
                struct.pack("=I4xQQ", self.fd, where, ctypes.addressof(self._next)),
                f"list {self._what}",
            )
        except NotFound:
            return None
        return self._next.raw

    def _attributes(self, value: ctypes.Array[ctypes.c_char] | None) -> bytes:
        where = ctypes.addressof(value) if value is not None else 0
        return struct.pack("=I4xQQQ", self.fd, ctypes.addressof(self._key), where, 0)


class Cell:
    """One number of 64 bits, 0 at first, that programs look at: what key 0, of four bytes, leads to. `close` it."""

    def __init__(self, name: str) -> None:
        """Raises KernelError."""
        self._map = _Array(name, 4, 8, 1)

    @property
    def fd(self) -> int:
        """The map."""
        return self._map.fd

    def put(self, number: int) -> None:
        """Raises KernelError."""
        self._map.put(bytes(4), struct.pack("=Q", number))

    def close(self) -> None:
        """Programs keep it."""
        self._map.close()


class _Array(HashMap):
    """Keys are 0 to `entries` - 1, and are always there."""

    _kind, _flags = _ARRAY, 0


def load_classifier(name: str, program: Assembler) -> int:
    """Have the kernel verify and compile a program for traffic control; its descriptor.

    Raises KernelError: it cannot, or does not want to; with its own last words.
    """
    code = program.code()
    instructions = ctypes.create_string_buffer(code, len(code))
    # Helpers that redirect are for programs of this licence only, and say so by this word.
    licence = ctypes.create_string_buffer(b"GPL")
    what = f"load BPF program {name}"

    def attributes(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        told = (1, len(log), ctypes.addressof(log)) if log is not None else (0, 0, 0)
        return struct.pack(
            "=IIQQIIQII16s",
            _SCHED_CLS,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.addressof(licence),
            *told,
            0,
            0,
            _object_name(name),
        )

    try:
        return _bpf(_PROG_LOAD, attributes(None), what)
    except KernelError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return _bpf(_PROG_LOAD, attributes(log), what)
        except KernelError as again:
            words = log.value.decode(errors="replace").strip().splitlines()
            raise from_errno(what, again.errno, _last(words)) from None


def _last(words: Sequence[str]) -> str:
    """The verifier's verdict stands before its statistics."""
    said: Iterable[str] = (one for one in reversed(words) if not one.startswith(("processed ", "verification time")))
    return next(iter(said), "")


def _object_name(name: str) -> bytes:
    return name.encode()[:15].ljust(16, b"\0")


_libc: ctypes.CDLL | None = None


def _bpf(command: int, attributes: bytes, what: str) -> int:
    global _libc  # noqa: PLW0603 - one library a process
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise KernelError(what, errno.ENOSYS, f"bpf(2) is not known for {platform.machine()}")
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    packed = ctypes.create_string_buffer(attributes, _ATTR_BYTES)
    answer = int(_libc.syscall(number, command, packed, _ATTR_BYTES))
    if answer < 0:
        raise from_errno(what, ctypes.get_errno())
    return answer
