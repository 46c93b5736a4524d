"""netloom: one execution for what otherwise is a chain, on networks that are defined once; who reaches whom."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from cni.versions import SUPPORTED
from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2
from tests.cni.chained.traffic import ask, no_answer, serving
from tests.cni.lab import WITH_CHECK, Lab, elements
from tests.hosts import IPV6, Netns

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")

PODS, PODS6, WEB, WEB6 = "10.2.0.0/16", "fd00:2::/64", "10.3.0.0/16", "fd00:3::/64"
HOST, OUTSIDE = "192.0.2.1", "192.0.2.9"


def conf_of(version: str = "1.1.0", network: str = "pods", **keys: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": network, "type": "netloom", **keys}


def with_ports(*ports: tuple[int, int, str], **keys: Any) -> dict[str, Any]:
    mappings = [{"hostPort": host, "containerPort": inside, "protocol": protocol} for host, inside, protocol in ports]
    return {"runtimeConfig": {"portMappings": mappings, **keys}}


def of(family: int, *subnets: str) -> list[str]:
    return [subnet for subnet in subnets if (":" in subnet) == (family == 6)]


@contextlib.contextmanager
def client_of(lab: Lab) -> Iterator[Client]:
    lab.ipamd  # noqa: B018 - starts it
    with Client(str(lab.host.path("/run/netloom/ipamd.sock")), timeout_s=30) as client:
        yield client


def define(client: Client, name: str, *subnets: str, **keys: Any) -> None:
    wanted = [subnet for subnet in subnets if IPV6 or ":" not in subnet]
    client.create_network(ipam_pb2.CreateNetworkRequest(network=ipam_pb2.Network(name=name, subnets=wanted, **keys)))


@pytest.fixture
def networks(lab: Lab) -> Iterator[Client]:
    """Two networks, pods and web, gone after the test."""
    with client_of(lab) as client:
        define(client, "pods", PODS, PODS6)
        define(client, "web", WEB, WEB6)
        yield client
        for name in ("pods", "web"):
            client.delete_network(name)


@pytest.fixture
def outside(lab: Lab) -> Iterator[Netns]:
    """A machine on the host's segment."""
    host = lab.host
    beyond = host.netns("beyond")
    host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", "beyond"])
    host.run(["ip", "address", "add", f"{HOST}/24", "dev", "up0"])
    host.run(["ip", "link", "set", "up0", "up"])
    beyond.run(["ip", "address", "add", f"{OUTSIDE}/24", "dev", "eth0"])
    for link in ("lo", "eth0"):
        beyond.run(["ip", "link", "set", link, "up"])
    yield beyond
    beyond.delete()
    host.run(["ip", "link", "delete", "up0"], check=False)


@pytest.mark.both_ways
@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, networks: Client, version: str) -> None:
    limits = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}
    conf = conf_of(version, **with_ports((8080, 80, "tcp"), bandwidth=limits))
    before = lab.host.snapshot()
    with lab.attached(conf, "netloom") as one:
        if version not in ("0.1.0", "0.2.0"):
            names = [interface["name"] for interface in one.result["interfaces"]]
            assert names[0] == "nl-pods"
            assert names[2] == "eth0"
            assert names[3].startswith("bwp")
            assert one.addresses == ["10.2.0.2/16", *(["fd00:2::2/64"] if IPV6 else [])]
            assert one.result["ips"][0]["gateway"] == "10.2.0.1"
        assert one.netns.ping("10.2.0.1") > 0
        with serving(one.netns, "pod", "tcp:80"):
            assert ask(lab.host, ("tcp", "10.2.0.2", 80)) == ["pod 10.2.0.1"]
            assert ask(lab.host, ("tcp", "127.0.0.1", 8080)) == ["pod 10.2.0.1"]
        if version in WITH_CHECK:
            one.check()
            lab.host.run(["nft", "delete", "element", "inet", "netloom", "anydnat4", "{ tcp . 8080 }"])
            assert "anydnat4" in one.broken()
    lab.host.assert_clean(before, keep=lab.bridges())
    again = lab.cni("DEL", "netloom", conf, netns="", container_id="never")
    again.ok()


def test_the_mtu_is_the_configurations_then_the_networks_then_netds(lab: Lab, networks: Client) -> None:
    define(networks, "small", "10.4.0.0/16", mtu=1300)
    try:
        lab.host.path("/run/netloom/fabric.json").write_text(
            '{"networks": {"pods": {"mtu": 1450}, "small": {"mtu": 1450}}}'
        )
        wanted = [(conf_of(), 1450), (conf_of(mtu=1400), 1400), (conf_of(network="small"), 1300)]
        for conf, mtu in [*wanted, (conf_of(network="web"), 1500)]:
            with lab.attached(conf, "netloom") as one:
                assert one.netns.links()["eth0"]["mtu"] == mtu
        # What netd has not heard of yet.
        lab.host.path("/run/netloom/fabric.json").write_text('{"networks": {"default": {"mtu": 1430}}}')
        with lab.attached(conf_of(network="web"), "netloom") as one:
            assert one.netns.links()["eth0"]["mtu"] == 1430
    finally:
        lab.host.path("/run/netloom/fabric.json").unlink()
        networks.delete_network("small")


