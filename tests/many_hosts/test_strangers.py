"""Who is on one host and in no network of ours, and masquerades, gets into no network on another host."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_network

import pytest

from tests.cni.chained.traffic import ask, no_answer, serving, until
from tests.hosts import IPV6, PATIENCE_S, Host, HostError, Netns, wait_until
from tests.many_hosts.fleet import CONFIG, SOCKET, Container, Fleet
from tests.many_hosts.overlays import addresses, assert_reach, at_port_80, web
from tests.many_hosts.pods import Pods, outside_of

pytestmark = pytest.mark.kernel

PODS6 = ("--subnet", "fd02::/64", "--block6", "120") if IPV6 else ()
OV6 = ("--subnet", "fd20::/64") if IPV6 else ()
KINDS = {
    "vxlan": ("--subnet", "10.2.0.0/16", "--block", "24", *PODS6, "--backend", "vxlan"),
    "host-gw": ("--subnet", "10.2.0.0/16", "--block", "24", *PODS6, "--backend", "host-gw"),
    "overlay": ("--type", "overlay", "--subnet", "10.20.0.0/24", *OV6),
}

# As Docker's own bridge: somebody else's, with masquerade.
_NAT = """
table inet strangers {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.17.0.0/24 oifname != "docker0" masquerade
		ip6 saddr fd17::/64 oifname != "docker0" masquerade
	}
}
"""
# To port 9 of each argument: datagrams, and segments of no connection, which conntrack finds invalid.
_ONE_WAY = """
import socket, sys
for target in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    for kind, protocol, data in (
        (socket.SOCK_DGRAM, 17, b"x"),
        (socket.SOCK_RAW, 6, bytes([0x30, 0, 0, 9, *[0] * 8, 0x50, 0x14, 0, 0, 0, 0, 0, 0])),
    ):
        for _ in range(3):
            with socket.socket(family, kind, protocol) as one:
                one.sendto(data, (target, 9 if kind == socket.SOCK_DGRAM else 0))
"""
# Every packet that arrives for port 9 by TCP or UDP; prints (protocol, source) once the input ends.
_SNIFFER = """
import ipaddress, json, select, socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as raw:
    print("ready", flush=True)
    found = set()
    while True:
        readable = select.select([raw, sys.stdin], [], [])[0]
        if raw not in readable:
            break
        packet, where = raw.recvfrom(2048)
        if where[2] != 0 or where[0] == "lo":
            continue
        if where[1] == 0x0800:
            protocol, source, at = packet[9], packet[12:16], (packet[0] & 15) * 4
        elif where[1] == 0x86DD:
            protocol, source, at = packet[6], packet[8:24], 40
        else:
            continue
        if protocol in (6, 17) and packet[at + 2 : at + 4] == bytes([0, 9]):
            found.add((protocol, str(ipaddress.ip_address(source))))
    print(json.dumps(sorted(found)))
"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pods]:
    with Pods((4, 6) if IPV6 else (4,), (0, 0)) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def stranger(fleet: Pods) -> Netns:
    return stranger_of(fleet.host(1))


@pytest.fixture(scope="module")
def outside(fleet: Pods) -> Netns:
    return outside_of(fleet)


@pytest.fixture(params=KINDS)
def pods(fleet: Pods, request: pytest.FixtureRequest) -> Iterator[list[Container]]:
    """Of one network, two on each host; the last has a published port."""
    name = f"a-{request.param}"
    fleet.netloom(1, "network", "create", name, *KINDS[request.param])
    fleet.until_known(name)
    made = [fleet.pod(1, name), fleet.pod(2, name), fleet.pod(1, name), fleet.pod(2, name, (8080, 80))]
    if request.param != "overlay":
        fleet.until_ways(*made)
    until_guarded(fleet.host(1), "10.20.0.0/24" if request.param == "overlay" else "10.2.0.0/16")
    if request.param != "overlay":  # this host's own part of it
        block = ip_network(f"{made[0].ipv4}/24", strict=False)
        wait_until(lambda: f"0.0.0.0/0 . {block}" in guarded(fleet.host(1)), f"{block}", lambda: guarded(fleet.host(1)))
    yield made
    fleet.release_all()
    fleet.netloom(2, "network", "delete", name)


