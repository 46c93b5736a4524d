"""Overlay networks of a cluster: what is chosen where nodes meet, what Docker shares, MACs that live with addresses."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import msgspec
import pytest

from cluster import layout
from cluster.etcd import Delete, Etcd, Put
from cluster.layout import AliveRecord, MacRecord, NetworkRecord, VersionRecord
from ipamd.client import Client, IpamError
from ipamd.engine import Engine, Transaction
from ipamd.member.macs import Macs
from ipamd.member.networks import SharedNetworks
from ipamd.networks import Choice, validated
from ipamd.overlay import complete, parts_of
from ipamd.pool import PoolSpec
from ipamd.store.cluster import ClusterStore
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected, looped
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import cidrs, key, now, spec, wait_for

T = TypeVar("T")

# Where no test machine is; 16 parts.
PARTS = "198.18.240.0/20,24"
SETTINGS = "[reclaim]\ngrace_s = 0\n"


class Lab:
    """Two nodes, and etcd."""

    def __init__(self, etcd: EtcdCluster, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.etcd = etcd
        self.prefix = f"/{directory.name}/"
        self._stack = stack
        self.a, self.b = (self.start(name) for name in "ab")

    def start(self, name: str, parts: str = PARTS) -> Node:
        node = Node(self.directory, name, self.etcd.sockets, SETTINGS, prefix=self.prefix)
        text = node.config.read_text()
        node.config.write_text(text.replace("[ipamd]\n", f'[ipamd]\noverlay_subnets = "{parts}"\n'))
        return self._stack.enter_context(node)

    def ask(self, question: Callable[[Etcd], Coroutine[Any, Any, T]]) -> T:
        """Asks etcd itself."""

        async def answer() -> T:
            async with connected(self.etcd.sockets, self.prefix) as etcd:
                return await question(etcd)

        return asyncio.run(answer())

    def keys(self, prefix: str) -> list[str]:
        """Their ends."""

        async def read(etcd: Etcd) -> list[str]:
            return [
                pair.key.removeprefix(prefix) async for page in etcd.walk(prefix, keys_only=True) for pair in page.pairs
            ]

        return self.ask(read)

    def write(self, *operations: Put | Delete) -> None:
        self.ask(lambda etcd: etcd.txn([], list(operations)))

    def raw(self, key: str) -> bytes:
        pair = self.ask(lambda etcd: etcd.get(key))
        assert pair is not None
        return pair.value

    def record(self, name: str) -> NetworkRecord:
        pair = self.ask(lambda etcd: etcd.get(layout.NETWORKS + name))
        assert pair is not None
        return layout.decode(NetworkRecord, pair.key, pair.value)

    def mac(self, place: str) -> MacRecord | None:
        pair = self.ask(lambda etcd: etcd.get(layout.MACS + place))
        return layout.decode(MacRecord, pair.key, pair.value) if pair is not None else None


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def lab(etcd: EtcdCluster, tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(etcd, tmp_path, stack)


def wanted(name: str, *subnets: str, **more: Any) -> pb.CreateNetworkRequest:
    return pb.CreateNetworkRequest(network=pb.Network(name=name, type="overlay", subnets=subnets, **more))


def refused(code: str, match: str, call: Callable[[], object]) -> None:
    with pytest.raises(IpamError, match=match) as error:
        call()
    assert error.value.code.name == code


def docker_key(container: str) -> pb.AttachmentKey:
    return pb.AttachmentKey(client="docker", network="x", container_id=container, ifname="eth0")


def test_what_is_not_said_is_chosen(lab: Lab) -> None:
    with lab.a.client() as to_a, lab.b.client() as to_b:
        to_a.create_pool("taken", spec("198.18.240.0/24"))
        to_a.create_network(pb.CreateNetworkRequest(network=pb.Network(name="pods", subnets=["198.18.241.128/25"])))
        lab.write(
            Put("underlay/198.18.242.7", b"x"),
            Put("netd/c", b'{"id": "1", "addresses": ["198.18.243.9"], "mac": "", "subnets": ["198.18.244.0/23"]}'),
            Put("netd/d", b'{"addresses": 7}'),
            Put("netd/e", b'{"addresses": ["x"]}'),
            Put("pools/broken", b'{"spec": "7"}'),
        )
        one = to_a.create_network(wanted("one"))
        assert (one.type, one.vni, list(one.subnets), list(one.gateways), one.bridge, one.pool) == (
            *("overlay", 256, ["198.18.246.0/24"], ["198.18.246.1/24"], "nl-one", "one"),
        )
        pool = to_a.get_pool("one")
        assert (pool.spec.mode, pool.spec.range_sets[0].ranges[0].subnet) == ("cluster-address", "198.18.246.0/24")
        two = to_b.create_network(wanted("two"))
        assert (two.vni, list(two.subnets)) == (257, ["198.18.247.0/24"])
        three = to_b.create_network(wanted("three", "fd77::/64", "198.18.248.0/24", vni=259, internal=True, flood=True))
        assert list(three.gateways) == ["fd77::1/64", "198.18.248.1/24"]
        assert (three.internal, three.flood) == (True, True)
        # A bridge that has the name of a VXLAN device.
        to_a.create_network(
            pb.CreateNetworkRequest(network=pb.Network(name="vx258", subnets=["198.18.255.0/24"])),
        )
        assert to_a.create_network(wanted("four")).vni == 260

        # The same again is what there is, by any node.
        for client in (to_a, to_b):
            for request in (wanted("one"), wanted("one", "198.18.246.0/24"), wanted("one", vni=256)):
                assert client.create_network(request) == one
        to_a.allocate(key("c"), pools=["one"], requested=["198.18.246.9"])
        refused("INVALID_ARGUMENT", "gateway of pool one",
                lambda: to_a.allocate(key("d"), pools=["one"], requested=["198.18.246.1"]))  # fmt: skip
        # Any address at any node.
        assert cidrs(to_b.allocate(key("e"), pools=["one"], requested=["198.18.246.8"])) == ["198.18.246.8/24"]
        small = to_b.create_network(wanted("small", "198.18.254.0/30"))
        assert cidrs(to_b.allocate(key("f"), pools=[small.pool])) == ["198.18.254.2/30"]
        refused("RESOURCE_EXHAUSTED", "small", lambda: to_b.allocate(key("g"), pools=[small.pool]))


def test_what_cannot_be_is_refused_with_the_remedy(lab: Lab) -> None:
    with lab.a.client() as client:
        client.create_network(wanted("one", "198.18.0.0/24", vni=300))
        for code, match, request in (
            ("ALREADY_EXISTS", "vni: network one has VNI 300", wanted("two", vni=300)),
            ("ALREADY_EXISTS", "overlaps 198.18.0.0/24 of network one", wanted("two", "198.18.0.0/25")),
            ("ALREADY_EXISTS", "another definition", wanted("one", vni=301)),
            ("ALREADY_EXISTS", "another definition", wanted("one", internal=True)),
            ("INVALID_ARGUMENT", "vni: wanted 1 to 16777215.*found 16777216", wanted("two", vni=1 << 24)),
            ("INVALID_ARGUMENT", "backend: found 'vxlan'", wanted("two", backend="vxlan")),
            ("INVALID_ARGUMENT", "prefix length of at most 31", wanted("two", "198.18.1.0/32")),
            ("INVALID_ARGUMENT", "prefix length of at most 127", wanted("two", "fd77::/128")),
            ("INVALID_ARGUMENT", "one of each", wanted("two", "198.18.1.0/24", "198.18.2.0/24")),
            ("INVALID_ARGUMENT", "docker: found 'x'", wanted("two", docker="x")),
            ("INVALID_ARGUMENT", "open: found with internal", wanted("two", open=True, internal=True)),
        ):
            refused(code, match, lambda request=request: client.create_network(request))  # type: ignore[misc]
        for mode in ("node-block", "local"):
            request = wanted("two")
            request.mode = mode
            refused("INVALID_ARGUMENT", f"mode: found {mode}", lambda: client.create_network(request))  # noqa: B023
        request = wanted("two")
        request.block_v4 = 26
        refused("INVALID_ARGUMENT", "block_v4: found 26", lambda: client.create_network(request))
        routed = pb.CreateNetworkRequest(network=pb.Network(name="r", subnets=["198.18.9.0/24"], flood=True))
        refused("INVALID_ARGUMENT", "flood: found True with type routed", lambda: client.create_network(routed))
        routed.network.flood = False
        client.create_network(routed)
        for one, other in (("r", "one"), ("one", "r")):
            refused("FAILED_PRECONDITION", "network one is an overlay.*connect the container to both",
                    lambda one=one, other=other: client.connect_networks(one, other))  # type: ignore[misc]  # fmt: skip
        refused("FAILED_PRECONDITION", "network r is routed", lambda: client.share_network("r", "x"))
        client.create_pool("mine", spec("198.18.8.0/24", mode="local"))
        refused(
            "ALREADY_EXISTS", "a pool mine of its own", lambda: client.create_network(wanted("mine", "198.18.6.0/24"))
        )
        client.create_pool("two", spec("198.18.7.0/24"))
        refused("ALREADY_EXISTS", "has a pool two with another spec", lambda: client.create_network(wanted("two")))
        assert lab.keys(layout.NETWORKS) == ["one", "r"]
        assert lab.keys(layout.POOLS) == ["one", "r", "two"]


def test_two_nodes_at_once_choose_differently_and_leave_nothing_behind(lab: Lab) -> None:
    def create(node: Node, name: str) -> pb.Network:
        with node.client() as client:
            return client.create_network(wanted(name))

    made = []
    for number in range(5):
        with ThreadPoolExecutor() as pool:
            made += list(pool.map(create, (lab.a, lab.b), (f"a{number}", f"b{number}")))
    assert len({one.vni for one in made}) == len({one.subnets[0] for one in made}) == 10
    assert {one.vni for one in made} == set(range(256, 266))
    # Two of one name: both have the one that there is.
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(create, (lab.a, lab.b), ("same", "same"))
    assert first == second
    names = sorted([one.name for one in made] + ["same"])
    assert lab.keys(layout.NETWORKS) == lab.keys(layout.POOLS) == names
    with lab.a.client() as client:
        for number in range(5):
            client.create_network(wanted(f"more{number}"))
        refused("RESOURCE_EXHAUSTED", r"198\.18\.240\.0/20.*--subnet.*overlay_subnets",
                lambda: client.create_network(wanted("last")))  # fmt: skip
        assert lab.keys(layout.POOLS) == sorted([*names, *(f"more{number}" for number in range(5))])
        client.delete_network("a0")
        client.create_network(wanted("last"))


@looped
async def test_what_comes_in_between_two_looks_is_no_refusal(etcd: EtcdCluster, tmp_path: Path) -> None:
    """The same network of another node, made after the networks were read and before the pools were."""
    spec_ = PoolSpec((), mode="cluster-address")
    record = validated(NetworkRecord("same", type="overlay"))

    def choose(parts: str) -> Choice:
        return lambda asked, others, taken: complete(asked, others, parts_of(parts), taken)

    async with connected(etcd.sockets, f"/{tmp_path.name}/") as client:
        other = SharedNetworks(client, Mock(), Mock(), Mock(), Mock())

        class Late(SharedNetworks):
            looks = 0

            async def _state(self) -> Any:
                found = await super()._state()
                self.looks += 1
                if self.looks == 1:
                    await other.create_overlay(record, spec_, choose("198.18.7.0/24,24"))
                return found

        for parts in ("198.18.0.0/20,24", "198.18.7.0/24,24"):  # another choice; nothing is left to choose
            late = Late(client, Mock(), Mock(), Mock(), Mock())
            made, its_pool = await late.create_overlay(record, spec_, choose(parts))
            assert (made.vni, made.subnets, its_pool.range_sets[0][0].subnet) == (
                *(256, ("198.18.7.0/24",), "198.18.7.0/24"),
            )
            assert late.looks == 3
            await client.delete("", prefix=True)


def test_a_network_is_shared_with_docker_and_kept_while_it_is(lab: Lab) -> None:
    with lab.a.client() as to_a, lab.b.client() as to_b:
        to_a.create_network(wanted("one"))
        to_a.create_network(wanted("two"))
        wait_for("the networks on b", lambda: len(to_b.list_networks()) == 2)
        # What a newer version wrote stays.
        lab.write(Put(layout.NETWORKS + "one", layout.encode(lab.record("one"))[:-1] + b',"later":[7]}'))
        assert to_b.share_network("one", "blue").docker == "blue"
        assert b'"later":[7]' in lab.raw(layout.NETWORKS + "one")
        assert to_b.share_network("one", "blue").docker == "blue"
        refused("FAILED_PRECONDITION", "shows network one as blue", lambda: to_b.share_network("one", "green"))
        # Whether a has heard of it or not.
        refused("ALREADY_EXISTS", "shows network one as blue", lambda: to_a.share_network("two", "blue"))
        refused("FAILED_PRECONDITION", "docker network rm blue", lambda: to_a.delete_network("one"))
        wait_for("the name on a", lambda: to_a.get_network("one").docker == "blue")
        assert to_a.create_network(wanted("one")).docker == "blue"
        refused("NOT_FOUND", "no network three", lambda: to_a.share_network("three", "x"))
        refused("INVALID_ARGUMENT", "docker: ", lambda: to_a.share_network("one", "a\nb"))
        refused("INVALID_ARGUMENT", "docker: ", lambda: to_a.share_network("one", " a"))

        to_b.allocate(docker_key("c1"), pools=["one"])
        to_b.allocate(key("c2"), pools=["one"])
        refused("FAILED_PRECONDITION", "network one is in use: container c1 on node b has 198",
                lambda: to_a.share_network("one", ""))  # fmt: skip
        to_b.release(docker_key("c1"))
        assert to_a.share_network("one", "").docker == ""
        assert to_a.share_network("one", "").docker == ""
        assert lab.record("one").docker == ""
        refused("FAILED_PRECONDITION", "c2", lambda: to_a.delete_network("one"))
        to_b.release(key("c2"))
        to_a.delete_network("one")
        assert lab.keys(layout.NETWORKS) == lab.keys(layout.POOLS) == ["two"]


def test_two_networks_cannot_get_one_name_at_once(lab: Lab) -> None:
    def share(node: Node, name: str) -> str:
        with node.client() as client:
            try:
                client.share_network(name, "blue")
            except IpamError as error:
                return error.code.name
            return ""

    with lab.a.client() as client:
        client.create_network(wanted("one"))
        client.create_network(wanted("two"))
        for _ in range(4):
            with ThreadPoolExecutor() as pool:
                outcomes = list(pool.map(share, (lab.a, lab.b), ("one", "two")))
            assert sorted(outcomes) == ["", "ALREADY_EXISTS"]
            for name in ("one", "two"):
                client.share_network(name, "")


def test_a_mac_is_told_and_goes_with_its_address(lab: Lab) -> None:
    mac = "02:00:00:00:00:07"
    with lab.a.client() as to_a, lab.b.client() as to_b:
        to_a.create_network(wanted("one", "198.18.0.0/24", "fd77::/64"))
        to_a.create_pool("plain", spec("198.18.9.0/24", mode="cluster-address"))
        wait_for("both pools on b", lambda: len(to_b.list_pools()) == 2 and to_b.list_networks())
        made = to_a.allocate(key("c"), pools=["one"], requested=["198.18.0.7", "fd77::7"])
        to_a.set_mac("one", "198.18.0.7", "02-00-00-00-00-07")
        to_a.set_mac("one", "198.18.0.7", mac)
        told = lab.mac("one#198.18.0.7")
        assert told is not None
        assert (told.generation, told.mac) == (made.generation, mac)
        assert [pool_node.id for pool_node in to_a.list_nodes("a")] == [told.node_id]
        # That of its interface follows from the IPv4 address, so nothing needs to be told.
        to_a.set_mac("one", "fd77::7", "02:42:c6:12:00:07")
        assert lab.keys(layout.MACS) == ["one#198.18.0.7"]
        to_a.set_mac("one", "198.18.0.7", "02:42:C6:12:00:07")
        assert lab.keys(layout.MACS) == []
        for ip in ("198.18.0.7", "fd77::7"):
            to_a.set_mac("one", ip, mac)

        refused("FAILED_PRECONDITION", "held by node a", lambda: to_b.set_mac("one", "198.18.0.7", mac))
        refused("NOT_FOUND", "nobody holds 198.18.0.8", lambda: to_a.set_mac("one", "198.18.0.8", mac))
        refused("NOT_FOUND", "no network nothing", lambda: to_a.set_mac("nothing", "198.18.0.8", mac))
        refused("NOT_FOUND", "no network plain", lambda: to_a.set_mac("plain", "198.18.9.8", mac))
        refused("INVALID_ARGUMENT", "address: ", lambda: to_a.set_mac("one", "x", mac))
        refused("INVALID_ARGUMENT", "gateway's", lambda: to_a.set_mac("one", "198.18.0.7", "02:42:c6:12:00:01"))
        for bad in ("", "02:00:00:00:00", "01:00:00:00:00:07", "00:00:00:00:00:00", "02:00:00:00:00:0g"):
            refused("INVALID_ARGUMENT", "mac: ", lambda bad=bad: to_a.set_mac("one", "198.18.0.7", bad))  # type: ignore[misc]

        to_a.release(key("c"))
        wait_for("the end of address and MACs", lambda: not lab.keys(layout.ADDRESSES))
        assert lab.keys(layout.MACS) == []
        # Forgotten with its node.
        to_b.allocate(key("d"), pools=["one"], requested=["198.18.0.9", "fd77::9"])
        to_b.set_mac("one", "198.18.0.9", mac)
        lab.b.kill()
        to_a.remove_node("b", force=True)
        assert lab.keys(layout.ADDRESSES) == lab.keys(layout.MACS) == []


def test_as_many_as_etcd_takes_are_released_together(lab: Lab) -> None:
    """Address, index, MAC and cool-down of each; etcd takes 128 changes at a time."""
    with lab.a.client() as client:
        client.create_network(wanted("one", "198.18.0.0/24"))
        ips = [f"198.18.0.{number}" for number in range(2, 102)]
        for ip in ips:
            client.allocate(key(ip), pools=["one"], requested=[ip])
        for ip in ips[:5] + ips[-5:]:
            client.set_mac("one", ip, "02:00:00:00:00:07")
        assert len(lab.keys(layout.ADDRESSES)) == 100
        # In one commit, so that all of them are to be told at a time.
        request = pb.GarbageCollectRequest(client="cni", network="n", before=now())
        assert len(client.garbage_collect(request).released) == 100
        wait_for("their end", lambda: not lab.keys(layout.ADDRESSES))
        assert lab.keys(layout.MACS) == lab.keys(layout.OWNED) == []
        assert len(lab.keys(layout.FREED)) == 100


def test_macs_that_etcd_lost_are_told_again(lab: Lab) -> None:
    """By the look that a node takes when etcd comes back; here the test takes it, with the node's database."""
    with lab.a.client() as client:
        client.create_network(wanted("one", "198.18.0.0/24"))
        macs = {f"198.18.0.{number}": f"02:00:00:00:00:{number:02x}" for number in (7, 8, 9)}
        for ip, mac in macs.items():
            client.allocate(key(ip), pools=["one"], requested=[ip])
            client.set_mac("one", ip, mac)
        client.release(key("198.18.0.9"))
        client.set_mac("one", "198.18.0.8", "02:42:c6:12:00:08")  # what follows from the address
        wait_for("the release in etcd", lambda: len(lab.keys(layout.ADDRESSES)) == 2)
        node_id = client.list_nodes("a")[0].id
        lab.a.stop()
    told = lab.mac("one#198.18.0.7")
    lab.write(Delete(layout.MACS, True))

    async def look(etcd: Etcd) -> list[int]:
        store = ClusterStore(lab.a.database)
        transaction = Transaction(store)
        engine = Engine(transaction)
        try:
            macs = Macs(etcd, engine, transaction, node_id)
            return [await macs.look(), await macs.look()]
        finally:
            await engine.close()
            store.close()

    assert lab.ask(look) == [1, 0]
    assert lab.keys(layout.MACS) == ["one#198.18.0.7"]
    assert lab.mac("one#198.18.0.7") == told
    # By the node itself at its start.
    lab.write(Delete(layout.MACS, True))
    lab.a.start()
    wait_for("the MAC", lambda: lab.mac("one#198.18.0.7") == told)


