"""The master's helper: addresses of the dead come back, and so does what was flushed from nftables."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.warm.service import Service, bridge

pytestmark = pytest.mark.kernel


@pytest.fixture
def service(host: Host, launcher: Path) -> Iterator[Service]:
    host.start_ipamd(pools={"cooldown_s": 0}, reclaim={"grace_s": 0.1})
    one = Service(host, launcher, ["--workers", "2", "--liveness-interval", "0.2"])
    one.start()
    yield one
    assert one.stop() == 0


def elements(service: Service, name: str) -> list[object]:
    for item in service.host.nft():
        if item.get("set", {}).get("name") == name:
            return list(item["set"].get("elem", ()))
    return []


def ruleset(service: Service) -> list[object]:
    """Without the tables' handles: they are new ones."""
    return [
        {**item, "table": {**item["table"], "handle": 0}} if "table" in item else item for item in service.host.nft()
    ]


def test_addresses_of_a_container_that_died_without_a_del_come_back(service: Service) -> None:
    host = service.host
    alive, dead = host.netns("alive"), host.netns("dead")
    kept = service.add(alive, "alive").result()["ips"][0]["address"].split("/")[0]
    lost = service.add(dead, "dead").result()["ips"][0]["address"].split("/")[0]
    assert len(host.allocations()) == 2
    dead.delete()
    wait_until(lambda: len(host.allocations()) == 1, "the release", lambda: service.log() + str(host.allocations()))
    assert kept in host.allocations()[0]
    assert f"released {lost}" in service.log()


@pytest.mark.parametrize(
    "command",
    ["flush ruleset", "delete table inet netloom", "flush table inet netloom", "flush set inet netloom masq4"],
)
def test_what_was_taken_from_nftables_comes_back(service: Service, command: str) -> None:
    host = service.host
    c1 = host.netns("c1")
    service.add(c1).ok()
    before = ruleset(service)
    assert elements(service, "masq4")
    assert elements(service, "nomasq4")
    host.run(["nft", *command.split()])
    wait_until(lambda: ruleset(service) == before, "what was there", service.log)
    wait_until(lambda: "into nftables" in service.log(), "a line that says so")


def test_our_own_requests_are_no_reason_to_rebuild(service: Service) -> None:
    c1 = service.host.netns("c1")
    service.add(c1).ok()  # writes the tables, which is a reason
    service.delete(c1).ok()
    time.sleep(0.5)
    before = service.log()
    for _ in range(5):
        service.add(c1).ok()
        service.delete(c1).ok()
    time.sleep(0.5)
    assert service.log() == before


def test_the_helper_is_replaced_and_repairs_what_happened_meanwhile(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    service.add(c1).ok()
    before = ruleset(service)
    os.kill(helper(service), signal.SIGKILL)
    host.run(["nft", "flush", "ruleset"])
    wait_until(lambda: ruleset(service) == before, "what was there", service.log)


def test_without_ipamd_it_goes_on_and_says_so_once(service: Service) -> None:
    host = service.host
    assert host._ipamd is not None
    host._ipamd.stop()
    wait_until(lambda: "ipamd is not reachable" in service.log(), "a complaint")
    c1 = host.netns("c1")
    conf = bridge(ipam={}, isDefaultGateway=False)
    service.call("ADD", conf, netns=c1).ok()
    pid = helper(service)
    host._ipamd.start()
    dead = host.netns("dead")
    service.add(dead, "dead").ok()
    dead.delete()
    wait_until(lambda: host.allocations() == [], "the release", service.log)
    assert helper(service) == pid
    assert service.log().count("ipamd is not reachable") == 1


def helper(service: Service) -> int:
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text(encoding="ascii").split()
    (pid,) = (int(pid) for pid in children if "watch" in Path(f"/proc/{pid}/comm").read_text(encoding="ascii"))
    return pid
