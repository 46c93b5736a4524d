"""The shim is killed at each call, and inside each: before it begins, between its steps, before it answers.

Docker's command then succeeds or fails with an error, a second attempt succeeds, and once all is removed, nothing is
left of it. Docker repeats a call whose connection was cut, but without its arguments: that is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.engine import Docker, settled
from tests.hosts import wait_until
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel

CREATE = (
    *("RequestPool:before", "RequestPool:writing", "RequestPool:written", "RequestPool:after"),
    *("RequestAddress:before", "RequestAddress:after"),
    *("CreateNetwork:before", "CreateNetwork:after"),
)
RUN = (
    *("RequestAddress:before", "RequestAddress:after"),
    *("CreateEndpoint:before", "CreateEndpoint:after"),
    *("Join:before", "Join:written", "Join:added", "Join:moved", "Join:after"),
    *("ProgramExternalConnectivity:before", "ProgramExternalConnectivity:written"),
    *("ProgramExternalConnectivity:added", "ProgramExternalConnectivity:after"),
)
REMOVE = (
    *("RevokeExternalConnectivity:before", "RevokeExternalConnectivity:deleted", "RevokeExternalConnectivity:after"),
    *("Leave:before", "Leave:after"),
    *("DeleteEndpoint:before", "DeleteEndpoint:deleted", "DeleteEndpoint:forgetting", "DeleteEndpoint:after"),
    *("ReleaseAddress:before", "ReleaseAddress:after"),
)
DELETE = (
    *("ReleasePool:before", "ReleasePool:forgetting", "ReleasePool:after"),
    *("DeleteNetwork:before", "DeleteNetwork:forgetting", "DeleteNetwork:after"),
)


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("faults", launcher, shim="tests.docker.faulty") as docker:
        yield docker


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    yield shared
    shared.host.path("/run/fault").unlink(missing_ok=True)
    shared.remove_all()
    shared.assert_clean()


@contextlib.contextmanager
def killed(docker: Docker, place: str) -> Iterator[None]:
    """The shim ends at this place, in what the block does."""
    fault = docker.host.path("/run/fault")
    served = docker.shim_log().count("serving Docker")
    fault.write_text(place, encoding="ascii")
    yield
    wait_until(lambda: not fault.exists(), f"the shim to reach {place}", docker.shim_log)  # maybe after its answer
    wait_until(lambda: docker.shim_log().count("serving Docker") > served, "the next shim", docker.shim_log)


def works(docker: Docker, name: str, port: int) -> None:
    """The container is reached by its published port and reaches the outside."""
    assert docker.ask(HOST_OUTSIDE, port, netns=docker.outside) == name
    docker.inside(name, "ping", "-c1", "-w5", OUTSIDE)


def has_pool(docker: Docker, base: str) -> bool:
    """Whether the shim has a pool that begins there."""
    return any(base in pool for pool in docker.state()["pools"])


def test_docker_network_create(docker: Docker) -> None:
    for number, place in enumerate(CREATE):
        with killed(docker, place):
            arguments = ("-d", "netloom", "--ipam-driver", "netloom", "--subnet", f"10.80.{number}.0/24", f"n{number}")
            done = docker.docker("network", "create", *arguments, check=False)
        if done.returncode != 0:
            assert "Error response from daemon" in done.stderr, place
            if docker.docker("network", "create", *arguments, check=False).returncode != 0:
                # Nobody gave its pool back; that goes after the grace.
                with docker.hurry():
                    wait_until(lambda n=number: not has_pool(docker, f"10.80.{n}.0"), place, docker.shim_log)  # type: ignore[misc]
                docker.docker("network", "create", *arguments)
        (shown,) = json.loads(docker.docker("network", "inspect", f"n{number}").stdout)
        assert shown["IPAM"]["Config"][0]["Subnet"] == f"10.80.{number}.0/24", place


def test_docker_run(docker: Docker) -> None:
    docker.network("web", "--subnet", "10.81.0.0/24")
    for number, place in enumerate(RUN):
        arguments = ("--network", "web", "-p", f"{8100 + number}:80")
        name = f"c{number}"
        with killed(docker, place):
            done = docker.docker(
                "run", "-d", "--name", name, "--hostname", name, *arguments, "localhost/busybox:1", check=False
            )
        if done.returncode != 0:
            assert "Error response from daemon" in done.stderr, place
            docker.docker("rm", "-f", name)
            docker.start(name, *arguments)
        works(docker, name, 8100 + number)
    docker.assert_agreement()
    for number in range(len(RUN)):
        works(docker, f"c{number}", 8100 + number)


def test_docker_rm(docker: Docker) -> None:
    """The next container gets the address at once, also of one that Docker could not give back."""
    docker.network("web", "--subnet", "10.82.0.0/24", "--ip-range", "10.82.0.8/31")
    docker.start("keep", "--network", "web", "-p", "8200:80")
    for place in REMOVE:
        docker.start("one", "--network", "web", "-p", "8201:80")
        with killed(docker, place):
            docker.docker("rm", "-f", "one")
        arguments = ("--name", "two", "--hostname", "two", "--network", "web", "-p", "8202:80", "localhost/busybox:1")

        done = docker.docker("run", "-d", *arguments, check=False)
        assert done.returncode == 0, f"{place}: {done.stderr}\n{docker.shim_log()[-4000:]}"
        works(docker, "two", 8202)
        docker.assert_agreement()
        works(docker, "two", 8202)
        docker.docker("rm", "-f", "two")
    works(docker, "keep", 8200)


def test_docker_network_rm(docker: Docker) -> None:
    subnets = [("--subnet", f"10.83.{number}.0/24") for number in range(len(DELETE))]
    for number, place in enumerate(DELETE):
        docker.network(f"n{number}", *subnets[number])
        docker.start("one", "--network", f"n{number}")
        docker.docker("rm", "-f", "one")
        with killed(docker, place):
            done = docker.docker("network", "rm", f"n{number}", check=False)
        if done.returncode != 0:
            docker.docker("network", "rm", f"n{number}")
    # What Docker has forgotten goes after the grace, which is waited for once.
    with docker.hurry():
        wait_until(lambda: not any(docker.state().values()), "all to go", docker.shim_log)
    for subnet in subnets:
        docker.network("web", *subnet)
        docker.docker("network", "rm", "web")
