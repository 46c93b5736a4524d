"""Ten nodes allocate and release hundreds of times a second, while what a cluster rests on breaks.

After each fault: no address ever had two owners, none is lost, and `netloom ip check` is clean. See `judge`.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from ipamd.client import IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from protos.ipam.v1 import ipam_pb2_grpc
from tests.cluster.conftest import BLOCKS, JUMPING, SHARED, Field
from tests.cluster.nodes import Node, empty, fill, pool
from tests.hosts import wait_until

pytestmark = pytest.mark.kernel

CONFLIST: dict[str, Any] = {"cniVersion": "1.1.0", "name": "shared", "ipam": {"type": "ipamd", "pool": SHARED}}


def test_the_leader_is_killed_and_comes_back(field: Field) -> None:
    with field.fleet.load(10):
        time.sleep(2)
        leader = field.etcd.leader()
        field.etcd.kill(leader)
        assert field.etcd.leader() is not leader
        field.fleet.until_served()
        field.etcd.start(leader)
        field.fleet.until_served()
    field.fleet.assert_sound()


def test_members_are_cut_off(field: Field) -> None:
    """First the leader, then one that follows; each time the two others go on."""
    with field.fleet.load(0):
        time.sleep(1)
        for member in (field.etcd.leader(), None):
            away = member or field.etcd.follower()
            field.etcd.cut(away)
            assert field.etcd.leader() is not away
            field.fleet.until_served()
            time.sleep(3)
            field.etcd.heal(away)
            field.etcd.wait(away)
            field.fleet.until_served()
    field.fleet.assert_sound()


def test_all_members_are_cut_off(field: Field) -> None:
    """Blocks go on; what needs the cluster says so in time, and to a runtime with code 11."""
    with field.fleet.load(0):
        time.sleep(2)
        field.etcd.cut_all()
        time.sleep(4)  # what was under way may still be answered
        begin_ns = time.monotonic_ns()
        call = add(field.nodes[0])
        assert call.code() == 11, call
        assert "etcd" in call.json["msg"] + call.json.get("details", "")
        field.fleet.until_served(BLOCKS)
        time.sleep(6)
        field.fleet.until_served(BLOCKS)
        end_ns = time.monotonic_ns()
        field.etcd.heal_all()
        field.fleet.until_served()
    verdict = field.fleet.assert_sound()
    assert not verdict.granted(begin_ns, end_ns, SHARED)
    assert set(verdict.refusals(begin_ns, end_ns, SHARED)) == {"UNAVAILABLE"}


def test_a_node_starts_while_all_members_are_away(field: Field) -> None:
    node = field.nodes[1]
    held = node.held()
    field.etcd.cut_all()
    try:
        node.ipamd.kill()
        node.ipamd.start()
        assert node.held() == held
        with node.client() as client:
            key = pb.AttachmentKey(client="test", network="one", container_id="one", ifname="eth0")
            assert client.allocate(key, pools=(BLOCKS,)).addresses
            client.release(key)
            with pytest.raises(IpamError) as caught:
                client.allocate(key, pools=(SHARED,))
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    finally:
        field.etcd.heal_all()
    field.fleet.assert_sound()


def test_nodes_are_killed(field: Field) -> None:
    with field.fleet.load(0):
        for turn in range(3):
            time.sleep(2)
            struck = field.nodes[turn::3]
            for node in struck:
                node.ipamd.kill()
            for node in struck:
                node.ipamd.launch()
            for node in struck:
                node.ipamd.wait()
        field.fleet.until_served()
    field.fleet.assert_sound()


def test_history_is_compacted_under_the_watchers(field: Field) -> None:
    """One node hears nothing for a while, and what it missed is no longer in the history."""
    deaf, other = field.nodes[2], field.nodes[3]
    with field.fleet.load(0):
        time.sleep(1)
        field.etcd.underlay.cut(deaf.host)
        with other.client() as client:
            client.create_pool("late", pb.PoolSpec(**pool("10.66.0.0/24", "cluster-address")))
        end = time.monotonic() + 8
        while time.monotonic() < end:
            field.etcd.compact()
            time.sleep(0.3)
        field.etcd.underlay.heal(deaf.host)
        field.etcd.compact()
        wait_until(lambda: "late" in pools(deaf), "the pool that was made meanwhile", deaf.ipamd.log)
        with other.client() as client:
            client.delete_pool("late")
        wait_until(lambda: "late" not in pools(deaf), "the end of that pool")
        field.fleet.until_served()
    field.fleet.assert_sound()


def test_pools_come_and_go(field: Field) -> None:
    """Whoever deletes one also follows what happens to it."""
    with field.nodes[3].client() as client:
        for _ in range(10):
            client.create_pool("brief", pb.PoolSpec(**pool("10.66.0.0/24", "cluster-address")))
            client.delete_pool("brief")
    for node in field.nodes:
        wait_until(lambda node=node: "brief" not in pools(node), f"the end of the pool on {node.name}")  # type: ignore[misc]


def test_etcd_is_full(field: Field) -> None:
    with field.fleet.load(0):
        time.sleep(1)
        field.etcd.fill("/somebody-else/")
        time.sleep(1)
        begin_ns = time.monotonic_ns()
        with field.nodes[4].client() as client, pytest.raises(IpamError) as caught:
            key = pb.AttachmentKey(client="test", network="one", container_id="one", ifname="eth0")
            client.allocate(key, pools=(SHARED,))
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert "quota" in caught.value.message
        field.fleet.until_served(BLOCKS)
        time.sleep(2)
        end_ns = time.monotonic_ns()
        field.etcd.etcdctl("del", "/somebody-else/", "--prefix")
        field.etcd.compact()
        field.etcd.defragment()
        field.etcd.disarm()
        assert field.etcd.alarms() == ""
        field.fleet.until_served()
    verdict = field.fleet.assert_sound()
    assert not verdict.granted(begin_ns, end_ns, SHARED)


def test_a_clock_jumps(field: Field) -> None:
    """An hour ahead, then an hour back behind what it was; cool-downs, leases and identities do not care."""
    node = field.fleet.nodes[JUMPING]
    with field.fleet.load(0):
        for ahead in ("+3600", "-3600"):
            time.sleep(1)
            field.clock.write_text(f"{ahead}\n", encoding="ascii")
            wait_until(lambda wanted=int(ahead): abs(seen_ahead(node) - wanted) < 60, "the clock's jump")  # type: ignore[misc]
            time.sleep(6)  # more than a lease
            assert alive(field.nodes[0]) == set(field.fleet.nodes)
            field.fleet.until_served()
        field.clock.write_text("+0\n", encoding="ascii")
    field.fleet.assert_sound()


def test_nothing_is_lost(field: Field) -> None:
    """After all of this every address can be had: owned by a client, or now by this test."""
    verdict = field.fleet.assert_sound()
    held = [address for addresses in verdict.owned.values() for address in addresses]
    shared = fill(field.fleet.nodes, SHARED)
    blocks = fill(field.fleet.nodes, BLOCKS)
    assert not (shared.keys() | blocks.keys()) & set(held)
    assert len(shared) + sum(address.startswith("10.65.") for address in held) == 509
    assert len(blocks) + sum(address.startswith("10.64.") for address in held) == 32 * 61
    empty(field.fleet.nodes)
    field.fleet.assert_sound()


def add(node: Node) -> Any:
    """An ADD of the plugin, as a runtime executes it."""
    netns = node.host.netns()
    try:
        return node.host.cni("ADD", "ipamd", CONFLIST, container_id="one", netns=netns)
    finally:
        netns.delete()


def pools(node: Node) -> set[str]:
    with node.client() as client:
        return {one.name for one in client.list_pools()}


def alive(node: Node) -> set[str]:
    """The nodes whose lease runs."""
    with grpc.insecure_channel(f"unix:{node.socket}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = ipam_pb2_grpc.IpamStub(channel).ListNodes(pb.ListNodesRequest(), timeout=30)
    return {one.name for one in answer.nodes if one.alive}


def seen_ahead(node: Node) -> float:
    """How far the node's wall clock is ahead, as a fresh allocation tells it."""
    key = pb.AttachmentKey(client="test", network="clock", container_id=str(time.monotonic_ns()), ifname="eth0")
    with node.client() as client:
        client.allocate(key, pools=(BLOCKS,))
        entry = next(iter(client.list_allocations(pb.ListAllocationsRequest(container_id=key.container_id))))
        client.release(key)
    return entry.created_unix_s - time.time()
