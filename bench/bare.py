"""Bare transactions of etcd, through the client that ipamd uses: `python -m bench.bare`, inside a host.

It reads one JSON request per line and answers with one:

    {"endpoints": ["192.168.77.2:2379"], "width": 8, "least": false, "begin_s": 1.5, "end_s": 2.5}
    {"took_us": [812.0]}

A transaction is the one that a cluster-wide address takes (`ipamd.member.claims`): nobody's, neither reserved nor
cooling down, pool and node as they are; then its record and the node's own index of it. With `least` it only makes a
key that is not there yet. `width` of them are under way at any time, from `begin_s` to `end_s` (time.monotonic); what
ends later is not counted. The keys are taken away afterwards, which is not measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from cluster import layout
from cluster.etcd import Compare, Delete, Etcd, EtcdConfig, Get, Put, absent, present, unchanged

_VALUE = bytes(240)
# Of each process its own.
_NODE, _POOL = f"{layout.NODES}{os.getpid()}", f"{layout.POOLS}{os.getpid()}"
Operations = list[Put | Delete | Get]
_PREFIX = "/bench-bare/"


class Bare:
    """One client, kept for all requests."""

    def __init__(self) -> None:
        self._etcd: Etcd | None = None

    async def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._etcd is None:
            self._etcd = Etcd(EtcdConfig(tuple(request["endpoints"]), prefix=_PREFIX, timeout_s=30.0))
            await self._etcd.put(_NODE, _VALUE)
        etcd = self._etcd
        make = _least if request["least"] else _Claim(await etcd.put(_POOL, _VALUE))
        place = f"{os.urandom(8).hex()}/"
        took: list[float] = []
        await asyncio.sleep(max(0.0, request["begin_s"] - time.monotonic()))

        async def work(index: int) -> None:
            number = 0
            while True:
                key = f"{place}{index}-{number}"
                began = time.perf_counter_ns()
                done = await etcd.txn(*make(key))
                if time.monotonic() > request["end_s"]:
                    return
                if not done.succeeded:
                    raise RuntimeError(f"{key} was there already")
                took.append((time.perf_counter_ns() - began) / 1000)
                number += 1

        await asyncio.gather(*(work(index) for index in range(request["width"])))
        for prefix in (place, layout.ADDRESSES + place, f"{layout.OWNED}{place}"):
            await etcd.delete(prefix, prefix=True)
        return {"took_us": took}


def _least(key: str) -> tuple[list[Compare], Operations, Operations]:
    return [absent(key)], [Put(key, _VALUE)], []


class _Claim:
    """What a claim of one address is made of."""

    def __init__(self, pool_revision: int) -> None:
        self._pool_revision = pool_revision

    def __call__(self, place: str) -> tuple[list[Compare], Operations, Operations]:
        key, reserved, freed = layout.ADDRESSES + place, layout.RESERVATIONS + place, layout.FREED + place
        wanted = [present(_NODE), unchanged(_POOL, self._pool_revision), absent(key), absent(reserved), absent(freed)]
        return (
            wanted,
            [Put(key, _VALUE), Put(f"{layout.OWNED}{place}", b"")],
            [Get(_NODE), Get(_POOL), Get(key), Get(reserved), Get(freed)],
        )


def main() -> None:
    gc.disable()
    bare = Bare()
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            try:
                answer = runner.run(bare.answer(json.loads(line)))
            except Exception as error:  # noqa: BLE001 - the asker shows it
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
