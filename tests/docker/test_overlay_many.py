"""One overlay with fifty containers on each of three hosts: Docker on two of them, podman on the third. The tests are
steps, each with a test's time for itself: they take it on a machine with other work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.docker.engine import Docker
from tests.docker.three import NETWORKS, VNIS, Place, known, placed, silent
from tests.hosts import wait_until

pytestmark = pytest.mark.kernel
MANY = 50  # containers of each host
NETWORK = "ov1"


@dataclass
class Crowd:
    """The containers, by host as in `place.hosts`: their names, and their names by address."""

    place: Place
    names: list[list[str]]
    found: list[dict[str, str]]

    @property
    def every(self) -> dict[str, str]:
        return {address: name for found in self.found for address, name in found.items()}


@pytest.fixture(scope="module")
def place(launcher: Path) -> Iterator[Place]:
    with placed(launcher) as made:
        yield made


@pytest.fixture(scope="module")
def crowd(place: Place) -> Crowd:
    names = [[f"{letter}{number}" for number in range(MANY)] for letter in "abc"]
    starts: list[Callable[[str], None]] = [partial(start, docker) for docker in place.both]
    starts.append(lambda name: place.podman.start(name, NETWORK))
    with ThreadPoolExecutor(len(starts)) as pool:  # one at a time on each host
        for done in [pool.submit(each, *pair) for pair in zip(starts, names, strict=True)]:
            done.result()
    found = [of_docker(docker) for docker in place.both]
    found.append({address: name for name, address in place.podman.addresses(NETWORK, *names[2]).items()})
    return Crowd(place, names, found)


def start(docker: Docker, name: str) -> None:
    docker.start(name, "--network", NETWORK)


def each(begin: Callable[[str], None], names: list[str]) -> None:
    for name in names:
        begin(name)


def of_docker(docker: Docker) -> dict[str, str]:
    """Containers by address."""
    shown = docker.docker(
        "network", "inspect", "-f", "{{range .Containers}}{{.Name}} {{.IPv4Address}};{{end}}", NETWORK
    )
    pairs = (one.split() for one in shown.stdout.strip().rstrip(";").split(";"))
    return {cidr.partition("/")[0]: name for name, cidr in pairs}


def lacks_overlay(place: Place, name: str) -> bool:
    """Whether a host has nothing of the network any more: no bridge, no tunnel, no container's interface or record."""
    (host,) = (one for one in place.hosts if one.name == name)
    links = host.links()
    return not (
        {f"nl-{NETWORK}", f"nl-vx{VNIS[NETWORK]}"} & links.keys()
        or [link for link in links if link.startswith("veth")]
        or any(host.path("/run/netloom/attachments").rglob("*@*"))
    )


def test_nobody_is_there_at_first(place: Place) -> None:
    assert place.listed() == set()
    assert [known(host, NETWORK) for host in place.hosts] == [(set(), set())] * 3


def test_all_have_an_address_of_their_own(crowd: Crowd) -> None:
    assert [sorted(found.values()) for found in crowd.found] == [sorted(names) for names in crowd.names]
    assert len(crowd.every) == 3 * MANY
    assert all(ip_address(address) in ip_network(NETWORKS[NETWORK]) for address in crowd.every)
    assert crowd.place.listed() == crowd.every.keys()


def test_all_are_known_and_reached_everywhere(crowd: Crowd) -> None:
    place = crowd.place
    for host, found in zip(place.hosts, crowd.found, strict=True):
        others = crowd.every.keys() - found.keys()
        wait_until(lambda h=host, o=others: known(h, NETWORK) == (o, o), f"all others on {host.name}")  # type: ignore[misc]
    where = [place.netns(place.one, "a0"), place.netns(place.two, "b0"), place.netns(place.podman, "c0")]
    with ThreadPoolExecutor(len(where)) as pool:
        assert list(pool.map(partial(silent, names=crowd.every), where)) == [[], [], []]


def test_nothing_is_left_of_them(crowd: Crowd) -> None:
    place = crowd.place
    with ThreadPoolExecutor() as pool:
        gone = [pool.submit(place.podman.remove_all)]
        gone += [pool.submit(remove, *pair) for pair in zip(place.both, crowd.names, strict=False)]
        for done in gone:
            done.result()
    wait_until(lambda: not place.listed(), "all addresses to come back", lambda: str(place.listed()))
    for host in place.hosts:
        wait_until(partial(lacks_overlay, place, host.name), f"nothing on {host.name}")
    left = [key for key in place.cluster.etcd.keys("/netloom/") if f"/{NETWORK}#" in key and "/freed/" not in key]
    assert not left
    for docker in place.both:
        wait_until(partial(lacks_endpoints, docker), f"no endpoint on {docker.host.name}")


def lacks_endpoints(docker: Docker) -> bool:
    return not docker.state()["endpoints"] and not docker.held()


def remove(docker: Docker, names: list[str]) -> None:
    docker.docker("rm", "-f", *names)
