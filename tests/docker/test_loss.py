"""What ends in the middle: the shim, dockerd, both. Afterwards Docker, the shim, ipamd and the kernel agree."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docker.engine import DOCKER, Docker, settled
from tests.hosts import PATIENCE_S, wait_until
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import HOST_OUTSIDE

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("loss", launcher) as docker:
        yield docker


@pytest.fixture(scope="module", autouse=True)
def deserted(launcher: Path) -> Iterator[tuple[Docker, subprocess.Popen[str]]]:
    """A host where a container is being removed, and the shim is away. Docker gives up on each of its four calls after
    15 s: so this begins before the other tests, which need not wait for it."""
    with settled("deserted", launcher) as docker:
        docker.network("web", "--subnet", "10.51.0.0/24")
        docker.start("one", "--network", "web")
        docker.stop_shim(signal.SIGKILL)
        removal = docker.host.popen([DOCKER, "rm", "-f", "one"], stdin=subprocess.DEVNULL, env=docker.environment)
        wait_until(lambda: not cgroups.found(), "the end of the container")  # of all hosts: they are looked at together
        yield docker, removal
        docker.remove_all()
        docker.assert_clean()


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    yield shared
    if shared.shim is None:
        shared.start_shim()
    if shared.dockerd is None:
        shared.start_dockerd()
    shared.remove_all()
    shared.assert_clean()


def test_the_shim_is_killed_and_nobody_notices(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.50.0.0/24")
    docker.start("one", "--network", "web", "-p", "8080:80")
    docker.stop_shim(signal.SIGKILL)
    assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "one"
    docker.start_shim()
    docker.start("two", "--network", "web")
    docker.inside("two", "ping", "-c1", "one")
    docker.docker("rm", "-f", "one")
    assert docker.silent(HOST_OUTSIDE, 8080, netns=docker.outside)


def test_dockerd_is_killed_with_running_containers(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.52.0.0/24")
    docker.start("one", "--network", "web", "--ip", "10.52.0.50")
    docker.stop_dockerd(signal.SIGKILL)
    docker.start_dockerd()
    with docker.hurry():
        wait_until(lambda: not docker.state()["endpoints"], "the endpoint to go", docker.shim_log)
    docker.docker("start", "one")
    assert docker.address("one", "web") == "10.52.0.50"
    docker.inside("one", "ping", "-c1", "10.52.0.1")


def test_both_are_killed(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.53.0.0/24")
    docker.start("one", "--network", "web")
    docker.stop_shim(signal.SIGKILL)
    docker.stop_dockerd(signal.SIGKILL)
    docker.start_shim()
    docker.start_dockerd()
    with docker.hurry():
        wait_until(lambda: not docker.state()["endpoints"], "the endpoint to go", docker.shim_log)
    docker.docker("start", "one")
    docker.inside("one", "ping", "-c1", "10.53.0.1")
    assert len(docker.state()["endpoints"]) == 1


def test_what_docker_has_forgotten_goes(docker: Docker) -> None:
    """As after a dockerd that was killed between two calls: everything is asked for, and nothing ever given back."""
    pool = docker.call("IpamDriver.RequestPool", Pool="10.54.0.0/24")["PoolID"]
    gateway = {"RequestAddressType": "com.docker.network.gateway"}
    assert docker.call("IpamDriver.RequestAddress", PoolID=pool, Options=gateway)["Address"] == "10.54.0.1/24"
    address = docker.call("IpamDriver.RequestAddress", PoolID=pool)["Address"]
    data = [{"Pool": "10.54.0.0/24", "Gateway": "10.54.0.1/24"}]
    docker.call("NetworkDriver.CreateNetwork", NetworkID="f" * 64, IPv4Data=data)
    ids = {"NetworkID": "f" * 64, "EndpointID": "e" * 64}
    docker.call("NetworkDriver.CreateEndpoint", **ids, Interface={"Address": address})
    taken = docker.call("NetworkDriver.Join", **ids)["InterfaceName"]["SrcName"]
    assert taken in docker.host.links()
    with docker.hurry():
        wait_until(lambda: not any(docker.state().values()), "what Docker does not have to go", docker.shim_log)
        wait_until(lambda: not docker.held(), "its address to come back", docker.shim_log)
    assert taken not in docker.host.links()


def test_nothing_is_removed_while_docker_does_not_answer(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.55.0.0/24")
    docker.start("one", "--network", "web")
    before = docker.state()
    looks = docker.shim_log().count("cannot compare with Docker")  # it is said once
    docker.stop_dockerd(signal.SIGKILL)
    wait_until(lambda: docker.shim_log().count("cannot compare with Docker") > looks, "a look", docker.shim_log)
    with docker.hurry(), pytest.raises(AssertionError):
        wait_until(lambda: docker.state() != before, "a removal, which must not come", limit_s=3)
    docker.start_dockerd()


def test_live_restore_keeps_containers_connected(launcher: Path) -> None:
    with settled("restore", launcher, "--live-restore") as docker:
        docker.network("web", "--subnet", "10.56.0.0/24")
        docker.start("one", "--network", "web", "-p", "8080:80")
        address = docker.address("one", "web")
        for number in (signal.SIGTERM, signal.SIGKILL):
            docker.stop_dockerd(number)
            assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "one"
            docker.start_dockerd()
            assert docker.address("one", "web") == address
            assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "one"
            refused = docker.docker("run", "--rm", "--network", "web", "--ip", address, images.NAME, check=False)
            assert address in refused.stderr
            docker.docker("run", "--rm", "--network", "web", images.NAME, "ping", "-c1", "one")
        docker.remove_all()
        docker.assert_clean()


def test_netloom_gc_has_it_compared_at_once(docker: Docker) -> None:
    def gc(*words: str) -> dict[str, Any]:
        found = json.loads(docker.netloom("gc", "--json", *words).stdout)
        assert found["released"] is not None
        told = found["docker"]
        assert isinstance(told, dict)
        return told

    pool = docker.call("IpamDriver.RequestPool", Pool="10.57.0.0/24")["PoolID"]
    told = gc("--dry-run")
    assert (told["error"], told["grace_s"]) == ("", 60)
    assert ("pool", pool) in [(one["kind"], one["name"]) for one in told["suspected"] + told["removed"]]
    docker.stop_dockerd(signal.SIGKILL)
    assert "nothing was compared: Docker at" in gc()["error"]
    docker.stop_shim(signal.SIGKILL)
    assert "the driver does not answer" in gc()["error"]
    docker.start_shim()
    docker.start_dockerd()
    gc()
    assert docker.state()["pools"]
    with docker.hurry():
        wait_until(lambda: not docker.state()["pools"], "the pool to go", docker.shim_log)
    assert gc() == {**told, "removed": [], "suspected": []}


def test_a_container_that_went_while_the_shim_was_away(deserted: tuple[Docker, subprocess.Popen[str]]) -> None:
    docker, removal = deserted
    assert removal.wait(2 * PATIENCE_S) == 0
    assert docker.state()["endpoints"]
    docker.start_shim()
    with docker.hurry():
        wait_until(lambda: not docker.state()["endpoints"], "the endpoint to go", docker.shim_log)
        wait_until(lambda: docker.held() == ["10.51.0.1/24"], "its address to come back", docker.shim_log)
