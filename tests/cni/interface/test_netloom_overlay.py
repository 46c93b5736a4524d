"""netloom on overlay networks: MACs that follow from addresses, netd's device, what is inside, what goes out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import pytest

from cni.interface import netloom, overlay
from cni.versions import SUPPORTED
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cni.chained.test_firewall import bridge_netfilter, dropping
from tests.cni.chained.traffic import ask, no_answer, serving
from tests.cni.interface.test_netloom import HOST, OUTSIDE, outside, with_ports
from tests.cni.lab import WITH_CHECK, Attached, Lab, Served, elements, net, pool
from tests.cni.overlays import (
    FABRIC,
    MTU,
    FakeNetd,
    Overlay,
    Relay,
    conf_of,
    mac_of,
    make_device,
    relaying,
    static,
    write_fabric,
)
from tests.hosts import IPV6, Netns, wait_until
from tests.underlay import Underlay

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
__all__ = ["outside"]  # a fixture here, too

OV1 = Overlay("ov1", 5001, ("10.9.0.0/24", "fd00:9::/64"))
OV2 = Overlay("ov2", 5002, ("10.9.1.0/24", "fd00:9:1::/64"))
INNER = Overlay("inner", 5003, ("10.9.2.0/24", "fd00:9:2::/64"), internal=True)
GATEWAY_MAC = "02:42:0a:09:00:01"
OWN_MAC = "02:00:00:00:00:77"
LIMITS = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}


@pytest.fixture
def relay(lab: Lab) -> Iterator[Relay]:
    """The three networks are there during the test."""
    with relaying(lab, OV1, OV2, INNER) as relay:
        yield relay


@pytest.fixture
def netd(lab: Lab, relay: Relay) -> Iterator[FakeNetd]:
    """Somebody who does netd's part for all of them."""
    with FakeNetd(lab.host, (OV1, OV2, INNER)) as netd:
        yield netd


def settle(lab: Lab, *networks: Overlay) -> None:
    """The bridge and the device on it are there, as after a first container."""
    for network in networks:
        with lab.attached(conf_of(network), "netloom"):
            pass


def mac(one: Attached, ifname: str = "eth0") -> str:
    return str(one.netns.links()[ifname]["address"])


def said(answer: Any) -> str:
    return f"{answer.json['msg']} {answer.json.get('details', '')}"


# The verbs


@pytest.mark.both_ways
@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, netd: FakeNetd, relay: Relay, version: str) -> None:
    settle(lab, OV1)
    conf = conf_of(OV1, version, **with_ports((8080, 80, "tcp"), bandwidth=LIMITS))
    before = lab.host.snapshot()
    with lab.attached(conf, "netloom") as one:
        host = lab.host.links()
        assert host[OV1.bridge]["address"] == GATEWAY_MAC
        assert host[OV1.device]["master"] == OV1.bridge
        assert one.netns.links()["eth0"]["mtu"] == MTU
        address = next(text for text in one.netns.addresses()["eth0"] if text.startswith("10.9.0."))
        assert mac(one) == mac_of(address)
        if version not in ("0.1.0", "0.2.0"):
            assert one.addresses[0] == address
            assert one.result["interfaces"][0] == {"name": OV1.bridge, "mac": GATEWAY_MAC}
            assert one.result["interfaces"][2]["mac"] == mac(one)
            assert [ip["gateway"] for ip in one.result["ips"]] == [text.split("/")[0] for text in OV1.gateways]
        assert one.netns.ping("10.9.0.1") > 0
        with serving(one.netns, "pod", "tcp:80"):
            assert ask(lab.host, ("tcp", "127.0.0.1", 8080)) == ["pod 10.9.0.1"]
        if version in WITH_CHECK:
            one.check()
    assert "SetMac" not in relay.asked
    lab.host.assert_clean(before)
    lab.cni("DEL", "netloom", conf, netns="", container_id="never").ok()


