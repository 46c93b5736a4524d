"""Overlay networks: what can be, what is chosen. Pure."""

import ipaddress
import random
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from cluster.layout import NetworkRecord
from ipamd import overlay
from ipamd.errors import AlreadyExistsError, ExhaustedError, InvalidArgumentError
from ipamd.networks import judge, validated
from ipamd.overlay import DEFAULT_PARTS, Parts, choose_subnet, complete, gateways, parse_mac, parts_of
from ipamd.pool import Network, PoolSpec, validate
from ipamd.store.base import Address, Allocation, Instant, Key, Netns
from kernel import macs


def net(text: str) -> Network:
    return ipaddress.ip_network(text)


def blue(*subnets: str, **more: Any) -> NetworkRecord:
    return validated(NetworkRecord("blue", type="overlay", subnets=subnets, **more))


@dataclass(frozen=True)
class _Case:
    parts: str
    taken: tuple[str, ...]
    chosen: str


@pytest.mark.parametrize(
    "case",
    [
        _Case("10.0.0.0/8,24", (), "10.0.0.0/24"),
        _Case("10.0.0.0/8,24", ("10.0.0.77/32",), "10.0.1.0/24"),
        _Case("10.0.0.0/8,24", ("10.0.0.0/9",), "10.128.0.0/24"),
        _Case("10.0.0.0/8,24", ("9.0.0.0/8", "11.0.0.0/8", "::/0"), "10.0.0.0/24"),
        _Case("10.0.0.0/8,24", ("10.0.2.0/24", "10.0.0.255/32", "10.0.1.0/30"), "10.0.3.0/24"),
        # One that holds another, and ends behind it.
        _Case("10.0.0.0/8,24", ("10.0.0.0/22", "10.0.1.0/24"), "10.0.4.0/24"),
        _Case("10.0.0.0/8,24", ("10.0.1.0/24",), "10.0.0.0/24"),
        _Case("10.1.2.0/24,24", (), "10.1.2.0/24"),
        _Case("255.255.255.0/24,25", ("255.255.255.0/25",), "255.255.255.128/25"),
        _Case("fd00::/32,64", ("fd00::/48", "10.0.0.0/8"), "fd00:0:1::/64"),
        _Case("::/16,64", (), "::/64"),
    ],
)
def test_the_first_part_that_overlaps_nothing(case: _Case) -> None:
    assert str(choose_subnet(parts_of(case.parts), map(net, case.taken))) == case.chosen


def test_a_choice_is_the_one_that_looking_at_each_part_would_find() -> None:
    chance = random.Random(7)
    for _ in range(300):
        whole = net(f"10.0.0.0/{chance.randint(22, 26)}")
        parts = Parts(whole, chance.randint(whole.prefixlen, 29))
        taken = [
            net(f"{ipaddress.ip_address((10 << 24) + chance.randrange(2048))}/32").supernet(chance.randint(0, 9))
            for _ in range(chance.randint(0, 6))
        ]
        wanted = next(
            (part for part in whole.subnets(new_prefix=parts.length) if not any(part.overlaps(one) for one in taken)),
            None,
        )
        if wanted is not None:
            assert choose_subnet(parts, taken) == wanted
        else:
            with pytest.raises(ExhaustedError, match="overlay_subnets"):
                choose_subnet(parts, taken)


def test_what_is_said_is_kept_and_the_rest_is_chosen() -> None:
    others = [
        NetworkRecord("a", "overlay", ("10.0.0.0/24",), bridge="nl-a", vni=256),
        NetworkRecord("b", "routed", ("10.0.1.0/24",), bridge="nl-vx257"),
        NetworkRecord("c", "overlay", ("10.0.2.0/24",), bridge="nl-c", vni=9),
        NetworkRecord("d", "overlay", ("10.0.3.0/24",), bridge="nl-vx0259", vni=258),
    ]
    made = complete(blue(), others, DEFAULT_PARTS, [net("10.0.4.0/23")])
    assert (made.vni, made.subnets) == (259, ("10.0.6.0/24",))
    assert judge(made, others) is None
    assert complete(blue("fd00::/64", vni=7), others, DEFAULT_PARTS, []) == blue("fd00::/64", vni=7)
    assert complete(blue(vni=7), [], DEFAULT_PARTS, []).subnets == ("10.0.0.0/24",)


