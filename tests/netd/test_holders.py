"""What is taken of the MACs in etcd, whoever wrote them there."""

from __future__ import annotations

import asyncio
from typing import cast
from unittest.mock import Mock

import pytest

from cluster import layout
from cluster.etcd import Etcd, Event, Pair
from cluster.layout import MacRecord
from netd.holders import _do, _Network
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