def test_check_names_what_is_broken(lab: Lab, netd: FakeNetd) -> None:
    host = lab.host
    with lab.attached(conf_of(OV1), "netloom") as one:
        host.run(["ip", "link", "set", OV1.bridge, "address", "02:00:00:00:00:01"])
        assert "02:00:00:00:00:01" in one.broken()
        with lab.attached(conf_of(OV1), "netloom"):  # whose ADD mends that
            one.check()
        own = mac(one)
        one.netns.run(["ip", "link", "set", "eth0", "address", OWN_MAC])
        assert OWN_MAC in one.broken()
        one.netns.run(["ip", "link", "set", "eth0", "address", own])
        one.netns.run(["ip", "link", "set", "eth0", "mtu", "1500"])
        assert "1500" in one.broken()
        one.netns.run(["ip", "link", "set", "eth0", "mtu", "1400"])  # plugin tuning may have done so
        one.check()
        host.run(["ip", "address", "delete", "10.9.0.1/24", "dev", OV1.bridge])
        assert "10.9.0.1" in one.broken()
        host.run(["ip", "address", "add", "10.9.0.1/24", "dev", OV1.bridge])
        host.run(["nft", "delete", "element", "inet", "netloom", "bridged", f"{{ {OV1.bridge} . {OV1.bridge} }}"])
        assert "bridged" in one.broken()


def test_status_wants_a_netd_that_knows_the_network(lab: Lab, relay: Relay) -> None:
    for networks, words in (({}, "systemctl enable --now netloom-netd"), ({"pods": {"mtu": 1450}}, "netloom doctor")):
        if networks:
            write_fabric(lab.host, networks)
        answer = lab.cni("STATUS", "netloom", conf_of(OV1))
        assert answer.code() == 50
        assert "ov1" in said(answer)
        assert words in said(answer)
    write_fabric(lab.host, {"ov1": {"mtu": 1450}})
    lab.cni("STATUS", "netloom", conf_of(OV1)).ok()
    lab.host.path(FABRIC).unlink()


def test_gc_takes_the_dead_and_the_idle_bridge_with_netds_device_on_it(lab: Lab, netd: FakeNetd) -> None:
    with lab.attached(conf_of(OV2), "netloom") as living:
        with lab.space() as netns:
            lab.cni("ADD", "netloom", conf_of(OV1), netns=netns, container_id="dead").ok()
        for network in (OV1, OV2):
            lab.cni("GC", "netloom", {**conf_of(network), "cni.dev/valid-attachments": []}).ok()
        assert lab.bridges() == [OV2.bridge], "one is in use"
        living.check()
    # No record names it any more.
    lab.cni("GC", "netloom", {**conf_of(OV2), "cni.dev/valid-attachments": []}).ok()
    assert lab.bridges() == []


@pytest.mark.parametrize("alias", ["", "somebody's"])
def test_a_bridge_with_somebody_elses_tunnel_on_it_stays(lab: Lab, relay: Relay, alias: str) -> None:
    settle(lab, OV1)
    make_device(lab.host, OV1, alias=alias)
    try:
        lab.host.run(["ip", "link", "set", OV1.device, "master", OV1.bridge])
        lab.cni("GC", "netloom", {**conf_of(OV1), "cni.dev/valid-attachments": []}).ok()
        assert lab.bridges() == [OV1.bridge]
    finally:
        lab.host.run(["ip", "link", "delete", OV1.device])


# The way to the others


def late(answer: Served) -> bool:
    """Whether netd's part took longer than an ADD waits: the machine is busy, and the answer says nothing."""
    return "netd has not" in answer.stderr or "does not know it" in answer.stderr


def test_an_add_is_over_once_netds_device_is_a_port(lab: Lab, relay: Relay) -> None:
    """FakeNetd begins when it hears of the bridge, which is while the ADD is under way."""
    in_time = []
    for _ in range(20):
        with FakeNetd(lab.host, (OV1,)), lab.space() as netns:
            answer = lab.cni("ADD", "netloom", conf_of(OV1), netns=netns)
            found = lab.host.links()[OV1.device]
            lab.cni("DEL", "netloom", conf_of(OV1), netns=netns).ok()
            lab.host.run(["ip", "link", "delete", OV1.bridge])
        answer.ok()
        if not late(answer):
            in_time.append((found.get("master"), "UP" in found["flags"]))
        if len(in_time) == 5:
            break
    assert set(in_time) == {(OV1.bridge, True)}


