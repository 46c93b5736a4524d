"""Two overlays over three hosts: Docker on two of them, podman on the third."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tests.docker.cluster import Cluster, clustered
from tests.docker.engine import Docker, patiently
from tests.hosts import PATIENCE_S, PROGRAM_PATH, Host, HostError, Netns, wait_until
from tests.many_hosts.test_podman import prepare
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import OWN

NETWORKS = {"ov1": "10.50.1.0/24", "ov2": "10.50.2.0/24"}
VNIS = {"ov1": 256, "ov2": 257}
AUTHORIZATION = "--authorization-plugin=netloom"  # of the first host's dockerd
Ask = Callable[..., str]

# Argument: seconds. Standard input: a JSON object of names by address. Asks the web server at each for its name until
# it says the right one; prints those that never did, with what they said.
_ASK_ALL = """
import http.client, json, sys, time
from concurrent.futures import ThreadPoolExecutor
deadline = time.monotonic() + float(sys.argv[1])
def ask(one):
    address, name = one
    while True:
        connection = http.client.HTTPConnection(address, timeout=3)
        try:
            connection.request("GET", "/")
            said = connection.getresponse().read().decode().strip()
        except (OSError, http.client.HTTPException) as error:
            said = str(error)
        finally:
            connection.close()
        if said == name:
            return []
        if time.monotonic() > deadline:
            return [f"{name} at {address}: {said}"]
        time.sleep(0.2)
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(sum(pool.map(ask, json.load(sys.stdin).items()), [])))
"""


class Podman:
    """podman on a host that has the cluster's networks as conflists."""

    def __init__(self, host: Host) -> None:
        self.host = host
        for network in NETWORKS:
            plugin = {"type": "netloom", "capabilities": {"portMappings": True, "ips": True, "mac": True}}
            prepare(host, {"cniVersion": "1.0.0", "name": network, "plugins": [plugin]})
        self.run("import", "-", images.NAME, input=images.root_tar())

    def start(self, name: str, network: str, *options: str) -> None:
        where = ["--cgroup-parent", cgroups.parent(), "--network", network, "--hostname", name, "--name", name]
        first = partial(self.run, "run", "-d", *where, *options, images.NAME, *images.SERVE)
        patiently(first, partial(self.run, "start", name))

    def inside(self, container: str, *command: str) -> str:
        return self.run("exec", container, *command)

    def address(self, container: str, network: str) -> str:
        return self.addresses(network, container)[container]

    def addresses(self, network: str, *containers: str) -> dict[str, str]:
        """By container."""
        found = json.loads(self.run("inspect", *containers))
        return {
            name: str(one["NetworkSettings"]["Networks"][network]["IPAddress"])
            for name, one in zip(containers, found, strict=True)
        }

    def remove_all(self) -> None:
        self.run("rm", "-f", "-t", "0", "-a")

    def run(self, *words: str, **options: object) -> str:
        environment = {"PATH": PROGRAM_PATH, "HOME": "/root"}
        return str(self.host.run(["podman", *words], env=environment, cwd="/", **options).stdout)  # type: ignore[arg-type]


class Place:
    """Cluster, and podman on its third host."""

    def __init__(self, cluster: Cluster, podman: Podman) -> None:
        self.cluster, self.podman = cluster, podman
        self.one, self.two = cluster.dockers.values()
        self.both = (self.one, self.two)
        self.hosts = (self.one.host, self.two.host, podman.host)

    def create(self) -> None:
        """What is missing of the networks, in the Docker of the first host, and both have them."""
        for name in NETWORKS:
            if not has_ours(self.one, name):
                overlay = ("-o", "type=overlay", "-o", f"network={name}")
                self.one.docker("network", "create", "-d", "netloom", *overlay, name)
        for docker in self.both:
            for name in NETWORKS:
                wait_until(partial(has_ours, docker, name), f"{name} on {docker.host.name}", docker.shim_log)

    def netns(self, docker: Docker | Podman, container: str) -> Netns:
        """A container's namespace."""
        printed = docker.docker("inspect", container).stdout if isinstance(docker, Docker) else docker.run(
            "inspect", container
        )  # fmt: skip
        found = Netns(docker.host, container)
        found.path = json.loads(printed)[0]["NetworkSettings"]["SandboxKey"]
        return found

    def number(self, name: str) -> int:
        """Of a host on the underlay."""
        return 11 + list(self.cluster.netds).index(name)

    def listed(self) -> set[str]:
        """The addresses that anybody has on any host, as the cluster's."""
        return {cidr.partition("/")[0] for cidr in self.two.held(cluster=True)}


@contextlib.contextmanager
def placed(launcher: Path) -> Iterator[Place]:
    """With the networks, which Docker has."""
    dockerd = {"host1": (AUTHORIZATION,), "host2": ()}
    with clustered(launcher, dockerd) as cluster, contextlib.ExitStack() as stack:
        host = stack.enter_context(Host("host3", own=OWN))
        cluster.join(host, stack)
        stack.callback(cgroups.remove)
        made = Place(cluster, Podman(host))
        for name, subnet in NETWORKS.items():
            vni = str(VNIS[name])
            made.one.netloom("network", "create", name, "--type", "overlay", "--subnet", subnet, "--vni", vni)
        made.create()
        try:
            yield made
        finally:
            clean(made)


def clean(place: Place) -> None:
    """Removes all containers."""
    for docker in place.both:
        containers = docker.docker("ps", "-aq").stdout.split()
        if containers:
            docker.docker("rm", "-f", *containers)
    place.podman.remove_all()


def has_ours(docker: Docker, name: str) -> bool:
    """Whether the one network of this name has the cluster's addresses."""
    shown = docker.docker("network", "inspect", "-f", "{{.IPAM.Driver}}", name, check=False)
    return shown.stdout.split() == ["netloom"]


def web(inside: Ask, container: str, address: str) -> str:
    """What an address serves, asked from a container; "" where nothing answers."""
    try:
        return inside(container, "timeout", "2", "wget", "-qO-", f"http://{address}").strip()
    except HostError:
        return ""


def silent(where: Netns, names: Mapping[str, str]) -> list[str]:
    """Which of these, names by address, do not serve their name to a container, with what they do instead."""
    argv = [sys.executable, "-I", "-c", _ASK_ALL, str(PATIENCE_S)]
    found: list[str] = json.loads(where.run(argv, input=json.dumps(names), timeout=3 * PATIENCE_S).stdout)
    return found


def known(host: Host, network: str) -> tuple[set[str], set[str]]:
    """Addresses that a host's kernel knows on other hosts: as neighbours; as MACs that the tunnel leads to."""
    neighbours = host.run(["ip", "neigh", "show", "dev", f"nl-{network}", "nud", "permanent"], check=False).stdout
    entries = host.run(["bridge", "fdb", "show", "dev", f"nl-vx{VNIS[network]}"], check=False).stdout
    there = [line.split()[0].split(":") for line in entries.splitlines() if " dst " in line]
    return (
        {line.split()[0] for line in neighbours.splitlines() if not line.startswith("ff")},
        {".".join(str(int(part, 16)) for part in mac[2:]) for mac in there},
    )