def stranger_of(host: Host) -> Netns:
    """A container on a bridge that is none of ours."""
    netns = host.netns("stranger")
    host.run(["ip", "link", "add", "docker0", "up", "type", "bridge"])
    host.run(["ip", "link", "add", "vstranger", "master", "docker0", "up", "type", "veth", "peer", "name", "eth0",
              "netns", netns.path])  # fmt: skip
    netns.run(["ip", "link", "set", "lo", "up"])
    netns.run(["ip", "link", "set", "eth0", "up"])
    for family, prefix, length in (("-4", "172.17.0.", "24"), ("-6", "fd17::", "64")):
        if family == "-4" or IPV6:
            own = ["nodad"] if family == "-6" else []
            host.run(["ip", family, "address", "add", f"{prefix}1/{length}", "dev", "docker0", *own])
            netns.run(["ip", family, "address", "add", f"{prefix}2/{length}", "dev", "eth0", *own])
            netns.run(["ip", family, "route", "add", "default", "via", f"{prefix}1"])
    host.run(["nft", "-f", "-"], input=_NAT)
    return netns


@contextlib.contextmanager
def sniffing(*where: Netns) -> Iterator[list[list[object]]]:
    """What arrives for port 9 of any of them while the block lasts; filled in at its end."""
    found: list[list[object]] = []
    with ExitStack() as stack:
        running = []
        for one in where:
            argv = [sys.executable, "-I", "-S", "-c", _SNIFFER]
            process = one.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise HostError("nothing can be seen of what arrives")
        yield found
        for process in running:
            out, _ = process.communicate("\n", timeout=PATIENCE_S)
            found += json.loads(out)


def send(where: Netns, targets: Sequence[str]) -> None:
    where.run([sys.executable, "-I", "-S", "-c", _ONE_WAY, *targets])


def assert_kept_out(stranger: Netns, pods: Sequence[Container]) -> None:
    """Nothing of it arrives, while what the first of them sends to the others does. All have servers."""
    questions = at_port_80(*pods)
    assert no_answer(stranger, *questions) == [""] * len(questions)
    friend, *others = pods
    with sniffing(*(pod.netns for pod in pods)) as arrived:
        send(stranger, addresses(*pods))
        send(friend.netns, addresses(*others))  # after it, the same ways
        assert ask(friend.netns, *at_port_80(*others)) != [""]
    assert {str(source) for _, source in arrived} == set(addresses(friend))


def guarded(host: Host) -> str:
    """The networks that strangers are kept out of, as nft shows them."""
    sets = [f"{kind}{version}" for kind in ("remote", "among", "local") for version in (4, 6)]
    return "".join(host.run(["nft", "list", "set", "inet", "netloom", one], check=False).stdout for one in sets)


def until_guarded(host: Host, network: str, *, there: bool = True) -> None:
    wait_until(
        lambda: (f"{network} . {network}" in guarded(host)) is there, f"{network}: {there}", lambda: guarded(host)
    )


def test_a_stranger_reaches_none_of_a_network_on_any_host(
    fleet: Pods, pods: list[Container], stranger: Netns, outside: Netns
) -> None:
    host = fleet.underlay_address(2, 4)
    with web(*pods), serving(outside, "outside", "tcp:80"):
        assert_kept_out(stranger, pods)
        # All else goes on: within the network, hosts to their containers, published ports, the way out.
        assert_reach(pods)
        assert ask(fleet.host(2), *at_port_80(pods[1]))[0].startswith(pods[1].id)
        assert ask(stranger, ("tcp", host, 8080)) == [f"{pods[3].id} {fleet.underlay_address(1, 4)}"]
        assert ask(pods[0].netns, ("tcp", host, 8080))[0].startswith(pods[3].id)
        out = ("tcp", fleet.underlays[0].address(99), 80)
        assert ask(stranger, out) == ask(pods[0].netns, out) == [f"outside {fleet.underlay_address(1, 4)}"]
        assert_passed_on_to_nobody(outside, fleet, pods[1])
        # Where this host has none of its containers, but its part of the network, with an address at the tunnel's end.
        fleet.release(pods[0], pods[2])
        assert_kept_out(stranger, [pods[1], pods[3]])
        assert_passed_on_to_nobody(outside, fleet, pods[1])
        assert ask(stranger, ("tcp", host, 8080)) == [f"{pods[3].id} {fleet.underlay_address(1, 4)}"]


def assert_passed_on_to_nobody(outside: Netns, fleet: Pods, pod: Container) -> None:
    """What somebody beyond routes by host1 does not arrive on host2."""
    for address in addresses(pod):
        way = ["via", fleet.underlay_address(1, 6 if ":" in address else 4)]
        outside.run(["ip", "route", "replace", address, *way])
    with sniffing(pod.netns) as arrived:
        assert set(no_answer(outside, *at_port_80(pod))) == {""}
        send(outside, addresses(pod))
    assert arrived == []
    for address in addresses(pod):
        outside.run(["ip", "route", "delete", address])