def test_what_waiting_costs(lab: Lab, relay: Relay) -> None:
    look = f"look up link {OV1.device}"
    with lab.space() as netns:

        def labels() -> tuple[str, ...]:
            answer = lab.cni("ADD", "netloom", conf_of(OV1), netns=netns, faults=[{"at": 10**6, "when": "before"}])
            answer.ok()
            assert "netd has not" not in answer.stderr
            lab.cni("DEL", "netloom", conf_of(OV1), netns=netns).ok()
            return answer.calls

        assert look not in labels(), "no netd has ever run here"
        lab.host.run(["ip", "link", "delete", OV1.bridge])
        with FakeNetd(lab.host, (OV1,)):
            labels()
            assert labels().count(look) == 1, "it is there"


def test_an_add_waits_for_a_netd_that_is_about_to_hear_of_the_network(lab: Lab, relay: Relay) -> None:
    """As right after `netloom network create` on another host."""
    for _ in range(20):
        answer, found = early_add(lab)
        if not late(answer):
            break
    assert found == (OV1.bridge, True, MTU)
    assert not late(answer)


def early_add(lab: Lab) -> tuple[Served, tuple[str, bool, int]]:
    """Of an ADD that netd begins after: bridge of netd's device, whether that is up, and the container's MTU."""
    write_fabric(lab.host, {"default": {"mtu": 1500, "backend": "host-gw"}})
    with lab.space() as netns, ThreadPoolExecutor(1) as beside:
        adding = beside.submit(lab.cni, "ADD", "netloom", conf_of(OV1), netns=netns, container_id="early")
        try:
            records = lab.host.path("/run/netloom/attachments")
            wait_until(lambda: list(records.glob("*/early@eth0.netloom")), "the ADD to be under way")
            time.sleep(0.2)  # one that does not wait is over by now
            with FakeNetd(lab.host, (OV1,)):
                answer = adding.result()
                found = lab.host.links()[OV1.device]
                mtu = netns.links()["eth0"]["mtu"]
        finally:
            adding.result()
            lab.cni("DEL", "netloom", conf_of(OV1), netns=netns, container_id="early").ok()
            lab.host.run(["ip", "link", "delete", OV1.bridge], check=False)
    answer.ok()
    return answer, (found.get("master", ""), "UP" in found["flags"], mtu)


def test_a_netd_that_never_hears_of_the_network_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(range(1000))
    monkeypatch.setattr(overlay, "READY_TIMEOUT_S", 0.1)
    assert overlay.wait_until_known(lambda: next(looks), lambda number: number == 7, "ov1") == 7
    assert capsys.readouterr().err == ""
    assert overlay.wait_until_known(lambda: next(looks), lambda _: False, "ov1") > 8
    assert "network ov1: netd of this host does not know it after 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("default", "wanted"),
    [(netloom._Fabric(1440, "vxlan"), 1440), (netloom._Fabric(1500, "host-gw"), 1430)],
)
def test_the_mtu_fits_a_tunnel_of_a_network_that_netd_does_not_know(default: netloom._Fabric, wanted: int) -> None:
    network = pb.Network(name="ov1", type="overlay")
    assert netloom._mtu(netloom.NetloomConf(), network, netloom._Fabrics({"default": default})) == wanted


def test_a_netd_that_does_not_come_is_not_waited_for_for_ever(lab: Lab, relay: Relay) -> None:
    write_fabric(lab.host, {"ov1": {"mtu": MTU}})
    try:
        with lab.space() as netns:
            # A device that is a port of another bridge is none of this one's.
            lab.host.run(["ip", "link", "add", "other", "type", "bridge"])
            make_device(lab.host, OV1)
            lab.host.run(["ip", "link", "set", OV1.device, "up", "master", "other"])
            answer = lab.cni("ADD", "netloom", conf_of(OV1), netns=netns, faults=[{"at": 10**6, "when": "before"}])
            answer.ok()
            assert f"netd has not brought {OV1.device} up on bridge {OV1.bridge}" in answer.stderr
            assert answer.calls.count(f"look up link {OV1.device}") > 1
            lab.cni("DEL", "netloom", conf_of(OV1), netns=netns).ok()
    finally:
        lab.host.path(FABRIC).unlink()
        for name in ("other", OV1.device):
            lab.host.run(["ip", "link", "delete", name], check=False)


