"""Reading netloom.toml: what every daemon's configuration has in common. Which keys there are, each daemon says itself.

The file serves every daemon of the host: tables of the others are left to them, all other names are refused. A wrong
key or value raises ConfigError, which names file and line, the key, what was found and what to do.

A key is named by its parts joined with dots, "ipamd.socket"; in the second of several [[peer]] it is "peer.2.name".
"""

import difflib
import grp
import os
import pwd
import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from kernel import paths

T = TypeVar("T")

_LONGEST_SECONDS = 30 * 86400.0  # a month: longer is a mistake in the unit
_LARGEST_FILE = 1 << 20
_NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class ConfigError(Exception):
    """The configuration cannot be used; the text names the place, the key, what was found and what to do."""


class WrongValueError(Exception):
    """What is wrong with a value and what to do, without the place, which the converter does not know."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Which names a daemon takes.

    Attributes:
        tables: the keys of each table.
        lists: the keys of each table that may be there several times, written [[name]].
        others: tables of other daemons, which are left to them.
        flags: what a flag sets: the name that overrides have it by → (key, flag).
        hyphens: whether a key may be written with hyphens, as flags are.
    """

    tables: Mapping[str, Sequence[str]]
    lists: Mapping[str, Sequence[str]]
    others: Sequence[str]
    flags: Mapping[str, tuple[str, str]]
    hyphens: bool = False


def ipamd_socket(environment: Mapping[str, str]) -> str:
    """Where ipamd is to be asked: as the host's configuration says, else the environment, else the default.

    ipamd itself says what is wrong with a file. Here it is passed over: whoever asks has to work just then.
    """
    return _socket_of("ipamd", paths.config_file(environment)) or paths.ipamd_socket(environment)


def netd_socket(environment: Mapping[str, str]) -> str:
    """Where netd is to be asked: as the host's configuration says, else in the run directory."""
    return _socket_of("netd", paths.config_file(environment)) or f"{paths.run_dir(environment)}/netd.sock"


def _socket_of(daemon: str, file: str) -> str:
    try:
        with open(file, "rb") as stream:
            table = tomllib.load(stream).get(daemon, {})
    except (OSError, ValueError):
        return ""
    value = table.get("socket", "") if isinstance(table, dict) else ""
    return value if isinstance(value, str) and value.startswith("/") else ""


