"""`netloom pool`: what the command line becomes, and what a real ipamd makes of it."""

import json

import click
import pytest

from cli.pools import block_lengths, pool_spec
from protos.ipam.v1 import ipam_pb2
from tests.cli.conftest import Ipamd, Netloom


def _range(subnet: str, start: str = "", end: str = "", gateway: str = "") -> ipam_pb2.Range:
    return ipam_pb2.Range(subnet=subnet, start=start, end=end, gateway=gateway)


def test_a_range_set_for_each_family_in_the_order_given() -> None:
    spec = pool_spec(["fd00::/64", "10.1.0.0/24", "10.2.0.0/24"], [], [], [], None)
    assert [list(entry.ranges) for entry in spec.range_sets] == [
        [_range("fd00::/64")],
        [_range("10.1.0.0/24"), _range("10.2.0.0/24")],
    ]
    assert not spec.HasField("cooldown_ms")


def test_ranges_and_gateways_find_their_subnet() -> None:
    spec = pool_spec(
        ["10.1.0.0/24", "10.2.0.0/24", "fd00::/64"],
        ["10.2.0.10-10.2.0.19", "10.2.0.30 - 10.2.0.39"],
        ["10.2.0.254", "none"],
        ["10.1.0.7", "10.1.0.128/25"],
        0.25,
    )
    assert [list(entry.ranges) for entry in spec.range_sets] == [
        [
            _range("10.1.0.0/24", gateway="none"),
            _range("10.2.0.0/24", "10.2.0.10", "10.2.0.19", "10.2.0.254"),
            _range("10.2.0.0/24", "10.2.0.30", "10.2.0.39", "10.2.0.254"),
        ],
        [_range("fd00::/64", gateway="none")],
    ]
    assert list(spec.excludes) == ["10.1.0.7", "10.1.0.128/25"]
    assert spec.cooldown_ms == 250


