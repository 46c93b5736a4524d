"""Networks that are defined once, over three hosts with all of Netloom and one etcd."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from tests.cni.chained.traffic import Query, ask, no_answer, serving, until
from tests.hosts import IPV6, Netns, wait_until
from tests.many_hosts.fleet import Container, Pinger, assert_loses, routes_of_netd, settle
from tests.many_hosts.pods import Pods, outside_of

pytestmark = pytest.mark.kernel

PODS6 = ("--subnet", "fd02::/64", "--block6", "120") if IPV6 else ()
WEB6 = ("--subnet", "fd03::/64", "--block6", "120") if IPV6 else ()
# Backend, and what remains of 1500 bytes with an IPv4 underlay (RFC 7348: 50 bytes go).
BACKENDS = {"vxlan": 1450, "host-gw": 1500}

# A datagram that may not be cut (IP_MTU_DISCOVER: IP_PMTUDISC_DO), and its answer.
_LARGE = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.setsockopt(socket.IPPROTO_IP, 10, 2)
    one.settimeout(2)
    one.connect((sys.argv[1], 53))
    one.send(bytes(int(sys.argv[2])))
    one.recv(100)
"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pods]:
    with Pods((4, 6) if IPV6 else (4,)) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def outside(fleet: Pods) -> Netns:
    return outside_of(fleet)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, fleet: Pods) -> Iterator[str]:
    """Two networks of a backend, pods and web; gone after the tests."""
    name = str(request.param)
    pods = ("network", "create", "pods", "--subnet", "10.2.0.0/16", "--block", "24", *PODS6, "--backend", name)
    fleet.netloom(1, *pods)
    fleet.netloom(2, "network", "create", "web", "--subnet", "10.3.0.0/16", *WEB6, "--backend", name)
    for network in ("pods", "web"):
        fleet.until_known(network)
    yield name
    for network in ("pods", "web"):
        fleet.netloom(3, "network", "delete", network)


@pytest.fixture
def pods(fleet: Pods, backend: str) -> Iterator[list[Container]]:
    """A container of pods on each host."""
    made = [fleet.pod(number, "pods") for number in (1, 2, 3)]
    fleet.until_ways(*made)
    yield made
    fleet.release_all()


def ports_of(*containers: Container) -> list[Query]:
    return [("tcp", address, 80) for one in containers for address in (one.ipv4, one.ipv6) if address]


def whole(one: Container, other: Container, size: int) -> bool:
    """Whether a packet of this size gets there in one piece, and an answer comes."""
    argv = [sys.executable, "-I", "-S", "-c", _LARGE, other.ipv4, str(size - 28)]  # but for headers of IP and UDP
    return one.netns.run(argv, check=False).returncode == 0


def all_reach_all_with_their_own_addresses(containers: list[Container]) -> None:
    with ExitStack() as servers:
        for one in containers:
            servers.enter_context(serving(one.netns, one.id, "tcp:80"))
        for one in containers:
            for other in containers:
                if one is not other:
                    own = [address for address in (one.ipv4, one.ipv6) if address]
                    assert ask(one.netns, *ports_of(other)) == [f"{other.id} {address}" for address in own]


def test_every_container_reaches_every_other_with_its_own_address(
    fleet: Pods, backend: str, pods: list[Container]
) -> None:
    all_reach_all_with_their_own_addresses(pods)
    for one in pods:
        fleet.check(one)
    devices = {one["dev"] for one in routes_of_netd(fleet.host(1))}
    assert devices == {"nl-vx1" if backend == "vxlan" else "eth0"}
    explained = fleet.netd(1).explain(pods[1].ipv4)
    assert (explained.node, explained.network, explained.backend) == ("host2", "pods", backend)


def test_the_mtu_of_the_way_is_inside(fleet: Pods, backend: str, pods: list[Container]) -> None:
    assert [fleet.fabric(number)["pods"]["mtu"] for number in (1, 2, 3)] == [BACKENDS[backend]] * 3
    for one, other in zip(pods, [*pods[1:], pods[0]], strict=True):
        assert one.netns.links()["eth0"]["mtu"] == BACKENDS[backend]
        with serving(other.netns, "large", "udp:53"):
            wait_until(partial(whole, one, other, BACKENDS[backend]), "an answer to a packet that fills the MTU")


def test_the_outside_by_masquerade_and_published_ports(
    fleet: Pods, backend: str, pods: list[Container], outside: Netns
) -> None:
    published = fleet.pod(2, "pods", (8080, 80))
    host, there = fleet.underlay_address(2, 4), fleet.underlays[0].address(99)
    with serving(published.netns, "published", "tcp:80"), serving(outside, "outside", "tcp:80"):
        assert ask(pods[0].netns, ("tcp", there, 80)) == [f"outside {fleet.underlay_address(1, 4)}"]
        # From outside, from another host, from a container of another host.
        assert ask(outside, ("tcp", host, 8080)) == [f"published {there}"]
        assert ask(fleet.host(1), ("tcp", host, 8080)) == [f"published {fleet.underlay_address(1, 4)}"]
        assert ask(pods[2].netns, ("tcp", host, 8080))[0].startswith("published ")
        # What is not published is not reached, though there is a way.
        outside.run(["ip", "route", "replace", "10.2.0.0/16", "via", host])
        assert no_answer(outside, ("tcp", published.ipv4, 80)) == [""]


def test_networks_are_apart_on_all_hosts_until_they_are_connected(
    fleet: Pods, backend: str, pods: list[Container]
) -> None:
    webs = [fleet.pod(number, "web") for number in (1, 2, 3)]
    fleet.until_ways(*webs)
    ways = [(one, web) for one in pods for web in webs] + [(web, one) for one in pods for web in webs]

    def answers(one: Container) -> set[str]:
        return set(no_answer(one.netns, *ports_of(*(webs if one in pods else pods))))

    def apart() -> bool:
        """Of both families; they wait beside one another."""
        return set().union(*waiting.map(answers, [*pods, *webs])) == {""}

    with ExitStack() as servers, ThreadPoolExecutor(6) as waiting:
        for one in (*pods, *webs):
            servers.enter_context(serving(one.netns, one.id, "tcp:80"))
        assert apart()
        fleet.netloom(1, "network", "connect", "pods", "web")
        for one, other in ways:
            until(one.netns, ("tcp", other.ipv4, 80), f"{other.id} {one.ipv4}")
            if one.ipv6:
                until(one.netns, ("tcp", other.ipv6, 80), f"{other.id} {one.ipv6}")
        for one in (*pods, *webs):
            fleet.check(one)
        fleet.netloom(3, "network", "disconnect", "web", "pods")
        wait_until(apart, "their parting")
        assert ask(pods[0].netns, *ports_of(pods[1]))[0] == f"{pods[1].id} {pods[0].ipv4}"
        for one in (*pods, *webs):
            fleet.check(one)


def test_who_has_none_of_a_network_is_apart_from_it_too(fleet: Pods, backend: str) -> None:
    """Then that host's kernel does not know of it: the others guard it, who must see where packets come from."""
    old = fleet.pod(1, "pods")  # its block stays with the host, and an address of it at the tunnel's end
    web, pod = fleet.pod(1, "web"), fleet.pod(2, "pods")
    fleet.until_ways(web, pod)
    fleet.release(old)
    with serving(pod.netns, "pod", "tcp:80"), serving(web.netns, "web", "tcp:80"):
        assert ask(fleet.host(2), *ports_of(pod))[0].startswith("pod ")
        assert set(no_answer(web.netns, *ports_of(pod))) == {""}
        assert set(no_answer(pod.netns, *ports_of(web))) == {""}
    fleet.release(web, pod)


