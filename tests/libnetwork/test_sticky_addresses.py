"""Addresses for containers whose names are known, on a real ipamd with the memory store; etcd's slowness is played."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from ipamd.client import IpamError
from libnetwork.ipam_driver import IpamDriver
from libnetwork.state import State
from protos.ipam.v1 import ipam_pb2 as pb
from tests.libnetwork.test_ipam_driver import Driver, Overlay, daemon, ipam, overlay, routes

__all__ = ["daemon", "ipam", "overlay", "routes"]


class Named:
    """What Docker asks of a driver, for one container after the other."""

    def __init__(self, driver: Driver, state: State) -> None:
        self.name = ""
        self.asked: list[str] = []
        client = driver.client
        driver.driver = IpamDriver(state, lambda: client, lambda: None, who=self._who)  # type: ignore[arg-type, return-value]
        self._driver = driver

    def _who(self, pool: str) -> str:
        self.asked.append(pool)
        return self.name

    def address(self, pool: str, name: str, wanted: str = "") -> str:
        self.name = name
        return self._driver.address(pool, wanted)


def test_a_name_has_its_address_back(ipam: Driver, state: State) -> None:
    docker = Named(ipam, state)
    pool = ipam.pool("10.1.0.0/24", "10.1.0.0/25")
    assert ipam.address(pool, gateway=True) == "10.1.0.1/24"
    first, second = docker.address(pool, "web"), docker.address(pool, "db")
    (held,) = ipam.client.list_allocations(pb.ListAllocationsRequest(network=pool, address=first.partition("/")[0]))
    assert held.workload == "web"
    for address in (first, second):
        ipam.release(pool, address.partition("/")[0])
    assert docker.address(pool, "") not in (first, second)
    assert docker.address(pool, "db") == second
    assert docker.address(pool, "other", first) == first
    third = docker.address(pool, "web")
    assert third not in (first, second)  # and no error
    ipam.release(pool, third.partition("/")[0])
    ipam.release(pool, first.partition("/")[0])
    assert docker.address(pool, "web") == third
    assert docker.asked == [pool] * 6  # of no gateway, and of no address that somebody named


class Slow(Overlay):
    """An address that was given back comes only later, as etcd has not heard of it."""

    def __init__(self, of: Any) -> None:
        super().__init__(of)
        self.times = 0
        self.wished: list[tuple[str, ...]] = []

    def allocate(self, key: pb.AttachmentKey, **asked: Any) -> pb.AllocateResponse:
        self.wished.append(tuple(asked["requested"]))
        if asked["requested"] and self.times:
            self.times -= 1
            raise IpamError(grpc.StatusCode.UNAVAILABLE, "was released lately and cools down; ask again later")
        answer: pb.AllocateResponse = self._client.allocate(key, **asked)
        return answer


def slowed(overlay: Driver, state: State) -> tuple[Slow, Named]:
    slow = Slow(overlay.client._client)  # type: ignore[attr-defined]
    overlay.client = slow  # type: ignore[assignment]
    return slow, Named(overlay, state)


def test_an_overlays_address_that_is_just_being_given_back(
    overlay: Driver, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, docker = slowed(overlay, state)
    pool = overlay.pool("10.70.0.0/24")
    monkeypatch.setattr("libnetwork.ipam_driver._LEAVING_POLL_S", 0)
    address = docker.address(pool, "web")
    wanted = address.partition("/")[0]
    overlay.release(pool, wanted)
    slow.times = 3
    slow.wished.clear()
    assert docker.address(pool, "web") == address
    assert slow.wished == [(wanted,)] * 4
    # Another name does not wait for it, nor does it where somebody has the address.
    overlay.release(pool, wanted)
    slow.wished.clear()
    slow.times = 1
    assert docker.address(pool, "db") != address
    assert docker.address(pool, "thief", wanted) == address
    assert docker.address(pool, "web") != address
    assert slow.wished == [(), (wanted,), (wanted,), (wanted,), ()]


def test_an_overlays_address_that_does_not_come_back(
    overlay: Driver, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, docker = slowed(overlay, state)
    pool = overlay.pool("10.70.0.0/24")
    monkeypatch.setattr("libnetwork.ipam_driver._LEAVING_S", 0.05)
    address = docker.address(pool, "web")
    overlay.release(pool, address.partition("/")[0])
    slow.times = 1_000_000
    docker.address(pool, "web")  # whichever, but without an error
    assert slow.wished[-1] == () and slow.wished[-2] != ()
