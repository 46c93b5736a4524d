"""A watch that outlives its connections: nothing missed, nothing twice.

- It goes on after the last revision that was handed on whole. A revision is never cut: etcd sends all changes of one
  transaction in one answer, or in fragments, which are put together.
- It asks for that revision once more, and leaves it out. Of the very revision up to which history was compacted etcd
  serves a watch, but has forgotten the deletions; asked for the one before, it says that history is gone.
- etcd's own notices of progress come in order with the events, so they count. The answer to a progress request does
  not: in etcd before 3.4.25 and 3.5.8 it may overtake events of earlier revisions. It only shows that the member lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal, NamedTuple

import msgspec
from grpc import aio

from cluster.endpoints import Endpoints, Line, ended
from cluster.errors import (
    AnotherHistoryError,
    CompactedError,
    DeniedError,
    TooLargeError,
    UnavailableError,
    Verdict,
    judge,
)
from protos.etcd.v3 import kv_pb2
from protos.etcd.v3 import rpc_pb2 as pb

# So long without a word until the member is asked, and again until it counts as gone.
QUIET_S = 10.0
_CREATE_S = 5.0
_LONGEST_PAUSE_S = 1.0
_MOST_TOLD = 1000

_logger = logging.getLogger(__name__)


class Pair(msgspec.Struct, frozen=True, gc=False):
    key: str  # without the prefix
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class Event(NamedTuple):
    kind: Literal["put", "delete"]
    pair: Pair  # of a delete only key and mod_revision
    previous: Pair | None  # None where there was none, or its history is compacted away


class Batch(NamedTuple):
    events: list[Event]
    revision: int  # all up to here is known


def pair_of(kv: kv_pb2.KeyValue, cut: int) -> Pair:
    """Raises UnicodeDecodeError."""
    return Pair(kv.key[cut:].decode(), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


class Keys:
    """What etcd lists, as pairs. A key that is no UTF-8 is none of ours: it is left out, and told once."""

    def __init__(self, cut: int) -> None:
        """`cut`: how many bytes of each key are the prefix."""
        self._cut = cut
        self._told: set[bytes] = set()

    def pair(self, kv: kv_pb2.KeyValue) -> Pair | None:
        try:
            return pair_of(kv, self._cut)
        except UnicodeDecodeError:
            self._tell(kv.key)
            return None

    def _tell(self, key: bytes) -> None:
        if key not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(key)
            _logger.error("etcd: the key %s is no UTF-8 and is left out; delete it", shown(key))

    def event(self, event: kv_pb2.Event) -> Event | None:
        pair = self.pair(event.kv)
        if pair is None:
            return None
        previous = pair_of(event.prev_kv, self._cut) if event.HasField("prev_kv") else None
        return Event("delete" if event.type == kv_pb2.Event.DELETE else "put", pair, previous)


def shown(key: bytes) -> str:
    """A key in a text for people, also one that is no UTF-8, or would write to their terminal."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in key)


def prefix_end(first: bytes) -> bytes:
    """The first key after all that begin with `first`; etcd takes a zero byte for no end."""
    stripped = first.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


class _LostError(Exception):
    """This stream is over; the watch goes on with another."""


class _SilentError(_LostError):
    """And the connection with it."""


async def watch(
    endpoints: Endpoints, root: bytes, prefix: str, start_revision: int, keys: Keys
) -> AsyncGenerator[Batch, None]:
    progress = _Progress(start_revision - 1 if start_revision else -1)
    pause = 0.0
    denied = 0
    while True:
        before = progress.revision
        try:
            line = await endpoints.stream()
            stream = _Stream(endpoints, line, root + prefix.encode(), keys)
            try:
                async with aclosing(stream.batches(progress)) as batches:
                    async for batch in batches:
                        pause = denied = 0
                        yield batch
            except _LostError as error:
                _logger.log(_level(pause), "etcd: the watch on %s ended at %s: %s", prefix, line.endpoint.name, error)
                line.failed(str(error), forget=isinstance(error, _SilentError))
            except DeniedError:
                # A refused token looks like a missing right: once more, with a fresh one.
                denied += 1
                if denied > 1 or not endpoints.has_user:
                    raise
                await endpoints.renew_token(line.metadata)
        except UnavailableError as error:
            _logger.log(_level(pause), "etcd: no endpoint for the watch on %s: %s", prefix, error)
        if progress.revision == before:
            pause = min(_LONGEST_PAUSE_S, max(0.05, 2 * pause))
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret


def _level(pause: float) -> int:
    """The first failure of a row is told, the others are for who looks for them."""
    return logging.DEBUG if pause else logging.INFO


class _Progress:
    """How far a watch has come, over its streams."""

    def __init__(self, revision: int) -> None:
        self.revision = revision  # all up to here was handed on; -1: not begun
        self.told = False  # whether the first, empty batch was handed on