@pytest.mark.parametrize(
    ("networks", "keys", "wanted"),
    [
        ({}, {}, 1500),
        ({"ov1": {"mtu": 1450}, "default": {"mtu": 1500}}, {}, 1450),
        ({"ov1": {"mtu": 1450}}, {"mtu": 1300}, 1300),
    ],
)
def test_the_mtu_fits_a_tunnel(
    lab: Lab, relay: Relay, networks: dict[str, Any], keys: dict[str, Any], wanted: int
) -> None:
    if networks:
        write_fabric(lab.host, networks)
    try:
        with lab.space() as netns:
            lab.cni("ADD", "netloom", conf_of(OV1, **keys), netns=netns).ok()
            assert (netns.links()["eth0"]["mtu"], lab.host.links()[OV1.bridge]["mtu"]) == (wanted, wanted)
            lab.cni("DEL", "netloom", conf_of(OV1, **keys), netns=netns).ok()
    finally:
        lab.host.path(FABRIC).unlink(missing_ok=True)


# Addresses and MACs


def test_who_asks_for_a_mac_gets_it_and_the_other_hosts_are_told(lab: Lab, netd: FakeNetd, relay: Relay) -> None:
    settle(lab, OV1)
    assert relay.macs == []
    wanted: list[dict[str, Any]] = [{"conf": {"runtimeConfig": {"mac": OWN_MAC}}}, {"args": f"MAC={OWN_MAC}"}]
    for one_way in wanted:
        relay.macs.clear()
        conf = conf_of(OV1, **one_way.pop("conf", {}))
        with lab.attached(conf, "netloom", **one_way) as one:
            assert mac(one) == OWN_MAC == one.mac
            assert relay.macs == [("ov1", address.split("/")[0], OWN_MAC) for address in one.addresses]
            assert lab.host.links()[OV1.bridge]["address"] == GATEWAY_MAC
            one.check()
    # What follows from the address need not be told.
    relay.macs.clear()
    conf = conf_of(OV1, runtimeConfig={"mac": mac_of("10.9.0.99"), "ips": ["10.9.0.99"]})
    with lab.attached(conf, "netloom") as one:
        assert one.addresses[0] == "10.9.0.99/24"
        assert mac(one) == mac_of("10.9.0.99")
    assert relay.macs == []


def test_an_address_that_was_told_with_another_mac_before(lab: Lab, netd: FakeNetd, relay: Relay) -> None:
    """A second container on the caller's own address, and one whose namespace is another without a DEL before."""
    settle(lab, OV1)
    address = "10.9.0.50"
    own: dict[str, Any] = {"runtimeConfig": {"mac": OWN_MAC}}
    nothing: dict[str, Any] = {}
    with lab.space() as netns, lab.space() as other:
        for more, told in ((own, OWN_MAC), (nothing, mac_of(address))):
            relay.macs.clear()
            conf = conf_of(OV1, **static(f"{address}/24"), **more)
            lab.cni("ADD", "netloom", conf, netns=netns).ok()
            lab.cni("DEL", "netloom", conf, netns=netns).ok()
            assert relay.macs == [("ov1", address, told)]
        for where, more, told in ((netns, {"mac": OWN_MAC}, OWN_MAC), (other, nothing, mac_of(address))):
            relay.macs.clear()
            conf = conf_of(OV1, runtimeConfig={"ips": [address], **more})
            lab.cni("ADD", "netloom", conf, netns=where).ok()
            assert ("ov1", address, told) in relay.macs
        lab.cni("DEL", "netloom", conf, netns=other).ok()
        # Where nobody is to be told of it, as the address is nobody's here.
        relay.refuse_macs = "held by somebody else"
        conf = conf_of(OV1, **static(f"{address}/24"))
        lab.cni("ADD", "netloom", conf, netns=other).ok()
        lab.cni("DEL", "netloom", conf, netns=other).ok()


