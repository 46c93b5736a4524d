"""The cluster's word on addresses of cluster-address pools: `claims`, `unclaims` and `addresses` put together."""

import asyncio
import contextlib
import time

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Etcd
from cluster.layout import BlockRecord
from ipamd.engine import Engine
from ipamd.lease import Ledger
from ipamd.member.addresses import Addresses
from ipamd.member.book import Book
from ipamd.member.claims import Claims
from ipamd.member.mirror import Known
from ipamd.member.unclaims import Unclaims
from ipamd.rounds import Rounds
from ipamd.shared import Place
from ipamd.store.base import Allocation, Store

# One call without an answer says little. Who asks in vain for longer is refused before the ledger chooses: each choice
# that etcd could not be told of costs an address until it can.
_DOUBT_S = 1.0


class SharedAddresses:
    """See `ipamd.allocate.Claims`. `pools`: those of the cluster as they stand in etcd; kept by somebody else."""

    def __init__(
        self, etcd: Etcd, engine: Engine, ledger: Ledger, store: Store, identity: BlockRecord, pools: dict[str, Known]
    ) -> None:
        self._etcd = etcd
        self._ledger = ledger
        self._book = Book(identity)
        self._claims = Claims(etcd, engine, ledger, self._book, pools)
        self._unclaims = Unclaims(etcd, engine, ledger, store, self._book)
        self._addresses = Addresses(etcd, engine, ledger, store, self._book, self._claims)
        self._claims.on_claimed = self._unclaims.claimed
        self.rounds = Rounds()
        self._running = False
        self._looking: asyncio.Task[None] | None = None
        ledger.join(identity.node)

    @property
    def pending(self) -> int:
        """How many changes the cluster does not know yet."""
        return self._unclaims.pending

    @property
    def conflicts(self) -> dict[Place, str]:
        """Addresses that are in use here and that the cluster has for another node, and what an operator is to know."""
        return dict(self._book.conflicts)

    @property
    def collisions(self) -> int:
        """How many claims others were faster with, so far."""
        return self._claims.collisions

    def look_at(self, place: Place) -> None:
        """Compares an address with etcd's record of it soon, and mends what can be."""
        self._addresses.suspect(place)

    async def run(self) -> None:
        """Claims, tells of releases and follows the others. Never returns."""
        self._running = True
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._claims.run, self._unclaims.run, self._addresses.run):
                    group.create_task(work())
        finally:
            self._running = False
            if self._looking is not None:
                self._looking.cancel()

    async def ready(self) -> None:
        """Returns when the ledger may choose, or knows why it may not now."""
        state = self._etcd.state
        if self._running and not self._addresses.known.is_set():
            self._addresses.want()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._addresses.known.wait(), self._etcd.config.timeout_s / 2)
        if not self._addresses.known.is_set():
            self._ledger.shared_refusal = state.reason or "the cluster's state was not read yet"
        elif state.connected or time.monotonic() - state.since < _DOUBT_S:
            self._ledger.shared_refusal = ""
        else:
            self._ledger.shared_refusal = state.reason or "it does not answer"
            self._look()

    def _look(self) -> None:
        """Whoever asks next is to know whether etcd answers again: it may have been slow once, and on a node at rest
        nothing else asks it before the lease is renewed."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        with contextlib.suppress(EtcdError):
            await self._etcd.get(layout.VERSION)

    async def confirm(self, allocation: Allocation) -> None:
        """Returns when the cluster has the allocation's addresses as this node's."""
        await self._claims.confirm(allocation)
