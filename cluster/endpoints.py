"""One call to etcd, from whichever endpoint answers: connections, choice, failover, log-in.

- A call goes to the current endpoint. Where that one fails, the next is taken and stays the current one. All tries
  together have the caller's time; each has its share of what is left, so that a member which hangs costs only that.
- A change that may have been made is not asked for again, unless the caller says that it may be: it ends with
  UnknownOutcomeError. So that this is rare, nothing is sent before the connection stands: what was not sent is known.
- Every call carries `hasleader`: a member that is cut off from the others refuses at once instead of waiting.
- A connection is checked by pings while calls or watches are open on it.

Belongs to one event loop. The order of the endpoints is random: many nodes spread over them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from cluster.config import Address, EtcdConfig, EtcdConfigError
from cluster.errors import (
    NO_CONNECTION,
    SILENCE,
    DeniedError,
    EtcdError,
    UnavailableError,
    UnknownOutcomeError,
    Verdict,
    is_tls,
    judge,
)
from protos.etcd.v3 import rpc_pb2 as pb
from protos.etcd.v3 import rpc_pb2_grpc as rpc

Metadata = tuple[tuple[str, str], ...]

LARGEST_MESSAGE = 64 << 20
# A server of etcd's hangs up on a client that pings more often than every 5 s.
_PING_S, _PING_ANSWER_S = 6, 3
_LONGEST_PAUSE_S = 0.25
_NOT_ASKED = "not asked yet"
_HAS_LEADER: Metadata = (("hasleader", "true"),)
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # what is repeated is decided here
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.keepalive_time_ms", _PING_S * 1000),
    ("grpc.keepalive_timeout_ms", _PING_ANSWER_S * 1000),
    # Of any ping: while one is under way, none is sent that would have the time above.
    ("grpc.http2.ping_timeout_ms", _PING_ANSWER_S * 1000),
    # No pings to measure the line; so the window, which they would make wider, is wide from the start.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    ("grpc.http2.max_pings_without_data", 0),  # a watch sends nothing for hours and wants its pings
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # how long connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EtcdState:
    """How it stood at the last call. `since`: time.monotonic() of the last change of `connected`."""

    connected: bool
    endpoint: str
    since: float
    reason: str  # why not connected


class Endpoint:
    """One member's address, its connection and its methods. Connects when it is first used."""

    def __init__(self, address: Address, config: EtcdConfig) -> None:
        self.name = address.shown
        self._address = address
        self._config = config
        self._channel: aio.Channel | None = None
        self._forgotten: list[aio.Channel] = []
        self._closing: set[asyncio.Task[None]] = set()
        self.methods: dict[str, Any] = {}
        self.watch: Any = None
        self.keep_alive: Any = None

    def open(self) -> aio.Channel:
        if self._channel is None:
            target, options = self._address.target, _OPTIONS
            if target.startswith("unix:"):
                options = (*_OPTIONS, ("grpc.default_authority", "localhost"))
            if self._address.tls:
                self._channel = aio.secure_channel(target, _credentials(self._config), options=options)
            else:
                self._channel = aio.insecure_channel(target, options=options)
            self._bind(self._channel)
        return self._channel

    def uses(self, channel: aio.Channel) -> bool:
        """Whether calls go by this connection: it was not forgotten since."""
        return self._channel is channel

    def ready(self) -> bool:
        return self._channel is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def connect(self, limit_s: float) -> bool:
        """Whether a call may be tried: connected, or refused (the call then tells why). False: no answer in time."""
        channel = self.open()
        deadline = time.monotonic() + limit_s
        state = channel.get_state(try_to_connect=True)
        while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await channel.wait_for_state_change(state)
            except TimeoutError:
                return False
            state = channel.get_state(try_to_connect=True)
        return True

    def forget(self) -> None:
        """The next call connects anew. Calls that are under way still have their time."""
        channel, self._channel = self._channel, None
        if channel is not None:
            self._forgotten.append(channel)
            task = asyncio.create_task(self._close_later(channel))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends the calls that are under way, too."""
        for task in tuple(self._closing):
            task.cancel()
        if self._channel is not None:
            self._forgotten.append(self._channel)
            self._channel = None
        for channel in self._forgotten:
            await channel.close(None)
        self._forgotten.clear()

    async def _close_later(self, channel: aio.Channel) -> None:
        await asyncio.sleep(2 * self._config.timeout_s)
        self._forgotten.remove(channel)
        await channel.close(None)

    def _bind(self, channel: aio.Channel) -> None:
        kv, lease, maintenance = rpc.KVStub(channel), rpc.LeaseStub(channel), rpc.MaintenanceStub(channel)
        self.methods = {
            "Range": kv.Range,
            "Put": kv.Put,
            "DeleteRange": kv.DeleteRange,
            "Txn": kv.Txn,
            "Compact": kv.Compact,
            "LeaseGrant": lease.LeaseGrant,
            "LeaseRevoke": lease.LeaseRevoke,
            "LeaseTimeToLive": lease.LeaseTimeToLive,
            "LeaseKeepAlive": self._keep_alive_once,
            "Authenticate": rpc.AuthStub(channel).Authenticate,
            "Alarm": maintenance.Alarm,
            "Status": maintenance.Status,
            "Defragment": maintenance.Defragment,
        }
        self.watch = rpc.WatchStub(channel).Watch
        self.keep_alive = lease.LeaseKeepAlive

    async def _keep_alive_once(
        self,
        request: pb.LeaseKeepAliveRequest,
        timeout: float,  # noqa: ASYNC109 - as the others have it
        metadata: Metadata,
    ) -> pb.LeaseKeepAliveResponse:
        """etcd has only a stream for this; one question and one answer of it."""
        call = self.keep_alive(timeout=timeout, metadata=metadata)
        try:
            with contextlib.suppress(asyncio.InvalidStateError):  # ended already: reading tells why
                await call.write(request)
            answer: pb.LeaseKeepAliveResponse = await call.read()
            if answer is aio.EOF:  # type: ignore[attr-defined]
                raise await ended(call)
            return answer
        finally:
            call.cancel()


class Line:
    """What one stream goes by, and how the others hear of what it meets."""

    __slots__ = ("_channel", "_endpoints", "endpoint", "metadata")

    def __init__(self, endpoints: Endpoints, endpoint: Endpoint, metadata: Metadata) -> None:
        self._endpoints = endpoints
        self._channel = endpoint.open()
        self.endpoint = endpoint
        self.metadata = metadata

    def answered(self) -> None:
        """The endpoint took the stream."""
        self._endpoints.note_answer(self.endpoint)

    def failed(self, reason: str, *, forget: bool = False) -> None:
        """The stream ended; `forget`: and nothing else will come by this connection.

        Where somebody else had the connection forgotten, its end says nothing about the one after it.
        """
        if self.endpoint.uses(self._channel):
            self._endpoints.turn_from(self.endpoint, reason)
            if forget:
                self.endpoint.forget()


class _Tries:
    """What one call has met so far."""

    __slots__ = ("changes", "deadline", "failed", "logs_in", "reasons", "repeatable", "tokens", "unsure")

    def __init__(self, deadline: float, changes: bool = False, repeatable: bool = True) -> None:
        self.deadline = deadline
        self.changes = changes
        self.repeatable = repeatable
        self.failed: set[Endpoint] = set()  # of this round
        self.reasons: dict[str, str] = {}  # of each endpoint, of all rounds: what it said last; silence says less
        self.unsure = ""  # why a change may have been made
        self.tokens = 0
        self.logs_in = False

    def told(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in sorted(self.reasons.items())) or "no answer"


class Endpoints:
    """All endpoints, and the token with which etcd knows us."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        addresses = list(config.addresses())
        random.shuffle(addresses)
        self.all = [Endpoint(address, config) for address in addresses]
        self._current = self.all[0]
        self._state = EtcdState(False, "", time.monotonic(), _NOT_ASKED)
        self._metadata: Metadata = _HAS_LEADER
        self._logged_in = not config.user
        self._log_in = asyncio.Lock()
        self._closed = False

    @property
    def has_user(self) -> bool:
        return bool(self._config.user)

    @property
    def state(self) -> EtcdState:
        return self._state

    async def close(self) -> None:
        """Calls and watches that are open end with EtcdError."""
        self._closed = True
        for endpoint in self.all:
            await endpoint.close()

    async def call(
        self, method: str, request: Any, *, changes: bool = False, repeatable: bool = True, limit_s: float = 0.0
    ) -> Any:
        """The answer of whichever endpoint gives one. Raises EtcdError; see the rules above."""
        tries = _Tries(time.monotonic() + (limit_s or self._config.timeout_s), changes, repeatable)
        return await self._try(method, request, tries)

    async def _try(self, method: str, request: Any, tries: _Tries) -> Any:
        repeatable = tries.repeatable
        while True:
            endpoint = self._current
            if tries.failed or not endpoint.ready() or not self._logged_in:
                endpoint = await self._prepare(tries)
            left = tries.deadline - time.monotonic()
            # A log-in goes without the old token, which etcd 3.4 would refuse.
            metadata = _HAS_LEADER if tries.logs_in else self._metadata
            try:
                answer = await endpoint.methods[method](
                    request, timeout=self._share(left, tries) if repeatable else left, metadata=metadata
                )
            except aio.AioRpcError as error:
                await self._failed(error, endpoint, metadata, tries)
                continue
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed and not (task and task.cancelling()):
                    raise UnknownOutcomeError("etcd: the client was closed during a call") from None
                raise
            if not self._state.connected or self._state.endpoint != endpoint.name:
                self._note(True, endpoint.name, "")
            return answer

    async def _prepare(self, tries: _Tries) -> Endpoint:
        """The endpoint for the next try, where the current one will not do as it is."""
        try:
            if not self._logged_in and not tries.logs_in:
                await self._renew_token(self._metadata, tries.deadline)
            endpoint = await self._next(tries)
        except EtcdError as error:
            if not tries.unsure:
                raise
            raise UnknownOutcomeError(f"{tries.unsure}; then: {error}") from None
        return endpoint

    async def _failed(self, error: aio.AioRpcError, endpoint: Endpoint, metadata: Metadata, tries: _Tries) -> None:
        """Returns where the call is to be tried again."""
        verdict, meaning = judge(error)
        if verdict is Verdict.TOKEN and tries.tokens < 2 and self._config.user and not tries.logs_in:
            tries.tokens += 1
            await self._renew_token(metadata, tries.deadline)
            return
        if verdict in (Verdict.TOKEN, Verdict.FINAL):
            if tries.unsure:
                raise UnknownOutcomeError(f"{tries.unsure}; then: {meaning}")
            raise meaning
        self._leave(endpoint, str(meaning), tries)
        if verdict is Verdict.UNSURE and tries.changes:
            tries.unsure = f"etcd at {endpoint.name} did not answer a change, which may have been made: {meaning}"
            if not tries.repeatable:
                raise UnknownOutcomeError(tries.unsure)

    async def ask(self, name: str, method: str, request: Any, limit_s: float) -> Any:
        """The answer of one endpoint, also of one without a leader."""
        endpoint = next((one for one in self.all if one.name == name), None)
        if endpoint is None:
            raise EtcdError(f"no such endpoint: {name}; there are {', '.join(one.name for one in self.all)}")
        deadline = time.monotonic() + limit_s
        if not await endpoint.connect(limit_s):
            raise UnavailableError(f"no connection to {name} within {limit_s:g} s")
        if not self._logged_in:
            with contextlib.suppress(UnavailableError):  # what needs no user is answered nevertheless
                await self._renew_token(self._metadata, deadline)
        try:
            return await endpoint.methods[method](
                request, timeout=max(0.1, deadline - time.monotonic()), metadata=self._metadata[1:]
            )
        except aio.AioRpcError as error:
            raise judge(error)[1] from None

    async def stream(self, limit_s: float = 0.0) -> Line:
        """A connected endpoint for a stream."""
        deadline = time.monotonic() + (limit_s or self._config.timeout_s)
        endpoint = await self._next(_Tries(deadline))
        if not self._logged_in:
            await self._renew_token(self._metadata, deadline)
        return Line(self, endpoint, self._metadata)

    async def renew_token(self, used: Metadata) -> None:
        """For a stream whose token was refused."""
        await self._renew_token(used, time.monotonic() + self._config.timeout_s)

    async def _next(self, tries: _Tries) -> Endpoint:
        """The endpoint for the next try, connected or refusing. After a round without success it waits a little."""
        while True:
            if self._closed:
                raise EtcdError("etcd: this client is closed")
            left = tries.deadline - time.monotonic()
            if left <= 0:
                raise UnavailableError(f"etcd: no endpoint answered in time: {tries.told()}")
            endpoint = self._current
            if endpoint in tries.failed:
                untried = [one for one in self.all if one not in tries.failed]
                if not untried:
                    await self._pause(tries, left)
                    continue
                endpoint = self._current = next((one for one in untried if one.ready()), untried[0])
            if endpoint.ready():
                return endpoint
            try:
                if await endpoint.connect(self._share(left, tries)):
                    return endpoint
            except (OSError, EtcdConfigError) as error:
                raise EtcdError(str(error)) from None
            self._leave(endpoint, NO_CONNECTION, tries)

    async def _pause(self, tries: _Tries, left: float) -> None:
        """Between two rounds. Raises where waiting would not help."""
        if all(is_tls(reason) for reason in tries.reasons.values()):
            raise DeniedError(f"etcd: no endpoint can be used with these certificates: {tries.told()}")
        await asyncio.sleep(min(left, random.uniform(0.3, 1.0) * _LONGEST_PAUSE_S))  # noqa: S311 - no secret
        tries.failed.clear()

    def _share(self, left: float, tries: _Tries) -> float:
        """What one try may take: the rest of the time, divided among the endpoints not tried yet."""
        return max(0.02, left / max(1, len(self.all) - len(tries.failed)))

    def _leave(self, endpoint: Endpoint, reason: str, tries: _Tries) -> None:
        tries.failed.add(endpoint)
        # The last round may have been too short for an answer.
        if reason not in SILENCE or endpoint.name not in tries.reasons:
            tries.reasons[endpoint.name] = reason
        self.turn_from(endpoint, tries.reasons[endpoint.name])
        if is_tls(reason):
            endpoint.forget()  # the next try reads the certificates anew

    def turn_from(self, endpoint: Endpoint, reason: str) -> None:
        """It failed: where it is the current endpoint, another one is from now on."""
        if self._current is not endpoint:
            return
        others = [one for one in self.all if one is not endpoint]
        start = self.all.index(endpoint)
        following = self.all[start + 1 :] + self.all[:start]
        self._current = next((one for one in others if one.ready()), following[0] if following else endpoint)
        self._note(False, endpoint.name, reason)

    def note_answer(self, endpoint: Endpoint) -> None:
        """It answered."""
        if not self._state.connected:
            self._note(True, endpoint.name, "")

    def _note(self, connected: bool, endpoint: str, reason: str) -> None:
        before = self._state
        since = before.since if connected == before.connected else time.monotonic()
        self._state = EtcdState(connected, endpoint, since, reason)
        if connected:
            _logger.info("etcd: connected to %s", endpoint)
        elif before.connected or before.reason == _NOT_ASKED:  # the others of a row are in `state`
            _logger.warning("etcd: left %s: %s", endpoint, reason)

    async def _renew_token(self, used: Metadata, deadline: float) -> None:
        """A fresh token, unless another call got one since `used`."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self._log_in:
                if not self._logged_in or self._metadata is used:
                    await self._authenticate(deadline)
        except TimeoutError:
            raise UnavailableError("etcd: nobody could log in in time") from None

    async def _authenticate(self, deadline: float) -> None:
        try:
            password = self._config.read_password()
        except EtcdConfigError as error:
            raise DeniedError(str(error)) from None
        tries = _Tries(deadline)
        tries.logs_in = True
        try:
            answer = await self._try(
                "Authenticate", pb.AuthenticateRequest(name=self._config.user, password=password), tries
            )
        except EtcdError as error:
            if "authentication is not enabled" not in str(error):
                raise
            self._metadata = _HAS_LEADER
        else:
            self._metadata = (*_HAS_LEADER, ("token", answer.token))
        self._logged_in = True


async def ended(call: Any) -> aio.AioRpcError:
    """Why the server ended a stream."""
    code, details = await call.code(), await call.details() or "ended by etcd"
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=details, debug_error_string=None)


def _credentials(config: EtcdConfig) -> grpc.ChannelCredentials:
    def content(path: str) -> bytes | None:
        if not path:
            return None
        with open(path, "rb") as file:
            return file.read()

    return grpc.ssl_channel_credentials(content(config.ca), content(config.key), content(config.cert))
