"""Overlay networks on bad days, and when containers move: what is there for whom, and what running pings lose."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.hosts import IPV6, PATIENCE_S, ROOT, Host, Netns, wait_until
from tests.many_hosts.fleet import CONFIG, LEASE_S, Container, Netd, Pinger, settle
from tests.many_hosts.overlays import addresses, assert_reach, holds, state, web
from tests.many_hosts.pods import Pods, answer, conf_of
from tests.warm.conftest import launcher
from tests.warm.service import Service

__all__ = ["launcher"]  # a fixture
pytestmark = pytest.mark.kernel

OV1 = ("--subnet", "10.20.0.0/24", *(("--subnet", "fd20::/64") if IPV6 else ()))
FEW = 3  # pings, of 50 ms: what may be under way while a host hears of a change
MANY = 50  # containers of each host

# netd that looks for idle bridges all the time, so that an ADD often meets their removal.
EAGER = "import sys, netd.bridges; netd.bridges._EVERY_S = 0.03; from netd.__main__ import main; sys.exit(main())"

# Arguments: seconds, addresses. Pings all of them until each has answered, and prints those that never did.
PING_ALL = """
import os, select, socket, struct, sys, time
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
packet = head[:2] + struct.pack("!H", checksum(head)) + head[4:]
missing, deadline, again = set(sys.argv[2:]), time.monotonic() + float(sys.argv[1]), 0
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
    raw.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)
    while missing and time.monotonic() < deadline:
        if time.monotonic() >= again:
            again = time.monotonic() + 1
            for address in missing:
                raw.sendto(packet, (address, 0))
        if select.select([raw], [], [], 0.1)[0]:
            data, source = raw.recvfrom(2048)
            if data[20] == 0:
                missing.discard(source[0])