def test_the_same_again_is_known_whatever_was_chosen() -> None:
    there = msgspec.structs.replace(blue("10.0.0.0/24", vni=256), docker="x", created_unix_s=7)
    for again in (blue(), blue("10.0.0.0/24"), blue(vni=256), blue("10.0.0.0/24", vni=256)):
        assert judge(again, [there]) is there
    for other in (blue(vni=257), blue("10.0.1.0/24"), blue(flood=True), blue(internal=True), blue(mtu=1400)):
        with pytest.raises(AlreadyExistsError, match="another definition"):
            judge(other, [there])
    routed = validated(NetworkRecord("blue", subnets=("10.0.0.0/24",)))
    with pytest.raises(AlreadyExistsError, match="another definition"):
        judge(routed, [there])
    with pytest.raises(AlreadyExistsError, match="another definition"):
        judge(blue(), [routed])


def test_a_device_and_a_bridge_cannot_have_one_name() -> None:
    bridge = validated(NetworkRecord("vx300", subnets=("10.1.0.0/24",)))
    device = blue("10.2.0.0/24", vni=300)
    for one, other in ((bridge, device), (device, bridge)):
        with pytest.raises(AlreadyExistsError, match=r"VNI 300, of network blue.*nl-vx300"):
            judge(one, [other])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"type": "overley"}, "type: wanted routed or overlay, found 'overley'"),
        ({"type": "routed", "vni": 7, "subnets": ("10.0.0.0/24",)}, "vni: found 7 with type routed"),
        ({"type": "", "internal": True, "subnets": ("10.0.0.0/24",)}, "internal: found True with type routed"),
        ({"type": "routed"}, "subnets: wanted one IPv4 or IPv6 subnet, or one of each, found none"),
        ({"type": "overlay", "subnets": ("10.0.0.1/24",)}, r"host bits set; write 10\.0\.0\.0/24"),
    ],
)
def test_what_cannot_be_is_named(more: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        validated(NetworkRecord("blue", **more))


def test_gateways_are_those_that_the_pool_never_hands_out() -> None:
    for subnet in ("10.0.0.0/24", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.0/8", "fd00::/64", "fd00::/126", "fd00::/127"):
        record = blue(subnet)
        (gateway,) = gateways(record)
        (only,) = validate(overlay.spec_of(record, PoolSpec((), mode="cluster-address"))).range_sets
        interface = ipaddress.ip_interface(gateway)
        assert (int(interface.ip), str(interface.network)) == (only[0].gateway, subnet)
        assert interface.ip == next(iter(interface.network.hosts()))
        assert overlay.gateway_macs(record) == [macs.of_address(interface.ip)]
    assert gateways(validated(NetworkRecord("pods", subnets=("10.0.0.0/24",)))) == []


def test_a_mac_follows_from_all_addresses_of_the_interface() -> None:
    held = Allocation(
        Key("n", "cni", "blue", "c", "eth0"),
        (Address("fd00::7/64", "", "blue", 0), Address("10.0.0.7/24", "", "blue", 1)),
        Netns(),
        Instant("", 0),
        0,
    )
    assert overlay.default_mac(held) == "02:42:0a:00:00:07"
    assert parse_mac("02-42-0A-00-00-07") == "02:42:0a:00:00:07"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "wanted a CIDR and the length of its parts"),
        ("10.0.0.0/8", 'the length of its parts is missing: write "10.0.0.0/8,24"'),
        ("10.0.0.0/30", 'write "10.0.0.0/30,30"'),
        ("10.0.0.0/8,", "is missing"),
        ("10.0.0.0/8,x", "is missing"),
        ("10.0.0.1/8,24", "host bits"),
        ("10.0.0.0/8,7", "prefix length of 8 to 31, found 7"),
        ("10.0.0.0/8,32", "prefix length of 8 to 31, found 32"),
        ("fd00::/48,128", "prefix length of 48 to 127, found 128"),
        ("10.0.0.0/8,24,25", "is missing"),
    ],
)
def test_parts_that_cannot_be(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parts_of(text)


def test_parts_are_as_they_are_written() -> None:
    assert str(parts_of(" 10.0.0.0/8 , 24 ")) == str(DEFAULT_PARTS) == "10.0.0.0/8,24"
