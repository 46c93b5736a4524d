"""What a pool's spec may say, and what its defaults are."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipamd.errors import InvalidArgumentError
from ipamd.pool import PoolSpec, RangeSpec, address_number, address_text, validate


def _bounds(r: RangeSpec) -> tuple[str, str, str]:
    layout = validate(PoolSpec(((r,),)))
    found = layout.range_sets[0][0]
    gateway = "" if found.gateway is None else address_text(found.version, found.gateway)
    return address_text(found.version, found.first), address_text(found.version, found.last), gateway


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (RangeSpec("10.1.0.0/24"), ("10.1.0.1", "10.1.0.254", "10.1.0.1")),
        (RangeSpec("10.0.0.0/8"), ("10.0.0.1", "10.255.255.254", "10.0.0.1")),
        (RangeSpec("10.1.0.0/24", gateway="10.1.0.254"), ("10.1.0.1", "10.1.0.254", "10.1.0.254")),
        (RangeSpec("10.1.0.0/24", gateway="none"), ("10.1.0.1", "10.1.0.254", "")),
        (RangeSpec("10.1.0.0/24", "10.1.0.10", "10.1.0.20"), ("10.1.0.10", "10.1.0.20", "10.1.0.1")),
        # Bounds on the network's own and the broadcast address are taken, those addresses are not.
        (RangeSpec("10.1.0.0/24", "10.1.0.0", "10.1.0.255"), ("10.1.0.1", "10.1.0.254", "10.1.0.1")),
        (RangeSpec("10.1.0.0/31"), ("10.1.0.0", "10.1.0.1", "10.1.0.0")),
        (RangeSpec("fd00::/64"), ("fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00::1")),
        (RangeSpec("fd00::/127"), ("fd00::", "fd00::1", "fd00::")),
        (RangeSpec("fd00::/64", gateway="fe80::1"), ("fd00::1", "fd00::ffff:ffff:ffff:ffff", "fe80::1")),
    ],
)
def test_defaults(spec: RangeSpec, expected: tuple[str, str, str]) -> None:
    assert _bounds(spec) == expected


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (PoolSpec(()), "at least one range set"),
        (PoolSpec(((),)), "range_sets[0]: wanted at least one range"),
        (PoolSpec(((RangeSpec(""),),)), "range_sets[0].ranges[0].subnet: wanted a CIDR such as 10.1.0.0/16, found ''"),
        (PoolSpec(((RangeSpec("10.1.0.0"),),)), "wanted a CIDR"),
        (PoolSpec(((RangeSpec("10.1.0.0/x"),),)), "wanted a CIDR"),
        (PoolSpec(((RangeSpec("10.1.2.3/16"),),)), "'10.1.2.3/16' has host bits set; write 10.1.0.0/16"),
        (PoolSpec(((RangeSpec("fd00::1/64"),),)), "write fd00::/64"),
        (PoolSpec(((RangeSpec("fe80::%eth0/64"),),)), "wanted a CIDR"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", "10.2.0.1"),),)), "start: 10.2.0.1 lies outside 10.1.0.0/24"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", end="fd00::1"),),)), "end: fd00::1 lies outside"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", "10.1.0.9", "10.1.0.8"),),)), "exchange them"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", gateway="fd00::1"),),)), "not of the family"),
        (PoolSpec(((RangeSpec("10.1.0.0/24", gateway="x"),),)), "gateway: wanted an IP address, found 'x'"),
        (PoolSpec(((RangeSpec("10.1.0.0/24"), RangeSpec("fd00::/64")),)), "make a set for each family"),
        (PoolSpec(((RangeSpec("10.1.0.0/24"), RangeSpec("10.1.0.128/25")),)), "overlap"),
        (PoolSpec(((RangeSpec("10.1.0.0/24"),), (RangeSpec("10.1.0.0/16", "10.1.0.200"),))), "overlap"),
        (PoolSpec(((RangeSpec("10.1.0.0/32"),),)), "no address of 10.1.0.0-10.1.0.0 can be handed out"),
        (PoolSpec(((RangeSpec("10.1.0.0/30"),),), ("10.1.0.2",)), "gateway and excludes take them all"),
        (PoolSpec(((RangeSpec("10.1.0.0/24"),),), ("10.1.0.7/29",)), "excludes[0]: '10.1.0.7/29' has host bits"),
        (PoolSpec(((RangeSpec("10.1.0.0/24"),),), ("", "")), "excludes[0]: wanted an IP address, found ''"),
        (PoolSpec((tuple(RangeSpec(f"10.{n >> 8}.{n & 255}.0/24") for n in range(1025)),)), "at most 1024 ranges"),
    ],
)
def test_refusals(spec: PoolSpec, text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validate(spec)
    assert text in str(caught.value)


def test_ranges_of_one_subnet_share_its_gateway() -> None:
    low, high = RangeSpec("10.1.0.0/24", "10.1.0.1", "10.1.0.9"), RangeSpec("10.1.0.0/24", "10.1.0.20")
    layout = validate(PoolSpec(((low, high),)))
    assert layout.build()[0].size == 8 + 235


def test_excludes_may_be_large_and_overlap() -> None:
    excludes = ("10.0.0.0/9", "10.0.0.0/10", "10.128.0.0/32", "10.128.0.2", "192.0.2.0/24", "fd00::/8")
    (built,) = validate(PoolSpec(((RangeSpec("10.0.0.0/8"),),), excludes)).build()
    assert built.take_cold() == (int(ipaddress.ip_address("10.128.0.1")), 0)
    assert built.take_cold() == (int(ipaddress.ip_address("10.128.0.3")), 0)
    (six,) = validate(PoolSpec(((RangeSpec("fd00::/48"),),), ("fd00::/49",))).build()
    assert six.take_cold() == (int(ipaddress.ip_address("fd00:0:0:8000::")), 0)


def test_a_spec_survives_the_store() -> None:
    spec = PoolSpec(((RangeSpec("10.1.0.0/24", "10.1.0.5", "", "none"),), (RangeSpec("fd00::/64"),)), ("10.1.0.9",), 0)
    assert PoolSpec.decode(spec.encode()) == spec


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_texts_and_numbers(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    text = address_text(address.version, int(address))
    assert address_number(text) == (address.version, int(address))
    assert ipaddress.ip_address(text) == address
