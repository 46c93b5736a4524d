"""The fast path of overlays on two hosts: who is on it, who is not, and that nobody needs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tests.cni.chained.test_firewall import bridge_netfilter
from tests.cni.chained.traffic import ask, no_answer
from tests.hosts import Host, wait_until
from tests.many_hosts.fleet import CONFIG, Container, Netd, Pinger, settle
from tests.many_hosts.overlays import assert_reach, at_port_80, web
from tests.many_hosts.pods import Pods

pytestmark = pytest.mark.kernel

# What asks for a neighbour's MAC passes.
CLOSED = """table bridge test { chain f { type filter hook forward priority 0
ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 ether type { ip, ip6 } drop; }; }"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pods]:
    with Pods(segments=(0, 0)) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def device(fleet: Pods) -> str:
    """Of the network ov1."""
    return fleet.overlay("ov1", "--subnet", "10.20.0.0/24", "--subnet", "fd20::/64")


@pytest.fixture
def pods(fleet: Pods, device: str) -> Iterator[list[Container]]:
    """Two containers on the first host, one on the second; all on the fast path."""
    made = [fleet.pod(number, "ov1") for number in (1, 1, 2)]
    until_on_it(fleet, 2, 1)
    yield made
    fleet.release_all()


@contextmanager
def closed(fleet: Pods) -> Iterator[None]:
    """No bridge forwards IP."""
    for host in fleet.hosts:
        host.run(["nft", CLOSED])
    try:
        yield
    finally:
        for host in fleet.hosts:
            host.run(["nft", "delete table bridge test"])


def on_it(fleet: Pods) -> list[int]:
    """How many containers of each host."""
    return [one.fast for netd in fleet.netds for one in netd.status().overlays]


def until_on_it(fleet: Pods, *counts: int) -> None:
    logs = "".join(netd.log() for netd in fleet.netds)
    wait_until(lambda: on_it(fleet) == [*counts], f"so many containers on the fast path: {counts}", lambda: logs)


def programs(host: Host) -> list[str]:
    """The links of the host that have one of ours at their entrance."""
    return [
        name
        for name in host.links()
        if "netloom" in host.run(["tc", "filter", "show", "dev", name, "ingress"], check=False).stdout
    ]


def test_what_is_on_it_passes_by_the_bridge(fleet: Pods, device: str, pods: list[Container]) -> None:
    """Over hosts and within one, both families; not what came a moment ago, and what is limited never."""
    with web(*pods):
        for number in (1, 2):
            assert device in programs(fleet.host(number))
        with closed(fleet):
            assert_reach(pods)
        limited = fleet.pod(1, "ov1", bandwidth={"ingressRate": 10**9, "ingressBurst": 10**8})
        late = fleet.pod(2, "ov1")
        with web(limited, late):
            assert_reach([*pods, limited, late])
            until_on_it(fleet, 2, 2)
            with closed(fleet):
                assert_reach([*pods, late])
                for here, there in ((limited, pods[2]), (pods[2], limited), (pods[0], limited)):
                    assert no_answer(here.netns, *at_port_80(there)) == ["", ""]
            assert_reach([*pods, limited, late])
            shown = fleet.netloom(1, "network", "show", "ov1").stdout
            assert "fast path   2 of 3 containers here" in shown


def test_netfilter_does_not_see_it(fleet: Pods, pods: list[Container]) -> None:
    """Where br_netfilter shows it all that is bridged."""
    rule = "table inet test { chain f { type filter hook forward priority 0; ip saddr 10.20.0.0/24 drop; }; }"
    with web(*pods), bridge_netfilter(fleet.host(1), True), bridge_netfilter(fleet.host(2), True):
        for host in fleet.hosts:
            host.run(["nft", rule])
        try:
            assert ask(pods[0].netns, ("tcp", pods[2].ipv4, 80)) == [f"{pods[2].id} {pods[0].ipv4}"]
        finally:
            for host in fleet.hosts:
                host.run(["nft", "delete table inet test"])


def test_one_that_moves_takes_it_along(fleet: Pods, pods: list[Container]) -> None:
    """Its MAC is the same on each host."""
    moving = fleet.pod(1, "ov1", sticky="moving")
    until_on_it(fleet, 3, 1)
    for number, counts in ((2, (2, 2)), (1, (3, 1)), (1, (3, 1)), (2, (2, 2))):
        fleet.release(moving)
        before, moving = moving, fleet.pod(number, "ov1", sticky="moving")
        assert moving.ipv4 == before.ipv4
        with web(*pods, moving):
            assert_reach([*pods, moving])
            until_on_it(fleet, *counts)
            with closed(fleet):
                assert_reach([*pods, moving])


def test_one_that_comes_back_while_netd_is_away(fleet: Pods, pods: list[Container]) -> None:
    """At another port, of which the programs know nothing."""
    moving = fleet.pod(1, "ov1", sticky="back")
    until_on_it(fleet, 3, 1)
    fleet.netd(1).kill()
    try:
        fleet.release(moving)
        before, moving = moving, fleet.pod(1, "ov1", sticky="back")
        assert moving.ipv4 == before.ipv4
        with web(*pods, moving):
            assert_reach([*pods, moving])
    finally:
        fleet.netd(1).start()
    until_on_it(fleet, 3, 1)
    with web(*pods, moving), closed(fleet):
        assert_reach([*pods, moving])