def test_a_mac_that_cannot_be_told_ends_the_add(lab: Lab, netd: FakeNetd, relay: Relay) -> None:
    settle(lab, OV1)
    before = lab.host.snapshot()
    relay.refuse_macs = "no such address here"
    with lab.space() as netns:
        answer = lab.cni("ADD", "netloom", conf_of(OV1, runtimeConfig={"mac": OWN_MAC}), netns=netns)
        assert answer.code() > 0
        assert "no such address here" in said(answer)
        assert set(netns.links()) == {"lo"}
    lab.host.assert_clean(before)


@pytest.mark.parametrize("way_of_asking", ["ips", "args"])
def test_an_address_that_is_asked_for(lab: Lab, netd: FakeNetd, way_of_asking: str) -> None:
    more: dict[str, Any] = {"args": "IP=10.9.0.200"} if way_of_asking == "args" else {}
    keys: dict[str, Any] = {} if more else {"runtimeConfig": {"ips": ["10.9.0.200/24"]}}
    conf = conf_of(OV1, **keys)
    with lab.attached(conf, "netloom", **more) as one:
        assert one.addresses[0] == "10.9.0.200/24"
        assert mac(one) == "02:42:0a:09:00:c8"
        one.check()


def test_addresses_of_the_callers_own(lab: Lab, netd: FakeNetd, relay: Relay) -> None:
    both = ["10.9.0.50/24", *(["fd00:9::50/64"] if IPV6 else [])]
    conf = conf_of(OV1, **static(*both), **with_ports((8080, 80, "tcp")))
    settle(lab, OV1)
    before = lab.host.snapshot()
    relay.asked.clear()
    with lab.attached(conf, "netloom") as one, lab.attached(conf_of(OV1), "netloom") as other:
        assert one.addresses == both
        assert mac(one) == "02:42:0a:09:00:32"
        # Each is an allocation of its own, as Docker has them; of the IPv4 address the others expect this one, unless
        # they were told another before.
        told = [("ov1", "fd00:9::50", mac(one))] * (len(both) - 1)
        assert relay.macs == [*told, ("ov1", "10.9.0.50", mac(one))]
        assert one.result["ips"][0]["gateway"] == "10.9.0.1"
        assert other.netns.ping("10.9.0.50") > 0
        one.check()
        lab.cni("STATUS", "netloom", conf).ok()
        lab.cni("GC", "netloom", {**conf, "cni.dev/valid-attachments": []}).ok()
        one.check()
    lab.host.assert_clean(before)
    asked = relay.asked[:]
    assert asked.count("Allocate") == asked.count("Release") == 1, "the other's"
    assert not {"GarbageCollect", "Check"} & set(asked)


@pytest.mark.parametrize(
    ("ipam", "words"),
    [
        (static("10.9.1.50/24"), ["10.9.1.50/24", "10.9.0.0/24"]),
        (static("10.9.0.50/16"), ["10.9.0.50/16", "10.9.0.0/24"]),
        (static("10.9.0.1/24"), ["10.9.0.1/24", "gateway"]),
        (static("10.9.0.0/24"), ["10.9.0.0/24", "interface"]),
        (static("10.9.0.255/24"), ["10.9.0.255/24", "interface"]),
        (static(("10.9.0.50/24", "10.9.0.2")), ["10.9.0.2", "10.9.0.1"]),
        (static(), ["$.ipam.addresses", "no address"]),
        (static("10.9.0.50"), ["$.ipam.addresses[0]", "CIDR"]),
        (static() | {"runtimeConfig": {"ips": ["192.0.2.1/24"]}}, ["192.0.2.1/24", "10.9.0.0/24"]),
        ({"ipam": {"type": "host-local"}}, ["its own pool", "static"]),
        ({"ipam": {"type": "ipamd"}}, ["its own pool", "static"]),
    ],
)
def test_addresses_that_cannot_be_are_refused(lab: Lab, relay: Relay, ipam: dict[str, Any], words: list[str]) -> None:
    before = lab.host.snapshot()
    with lab.space() as netns:
        for verb in ("ADD", "STATUS"):
            answer = lab.cni(verb, "netloom", conf_of(OV1, **ipam), netns=netns)
            assert answer.code() > 0
            for word in words:
                assert word in said(answer)
        lab.cni("DEL", "netloom", conf_of(OV1, **ipam), netns=netns).ok()
    lab.host.assert_clean(before)


