"""Addresses of an overlay network that follow containers' names, on one host and from host to host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.cluster import clustered
from tests.docker.test_overlay import Pair
from tests.hosts import wait_until

pytestmark = pytest.mark.kernel
ASKS = ["--authorization-plugin=netloom"]


@pytest.fixture
def pair(launcher: Path) -> Iterator[Pair]:
    with clustered(launcher, {"host1": ASKS, "host2": ASKS}) as cluster:
        one, two = cluster.dockers.values()
        two.stop_dockerd()
        two.stop_shim()
        two.start_shim("--sticky-overlays")
        two.start_dockerd()
        yield Pair(one, two)


def test_an_address_goes_where_its_name_goes(pair: Pair) -> None:
    one, two = pair.both
    pair.define("ov1", "--subnet", "10.0.0.0/24")
    pair.create("-o", "sticky=true")
    one.start("web", "--network", "ov1")
    address = one.address("web", "ov1")
    # Each time etcd is told first that it was given back.
    for _ in range(3):
        one.docker("restart", "web")
        assert one.address("web", "ov1") == address
    for here, there in ((one, two), (two, one)):
        here.docker("rm", "-f", "web")
        wait_until(lambda: here.held() == [], "the address to come back", here.shim_log)  # noqa: B023
        there.start("other", "--network", "ov1")
        there.start("web", "--network", "ov1")
        assert there.address("web", "ov1") == address
        there.docker("rm", "-f", "other")
    pair.clean()
