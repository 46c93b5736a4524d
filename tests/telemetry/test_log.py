"""Log lines, in both forms, with values that try to break them."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry import log

logger = logging.getLogger("test.log")


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _one(stream: io.StringIO) -> dict[str, Any]:
    (line,) = _lines(stream)
    return line


def test_json_has_exactly_the_promised_keys() -> None:
    stream = io.StringIO()
    log.setup("info", "json", stream)
    log.event(logger, "warning", "address released", address="10.1.0.2", count=3, request_id="00ff")
    line = _one(stream)
    moment = line.pop("ts")
    assert moment.endswith("Z")
    assert datetime.fromisoformat(moment).utcoffset() is not None
    assert line == {
        "level": "warning",
        "logger": "test.log",
        "msg": "address released",
        "request_id": "00ff",
        "fields": {"address": "10.1.0.2", "count": 3},
    }


def test_levels_below_the_set_one_are_not_written() -> None:
    stream = io.StringIO()
    log.setup("warning", "json", stream)
    log.event(logger, "info", "quiet")
    log.event(logger, "error", "loud")
    assert [line["msg"] for line in _lines(stream)] == ["loud"]


def test_setting_up_again_replaces_the_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.setup("info", "json", first)
    log.setup("info", "json", second)
    log.event(logger, "info", "once")
    assert first.getvalue() == ""
    assert len(_lines(second)) == 1


@pytest.mark.parametrize(("level", "form"), [("loud", "json"), ("info", "xml"), ("INFO", "json")])
def test_an_unknown_level_or_form_is_refused(level: str, form: str) -> None:
    with pytest.raises(ValueError, match="wanted one of"):
        log.setup(level, form)


def test_field_names_that_are_also_parameters_or_record_attributes() -> None:
    stream = io.StringIO()
    log.setup("info", "json", stream)
    fields: dict[str, Any] = {"logger": 1, "level": 2, "message": 3, "name": 4, "args": 5, "msg": 6}
    log.event(logger, "info", "100% of %s", **fields)
    line = _one(stream)
    assert line["fields"] == fields
    assert line["msg"] == "100% of %s"


def test_a_librarys_own_record_comes_out_in_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own handler raises on a bad record
    stream = io.StringIO()
    log.setup("info", "json", stream)
    logging.getLogger("some.library").warning("port %d", 80)
    logging.getLogger("some.library").warning("port %d", "eighty")
    good, bad = _lines(stream)
    assert good["msg"] == "port 80"
    assert bad["msg"].startswith("port %d <arguments cannot be shown: TypeError")


class _Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class _HostileDict(dict[str, object]):
    def items(self) -> Any:
        raise RuntimeError("no")


def test_values_that_cannot_be_shown_say_so_and_the_line_is_still_written() -> None:
    stream = io.StringIO()
    log.setup("info", "json", stream)
    loop: list[object] = []
    loop.append(loop)
    log.event(
        logger,
        "info",
        "odd",
        hostile=_Hostile(),
        mapping=_HostileDict(a=1),
        loop=loop,
        nan=math.nan,
        huge=10**6000,
        beyond_53_bits=1 << 60,
        surrogate="a\udc80b",
        raw=b"\xff\x00ok",
        keys={1: 2, (3, 4): {5}},
        long="x" * 10_000,
        many=list(range(1000)),
        flag=True,
        none=None,
    )
    fields = _one(stream)["fields"]
    assert "cannot be shown" in fields["hostile"]
    assert "cannot be shown" in fields["mapping"]
    assert json.dumps(fields["loop"]) == json.dumps([[[[["…"]]]]])
    assert fields["nan"] == "nan"
    assert fields["huge"].startswith("0x")
    assert fields["beyond_53_bits"] == str(1 << 60)
    assert fields["surrogate"] == "a\\udc80b"
    assert fields["raw"] == "\\xff\0ok"
    assert fields["keys"] == {"1": 2, "[3, 4]": [5]}
    assert len(fields["long"]) < 4200
    assert fields["many"][-1] == "… 744 more"
    assert fields["flag"] is True
    assert fields["none"] is None


_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=20)
    | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}\Z", fullmatch=True), _anything, max_size=3), st.text(st.characters())
)
def test_whatever_is_logged_is_one_line_of_strict_json_and_one_line_of_text(
    fields: dict[str, Any], message: str
) -> None:
    fields.pop("exc_info", None)
    for form in log.FORMATS:
        stream = io.StringIO()
        log.setup("info", form, stream)
        log.event(logger, "info", message, **fields)
        text = stream.getvalue()
        assert text.endswith("\n")
        assert len(text.splitlines()) == 1
        text.encode("utf-8")  # no lone surrogate
        if form == "json":
            assert text.isascii()
            json.loads(text, parse_constant=pytest.fail)


def test_text_cannot_be_forged_by_a_value() -> None:
    stream = io.StringIO()
    log.setup("info", "text", stream)
    log.event(logger, "info", "released", container_id="x\n2026-01-01 error forged\x1b[2J", node="n 1", empty="")
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert "\\n2026-01-01" in line
    assert 'node="n 1"' in line
    assert 'empty=""' in line


def test_a_traceback_stays_with_its_event() -> None:
    for form in log.FORMATS:
        stream = io.StringIO()
        log.setup("info", form, stream)
        try:
            json.loads("a\nb")
        except ValueError as error:
            error.add_note("two\nlines")
            log.event(logger, "error", "failed", exc_info=True)
        if form == "json":
            assert "two\nlines" in _one(stream)["exception"]
        else:
            head, *rest = stream.getvalue().splitlines()
            assert "failed" in head
            assert len(rest) >= 3
            assert all(line.startswith("    ") for line in rest)


def test_an_exception_that_cannot_be_shown() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    stream = io.StringIO()
    log.setup("info", "json", stream)
    log.event(logger, "error", "failed", exc_info=OddError())
    assert "OddError" in _one(stream)["exception"]


def test_the_request_id_is_bound_to_its_own_thread() -> None:
    stream = io.StringIO()
    log.setup("info", "json", stream)

    def elsewhere() -> None:
        log.event(logger, "info", "other thread")

    with log.request("abcd"):
        log.event(logger, "info", "inside")
        logging.getLogger("library").info("inside too")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    log.event(logger, "info", "after")
    assert [(line["msg"], line.get("request_id")) for line in _lines(stream)] == [
        ("inside", "abcd"),
        ("inside too", "abcd"),
        ("other thread", None),
        ("after", None),
    ]


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails_costs_the_line_only(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info", "json", _Full())
    log.event(logger, "error", "lost")
    assert capsys.readouterr() == ("", "")


def test_an_ascii_stream_gets_escapes_instead_of_losing_the_line() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    log.setup("info", "text", stream)
    log.event(logger, "info", "kept", pool="grün")
    assert b"pool=gr\\xfcn" in raw.getvalue()


def test_under_the_journal_the_level_is_a_prefix_and_the_time_is_left_out() -> None:
    program = (
        "import logging, os\n"
        "from telemetry import log\n"
        "s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'\n"
        "log.setup('info', 'text')\n"
        "log.event(logging.getLogger('ipamd'), 'warning', 'cooling', pool='p')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.stderr == "<4>ipamd: cooling  pool=p\n"
