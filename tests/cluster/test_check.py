"""`CheckStore` in a cluster: what was damaged in etcd by hand is found, named, and mended where that is safe."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest

from cluster import layout
from cluster.etcd import Delete, Put
from cluster.layout import BlockRecord, NetworkRecord
from ipamd.client import Client, IpamError
from ipamd.errors import AlreadyExistsError, UnavailableError
from ipamd.member.networks import SharedNetworks
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected, looped
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import cidrs, key, spec, wait_for

_THREE = ("pods", "web", "db")
NO_GRACE = "[reclaim]\ngrace_s = 0\n"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def damage(etcd: EtcdCluster, tmp_path: Path) -> Callable[..., None]:
    """Writes to etcd behind the nodes' back."""

    def change(*operations: Put | Delete) -> None:
        async def write() -> None:
            async with connected(etcd.sockets, f"/{tmp_path.name}/") as client:
                await client.txn([], list(operations))

        asyncio.run(write())

    return change


@pytest.fixture
def pair(etcd: EtcdCluster, tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes and two pools, blue of blocks and green of addresses, of each of which both have one address."""
    with ExitStack() as stack:
        prefix = f"/{tmp_path.name}/"
        a, b = (stack.enter_context(Node(tmp_path, name, etcd.sockets, NO_GRACE, prefix=prefix)) for name in "ab")
        with a.client() as client:
            client.create_pool("blue", spec("10.1.0.0/16"))
            client.create_pool("green", spec("10.2.0.0/24", mode="cluster-address"))
        for node in (a, b):
            with node.client() as client:
                wait_for("both pools", partial(_knows_both, client))
                for name in ("blue", "green"):
                    client.allocate(key(f"{node.name}-{name}"), pools=[name])
                until_told(node, client)
        yield a, b


def make_idle(node: Node) -> None:
    """A pool of blocks of which nobody asks for an address: no node claims the block that a test damages."""
    with node.client() as client:
        client.create_pool("idle", spec("10.9.0.0/16"))


def _knows_both(client: Client) -> bool:
    return len(client.list_pools()) == 2


def until_told(node: Node, client: Client) -> None:
    """Returns when the cluster knows all that this node did."""
    try:
        wait_for("all that is to be told", lambda: client.status().unpublished == 0)
    except AssertionError as error:
        # What a node has to tell depends on etcd and on its disk: say what it says of both.
        raise AssertionError(f"{error}\n{client.status()}\n{node.log.read_text()[-8000:]}") from None


def check(client: Client, *, repair: bool = False) -> pb.CheckStoreResponse:
    return client.check_store(pb.CheckStoreRequest(repair=repair))


def kinds(answer: pb.CheckStoreResponse) -> list[tuple[str, str]]:
    return [(one.kind, one.address) for one in answer.differences]


def settled(client: Client) -> None:
    wait_for("no difference", lambda: not check(client).differences)


def block_of(cidr: str) -> str:
    """The block of 64 addresses that an address lies in."""
    first = cidr.partition("/")[0].rpartition(".")
    return f"{first[0]}.{int(first[2]) // 64 * 64}/26"


def test_two_nodes_in_order_have_nothing_to_mend(pair: tuple[Node, Node]) -> None:
    for node in pair:
        with node.client() as client:
            answer = check(client)
            assert (kinds(answer), answer.allocations) == ([], 2)
            assert answer.blocks >= 2, "of both nodes"


def test_a_block_of_a_node_that_nobody_knows_is_freed_unless_it_is_in_use(
    pair: tuple[Node, Node], damage: Callable[..., None]
) -> None:
    make_idle(pair[0])
    ghost = layout.encode(layout.BlockRecord("ghost", "1234"))
    used = layout.PublishedRecord(
        "ghost", (layout.PublishedRow("10.9.200.70/26", "", 0, 1, "cni", "n", "c", "e", 0, ""),)
    )
    damage(
        Put("blocks/idle#10.9.200.0/26", ghost),
        Put("blocks/idle#10.9.200.64/26", ghost),
        Put("published/idle#10.9.200.64/26", layout.encode(used)),
    )
    with pair[0].client() as client:
        first = check(client, repair=True)
        assert kinds(first) == [("orphan-block", "10.9.200.0/26"), ("orphan-block", "10.9.200.64/26")]
        assert [one.repairable for one in first.differences] == [True, False]
        assert not any(one.repaired for one in first.differences), "found for the first time"
        assert "ghost" in first.differences[0].text
        second = check(client, repair=True)
        assert [one.repaired for one in second.differences] == [True, False]
        assert kinds(check(client)) == [("orphan-block", "10.9.200.64/26")]


def test_what_is_published_wrongly_is_published_again(pair: tuple[Node, Node], damage: Callable[..., None]) -> None:
    a, _ = pair
    with a.client() as client:
        block = block_of(cidrs(client.allocate(key("a-blue"), pools=["blue"]))[0])
        damage(Put(f"published/blue#{block}", layout.encode(layout.PublishedRecord("a", ()))))
        assert kinds(check(client)) == [("unpublished", block)]
        assert [one.repaired for one in check(client, repair=True).differences] == [True]
        settled(client)


def test_addresses_that_etcd_lost_or_kept_by_mistake_are_put_right(
    pair: tuple[Node, Node], damage: Callable[..., None], etcd: EtcdCluster, tmp_path: Path
) -> None:
    a, _ = pair
    with a.client() as client:
        mine = cidrs(client.allocate(key("a-green"), pools=["green"]))[0].partition("/")[0]
        value = asyncio.run(_read(etcd, tmp_path, f"addresses/green#{mine}"))
        damage(Delete(f"addresses/green#{mine}"), Delete(f"owned/a/green#{mine}"))
        wait_for("the loss", lambda: kinds(check(client)) in ([("unclaimed", mine)], []))
        settled(client)
        assert asyncio.run(_read(etcd, tmp_path, f"addresses/green#{mine}")) is not None

        # What a copy of an older database would not know.
        assert value is not None
        damage(Put("addresses/green#10.2.0.99", value), Put("owned/a/green#10.2.0.99", b""))
        found = kinds(check(client))
        assert found in ([("unreleased", "10.2.0.99")], [])
        settled(client)


async def _read(etcd: EtcdCluster, tmp_path: Path, name: str) -> bytes | None:
    async with connected(etcd.sockets, f"/{tmp_path.name}/") as client:
        found = await client.get(name)
    return None if found is None else found.value


def test_one_address_of_two_nodes_is_for_a_person(pair: tuple[Node, Node], damage: Callable[..., None]) -> None:
    a, _ = pair
    with a.client() as client:
        mine = cidrs(client.allocate(key("a-green"), pools=["green"]))[0].partition("/")[0]
        damage(Put(f"addresses/green#{mine}", b'{"node":"b","node_id":"other","generation":7,"allocation":{}}'))
        wait_for("the conflict", lambda: kinds(check(client)) == [("duplicate", mine)])
        for _ in range(2):
            (found,) = check(client, repair=True).differences
        assert not found.repairable
        assert "node b" in found.text


def test_without_etcd_nothing_is_said_to_be_well(tmp_path: Path) -> None:
    with EtcdCluster() as etcd, Node(tmp_path, "a", etcd.sockets) as a, a.client() as client:
        etcd.kill("m1")
        with pytest.raises(IpamError, match="nothing was compared"):
            check(client)


def test_a_network_is_known_to_all_nodes_and_connected_by_any(pair: tuple[Node, Node]) -> None:
    a, b = pair
    with a.client() as to_a, b.client() as to_b:
        made = to_a.create_network(_network("pods", "10.3.0.0/16"))
        assert (made.bridge, to_a.get_pool("pods").spec.mode) == ("nl-pods", "node-block")
        wait_for("the network on b", lambda: _names(to_b) == ["pods"])
        to_b.create_network(_network("web", "10.4.0.0/16"))
        wait_for("the network on a", lambda: _names(to_a) == ["pods", "web"])
        assert cidrs(to_b.allocate(key("c"), pools=["pods"]))[0].startswith("10.3.")
        for client in (to_a, to_b):
            with pytest.raises(IpamError, match="overlaps"):
                client.create_network(_network("other", "10.3.128.0/17"))
        to_b.connect_networks("pods", "web")
        wait_for("the connection on a", lambda: list(to_a.get_network("web").reachable) == ["10.3.0.0/16"])
        with pytest.raises(IpamError, match="pods"):
            to_a.delete_network("pods")
        to_b.release(key("c"))
        wait_for("the end of the network", lambda: _deleted(to_a, "pods"))
        wait_for("its end on b", lambda: _names(to_b) == ["web"])
        assert list(to_b.get_network("web").connected) == []


def test_a_record_that_cannot_be_read_is_named(pair: tuple[Node, Node], damage: Callable[..., None]) -> None:
    make_idle(pair[0])
    ending = layout.place("idle", "10.9.200.0/26")
    damage(Put(layout.BLOCKS + ending, layout.encode(BlockRecord("gone", "1"))), Put(layout.PUBLISHED + ending, b"7"))
    with pair[0].client() as client, pytest.raises(IpamError, match=r"published/idle#10\.9\.200\.0/26"):
        check(client)


def test_every_record_that_cannot_be_read_is_named_at_once(
    pair: tuple[Node, Node], damage: Callable[..., None]
) -> None:
    """Whose ever it is, on either node; also one that is no text."""
    a, b = pair
    make_idle(a)
    with a.client() as to_a, b.client() as to_b:
        block = layout.place("blue", block_of(cidrs(to_b.allocate(key("b-blue"), pools=["blue"]))[0]))
        owned = layout.OWNED + "a/" + layout.place("green", "10.2.0.77")
        damaged = {
            layout.NODES + "ghost": b"{",
            layout.BLOCKS + layout.place("idle", "10.9.200.64/26"): b"7",
            layout.PUBLISHED + layout.place("idle", "10.9.200.0/26"): b"",
            layout.PUBLISHED + block: b"[]",
            layout.ADDRESSES + layout.place("green", "10.2.0.77"): b'{"node":"\xff"}',
            layout.ADDRESSES + layout.place("green", "10.2.0.78"): b'{"node":1}',
        }
        damage(Put(owned, b""), *(Put(*entry) for entry in damaged.items()))
        for client in (to_a, to_b):
            with pytest.raises(IpamError, match="nothing was compared") as caught:
                check(client, repair=True)
            assert [name for name in damaged if f"{name}: " not in caught.value.message] == []
        damage(Delete(owned), *map(Delete, damaged))
        # What is left is what the check is for.
        assert ("unpublished", block_of(block.partition("#")[2])) in kinds(check(to_b))
        check(to_b, repair=True)
        settled(to_a)
        settled(to_b)


def test_more_damage_than_an_answer_holds_is_in_the_log(pair: tuple[Node, Node], damage: Callable[..., None]) -> None:
    names = [layout.NODES + f"ghost{number}" for number in range(40)]
    damage(*(Put(name, b"\xff") for name in names))
    with pair[0].client() as client, pytest.raises(IpamError, match="28 more, which the log names"):
        check(client)
    told = pair[0].log.read_text()
    assert [name for name in names if f'"{name}"' not in told] == []


def test_a_network_that_etcd_lost_is_put_there_again_while_it_is_used(
    pair: tuple[Node, Node], damage: Callable[..., None]
) -> None:
    a, b = pair
    with a.client() as to_a, b.client() as to_b:
        for name, subnet in (("pods", "10.3.0.0/16"), ("web", "10.4.0.0/16")):
            to_a.create_network(_network(name, subnet))
        wait_for("the networks on b", lambda: _names(to_b) == ["pods", "web"])
        to_b.allocate(key("c"), pools=["pods"])
        damage(Delete(layout.NETWORKS, True))
        wait_for("the end of web on a", lambda: _names(to_a) == ["pods"])
        wait_for("the end of web on b", lambda: _names(to_b) == ["pods"])


def test_keys_that_are_no_text_stop_nobody(pair: tuple[Node, Node], etcd: EtcdCluster, tmp_path: Path) -> None:
    a, b = pair
    strange = [f"/{tmp_path.name}/{kind}/x\udcff" for kind in ("addresses", "freed", "networks", "pools")]
    for name in strange:
        etcd.etcdctl("put", name, "x")
    with a.client() as to_a, b.client() as to_b:
        to_a.create_pool("red", spec("10.3.0.0/24", mode="cluster-address"))
        to_a.create_network(_network("pods", "10.10.0.0/16"))
        wait_for("pool and network on b", lambda: len(to_b.list_pools()) == 4 and to_b.list_networks())
        to_a.allocate(key("new"), pools=["green"])
        wait_for("the address on b", lambda: to_b.get_pool("green").usage[0].elsewhere == 2)
        to_a.release(key("new"))
        wait_for("its end on b", lambda: to_b.get_pool("green").usage[0].cooling)
        for node, client in ((a, to_a), (b, to_b)):
            until_told(node, client)
            found = client.check_store(pb.CheckStoreRequest()).differences
            assert [one.kind for one in found] == ["unreadable-key"] * 4
            assert rf"etcd: /{tmp_path.name}/addresses/x\xff: " in found[0].text
            assert node.log.read_text().count(r"networks/x\\xff is no UTF-8") == 1
        b.stop()
        b.start()
        assert [one.name for one in to_b.list_networks()] == ["pods"]


@looped
async def test_what_one_node_has_not_heard_of_yet_is_not_overwritten() -> None:
    """Another node connects and deletes networks while this one's watch is behind."""
    pods, web, db = (NetworkRecord(name, subnets=(f"10.{number}.0.0/16",)) for number, name in enumerate(_THREE))
    together = msgspec.structs.replace(web, connected=("db",))
    with EtcdCluster() as etcd:
        async with connected(etcd.sockets) as client:
            for record in (together, db):
                await client.put(layout.NETWORKS + record.name, layout.encode(record))
            # Of what it is made of only etcd is asked for these.
            shared = SharedNetworks(client, Mock(), Mock(), Mock(), Mock())
            for change in (
                shared.change([(db, db), (web, msgspec.structs.replace(web, connected=("pods",)))]),
                shared.change([(pods, msgspec.structs.replace(pods, connected=("web",)))]),
            ):
                with pytest.raises(UnavailableError, match="changed by another node"):
                    await change
            await shared.create(db)  # the same again, whatever became of its pool
            with pytest.raises(AlreadyExistsError, match="another definition"):
                await shared.create(msgspec.structs.replace(db, mtu=1400))
            with pytest.raises(AlreadyExistsError, match="overlaps"):
                await shared.create(msgspec.structs.replace(db, name="later", bridge="nl-later"))
            assert await shared.delete("pods") == []  # nothing is there
            await shared.change([(web, together)])
            assert await client.get(layout.NETWORKS + "pods") is None
            there = await client.get(layout.NETWORKS + "web")
            assert there is not None
            assert layout.decode(NetworkRecord, there.key, there.value) == together
            # What it has not heard of is heeded: that web is connected with db.
            assert [record.connected for record in await shared.delete("db")] == [()]
            there = await client.get(layout.NETWORKS + "web")
            assert there is not None
            assert layout.decode(NetworkRecord, there.key, there.value) == web


def _network(name: str, *subnets: str) -> pb.CreateNetworkRequest:
    return pb.CreateNetworkRequest(network=pb.Network(name=name, subnets=subnets))


def _names(client: Client) -> Sequence[str]:
    return [network.name for network in client.list_networks()]


def _deleted(client: Client, name: str) -> bool:
    """A pool's blocks go back only when the addresses of it have cooled down, or at once where it is deleted."""
    try:
        client.delete_network(name)
    except IpamError:
        return False
    return True


def test_networks_that_two_nodes_define_at_once_do_not_overlap(pair: tuple[Node, Node]) -> None:
    a, b = pair

    def define(node: Node, number: int) -> str:
        with node.client() as client:
            try:
                client.create_network(_network(f"{node.name}{number}", f"10.{64 + number}.0.0/16"))
            except IpamError as error:
                return str(error)
            return ""

    for number in range(6):
        with ThreadPoolExecutor() as pool:
            outcomes = list(pool.map(define, (a, b), (number, number)))
        refused = [text for text in outcomes if text]
        assert len(refused) == 1, outcomes
        assert "overlaps" in refused[0] or "at this moment" in refused[0]
