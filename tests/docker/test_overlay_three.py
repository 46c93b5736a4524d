"""Two overlays over three hosts: Docker on two of them, podman on the third."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.docker.cluster import Cluster, clustered
from tests.docker.engine import Docker
from tests.hosts import PROGRAM_PATH, Host, HostError, wait_until
from tests.many_hosts.test_podman import prepare
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import OWN

pytestmark = pytest.mark.kernel
NETWORKS = {"ov1": "10.50.1.0/24", "ov2": "10.50.2.0/24"}
Ask = Callable[..., str]


class Podman:
    """podman on a host that has the cluster's networks as conflists."""

    def __init__(self, host: Host) -> None:
        self.host = host
        for network in NETWORKS:
            plugin = {"type": "netloom", "capabilities": {"portMappings": True, "ips": True, "mac": True}}
            prepare(host, {"cniVersion": "1.0.0", "name": network, "plugins": [plugin]})
        self._run("import", "-", images.NAME, input=images.root_tar())

    def start(self, name: str, network: str, *options: str) -> None:
        where = ["--cgroup-parent", cgroups.parent(), "--network", network, "--hostname", name, "--name", name]
        self._run("run", "-d", *where, *options, images.NAME, *images.SERVE)

    def inside(self, container: str, *command: str) -> str:
        return self._run("exec", container, *command)

    def address(self, container: str, network: str) -> str:
        found = json.loads(self._run("inspect", container))[0]["NetworkSettings"]["Networks"][network]
        return str(found["IPAddress"])

    def remove_all(self) -> None:
        self._run("rm", "-f", "-t", "0", "-a")

    def _run(self, *words: str, **options: object) -> str:
        environment = {"PATH": PROGRAM_PATH, "HOME": "/root"}
        return str(self.host.run(["podman", *words], env=environment, cwd="/", **options).stdout)  # type: ignore[arg-type]


class Place:
    """Cluster, and podman on its third host."""

    def __init__(self, cluster: Cluster, podman: Podman) -> None:
        self.cluster, self.podman = cluster, podman
        self.one, self.two = cluster.dockers.values()


@pytest.fixture
def place(launcher: Path) -> Iterator[Place]:
    with clustered(launcher, {"host1": (), "host2": ()}) as cluster, contextlib.ExitStack() as stack:
        host = stack.enter_context(Host("host3", own=OWN))
        cluster.join(host, stack)
        stack.callback(cgroups.remove)
        made = Place(cluster, Podman(host))
        stack.callback(made.podman.remove_all)
        for name, subnet in NETWORKS.items():
            made.one.netloom("network", "create", name, "--type", "overlay", "--subnet", subnet)
            made.one.docker("network", "create", "-d", "netloom", "-o", "type=overlay", "-o", f"network={name}", name)
        for docker in (made.one, made.two):
            for name in NETWORKS:
                wait_until(partial(has_ours, docker, name), f"{name} on {docker.host.name}", docker.shim_log)
        yield made
        for docker in (made.one, made.two):
            docker.remove_all()


def has_ours(docker: Docker, name: str) -> bool:
    shown = docker.docker("network", "inspect", "-f", "{{.IPAM.Driver}}", name, check=False)
    return shown.stdout.split() == ["netloom"]


def web(inside: Ask, container: str, address: str) -> str:
    """What an address serves, asked from a container; "" where nothing answers."""
    try:
        return inside(container, "timeout", "2", "wget", "-qO-", f"http://{address}").strip()
    except HostError:
        return ""


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
    for network, found in addresses.items():
        other = next(name for name in NETWORKS if name != network)
        for container in found:
            for name, address in found.items():
                wait_until(lambda c=container, a=address, n=name: ask(c, a) == n, f"{name} from {container}")  # type: ignore[misc]
            assert ask(container, next(iter(addresses[other].values()))) == ""
    # Out by the own host, under its address; in by a published port.
    outside = place.cluster.underlay.address(_number(place, "host2"))
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
    shown = json.loads(two.netloom("ip", "list", "--cluster", "--json").stdout)["allocations"]
    held = {address["cidr"].partition("/")[0] for one in shown for address in one["addresses"]}
    assert held == {address for found in addresses.values() for address in found.values()}


def _number(place: Place, name: str) -> int:
    return 11 + list(place.cluster.netds).index(name)
