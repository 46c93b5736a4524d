"""cni.config: hostile bytes, typed conversion, spelling of runtimeConfig."""

from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import config
from cni.errors import CniError, Code


class Range(msgspec.Struct, rename="camel"):
    subnet: str
    range_start: str = ""


class Conf(msgspec.Struct, rename="camel"):
    mtu: int = 0
    is_gateway: bool = False
    bridge: str = "cni0"
    vlan: Annotated[int, msgspec.Meta(ge=0, le=4094)] = 0
    ranges: list[list[Range]] = []
    sysctl: dict[str, str] = {}
    mode: Literal["l2", "l3"] = "l2"
    rate: float = 0.0
    mac: str | None = None


HOSTILE = {
    "empty": b"",
    "blank": b"   \n",
    "truncated": b'{"name": "net", "ipam": {"type": "host-l',
    "trailing": b'{"name": "net"} x',
    "two": b'{"name": "net"}{"name": "net"}',
    "array": b"[1, 2]",
    "string": b'"net"',
    "number": b"1",
    "bad utf-8 in a value": b'{"name": "\xff\xfe"}',
    "bad utf-8 in a key": b'{"\xc3\x28": 1}',
    "surrogate as utf-8": b'{"name": "\xed\xa0\x80"}',
    "lone surrogate": b'{"name": "\\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"name": "net"}',
    "utf-16": '{"name": "net"}'.encode("utf-16"),
    "NUL in a string": b'{"name": "a\0b"}',
    "NUL after": b'{"name": "net"}\0',
    "only NUL": b"\0" * 100,
    "deep arrays": b'{"a":' + b"[" * 200_000,
    "deep arrays, closed": b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "deep objects": b'{"a":' * 100_000,
    "deeper than the limit": b'{"a":' * (config.MAX_DEPTH + 2) + b"1" + b"}" * (config.MAX_DEPTH + 2),
    "huge number": b'{"mtu": ' + b"9" * 5_000 + b"}",
    "huge exponent": b'{"mtu": 1e999999}',
    "NaN": b'{"mtu": NaN}',
    "10 MB": b'{"a": "' + b"x" * 10_000_000 + b'"}',
    "10 MB of nothing": b" " * 10_000_000,
    "one byte too many": b'{"a": "' + b"x" * (config.LIMIT - 8) + b'"}',
    "comment": b'{"a": 1} // x',
    "single quotes": b"{'a': 1}",
}


