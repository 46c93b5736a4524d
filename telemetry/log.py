"""Structured logging on top of the standard library's: one line is one event with a message and named fields.

Rules of this file:
- Logging never fails its caller. A value that cannot be printed is replaced by a note that says so; a stream that
  cannot be written to (full disk, closed pipe) loses the line and nothing else.
- A value that came from outside (container ids, names, paths) cannot forge a line or send a terminal an escape
  sequence: control characters are escaped, long values are cut.
- `json` is one ASCII object a line with the keys ts, level, logger, msg, and, where there are any, request_id, fields
  and exception. `text` is for people; under journald it leaves out the time and tells the level by sd-daemon(3)'s
  prefix ("<6>"), as the journal keeps both itself.

Libraries that log through the standard library come out in the same form.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO, get_args

Level = Literal["debug", "info", "warning", "error", "critical"]
Format = Literal["json", "text"]

LEVELS: tuple[Level, ...] = get_args(Level)
FORMATS: tuple[Format, ...] = get_args(Format)

_NUMBERS: Mapping[str, int] = logging.getLevelNamesMapping()
# sd-daemon(3): what the journal files a line under.
_JOURNAL_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_LONGEST_TEXT = 4096  # characters of one value; a hostile name must not fill the disk
_LONGEST_LIST = 256  # entries of one list or mapping
_DEEPEST = 6  # levels of lists and mappings; a value may contain itself
_BARE = re.compile(r"[!#-&(-<>-\[\]-~]+")  # printable ASCII without blank, quotes, = and backslash
_FIELDS = "netloom_fields"
_REQUEST_ID = "netloom_request_id"

_request_id: ContextVar[str] = ContextVar("request_id", default="")


def setup(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:  # noqa: A002 (the key's name in the configuration)
    """Sends every logger of this process to `stream` (default: standard error) in the given form.

    Calling it again replaces the earlier set-up. Raises ValueError for a level or form that does not exist.
    """
    if level not in LEVELS:
        raise ValueError(f"log level: wanted one of {', '.join(LEVELS)}, found {level!r}")
    if format not in FORMATS:
        raise ValueError(f"log format: wanted one of {', '.join(FORMATS)}, found {format!r}")
    target = sys.stderr if stream is None else stream
    handler = _Handler(target)
    handler.setFormatter(_Json() if format == "json" else _Text(journal=_is_journal(target)))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_NUMBERS[level.upper()])
    # Nothing of ours prints the caller, the thread or the process; finding them out is half the cost of a line
    # (Python's Logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def event(
    logger: logging.Logger,
    level: Level,
    message: str,
    /,
    *,
    exc_info: BaseException | bool | None = None,
    **fields: object,
) -> None:
    """Logs one event. `message` is constant text; what varies goes into `fields`.

    A field `request_id` (or the one bound by `request`) is written beside the message, not among the fields.
    """
    number = _NUMBERS.get(str(level).upper(), logging.ERROR)
    if not logger.isEnabledFor(number):
        return
    request_id = fields.pop("request_id", None) or _request_id.get()
    extra = {_FIELDS: fields, _REQUEST_ID: request_id}
    # The message goes in as an argument: a "%" in it is no format.
    logger.log(number, "%s", message, exc_info=exc_info, extra=extra)


@contextlib.contextmanager
def request(request_id: str) -> Iterator[None]:
    """Everything that is logged in this context (thread or task) meanwhile carries `request_id`."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def plain(value: object, depth: int = 0) -> object:
    """`value` as JSON can hold it: never raises, bounded in length and depth, whatever the value does."""
    if type(value) is str and len(value) <= _LONGEST_TEXT and value.isascii():
        return value  # nearly every value
    try:
        return _plain(value, depth)
    except Exception as error:  # noqa: BLE001 (a value's __str__ or __iter__ may raise anything)
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _plain(value: object, depth: int) -> object:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if depth >= _DEEPEST:
            return "…"
        return _plain_mapping(value, depth) if isinstance(value, Mapping) else _plain_list(value, depth)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _plain_number(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _cut(bytes(value[:_LONGEST_TEXT]).decode("utf-8", "backslashreplace"))
    return value if value is None or isinstance(value, bool) else _cut(str(value))


def _plain_number(value: float) -> object:
    if isinstance(value, int):
        # JSON readers keep 53 bits; a longer number is kept exact as text. Python itself refuses 4300 digits.
        number = int(value)
        return number if abs(number) < 1 << 53 else _cut(hex(number) if number.bit_length() > 8192 else str(number))
    return float(value) if math.isfinite(value) else str(value)


def _plain_list(value: Collection[object], depth: int) -> list[object]:
    entries = [plain(entry, depth + 1) for entry, _ in zip(value, range(_LONGEST_LIST), strict=False)]
    return entries if len(value) <= _LONGEST_LIST else [*entries, f"… {len(value) - _LONGEST_LIST} more"]


def _plain_mapping(value: Mapping[object, object], depth: int) -> dict[str, object]:
    plain_items = {
        str(plain(key, depth + 1)): plain(entry, depth + 1)
        for (key, entry), _ in zip(value.items(), range(_LONGEST_LIST), strict=False)
    }
    if len(value) > _LONGEST_LIST:
        plain_items["…"] = f"{len(value) - _LONGEST_LIST} more"
    return plain_items


def _cut(text: str) -> str:
    """Bounded, and without the lone surrogates (os.fsdecode makes them) that strict JSON readers refuse."""
    short = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}… ({len(text)} characters)"
    return short.encode("utf-8", "backslashreplace").decode()


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines; a line that cannot be written is lost, and nobody hears of it twice."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        # In the C locale a stream may hold ASCII only, and would refuse the whole line for one character.
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return line if line.isascii() else line.encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the standard library's name)
        """Says nothing; the standard one prints a traceback to standard error."""


