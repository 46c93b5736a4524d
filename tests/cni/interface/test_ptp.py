"""ptp: each verb in each spec version, each key, in a real host: what is printed, what the kernel has on both ends,
what a packet does, and that DEL puts everything back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.interface import reference
from tests.cni.lab import FOUR, SIX, WITH_CHECK, Attached, Capture, Lab, both, elements, pool, unreachable
from tests.hosts import IPV6, wait_until

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
FAMILIES = 2 if IPV6 else 1
DEFAULTS = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}][:FAMILIES]


def conf_of(version: str = "1.1.0", name: str = "net", **keys: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": name, "type": "ptp", "ipam": {**both(), "routes": DEFAULTS}, **keys}


def scripted(**keys: Any) -> dict[str, Any]:
    return conf_of(**{"ipam": {"type": "scripted"}, **keys})


def refused(lab: Lab, conf: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An ADD that must fail, and leave nothing; its error object."""
    with lab.space() as netns:
        before = lab.host.snapshot()
        answer = lab.cni("ADD", "ptp", conf, netns=netns, **more)
        assert answer.code() > 0
        lab.host.assert_clean(before)
        assert set(netns.links()) == {"lo"}
    error: dict[str, Any] = answer.json
    return error


def end(one: Attached) -> str:
    """The host's end."""
    return str(one.result["interfaces"][0]["name"])


def routes_over(where: Any, dev: str) -> list[tuple[Any, ...]]:
    """(destination, gateway, scope, source) in the main table."""
    return [
        (r["dst"], r.get("gateway"), r.get("scope"), r.get("prefsrc"))
        for r in where.routes()
        if r.get("dev") == dev and r.get("table", "main") == "main"
    ]


# Each verb in each version


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    host = lab.host
    dns = {"nameservers": ["192.0.2.53"], "search": ["example"]}
    conf = conf_of(version, ipMasq=True, mtu=1400, dns=dns)
    before = host.snapshot()
    with lab.space() as netns:
        result = lab.cni("ADD", "ptp", conf, netns=netns).result()

        # What is printed.
        assert result["cniVersion"] == version
        assert result["dns"] == dns
        links, inside = host.links(), netns.links()
        (port,) = [name for name in links if name.startswith("veth")]
        routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}][:FAMILIES]
        if version in ("0.1.0", "0.2.0"):
            assert set(result) == {"cniVersion", "ip4", "dns"} | ({"ip6"} if IPV6 else set())
            assert result["ip4"]["gateway"] == "10.1.0.1"
            assert [r["dst"] for r in result["ip4"]["routes"]] == ["0.0.0.0/0"]
            addresses = [result[key]["ip"] for key in ("ip4", "ip6")[:FAMILIES]]
        else:
            assert result["interfaces"] == [
                {"name": port, "mac": links[port]["address"]},
                {"name": "eth0", "mac": inside["eth0"]["address"], "sandbox": netns.path},
            ]
            assert [one["interface"] for one in result["ips"]] == [1] * FAMILIES
            assert [one["gateway"] for one in result["ips"]] == ["10.1.0.1", "fd00:1::1"][:FAMILIES]
            assert [one.get("version") for one in result["ips"]] == (
                [None] * FAMILIES if version in ("1.0.0", "1.1.0") else ["4", "6"][:FAMILIES]
            )
            assert result["routes"] == routes
            addresses = [one["address"] for one in result["ips"]]

        # What the kernel has.
        bare = [address.split("/")[0] for address in addresses]
        assert netns.addresses()["eth0"] == addresses
        assert (inside["eth0"]["mtu"], links[port]["mtu"]) == (1400, 1400)
        assert "UP" in inside["eth0"]["flags"]
        assert "UP" in links[port]["flags"]
        assert host.addresses()[port] == ["10.1.0.1/32", "fd00:1::1/128"][:FAMILIES]
        found = routes_over(netns, "eth0")
        assert ("10.1.0.1", None, "link", bare[0]) in found
        assert ("10.1.0.0/16", "10.1.0.1", None, bare[0]) in found
        assert ("default", "10.1.0.1", None, None) in found
        assert (bare[0], None, "host", None) in routes_over(host, port)
        if IPV6:
            assert ("fd00:1::/64", "fd00:1::1", None, bare[1]) in found
            assert ("default", "fd00:1::1", None, None) in found
            assert bare[1] in [one[0] for one in routes_over(host, port)]
        assert elements(host, "masq4") + elements(host, "masq6") == bare
        assert host.run(["cat", f"/proc/sys/net/ipv6/conf/{port}/accept_ra"], check=False).stdout.strip() in ("0", "")
        for gateway in ["10.1.0.1", "fd00:1::1"][:FAMILIES]:
            assert netns.ping(gateway) > 0
        for address in bare:
            assert host.ping(address) > 0

        # The other verbs.
        with_result = {**conf, "prevResult": result}
        answer = lab.cni("CHECK", "ptp", with_result, netns=netns)
        assert (answer.stdout, answer.status) == ("", 0) if version in WITH_CHECK else answer.code() == 1
        valid = [{"containerID": "c1", "ifname": "eth0"}]
        for verb, more in (("GC", {"cni.dev/valid-attachments": valid}), ("STATUS", {})):
            answer = lab.cni(verb, "ptp", {**conf, **more})
            assert (answer.stdout, answer.status) == ("", 0) if version == "1.1.0" else answer.code() == 1
        assert netns.ping("10.1.0.1") > 0
        answer = lab.cni("DEL", "ptp", with_result if version in WITH_CHECK else conf, netns=netns)
        answer.ok()
        assert answer.stdout == ""
        assert set(netns.links()) == {"lo"}
        lab.cni("DEL", "ptp", conf, netns=netns).ok()
    host.assert_clean(before)


