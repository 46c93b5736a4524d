"""The static plugin, through the skel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import pytest

from cni import skel
from cni.versions import SUPPORTED, at_least
from kernel.session import Session

CONF: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "name": "net",
    "type": "bridge",
    "ipam": {
        "type": "static",
        "addresses": [{"address": "10.5.0.5/24", "gateway": "10.5.0.1"}, {"address": "FD00:5:0::5/64"}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "192.0.2.0/24", "gw": "10.5.0.9", "mtu": 1400, "priority": 7}],
        "dns": {"nameservers": ["10.5.0.1"], "domain": "d", "search": ["s"], "options": ["o"]},
    },
}


def no_host() -> Session:
    return cast("Session", None)  # the plugin never looks at the host


def call(verb: str, conf: Mapping[str, Any], args: str = "") -> Any:
    environment = {
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/c1",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": args,
    }
    outcome = skel.run("static", environment, lambda: json.dumps(conf).encode(), no_host)
    assert outcome.stderr == b""
    document = json.loads(outcome.stdout) if outcome.stdout else None
    assert outcome.status == (1 if document and "code" in document else 0)
    return document


def ipam(**keys: Any) -> dict[str, Any]:
    return {**CONF, "ipam": {"type": "static", **keys}}


def addresses(answer: Any) -> list[tuple[str, str]]:
    return [(ip["address"], ip.get("gateway", "")) for ip in answer["ips"]]


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb_in_every_version(version: str) -> None:
    conf = {**CONF, "cniVersion": version}
    answer = call("ADD", conf)
    assert answer["cniVersion"] == version
    if at_least(version, "0.3.0"):
        assert addresses(answer) == [("10.5.0.5/24", "10.5.0.1"), ("fd00:5::5/64", "")]
        assert answer["routes"][1]["gw"] == "10.5.0.9"
    else:
        assert (answer["ip4"]["ip"], answer["ip6"]["ip"]) == ("10.5.0.5/24", "fd00:5::5/64")
    assert answer["dns"] == {"nameservers": ["10.5.0.1"], "domain": "d", "search": ["s"], "options": ["o"]}
    assert call("DEL", {**conf, "prevResult": answer}) is None
    if at_least(version, "0.4.0"):
        assert call("CHECK", {**conf, "prevResult": answer}) is None
    else:
        assert call("CHECK", conf)["code"] == 1
    for verb in ("GC", "STATUS"):
        got = call(verb, {**conf, "cni.dev/valid-attachments": []})
        assert got is None if version == "1.1.0" else got["code"] == 1


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_old_versions_know_one_address_of_a_family(version: str) -> None:
    conf = {**ipam(addresses=[{"address": "10.5.0.5/24"}, {"address": "10.5.0.6/24"}]), "cniVersion": version}
    answer = call("ADD", conf)
    assert answer["code"] == 7
    assert f"CNI version {version} does not support more than 1 address per family" in answer["msg"]


def test_the_runtimes_addresses_stand_instead_of_all_others() -> None:
    conf = {**CONF, "args": {"cni": {"ips": ["10.6.0.6/24"]}}}
    assert addresses(call("ADD", conf, "IP=10.7.0.7/24")) == [("10.6.0.6/24", "")]
    conf["runtimeConfig"] = {"ips": ["10.8.0.8/24", "fd00:8::8/64"]}
    assert addresses(call("ADD", conf, "IP=10.7.0.7/24")) == [("10.8.0.8/24", ""), ("fd00:8::8/64", "")]


def test_cni_args_add_addresses_with_gateways_of_their_networks() -> None:
    args = "IP=10.7.0.7/24, 10.9.0.9/24,fd00:7::7/64;GATEWAY=10.7.0.1,fd00:7::1;IgnoreUnknown=1;K8S=x"
    assert addresses(call("ADD", ipam(addresses=[{"address": "10.5.0.5/8"}]), args)) == [
        ("10.5.0.5/8", ""),
        ("10.7.0.7/24", "10.7.0.1"),
        ("10.9.0.9/24", ""),
        ("fd00:7::7/64", "fd00:7::1"),
    ]


@pytest.mark.parametrize(
    ("change", "args", "code", "words"),
    [
        ({"addresses": [{"address": "10.5.0.5"}]}, "", 7, 'expected to be in CIDR notation, got: "10.5.0.5"'),
        ({"addresses": [{"address": "10.5.0.5/33"}]}, "", 7, "$.ipam.addresses[0]"),
        ({"addresses": [{"address": "10.5.0.5/24", "gateway": "x"}]}, "", 7, "invalid gateway address"),
        ({"addresses": [{}]}, "", 7, "address"),
        ({"addresses": 5}, "", 7, "$.ipam.addresses"),
        ({"routes": [{"dst": "10.0.0.1"}]}, "", 7, "$.ipam.routes[0].dst"),
        ({"routes": [{"dst": "10.0.0.0/8", "gw": "g"}]}, "", 7, "$.ipam.routes[0].gw"),
        ({"routes": [{"dst": "10.0.0.0/8", "mtu": -1}]}, "", 7, "$.ipam.routes[0].mtu"),
        ({}, "IP=10.5.0.5", 4, "the 'ip' field is expected to be in CIDR notation"),
        ({}, "IP=10.5.0.5/24;GATEWAY=x", 4, "invalid gateway address"),
        ({}, "FOO=1", 4, "unknown args"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], args: str, code: int, words: str) -> None:
    for verb in ("ADD", "STATUS"):
        answer = call(verb, ipam(**change), args)
        assert answer["code"] == code
        assert words in answer["msg"]
    assert call("DEL", ipam(**change), args) is None


def test_without_the_ipam_object() -> None:
    assert "missing 'ipam' key" in call("ADD", {"cniVersion": "1.0.0", "name": "n"})["msg"]
    assert call("DEL", {"cniVersion": "1.0.0", "name": "n"}) is None


@pytest.mark.parametrize(
    "ips",
    [
        [],
        [{"address": "10.5.0.5/24", "gateway": "10.5.0.2"}, {"address": "fd00:5::5/64"}],
        [{"address": "10.5.0.5/24"}, {"address": "fd00:5::5/64"}],
        [{"address": "10.5.0.5/16", "gateway": "10.5.0.1"}, {"address": "fd00:5::5/64"}],
        [{"address": "10.5.0.5/24", "gateway": "10.5.0.1"}],
    ],
)
def test_check_misses_what_is_not_as_configured(ips: list[dict[str, str]]) -> None:
    answer = call("CHECK", {**CONF, "prevResult": {"cniVersion": "1.1.0", "ips": ips}})
    assert answer["code"] == 999
    assert "static: Failed to match addr" in answer["msg"]


def test_check_allows_other_addresses_and_needs_a_result() -> None:
    ips = [{"address": "192.0.2.1/24"}, *call("ADD", CONF)["ips"]]
    assert call("CHECK", {**CONF, "prevResult": {"cniVersion": "1.1.0", "ips": ips}}) is None
    assert call("CHECK", CONF)["code"] == 7
