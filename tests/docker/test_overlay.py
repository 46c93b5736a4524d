"""Overlay networks in the Docker of two hosts, with one etcd, and an ipamd, netd and shim each."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from kernel import macs
from tests.docker.cluster import clustered
from tests.docker.engine import Docker
from tests.hosts import IPV6, HostError, wait_until
from tests.runtimes import images
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel
NETDS_OWN = "nl-vx1"  # between hosts, for networks that are routed
OVERLAY = ("-o", "type=overlay", "-o", "network=ov1")


class Pair:
    """Both hosts; `one` stops its containers with dockerd, `two` keeps them."""

    def __init__(self, one: Docker, two: Docker) -> None:
        self.one, self.two = one, two
        self.both = (one, two)

    def until(self, holds: Callable[[Docker], object], what: str) -> None:
        """Waits until it holds on both hosts."""
        for docker in self.both:
            wait_until(partial(holds, docker), f"{what} on {docker.host.name}", self._told)

    def _told(self) -> str:
        return "\n".join(f"{docker.host.name}: {left(docker)}\n{docker.shim_log()[-4000:]}" for docker in self.both)

    def define(self, name: str = "ov1", *arguments: str) -> None:
        """netloom network create, and both hosts know it."""
        self.one.netloom("network", "create", name, "--type", "overlay", *arguments)
        self.until(lambda one: name in defined(one), name)

    def create(self, *arguments: str) -> None:
        """docker network create on a host, as short as it may be, and both have it."""
        self.one.network("ov1", *OVERLAY, *arguments, ipam="")
        self.until_shown()

    def until_shown(self) -> None:
        self.until(has_ours, "ov1")

    def until_gone(self) -> None:
        self.until(lambda one: not shown(one, "ov1"), "no ov1")

    def clean(self) -> None:
        """Containers, networks and definitions; then nothing of them may be left anywhere."""
        for docker in self.both:
            if docker.shim is None:
                docker.start_shim()
            if docker.dockerd is None:
                docker.start_dockerd()
            containers = docker.docker("ps", "-aq").stdout.split()
            if containers:
                docker.docker("rm", "-f", *containers)
        # A network that is in use elsewhere comes back until that is over.
        self.until(lambda one: not self._removed(one), "no network")
        self.until(lambda one: not self._removed(one), "no network")
        with self.one.hurry(), self.two.hurry():
            self.until(lambda one: not one.held(), "no address")
            with self.one.client() as client:
                for name in defined(self.one):
                    client.delete_network(name)
            self.until(lambda one: not any(left(one)), "nothing")

    @staticmethod
    def _removed(docker: Docker) -> list[str]:
        """The networks that were there."""
        networks = docker.docker("network", "ls", "-q", "-f", "type=custom").stdout.split()
        if networks:
            docker.docker("network", "rm", *networks, check=False)
        return networks


def defined(docker: Docker) -> list[str]:
    """The networks that ipamd knows."""
    with docker.client() as client:
        return [network.name for network in client.list_networks()]


def until_served(docker: Docker, container: str, address: str, name: str) -> None:
    """Until a container gets another's name from there: a host whose etcd is slow may hear of it after the ADD."""
    ask = ["timeout", "2", "wget", "-qO-", f"http://{address}"]
    wait_until(lambda: docker.inside(container, *ask, check=False) == name, f"{name} at {address} for {container}")


def left(docker: Docker) -> tuple[list[str], ...]:
    """What may not be there without a network."""
    links = [link for link in docker.host.links() if link.startswith("nl-") and link != NETDS_OWN]
    return *docker.state().values(), docker.held(), links, problems(docker)


def shown(docker: Docker, name: str) -> list[dict[str, Any]]:
    """Docker's networks of this name."""
    ids = docker.docker("network", "ls", "-q", "--no-trunc", "-f", f"name=^{name}$").stdout.split()
    found = docker.docker("network", "inspect", *ids, check=False).stdout if ids else "[]"
    networks: list[dict[str, Any]] = json.loads(found)
    return networks


def has_ours(docker: Docker, name: str = "ov1") -> bool:
    """Whether the one network of this name has the cluster's addresses."""
    return [one["IPAM"]["Driver"] for one in shown(docker, name)] == ["netloom"]


def problems(docker: Docker) -> list[str]:
    """What the shim could not do, for netloom status."""
    files = docker.host.path("/var/lib/netloom/docker/problems").glob("*.json")
    return [str(json.loads(file.read_text())["text"]) for file in files]