def test_a_routed_network_gives_its_addresses_itself(lab: Lab, relay: Relay) -> None:
    del relay.overlays["ov1"]
    with lab.space() as netns:
        answer = lab.cni("ADD", "netloom", conf_of(OV1, **static("10.9.0.50/24")), netns=netns)
        assert answer.code() == 7
        assert "no overlay" in said(answer)


V6_ONLY = Overlay("six", 5004, ("fd00:99::/64",))


@needs_ipv6
def test_without_ipv4_the_mac_follows_from_the_ipv6_address(lab: Lab) -> None:
    def mac_of_six(address: str) -> str:
        return "02:42:" + hashlib.sha256(ip_address(address).packed).digest()[:4].hex(":")

    with relaying(lab, V6_ONLY), FakeNetd(lab.host, (V6_ONLY,)), lab.attached(conf_of(V6_ONLY), "netloom") as one:
        assert mac(one) == mac_of_six(one.ip(6))
        assert lab.host.links()[V6_ONLY.bridge]["address"] == mac_of_six("fd00:99::1")
        assert one.netns.ping("fd00:99::1") > 0
        one.check()


@pytest.mark.parametrize("spoof_check", [False, True])
def test_the_key_of_plugin_bridge(lab: Lab, spoof_check: bool) -> None:
    conf = net(bridge="br9", isGateway=True, macFromAddress=True, macspoofchk=spoof_check, ipam=pool("10.8.0.0/16"))
    with lab.attached(conf) as one, lab.attached(conf) as two:  # the second one finds the bridge
        for attached in (one, two):
            assert mac(attached) == attached.mac == mac_of(attached.ip())
            assert attached.netns.ping("10.8.0.1") > 0
            attached.check()
        assert one.result["interfaces"][0]["mac"] == lab.host.links()["br9"]["address"] == "02:42:0a:08:00:01"
    with lab.attached({**conf, "runtimeConfig": {"mac": OWN_MAC}}) as one:
        assert mac(one) == one.mac == OWN_MAC
    without = {key: value for key, value in conf.items() if key not in ("ipam", "isGateway")}
    with lab.attached(without) as one:
        assert mac(one) == one.mac != ""
    # Somebody else's bridge keeps its MAC.
    lab.host.run(["ip", "link", "add", "br8", "address", OWN_MAC, "type", "bridge"])
    with lab.attached({**conf, "bridge": "br8"}) as one:
        assert mac(one) == mac_of(one.ip())
        assert lab.host.links()["br8"]["address"] == OWN_MAC == one.result["interfaces"][0]["mac"]


# Who reaches whom


def reached(source: Netns, *targets: tuple[Attached, str]) -> bool:
    """Whether servers in the targets answer the source by both families, and see its own address."""
    for target, name in targets:
        families = (4, 6) if IPV6 else (4,)
        with serving(target.netns, name, "tcp:80"):
            answers = ask(source, *(("tcp", target.ip(family), 80) for family in families))
        if [answer.partition(" ")[0] for answer in answers] != [name] * len(families):
            return False
    return True


def apart(source: Netns, target: Attached) -> bool:
    families = (4, 6) if IPV6 else (4,)
    with serving(target.netns, "other", "tcp:80", "udp:53"):
        wishes = [(how, target.ip(family), port) for family in families for how, port in (("tcp", 80), ("udp", 53))]
        return not any(no_answer(source, *wishes))


