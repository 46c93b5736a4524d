"""etcd, as the cluster's state is kept in it. The one door: nobody else knows which client is behind.

    etcd = Etcd(EtcdConfig(("10.0.0.1:2379", "10.0.0.2:2379")))
    pair = await etcd.get("nodes/a")                                      # Pair, or None
    page = await etcd.range("nodes/", after="nodes/a", limit=100)         # Page(pairs, revision, more)
    async for page in etcd.walk("blocks/"): ...                           # all of it, as at one revision
    done = await etcd.txn([absent("nodes/a")], [Put("nodes/a", b"1")], [Get("nodes/a")])
    async for batch in etcd.watch("nodes/", start_revision=page.revision + 1): ...
    lease = await etcd.grant(15)                                          # and `cluster.leases.LeaseKeeper`

Keys are text without the configured prefix; one that is no UTF-8, which somebody else wrote, is left out. Reads are
linearizable. Every call has a deadline (`timeout_s`, all endpoints together) and raises only EtcdError. A change that
may have been made although no answer came raises UnknownOutcomeError; a caller who can tell by reading, or whose change
may be made twice, says `repeatable=True`.

An Etcd belongs to the event loop in which it was made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from cluster import watch
from cluster.config import EtcdConfig, EtcdConfigError
from cluster.endpoints import Endpoints, EtcdState
from cluster.errors import (
    CompactedError,
    DeniedError,
    EtcdError,
    QuotaError,
    TooLargeError,
    UnavailableError,
    UnknownOutcomeError,
)
from cluster.watch import Batch, Event, Pair, pair_of, prefix_end
from protos.etcd.v3 import rpc_pb2 as pb

__all__ = [
    "Batch",
    "CompactedError",
    "Compare",
    "Delete",
    "DeniedError",
    "EndpointStatus",
    "Etcd",
    "EtcdConfig",
    "EtcdConfigError",
    "EtcdError",
    "EtcdState",
    "Event",
    "Get",
    "Lease",
    "List",
    "Page",
    "Pair",
    "Put",
    "QuotaError",
    "TooLargeError",
    "TxnResult",
    "UnavailableError",
    "UnknownOutcomeError",
    "absent",
    "equals",
    "present",
    "unchanged",
]

# etcd's own limit is --max-txn-ops, 128 by default.
LARGEST_TXN = 100
_DEFRAGMENT_S = 120.0
_ALARMS: dict[int, str] = {pb.AlarmType.NOSPACE: "NOSPACE", pb.AlarmType.CORRUPT: "CORRUPT"}
_GONE = "requested lease not found"


class Page(NamedTuple):
    pairs: list[Pair]
    revision: int  # as at which it was read
    more: bool
    unreadable: tuple[bytes, ...] = ()  # whole keys that are no UTF-8, which `pairs` leaves out


class Compare(NamedTuple):
    """A condition of a transaction; made by the functions below."""

    key: str
    target: int
    result: int
    number: int = 0
    value: bytes = b""


def absent(key: str) -> Compare:
    return Compare(key, pb.Compare.CREATE, pb.Compare.EQUAL)


def present(key: str) -> Compare:
    return Compare(key, pb.Compare.CREATE, pb.Compare.GREATER)


def unchanged(key: str, mod_revision: int) -> Compare:
    """Not changed, and not deleted, since that revision was read."""
    return Compare(key, pb.Compare.MOD, pb.Compare.EQUAL, mod_revision)


def equals(key: str, value: bytes) -> Compare:
    return Compare(key, pb.Compare.VALUE, pb.Compare.EQUAL, 0, value)


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    key: str
    prefix: bool = False  # everything that begins so


class Get(NamedTuple):
    key: str


class List(NamedTuple):
    prefix: str
    limit: int  # how many pairs at most, by key


Operation = Put | Delete | Get | List


class TxnResult(NamedTuple):
    succeeded: bool
    revision: int
    pairs: tuple[Pair | None, ...] = ()  # one for each Get of the branch that was taken, in order
    deleted: int = 0  # keys, by all Deletes together
    pages: tuple[Page, ...] = ()  # one for each List, in order


class Lease(NamedTuple):
    id: int
    ttl_s: int


class EndpointStatus(msgspec.Struct, frozen=True):
    endpoint: str
    version: str = ""
    leader: bool = False  # whether it is the leader
    has_leader: bool = False
    db_bytes: int = 0
    db_bytes_used: int = 0
    revision: int = 0
    alarms: tuple[str, ...] = ()
    error: str = ""  # why it does not answer


class Etcd:
    def __init__(self, config: EtcdConfig) -> None:
        """Connects at the first call."""
        self.config = config
        self._endpoints = Endpoints(config)
        self._prefix = config.prefix.encode()
        self._keys = watch.Keys(len(self._prefix))
        self._call = self._endpoints.call

    async def close(self) -> None:
        await self._endpoints.close()

    @property
    def state(self) -> EtcdState:
        return self._endpoints.state

    async def get(self, key: str) -> Pair | None:
        found = await self._call("Range", pb.RangeRequest(key=self._prefix + key.encode()))
        return pair_of(found.kvs[0], len(self._prefix)) if found.kvs else None

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        """The pairs whose keys begin with `prefix` and come after the key `after`, by key; at most `limit`."""
        first = self._prefix + prefix.encode()
        begin = self._prefix + after.encode() + b"\0" if after else first
        page, _ = await self._page(begin, prefix_end(first), limit, revision, keys_only)
        return page

    async def _page(self, begin: bytes, end: bytes, limit: int, revision: int, keys_only: bool) -> tuple[Page, bytes]:
        """And its last key, whole."""
        request = pb.RangeRequest(key=begin, range_end=end, limit=limit, revision=revision, keys_only=keys_only)
        found = await self._call("Range", request)
        pairs, unreadable = [], []
        for kv in found.kvs:
            pair = self._keys.pair(kv)
            if pair is not None:
                pairs.append(pair)
            else:
                unreadable.append(kv.key)
        page = Page(pairs, revision or found.header.revision, found.more, tuple(unreadable))
        return page, found.kvs[-1].key if found.kvs else b""

    async def walk(
        self, prefix: str, *, page: int = 500, keys_only: bool = False, revision: int = 0
    ) -> AsyncIterator[Page]:
        """All pairs whose keys begin with `prefix`, as at one revision, in pages; at least one page comes."""
        begin = self._prefix + prefix.encode()
        end = prefix_end(begin)
        while True:
            found, last = await self._page(begin, end, page, revision, keys_only)
            yield found
            if not found.more or not last:
                return
            revision, begin = found.revision, last + b"\0"

    async def count(self, prefix: str) -> int:
        first = self._prefix + prefix.encode()
        request = pb.RangeRequest(key=first, range_end=prefix_end(first), count_only=True)
        return int((await self._call("Range", request)).count)

    async def txn(
        self,
        compares: Iterable[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        repeatable: bool = False,
    ) -> TxnResult:
        """Raises UnknownOutcomeError where no answer came and it is not `repeatable`, or reading only."""
        prefix = self._prefix
        # Filled in place, which costs a third of making the parts first.
        request = pb.TxnRequest()
        for compare in compares:
            _fill_compare(request.compare.add(), prefix, compare)
        for operation in then:
            _fill_operation(request.success.add(), prefix, operation)
        for operation in otherwise:
            _fill_operation(request.failure.add(), prefix, operation)
        changes = any(not isinstance(operation, Get | List) for operation in (*then, *otherwise))
        answer = await self._call("Txn", request, changes=changes, repeatable=repeatable)
        succeeded = answer.succeeded
        pairs: list[Pair | None] = []
        pages: list[Page] = []
        deleted = 0
        for operation, one in zip(then if succeeded else otherwise, answer.responses, strict=False):
            if isinstance(operation, Get):
                kvs = one.response_range.kvs
                pairs.append(pair_of(kvs[0], len(prefix)) if kvs else None)
            elif isinstance(operation, Delete):
                deleted += one.response_delete_range.deleted
            elif isinstance(operation, List):
                found = one.response_range
                listed = [pair_of(kv, len(prefix)) for kv in found.kvs]
                pages.append(Page(listed, answer.header.revision, found.more))
        return TxnResult(succeeded, answer.header.revision, tuple(pairs), deleted, tuple(pages))

    async def put(self, key: str, value: bytes, lease: int = 0, *, repeatable: bool = False) -> int:
        """The revision. `repeatable`, as of `txn`: for keys that nobody else writes."""
        request = pb.PutRequest(key=self._prefix + key.encode(), value=value, lease=lease)
        return int((await self._call("Put", request, changes=True, repeatable=repeatable)).header.revision)

    async def delete(self, key: str, *, prefix: bool = False, repeatable: bool = False) -> int:
        """How many keys went; fewer than there were, where it was asked for twice."""
        first = self._prefix + key.encode()
        request = pb.DeleteRangeRequest(key=first, range_end=prefix_end(first) if prefix else b"")
        return int((await self._call("DeleteRange", request, changes=True, repeatable=repeatable)).deleted)

    async def grant(self, ttl_s: int) -> Lease:
        """A lease that nobody got hold of, because no answer came, ends by itself."""
        answer = await self._call("LeaseGrant", pb.LeaseGrantRequest(TTL=ttl_s))
        return Lease(answer.ID, answer.TTL)

    async def keep_alive_once(self, lease_id: int) -> int:
        """The seconds that the lease now has; 0: it is gone."""
        try:
            return max(0, int((await self._call("LeaseKeepAlive", pb.LeaseKeepAliveRequest(ID=lease_id))).TTL))
        except EtcdError as error:
            if _GONE in str(error):
                return 0
            raise

    async def time_to_live(self, lease_id: int) -> int:
        """The seconds that are left of a lease, which this does not prolong; 0: it is gone."""
        return max(0, int((await self._call("LeaseTimeToLive", pb.LeaseTimeToLiveRequest(ID=lease_id))).TTL))

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease, and all keys under it; also one that is gone."""
        try:
            await self._call("LeaseRevoke", pb.LeaseRevokeRequest(ID=lease_id), changes=True)
        except EtcdError as error:
            if _GONE not in str(error):
                raise

    def watch(self, prefix: str, start_revision: int = 0) -> AsyncGenerator[Batch, None]:
        """What happens to keys that begin with `prefix`, from `start_revision` on; 0: from now on.

        The first batch is empty: from then on nothing is missed. Each revision comes once, whole and in order, over
        any number of reconnects. A batch without events says how far the watch has come. Raises CompactedError where
        the revision to go on from is compacted away: read the state anew, and watch from there. Other errors of the
        connection are not raised: see `state`. DeniedError is.
        """
        return watch.watch(self._endpoints, self._prefix, prefix, start_revision, self._keys)

    async def status(self) -> list[EndpointStatus]:
        """Of each endpoint, also of one without a leader; `error` where it does not answer."""
        return list(await asyncio.gather(*(self._status(endpoint.name) for endpoint in self._endpoints.all)))

    async def _status(self, endpoint: str) -> EndpointStatus:
        try:
            answer = await self._ask(endpoint, "Status", pb.StatusRequest())
            alarms = await self._ask(endpoint, "Alarm", pb.AlarmRequest(action=pb.AlarmRequest.GET))
        except EtcdError as error:
            return EndpointStatus(endpoint, error=str(error))
        return EndpointStatus(
            endpoint=endpoint,
            version=answer.version,
            leader=answer.leader == answer.header.member_id,
            has_leader=answer.leader != 0,
            db_bytes=answer.dbSize,
            db_bytes_used=answer.dbSizeInUse,
            revision=answer.header.revision,
            alarms=tuple(sorted({_ALARMS.get(alarm.alarm, str(alarm.alarm)) for alarm in alarms.alarms})),
        )

    async def compact(self, revision: int) -> None:
        """Forgets the history before `revision`, if it is not forgotten yet; returns when the space is free again."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        try:
            await self._call("Compact", request, limit_s=_DEFRAGMENT_S)
        except CompactedError:
            return

    async def defragment(self, endpoint: str) -> None:
        """Gives free space of one member's file back. The member serves nobody meanwhile."""
        await self._endpoints.ask(endpoint, "Defragment", pb.DefragmentRequest(), _DEFRAGMENT_S)

    async def disarm(self) -> None:
        """Ends the alarm NOSPACE of all members; etcd raises it again where the space is still missing."""
        found = await self._call("Alarm", pb.AlarmRequest(action=pb.AlarmRequest.GET))
        for alarm in found.alarms:
            if alarm.alarm == pb.AlarmType.NOSPACE:
                request = pb.AlarmRequest(
                    action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=pb.AlarmType.NOSPACE
                )
                await self._call("Alarm", request)

    async def _ask(self, endpoint: str, method: str, request: Any) -> Any:
        return await self._endpoints.ask(endpoint, method, request, self.config.timeout_s)


def _fill_compare(message: pb.Compare, prefix: bytes, compare: Compare) -> None:
    key, message.target, message.result, number, value = compare  # type: ignore[assignment]
    message.key = prefix + key.encode()
    if message.target == pb.Compare.CREATE:
        message.create_revision = number
    elif message.target == pb.Compare.MOD:
        message.mod_revision = number
    else:
        message.value = value


def _fill_operation(message: pb.RequestOp, prefix: bytes, operation: Operation) -> None:
    if isinstance(operation, List):
        listing = message.request_range
        listing.key = prefix + operation.prefix.encode()
        listing.range_end, listing.limit = prefix_end(listing.key), operation.limit
        return
    key = prefix + operation.key.encode()
    if isinstance(operation, Put):
        put = message.request_put
        put.key, put.value, put.lease = key, operation.value, operation.lease
    elif isinstance(operation, Get):
        message.request_range.key = key
    else:
        delete = message.request_delete_range
        delete.key = key
        if operation.prefix:
            delete.range_end = prefix_end(key)
