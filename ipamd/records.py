"""Release records: what a DEL wrote while ipamd was away, replayed when it is back.

A record is a file `<random>.json` in the release directory:
    {"version": 1, "key": {"node", "client", "network", "container_id", "ifname"}, "generation": 0,
     "before": {"boot_id", "boottime_ns"}, "request_id": "…"}
It is replayed as a release of what was asked for before that moment, and removed once the release is durable; should
the removal be lost, replaying it again does no harm. A file that is no record is renamed to `<name>.bad` and logged,
for a person to look at. Writers write to a name that does not end in .json, then rename.
"""

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable

import msgspec
from msgspec import Struct

from ipamd.engine import Engine
from ipamd.errors import IpamdError
from ipamd.lease import Ledger
from ipamd.reclaim import log_release
from ipamd.store.base import Instant, Key
from telemetry import log

_logger = logging.getLogger("ipamd.records")

_LARGEST = 1 << 16
_AT_ONCE = 64


class _Record(Struct, frozen=True):
    version: int
    key: Key
    before: Instant
    generation: int = 0
    request_id: str = ""


class _NotARecordError(Exception):
    pass


class ReleaseRecords:
    """The release directory."""

    def __init__(
        self,
        directory: str,
        engine: Engine,
        ledger: Ledger,
        *,
        node: str,
        on_release: Callable[[str, int], None] = lambda _reason, _count: None,
    ) -> None:
        self._directory = directory
        self._engine = engine
        self._ledger = ledger
        self._node = node
        self._on_release = on_release
        self._stuck: set[str] = set()  # replayed or refused, but the directory does not let us remove or rename them

    def prepare(self) -> None:
        """Makes the directory where it is missing, owned by this user; where that fails, says so and goes on."""
        try:
            os.makedirs(self._directory, mode=0o755, exist_ok=True)
        except OSError as error:
            log.event(
                _logger, "warning", "the release directory cannot be made", path=self._directory, error=str(error)
            )

    async def replay(self) -> int:
        """Replays every record that is there; returns how many allocations were released.

        What cannot be done now (a full store) stays for the next time.
        """
        try:
            names = [entry.name for entry in os.scandir(self._directory) if entry.name.endswith(".json")]
        except OSError:
            return 0  # no directory: nobody wrote a record yet
        self._stuck &= set(names)
        names = [name for name in names if not name.startswith(".") and name not in self._stuck]
        released = 0
        for start in range(0, len(names), _AT_ONCE):
            released += sum(await asyncio.gather(*map(self._replay_one, names[start : start + _AT_ONCE])))
        return released

    async def _replay_one(self, name: str) -> bool:
        try:
            record = _read(os.path.join(self._directory, name))
        except FileNotFoundError:
            return False
        except (_NotARecordError, OSError) as error:
            self._set_aside(name, str(error))
            return False
        key = record.key if record.key.node else msgspec.structs.replace(record.key, node=self._node)
        try:
            held = await self._engine.run(lambda: self._ledger.release(key, record.generation, record.before))
        except IpamdError as error:
            log.event(_logger, "warning", "a release record waits", record=name, error=str(error))
            return False
        if held is not None:
            log_release(held, "release record of a DEL", record.request_id)
            self._on_release("replay", 1)
        self._remove(name)
        return held is not None

    def _remove(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self._directory, name))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._stuck.add(name)
            log.event(
                _logger,
                "error",
                "a replayed release record cannot be removed; give its directory to ipamd's user",
                record=name,
                error=str(error),
            )

    def _set_aside(self, name: str, why: str) -> None:
        path = os.path.join(self._directory, name)
        try:
            os.rename(path, f"{path}.bad")
        except OSError:
            self._stuck.add(name)
        log.event(_logger, "error", "this is no release record; look at the .bad file", record=name, error=why)


def _read(path: str) -> _Record:
    """Raises OSError, or _NotARecordError that says what is wrong."""
    # O_NONBLOCK: whoever may write there must not hang us with a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _NotARecordError("wanted a regular file")
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise _NotARecordError(f"wanted at most {_LARGEST} bytes")
    try:
        record = msgspec.json.decode(content, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _NotARecordError(str(error)) from None
    key = record.key
    if record.version != 1:
        raise _NotARecordError(f"wanted version 1, found {record.version}; a newer plugin wrote it")
    if not (key.client and key.network and key.container_id and key.ifname and record.before.boot_id):
        raise _NotARecordError("wanted a whole key and a moment, found an empty field")
    if not 0 <= record.generation < 1 << 63:
        raise _NotARecordError(f"wanted a generation, found {record.generation}")
    return record
