"""docker network create, and containers on every kind of network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.docker.engine import Docker, settled
from tests.hosts import IPV6, wait_until
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("networks", launcher) as docker:
        yield docker


def config(docker: Docker, network: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(docker.docker("network", "inspect", network).stdout)[0]["IPAM"]["Config"]
    return found


def test_containers_of_a_network_reach_one_another_by_name_and_the_outside_through_us(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.30.0.0/24")
    docker.start("one", "--network", "web")
    docker.start("two", "--network", "web", "--network-alias", "deux")
    assert docker.inside("one", "wget", "-qO-", "http://two") == "two"
    assert docker.inside("one", "wget", "-qO-", "http://deux") == "two"
    docker.inside("one", "ping", "-c1", OUTSIDE)
    assert "default via 10.30.0.1" in docker.inside("one", "ip", "route")
    verbs = docker.verbs()
    assert verbs.count("ADD bridge") == 2
    assert verbs.count("ADD firewall") == 2


def test_networks_are_apart_and_a_container_on_both_reaches_both(docker: Docker) -> None:
    docker.network("left", "--subnet", "10.31.0.0/24")
    docker.network("right", "--subnet", "10.32.0.0/24")
    docker.start("ann", "--network", "left")
    docker.start("bob", "--network", "right")
    there = docker.address("bob", "right")
    assert docker.docker("exec", "ann", "ping", "-c1", "-W1", there, check=False).returncode != 0
    docker.docker("network", "connect", "right", "ann")
    docker.inside("ann", "ping", "-c1", there)
    assert docker.inside("ann", "wget", "-qO-", "http://bob") == "bob"
    docker.docker("network", "disconnect", "right", "ann")
    assert "eth1" not in docker.inside("ann", "ip", "link")
    assert docker.docker("exec", "ann", "ping", "-c1", "-W1", there, check=False).returncode != 0


def test_addresses_that_are_asked_for(docker: Docker) -> None:
    docker.network("fix", "--subnet", "10.33.0.0/16", "--ip-range", "10.33.5.0/24", "--gateway", "10.33.0.9")
    docker.start("any", "--network", "fix", "--mac-address", "02:aa:bb:cc:dd:ee")
    docker.start("named", "--network", "fix", "--ip", "10.33.200.3")
    assert docker.address("any", "fix").startswith("10.33.5.")
    assert "02:aa:bb:cc:dd:ee" in docker.inside("any", "ip", "link", "show", "eth0")
    assert docker.address("named", "fix") == "10.33.200.3"
    assert "default via 10.33.0.9" in docker.inside("named", "ip", "route")
    docker.inside("named", "ping", "-c1", "any")
    taken = docker.docker("run", "--rm", "--network", "fix", "--ip", "10.33.200.3", "localhost/busybox:1", check=False)
    assert "10.33.200.3" in taken.stderr


def test_without_a_subnet_a_free_one_is_chosen(docker: Docker) -> None:
    docker.network("auto1")
    docker.network("auto2")
    chosen = [config(docker, name)[0]["Subnet"] for name in ("auto1", "auto2")]
    # 172.17.0.0/16 is docker0's: a route of the host.
    assert chosen == ["172.18.0.0/16", "172.19.0.0/16"]


def test_a_subnet_of_another_network_is_refused_by_name(docker: Docker) -> None:
    docker.network("one", "--subnet", "10.34.0.0/24")
    arguments = ("-d", "netloom", "--ipam-driver", "netloom", "--subnet", "10.34.0.0/25", "two")
    refused = docker.docker("network", "create", *arguments, check=False)
    assert "10.34.0.0/25 overlaps with 10.34.0.0/24" in refused.stderr


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_both_families(docker: Docker) -> None:
    docker.network("dual", "--ipv6", "--subnet", "10.35.0.0/24", "--subnet", "fd00:35::/64")
    docker.start("one", "--network", "dual", "--ip6", "fd00:35::77")
    docker.start("two", "--network", "dual")
    assert "fd00:35::77/64" in docker.inside("one", "ip", "addr")
    docker.inside("two", "ping", "-6", "-c1", "fd00:35::77")
    docker.inside("two", "ping", "-6", "-c1", "fd00:35::1")


def test_an_internal_network_has_no_way_out(docker: Docker) -> None:
    docker.network("inner", "--internal", "--subnet", "10.36.0.0/24")
    docker.start("one", "--network", "inner")
    docker.start("two", "--network", "inner")
    docker.inside("one", "ping", "-c1", "two")
    assert "default" not in docker.inside("one", "ip", "route")
    assert docker.docker("exec", "one", "ping", "-c1", "-W1", OUTSIDE, check=False).returncode != 0


def test_dockers_own_ipam_under_our_driver(docker: Docker) -> None:
    docker.network("theirs", ipam="")
    docker.start("one", "--network", "theirs")
    docker.start("two", "--network", "theirs")
    docker.inside("one", "ping", "-c1", "two")
    assert docker.held() == []


def test_our_ipam_under_dockers_own_bridge(docker: Docker) -> None:
    docker.docker("network", "create", "-d", "bridge", "--ipam-driver", "netloom", "--subnet", "10.37.0.0/24", "ours")
    docker.start("one", "--network", "ours")
    assert docker.address("one", "ours") == "10.37.0.2"
    assert docker.held() == ["10.37.0.1/24", "10.37.0.2/24"]


def test_no_ipam_of_docker_and_a_conflist_of_the_host(docker: Docker) -> None:
    ipam = {"type": "ipamd", "subnet": "10.38.0.0/24"}
    file = docker.conflist("mine", [{"type": "bridge", "bridge": "mine0", "isDefaultGateway": True, "ipam": ipam}])
    try:
        docker.network("listed", "-o", "conflist=mine", ipam="null")
        docker.start("one", "--network", "listed")
        assert "10.38.0.2/24" in docker.inside("one", "ip", "addr")
        assert "default via 10.38.0.1" in docker.inside("one", "ip", "route")
        docker.remove_all()
    finally:
        file.unlink()


def test_ptp(docker: Docker) -> None:
    docker.network("point", "-o", "type=ptp", "--subnet", "10.39.0.0/24")
    docker.start("one", "--network", "point")
    docker.start("two", "--network", "point")
    docker.inside("one", "ping", "-c1", "10.39.0.1")
    docker.inside("one", "ping", "-c1", "two")
    docker.inside("one", "ping", "-c1", OUTSIDE)


def test_options_of_the_bridge(docker: Docker) -> None:
    options = {
        "com.docker.network.bridge.name": "mybridge",
        "com.docker.network.bridge.enable_icc": "false",
        "com.docker.network.driver.mtu": "1400",
        "com.docker.network.container_iface_prefix": "lan",
    }
    arguments = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    docker.network("opt", "--subnet", "10.40.0.0/24", *arguments)
    docker.start("one", "--network", "opt")
    docker.start("two", "--network", "opt")
    assert docker.host.links()["mybridge"]["mtu"] == 1400
    assert "mtu 1400" in docker.inside("one", "ip", "link", "show", "lan0")
    there = docker.address("two", "opt")
    assert docker.docker("exec", "one", "ping", "-c1", "-W1", there, check=False).returncode != 0
    docker.inside("one", "ping", "-c1", "10.40.0.1")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("colour=blue", "option colour=blue: unknown; known are"),
        ("type=vlan", "option type=vlan: wanted one of bridge, ptp, macvlan"),
        ("parent=eth0", "option parent=eth0: only with -o type=macvlan"),
        ("com.docker.network.driver.mtu=ten", "option com.docker.network.driver.mtu=ten: wanted a number"),
        ("com.docker.network.bridge.name=a/b", "option com.docker.network.bridge.name=a/b: wanted the name"),
        ("com.docker.network.bridge.enable_icc=maybe", "enable_icc=maybe: wanted true or false"),
        ("conflist=nowhere", "conflist nowhere: no .conflist"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_words(docker: Docker, option: str, words: str) -> None:
    done = docker.docker(
        "network", "create", "-d", "netloom", "-o", option, "--subnet", "10.41.0.0/24", "x", check=False
    )
    assert done.returncode != 0
    assert words in done.stderr


def test_published_ports(docker: Docker) -> None:
    docker.network("pub", "--subnet", "10.42.0.0/24")
    docker.start("web", "--network", "pub", "-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "9000-9002:80")
    docker.start("also", "--network", "pub", "-p", "9000-9002:80")
    assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "web"
    assert docker.ask("127.0.0.1", 8081) == "web"
    assert docker.silent(HOST_OUTSIDE, 8081, netns=docker.outside)
    assert docker.ask(HOST_OUTSIDE, 9000, netns=docker.outside) == "web"
    assert docker.ask(HOST_OUTSIDE, 9001, netns=docker.outside) == "also"
    docker.docker("stop", "-t", "0", "web")
    assert docker.silent(HOST_OUTSIDE, 8080, netns=docker.outside)


def test_published_ports_follow_the_default_route(docker: Docker) -> None:
    docker.network("p1", "--subnet", "10.43.0.0/24")
    docker.network("p2", "--subnet", "10.44.0.0/24")
    docker.start("web", "--network", "p1", "-p", "8080:80")
    docker.docker("network", "connect", "p2", "web")
    assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "web"
    docker.docker("network", "disconnect", "p1", "web")
    assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "web"


def test_stop_start_restart_and_kill(docker: Docker) -> None:
    docker.network("life", "--subnet", "10.45.0.0/24")
    docker.start("one", "--network", "life", "--ip", "10.45.0.50")
    for command in (("restart", "-t", "0"), ("kill",), ("start",), ("stop", "-t", "0"), ("start",)):
        docker.docker(*command, "one")
    docker.inside("one", "ping", "-c1", "10.45.0.1")
    assert docker.address("one", "life") == "10.45.0.50"
    assert len(docker.state()["endpoints"]) == 1


def test_twenty_at_once(docker: Docker) -> None:
    docker.network("many", "--subnet", "10.46.0.0/24")
    names = [f"c{number}" for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda name: docker.start(name, "--network", "many"), names))
        addresses = list(pool.map(lambda name: docker.address(name, "many"), names))
        assert len(set(addresses)) == 20
        list(pool.map(lambda name: docker.docker("rm", "-f", name), names))
    # Docker's release is answered before ipamd has it.
    wait_until(lambda: docker.held() == ["10.46.0.1/24"], "all addresses to come back", docker.shim_log)