@pytest.mark.parametrize("bridge_nf", [False, True])
def test_what_is_apart_and_what_goes_out(lab: Lab, netd: FakeNetd, outside: Netns, bridge_nf: bool) -> None:
    with (
        bridge_netfilter(lab.host, bridge_nf),
        lab.attached(conf_of(OV1), "netloom") as one,
        lab.attached(conf_of(OV1), "netloom") as two,
        lab.attached(conf_of(OV2, **with_ports((8081, 80, "tcp"))), "netloom") as three,
        lab.attached(conf_of(INNER, **with_ports((8082, 80, "tcp"))), "netloom") as inner,
        lab.attached(conf_of(INNER), "netloom") as inner_too,
        serving(outside, "outside", "tcp:80"),
    ):
        assert reached(one.netns, (two, "two"))
        assert reached(inner.netns, (inner_too, "inner"))
        for source, target in ((one, three), (three, one), (one, inner), (inner, one)):
            assert apart(source.netns, target)
        outside.run(["ip", "route", "add", "10.9.0.0/16", "via", HOST])
        assert apart_v4(outside, one)
        assert apart_v4(outside, inner)
        # Out, by the host's address; and in by a published port.
        assert ask(one.netns, ("tcp", OUTSIDE, 80)) == [f"outside {HOST}"]
        with serving(three.netns, "three", "tcp:80"), serving(inner.netns, "inner", "tcp:80"):
            assert ask(outside, ("tcp", HOST, 8081)) == [f"three {OUTSIDE}"]
            assert ask(one.netns, ("tcp", HOST, 8081))[0].startswith("three ")
            assert no_answer(outside, ("tcp", HOST, 8082)) == [""]
        # An internal one has no way out, and no route that promises one.
        assert no_answer(inner.netns, ("tcp", OUTSIDE, 80)) == [""]
        assert not [route for route in inner.netns.routes() if route["dst"] == "default"]
        assert inner.netns.ping("10.9.2.1") > 0
        inner.netns.run(["ip", "route", "add", "default", "via", "10.9.2.1"])
        assert no_answer(inner.netns, ("tcp", OUTSIDE, 80)) == [""]
        inner.netns.run(["ip", "route", "delete", "default"])
        assert not [entry for entry in elements(lab.host, "masq4") if str(entry).startswith("10.9.2.")]
        for attached in (one, three, inner):
            attached.check()


def apart_v4(source: Netns, target: Attached) -> bool:
    with serving(target.netns, "other", "tcp:80"):
        return no_answer(source, ("tcp", target.ip(), 80)) == [""]


def test_a_container_on_two_networks(lab: Lab, netd: FakeNetd) -> None:
    with (
        lab.attached(conf_of(OV1), "netloom") as one,
        lab.attached(conf_of(OV2), "netloom") as two,
        lab.space() as netns,
    ):
        for network, ifname in ((OV1, "eth0"), (OV2, "eth1")):
            lab.cni("ADD", "netloom", conf_of(network), netns=netns, container_id="both", ifname=ifname).ok()
        assert reached(netns, (one, "one"), (two, "two"))
        links, addresses = netns.links(), netns.addresses()
        for ifname, prefix in (("eth0", "10.9.0."), ("eth1", "10.9.1.")):
            address = next(text for text in addresses[ifname] if text.startswith(prefix))
            assert links[ifname]["address"] == mac_of(address)
        assert apart(one.netns, two)
        lab.cni("DEL", "netloom", conf_of(OV1), netns=netns, container_id="both").ok()
        assert reached(netns, (two, "two"))
        lab.cni("DEL", "netloom", conf_of(OV2), netns=netns, container_id="both", ifname="eth1").ok()
        assert set(netns.links()) == {"lo"}


