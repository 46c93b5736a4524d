"""bridge: each verb in each spec version, each key, in a real host: what is printed, what the kernel has, what a packet
does, and that DEL puts everything back."""

from __future__ import annotations

import json
from ipaddress import ip_interface
from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.lab import (
    FOUR,
    SIX,
    WITH_CHECK,
    Capture,
    Lab,
    both,
    elements,
    ethernet,
    mac_bytes,
    net,
    pool,
    send,
    unreachable,
)
from tests.hosts import IPV6, Host, Netns, wait_until

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")


def sysctl(where: Host | Netns, name: str) -> str:
    return where.run(["cat", f"/proc/sys/net/{name}"]).stdout.strip()


def bridge_data(lab: Lab, port: str) -> dict[str, Any]:
    data: dict[str, Any] = lab.host.links()[port]["linkinfo"]["info_slave_data"]
    return data


def refused(lab: Lab, conf: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An ADD that must fail, and leave nothing; its error object."""
    netns = lab.host.netns()
    before = lab.host.snapshot()
    answer = lab.cni("ADD", "bridge", conf, netns=netns, **more)
    if answer.status == 0:
        lab.cni("DEL", "bridge", conf, netns=netns, **more)
        netns.delete()
    assert answer.code() > 0
    lab.host.assert_clean(before, keep=lab.bridges())
    assert set(netns.links()) == {"lo"}
    netns.delete()
    error: dict[str, Any] = answer.json
    return error


# Each verb in each version


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    host, netns = lab.host, lab.host.netns()
    conf = net(
        version,
        isDefaultGateway=True,
        ipMasq=True,
        macspoofchk=True,
        hairpinMode=True,
        mtu=1400,
        dns={"nameservers": ["192.0.2.53"], "search": ["example"]},
        ipam=both(),
    )
    before = host.snapshot()
    result = lab.cni("ADD", "bridge", conf, netns=netns).result()

    # What is printed.
    assert result["cniVersion"] == version
    dns = {"nameservers": ["192.0.2.53"], "search": ["example"]}
    assert result["dns"] == dns
    links, inside = host.links(), netns.links()
    (port,) = [name for name, one in links.items() if one.get("master") == "br0"]
    assert port.startswith("veth")
    if version in ("0.1.0", "0.2.0"):
        assert set(result) == {"cniVersion", "ip4", "dns"} | ({"ip6"} if IPV6 else set())
        four = result["ip4"]
        assert four == {"ip": four["ip"], "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]}
        addresses = [four["ip"], *([result["ip6"]["ip"]] if IPV6 else [])]
    else:
        assert [(one["name"], one.get("sandbox", "")) for one in result["interfaces"]] == [
            ("br0", ""),
            (port, ""),
            ("eth0", netns.path),
        ]
        for one in result["interfaces"]:
            assert one["mac"] == (inside if one.get("sandbox") else links)[one["name"]]["address"]
        assert [one["interface"] for one in result["ips"]] == [2] * len(result["ips"])
        if version in ("1.0.0", "1.1.0"):
            assert all("version" not in one for one in result["ips"])
        else:
            assert [one["version"] for one in result["ips"]] == ["4", "6"][: len(result["ips"])]
        assert [one["gateway"] for one in result["ips"]] == ["10.1.0.1", "fd00:1::1"][: len(result["ips"])]
        expected = [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}, {"dst": "::/0", "gw": "fd00:1::1"}]
        assert result["routes"] == expected[: len(result["ips"])]
        addresses = [one["address"] for one in result["ips"]]

    # What the kernel has.
    assert netns.addresses()["eth0"] == addresses
    assert host.addresses()["br0"] == ["10.1.0.1/16", "fd00:1::1/64"][: len(addresses)]
    defaults = [(one["gateway"], one["dev"]) for one in netns.routes() if one["dst"] == "default"]
    assert defaults == [("10.1.0.1", "eth0"), ("fd00:1::1", "eth0")][: len(addresses)]
    assert (inside["eth0"]["mtu"], links[port]["mtu"], links["br0"]["mtu"]) == (1400, 1400, 1400)
    assert "UP" in inside["eth0"]["flags"]
    assert bridge_data(lab, port)["hairpin"] is True
    assert bridge_data(lab, port)["isolated"] is False
    assert sysctl(host, "ipv4/ip_forward") == "1"
    if IPV6:
        assert sysctl(host, "ipv6/conf/all/forwarding") == "1"
        assert sysctl(host, f"ipv6/conf/{port}/accept_ra") == "0"
        assert sysctl(host, "ipv6/conf/br0/accept_ra") == "0"
        assert sysctl(netns, "ipv6/conf/eth0/accept_dad") == "0"
    assert sysctl(netns, "ipv4/conf/eth0/arp_notify") == "1"
    bare = [str(ip_interface(address).ip) for address in addresses]
    assert elements(host, "masq4") + elements(host, "masq6") == bare
    assert len(elements(host, "nomasq4")) == 1
    assert elements(host, "guarded") == [port]
    assert elements(host, "allowed") == [{"concat": [port, inside["eth0"]["address"]]}]
    for gateway in ["10.1.0.1", "fd00:1::1"][: len(addresses)]:
        assert netns.ping(gateway) > 0

    # The other verbs.
    with_result = {**conf, "prevResult": result}
    if version in WITH_CHECK:
        assert lab.cni("CHECK", "bridge", with_result, netns=netns).stdout == ""
        lab.cni("CHECK", "bridge", with_result, netns=netns).ok()
    else:
        assert lab.cni("CHECK", "bridge", with_result, netns=netns).code() == 1
    for verb, more in (
        ("GC", {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}),
        ("STATUS", {}),
    ):
        answer = lab.cni(verb, "bridge", {**conf, **more})
        if version == "1.1.0":
            answer.ok()
            assert answer.stdout == ""
        else:
            assert answer.code() == 1
    assert netns.ping("10.1.0.1") > 0
    answer = lab.cni("DEL", "bridge", with_result if version in WITH_CHECK else conf, netns=netns)
    answer.ok()
    assert answer.stdout == ""
    assert set(netns.links()) == {"lo"}
    host.assert_clean(before, keep=["br0"])
    lab.cni("DEL", "bridge", conf, netns=netns).ok()
    netns.delete()


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("kind", ["layer 2", "ipv4", "ipv6", "dual", "several"])
def test_shapes_of_a_result_in_every_version(lab: Lab, version: str, kind: str) -> None:
    subnets = {
        "layer 2": (),
        "ipv4": (FOUR,),
        "ipv6": (SIX,),
        "dual": (FOUR, SIX),
        "several": (FOUR, "10.2.0.0/24", SIX, "fd00:2::/64"),
    }[kind]
    if not IPV6 and kind not in ("layer 2", "ipv4"):
        pytest.skip("no IPv6 on this machine")
    conf = {**net(version, isGateway=bool(subnets), ipMasq=True), **({"ipam": pool(*subnets)} if subnets else {})}
    nested = version in ("0.1.0", "0.2.0")
    if nested and not subnets:
        # A result of that version needs an address; nothing of the attempt is left.
        error = refused(lab, conf)
        assert (error["code"], error["msg"]) == (7, "cannot convert: no valid IP addresses")
        return
    with lab.attached(conf) as one:
        present = one.netns.addresses()["eth0"]
        # The kernel lists IPv6 addresses in the opposite order.
        networks = [ip_interface(address).network for address in present]
        assert sorted(networks, key=str) == sorted([ip_interface(s).network for s in subnets], key=str)
        firsts = [next(str(n) for n in ip_interface(s).network.hosts()) for s in subnets]
        gateways = [f"{first}/{ip_interface(s).network.prefixlen}" for first, s in zip(firsts, subnets, strict=True)]
        assert sorted(lab.host.addresses()["br0"]) == sorted(gateways)
        if nested:
            reported = [one.result[key]["ip"] for key in ("ip4", "ip6") if key in one.result]
            assert set(reported) <= set(present)
        else:
            assert sorted(ip["address"] for ip in one.result.get("ips", [])) == sorted(present)
            assert len(one.result["interfaces"]) == 3
        for gateway in firsts:
            assert one.netns.ping(gateway) > 0
        if version in WITH_CHECK:
            one.check()
        assert len(elements(lab.host, "masq4")) == sum(":" not in subnet for subnet in subnets)
        assert len(elements(lab.host, "masq6")) == sum(":" in subnet for subnet in subnets)


def test_the_version_of_a_process_without_configuration(lab: Lab) -> None:
    answer = lab.host.cni("VERSION", "bridge", b"")
    assert answer.json == {"cniVersion": "1.1.0", "supportedVersions": list(SUPPORTED)}


# Two containers


def test_two_containers_reach_each_other(lab: Lab) -> None:
    conf = net(isGateway=True, ipam=both())
    with lab.attached(conf) as one, lab.attached(conf) as two:
        assert one.netns.ping(two.ip()) > 0
        assert two.netns.ping(one.ip()) > 0
        if IPV6:
            assert one.netns.ping(two.ip(6)) > 0


def test_the_bridges_mac_stays(lab: Lab) -> None:
    conf = net(isGateway=True, ipam=pool())
    with lab.attached(conf) as one:
        mac = lab.host.links()["br0"]["address"]
        assert one.result["interfaces"][0]["mac"] == mac
        for _ in range(3):
            with lab.attached(conf) as two, lab.attached(conf):
                assert lab.host.links()["br0"]["address"] == mac
                assert two.result["interfaces"][0]["mac"] == mac
        one.check()
    assert lab.host.links()["br0"]["address"] == mac


def test_isolated_ports_reach_the_gateway_only(lab: Lab) -> None:
    conf = net(isGateway=True, portIsolation=True, ipam=pool())
    with lab.attached(conf) as one, lab.attached(conf) as two, lab.attached(net(ipam=pool(), isGateway=True)) as free:
        assert bridge_data(lab, one.port)["isolated"] is True
        assert one.netns.ping("10.1.0.1") > 0
        assert two.netns.ping("10.1.0.1") > 0
        assert one.netns.ping(free.ip()) > 0
        assert unreachable(one.netns, two.ip())


def test_a_spoofed_frame_is_dropped_and_an_honest_one_passes(lab: Lab) -> None:
    with (
        lab.attached(net(macspoofchk=True, ipam=pool())) as one,
        lab.attached(net(ipam=pool())) as two,
        Capture(two.netns) as seen,
    ):
        send(one.netns, ethernet("02:00:00:00:00:66", b"spoofed"), ethernet(one.mac, b"honest"))
        wait_until(lambda: seen.has(b"honest"), "the honest frame")
        assert not seen.has(b"spoofed")
        # Only guarded ports are looked at.
        send(two.netns, ethernet("02:00:00:00:00:66", b"unguarded"))
        with Capture(one.netns) as back:
            send(two.netns, ethernet("02:00:00:00:00:66", b"unguarded"))
            wait_until(lambda: back.has(b"unguarded"), "the frame of a port that nobody guards")


def test_a_hairpin_sends_back(lab: Lab) -> None:
    for wanted in (True, False):
        with lab.attached(net(hairpinMode=wanted, ipam=pool())) as one, Capture(one.netns) as seen:
            assert bridge_data(lab, one.port)["hairpin"] is wanted
            send(one.netns, ethernet(one.mac, b"to all"))
            if wanted:
                wait_until(lambda seen=seen: seen.has(b"to all"), "the own frame")  # type: ignore[misc]
            else:
                with lab.attached(net(ipam=pool())) as two:
                    send(two.netns, ethernet(two.mac, b"somebody else"))
                    wait_until(lambda seen=seen: seen.has(b"somebody else"), "a later frame")  # type: ignore[misc]
                assert not seen.has(b"to all")


def test_neighbours_hear_of_a_new_container(lab: Lab) -> None:
    with (
        lab.attached(net(ipam=both())) as listener,
        Capture(listener.netns) as seen,
        lab.attached(net(ipam=both())) as one,
    ):
        mac, packed = mac_bytes(one.mac), ip_interface(one.ip()).ip.packed
        # RFC 5227, announcement: sender and target address are the same; sent to all.
        arp = (b"\xff" * 6 + mac + b"\x08\x06", mac + packed + bytes(6) + packed)
        wait_until(lambda: seen.has(*arp), "gratuitous ARP", lambda: str(seen.frames()))
        if IPV6:
            # RFC 4861, 7.2.6: type 136 to all nodes, the address as target, the MAC as target link-layer option.
            head = b"\x33\x33\x00\x00\x00\x01" + mac + b"\x86\xdd"
            told = ip_interface(one.ip(6)).ip.packed + b"\x02\x01" + mac
            wait_until(lambda: seen.has(head, told), "an unsolicited advertisement", lambda: str(seen.frames()))


# Masquerade


def outside(lab: Lab) -> Netns:
    """A neighbour of the host on 192.0.2.0/24, which knows no way to the containers' networks."""
    netns = lab.host.netns()
    lab.host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", netns.name])
    for command in ("address add 192.0.2.1/24 dev up0", "link set up0 up"):
        lab.host.run(["ip", *command.split()])
    netns.run(["ip", "address", "add", "192.0.2.9/24", "dev", "eth0"])
    netns.run(["ip", "link", "set", "eth0", "up"])
    if IPV6:
        lab.host.run(["ip", "address", "add", "2001:db8::1/64", "dev", "up0", "nodad"])
        netns.run(["ip", "address", "add", "2001:db8::9/64", "dev", "eth0", "nodad"])
    return netns


@pytest.mark.parametrize("backend", ["", "nftables", "iptables"])
def test_packets_leave_under_the_hosts_address(lab: Lab, backend: str) -> None:
    beyond = outside(lab)
    keys = {"ipMasqBackend": backend} if backend else {}
    conf = net(isDefaultGateway=True, ipMasq=True, ipam=both(), **keys)
    try:
        with lab.attached(conf) as one, lab.attached(conf) as two, Capture(beyond) as seen:
            assert one.netns.ping("192.0.2.9") > 0
            wait_until(lambda: seen.has(bytes([192, 0, 2, 1, 192, 0, 2, 9])), "a packet of the host's")
            assert not seen.has(ip_interface(one.ip()).ip.packed)
            if IPV6:
                assert one.netns.ping("2001:db8::9") > 0
                assert not seen.has(ip_interface(one.ip(6)).ip.packed)
            # Within the network, and to the host, it is the container's own.
            with Capture(two.netns) as within:
                assert one.netns.ping(two.ip()) > 0
                honest = ip_interface(one.ip()).ip.packed + ip_interface(two.ip()).ip.packed
                wait_until(lambda: within.has(honest), "a packet of the container's own")
            two.check()
        # Once more for one that does not want it: its packets arrive as they are, and no answer finds back.
        with lab.attached(net(isDefaultGateway=True, ipam=pool())) as plain, Capture(beyond) as seen:
            assert unreachable(plain.netns, "192.0.2.9")
            own = ip_interface(plain.ip()).ip.packed + bytes([192, 0, 2, 9])
            wait_until(lambda: seen.has(own), "a packet with the container's address")
    finally:
        lab.host.run(["ip", "link", "delete", "up0"])
        beyond.delete()


def test_one_containers_del_leaves_the_others_masquerade(lab: Lab) -> None:
    conf = net(isDefaultGateway=True, ipMasq=True, macspoofchk=True, ipam=pool())
    other = net(name="other", isDefaultGateway=True, ipMasq=True, ipam=pool())
    with lab.attached(conf) as one:
        with lab.attached(conf) as two:
            assert set(elements(lab.host, "masq4")) == {one.ip(), two.ip()}
        assert elements(lab.host, "masq4") == [one.ip()]
        assert elements(lab.host, "guarded") == [one.port]
        one.check()
        # The network's exemption is wanted by another network too.
        netns = lab.host.netns()
        lab.cni("ADD", "bridge", {**other, "ipam": pool("10.1.0.0/16", exclude=[one.ip()])}, netns=netns).ok()
        one.call("DEL").ok()
        assert len(elements(lab.host, "nomasq4")) == 1
        lab.cni("DEL", "bridge", {**other, "ipam": pool("10.1.0.0/16")}, netns=netns).ok()
        netns.delete()
        assert elements(lab.host, "nomasq4") == []


def test_the_del_of_a_refused_add_spares_the_interface_that_was_there(lab: Lab) -> None:
    """As containerd does: an ADD that failed is followed by a DEL of the same network."""
    with lab.attached(net(isGateway=True, ipMasq=True, ipam=pool())) as one:
        second = net(name="second", ipam=pool("10.2.0.0/16"))
        refused = lab.cni("ADD", "bridge", second, container_id=one.container_id, netns=one.netns)
        assert refused.code() == 4
        lab.cni("DEL", "bridge", second, container_id=one.container_id, netns=one.netns).ok()
        one.check()


# The bridge itself


def test_somebody_elses_bridge_is_used_as_it_is(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    before = sysctl(lab.host, "ipv6/conf/br0/accept_ra") if IPV6 else ""
    conf = net(ipam=pool())
    with lab.attached(conf) as one:
        link = lab.host.links()["br0"]
        assert "ifalias" not in link
        assert one.result["interfaces"][0]["mac"] == link["address"]
        one.check()
        with lab.attached(conf) as two:
            # Without an address of its own such a bridge has the lowest MAC of its ports: nothing is broken by that.
            one.check()
            two.check()
        one.check()
        if IPV6:
            assert sysctl(lab.host, "ipv6/conf/br0/accept_ra") == before
    lab.cni("GC", "bridge", {**conf, "cni.dev/valid-attachments": []}).ok()
    assert "br0" in lab.host.links()


def test_a_gateway_pins_the_mac_of_somebody_elses_bridge(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    mac = lab.host.links()["br0"]["address"]
    conf = net(isGateway=True, ipam=pool())
    with lab.attached(conf) as one, lab.attached(conf):
        assert lab.host.links()["br0"]["address"] == mac
        assert one.result["interfaces"][0]["mac"] == mac
        one.check()


def test_a_gateway_that_is_there_already(lab: Lab) -> None:
    # As an administrator prepares it: the bridge has the gateway's address, but no MAC of its own.
    lab.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    lab.host.run(["ip", "address", "add", "10.1.0.1/16", "dev", "br0"])
    conf = net(isGateway=True, ipam=pool())
    with lab.attached(conf) as one, lab.attached(conf) as two:
        assert one.netns.ping("10.1.0.1") > 0
        assert lab.host.addresses()["br0"] == ["10.1.0.1/16"]
        one.check()
        two.check()
    lab.cni("GC", "bridge", {**conf, "cni.dev/valid-attachments": []}).ok()
    assert lab.host.addresses()["br0"] == ["10.1.0.1/16"]


def test_ours_goes_when_it_is_idle(lab: Lab) -> None:
    conf = net(isGateway=True, ipam=pool())
    with lab.attached(conf) as one:
        valid = [{"containerID": one.container_id, "ifname": "eth0"}]
        lab.cni("GC", "bridge", {**conf, "cni.dev/valid-attachments": valid}).ok()
        one.check()
        assert lab.host.links()["br0"]["ifalias"] == "made by netloom"
    assert "br0" in lab.host.links()
    lab.host.run(["ip", "link", "add", "foreign0", "type", "veth", "peer", "name", "foreign1"])
    lab.host.run(["ip", "link", "set", "foreign0", "master", "br0"])
    lab.cni("GC", "bridge", {**conf, "cni.dev/valid-attachments": []}).ok()
    assert "br0" in lab.host.links()
    lab.host.run(["ip", "link", "delete", "foreign0"])
    lab.cni("GC", "bridge", {**conf, "cni.dev/valid-attachments": []}).ok()
    assert "br0" not in lab.host.links()


def test_a_bridge_that_is_down_is_brought_up(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    with lab.attached(net(ipam=pool())):
        assert "UP" in lab.host.links()["br0"]["flags"]


@pytest.mark.parametrize("kind", ["dummy-like veth", "lo"])
def test_a_link_of_another_kind(lab: Lab, kind: str) -> None:
    name = "lo" if kind == "lo" else "other0"
    if kind != "lo":
        lab.host.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "other1"])
    error = refused(lab, net(bridge=name, ipam=pool()))
    assert error["code"] == 7
    assert "$.bridge: is a link of kind" in error["msg"]
    status = lab.cni("STATUS", "bridge", net(bridge=name, ipam=pool()))
    assert status.code() == 50
    if kind != "lo":
        lab.host.run(["ip", "link", "delete", name])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "a:b", "x" * 16, "../../etc", "eth0;reboot", "br%d", "é"]
)
def test_names_that_no_bridge_has(lab: Lab, name: str) -> None:
    error = refused(lab, net(bridge=name, ipam=pool()))
    assert error["code"] == 7
    assert "$.bridge" in error["msg"]
    assert not lab.bridges()


