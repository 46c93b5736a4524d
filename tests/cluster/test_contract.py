"""The contract suite of stores, on the store of a cluster together with a real etcd.

`ToldStore` is the store of kind "etcd" with what follows each commit: everything that the rows say the cluster is to
know is put into etcd by transactions that want what they change as the rows had it before, and errands are done and
settled. After each of them etcd's picture must be the rows'. The allocations of the suite claim all of their pools.
"""

# ruff: noqa: F403 (the tests of the suite, run here with this module's fixture)

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from cluster import layout
from cluster.etcd import Delete, Etcd, EtcdConfig, Put, absent, equals
from cluster.layout import BlockRecord, PoolRecord, ReservationRecord
from ipamd.store.base import Change, Drop, Errand, Filter, Grant, Settle, Store
from ipamd.store.cluster import ClusterStore
from tests.etcd import VERSIONS, EtcdCluster
from tests.hosts import PATIENCE_S
from tests.ipamd.store.test_contract import *

_OWN = BlockRecord("host", "id")
_ALL = 1 << 20


class ToldStore(ClusterStore):
    """See the top of this file."""

    def __init__(self, path: str, endpoints: Sequence[str], prefix: str) -> None:
        super().__init__(path)
        self._runner = asyncio.Runner()
        self._etcd = self._runner.run(_connect(endpoints, prefix))

    def apply(self, changes: Sequence[Change]) -> int:
        return super().apply([_claiming(change) for change in changes])

    def commit(self) -> None:
        super().commit()
        errands = self.errands(_ALL)
        self._runner.run(self._tell(errands))
        if errands:
            self.begin()
            super().apply([Settle(tuple(errand.seq for errand in errands))])
            super().commit()
        assert not self.errands()

    def close(self) -> None:
        self._runner.run(self._etcd.close())
        self._runner.close()
        super().close()

    async def _tell(self, errands: Iterable[Errand]) -> None:
        for errand in errands:
            key = layout.ADDRESSES + layout.place(errand.pool, errand.ip)
            value = b"%d" % errand.generation
            if errand.kind == "claim":
                await self._txn([absent(key)], [Put(key, value)])
            elif await self._etcd.get(key) is not None:
                await self._txn([equals(key, value)], [Delete(key)])
        for prefix, wanted in self._picture().items():
            there = await self._read(prefix)
            for key in there.keys() - wanted.keys():
                await self._txn([equals(key, there[key])], [Delete(key)])
            for key in wanted.keys() - there.keys():
                await self._txn([absent(key)], [Put(key, wanted[key])])
            for key in wanted.keys() & there.keys():
                if wanted[key] != there[key]:
                    await self._txn([equals(key, there[key])], [Put(key, wanted[key])])
            assert await self._read(prefix) == wanted
        assert await self._read(layout.ADDRESSES) == self._held()

    async def _txn(self, conditions: Sequence[object], changes: Sequence[object]) -> None:
        done = await self._etcd.txn(conditions, changes)  # type: ignore[arg-type]
        assert done.succeeded, (conditions, changes)

    async def _read(self, prefix: str) -> dict[str, bytes]:
        return {pair.key: pair.value async for page in self._etcd.walk(prefix) for pair in page.pairs}

    def _picture(self) -> Mapping[str, Mapping[str, bytes]]:
        """What the rows say that stands in etcd, but for addresses."""
        return {
            layout.POOLS: {layout.POOLS + row.name: layout.encode(PoolRecord(row.spec)) for row in self.pools()},
            layout.BLOCKS: {
                layout.BLOCKS + layout.place(pool, cidr): layout.encode(_OWN) for pool, cidr in self.blocks()
            },
            layout.RESERVATIONS: {
                layout.RESERVATIONS + layout.place(row.pool, row.ip): layout.encode(ReservationRecord(row.note))
                for row in self.reservations()
            },
        }

    def _held(self) -> dict[str, bytes]:
        return {
            layout.ADDRESSES + layout.place(address.pool, address.ip): b"%d" % held.generation
            for held in self.allocations(Filter(), limit=_ALL)
            for address in held.addresses
        }


def _claiming(change: Change) -> Change:
    if isinstance(change, Grant | Drop):
        return msgspec.structs.replace(change, claims=tuple({a.pool for a in change.allocation.addresses}))
    return change


async def _connect(endpoints: Sequence[str], prefix: str) -> Etcd:
    return Etcd(EtcdConfig(tuple(endpoints), prefix=prefix, timeout_s=PATIENCE_S))


@pytest.fixture(scope="module", params=VERSIONS)
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with EtcdCluster(version=request.param) as cluster:
        yield cluster


@pytest.fixture  # type: ignore[no-redef]  # in place of the suite's
def store(etcd: EtcdCluster, tmp_path: Path) -> Iterator[Store]:
    made = ToldStore(str(tmp_path / "s.db"), etcd.sockets, f"/{tmp_path.name}/")
    yield made
    made.close()
