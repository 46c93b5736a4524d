"""This node as one of a cluster: it joins, says that it is alive, and follows what the others do.

- The first start needs etcd: who the node is and which pools there are stands there. Later ones do not: what this node
  holds is in its own database, and pools of mode node-block go on. It joins when etcd is back.
- A node's record is permanent; another one, under a lease, says that it is alive. Nothing of the node's hangs on the
  lease, and a clean stop leaves it to run out: its containers go on.
- Where nodes are removed that were silent for a grace, this node stops giving addresses once it could not renew its
  lease for half of that, so that it never hands out what others believe to be free.
"""

import asyncio
import contextlib
import logging
import platform
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import EndpointStatus, Etcd, EtcdState, Event, Pair
from cluster.layout import AliveRecord, BlockRecord, LayoutError, NodeRecord
from cluster.leases import LeaseKeeper
from ipamd.backup import Shared
from ipamd.clock import Clock
from ipamd.config import ClusterConfig
from ipamd.engine import Engine, Transaction
from ipamd.errors import IpamdError, PreconditionError, StartError, UnavailableError
from ipamd.lease import Ledger
from ipamd.member import copy
from ipamd.member import identity as identities
from ipamd.member.blocks import Blocks, Counts
from ipamd.member.check import ClusterCheck
from ipamd.member.errors import JoinError
from ipamd.member.follow import Follower
from ipamd.member.holdings import Holdings
from ipamd.member.identity import Identity
from ipamd.member.mirror import Mirror
from ipamd.member.nodes import LeftForDead, Nodes
from ipamd.member.publish import Publisher
from ipamd.member.shared import SharedAddresses
from ipamd.store.base import Note
from telemetry import log
from telemetry.metrics import ClusterSample

_logger = logging.getLogger("ipamd.member")

_DRAINING = "draining"
_RENEWED = "renewed"  # boot id and CLOCK_BOOTTIME of the last renewal of the lease
_START_S = 10.0
_PAUSE_S = 1.0
_PAUSE_AFTER_REFUSAL_S = 10.0
_SYNC_S = 30.0


