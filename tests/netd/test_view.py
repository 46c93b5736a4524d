"""What etcd says of hosts, as values: pure, against a model, and against records that nobody of ours wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import layout
from cluster.etcd import Event, Pair
from netd.values import Network
from netd.view import NETD, NETD_ALIVE, PREFIXES, State, View, read_state

DEFAULT = Network("default", (), "vxlan", 1, 4789, 0, True, False)


def pair(key: str, value: object = "") -> Pair:
    return Pair(key, json.dumps(value).encode(), 1, 1, 1, 0)


def put(key: str, value: object = "") -> Event:
    return Event("put", pair(key, value), None)


def gone(key: str) -> Event:
    return Event("delete", pair(key), None)


def record(address: str = "10.0.0.2", **more: object) -> dict[str, object]:
    return {"id": "x", "addresses": [address], "mac": "02:00:00:00:00:01", **more}


def block(node: str) -> dict[str, str]:
    return {"node": node, "node_id": "x"}


def test_a_node_is_its_record_and_its_blocks() -> None:
    view = View()
    assert view.changed([put("netd/b", record(subnets=["10.9.0.0/24"]))]) == {"b"}
    assert view.changed([put("blocks/pods#10.2.0.64/26", block("b")), put("blocks/pods#fd00::/120", block("b"))]) == {
        "b"
    }
    node = view.node("b")
    assert node is not None
    assert [str(one) for one in node.subnets] == ["10.9.0.0/24", "10.2.0.64/26", "fd00::/120"]
    assert view.changed([put("blocks/pods#10.2.0.64/26", block("c"))]) == {"b", "c"}, "a block that changes hands"
    assert view.subnets("c") == (ip_network("10.2.0.64/26"),)
    assert view.node("c") is None, "nobody knows where it is"
    assert view.changed([gone("blocks/pods#10.2.0.64/26")]) == {"c"}
    assert view.changed([put("netd-alive/b", "x")]) == {"b"}
    assert view.alive == {"b"}
    assert view.changed([gone("netd-alive/b")]) == {"b"}
    assert view.node("b") is not None, "silent is not gone"
    assert view.changed([gone("netd/b")]) == {"b"}
    assert view.node("b") is None


def test_one_block_of_two_pools_stays_until_both_are_gone() -> None:
    view = View()
    view.changed([put("blocks/a#10.2.0.0/26", block("n")), put("blocks/b#10.2.0.0/26", block("n"))])
    view.changed([gone("blocks/a#10.2.0.0/26")])
    assert view.subnets("n") == (ip_network("10.2.0.0/26"),)
    view.changed([gone("blocks/b#10.2.0.0/26")])
    assert view.subnets("n") == ()


def test_what_is_listed_anew_replaces_what_was_known() -> None:
    view = View()
    view.listed(NETD, [pair("netd/a", record("10.0.0.1")), pair("netd/b", record())])
    assert view.listed(NETD, [pair("netd/b", record()), pair("netd/c", record("10.0.0.3"))]) == {"a", "b", "c"}
    assert set(view.records) == {"b", "c"}
    view.listed(NETD_ALIVE, [pair("netd-alive/b")])
    assert view.listed(NETD_ALIVE, []) == {"b"}
    assert view.alive == set()


def full() -> View:
    """Two hosts with a block each, and a network."""
    view = View()
    for prefix, pairs in (
        (NETD, [pair("netd/a", record("10.0.0.1")), pair("netd/b", record())]),
        (NETD_ALIVE, [pair("netd-alive/a"), pair("netd-alive/b")]),
        (layout.BLOCKS, [pair("blocks/p#10.2.1.0/24", block("a")), pair("blocks/p#10.2.2.0/24", block("b"))]),
        (layout.NETWORKS, [pair("networks/p", {"name": "p", "subnets": ["10.2.0.0/16"]})]),
    ):
        view.listed(prefix, pairs)
    return view


def test_what_etcd_lost_is_kept_until_it_is_settled() -> None:
    view = full()
    before = [view.node(name) for name in "ab"]
    for prefix in PREFIXES:
        view.listed(prefix, [], lost=True)
    assert view.alive == set(), "but not who lives"
    assert ([view.node(name) for name in "ab"], [*view.definitions()]) == (before, ["p"])
    assert view.listed(layout.BLOCKS, []) == set(), "the next list lacks it, too"
    view.changed([put("netd/a", record("10.0.0.1")), put("blocks/p#10.2.1.0/24", block("a"))])
    assert view.kept == {"netd/b", "blocks/p#10.2.2.0/24", "networks/p"}
    assert view.settle(set(), {"a"}) == set(), "b was not heard of"
    assert [view.node(name) for name in "ab"] == before
    again = View(read_state(msgspec.json.encode(view.state())))
    assert again.settle({"b"}, {"a"}) == {"b"}
    assert (again.kept, [*again.records], [*again.definitions()]) == (set(), ["a"], [])
    assert again.subnets("b") == ()
    assert view.settle(set(), {"a", "b"}) == {"b"}, "its ipamd did not put the block back"
    assert view.subnets("b") == ()
    assert view.kept == {"netd/b"}


def test_what_is_deleted_or_comes_back_is_kept_no_longer() -> None:
    view = full()
    view.listed(NETD, [], lost=True)
    assert view.changed([gone("netd/b")]) == {"b"}
    assert view.node("b") is None
    view.listed(NETD, [pair("netd/a", record("10.0.0.1"))])
    assert view.kept == set()
    view.listed(NETD, [])
    assert view.node("a") is None, "what is not lost is gone"


def test_the_disk_keeps_all_but_who_lives() -> None:
    import msgspec  # noqa: PLC0415 - of this test alone

    view = View()
    view.changed([put("netd/b", record()), put("blocks/p#10.2.0.0/26", block("b")), put("netd-alive/b")])
    view.changed([put("networks/pods", {"name": "pods", "subnets": ["10.2.0.0/16"]})])
    again = View(read_state(msgspec.json.encode(view.state())))
    assert again.node("b") == view.node("b")
    assert again.networks(DEFAULT, []) == view.networks(DEFAULT, [])
    assert again.alive == set()
    with pytest.raises(ValueError, match="records"):
        read_state(b'{"records": 7}')
    assert read_state(b"{}") == State()


def test_networks() -> None:
    view = View()
    view.changed(
        [
            put("networks/pods", {"name": "pods", "subnets": ["10.2.0.0/16"], "backend": "host-gw", "mtu": 1400}),
            put("networks/web", {"name": "web", "subnets": ["10.3.0.0/16"]}),
        ]
    )
    found = {one.name: one for one in view.networks(DEFAULT, [])}
    assert (found["pods"].backend, found["pods"].mtu) == ("host-gw", 1400)
    assert (found["web"].backend, found["web"].vni) == ("vxlan", 1), "the rest is netd's default"
    file = Network("other", (ip_network("10.3.0.0/17"),), "none", 1, 4789, 0, True, False)
    assert [one.name for one in view.networks(DEFAULT, [file])] == ["pods"], "the file wins"


def test_an_overlay_with_the_vni_of_tunnels_is_told_and_left_out() -> None:
    view = View()
    one = {"name": "ov", "type": "overlay", "subnets": ["10.9.0.0/24"], "vni": 7, "bridge": "nl-ov"}
    view.changed([put("networks/ov", one)])
    assert [overlay.vni for overlay in view.overlays([DEFAULT])] == [7]
    assert view.overlays([replace(DEFAULT, vni=7)]) == []
    assert "another --vni" in view.broken["networks/ov"]
    assert len(view.overlays([replace(DEFAULT, vni=7, backend="host-gw")])) == 1
    assert view.broken == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("netd/b", {"id": "x", "addresses": [], "mac": "02:00:00:00:00:01"}),
        ("netd/b", {"id": "x", "addresses": ["router"], "mac": "02:00:00:00:00:01"}),
        ("netd/b", {"id": "x", "addresses": ["10.0.0.2"], "mac": "nothing"}),
        ("netd/b", {"id": "x", "addresses": ["10.0.0.2"], "mac": "02:00:00:00:00:01", "subnets": ["10.2.1.5/24"]}),
        ("netd/b", {"id": "x", "addresses": ["10.0.0.2"], "mac": "02:00:00:00:00:01", "version": "\x1b[2J"}),
        ("netd/b", 7),
        ("blocks/pods", {"node": "b", "node_id": "x"}),
        ("blocks/pods#10.2.0.1/26", {"node": "b", "node_id": "x"}),
        ("networks/pods", {"name": "pods", "subnets": ["everything"]}),
        ("networks/pods", {"name": "pods", "subnets": ["10.2.0.0/16"], "backend": "carrier-pigeon"}),
    ],
)
def test_a_record_that_cannot_be_used_is_told_and_left_out(key: str, value: object) -> None:
    view = View()
    view.changed([put("netd/a", record("10.0.0.1")), put(key, value)])
    assert list(view.broken) == [key]
    assert view.node("b") is None
    assert view.networks(DEFAULT, []) == []
    assert view.node("a") is not None
    view.changed([gone(key)])
    assert view.broken == {}


NAMES = st.sampled_from(["a", "b", "c"])
BLOCKS = st.sampled_from([f"{pool}#10.2.0.{64 * number}/26" for pool in ("p", "q") for number in range(4)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("netd/"), NAMES, st.booleans()),
        st.tuples(st.just("netd-alive/"), NAMES, st.booleans()),
        st.tuples(st.just(layout.BLOCKS), st.tuples(BLOCKS, NAMES), st.booleans()),
    ),
    max_size=40,
)


@given(STEPS)
@settings(deadline=None)  # other tests may have the processors
def test_the_view_is_what_was_last_said(steps: list[tuple[str, str | tuple[str, str], bool]]) -> None:
    view = View()
    said: dict[str, str] = {}  # key → node
    for prefix, what, there in steps:
        end, node = what if isinstance(what, tuple) else (what, what)
        before = {name: view.subnets(name) for name in "abc"}
        if there:
            value = block(node) if prefix == layout.BLOCKS else record()
            concerned = view.changed([put(prefix + end, value)])
            said[prefix + end] = node
        else:
            concerned = view.changed([gone(prefix + end)])
            said.pop(prefix + end, None)
        for name, was in before.items():
            assert name in concerned or view.subnets(name) == was, "who has other subnets is told of"
    assert set(view.records) == {key[5:] for key in said if key.startswith("netd/")}
    assert view.alive == {key[11:] for key in said if key.startswith("netd-alive/")}
    for name in "abc":
        wanted = {
            ip_network(key.partition("#")[2])
            for key, node in said.items()
            if key.startswith(layout.BLOCKS) and node == name
        }
        assert set(view.subnets(name)) == wanted
