"""Overlay networks over three hosts: who reaches whom and how, and what that costs the underlay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from tests.cni.chained.test_firewall import bridge_netfilter, dropping
from tests.cni.chained.traffic import ask, no_answer, serving
from tests.hosts import IPV6, Netns, wait_until
from tests.many_hosts.overlays import addresses, assert_apart, assert_reach, at_port_80, counted, resolve, state, web
from tests.many_hosts.pods import Pods, conf_of, outside_of
from tests.many_hosts.test_podman import podman, prepare, start
from tests.many_hosts.test_podman import web as web_of_podman
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import OWN

pytestmark = pytest.mark.kernel

OV1 = ("--subnet", "10.20.0.0/24", *(("--subnet", "fd20::/64") if IPV6 else ()))
MTU = 1450  # RFC 7348: over IPv4, 50 of 1500 bytes go

# A datagram that may not be cut (IP_MTU_DISCOVER: IP_PMTUDISC_DO), and its answer.
LARGE = """
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
    with Pods((4, 6) if IPV6 else (4,), own=OWN) as made:
        made.start()
        made.overlay("ov1", *OV1)  # of both families
        made.overlay("ov2")  # of IPv4, as it is chosen
        yield made


@pytest.fixture(scope="module")
def outside(fleet: Pods) -> Netns:
    return outside_of(fleet)


@pytest.fixture
def released(fleet: Pods) -> Iterator[None]:
    yield
    fleet.release_all()


@pytest.fixture(params=["passing", "bridge-nf", "bridge-nf, dropping"])
def surroundings(fleet: Pods, request: pytest.FixtureRequest) -> Iterator[str]:
    """What else the hosts have: frames within a bridge pass iptables or not, and that drops what it forwards."""
    with ExitStack() as stack:
        for host in fleet.hosts:
            stack.enter_context(bridge_netfilter(host, "bridge-nf" in request.param))
            if "dropping" in request.param:
                stack.enter_context(dropping(host))
        yield str(request.param)
        fleet.release_all()  # before the other firewall goes, which is to have nothing of ours then


def test_who_reaches_whom(fleet: Pods, surroundings: str, outside: Netns) -> None:
    """All of a network each other, with their own addresses, on one host and over hosts; nobody of another; the outside
    by the own host's address; and who is on both, both."""
    ones = [fleet.pod(number, "ov1") for number in (1, 2, 3)]
    twos = [fleet.pod(1, "ov2"), fleet.pod(2, "ov2", (8080, 80))]
    both = fleet.pod(3, "ov1")
    both_too = fleet.attach(both, "ov2", "eth1")
    here = [fleet.underlay_address(number, 4) for number in (1, 2, 3)]  # by host
    there = fleet.underlays[0].address(99)
    with web(*ones, *twos, both), serving(outside, "outside", "tcp:80"):
        assert_reach([*ones, both])
        assert_reach([*twos, both_too])
        assert_apart(ones, twos)
        for pod, source in zip((*ones, *twos), (*here, *here), strict=False):
            assert ask(pod.netns, ("tcp", there, 80)) == [f"outside {source}"]
        if IPV6:
            out = ("tcp", fleet.underlays[0].address(99, 6), 80)
            assert ask(ones[1].netns, out) == [f"outside {fleet.underlay_address(2, 6)}"]
        # A host has its own containers; those of others see its address as that of their own gateway.
        for host, own in zip(fleet.hosts, ((ones[0], twos[0]), (ones[1], twos[1]), (ones[2], both)), strict=True):
            found = [answer.partition(" ")[0] for answer in ask(host, *at_port_80(*own))]
            assert found == [pod.id for pod in own for _ in addresses(pod)]
        # The published port: from outside, the other hosts, and containers of another host and of another network.
        published = ("tcp", here[1], 8080)
        assert ask(outside, published) == [f"{twos[1].id} {there}"]
        assert ask(fleet.host(1), published) == [f"{twos[1].id} {here[0]}"]
        for pod in (ones[0], ones[1], twos[0]):
            assert ask(pod.netns, published)[0].startswith(f"{twos[1].id} ")
        # What is not, is not reached, though there is a way.
        outside.run(["ip", "route", "replace", f"{twos[1].ipv4}/32", "via", here[1]])
        assert no_answer(outside, ("tcp", twos[1].ipv4, 80)) == [""]
        outside.run(["ip", "route", "delete", f"{twos[1].ipv4}/32"])
    for pod in (*ones, *twos, both):
        fleet.check(pod)