@pytest.mark.parametrize("verb", ["ADD", "STATUS", "DEL"])
def test_an_ipamd_that_knows_no_networks_yet_is_named(lab: Lab, tmp_path: Path, verb: str) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/old.sock")
    server.start()
    try:
        conf = conf_of(socket=f"{tmp_path}/old.sock")
        with lab.space() as netns:
            answer = lab.cni(verb, "netloom", conf, netns=netns)
            assert answer.code() == {"ADD": 11, "STATUS": 50, "DEL": 11}[verb]
            said = f"{answer.json['msg']} {answer.json.get('details', '')}"
            assert "another version than this plugin" in said
            assert set(netns.links()) == {"lo"}
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("keys", [{"socket": "relative"}, {"socket": "/a\0b"}, {"timeout": 0}, {"timeout": -1}])
def test_wrong_ways_to_ipamd_are_refused(lab: Lab, keys: dict[str, Any]) -> None:
    with lab.space() as netns:
        answer = lab.cni("ADD", "netloom", conf_of(**keys), netns=netns)
        assert answer.code() == 7
        assert next(iter(keys)) in answer.json["msg"]


@pytest.mark.parametrize("text", [b"", b"[", b'{"networks": 7}', b'"\xff"', b'{"networks": {"pods": {"mtu": "x"}}}'])
def test_what_netd_did_not_write_is_passed_over(lab: Lab, networks: Client, text: bytes) -> None:
    fabric = lab.host.path("/run/netloom/fabric.json")
    fabric.write_bytes(text)
    try:
        with lab.attached(conf_of(), "netloom") as one:
            assert one.netns.links()["eth0"]["mtu"] == 1500
    finally:
        fabric.unlink()


def test_who_was_connected_with_a_deleted_network_is_so_no_more(lab: Lab, networks: Client) -> None:
    """Its subnet may be another network's next."""
    define(networks, "old", "10.4.0.0/16")
    networks.connect_networks("pods", "old")
    with lab.attached(conf_of(), "netloom"):
        assert "10.4.0.0" in str(elements(lab.host, "joined4"))
        lab.host.run([sys.executable, "-m", "cli", "network", "delete", "old"])
        assert "10.4.0.0" not in str(elements(lab.host, "joined4"))
        assert "10.2.0.0" in str(elements(lab.host, "joined4"))


def test_the_configuration_may_have_another_name_than_the_network(lab: Lab, networks: Client) -> None:
    conf = conf_of(network="podman") | {"name": "podman", "network": "web"}
    with lab.attached(conf, "netloom") as one:
        assert one.ip() == "10.3.0.2"


@needs_ipv6
def test_networks_are_apart_until_they_are_connected(lab: Lab, networks: Client, outside: Netns) -> None:
    with (
        lab.attached(conf_of(), "netloom") as one,
        lab.attached(conf_of(), "netloom") as two,
        lab.attached(conf_of(network="web", **with_ports((8081, 80, "tcp"))), "netloom") as web,
        serving(two.netns, "pod", "tcp:80", "udp:53"),
        serving(web.netns, "web", "tcp:80", "udp:53"),
        serving(outside, "outside", "tcp:80"),
    ):
        to_web = [("tcp", web.ip(), 80), ("udp", web.ip(), 53), ("tcp", web.ip(6), 80)]
        # Its own network and its host, with the true source.
        assert ask(one.netns, ("tcp", two.ip(), 80), ("tcp", two.ip(6), 80)) == [f"pod {one.ip()}", f"pod {one.ip(6)}"]
        assert ask(lab.host, ("tcp", web.ip(), 80)) == ["web 10.3.0.1"]
        # Another network: only by the published port.
        assert no_answer(one.netns, *to_web) == ["", "", ""]
        assert ask(one.netns, ("tcp", HOST, 8081))[0].startswith("web ")
        # From outside, which has a route: only by the published port.
        outside.run(["ip", "route", "add", WEB, "via", HOST])
        assert no_answer(outside, ("tcp", web.ip(), 80)) == [""]
        assert ask(outside, ("tcp", HOST, 8081)) == [f"web {OUTSIDE}"]
        # And out.
        assert ask(one.netns, ("tcp", OUTSIDE, 80)) == [f"outside {HOST}"]

        networks.connect_networks("pods", "web")
        with lab.attached(conf_of(network="web"), "netloom") as later, serving(later.netns, "later", "tcp:80"):
            assert ask(one.netns, ("tcp", later.ip(), 80)) == [f"later {one.ip()}"], "an ADD brings what is connected"
            assert ask(one.netns, *to_web) == [f"web {one.ip()}", f"web {one.ip()}", f"web {one.ip(6)}"]
        # What is attached already learns of it by the command.
        words = [sys.executable, "-m", "cli", "network"]
        lab.host.run([*words, "disconnect", "web", "pods"])
        assert no_answer(one.netns, *to_web) == ["", "", ""]
        assert ask(one.netns, ("tcp", two.ip(), 80)) == [f"pod {one.ip()}"]
        lab.host.run([*words, "connect", "pods", "web"])
        assert ask(one.netns, *to_web) == [f"web {one.ip()}", f"web {one.ip()}", f"web {one.ip(6)}"]
        lab.host.run([*words, "disconnect", "pods", "web"])
        two.check()
        web.check()


