"""Sysctls of the thread's own namespace."""

from __future__ import annotations

import errno

import pytest

from kernel import sysctl
from kernel.errors import KernelError, NotFound
from kernel.netns import opened
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", "../../kernel/hostname"])
def test_a_part_never_leaves_the_directory(part: str) -> None:
    for attempt in (lambda: sysctl.read("ipv4", part), lambda: sysctl.write("1", "ipv4", part)):
        with pytest.raises(ValueError, match="cannot be part of a sysctl's name"):
            attempt()


@pytest.mark.kernel
def test_read_write_ensure(home: Space) -> None:
    assert sysctl.read("ipv4", "ip_forward") == "0"
    assert sysctl.ensure("1", "ipv4", "ip_forward") is True
    assert sysctl.ensure("1", "ipv4", "ip_forward") is False
    assert sysctl.read("ipv4", "ip_forward") == "1"
    sysctl.write("0", "ipv4", "ip_forward")
    assert spaces.run("cat", "/proc/sys/net/ipv4/ip_forward") == "0\n"


@pytest.mark.kernel
def test_each_namespace_has_its_own(session: Session, container: Space) -> None:
    with opened(container.path) as where, session.visit(where) as inside:
        with inside.inside():
            sysctl.write("1", "ipv4", "ip_forward")
        assert sysctl.read("ipv4", "ip_forward") == "0"
        with inside.inside():
            assert sysctl.read("ipv4", "ip_forward") == "1"


@pytest.mark.kernel
def test_an_interface_with_a_dot_in_its_name(home: Space) -> None:
    spaces.run("ip", "link", "add", "eth0.100", "type", "bridge")
    sysctl.write("1", "ipv4", "conf", "eth0.100", "arp_notify")
    assert sysctl.read("ipv4", "conf", "eth0.100", "arp_notify") == "1"


@pytest.mark.kernel
def test_failures_name_the_sysctl(home: Space) -> None:
    with pytest.raises(NotFound, match=r"read sysctl net\.ipv4\.no_such_thing"):
        sysctl.read("ipv4", "no_such_thing")
    with pytest.raises(NotFound, match=r"set sysctl net\.ipv4\.no_such_thing to 1"):
        sysctl.write("1", "ipv4", "no_such_thing")
    with pytest.raises(KernelError, match=r"set sysctl net\.ipv4\.ip_forward to many") as caught:
        sysctl.write("many", "ipv4", "ip_forward")
    assert caught.value.errno == errno.EINVAL