def test_as_a_process(lab: Lab) -> None:
    with lab.space() as netns:
        conf = conf_of("1.0.0")
        assert lab.host.cni("VERSION", "ptp", b"").json == {
            "cniVersion": "1.1.0",
            "supportedVersions": list(SUPPORTED),
        }
        result = lab.host.cni("ADD", "ptp", conf, netns=netns).result()
        assert netns.ping("10.1.0.1") > 0
        lab.host.cni("CHECK", "ptp", {**conf, "prevResult": result}, netns=netns).ok()
        lab.host.cni("DEL", "ptp", conf, netns=netns).ok()


# Packets


def test_containers_reach_each_other_and_the_host(lab: Lab) -> None:
    conf = conf_of()
    with lab.attached(conf, "ptp") as one:
        with lab.attached(conf, "ptp") as two:
            for version in (4, 6)[:FAMILIES]:
                assert one.netns.ping(two.ip(version)) > 0
                assert two.netns.ping(one.ip(version)) > 0
                assert lab.host.ping(one.ip(version)) > 0
                assert lab.host.ping(two.ip(version)) > 0
            one.check()
            two.check()
        # The gateway is on each host's end: the second one's is gone, the first one's answers.
        for gateway in ["10.1.0.1", "fd00:1::1"][:FAMILIES]:
            assert one.netns.ping(gateway) > 0
        one.check()


def test_packets_leave_under_the_hosts_address(lab: Lab) -> None:
    with lab.space() as beyond:
        lab.host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", beyond.name])
        try:
            lab.host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "up0"])
            lab.host.run(["ip", "link", "set", "up0", "up"])
            beyond.run(["ip", "address", "add", "192.0.2.9/24", "dev", "eth0"])
            beyond.run(["ip", "link", "set", "eth0", "up"])
            if IPV6:
                lab.host.run(["ip", "address", "add", "2001:db8::1/64", "dev", "up0", "nodad"])
                beyond.run(["ip", "address", "add", "2001:db8::9/64", "dev", "eth0", "nodad"])
            conf = conf_of(ipMasq=True)
            with lab.attached(conf, "ptp") as one, lab.attached(conf, "ptp") as two, Capture(beyond) as seen:
                assert one.netns.ping("192.0.2.9") > 0
                wait_until(lambda: seen.has(bytes([192, 0, 2, 1, 192, 0, 2, 9])), "a packet from the host's address")
                if IPV6:
                    assert one.netns.ping("2001:db8::9") > 0
                own = bytes(int(part) for part in one.ip().split("."))
                assert not seen.has(own)
                with Capture(two.netns) as within:
                    assert one.netns.ping(two.ip()) > 0
                    wait_until(lambda: within.has(own), "the container's own address")
            with lab.attached(conf_of(), "ptp") as plain:
                assert unreachable(plain.netns, "192.0.2.9")
        finally:
            lab.host.run(["ip", "link", "delete", "up0"])


# Addresses and routes


def test_the_link_goes_down_and_up(lab: Lab) -> None:
    with lab.attached(conf_of(ipam=pool()), "ptp") as one:
        before = routes_over(one.netns, "eth0")
        one.netns.run(["ip", "link", "set", "eth0", "down"])
        assert "is down" in one.broken()
        one.netns.run(["ip", "link", "set", "eth0", "up"])
        # What the kernel dropped is found, and it made no route to a network that is not on this link.
        assert set(routes_over(one.netns, "eth0")) <= set(before)
        assert "is gone" in one.broken()


