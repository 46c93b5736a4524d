"""podman on two hosts: one conflist of one plugin, and containers reach one another by their own addresses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping

import pytest

from tests.cni.chained.traffic import ask, serving
from tests.hosts import CNI_BIN, PROGRAM_PATH, Host, Netns, wait_until
from tests.many_hosts.pods import Pods
from tests.runtimes import cgroups, images
from tests.runtimes.podman import CONTAINERS_CONF
from tests.runtimes.runtime_host import NET_D, OWN

pytestmark = pytest.mark.kernel

# The same on every host.
CONFLIST = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [{"type": "netloom", "capabilities": {"portMappings": True, "bandwidth": True}}],
}


def podman(fleet: Pods, number: int, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": PROGRAM_PATH, "HOME": "/root"}
    return fleet.host(number).run(["podman", *words], env=environment, cwd="/", **options)  # type: ignore[arg-type]


def prepare(host: Host, conflist: Mapping[str, object]) -> None:
    """What podman on a host reads; the host has directories of its own for that (OWN)."""
    for path in ("/var/tmp", "/dev/shm"):
        host.path(path).chmod(0o1777)
    host.path(f"{NET_D}/10-{conflist['name']}.conflist").write_text(json.dumps(conflist))
    conf = CONTAINERS_CONF.format(plugins=json.dumps([CNI_BIN]), net_d=NET_D, environment="")
    host.path("/etc/containers/containers.conf").write_text(conf)
    policy = '{"default": [{"type": "insecureAcceptAnything"}]}'
    host.path("/etc/containers/policy.json").write_text(policy)


def start(fleet: Pods, number: int, name: str, *options: str, network: str = "pods") -> tuple[str, Netns]:
    """The container's address, and its namespace."""
    where = ["--cgroup-parent", cgroups.parent(), "--network", network, "--hostname", name, "--name", name]
    podman(fleet, number, "run", "-d", *where, *options, images.NAME, *images.SERVE)
    settings = json.loads(podman(fleet, number, "inspect", name).stdout)[0]["NetworkSettings"]
    netns = Netns(fleet.host(number), name)
    netns.path = settings["SandboxKey"]
    return settings["Networks"][network]["IPAddress"], netns


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pods]:
    """Two hosts with podman and the network pods."""
    try:
        with Pods(segments=(0, 0), own=OWN) as made:
            made.start()
            made.netloom(1, "network", "create", "pods", "--subnet", "10.2.0.0/16", "--backend", "vxlan")
            made.until_known("pods")
            for number, host in enumerate(made.hosts, 1):
                prepare(host, CONFLIST)
                podman(made, number, "import", "-", images.NAME, input=images.root_tar())
            yield made
    finally:
        cgroups.remove()


def web(where: Netns, address: str, port: int = 80) -> bool:
    """Whether the container's web server answers there."""
    script = f"exec 3<>/dev/tcp/{address}/{port} && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q two <&3"
    return where.run(["timeout", "5", "bash", "-c", script], check=False).returncode == 0


def test_containers_of_podman_on_two_hosts(fleet: Pods) -> None:
    try:
        one, there = start(fleet, 1, "one")
        two, here = start(fleet, 2, "two", "-p", "8080:80")
        wait_until(lambda: web(there, two), "the other host's container")
        with serving(here, "two", "tcp:81"):
            assert ask(there, ("tcp", two, 81)) == [f"two {one}"], "the true source"
        assert there.links()["eth0"]["mtu"] == 1450
        # A published port of the other host, from a container and from the host.
        address = fleet.underlay_address(2)
        wait_until(lambda: web(there, address, 8080), "the published port")
        assert "two" in podman(fleet, 1, "exec", "one", "wget", "-qO-", f"http://{two}/").stdout
    finally:
        for number in (1, 2):
            podman(fleet, number, "rm", "-f", "-t", "0", "-a", check=False)
    for host in fleet.hosts:
        wait_until(lambda host=host: not host.allocations(), "the end of all allocations", lambda: "")  # type: ignore[misc]
        assert not [name for name in host.links() if name.startswith("veth")]