def refusal(docker: Docker, *arguments: str) -> str:
    """What Docker says of a network that it does not make."""
    done = docker.docker("network", "create", "-d", "netloom", *arguments, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Pair]:
    with clustered(launcher, {"host1": [], "host2": ["--live-restore"]}) as cluster:
        yield Pair(*cluster.dockers.values())


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    """Nothing is left when a test is over."""
    yield shared
    shared.clean()


def test_made_on_one_host_it_is_in_the_docker_of_both(pair: Pair) -> None:
    pair.define()
    pair.create("--label", "of=us")
    for docker in pair.both:
        (network,) = shown(docker, "ov1")
        assert network["IPAM"]["Config"] == [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1"}]
        assert network["Options"] == {"type": "overlay", "network": "ov1"}
    assert shown(pair.one, "ov1")[0]["Labels"] == {"of": "us"}
    assert pair.one.held() == []  # the gateway is nobody's

    pair.one.start("ann", "--network", "ov1", "-p", "8080:80")
    pair.two.start("bob", "--network", "ov1")
    ann, bob = pair.one.address("ann", "ov1"), pair.two.address("bob", "ov1")
    assert ann != bob
    assert macs.of_address(ip_address(ann)) in pair.one.inside("ann", "ip", "link", "show", "eth0")
    until_served(pair.one, "ann", bob, "bob")
    until_served(pair.two, "bob", ann, "ann")
    assert pair.one.ask(HOST_OUTSIDE, 8080, netns=pair.one.outside) == "ann"
    pair.two.inside("bob", "ping", "-c1", OUTSIDE)
    assert pair.one.verbs().count("ADD netloom") == 1
    assert "ADD firewall" not in pair.one.verbs()
    assert not problems(pair.one) + problems(pair.two)


def test_the_name_is_good_for_a_container_at_once(pair: Pair) -> None:
    """What is made with Docker's own IPAM is replaced, before a command that follows it gets there."""
    pair.define()
    for _ in range(3):
        pair.one.docker("network", "create", "-d", "netloom", *OVERLAY, "ov1")
        pair.one.docker("run", "--rm", "--network", "ov1", images.NAME, "true")
        pair.until_shown()
        pair.one.docker("network", "rm", "ov1")
        pair.until_gone()


def test_addresses_and_macs_that_are_asked_for(pair: Pair) -> None:
    pair.define()
    pair.create()
    pair.one.start("ann", "--network", "ov1", "--ip", "10.0.0.50", "--mac-address", "02:aa:bb:cc:dd:ee")
    pair.two.start("bob", "--network", "ov1")
    until_served(pair.two, "bob", "10.0.0.50", "ann")
    taken = pair.two.docker("run", "--rm", "--network", "ov1", "--ip", "10.0.0.50", images.NAME, "true", check=False)
    assert "10.0.0.50" in taken.stderr and "host1" in taken.stderr, taken.stderr
    gateway = pair.two.docker("run", "--rm", "--network", "ov1", "--ip", "10.0.0.1", images.NAME, "true", check=False)
    assert gateway.returncode != 0
    pair.one.docker("restart", "-t", "0", "ann")
    assert pair.one.address("ann", "ov1") == "10.0.0.50"
    until_served(pair.two, "bob", "10.0.0.50", "ann")
    # It may be had on the other host once it is free, with the MAC that follows from it.
    pair.one.docker("rm", "-f", "ann")
    wait_until(lambda: not pair.one.held(), "the address to come back")
    pair.two.start("new", "--network", "ov1", "--ip", "10.0.0.50")
    pair.one.start("eve", "--network", "ov1")
    until_served(pair.one, "eve", "10.0.0.50", "new")


def test_connect_and_disconnect(pair: Pair) -> None:
    pair.define()
    pair.create()
    pair.one.network("web", "--subnet", "10.60.0.0/24")
    pair.one.start("ann", "--network", "web")
    pair.two.start("bob", "--network", "ov1")
    bob = pair.two.address("bob", "ov1")
    pair.one.docker("network", "connect", "ov1", "ann")
    until_served(pair.one, "ann", bob, "bob")
    pair.one.docker("network", "disconnect", "ov1", "ann")
    assert "eth1" not in pair.one.inside("ann", "ip", "link")
    wait_until(lambda: pair.one.held() == ["10.60.0.1/24", "10.60.0.2/24"], "its address to come back")


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_both_families(pair: Pair) -> None:
    pair.define("ov1", "--subnet", "10.61.0.0/24", "--subnet", "fd00:61::/64")
    pair.create()
    assert all(shown(docker, "ov1")[0]["EnableIPv6"] for docker in pair.both)
    pair.one.start("ann", "--network", "ov1", "--ip6", "fd00:61::77")
    pair.two.start("bob", "--network", "ov1")
    assert len(pair.two.held()) == 2
    pair.two.inside("bob", "ping", "-6", "-c1", "fd00:61::77")
    pair.two.inside("bob", "ping", "-6", "-c1", "fd00:61::1")
    pair.two.inside("bob", "ping", "-c1", pair.one.address("ann", "ov1"))


def test_an_internal_one_is_internal_everywhere(pair: Pair) -> None:
    pair.define("ov1", "--internal")
    # Without a subnet, as the host has no route to it yet.
    pair.one.network("ov1", *OVERLAY, "--internal", "--ipam-opt", "network=ov1")
    pair.until_shown()
    assert all(shown(docker, "ov1")[0]["Internal"] for docker in pair.both)
    pair.one.start("ann", "--network", "ov1")
    assert "default" not in pair.one.inside("ann", "ip", "route")
    pair.one.inside("ann", "ping", "-c1", "10.0.0.1")


def test_what_is_in_use_elsewhere_comes_back_when_it_is_removed(pair: Pair) -> None:
    pair.define()
    pair.create("--label", "of=us")
    pair.two.start("bob", "--network", "ov1")
    pair.one.docker("create", "--name", "later", "--network", "ov1", images.NAME, *images.SERVE)
    (before,) = shown(pair.one, "ov1")
    pair.one.docker("network", "rm", "ov1")
    # At once, without a moment in which it is not there.
    (after,) = shown(pair.one, "ov1")
    assert after["Id"] != before["Id"]
    assert after["Labels"] == {"of": "us"}
    log = pair.one.shim_log()
    assert "a shared network is not to be removed, and comes back" in log
    assert "on node host2" in log
    pair.one.docker("start", "later")  # it knows the network by its name
    pair.one.inside("later", "ping", "-c1", pair.two.address("bob", "ov1"))
    refused = pair.one.docker("network", "rm", "ov1", check=False)
    assert "has active endpoints" in refused.stderr
    pair.one.docker("rm", "-f", "later")
    pair.two.docker("rm", "-f", "bob")
    pair.one.docker("network", "rm", "ov1")
    pair.until_gone()


def test_where_a_stopped_container_refers_to_it_it_stays_until_that_goes(pair: Pair) -> None:
    pair.define()
    pair.create()
    pair.two.start("bob", "--network", "ov1")
    pair.two.docker("stop", "-t", "0", "bob")
    wait_until(lambda: not pair.two.held(), "its address to come back")
    pair.one.docker("network", "rm", "ov1")
    wait_until(lambda: bool(problems(pair.two)), "the problem", pair.two.shim_log)
    assert "container bob refers to it" in problems(pair.two)[0]
    assert problems(pair.two)[0] in pair.two.netloom("status", check=False).stdout
    assert has_ours(pair.two) and not shown(pair.one, "ov1")
    pair.two.docker("rm", "bob")
    pair.until_gone()
    wait_until(lambda: not problems(pair.two), "no problem")


def test_another_network_of_the_name_is_left_alone(pair: Pair) -> None:
    pair.define()
    pair.two.docker("network", "create", "ov1")
    pair.one.network("ov1", *OVERLAY, ipam="")
    wait_until(lambda: bool(problems(pair.two)), "the problem", pair.two.shim_log)
    assert "another network of this name (driver bridge)" in problems(pair.two)[0]
    assert [one["Driver"] for one in shown(pair.two, "ov1")] == ["bridge"]
    pair.two.docker("network", "rm", "ov1")
    pair.until_shown()
    wait_until(lambda: not problems(pair.two), "no problem")


def test_two_hosts_make_it_at_once(pair: Pair) -> None:
    pair.define()
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(docker.network, "ov1", *OVERLAY, ipam="") for docker in pair.both]
        for one in made:
            with contextlib.suppress(HostError):  # the other host's was there already
                one.result()
    pair.until_shown()
    pair.one.docker("network", "rm", "ov1")
    pair.until_gone()


