"""Tells the cluster what of this node's blocks is in use: one value for each block, soon after something changed."""

import asyncio
import logging
import time

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Etcd, Put, equals
from cluster.layout import BlockRecord, PublishedRecord
from ipamd.engine import Engine
from ipamd.errors import IpamdError
from ipamd.lease import Ledger
from ipamd.member.blocks import Counts
from ipamd.member.holdings import Holdings
from telemetry import log

_logger = logging.getLogger("ipamd.member")

# A block that changes all the time is told of so often; what changes seldom waits at most so long.
_INTERVAL_S = 1.0
_PAUSE_S = 1.0
_AT_ONCE = 16
_LARGEST = 512 << 10  # bytes; etcd takes 1.5 MiB

Place = tuple[str, str]  # pool, block


class Publisher:
    """See the top of this file."""

    def __init__(
        self, etcd: Etcd, engine: Engine, ledger: Ledger, holdings: Holdings, identity: BlockRecord, counts: Counts
    ) -> None:
        self._etcd = etcd
        self._engine = engine
        self._changed = ledger.changed
        self._holdings = holdings
        self._identity = identity
        self._record = layout.encode(identity)
        self._counts = counts
        self._on_the_way: dict[Place, None] = {}
        # What a process before this one told is not known: these are compared first.
        self._unsure = dict.fromkeys((held.pool, held.cidr) for held in holdings.all())

    @property
    def unpublished(self) -> int:
        """How many blocks have changes that the cluster does not know yet."""
        return len(self._changed.keys() | self._on_the_way.keys() | self._unsure.keys())

    async def run(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.flush()
            except (EtcdError, IpamdError) as error:
                log.event(_logger, "debug", "blocks could not be published", error=str(error))
                await asyncio.sleep(_PAUSE_S)

    async def flush(self) -> None:
        """Publishes all that changed so far; raises EtcdError, and what is left will come in the next round."""
        places = list({**self._unsure, **self._changed})
        for start in range(0, len(places), _AT_ONCE):
            await self._some(places[start : start + _AT_ONCE])

    async def _some(self, places: list[Place]) -> None:
        unsure = {place for place in places if place in self._unsure and place not in self._changed}
        for place in places:
            self._unsure.pop(place, None)
            self._changed.pop(place, None)
            self._on_the_way[place] = None
        try:
            rows = await self._engine.run(lambda: [self._holdings.rows(*place) for place in places])
            # None: given back meanwhile, and what was published of it went along.
            values = {
                place: layout.encode(PublishedRecord(self._identity.node, some))
                for place, some in zip(places, rows, strict=True)
                if some is not None
            }
            for place in unsure & values.keys():
                there = await self._etcd.get(layout.PUBLISHED + layout.place(*place))
                if there is not None and there.value == values[place]:
                    del values[place]
            await self._publish(values)
        except BaseException:
            self._changed.update(dict.fromkeys(places))
            raise
        finally:
            for place in places:
                self._on_the_way.pop(place, None)

    async def _publish(self, values: dict[Place, bytes]) -> None:
        """All in one transaction, if they are small and all of them ours."""
        if not values:
            return
        size = sum(map(len, values.values()))
        if (size <= _LARGEST or len(values) == 1) and await self._put(values):
            return
        if len(values) > 1:
            for place, value in values.items():
                await self._put({place: value})

    async def _put(self, values: dict[Place, bytes]) -> bool:
        endings = {layout.place(*place): value for place, value in values.items()}
        ours = [equals(layout.BLOCKS + ending, self._record) for ending in endings]
        puts = [Put(layout.PUBLISHED + ending, value) for ending, value in endings.items()]
        began = time.monotonic()
        done = await self._etcd.txn(ours, puts, repeatable=True)
        self._counts.told("publish", time.monotonic() - began)
        return done.succeeded
