"""What an ADD does while ipamd works: undone whatever comes of the request, and the answer given back however late."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cni.lab import Lab

pytestmark = pytest.mark.kernel
LINKS = {"bridge": "add veth pair", "ptp": "add veth pair", "macvlan": "add macvlan"}


@pytest.fixture
def lab(module_lab: Lab) -> Iterator[Lab]:
    """The module's host with an interface up0, which each test must leave as it found it."""
    module_lab.host.run(["ip", "link", "add", "up0", "up", "type", "veth", "peer", "name", "up1"])
    before = module_lab.host.snapshot()
    yield module_lab
    module_lab.tidy(before)
    module_lab.host.run(["ip", "link", "delete", "up0"])


def conf_of(plugin: str, subnet: str = "10.5.0.0/16") -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "bridge": {"bridge": "br5", "isGateway": True, "ipMasq": True},
        "ptp": {},
        "macvlan": {"master": "up0"},
    }
    ipam = {"type": "ipamd", "ranges": [[{"subnet": subnet}]], "timeout": 20}
    return {"cniVersion": "1.1.0", "name": f"net-{plugin}-{subnet[:4]}", "type": plugin, "ipam": ipam, **own[plugin]}


@contextmanager
def asleep(lab: Lab, limit_s: float = 0.3) -> Iterator[None]:
    """ipamd does nothing until the end of the block, and not longer than the limit."""
    pid = lab.ipamd.pid
    alarm = threading.Timer(limit_s, os.kill, (pid, signal.SIGCONT))
    os.kill(pid, signal.SIGSTOP)
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("plugin", LINKS)
def test_an_answer_that_comes_after_the_failure_is_given_back(lab: Lab, plugin: str) -> None:
    conf = conf_of(plugin)
    with lab.space() as netns:
        for _ in range(2):  # the second one makes nothing that all share
            called = lab.cni("ADD", plugin, conf, netns=netns).calls
            lab.cni("DEL", plugin, conf, netns=netns).ok()
        asked, answered = called.index("ask for addresses"), called.index("allocate")
        made = next(number for number, label in enumerate(called) if label.startswith(LINKS[plugin]))
        assert asked < made < answered
        before = lab.host.snapshot()
        for when in ("before", "after"):
            with asleep(lab):
                fault = {"at": made + 1, "when": when, "kind": "signal"}
                answer = lab.cni("ADD", plugin, conf, netns=netns, faults=[fault])
            assert answer.code() == 999
            lab.host.assert_clean(before)
            assert answer.undo_calls[-2:] == ("allocate", "release")


@pytest.mark.parametrize("plugin", LINKS)
def test_a_refusal_after_the_link_was_made(lab: Lab, plugin: str) -> None:
    conf = conf_of(plugin, "10.6.0.0/30")  # the gateway, and one more
    with lab.attached(conf, plugin), lab.space() as netns:
        before = lab.host.snapshot()
        for _ in range(3):
            answer = lab.cni("ADD", plugin, conf, netns=netns, container_id="late")
            assert answer.code() == 100
            lab.host.assert_clean(before)
        lab.cni("DEL", plugin, conf, netns=netns, container_id="late").ok()
        lab.host.assert_clean(before)


def test_no_bridge_for_a_container_without_addresses(lab: Lab) -> None:
    conf = {**conf_of("bridge", "10.7.0.0/30"), "bridge": "br7"}
    conf["ipam"]["exclude"] = ["10.7.0.2"]
    with lab.space() as netns:
        assert lab.cni("ADD", "bridge", conf, netns=netns).code() == 7
    assert "br7" not in lab.bridges()


def test_an_ipamd_that_is_away(lab: Lab) -> None:
    plugin = "bridge"
    conf = conf_of(plugin)
    with lab.space() as netns:
        lab.cni("ADD", plugin, conf, netns=netns).ok()
        lab.cni("DEL", plugin, conf, netns=netns).ok()
        before = lab.host.snapshot()
        lab.ipamd.stop()
        try:
            answer = lab.cni("ADD", plugin, conf, netns=netns)
            assert answer.code() == 11
            assert set(netns.links()) == {"lo"}
        finally:
            lab.ipamd.start()
        lab.cni("ADD", plugin, conf, netns=netns).ok()
        lab.cni("DEL", plugin, conf, netns=netns).ok()
        lab.host.assert_clean(before)


@pytest.mark.parametrize("plugin", LINKS)
def test_who_is_still_connected_keeps_its_address(lab: Lab, plugin: str) -> None:
    """Where the kernel does not let the interface go, a DEL fails, and the next one finds all that the first did."""
    conf = conf_of(plugin)
    with lab.space() as netns:
        lab.cni("ADD", plugin, conf, netns=netns).ok()
        there: dict[str, Any] = {"netns": netns} if plugin == "macvlan" else {}
        called = lab.cni("DEL", plugin, conf, **there).calls
        before = lab.host.snapshot()
        number = next(number for number, label in enumerate(called) if "delete link" in label)
        lab.cni("ADD", plugin, conf, netns=netns).ok()
        held = lab.host.allocations()
        for _ in range(2):
            fault = {"at": number + 1, "when": "before", "kind": "kernel"}
            assert lab.cni("DEL", plugin, conf, faults=[fault], **there).code() > 0
            assert "eth0" in netns.links()
            assert lab.host.allocations() == held
        lab.cni("DEL", plugin, conf, **there).ok()
        assert set(netns.links()) == {"lo"}
        lab.host.assert_clean(before)
