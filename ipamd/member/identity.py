"""Who this node is in which cluster: the records that say so, and what refuses the wrong ones."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from msgspec import Struct

from cluster import layout
from cluster.etcd import Etcd, Get, Pair, Put, absent
from cluster.layout import AliveRecord, NodeRecord, VersionRecord
from ipamd.engine import Transaction
from ipamd.errors import StartError
from ipamd.member.errors import JoinError
from ipamd.store.base import Note, Store
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_CLUSTER = "cluster"
_NODE_ID = "node-id"
_POLL_S = 0.5


class Identity(Struct, frozen=True):
    """What the disk says. `cluster` is "" before the node was one of any."""

    node: str
    node_id: str
    cluster: str


def on_disk(transaction: Transaction, node: str) -> Identity:
    """Reads it, and makes the node's id at the first start. Inside a batch. Raises StartError for another name."""
    store = transaction.store
    known, cluster = store.remembered_node(), store.note(_CLUSTER)
    if cluster and known and known != node:
        raise StartError(
            f"this node is {known} in its cluster, and is called {node} now: set node = {known!r} under [ipamd]; or "
            f"begin anew with an empty database, and remove {known} (netloom node remove)"
        )
    node_id = store.note(_NODE_ID)
    if not node_id:
        node_id = str(uuid.uuid4())
        transaction.apply(Note(_NODE_ID, node_id))
    return Identity(node, node_id, cluster)


def is_of_cluster(store: Store) -> bool:
    """Whether the database is of a node that is one of a cluster."""
    return bool(store.note(_CLUSTER))


def remember(transaction: Transaction, cluster: str) -> None:
    """The node is one of this cluster from now on. Inside a batch."""
    transaction.apply(Note(_CLUSTER, cluster))


async def join_cluster(etcd: Etcd, identity: Identity) -> str:
    """The cluster's id, which the first node makes; raises JoinError where it is another one, or too new."""
    fresh = VersionRecord(layout.SCHEMA, layout.NEEDS, str(uuid.uuid4()))
    endpoints = ", ".join(etcd.config.endpoints)
    pair = await etcd.get(layout.VERSION)
    if pair is None:
        if identity.cluster:
            raise JoinError(
                f"etcd ({endpoints}, prefix {etcd.config.prefix}) is empty, and this node is of cluster "
                f"{identity.cluster}: name the right etcd, or restore its data (docs/operations.md)"
            )
        put = Put(layout.VERSION, layout.encode(fresh))
        done = await etcd.txn([absent(layout.VERSION)], [put], [Get(layout.VERSION)], repeatable=True)
        pair = None if done.succeeded else done.pairs[0]
    found = fresh if pair is None else _understood(pair)
    if identity.cluster and identity.cluster != found.cluster:
        raise JoinError(
            f"etcd ({endpoints}, prefix {etcd.config.prefix}) is of cluster {found.cluster}, and this node of cluster "
            f"{identity.cluster}: name the right etcd, or begin anew with an empty database"
        )
    return found.cluster


async def refuse_newer(etcd: Etcd) -> None:
    """Raises JoinError where the cluster's state became too new for this version."""
    pair = await etcd.get(layout.VERSION)
    if pair is not None:
        _understood(pair)


def _understood(version: Pair) -> VersionRecord:
    found = layout.decode(VersionRecord, version.key, version.value)
    if found.needs > layout.SCHEMA:
        raise JoinError(
            f"the cluster's state needs schema {found.needs}, and this ipamd knows up to {layout.SCHEMA}; install the "
            "version that the other nodes have"
        )
    return found


async def register(etcd: Etcd, identity: Identity, record: NodeRecord) -> NodeRecord:
    """The node's record, made where it is missing; raises JoinError where another node has the name."""
    key = layout.NODES + identity.node
    done = await etcd.txn([absent(key)], [Put(key, layout.encode(record))], [Get(key)], repeatable=True)
    pair = done.pairs[0] if done.pairs else None
    if pair is None:
        log.event(_logger, "info", "the node is one of the cluster now", id=identity.node_id)
        return record
    found = layout.decode(NodeRecord, key, pair.value)
    if found.id != identity.node_id:
        raise JoinError(
            f"the cluster has a node {identity.node} already: that one is host {found.hostname} (id {found.id}), this "
            f"one is host {record.hostname} (id {identity.node_id}); give one of them another name (node under "
            f"[ipamd]), or, if that one is gone for ever, remove it (netloom node remove {identity.node})"
        )
    return found


async def wait_for_ghost(
    etcd: Etcd, identity: Identity, boot_id: str, limit_s: float, now_s: Callable[[], float] = time.monotonic
) -> None:
    """Returns when nobody else is alive as this node: after a reboot, when the lease of the last boot is over.

    Raises JoinError where somebody still is after `limit_s`: a copy of this node's disk, started elsewhere.
    """
    deadline = now_s() + limit_s
    while True:
        pair = await etcd.get(layout.ALIVE + identity.node)
        if pair is None:
            return
        found = layout.decode(AliveRecord, pair.key, pair.value)
        if found.id == identity.node_id and found.boot_id == boot_id:
            return  # our own last process
        if now_s() > deadline:
            raise JoinError(
                f"a node {identity.node} with the same id is alive on another host (boot {found.boot_id}): one of the "
                "two runs on a copy of the other's disk; begin anew there with an empty database and another name"
            )
        await asyncio.sleep(_POLL_S)
