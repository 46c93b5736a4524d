"""A stock docker0 carried by netd: dockerd is started with what netd wrote for it, and nothing else is done."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.docker.engine import Docker
from tests.docker.test_labs import prepare
from tests.hosts import Host, wait_until
from tests.underlay import Underlay

pytestmark = pytest.mark.kernel

_HOSTS = {"host1": "10.2.1", "host2": "10.2.2"}
_PEERS = "".join(
    f'[[peer]]\nname = "{name}"\naddress = "10.0.0.{number}"\nsubnets = ["{subnet}.0/24"]\n'
    for number, (name, subnet) in enumerate(_HOSTS.items(), 11)
)
_CONFIG = f'{_PEERS}[[network]]\nname = "pods"\nsubnets = ["10.2.0.0/16"]\n'


def docker_options(host: Host, name: str) -> list[str]:
    """What netd writes for dockerd, as a unit's EnvironmentFile has it."""
    host.path("/etc/netloom/netloom.toml").write_text(
        f'[netd]\nnode = "{name}"\nflannel_network = "pods"\n{_CONFIG}', encoding="utf-8"
    )
    log = host.directory / "netd.log"
    with log.open("w", encoding="utf-8") as stream:
        host.popen([sys.executable, "-m", "netd"], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    file = host.path("/run/flannel/docker")
    wait_until(file.exists, "options for dockerd", log.read_text)
    return host.run(["sh", "-c", '. /run/flannel/docker; printf %s "$DOCKER_OPTS"']).stdout.split()


def reaches(docker: Docker, address: str) -> bool:
    """Whether the container gets an answer."""
    return docker.docker("exec", "box", "ping", "-c1", "-W1", address, check=False).returncode == 0


def test_containers_of_docker0_reach_one_another(launcher: Path) -> None:
    with contextlib.ExitStack() as stack:
        underlay = stack.enter_context(Underlay("underlay", "10.0.0.0/24"))
        hosts = {}
        for number, (name, subnet) in enumerate(_HOSTS.items(), 11):
            docker = hosts[name] = stack.enter_context(Docker(name, launcher))
            underlay.join(docker.host, number)
            prepare(docker)
            options = docker_options(docker.host, name)
            assert options == [f"--bip={subnet}.1/24", "--ip-masq=false", "--mtu=1450"]
            docker.stop_dockerd()
            docker._dockerd_arguments += options
            docker.start_dockerd()
            docker.docker("run", "-d", "--name", "box", "--hostname", name, "box")
        for docker, (name, subnet) in zip(hosts.values(), reversed(_HOSTS.items()), strict=True):
            wait_until(partial(reaches, docker, f"{subnet}.2"), f"an answer of {name}")
            assert docker.docker("exec", "box", "wget", "-qO-", f"http://{subnet}.2").stdout == f"{name}\n"
            (link,) = json.loads(docker.docker("inspect", "box").stdout)
            assert link["NetworkSettings"]["Gateway"] in {f"{one}.1" for one in _HOSTS.values()}
        # Docker's own word on what it forwards stays: who is no container of the network begins nothing.
        policy = hosts["host1"].host.run(["iptables", "-S", "FORWARD"]).stdout
        assert "-P FORWARD DROP" in policy
        # What leaves the network has the host's address.
        shown = hosts["host1"].docker("exec", "box", "ping", "-c1", "10.0.0.1").stdout
        assert "1 packets received" in shown, shown