def test_an_open_network_is_reached_by_everybody(lab: Lab, networks: Client) -> None:
    define(networks, "free", "10.5.0.0/16", open=True)
    try:
        with (
            lab.attached(conf_of(), "netloom") as one,
            lab.attached(conf_of(network="free"), "netloom") as free,
            serving(free.netns, "free", "tcp:80"),
            serving(one.netns, "pod", "tcp:80"),
        ):
            assert ask(one.netns, ("tcp", free.ip(), 80))[0].startswith("free ")
            assert no_answer(free.netns, ("tcp", one.ip(), 80)) == [""]
    finally:
        networks.delete_network("free")


def test_a_network_in_use_is_not_deleted_and_its_user_is_named(lab: Lab, networks: Client) -> None:
    with lab.attached(conf_of(), "netloom") as one:
        with pytest.raises(IpamError, match=one.container_id):
            networks.delete_network("pods")
        assert networks.get_network("pods").name == "pods"


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        (conf_of(network="nowhere"), ["no network nowhere", "netloom network create"]),
        (conf_of(ipam={"type": "host-local"}), ["ipam", "its own pool"]),
        (conf_of(mtu=67), ["mtu", "67"]),
        (conf_of(name=7), ["name"]),
        (conf_of(**with_ports((0, 80, "tcp"))), ["portMappings[0].hostPort", "0"]),
        (conf_of(**with_ports((80, 80, "icmp"))), ["protocol", "icmp"]),
        (conf_of(runtimeConfig={"bandwidth": {"ingressBurst": 8}}), ["ingressBurst"]),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    lab: Lab, networks: Client, conf: dict[str, Any], words: list[str]
) -> None:
    before = lab.host.snapshot()
    with lab.space() as netns:
        answer = lab.cni("ADD", "netloom", conf, netns=netns)
        assert answer.code() > 0
        text = f"{answer.json['msg']} {answer.json.get('details', '')}"
        for word in words:
            assert word in text
        assert set(netns.links()) == {"lo"}
    lab.host.assert_clean(before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, networks: Client, when: str) -> None:
    limits = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}
    conf = conf_of(**with_ports((8080, 80, "tcp"), bandwidth=limits))
    with lab.space() as netns:
        for _ in range(2):  # the second one makes nothing that all share
            called = lab.cni("ADD", "netloom", conf, netns=netns, faults=[{"at": 10**6, "when": "before"}]).calls
            lab.cni("DEL", "netloom", conf, netns=netns).ok()
        assert len(called) > 30
        before = lab.host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 or label == "allocate" else "signal"
            answer = lab.cni("ADD", "netloom", conf, netns=netns, faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            if when == "after" and label in ("allocate", "read the namespace's cookie"):
                # Before we know of the answer nobody but the runtime can give the address back.
                lab.cni("DEL", "netloom", conf, netns=netns).ok()
            try:
                lab.host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
            assert set(netns.links()) == {"lo"}, label
        lab.cni("ADD", "netloom", conf, netns=netns).ok()
        assert netns.ping("10.2.0.1") > 0
        lab.cni("DEL", "netloom", conf, netns=netns).ok()


def test_gc_takes_what_died_and_leaves_what_lives(lab: Lab, networks: Client) -> None:
    conf = conf_of(**with_ports((8080, 80, "tcp")))
    with lab.attached(conf_of(**with_ports((8081, 80, "tcp"))), "netloom") as living:
        before = lab.host.snapshot()
        with lab.space() as netns:
            lab.cni("ADD", "netloom", conf, netns=netns, container_id="dead").ok()
        lab.cni("GC", "netloom", {**conf_of(), "cni.dev/valid-attachments": []}).ok()
        lab.host.assert_clean(before)
        assert len(elements(lab.host, "masq4")) == 1
        living.check()


def test_status_names_what_is_missing(lab: Lab, networks: Client) -> None:
    lab.cni("STATUS", "netloom", conf_of()).ok()
    answer = lab.cni("STATUS", "netloom", conf_of(network="nowhere"))
    assert answer.code() == 50
    assert "nowhere" in str(answer.json)
