"""A node as one of its cluster: who it is, how it joins, what an operator does with it."""

import asyncio
import socket
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cluster import layout
from cluster.etcd import Etcd
from cluster.layout import AliveRecord, BlockRecord, FreedRecord, NodeRecord
from ipamd.client import Client, IpamError
from ipamd.member.nodes import LeftForDead, Nodes
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cluster.daemons import Node
from tests.cluster.loop import connected
from tests.etcd import EtcdCluster
from tests.ipamd.clock import FakeClock
from tests.ipamd.daemon import WAIT_S, Daemon, cidrs, key, spec, wait_for

T = TypeVar("T")


class Lab:
    """Nodes of one cluster, which is the test's own."""

    def __init__(self, etcd: EtcdCluster, directory: Path, stack: ExitStack) -> None:
        self.etcd = etcd
        self.directory = directory
        self.prefix = f"/{directory.name}/"
        self._stack = stack

    def configured(self, name: str, settings: str = "", place: str = "") -> Node:
        """Not started."""
        return Node(self.directory / place, name, self.etcd.sockets, settings, prefix=self.prefix)

    def start(self, name: str, settings: str = "") -> Node:
        return self._stack.enter_context(self.configured(name, settings))

    def ask(self, question: Callable[[Etcd], Coroutine[Any, Any, T]]) -> T:
        """Asks etcd itself."""

        async def answer() -> T:
            async with connected(self.etcd.sockets, self.prefix) as etcd:
                return await question(etcd)

        return asyncio.run(answer())


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def lab(etcd: EtcdCluster, tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(etcd, tmp_path, stack)


def refusal(node: Node) -> str:
    """Why it does not start."""
    process = node.spawn()
    try:
        assert process.wait(WAIT_S) == 1
    finally:
        process.kill()
    return node.log.read_text()


def names(client: Client) -> list[tuple[str, bool, bool]]:
    return [(node.name, node.alive, node.draining) for node in client.list_nodes()]


def fill(client: Client, pool: str, count: int, prefix: str = "c") -> list[str]:
    return [cidrs(client.allocate(key(f"{prefix}{n}"), pools=[pool]))[0] for n in range(count)]


def test_nodes_are_listed_drained_and_removed(lab: Lab) -> None:
    a, b = lab.start("a", "[cluster]\nlease_s = 5\n"), lab.start("b", "[cluster]\nlease_s = 5\n")
    with a.client() as to_a, b.client() as to_b:
        to_a.create_pool("blue", spec("10.1.0.0/24", block_v4=26, cooldown_ms=0))
        wait_for("the pool on b", to_b.list_pools)
        fill(to_b, "blue", 70, "b")
        wait_for("all published", lambda: [n.addresses for n in to_a.list_nodes()] == [0, 70])
        (one, two) = to_a.list_nodes()
        assert (one.name, two.name, two.blocks, two.version != "", two.hostname != "") == ("a", "b", 2, True, True)

        # Drained: no new addresses, what was given stays, and empty blocks go back.
        assert to_a.drain_node("b").draining
        wait_for("b's word", lambda: to_b.status().draining)
        with pytest.raises(IpamError, match="node b is drained") as error:
            to_b.allocate(key("more"), pools=["blue"])
        assert error.value.code.name == "FAILED_PRECONDITION"
        with pytest.raises(IpamError, match="node b is drained"):
            to_b.status(pools=["blue"])
        assert not to_b.allocate(key("b0"), pools=["blue"]).created
        for n in range(70):
            to_b.release(key(f"b{n}"))
        wait_for("nothing is left with b", lambda: to_a.list_nodes()[1].blocks == 0)
        assert not to_a.drain_node("b", undo=True).draining
        wait_for("b gives again", lambda: not to_b.status().draining)
        fill(to_b, "blue", 10, "again")

        with pytest.raises(IpamError, match="node b is alive"):
            to_a.remove_node("b")
        with pytest.raises(IpamError, match="this is node a itself"):
            to_a.remove_node("a", force=True)
        with pytest.raises(IpamError, match="no node z"):
            to_a.drain_node("z")
        wait_for("published", lambda: to_a.list_nodes()[1].addresses == 10)
        b.kill()
        wait_for("b's lease is over", lambda: names(to_a) == [("a", True, False), ("b", False, False)])
        removed = to_a.remove_node("b")
        assert (removed.blocks, removed.addresses) == (1, 10)
        assert [node.name for node in to_a.list_nodes()] == ["a"]
        # Its blocks can be had by others now; b finds its name again, and what nobody took meanwhile.
        assert len(set(fill(to_a, "blue", 4 * 61))) == 4 * 61
        b.start()
        wait_for("b is back", lambda: names(to_a) == [("a", True, False), ("b", True, False)])


def test_addresses_of_a_removed_node_cool_down(lab: Lab) -> None:
    """More than one transaction takes; of a pool without a cool-down they can be had at once."""
    a, b = lab.start("a"), lab.start("b")
    with a.client() as to_a, b.client() as to_b:
        to_a.create_pool("slow", spec("10.2.0.0/24", mode="cluster-address", cooldown_ms=600_000))
        to_a.create_pool("fast", spec("10.3.0.0/24", mode="cluster-address", cooldown_ms=0))
        wait_for("both pools on b", lambda: len(to_b.list_pools()) == 2)
        taken = [cidrs(to_b.allocate(key(f"b{n}"), pools=["slow"]))[0].partition("/")[0] for n in range(59)]
        sticky = to_b.allocate(key("sticky"), pools=["slow"], workload="default/web-0")
        taken.append(cidrs(sticky)[0].partition("/")[0])
        other = cidrs(to_b.allocate(key("other"), pools=["fast"]))[0].partition("/")[0]
        b.kill()
        assert to_a.remove_node("b", force=True).addresses == 61

        async def freed(etcd: Etcd) -> dict[str, tuple[str, int]]:
            pairs = (await etcd.range(layout.FREED)).pairs
            return {
                pair.key.removeprefix(layout.FREED): (
                    layout.decode(FreedRecord, pair.key, pair.value).node,
                    await etcd.time_to_live(pair.lease),
                )
                for pair in pairs
            }

        rests = lab.ask(freed)
        assert set(rests) == {f"slow#{ip}" for ip in taken}
        assert {node for node, _ in rests.values()} == {"b"}
        assert min(seconds for _, seconds in rests.values()) > 300

        def heard() -> bool:
            return [(pool.usage[0].cooling, pool.usage[0].elsewhere) for pool in to_a.list_pools()] == [(0, 0), (60, 0)]

        wait_for("a has heard of all", heard)
        with pytest.raises(IpamError, match="cool") as error:
            to_a.allocate(key("mine"), pools=["slow"], requested=[taken[0]])
        assert error.value.code.name == "UNAVAILABLE"
        assert cidrs(to_a.allocate(key("other"), pools=["fast"], requested=[other])) == [f"{other}/24"]
        # As after a release: the workload itself may go on with its address elsewhere.
        assert cidrs(to_a.allocate(key("sticky"), pools=["slow"], workload="default/web-0")) == cidrs(sticky)
        rest = [cidrs(to_a.allocate(key(f"a{n}"), pools=["slow"]))[0].partition("/")[0] for n in range(253 - 60)]
        assert set(rest).isdisjoint(taken)


def test_a_removed_node_that_comes_back_has_its_addresses_again(lab: Lab) -> None:
    """At once, unless somebody else had them meanwhile: then when they have cooled down."""
    a, b = lab.start("a"), lab.start("b")
    with a.client() as to_a, b.client() as to_b:
        to_a.create_pool("pool", spec("10.2.0.0/29", mode="cluster-address", cooldown_ms=600_000))
        wait_for("the pool on b", to_b.list_pools)
        theirs = cidrs(to_b.allocate(key("b"), pools=["pool"]))
        lent = cidrs(to_b.allocate(key("b2"), pools=["pool"]))[0].partition("/")[0]
        to_a.remove_node("b", force=True)
        of_another = layout.FREED + layout.place("pool", lent)
        lab.ask(lambda etcd: etcd.put(of_another, layout.encode(FreedRecord("c", "another"))))
        wait_for("b's claim", lambda: [node.addresses for node in to_a.list_nodes()] == [0, 1])
        assert cidrs(to_b.allocate(key("b"), pools=["pool"])) == theirs
        assert lab.ask(lambda etcd: etcd.count(layout.FREED)) == 1
        assert [one.address for one in to_b.check_store(pb.CheckStoreRequest()).differences] == [lent]
        lab.ask(lambda etcd: etcd.delete(of_another))
        wait_for("b's other claim", lambda: [node.addresses for node in to_a.list_nodes()] == [0, 2])
        to_b.release(key("b2"))
        wait_for("its end", lambda: [node.addresses for node in to_a.list_nodes()] == [0, 1])
        lab.ask(lambda etcd: etcd.delete(of_another))
        wait_for("both heard of it", lambda: counts(to_a) == (0, 1, 0, "4") and counts(to_b) == (1, 0, 0, "4"))
        wait_for("no difference", lambda: not to_b.check_store(pb.CheckStoreRequest()).differences)
        assert lab.ask(lambda etcd: etcd.count(layout.FREED)) == 0
        ours = {cidrs(to_a.allocate(key(f"a{n}"), pools=["pool"]))[0] for n in range(4)}
        assert ours.isdisjoint(theirs)
        for client, allocated in ((to_a, 4), (to_b, 1)):
            wait_for("the counts", lambda client=client, count=allocated: counts(client) == (count, 5 - count, 0, "0"))  # type: ignore[misc]


def counts(client: Client) -> tuple[int, int, int, str]:
    (usage,) = client.get_pool("pool").usage
    return usage.allocated, usage.elsewhere, usage.cooling, usage.free


def test_two_nodes_of_one_name_are_refused(lab: Lab) -> None:
    a = lab.start("a")
    with a.client() as client:
        (known,) = client.list_nodes()
    other = lab.configured("a", place="elsewhere")
    text = refusal(other)
    assert "the cluster has a node a already" in text
    assert known.id in text
    assert known.hostname in text
    assert "netloom node remove a" in text
    with a.client() as client:
        assert names(client) == [("a", True, False)]


def test_a_name_that_was_taken_while_etcd_was_away(tmp_path: Path) -> None:
    """The first is away while it is removed and another one takes its name; it comes back with etcd down."""
    with EtcdCluster() as etcd, ExitStack() as stack:
        lab = Lab(etcd, tmp_path, stack)
        first, helper = lab.start("a", "[cluster]\nlease_s = 5\n"), lab.start("h")
        with first.client() as client:
            client.create_pool("blue", spec("10.1.0.0/24"))
            fill(client, "blue", 5)
        first.kill()
        with helper.client() as client:
            wait_for("a's lease is over", lambda: names(client)[0] == ("a", False, False))
            client.remove_node("a")
        second = stack.enter_context(lab.configured("a", "[cluster]\nlease_s = 5\n", place="elsewhere"))
        etcd.kill("m1")
        first.start()
        with first.client() as client:
            fill(client, "blue", 10)
            etcd.start("m1")
            wait_for("its word", lambda: "the cluster does not take this node" in first.log.read_text())
            with pytest.raises(IpamError, match="the cluster has a node a already"):
                client.allocate(key("new"), pools=["blue"])
            assert not client.allocate(key("c0"), pools=["blue"]).created
        with second.client() as client:
            fill(client, "blue", 5, "s")


def test_a_copy_of_a_node_is_told_from_the_node_after_a_reboot(lab: Lab) -> None:
    a = lab.start("a", "[cluster]\nlease_s = 5\n")
    with a.client() as client:
        client.create_pool("blue", spec("10.1.0.0/24"))
        taken = fill(client, "blue", 3)
        (known,) = client.list_nodes()
    assert a.stop() == 0
    ghost = layout.encode(AliveRecord(known.id, "another-boot", "1", 0))

    async def reboot(etcd: Etcd) -> None:
        """As the last boot left it: under a lease."""
        await etcd.put(layout.ALIVE + "a", ghost, (await etcd.grant(5)).id)

    lab.ask(reboot)
    a.start()
    with a.client() as client:
        assert fill(client, "blue", 3) == taken
        wait_for("a has joined", lambda: a.log.read_text().count("joined the cluster") == 2)
    assert a.stop() == 0

    async def copy(etcd: Etcd) -> None:
        """As somebody who stays alive."""
        await etcd.put(layout.ALIVE + "a", ghost)

    lab.ask(copy)
    a.start()
    with a.client() as client:
        wait_for("its word", lambda: "one of the two runs on a copy of the other's disk" in a.log.read_text())
        with pytest.raises(IpamError, match="on a copy of the other's disk"):
            client.allocate(key("more"), pools=["blue"])


def test_what_refuses_to_start(lab: Lab, etcd: EtcdCluster) -> None:
    nowhere = Node(lab.directory, "n", ["unix:/nowhere/etcd"], "", prefix=lab.prefix)
    assert "this node was never one of its cluster" in refusal(nowhere)
    a = lab.start("a")
    with a.client() as client:
        client.create_pool("blue", spec("10.1.0.0/24"))
    assert a.stop() == 0
    text = a.config.read_text()

    def with_(old: str, new: str) -> str:
        a.log.unlink()
        a.config.write_text(text.replace(old, new))
        return refusal(a)

    assert "is empty, and this node is of cluster" in with_(f'prefix = "{lab.prefix}"', 'prefix = "/other/"')
    assert "with pools blue: set kind" in with_('kind = "etcd"', 'kind = "sqlite"')
    assert "this node is a in its cluster, and is called b now" in with_('node = "a"', 'node = "b"')
    foreign = Node(lab.directory / "foreign", "f", etcd.sockets, "", prefix="/foreign/")
    with foreign:
        pass
    assert "is of cluster" in with_(f'prefix = "{lab.prefix}"', 'prefix = "/foreign/"')

    async def demand(to_etcd: Etcd) -> None:
        pair = await to_etcd.get(layout.VERSION)
        assert pair is not None
        record = layout.decode(layout.VersionRecord, layout.VERSION, pair.value)
        await to_etcd.put(layout.VERSION, layout.encode(layout.VersionRecord(9, 9, record.cluster)))

    lab.ask(demand)
    assert f"needs schema 9, and this ipamd knows up to {layout.SCHEMA}" in with_("", "")


def test_a_local_store_takes_no_pool_of_a_cluster(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        with pytest.raises(IpamError, match="mode node-block wants a cluster") as error:
            client.create_pool("blue", spec("10.1.0.0/24", mode="node-block"))
        assert error.value.code.name == "FAILED_PRECONDITION"
        with pytest.raises(IpamError, match="not one of a cluster"):
            client.list_nodes()


def test_the_status_tells_of_etcd(lab: Lab) -> None:
    a = lab.start("a")
    with a.client() as client:
        status = client.status()
        assert (status.store, status.etcd_reachable, status.draining) == ("etcd", True, False)
        (endpoint,) = status.etcd
        assert (endpoint.leader, endpoint.error, endpoint.version[:2]) == (True, "", "3.")


def test_metrics_and_warnings(lab: Lab) -> None:
    a = lab.configured("a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        page = f"127.0.0.1:{probe.getsockname()[1]}"
    a.config.write_text(a.config.read_text().replace('http_listen = ""', f'http_listen = "{page}"'))

    def metrics() -> str:
        with urllib.request.urlopen(f"http://{page}/metrics", timeout=WAIT_S) as answer:
            return str(answer.read().decode())

    with a, a.client() as client:
        client.create_pool("blue", spec("10.1.0.0/24", block_v4=26))
        fill(client, "blue", 61)
        wait_for("its blocks", lambda: 'pool_blocks{family="ipv4",pool="blue"} 2.0' in metrics())
        text = metrics()
        for line in (
            "netloom_ipamd_etcd_reachable 1.0",
            "netloom_ipamd_cluster_joined 1.0",
            "netloom_ipamd_draining 0.0",
            "netloom_ipamd_blocks_claimed_total 2.0",
            'netloom_ipamd_pool_blocks_total{family="ipv4",pool="blue"} 4.0',
            'netloom_ipamd_etcd_seconds_count{operation="claim"} 2.0',
        ):
            assert line in text, line
        wait_for("it is published", lambda: "netloom_ipamd_unpublished 0.0" in metrics())
        assert "% full" not in a.log.read_text()
        fill(client, "blue", 4 * 61)
        wait_for("the warning", lambda: "pool is 95 % full" in a.log.read_text())


def test_what_a_crash_between_etcd_and_the_store_leaves(lab: Lab) -> None:
    """A block that etcd gave this node and the store never heard of; and one that etcd lost."""
    a = lab.start("a")
    with a.client() as client:
        client.create_pool("blue", spec("10.1.0.0/24", cooldown_ms=0))
        taken = fill(client, "blue", 3)
        (node,) = client.list_nodes()
        wait_for("published", lambda: not client.status().unpublished)
    a.kill()

    async def tamper(etcd: Etcd) -> None:
        (held,) = (await etcd.range(layout.BLOCKS)).pairs
        await etcd.delete(held.key)
        for third in (0, 64, 128, 192):
            other = layout.BLOCKS + layout.place("blue", f"10.1.0.{third}/26")
            if other != held.key:
                await etcd.put(other, layout.encode(BlockRecord("a", node.id)))

    lab.ask(tamper)
    a.start()
    with a.client() as client:
        wait_for("all are known", lambda: "etcd had lost a block" in a.log.read_text())
        assert fill(client, "blue", 3) == taken
        assert len(set(fill(client, "blue", 4 * 61))) == 4 * 61


def test_nodes_that_are_silent_for_the_grace_are_removed(lab: Lab) -> None:
    async def play(etcd: Etcd) -> None:
        clock = FakeClock()
        left = LeftForDead(etcd, Nodes(etcd, "own", lambda _pool: 0.0), clock, "own", 100.0)
        for name in ("own", "dead", "alive"):
            await etcd.put(layout.NODES + name, layout.encode(NodeRecord(f"id-{name}", name, 0)))
            await etcd.put(
                layout.BLOCKS + layout.place("p", f"10.0.{len(name)}.0/26"),
                layout.encode(BlockRecord(name, f"id-{name}")),
            )
        await etcd.put(layout.ALIVE + "alive", layout.encode(AliveRecord("id-alive", "b", "1", 0)))

        async def nodes() -> list[str]:
            return [pair.key for pair in (await etcd.range(layout.NODES)).pairs]

        for _ in range(20):
            await left.look()
            assert len(await nodes()) == 3
            clock.advance(5.0)
        # A gap in which nobody looked counts for nothing.
        clock.advance(1000.0)
        await left.look()
        assert len(await nodes()) == 3
        for _ in range(20):
            clock.advance(5.0)
            await left.look()
        assert await nodes() == ["nodes/alive", "nodes/own"]
        blocks = (await etcd.range(layout.BLOCKS)).pairs
        assert {layout.decode(BlockRecord, pair.key, pair.value).node for pair in blocks} == {"own", "alive"}

    lab.ask(play)
