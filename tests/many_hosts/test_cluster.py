"""Peers from etcd: who joins is reached, who is silent is kept as long as it answers, and etcd may be away."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.hosts import wait_until
from tests.many_hosts.fleet import Container, Fleet, Netd, Pinger, routes_of_netd, settle, state_of_netd

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet("vxlan", etcd=True) as made:
        made.start()
        for number in (1, 2, 3):
            wait_until(lambda number=number: knows(made.netd(number), 2), "all peers", made.netd(number).log)  # type: ignore[misc]
        yield made


def knows(netd: Netd, count: int) -> bool:
    peers = netd.status().peers
    return len(peers) == count and all(peer.state == "up" and peer.wanted == peer.present > 0 for peer in peers)


def states(netd: Netd) -> dict[str, str]:
    return {peer.name: peer.state for peer in netd.status().peers}


def until_backend(netd: Netd, backend: str) -> None:
    wait_until(lambda: netd.status().networks[0].backend == backend, f"the backend {backend}", netd.log)


def until_ways(fleet: Fleet, device: str) -> None:
    wait_until(lambda: {one["dev"] for one in routes_of_netd(fleet.host(1))} == {device}, f"routes over {device}")


@pytest.fixture(scope="module")
def containers(fleet: Fleet) -> list[Container]:
    made = [fleet.container(number) for number in (1, 2, 3)]
    fleet.all_reach_all(made)
    return made


def test_every_container_reaches_every_other(fleet: Fleet, containers: list[Container]) -> None:
    fleet.all_reach_all(containers)
    status = fleet.netd(1).status()
    assert (status.source, status.store_state, list(status.problems)) == ("etcd", "connected", [])
    assert {peer.version for peer in status.peers} == {status.version}


def test_etcd_away_for_a_while(fleet: Fleet, containers: list[Container]) -> None:
    """Traffic goes on, nothing is withdrawn, also by a netd that starts meanwhile; what is undone comes back."""
    pinger = Pinger(containers[0].netns, containers[1].ipv4)
    before = [state_of_netd(host) for host in fleet.hosts]
    fleet.etcd.kill("m1")
    fleet.netd(1).kill()
    fleet.netd(1).start()
    settle(3 * 5)
    assert fleet.netd(1).status().store_state.startswith("not connected")
    assert [state_of_netd(host) for host in fleet.hosts] == before
    fleet.host(1).run(["ip", "route", "del", "10.2.3.0/24"])
    wait_until(
        lambda: state_of_netd(fleet.host(1)) == before[0], "the route", lambda: str(state_of_netd(fleet.host(1)))
    )
    fleet.etcd.start("m1")
    for number in (1, 2, 3):
        wait_until(lambda number=number: knows(fleet.netd(number), 2), "rest", fleet.netd(number).log)  # type: ignore[misc]
    assert [state_of_netd(host) for host in fleet.hosts] == before
    sent, lost = pinger.stop()
    assert sent > 100
    assert lost <= 1, "but for the moment in which the route was gone"


def test_a_start_without_etcd_and_without_memory_withdraws_nothing(fleet: Fleet, containers: list[Container]) -> None:
    before = state_of_netd(fleet.host(2))
    fleet.netd(2).kill()
    fleet.host(2).path("/var/lib/netloom/netd/peers.json").unlink()
    fleet.etcd.kill("m1")
    fleet.netd(2).start()
    settle(2)
    assert state_of_netd(fleet.host(2)) == before
    containers[1].ping(containers[2].ipv4)
    fleet.etcd.start("m1")
    wait_until(lambda: knows(fleet.netd(2), 2), "rest", fleet.netd(2).log)
    assert state_of_netd(fleet.host(2)) == before


def test_a_silent_host_that_answers_keeps_its_routes(fleet: Fleet, containers: list[Container]) -> None:
    netd = fleet.netd(3)
    before = state_of_netd(fleet.host(1))
    netd.kill()
    wait_until(lambda: states(fleet.netd(1))["host3"] == "silent", "the end of its lease", fleet.netd(1).log)
    settle(10)
    assert states(fleet.netd(1))["host3"] == "silent"
    assert state_of_netd(fleet.host(1)) == before
    containers[0].ping(containers[2].ipv4)
    netd.start()
    wait_until(lambda: knows(fleet.netd(1), 2), "it to be up", fleet.netd(1).log)


def test_a_host_that_dies_loses_its_routes_and_no_other_does(fleet: Fleet, containers: list[Container]) -> None:
    fleet.netd(3).kill()
    fleet.underlays[0].cut(fleet.host(3))
    others = Pinger(containers[0].netns, containers[1].ipv4)
    wait_until(lambda: states(fleet.netd(1))["host3"] == "down", "its end", fleet.netd(1).log)
    assert [one["dst"] for one in routes_of_netd(fleet.host(1))] == ["10.2.2.0/24"]
    assert states(fleet.netd(1))["host2"] == "up"
    fleet.underlays[0].heal(fleet.host(3))
    fleet.netd(3).start()
    wait_until(lambda: knows(fleet.netd(1), 2) and knows(fleet.netd(2), 2), "it to be back", fleet.netd(1).log)
    containers[0].ping(containers[2].ipv4)
    assert others.stop()[1] == 0


def test_a_host_that_is_cut_off_withdraws_nothing(fleet: Fleet, containers: list[Container]) -> None:
    before = [state_of_netd(host) for host in fleet.hosts]
    fleet.underlays[0].cut(fleet.host(3))
    wait_until(lambda: states(fleet.netd(1))["host3"] == "down", "its end", fleet.netd(1).log)
    assert state_of_netd(fleet.host(3)) == before[2], "who is alone cannot know who is away"
    assert fleet.netd(3).status().store_state.startswith("not connected")
    fleet.underlays[0].heal(fleet.host(3))
    wait_until(lambda: knows(fleet.netd(1), 2) and knows(fleet.netd(3), 2), "all to be up", fleet.netd(1).log)
    assert [state_of_netd(host) for host in fleet.hosts] == before
    containers[0].ping(containers[2].ipv4)


def test_when_many_are_silent_only_a_fifth_is_withdrawn_at_once(fleet: Fleet) -> None:
    """Twenty hosts that nobody ever hears of again: it may be this one that is cut off."""
    for number in range(20):
        record = {
            "id": f"ghost{number}",
            "addresses": [f"192.168.77.{100 + number}"],
            "mac": f"02:00:00:00:01:{number:02x}",
            "subnets": [f"10.9.{number}.0/24"],
        }
        fleet.etcd.etcdctl("put", f"/netloom/netd/ghost{number}", json.dumps(record))
    netd = fleet.netd(1)

    def ghosts(state: str) -> int:
        return sum(peer.state == state and peer.name.startswith("ghost") for peer in netd.status().peers)

    wait_until(lambda: ghosts("down"), "the first to go", netd.log)
    settle(8)
    # 23 hosts are known; a fifth of them is four.
    assert (ghosts("down"), ghosts("silent")) == (4, 16)
    assert len([one for one in routes_of_netd(fleet.host(1)) if one["dst"].startswith("10.9.")]) == 16
    assert any(
        "16 more hosts are silent and do not answer; their entries are kept" in one for one in netd.status().problems
    )
    assert states(netd)["host2"] == "up"
    fleet.etcd.etcdctl("del", "--prefix", "/netloom/netd/ghost")
    wait_until(lambda: knows(netd, 2) and not netd.status().problems, "them to be forgotten", netd.log)
    assert not [one for one in routes_of_netd(fleet.host(1)) if one["dst"].startswith("10.9.")]


def test_two_hosts_of_one_name(fleet: Fleet) -> None:
    netd, host = fleet.netd(3), fleet.host(3)
    netd.stop()
    fleet.configure(host, node="host2", subnets=["10.2.33.0/24"])
    netd.start()
    wait_until(lambda: netd.status().problems, "a refusal", netd.log)
    problem = netd.status().problems[0]
    assert "another host is alive as host2, at 192.168.77.12" in problem
    assert "and this one is at 192.168.77.13" in problem
    assert [one["dst"] for one in routes_of_netd(fleet.host(1))] == ["10.2.2.0/24", "10.2.3.0/24"], "nobody believes it"
    netd.stop()
    fleet.configure(host)
    netd.start()
    wait_until(lambda: knows(fleet.netd(1), 2) and not netd.status().problems, "rest", netd.log)


def test_two_hosts_of_one_underlay_address(fleet: Fleet) -> None:
    netd, host = fleet.netd(3), fleet.host(3)
    netd.stop()
    fleet.configure(host, public_ip=["192.168.77.12"])
    netd.start()
    wait_until(lambda: netd.status().problems, "a refusal", netd.log)
    found = "\n".join(netd.status().problems)
    assert "host2 has the underlay address 192.168.77.12, which this host, host3, has too" in found
    netd.stop()
    fleet.configure(host)
    netd.start()
    wait_until(lambda: knows(fleet.netd(1), 2) and not netd.status().problems, "rest", netd.log)


def test_another_backend_while_pings_run(fleet: Fleet, containers: list[Container]) -> None:
    """Host by host, half a second apart: who has no tunnel's end yet is sent plain packets."""
    fleet.backend = "host-gw"
    for backend in ("host-gw", "vxlan"):
        pingers = [Pinger(one.netns, other.ipv4) for one in containers for other in containers if one is not other]
        for number, host in enumerate(fleet.hosts, 1):
            fleet.configure(host, backend=backend)
            fleet.netd(number).reload()
            until_backend(fleet.netd(number), backend)
            settle(0.5)
        until_ways(fleet, "nl-vx1" if backend == "vxlan" else "eth0")
        results = [pinger.stop() for pinger in pingers]
        assert max(lost for _, lost in results) == 0, results
    fleet.backend = "vxlan"