@pytest.mark.parametrize("bridge_nf", [False, True])
def test_a_container_of_another_host(lab: Lab, relay: Relay, bridge_nf: bool) -> None:
    """Its packets come out of the tunnel, also where the host's firewall drops what it forwards; unasked ones too."""
    host = lab.host
    with Underlay() as underlay, lab.space() as far:
        here, there = underlay.join(host, 11, "up9"), underlay.join(far, 12)
        address, far_mac = "10.9.0.200", mac_of("10.9.0.200")
        far.run(["ip", "link", "add", "ov", "address", far_mac, "mtu", str(MTU), "up", "type", "vxlan", "id", "5001",
                 "dstport", "4789", "local", there.ipv4, "nolearning"])  # fmt: skip
        far.run(["ip", "address", "add", f"{address}/24", "dev", "ov"])
        try:
            with (
                FakeNetd(host, (OV1,), {"local": here.ipv4}),
                bridge_netfilter(host, bridge_nf),
                dropping(host),
                lab.attached(conf_of(OV1), "netloom") as one,
            ):
                # What netd makes of the address: nobody asks for it on the underlay.
                port = ["bridge", "link", "set", "dev", OV1.device, "learning", "off", "flood", "off"]
                host.run([*port, "mcast_flood", "off", "bcast_flood", "off", "neigh_suppress", "on"])
                host.run(["ip", "neighbour", "add", address, "lladdr", far_mac, "dev", OV1.bridge, "nud", "permanent"])
                host.run(["bridge", "fdb", "add", far_mac, "dev", OV1.device, "master", "static"])
                host.run(["bridge", "fdb", "add", far_mac, "dev", OV1.device, "self", "dst", there.ipv4])
                far.run(["bridge", "fdb", "add", mac(one), "dev", "ov", "self", "dst", here.ipv4])
                far.run(["ip", "neighbour", "add", one.ip(), "lladdr", mac(one), "dev", "ov", "nud", "permanent"])
                with serving(one.netns, "one", "tcp:80"), serving(far, "far", "tcp:80", "udp:53"):
                    assert ask(far, ("tcp", one.ip(), 80)) == [f"one {address}"]
                    assert ask(one.netns, ("tcp", address, 80), ("udp", address, 53)) == [f"far {one.ip()}"] * 2
                assert one.netns.ping(address) > 0
        finally:
            host.run(["ip", "link", "delete", "up9"], check=False)


# Faults


@pytest.mark.parametrize(("when", "own_mac"), [("before", False), ("after", True)])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, netd: FakeNetd, relay: Relay, when: str, own_mac: bool) -> None:
    more = {"mac": OWN_MAC} if own_mac else {}
    conf = conf_of(OV1, **with_ports((8080, 80, "tcp"), bandwidth=LIMITS, **more))
    with lab.space() as netns:
        for _ in range(2):  # the second one makes nothing that all share
            called = lab.cni("ADD", "netloom", conf, netns=netns, faults=[{"at": 10**6, "when": "before"}]).calls
            lab.cni("DEL", "netloom", conf, netns=netns).ok()
        assert called[-2].startswith("look up link nl-vx")
        answers = [number for number, label in enumerate(called, 1) if label == "allocate"]
        before = lab.host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 or label == "allocate" else "signal"
            answer = lab.cni("ADD", "netloom", conf, netns=netns, faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            if when == "after" and (number == answers[1] or label == "read the namespace's cookie"):
                # Before we know of the answer nobody but the runtime can give the address back.
                lab.cni("DEL", "netloom", conf, netns=netns).ok()
            try:
                lab.host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
            assert set(netns.links()) == {"lo"}, label
        lab.cni("ADD", "netloom", conf, netns=netns).ok()
        assert netns.ping("10.9.0.1") > 0
        lab.cni("DEL", "netloom", conf, netns=netns).ok()
    assert bool(relay.macs) is own_mac


def test_a_fault_at_each_step_of_the_first_container_leaves_only_the_bridge(lab: Lab, relay: Relay) -> None:
    conf = conf_of(OV1)
    with lab.space() as netns:
        settle(lab, OV1)
        lab.host.run(["ip", "link", "delete", OV1.bridge])
        before = lab.host.snapshot()
        called = lab.cni("ADD", "netloom", conf, netns=netns, faults=[{"at": 10**6, "when": "before"}]).calls
        lab.cni("DEL", "netloom", conf, netns=netns).ok()
        for number, label in enumerate(called, 1):
            lab.host.run(["ip", "link", "delete", OV1.bridge], check=False)
            fault = {"at": number, "when": "before", "kind": "kernel" if number % 2 else "signal"}
            assert lab.cni("ADD", "netloom", conf, netns=netns, faults=[fault]).code() > 0, label
            lab.host.assert_clean(before, keep=[OV1.bridge])
            assert set(netns.links()) == {"lo"}, label