def test_two_keys_that_exclude_each_other(lab: Lab) -> None:
    invalid: tuple[tuple[dict[str, Any], str], ...] = (
        ({"hairpinMode": True, "promiscMode": True, "ipam": pool()}, "promiscMode"),
        ({"disableContainerInterface": True, "ipam": pool()}, "disableContainerInterface"),
        ({"ipMasqBackend": "pf", "ipam": pool()}, "ipMasqBackend"),
        ({"mtu": -1}, "mtu"),
        ({"mtu": 2**31}, "mtu"),
    )
    for keys, word in invalid:
        error = refused(lab, net(**keys))
        assert error["code"] == 7
        assert word in error["msg"]
    unsupported: tuple[tuple[dict[str, Any], str], ...] = (
        ({"vlan": 100}, "vlan: 100"),
        ({"vlanTrunk": [{"id": 101}]}, "vlanTrunk"),
    )
    for keys, word in unsupported:
        error = refused(lab, net(**keys))
        assert error["code"] == 2
        assert word in error["msg"]
    assert not lab.bridges()


def test_an_mtu_that_the_kernel_refuses(lab: Lab) -> None:
    error = refused(lab, net(mtu=20, isGateway=True, ipam=pool()))
    assert error["code"] != 0
    assert "mtu" in (error["msg"] + error.get("details", "")).lower()


