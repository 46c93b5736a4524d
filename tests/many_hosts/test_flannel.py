"""Flannel's files by netd: a conflist of flannel's works on two hosts, whoever says what their subnets are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest

from kernel.nft import FLANNEL_TABLE
from tests.hosts import IPV6, Host, Netns, wait_until
from tests.many_hosts.fleet import CONFIG, Container, Fleet, Netd
from tests.many_hosts.pods import Pods, outside_of

pytestmark = pytest.mark.kernel

SUBNET_FILE, DOCKER_FILE = "/run/flannel/subnet.env", "/run/flannel/docker"
CONF: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "cbr0",
    "type": "flannel",
    "delegate": {"bridge": "cni0", "hairpinMode": True, "isDefaultGateway": True},
}
# Answers each datagram with the address that it came from.
MIRROR = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.bind((sys.argv[1], 7000))
    print("ready", flush=True)
    while True:
        _, sender = one.recvfrom(10)
        one.sendto(sender[0].encode(), sender)
"""
ASK = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.settimeout(5)
    for attempt in range(10):
        one.sendto(b"who", (sys.argv[1], 7000))
        try:
            print(one.recv(100).decode())
            break
        except TimeoutError:
            pass
"""


class Static(Fleet):
    """Two hosts that know each other and the network from their configuration alone."""

    def configure(self, host: Host, **netd_keys: object) -> None:
        super().configure(host, **{"flannel_network": "pods", **netd_keys})
        subnets = ["10.2.0.0/16", *(["fd02::/16"] if self.ipv6_containers else [])]
        path = host.path(CONFIG)
        path.write_text(f'{path.read_text()}\n[[network]]\nname = "pods"\nsubnets = {subnets}\n')


class Shared(Pods):
    """Hosts whose blocks are ipamd's."""

    def configure(self, host: Host, **netd_keys: object) -> None:
        super().configure(host, **{"flannel_network": "pods", **netd_keys})


def content(host: Host, path: str = SUBNET_FILE) -> dict[str, str]:
    """A file of variables."""
    file = host.path(path)
    return dict(line.split("=", 1) for line in file.read_text().splitlines()) if file.exists() else {}


def until_written(netd: Netd) -> None:
    def there() -> bool:
        return bool(content(netd.host, DOCKER_FILE))

    wait_until(there, "flannel's files", lambda: netd.log()[-2000:])


def attach(host: Host, name: str) -> Container:
    """A container by the plugin flannel."""
    netns = host.netns(name)
    result = host.cni("ADD", "flannel", CONF, container_id=name, netns=netns).result()
    addresses = [str(ip["address"]).partition("/")[0] for ip in result["ips"]]
    four, six = ([a for a in addresses if (":" in a) is wanted] for wanted in (False, True))
    return Container(netns, name, "".join(four), "".join(six))


def detach(host: Host, one: Container) -> None:
    host.cni("DEL", "flannel", CONF, container_id=one.id, netns=one.netns).ok()
    one.netns.delete()


def seen_source(asker: Netns, where: Netns, address: str) -> str:
    """The source that a program at the address sees, when the asker speaks to it."""
    mirror = where.popen([sys.executable, "-I", "-c", MIRROR, address], stdout=-1)
    try:
        assert mirror.stdout is not None
        assert mirror.stdout.readline() == "ready\n"
        return asker.run([sys.executable, "-I", "-c", ASK, address]).stdout.strip()
    finally:
        mirror.kill()
        mirror.wait()


@pytest.fixture(scope="module")
def pods() -> Iterator[Shared]:
    with Shared(segments=(0, 0)) as made:
        made.start()
        six = ["--subnet", "fd02::/48", "--block6", "120"] if IPV6 else []
        made.netloom(1, "network", "create", "pods", "--subnet", "10.2.0.0/16", "--block", "24", *six)
        made.until_known("pods")
        for netd in made.netds:
            until_written(netd)
        yield made


