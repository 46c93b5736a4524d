"""Pools of mode node-block on real ipamd processes and a real etcd."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ipamd.client import IpamError
from tests.cluster.daemons import Node
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import cidrs, key, spec, wait_for


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


def test_two_nodes_share_a_pool(etcd: EtcdCluster, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = (stack.enter_context(Node(tmp_path, name, etcd.sockets, prefix="/two/")) for name in ("a", "b"))
        with a.client() as to_a, b.client() as to_b:
            made = to_a.create_pool("blue", spec("10.1.0.0/16"))
            assert made.spec.mode == "node-block"
            wait_for("the pool on b", lambda: [pool.name for pool in to_b.list_pools()])
            of_a = [cidrs(to_a.allocate(key(f"a{n}"), pools=["blue"])) for n in range(100)]
            of_b = [cidrs(to_b.allocate(key(f"b{n}"), pools=["blue"])) for n in range(100)]
            everything = [cidr for answer in of_a + of_b for cidr in answer]
            assert len(set(everything)) == 200
            (usage,) = to_a.get_pool("blue").usage
            assert usage.blocks >= 2
            assert usage.allocated == 100