def test_promiscuous_mode(lab: Lab) -> None:
    with lab.attached(net(promiscMode=True, ipam=pool())) as one:
        assert "PROMISC" in lab.host.links()["br0"]["flags"]
        one.check()
        lab.host.run(["ip", "link", "set", "br0", "promisc", "off"])
        assert "promiscuous" in one.broken()


def test_an_address_of_somebody_else_on_the_bridge(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "up", "type", "bridge"])
    lab.host.run(["ip", "address", "add", "10.77.0.1/24", "dev", "br0"])
    error = refused(lab, net(isGateway=True, ipam=pool()))
    assert error["code"] == 7
    assert "10.77.0.1/24" in error["msg"]
    assert lab.host.addresses()["br0"] == ["10.77.0.1/24"]
    with lab.attached(net(isGateway=True, forceAddress=True, ipam=both())) as one:
        assert set(lab.host.addresses()["br0"]) == {"10.1.0.1/16", *(["fd00:1::1/64"] if IPV6 else [])}
        one.check()
        # Without a gateway nobody's address matters.
        with lab.attached(net(name="plain", ipam=pool("10.3.0.0/24"))):
            assert "10.1.0.1/16" in lab.host.addresses()["br0"]


@needs_ipv6
def test_an_overlapping_ipv6_address_on_the_bridge(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "up", "type", "bridge"])
    lab.host.run(["ip", "address", "add", "fd00:1::77/48", "dev", "br0", "nodad"])
    lab.host.run(["ip", "address", "add", "fd00:ff::77/64", "dev", "br0", "nodad"])
    assert "fd00:1::77/48" in refused(lab, net(isGateway=True, ipam=pool(SIX)))["msg"]
    with lab.attached(net(isGateway=True, forceAddress=True, ipam=pool(SIX))):
        assert set(lab.host.addresses()["br0"]) == {"fd00:1::1/64", "fd00:ff::77/64"}


