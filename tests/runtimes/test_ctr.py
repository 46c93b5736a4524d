"""`ctr run --cni`: containerd's own client runs the plugins itself, and often does not call DEL."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import HostError, Netns, wait_until
from tests.runtimes import cgroups, networks
from tests.runtimes.containerd import PAUSE, Containerd
from tests.runtimes.runtime_host import OUTSIDE

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=["cgroup1", "cgroup2"])
def shared(request: pytest.FixtureRequest, launcher: Path) -> Iterator[Containerd]:
    version2 = request.param == "cgroup2"
    if not version2 and not cgroups.has_version1():
        pytest.skip("this machine mounts no cgroup version 1, only cgroup2")
    with Containerd(launcher, version2, liveness_s=0.5) as containerd:
        containerd.conflist("web", networks.CHAIN)
        containerd.ctr_run("first", "--rm", command=["true"])
        containerd.delete_network("web", "web0")
        containerd.settle()
        yield containerd


@pytest.fixture
def containerd(shared: Containerd) -> Iterator[Containerd]:
    shared.forget()
    yield shared
    if "web0" in shared.host.links():  # `netloom gc` has deleted it where nobody wanted it any more
        shared.delete_network("web", "web0")
    try:
        shared.assert_clean()
    except HostError:
        shared.settle()
        raise
    assert shared.service.cold() == []


def netns(containerd: Containerd, name: str) -> Netns:
    there = Netns(containerd.host, name)
    there.path = containerd.requests(f"default-{name}", "ADD")[-1].netns
    return there


def address(containerd: Containerd, name: str) -> str:
    return str(containerd.requests(f"default-{name}", "ADD")[-1].result()["ips"][0]["address"]).partition("/")[0]


def kill(containerd: Containerd, name: str) -> None:
    """Ends a detached container and takes its container away; ctr calls no plugin for that."""
    containerd.ctr("task", "kill", "-s", "KILL", name)
    wait_until(lambda: "STOPPED" in containerd.ctr("task", "ls").stdout, "the end of the container")
    containerd.ctr("task", "rm", name)
    containerd.ctr("container", "rm", name)


def forget_cache(containerd: Containerd, name: str) -> None:
    """libcni's own note of an ADD stays where DEL was never called; it means nothing to anybody."""
    containerd.host.path(f"/var/lib/cni/results/web-default-{name}-eth0").unlink()


def test_a_container_in_the_foreground(containerd: Containerd) -> None:
    """ADD names the namespace by a process that is gone when DEL comes, which has no namespace at all."""
    serve = ["/bin/sh", "-c", "echo a >/dev/index.html; exec httpd -f -h /dev"]
    running = containerd.host.popen(
        ["ctr", "run", "--rm", *containerd.ctr_options("a"), PAUSE, "a", *serve],
        stdin=subprocess.DEVNULL,
        env=containerd.environment,
        cwd="/",
    )
    wait_until(lambda: len(containerd.requests("default-a", "ADD")) == len(networks.TYPES), "the ADD")
    assert containerd.ask(address(containerd, "a")) == "a"
    netns(containerd, "a").ping(OUTSIDE)
    netns(containerd, "a").ping(networks.GATEWAYS[0])
    containerd.ctr("task", "kill", "-s", "KILL", "a")
    running.wait(60)
    assert containerd.verbs("default-a") == networks.added() + networks.deleted()
    requests = containerd.requests("default-a")
    assert {one.netns.startswith("/proc/") for one in requests if one.verb == "ADD"} == {True}
    assert {one.netns for one in requests if one.verb == "DEL"} == {""}
    assert {one.status for one in requests} == {0}


def records(containerd: Containerd) -> str:
    return " ".join(file.name for file in containerd.host.path("/run/netloom/attachments").rglob("*@*"))


def test_what_a_detached_container_leaks_comes_back(containerd: Containerd) -> None:
    """By itself, once the container is dead: address, records, and what they stand for in the kernel."""
    containerd.ctr_run("a", "-d")
    containerd.ctr_run("b", "-d")
    b = address(containerd, "b")
    containerd.ask(b, netns=netns(containerd, "a"))
    kill(containerd, "a")
    assert containerd.verbs("default-a") == networks.added()
    wait_until(lambda: "default-a" not in str(containerd.host.allocations()), "the release of a's address")
    wait_until(lambda: "default-a" not in records(containerd), "the end of a's records")
    assert "default-b" in str(containerd.host.allocations())
    assert records(containerd).count("default-b") >= 3
    containerd.ask(b)
    kill(containerd, "b")
    wait_until(lambda: not containerd.host.allocations(), "the release of b's address")
    for name in ("a", "b"):
        forget_cache(containerd, name)


def test_what_it_leaks_goes_at_once_with_netloom_gc(containerd: Containerd) -> None:
    containerd.ctr_run("a", "-d")
    kill(containerd, "a")
    containerd.netloom("gc")
    assert records(containerd) == ""
    wait_until(lambda: not containerd.host.allocations(), "the release of the address, seen dead twice")
    forget_cache(containerd, "a")


def test_the_same_name_once_more_after_a_leak(containerd: Containerd) -> None:
    """Nobody called DEL, and nobody collected: the new container of that name gets its network all the same."""
    for _ in range(2):
        containerd.ctr_run("a", "-d")
        containerd.ask(address(containerd, "a"))
        kill(containerd, "a")
    with contextlib.suppress(HostError):
        containerd.ctr_run("a", "--rm", command=["true"])
    assert containerd.verbs("default-a")[-len(networks.TYPES) :] == networks.deleted()
