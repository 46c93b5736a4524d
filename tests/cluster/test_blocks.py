"""Pools of mode node-block on real ipamd processes and a real etcd."""

import asyncio
import ipaddress
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import layout
from cluster.etcd import Etcd
from cluster.layout import PublishedRecord
from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import cidrs, key, spec, wait_for

Nodes = Callable[..., Node]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def nodes(etcd: EtcdCluster, tmp_path: Path) -> Iterator[Nodes]:
    """Starts nodes of one cluster, which is this test's own."""
    with ExitStack() as stack:

        def start(name: str, settings: str = "") -> Node:
            return stack.enter_context(Node(tmp_path, name, etcd.sockets, settings, prefix=f"/{tmp_path.name}/"))

        yield start


def pool_on(node: Node, name: str, made: pb.PoolSpec | None = None) -> None:
    """Makes a pool, or waits until the node knows it."""
    with node.client() as client:
        if made is not None:
            client.create_pool(name, made)
        wait_for(f"pool {name} on {node.name}", lambda: name in {pool.name for pool in client.list_pools()})


def usage(client: Client, name: str, index: int = 0) -> pb.PoolUsage:
    return client.get_pool(name).usage[index]


def take(client: Client, count: int, name: str, prefix: str = "c") -> list[str]:
    return [cidr for number in range(count) for cidr in cidrs(client.allocate(key(f"{prefix}{number}"), pools=[name]))]


def give(client: Client, count: int, prefix: str = "c") -> None:
    for number in range(count):
        client.release(key(f"{prefix}{number}"))


def ips(found: list[str]) -> set[str]:
    return {cidr.partition("/")[0] for cidr in found}


def test_addresses_of_three_nodes_are_unique_and_of_their_blocks(nodes: Nodes) -> None:
    three = [nodes(name) for name in "abc"]
    pool_on(three[0], "blue", spec("10.1.0.0/20", "fd00:1::/64", block_v4=27, block_v6=124))
    taken: list[str] = []
    for node in three:
        pool_on(node, "blue")
        with node.client() as client:
            found = take(client, 60, "blue")
            four, six = usage(client, "blue"), usage(client, "blue", 1)
        assert {cidr.partition("/")[2] for cidr in found} == {"27", "124"}
        # 29 usable ones of 32 but for the gateway; 16 of an IPv6 block but for the first and the gateway.
        assert (four.allocated, four.blocks >= 3, six.blocks >= 5) == (60, True, True)
        assert int(four.blocks_total) == 128
        taken += found
    assert len(ips(taken)) == 3 * 60 * 2
    with three[0].client() as client:
        answer = client.allocate(key("more"), pools=["blue"])
        for address in answer.addresses:
            assert address.gateway in (_first_of(address.cidr), "")
        wait_for("blocks of all", lambda: usage(client, "blue").blocks_claimed >= 9)


def _first_of(cidr: str) -> str:
    return str(ipaddress.ip_interface(cidr).network[1])


