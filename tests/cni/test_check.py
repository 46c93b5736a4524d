"""CHECK passes directly after ADD, and finds each thing that somebody broke by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cni.lab import Attached, Lab, both, net
from tests.hosts import IPV6

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")

CONF = net(
    isDefaultGateway=True,
    ipMasq=True,
    macspoofchk=True,
    hairpinMode=True,
    portIsolation=True,
    ipam={**both(), "routes": [{"dst": "192.0.2.0/24", "gw": "10.1.0.9", "mtu": 1300}]},
)


def inside(command: str) -> Callable[[Attached], None]:
    """`ip` with these arguments, in the container."""

    def run(one: Attached) -> None:
        one.netns.run(["ip", *command.format(**names(one)).split()])

    return run


def outside(command: str) -> Callable[[Attached], None]:
    """A command on the host."""

    def run(one: Attached) -> None:
        one.lab.host.run(command.format(**names(one)).split())

    return run


def set_element(table: str, element: str) -> Callable[[Attached], None]:
    """Deletes an element of a set."""

    def run(one: Attached) -> None:
        one.lab.host.run(["nft", f"delete element {table} {element.format(**names(one))}"])

    return run


def names(one: Attached) -> dict[str, str]:
    four = one.ip()
    return {"port": one.port, "four": four, "six": one.ip(6) if IPV6 else "", "mac": one.mac}


BREAKS = [
    pytest.param(inside("address delete {four}/16 dev eth0"), "lacks the address", id="address"),
    pytest.param(inside("address delete {six}/64 dev eth0"), "lacks the address", id="ipv6", marks=needs_ipv6),
    pytest.param(inside("route delete default"), "route to 0.0.0.0/0", id="default route"),
    pytest.param(inside("-6 route delete default"), "route to ::/0", id="ipv6 route", marks=needs_ipv6),
    pytest.param(inside("route delete 192.0.2.0/24"), "route to 192.0.2.0/24", id="route"),
    pytest.param(
        inside("route replace 192.0.2.0/24 via 10.1.0.9 mtu 1200"), "route to 192.0.2.0/24", id="mtu of a route"
    ),
    pytest.param(inside("link set eth0 down"), "is down", id="link down"),
    pytest.param(inside("link set eth0 address 02:00:00:00:00:99"), "MAC", id="mac"),
    pytest.param(inside("link delete eth0"), "is gone", id="interface"),
    pytest.param(inside("link set eth0 name eth9"), "is gone", id="name"),
    pytest.param(outside("ip link set {port} nomaster"), "no port on bridge", id="port removed"),
    pytest.param(outside("ip link set {port} down"), "is down", id="port down"),
    pytest.param(outside("ip link delete br0"), "is gone", id="bridge gone"),
    pytest.param(outside("ip link set br0 down"), "is down", id="bridge down"),
    pytest.param(outside("ip link set br0 address 02:00:00:00:00:98"), "MAC", id="bridge mac"),
    pytest.param(outside("ip address delete 10.1.0.1/16 dev br0"), "gateway address", id="gateway address"),
    pytest.param(outside("ip link set {port} type bridge_slave hairpin off"), "hairpin", id="hairpin"),
    pytest.param(outside("ip link set {port} type bridge_slave isolated off"), "isolation", id="isolation"),
    pytest.param(set_element("inet netloom masq4", "{{ {four} }}"), "masq4", id="masquerade"),
    pytest.param(set_element("inet netloom masq6", "{{ {six} }}"), "masq6", id="masquerade v6", marks=needs_ipv6),
    pytest.param(set_element("inet netloom nomasq4", "{{ 10.1.0.0/16 . 10.1.0.0/16 }}"), "nomasq4", id="no masquerade"),
    pytest.param(set_element("bridge netloom guarded", "{{ {port} }}"), "guarded", id="guard"),
    pytest.param(set_element("bridge netloom allowed", "{{ {port} . {mac} }}"), "allowed", id="spoof check"),
    pytest.param(outside("nft delete table inet netloom"), "lacks", id="table gone"),
    pytest.param(outside("nft flush ruleset"), "lacks", id="flushed"),
]


@pytest.mark.parametrize(("breaking", "words"), BREAKS)
def test_what_was_broken_is_found(lab: Lab, breaking: Callable[[Attached], None], words: str) -> None:
    with lab.attached(CONF) as one, lab.attached({**CONF, "portIsolation": False}) as other:
        one.check()
        other.check()
        breaking(one)
        assert words in one.broken()
        if words in ("masq4", "masq6", "guarded", "allowed", "is gone from the container"):
            other.check()
    if words == "lacks":
        lab.warm_up()  # the tables are there for all tests of this module


def test_ipamds_allocation_released_behind_its_back(lab: Lab) -> None:
    with lab.attached(CONF) as one:
        assert lab.cni("DEL", "ipamd", CONF, netns=one.netns, container_id=one.container_id).status == 0
        assert "ipamd" in one.broken()


def test_a_result_of_another_attachment(lab: Lab) -> None:
    with lab.attached(CONF) as one, lab.attached(CONF) as two:
        answer = one.lab.cni(
            "CHECK", "bridge", {**CONF, "prevResult": two.result}, netns=one.netns, container_id=one.container_id
        )
        assert answer.code() > 0
        answer = one.lab.cni("CHECK", "bridge", CONF, netns=one.netns, container_id=one.container_id)
        assert answer.code() == 7
        assert "prevResult" in answer.json["msg"]


def test_a_container_with_its_namespace_gone(lab: Lab) -> None:
    with lab.attached(CONF) as one:
        one.netns.delete()
        assert one.call("CHECK").code() == 8


def test_later_plugins_may_add_to_it(lab: Lab) -> None:
    # SPEC, CHECK: what a later plugin of the chain may have changed is no failure.
    with lab.attached(CONF) as one:
        one.netns.run(["ip", "address", "add", "192.0.2.77/32", "dev", "eth0"])
        one.netns.run(["ip", "route", "add", "198.51.100.0/24", "via", "10.1.0.9"])
        one.netns.run(["ip", "link", "set", "eth0", "mtu", "1300"])
        lab.host.run(["ip", "link", "set", one.port, "promisc", "on"])
        one.check()
        chained = dict(one.result)
        chained["interfaces"] = [*one.result["interfaces"], {"name": "bwp0"}]
        one.result = chained
        one.check()


def test_an_upper_case_mac_in_a_result_is_the_same(lab: Lab) -> None:
    with lab.attached(CONF) as one:
        one.result["interfaces"] = [{**i, "mac": i["mac"].upper()} for i in one.result["interfaces"]]
        one.check()