@pytest.mark.parametrize(
    ("address", "gateway"),
    [
        ("10.7.0.5/32", "169.254.1.1"),
        ("10.7.0.1/31", "10.7.0.0"),
        ("10.7.0.5/24", "192.0.2.1"),
        pytest.param("fd07::5/128", "fd07::1", marks=needs_ipv6),
        pytest.param("fd07::5/128", "fe80::1", marks=needs_ipv6),
    ],
)
def test_gateways_of_all_kinds(lab: Lab, address: str, gateway: str) -> None:
    default = "::/0" if ":" in address else "0.0.0.0/0"
    lab.scripted().gives(f"{address} {gateway}", routes=[{"dst": default}])
    with lab.attached(scripted(ipMasq=True), "ptp") as one:
        assert one.netns.addresses()["eth0"] == [address]
        assert any(r[:2] == ("default", gateway) for r in routes_over(one.netns, "eth0"))
        assert lab.host.ping(address.split("/", maxsplit=1)[0]) > 0
        if not gateway.startswith("fe80"):
            assert one.netns.ping(gateway) > 0
        one.check()


def test_several_addresses_of_one_network(lab: Lab) -> None:
    lab.scripted().gives("10.7.0.5/24 10.7.0.1", "10.7.0.6/24 10.7.0.1", "10.8.0.5/24 10.8.0.1")
    with lab.attached(scripted(), "ptp") as one:
        assert lab.host.addresses()[end(one)] == ["10.7.0.1/32", "10.8.0.1/32"]
        for address in ("10.7.0.5", "10.7.0.6", "10.8.0.5"):
            assert lab.host.ping(address) > 0
        one.check()


def test_a_route_of_ipam_to_the_own_network(lab: Lab) -> None:
    lab.scripted().gives("10.7.0.5/24 10.7.0.1", routes=[{"dst": "10.7.0.0/24", "mtu": 1300}])
    with lab.attached(scripted(), "ptp") as one:
        (found,) = [r for r in one.netns.routes() if r["dst"] == "10.7.0.0/24"]
        assert (found["gateway"], found["metrics"]) == ("10.7.0.1", [{"mtu": 1300}])
        one.check()


def test_dns_is_ipams_where_the_network_has_none(lab: Lab) -> None:
    lab.scripted().gives("10.7.0.5/24 10.7.0.1", dns={"nameservers": ["192.0.2.1"]})
    with lab.attached(scripted(), "ptp") as one:
        assert one.result["dns"] == {"nameservers": ["192.0.2.1"]}
    with lab.attached(scripted(dns={"domain": "example"}), "ptp") as one:
        assert one.result["dns"] == {"domain": "example"}


# Bad input


def test_configurations_that_are_wrong(lab: Lab) -> None:
    for keys, word in (
        ({"ipam": {}}, "ipam.type"),
        ({"ipMasqBackend": "pf"}, '$.ipMasqBackend: want "nftables"'),
        ({"mtu": -1}, "mtu"),
        ({"ipMasq": "yes"}, "ipMasq"),
        ({"mtu": 20}, "$.mtu: was refused by the kernel, which takes 68 to 65535"),
        ({"mtu": 70000}, "found 70000"),
    ):
        error = refused(lab, conf_of(**keys))
        assert error["code"] == 7
        assert word in error["msg"]


def test_addresses_that_cannot_be_routed_to(lab: Lab) -> None:
    script = lab.scripted()
    for given, word in (("10.7.0.5/24", "no gateway"), ("10.7.0.5/24 10.7.0.5", "also the gateway")):
        script.gives(given)
        error = refused(lab, scripted())
        assert (error["code"], word in error["msg"], "10.7.0.5/24" in error["msg"]) == (7, True, True)
    assert script.log().count("ADD") == script.log().count("DEL") == 2
    script.gives("10.7.0.5/24 10.7.0.1")
    lab.host.run(["ip", "link", "add", "old0", "type", "veth", "peer", "name", "old1"])
    lab.host.run(["ip", "link", "set", "old0", "up"])
    lab.host.run(["ip", "route", "add", "10.7.0.5/32", "dev", "old0"])
    error = refused(lab, scripted())
    assert (error["code"], "10.7.0.5/32" in error["msg"]) == (101, True)
    lab.host.run(["ip", "link", "delete", "old0"])


