"""Bare transactions of etcd, through the client that ipamd uses: `python -m bench.bare`, inside a host.

It reads one JSON request per line and answers with one:

    {"endpoints": ["192.168.77.2:2379"], "width": 8, "begin_s": 1.5, "end_s": 2.5}   →  {"took_us": [812.0]}

A transaction makes a key that is not there yet, with a value of the size that an address' record has. `width` of them
are under way at any time, from `begin_s` to `end_s` (time.monotonic); what ends later is not counted. The keys are
taken away afterwards, which is not measured.
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

from cluster.etcd import Etcd, EtcdConfig, Put, absent

_VALUE = bytes(240)
_PREFIX = "/bench-bare/"


class Bare:
    """One client, kept for all requests."""

    def __init__(self) -> None:
        self._etcd: Etcd | None = None

    async def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._etcd is None:
            self._etcd = Etcd(EtcdConfig(tuple(request["endpoints"]), prefix=_PREFIX, timeout_s=30.0))
            await self._etcd.get("warm")
        etcd = self._etcd
        place = f"{os.urandom(8).hex()}/"
        took: list[float] = []
        await asyncio.sleep(max(0.0, request["begin_s"] - time.monotonic()))

        async def work(index: int) -> None:
            number = 0
            while True:
                key = f"{place}{index}-{number}"
                began = time.perf_counter_ns()
                done = await etcd.txn([absent(key)], [Put(key, _VALUE)])
                if time.monotonic() > request["end_s"]:
                    return
                if not done.succeeded:
                    raise RuntimeError(f"{key} was there already")
                took.append((time.perf_counter_ns() - began) / 1000)
                number += 1

        await asyncio.gather(*(work(index) for index in range(request["width"])))
        await etcd.delete(place, prefix=True)
        return {"took_us": took}


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