def test_it_can_be_turned_off_and_on(fleet: Pods, device: str, pods: list[Container]) -> None:
    """Without a packet that is lost; also when netd was away when it was."""
    pingers = [Pinger(one.netns, other.ipv4) for one, other in ((pods[0], pods[2]), (pods[2], pods[1]))]
    fleet.configure(fleet.host(1), fast_path=False)
    fleet.netd(1).reload()
    until_on_it(fleet, 0, 1)
    assert programs(fleet.host(1)) == []
    assert "off" in fleet.netloom(1, "network", "show", "ov1").stdout
    fleet.configure(fleet.host(1))
    fleet.netd(1).reload()
    until_on_it(fleet, 2, 1)
    fleet.netd(1).kill()
    assert len(programs(fleet.host(1))) == 3
    fleet.configure(fleet.host(1), fast_path=False)
    fleet.netd(1).start()
    wait_until(lambda: not programs(fleet.host(1)), "the programs gone")
    fleet.netd(1).stop()
    fleet.configure(fleet.host(1))
    fleet.netd(1).start()
    until_on_it(fleet, 2, 1)
    settle(0.3)
    for pinger in pingers:
        sent, lost = pinger.stop()
        assert sent > 20
        assert lost == 0


def test_what_somebody_takes_away_or_adds(fleet: Pods, device: str, pods: list[Container]) -> None:
    host = fleet.host(1)
    first, second = sorted(set(programs(host)) - {device})
    host.run(["tc", "qdisc", "delete", "dev", first, "ingress"])
    host.run(["tc", "qdisc", "add", "dev", second, "root", "tbf", "rate", "1gbit", "burst", "100k", "latency", "10ms"])
    with web(*pods):
        assert_reach(pods)
        host.run(["ip", "link", "set", first, "alias", "seen"])  # links have changed
        wait_until(lambda: sorted(programs(host)) == sorted([device, first]), "the one back, the other off")
        assert_reach(pods)
        host.run(["tc", "qdisc", "delete", "dev", second, "root"])
        host.run(["ip", "link", "set", first, "nomaster"])
        wait_until(partial(_reaches_none, pods), "a port that left the bridge leaves the fast path")


def test_a_filter_that_comes_later_is_asked(fleet: Pods, device: str, pods: list[Container]) -> None:
    """No event tells of it: it is seen when everything is compared. It stays, and ours beside it goes."""
    host = fleet.host(1)
    port = min(set(programs(host)) - {device})
    for link, on_path in ((port, [1, 1]), (device, [0, 1])):
        place = ["dev", link, "parent", "ffff:", "pref", "9", "protocol", "all"]
        host.run(["tc", "filter", "add", *place, "u32", "match", "u32", "0", "0"])
        try:
            fleet.netd(1).reload()
            until_on_it(fleet, *on_path)
            wait_until(partial(_is_free_of_ours, host, link), f"no program of ours at {link}")
            assert "u32" in host.run(["tc", "filter", "show", "dev", link, "ingress"]).stdout
            if link == device:
                wait_until(lambda: "somebody else's filters" in problem(fleet.netd(1)), "what is in the way")
            with web(*pods):
                assert_reach(pods)
        finally:
            host.run(["tc", "filter", "delete", *place])
        fleet.netd(1).reload()
        until_on_it(fleet, 2, 1)


def problem(netd: Netd) -> str:
    """What is wrong with the fast path of the network ov1."""
    return next(one.fast_problem for one in netd.status().overlays if one.name == "ov1")


def _is_free_of_ours(host: Host, link: str) -> bool:
    return link not in programs(host)


def test_who_takes_the_mac_of_another_gets_nothing(fleet: Pods, pods: list[Container]) -> None:
    """A container may set its own: what is at whose port the bridge knows."""
    thief, other = pods[0], pods[1]
    fleet.netd(1).kill()
    try:
        mac = link_of(other)["address"]
        thief.netns.run(["ip", "link", "set", "eth0", "address", mac])
        other.ping(pods[2].ipv4)
    finally:
        fleet.netd(1).start()
    until_on_it(fleet, 1, 1)
    with web(other, pods[2]), closed(fleet):
        assert_reach([other, pods[2]])


def link_of(pod: Container) -> dict[str, str]:
    """Its interface."""
    found: list[dict[str, str]] = json.loads(pod.netns.run(["ip", "-json", "link", "show", "eth0"]).stdout)
    return found[0]


def test_programs_of_an_earlier_netd_go_from_who_is_off_it(fleet: Pods, device: str, pods: list[Container]) -> None:
    """They know what was, and nobody tells them what is."""
    host = fleet.host(1)
    first, second = sorted(set(programs(host)) - {device})
    fleet.netd(1).kill()
    host.run(["tc", "qdisc", "add", "dev", second, "root", "tbf", "rate", "1gbit", "burst", "100k", "latency", "10ms"])
    fleet.netd(1).start()
    until_on_it(fleet, 1, 1)
    wait_until(lambda: sorted(programs(host)) == sorted([device, first]), "the programs of who is on it alone")
    with web(*pods):
        assert_reach(pods)