print(*missing)
"""


class EagerNetd(Netd):
    """See EAGER."""

    def spawn(self) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            argv = [sys.executable, "-c", EAGER, "--config", CONFIG]
            self._process = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pods]:
    with Pods((4, 6) if IPV6 else (4,)) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def device(fleet: Pods) -> str:
    """Of the network ov1."""
    return fleet.overlay("ov1", *OV1)


@pytest.fixture
def pods(fleet: Pods, device: str) -> Iterator[list[Container]]:
    """A container on each host, known to all."""
    made = [fleet.pod(number, "ov1") for number in (1, 2, 3)]
    for one in made:
        for other in made:
            if one is not other:
                wait_until(partial(holds, fleet.host(fleet.where(one)), "ov1", other), f"{other} on another host")
    yield made
    fleet.release_all()


def lacks(host: Host, *links: str) -> bool:
    return not {*links} & host.links().keys()


def test_what_is_undone_by_hand_comes_back(fleet: Pods, device: str, pods: list[Container]) -> None:
    host, other = fleet.host(1), pods[1]
    mac = other.netns.links()["eth0"]["address"]
    gateways = host.addresses()["nl-ov1"]
    assert gateways == ["10.20.0.1/24", *(["fd20::1/64"] if IPV6 else [])]

    def found() -> list[object]:
        links = host.links()
        shown, tunnel = links["nl-ov1"], links.get(device, {}).get("linkinfo", {}).get("info_data", {})
        flags = shown["address"], "UP" in shown["flags"], tunnel.get("learning")
        return [state(host, "ov1", device), flags, sorted(host.addresses()["nl-ov1"])]

    before = found()
    for words in (
        *(f"ip address del {gateway} dev nl-ov1" for gateway in gateways),
        "ip link set nl-ov1 address 02:00:00:00:00:99",
        "ip link set nl-ov1 down",
        f"ip neigh del {other.ipv4} dev nl-ov1",
        f"ip neigh replace {other.ipv4} lladdr 02:00:00:00:00:99 dev nl-ov1 nud permanent",
        f"bridge fdb del {mac} dev {device} self",
        f"bridge fdb replace {mac} dev {device} self dst 192.168.77.99",
        f"bridge fdb del {mac} dev {device} master",
        f"bridge link set dev {device} neigh_suppress off",
        f"bridge link set dev {device} flood on bcast_flood on mcast_flood on learning on",
        f"ip link set {device} type vxlan learning",
        f"ip link set {device} nomaster",
        f"ip link set {device} down",
        f"ip link set {device} mtu 1300",
        f"ip link del {device}",
    ):
        host.run(words.split())
        wait_until(lambda: found() == before, f"all to be as before {words}", lambda: str(found()))
    host.run(["nft", "delete", "table", "inet", "netloom"])
    for name in ("apart4", "masq4"):
        elements = ["nft", "list", "set", "inet", "netloom", name]
        wait_until(lambda elements=elements: "10.20.0." in host.run(elements, check=False).stdout, name)  # type: ignore[misc]
    for address in addresses(other):
        pods[0].ping(address)


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_a_restart_of_netd_loses_nothing(fleet: Pods, device: str, pods: list[Container], ending: str) -> None:
    fleet.until_fast("ov1", 1, 2)
    pingers = [Pinger(pods[0].netns, address) for address in addresses(pods[1])]
    before = state(fleet.host(1), "ov1", device)
    getattr(fleet.netd(1), ending)()
    assert state(fleet.host(1), "ov1", device) == before
    fleet.netd(1).start()
    settle()
    for pinger in pingers:
        sent, lost = pinger.stop()
        assert sent > 5
        assert lost == 0
    assert state(fleet.host(1), "ov1", device) == before


def test_etcd_away(fleet: Pods, device: str, pods: list[Container]) -> None:
    """Longer than leases last; a netd that starts meanwhile takes nothing away, nor does one when etcd is back."""
    fleet.until_fast("ov1", 1, 2, 3)
    pingers = [Pinger(one.netns, other.ipv4) for one, other in zip(pods, (*pods[1:], pods[0]), strict=True)]
    before = [state(host, "ov1", device) for host in fleet.hosts]
    fleet.etcd.kill("m1")
    try:
        fleet.netd(1).kill()
        fleet.netd(1).start()
        settle(LEASE_S + 1)
        assert [state(host, "ov1", device) for host in fleet.hosts] == before
    finally:
        fleet.etcd.start("m1")
    # Whoever comes now is known everywhere: all have connected again, and have heard of all.
    more = fleet.pod(3, "ov1")
    for number in (1, 2):
        wait_until(partial(holds, fleet.host(number), "ov1", more), "the new one", fleet.netd(number).log)
    assert_all_answer(pods[0], [more])
    for pinger in pingers:
        sent, lost = pinger.stop()
        assert sent > 20
        assert lost == 0


def assert_all_answer(one: Container, others: list[Container]) -> None:
    argv = [sys.executable, "-I", "-S", "-c", PING_ALL, str(PATIENCE_S), *(other.ipv4 for other in others)]
    assert one.netns.run(argv).stdout.split() == []


def test_one_that_moves_is_reached_at_once(fleet: Pods, pods: list[Container]) -> None:
    """By who had it in the cache, on every host, also where its MAC is another there."""
    moving = fleet.pod(1, "ov1", sticky="moving")
    for number, mac in ((2, ""), (3, "02:00:00:00:00:a3"), (1, "02:00:00:00:00:b1"), (2, "")):
        pingers = [Pinger(one.netns, address) for one in pods for address in addresses(moving)]
        fleet.release(moving)
        before, moving = moving, fleet.pod(number, "ov1", sticky="moving", **({"mac": mac} if mac else {}))
        assert addresses(moving) == addresses(before)
        for pinger in pingers:
            pinger.forget()
        settle(0.5)
        results = [pinger.stop() for pinger in pingers]
        assert min(sent for sent, _ in results) > 5, results
        assert max(lost for _, lost in results) <= FEW, (number, mac, results)


def test_who_waits_for_one_that_gets_a_mac_of_its_own_reaches_it(fleet: Pods, pods: list[Container]) -> None:
    """Its address is known before its MAC is: who asked in between must hear of it, long before a cache gets old."""
    waiting = [
        one.netns.popen([sys.executable, "-I", "-S", str(ROOT / "tests/ping.py"), "10.20.0.98", "14"],
                        stdout=subprocess.DEVNULL)
        for one in pods
    ]  # fmt: skip
    fleet.pod(1, "ov1", ips=["10.20.0.98/24"], mac="02:00:00:00:00:98")
    assert [one.wait(PATIENCE_S) for one in waiting] == [0, 0, 0]


def test_a_host_that_dies_and_comes_back(fleet: Pods, device: str, pods: list[Container]) -> None:
    fleet.until_fast("ov1", 1, 2)
    pinger = Pinger(pods[0].netns, pods[1].ipv4)
    before = [state(host, "ov1", device) for host in fleet.hosts[:2]]
    fleet.netd(3).kill()
    fleet.ipamds[3].kill()
    fleet.underlays[0].unplug(fleet.host(3))
    try:
        for host, netd in zip(fleet.hosts[:2], fleet.netds, strict=False):
            wait_until(lambda host=host: not any_of(host, pods[2]), "the dead host's to go", netd.log)  # type: ignore[misc]
            other = pods[1] if host is fleet.host(1) else pods[0]
            assert holds(host, "ov1", other)
    finally:
        fleet.underlays[0].plug(fleet.host(3))
        fleet.ipamds[3].start()
        fleet.netd(3).start()
    for host, was in zip(fleet.hosts, before, strict=False):
        wait_until(lambda host=host, was=was: state(host, "ov1", device) == was, "all to be as before")  # type: ignore[misc]
    with web(*pods):
        assert_reach(pods)
    assert pinger.stop()[1] == 0


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_a_host_that_dies_on_an_ipv6_underlay() -> None:
    """Silent, and answering probes, it keeps its entries; when it answers no more, they go."""
    with Pods((6,), (0, 0)) as fleet:
        fleet.start()
        fleet.overlay("ov1", *OV1)
        pods = [fleet.pod(number, "ov1") for number in (1, 2)]
        netd = fleet.netd(1)
        wait_until(partial(holds, fleet.host(1), "ov1", pods[1]), "the other one", netd.log)
        fleet.netd(2).kill()
        fleet.ipamds[2].kill()

        def other() -> str:
            return next(one.state for one in netd.status().peers if one.name == "host2")

        wait_until(lambda: other() == "silent", "the end of its lease", netd.log)
        settle(LEASE_S)  # three rounds of probes
        assert other() == "silent"
        pods[0].ping(pods[1].ipv4)
        fleet.underlays[0].unplug(fleet.host(2))
        wait_until(lambda: not any_of(fleet.host(1), pods[1]), "the dead host's to go", netd.log)
        assert other() == "down"
        fleet.underlays[0].plug(fleet.host(2))
        wait_until(partial(holds, fleet.host(1), "ov1", pods[1]), "it to be back", netd.log)
        fleet.ipamds[2].start()
        fleet.netd(2).start()
        fleet.release_all()


def any_of(host: Host, pod: Container) -> bool:
    """Whether anything of a container on another host is left."""
    mac = pod.netns.links()["eth0"]["address"]
    shown = host.run(["ip", "neigh"]).stdout + host.run(["bridge", "fdb"]).stdout
    return any(one in shown for one in (mac, *(f"{address} " for address in addresses(pod))))


def test_the_last_one_of_a_host_takes_bridge_and_tunnel_along(fleet: Pods, device: str, pods: list[Container]) -> None:
    fleet.release(pods[0])
    wait_until(partial(lacks, fleet.host(1), "nl-ov1", device), "the end of bridge and tunnel")
    assert {"nl-ov1", device} <= fleet.host(2).links().keys()
    pods[1].ping(pods[2].ipv4)


def test_an_add_while_the_bridge_is_about_to_go(fleet: Pods, device: str, pods: list[Container]) -> None:
    """Here it goes at once, so that nearly every ADD meets that, at another moment."""
    fleet.release(pods[0])
    fleet.netd(1).stop()
    eager = EagerNetd(fleet.host(1))
    eager.start()
    try:
        chosen = random.Random(8)
        for _ in range(8):
            one = fleet.pod(1, "ov1")
            assert_all_answer(one, pods[1:])
            fleet.check(one)
            fleet.release(one)
            time.sleep(chosen.uniform(0, 0.2))
    finally:
        eager.stop()
        fleet.netd(1).start()


def test_many_containers_come_and_go(fleet: Pods, device: str, launcher: Path) -> None:
    """Nothing is left of them: no link, no record, no element of nftables, no key in etcd."""
    before = keys_of_addresses(fleet)
    conf = conf_of("ov1")
    names = [f"many{number}" for number in range(MANY)]
    with ExitStack() as stack:
        services = []
        for host in fleet.hosts:
            service = Service(host, launcher, directory="/run/warm")
            service.start()
            stack.callback(service.stop)
            services.append(service)
            host.run(["ip", "-batch", "-"], input="".join(f"netns add {name}\n" for name in names))
        calls = [(service, Netns(service.host, name)) for name in names for service in services]

        def call(verb: str, one: tuple[Service, Netns]) -> str:
            service, netns = one
            done = answer(lambda: service.call(verb, conf, plugin="netloom", netns=netns, container_id=netns.name))
            done.ok()
            return str(done.json["ips"][0]["address"]).partition("/")[0] if verb == "ADD" else ""

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(partial(call, "ADD"), calls))
            first = Container(calls[0][1], names[0], found[0], "")
            assert_all_answer(first, [Container(first.netns, "", address, "") for address in found[1:]])
            assert len(set(found)) == 3 * MANY
            list(pool.map(partial(call, "DEL"), calls))
        for host in fleet.hosts:
            host.run(["ip", "-batch", "-"], input="".join(f"netns del {name}\n" for name in names))
    for host in fleet.hosts:
        wait_until(partial(lacks, host, "nl-ov1", device), "the end of bridge and tunnel")
        assert not [name for name in host.links() if name.startswith("veth")]
        records = host.path("/run/netloom/attachments")
        wait_until(lambda records=records: not list(records.iterdir()), "the end of all records")  # type: ignore[misc]
        sets = [entry.get("set", entry.get("map", {})) for entry in host.nft()]
        # Which networks there are stays known to netd (netd/strangers.py).
        known = ("schema", "remote", "among")
        assert not [one for one in sets if one.get("elem", 0) != 0 and not one["name"].startswith(known)]
        assert host.allocations() == []
    wait_until(lambda: keys_of_addresses(fleet) <= before, "the end of all keys", lambda: str(keys_of_addresses(fleet)))
    assert not [key for key in keys_of_addresses(fleet) if "/ov1#" in key]


def keys_of_addresses(fleet: Pods) -> set[str]:
    """All in etcd that is about a single address."""
    return {key for key in fleet.etcd.keys("/netloom/") if key.split("/")[2] in ("addresses", "macs", "owned")}
