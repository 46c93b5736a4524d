"""The master's helper: addresses of the dead come back, and so does what was flushed from nftables."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernel.events import Change
from kernel.record import Records
from tests.hosts import CniCall, Host, Netns, wait_until
from tests.kernel import bus
from tests.warm.service import Service, bridge
from warm.watch import Watch

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
    """Without handles: they are new ones."""
    return [{kind: {**what, "handle": 0} for kind, what in item.items()} for item in service.host.nft()]


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


def test_what_a_container_left_that_died_without_a_del_goes(service: Service) -> None:
    host = service.host
    alive, dead = host.netns("alive"), host.netns("dead")
    service.add(alive, "alive").ok()
    before = elements(service, "masq4")
    records = host.path("/run/netloom/attachments/net")
    there = sorted(path.name for path in records.iterdir())
    service.add(dead, "dead").ok()
    assert len(elements(service, "masq4")) == 2
    dead.delete()
    wait_until(lambda: elements(service, "masq4") == before, "the element to go", service.log)
    wait_until(lambda: sorted(path.name for path in records.iterdir()) == there, "the record to go", service.log)
    wait_until(lambda: "removed what bridge left of dead eth0" in service.log(), "a line that says so")
    alive.ping(host.addresses()["br0"][0].split("/")[0])


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


@pytest.mark.parametrize("what", ["ruleset", "map inet netloom anydnat4", "the chain", "its rules"])
def test_published_ports_come_back(service: Service, what: str) -> None:
    """One with a condition has a chain of its own."""
    host = service.host
    for name, keys in (("c1", {}), ("c2", {"conditionsV4": ["ip saddr 192.0.2.0/24"]})):
        netns = host.netns(name)
        result = service.add(netns, name).result()
        conf = {**bridge(), "type": "portmap", "prevResult": result, **keys}
        mapping = {"hostPort": 8080 + int(name[1]), "containerPort": 80, "protocol": "tcp"}
        conf["runtimeConfig"] = {"portMappings": [mapping]}
        service.host.cni("ADD", "portmap", conf, netns=netns, container_id=name).ok()

    def rules() -> list[str]:
        return sorted(host.run(["nft", "--stateless", "list", "ruleset"]).stdout.splitlines())

    before = rules()
    (chain,) = [c["chain"]["name"] for c in host.nft() if c.get("chain", {}).get("name", "").startswith("c_")]
    empty = f"flush chain inet netloom {chain}"
    commands = {
        "the chain": f"flush map inet netloom anycond4; {empty}; delete chain inet netloom {chain}",
        "its rules": empty,
    }
    host.run(["nft", commands.get(what, f"flush {what}")])
    wait_until(lambda: rules() == before, "what was there", service.log)


def test_a_large_firewall_of_somebody_else_is_nothing_to_repair(service: Service) -> None:
    """More events than the usual buffer of a socket holds."""
    host = service.host
    service.add(host.netns("c1")).ok()
    rules = "".join(f"ip saddr 10.{n >> 8}.{n & 255}.1 tcp dport {n + 1} accept\n" for n in range(20_000))
    host.path("/run/foreign.nft").write_text(f"table ip foreign {{ chain a {{\n{rules}}}\n}}\n", encoding="ascii")

    def handle() -> list[int]:
        return [item["table"]["handle"] for item in host.nft() if item.get("table", {}).get("name") == "netloom"]

    before = handle()
    host.run(["nft", "-f", "/run/foreign.nft"])
    host.run(["nft", "delete", "table", "ip", "foreign"])
    # The helper works off what it hears in order: this is heard after all of it.
    host.run(["nft", "flush", "set", "inet", "netloom", "masq4"])
    wait_until(lambda: elements(service, "masq4") != [], "the element", service.log)
    assert handle() == before
    assert service.log().count("into nftables") == 1


def test_one_that_cannot_be_removed_keeps_nobody_elses_things(service: Service) -> None:
    host = service.host
    dead = [host.netns(f"dead{number}") for number in range(3)]
    for number, netns in enumerate(dead):
        service.add(netns, f"d{number}").ok()
    records = Records(str(host.path("/run/netloom")))
    one = next(record for record in records.all() if record.key.container_id == "d1")
    directory = host.path("/run/netloom/a directory")
    directory.mkdir()
    records.write(replace(one, files=("/run/netloom/a directory",)))
    for netns in dead:
        netns.delete()
    wait_until(lambda: len(list(records.all())) == 1, "the removal of the others", service.log)
    wait_until(lambda: "removal of what dead containers left: " in service.log(), "a complaint", service.log)
    assert [record.key.container_id for record in records.all()] == ["d1"]
    directory.rmdir()
    wait_until(lambda: not list(records.all()), "the removal of the last", service.log)


def test_missed_events_make_the_helper_write_the_tables_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears of its own writing, too; missing events of that must not make it begin again."""
    done: list[bool] = []
    helper = object.__new__(Watch)
    helper._rewrote = False
    monkeypatch.setattr(helper, "_rebuild", lambda _why, *, anew: done.append(anew))
    monkeypatch.setattr(helper, "_attempt", lambda _what, _work: None)
    missed = Change(structure=True, elements=True, forward=True, firewalld=True, lost=True)
    flushed = Change(structure=True, elements=True, pid=1, process="nft")
    for changes in ([missed], [missed], [missed, flushed], [flushed], [missed, missed], [missed]):
        helper._see_to(changes)
    assert done == [True, False, True, True, True, False]