def test_daemons_end_and_begin(pair: Pair) -> None:
    pair.define()
    pair.create()
    pair.one.start("ann", "--network", "ov1")
    pair.two.start("bob", "--network", "ov1", "-p", "8080:80")
    bob = pair.two.address("bob", "ov1")
    for docker in pair.both:
        docker.stop_shim(signal.SIGKILL)
    until_served(pair.one, "ann", bob, "bob")
    for docker in pair.both:
        docker.start_shim()
    # Here the container goes on, and Docker asks for its address again.
    pair.two.stop_dockerd()
    until_served(pair.one, "ann", bob, "bob")
    pair.two.start_dockerd()
    assert pair.two.address("bob", "ov1") == bob
    assert pair.two.ask(HOST_OUTSIDE, 8080, netns=pair.two.outside) == "bob"
    # Here it ends.
    pair.one.stop_dockerd(signal.SIGKILL)
    pair.one.start_dockerd()
    with pair.one.hurry():
        wait_until(lambda: not pair.one.held(), "its address to come back", pair.one.shim_log)
    pair.one.docker("start", "ann")
    until_served(pair.one, "ann", bob, "bob")
    wait_until(lambda: pair.two.held() == [f"{bob}/24"], "bob's address alone", lambda: str(pair.two.held()))
    assert has_ours(pair.one) and has_ours(pair.two)


