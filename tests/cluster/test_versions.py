"""Members of this version and of the one before, or the next, in one cluster.

`schema1.json` is all that two nodes had in etcd, key by key, as the last version with schema 1 wrote it: a block, two
addresses and a cool-down of each kind, reservations, networks that are connected, a node that is drained. The next
version is played by the same records with fields that nobody knows. What is not shown here is an older ipamd at work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from msgspec import Struct

from cluster import layout
from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected, looped
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import WAIT_S, cidrs, key, now, spec, wait_for

pytestmark = pytest.mark.kernel

RECORDED: dict[str, str] = json.loads(Path(__file__).with_name("schema1.json").read_text(encoding="utf-8"))
SINCE = {"macs/"}  # keys that schema 1 did not have
FAST = "[cluster]\nlease_s = 5\n"
HOLDERS = {"one": "host-1", "two": "host-2", "three": "host-1", "four": "host-2"}


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A part of etcd that is this test's own."""
    return f"/{tmp_path.parent.name}-{tmp_path.name}/"


def seed(etcd: EtcdCluster, prefix: str, records: dict[str, str]) -> None:
    @looped
    async def put() -> None:
        async with connected(etcd.sockets, prefix) as client:
            for name, value in records.items():
                await client.put(name, value.encode())

    put()


def stands(etcd: EtcdCluster, prefix: str) -> dict[str, str]:
    """All that is in etcd."""
    found: dict[str, str] = {}

    @looped
    async def read() -> None:
        async with connected(etcd.sockets, prefix) as client:
            async for page in client.walk(""):
                found.update((pair.key, pair.value.decode()) for pair in page.pairs)

    read()
    return found


def with_later_fields(value: str) -> str:
    """As a version may write it that has more to say."""
    record = json.loads(value)
    for row in record.get("rows", ()):
        row.append({"later": 1})
    if "allocation" in record:
        record["allocation"]["later"] = [1]
    return json.dumps({"before": {"all": None}, **record, "later": [1, {"x": "y"}]})


def newer(needs: int) -> dict[str, str]:
    """The same cluster, as a node of the next version might have it."""
    records = {name: with_later_fields(value) if value.startswith("{") else value for name, value in RECORDED.items()}
    records["version"] = with_later_fields(msgspec.json.encode(layout.VersionRecord(99, needs, "c")).decode())
    return records


def refusal(client: Client, container: str, pool: str, *requested: str) -> IpamError:
    with pytest.raises(IpamError) as caught:
        client.allocate(key(container), pools=[pool], requested=requested, at=now())
    return caught.value


def pools_of(client: Client) -> set[str]:
    return {pool.name for pool in client.list_pools()}


def use_what_is_there(client: Client) -> None:
    """Everything that the recorded nodes left is understood."""
    wait_for("the cluster's pools", lambda: pools_of(client) >= {"blocks", "shared", "green", "red"})
    nodes = {node.name: node for node in client.list_nodes()}
    assert {name: (node.draining, node.alive) for name, node in nodes.items()} == {
        "host-1": (False, True),
        "host-2": (True, True),
        "host-3": (False, True),
    }
    assert [(node.blocks, node.addresses) for node in (nodes["host-1"], nodes["host-2"])] == [(1, 3), (1, 3)]
    wait_for("the networks", lambda: len(client.list_networks()) == 2)
    assert {(one.name, one.type, one.mtu, tuple(one.connected)) for one in client.list_networks()} == {
        ("green", "routed", 1400, ("red",)),
        ("red", "routed", 1400, ("green",)),
    }
    listed = list(client.list_allocations(pb.ListAllocationsRequest(cluster=True)))
    assert {one.key.container_id: one.key.node for one in listed} == HOLDERS
    assert sorted(cidrs(next(one for one in listed if one.key.container_id == "four"))) == [
        "10.30.0.149/24",
        "fd30::a2/120",
    ]
    # The first request for such a pool has the watches begin.
    assert "is held on node host-2" in refusal(client, "five", "shared", "10.30.0.149").message
    assert "reserved" in refusal(client, "five", "shared", "10.30.0.9").message
    assert "cools down" in refusal(client, "six", "shared", "10.30.0.150").message
    back = client.allocate(key("five", "net"), pools=["shared"], workload="default/five", at=now())
    assert sorted(cidrs(back)) == ["10.30.0.150/24", "fd30::a3/120"]
    assert "is node host-1's" in refusal(client, "seven", "blocks", "10.20.15.130").message
    (given,) = cidrs(client.allocate(key("seven", "net"), pools=["blocks"], at=now()))
    assert given.partition("/")[0] not in {f"10.20.15.{last}" for last in (*range(64), *range(128, 192))}


