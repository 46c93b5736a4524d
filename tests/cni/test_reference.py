"""What the reference left goes with DEL and GC of bridge. The rules are written here as newer references write them in
nftables; tests/peers has what Debian's itself writes."""

from __future__ import annotations

from typing import Any

import pytest

from kernel import reference
from kernel.reference import Owner
from tests.cni.lab import Lab, net, pool
from tests.hosts import Netns

pytestmark = pytest.mark.kernel
CONF = net(ipMasq=True, macspoofchk=True, ipam=pool())


def leave(lab: Lab, container_id: str, network: str = "net", ifname: str = "eth0") -> None:
    """What ipMasq and macspoofchk of the reference make."""
    owner = Owner(network, container_id, ifname)
    table, name = "inet cni_plugins_masquerade", f"cni-br-iface-{container_id}-{ifname}"
    comment = f'comment "macspoofchk-{container_id}-{ifname}"'
    lab.host.run(
        ["nft", "-f", "-"],
        input=f"""
            add table {table}
            add chain {table} masq_checks
            add rule {table} masq_checks ip saddr 10.1.9.9 ip daddr != 10.1.0.0/16 masquerade \
                comment "{reference._mark(owner)}, net: {network}, if: {ifname}, id: {container_id}"
            add table bridge nat
            add chain bridge nat PREROUTING {{ type filter hook prerouting priority -300; }}
            add chain bridge nat {name}
            add chain bridge nat {name}-mac
            add rule bridge nat PREROUTING iifname "veth00000000" jump {name} {comment}
            add rule bridge nat {name} jump {name}-mac {comment}
        """,
    )


def left(lab: Lab, container_id: str) -> int:
    return lab.host.run(["nft", "list", "ruleset"]).stdout.count(container_id)


@pytest.fixture(autouse=True)
def _flushed(lab: Lab) -> Any:
    """After each test nothing of the reference's is there, so that the host is as before."""
    yield
    lab.host.run(
        ["nft", "-f", "-"], input="table inet cni_plugins_masquerade\ndelete table inet cni_plugins_masquerade\n"
    )
    lab.host.run(["nft", "-f", "-"], input="table bridge nat\ndelete table bridge nat\n")


@pytest.mark.parametrize("netns", ["", "/run/netns/gone"])
def test_del_takes_back_what_has_no_record(lab: Lab, netns: str) -> None:
    leave(lab, "ref1")
    leave(lab, "ref2")
    leave(lab, "ref1x", ifname="eth1")
    assert left(lab, "ref2") >= 6
    lab.cni("DEL", "bridge", CONF, container_id="ref1", netns=netns).ok()
    assert left(lab, "ref1-eth0") == left(lab, 'id: ref1"') == 0
    assert left(lab, "ref2") >= 6
    assert left(lab, "ref1x") >= 6
    lab.cni("DEL", "bridge", CONF, container_id="ref1", netns=netns).ok()


def test_what_we_attached_is_not_looked_for(lab: Lab) -> None:
    with lab.attached(CONF) as one:
        answer = one.call("DEL")
        answer.ok()
        assert "list nftables' tables" not in answer.calls
        again = one.call("DEL")
        assert again.calls.count("list nftables' tables") == 2


def test_a_failure_stops_nothing_else_and_is_told(lab: Lab) -> None:
    leave(lab, "ref1")
    calls = lab.cni("DEL", "bridge", CONF, container_id="ref1").calls
    leave(lab, "ref1")
    fault = {"at": calls.index("list nftables' tables") + 1, "when": "before", "kind": "error"}
    answer = lab.cni("DEL", "bridge", CONF, container_id="ref1", faults=[fault])
    assert answer.code() == 999
    assert "INJECTED list nftables' tables" in answer.json["msg"]
    assert "release" in answer.calls
    assert left(lab, "id: ref1") == 1, "masquerade, whose removal failed"
    assert left(lab, "ref1-eth0") == 0
    lab.cni("DEL", "bridge", CONF, container_id="ref1").ok()
    assert left(lab, "ref1") == 0


def test_gc_goes_by_the_list(lab: Lab) -> None:
    for container_id in ("ref1", "ref2"):
        leave(lab, container_id)
    leave(lab, "ref3", network="othernet")
    valid = [{"containerID": "ref2", "ifname": "eth0"}]
    lab.cni("GC", "bridge", {**CONF, "cni.dev/valid-attachments": valid}).ok()
    assert (left(lab, "id: ref1"), left(lab, "id: ref2"), left(lab, "id: ref3")) == (0, 1, 1)
    # The port of all three is gone, and a spoof check is about a port.
    assert left(lab, "macspoofchk") == 0


def result(port: str, mac: str, netns: Netns) -> dict[str, Any]:
    interfaces = [{"name": "br0"}, {"name": port, "mac": mac}, {"name": "eth0", "sandbox": netns.path}]
    return {"cniVersion": "1.1.0", "interfaces": interfaces, "ips": [{"address": "10.1.0.9/16", "interface": 2}]}


def test_without_a_namespace_the_port_is_deleted_that_the_result_names(lab: Lab) -> None:
    with lab.space() as netns:
        pair = ["ip", "link", "add", "veth12345678", "type", "veth", "peer", "name", "eth0", "netns", netns.name]
        lab.host.run(pair)
        mac = lab.host.links()["veth12345678"]["address"]
        other = {**CONF, "prevResult": result("veth12345678", "02:00:00:00:00:09", netns)}
        lab.cni("DEL", "bridge", other, container_id="ref1").ok()
        assert "eth0" in netns.links(), "it is another one of that name"
        own = {**CONF, "prevResult": result("veth12345678", mac.upper(), netns)}
        lab.cni("DEL", "bridge", own, container_id="ref1").ok()
        assert set(netns.links()) == {"lo"}
        lab.cni("DEL", "bridge", own, container_id="ref1").ok()
