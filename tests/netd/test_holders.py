"""What is taken of the MACs in etcd, whoever wrote them there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from unittest.mock import Mock

import pytest

from cluster import layout
from cluster.etcd import Etcd, Event, Pair
from cluster.layout import MacRecord
from netd.holders import _Address, _Allocation, _do, _Network, _Record
from netd.reconcile import Reconciler
from telemetry import log

KEY = layout.MACS + layout.place("ov1", "10.9.0.2")


def taken(mac: str) -> list[str]:
    async def ask(_what: object) -> None:
        raise AssertionError("nothing is to be done yet")

    network = _Network("ov1", cast("Etcd", None), ask)
    network._take_mac(Pair(KEY, layout.encode(MacRecord("id", 1, mac)), 1, 1, 1, 0))
    return [one.mac for one in network._macs.values()]


@pytest.mark.parametrize("mac", ["00:00:00:00:00:00", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "nonsense", ""])
def test_what_no_interface_has_is_left_out(mac: str) -> None:
    """All zeroes would have frames for nobody known sent to one host."""
    assert taken(mac) == []


def test_another_spelling_is_one_mac() -> None:
    """Else what the kernel has would never be what is wanted."""
    assert taken("2:42:A:9:0:C") == ["02:42:0a:09:00:0c"]


def test_a_mac_that_comes_while_the_holders_are_handed_on() -> None:
    """It is handed on, too: nobody would tell it again."""
    asked = 0

    async def ask(_what: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            mac = layout.encode(MacRecord("id", 1, "02:00:00:00:00:01"))
            await network._macs_changed([Event("put", Pair(KEY, mac, 1, 2, 1, 0), None)])

    async def run() -> None:
        network._mac_follower.synced.set()
        await network._listed([], 1)

    network = _Network("ov1", cast("Etcd", None), ask)
    asyncio.run(run())
    assert asked == 2


def test_addresses_that_etcd_lost_stay_until_they_are_settled() -> None:
    told: dict[str, str] = {}  # address → host

    async def ask(what: Callable[[Reconciler], None]) -> None:
        reconciler = Mock()
        reconciler.overlays.take_false_news.return_value = []
        what(reconciler)
        for call in reconciler.overlays.replace.call_args_list:
            told.clear()
            told.update({str(one.address): f"{one.node} {one.mac}" for one in call.args[1]})
        for call in reconciler.overlays.put.call_args_list:
            for address, one in call.args[1].items():
                told.pop(str(address), None)
                told.update({str(address): f"{one.node} {one.mac}"} if one else {})

    def address(number: int, node: str) -> Pair:
        ip = f"10.9.0.{number}"
        record = _Record(node, "id", 1, _Allocation((_Address(f"{ip}/24"),)))
        return Pair(layout.ADDRESSES + layout.place("ov1", ip), layout.encode(record), 1, 1, 1, 0)

    async def run() -> None:
        network._mac_follower.synced.set()
        mac = Pair(KEY, layout.encode(MacRecord("id", 1, "02:00:00:00:00:01")), 1, 1, 1, 0)
        await network._macs_listed([mac], 9)
        await network._listed([address(2, "b"), address(3, "b"), address(4, "c")], 9)
        before = dict(told)
        assert before["10.9.0.2"] == "b 02:00:00:00:00:01"
        network.again()
        for _ in range(2):  # and again, for another reason
            await network._macs_listed([], 1)
            await network._listed([], 1)
            assert told == before
            network._follower.went_back = network._mac_follower.went_back = False
        await network._took([Event("put", address(3, "b"), None)])
        assert len(network.kept) == 2
        await network.settle({"d"})
        assert told == before
        await network.settle({"b"})
        assert (set(told), len(network.kept)) == ({"10.9.0.3", "10.9.0.4"}, 1)
        await network._took([Event("delete", address(4, "c"), None)])
        assert (set(told), len(network.kept)) == ({"10.9.0.3"}, 0)
        await network._listed([], 2)
        assert told == {}, "what is not lost is gone"

    network = _Network("ov1", cast("Etcd", None), ask)
    asyncio.run(run())


def test_what_is_left_out_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What `tests/netd/test_overlays.py` shows the overlays to say."""
    news = ["network ov1: 10.9.0.1 on b is the gateway's own address"]
    reconciler = Mock()
    reconciler.overlays.take_false_news.side_effect = lambda: [news.pop()] if news else []
    for _ in range(2):
        _do(reconciler, set())
    assert [vars(record)[log._FIELDS]["error"] for record in caplog.records] == [
        "network ov1: 10.9.0.1 on b is the gateway's own address"
    ]