def test_a_second_add_is_refused_and_harms_nothing(lab: Lab) -> None:
    with lab.attached(conf_of(ipMasq=True), "ptp") as one:
        before = lab.host.snapshot()
        assert one.call("ADD").code() == 4
        lab.host.assert_clean(before)
        one.check()


# CHECK


@pytest.mark.parametrize(
    ("where", "command", "says"),
    [
        ("host", "ip route delete {ip}/32 dev {end}", "the route to {ip}/32 on {end} is gone"),
        ("host", "ip address delete 10.1.0.1/32 dev {end}", "{end} lacks the gateway address 10.1.0.1/32"),
        ("host", "ip link set {end} down", "{end} is down"),
        ("host", "ip link delete {end}", "eth0 is gone"),
        ("host", "nft flush set inet netloom masq4", "masq4"),
        ("inside", "ip route delete 10.1.0.0/16", "the route to 10.1.0.0/16 via 10.1.0.1 on eth0 is gone"),
        ("inside", "ip route delete 10.1.0.1 dev eth0", "the route to 10.1.0.1/32 on eth0 is gone"),
        ("inside", "ip route delete default", "the route to 0.0.0.0/0 via 10.1.0.1"),
        ("inside", "ip address delete {ip}/16 dev eth0", "lacks the address {ip}/16"),
        ("inside", "ip link set eth0 address 02:00:00:00:00:09", "has the MAC 02:00:00:00:00:09"),
    ],
)
def test_check_finds(lab: Lab, where: str, command: str, says: str) -> None:
    if command.startswith("nft") and lab.host.run(["sh", "-c", "command -v nft"], check=False).returncode:
        pytest.skip("no nft program")
    with lab.attached(conf_of(ipMasq=True, ipam=pool(routes=[{"dst": "0.0.0.0/0"}])), "ptp") as one:
        one.check()
        known = {"ip": one.ip(), "end": end(one)}
        (lab.host if where == "host" else one.netns).run(command.format(**known).split())
        assert says.format(**known) in one.broken()


def test_check_without_a_result(lab: Lab) -> None:
    with lab.attached(conf_of(), "ptp") as one:
        answer = lab.cni("CHECK", "ptp", one.conf, netns=one.netns, container_id=one.container_id)
        assert (answer.code(), answer.json["msg"]) == (7, "required prevResult missing")


# DEL, GC and STATUS


def test_del_without_namespace_removes_everything(lab: Lab) -> None:
    conf = conf_of(ipMasq=True)
    for how in ("no netns", "path gone", "namespace alive"):
        before = lab.host.snapshot()
        netns = lab.host.netns()
        result = lab.cni("ADD", "ptp", conf, netns=netns).result()
        if how == "path gone":
            netns.delete()
        lab.cni("DEL", "ptp", {**conf, "prevResult": result}, netns="" if how != "path gone" else netns).ok()
        if how != "path gone":
            assert set(netns.links()) == {"lo"}
            netns.delete()
        lab.host.assert_clean(before)
        lab.cni("DEL", "ptp", conf, netns="").ok()


def test_gc_removes_the_dead_and_spares_the_living(lab: Lab) -> None:
    conf = conf_of(ipMasq=True)
    with lab.attached(conf, "ptp") as living:
        before = lab.host.snapshot()
        dead = lab.host.netns()
        lab.cni("ADD", "ptp", conf, netns=dead, container_id="dead").ok()
        dead.delete()
        other = lab.cni("GC", "ptp", {**conf, "name": "other", "cni.dev/valid-attachments": []})
        other.ok()
        assert len(elements(lab.host, "masq4")) == 2
        answer = lab.cni("GC", "ptp", {**conf, "cni.dev/valid-attachments": []})
        answer.ok()
        assert living.container_id in answer.stderr
        lab.host.assert_clean(before)
        living.check()


def test_status_is_ipams(lab: Lab) -> None:
    script = lab.scripted()
    lab.cni("STATUS", "ptp", scripted()).ok()
    script.does("STATUS", "exit 1", {"code": 50, "msg": "no addresses"})
    answer = lab.cni("STATUS", "ptp", scripted())
    assert (answer.code(), answer.json["msg"]) == (50, "no addresses")


