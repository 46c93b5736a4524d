"""loopback: each verb in each spec version, in a real host."""

from __future__ import annotations

from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.lab import WITH_CHECK, Lab, net
from tests.hosts import IPV6

pytestmark = pytest.mark.kernel


def conf(version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
    return {**net(version, name="cbr0", **keys), "type": "loopback"}


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    with lab.space() as netns:
        before = lab.host.snapshot()
        result = lab.cni("ADD", "loopback", conf(version), netns=netns, ifname="lo").result()
        assert result["cniVersion"] == version
        expected = ["127.0.0.1/8", *(["::1/128"] if IPV6 else [])]
        if version in ("0.1.0", "0.2.0"):
            assert result["ip4"] == {"ip": "127.0.0.1/8"}
            assert (result["ip6"] if IPV6 else {"ip": "::1/128"}) == {"ip": "::1/128"}
        else:
            assert result["interfaces"] == [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": netns.path}]
            # Where only the tests do without IPv6, the kernel's own address is there all the same.
            assert [ip["address"] for ip in result["ips"]][: len(expected)] == expected
            assert {ip["interface"] for ip in result["ips"]} == {0}
        assert netns.addresses()["lo"][: len(expected)] == expected
        assert netns.ping("127.0.0.1") > 0

        with_result = {**conf(version), "prevResult": result}
        checked = lab.cni("CHECK", "loopback", with_result, netns=netns, ifname="lo")
        assert (checked.status == 0) is (version in WITH_CHECK)
        for verb in ("GC", "STATUS"):
            served = lab.cni(verb, "loopback", {**conf(version), "cni.dev/valid-attachments": []})
            assert (served.status == 0) is (version == "1.1.0")
        assert netns.ping("127.0.0.1") > 0

        for _ in range(2):
            answer = lab.cni("DEL", "loopback", conf(version), netns=netns, ifname="lo")
            answer.ok()
            assert answer.stdout == ""
        assert "UP" not in netns.links()["lo"]["flags"]
        lab.host.assert_clean(before)


def test_a_previous_result_is_passed_on(lab: Lab) -> None:
    previous = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x", "mac": "02:00:00:00:00:01"}],
        "ips": [{"address": "10.1.0.2/16", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    with lab.space() as netns:
        answer = lab.cni("ADD", "loopback", conf(prevResult=previous), netns=netns)
        assert answer.result() == previous
        assert "UP" in netns.links()["lo"]["flags"]


def test_the_interfaces_name_does_not_matter(lab: Lab) -> None:
    with lab.space() as netns:
        lab.cni("ADD", "loopback", conf(), netns=netns, ifname="whatever0").ok()
        assert "UP" in netns.links()["lo"]["flags"]
        lab.cni("CHECK", "loopback", conf(), netns=netns, ifname="whatever0").ok()


def test_check_finds_it_down(lab: Lab) -> None:
    with lab.space() as netns:
        lab.cni("ADD", "loopback", conf(), netns=netns).ok()
        netns.run(["ip", "link", "set", "lo", "down"])
        answer = lab.cni("CHECK", "loopback", conf(), netns=netns)
        assert answer.code() == 999
        assert "down" in answer.json["msg"]


def test_an_address_that_is_no_loopback_address(lab: Lab) -> None:
    with lab.space() as netns:
        netns.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"])
        answer = lab.cni("ADD", "loopback", conf(), netns=netns)
        assert answer.code() == 999
        assert "192.0.2.1" in answer.json["msg"]
        # What this ADD did is undone.
        assert "UP" not in netns.links()["lo"]["flags"]


def test_an_add_that_fails_leaves_what_was_up_up(lab: Lab) -> None:
    with lab.space() as netns:
        netns.run(["ip", "link", "set", "lo", "up"])
        netns.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"])
        assert lab.cni("ADD", "loopback", conf(), netns=netns).code() == 999
        assert "UP" in netns.links()["lo"]["flags"]


@pytest.mark.parametrize("netns", ["", "/run/netns/nothing", "/etc/passwd", "/proc/self/ns/net"])
def test_del_without_a_namespace(lab: Lab, netns: str) -> None:
    before = lab.host.snapshot()
    lab.cni("DEL", "loopback", conf(), netns=netns).ok()
    lab.host.assert_clean(before)
    assert "UP" in lab.host.links()["lo"]["flags"]
