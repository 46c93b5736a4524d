"""Much at once, again and again, and after the power went: nothing is lost, and nothing is left."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docker.engine import HASTY, Docker, settled
from tests.hosts import HostError, wait_until
from tests.runtimes import images
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with settled("times", launcher) as docker:
        yield docker


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    yield shared
    shared.remove_all()
    shared.assert_clean()


class Killer:
    """Kills one warm worker after the other while the block lasts."""

    def __init__(self, docker: Docker) -> None:
        self._docker = docker
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.killed = 0

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            for pid in self._docker.service.workers()[:1]:
                try:
                    self._docker.kill(pid)
                except (HostError, ProcessLookupError):
                    continue  # it ended meanwhile
                self.killed += 1


def test_twenty_at_once_while_workers_are_killed(docker: Docker) -> None:
    """A command fails or succeeds; again, it succeeds."""
    docker.network("many", "--subnet", "10.85.0.0/24")

    def start(number: int) -> None:
        name = f"c{number}"
        arguments = ("--name", name, "--hostname", name, "--network", "many", "-p", f"{8300 + number}:80")
        done = docker.docker("run", "-d", *arguments, images.NAME, check=False)
        if done.returncode != 0:
            assert "Error response from daemon" in done.stderr
            failed.append(number)

    failed: list[int] = []
    with ThreadPoolExecutor(20) as pool, Killer(docker) as killer:
        list(pool.map(start, range(20)))
    assert killer.killed
    for number in list(failed):
        docker.docker("rm", "-f", f"c{number}")
        start(number)
    assert len(failed) == len(set(failed)), failed
    docker.assert_agreement()
    assert [docker.ask(HOST_OUTSIDE, 8300 + number, netns=docker.outside) for number in range(20)] == [
        f"c{number}" for number in range(20)
    ]
    with ThreadPoolExecutor(20) as pool, Killer(docker) as killer:
        list(pool.map(lambda number: docker.docker("rm", "-f", f"c{number}"), range(20)))
    assert killer.killed
    docker.assert_agreement()
    assert docker.held() == ["10.85.0.1/24"]


def test_ten_restarts_on_two_networks_with_published_ports(docker: Docker) -> None:
    docker.network("left", "--subnet", "10.86.0.0/24")
    docker.network("right", "--subnet", "10.87.0.0/24")
    docker.start("peer", "--network", "right")
    docker.start("one", "--network", "left", "-p", "8080:80", "-p", "8081:80")
    docker.docker("network", "connect", "--ip", "10.87.0.50", "right", "one")

    def restart() -> Counter[str]:
        """What is there then, ids and addresses left out, which change."""
        docker.docker("restart", "-t", "0", "one")
        assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "one"
        docker.assert_agreement()
        kinds = ("nft ", "link ", "file ", "route ", "endpoints ", "address ", "networks ", "pools ")
        facts = (fact for fact in docker.snapshot().facts if fact.startswith(kinds))
        return Counter(re.sub(r"[0-9a-f:.]{4,}|[0-9]+", "#", fact.partition("{")[0]) for fact in facts)

    before = restart()
    for _ in range(8):
        restart()
    assert restart() == before
    assert docker.ask(HOST_OUTSIDE, 8081, netns=docker.outside) == "one"
    docker.inside("peer", "ping", "-c1", "10.87.0.50")


def test_the_power_goes(launcher: Path) -> None:
    docker = Docker("power", launcher)
    docker.shim_module = HASTY
    with docker:
        docker.network("web", "--subnet", "10.88.0.0/24")
        docker.network("also", "--subnet", "10.89.0.0/24")
        docker.start("always", "--network", "web", "--restart", "always", "-p", "8080:80", "--ip", "10.88.0.50")
        docker.docker("network", "connect", "also", "always")
        docker.start("running", "--network", "web", "-p", "8081:80")
        docker.start("stopped", "--network", "also")
        docker.docker("stop", "-t", "0", "stopped")
        docker.reboot()
        assert docker.ask(HOST_OUTSIDE, 8080, netns=docker.outside) == "always"
        assert docker.address("always", "web") == "10.88.0.50"
        docker.inside("always", "ping", "-c1", OUTSIDE)
        docker.assert_agreement()
        assert docker.silent(HOST_OUTSIDE, 8081, netns=docker.outside)
        docker.docker("start", "running", "stopped")
        assert docker.ask(HOST_OUTSIDE, 8081, netns=docker.outside) == "running"
        assert docker.inside("always", "wget", "-qO-", "http://running") == "running"
        wait_until(
            lambda: docker.inside("always", "wget", "-qO-", "http://stopped", check=False) == "stopped",
            "the server in stopped",
        )
        docker.assert_agreement()
        docker.remove_all()
        with docker.hurry():
            wait_until(lambda: not any(docker.state().values()) and not docker.held(), "all to go", docker.shim_log)
        assert not [link for link in docker.host.links() if link.startswith(("nl", "veth"))]
        assert not list(docker.host.path("/run/netloom/attachments").rglob("*@*"))