ACCEPT = '-A FORWARD -m mark --mark 0x1000000/0x1000000 -m comment --comment "netloom lets pass 0x1000000" -j ACCEPT'


def forward(service: Service, tool: str = "iptables") -> list[str]:
    return service.host.run([tool, "-S", "FORWARD"]).stdout.splitlines()[1:]


def wall(service: Service, netns: Netns, verb: str = "ADD", **keys: Any) -> CniCall:
    """firewall after the bridge of a container that is there."""
    result = {"cniVersion": "1.0.0", "interfaces": [{"name": "br0"}], "ips": [{"address": "10.9.0.2/16"}]}
    conf = {"cniVersion": "1.0.0", "name": "net", "type": "firewall", "prevResult": result, **keys}
    return service.call(verb, conf, plugin="firewall", netns=netns)


def test_the_rule_in_front_of_another_firewall_comes_back(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    service.add(c1).ok()
    # Another firewall that is started later than the containers.
    wall(service, c1).ok()
    host.run(["iptables", "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT"])
    wait_until(lambda: forward(service)[:1] == [ACCEPT], "the rule", service.log)
    saved = host.run(["iptables-save", "-t", "filter"]).stdout.replace(f"{ACCEPT}\n", "")
    host.run(["iptables", "-P", "FORWARD", "DROP"])
    for command in (["iptables", "-F"], ["iptables-restore"]):
        host.run(command, input=saved)
        wait_until(lambda: ACCEPT in forward(service), f"the rule after {command}", service.log)
    # An administrator's chain, too.
    host.run(["iptables", "-N", "CNI-ADMIN"])
    wait_until(lambda: "CNI-ADMIN" in forward(service)[0], "the call", service.log)
    host.run(["nft", "delete", "table", "ip", "filter"])
    host.run(["iptables", "-P", "FORWARD", "DROP"])
    wait_until(lambda: forward(service) == [ACCEPT], "the rule in a new table", service.log)
    assert "by iptables" in service.log()
    assert "put the rule that lets our packets pass back into iptables" in service.log()
    # Nobody wants it any more.
    wall(service, c1, "DEL").ok()
    service.delete(c1).ok()
    assert forward(service) == []
    host.run(["iptables", "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT"])
    time.sleep(0.5)
    assert len(forward(service)) == 1


def test_the_rule_in_iptables_legacy_comes_back(service: Service) -> None:
    host = service.host
    if host.run(["iptables-legacy", "-P", "FORWARD", "DROP"], check=False).returncode:
        pytest.skip("this kernel has no iptables-legacy")
    c1 = host.netns("c1")
    wall(service, c1).ok()
    assert forward(service, "iptables-legacy") == [ACCEPT]
    host.run(["iptables-legacy", "-F"])
    wait_until(lambda: forward(service, "iptables-legacy") == [ACCEPT], "the rule", service.log)
    wall(service, c1, "DEL").ok()
    assert forward(service, "iptables-legacy") == []


def test_sources_that_firewalld_forgot_come_back(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    with bus.running(host):
        with bus.firewalld_running(host):
            wall(service, c1).ok()
        with bus.firewalld_running(host) as calls:
            assert calls() == []
            host.run(["nft", "add", "table", "inet", "firewalld"])  # as it does when it starts, and when it reloads
            wait_until(lambda: calls() == ["addSource trusted 10.9.0.2/32"], "the source", service.log)
            wait_until(lambda: "addresses of 1 attachments again" in service.log(), "a line that says so")
            wall(service, c1, "DEL").ok()
            assert calls()[1:] == ["removeSource trusted 10.9.0.2/32"]


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
