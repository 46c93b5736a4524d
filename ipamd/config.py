"""ipamd's configuration: the host's TOML file, and command-line flags that override it.

    [ipamd]
    socket = "/run/netloom/ipamd.sock"
    socket_mode = "0660"              # no rights for others: whoever opens the socket may take and free addresses
    socket_owner = "root"             # a name or a number; absent: as it comes
    socket_group = "netloom"
    node = "host-1"                   # default: the host's name
    http_listen = "127.0.0.1:9464"    # /metrics and /healthz; absent or "": off
    http_allow_remote = false

    [store]
    kind = "sqlite"                   # or "memory": forgets everything at a stop, for trying things out
    path = "/var/lib/netloom/ipamd.db"

    [pools]
    cooldown_s = 30                   # a freed address is not handed out again before

    [reclaim]
    interval_s = 60                   # how often ipamd itself looks for allocations of an earlier boot; 0: never
    grace_s = 60                      # between the two observations that something is gone

    [log]
    level = "info"
    format = "text"                   # or "json"

The file serves every daemon of the host: tables of the others are left to them, all other names are refused. A wrong
key or value raises ConfigError, which names file and line, the key, what was found and what to do. Flags win over the
file, the file wins over the environment, and that over the defaults.
"""

import argparse
import difflib
import grp
import os
import pwd
import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from kernel import paths
from telemetry.health import parse_listen
from telemetry.log import FORMATS, LEVELS

T = TypeVar("T")
StoreKind = Literal["sqlite", "memory"]

_STORE_KINDS: tuple[StoreKind, ...] = ("sqlite", "memory")
_OTHER_DAEMONS = ("netd", "docker", "cni")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "ipamd": ("socket", "socket_mode", "socket_owner", "socket_group", "node", "http_listen", "http_allow_remote"),
    "store": ("kind", "path"),
    "pools": ("cooldown_s",),
    "reclaim": ("interval_s", "grace_s"),
    "log": ("level", "format"),
}
# What a flag sets, under the name that `load` takes it by.
_OVERRIDES: Mapping[str, tuple[str, str]] = {
    "socket": ("ipamd.socket", "--socket"),
    "node": ("ipamd.node", "--node"),
    "http_listen": ("ipamd.http_listen", "--http-listen"),
    "store_kind": ("store.kind", "--store"),
    "store_path": ("store.path", "--store"),
    "log_level": ("log.level", "--log-level"),
    "log_format": ("log.format", "--log-format"),
}
_LONGEST_SECONDS = 30 * 86400.0  # a month: longer is a mistake in the unit
_LARGEST_FILE = 1 << 20
_NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class ConfigError(Exception):
    """The configuration cannot be used; the text names the place, the key, what was found and what to do."""


class _WrongValueError(Exception):
    """What is wrong with a value and what to do, without the place, which the converter does not know."""


@dataclass(frozen=True, slots=True)
class Config:
    """What ipamd runs with. Paths are absolute, times are in seconds."""

    socket: str
    socket_mode: int  # permission bits, 0o660
    socket_owner: int | None  # user id; None: not changed
    socket_group: int | None  # group id; None: not changed
    node: str
    http_listen: str | None  # "127.0.0.1:9464"; None: no HTTP
    http_allow_remote: bool
    store_kind: StoreKind
    store_path: str  # of no meaning where store_kind is "memory"
    cooldown_s: float
    reclaim_interval_s: float  # 0: never by itself
    reclaim_grace_s: float
    release_dir: str  # where a DEL leaves its record while ipamd is away
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """ipamd's command line, read."""

    config: str | None  # the file that was named; None: the default one
    overrides: Mapping[str, object]  # as `load` takes them
    check: bool  # only validate


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Reads the command line; prints usage and raises SystemExit(2) where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="ipamd", description="Netloom's address daemon: who has which address.")
    parser.add_argument("--config", metavar="FILE", help=f"default: $NETLOOM_CONFIG, else {paths.CONFIG_FILE}")
    parser.add_argument("--socket", metavar="PATH", help="listen here instead of the configured socket")
    parser.add_argument("--store", metavar="PATH|memory", help="SQLite file, or the word memory")
    parser.add_argument("--node", metavar="NAME", help="this node's name; default: the host's name")
    parser.add_argument("--log-level", metavar="LEVEL", help=", ".join(LEVELS))
    parser.add_argument("--log-format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--http-listen", metavar="ADDRESS:PORT", help="/metrics and /healthz; an empty word: off")
    parser.add_argument("--check", action="store_true", help="validate the configuration, say so, and stop")
    given = parser.parse_args(argv)
    overrides: dict[str, object] = {
        name: value
        for name in ("socket", "node", "log_level", "log_format", "http_listen")
        if (value := getattr(given, name)) is not None
    }
    if given.store == "memory":
        overrides["store_kind"] = "memory"
    elif given.store is not None:
        # A flag is typed in a directory, so a relative path means what it means to a shell.
        overrides["store_kind"], overrides["store_path"] = "sqlite", given.store and os.path.abspath(given.store)
    if given.socket:
        overrides["socket"] = os.path.abspath(given.socket)
    return Arguments(given.config, overrides, given.check)