def read(file: str, required: bool) -> str:
    """The file's text; "" where it is not there and need not be. Raises ConfigError."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ConfigError(f"{file}: wanted a configuration, found more than {_LARGEST_FILE} bytes; is it the file?")
        # A byte order mark is what some editors leave; tomllib takes it for a key.
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{file}: there is no such file; name another with --config, or create it") from None
        return ""
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: wanted UTF-8, found the byte {content[error.start]:#04x}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


class Settings:
    """The file's values and the flags', each with the place to name when it is wrong."""

    def __init__(self, file: str, text: str, schema: Schema, overrides: Mapping[str, object]) -> None:
        self._file = file
        self._text = text
        self._schema = schema
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(_syntax_error(file, text, str(error))) from None
        except RecursionError:
            raise ConfigError(f"{file}: nested too deeply for a configuration") from None
        self._document: Mapping[str, object] = document
        self._flags: dict[str, str] = {}
        self._entries: dict[str, int] = {}
        self._lines: dict[tuple[str, ...], int] | None = None
        self._values = self._known_values(document)
        for name, value in overrides.items():
            key, flag = schema.flags[name]
            self._values[key] = value
            self._flags[key] = flag

    def take(self, key: str, convert: Callable[[object], T]) -> T | None:
        """The converted value of a key; None where nobody gave one. Raises ConfigError where it is wrong."""
        if key not in self._values:
            return None
        try:
            return convert(self._values[key])
        except WrongValueError as error:
            self.refuse(key, f"found {_shown(self._values[key])}; {error}")

    def entries(self, table: str) -> list[str]:
        """What the keys of each [[table]] begin with: "peer.1", "peer.2"."""
        return [f"{table}.{number}" for number in range(1, self._entries.get(table, 0) + 1)]

    def refuse(self, key: str, what: str) -> NoReturn:
        """Raises ConfigError for a key whose value was fine by itself; `what` says what was found and what to do."""
        self._refuse(tuple(key.split(".")), what)

    def other(self, table: str, key: str) -> object:
        """What stands in a table that is another daemon's, unchecked; None where nothing does."""
        content = self._document.get(table)
        return content.get(key) if isinstance(content, dict) else None

    def _known_values(self, document: Mapping[str, object]) -> dict[str, object]:
        tables, lists, others = self._schema.tables, self._schema.lists, self._schema.others
        values: dict[str, object] = {}
        for table, content in document.items():
            if table in others:
                continue
            if table in lists:
                values.update(self._list_values(table, content))
                continue
            if table not in tables:
                self._refuse_name((table,), [*tables, *lists, *others], content)
            if not isinstance(content, dict):
                self._refuse(
                    (table,), f"found {_shown(content)}; wanted a table, written [{table}] on a line of its own"
                )
            values.update(self._table_values((table,), tables[table], content))
        return values

    def _list_values(self, table: str, content: object) -> dict[str, object]:
        if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
            self._refuse((table,), f"found {_shown(content)}; wanted tables, each written [[{table}]] on a line")
        self._entries[table] = len(content)
        values: dict[str, object] = {}
        for number, one in enumerate(content, 1):
            values.update(self._table_values((table, str(number)), self._schema.lists[table], one))
        return values

    def _table_values(
        self, where: tuple[str, ...], known: Sequence[str], content: Mapping[str, object]
    ) -> dict[str, object]:
        values: dict[str, object] = {}
        for written, value in content.items():
            name = written.replace("-", "_") if self._schema.hyphens else written
            if name not in known:
                self._refuse_name((*where, written), known, value)
            if f"{'.'.join((*where, name))}" in values:
                self._refuse((*where, written), "it is there twice, once with a hyphen; keep one")
            values[".".join((*where, name))] = value
        return values

    def _refuse_name(self, parts: tuple[str, ...], known: Sequence[str], value: object) -> NoReturn:
        name = parts[-1]
        homes = [f"[{table}]" for table, keys in self._schema.tables.items() if name in keys]
        homes += [f"[[{table}]]" for table, keys in self._schema.lists.items() if name in keys]
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            remedy = f"did you mean {near[0]}?"
        elif homes:
            remedy = f"it belongs under {homes[0]}"
        else:
            remedy = f"known here: {', '.join(known)}"
        self._refuse(parts, f"there is no such key (its value: {_shown(value)}); {remedy}")

    def _refuse(self, parts: tuple[str, ...], what: str) -> NoReturn:
        key = ".".join(parts)
        if key in self._flags:
            raise ConfigError(f"{self._flags[key]}: {what}")
        if self._lines is None:
            self._lines = key_lines(self._text)
        lines = self._lines
        if parts not in lines:
            parts_written = (*parts[:-1], parts[-1].replace("_", "-"))
            parts = parts_written if parts_written in lines else parts
        line = next((lines[parts[:n]] for n in range(len(parts), 0, -1) if parts[:n] in lines), None)
        place = self._file if line is None else f"{self._file}:{line}"
        raise ConfigError(f"{place}: {_visible(key)}: {what}")


def absolute_path(value: object) -> str:
    path = string(value)
    if not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise WrongValueError("wanted the absolute path of a file")
    return os.path.normpath(path)


def string(value: object) -> str:
    if not isinstance(value, str):
        raise WrongValueError(f"wanted text in quotes, this is {_kind(value)}")
    return value


def strings(value: object) -> tuple[str, ...]:
    """One text, or a list of them."""
    if isinstance(value, list):
        return tuple(string(one) for one in value)
    if not isinstance(value, str):
        raise WrongValueError(f"wanted a list of texts in quotes, this is {_kind(value)}")
    return (value,)


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValueError(f"wanted true or false without quotes, this is {_kind(value)}")
    return value