def test_one_gateway_of_one_mac_on_every_host(fleet: Pods, released: None) -> None:
    pods = [fleet.pod(number, "ov1") for number in (1, 2, 3)]
    for pod in pods:
        links, found = pod.netns.links(), fleet.host(fleet.where(pod)).addresses()["nl-ov1"]
        assert set(found) == {"10.20.0.1/24", *(["fd20::1/64"] if IPV6 else [])}
        assert links["eth0"]["mtu"] == MTU
        assert links["eth0"]["address"] == "02:42:" + ip_address(pod.ipv4).packed.hex(":")
        assert fleet.host(fleet.where(pod)).links()["nl-ov1"]["address"] == "02:42:0a:14:00:01"
        pod.ping("10.20.0.1")
        assert pod.netns.run(["ip", "neigh", "show", "10.20.0.1"]).stdout.split()[4] == "02:42:0a:14:00:01"


def test_what_fills_the_mtu_passes_in_one_piece(fleet: Pods, released: None) -> None:
    one, two = fleet.pod(1, "ov1"), fleet.pod(2, "ov1")
    with serving(two.netns, "large", "udp:53"):
        for size, passes in ((MTU, True), (MTU + 1, False)):
            argv = [sys.executable, "-I", "-S", "-c", LARGE, two.ipv4, str(size - 28)]  # but for headers of IP and UDP
            assert (one.netns.run(argv, check=False).returncode == 0) is passes, size


def test_what_the_runtime_asks_for(fleet: Pods, released: None) -> None:
    """An address on any host; a MAC, which the others are told of, also who waits for the address already; limits."""
    near, far = fleet.pod(2, "ov1"), fleet.pod(3, "ov1")
    wanted = ["10.20.0.77/24", *(["fd20::77/64"] if IPV6 else [])]
    mac = "02:00:5e:00:00:77"
    pod = fleet.pod(1, "ov1", ips=wanted, mac=mac, bandwidth={"ingressRate": 10**9, "ingressBurst": 10**8})
    assert addresses(pod) == [one.partition("/")[0] for one in wanted]
    assert pod.netns.links()["eth0"]["address"] == mac
    with web(pod, near, far):
        assert_reach([pod, near, far])
    for one in (near, far):
        for address in addresses(pod):
            assert one.netns.run(["ip", "neigh", "show", address]).stdout.split()[4] == mac
    assert "rate 1Gbit" in fleet.host(1).run(["tc", "qdisc", "show"]).stdout
    fleet.check(pod)
    taken = fleet.host(2).netns("taken")
    refused = fleet.ask("ADD", 2, conf_of("ov1", ips=wanted), container_id="taken", netns=taken)
    assert refused.code() > 0
    assert "10.20.0.77" in refused.stdout
    assert "host1" in refused.stdout
    taken.delete()


def test_an_internal_one_has_no_way_out(fleet: Pods, outside: Netns) -> None:
    fleet.overlay("inner", "--internal")
    one, two, other = fleet.pod(1, "inner"), fleet.pod(2, "inner"), fleet.pod(1, "ov1")
    out = ("tcp", fleet.underlays[0].address(99), 80)
    with web(one, two, other), serving(outside, "outside", "tcp:80"):
        assert_reach([one, two])
        assert_apart([one, two], [other])
        assert not [route for route in one.netns.routes() if route["dst"] == "default"]
        gateway = str(ip_address(int(ip_address(one.ipv4)) & ~0xFF | 1))
        one.netns.run(["ip", "route", "add", "default", "via", gateway])
        assert no_answer(one.netns, out, *at_port_80(other)) == [""] * (1 + len(addresses(other)))
        assert ask(other.netns, out) != [""]
    fleet.release_all()
    fleet.netloom(2, "network", "delete", "inner")


