"""Pools of mode cluster-address on real ipamd processes and a real etcd."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from cluster.etcd import Event
from ipamd.client import Client, IpamError
from ipamd.member.addresses import changes
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster import faulty
from tests.cluster.daemons import Node
from tests.cluster.loop import connected, looped, until
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, Daemon, cidrs, key, now, spec, wait_for

pytestmark = pytest.mark.kernel

Code = grpc.StatusCode
MODE = "cluster-address"
FAST = "[cluster]\nlease_s = 5\n"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A part of etcd that is this test's own."""
    return f"/{request.node.name.partition('[')[0]}-{abs(hash(request.node.name))}/"


def start(
    stack: ExitStack, etcd: EtcdCluster, prefix: str, directory: Path, *names: str, settings: str = ""
) -> list[Node]:
    return [stack.enter_context(Node(directory, name, etcd.sockets, FAST + settings, prefix=prefix)) for name in names]


def keys(etcd: EtcdCluster, prefix: str, kind: str) -> list[str]:
    return sorted(name.removeprefix(prefix + kind) for name in etcd.keys(prefix + kind))


def make_pool(nodes: list[Node], *subnets: str, cooldown_ms: int = 0) -> None:
    with nodes[0].client() as client:
        client.create_pool("p", spec(*subnets, mode=MODE, cooldown_ms=cooldown_ms))
    for node in nodes:
        with node.client() as client:
            wait_for(f"the pool on {node.name}", lambda client=client: [pool.name for pool in client.list_pools()])  # type: ignore[misc]


def allocate(client: Client, container: str, *requested: str, workload: str = "") -> pb.AllocateResponse:
    return client.allocate(key(container), pools=["p"], requested=requested, workload=workload, at=now())


def refusal(client: Client, container: str, *requested: str) -> IpamError:
    with pytest.raises(IpamError) as caught:
        allocate(client, container, *requested)
    return caught.value


def eventually(client: Client, container: str, *requested: str) -> list[str]:
    """What is allocated once that can be."""
    found: list[str] = []

    def given() -> bool:
        with contextlib.suppress(IpamError):
            found[:] = cidrs(allocate(client, container, *requested))
        return bool(found)

    wait_for(f"addresses for {container}", given)
    return found