def test_a_network_in_use_is_not_deleted_whoever_uses_it(fleet: Pods, backend: str, pods: list[Container]) -> None:
    fleet.release(pods[0], pods[2])
    done = fleet.try_netloom(1, "network", "delete", "pods")
    assert done.returncode != 0
    assert pods[1].id in done.stderr
    assert "host2" in done.stderr
    assert fleet.pod(1, "pods").ipv4.startswith("10.2.")


def test_etcd_away(fleet: Pods, backend: str, pods: list[Container]) -> None:
    """Traffic goes on, and containers come and go with addresses of the blocks that a host has."""
    pinger = Pinger(pods[0].netns, pods[1].ipv4)
    fleet.etcd.kill("m1")
    try:
        more = [fleet.pod(number, "pods") for number in (1, 2, 3)]
        all_reach_all_with_their_own_addresses([*pods, *more])
        assert {one.netns.links()["eth0"]["mtu"] for one in more} == {BACKENDS[backend]}
        fleet.release(*more)
    finally:
        fleet.etcd.start("m1")
    sent, lost = pinger.stop()
    assert sent > 20
    assert lost == 0


def test_another_backend_of_the_network(fleet: Pods, backend: str, pods: list[Container]) -> None:
    """Changed where it is defined, and changed back: each host follows as soon as it hears of it."""
    other = next(name for name in BACKENDS if name != backend)
    key = "/netloom/networks/pods"
    before = fleet.etcd.etcdctl("get", "--print-value-only", key).strip()

    def put(record: str, name: str) -> None:
        fleet.etcd.etcdctl("put", key, record)
        for one in pods:
            for two, host in zip(pods, fleet.hosts, strict=True):
                if one is not two:
                    device = "eth0" if name == "host-gw" else "nl-vx1"
                    wait_until(partial(fleet.goes_by, host, one.ipv4, device), f"{one.ipv4} by {device}")

    def both() -> None:
        put(json.dumps({**json.loads(before), "backend": other}), other)
        settle(0.5)
        put(before, backend)

    assert_loses(5, pods, both)
