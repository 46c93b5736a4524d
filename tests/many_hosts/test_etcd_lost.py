"""etcd comes back without its data: nothing between hosts stops, and it is all there again; who died meanwhile goes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.hosts import wait_until
from tests.many_hosts.fleet import LEASE_S, Container, Pinger, settle, state_of_netd
from tests.many_hosts.overlays import holds, state
from tests.many_hosts.pods import Pods

pytestmark = pytest.mark.kernel

COPY = "/run/netloom/copy"
OF_HOSTS = ("netd", "netd-alive", "underlay", "blocks", "networks", "addresses", "macs", "pools")


@pytest.fixture
def fleet() -> Iterator[Pods]:
    with Pods(segments=(0, 0, 0, 0)) as made:
        made.start()
        yield made


def emptied(fleet: Pods) -> None:
    """Stops etcd, and takes its data away."""
    fleet.etcd.kill("m1")
    fleet.etcd.members["m1"].host.run(["rm", "-r", "/run/etcd/member"])


def keys(fleet: Pods) -> set[str]:
    return {key for key in fleet.etcd.keys("/netloom/") if key.split("/")[2] in OF_HOSTS}


def states(fleet: Pods, number: int) -> dict[str, str]:
    return {peer.name: peer.state for peer in fleet.netd(number).status().peers}


def lost_data(fleet: Pods, number: int) -> list[str]:
    return [one for one in fleet.netd(number).status().problems if "lost its data" in one]


def logs(fleet: Pods) -> str:
    return "\n".join(f"--- {netd.host.name}\n{netd.log()[-2500:]}" for netd in fleet.netds)


class Traffic:
    """Pings between all pairs of some containers."""

    def __init__(self, *networks: list[Container]) -> None:
        pairs = [(one, two) for pods in networks for one in pods for two in pods if one is not two]
        self._pingers = {f"{one.id} to {two.id}": Pinger(one.netns, two.ipv4) for one, two in pairs}

    def stop(self) -> dict[str, tuple[int, int]]:
        """Who lost any: (sent, lost)."""
        found = {name: pinger.stop() for name, pinger in self._pingers.items()}
        assert all(sent > 50 for sent, _ in found.values()), found
        return {name: one for name, one in found.items() if one[1]}


def test_etcd_that_lost_its_data_stops_nobody(fleet: Pods) -> None:
    """Neither on a routed network nor on an overlay; and a host that dies while etcd is away goes afterwards."""
    device = fleet.overlay("ov1", "--subnet", "10.20.0.0/24")
    fleet.netloom(1, "network", "create", "pods", "--subnet", "10.2.0.0/16", "--block", "24")
    fleet.until_known("pods")
    routed, layer2 = ([fleet.pod(number, network) for number in (1, 2, 3, 4)] for network in ("pods", "ov1"))
    fleet.until_ways(*routed)
    for one in (1, 2, 3, 4):
        wait_until(partial(holds, fleet.host(one), "ov1", *layer2[: one - 1], *layer2[one:]), "all holders")
    living, before = (1, 2, 3), keys(fleet)

    def found(number: int) -> tuple[list[str], list[str]]:
        return state_of_netd(fleet.host(number)), state(fleet.host(number), "ov1", device)

    fleet.netloom(1, "store", "backup", COPY)
    there = {number: found(number) for number in living}
    traffic = Traffic(routed[:3], layer2[:3])
    emptied(fleet)
    fleet.netd(4).kill()
    fleet.ipamds[4].kill()
    fleet.underlays[0].cut(fleet.host(4))
    settle(LEASE_S + 1)
    fleet.etcd.start("m1")
    for number in living:
        wait_until(
            lambda number=number: [*states(fleet, number).values()].count("up") == 2,  # type: ignore[misc]
            "all to be back",
            lambda: logs(fleet),
        )
    for number in living:
        wait_until(partial(lost_data, fleet, number), "what it says of that", lambda: logs(fleet))
    for number in living:
        wait_until(lambda number=number: "host4" not in states(fleet, number), "its end", lambda: logs(fleet))  # type: ignore[misc]
        wait_until(lambda number=number: not lost_data(fleet, number), "rest", lambda: logs(fleet))  # type: ignore[misc]
    assert traffic.stop() == {}
    gone = (routed[3].ipv4, layer2[3].ipv4, "192.168.77.14")
    block = f"{routed[3].ipv4.rpartition('.')[0]}."
    for number in living:
        shown = "\n".join([*found(number)[0], *found(number)[1]])
        assert not [one for one in (*gone, block) if one in shown], shown
        assert len(found(number)[0]) < len(there[number][0])
        assert len(found(number)[1]) < len(there[number][1])
    assert {key for key in keys(fleet) if "host4" not in key} <= before
    assert {f"/netloom/addresses/ov1#{pod.ipv4}" for pod in layer2[:3]} <= keys(fleet)
    # Who starts refuses an etcd that is not its cluster's.
    fleet.netloom(1, "store", "restore", COPY, "--cluster")
    fleet.underlays[0].heal(fleet.host(4))
    fleet.ipamds[4].start()
    fleet.netd(4).start()
    for number in living:
        wait_until(lambda number=number: found(number) == there[number], "all as it was", lambda: logs(fleet))  # type: ignore[misc]
    for pods in (routed, layer2):
        pods[0].ping(pods[3].ipv4)
    assert keys(fleet) == before