def test_a_second_network_on_the_same_bridge_needs_force(lab: Lab) -> None:
    with lab.attached(net(isGateway=True, ipam=pool())):
        assert refused(lab, net(name="second", isGateway=True, ipam=pool("10.5.0.0/24")))["code"] == 7


# The container's interface


@pytest.mark.parametrize(
    ("capability", "convention", "args", "expected"),
    [
        ("02:00:00:00:00:01", "02:00:00:00:00:02", "MAC=02:00:00:00:00:03", "02:00:00:00:00:01"),
        ("", "02:00:00:00:00:02", "MAC=02:00:00:00:00:03", "02:00:00:00:00:02"),
        ("", "", "MAC=02:00:00:00:00:03", "02:00:00:00:00:03"),
        ("02-00-00-00-00-0A", "", "", "02:00:00:00:00:0a"),
        ("", "", "IgnoreUnknown=1;MAC=02:00:00:00:00:03;K8S_POD_NAME=x", "02:00:00:00:00:03"),
    ],
)
def test_where_a_mac_comes_from(lab: Lab, capability: str, convention: str, args: str, expected: str) -> None:
    conf = net(ipam=pool(), macspoofchk=True)
    if capability:
        conf["runtimeConfig"] = {"Mac": capability}
    if convention:
        conf["args"] = {"cni": {"mac": convention}}
    with lab.attached(conf, args=args) as one:
        assert one.mac == expected
        assert one.netns.links()["eth0"]["address"] == expected
        assert elements(lab.host, "allowed") == [{"concat": [one.port, expected]}]
        one.check()