def test_the_files_tell_this_hosts_block(pods: Shared) -> None:
    seen = set()
    for number, host in enumerate(pods.hosts, 1):
        found = content(host)
        gateway = ip_interface(found["FLANNEL_SUBNET"])
        assert gateway.network.prefixlen == 24
        assert gateway.ip == gateway.network[1]
        wait_until(lambda: str(gateway.network) in pods.fabric(number)["pods"]["own"], "it to be routed")  # noqa: B023
        assert (found["FLANNEL_NETWORK"], found["FLANNEL_MTU"], found["FLANNEL_IPMASQ"]) == (
            "10.2.0.0/16",
            "1450",
            "true",
        )
        if IPV6:
            assert found["FLANNEL_IPV6_NETWORK"] == "fd02::/48"
            six = ip_interface(found["FLANNEL_IPV6_SUBNET"])
            assert (six.network.prefixlen, six.ip) == (120, six.network[1])
        assert content(host, DOCKER_FILE) == {
            "DOCKER_OPT_BIP": f'"--bip={gateway}"',
            "DOCKER_OPT_IPMASQ": '"--ip-masq=false"',
            "DOCKER_OPT_MTU": '"--mtu=1450"',
            "DOCKER_OPTS": f'" --bip={gateway} --ip-masq=false --mtu=1450"',
        }
        assert {host.path(path).stat().st_mode & 0o777 for path in (SUBNET_FILE, DOCKER_FILE)} == {0o644}
        seen.add(gateway)
    assert len(seen) == 2


