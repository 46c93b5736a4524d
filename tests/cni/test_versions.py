"""cni.versions: what each spec version can say, out and in."""

import json
from ipaddress import ip_interface
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import versions
from cni.errors import CniError, Code
from cni.result import DNS, Interface, IPConfig, Result, Route

NESTED = ("0.1.0", "0.2.0")
VERSIONED = ("0.3.0", "0.3.1", "0.4.0")
FLAT = ("1.0.0", "1.1.0")

FULL = Result(
    interfaces=(
        Interface("cni0", "02:00:00:00:00:01"),
        Interface("eth0", "02:00:00:00:00:02", "/run/netns/x", 1450, "/run/sock", "0000:00:1f.6"),
    ),
    ips=(
        IPConfig("10.1.0.5/16", "10.1.0.1", 1),
        IPConfig("fd00::5/64", "fd00::1", 1),
        IPConfig("10.2.0.5/24"),
    ),
    routes=(
        Route("0.0.0.0/0"),
        Route("10.9.0.0/16", "10.1.0.9", 1400, 1360, 5, 0, 253),
        Route("::/0", "fd00::1"),
    ),
    dns=DNS(("10.1.0.1",), "example.org", ("example.org",), ("ndots:1",)),
)
DNS_DOCUMENT = {
    "nameservers": ["10.1.0.1"],
    "domain": "example.org",
    "search": ["example.org"],
    "options": ["ndots:1"],
}
# What the reference's types print for FULL, written out by hand from pkg/types/{020,040,100}.
EXPECTED_NESTED = {
    "ip4": {
        "ip": "10.1.0.5/16",
        "gateway": "10.1.0.1",
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.9.0.0/16", "gw": "10.1.0.9"}],
    },
    "ip6": {"ip": "fd00::5/64", "gateway": "fd00::1", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
    "dns": DNS_DOCUMENT,
}
ROUTES = [
    {"dst": "0.0.0.0/0"},
    {
        "dst": "10.9.0.0/16",
        "gw": "10.1.0.9",
        "mtu": 1400,
        "advmss": 1360,
        "priority": 5,
        "table": 0,
        "scope": 253,
    },
    {"dst": "::/0", "gw": "fd00::1"},
]
EXPECTED_VERSIONED = {
    "interfaces": [
        {"name": "cni0", "mac": "02:00:00:00:00:01"},
        {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x"},
    ],
    "ips": [
        {"version": "4", "interface": 1, "address": "10.1.0.5/16", "gateway": "10.1.0.1"},
        {"version": "6", "interface": 1, "address": "fd00::5/64", "gateway": "fd00::1"},
        {"version": "4", "address": "10.2.0.5/24"},
    ],
    "routes": ROUTES,
    "dns": DNS_DOCUMENT,
}
EXPECTED_FLAT = {
    "dns": DNS_DOCUMENT,
    "interfaces": [
        {"mac": "02:00:00:00:00:01", "name": "cni0"},
        {
            "mac": "02:00:00:00:00:02",
            "mtu": 1450,
            "name": "eth0",
            "pciID": "0000:00:1f.6",
            "sandbox": "/run/netns/x",
            "socketPath": "/run/sock",
        },
    ],
    "ips": [
        {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1},
        {"address": "fd00::5/64", "gateway": "fd00::1", "interface": 1},
        {"address": "10.2.0.5/24"},
    ],
    "routes": ROUTES,
}


def text(document: object, *, sort: bool) -> str:
    return json.dumps(document, sort_keys=sort)


@pytest.mark.parametrize("version", NESTED)
def test_encode_nested(version: str) -> None:
    expected = {"cniVersion": version, **EXPECTED_NESTED}
    assert text(versions.encode(FULL, version), sort=False) == text(expected, sort=False)


@pytest.mark.parametrize("version", VERSIONED)
def test_encode_versioned(version: str) -> None:
    expected = {"cniVersion": version, **EXPECTED_VERSIONED}
    assert text(versions.encode(FULL, version), sort=False) == text(expected, sort=False)


@pytest.mark.parametrize("version", FLAT)
def test_encode_flat_sorts_all_keys(version: str) -> None:
    expected = {"cniVersion": version, **EXPECTED_FLAT}
    assert text(versions.encode(FULL, version), sort=False) == text(expected, sort=True)


def test_empty_version_is_the_oldest() -> None:
    assert versions.encode(FULL, "") == versions.encode(FULL, "0.1.0")


@pytest.mark.parametrize("version", ["0.5.0", "1.2.0", "1", "1.1.0\n", "x"])
def test_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(CniError) as caught:
        versions.encode(FULL, version)
    assert caught.value.code == Code.INCOMPATIBLE_VERSION


@pytest.mark.parametrize("version", NESTED)
def test_nested_versions_need_an_address(version: str) -> None:
    with pytest.raises(CniError, match="cannot convert: no valid IP addresses"):
        versions.encode(Result(interfaces=FULL.interfaces, routes=FULL.routes), version)


@pytest.mark.parametrize(("version", "expected"), [("0.4.0", {"cniVersion", "dns"}), ("1.0.0", {"cniVersion"})])
def test_an_empty_result_leaves_keys_out(version: str, expected: set[str]) -> None:
    assert set(versions.encode(Result(), version)) == expected


def test_routes_of_a_family_without_address_are_lost_in_nested_versions() -> None:
    result = Result(ips=(IPConfig("10.0.0.2/24"),), routes=(Route("::/0"), Route("0.0.0.0/0")))
    assert versions.encode(result, "0.2.0")["ip4"] == {"ip": "10.0.0.2/24", "routes": [{"dst": "0.0.0.0/0"}]}
    assert "ip6" not in versions.encode(result, "0.2.0")


# --- in ---


@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_a_document_without_version_is_of_the_assumed_one(version: str) -> None:
    document = versions.encode(FULL, version)
    expected = versions.decode(document, "unused")
    del document["cniVersion"]
    assert versions.decode(document, version) == expected
    assert versions.decode({**document, "cniVersion": ""}, version) == expected
    assert versions.decode({**document, "cniVersion": None}, version) == expected


def test_the_documents_own_version_counts() -> None:
    document = versions.encode(FULL, "0.2.0")
    assert [ip.address for ip in versions.decode(document, "1.1.0").ips] == ["10.1.0.5/16", "fd00::5/64"]


def test_ipam_results_have_no_interfaces() -> None:
    document = {"ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1"}], "routes": [{"dst": "0.0.0.0/0"}], "dns": {}}
    assert versions.decode(document, "1.0.0") == Result(
        ips=(IPConfig("10.1.0.5/16", "10.1.0.1"),), routes=(Route("0.0.0.0/0"),)
    )