class Member:
    """See the top of this file. `joined`: etcd was met in this run, and says that this node is who it is."""

    def __init__(
        self,
        config: ClusterConfig,
        identity: Identity,
        *,
        version: str,
        engine: Engine,
        ledger: Ledger,
        transaction: Transaction,
        clock: Clock,
        counts: Counts,
    ) -> None:
        self.joined = False
        self.refusal = ""  # why it cannot join, where waiting does not help
        self.draining = bool(transaction.store.note(_DRAINING))
        self.etcd = Etcd(config.etcd)
        self.identity = identity
        self._config = config
        self._version = version
        self._engine = engine
        self._ledger = ledger
        self._transaction = transaction
        self._clock = clock
        self._silent = False
        self._keeper: LeaseKeeper | None = None
        self._tasks: list[asyncio.Task[None]] = []
        own = BlockRecord(identity.node, identity.node_id)
        holdings = Holdings(transaction, ledger)
        self.mirror = Mirror(self.etcd, engine, ledger, transaction.store, holdings, identity.node)
        self.blocks = Blocks(self.etcd, engine, ledger, holdings, self.mirror, own, counts)
        self.claims = SharedAddresses(self.etcd, engine, ledger, transaction.store, own, self.mirror.pools)
        self.publisher = Publisher(self.etcd, engine, ledger, holdings, own, counts)
        self.check = ClusterCheck(
            self.etcd,
            engine,
            ledger,
            transaction.store,
            identity=own,
            holdings=holdings,
            blocks=self.blocks,
            shared=self.claims,
        )
        self.nodes = Nodes(self.etcd, identity.node, ledger.cooldown_s)
        self._node = Follower(self.etcd, layout.NODES + identity.node, self._listed, self._changed)
        # What follows etcd from the moment when the node has joined: in this order, each after the one before.
        self.followers: list[Follower] = [*self.mirror.followers, self.blocks.follower, self._node]
        # Further work, from then on.
        self.also: list[Callable[[], Coroutine[Any, Any, None]]] = [self.claims.run]
        boot_id, _, renewed_ns = transaction.store.note(_RENEWED).partition(" ")
        # Of an earlier boot nobody knows how long ago that was.
        self._renewed_ns = int(renewed_ns) if boot_id == clock.boot_id else -(1 << 62)
        ledger.in_cluster = True
        self._set_draining(self.draining)

    async def start(self) -> None:
        """Joins; where etcd does not answer a node that has joined before, a task goes on trying. Raises StartError."""
        try:
            async with asyncio.timeout(_START_S if self.identity.cluster else None):
                await self._join()
        except JoinError as error:
            raise StartError(str(error)) from None
        except (EtcdError, TimeoutError) as error:
            why = str(error) or f"it took longer than {_START_S:g} s to join"
            if not self.identity.cluster:
                raise StartError(
                    f"etcd cannot be used, and this node was never one of its cluster: {why}; see [etcd] in the "
                    "configuration"
                ) from None
            log.event(_logger, "warning", "etcd is away: this node goes on with what it holds", error=why)
        if self._config.reclaim_nodes_after_s:
            self._run(self._watch_silence())
        if not self.joined:
            self._run(self._join_later())

    async def close(self) -> None:
        """Stops following. The lease runs out by itself."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.close()
        if self.joined:
            with contextlib.suppress(EtcdError, IpamdError, TimeoutError):
                async with asyncio.timeout(_PAUSE_S):
                    await self.publisher.flush()
        await self.etcd.close()

    # --- what others ask

    @property
    def state(self) -> EtcdState:
        """Whether etcd answers, and since when."""
        return self.etcd.state

    async def endpoints(self) -> list[EndpointStatus]:
        """What each endpoint says of itself."""
        return await self.etcd.status()

    @property
    def unpublished(self) -> int:
        """How much the cluster does not know yet."""
        return self.publisher.unpublished + self.claims.pending

    def sample(self) -> ClusterSample:
        """For the metrics."""
        return ClusterSample(self.etcd.state.connected, self.joined, self.draining, self.unpublished)

    def trouble(self) -> str:
        """What an operator should know, "" where all is well."""
        if self.refusal:
            return self.refusal
        state = self.etcd.state
        if not self.joined or not state.connected:
            return (
                f"etcd is away: {state.reason or 'it was not met yet'}; this node goes on with the blocks that it holds"
            )
        return ""

    async def records(self) -> list[Shared]:
        """What a backup has of the cluster. Raises UnavailableError."""
        try:
            return await copy.records(self.etcd)
        except EtcdError as error:
            raise UnavailableError(f"the cluster's part cannot be read: {error}") from None

    # --- joining

    async def _join(self) -> None:
        cluster = await identities.join_cluster(self.etcd, self.identity)
        await self._register()
        await self._wait_for_ghost()
        if not self.identity.cluster:
            await self._engine.run(lambda: identities.remember(self._transaction, cluster), grows=True)
        await self._say_alive()
        following: list[asyncio.Task[None]] = []
        try:
            for follower in self.followers:
                follower.synced.clear()  # an earlier attempt may have come so far
                following.append(asyncio.create_task(follower.run()))
                async with asyncio.timeout(_SYNC_S):
                    await follower.synced.wait()
        except BaseException:
            for task in following:
                task.cancel()
            raise
        self._tasks += following
        self.joined = True
        self.refusal = ""
        self._judge()
        for work in (self._stay_alive, self.blocks.keep_ahead, self.blocks.keep_tidy, self.publisher.run, *self.also):
            self._run(self._for_ever(work))
        if self._config.reclaim_nodes_after_s:
            grace_s = self._config.reclaim_nodes_after_s
            self._run(LeftForDead(self.etcd, self.nodes, self._clock, self.identity.node, grace_s).run())
        log.event(_logger, "info", "joined the cluster", cluster=cluster, etcd=self.etcd.state.endpoint)

    async def _join_later(self) -> None:
        while True:
            pause = _PAUSE_S
            try:
                await self._join()
            except JoinError as error:
                if self.refusal != str(error):
                    log.event(_logger, "error", "the cluster does not take this node", error=str(error))
                self.refusal = str(error)
                self._judge()
                pause = _PAUSE_AFTER_REFUSAL_S
            except (EtcdError, IpamdError, LayoutError, TimeoutError) as error:
                log.event(_logger, "debug", "the cluster cannot be joined yet", error=str(error))
            else:
                return
            await asyncio.sleep(pause)

    async def _wait_for_ghost(self) -> None:
        limit_s = 2.0 * self._config.lease_s
        await identities.wait_for_ghost(self.etcd, self.identity, self._clock.boot_id, limit_s)

    async def _register(self) -> bool:
        """Whether the node's record was not there."""
        node = self.identity
        fresh = NodeRecord(node.node_id, platform.node(), self._clock.unix_s(), self.draining)
        return await identities.register(self.etcd, node, fresh) is fresh

    # --- being alive

    async def _say_alive(self) -> None:
        asked_ns = self._clock.now_ns()
        lease = await self.etcd.grant(self._config.lease_s)
        record = AliveRecord(
            self.identity.node_id, self._clock.boot_id, self._version, self._clock.unix_s(), layout.SCHEMA
        )
        await self.etcd.put(layout.ALIVE + self.identity.node, layout.encode(record), lease.id)
        if self._keeper is not None:
            await self._keeper.close()
        self._keeper = LeaseKeeper(self.etcd, lease, granted_ns=asked_ns, clock_ns=self._clock.now_ns)

    async def _stay_alive(self) -> None:
        while True:
            if self._keeper is not None:
                await self._keeper.lost()
            try:
                await identities.refuse_newer(self.etcd)
                if await self._register():  # it is permanent: etcd lost its data, or the node was removed
                    for follower in self.followers:
                        follower.again()
                await self._wait_for_ghost()
                await self._say_alive()
            except JoinError as error:
                log.event(_logger, "error", "the cluster does not take this node any more", error=str(error))
                self.refusal = str(error)
                self._judge()
                await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
            except (EtcdError, LayoutError) as error:
                log.event(_logger, "debug", "the node's lease cannot be had", error=str(error))
                await asyncio.sleep(_PAUSE_S)
            else:
                self.refusal = ""
                self._judge()

    async def _watch_silence(self) -> None:
        """Stops giving addresses before others may believe that this node is gone."""
        grace_s = self._config.reclaim_nodes_after_s
        noted_ns = 0
        while True:
            renewed_ns = self._keeper.last_renewed_ns if self._keeper else self._renewed_ns
            silent = self._clock.now_ns() - renewed_ns > grace_s / 2 * 1e9
            if silent != self._silent:
                self._silent = silent
                self._judge()
                log.event(_logger, "error" if silent else "info",
                          "the lease could not be renewed: no new addresses" if silent else "the lease is renewed",
                          grace_s=grace_s)  # fmt: skip
            if self._keeper and renewed_ns - noted_ns > grace_s / 16 * 1e9:
                noted_ns = renewed_ns
                with contextlib.suppress(IpamdError):
                    await self._engine.run(lambda ns=noted_ns: self._note_renewal(ns))  # type: ignore[misc]
            await asyncio.sleep(min(1.0, grace_s / 60))

    def _note_renewal(self, moment_ns: int) -> None:
        self._transaction.apply(Note(_RENEWED, f"{self._clock.boot_id} {moment_ns}"))

    # --- being drained

    async def _listed(self, pairs: Sequence[Pair], _revision: int) -> None:
        for pair in pairs:
            await self._read(pair)

    async def _changed(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == "put":
                await self._read(event.pair)
            elif event.pair.key == layout.NODES + self.identity.node:
                log.event(_logger, "error", "this node was removed from the cluster while it runs; it comes back")
                await self._register()

    async def _read(self, pair: Pair) -> None:
        if pair.key != layout.NODES + self.identity.node:
            return
        record = layout.decode(NodeRecord, pair.key, pair.value)
        if record.id != self.identity.node_id:
            self.refusal = (
                f"the cluster gave the name {self.identity.node} to host {record.hostname} (id {record.id}) after this "
                "node was removed; give one of them another name"
            )
            log.event(_logger, "error", "the cluster has another node of this name", error=self.refusal)
            self._judge()
            return
        if record.draining != self.draining:
            await self._engine.run(lambda: self._transaction.apply(Note(_DRAINING, "1" if record.draining else "")))
            log.event(_logger, "warning", "the node is drained" if record.draining else "the node is no longer drained")
            self._set_draining(record.draining)

    def _set_draining(self, draining: bool) -> None:
        self.draining = self.blocks.draining = draining
        self._judge()

    # --- whether new addresses may be given

    def _judge(self) -> None:
        self._ledger.refusal = self._refusal()

    def _refusal(self) -> Callable[[], IpamdError] | None:
        node = self.identity.node
        if self.refusal:
            text = self.refusal
            return lambda: UnavailableError(f"no new addresses of the cluster's pools here: {text}")
        if self._silent:
            return lambda: UnavailableError(
                "etcd could not be reached for so long that other nodes may soon take what this one holds: no new "
                "addresses of the cluster's pools until it is back"
            )
        if self.draining:
            return lambda: PreconditionError(
                f"node {node} is drained: it gives no new addresses of the cluster's pools (netloom node drain --undo "
                f"{node} ends that)"
            )
        return None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _for_ever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Work that never returns; a fault of ours in it is logged, and it begins anew."""
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 (whatever it was, the cluster goes on hearing of this node)
                log.event(_logger, "error", "a part of the node's work in the cluster failed; it begins anew",
                          exc_info=error)  # fmt: skip
            await asyncio.sleep(_PAUSE_S)
