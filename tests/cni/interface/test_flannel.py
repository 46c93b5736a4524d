"""flannel: subnet.env and a short configuration become a bridge; what was told is kept for DEL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.lab import WITH_CHECK, Lab
from tests.hosts import IPV6

pytestmark = pytest.mark.kernel

SUBNET = "FLANNEL_NETWORK=10.2.0.0/16\nFLANNEL_SUBNET=10.2.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
SUBNET6 = "FLANNEL_IPV6_NETWORK=fd00:2::/48\nFLANNEL_IPV6_SUBNET=fd00:2:0:7::1/64\n"
KEPT = "/var/lib/cni/flannel"


def conf_of(version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": "cbr0", "type": "flannel", **keys}


@pytest.fixture
def subnet_env(lab: Lab) -> Iterator[Path]:
    """As netd or flanneld writes it."""
    path = lab.host.path("/run/flannel/subnet.env")
    path.parent.mkdir(exist_ok=True)
    path.write_text(SUBNET + (SUBNET6 if IPV6 else ""))
    yield path
    path.unlink(missing_ok=True)
    path.parent.rmdir()
    # What host-local keeps for ever; no address may be among it.
    networks = lab.host.path("/var/lib/cni/networks")
    left = [one.name for one in networks.rglob("*") if one.is_file()] if networks.exists() else []
    assert [name for name in left if name != "lock" and not name.startswith("last_reserved_ip")] == []
    for furniture in (networks, lab.host.path(KEPT), lab.host.path("/run/netloom/host-local")):
        shutil.rmtree(furniture, ignore_errors=True)


def kept(lab: Lab) -> list[str]:
    directory = lab.host.path(KEPT)
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.mark.both_ways
@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, subnet_env: Path, version: str) -> None:
    conf = conf_of(version)
    with lab.attached(conf, "flannel") as one:
        if version not in ("0.1.0", "0.2.0"):
            assert one.result["interfaces"][0]["name"] == "cni0"
            assert one.addresses[0].startswith("10.2.7.")
            assert [ip["gateway"] for ip in one.result["ips"]] == ["10.2.7.1", *(["fd00:2:0:7::1"] if IPV6 else [])]
        assert one.netns.links()["eth0"]["mtu"] == 1450
        assert "10.2.0.0/16" in {route["dst"] for route in one.netns.routes()}
        assert one.netns.ping("10.2.7.1") > 0
        told = json.loads(lab.host.path(f"{KEPT}/{one.container_id}").read_text())
        assert (told["type"], told["isGateway"], told["ipMasq"]) == ("bridge", True, True)
        assert told["ipam"]["ranges"][0] == [{"subnet": "10.2.7.0/24"}]
        if version in WITH_CHECK:
            one.check()
        subnet_env.unlink()  # DEL goes by what was kept
    assert kept(lab) == []
    lab.cni("DEL", "flannel", conf, netns="", container_id="never").ok()


def test_the_delegates_keys_win_and_its_type_may_be_another(lab: Lab, subnet_env: Path) -> None:
    keys = {"type": "ptp", "mtu": 1400, "ipMasq": False}
    with lab.attached(conf_of(delegate=keys, ipam={"routes": [{"dst": "0.0.0.0/0"}]}), "flannel") as one:
        told = json.loads(lab.host.path(f"{KEPT}/{one.container_id}").read_text())
        assert (told["type"], told["mtu"], told["ipMasq"]) == ("ptp", 1400, False)
        assert "isGateway" not in told
        assert one.netns.links()["eth0"]["mtu"] == 1400
        assert any(route["dst"] == "default" for route in one.netns.routes())


def test_a_foreign_delegate_is_executed_and_its_failure_leaves_nothing(lab: Lab, subnet_env: Path) -> None:
    script = lab.scripted()
    script.gives("10.2.7.9/24", version="1.0.0")
    with lab.space() as netns:
        conf = conf_of("1.0.0", delegate={"type": "scripted"})
        result = lab.cni("ADD", "flannel", conf, netns=netns).result()
        assert [ip["address"] for ip in result["ips"]] == ["10.2.7.9/24"]
        assert script.stdin("ADD")["ipam"]["ranges"][0] == [{"subnet": "10.2.7.0/24"}]
        lab.cni("DEL", "flannel", conf, netns=netns).ok()
        assert kept(lab) == []
        script.does("ADD", "exit 1", {"code": 77, "msg": "no"})
        assert lab.cni("ADD", "flannel", conf, netns=netns).code() == 77
        assert kept(lab) == []


def test_two_interfaces_of_a_container_are_kept_apart(lab: Lab, subnet_env: Path) -> None:
    with lab.attached(conf_of(), "flannel", container_id="both") as one:
        other = conf_of(delegate={"bridge": "cni1", "type": "bridge"}) | {"name": "second"}
        subnet_env.write_text("FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.7.1/24\nFLANNEL_MTU=1400\n")
        lab.cni("ADD", "flannel", other, netns=one.netns, container_id="both", ifname="eth1").ok()
        assert kept(lab) == ["both", "both@eth1"]
        assert one.netns.links()["eth1"]["mtu"] == 1400
        lab.cni("DEL", "flannel", other, netns=one.netns, container_id="both", ifname="eth1").ok()
        assert kept(lab) == ["both"]
        assert "eth0" in one.netns.links()
    assert kept(lab) == []


@pytest.mark.parametrize(
    ("text", "conf", "code", "words"),
    [
        (None, conf_of(), 11, ["subnet.env", "netd or flanneld"]),
        ("FLANNEL_NETWORK=10.2.0.0/16\n", conf_of(), 7, ["FLANNEL_SUBNET"]),
        ("FLANNEL_SUBNET=10.2.0/24\n", conf_of(), 7, ["FLANNEL_SUBNET", "10.2.0/24"]),
        ("FLANNEL_SUBNET=10.2.7.1/24\nFLANNEL_MTU=big\n", conf_of(), 7, ["FLANNEL_MTU", "big"]),
        (SUBNET, conf_of(delegate={"ipam": {}}), 7, ["delegate.ipam"]),
        (SUBNET, conf_of(delegate={"type": "../bridge"}), 7, ["delegate.type", "../bridge"]),
        (SUBNET, conf_of(delegate={"type": "flannel"}), 7, ["delegate.type"]),
        (SUBNET, conf_of(delegate={"type": "nothere"}), 7, ["nothere", "delegate.type"]),
        (SUBNET, conf_of(dataDir="kept"), 7, ["dataDir", "kept"]),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    lab: Lab, subnet_env: Path, text: str | None, conf: dict[str, Any], code: int, words: list[str]
) -> None:
    subnet_env.unlink()
    if text is not None:
        subnet_env.write_text(text)
    with lab.space() as netns:
        answer = lab.cni("ADD", "flannel", conf, netns=netns)
        assert answer.code() == code
        said = f"{answer.json['msg']} {answer.json.get('details', '')}"
        for word in words:
            assert word in said
        assert set(netns.links()) == {"lo"}
    assert kept(lab) == []


def test_status_is_not_available_until_the_host_has_its_part(lab: Lab, subnet_env: Path) -> None:
    lab.cni("STATUS", "flannel", conf_of()).ok()
    subnet_env.unlink()
    answer = lab.cni("STATUS", "flannel", conf_of())
    assert answer.code() == 50
    assert "subnet.env" in answer.json["msg"]


def test_a_del_of_an_interface_that_has_nothing_leaves_the_others_configuration(lab: Lab, subnet_env: Path) -> None:
    """Runtimes send a DEL after each ADD that failed, and may send any DEL again."""
    with lab.attached(conf_of(), "flannel", container_id="both") as one:
        other = conf_of(delegate={"bridge": "cni1", "type": "bridge"}) | {"name": "second"}
        where: dict[str, Any] = {"netns": one.netns, "container_id": "both", "ifname": "eth1"}
        subnet_env.write_text("FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.7.1/24\nFLANNEL_MTU=1400\n")
        lab.cni("DEL", "flannel", other, **where).ok()
        assert kept(lab) == ["both"]
        lab.cni("ADD", "flannel", other, **where).ok()
        for _ in range(2):
            lab.cni("DEL", "flannel", other, **where).ok()
            assert kept(lab) == ["both"]
        assert "eth0" in one.netns.links()
    assert kept(lab) == []


def test_what_flannels_own_plugin_kept_is_heeded(lab: Lab, subnet_env: Path) -> None:
    with lab.attached(conf_of(), "flannel", container_id="old") as one:
        path = lab.host.path(f"{KEPT}/old")
        told = json.loads(path.read_text())
        assert told.pop("netloomIfname") == "eth0"
        path.write_text(json.dumps(told))
        subnet_env.unlink()
        one.check()
    assert kept(lab) == []


def test_gc_forgets_what_died(lab: Lab, subnet_env: Path) -> None:
    with lab.attached(conf_of(), "flannel") as living:
        with lab.space() as netns:
            lab.cni("ADD", "flannel", conf_of(), netns=netns, container_id="dead").ok()
        valid = [{"containerID": living.container_id, "ifname": "eth0"}]
        lab.cni("GC", "flannel", {**conf_of(), "cni.dev/valid-attachments": valid}).ok()
        assert kept(lab) == [living.container_id]
        living.check()