def test_a_check_finds_macs_of_nobody(lab: Lab) -> None:
    with lab.a.client() as client:
        client.create_network(wanted("one", "198.18.0.0/24"))
        made = client.allocate(key("c"), pools=["one"], requested=["198.18.0.7"])
        client.set_mac("one", "198.18.0.7", "02:00:00:00:00:07")
        node = client.list_nodes("a")[0].id
        assert found(client) == []
        old = MacRecord(node, made.generation + 100, "02:00:00:00:00:08")
        lab.write(
            Put(layout.MACS + "one#198.18.0.8", layout.encode(old)),
            Put(layout.MACS + "one#198.18.0.9", b"x"),
        )
        assert found(client) == ["stale-mac 198.18.0.8 False", "stale-mac 198.18.0.9 False"]
        assert found(client, repair=True) == ["stale-mac 198.18.0.8 True", "stale-mac 198.18.0.9 True"]
        assert lab.keys(layout.MACS) == ["one#198.18.0.7"]
        lab.write(Put(layout.MACS + "one#198.18.0.7", layout.encode(old)))
        assert found(client, repair=True) == ["stale-mac 198.18.0.7 False"]
        assert found(client, repair=True) == ["stale-mac 198.18.0.7 True"]
        assert lab.keys(layout.MACS) == []