def test_an_address_has_one_holder_in_the_cluster(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool(list(nodes), "10.1.0.0/24", "fd00:1::/64", cooldown_ms=1000)
        to_a, to_b = (stack.enter_context(node.client()) for node in (a, b))
        mine = allocate(to_a, "one")
        assert mine.created
        ips = [cidr.partition("/")[0] for cidr in cidrs(mine)]
        assert keys(etcd, prefix, "addresses/") == sorted(f"p#{ip}" for ip in ips)
        assert keys(etcd, prefix, "owned/") == sorted(f"a/p#{ip}" for ip in ips)
        assert cidrs(allocate(to_a, "one")) == cidrs(mine)

        wait_for("b hears of it", lambda: to_b.get_pool("p").usage[0].elsewhere)
        for ip in ips:
            refused = refusal(to_b, "two", ip)
            assert refused.code is Code.ALREADY_EXISTS
            assert f"{ip} of pool p is held on node a" in refused.message
        # Any free address can be asked for from any node.
        assert cidrs(allocate(to_b, "two", "10.1.0.77", "fd00:1::77")) == ["10.1.0.77/24", "fd00:1::77/64"]
        assert to_b.get_pool("p").usage[0].allocated == 1

        to_a.release(key("one"))
        wait_for("etcd hears of the release", lambda: f"p#{ips[0]}" not in keys(etcd, prefix, "addresses/"))
        assert f"p#{ips[0]}" in keys(etcd, prefix, "freed/")
        assert not keys(etcd, prefix, "owned/a/")
        wait_for("b hears of the cool-down", lambda: "cools down" in refusal_of(to_b, "three", ips[0]))
        assert eventually(to_b, "three", *ips) == cidrs(mine)
        assert not keys(etcd, prefix, "freed/")


def refusal_of(client: Client, container: str, ip: str) -> str:
    return refusal(client, container, ip).message


def test_nodes_compete_for_the_last_addresses(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    """Three nodes want 61 addresses with 30 containers each: 61 get one, no two the same, and the rest are refused."""
    with ExitStack() as stack:
        nodes = start(stack, etcd, prefix, tmp_path, "a", "b", "c")
        make_pool(nodes, "10.2.0.0/26")

        def many(node: Node) -> list[str]:
            found = []
            with node.client() as client:
                for number in range(30):
                    try:
                        found += cidrs(allocate(client, f"{node.name}{number}"))
                    except IpamError as error:
                        assert error.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE), error
            return found

        with ThreadPoolExecutor() as pool:
            found = [cidr for cidrs in pool.map(many, nodes) for cidr in cidrs]
        with nodes[0].client() as client:
            found += rest_of(client)
        assert len(found) == len(set(found)) == 61
        assert len(keys(etcd, prefix, "addresses/")) == 61


def rest_of(client: Client) -> list[str]:
    """Allocates until nothing is left."""
    found: list[str] = []
    number = 0

    def exhausted() -> bool:
        nonlocal number
        number += 1
        try:
            found.extend(cidrs(allocate(client, f"rest{number}")))
        except IpamError as error:
            return error.code is Code.RESOURCE_EXHAUSTED
        return False

    wait_for("the end of the pool", exhausted)
    return found


def test_nodes_begin_at_places_of_their_own(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = start(stack, etcd, prefix, tmp_path, "a", "b", "c")
        make_pool(nodes, "10.0.0.0/8")
        first = []
        for node in nodes:
            with node.client() as client:
                first += cidrs(allocate(client, "x"))
        assert len({cidr.split(".")[1] for cidr in first}) > 1


def test_a_workload_takes_its_address_to_another_node(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.3.0.0/24", cooldown_ms=60_000)
        to_a, to_b = (stack.enter_context(node.client()) for node in (a, b))
        mine = cidrs(allocate(to_a, "one", workload="default/web-0"))
        to_a.release(key("one"))
        wait_for("the cool-down", lambda: keys(etcd, prefix, "freed/"))
        assert cidrs(allocate(to_b, "other", workload="default/web-1")) != mine
        wait_for("b hears of the cool-down", lambda: to_b.get_pool("p").usage[0].cooling)
        assert cidrs(allocate(to_b, "two", workload="default/web-0")) == mine
        assert not keys(etcd, prefix, "freed/")
        to_b.release(key("two"))
        wait_for("the cool-down", lambda: keys(etcd, prefix, "freed/"))
        assert cidrs(allocate(to_b, "three", workload="default/web-0")) == mine


def test_etcd_is_away_and_comes_back(prefix: str, tmp_path: Path) -> None:
    with EtcdCluster() as etcd, ExitStack() as stack:
        (a,) = start(stack, etcd, prefix, tmp_path, "a")
        make_pool([a], "10.4.0.0/24")
        client = stack.enter_context(a.client())
        held = cidrs(allocate(client, "held"))
        allocate(client, "going")
        etcd.kill("m1")
        began = time.monotonic()
        for number in range(3):
            assert refusal(client, f"new{number}").code is Code.UNAVAILABLE
        assert time.monotonic() - began < 3 * 5.0 + 30  # each well within a caller's patience, on a loaded machine
        # What is held is answered, and a release is done at once.
        assert cidrs(allocate(client, "held")) == held
        assert client.release(key("going")).released
        assert [entry.key.container_id for entry in client.list_allocations()] == ["held"]
        etcd.start("m1")
        wait_for("etcd hears of the release", lambda: len(keys(etcd, prefix, "addresses/")) == 1)
        assert len(eventually(client, "again")) == 1
        wait_for("no errand is left", lambda: len(keys(etcd, prefix, "owned/")) == 2)
        assert [entry.key.container_id for entry in client.list_allocations()] == ["held", "again"]
        usage = client.get_pool("p").usage[0]
        assert (usage.allocated, usage.cooling) == (2, 0)


def test_a_node_that_was_killed_finds_its_addresses(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.5.0.0/24")
        with a.client() as client:
            mine = [cidrs(allocate(client, f"c{number}")) for number in range(5)]
            client.release(key("c0"))
        a.kill()
        a.start()
        with a.client() as client:
            wait_for("the release", lambda: len(keys(etcd, prefix, "addresses/")) == 4)
            assert [cidrs(entry) for entry in client.list_allocations()] == mine[1:]
            assert eventually(client, "c1") == mine[1]
            new = eventually(client, "new")
            assert new not in mine[1:]
        with b.client() as client:
            assert refusal(client, "x", mine[2][0].partition("/")[0]).code is Code.ALREADY_EXISTS


def test_what_etcd_lost_is_claimed_again_and_what_the_node_lost_is_adopted(
    etcd: EtcdCluster, prefix: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        (a,) = start(stack, etcd, prefix, tmp_path, "a")
        make_pool([a], "10.6.0.0/24")
        with a.client() as client:
            lost = cidrs(allocate(client, "lost"))[0].partition("/")[0]
            etcd.etcdctl("del", f"{prefix}addresses/p#{lost}")
            wait_for("it is claimed again", lambda: keys(etcd, prefix, "addresses/") == [f"p#{lost}"])
            assert a.stop() == 0
        # An older copy of the database.
        copy = {path: path.read_bytes() for path in Path(a.database).parent.iterdir() if path.is_file()}
        a.start()
        with a.client() as client:
            forgotten = eventually(client, "forgotten")
            assert a.stop() == 0
        for path in Path(a.database).parent.iterdir():
            path.unlink()
        for path, content in copy.items():
            path.write_bytes(content)
        a.start()
        with a.client() as client:
            wait_for("both are there", lambda: len(list(client.list_allocations())) == 2)
            found = {entry.key.container_id: cidrs(entry) for entry in client.list_allocations()}
            assert found["forgotten"] == forgotten
            client.release(key("forgotten"))
            wait_for("it is released like any other", lambda: keys(etcd, prefix, "addresses/") == [f"p#{lost}"])


def test_an_address_that_another_node_has_is_complained_about(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.7.0.0/24")
        with a.client() as to_a, b.client() as to_b:
            ip = cidrs(allocate(to_a, "one"))[0].partition("/")[0]
            wait_for("b hears of it", lambda: to_b.get_pool("p").usage[0].elsewhere)
            a.kill()
            etcd.etcdctl("del", f"{prefix}addresses/p#{ip}")
            eventually(to_b, "two", ip)
            a.start()
            wait_for("the complaint", lambda: "an address has two owners" in a.log.read_text())
            assert [entry.key.container_id for entry in to_a.list_allocations()] == ["one"]


def test_a_reserved_address_is_not_given(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.8.0.0/24")
        with a.client() as to_a, b.client() as to_b:
            to_a.reserve("p", "10.8.0.9", "printer")
            refused = refusal(to_b, "x", "10.8.0.9")
            assert refused.code is Code.ALREADY_EXISTS, refused
            ip = cidrs(allocate(to_b, "y"))[0].partition("/")[0]
            with pytest.raises(IpamError) as caught:
                to_a.reserve("p", ip, "")
            assert caught.value.code is Code.ALREADY_EXISTS
            to_a.unreserve("p", "10.8.0.9")
            assert eventually(to_b, "x", "10.8.0.9") == ["10.8.0.9/24"]


def test_an_address_that_was_reserved_cools_down_for_all(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    """As a released one does: somebody may still use it."""
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.8.0.0/24", cooldown_ms=600_000)
        with a.client() as to_a, b.client() as to_b:
            to_a.reserve("p", "10.8.0.9", "printer")
            wait_for("b hears of it", lambda: to_b.get_pool("p").usage[0].reserved)
            to_a.unreserve("p", "10.8.0.9")
            assert keys(etcd, prefix, "freed/") == ["p#10.8.0.9"]
            wait_for("b hears of both", lambda: "cools down" in refusal(to_b, "x", "10.8.0.9").message)
            for client in (to_a, to_b):
                assert refusal(client, "x", "10.8.0.9").code is Code.UNAVAILABLE
                assert client.get_pool("p").usage[0].cooling == 1
            before = etcd.keys(f"{prefix}freed/")
            with pytest.raises(IpamError) as caught:
                to_b.unreserve("p", "10.8.0.9")
            assert caught.value.code is Code.NOT_FOUND
            assert etcd.keys(f"{prefix}freed/") == before
            # It may be reserved again meanwhile, by any node.
            to_b.reserve("p", "10.8.0.9", "printer")


def test_history_is_compacted_under_the_watch(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.9.0.0/24")
        with a.client() as to_a, b.client() as to_b:
            old = cidrs(allocate(to_a, "old"))[0].partition("/")[0]
            wait_for("b hears of it", lambda: to_b.get_pool("p").usage[0].elsewhere)
            assert b.process is not None
            b.process.send_signal(signal.SIGSTOP)
            new = cidrs(allocate(to_a, "new"))[0].partition("/")[0]
            to_a.release(key("old"))
            wait_for("the release", lambda: keys(etcd, prefix, "addresses/") == [f"p#{new}"])
            etcd.compact()
            etcd.restart("m1")
            b.process.send_signal(signal.SIGCONT)
            assert eventually(to_b, "x", old) == [f"{old}/24"]
            assert refusal(to_b, "y", new).code is Code.ALREADY_EXISTS


@looped
async def test_where_changes_are_many_they_come_in_few_messages(etcd: EtcdCluster, prefix: str) -> None:
    """Whole, in order and each once, while they are made and when they are over."""
    found: list[Event] = []
    takes: list[int] = []

    def take(events: list[Event]) -> None:
        takes.append(len(events))
        found.extend(events)

    async with connected(etcd.sockets, prefix) as client:
        first = await client.put("other", b"")
        names = [f"addresses/{number}" for number in range(60)]

        async def follow() -> None:
            revision = first
            while True:
                before, revision = revision, await changes(client, "addresses/", revision, take)
                assert revision > before

        following = asyncio.create_task(follow())
        for name in names:
            await client.put(name, b"")
        for name in names:
            await client.delete(name)
        await until(lambda: asyncio.sleep(0, len(found) >= 120 or following.done()), "all of them")
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
    assert [(event.kind, event.pair.key) for event in found] == [
        *(("put", name) for name in names),
        *(("delete", name) for name in names),
    ]
    assert [event.pair.mod_revision for event in found] == list(range(first + 1, first + 121))
    assert max(takes) > 8


def test_all_of_the_cluster_is_listed_on_every_node(etcd: EtcdCluster, prefix: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = start(stack, etcd, prefix, tmp_path, "a", "b")
        make_pool([a, b], "10.10.0.0/22", "fd00:10::/64")
        with a.client() as to_a, b.client() as to_b:
            to_a.create_pool("blocks", spec("10.11.0.0/20"))
            wait_for("the pool on b", lambda: len(to_b.list_pools()) == 2)
            expected = {}
            for client, node in ((to_a, "a"), (to_b, "b")):
                for number in range(40):
                    name = f"{node}{number}"
                    expected[name, "p"] = node, cidrs(client.allocate(key(name), pools=["p"], workload=name))
                for number in range(100):
                    name = f"{node}{number}"
                    of = key(name, network="other")
                    expected[name, "blocks"] = node, cidrs(client.allocate(of, pools=["blocks"]))

            def listed(client: Client, **wanted: str) -> dict[tuple[str, str], tuple[str, list[str]]]:
                request = pb.ListAllocationsRequest(cluster=True, **wanted)
                found = list(client.list_allocations(request))
                by_name = {(e.key.container_id, e.addresses[0].pool): (e.key.node, cidrs(e)) for e in found}
                assert len(by_name) == len(found)
                return by_name

            wait_for("all is published", lambda: len(listed(to_a)) == len(expected))
            assert listed(to_a) == listed(to_b) == expected
            some = listed(to_b, node="a", pool="p")
            assert some == {what: held for what, held in expected.items() if held[0] == "a" and what[1] == "p"}
            ip = expected["b7", "p"][1][1].partition("/")[0]
            assert list(listed(to_a, address=ip)) == [("b7", "p")]
            assert len(list(to_a.list_allocations())) == 140  # without the cluster: this node's


def test_who_is_in_no_cluster_cannot_list_it(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        with pytest.raises(IpamError, match="belongs to no cluster") as caught:
            list(client.list_allocations(pb.ListAllocationsRequest(cluster=True)))
        assert caught.value.code is Code.FAILED_PRECONDITION


class Mortal(Node):
    """Dies at a step of a claim or release, if one is set."""

    step = ""

    def spawn(self) -> "subprocess.Popen[bytes]":
        if not self.step:
            return super().spawn()
        environment = {**os.environ, "NETLOOM_RUN_DIR": f"{self.directory}/run", "PYTHONPATH": ROOT}
        argv = [sys.executable, "-m", "tests.cluster.faulty", self.step, "--config", str(self.config)]
        with open(self.log, "ab") as log:
            return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=log, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("step", faulty.STEPS)
def test_killed_at_any_step_nothing_is_lost_and_nothing_stays(
    etcd: EtcdCluster, prefix: str, tmp_path: Path, step: str
) -> None:
    """Whatever was answered holds; store and etcd agree again soon after the restart; and all can be released."""
    with ExitStack() as stack:
        node = stack.enter_context(Mortal(tmp_path, "a", etcd.sockets, FAST, prefix=prefix))
        make_pool([node], "10.12.0.0/24", "fd00:12::/64")
        with node.client() as client:
            held = {"old": cidrs(allocate(client, "old"))}
            going = cidrs(allocate(client, "going"))
            assert node.stop() == 0
            node.step = step
            node.start()
            process = node.process
            assert process is not None
            process.send_signal(signal.SIGUSR1)
            known = {"old", "new", "going"}
            with contextlib.suppress(IpamError):
                client.release(key("going"))
                known.discard("going")
                held["new"] = cidrs(allocate(client, "new"))
            wait_for("its death", lambda: process.poll() is not None)
            node.step = ""
            node.start()

            def agree() -> bool:
                here = {a.cidr.partition("/")[0] for e in client.list_allocations() for a in e.addresses}
                return {f"p#{ip}" for ip in here} == set(keys(etcd, prefix, "addresses/"))

            wait_for("store and etcd to agree", agree)
            found = {entry.key.container_id: cidrs(entry) for entry in client.list_allocations()}
            assert held.items() <= found.items()
            assert set(found) <= known
            eventually(client, "new")
            for container in known:
                client.release(key(container))
            wait_for("the end", lambda: not keys(etcd, prefix, "addresses/") and not keys(etcd, prefix, "owned/"))
            # Every address can be had again, as the pool has no cool-down.
            assert eventually(client, "again", *(cidr.partition("/")[0] for cidr in going)) == going