def load(path: str | None, overrides: Mapping[str, object], environment: Mapping[str, str]) -> Config:
    """Reads and validates the configuration.

    `path` is a file that the operator named and that must exist; None means the default file, which need not. A file
    named by NETLOOM_CONFIG must exist too. `overrides` holds values that win over the file's, by the names of Config's
    fields (those of the flags). Raises ConfigError.
    """
    try:
        file = path or paths.config_file(environment)
        required = path is not None or bool(environment.get("NETLOOM_CONFIG"))
        text = _read(file, required)
        found = _Found(file, text, overrides)
        socket_path = found.take("ipamd.socket", _absolute_path) or paths.ipamd_socket(environment)
        store_path = found.take("store.path", _absolute_path) or f"{paths.state_dir(environment)}/ipamd.db"
        release_dir = paths.releases_dir(environment)
    except paths.PathError as error:
        raise ConfigError(str(error)) from None
    return _build(found, socket_path, store_path, release_dir)


def _build(found: "_Found", socket_path: str, store_path: str, release_dir: str) -> Config:
    allow_remote = found.take("ipamd.http_allow_remote", _boolean) or False
    mode = found.take("ipamd.socket_mode", _socket_mode)
    cooldown_s = found.take("pools.cooldown_s", _seconds)
    interval_s = found.take("reclaim.interval_s", _seconds)
    grace_s = found.take("reclaim.grace_s", _seconds)
    return Config(
        socket=socket_path,
        socket_mode=0o660 if mode is None else mode,
        socket_owner=found.take("ipamd.socket_owner", _user),
        socket_group=found.take("ipamd.socket_group", _group),
        node=found.take("ipamd.node", _node) or _default_node(),
        http_listen=found.take("ipamd.http_listen", _listen(allow_remote)) or None,
        http_allow_remote=allow_remote,
        store_kind=found.take("store.kind", _store_kind) or "sqlite",
        store_path=store_path,
        cooldown_s=30.0 if cooldown_s is None else cooldown_s,
        reclaim_interval_s=60.0 if interval_s is None else interval_s,
        reclaim_grace_s=60.0 if grace_s is None else grace_s,
        release_dir=release_dir,
        log_level=found.take("log.level", _one_of(LEVELS)) or "info",
        log_format=found.take("log.format", _one_of(FORMATS)) or "text",
    )


def _read(file: str, required: bool) -> str:
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


class _Found:
    """The file's values and the flags', each with the place to name when it is wrong."""

    def __init__(self, file: str, text: str, overrides: Mapping[str, object]) -> None:
        self._file = file
        self._text = text
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(_syntax_error(file, text, str(error))) from None
        except RecursionError:
            raise ConfigError(f"{file}: nested too deeply for a configuration") from None
        self._flags: dict[str, str] = {}
        self._values = self._known_values(document)
        for name, value in overrides.items():
            key, flag = _OVERRIDES[name]
            self._values[key] = value
            self._flags[key] = flag

    def take(self, key: str, convert: Callable[[object], T]) -> T | None:
        """The converted value of a dotted key; None where nobody gave one. Raises ConfigError where it is wrong."""
        if key not in self._values:
            return None
        try:
            return convert(self._values[key])
        except _WrongValueError as error:
            self._refuse(tuple(key.split(".")), f"found {_shown(self._values[key])}; {error}")

    def _known_values(self, document: Mapping[str, object]) -> dict[str, object]:
        values: dict[str, object] = {}
        for table, content in document.items():
            if table in _OTHER_DAEMONS:
                continue
            if table not in _KEYS:
                self._refuse_name((table,), [*_KEYS, *_OTHER_DAEMONS], content)
            if not isinstance(content, dict):
                self._refuse(
                    (table,), f"found {_shown(content)}; wanted a table, written [{table}] on a line of its own"
                )
            for name, value in content.items():
                if name not in _KEYS[table]:
                    self._refuse_name((table, name), _KEYS[table], value)
                values[f"{table}.{name}"] = value
        return values

    def _refuse_name(self, parts: tuple[str, ...], known: Sequence[str], value: object) -> NoReturn:
        name = parts[-1]
        homes = [table for table, keys in _KEYS.items() if name in keys]
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            remedy = f"did you mean {near[0]}?"
        elif homes:
            remedy = f"it belongs under [{homes[0]}]"
        else:
            remedy = f"known here: {', '.join(known)}"
        self._refuse(parts, f"there is no such key (its value: {_shown(value)}); {remedy}")

    def _refuse(self, parts: tuple[str, ...], what: str) -> NoReturn:
        key = ".".join(parts)
        if key in self._flags:
            raise ConfigError(f"{self._flags[key]}: {what}")
        lines = _key_lines(self._text)
        line = next((lines[parts[:n]] for n in range(len(parts), 0, -1) if parts[:n] in lines), None)
        place = self._file if line is None else f"{self._file}:{line}"
        raise ConfigError(f"{place}: {_visible(key)}: {what}")


