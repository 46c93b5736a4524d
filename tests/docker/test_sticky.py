"""Addresses that follow containers' names, where dockerd asks the shim before it starts a container."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from libnetwork.docker import is_let_alone
from tests.docker.engine import Docker, settled
from tests.hosts import PATIENCE_S, wait_until
from tests.runtimes import images

pytestmark = pytest.mark.kernel
STICKY = ("-o", "sticky=true")
TOLD = '"authorization-plugins": ["netloom"]'


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("sticky", launcher, "--authorization-plugin=netloom") as docker:
        yield docker


def remove(docker: Docker, *names: str) -> None:
    docker.docker("rm", "-f", *names)


def test_a_name_keeps_its_address(docker: Docker) -> None:
    docker.network("left", *STICKY, "--subnet", "10.50.0.0/24")
    docker.network("right", *STICKY, "--subnet", "10.51.0.0/24")
    docker.network("plain", "--subnet", "10.52.0.0/24")
    for name in ("other", "web"):
        docker.start(name, "--network", "left")
        docker.docker("network", "connect", "right", name)
        docker.docker("network", "connect", "plain", name)
    left, right, plain = ((docker.address("web", network)) for network in ("left", "right", "plain"))

    remove(docker, "other", "web")
    docker.docker("create", "--name", "web", "--network", "left", "--stop-signal", "KILL", images.NAME)
    docker.docker("network", "connect", "right", "web")
    docker.docker("start", "web")
    assert (docker.address("web", "left"), docker.address("web", "right")) == (left, right)
    docker.docker("stop", "web")
    docker.start("other", "--network", "left")
    docker.docker("start", "web")
    assert docker.address("web", "left") == left
    docker.docker("restart", "web")
    assert (docker.address("web", "left"), docker.address("web", "right")) == (left, right)
    docker.docker("network", "disconnect", "right", "web")
    docker.docker("network", "connect", "right", "web")
    assert docker.address("web", "right") == right
    # The name counts, not the container.
    docker.docker("rename", "other", "spare")
    docker.docker("rename", "web", "other")
    others = docker.address("spare", "left")
    remove(docker, "spare")
    docker.docker("restart", "other")
    assert docker.address("other", "left") == others
    # A network that does not say so gives its addresses in turn.
    docker.start("web", "--network", "plain")
    assert docker.address("web", "plain") != plain


def test_many_at_once_keep_each_its_own(docker: Docker) -> None:
    docker.network("left", *STICKY, "--subnet", "10.50.0.0/24")
    docker.network("right", *STICKY, "--subnet", "10.51.0.0/24")
    names = [f"one{number}" for number in range(5)]

    def both(name: str) -> tuple[str, str]:
        return docker.address(name, "left"), docker.address(name, "right")

    with ThreadPoolExecutor(len(names)) as pool:

        def each(*arguments: str) -> None:
            list(pool.map(lambda name: docker.docker(*arguments, name), names))

        def create() -> None:
            for name in names:
                docker.docker("create", "--name", name, "--network", "left", "--stop-signal", "KILL", images.NAME)
                docker.docker("network", "connect", "right", name)

        create()
        each("start")
        found = {name: both(name) for name in names}
        assert len(set(found.values())) == len(names)
        remove(docker, *names)
        create()
        each("start")
        assert {name: both(name) for name in names} == found
        # Each is stopped first, and some are while others start.
        each("restart")
        assert {name: both(name) for name in names} == found
        each("network", "disconnect", "left")
        each("network", "connect", "left")
        assert {name: both(name) for name in names} == found
    assert "not certain" not in docker.shim_log(), docker.shim_log()[-8000:]


def test_an_address_that_another_has_and_one_that_was_named(docker: Docker) -> None:
    docker.network("web", *STICKY, "--subnet", "10.50.0.0/24")
    docker.start("ann", "--network", "web")
    first = docker.address("ann", "web")
    remove(docker, "ann")
    docker.start("thief", "--network", "web", "--ip", first)
    assert docker.address("thief", "web") == first
    docker.start("ann", "--network", "web")
    second = docker.address("ann", "web")
    assert second != first
    remove(docker, "thief", "ann")
    docker.start("ann", "--network", "web")
    assert docker.address("ann", "web") == second  # the last one counts
    remove(docker, "ann")
    docker.start("ann", "--network", "web", "--ip", "10.50.0.77")
    assert docker.address("ann", "web") == "10.50.0.77"
    remove(docker, "ann")
    docker.start("ann", "--network", "web")
    assert docker.address("ann", "web") == second  # and not what was named


def test_what_docker_starts_again_by_itself(docker: Docker) -> None:
    docker.network("web", *STICKY, "--subnet", "10.50.0.0/24")
    until_told = "while [ ! -e /end ]; do sleep 0.1; done; rm /end; exit 1"
    docker.start("bob", "--network", "web", "--restart", "always", command=("sh", "-c", until_told))
    address = docker.address("bob", "web")
    for count in (1, 2):
        docker.inside("bob", "touch", "/end")
        wait_until(lambda: docker.inspect("bob")["RestartCount"] == count, "a restart", docker.shim_log)  # noqa: B023
        wait_until(lambda: docker.inspect("bob")["State"]["Status"] == "running", "bob", docker.shim_log)
    assert docker.address("bob", "web") == address


def test_docker_tells_nothing_of_a_container_that_it_starts(docker: Docker) -> None:
    """And of any other it does, which is how of two the one is found."""
    docker.network("web", *STICKY, "--subnet", "10.50.0.0/24")
    docker.start("other", "--network", "web")
    docker.docker("create", "--name", "web", "--network", "web", "--stop-signal", "KILL", images.NAME)
    path = str(docker.host.path("/run/docker.sock"))
    wanted = docker.shim_log().count("an address is wanted")
    assert is_let_alone(path, "web", PATIENCE_S) and is_let_alone(path, "other", PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        os.kill(docker.ipamd.pid, signal.SIGSTOP)  # the shim waits for it, and Docker for the shim
        try:
            starting = pool.submit(docker.docker, "start", "web", check=False)
            wait_until(lambda: docker.shim_log().count("an address is wanted") > wanted, "a request", docker.shim_log)
            assert not is_let_alone(path, "web", 0.5)
            assert is_let_alone(path, "other", PATIENCE_S)
        finally:
            os.kill(docker.ipamd.pid, signal.SIGCONT)
        starting.result()


def test_words(docker: Docker) -> None:
    for arguments, words in {
        ("-o", "sticky=maybe"): "option sticky=maybe: wanted true or false",
        ("-o", "sticky=true"): "option sticky=true: the addresses are not ours; add --ipam-driver netloom",
    }.items():
        done = docker.docker("network", "create", "-d", "netloom", *arguments, "web", check=False)
        assert done.returncode != 0
        assert words in done.stderr
    docker.network("web", *STICKY, "--subnet", "10.50.0.0/24")
    (web,) = json.loads(docker.docker("network", "inspect", "web").stdout)
    assert web["Options"] == {"sticky": "true"}
    assert TOLD not in docker.netloom("status", check=False).stdout


def test_a_dockerd_that_does_not_ask(docker: Docker) -> None:
    docker.network("web", *STICKY, "--subnet", "10.50.0.0/24")
    docker.stop_dockerd()
    arguments, docker._dockerd_arguments = docker._dockerd_arguments, []
    try:
        docker.start_dockerd()
        wait_until(lambda: TOLD in docker.netloom("status", check=False).stdout, "the words", docker.shim_log)
        docker.network("more", *STICKY, "--subnet", "10.51.0.0/24")
        assert docker.netloom("status", check=False).stdout.count(TOLD) == 2
        docker.start("ann", "--network", "web")  # with an address like any other
        remove(docker, "ann")
    finally:
        docker.stop_dockerd()
        docker._dockerd_arguments = arguments
        docker.start_dockerd()
    wait_until(lambda: TOLD not in docker.netloom("status", check=False).stdout, "no words", docker.shim_log)
    docker.start("ann", "--network", "web")
    address = docker.address("ann", "web")
    remove(docker, "ann")
    docker.start("ann", "--network", "web")
    assert docker.address("ann", "web") == address
