"""This host's own records in etcd: by what it is reached, and that it lives.

- The record is permanent: what is known of a host that is away stays known. That it lives is under a lease.
- Two hosts cannot have one name, or one underlay address: whoever comes second is refused, keeps trying, and says whose
  it is. All keys are written in one transaction, whose conditions are what was read just before.
- A clean stop ends no lease: the next start takes it over, and nobody hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Compare, Delete, Etcd, Get, Pair, Put, absent, unchanged
from cluster.layout import LayoutError
from cluster.leases import LeaseKeeper
from netd.view import NETD, NETD_ALIVE, UNDERLAY, NetdRecord
from telemetry import log

_logger = logging.getLogger("netd")

_LOOK_S = 1.0  # how often this host's own addresses are compared with what was said


class Member:
    """Keeps this host's records. `record` tells what they should say; None: nothing can be said yet."""

    def __init__(
        self, etcd: Etcd, name: str, alive: str, lease_s: int, record: Callable[[], Awaitable[NetdRecord | None]]
    ) -> None:
        """`alive`: who this host is in this boot."""
        self.problem = ""  # why others are not told of this host
        self._etcd = etcd
        self._name = name
        self._alive = alive.encode()
        self._lease_s = lease_s
        self._record = record
        self.missing: Callable[[], None] = lambda: (
            None
        )  # hears that etcd no longer has what was said, which is permanent
        self._said: NetdRecord | None = None
        self._anew = False
        self._keeper: LeaseKeeper | None = None
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Something changed that others may have to know: look now."""
        self._nudged.set()

    def again(self) -> None:
        """etcd may have lost what was said, or have something older: say it again."""
        self._anew = True
        self.nudge()

    async def run(self) -> None:
        """Never returns; when it is cancelled, the lease lives on for its time."""
        try:
            while True:
                pause_s = await self._once()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._nudged.wait(), pause_s)
                self._nudged.clear()
        finally:
            if self._keeper is not None:
                await self._keeper.close()

    async def _once(self) -> float:
        try:
            record = await self._record()
            lost = self._keeper is None or self._keeper.is_lost
            if record is not None and (lost or self._anew or record != self._said):
                await self._say(record, lost)
        except (EtcdError, LayoutError) as error:
            log.event(_logger, "debug", "etcd cannot be told of this host", error=str(error))
        return _LOOK_S

    async def _say(self, record: NetdRecord, lost: bool) -> None:
        if lost and self._keeper is not None:
            await self._keeper.close()
            self._keeper = None
        lease = await self._etcd.grant(self._lease_s) if self._keeper is None else self._keeper.lease
        addresses = [UNDERLAY + address for address in record.addresses]
        keys = [NETD + self._name, NETD_ALIVE + self._name, *addresses]
        while True:
            pairs = (await self._etcd.txn([], [Get(key) for key in keys])).pairs
            self._refuse(record, pairs)
            if self.problem:
                if self._keeper is None:
                    await self._etcd.revoke(lease.id)
                return
            if pairs[0] is None and self._said is not None:
                self.missing()
            wanted = dict(zip(keys, pairs, strict=True))
            puts = [
                Put(keys[0], layout.encode(record)),
                Put(keys[1], self._alive, lease.id),
                *(Put(key, f"{self._name}#{record.id}".encode(), lease.id) for key in addresses),
            ]
            left = set(self._said.addresses if self._said is not None else ()) - set(record.addresses)
            drops = [Delete(UNDERLAY + address) for address in left]  # for who may get it now
            conditions = [_as_read(key, pair) for key, pair in wanted.items()]
            if (await self._etcd.txn(conditions, [*puts, *drops], repeatable=True)).succeeded:
                break
        if self._keeper is None:
            self._keeper = LeaseKeeper(self._etcd, lease, lambda _: self._nudged.set())
        log.event(_logger, "info", "the cluster knows this host", addresses=",".join(record.addresses),
                  subnets=",".join(record.subnets), takes_vxlan=record.takes_vxlan)  # fmt: skip
        self._said, self._anew = record, False

    def _refuse(self, record: NetdRecord, pairs: tuple[Pair | None, ...]) -> None:
        """Sets `problem` where another host has the name or an address."""
        before, problem = self.problem, ""
        known, alive, *claims = pairs
        if alive is not None and alive.value != self._alive:
            other = layout.decode(NetdRecord, NETD + self._name, known.value) if known is not None else None
            where = ", ".join(other.addresses) if other is not None else "an unknown address"
            problem = (
                f"another host is alive as {self._name}, at {where}, and this one is at {', '.join(record.addresses)}:"
                " give one of them another name (node under [netd])"
            )
        for address, claim in zip(record.addresses, claims, strict=True):
            owner, _, its_id = (claim.value if claim is not None else b"").decode(errors="replace").partition("#")
            # Its own of before, under another name, is no rival's.
            if claim is not None and its_id != record.id and not problem:
                problem = (
                    f"{owner} has the underlay address {address}, which this host, {self._name}, has too: give one of"
                    " them another; until then the others are not told of this host"
                )
        self.problem = problem
        if problem and problem != before:
            log.event(_logger, "error", "the cluster does not take this host", error=problem)


def _as_read(key: str, pair: Pair | None) -> Compare:
    return absent(key) if pair is None else unchanged(key, pair.mod_revision)