def test_nulls_are_absent() -> None:
    document = {"interfaces": None, "ips": [{"address": "10.1.0.5/16", "gateway": None}], "dns": None, "routes": None}
    assert versions.decode(document, "1.0.0") == Result(ips=(IPConfig("10.1.0.5/16"),))


def test_unknown_keys_are_ignored() -> None:
    document = {"ips": [{"address": "10.1.0.5/16", "weight": 3}], "future": [1]}
    assert versions.decode(document, "1.1.0") == Result(ips=(IPConfig("10.1.0.5/16"),))


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("10.1.0.5/16", "10.1.0.5/16"),
        ("FD00:0:0::5/64", "fd00::5/64"),
        ("::ffff:10.0.0.1/104", "10.0.0.1/8"),
        ("::/0", "::/0"),
    ],
)
def test_addresses_become_canonical(written: str, canonical: str) -> None:
    assert versions.decode({"ips": [{"address": written}]}, "1.0.0").ips[0].address == canonical


@pytest.mark.parametrize(
    "address",
    [
        "10.1.0.5",
        "10.1.0.5/",
        "10.1.0.5/33",
        "10.1.0.5/-1",
        "10.1.0.5/+1",
        "10.1.0.5/1_6",
        "10.1.0.5/1\uff16",
        "10.1.0.5/16\n",
        "010.1.0.5/16",
        "10.1.5/16",
        "fd00::5/129",
        "fd00::5%eth0/64",
        "::ffff:10.0.0.1/64",
        "10.1.0.5\0/16",
        "",
        "\u0663.1.1.1/8",
    ],
)
def test_malformed_addresses_name_their_place(address: str) -> None:
    with pytest.raises(CniError) as caught:
        versions.decode({"ips": [{"address": "10.0.0.1/8"}, {"address": address}]}, "1.0.0", "$.prevResult")
    assert caught.value.code == Code.INVALID_CONFIG
    assert "$.prevResult.ips[1].address" in caught.value.msg