def _message(record: logging.LogRecord) -> str:
    try:
        return _cut(record.getMessage())
    except Exception as error:  # noqa: BLE001 (a library's "%d" with a string, or a __str__ that raises)
        return f"{plain(record.msg)} <arguments cannot be shown: {type(error).__name__}>"


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, _FIELDS, None)
    return _plain_mapping(fields, 0) if isinstance(fields, dict) else {}


def _request_id_of(record: logging.LogRecord) -> str:
    value = plain(getattr(record, _REQUEST_ID, None) or _request_id.get())
    return value if isinstance(value, str) else json.dumps(value)


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    try:
        return formatter.formatException(record.exc_info)
    except Exception as error:  # noqa: BLE001 (an exception's own __str__ may raise)
        return f"<{record.exc_info[0].__name__} that cannot be shown: {type(error).__name__}>"


def _moment(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, microseconds."""
    seconds, fraction = divmod(record.created, 1)
    return f"{_second(int(seconds))}.{int(fraction * 1e6):06d}Z"


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": _message(record),
        }
        if request_id := _request_id_of(record):
            line["request_id"] = request_id
        if fields := _fields_of(record):
            line["fields"] = fields
        if exception := _exception(self, record):
            line["exception"] = exception.encode("utf-8", "backslashreplace").decode()
        return json.dumps(line, separators=(",", ":"))


class _Text(logging.Formatter):
    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields_of(record)
        if request_id := _request_id_of(record):
            fields["request_id"] = request_id
        head = _visible(f"{record.name}: {_message(record)}")
        if fields:
            head += "  " + " ".join(f"{_visible(key)}={_text_value(value)}" for key, value in fields.items())
        if not self._journal:
            head = f"{_moment(record)} {record.levelname.lower():<8} {head}"
        # A traceback keeps its lines, each indented, so that none of them can pass for an event of its own.
        lines = [head, *(f"    {_visible(line)}" for line in _exception(self, record).splitlines())]
        prefix = f"<{_JOURNAL_PRIORITY.get(record.levelno, 6)}>" if self._journal else ""
        return "\n".join(prefix + line for line in lines)


def _visible(text: str) -> str:
    """Without line breaks and control characters, which are shown as escapes."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def _text_value(value: object) -> str:
    if isinstance(value, str):
        if _BARE.fullmatch(value):
            return value
        if value.isprintable() and value and not set(value) & set(" =\"'\\"):
            return value
    return _visible(json.dumps(value, ensure_ascii=False))


def _is_journal(stream: TextIO) -> bool:
    """Whether the stream leads to the journal: JOURNAL_STREAM holds its device and inode (systemd.exec(5))."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        status = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"
    return False
