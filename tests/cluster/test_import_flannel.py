"""`netloom import flannel`: what flannel keeps in etcd becomes a network, and each host keeps its subnet."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.interface.flannel import read_subnet
from netd.flannel import subnet_key
from tests.cluster.daemons import Node
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, cidrs, wait_for


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as made:
        yield made


def say(etcd: EtcdCluster, config: object, prefix: str = "/coreos.com/network") -> None:
    """What an operator of flannel wrote."""
    etcd.etcdctl("put", f"{prefix}/config", json.dumps(config))


def subnet_file(directory: Path, **values: str) -> str:
    file = directory / "subnet.env"
    file.write_text("".join(f"FLANNEL_{name}={value}\n" for name, value in values.items()))
    return str(file)


def run(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "cli", "--socket", node.socket, "import", "flannel", *words]
    environment = {**os.environ, "NETLOOM_CONFIG": str(node.config)}
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def refused(node: Node, *words: str) -> str:
    done = run(node, *words)
    assert done.returncode != 0, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_two_hosts_move_and_keep_their_subnets(tmp_path: Path, etcd: EtcdCluster) -> None:
    say(etcd, {"Network": "10.2.0.0/16", "SubnetLen": 24, "SubnetMin": "10.2.10.0", "Backend": {"Type": "vxlan"}})
    for subnet, host in (("10.2.33.0-24", "192.168.77.11"), ("10.2.44.0-24", "192.168.77.12")):
        lease = {"PublicIP": host, "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}}
        etcd.etcdctl("put", f"/coreos.com/network/subnets/{subnet}", json.dumps(lease))
    before = etcd.keys("/coreos.com/")
    with (
        Node(tmp_path, "a", etcd.sockets, prefix="/two/") as a,
        Node(tmp_path, "b", etcd.sockets, prefix="/two/") as b,
    ):
        file = subnet_file(tmp_path / "a", NETWORK="10.2.0.0/16", SUBNET="10.2.33.1/24", MTU="1450", IPMASQ="true")
        done = run(a, "--subnet-file", file)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "network pods (10.2.0.0/16), backend vxlan",
            "claimed for this host: 10.2.33.0/24",
            "SUBNET        HOST           NEXT",
            "10.2.33.0/24  192.168.77.11  flannel_network under [netd]",
            "10.2.44.0/24  192.168.77.12  netloom import flannel there",
        ]
        again = run(a, "--subnet-file", file, "--json")
        assert json.loads(again.stdout)["claimed"] == ["10.2.33.0/24"], again.stderr
        with a.client() as client:
            # As netd asks: the block stays.
            assert cidrs(client.allocate(subnet_key("pods"), pools=["pods"])) == ["10.2.33.254/24"]
            assert client.get_network("pods").backend == "vxlan"
            spec = client.get_pool("pods").spec
            assert (spec.mode, spec.block_v4) == ("node-block", 24)
            assert set(spec.excludes) == {"10.2.0.0/21", "10.2.8.0/23"}, "what lies before SubnetMin"
        # netd of the other host was there too early.
        with b.client() as client:
            wait_for("the network", client.list_networks)
            early = cidrs(client.allocate(subnet_key("pods"), pools=["pods"]))
            done = run(
                b, "--subnet-file", subnet_file(tmp_path / "b", NETWORK="10.2.0.0/16", SUBNET="10.2.44.1/24"), "--json"
            )
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert [(one["subnet"], one["here"]) for one in found["leases"]] == [
                ("10.2.33.0/24", False),
                ("10.2.44.0/24", True),
            ]
            late = cidrs(client.allocate(subnet_key("pods"), pools=["pods"]))
            assert (early == late, late) == (False, ["10.2.44.254/24"])
        stolen = refused(b, "--subnet-file", file)
        assert "block 10.2.33.0/24 of pool pods is node a's" in stolen
    assert etcd.keys("/coreos.com/") == before, "etcd is only read"


def test_both_families_another_prefix_and_an_endpoint_of_ones_own(tmp_path: Path, etcd: EtcdCluster) -> None:
    say(
        etcd,
        {
            "Network": "10.4.0.0/23",
            "EnableIPv6": True,
            "IPv6Network": "fd04::/48",
            "Backend": {"Type": "vxlan", "DirectRouting": True, "MTU": 1400},
        },
        "/elsewhere/net",
    )
    with Node(tmp_path, "a", etcd.sockets, prefix="/both/") as a:
        file = subnet_file(
            tmp_path, NETWORK="10.4.0.0/23", SUBNET="10.4.0.129/25", IPV6_NETWORK="fd04::/48",
            IPV6_SUBNET="fd04:0:0:7::1/64",
        )  # fmt: skip
        words = ["--etcd-prefix", "/elsewhere/net/", "--endpoint", etcd.sockets[0], "--name", "cbr", "--json"]
        done = run(a, *words, "--subnet-file", file)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["backend"], found["claimed"]) == ("direct", ["10.4.0.128/25", "fd04:0:0:7::/118"])
        assert found["narrowed"] == ["fd04:0:0:7::/64"]
        told = run(a, *words[:-1], "--subnet-file", file).stdout
        assert 'have all of it: subnets = ["fd04:0:0:7::/64"] under [netd] of this host' in told
        with a.client() as client:
            assert client.get_network("cbr").mtu == 1400
            answer = client.allocate(subnet_key("cbr"), pools=["cbr"])
            assert [one.gateway for one in answer.addresses] == ["10.4.0.129", "fd04:0:0:7::1"]
        assert read_subnet(file).parts[0] == ("10.4.0.0/23", "10.4.0.128/25")
        done = run(a, *words[:-1], "--subnet-file", str(tmp_path / "none"))
        assert f"{tmp_path}/none is not there: nothing claimed\n" in done.stdout


def test_what_cannot_be_taken_over_is_refused_in_words(tmp_path: Path, etcd: EtcdCluster) -> None:
    with Node(tmp_path, "a", etcd.sockets, prefix="/no/") as a:
        nothing = refused(a, "--etcd-prefix", "/nothing")
        assert "etcd has no key /nothing/config" in nothing
        at = ["--etcd-prefix", "/odd"]
        for config, text in (
            ({"Network": "10.5.0.0/16"}, "flannel's is udp, and Netloom has vxlan, host-gw of flannel's"),
            ({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}}, "flannel's is wireguard"),
            ({"Network": "10.5.0.0/33", "Backend": {"Type": "vxlan"}}, "Network of flannel's configuration is no"),
            ({"Network": "10.0.0.0/8", "SubnetLen": 20, "Backend": {"Type": "vxlan"}}, "a /20, and a block of"),
            ({"EnableIPv4": False, "Backend": {"Type": "vxlan"}}, "has no network"),
            ({"Network": 7}, "is no configuration of flannel's"),
        ):
            say(etcd, config, "/odd")
            assert text in refused(a, *at), config
        say(etcd, {"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}, "/odd")
        old = subnet_file(tmp_path, NETWORK="10.9.0.0/16", SUBNET="10.9.1.1/24")
        assert "this host's subnet 10.9.1.0/24 is none of 10.5.0.0/16" in refused(a, *at, "--subnet-file", old)
        with a.client() as client:
            assert client.list_networks() == []
        refusal = run(a, *at, "--endpoint", "unix:/nowhere/at/all")
        assert (refusal.returncode, "etcd" in refusal.stderr) == (3, True), refusal.stderr
