"""`netloom store migrate`: a node's database into a cluster and back, with containers that keep what they have."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import layout
from cluster.etcd import Put
from ipamd.client import IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, cidrs, key, spec, wait_for

NO_GRACE = "[reclaim]\ngrace_s = 0\n"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


def migrate(node: Node, kind: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NETLOOM_CONFIG": str(node.config), "PYTHONPATH": ROOT}
    return subprocess.run(
        [sys.executable, "-m", "cli", "store", "migrate", "--to", kind, *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def use(node: Node, kind: str) -> None:
    text = node.config.read_text()
    for other in ("sqlite", "etcd"):
        text = text.replace(f'kind = "{other}"', f'kind = "{kind}"')
    node.config.write_text(text)


@pytest.mark.parametrize("mode", ["cluster-address", "node-block"])
def test_into_a_cluster_and_out_again(etcd: EtcdCluster, tmp_path: Path, mode: str) -> None:
    prefix = f"/{tmp_path.name}/"
    a = Node(tmp_path, "a", etcd.sockets, NO_GRACE, prefix=prefix)
    use(a, "sqlite")
    with a:
        with a.client() as client:
            client.create_pool("blue", spec("10.1.0.0/16", "fd00:1::/64"))
            client.reserve("blue", "10.1.0.40", "printer")
            for name, subnet in (("pods", "10.8.0.0/16"), ("web", "10.9.0.0/16")):
                client.create_network(pb.CreateNetworkRequest(network=pb.Network(name=name, subnets=[subnet])))
            client.connect_networks("pods", "web")
            held = {name: cidrs(client.allocate(key(name), pools=["blue"])) for name in ("one", "two", "three")}
            refused = migrate(a, "etcd")
            assert refused.returncode == 1
            assert "another ipamd" in refused.stderr
        assert a.stop() == 0
        moved = migrate(a, "etcd", "--mode", mode)
        assert moved.returncode == 0, moved
        assert "3 pools (blue, pods, web)" in moved.stdout
        assert migrate(a, "etcd", "--mode", mode).returncode == 0, "again"
        a.process = None
        wrong = a.spawn()
        assert wrong.wait(60) == 1, "the configuration still says sqlite"
        assert "is one of a cluster, with pools blue" in a.log.read_text()
        use(a, "etcd")
        a.start()
        with a.client() as client, Node(tmp_path, "b", etcd.sockets, NO_GRACE, prefix=prefix) as b, b.client() as to_b:
            assert client.get_pool("blue").spec.mode == mode
            for name, addresses in held.items():
                again = client.allocate(key(name), pools=["blue"])
                assert (again.created, cidrs(again)) == (False, addresses)
            wait_for("no difference", lambda: not client.check_store(pb.CheckStoreRequest()).differences)
            wait_for("the pools on b", lambda: [pool.name for pool in to_b.list_pools()] == ["blue", "pods", "web"])
            wait_for("the networks on b", lambda: [one.name for one in to_b.list_networks()] == ["pods", "web"])
            assert list(to_b.get_network("pods").reachable) == ["10.9.0.0/16"]
            assert list(client.get_network("web").connected) == ["pods"]
            answers = [to_b.allocate(key(f"b{number}"), pools=["blue"]) for number in range(80)]
            theirs = {cidr.partition("/")[0] for answer in answers for cidr in cidrs(answer)}
            ours = {cidr.partition("/")[0] for addresses in held.values() for cidr in addresses}
            assert len(theirs) == 160
            assert theirs.isdisjoint(ours | {"10.1.0.40"})
        assert a.stop() == 0
        refused = migrate(a, "sqlite")
        assert refused.returncode == 1
        assert "other nodes (b)" in refused.stderr
        a.start()
        with a.client() as client:
            client.remove_node("b", force=True)
        assert a.stop() == 0
        back = migrate(a, "sqlite")
        assert back.returncode == 0, back
        use(a, "sqlite")
        a.start()
        with a.client() as client:
            assert (client.status().store, client.get_pool("blue").spec.mode) == ("sqlite", "local")
            for name, addresses in held.items():
                again = client.allocate(key(name), pools=["blue"])
                assert (again.created, cidrs(again)) == (False, addresses)
            assert [row.address for row in client.list_reservations()] == ["10.1.0.40"]
            client.allocate(key("new"), pools=["blue"])
            assert list(client.get_network("web").reachable) == ["10.8.0.0/16"]
            assert not client.check_store(pb.CheckStoreRequest()).differences
    assert asyncio.run(_keys(etcd, prefix)) == 0


async def _keys(etcd: EtcdCluster, prefix: str) -> int:
    async with connected(etcd.sockets, prefix) as client:
        return await client.count("")


def test_not_out_of_a_cluster_with_an_overlay_network(etcd: EtcdCluster, tmp_path: Path) -> None:
    a = Node(tmp_path, "a", etcd.sockets, NO_GRACE, prefix=f"/{tmp_path.name}/")
    with a:
        with a.client() as client:
            network = pb.Network(name="blue", type="overlay", subnets=["198.18.0.0/24"])
            client.create_network(pb.CreateNetworkRequest(network=network))
        a.stop()
        refused = migrate(a, "sqlite")
        assert refused.returncode == 1
        assert "network blue is an overlay" in refused.stderr
        a.start()
        with a.client() as client:
            assert client.get_network("blue").vni == 256
            client.delete_network("blue")
        a.stop()
        assert migrate(a, "sqlite").returncode == 0


def test_what_another_node_has_stands_against_it_and_nothing_is_left(etcd: EtcdCluster, tmp_path: Path) -> None:
    prefix = f"/{tmp_path.name}/"
    a = Node(tmp_path, "a", etcd.sockets, NO_GRACE, prefix=prefix)
    use(a, "sqlite")
    with a:
        with a.client() as client:
            client.create_pool("blue", spec("10.1.0.0/16"))
            held = [cidrs(client.allocate(key(name), pools=["blue"]))[0].partition("/")[0] for name in ("one", "two")]
        a.stop()

        async def others() -> None:
            async with connected(etcd.sockets, prefix) as client:
                value = b'{"node":"z","node_id":"zz","generation":1,"allocation":{}}'
                await client.txn([], [Put(f"{layout.ADDRESSES}blue#{held[1]}", value)])

        asyncio.run(others())
        refused = migrate(a, "etcd")
        assert refused.returncode == 1
        assert held[1] in refused.stderr
        assert '"node":"z"' in refused.stderr

        async def left() -> object:
            async with connected(etcd.sockets, prefix) as client:
                return await client.get(f"{layout.ADDRESSES}blue#{held[0]}")

        assert asyncio.run(left()) is None
        a.start()
        with a.client() as client:
            assert client.status().store == "sqlite"
            assert client.get_pool("blue").spec.mode == "local"


def test_a_cluster_that_cannot_be_reached_changes_nothing(tmp_path: Path) -> None:
    a = Node(tmp_path, "a", ["127.0.0.1:1"], NO_GRACE)
    use(a, "sqlite")
    with a:
        with a.client() as client:
            client.create_pool("blue", spec("10.1.0.0/16"))
        a.stop()
        ran = migrate(a, "etcd")
        assert ran.returncode == 3
        assert "nothing was changed" in ran.stderr
        a.start()
        with a.client() as client, pytest.raises(IpamError):
            client.get_pool("green")
