"""The command on nodes of a cluster."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cluster.daemons import Node
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, key, wait_for


def netloom(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "cli", "--socket", node.socket, *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_nodes_and_blocks(tmp_path: Path) -> None:
    with (
        EtcdCluster() as etcd,
        Node(tmp_path, "a", etcd.sockets, "[cluster]\nlease_s = 5\n") as a,
        Node(tmp_path, "b", etcd.sockets, "[cluster]\nlease_s = 5\n") as b,
    ):
        words = ["pool", "create", "blue", "--subnet", "10.1.0.0/24", "--block", "/27", "--blocks-per-node", "3"]
        made = netloom(a, *words)
        assert (made.returncode, made.stdout) == (0, "created pool blue; blocks for the nodes to claim: IPv4 8\n")
        with b.client() as client:
            wait_for("the pool", client.list_pools)
            client.allocate(key("one"), pools=["blue"])
            wait_for("it is published", lambda: client.list_nodes()[1].addresses == 1)
        header, usage, _, header2, blocks = netloom(b, "pool", "list").stdout.splitlines()
        assert usage.split()[:5] == ["blue", "node-block", "IPv4", "29", "1"]
        assert header2.split() == ["POOL", "FAMILY", "HERE", "CLAIMED", "BLOCKS", "USED"]
        assert blocks.split()[:5] == ["blue", "IPv4", "1", "1", "8"]
        assert "node-block, blocks of /27 and /122; at most 3 to a node" in netloom(a, "pool", "show", "blue").stdout

        header, first, second = netloom(a, "node", "list").stdout.splitlines()
        assert header.split()[:5] == ["NODE", "STATE", "HOST", "BLOCKS", "ADDRESSES"]
        assert (first.split()[:2], second.split()[:2]) == (["a", "alive"], ["b", "alive"])
        assert second.split()[3:5] == ["1", "1"]
        (one,) = json.loads(netloom(a, "node", "list", "--json").stdout)["nodes"][1:]
        assert (one["name"], one["alive"], one["blocks"], one["addresses"]) == ("b", True, 1, 1)
        assert "state                 alive\n" in netloom(a, "node", "show", "b").stdout
        assert netloom(a, "node", "drain", "b").stdout == "node b gives no new addresses; it holds 1 blocks\n"
        assert "alive, draining" in netloom(a, "node", "list").stdout
        assert netloom(a, "node", "drain", "b", "--undo").stdout == "node b gives addresses again\n"
        refused = netloom(a, "node", "remove", "b")
        assert (refused.returncode, "node b is alive" in refused.stderr) == (1, True)
        b.kill()
        removed = netloom(a, "node", "remove", "b", "--force")
        assert removed.stdout == "removed node b: 1 blocks and 1 addresses came back\n"

        shown = netloom(a, "status")
        assert "etcd is reachable, 0 changes to be told" in shown.stdout
        etcd.kill("m1")
        wait_for("the loss is seen", lambda: "etcd cannot be reached" in netloom(a, "status").stdout)
        assert netloom(a, "node", "list").returncode == 3


def test_networks_of_both_types(tmp_path: Path) -> None:
    with EtcdCluster() as etcd, Node(tmp_path, "a", etcd.sockets) as a:
        words = ["network", "create", "ov1", "--type", "overlay", "--subnet", "198.18.0.0/24", "--internal"]
        made = netloom(a, *words)
        assert made.stdout == "created network ov1 (198.18.0.0/24), VNI 256, bridge nl-ov1\n"
        again = json.loads(netloom(a, "network", "create", "ov1", "--type", "overlay", "--internal", "--json").stdout)
        assert (again["vni"], again["gateways"], again["internal"]) == (256, ["198.18.0.1/24"], True)
        netloom(a, "network", "create", "pods", "--subnet", "198.18.1.0/24")
        header, first, second = netloom(a, "network", "list").stdout.splitlines()
        assert header.split() == ["NETWORK", "TYPE", "VNI", "SUBNETS", "BACKEND", "BRIDGE", "MTU", "CONNECTED"]
        assert first.split() == ["ov1", "overlay", "256", "198.18.0.0/24", "-", "nl-ov1", "auto"]
        assert second.split() == ["pods", "routed", "-", "198.18.1.0/24", "default", "nl-pods", "auto"]
        with a.client() as client:
            client.share_network("ov1", "blue")
        facts = dict(line.split("  ", 1) for line in netloom(a, "network", "show", "ov1").stdout.splitlines())
        facts = {name: value.strip() for name, value in facts.items()}
        assert facts["type"] == "overlay"
        assert facts["gateway"] == "198.18.0.1/24"
        assert (facts["way out"], facts["flood"], facts["masquerade"]) == ("no", "no", "no")
        assert facts["docker"] == "every host's shows it as blue"
        refused = netloom(a, "network", "delete", "ov1")
        assert (refused.returncode, "docker network rm blue" in refused.stderr) == (1, True)
        refused = netloom(a, "network", "create", "red")
        assert (refused.returncode, "--subnet CIDR" in refused.stderr) == (2, True)
        refused = netloom(a, "network", "create", "red", "--type", "overlay", "--backend", "vxlan")
        assert (refused.returncode, "backend: found 'vxlan'" in refused.stderr) == (2, True)
