"""What `netloom status`, `route`, `topology` and `doctor` say on three hosts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hosts import IPV6, Host, wait_until
from tests.many_hosts.fleet import Fleet, state_of_netd

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """host1 and host2 on a segment, host3 behind a router; host1 has ipamd."""
    with Fleet("direct", segments=(0, 0, 1)) as made:
        made.host(1).start_ipamd()
        made.start()
        yield made


def netloom(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    return host.run([sys.executable, "-m", "cli", *words], check=False)


def document(host: Host, *words: str) -> dict[str, Any]:
    done = netloom(host, *words, "--json")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_status(fleet: Fleet) -> None:
    done = netloom(fleet.host(1), "status")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by eth0 192.168.77.11, 2 of 2 hosts reached" in done.stdout
    assert "default  direct   10.2.1.0/24" in done.stdout
    found = document(fleet.host(1), "status")["netd"]
    assert found["answers"] is True
    assert [(peer["name"], peer["state"], sorted(peer["links"])) for peer in found["peers"]] == [
        ("host2", "up", ["eth0", "nl-vx1"] if IPV6 else ["eth0"]),
        ("host3", "up", ["nl-vx1"]),
    ]


def test_route(fleet: Fleet) -> None:
    host = fleet.host(1)
    done = netloom(host, "route", "10.2.3.7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tunnel nl-vx1 to 192.168.78.13, VNI 1, UDP port 4789" in done.stdout
    found = document(host, "route", "10.2.3.7")["ways"][0]
    assert (found["node"], found["way"], found["mtu"], found["subnet"]) == ("host3", "tunnel", 1450, "10.2.3.0/24")
    kinds = {entry["kind"]: entry["present"] for entry in found["entries"]}
    assert kinds == dict.fromkeys(("device", "address", "neighbour", "forward", "route"), True)
    assert found["kernel"].startswith("10.2.3.7 via 10.2.3.0 dev nl-vx1")
    plain = document(host, "route", "10.2.2.9")["ways"][0]
    assert (plain["node"], plain["way"], plain["next_hop"], plain["link"]) == (
        "host2",
        "route",
        "192.168.77.12",
        "eth0",
    )
    assert document(host, "route", "10.2.1.5")["ways"][0]["kind"] == "own"
    assert document(host, "route", "192.168.77.12")["ways"][0]["kind"] == "underlay"
    assert document(host, "route", "192.0.2.1")["ways"][0]["kind"] == "elsewhere"


def test_route_to_a_container_by_its_id(fleet: Fleet) -> None:
    host = fleet.host(1)
    conf = {
        "cniVersion": "1.0.0",
        "name": "own",
        "type": "bridge",
        "bridge": "cni9",
        "ipam": {"type": "ipamd", "ranges": [[{"subnet": "10.2.1.128/25"}]]},
    }
    netns = host.netns("routed")
    host.cni("ADD", "bridge", conf, container_id="feedface01", netns=netns).result()
    found = document(host, "route", "feedf")["ways"]
    assert [(way["address"], way["kind"]) for way in found] == [("10.2.1.130", "own")]
    host.cni("DEL", "bridge", conf, container_id="feedface01", netns=netns).ok()
    done = netloom(host, "route", "feedf")
    assert done.returncode == 1
    assert "ipamd knows no container feedf" in done.stderr


def test_route_shows_what_is_missing(fleet: Fleet) -> None:
    host, netd = fleet.host(3), fleet.netd(3)
    before = state_of_netd(host)
    # netd must not put it back while we look.
    netd.stop()
    host.run(["ip", "neigh", "del", "10.2.1.0", "dev", "nl-vx1"])
    assert netloom(host, "route", "10.2.1.5").returncode == 3, "nobody answers"
    netd.start()
    assert state_of_netd(host) == before
    # An entry that netd may not touch stays missing.
    host.run(["ip", "route", "replace", "10.2.1.0/24", "via", "192.168.78.254", "proto", "static"])
    wait_until(lambda: netd.status().problems, "a problem")
    done = netloom(host, "route", "10.2.1.5")
    assert done.returncode == 1
    assert "NO" in done.stdout
    assert "instead: a route of protocol 4" in done.stdout
    assert "remove it with: ip route del 10.2.1.0/24" in done.stdout
    host.run(["ip", "route", "del", "10.2.1.0/24"])
    wait_until(lambda: not netd.status().problems, "rest")


def test_topology(fleet: Fleet) -> None:
    host = fleet.host(1)
    done = netloom(host, "topology")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "[host1]  192.168.77.11  (this host, eth0)"
    assert any("tunnel nl-vx1" in line and "[host3]  192.168.78.13" in line for line in lines)
    svg = netloom(host, "topology", "--svg", "-").stdout
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"host1", "host2", "host3"} <= set(texts)
    assert netloom(host, "topology", "--svg", "/run/netloom/picture.svg").returncode == 0
    assert host.path("/run/netloom/picture.svg").read_text() == svg
    assert netloom(host, "topology", "--svg", "/nowhere/x.svg").returncode == 1


def findings(host: Host) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in document(host, "doctor")["findings"]:
        found.setdefault(one["check"], []).append((one["level"], one["text"], one["remedy"]))
    return found


def test_doctor_is_content(fleet: Fleet) -> None:
    done = netloom(fleet.host(1), "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(fleet.host(1))
    assert {check: [level for level, _, _ in entries] for check, entries in found.items()} == {
        check: ["ok"]
        for check in ("forwarding", "firewalls", "netd", "versions", "underlay", "mtu", "tunnels", "checksums")
    }


def test_doctor_finds_a_narrow_path(fleet: Fleet) -> None:
    fleet.host(3).run(["ip", "link", "set", "eth0", "mtu", "1400"])
    try:
        wait_until(lambda: fleet.netd(3).status().underlay.mtu == 1400, "the other MTU")
        assert fleet.netd(3).status().networks[0].mtu == 1350
        assert fleet.host(3).links()["nl-vx1"]["mtu"] == 1350
        found = findings(fleet.host(1))["mtu"]
        assert [level for level, _, _ in found] == ["problem"]
        said = re.fullmatch(
            r"packets of 1500 bytes, which eth0 sends, do not get to host3 \(192\.168\.78\.13\); (\d+) do", found[0][1]
        )
        assert said is not None
        # A veth takes four bytes more than its MTU, the room of a VLAN's tag (is_skb_forwardable).
        assert int(said[1]) in (1400, 1404)
        assert f"mtu = {int(said[1]) - 50} under [netd]" in found[0][2]
    finally:
        fleet.host(3).run(["ip", "link", "set", "eth0", "mtu", "1500"])
    wait_until(lambda: fleet.host(3).links()["nl-vx1"]["mtu"] == 1450, "the MTU of before")


@pytest.mark.parametrize(
    ("spoil", "mend", "check", "said", "remedy"),
    [
        (
            "sysctl -qw net.ipv4.ip_forward=0",
            "sysctl -qw net.ipv4.ip_forward=1",
            "forwarding",
            "net.ipv4.ip_forward is 0",
            "sysctl -w net.ipv4.ip_forward=1",
        ),
    ],
)
def test_doctor_on_this_host(fleet: Fleet, spoil: str, mend: str, check: str, said: str, remedy: str) -> None:
    host = fleet.host(1)
    host.run(spoil.split())
    try:
        found = findings(host)[check]
        assert any(level == "problem" and said in text and remedy in help_ for level, text, help_ in found), found
        assert netloom(host, "doctor").returncode == 1
    finally:
        host.run(mend.split())


def drop(host: Host, rule: str) -> None:
    host.run(["nft", "add", "table", "inet", "spoil"])
    host.run(["nft", "add", "chain", "inet", "spoil", "in", "{ type filter hook input priority 0; }"])
    host.run(["nft", "add", "rule", "inet", "spoil", "in", *rule.split()])


@pytest.mark.parametrize(
    ("rule", "check", "level", "said", "remedy"),
    [
        ("udp dport 4789 drop", "tunnels", "problem", "host3 answer, but not through", "drop UDP port 4789"),
        ("ip protocol icmp drop", "underlay", "problem", "no answer from host3 (192.168.78.13)", "drop ICMP"),
        # Only what a kernel sends has options: as a card would spoil only what it was to finish.
        ("tcp option maxseg exists drop", "checksums", "problem", "the tunnel to host3 gets lost", "tx_checksum"),
        ("meta l4proto tcp drop", "checksums", "warning", "gets no answer, whoever makes", "cannot be judged"),
    ],
)  # fmt: skip
def test_doctor_finds_what_is_lost_on_the_way(
    fleet: Fleet, rule: str, check: str, level: str, said: str, remedy: str
) -> None:
    drop(fleet.host(3), rule)
    try:
        found = findings(fleet.host(1))[check]
        assert any(one[0] == level and said in one[1] and remedy in one[2] for one in found), found
    finally:
        fleet.host(3).run(["nft", "delete", "table", "inet", "spoil"])


def test_doctor_without_netd(fleet: Fleet) -> None:
    netd = fleet.netd(2)
    netd.stop()
    try:
        found = findings(fleet.host(2))["netd"]
        assert [level for level, _, _ in found] == ["problem"]
        assert "netd is not running" in found[0][1]
        assert "systemctl start netloom-netd" in found[0][2]
    finally:
        netd.start()


def test_checksum_offload_is_switched_by_the_configuration(fleet: Fleet) -> None:
    host, netd = fleet.host(1), fleet.netd(1)

    def offloaded() -> bool:
        script = "from kernel import vxlan; print(vxlan.tx_checksum('nl-vx1'))"
        return host.run([sys.executable, "-c", script]).stdout == "True\n"

    assert offloaded()
    before = host.links()["nl-vx1"]["ifindex"]
    fleet.configure(host, tx_checksum=False)
    netd.reload()
    wait_until(lambda: not offloaded(), "the switch")
    assert host.links()["nl-vx1"]["ifindex"] == before, "the device is not made anew for that"
    fleet.configure(host)
    netd.reload()
    wait_until(offloaded, "the switch back")