def test_every_kind_of_key_is_recorded() -> None:
    kinds = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    assert {kind for kind in kinds if any(name.startswith(kind) for name in RECORDED)} == kinds - SINCE


def test_a_node_joins_those_of_the_previous_version(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    seed(etcd, prefix, RECORDED)
    with Node(tmp_path, "host-3", etcd.sockets, FAST, prefix=prefix) as node, node.client() as client:
        use_what_is_there(client)
        found = stands(etcd, prefix)
        gone = {name for name in RECORDED if name.startswith("freed/")}
        assert {name: found.get(name) for name in RECORDED} == {
            name: None if name in gone else value for name, value in RECORDED.items()
        }
        # What it had can be taken back as from one of this version.
        removed = client.remove_node("host-1", force=True)
        assert (removed.blocks, removed.addresses) == (1, 3)
        left = [name for name, value in stands(etcd, prefix).items() if "host-1" in name + value]
        assert left == ["freed/shared#10.30.0.220", "freed/shared#fd30::6d"], "they cool down"


class V1Version(Struct):
    schema: int
    needs: int
    cluster: str


class V1Pool(Struct):
    spec: str
    deleting: bool = False


class V1Reservation(Struct):
    note: str = ""


class V1Node(Struct):
    id: str
    hostname: str
    created_unix_s: int
    draining: bool = False


class V1Alive(Struct):
    id: str
    boot_id: str
    version: str
    since_unix_s: int


class V1Block(Struct):
    node: str
    node_id: str


class V1Network(Struct):
    name: str
    type: str = ""
    subnets: tuple[str, ...] = ()
    backend: str = ""
    bridge: str = ""
    mtu: int = 0
    masquerade: bool = True
    open: bool = False
    connected: tuple[str, ...] = ()
    created_unix_s: int = 0


class V1PublishedRow(Struct, array_like=True):
    cidr: str
    gateway: str
    range_set: int
    generation: int
    client: str
    network: str
    container_id: str
    ifname: str
    created_unix_s: int
    workload: str


class V1Published(Struct):
    node: str
    rows: tuple[V1PublishedRow, ...]


class V1Key(Struct):
    node: str
    client: str
    network: str
    container_id: str
    ifname: str


class V1Allocated(Struct, array_like=True):
    cidr: str
    gateway: str
    pool: str
    range_set: int


class V1Allocation(Struct):
    key: V1Key
    addresses: tuple[V1Allocated, ...]
    netns: dict[str, Any]
    at: dict[str, Any]
    created_unix_s: int
    generation: int
    workload: str = ""


class V1Address(Struct):
    node: str
    node_id: str
    generation: int
    allocation: V1Allocation


class V1Freed(Struct):
    node: str
    node_id: str
    workload: str = ""


V1: dict[str, type[Struct]] = {
    "version": V1Version,
    "pools/": V1Pool,
    "reservations/": V1Reservation,
    "nodes/": V1Node,
    "alive/": V1Alive,
    "blocks/": V1Block,
    "published/": V1Published,
    "addresses/": V1Address,
    "freed/": V1Freed,
    "networks/": V1Network,
}


def read_by_v1(records: dict[str, str]) -> dict[str, list[Any]]:
    """Each value, as the previous version reads it, by the kind of its key."""
    found: dict[str, list[Any]] = {}
    for name, value in records.items():
        kind = "".join(re.findall("^[^/]+/?", name))
        found.setdefault(kind, []).append(msgspec.json.decode(value, type=V1[kind]) if kind in V1 else value)
    return found


def test_the_previous_version_reads_what_this_one_writes(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    assert set(read_by_v1(RECORDED)) == {*V1, "owned/", "last-network"}
    with Node(tmp_path, "a", etcd.sockets, FAST, prefix=prefix) as node, node.client() as client:
        client.create_pool("blocks", spec("10.20.0.0/20", mode="node-block"))
        client.create_pool("shared", spec("10.30.0.0/24", mode="cluster-address", cooldown_ms=3_600_000))
        client.reserve("shared", "10.30.0.9", "the printer")
        for name, subnet in (("green", "10.40.0.0/20"), ("red", "10.41.0.0/20")):
            network = pb.Network(name=name, type="routed", subnets=[subnet])
            client.create_network(pb.CreateNetworkRequest(network=network))
        client.connect_networks("green", "red")
        given = {
            name: cidrs(client.allocate(key(name), pools=[pool], workload=f"default/{name}", at=now()))
            for name, pool in (("one", "blocks"), ("two", "shared"), ("three", "shared"))
        }
        client.release(key("three"))
        client.drain_node("a")
        wait_for(
            "all of it",
            lambda: {name.partition("/")[0] for name in stands(etcd, prefix)} >= {"published", "freed", "addresses"},
        )
        found = read_by_v1(stands(etcd, prefix))
        assert set(found) == {*V1, "owned/", "last-network"}
        (version,) = found["version"]
        assert version.needs == 1  # so it may join
        assert {pool.spec for pool in found["pools/"]} >= {
            '{"range_sets":[[{"subnet":"10.20.0.0/20","start":"","end":"","gateway":""}]],"mode":"node-block"}'
        }
        assert [one.note for one in found["reservations/"]] == ["the printer"]
        assert [(one.draining, one.id) for one in found["nodes/"]] == [(True, found["alive/"][0].id)]
        assert [row.cidr for one in found["published/"] for row in one.rows] == given["one"]
        (address,) = found["addresses/"]
        assert [one.cidr for one in address.allocation.addresses] == given["two"]
        assert (address.node, address.allocation.workload) == ("a", "default/two")
        assert [one.workload for one in found["freed/"]] == ["default/three eth0"]
        assert {(one.name, one.connected) for one in found["networks/"]} == {("green", ("red",)), ("red", ("green",))}


def test_a_node_joins_those_of_the_next_version_and_keeps_what_it_does_not_know(
    etcd: EtcdCluster, prefix: str, tmp_path: Path
) -> None:
    records = newer(layout.SCHEMA)
    seed(etcd, prefix, records)
    with Node(tmp_path, "host-3", etcd.sockets, FAST, prefix=prefix) as node, node.client() as client:
        use_what_is_there(client)
        found = stands(etcd, prefix)
        assert {name for name, value in records.items() if found.get(name) != value} == {
            name for name in RECORDED if name.startswith("freed/")
        }
        # What it writes of others' records.
        client.drain_node("host-2", undo=True)
        client.connect_networks("green", "red", undo=True)
        with pytest.raises(IpamError) as caught:
            client.delete_pool("shared")
        assert "is in use" in caught.value.message
        found = stands(etcd, prefix)
        changed = {name for name, value in records.items() if name in found and found[name] != value}
        assert changed == {"nodes/host-2", "networks/green", "networks/red", "pools/shared"}
        for name in changed:
            after, before = json.loads(found[name]), json.loads(records[name])
            assert (after["later"], after["before"]) == (before["later"], before["before"])
            assert not after.get("draining")
            assert not after.get("connected")
            assert not after.get("deleting")
        assert json.loads(found["pools/shared"]) == json.loads(records["pools/shared"])


TOO_NEW = f"needs schema {layout.SCHEMA + 1}, and this ipamd knows up to {layout.SCHEMA}; install the version"


def test_a_cluster_that_is_too_new_is_refused(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    records = newer(layout.SCHEMA + 1)
    seed(etcd, prefix, records)
    node = Node(tmp_path, "host-3", etcd.sockets, FAST, prefix=prefix)
    assert node.spawn().wait(WAIT_S) == 1
    assert TOO_NEW in node.log.read_text()
    assert stands(etcd, prefix) == records


def test_a_node_that_comes_back_finds_its_cluster_too_new(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    """Silent while the others went on to what it does not know, and still running."""
    with Node(tmp_path, "a", etcd.sockets, FAST, prefix=prefix) as node, node.client() as client:
        client.create_pool("p", spec("10.50.0.0/20", mode="node-block"))
        client.allocate(key("before"), pools=["p"], at=now())
        version = json.loads(stands(etcd, prefix)["version"])
        seed(etcd, prefix, {"version": json.dumps({**version, "schema": 99, "needs": layout.SCHEMA + 1})})

        @looped
        async def end_lease() -> None:
            async with connected(etcd.sockets, prefix) as direct:
                leases = re.findall(r"^[0-9a-f]{16}$", etcd.etcdctl("lease", "list"), re.MULTILINE)
                for lease in leases:
                    await direct.revoke(int(lease, 16))

        end_lease()
        wait_for("its word", lambda: TOO_NEW in node.log.read_text())
        error = refusal(client, "after", "p")
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert TOO_NEW in error.message
        assert client.release(key("before")).released
        assert "alive/a" not in stands(etcd, prefix)