def test_nobody_takes_the_held_address_for_a_leak(pods: Shared) -> None:
    done = pods.netloom(1, "ip", "list", "--json")
    (held,) = [one for one in json.loads(done.stdout)["allocations"] if one["client"] == "netd"]
    assert (held["container_id"], held["network"]) == ("subnet", "pods")
    checked = pods.try_netloom(1, "ip", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    collected = pods.try_netloom(1, "gc")
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert json.loads(pods.netloom(1, "ip", "list", "--json").stdout) == json.loads(done.stdout)


def test_containers_of_flannels_conflist_reach_one_another_and_beyond(pods: Shared) -> None:
    one, two = attach(pods.host(1), "f1"), attach(pods.host(2), "f2")
    pods.all_reach_all([one, two])
    assert one.netns.links()["eth0"]["mtu"] == 1450
    assert seen_source(one.netns, two.netns, two.ipv4) == one.ipv4, "between hosts the source is the container's"
    if IPV6:
        assert seen_source(one.netns, two.netns, two.ipv6) == one.ipv6
    beyond = outside_of(pods)
    assert seen_source(one.netns, beyond, "192.168.77.99") == "192.168.77.11", "who is outside sees the host"
    # As on a host with Docker.
    pods.host(2).run(["iptables", "-P", "FORWARD", "DROP"])
    wait_until(lambda: _passes(one, two), "packets between containers")
    two.ping(one.ipv4)
    detach(pods.host(1), one)
    detach(pods.host(2), two)
    pods.host(2).run(["iptables", "-P", "FORWARD", "ACCEPT"])


def _passes(one: Container, two: Container) -> bool:
    try:
        one.ping(two.ipv4, 1)
    except AssertionError:
        return False
    return True


def test_what_is_gone_comes_back_and_a_start_changes_nothing(pods: Shared) -> None:
    netd, host = pods.netd(1), pods.host(1)
    before = host.path(SUBNET_FILE).read_text()
    netd.kill()
    host.path(SUBNET_FILE).unlink()
    host.run(["nft", "delete", "table", "inet", FLANNEL_TABLE])
    netd.start()
    wait_until(lambda: host.path(SUBNET_FILE).exists(), "subnet.env", netd.log)
    assert host.path(SUBNET_FILE).read_text() == before
    host.path(SUBNET_FILE).unlink()
    host.run(["nft", "flush", "ruleset"])
    wait_until(lambda: host.path(SUBNET_FILE).exists(), "subnet.env", netd.log)
    wait_until(lambda: FLANNEL_TABLE in host.run(["nft", "list", "tables"]).stdout, "the table", netd.log)
    stamp = host.path(SUBNET_FILE).stat().st_mtime_ns
    netd.kill()
    netd.start()
    until_written(netd)
    assert host.path(SUBNET_FILE).stat().st_mtime_ns == stamp, "what is right is not written"


def test_what_cannot_be_told_is_a_problem_and_no_key_no_rules(pods: Shared) -> None:
    netd, host = pods.netd(2), pods.host(2)
    before = host.path(SUBNET_FILE).read_text()
    path = host.path(CONFIG)
    text = path.read_text()
    path.write_text(text.replace('flannel_network = "pods"', 'flannel_network = "other"'))
    netd.reload()
    wait_until(lambda: list(netd.status().problems), "a problem", netd.log)
    (problem,) = netd.status().problems
    assert "flannel_network other: this host knows no network of that name" in problem
    assert problem.endswith("Known: pods")
    assert host.path(SUBNET_FILE).read_text() == before, "what was told stays"
    path.write_text(text.replace('flannel_network = "pods"\n', ""))
    netd.reload()
    wait_until(lambda: FLANNEL_TABLE not in host.run(["nft", "list", "tables"]).stdout, "no table", netd.log)
    path.write_text(text)
    netd.reload()
    wait_until(lambda: FLANNEL_TABLE in host.run(["nft", "list", "tables"]).stdout, "the table", netd.log)
    assert list(netd.status().problems) == []


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_an_ipv6_subnet_of_flannels_size(pods: Shared) -> None:
    """Larger than a block can be: the configuration says it, and IPv4 is a block as before."""
    netd, host = pods.netd(2), pods.host(2)
    before, path = content(host), host.path(CONFIG)
    text = path.read_text()
    path.write_text(text.replace('flannel_network = "pods"', 'flannel_network = "pods"\nsubnets = ["fd02:0:0:7::/64"]'))
    try:
        netd.reload()
        wanted = {**before, "FLANNEL_IPV6_SUBNET": "fd02:0:0:7::1/64"}
        wait_until(lambda: content(host) == wanted, "subnet.env", lambda: str(content(host)))
        one, two = attach(pods.host(1), "f1"), attach(host, "f2")
        assert ip_network("fd02:0:0:7::/64")[2] == ip_interface(two.ipv6).ip
        wait_until(lambda: pods.knows_way(1, "fd02:0:0:7:8000::1"), "the way to all of it")
        pods.all_reach_all([one, two])
        detach(pods.host(1), one)
        detach(host, two)
    finally:
        path.write_text(text)
        netd.reload()
    wait_until(lambda: content(host) == before, "subnet.env as before")


def test_subnets_of_the_configuration_without_ipamd() -> None:
    with Static("host-gw", segments=(0, 0), ipv6_containers=False, netd={"flannel_masquerade": False}) as fleet:
        fleet.start()
        for netd in fleet.netds:
            until_written(netd)
        assert content(fleet.host(2)) == {
            "FLANNEL_NETWORK": "10.2.0.0/16",
            "FLANNEL_SUBNET": "10.2.2.1/24",
            "FLANNEL_MTU": "1500",
            "FLANNEL_IPMASQ": "false",
        }
        assert content(fleet.host(2), DOCKER_FILE)["DOCKER_OPT_IPMASQ"] == '"--ip-masq=true"'
        one, two = attach(fleet.host(1), "f1"), attach(fleet.host(2), "f2")
        assert ip_network("10.2.1.0/24")[2] == ip_interface(one.ipv4).ip
        fleet.all_reach_all([one, two])
        fleet.netd(1).stop()
        fleet.host(1).run([sys.executable, "-m", "netd", "--remove", "--config", CONFIG])
        assert FLANNEL_TABLE not in fleet.host(1).run(["nft", "list", "tables"]).stdout