@pytest.mark.parametrize(
    ("version", "document", "place"),
    [
        ("1.0.0", [], "$:"),
        ("1.0.0", "x", "$:"),
        ("1.0.0", {"cniVersion": 1}, "$.cniVersion"),
        ("1.0.0", {"cniVersion": "7.0.0"}, "$.cniVersion"),
        ("1.0.0", {"interfaces": {}}, "$.interfaces"),
        ("1.0.0", {"interfaces": [None]}, "$.interfaces[0]"),
        ("1.0.0", {"interfaces": [{"name": 5}]}, "$.interfaces[0].name"),
        ("1.1.0", {"interfaces": [{"name": "x", "mtu": 1.0}]}, "$.interfaces[0].mtu"),
        ("1.0.0", {"ips": [{}]}, "$.ips[0]"),
        ("1.0.0", {"ips": [{"address": "10.0.0.1/8", "gateway": "10.0.0.1/8"}]}, "$.ips[0].gateway"),
        ("1.0.0", {"ips": [{"address": "10.0.0.1/8", "interface": -1}]}, "$.ips[0].interface"),
        ("1.0.0", {"ips": [{"address": "10.0.0.1/8", "interface": True}]}, "$.ips[0].interface"),
        ("1.0.0", {"routes": [{"dst": "default"}]}, "$.routes[0].dst"),
        ("1.0.0", {"routes": [{"dst": "0.0.0.0/0", "gw": "x"}]}, "$.routes[0].gw"),
        ("0.4.0", {"dns": {"nameservers": "10.0.0.1"}}, "$.dns.nameservers"),
        ("0.2.0", {"ip4": {"ip": "fd00::1/64"}}, "$.ip4.ip"),
        ("0.2.0", {"ip6": {"ip": "fd00::1/64", "routes": [{"dst": 1}]}}, "$.ip6.routes[0].dst"),
    ],
)
def test_wrong_documents_name_their_place(version: str, document: object, place: str) -> None:
    with pytest.raises(CniError) as caught:
        versions.decode(document, version)
    assert caught.value.code == Code.INVALID_CONFIG
    assert place in caught.value.msg


# --- both ---

words = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.integers(0, 2**31)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    v6 = draw(st.booleans())
    address = draw(st.ip_addresses(v=6 if v6 else 4))
    canonical = versions.canonical_ip(str(address))
    return f"{canonical}/{draw(st.integers(0, 128 if ':' in canonical else 32))}"


gateways = st.one_of(st.just(""), st.ip_addresses().map(lambda ip: versions.canonical_ip(str(ip))))
interfaces = st.builds(Interface, words, words, words, numbers, words, words)
ips = st.builds(IPConfig, addresses(), gateways, st.none() | st.integers(0, 9))
routes = st.builds(
    Route, addresses(), gateways, numbers, numbers, numbers, st.none() | st.integers(0, 2**32), st.none() | numbers
)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=4).map(tuple)


results = st.builds(
    Result,
    tuples(interfaces),
    tuples(ips),
    tuples(routes),
    st.builds(DNS, tuples(words), words, tuples(words), tuples(words)),
)


def expressible(result: Result, version: str) -> Result:
    """What is left of a result in a version, worked out another way than by its code."""
    if version in FLAT:
        return result
    if version in VERSIONED:
        kept = tuple(Interface(one.name, one.mac, one.sandbox) for one in result.interfaces)
        return msgspec.structs.replace(result, interfaces=kept)
    firsts: dict[int, IPConfig] = {}
    for ip in result.ips:
        firsts.setdefault(ip_interface(ip.address).version, IPConfig(ip.address, ip.gateway))
    by_family = {
        family: tuple(Route(r.dst, r.gw) for r in result.routes if ip_interface(r.dst).version == family)
        for family in firsts
    }
    families = sorted(firsts)
    return Result(
        ips=tuple(firsts[family] for family in families),
        routes=tuple(route for family in families for route in by_family[family]),
        dns=result.dns,
    )


@pytest.mark.parametrize("version", versions.SUPPORTED)
@given(result=results)
def test_what_a_version_can_express_comes_back(version: str, result: Result) -> None:
    if version in NESTED and not result.ips:
        with pytest.raises(CniError):
            versions.encode(result, version)
        return
    # By way of bytes, as a runtime's cache does it.
    document = msgspec.json.decode(msgspec.json.encode(versions.encode(result, version)))
    back = versions.decode(document, version)
    assert back == expressible(result, version)
    assert versions.encode(back, version) == document


@given(result=results, older=st.sampled_from(versions.SUPPORTED), newer=st.sampled_from(versions.SUPPORTED))
def test_a_detour_over_a_newer_version_loses_nothing(result: Result, older: str, newer: str) -> None:
    if versions.at_least(older, newer) or not result.ips:
        return
    detour = versions.decode(versions.encode(result, newer), newer)
    assert versions.encode(detour, older) == versions.encode(result, older)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=10,
)
result_keys = st.sampled_from(["cniVersion", "interfaces", "ips", "routes", "dns", "ip4", "ip6"])


@given(document=st.dictionaries(result_keys, json_values, max_size=5), version=st.sampled_from(versions.SUPPORTED))
def test_any_document_is_a_result_or_an_error_with_code_7(document: dict[str, object], version: str) -> None:
    try:
        versions.encode(versions.decode(document, version), "1.1.0")
    except CniError as error:
        assert error.code == Code.INVALID_CONFIG


@pytest.mark.parametrize(("oldest", "count"), [("0.1.0", 7), ("0.4.0", 3), ("1.1.0", 1)])
def test_supported_from(oldest: str, count: int) -> None:
    assert versions.supported_from(oldest) == versions.SUPPORTED[-count:]
