"""What a backup has of a cluster, and a cluster's state made from one."""

from collections.abc import Iterable
from itertools import islice

from cluster import layout
from cluster.etcd import Etcd, Put, absent
from ipamd.backup import Shared
from ipamd.errors import PreconditionError

# Neither what stands under a lease, nor what the nodes publish again by themselves.
_PREFIXES = (
    layout.VERSION,
    layout.POOLS,
    layout.RESERVATIONS,
    layout.NETWORKS,
    layout.NODES,
    layout.BLOCKS,
    layout.ADDRESSES,
    layout.OWNED,
    layout.MACS,
)
_BATCH = 50  # keys of a transaction, with a condition for each


async def records(etcd: Etcd) -> list[Shared]:
    """All that is worth keeping, of one revision. Raises EtcdError."""
    found: list[Shared] = []
    revision = 0
    for prefix in _PREFIXES:
        async for page in etcd.walk(prefix, revision=revision):
            revision = revision or page.revision
            found += (Shared(pair.key, pair.value) for pair in page.pairs)
    return found


async def restore(etcd: Etcd, shared: Iterable[Shared]) -> int:
    """Puts them into an etcd that has no cluster yet; returns how many.

    The version comes last: a node that starts meanwhile, and a second attempt, see that it is not complete. Raises
    PreconditionError where there is a cluster, and EtcdError.
    """
    if await etcd.get(layout.VERSION) is not None:
        raise PreconditionError(
            f"etcd ({', '.join(etcd.config.endpoints)}) has a cluster under {etcd.config.prefix}; name another prefix, "
            "or an empty etcd"
        )
    rows = sorted(shared, key=lambda row: row.key == layout.VERSION)
    remaining = iter(rows)
    while batch := list(islice(remaining, _BATCH)):
        done = await etcd.txn(
            [absent(row.key) for row in batch], [Put(row.key, row.value) for row in batch], repeatable=True
        )
        if not done.succeeded:
            # An earlier attempt: each by itself then, and what is there stays.
            for row in batch:
                await etcd.txn([absent(row.key)], [Put(row.key, row.value)], repeatable=True)
    return len(rows)
