"""Two overlays over three hosts: Docker on two of them, podman on the third. The first dockerd asks the shim before it
removes a network."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.docker.engine import DOCKER, Docker
from tests.docker.three import NETWORKS, Ask, Place, clean, known, placed, silent, web
from tests.hosts import PATIENCE_S, wait_until
from tests.many_hosts.fleet import Pinger

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Place]:
    with placed(launcher) as made:
        yield made


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    """With both networks and no container."""
    shared.create()
    yield shared
    clean(shared)


def test_two_overlays_on_three_hosts(place: Place) -> None:
    one, two, podman = place.one, place.two, place.podman
    addresses: dict[str, dict[str, str]] = {}
    for network in NETWORKS:
        a, b, c = (f"{network}-{letter}" for letter in "abc")
        one.start(a, "--network", network)
        two.start(b, "--network", network, *(["-p", "8080:80"] if network == "ov1" else []))
        podman.start(c, network)
        addresses[network] = {
            a: one.address(a, network),
            b: two.address(b, network),
            c: podman.address(c, network),
        }
    inside: dict[str, Ask] = {"a": one.inside, "b": two.inside, "c": podman.inside}

    def ask(container: str, address: str) -> str:
        return web(inside[container[-1]], container, address)

    # All of a network reach each other, and nobody of the other one.
    strangers: list[tuple[str, str]] = []
    for network, found in addresses.items():
        other = next(name for name in NETWORKS if name != network)
        for container in found:
            for name, address in found.items():
                wait_until(lambda c=container, a=address, n=name: ask(c, a) == n, f"{name} from {container}")  # type: ignore[misc]
            strangers.append((container, next(iter(addresses[other].values()))))
    with ThreadPoolExecutor(len(strangers)) as pool:  # each of them waits for its limit
        assert list(pool.map(lambda one: ask(*one), strangers)) == [""] * len(strangers)
    # Out by the own host, under its address; in by a published port.
    outside = place.cluster.underlay.address(place.number("host2"))
    assert ask("ov2-a", f"{outside}:8080") == "ov1-b"
    assert ask("ov1-c", f"{outside}:8080") == "ov1-b"
    # Connected to both, for a while.
    one.docker("network", "connect", "ov2", "ov1-a")
    for name in ("ov2-b", "ov2-c"):
        wait_until(lambda n=name: ask("ov1-a", addresses["ov2"][n]) == n, f"{name} from ov1-a")  # type: ignore[misc]
    assert ask("ov1-a", addresses["ov1"]["ov1-c"]) == "ov1-c"
    one.docker("network", "disconnect", "ov2", "ov1-a")
    assert ask("ov1-a", addresses["ov2"]["ov2-c"]) == ""
    # Docker goes on where podman has a container, and podman where Docker has.
    assert place.listed() == {address for found in addresses.values() for address in found.values()}


def test_a_docker_host_dies_and_comes_back(place: Place) -> None:
    one, two = place.one, place.two
    one.start("ann", "--network", "ov1")
    two.start("bob", "--network", "ov1", "--restart", "always", "--ip", "10.50.1.77")
    two.start("ben", "--network", "ov1")
    place.podman.start("cal", "ov1")
    bob, ben, cal = two.address("bob", "ov1"), two.address("ben", "ov1"), place.podman.address("cal", "ov1")
    ann, here = one.address("ann", "ov1"), (place.netns(one, "ann"), place.netns(place.podman, "cal"))
    everybody = {ann: "ann", bob: "bob", ben: "ben", cal: "cal"}
    for each in here:
        assert silent(each, everybody) == []
    before = [ours(docker) for docker in place.both]
    pinger = Pinger(here[0], cal)
    place.cluster.power_off("host2")
    try:
        for host, other in ((one.host, cal), (place.podman.host, ann)):
            wait_until(lambda h=host, o=other: known(h, "ov1") == ({o}, {o}), "the dead host's to go")  # type: ignore[misc]
        assert ours(one) == before[0]
    finally:
        place.cluster.power_on("host2")
    assert [ours(docker) for docker in place.both] == before
    two.docker("start", "ben")
    assert two.address("bob", "ov1") == bob
    everybody = {ann: "ann", bob: "bob", two.address("ben", "ov1"): "ben", cal: "cal"}
    for each in (*here, place.netns(two, "bob")):
        assert silent(each, everybody) == []
    assert place.listed() == everybody.keys()
    sent, lost = pinger.stop()
    assert sent > 20
    assert lost == 0


def test_what_is_in_use_elsewhere_is_not_removed_and_it_says_why(place: Place) -> None:
    one, two = place.one, place.two
    two.start("bob", "--network", "ov1")
    bob = two.address("bob", "ov1")
    before = [ours(docker) for docker in place.both]
    identity = one.docker("network", "inspect", "-f", "{{.Id}}", "ov1").stdout.strip()
    for name in ("ov1", identity, identity[:12]):
        refused = one.docker("network", "rm", name, check=False)
        assert refused.returncode == 1
        assert f"network ov1 is in use by {bob} on host2; stop these containers" in refused.stderr
        assert refused.stdout == ""
    # What is on this host has a name.
    one.start("ann", "--network", "ov1")
    refused = one.docker("network", "rm", "ov1", check=False)
    assert f"ann ({one.address('ann', 'ov1')}) on host1, and by {bob} on host2" in refused.stderr
    assert [ours(docker) for docker in place.both] == before
    assert "comes back" not in one.shim_log()
    one.docker("rm", "-f", "ann")
    # By the other host, without the plugin: this one's shim removes it, and its Docker asks that very shim.
    two.docker("network", "rm", "ov2")
    wait_until(partial(lacks, one, "ov2"), "no ov2 on host1", one.shim_log)
    # Networks of others are nothing to it, nor is what Docker asks nobody about.
    one.docker("network", "create", "plain")
    assert one.docker("network", "rm", "plain").stdout == "plain\n"
    assert one.docker("network", "prune", "-f").stdout == "Deleted Networks:\nov1\n\n"
    assert "comes back" in one.shim_log()
    assert not lacks(one, "ov1")
    # Once nobody is on it.
    two.docker("rm", "-f", "bob")
    assert one.docker("network", "rm", "ov1").stdout == "ov1\n"
    for docker in place.both:
        wait_until(partial(lacks, docker, "ov1"), f"no ov1 on {docker.host.name}", docker.shim_log)


def test_docker_waits_for_a_shim_that_is_asked_before_everything(place: Place) -> None:
    place.one.stop_shim(signal.SIGKILL)
    listing = place.one.host.popen([DOCKER, "network", "ls"], stdout=subprocess.PIPE, env=place.one.environment)
    with pytest.raises(subprocess.TimeoutExpired):
        listing.wait(1)
    place.one.start_shim()
    shown, _ = listing.communicate(timeout=PATIENCE_S)
    assert listing.returncode == 0
    assert "ov1" in shown


def ours(docker: Docker) -> str:
    """Docker's networks that are of Netloom's, with their ids."""
    return docker.docker("network", "ls", "--no-trunc", "-f", "driver=netloom").stdout


def lacks(docker: Docker, name: str) -> bool:
    return docker.docker("network", "ls", "-q", "-f", f"name=^{name}$").stdout == ""