@pytest.mark.parametrize(
    "mac",
    ["nonsense", "01:00:00:00:00:01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "02:00:00:00:00:+1", "02:00", 5, []],
)
def test_bad_macs(lab: Lab, mac: object) -> None:
    error = refused(lab, net(ipam=pool(), runtimeConfig={"mac": mac}))
    assert error["code"] == 7
    assert "runtimeConfig.mac" in error["msg"]


def test_unknown_arguments_are_refused_unless_told_otherwise(lab: Lab) -> None:
    assert refused(lab, net(ipam=pool()), args="FOO=bar")["code"] == 4
    with lab.attached(net(ipam=pool()), args="FOO=bar;IgnoreUnknown=true") as one:
        assert one.addresses


def test_without_an_interface_of_the_containers(lab: Lab) -> None:
    with lab.attached(net(disableContainerInterface=True)) as one:
        assert "UP" not in one.netns.links()["eth0"]["flags"]
        assert one.netns.addresses()["eth0"] == []
        assert lab.host.links()[one.port]["master"] == "br0"
        assert [interface["name"] for interface in one.result["interfaces"]] == ["br0", one.port, "eth0"]
        one.check()


def test_dns_of_the_network_wins(lab: Lab) -> None:
    resolv = lab.host.path("/run/resolv.conf")
    resolv.write_text("nameserver 192.0.2.1\nsearch pool.example\n")
    ipam = pool(resolvConf="/run/resolv.conf")
    with lab.attached(net(ipam=ipam)) as one:
        assert one.result["dns"] == {"nameservers": ["192.0.2.1"], "search": ["pool.example"]}
    with lab.attached(net(ipam=ipam, dns={"nameservers": ["192.0.2.2"], "options": ["ndots:2"]})) as one:
        assert one.result["dns"] == {"nameservers": ["192.0.2.2"], "options": ["ndots:2"]}
    resolv.unlink()


def test_routes_are_really_in_the_kernel(lab: Lab) -> None:
    wishes: list[dict[str, Any]] = [
        {"dst": "0.0.0.0/0"},
        {"dst": "192.0.2.0/24", "gw": "10.1.0.9", "priority": 50, "mtu": 1300, "advmss": 1200},
        {"dst": "198.51.100.0/24", "table": 4711},
        {"dst": "203.0.113.7/32", "scope": 253},
    ]
    if IPV6:
        wishes.append({"dst": "2001:db8::/32", "priority": 60, "mtu": 1350})
    with lab.attached(net(isGateway=True, ipam={**both(), "routes": wishes})) as one:
        found = {
            r["dst"]: r
            for r in json.loads(one.netns.run(["ip", "-j", "-d", "route", "show", "table", "all"]).stdout)
            + json.loads(one.netns.run(["ip", "-6", "-j", "-d", "route", "show", "table", "all"]).stdout)
        }
        assert found["default"]["gateway"] == "10.1.0.1"
        special = found["192.0.2.0/24"]
        assert (special["gateway"], special["metric"]) == ("10.1.0.9", 50)
        assert special["metrics"] == [{"mtu": 1300, "advmss": 1200}]
        assert found["198.51.100.0/24"]["table"] == "4711"
        if IPV6:
            assert (found["2001:db8::/32"]["metric"], found["2001:db8::/32"]["gateway"]) == (60, "fd00:1::1")
        reported = {route["dst"]: route for route in one.result["routes"]}
        assert reported["192.0.2.0/24"] == wishes[1]
        one.check()


def test_a_link_scope_route(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16", routes=[{"dst": "198.51.100.0/24", "scope": 253}, {"dst": "203.0.113.0/24"}])
    with lab.attached(net(ipam={"type": "scripted"})) as one:
        found = {route["dst"]: route for route in one.netns.routes()}
        assert found["198.51.100.0/24"]["scope"] == "link"
        assert found["203.0.113.0/24"]["scope"] == "link"
        one.check()


@pytest.mark.parametrize("explicit", [False, True])
def test_a_default_route_is_not_there_twice(lab: Lab, explicit: bool) -> None:
    routes = [{"dst": "0.0.0.0/0", **({"gw": "10.1.0.1"} if explicit else {})}]
    with lab.attached(net(isDefaultGateway=True, ipam={**pool(), "routes": routes})) as one:
        assert [route["gateway"] for route in one.netns.routes() if route["dst"] == "default"] == ["10.1.0.1"]
        one.check()


@needs_ipv6
def test_two_ipv6_gateways(lab: Lab) -> None:
    with lab.attached(net(isDefaultGateway=True, ipam=pool(SIX, "fd00:2::/64"))) as one:
        one.check()
        assert one.netns.ping("fd00:2::1") > 0


def test_addresses_without_room_for_a_gateway(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.0/31")
    with lab.attached(net(isDefaultGateway=True, ipam={"type": "scripted"})) as one:
        assert lab.host.addresses()["br0"] == ["10.1.0.1/31"]
        assert one.netns.ping("10.1.0.1") > 0
        one.check()
    script.gives("10.1.0.1/16")
    assert "also the gateway" in refused(lab, net(bridge="br1", isGateway=True, ipam={"type": "scripted"}))["msg"]


@pytest.mark.parametrize("address", ["10.1.0.5/32", pytest.param("fd00::5/128", marks=needs_ipv6)])
def test_an_address_of_its_own(lab: Lab, address: str) -> None:
    script = lab.scripted()
    script.gives(address)
    with lab.attached(net(ipam={"type": "scripted"})) as one:
        assert one.netns.addresses()["eth0"] == [address]
        one.check()
    # Its gateway, the next address as in the reference, is out of reach: the kernel refuses the default route.
    refused(lab, net(isDefaultGateway=True, ipam={"type": "scripted"}))


# Duplicate address detection


@needs_ipv6
def test_a_duplicate_on_the_segment(lab: Lab) -> None:
    holder = lab.host.netns()
    with lab.attached(net(bridge="br0", isGateway=True, enabledad=True, ipam=pool(SIX))) as one:
        # The first one found nobody, and got the address only after it had looked.
        assert one.netns.addresses()["eth0"] == one.addresses
        assert sysctl(one.netns, "ipv6/conf/eth0/accept_dad") == "1"
        lab.host.run(["ip", "link", "add", "thief0", "type", "veth", "peer", "name", "eth0", "netns", holder.name])
        lab.host.run(["ip", "link", "set", "thief0", "master", "br0", "up"])
        holder.run(["ip", "address", "add", "fd00:1::99/64", "dev", "eth0", "nodad"])
        holder.run(["ip", "link", "set", "eth0", "up"])
        holder.ping("fd00:1::1")
        wanted = {**net(isGateway=True, enabledad=True, ipam=pool(SIX)), "runtimeConfig": {"ips": ["fd00:1::99"]}}
        error = refused(lab, wanted)
        assert error["code"] == 101
        assert "fd00:1::99/64" in error["msg"]
        assert len(lab.host.allocations()) == 1
        lab.host.run(["ip", "link", "delete", "thief0"])
    holder.delete()


# ADD on what is there


def test_a_second_add_is_refused_and_harms_nothing(lab: Lab) -> None:
    conf = net(isGateway=True, ipMasq=True, ipam=pool())
    with lab.attached(conf) as one:
        before = lab.host.snapshot()
        answer = one.call("ADD")
        assert answer.code() == 4
        lab.host.assert_clean(before)
        other = lab.cni("ADD", "bridge", net(name="other", ipam=pool()), netns=one.netns, container_id=one.container_id)
        assert other.code() == 4
        lab.host.assert_clean(before)
        one.check()


def test_two_interfaces_of_one_container(lab: Lab) -> None:
    first, second = (
        net(isGateway=True, ipMasq=True, ipam=pool()),
        net(name="two", bridge="br1", ipam=pool("10.2.0.0/24")),
    )
    with lab.attached(first) as one:
        answer = lab.cni("ADD", "bridge", second, netns=one.netns, container_id=one.container_id, ifname="net1")
        assert set(one.netns.links()) == {"lo", "eth0", "net1"}
        one.check()
        lab.cni(
            "DEL", "bridge", {**second, "prevResult": answer.result()}, netns=one.netns,
            container_id=one.container_id, ifname="net1",
        ).ok()  # fmt: skip
        assert set(one.netns.links()) == {"lo", "eth0"}
        one.check()


def test_the_longest_names(lab: Lab) -> None:
    conf = net(name="n" * 255, bridge="b" * 15, ipMasq=True, macspoofchk=True, ipam=pool())
    with lab.attached(conf, container_id="c" * 255, ifname="e" * 15) as one:
        one.check()
        assert one.netns.links()["e" * 15]["ifname"] == "e" * 15


def test_own_and_host_namespace_are_refused(lab: Lab) -> None:
    before = lab.host.snapshot()
    for netns in ("/proc/self/ns/net", "/proc/1/ns/mnt", "/etc/passwd", "/run/netns/nothing", "/run/netns", "relative"):
        answer = lab.host.cni("ADD", "bridge", net(ipam=pool()), netns=netns)
        assert answer.code() == 8, netns
    lab.host.assert_clean(before)