@pytest.mark.parametrize("stdin", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_code_6(stdin: bytes) -> None:
    with pytest.raises(CniError) as caught:
        config.decode(stdin)
    assert caught.value.code == Code.DECODING_FAILURE
    assert caught.value.msg.startswith("error unmarshall network config: ")
    assert len(caught.value.msg) < 300


def test_exactly_the_limit_is_read() -> None:
    stdin = b'{"a": "' + b"x" * (config.LIMIT - 9) + b'"}'
    assert len(stdin) == config.LIMIT
    assert len(str(config.decode(stdin)["a"])) == config.LIMIT - 9


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_code_6(stdin: bytes) -> None:
    try:
        assert isinstance(config.decode(stdin), dict)
    except CniError as error:
        assert error.code == Code.DECODING_FAILURE


def test_null_is_an_empty_object() -> None:
    assert config.decode(b"null") == {}


def test_of_a_repeated_key_the_last_counts() -> None:
    assert config.decode(b'{"mtu": 1, "mtu": 2}') == {"mtu": 2}


def test_nulls_are_dropped_at_every_level() -> None:
    stdin = b'{"a": null, "b": {"c": null, "d": [{"e": null, "f": 1}, null]}}'
    assert config.decode(stdin) == {"b": {"d": [{"f": 1}, None]}}


def test_escaped_nul_is_text() -> None:
    assert config.decode(b'{"a": "x\\u0000y"}') == {"a": "x\0y"}


@pytest.mark.parametrize(
    ("document", "kind", "text"),
    [
        ({"mtu": "1500"}, Conf, '$.mtu: expected int, found "1500"'),
        ({"mtu": 1.0}, Conf, "$.mtu: expected int, found 1.0"),
        ({"mtu": True}, Conf, "$.mtu: expected int, found true"),
        ({"mtu": [1]}, Conf, "$.mtu: expected int, found [1]"),
        ({"isGateway": 1}, Conf, "$.isGateway: expected bool, found 1"),
        ({"isGateway": "true"}, Conf, '$.isGateway: expected bool, found "true"'),
        ({"bridge": 5}, Conf, "$.bridge: expected str, found 5"),
        ({"mac": 5}, Conf, "$.mac: expected str, found 5"),
        ({"vlan": 5000}, Conf, "$.vlan: expected int <= 4094, found 5000"),
        ({"mode": "l9"}, Conf, "$.mode: invalid enum value 'l9', found \"l9\""),
        ({"ranges": [[{"subnet": 5}]]}, Conf, "$.ranges[0][0].subnet: expected str, found 5"),
        ({"ranges": [[{}]]}, Conf, "$.ranges[0][0]: object missing required field subnet, found {}"),
        ({"sysctl": {"a.b": 1}}, Conf, "$.sysctl[...]: expected str"),
        ({"sysctl": [1]}, Conf, "$.sysctl: expected object, found [1]"),
        ([1], Conf, "$: expected object, found [1]"),
        ({1: "x"}, dict[str, str], "a key of $: expected str"),
    ],
)
def test_a_wrong_type_names_path_value_and_expectation(document: object, kind: type[object], text: str) -> None:
    with pytest.raises(CniError) as caught:
        config.convert(document, kind)
    assert caught.value.code == Code.INVALID_CONFIG
    assert caught.value.msg == f"invalid network config: {text}"


def test_the_path_starts_where_the_document_stands() -> None:
    with pytest.raises(CniError, match=r"\$\.ipam\.mtu: expected int, found null"):
        config.convert({"mtu": None}, Conf, "$.ipam")


def test_a_found_value_is_short_and_safe() -> None:
    with pytest.raises(CniError) as caught:
        config.convert({"mtu": "\x1b[31m\u202e\x7f" + "x" * 1000}, Conf)
    assert caught.value.msg.isascii()
    assert caught.value.msg.isprintable()
    assert len(caught.value.msg) < 200


def test_an_integer_beyond_64_bits_is_no_integer() -> None:
    for number in (2**64, -(2**63) - 1, 10**30):
        with pytest.raises(CniError, match=r"\$\.mtu: expected int"):
            config.convert(config.decode(b'{"mtu": %d}' % number), Conf)


def test_what_is_right_converts_and_unknown_keys_are_ignored() -> None:
    stdin = b'{"mtu": 1500, "isGateway": true, "rate": 5, "ranges": [[{"subnet": "a", "x": 1}]], "future": {}}'
    assert config.convert(config.decode(stdin), Conf) == Conf(1500, True, ranges=[[Range("a")]], rate=5.0)


def test_runtime_config_takes_the_conventions_spelling() -> None:
    stdin = b"""{"runtimeConfig": {
        "PortMappings": [{"HostPort": 80, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": "", "Other": 1}],
        "ipranges": [[{"Subnet": "10.0.0.0/8", "RANGESTART": "10.0.0.5", "rangeend": "x", "GateWay": "y"}]],
        "Bandwidth": {"IngressRate": 1, "ingressburst": 2, "EgressRate": 3, "EGRESSBURST": 4},
        "DNS": {"Servers": ["a"], "Searches": ["b"], "Options": ["c"]},
        "IPs": ["10.0.0.5"], "MAC": "02:00:00:00:00:01", "InfinibandGuid": "g", "deviceid": "d",
        "Aliases": ["Web"], "CgroupPath": "/c",
        "io.kubernetes.cri.pod-annotations": {"HostPort": "1", "Servers": {"MAC": null, "Mac": "x"}}
    }}"""
    assert config.decode(stdin)["runtimeConfig"] == {
        "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": "", "Other": 1}],
        "ipRanges": [[{"subnet": "10.0.0.0/8", "rangeStart": "10.0.0.5", "rangeEnd": "x", "gateway": "y"}]],
        "bandwidth": {"ingressRate": 1, "ingressBurst": 2, "egressRate": 3, "egressBurst": 4},
        "dns": {"servers": ["a"], "searches": ["b"], "options": ["c"]},
        "ips": ["10.0.0.5"],
        "mac": "02:00:00:00:00:01",
        "infinibandGUID": "g",
        "deviceID": "d",
        "aliases": ["Web"],
        "cgroupPath": "/c",
        "io.kubernetes.cri.pod-annotations": {"HostPort": "1", "Servers": {"Mac": "x"}},
    }


def test_case_counts_outside_runtime_config() -> None:
    assert config.decode(b'{"MTU": 5, "dns": {"Servers": []}}') == {"MTU": 5, "dns": {"Servers": []}}


def test_of_two_spellings_the_last_counts() -> None:
    assert config.decode(b'{"runtimeConfig": {"mac": "a", "MAC": "b"}}')["runtimeConfig"] == {"mac": "b"}


@pytest.mark.parametrize("value", [5, "x", [], True])
def test_a_wrong_runtime_config_is_left_for_the_plugin_to_refuse(value: object) -> None:
    stdin = msgspec.json.encode({"runtimeConfig": value})
    assert config.decode(stdin) == {"runtimeConfig": value}
