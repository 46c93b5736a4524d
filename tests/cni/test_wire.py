"""The frames: the constants of C and Python are the same, and what is no request is refused."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import wire
from tests.hosts import ROOT

PLACES = bytes(64)


def request_fields() -> dict[int, bytes]:
    return {
        wire.TAG_PROGRAM: b"bridge",
        wire.TAG_ENVIRONMENT: b"CNI_COMMAND=ADD\0A=1\0A=2\0nothing\0=C:=x\0EMPTY=\0RAW=\xff=\0",
        wire.TAG_UMASK: wire.u32(0o22),
        wire.TAG_PLACES: PLACES,
        wire.TAG_DESCRIPTORS: wire.u32(3),
    }


def body(fields: dict[int, bytes], *, required: bool = False) -> bytes:
    return wire.frame(wire.KIND_REQUEST, fields.items(), required=required)[wire.HEADER_SIZE :]


def test_constants_are_those_of_the_launcher() -> None:
    text = (ROOT / "warm/wire.h").read_text(encoding="utf-8")
    found = re.findall(r"^#define NETLOOM_(\w+) (0x[0-9A-F]+|\d+)", text, re.MULTILINE)
    theirs = {name: int(value, 0) for name, value in found}
    ours = {name: value for name, value in vars(wire).items() if name.isupper() and not name.startswith("_")}
    assert theirs == ours
    assert len(ours) > 20


def test_standard_input_has_the_bound_of_the_plugins() -> None:
    from cni import config  # noqa: PLC0415

    assert wire.STDIN_LIMIT == config.LIMIT
    assert wire.FRAME_LIMIT > wire.STDIN_LIMIT


def test_a_request_is_read_as_a_process_would_see_it() -> None:
    request = wire.request(body(request_fields()))
    assert request.program == "bridge"
    assert request.environment == {"CNI_COMMAND": "ADD", "A": "1", "EMPTY": "", "RAW": "\udcff="}
    assert (request.umask, request.stdin, request.descriptors) == (0o22, None, 3)
    assert request.places == (0,) * 8


@pytest.mark.parametrize("missing", list(request_fields()))
def test_a_request_that_lacks_a_field_is_refused(missing: int) -> None:
    fields = request_fields()
    del fields[missing]
    with pytest.raises(wire.WireError, match=f"lacks the field {missing}"):
        wire.request(body(fields))


def test_an_unknown_field_is_passed_over_unless_it_must_be_understood() -> None:
    fields = {**request_fields(), 999: b"later"}
    assert wire.request(body(fields)).program == "bridge"
    with pytest.raises(wire.WireError, match="field 999"):
        wire.request(body(fields, required=True))


def test_a_header_of_neighbouring_age_is_understood_and_one_without_overlap_refused() -> None:
    import struct  # noqa: PLC0415

    def header(version: int, oldest: int) -> bytes:
        return struct.pack("=IHHII", wire.MAGIC, version, oldest, wire.KIND_DONE, 0)

    assert wire.header(header(wire.VERSION + 1, wire.VERSION)).version == wire.VERSION + 1
    assert wire.header(header(wire.VERSION, wire.OLDEST)).kind == wire.KIND_DONE
    with pytest.raises(wire.WireError, match="speaks versions"):
        wire.header(header(wire.VERSION + 2, wire.VERSION + 1))
    with pytest.raises(wire.WireError, match="speaks versions"):
        wire.header(header(wire.OLDEST - 1, 0))


def test_a_frame_over_the_limit_is_refused_before_its_body_came() -> None:
    frame = bytearray(wire.frame(wire.KIND_REQUEST))
    frame[12:16] = wire.u32(wire.FRAME_LIMIT + 1)
    with pytest.raises(wire.WireError, match="at most"):
        wire.header(frame)


@given(st.binary(max_size=300))
def test_no_body_does_anything_but_give_a_request_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        wire.request(data)


@given(st.data())
def test_a_damaged_request_does_the_same(data: st.DataObject) -> None:
    whole = bytearray(body(request_fields()))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(wire.WireError):
        wire.request(whole[: data.draw(st.integers(0, len(whole)))])


@given(st.binary(min_size=16, max_size=16))
def test_no_sixteen_bytes_do_anything_but_give_a_header_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        assert wire.header(data).length <= wire.FRAME_LIMIT
