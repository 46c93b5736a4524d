"""cni.errors: codes, and texts that any bytes survive in."""

import json

import msgspec
import pytest

from cni.errors import CniError, Code, shown


def test_codes_are_those_of_the_specification() -> None:
    assert {int(code) for code in Code} == {1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51, 100, 101, 102, 103, 999}


def test_document_has_the_specifications_keys_in_its_order() -> None:
    error = CniError(Code.INVALID_CONFIG, "message", "details")
    assert list(error.document("1.0.0").items()) == [
        ("cniVersion", "1.0.0"),
        ("code", 7),
        ("msg", "message"),
        ("details", "details"),
    ]
    assert str(error) == "message; details"


def test_empty_details_are_left_out() -> None:
    assert "details" not in CniError(5, "message").document("1.0.0")
    assert str(CniError(5, "message")) == "message"


def test_a_delegates_code_is_kept() -> None:
    assert CniError(123, "message").document("1.0.0")["code"] == 123


def test_bytes_that_are_no_utf8_can_be_printed() -> None:
    raw = b"/run/\xff".decode("utf-8", "surrogateescape")
    document = CniError(Code.INVALID_NETNS, raw, raw).document("1.1.0")
    assert json.loads(msgspec.json.encode(document))["msg"] == "/run/\\udcff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", '"plain"'),
        ("a\nb\x1b[0m", '"a\\nb\\x1b[0m"'),
        ('a"b', '"a\\"b"'),
        ("it's", '"it\'s"'),
        ("\u202e", '"\\u202e"'),
    ],
)
def test_shown_is_one_line_of_ascii(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(text).isascii()
    assert shown(text).isprintable()


def test_shown_is_short() -> None:
    assert len(shown("x" * 10_000)) < 120
