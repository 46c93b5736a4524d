"""Ranges: what the reference takes and refuses, and the order in which addresses are tried."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import CniError
from cni.ipam import ranges
from cni.ipam.ranges import RangeConf


def parsed(*sets: list[RangeConf], version: str = "1.0.0") -> tuple[ranges.RangeSet, ...]:
    return ranges.parse([(f"$[{index}]", one) for index, one in enumerate(sets)], version)


@pytest.mark.parametrize(
    ("conf", "first", "last", "gateway"),
    [
        (RangeConf("10.0.0.0/24"), "10.0.0.1", "10.0.0.254", "10.0.0.1"),
        (RangeConf("10.0.0.0/30"), "10.0.0.1", "10.0.0.2", "10.0.0.1"),
        (RangeConf("fd00::/64"), "fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00::1"),
        (RangeConf("10.0.0.0/24", "10.0.0.0", "10.0.0.255"), "10.0.0.0", "10.0.0.255", "10.0.0.1"),
        (RangeConf("10.0.0.0/24", gateway="192.0.2.1"), "10.0.0.1", "10.0.0.254", "192.0.2.1"),
        (RangeConf("10.0.0.0/24", "::ffff:10.0.0.9", "10.0.0.9"), "10.0.0.9", "10.0.0.9", "10.0.0.1"),
    ],
)
def test_default_values(conf: RangeConf, first: str, last: str, gateway: str) -> None:
    one = parsed([conf])[0].ranges[0]
    assert (str(one.first), str(one.last), str(one.gateway)) == (first, last, gateway)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], "no IP ranges specified"),
        ([[]], "invalid range set 0: empty range set"),
        ([[RangeConf("10.0.0.0/31")]], "Network 10.0.0.0/31 too small to allocate from"),
        ([[RangeConf("10.0.0.0/32")]], "too small"),
        ([[RangeConf("fd00::/127")]], "too small"),
        ([[RangeConf("10.0.0.5/24")]], "Network has host bits set. For a subnet mask of length 24 the network address"),
        ([[RangeConf("::ffff:10.0.0.0/120")]], "no CIDR"),
        ([[RangeConf("10.0.0.0")]], "no CIDR"),
        ([[RangeConf("10.0.0.0/255.0.0.0")]], "no CIDR"),
        ([[RangeConf("010.0.0.0/8")]], "no CIDR"),
        ([[RangeConf("")]], "no CIDR"),
        ([[RangeConf("10.0.0.0/24", "10.0.1.0")]], "RangeStart 10.0.1.0 not in network 10.0.0.0/24"),
        ([[RangeConf("10.0.0.0/24", "", "fd00::1")]], "RangeEnd fd00::1 not in network"),
        ([[RangeConf("10.0.0.0/24", "10.0.0.9", "10.0.0.8")]], "comes before"),
        ([[RangeConf("10.0.0.0/24", "10.0.0.255")]], "comes before"),
        ([[RangeConf("10.0.0.0/24", gateway="x")]], 'gateway "x" is no IP address'),
        ([[RangeConf("fe80::/64", "fe80::1%eth0")]], 'rangeStart "fe80::1%eth0" is no IP address'),
        ([[RangeConf("10.0.0.0/24"), RangeConf("fd00::/64")]], "mixed address families"),
        ([[RangeConf("10.0.0.0/24"), RangeConf("10.0.0.0/16")]], "overlap"),
        ([[RangeConf("10.0.0.0/24")], [RangeConf("10.0.0.0/16")]], "range set 0 overlaps with 1"),
        ([[RangeConf("10.0.0.0/24")], [RangeConf("fd00::/64")], [RangeConf("10.0.0.0/28")]], "0 overlaps with 2"),
    ],
)
def test_what_is_refused(sets: list[list[RangeConf]], words: str) -> None:
    with pytest.raises(CniError) as caught:
        parsed(*sets)
    assert caught.value.code == 7
    assert words in caught.value.msg


def test_parts_of_one_subnet_do_not_overlap() -> None:
    low = RangeConf("10.0.0.0/24", "10.0.0.10", "10.0.0.20")
    high = RangeConf("10.0.0.0/24", "10.0.0.21", "10.0.0.30")
    assert str(parsed([low, high])[0]) == "10.0.0.10-10.0.0.20,10.0.0.21-10.0.0.30"
    assert len(parsed([low], [high])) == 2


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_one_address_of_a_family_in_old_versions(version: str) -> None:
    assert len(parsed([RangeConf("10.0.0.0/24")], [RangeConf("fd00::/64")], version=version)) == 2
    with pytest.raises(CniError, match="does not support more than 1 address per family"):
        parsed([RangeConf("10.0.0.0/24")], [RangeConf("10.0.1.0/24")], version=version)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 64))
def test_spans_go_round_once_and_begin_after_the_last(sizes: list[int], after: int) -> None:
    confs = []
    for index, size in enumerate(sizes):
        base = 16 * index
        confs.append(RangeConf("10.0.0.0/24", f"10.0.0.{base}", f"10.0.0.{base + size}"))
    (one,) = parsed(confs)
    every = [16 * index + low for index, size in enumerate(sizes) for low in range(size + 1)]
    last = ip_address(f"10.0.0.{after}")
    got = [value & 255 for _, first, end in one.spans(last) for value in range(int(first), int(end) + 1)]
    start = every.index(after) + 1 if after in every else 0
    assert got == every[start:] + every[:start]
    assert [str(first) for _, first, _ in one.spans(None)] == [str(single.first) for single in one.ranges]