def test_what_a_shim_could_not_replace_the_next_one_does(pair: Pair) -> None:
    pair.define()
    pair.one.stop_shim()
    pair.one.start_shim("--docker", "/run/nobody.sock")
    pair.one.docker("network", "create", "-d", "netloom", *OVERLAY, "ov1")
    failed = pair.one.docker("run", "--rm", "--network", "ov1", images.NAME, "true", check=False)
    assert "overlay network ov1: it is being replaced, try again" in failed.stderr
    pair.one.stop_shim(signal.SIGKILL)
    pair.one.start_shim()
    pair.until_shown()
    pair.one.docker("run", "--rm", "--network", "ov1", images.NAME, "true")


def test_what_is_refused(pair: Pair) -> None:
    pair.define()
    one = pair.one
    assert "netloom network create ov9 --type overlay" in refusal(one, "-o", "type=overlay", "-o", "network=ov9", "no")
    assert "needs -o network=NAME" in refusal(one, "-o", "type=overlay", "no")
    assert "only with -o type=overlay" in refusal(one, "-o", "network=ov1", "no")
    assert "leave --internal out" in refusal(one, "--internal", *OVERLAY, "no")
    ours = ("--ipam-driver", "netloom", *OVERLAY)
    assert "--ipam-opt network=ov1 --subnet 10.0.0.0/24" in refusal(one, *ours, "--subnet", "10.62.0.0/24", "no")
    assert "--ipam-opt network=ov1" in refusal(one, *ours, "no")
    opted = (*ours, "--ipam-opt", "network=ov1")
    assert "has 10.0.0.0/24" in refusal(one, *opted, "--subnet", "10.62.0.0/24", "no")
    assert "has 10.0.0.1 on every host" in refusal(
        one, *opted, "--subnet", "10.0.0.0/24", "--gateway", "10.0.0.9", "no"
    )
    assert "leave it out" in refusal(one, *opted, "--subnet", "10.0.0.0/24", "--ip-range", "10.0.0.0/28", "no")
    assert "netloom ip reserve ov1 10.0.0.9" in refusal(
        one, *opted, "--subnet", "10.0.0.0/24", "--aux-address", "x=10.0.0.9", "no"
    )
    assert "overlaps with 10.0.0.0/24, which overlay network ov1 has" in refusal(
        one, "--ipam-driver", "netloom", "--subnet", "10.0.0.0/16", "no"
    )
    one.netloom("network", "create", "plain", "--subnet", "10.63.0.0/16")
    assert "is of type routed" in refusal(one, "-o", "type=overlay", "-o", "network=plain", "no")
    # Its subnet, by itself, is as good as its name.
    one.network("ov1", *OVERLAY, "--subnet", "10.0.0.0/24")
    pair.until_shown()
    assert "already, as ov1" in refusal(one, *OVERLAY, "no")
    one.start("ann", "--network", "ov1")
    pair.two.docker("network", "rm", "ov1")
    # Docker does not take a subnet that the host has a route to, and asks for another one for ever.
    one.docker("rm", "-f", "ann")
    one.docker("network", "rm", "ov1")
    pair.until_gone()
    one.host.run(["ip", "route", "add", "10.0.0.0/25", "dev", "outside"])
    try:
        assert "add --subnet 10.0.0.0/24" in refusal(one, *opted, "no")
    finally:
        one.host.run(["ip", "route", "delete", "10.0.0.0/25"])
    for docker in pair.both:
        assert not docker.state()["pools"]
