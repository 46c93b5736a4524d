"""What `make install` installs, bundles and launchers, under podman and containerd: the warm way, and the cold one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import wait_until
from tests.runtimes import networks
from tests.runtimes.containerd import Containerd
from tests.runtimes.podman import Podman
from tests.runtimes.runtime_host import HOST_OUTSIDE, RuntimeHost

pytestmark = pytest.mark.kernel


def ways(*of: tuple[list[str], str]) -> list[tuple[str, str, str]]:
    """What `RuntimeHost.traced` has to say of verbs of the chain, and their way."""
    found = []
    for verbs, way in of:
        found += [(verb, plugin, way) for verb, plugin in (one.split() for one in verbs)]
    return found


def traced(host: RuntimeHost, wanted: list[tuple[str, str, str]]) -> None:
    """A request is told of once it is over, which may be after the runtime asked for the next."""
    wait_until(lambda: sorted(host.traced()) == sorted(wanted), "the traces", lambda: f"{host.traced()}")


def test_podman(installed: Path) -> None:
    with Podman(installed) as podman:
        podman.conflist("web", networks.CHAIN)
        podman.start("first", "--network", "web")
        podman.podman("rm", "-f", "-t", "0", "first")
        podman.settle()
        warm = ways((networks.added(), "warm"), (networks.deleted(), "warm"))
        traced(podman, warm)
        podman.start("a", "--network", "web", "-p", "8080:80")
        assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.outside) == "a"
        podman.end_service()
        podman.podman("rm", "-f", "-t", "0", "a")
        podman.start("b", "--network", "web", "-p", "8080:80")
        podman.begin_service()
        assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.outside) == "b"
        podman.podman("rm", "-f", "-t", "0", "b")
        cold = ways((networks.deleted(), "cold"), (networks.added(), "cold"))
        traced(podman, warm + warm + cold)
        podman.assert_clean()


def test_containerd(installed: Path) -> None:
    ports = [{"protocol": "TCP", "container_port": 80, "host_port": 8080}]
    with Containerd(installed) as containerd:
        containerd.network("pods", networks.CHAIN)
        containerd.remove(containerd.pod("first", port_mappings=ports))
        containerd.settle()
        pod = containerd.pod("a", port_mappings=ports)
        assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a"
        containerd.cri.stop_pod(pod)
        assert {way for _, _, way in containerd.traced()} == {"warm"}
        containerd.end_service()
        containerd.cri.remove_pod(pod)
        before = ways((networks.added() * 2, "warm"), (networks.deleted() * 3, "warm"))
        before += [(verb, "loopback", "warm") for verb in ("ADD", "DEL", "DEL", "ADD", "DEL")]
        traced(containerd, [*before, *ways((networks.deleted(), "cold")), ("DEL", "loopback", "cold")])
        containerd.begin_service()
        containerd.assert_clean()