class _Stream:
    """One watch on one connection."""

    def __init__(self, endpoints: Endpoints, line: Line, first: bytes, keys: Keys) -> None:
        self._endpoints = endpoints
        self._line = line
        self._first = first
        self._keys = keys
        self._heard = False
        self._is_silent = False

    async def batches(self, progress: _Progress) -> AsyncGenerator[Batch, None]:
        call = self._line.endpoint.watch(metadata=self._line.metadata)
        guard = asyncio.create_task(self._guard(call))
        try:
            await self._create(call, progress)
            if not progress.told:
                progress.told = True
                yield Batch([], progress.revision)
            fragments: list[kv_pb2.Event] = []
            while True:
                answer = await self._read(call)
                self._refused(answer)
                if answer.watch_id == -1:
                    continue
                fragments.extend(answer.events)
                if answer.fragment:
                    continue
                # What an answer with events says of the store's revision may be ahead of what is still to come.
                revision = fragments[-1].kv.mod_revision if fragments else answer.header.revision
                events, fragments = [e for e in fragments if e.kv.mod_revision > progress.revision], []
                if revision > progress.revision:
                    progress.revision = revision
                    found = map(self._keys.event, events)
                    yield Batch([event for event in found if event is not None], revision)
        except aio.AioRpcError as error:
            self._raise(error)
        finally:
            guard.cancel()
            call.cancel()

    async def _create(self, call: Any, progress: _Progress) -> None:
        request = pb.WatchCreateRequest(
            key=self._first,
            range_end=prefix_end(self._first),
            start_revision=max(1, progress.revision) if progress.revision >= 0 else 0,
            progress_notify=True,
            prev_kv=True,
            fragment=True,
        )
        try:
            async with asyncio.timeout(_CREATE_S):
                with contextlib.suppress(asyncio.InvalidStateError):  # ended already: reading tells why
                    await call.write(pb.WatchRequest(create_request=request))
                answer = await call.read()
        except TimeoutError:
            raise _SilentError("no answer") from None
        if answer is aio.EOF:  # type: ignore[attr-defined]
            self._raise(await ended(call))
        self._refused(answer)
        self._line.answered()
        if progress.revision < 0:
            # Begun at "now", which is after the revision that it tells.
            progress.revision = answer.header.revision
        elif answer.header.revision < progress.revision:
            await self._check(progress.revision)

    async def _check(self, revision: int) -> None:
        """The member is behind what was seen already: it lags, or this is another history than the one followed."""
        try:
            found = await self._endpoints.call("Range", pb.RangeRequest(key=self._first, count_only=True))
        except UnavailableError as error:
            raise _LostError(str(error)) from None
        if found.header.revision < revision:
            raise AnotherHistoryError(
                found.header.revision,
                f"etcd is at revision {found.header.revision}, and was at {revision} before: it was restored from a "
                "backup, or begun anew; the state has to be read anew",
            )

    async def _read(self, call: Any) -> Any:
        try:
            answer = await call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not the reader was cancelled, but the call: by the guard, or because the connection was closed here.
            raise (_SilentError if self._is_silent else _LostError)("no sign of life, or closed") from None
        if answer is aio.EOF:  # type: ignore[attr-defined]
            self._raise(await ended(call))
        self._heard = True
        return answer

    async def _guard(self, call: Any) -> None:
        """Asks for a sign of life where nothing was heard for a while, and ends the call where none comes."""
        asked = False
        while True:
            await asyncio.sleep(QUIET_S)
            # Before anything is asked: on a busy machine the answer may be read before the writing has returned.
            heard, self._heard = self._heard, False
            if heard:
                asked = False
            elif asked:
                self._is_silent = True
                call.cancel()
                return
            else:
                asked = True
                # Where it takes no requests, the next round ends it.
                with contextlib.suppress(asyncio.InvalidStateError, aio.AioRpcError, TimeoutError):
                    async with asyncio.timeout(QUIET_S / 2):
                        await call.write(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))

    def _raise(self, error: aio.AioRpcError) -> None:
        verdict, meaning = judge(error)
        if verdict is Verdict.TOKEN or (verdict is Verdict.FINAL and isinstance(meaning, DeniedError | TooLargeError)):
            raise meaning
        raise _LostError(str(meaning))

    def _refused(self, answer: Any) -> None:
        """Raises where etcd ended the watch."""
        if answer.compact_revision:
            raise CompactedError(answer.compact_revision)
        if answer.canceled:
            if "permission denied" in answer.cancel_reason or "token" in answer.cancel_reason:
                raise DeniedError(
                    f"etcd refuses the watch: {answer.cancel_reason}: the user needs the right to read it"
                )
            raise _LostError(answer.cancel_reason or "canceled by etcd")