def _absolute_path(value: object) -> str:
    path = _string(value)
    if not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise _WrongValueError("wanted the absolute path of a file")
    return os.path.normpath(path)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongValueError(f"wanted text in quotes, this is {_kind(value)}")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongValueError(f"wanted true or false without quotes, this is {_kind(value)}")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongValueError(f"wanted a number of seconds without quotes, this is {_kind(value)}")
    if not 0 <= value <= _LONGEST_SECONDS:  # true for nan, too
        raise _WrongValueError(f"wanted seconds from 0 to {_LONGEST_SECONDS:.0f}")
    return float(value)


def _socket_mode(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise _WrongValueError('wanted permission bits as three octal digits in quotes, such as "0660"')
    mode = int(value, 8)
    if mode & 0o007:
        raise _WrongValueError("others would get rights, and whoever opens the socket may take and free addresses; "
                         "give them to a group with socket_group")  # fmt: skip
    return mode


def _user(value: object) -> int | None:
    return _account(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def _group(value: object) -> int | None:
    return _account(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _account(value: object, what: str, number_of: Callable[[str], int]) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = _string(value)
    if not name:
        return None
    if name.isascii() and name.isdigit():
        if int(name[:11]) >= (1 << 32) - 1:  # the last one means "unchanged" to chown(2)
            raise _WrongValueError(f"wanted a {what} id below 4294967295")
        return int(name)
    try:
        return number_of(name)
    except (KeyError, ValueError):
        raise _WrongValueError(f"this machine has no such {what}; create it, or name one that exists") from None


def _node(value: object) -> str:
    if not _NODE.fullmatch(_string(value)):
        raise _WrongValueError(
            "wanted a node name: 1 to 253 letters, digits, '.', '_' and '-', with a letter or digit at both ends"
        )
    return str(value)


def _default_node() -> str:
    name = socket.gethostname()
    if not _NODE.fullmatch(name):
        raise ConfigError(f"the host's name {name!r} cannot name a node; set node under [ipamd], or give --node")
    return name


def _listen(allow_remote: bool) -> Callable[[object], str]:
    def convert(value: object) -> str:
        text = _string(value)
        if not text:
            return ""
        try:
            return str(parse_listen(text, allow_remote))
        except ValueError as error:
            remedy = " with http_allow_remote = true" if "explicitly" in str(error) else ""
            raise _WrongValueError(f"{error}{remedy}") from None

    return convert


def _store_kind(value: object) -> StoreKind:
    for kind in _STORE_KINDS:
        if value == kind:
            return kind
    raise _WrongValueError(_wanted_one_of(value, _STORE_KINDS))


def _one_of(allowed: Sequence[str]) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in allowed:
            raise _WrongValueError(_wanted_one_of(value, allowed))
        return str(value)

    return convert


def _wanted_one_of(value: object, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1)
    return f"wanted one of {', '.join(allowed)}" + (f"; did you mean {near[0]}?" if near else "")


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
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
# What must be stepped over as a whole to know where a value ends: texts of four kinds, comments, brackets.
_TOKEN = re.compile(
    r"""\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[{]|[\]}]|\n""", re.DOTALL
)


def _key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line (from 1) of each table and key of a TOML document; tomllib does not tell them.

    Keys inside inline tables and arrays are left to their parent. The document must be one that tomllib takes.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    position, line = 0, 1
    while position < len(text):
        begin = position
        if header := _HEADER.match(text, position):
            table = _split(header[1])
            lines.setdefault(table, line)
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
