"""The plugins of a network: of its options, and of conflists of the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from libnetwork import conflist
from libnetwork.errors import DriverError
from libnetwork.options import NetworkOptions
from libnetwork.state import Network
from tests.libnetwork.conftest import endpoint, network

PATH = ("/opt/cni/bin",)


def write(directory: Path, file: str, document: Any) -> None:
    (directory / file).write_text(json.dumps(document) if not isinstance(document, str) else document)


def listed(name: str, *plugins: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": name, "plugins": list(plugins), **keys}


def test_a_bridge() -> None:
    found = conflist.chain(network(mtu=1400, icc=False), endpoint(), PATH)
    assert (found.name, found.path) == ("docker-n1n1n1n1n1n1", PATH)
    bridge, firewall = found.plugins
    assert firewall == {"type": "firewall", "ingressPolicy": "same-bridge"}
    assert bridge == {
        "type": "bridge",
        "bridge": "nl-n1n1n1n1n1n1",
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "portIsolation": True,
        "mtu": 1400,
        "capabilities": {"mac": True},
        "ipam": {
            "type": "static",
            "addresses": [{"address": "10.1.0.2/24", "gateway": "10.1.0.1"}],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    assert len(bridge["bridge"]) <= 15


def test_an_internal_one_has_no_default_route_and_no_masquerade() -> None:
    bridge, firewall = conflist.chain(network(internal=True), endpoint(), PATH).plugins
    assert firewall["internal"] is True
    assert bridge["ipMasq"] is False
    assert bridge["ipam"]["routes"] == []


def test_both_families() -> None:
    both = Network("n", NetworkOptions(), ("10.1.0.0/24", "fd01::/64"), ("10.1.0.1/24", "fd01::1/64"))
    ipam = conflist.static(both, endpoint(addresses=("10.1.0.2/24", "fd01::2/64")))
    assert ipam["addresses"] == [
        {"address": "10.1.0.2/24", "gateway": "10.1.0.1"},
        {"address": "fd01::2/64", "gateway": "fd01::1"},
    ]
    assert ipam["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]


def test_without_a_gateway_there_is_no_route() -> None:
    alone = Network("n", NetworkOptions(), ("10.1.0.0/24",), ())
    assert conflist.static(alone, endpoint()) == {
        "type": "static",
        "addresses": [{"address": "10.1.0.2/24"}],
        "routes": [],
    }
    bridge, _ = conflist.chain(alone, endpoint(), PATH).plugins
    assert bridge["isGateway"] is False


def test_the_other_types() -> None:
    ptp, firewall = conflist.chain(network(type="ptp", masquerade=False), endpoint(), PATH).plugins
    assert (ptp["type"], ptp["ipMasq"]) == ("ptp", False)
    assert firewall == {"type": "firewall", "apart": ["10.1.0.0/24"]}
    (macvlan,) = conflist.chain(network(type="macvlan", parent="eth0"), endpoint(), PATH).plugins
    assert (macvlan["type"], macvlan["master"], macvlan["mode"]) == ("macvlan", "eth0", "bridge")


def test_a_conflist_with_dockers_addresses_and_portmap_apart(tmp_path: Path) -> None:
    bridge = {"type": "bridge", "ipam": {"type": "ipamd", "subnet": "10.9.0.0/24"}}
    portmap = {"type": "portmap", "snat": False, "capabilities": {"portMappings": True}}
    write(tmp_path, "20-mine.conflist", listed("mine", bridge, portmap, {"type": "tuning"}, cniVersion="0.4.0"))
    mine = network(conflist="mine")
    found = conflist.chain(conflist.adopt(mine, str(tmp_path)), endpoint(), PATH)
    assert found.version == "0.4.0"
    assert [plugin["type"] for plugin in found.plugins] == ["bridge", "tuning"]
    assert found.plugins[0]["ipam"]["type"] == "static"
    assert conflist.chain(conflist.adopt(mine, str(tmp_path)), endpoint(addresses=()), PATH).plugins[0] == bridge
    (own,) = conflist.ports(conflist.adopt(mine, str(tmp_path)), PATH).plugins
    assert own == portmap


def test_ports_without_a_portmap_in_the_conflist(tmp_path: Path) -> None:
    write(tmp_path, "a.conflist", listed("mine", {"type": "bridge"}))
    wanted = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
    assert conflist.ports(conflist.adopt(network(conflist="mine"), str(tmp_path)), PATH).plugins == (wanted,)
    assert conflist.ports(network(), PATH).plugins == (wanted,)


def test_what_docker_does_not_keep_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.conflist", listed("mine", {"type": "bridge"}, {"type": "tuning"}, {"type": "sbr"}))
    found = conflist.lost(conflist.adopt(network(conflist="mine"), str(tmp_path)))
    assert [line.split(":")[0] for line in found] == ["plugin tuning", "plugin sbr"]
    assert conflist.lost(network()) == []


def test_a_conflist_of_nothing_but_portmap(tmp_path: Path) -> None:
    write(tmp_path, "a.conflist", listed("mine", {"type": "portmap"}))
    with pytest.raises(DriverError, match="conflist mine: it has no plugin that makes an interface"):
        conflist.adopt(network(conflist="mine"), str(tmp_path))


def test_files_that_are_none_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "01b.conflist").write_bytes(b'{"name": "\xff"}')
    write(tmp_path, "00.conflist", "{")
    write(tmp_path, "01.conflist", [1])
    write(tmp_path, "02.conflist", listed("mine"))
    write(tmp_path, "03.conflist", {"name": "mine", "plugins": "bridge"})
    write(tmp_path, "04.conflist", {"name": "mine", "plugins": ["bridge"]})
    write(tmp_path, "05.json", listed("mine", {"type": "bridge", "by": "json"}))
    (tmp_path / "06.conflist").mkdir()
    write(tmp_path, "07.conflist", listed("other", {"type": "bridge"}))
    write(tmp_path, "08.conflist", listed("mine", {"type": "bridge", "by": "eight"}))
    write(tmp_path, "09.conflist", listed("mine", {"type": "bridge", "by": "nine"}))
    assert conflist.read("mine", str(tmp_path))["plugins"] == [{"type": "bridge", "by": "eight"}]
    with pytest.raises(DriverError, match="has this name; there are other, mine, mine"):
        conflist.read("none", str(tmp_path))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"conflist mine: .*/nowhere: No such file or directory"):
        conflist.read("mine", str(tmp_path / "nowhere"))
