"""The labs of two Docker hosts with netd between them, command by command."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.docker import lab
from tests.docker.cluster import clustered
from tests.docker.engine import Docker
from tests.docker.test_labs import prepare, shell
from tests.hosts import wait_until
from tests.underlay import Underlay

pytestmark = pytest.mark.kernel
SOCKET = "/run/netloom/netd.sock"
# `systemctl reload` of the lab's host: it returns when the configuration was read, as nobody else reads along there.
_RELOAD = """#!/bin/sh
said() { grep -c "the configuration" "$1"; }
[ "$*" = "reload netloom-netd" ] || { echo "only reload netloom-netd is known here"; exit 1; }
before=$(said /run/lab/netd.log)
kill -HUP "$(cat /run/lab/netd.pid)"
while [ "$(said /run/lab/netd.log)" = "$before" ]; do sleep 0.1; done
"""


@contextlib.contextmanager
def hosts(launcher: Path, bips: Mapping[str, str], *dockerd: str) -> Iterator[dict[str, Docker]]:
    """host1 and host2 on a segment, with these addresses of docker0."""
    with contextlib.ExitStack() as stack:
        underlay = stack.enter_context(Underlay("underlay", "10.0.0.0/24"))
        made = {}
        for number, (name, bip) in enumerate(bips.items(), 11):
            docker = stack.enter_context(Docker(name, launcher, ["--bip", bip, "--ip-masq=false", *dockerd]))
            underlay.join(docker.host, number)
            prepare(docker)
            start_netd(docker, name)
            made[name] = docker
        yield made
        for docker in made.values():
            docker.remove_all()


def start_netd(docker: Docker, name: str) -> None:
    """netd without peers, and a `systemctl` for it."""
    host, place = docker.host, docker.host.path("/run/lab")
    host.path("/etc/netloom/netloom.toml").write_text(f'[netd]\nnode = "{name}"\ninterface = "eth0"\n')
    with (place / "netd.log").open("w") as log:
        process = host.popen([sys.executable, "-m", "netd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    (place / "netd.pid").write_text(f"{process.pid}\n")
    (place / "systemctl").write_text(_RELOAD)
    (place / "systemctl").chmod(0o755)
    wait_until(lambda: host.path(SOCKET).exists() or process.poll() is not None, "netd", (place / "netd.log").read_text)
    assert process.poll() is None, (place / "netd.log").read_text()


def test_overlay(launcher: Path) -> None:
    with clustered(launcher, {"host1": (), "host2": ()}, "10.0.0.0/24") as cluster:
        made = cluster.dockers
        for docker in made.values():
            prepare(docker)
        lab.run(lab.LABS / "docker-overlay.md", lambda host, command: shell(made[host], command))


def test_static_routes(launcher: Path) -> None:
    with hosts(launcher, {"host1": "192.168.100.1/24", "host2": "192.168.200.1/24"}) as made:
        lab.run(lab.LABS / "static-routes.md", lambda host, command: shell(made[host], command))


def test_tunnels(launcher: Path) -> None:
    with hosts(launcher, {"host1": "10.2.1.1/24", "host2": "10.2.2.1/24"}, "--mtu", "1450") as made:
        lab.run(lab.LABS / "tunnels.md", lambda host, command: shell(made[host], command))