@pytest.mark.parametrize(
    ("subnets", "ranges", "gateways", "complaint"),
    [
        (["10.1.2.3/16"], [], [], "--subnet 10.1.2.3/16: has host bits set; write 10.1.0.0/16"),
        (["ten"], [], [], "--subnet ten: wanted a CIDR"),
        (["10.0.0.0/33"], [], [], "--subnet 10.0.0.0/33: wanted a CIDR"),
        (["10.1.0.0/16"], ["10.1.0.5"], [], "--range 10.1.0.5: wanted two addresses with a dash"),
        (["10.1.0.0/16"], ["10.1.0.9-10.1.0.5"], [], "wanted the lower address first"),
        (["10.1.0.0/16"], ["10.1.0.9-fd00::1"], [], "wanted the lower address first"),
        (["10.1.0.0/16"], ["10.2.0.1-10.2.0.5"], [], "10.2.0.1 lies in none of the subnets (10.1.0.0/16)"),
        (["10.1.0.0/16"], ["a-b"], [], "--range a-b: 'a' is no IP address"),
        (["10.1.0.0/16"], [], ["10.2.0.1"], "--gateway 10.2.0.1: 10.2.0.1 lies in none of the subnets"),
        (["10.1.0.0/16"], [], ["x"], "--gateway x: 'x' is no IP address"),
    ],
)
def test_what_cannot_be_meant(subnets: list[str], ranges: list[str], gateways: list[str], complaint: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        pool_spec(subnets, ranges, gateways, [], None)
    assert complaint in caught.value.format_message()


# What the usage of a pool says that no other node has a part of.
_ALONE = {"blocks": 0, "blocks_claimed": 0, "blocks_total": "0", "elsewhere": 0}


def test_create_show_list_delete(ipamd: Ipamd, netloom: Netloom) -> None:
    words = ["--subnet", "10.1.0.0/24", "--subnet", "fd00:1::/64", "--range", "10.1.0.10-10.1.0.19"]
    ran = netloom(
        "pool", "create", "blue", *words, "--gateway", "10.1.0.254", "--exclude", "10.1.0.12", "--cooldown", "5"
    )
    assert (ran.status, ran.out) == (0, "created pool blue; addresses to hand out: IPv4 9, IPv6 ~2^64\n")
    document = json.loads(netloom("pool", "show", "blue", "--json").out)
    assert document == {
        "name": "blue",
        "managed": False,
        "range_sets": [
            [{"subnet": "10.1.0.0/24", "start": "10.1.0.10", "end": "10.1.0.19", "gateway": "10.1.0.254"}],
            [{"subnet": "fd00:1::/64", "start": "", "end": "", "gateway": ""}],
        ],
        "excludes": ["10.1.0.12"],
        "cooldown_s": 5.0,
        "mode": "local",
        "block_v4": 26,
        "block_v6": 122,
        "blocks_per_node": 0,
        "usage": [
            {"family": "ipv4", "size": "9", "allocated": 0, "reserved": 0, "cooling": 0, "free": "9", **_ALONE},
            {
                "family": "ipv6",
                "size": "18446744073709551614",
                "allocated": 0,
                "reserved": 0,
                "cooling": 0,
                "free": "18446744073709551614",
                **_ALONE,
            },
        ],
        "reservations": [],
    }
    ipamd.allocate("one", "blue")
    assert netloom("ip", "reserve", "blue", "10.1.0.19", "--note", "printer").status == 0
    header, ipv4, ipv6 = (line.split() for line in netloom("pool", "list").out.splitlines())
    assert header == ["POOL", "KIND", "FAMILY", "SIZE", "ALLOCATED", "RESERVED", "COOLING", "FREE", "USED"]
    assert ipv4 == ["blue", "named", "IPv4", "9", "1", "1", "0", "7", "[##", "]", "22%"]
    assert ipv6[:3] == ["blue", "named", "IPv6"]
    shown = netloom("pool", "show", "blue").out
    assert "10.1.0.0/24, 10.1.0.10 to 10.1.0.19, gateway 10.1.0.254" in shown
    assert "10.1.0.19  printer" in shown
    refused = netloom("pool", "delete", "blue")
    assert (refused.status, refused.out) == (1, "")
    assert "one" in refused.err
    assert netloom("ip", "release", "10.1.0.10", "--yes").status == 0
    assert netloom("ip", "unreserve", "blue", "10.1.0.19").status == 0
    assert netloom("pool", "delete", "blue", "--json").out == '{\n  "name": "blue"\n}\n'
    assert json.loads(netloom("pool", "list", "--json").out) == {"pools": []}


def test_a_name_that_is_taken(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "p", "--subnet", "10.1.0.0/24").status == 0
    ran = netloom("pool", "create", "p", "--subnet", "10.2.0.0/24")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("netloom: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("blocks", "lengths"),
    [((), (0, 0)), (("/26",), (26, 0)), (("124", "/24"), (24, 124)), (("/33",), (0, 33))],
)
def test_lengths_of_blocks(blocks: tuple[str, ...], lengths: tuple[int, int]) -> None:
    assert block_lengths(blocks) == lengths


@pytest.mark.parametrize("blocks", [("x",), ("/0",), ("/129",), ("/26", "/27"), ("",)])
def test_wrong_lengths_of_blocks(blocks: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError, match="--block"):
        block_lengths(blocks)


@pytest.mark.parametrize(
    "words",
    [
        ["create", "p"],
        ["create", "--subnet", "10.1.0.0/24"],
        ["create", "p", "--subnet", "10.1.0.0/24", "--cooldown", "-1"],
        ["create", "p", "--subnet", "10.1.0.0/24", "--cooldown", "5000000"],
        ["create", "p/../q", "--subnet", "10.1.0.0/24"],
        ["create", "p", "--subnet", "10.1.0.0/24", "--exclude", "x"],
        ["create", "p", "--subnet", "10.1.0.0/24", "--gateway", "fd00::1"],
    ],
)
def test_wrong_usage_is_status_2_in_one_line(ipamd: Ipamd, netloom: Netloom, words: list[str]) -> None:
    ran = netloom("pool", *words)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("netloom: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("words", [["show", "nope"], ["delete", "nope"]])
def test_a_pool_that_is_not_there(ipamd: Ipamd, netloom: Netloom, words: list[str]) -> None:
    ran = netloom("pool", *words)
    assert (ran.status, ran.out) == (1, "")
    assert "nope" in ran.err
