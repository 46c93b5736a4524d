"""Wanted and found, and the way from one to the other: pure, and checked against a model of a kernel."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

from hypothesis import given
from hypothesis import strategies as st

from netd.desired import OWN, Desired
from netd.plan import needs_new_device, plan
from netd.values import Address, Device, Entry, Forward, Key, Neighbour, Route

DEVICE = Device("nl-vx1", 1, ip_address("10.0.0.1"), 4789, 2, "02:00:00:00:00:01", 1450, True, False)


def route(number: int, device: str = "nl-vx1", gateway: int = 0) -> Route:
    return Route(device, ip_network((0x0A020000 + (number << 8), 24)), ip_address(0x0A000000 + gateway), onlink=True)


def neighbour(number: int, mac: int = 1) -> Neighbour:
    return Neighbour("nl-vx1", ip_address(0x0A020000 + (number << 8)), f"02:00:00:00:00:{mac:02x}")


def forward(mac: int, dst: int = 1) -> Forward:
    return Forward("nl-vx1", f"02:00:00:00:00:{mac:02x}", ip_address(0x0A000000 + dst))


ENTRIES = st.one_of(
    st.builds(route, st.integers(0, 4), st.sampled_from(["nl-vx1", "eth0"]), st.integers(0, 2)),
    st.builds(neighbour, st.integers(0, 4), st.integers(1, 3)),
    st.builds(forward, st.integers(1, 4), st.integers(1, 3)),
    st.just(DEVICE),
    st.just(Address("nl-vx1", ip_interface("10.2.1.0/32"))),
)
TABLES = st.lists(ENTRIES, max_size=12).map(lambda entries: {one.key: one for one in entries})


@given(TABLES, TABLES)
def test_the_plan_leads_from_one_to_the_other(wanted: dict[Key, Entry], found: dict[Key, Entry]) -> None:
    made = plan({*wanted, *found}, wanted.get, found.get)
    kernel = dict(found)
    for device, have in made.devices:
        assert kernel.get(device.key) == have
        kernel[device.key] = device
    for want, had in made.put:
        assert kernel.get(want.key) == had
        kernel[want.key] = want
    for entry in (*made.drop, *made.drop_devices):
        del kernel[entry.key]
    assert kernel == wanted
    assert not plan({*wanted, *kernel}, wanted.get, kernel.get), "then there is nothing to do"
    changed = [one for one, _ in (*made.devices, *made.put)] + [*made.drop, *made.drop_devices]
    assert all(wanted.get(one.key) != found.get(one.key) for one in changed), "only differences are touched"


def test_order() -> None:
    wanted: list[Entry] = [route(1), neighbour(1), forward(1)]
    there = {one.key: one for one in wanted}
    nothing: dict[Key, Entry] = {}
    made = plan(there, there.get, nothing.get)
    assert [type(one).__name__ for one, _ in made.put] == ["Neighbour", "Forward", "Route"]
    made = plan(there, nothing.get, there.get)
    assert [type(one).__name__ for one in made.drop] == ["Route", "Neighbour", "Forward"]


def test_a_route_over_another_link_is_exchanged_not_removed() -> None:
    old, new = route(1, "eth0"), route(1, "nl-vx1")
    made = plan({old.key}, {new.key: new}.get, {old.key: old}.get)
    assert (made.put, made.drop) == ([(new, old)], [])


def test_what_takes_a_new_device() -> None:
    from dataclasses import replace  # noqa: PLC0415 - of this test alone

    for change in ({"mtu": 1400}, {"mac": "02:00:00:00:00:09"}, {"tx_checksum": False}, {"up": False}):
        assert not needs_new_device(DEVICE, replace(DEVICE, **change)), change
    for other in ({"vni": 2}, {"port": 1}, {"local": ip_address("10.0.0.9")}, {"link": 9}, {"udp_checksum": True}):
        assert needs_new_device(DEVICE, replace(DEVICE, **other)), other


OWNERS = st.sampled_from(["b", "c", "d", OWN])


@given(st.lists(st.tuples(OWNERS, st.one_of(st.none(), st.lists(ENTRIES, max_size=5))), max_size=20))
def test_desired_is_what_its_owners_want(steps: list[tuple[str, list[Entry] | None]]) -> None:
    """Against a model: the first who wanted an entry of a key, and still does, has it."""
    desired = Desired()
    claims: dict[Key, dict[str, Entry]] = {}
    for owner, entries in steps:
        before = {key: desired.get(key) for key in (*claims, *(one.key for one in entries or ()))}
        if entries is None:
            if owner not in desired.owners():
                continue
            changed = desired.remove(owner)
        else:
            changed = desired.replace(owner, entries)
        wanted = {one.key: one for one in entries or ()}
        for key in list(claims):
            if key not in wanted:
                claims[key].pop(owner, None)
        for key, entry in wanted.items():
            claims.setdefault(key, {})[owner] = entry
        claims = {key: rivals for key, rivals in claims.items() if rivals}
        assert {key: desired.get(key) for key in desired.keys()} == {  # noqa: SIM118 - it is no dict
            key: next(iter(rivals.values())) for key, rivals in claims.items()
        }
        for key, was in before.items():
            assert desired.get(key) == was or key in changed
    disputed = {key for key, rivals in claims.items() if len(set(rivals.values())) > 1}
    assert {key for key, _ in desired.disputes()} == disputed