def test_it_holds_while_netd_is_away_and_comes_back_with_it(
    fleet: Pods, pods: list[Container], stranger: Netns
) -> None:
    host, netd = fleet.host(1), fleet.netd(1)
    before = guarded(host)
    with web(*pods):
        netd.kill()
        assert_kept_out(stranger, pods)
        host.run(["nft", "delete", "table", "inet", "netloom"])
        netd.start()
        wait_until(lambda: guarded(host) == before, "what was there", lambda: guarded(host) + netd.log())
        assert_kept_out(stranger, pods)
        host.run(["nft", "delete", "table", "inet", "netloom"])
        wait_until(lambda: guarded(host) == before, "what was there", lambda: guarded(host) + netd.log())
        assert_kept_out(stranger, pods)
        # By an ADD, too, while netd is away.
        netd.kill()
        host.run(["nft", "flush", "ruleset"])
        host.run(["nft", "-f", "-"], input=_NAT)
        fleet.pod(1, pods[0].id.rpartition("-")[0])
        assert guarded(host) == before
        assert_kept_out(stranger, pods)
        netd.start()
        assert guarded(host) == before


def test_networks_come_and_go(fleet: Pods, stranger: Netns) -> None:
    """Also on a host that has none of them; an open one is everybody's."""
    host = fleet.host(1)
    fleet.netloom(2, "network", "create", "shut", "--subnet", "10.4.0.0/16")
    fleet.netloom(2, "network", "create", "wide", "--subnet", "10.5.0.0/16", "--open")
    fleet.until_known("shut")
    fleet.until_known("wide")
    shut, wide, friend = fleet.pod(2, "shut"), fleet.pod(2, "wide"), fleet.pod(1, "wide")
    fleet.until_ways(shut, wide, friend)
    until_guarded(host, "10.4.0.0/16")
    assert "10.5." not in guarded(host).replace(f"0.0.0.0/0 . {'.'.join(friend.ipv4.split('.')[:3])}", "")
    with web(shut, wide):
        assert no_answer(stranger, *at_port_80(shut)) == no_answer(friend.netns, *at_port_80(shut)) == [""]
        assert ask(stranger, *at_port_80(wide))[0].startswith(wide.id)
        fleet.netloom(1, "network", "connect", "shut", "wide")
        until(friend.netns, ("tcp", shut.ipv4, 80), f"{shut.id} {friend.ipv4}")
        assert no_answer(stranger, *at_port_80(shut)) == [""]
        fleet.netloom(1, "network", "disconnect", "shut", "wide")
        until(friend.netns, ("tcp", shut.ipv4, 80), "")
    fleet.release_all()
    for network in ("shut", "wide"):
        fleet.netloom(1, "network", "delete", network)
    until_guarded(host, "10.4.0.0/16", there=False)


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_networks_of_the_configuration(backend: str) -> None:
    """Whatever plugin attaches to them: this host passes nothing on but from the network itself."""
    with Fleet(backend, segments=(0, 0), ipv6_containers=False) as fleet:
        fleet.start()
        host, netd = fleet.host(1), fleet.netd(1)
        near, far = fleet.container(1), fleet.container(2)
        stranger = stranger_of(host)
        text = host.path(CONFIG).read_text()

        def configure(more: str) -> None:
            host.path(CONFIG).write_text(f"{text}\n{more}")
            netd.reload()

        with serving(far.netns, "far", "tcp:80"), serving(near.netns, "near", "tcp:80"):
            question, here = ("tcp", far.ipv4, 80), ("tcp", near.ipv4, 80)
            assert ask(stranger, question)[0].startswith("far ")
            configure('[[network]]\nname = "pods"\nsubnets = ["10.2.0.0/16"]\n')
            until_guarded(host, "10.2.0.0/16")
            assert no_answer(stranger, question) == [""]
            # What is on this host its plugins decide about.
            assert ask(stranger, here)[0].startswith("near ")
            assert ask(near.netns, question) == [f"far {near.ipv4}"]
            assert ask(far.netns, here) == [f"near {far.ipv4}"]
            assert ask(host, question)[0].startswith("far ")
            assert ask(fleet.host(2), here)[0].startswith("near ")
            configure('[[network]]\nname = "pods"\nsubnets = ["10.2.0.0/16"]\nopen = true\n')
            until_guarded(host, "10.2.0.0/16", there=False)
            assert ask(stranger, question)[0].startswith("far ")
            configure('[[network]]\nname = "pods"\nsubnets = ["10.2.0.0/16"]\n')
            until_guarded(host, "10.2.0.0/16")
            netd.stop()
            until_guarded(host, "10.2.0.0/16")
            host.run([sys.executable, "-m", "netd", "--config", CONFIG, "--remove"])
            assert "elements" not in guarded(host)
            assert not host.path(SOCKET).exists()
            assert list(host.path("/run/netloom/standing").iterdir()) == []
