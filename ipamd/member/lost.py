"""Whether something of a pool is in use here that etcd no longer has: it was lost there, as nobody deletes such a one.

A claim under way is none of it: the ledger has chosen, and etcd refuses the choice, as the pool is gone.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from ipamd.engine import Engine
from ipamd.lease import Ledger
from ipamd.store.base import Store

_CLAIMS_S = 5.0  # a claim has [etcd] timeout_s, 3 s; and who asks waits for 5 s
_POLL_S = 0.1


async def in_use(engine: Engine, ledger: Ledger, store: Store, pool: str) -> bool:
    """Waits for claims under way; one without an answer (of an earlier process, or for too long) counts."""
    until = asyncio.get_running_loop().time() + _CLAIMS_S
    look: Callable[[], set[int]] = partial(_generations, store, pool)
    while held := await engine.run(look):
        if held - ledger.unconfirmed.keys() or asyncio.get_running_loop().time() > until:
            return True
        await asyncio.sleep(_POLL_S)
    return False


def _generations(store: Store, pool: str) -> set[int]:
    return {generation for _, generation in store.taken(pool) if generation}