def _reaches_none(pods: list[Container]) -> bool:
    answers = [no_answer(one.netns, ("tcp", pods[2].ipv4, 80)) for one in pods[:2]]
    return [""] in answers


def goes_past(fleet: Pods, device: str, source: Container, target: Container) -> bool:
    """Whether what a container of the first host sends to one of another does not go through the tunnel's end."""
    before = _by_tunnel(fleet.host(1), device)
    with web(target):
        assert ask(source.netns, ("tcp", target.ipv4, 80)) == [f"{target.id} {source.ipv4}"]
    return _by_tunnel(fleet.host(1), device) == before


def _by_tunnel(host: Host, device: str) -> int:
    (found,) = json.loads(host.run(["ip", "-json", "-s", "link", "show", device]).stdout)
    return int(found["stats64"]["tx"]["packets"])


_MARKS = "table inet test { chain c { type filter hook output priority 0; udp dport 4789 meta mark set 0; }; }"
_OTHER_PORT = "proto udp dport 9 dir out"


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (f"nft '{_MARKS}'", "nft delete table inet test"),
        ("ip route add OTHER/32 dev eth0 mtu 1480", "ip route delete OTHER/32 dev eth0"),
        (f"ip xfrm policy add dst OTHER/32 {_OTHER_PORT}", f"ip xfrm policy delete dst OTHER/32 {_OTHER_PORT}"),
        ("tc qdisc add dev DEVICE root pfifo", "tc qdisc delete dev DEVICE root"),
        ("", ""),
    ],
    ids=["rule", "route", "IPsec", "queue", "netd away"],
)
def test_the_tunnels_end_is_passed_by_while_nobody_has_a_say(
    fleet: Pods, device: str, pods: list[Container], begin: str, end: str
) -> None:
    """Seconds after somebody has, it is not, and after that is over it is again; nothing is lost meanwhile."""
    ways = partial(goes_past, fleet, device, pods[0], pods[2])
    wait_until(ways, "a way past the tunnel's end", fleet.netd(1).log)
    pinger = Pinger(pods[0].netns, pods[2].ipv4)
    begin, end = (one.replace("OTHER", fleet.underlay_address(2, 4)).replace("DEVICE", device) for one in (begin, end))
    if begin:
        fleet.host(1).run(["sh", "-ec", begin])
    else:
        fleet.netd(1).kill()
    try:
        if "qdisc" in begin:  # no event tells of it
            fleet.netd(1).reload()
        wait_until(lambda: not ways(), "a way through the tunnel's end", fleet.netd(1).log)
        time.sleep(0.5)  # some pings go that way
    finally:
        if begin:
            fleet.host(1).run(["sh", "-ec", end])
        else:
            fleet.netd(1).start()
    if "qdisc" in begin:
        fleet.netd(1).reload()
    wait_until(ways, "a way past the tunnel's end", fleet.netd(1).log)
    sent, lost = pinger.stop()
    assert sent > 5
    assert lost == 0


class ConfinedNetd(Netd):
    """One that may not load programs."""

    def spawn(self) -> None:
        argv = ["setpriv", "--bounding-set=-bpf,-sys_admin", sys.executable, "-m", "netd", "--config", CONFIG]
        with self._log.open("a", encoding="utf-8") as log:
            self._process = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def test_a_kernel_that_refuses(fleet: Pods, pods: list[Container]) -> None:
    """All goes by the bridge, and it is said once, and by doctor."""
    fleet.netd(2).stop()
    confined = ConfinedNetd(fleet.host(2))
    confined.start()
    try:
        late = fleet.pod(2, "ov1")
        wait_until(lambda: "Operation not permitted" in problem(confined), "what the kernel says", confined.log)
        assert programs(fleet.host(2)) == []  # those of an earlier netd: nobody tells them what changes
        with web(*pods, late):
            assert_reach([*pods, late])
        done = fleet.try_netloom(2, "doctor")
        assert "the kernel refuses the fast path: make BPF map netloom_macs: Operation not permitted" in done.stdout
        assert confined.log().count("no fast path") == 1
    finally:
        confined.stop()
        fleet.netd(2).start()
    until_on_it(fleet, 2, 2)


def test_nothing_is_left(fleet: Pods, device: str) -> None:
    """By the last container's end, and by `netd --remove`."""
    one, host = fleet.pod(2, "ov1"), fleet.host(2)
    wait_until(lambda: len(programs(host)) == 2, "the programs")
    fleet.netd(2).stop()
    done = host.run([sys.executable, "-m", "netd", "--remove", "--config", CONFIG], check=False)
    assert done.returncode == 0, done.stderr
    assert programs(host) == []
    fleet.netd(2).start()
    wait_until(lambda: len(programs(host)) == 2, "the programs")
    fleet.release(one)
    wait_until(lambda: device not in host.links(), "the end of the network on this host")
    assert "ingress" not in host.run(["tc", "qdisc", "show"]).stdout