def whole(least: int, most: int) -> Callable[[object], int]:
    """A whole number from `least` to `most`."""

    def convert(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValueError(f"wanted a whole number without quotes, this is {_kind(value)}")
        if not least <= value <= most:
            raise WrongValueError(f"wanted a whole number from {least} to {most}")
        return value

    return convert


def seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValueError(f"wanted a number of seconds without quotes, this is {_kind(value)}")
    if not 0 <= value <= _LONGEST_SECONDS:  # true for nan, too
        raise WrongValueError(f"wanted seconds from 0 to {_LONGEST_SECONDS:.0f}")
    return float(value)


def socket_mode(reason: str) -> Callable[[object], int]:
    """Permission bits without any for others; `reason` says why they get none."""

    def convert(value: object) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
            raise WrongValueError('wanted permission bits as three octal digits in quotes, such as "0660"')
        mode = int(value, 8)
        if mode & 0o007:
            raise WrongValueError(f"others would get rights, and {reason}; give them to a group with socket_group")
        return mode

    return convert


def user(value: object) -> int | None:
    return _account(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def group(value: object) -> int | None:
    return _account(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _account(value: object, what: str, number_of: Callable[[str], int]) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = string(value)
    if not name:
        return None
    if name.isascii() and name.isdigit():
        if int(name[:11]) >= (1 << 32) - 1:  # the last one means "unchanged" to chown(2)
            raise WrongValueError(f"wanted a {what} id below 4294967295")
        return int(name)
    try:
        return number_of(name)
    except (KeyError, ValueError):
        raise WrongValueError(f"this machine has no such {what}; create it, or name one that exists") from None


def node(value: object) -> str:
    if not _NODE.fullmatch(string(value)):
        raise WrongValueError(
            "wanted a node name: 1 to 253 letters, digits, '.', '_' and '-', with a letter or digit at both ends"
        )
    return str(value)


def default_node(table: str) -> str:
    """The host's name. Raises ConfigError where that cannot name a node."""
    name = socket.gethostname()
    if not _NODE.fullmatch(name):
        raise ConfigError(f"the host's name {name!r} cannot name a node; set node under [{table}], or give --node")
    return name


def listen(parse: Callable[[str, bool], object], allow_remote: bool) -> Callable[[object], str]:
    """An address to listen on, or "". `parse` raises ValueError."""

    def convert(value: object) -> str:
        text = string(value)
        if not text:
            return ""
        try:
            return str(parse(text, allow_remote))
        except ValueError as error:
            remedy = " with http_allow_remote = true" if "explicitly" in str(error) else ""
            raise WrongValueError(f"{error}{remedy}") from None

    return convert


def one_of(allowed: Sequence[T]) -> Callable[[object], T]:
    """One of these words."""

    def convert(value: object) -> T:
        for one in allowed:
            if value == one:
                return one
        words = [str(one) for one in allowed]
        near = difflib.get_close_matches(str(value).lower(), words, n=1)
        raise WrongValueError(f"wanted one of {', '.join(words)}" + (f"; did you mean {near[0]}?" if near else ""))

    return convert


def _kind(value: object) -> str:
    names: Mapping[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "a table" if isinstance(value, dict) else "a date or time")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return _visible(text if len(text) <= 120 else f"{text[:120]}…")


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _syntax_error(file: str, text: str, message: str) -> str:
    """tomllib's message ends in "(at line 3, column 5)" or "(at end of document)"; the line belongs in front."""
    at = re.search(r" \(at line (\d+), column \d+\)$", message)
    line = int(at[1]) if at else text.count("\n") + 1
    return f"{file}:{line}: this is not TOML: {message[: at.start()] if at else message}"


# A key as TOML writes it: bare, or quoted in either way. Several of them are joined by dots.
_NAME = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_DOTTED = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
# What must be stepped over as a whole to know where a value ends: texts of four kinds, comments, brackets.
_TOKEN = re.compile(
    r"""\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[{]|[\]}]|\n""", re.DOTALL
)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line (from 1) of each table and key of a TOML document; tomllib does not tell them.

    Keys of the second [[peer]] are ("peer", "2", …). Keys inside inline tables and arrays are left to their parent. The
    document must be one that tomllib takes.
    """
    lines: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    position, line = 0, 1
    while position < len(text):
        begin = position
        if header := _HEADER.match(text, position):
            table = _split(header[2])
            lines.setdefault(table, line)
            if header[1] == "[[":
                counts[table] = counts.get(table, 0) + 1
                table = (*table, str(counts[table]))
                lines[table] = line
            position = _end_of_line(text, header.end())
        elif assignment := _ASSIGNMENT.match(text, position):
            parts = (*table, *_split(assignment[1]))
            for n in range(1, len(parts) + 1):
                lines.setdefault(parts[:n], line)
            position = _end_of_line(text, assignment.end())
        else:
            position = _end_of_line(text, position)
        line += text.count("\n", begin, position)
    return lines


def _end_of_line(text: str, position: int) -> int:
    """Where the next line begins that is not part of the value that stands here."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == "\n" and depth <= 0:
            return token.end()
    return len(text)


def _split(dotted: str) -> tuple[str, ...]:
    parts = re.findall(_NAME, dotted)
    return tuple(tomllib.loads(f"x = {part}")["x"] if part[0] in "\"'" else part for part in parts)