def test_nothing_is_asked_on_the_underlay(fleet: Pods, released: None) -> None:
    """Neighbours are known to every host; and what nobody knows goes nowhere."""
    one, two, three = (fleet.pod(number, "ov1") for number in (1, 2, 3))
    one.ping(two.ipv4)
    with counted(fleet.underlays[0]) as frames:
        assert resolve(one.netns, one.ipv4, [two.ipv4, three.ipv4], 1000) == 1000
        if IPV6:
            assert resolve(one.netns, one.ipv6, [two.ipv6, three.ipv6], 1000) == 1000
        for pod in (one, two, three):
            pod.netns.run(["ip", "neigh", "flush", "dev", "eth0"])
        with web(one, two, three):
            assert_reach([one, two, three])
        assert resolve(one.netns, one.ipv4, ["10.20.0.250"], 20) == 0
        if IPV6:
            assert resolve(one.netns, one.ipv6, ["fd20::fa"], 20) == 0
    assert frames.all > 20
    assert (frames.to_many, frames.resolving) == (0, 0)


def test_one_that_floods_carries_what_nobody_knows(fleet: Pods) -> None:
    """To hosts that are on it, and back, also from an interface of which ipamd does not know."""
    device = fleet.overlay("wild", "--subnet", "10.30.0.0/24", "--flood")
    one, two = fleet.pod(1, "wild"), fleet.pod(2, "wild")
    assert resolve(one.netns, one.ipv4, ["10.30.0.200"], 1) == 0
    host = fleet.host(2)
    host.run(["ip", "link", "add", "hand0", "master", "nl-wild", "up", "type", "veth", "peer", "name", "eth9"])
    try:
        host.run(["ip", "link", "set", "eth9", "netns", two.netns.path])
        for words in (["address", "add", "10.30.0.200/32", "dev", "eth9"], ["link", "set", "eth9", "up"]):
            two.netns.run(["ip", *words])
        with counted(fleet.underlays[0]) as frames:
            assert resolve(one.netns, one.ipv4, ["10.30.0.200"], 1) == 1
            one.ping("10.30.0.200")
        assert frames.to_many > 0
        with counted(fleet.underlays[0]) as frames:
            assert resolve(one.netns, one.ipv4, [two.ipv4], 100) == 100
        assert frames.resolving == 0
        assert not any("00:00:00:00:00:00" in line for line in state(fleet.host(3), "wild", device))
    finally:
        host.run(["ip", "link", "delete", "hand0"])
    fleet.release_all()
    fleet.netloom(2, "network", "delete", "wild")


@pytest.fixture
def engines(fleet: Pods) -> Iterator[None]:
    """podman on the first two hosts, with one conflist of one plugin."""
    plugin = {"type": "netloom", "network": "ov1", "capabilities": {"portMappings": True, "ips": True, "mac": True}}
    conflist = {"cniVersion": "1.0.0", "name": "blue", "plugins": [plugin]}
    try:
        for number, host in enumerate(fleet.hosts[:2], 1):
            prepare(host, conflist)
            podman(fleet, number, "import", "-", images.NAME, input=images.root_tar())
        yield
    finally:
        for number in (1, 2):
            podman(fleet, number, "rm", "-f", "-t", "0", "-a", check=False)
        cgroups.remove()


def test_podman_with_the_networks_name(fleet: Pods, engines: None, outside: Netns, released: None) -> None:
    pod = fleet.pod(3, "ov1")
    one, there = start(fleet, 1, "one", "--ip", "10.20.0.88", network="blue")
    two, here = start(fleet, 2, "two", "-p", "8081:80", network="blue")
    assert one == "10.20.0.88"
    with serving(here, "two", "tcp:81"), serving(there, "one", "tcp:81"), serving(pod.netns, "pod", "tcp:81"):
        assert ask(there, ("tcp", two, 81), ("tcp", pod.ipv4, 81)) == [f"two {one}", f"pod {one}"]
        assert ask(pod.netns, ("tcp", one, 81), ("tcp", two, 81)) == [f"one {pod.ipv4}", f"two {pod.ipv4}"]
    for where in (outside, pod.netns, there):
        wait_until(lambda where=where: web_of_podman(where, fleet.underlay_address(2, 4), 8081), "the published port")  # type: ignore[misc]


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_over_an_ipv6_underlay() -> None:
    with Pods((6,), (0, 0)) as fleet:
        fleet.start()
        device = fleet.overlay("ov1", *OV1)
        pods = [fleet.pod(number, "ov1") for number in (1, 2)]
        with web(*pods):
            assert_reach(pods)
        assert {pod.netns.links()["eth0"]["mtu"] for pod in pods} == {MTU - 20}
        data = fleet.host(1).links()[device]["linkinfo"]["info_data"]
        assert data["local6"] == fleet.underlay_address(1)
        for pod in pods:
            fleet.check(pod)
        fleet.release_all()
