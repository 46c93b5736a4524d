"""The MACs that this node told the cluster of, and tells again where etcd lost them.

A MAC belongs to an allocation of an address in an overlay network. etcd has it for all hosts; releasing the address
takes it away there, in the same change (`unclaims`). A note in the store has this node's, as nobody else could tell
them again: after etcd was restored from an older copy, or a key was deleted by hand.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Delete, Etcd, Get, Pair, Put, unchanged
from cluster.layout import LayoutError, MacRecord
from ipamd.engine import Engine, Transaction
from ipamd.errors import IpamdError, NotFoundError, PreconditionError, UnavailableError
from ipamd.member.book import address_key, holder_of, mac_key
from ipamd.shared import Place
from ipamd.store.base import Allocation, Note
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_NOTE = "macs"
_BATCH = 50  # addresses of a transaction, with two questions for each
_EVERY_S = 300.0
# After etcd was away addresses may have to be claimed again, and MACs are told after that.
_PAUSE_S, _LOOKS = 5.0, 3


class Macs:
    """See the top of this file, and `ipamd.networks.Macs`."""

    def __init__(self, etcd: Etcd, engine: Engine, transaction: Transaction, node_id: str) -> None:
        self._etcd = etcd
        self._engine = engine
        self._transaction = transaction
        self._node_id = node_id
        text = transaction.store.note(_NOTE)
        self._changing = asyncio.Lock()  # a look must not put back what was told since it read
        # pool, address, generation, MAC; "": what was told before is about to be deleted
        found = msgspec.json.decode(text, type=list[tuple[str, str, int, str]]) if text else []
        self._told = {(pool, ip): (generation, mac) for pool, ip, generation, mac in found}

    async def set(self, pool: str, ip: str, mac: str) -> None:
        """Tells of a MAC, or ("") no longer. Raises NotFoundError, PreconditionError, UnavailableError."""
        async with self._changing:
            await self._set((pool, ip), mac)

    async def _set(self, place: Place, mac: str) -> None:
        pool, ip = place
        held = await self._engine.run(lambda: self._transaction.store.holder(pool, ip))
        if not mac and isinstance(held, Allocation) and self._told.get(place, (0, ""))[0] != held.generation:
            return  # of this allocation nothing was ever told
        with _told():
            address, there = (await self._etcd.txn([], [Get(address_key(place)), Get(mac_key(place))])).pairs
            holder = holder_of(address) if address is not None else None
            if holder is not None and holder.node_id != self._node_id:
                raise PreconditionError(
                    f"address: {ip} of pool {pool} is held by node {holder.node}; its own ipamd is to be told"
                )
            if not isinstance(held, Allocation):
                raise NotFoundError(f"address: nobody holds {ip} of pool {pool} here; allocate it first")
            if address is None or holder is None or holder.generation != held.generation:
                raise UnavailableError(f"the cluster does not know yet who holds {ip} of pool {pool}; ask again")
        # Before etcd: what it may have been told is told again as it is here, whatever comes in between.
        await self._note(place, (held.generation, mac))
        with _told():
            done = await self._put(place, held.generation, mac, address, there)
        if not done:
            raise NotFoundError(f"address: {ip} of pool {pool} was released at this moment")
        if not mac:
            await self._note(place, None)

    async def _note(self, place: Place, one: tuple[int, str] | None) -> None:
        if self._told.get(place) != one:
            told = {there: other for there, other in self._told.items() if there != place}
            if one is not None:
                told[place] = one
            await self._engine.run(lambda: self._keep(told), grows=True)

    async def _put(self, place: Place, generation: int, mac: str, address: Pair, there: Pair | None) -> bool:
        """Makes etcd's record what it is to be, if the address is still ours."""
        record = layout.encode(MacRecord(self._node_id, generation, mac)) if mac else b""
        if (there.value if there is not None else b"") == record:
            return True
        change = Put(mac_key(place), record) if mac else Delete(mac_key(place))
        return (await self._etcd.txn([unchanged(address.key, address.mod_revision)], [change])).succeeded

    def _keep(self, told: dict[Place, tuple[int, str]]) -> None:
        """Inside a batch: what is not in use any more is left out."""
        kept = {place: one for place, one in told.items() if self._generation(place) == one[0]}
        if kept == self._told:
            return
        rows = [(*place, *one) for place, one in sorted(kept.items())]
        self._transaction.apply(Note(_NOTE, msgspec.json.encode(rows).decode() if rows else ""))
        self._transaction.on_undo(setattr, self, "_told", self._told)
        self._told = kept

    def _generation(self, place: Place) -> int:
        held = self._transaction.store.holder(*place)
        return held.generation if isinstance(held, Allocation) else 0

    async def run(self) -> None:
        """Looks after etcd was away, and now and then. Never returns."""
        seen: object = None
        looks, looked_s = 0, 0.0
        while True:
            state = self._etcd.state
            if (state.connected, state.since) != seen:
                seen = state.connected, state.since
                looks = _LOOKS
            if state.connected and (looks or time.monotonic() - looked_s > _EVERY_S):
                looks, looked_s = max(looks - 1, 0), time.monotonic()
                try:
                    await self.look()
                except (EtcdError, LayoutError, IpamdError) as error:
                    log.event(_logger, "debug", "MACs cannot be looked at yet", error=str(error))
                    looks = max(looks, 1)
            await asyncio.sleep(_PAUSE_S)

    async def look(self) -> int:
        """Tells again what etcd lacks; returns how many. Raises EtcdError, LayoutError, IpamdError."""
        if not self._told:
            return 0
        await self._engine.run(lambda: self._keep(self._told))
        places = list(self._told)
        count = 0
        for start in range(0, len(places), _BATCH):
            async with self._changing:
                count += await self._look_at(places[start : start + _BATCH])
        if count:
            log.event(_logger, "warning", "etcd had lost MACs of addresses that are in use; they are told again",
                      count=count)  # fmt: skip
        return count

    async def _look_at(self, places: Sequence[Place]) -> int:
        count = 0
        for place, address, there in await self._read(places):
            generation, mac = self._told.get(place, (0, ""))
            holder = holder_of(address) if address is not None else None
            if address is None or holder is None or (holder.node_id, holder.generation) != (self._node_id, generation):
                continue  # `addresses` claims it again, if it is in use
            if not mac:
                await self._put(place, generation, mac, address, there)
                await self._note(place, None)
            elif there is None or there.value != layout.encode(MacRecord(self._node_id, generation, mac)):
                count += await self._put(place, generation, mac, address, there)
        return count

    async def _read(self, places: Sequence[Place]) -> Iterable[tuple[Place, Pair | None, Pair | None]]:
        gets = [Get(key(place)) for place in places for key in (address_key, mac_key)]
        pairs = (await self._etcd.txn([], gets)).pairs
        return zip(places, pairs[::2], pairs[1::2], strict=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except EtcdError as error:
        raise UnavailableError(f"the cluster cannot be told: {error}; ask again") from None
    except LayoutError as error:
        raise PreconditionError(f"what the cluster has cannot be read: {error}; delete or correct it") from None