def found(client: Client, repair: bool = False) -> list[str]:
    differences = client.check_store(pb.CheckStoreRequest(repair=repair)).differences
    return [f"{one.kind} {one.address} {one.repaired}" for one in differences]


def test_older_members_are_kept_from_taking_one_for_a_routed_network(lab: Lab) -> None:
    def version() -> VersionRecord:
        pair = lab.ask(lambda etcd: etcd.get(layout.VERSION))
        assert pair is not None
        return layout.decode(VersionRecord, pair.key, pair.value)

    before = version()
    assert before.needs == 1
    # As a member of schema 1 writes it.
    lab.write(
        Put(layout.ALIVE + "old", b'{"id": "1", "boot_id": "2", "version": "0.9", "since_unix_s": 7}'),
        Put(layout.VERSION, layout.encode(msgspec.structs.replace(before, schema=1))),
    )
    with lab.a.client() as client:
        refused("FAILED_PRECONDITION", "node old runs version 0.9.*newer one there first",
                lambda: client.create_network(wanted("one")))  # fmt: skip
        assert lab.keys(layout.NETWORKS) == lab.keys(layout.POOLS) == []
        assert version().needs == 1
        client.create_network(pb.CreateNetworkRequest(network=pb.Network(name="pods", subnets=["198.18.9.0/24"])))
        lab.write(Put(layout.ALIVE + "old", layout.encode(AliveRecord("1", "2", "1.0", 7, 2))))
        client.create_network(wanted("one"))
        assert version() == VersionRecord(layout.SCHEMA, layout.OVERLAYS_NEED, before.cluster)
