"""All allocations of the cluster's pools, read from etcd page by page; nothing of it is kept.

Of a pool of mode node-block they are what its nodes published, so a few seconds old; of mode cluster-address, etcd's
own truth. An attachment with addresses of several blocks or pools comes once for each.
"""

import logging
from collections.abc import AsyncGenerator, Iterator

import msgspec

from cluster import layout
from cluster.errors import EtcdError
from cluster.etcd import Etcd, Pair
from cluster.layout import AddressRecord, LayoutError, PublishedRecord, PublishedRow
from ipamd.errors import UnavailableError
from ipamd.store.base import Address, Allocation, Filter, Instant, Key, Netns
from telemetry import log

_logger = logging.getLogger("ipamd.member")

_BLOCKS_AT_ONCE = 32  # a block of 1,024 addresses has some 200 KiB
_ADDRESSES_AT_ONCE = 500


async def listing(etcd: Etcd, wanted: Filter) -> AsyncGenerator[Allocation, None]:
    """Those that match. Raises UnavailableError."""
    only = layout.place(wanted.pool, "") if wanted.pool else ""
    try:
        async for page in etcd.walk(layout.PUBLISHED + only, page=_BLOCKS_AT_ONCE):
            for pair in page.pairs:
                for allocation in _of_block(pair):
                    if wanted.matches(allocation):
                        yield allocation
        async for page in etcd.walk(layout.ADDRESSES + only, page=_ADDRESSES_AT_ONCE):
            for pair in page.pairs:
                for allocation in _of_address(pair):
                    if wanted.matches(allocation):
                        yield allocation
    except EtcdError as error:
        raise UnavailableError(f"the cluster's allocations cannot be read: {error}") from None


def _of_block(pair: Pair) -> Iterator[Allocation]:
    pool, _ = layout.split(pair.key.removeprefix(layout.PUBLISHED))
    try:
        record = layout.decode(PublishedRecord, pair.key, pair.value)
    except LayoutError as error:
        log.event(_logger, "error", "a block's list cannot be read", error=str(error))
        return
    for row in record.rows:
        yield _published(pool, record.node, row)


def _published(pool: str, node: str, row: PublishedRow) -> Allocation:
    return Allocation(
        Key(node, row.client, row.network, row.container_id, row.ifname),
        (Address(row.cidr, row.gateway, pool, row.range_set),),
        Netns(),
        Instant("", 0),
        row.created_unix_s,
        row.generation,
        row.workload,
    )


def _of_address(pair: Pair) -> Iterator[Allocation]:
    """The allocation, at the first of its addresses in this pool."""
    pool, ip = layout.split(pair.key.removeprefix(layout.ADDRESSES))
    try:
        record = layout.decode(AddressRecord, pair.key, pair.value)
        allocation = msgspec.json.decode(record.allocation, type=Allocation)
    except (LayoutError, msgspec.MsgspecError) as error:
        log.event(_logger, "error", "an address of the cluster cannot be read", key=pair.key, error=str(error))
        return
    addresses = tuple(address for address in allocation.addresses if address.pool == pool)
    if addresses and addresses[0].ip == ip:
        key = msgspec.structs.replace(allocation.key, node=record.node)
        yield msgspec.structs.replace(allocation, key=key, addresses=addresses, generation=record.generation)
