"""What `docker network create -o …` may say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from libnetwork import options
from libnetwork.errors import DriverError
from libnetwork.options import NetworkOptions

GENERIC = "com.docker.network.generic"


def parse(**given: str) -> NetworkOptions:
    found, unknown = options.parse({GENERIC: {name.replace("__", "."): text for name, text in given.items()}})
    assert unknown == []
    return found


@pytest.mark.parametrize("given", [None, {}, {GENERIC: None}, {GENERIC: {}}])
def test_nothing_said_is_a_bridge(given: dict[str, Any] | None) -> None:
    assert options.parse(given) == (NetworkOptions(), [])


def test_every_option_arrives() -> None:
    bridge = {
        "com.docker.network.bridge.name": "br1",
        "com.docker.network.bridge.enable_icc": "False",
        "com.docker.network.bridge.enable_ip_masquerade": "0",
        "com.docker.network.bridge.host_binding_ipv4": "127.0.0.1",
        "com.docker.network.driver.mtu": "1400",
        "com.docker.network.container_iface_prefix": "lan",
        "sticky": "true",
        "type": "bridge",
    }
    found, _ = options.parse(
        {GENERIC: bridge, "com.docker.network.internal": True, "com.docker.network.enable_ipv6": True}
    )
    assert found == NetworkOptions(
        bridge="br1",
        icc=False,
        masquerade=False,
        host_binding="127.0.0.1",
        mtu=1400,
        prefix="lan",
        sticky=True,
        internal=True,
        ipv6=True,
    )
    macvlan, _ = options.parse({GENERIC: {"type": "macvlan", "parent": "eth0.7", "macvlan_mode": "vepa"}})
    assert macvlan == NetworkOptions(type="macvlan", parent="eth0.7", macvlan_mode="vepa")
    assert parse(com__docker__network__mtu="68").mtu == 68
    assert parse(conflist="mine", sticky="0") == NetworkOptions(conflist="mine", sticky=False)


def test_every_name_is_read_by_some_field() -> None:
    assert set(options._NAMES.values()) <= set(NetworkOptions.__struct_fields__)


def test_an_unknown_one_of_dockers_is_told_and_one_of_ours_refused() -> None:
    assert options.parse({GENERIC: {"com.docker.network.driver.new": "1"}})[1] == ["com.docker.network.driver.new=1"]
    with pytest.raises(DriverError) as refused:
        options.parse({GENERIC: {"typ": "bridge"}})
    assert "option typ=bridge: unknown" in str(refused.value)
    for name in options._NAMES:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "vlan"}, "type=vlan: wanted one of bridge, ptp, macvlan"),
        ({"type": "macvlan"}, "needs -o parent=INTERFACE"),
        ({"type": "macvlan", "parent": "eth0", "macvlan_mode": "x"}, "macvlan_mode=x: wanted one of bridge, private"),
        ({"parent": "eth0"}, "parent=eth0: only with -o type=macvlan, not with bridge"),
        ({"type": "ptp", "com.docker.network.bridge.name": "br0"}, "name=br0: only with -o type=bridge"),
        ({"com.docker.network.bridge.name": "a" * 16}, "wanted the name of an interface"),
        ({"com.docker.network.bridge.name": ""}, "wanted the name of an interface"),
        ({"com.docker.network.container_iface_prefix": "a/b"}, "wanted the name of an interface"),
        ({"com.docker.network.driver.mtu": "67"}, "mtu=67: wanted a number from 68 to 65535"),
        ({"com.docker.network.driver.mtu": "-1"}, "mtu=-1: wanted a number"),
        ({"com.docker.network.bridge.enable_icc": "yes"}, "enable_icc=yes: wanted true or false"),
        ({"com.docker.network.bridge.host_binding_ipv4": "localhost"}, "=localhost: wanted an address of this host"),
        ({"conflist": "mine", "type": "ptp"}, "type=ptp: with -o conflist=NAME the conflist says such things"),
        ({"conflist": "mine", "com.docker.network.mtu": "1400"}, "with -o conflist=NAME the conflist says such things"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(given: dict[str, str], words: str) -> None:
    with pytest.raises(DriverError) as refused:
        options.parse({GENERIC: given})
    assert words in str(refused.value)


def test_what_is_no_object_of_options() -> None:
    with pytest.raises(DriverError, match="wanted an object of options"):
        options.parse({GENERIC: ["type=bridge"]})


def test_an_overlay_is_what_its_definition_says() -> None:
    found = parse(type="overlay", network="ov1", com__docker__network__container_iface_prefix="lan")
    assert found == NetworkOptions("overlay", "ov1", prefix="lan")
    with pytest.raises(DriverError, match=r"needs -o network=NAME.*netloom network create NAME --type overlay"):
        parse(type="overlay")
    with pytest.raises(DriverError, match="option network=ov1: only with -o type=overlay, not with bridge"):
        parse(network="ov1")
    for name in ("com.docker.network.driver.mtu", "conflist"):
        with pytest.raises(DriverError, match=f"option {name}=1400: with -o type=overlay the network's definition"):
            options.parse({GENERIC: {"type": "overlay", "network": "ov1", name: "1400"}})