def test_the_default_is_blocks_of_64_and_a_local_pool_stays_with_its_node(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    with a.client() as to_a, b.client() as to_b:
        made = to_a.create_pool("blue", spec("10.1.0.0/16"))
        assert (made.spec.mode, made.spec.block_v4, made.spec.block_v6) == ("node-block", 26, 122)
        assert cidrs(to_a.allocate(key("c"), pools=["blue"]))[0].endswith("/26")
        to_a.create_pool("own", spec("10.2.0.0/16", mode="local"))
        wait_for("the pool on b", lambda: [pool.name for pool in to_b.list_pools()] == ["blue"])
        assert to_a.create_pool("blue", spec("10.1.0.0/16")).name == "blue"
        with pytest.raises(IpamError, match="another spec"):
            to_b.create_pool("blue", spec("10.9.0.0/16"))


def test_etcd_down_and_a_restart_of_ipamd_meanwhile(tmp_path: Path) -> None:
    with EtcdCluster() as etcd, Node(tmp_path, "a", etcd.sockets) as a:
        pool_on(a, "blue", spec("10.1.0.0/16"))
        with a.client() as client:
            before = take(client, 20, "blue")
            etcd.kill("m1")
            during = take(client, 10, "blue", "d")
            assert usage(client, "blue").blocks <= 2
        assert a.stop() == 0
        a.start()
        with a.client() as client:
            status = client.status()
            assert (status.store, status.etcd_reachable) == ("etcd", False)
            assert take(client, 20, "blue") == before
            during += take(client, 10, "blue", "e")
            assert len(ips(before + during)) == 40
            with pytest.raises(IpamError) as error:
                take(client, 200, "blue", "f")
            assert error.value.code.name == "UNAVAILABLE"
            assert "wants a block more, and" in str(error.value)
            etcd.start("m1")
            wait_for("etcd again", lambda: client.status().etcd_reachable and not client.status().unpublished)
            assert len(ips(take(client, 200, "blue", "f"))) == 200


def test_a_node_that_was_killed_finds_its_blocks_and_allocations(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "blue", spec("10.1.0.0/22"))
    pool_on(b, "blue")
    with a.client() as client:
        before = take(client, 100, "blue")
        blocks = usage(client, "blue").blocks
    a.kill()
    with b.client() as client:
        others = take(client, 300, "blue", "b")
    a.start()
    with a.client() as client:
        assert take(client, 100, "blue") == before
        assert usage(client, "blue").blocks == blocks
        before += take(client, 30, "blue", "more")
    assert not ips(before) & ips(others)


def test_empty_blocks_go_back_and_one_stays(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "blue", spec("10.1.0.0/23", block_v4=27, cooldown_ms=200))
    pool_on(b, "blue")
    with a.client() as to_a, b.client() as to_b:
        take(to_a, 200, "blue")
        wait_for("b sees them", lambda: usage(to_b, "blue").blocks_claimed >= 7)
        give(to_a, 200)
        wait_for("one block left", lambda: usage(to_a, "blue").blocks == 1)
        wait_for("b sees that, too", lambda: usage(to_b, "blue").blocks_claimed <= 2)
        # All that a had can be had by b.
        assert len(ips(take(to_b, 29 * 15, "blue", "b"))) == 29 * 15


def test_a_full_pool_and_the_limit_of_a_node(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "small", spec("10.1.0.0/26", block_v4=27, cooldown_ms=0))
    pool_on(a, "limited", spec("10.2.0.0/24", block_v4=27, blocks_per_node=2, cooldown_ms=0))
    pool_on(b, "small")
    pool_on(b, "limited")
    with a.client() as to_a, b.client() as to_b:
        take(to_a, 40, "small")
        with pytest.raises(IpamError) as error:
            to_b.allocate(key("b"), pools=["small"])
        assert error.value.code.name == "RESOURCE_EXHAUSTED"
        assert "all of its 2 blocks are claimed" in str(error.value)
        with pytest.raises(IpamError, match="blocks are claimed"):
            to_b.status(pools=["small"])
        take(to_a, 58, "limited", "l")
        with pytest.raises(IpamError, match="as many as blocks_per_node lets it"):
            to_a.allocate(key("l58"), pools=["limited"])
        to_b.allocate(key("l"), pools=["limited"])
        to_a.release(key("l7"))
        to_a.allocate(key("l58"), pools=["limited"])


def test_an_address_that_is_asked_for_brings_its_block(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "blue", spec("10.1.0.0/16"))
    pool_on(b, "blue")
    with a.client() as to_a, b.client() as to_b:
        got = to_a.allocate(key("a"), pools=["blue"], requested=["10.1.77.77"])
        assert cidrs(got) == ["10.1.77.77/26"]
        wait_for("b knows", lambda: usage(to_b, "blue").blocks_claimed == 1)
        with pytest.raises(IpamError, match="is node a's, which alone hands its addresses out") as error:
            to_b.allocate(key("b"), pools=["blue"], requested=["10.1.77.78"])
        assert error.value.code.name == "FAILED_PRECONDITION"
        with pytest.raises(IpamError, match="is a gateway of pool blue"):
            to_b.allocate(key("b"), pools=["blue"], requested=["10.1.78.1"])


def test_reservations_hold_on_every_node(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "blue", spec("10.1.0.0/25", block_v4=26))
    pool_on(b, "blue")
    with a.client() as to_a, b.client() as to_b:
        to_a.reserve("blue", "10.1.0.5", "printer")
        to_a.reserve("blue", "10.1.0.70", "router")
        wait_for("b knows", lambda: len(to_b.list_reservations("blue")) == 2)
        with pytest.raises(IpamError, match="is reserved"):
            to_b.reserve("blue", "10.1.0.5", "scanner")
        of_a, of_b = ips(take(to_a, 30, "blue")), ips(take(to_b, 30, "blue"))
        assert not (of_a | of_b) & {"10.1.0.5", "10.1.0.70"}
        foreign = next(ip for ip in ("10.1.0.62", "10.1.0.126") if not _within(ip, f"{min(of_a)}/26"))
        with pytest.raises(IpamError, match="of node b, which alone knows whether it is in use"):
            to_a.reserve("blue", foreign, "")
        to_b.unreserve("blue", "10.1.0.5")
        wait_for("a knows", lambda: len(to_a.list_reservations("blue")) == 1)


def test_a_pool_is_deleted_when_no_node_uses_it(nodes: Nodes) -> None:
    a, b = nodes("a"), nodes("b")
    pool_on(a, "blue", spec("10.1.0.0/16"))
    pool_on(b, "blue")
    with a.client() as to_a, b.client() as to_b:
        take(to_a, 3, "blue")
        take(to_b, 3, "blue")
        give(to_a, 3)
        with pytest.raises(IpamError, match=r"c0 on node b has .*; release its addresses first"):
            to_a.delete_pool("blue")
        take(to_a, 3, "blue")  # it can be used again
        give(to_a, 3)
        give(to_b, 3)
        to_a.delete_pool("blue")
        wait_for("b knows", lambda: not to_b.list_pools())
        to_b.create_pool("blue", spec("10.1.0.0/24"))


def test_what_is_in_use_is_published(nodes: Nodes, etcd: EtcdCluster, tmp_path: Path) -> None:
    a = nodes("a")
    pool_on(a, "blue", spec("10.1.0.0/16"))
    with a.client() as client:
        taken = take(client, 70, "blue")
        wait_for("all published", lambda: ips(taken) == _published(etcd, tmp_path))
        assert client.status().unpublished == 0
        give(client, 69)
        wait_for("what is left", lambda: _published(etcd, tmp_path) == ips(taken[69:]))


def _published(etcd: EtcdCluster, tmp_path: Path) -> set[str]:
    async def read() -> set[str]:
        async with connected(etcd.sockets, f"/{tmp_path.name}/") as client:
            return await _rows(client)

    return asyncio.run(read())


async def _rows(etcd: Etcd) -> set[str]:
    pairs = [pair async for page in etcd.walk(layout.PUBLISHED) for pair in page.pairs]
    records = [layout.decode(PublishedRecord, pair.key, pair.value) for pair in pairs]
    return {row.cidr.partition("/")[0] for record in records for row in record.rows}


def test_a_block_that_two_nodes_claim_hands_nothing_out(nodes: Nodes, etcd: EtcdCluster, tmp_path: Path) -> None:
    a = nodes("a")
    pool_on(a, "blue", spec("10.1.0.0/24", block_v4=26, cooldown_ms=0))
    with a.client() as client:
        taken = take(client, 5, "blue")
        wait_for("published", lambda: not client.status().unpublished)
        network = taken[0].rpartition(".")[0] + f".{int(taken[0].split('.')[3].split('/')[0]) // 64 * 64}/26"
        block = layout.BLOCKS + layout.place("blue", network)

        async def usurp(value: bytes) -> None:
            async with connected(etcd.sockets, f"/{tmp_path.name}/") as to_etcd:
                await to_etcd.put(block, value)

        mine = asyncio.run(_value(etcd, tmp_path, block))
        asyncio.run(usurp(layout.encode(layout.BlockRecord("z", "somebody"))))
        wait_for("its word", lambda: "claimed by two nodes" in a.log.read_text())
        later = ips(take(client, 30, "blue", "later"))
        assert not any(_within(ip, network) for ip in later)
        give(client, 4)
        assert a.stop() == 0
    a.start()
    with a.client() as client:
        assert not any(_within(ip, network) for ip in ips(take(client, 30, "blue", "after")))
        asyncio.run(usurp(mine))
        wait_for("it is ours again", lambda: "this node's again" in a.log.read_text())


async def _value(etcd: EtcdCluster, tmp_path: Path, name: str) -> bytes:
    async with connected(etcd.sockets, f"/{tmp_path.name}/") as client:
        pair = await client.get(name)
        assert pair is not None
        return pair.value


def _within(ip: str, network: str) -> bool:
    return ipaddress.ip_address(ip) in ipaddress.ip_network(network, strict=False)


def test_many_clients_at_once_wait_for_one_claim(nodes: Nodes) -> None:
    a = nodes("a")
    pool_on(a, "blue", spec("10.1.0.0/16", block_v4=28))

    def some(worker: int) -> list[str]:
        with a.client() as client:
            return take(client, 50, "blue", f"w{worker}-")

    with ThreadPoolExecutor(8) as workers:
        found = [cidr for part in workers.map(some, range(8)) for cidr in part]
    assert len(ips(found)) == 400
    with a.client() as client:
        assert usage(client, "blue").allocated == 400
