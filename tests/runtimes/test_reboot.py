"""The power goes while containers run, and comes back: what is on disk is older than what is in the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import wait_until
from tests.runtimes import networks
from tests.runtimes.containerd import Containerd
from tests.runtimes.podman import Podman
from tests.runtimes.runtime_host import HOST_OUTSIDE

pytestmark = pytest.mark.kernel


def test_podman(launcher: Path) -> None:
    """podman starts a container of before with the id of before; of the other one it has nothing to clean up."""
    with Podman(launcher) as podman:
        podman.conflist("web", networks.CHAIN)
        a = podman.start("a", "--network", "web", "-p", "8080:80")
        b = podman.start("b", "--network", "web", "-p", "8081:80")
        podman.reboot()
        podman.forget()
        podman.podman("start", "a")
        assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.outside) == "a"
        assert podman.verbs(a)[-len(networks.TYPES) :] == networks.added()
        # Nobody removes b, and its address comes back all the same.
        wait_until(lambda: b not in str(podman.host.allocations()), "the release of b's address")
        assert a in str(podman.host.allocations())
        podman.start("c", "--network", "web", "-p", "8081:80")
        assert podman.ask(HOST_OUTSIDE, 8081, netns=podman.outside) == "c"
        podman.podman("rm", "-f", "-t", "0", "a", "b", "c")
        assert not podman.host.allocations()
        assert not list(podman.host.path("/run/netloom/attachments").rglob("*@*"))


def test_containerd(launcher: Path) -> None:
    """A kubelet removes the pods of before, whose namespaces are gone, and runs new ones with the same ports."""
    ports = [{"protocol": "TCP", "container_port": 80, "host_port": 8080}]
    with Containerd(launcher) as containerd:
        containerd.network("pods", networks.CHAIN)
        old = containerd.pod("a", port_mappings=ports)
        containerd.reboot()
        containerd.begin()
        new = containerd.pod("a-again", port_mappings=ports)
        assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a-again"
        if old in containerd.cri.pods():
            containerd.remove(old)
        assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a-again"
        containerd.remove(new)
        wait_until(lambda: not containerd.host.allocations(), "the release of all addresses")
        assert not list(containerd.host.path("/run/netloom/attachments").rglob("*@*"))
