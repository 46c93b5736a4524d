"""The labs of docs/labs, command by command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import lab
from tests.docker.engine import Docker
from tests.hosts import ROOT, Host, Netns
from tests.many_hosts.test_labs import LABS as FLANNEL
from tests.runtimes import images

ONE_HOST = ("docker-modes", "docker-networks", "docker-ports", "second-interface")


@pytest.fixture(scope="module")
def shared(launcher: Path) -> Iterator[Docker]:
    with Docker("labs", launcher) as docker:
        prepare(docker)
        docker.docker("network", "create", "-d", "netloom", "--subnet", "10.99.0.0/24", "first")
        docker.start("first", "--network", "first")
        docker.remove_all()
        docker.settle()
        yield docker


def prepare(docker: Docker) -> None:
    """The lab's image, and `netloom` where a shell finds it."""
    docker.docker("tag", images.NAME, "box")
    program = docker.host.path("/run/lab/netloom")
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m cli "$@"\n', encoding="utf-8")
    program.chmod(0o755)


def shell(docker: Docker, command: str, netns: str = "") -> str:
    """What a shell of the host, or of a namespace of it, prints."""
    wrapped = ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []
    # Debian's docker, and busybox for what a host may lack.
    path = "/run/lab:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {**docker.environment, "PATH": path}
    return docker.host.run([*wrapped, "sh", "-c", script(command)], env=environment, cwd="/", check=False).stdout


def script(command: str) -> str:
    """For a shell: busybox has the programs that a host may lack."""
    programs = "".join(f'{name}() {{ busybox {name} "$@"; }}\n' for name in ("wget", "ping"))
    return f"{programs}{{ {command}\n}} 2>&1"


def join(underlay: Host, there: Host | Netns, address: str) -> None:
    """Gives a host, or a namespace of the underlay's, an `eth0` on the segment."""
    port = f"p{address.partition('/')[0].rpartition('.')[2]}"
    underlay.run(["ip", "link", "add", port, "up", "master", "segment", "type", "veth", "peer", "name", f"{port}e"])
    path = there.path if isinstance(there, Netns) else there.netns_path
    underlay.run(["ip", "link", "set", f"{port}e", "netns", path])
    there.run(["ip", "link", "set", f"{port}e", "name", "eth0", "up"])
    there.run(["ip", "addr", "add", address, "dev", "eth0"])


@pytest.mark.kernel
@pytest.mark.parametrize("name", ONE_HOST)
def test_on_one_host(shared: Docker, name: str) -> None:
    try:
        lab.run(lab.LABS / f"{name}.md", lambda host, command: shell(shared, command, host))
        shared.assert_clean()
    finally:
        shared.remove_all()


@pytest.mark.kernel
def test_macvlan_on_two_hosts(launcher: Path) -> None:
    with contextlib.ExitStack() as stack:
        underlay = stack.enter_context(Host("underlay", plugins=False))
        underlay.run(["ip", "link", "add", "segment", "up", "type", "bridge"])
        outside = underlay.netns("outside")
        join(underlay, outside, "172.16.10.1/24")
        hosts = {name: stack.enter_context(Docker(name, launcher)) for name in ("host1", "host2")}
        for number, docker in enumerate(hosts.values(), 2):
            prepare(docker)
            join(underlay, docker.host, f"172.16.10.{number}/24")

        def execute(host: str, command: str) -> str:
            if host == "outside":
                return outside.run(["sh", "-c", script(command)], check=False).stdout
            return shell(hosts[host], command)

        lab.run(lab.LABS / "docker-macvlan.md", execute)


def test_every_lab_is_executed() -> None:
    there = {path.stem for path in lab.LABS.glob("*.md")} - {"README"}
    assert there == {
        *ONE_HOST,
        "docker-macvlan",
        "static-routes",
        "tunnels",
        "docker-overlay",
        *FLANNEL,
    }  # test_labs_of_hosts.py, many_hosts


@pytest.mark.parametrize(
    ("command", "looks"),
    [
        ("docker exec r1 wget -qO- http://b1 || echo unknown", True),
        ("docker run --rm --network host box wget -qO- http://127.0.0.1", True),
        ("docker run --rm --network lan box ip -o -4 addr show eth0", False),  # another address the next time
        ("ip -br link show type bridge", True),
        ("docker exec one ip route", True),
        ("ip route del 192.168.100.0/24", False),
        ("ip route show 192.168.200.0/24; ip route del 192.168.200.0/24", False),
        ("ip link set eth0 promisc on", False),
        ("cat >/etc/netloom/netloom.toml <<'END'\nEND", False),
    ],
)
def test_what_is_repeated_changes_nothing(command: str, looks: bool) -> None:
    assert lab.looks(command) == looks


def test_a_lab_that_shows_something_else_fails(tmp_path: Path) -> None:
    file = tmp_path / "wrong.md"
    file.write_text("```console\n$ one\nright\n$ two\n...\nlast ... word\n```\n", encoding="utf-8")
    lab.run(file, lambda _, command: {"one": "right\n", "two": "a\nb\nlast known word\n"}[command])
    shown = iter(("not yet\n", "right\n"))
    file.write_text("```console\n$ ip route\nright\n```\n", encoding="utf-8")
    lab.run(file, lambda _host, _command: next(shown))
    file.write_text("```console\n$ one\nright\n```\n", encoding="utf-8")
    for wrong in ("left\n", "right\nmore\n", ""):

        def execute(_: str, command: str, printed: str = wrong) -> str:
            return printed

        with pytest.raises(AssertionError, match=r"wrong\.md:2"):
            lab.run(file, execute)
