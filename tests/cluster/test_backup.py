"""`netloom store backup|restore` in a cluster whose etcd is lost."""

import asyncio
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from cluster import layout
from cluster.layout import MacRecord
from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, cidrs, key, spec, wait_for

NO_GRACE = "[reclaim]\ngrace_s = 0\n"


def netloom(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NETLOOM_CONFIG": str(node.config), "PYTHONPATH": ROOT}
    argv = [sys.executable, "-m", "cli", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)


def test_an_etcd_that_was_lost_is_made_again_from_any_nodes_backup(tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with EtcdCluster() as old:
        a, b = (Node(tmp_path, name, old.sockets, NO_GRACE) for name in "ab")
        with a, b, a.client() as to_a, b.client() as to_b:
            to_a.create_pool("blue", spec("10.1.0.0/16"))
            to_a.create_pool("green", spec("10.2.0.0/24", mode="cluster-address"))
            to_a.create_network(pb.CreateNetworkRequest(network=pb.Network(name="pods", subnets=["10.3.0.0/16"])))
            overlay = pb.Network(name="wide", type="overlay", subnets=["10.4.0.0/24"], flood=True)
            overlay = to_a.create_network(pb.CreateNetworkRequest(network=overlay))
            wait_for("all pools on b", lambda: len(to_b.list_pools()) == 4)
            to_b.reserve("blue", "10.1.0.99", "printer")
            held = {
                (node.name, pool): cidrs(client.allocate(key(f"{node.name}-{pool}"), pools=[pool]))
                for node, client in ((a, to_a), (b, to_b))
                for pool in ("blue", "green", "pods")
            }
            moved = cidrs(to_b.allocate(key("moved"), pools=["wide"]))[0].partition("/")[0]
            wait_for("the network on b", lambda: len(to_b.list_networks()) == 2)
            to_b.set_mac("wide", moved, "02:00:00:00:00:07")
            wait_for("b's word in etcd", lambda: to_b.status().unpublished == 0)
            assert netloom(a, "store", "backup", str(file)).returncode == 0
            later = cidrs(to_b.allocate(key("later"), pools=["green"]))  # not in the backup
            a.stop()
            b.stop()
    with EtcdCluster() as new:
        for node in (a, b):
            node.config.write_text(node.config.read_text().replace(str(list(old.sockets)), str(list(new.sockets))))
        ran = netloom(a, "store", "restore", str(file), "--cluster")
        assert ran.returncode == 0, ran
        again = netloom(a, "store", "restore", str(file), "--cluster")
        assert again.returncode == 1
        assert "has a cluster" in again.stderr
        with a, b, a.client() as to_a, b.client() as to_b:
            for (name, pool), addresses in held.items():
                client = to_a if name == "a" else to_b
                answer = client.allocate(key(f"{name}-{pool}"), pools=[pool])
                assert (answer.created, cidrs(answer)) == (False, addresses)
            for client in (to_a, to_b):
                wait_for("no difference", partial(_agrees, client))
                assert [network.name for network in client.list_networks()] == ["pods", "wide"]
                assert client.get_network("wide") == overlay
                assert [row.address for row in client.list_reservations()] == ["10.1.0.99"]
            assert asyncio.run(_mac(new, f"wide#{moved}")) == "02:00:00:00:00:07"
            mine = {cidr for number in range(250) for cidr in _try(to_a, number)}
            assert mine.isdisjoint({*later, *held["b", "green"]}), "what b held since the backup is still b's"


async def _mac(etcd: EtcdCluster, place: str) -> str:
    async with connected(etcd.sockets) as client:
        pair = await client.get(layout.MACS + place)
        assert pair is not None
        return layout.decode(MacRecord, pair.key, pair.value).mac


def _agrees(client: Client) -> bool:
    return not client.check_store(pb.CheckStoreRequest()).differences


def _try(client: Client, number: int) -> list[str]:
    try:
        return cidrs(client.allocate(key(f"more{number}"), pools=["green"]))
    except IpamError:
        return []
