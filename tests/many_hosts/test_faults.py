"""What happens on bad days, with a static list of peers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from tests.hosts import Host, wait_until
from tests.many_hosts.fleet import (
    CONFIG,
    Container,
    Fleet,
    Pinger,
    assert_loses,
    routes_of_netd,
    settle,
    state_of_netd,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet("vxlan") as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def pair(fleet: Fleet) -> tuple[Container, Container]:
    one, two = fleet.container(1), fleet.container(2)
    one.ping(two.ipv4)
    return one, two


def run(host: Host, command: str) -> None:
    host.run(command.split())


def neighbour_of(lines: list[str], address: str) -> str:
    return next(line for line in lines if line.startswith(f"neigh {address} "))


@pytest.mark.parametrize(
    "deletion",
    [
        "ip route del 10.2.2.0/24",
        "ip route replace 10.2.2.0/24 via 10.2.2.0 dev nl-vx1 onlink proto 110 mtu 1000",
        "ip neigh del 10.2.2.0 dev nl-vx1",
        "ip neigh replace 10.2.2.0 dev nl-vx1 lladdr 02:00:00:00:00:99 nud permanent",
        "bridge fdb del {mac} dev nl-vx1",
        "bridge fdb replace {mac} dev nl-vx1 dst 192.168.77.99",
        "ip address del 10.2.1.0/32 dev nl-vx1",
        "ip link del nl-vx1",
        "ip link set nl-vx1 down",
        "ip link set nl-vx1 mtu 1300",
        "ip link set nl-vx1 address 02:00:00:00:00:77",
        "ip link set eth0 down",
        "sysctl -qw net.ipv4.ip_forward=0",
    ],
)
def test_what_is_undone_by_hand_comes_back(fleet: Fleet, pair: tuple[Container, Container], deletion: str) -> None:
    host = fleet.host(1)
    wait_until(lambda: len(state_of_netd(host)) == 12, "rest", lambda: str(state_of_netd(host)))
    before = state_of_netd(host), host.links()["nl-vx1"]["mtu"], host.links()["nl-vx1"]["address"]
    mac = re.search(r"lladdr (\S+)", neighbour_of(before[0], "10.2.2.0"))
    assert mac is not None
    run(host, deletion.format(mac=mac[1]))
    if "eth0" in deletion:
        # IPv6 addresses go with the link, and are the operator's to give again.
        host.run(["ip", "link", "set", "eth0", "up"])
    if "forward" in deletion:
        # No event tells of a sysctl: the next full comparison finds it.
        assert host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
        fleet.netd(1).reload()
        wait_until(lambda: host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n", "forwarding")

    def back() -> bool:
        links = host.links()
        device = links.get("nl-vx1", {"mtu": 0, "address": "", "flags": []})
        return (state_of_netd(host), device["mtu"], device["address"]) == before and "UP" in device["flags"]

    wait_until(back, f"all to be as before: {deletion}", lambda: "\n".join(["", *state_of_netd(host)]))
    pair[0].ping(pair[1].ipv4)
    pair[0].ping(pair[1].ipv6)


def test_what_others_made_stays(fleet: Fleet) -> None:
    host = fleet.host(3)
    commands = (
        "ip route add 198.51.100.0/24 via 192.168.77.11",
        "ip route add 10.2.99.0/24 via 192.168.77.11 proto static",
        "ip neigh add 192.168.77.200 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
        "ip link add vx9 type vxlan id 9 dstport 4790",
    )
    for command in commands:
        run(host, command)
    fleet.netd(3).stop()
    fleet.netd(3).start()
    shown = host.run(["ip", "route"]).stdout
    assert "198.51.100.0/24" in shown
    assert "10.2.99.0/24" in shown
    assert "02:00:00:00:00:01" in host.run(["ip", "neigh", "show", "dev", "eth0"]).stdout
    assert "vx9" in host.links()


def test_a_foreign_route_in_the_way_is_told_and_not_touched(fleet: Fleet) -> None:
    host, netd = fleet.host(3), fleet.netd(3)
    run(host, "ip route replace 10.2.2.0/24 via 192.168.77.12 proto static")
    wait_until(lambda: netd.status().problems, "a problem")
    problem = netd.status().problems[0]
    assert "10.2.2.0/24: there is a route via 192.168.77.12 of protocol 4 already" in problem
    assert "ip route del 10.2.2.0/24" in problem
    assert "proto static" in host.run(["ip", "route", "show", "10.2.2.0/24"]).stdout
    run(host, "ip route del 10.2.2.0/24")
    wait_until(lambda: len(routes_of_netd(host)) == 2, "the route", lambda: host.run(["ip", "route"]).stdout)
    wait_until(lambda: not netd.status().problems, "no problem", lambda: str(netd.status().problems))


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_a_restart_under_a_running_ping_loses_nothing(
    fleet: Fleet, pair: tuple[Container, Container], ending: str
) -> None:
    pinger = Pinger(pair[0].netns, pair[1].ipv4)
    before = state_of_netd(fleet.host(1))
    getattr(fleet.netd(1), ending)()
    settle()
    assert state_of_netd(fleet.host(1)) == before
    fleet.netd(1).start()
    settle()
    sent, lost = pinger.stop()
    assert sent > 10
    assert lost == 0
    assert state_of_netd(fleet.host(1)) == before
    assert fleet.netd(1).status().counts.changes == 0


def test_what_was_changed_while_netd_was_away_is_mended_at_its_start(
    fleet: Fleet, pair: tuple[Container, Container]
) -> None:
    host, netd = fleet.host(1), fleet.netd(1)
    before = state_of_netd(host)
    netd.kill()
    run(host, "ip route del 10.2.2.0/24")
    run(host, "ip route add 10.2.77.0/24 via 10.2.77.0 dev nl-vx1 onlink proto 110")
    run(host, "ip neigh add 10.2.77.0 lladdr 02:00:00:00:00:01 dev nl-vx1 nud permanent")
    netd.start()
    assert state_of_netd(host) == before
    pair[0].ping(pair[1].ipv4)


@pytest.mark.parametrize(("before", "after"), [("vxlan", "host-gw"), ("host-gw", "direct"), ("direct", "vxlan")])
def test_another_backend_on_all_hosts_loses_at_most_five(before: str, after: str) -> None:
    with Fleet(before, ipv6_containers=False) as fleet:
        fleet.start()
        containers = [fleet.container(number) for number in (1, 2, 3)]
        fleet.all_reach_all(containers)

        def switch(backend: str) -> None:
            fleet.backend = backend
            for host in fleet.hosts:
                fleet.configure(host)
            for netd in fleet.netds:
                netd.reload()
            for netd in fleet.netds:
                wait_until(lambda netd=netd: netd.status().networks[0].backend == backend, "the other backend")  # type: ignore[misc]

        assert_loses(5, containers, partial(switch, after), partial(switch, before))
        ways = {one["dev"] for one in routes_of_netd(fleet.host(1))}
        assert ways == ({"nl-vx1"} if after == "vxlan" else {"eth0"})


def test_netd_takes_its_own_away_when_asked(fleet: Fleet) -> None:
    host, netd = fleet.host(2), fleet.netd(2)
    refused = host.run([sys.executable, "-m", "netd", "--config", CONFIG, "--remove"], check=False)
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr
    assert len(state_of_netd(host)) == 12
    netd.stop()
    said = host.run([sys.executable, "-m", "netd", "--config", CONFIG, "--remove"]).stdout
    assert said == f"removed {4 + 1} routes and tunnels\n"
    assert state_of_netd(host) == []
    netd.start()
    assert len(state_of_netd(host)) == 12
