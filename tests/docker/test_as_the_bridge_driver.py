"""What users of Docker's own bridge driver are used to, and find again: each is tried on both, with one outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docker.engine import Docker, settled
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel
DRIVERS = pytest.mark.parametrize("driver", ["netloom", "bridge"])
ROUTED_TOO = pytest.mark.parametrize("driver", ["netloom", "routed", "bridge"])  # netloom with type=ptp


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("likeness", launcher) as docker:
        yield docker


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    yield shared
    shared.remove_all()
    shared.assert_clean("nft ")  # what iptables of Docker's own driver leaves is Docker's


def create(docker: Docker, driver: str, name: str, *arguments: str) -> None:
    ours = ["netloom", "--ipam-driver", "netloom"]
    options = {"netloom": ours, "routed": [*ours, "-o", "type=ptp"], "bridge": ["bridge"]}[driver]
    docker.docker("network", "create", "-d", *options, *arguments, name)


def reaches(docker: Docker, container: str, address: str, port: int = 80) -> bool:
    """Whether a container's request is answered, which takes some milliseconds."""
    done = docker.docker("exec", container, "timeout", "1", "wget", "-qO-", f"http://{address}:{port}", check=False)
    return done.returncode == 0


@ROUTED_TOO
def test_an_internal_network_has_no_way_out_and_no_way_in(docker: Docker, driver: str) -> None:
    create(docker, driver, "inner", "--internal", "--subnet", "10.70.0.0/24")
    create(docker, driver, "open", "--subnet", "10.71.0.0/24")
    docker.start("two", "--network", "inner")
    docker.start("one", "--network", "inner", "--cap-add", "NET_ADMIN")
    docker.start("other", "--network", "open", "-p", "8080:80")
    create(docker, driver, "secret", "--internal", "--subnet", "10.77.0.0/24")
    docker.start("third", "--network", "secret")
    inner = docker.address("one", "inner")
    # Whoever is in the container makes a route of their own, and the outside has one back: only a drop is left.
    docker.inside("one", "ip", "route", "replace", "default", "via", "10.70.0.1")
    docker.outside.run(["ip", "route", "add", "10.70.0.0/24", "via", HOST_OUTSIDE])
    try:
        assert docker.ask(inner) == "one"  # the host itself
        assert docker.inside("one", "wget", "-qO-", f"http://{docker.address('two', 'inner')}") == "two"
        questions = [
            ("one", docker.address("other", "open"), 80),
            ("one", docker.address("third", "secret"), 80),
            ("one", HOST_OUTSIDE, 8080),
            ("other", inner, 80),
        ]
        with ThreadPoolExecutor() as pool:  # each waits for its limit
            answers = [pool.submit(reaches, docker, *question) for question in questions]
            ping = pool.submit(docker.docker, "exec", "one", "ping", "-c1", "-W1", OUTSIDE, check=False)
            assert docker.silent(inner, netns=docker.outside)
        assert not [question for question, answer in zip(questions, answers, strict=True) if answer.result()]
        assert ping.result().returncode != 0
    finally:
        docker.outside.run(["ip", "route", "del", "10.70.0.0/24"])


@ROUTED_TOO
def test_networks_are_apart_in_both_directions_and_by_published_ports(docker: Docker, driver: str) -> None:
    create(docker, driver, "left", "--subnet", "10.72.0.0/24")
    create(docker, driver, "right", "--subnet", "10.73.0.0/24")
    docker.start("ann", "--network", "left", "-p", "8080:80")
    docker.start("bob", "--network", "right", "-p", "8081:80", "-p", "127.0.0.1:8082:80")
    for who, whom, network, port in (("ann", "bob", "right", 8081), ("bob", "ann", "left", 8080)):
        assert not reaches(docker, who, docker.address(whom, network))
        for address in (HOST_OUTSIDE, "10.72.0.1", "10.73.0.1"):
            assert docker.inside(who, "wget", "-qO-", f"http://{address}:{port}") == whom
        assert not reaches(docker, who, HOST_OUTSIDE, 8082)


@DRIVERS
def test_what_docker_shows_of_a_network(docker: Docker, driver: str) -> None:
    mtu = ("-o", "com.docker.network.driver.mtu=1400")
    reserved = ("--aux-address", "router=10.74.0.2", "--aux-address", "printer=10.74.0.4")
    create(docker, driver, "web", "--subnet", "10.74.0.0/24", *mtu, *reserved)
    (shown,) = json.loads(docker.docker("network", "inspect", "web").stdout)
    assert shown["Options"]["com.docker.network.driver.mtu"] == "1400"
    (pool,) = shown["IPAM"]["Config"]
    assert pool["AuxiliaryAddresses"] == {"router": "10.74.0.2", "printer": "10.74.0.4"}
    docker.start("one", "--network", "web")
    docker.start("two", "--network", "web")
    assert [docker.address(name, "web") for name in ("one", "two")] == ["10.74.0.3", "10.74.0.5"]
    assert "mtu 1400" in docker.inside("one", "ip", "link", "show", "eth0")
    taken = docker.docker("run", "--rm", "--network", "web", "--ip", "10.74.0.2", "localhost/busybox:1", check=False)
    assert "10.74.0.2" in taken.stderr or "already in use" in taken.stderr


@DRIVERS
def test_a_network_that_is_connected_later_with_an_address(docker: Docker, driver: str) -> None:
    create(docker, driver, "a", "--subnet", "10.75.0.0/24")
    create(docker, driver, "b", "--subnet", "10.76.0.0/24")
    docker.start("peer", "--network", "b")
    docker.start("one", "--network", "a")
    docker.docker("network", "connect", "--ip", "10.76.0.77", "--alias", "uno", "b", "one")
    assert docker.address("one", "b") == "10.76.0.77"
    assert "10.76.0.77/24" in docker.inside("one", "ip", "addr", "show", "eth1")
    assert docker.inside("peer", "wget", "-qO-", "http://uno") == "one"
    assert "default via 10.75.0.1 dev eth0" in docker.inside("one", "ip", "route")
    docker.docker("restart", "-t", "0", "one")
    assert docker.address("one", "b") == "10.76.0.77"
    assert docker.inside("peer", "wget", "-qO-", "http://uno") == "one"