# Faults


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, when: str) -> None:
    conf = conf_of(ipMasq=True, mtu=1400)
    with lab.space() as netns:
        for _ in range(2):  # the second one makes nothing that all share
            called = lab.cni("ADD", "ptp", conf, netns=netns).calls
            lab.cni("DEL", "ptp", conf, netns=netns).ok()
        assert len(called) > 20
        before = lab.host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 else "signal"
            if kind == "signal" and label == "allocate":
                kind = "error"
            answer = lab.cni("ADD", "ptp", conf, netns=netns, faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            if when == "after" and label in ("allocate", "read the namespace's cookie"):
                # Before we know of the answer nobody but the runtime can give the address back.
                lab.cni("DEL", "ptp", conf, netns=netns).ok()
            try:
                lab.host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
            assert set(netns.links()) == {"lo"}, label
        lab.cni("ADD", "ptp", conf, netns=netns).ok()
        assert netns.ping("10.1.0.1") > 0
        lab.cni("DEL", "ptp", conf, netns=netns).ok()


# Beside the reference


@reference.needs_reference
@pytest.mark.parametrize(
    ("version", "addresses", "routes", "keys"),
    [
        ("0.3.1", ["10.7.0.5/24 10.7.0.1"], [{"dst": "0.0.0.0/0"}], {}),
        ("0.2.0", ["10.7.0.5/24 10.7.0.1"], [{"dst": "0.0.0.0/0"}, {"dst": "192.0.2.0/24", "gw": "10.7.0.1"}], {}),
        ("1.0.0", ["10.7.0.5/24 10.7.0.1"], [], {"mtu": 1380, "dns": {"nameservers": ["192.0.2.1"]}}),
        pytest.param(
            "0.4.0",
            ["10.7.0.5/24 10.7.0.1", "fd07::5/64 fd07::1"],
            [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            {},
            marks=needs_ipv6,
        ),
    ],
)
def test_as_the_reference_does_it(
    lab: Lab, version: str, addresses: list[str], routes: list[dict[str, str]], keys: dict[str, Any]
) -> None:
    conf = scripted(version=version, **keys)
    if version == "0.2.0":
        answer = {"ip4": {"ip": addresses[0].split()[0], "gateway": "10.7.0.1", "routes": routes}}
        lab.scripted().does("ADD", answer={"cniVersion": version, **answer})
    else:
        lab.scripted().gives(*addresses, version=version, routes=routes)
        if version != "1.0.0":
            ips = [dict(zip(("address", "gateway"), one.split(), strict=True)) for one in addresses]
            for one in ips:
                one["version"] = "6" if ":" in one["address"] else "4"
            lab.scripted().does("ADD", answer={"cniVersion": version, "ips": ips, "routes": routes})
    found = []
    for ours in (True, False):
        with lab.space() as netns:
            result = (
                lab.cni("ADD", "ptp", conf, netns=netns).result() if ours else reference.call(lab, "ADD", conf, netns)
            )
            (port,) = [name for name in lab.host.links() if name.startswith("veth")]
            # The reference lets the kernel look for duplicates of the gateway, too.
            wait_until(partial(reference.settled, lab.host, port), "the end of detection")
            states = reference.state(netns, "eth0"), reference.state(lab.host, port)
            found.append((reference.comparable(result, netns), *states))
            # Each removes what it made; what the reference made, ours removes too.
            lab.cni("DEL", "ptp", conf, netns=netns).ok()
            assert set(netns.links()) == {"lo"}
    (ours, *our_states), (theirs, *their_states) = found
    assert ours == theirs
    assert [reference.difference(*pair) for pair in zip(our_states, their_states, strict=True)] == [[], []]


def test_a_container_of_the_reference_is_removed_with_its_namespace_only(lab: Lab) -> None:
    """Without a record and a namespace nothing is known, and that is no error."""
    lab.cni("DEL", "ptp", conf_of(), netns="/run/netns/nothing", container_id="unknown").ok()


def test_two_networks_and_interfaces_of_one_container(lab: Lab) -> None:
    second = conf_of(name="two", ipam=pool("10.2.0.0/24"))
    with lab.attached(conf_of(ipam=pool(FOUR)), "ptp") as one:
        result = lab.cni("ADD", "ptp", second, netns=one.netns, container_id=one.container_id, ifname="net1").result()
        one.check()
        assert lab.host.ping(result["ips"][0]["address"].split("/")[0]) > 0
        lab.cni("DEL", "ptp", second, netns=one.netns, container_id=one.container_id, ifname="net1").ok()
        one.check()


@needs_ipv6
def test_ipv6_alone(lab: Lab) -> None:
    with lab.attached(conf_of(ipam=pool(SIX)), "ptp") as one, lab.attached(conf_of(ipam=pool(SIX)), "ptp") as two:
        assert one.netns.ping(two.ip(6)) > 0
        one.check()
