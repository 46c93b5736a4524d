"""Who holds one address of an overlay, asked of a real etcd, by a host that is not on it."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import msgspec
import pytest

from cluster import layout
from cluster.etcd import EtcdError
from cluster.layout import AddressRecord, LayoutError, MacRecord
from ipamd.store.base import Address, Allocation, Instant, Key, Netns
from netd.holders import ask
from netd.values import Holder
from tests.cluster.loop import connected, looped
from tests.etcd import EtcdCluster

pytestmark = pytest.mark.kernel

FOUR, SIX = ip_address("10.9.0.2"), ip_address("fd09::2")


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


def record() -> bytes:
    """Of an attachment of host b with an address of each family."""
    addresses = tuple(Address(f"{one}/{length}", "", "ov1", 0) for one, length in ((FOUR, 24), (SIX, 64)))
    allocation = Allocation(Key("b", "cni", "ov1", "c1", "eth0"), addresses, Netns(), Instant("", 0), 0, 7)
    return layout.encode(AddressRecord("b", "id-b", 7, msgspec.Raw(msgspec.json.encode(allocation))))


@looped
async def test_holders(one: EtcdCluster) -> None:
    async with connected(one.sockets, "/holders/") as etcd:
        assert await ask(etcd, "ov1", FOUR) is None
        for address in (FOUR, SIX):
            await etcd.put(layout.ADDRESSES + layout.place("ov1", str(address)), record())
        assert await ask(etcd, "ov1", FOUR) == Holder(FOUR, "02:42:0a:09:00:02", "b")
        assert await ask(etcd, "ov1", SIX) == Holder(SIX, "02:42:0a:09:00:02", "b")
        assert await ask(etcd, "ov2", FOUR) is None
        # One of its own counts while the allocation is that one.
        place = layout.MACS + layout.place("ov1", str(FOUR))
        await etcd.put(place, layout.encode(MacRecord("id-b", 7, "02:00:00:00:00:07")))
        assert await ask(etcd, "ov1", FOUR) == Holder(FOUR, "02:00:00:00:00:07", "b")
        await etcd.put(place, layout.encode(MacRecord("id-b", 6, "02:00:00:00:00:06")))
        assert await ask(etcd, "ov1", FOUR) == Holder(FOUR, "02:42:0a:09:00:02", "b")
        await etcd.put(layout.ADDRESSES + layout.place("ov1", str(FOUR)), b"{}")
        with pytest.raises(LayoutError, match=r"10\.9\.0\.2"):
            await ask(etcd, "ov1", FOUR)


@looped
async def test_etcd_is_away() -> None:
    async with connected(("127.0.0.1:9",), timeout_s=0.2) as etcd:
        with pytest.raises(EtcdError):
            await ask(etcd, "ov1", FOUR)
