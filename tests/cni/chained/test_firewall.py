"""firewall with real packets: what passes where another firewall drops, what a policy keeps apart, what stays behind,
which is nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from cni.versions import SUPPORTED
from kernel import nft
from kernel.record import Key, Record, Records
from tests.cni.chained.traffic import ask, no_answer, serving
from tests.cni.lab import WITH_CHECK, Attached, Lab, Served, both, elements, net, pool, unreachable
from tests.hosts import IPV6, Host, Netns, wait_until
from tests.kernel import bus

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")

HOST, OUTSIDE = "192.0.2.1", "192.0.2.9"
HOST6, OUTSIDE6 = "2001:db8::1", "2001:db8::9"
PEER = OUTSIDE6 if IPV6 else OUTSIDE
ACCEPT = '-A FORWARD -m mark --mark 0x1000000/0x1000000 -m comment --comment "netloom lets pass 0x1000000" -j ACCEPT'
CHAINED = [version for version in SUPPORTED if version not in ("0.1.0", "0.2.0", "0.3.0", "0.3.1")]


@pytest.fixture(scope="module")
def outside(module_lab: Lab) -> Iterator[Netns]:
    """A machine on the host's segment, by way of which it reaches the containers, with a server."""
    host = module_lab.host
    beyond = host.netns("outside")
    host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", "outside"])
    host.run(["ip", "address", "add", f"{HOST}/24", "dev", "up0"])
    host.run(["ip", "link", "set", "up0", "up"])
    beyond.run(["ip", "address", "add", f"{OUTSIDE}/24", "dev", "eth0"])
    for link in ("lo", "eth0"):
        beyond.run(["ip", "link", "set", link, "up"])
    beyond.run(["ip", "route", "add", "10.0.0.0/8", "via", HOST])
    if IPV6:
        host.run(["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"])  # or the first ADD does, and adds routes by it
        host.run(["ip", "address", "add", f"{HOST6}/64", "dev", "up0", "nodad"])
        beyond.run(["ip", "address", "add", f"{OUTSIDE6}/64", "dev", "eth0", "nodad"])
        beyond.run(["ip", "route", "add", "fd00::/16", "via", HOST6])
    with serving(beyond, "outside", "tcp:80"):
        yield beyond
    host.run(["ip", "link", "delete", "up0"])
    beyond.delete()


@pytest.fixture(autouse=True)
def _segment(outside: Netns) -> None:
    """Before the snapshot of `lab`."""


def web(version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
    return net(version, **{"isDefaultGateway": True, "ipam": both(), **keys})


def numbered(number: int, **keys: Any) -> dict[str, Any]:
    """One of several networks, each with a bridge of its own."""
    ranges = [f"10.{number}.0.0/16", *([f"fd00:{number}::/64"] if IPV6 else [])]
    return web(name=f"net{number}", bridge=f"br{number}", ipam=pool(*ranges), **keys)


@dataclass
class Walled:
    """A container with the plugin."""

    one: Attached
    conf: dict[str, Any]

    @property
    def netns(self) -> Netns:
        return self.one.netns

    @property
    def targets(self) -> list[str]:
        return [self.one.ip(), *([self.one.ip(6)] if IPV6 else [])]

    def call(self, verb: str, conf: dict[str, Any] | None = None, **more: Any) -> Served:
        known = {"netns": self.netns, "container_id": self.one.container_id, **self.one.more}
        return self.one.lab.cni(verb, "firewall", conf or self.conf, **{**known, **more})

    def check(self) -> None:
        self.call("CHECK").ok()

    def broken(self) -> str:
        answer = self.call("CHECK")
        assert answer.code() > 0
        return str(answer.json["msg"])


def conf_of(one: Attached, **keys: Any) -> dict[str, Any]:
    conf = {"cniVersion": one.conf["cniVersion"], "name": one.conf["name"], "type": "firewall"}
    return {**conf, "prevResult": one.result, **keys}


@contextlib.contextmanager
def walled(lab: Lab, network: dict[str, Any] | None = None, **keys: Any) -> Iterator[Walled]:
    """A container with the plugin for the duration of the block."""
    network = network or web()
    with lab.attached(network, str(network["type"])) as one:
        two = Walled(one, conf_of(one, **keys))
        two.call("ADD").ok()
        try:
            yield two
        finally:
            two.call("DEL").ok()


@contextlib.contextmanager
def settled(lab: Lab, network: dict[str, Any] | None = None, **keys: Any) -> Iterator[Walled]:
    """A container that had the plugin before: what its network shares stays until the network's last container goes."""
    with lab.attached(network or web()) as one:
        two = Walled(one, conf_of(one, **keys))
        two.call("ADD").ok()
        two.call("DEL").ok()
        # The port goes with the next plugin's DEL; its flag stays that long.
        lab.host.run(["bridge", "link", "set", "dev", one.port, "isolated", "off"])
        yield two


# Other firewalls


def tables(host: Host, *commands: str, versions: Sequence[int] = (4, 6)) -> None:
    for version in versions if IPV6 else versions[:1]:
        for command in commands:
            host.run([{4: "iptables", 6: "ip6tables"}[version], "-w", *command.split()])


def forward(host: Host, version: int = 4) -> list[str]:
    """The rules of FORWARD as iptables prints them."""
    return host.run([{4: "iptables", 6: "ip6tables"}[version], "-S", "FORWARD"]).stdout.splitlines()[1:]


def like_docker(host: Host) -> None:
    """As Docker 20.10 leaves it; it does not look at IPv6, but a host that drops there is the same."""
    tables(
        host,
        *(f"-N {chain}" for chain in ("DOCKER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2", "DOCKER-USER")),
        "-A DOCKER-USER -j RETURN",
        "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
        "-A DOCKER-ISOLATION-STAGE-1 -j RETURN",
        "-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP",
        "-A DOCKER-ISOLATION-STAGE-2 -j RETURN",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -o docker0 -j DOCKER",
        "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
        "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
        "-P FORWARD DROP",
    )


def like_ufw(host: Host) -> None:
    """As `ufw enable` leaves it, as far as it is about forwarding (DEFAULT_FORWARD_POLICY="DROP")."""
    for tool, prefix in (("iptables", "ufw"), ("ip6tables", "ufw6"))[: 2 if IPV6 else 1]:
        before, after = f"{prefix}-before-forward", f"{prefix}-after-forward"
        text = f"""*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:{before} - [0:0]
:{after} - [0:0]
-A FORWARD -j {before}
-A FORWARD -j {after}
-A {before} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""
        host.run([f"{tool}-restore"], input=text)


def like_rhel(host: Host) -> None:
    """A policy that accepts, and a last rule that does not."""
    tables(host, "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A FORWARD -j REJECT")


def gone(host: Host) -> None:
    for family in ("ip", "ip6"):
        host.run(["nft", "delete", "table", family, "filter"], check=False)


@contextlib.contextmanager
def dropping(host: Host, make: Any = like_docker) -> Iterator[None]:
    """Another firewall for the duration of the block; at its end it must have nothing of ours any more."""
    make(host)
    before = host.run(["nft", "list", "ruleset", "ip"]).stdout + host.run(["nft", "list", "ruleset", "ip6"]).stdout
    try:
        yield
        assert not any("netloom" in line for version in (4, 6) for line in forward(host, version)), before
    finally:
        gone(host)


@contextlib.contextmanager
def bridge_netfilter(host: Host, on: bool) -> Iterator[None]:
    """Whether packets inside a bridge go through iptables."""
    names = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    before = [host.run(["sysctl", "-n", name]).stdout.strip() for name in names]
    for name in names:
        host.run(["sysctl", "-qw", f"{name}={int(on)}"])
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            host.run(["sysctl", "-qw", f"{name}={value}"])


def outward(one: Netns) -> list[str]:
    """What the container gets from the machine outside, by each family."""
    return ask(one, *(("tcp", target, 80) for target in (OUTSIDE, OUTSIDE6)[: 2 if IPV6 else 1]))


def not_outward(one: Netns) -> bool:
    return not any(no_answer(one, *(("tcp", target, 80) for target in (OUTSIDE, OUTSIDE6)[: 2 if IPV6 else 1])))


def reaches(source: Netns, *targets: Walled) -> bool:
    """Whether servers in the targets answer the source, by each family."""
    return all(_asked(ask, source, target) == [f"server {target.one.container_id}"] * FAMILIES for target in targets)


def cut_off(source: Netns, *targets: Walled) -> bool:
    """Whether none does, by any family."""
    return all(_asked(no_answer, source, target) == [""] * FAMILIES for target in targets)


def _asked(how: Callable[..., list[str]], source: Netns, target: Walled) -> list[str]:
    with serving(target.netns, f"server {target.one.container_id}", "tcp:81"):
        answers = how(source, *(("tcp", one, 81) for one in target.targets))
    return [answer.rpartition(" ")[0] for answer in answers]


FAMILIES = 2 if IPV6 else 1


# The verbs


@pytest.mark.parametrize("version", CHAINED)
def test_every_verb(lab: Lab, version: str) -> None:
    with settled(lab, web(version), ingressPolicy="same-bridge") as two:
        one, attached = two.one, lab.host.snapshot()
        assert two.call("ADD").result() == one.result
        assert elements(lab.host, "accept4") == [one.ip()]
        assert elements(lab.host, "accept6") == ([one.ip(6)] if IPV6 else [])
        assert elements(lab.host, "separated") == ["br0"]
        check = two.call("CHECK")
        assert (check.stdout, check.status) == ("", 0) if version in WITH_CHECK else check.code() == 1
        valid = [{"containerID": one.container_id, "ifname": "eth0"}]
        bare = {key: value for key, value in two.conf.items() if key != "prevResult"}
        for verb, more in (("GC", {"cni.dev/valid-attachments": valid}), ("STATUS", {})):
            answer = lab.cni(verb, "firewall", {**bare, **more})
            assert (answer.stdout, answer.status) == ("", 0) if version == "1.1.0" else answer.code() == 1
        assert elements(lab.host, "accept4") == [one.ip()]
        answer = two.call("DEL")
        assert (answer.stdout, answer.stderr, answer.status) == ("", "", 0)
        lab.host.assert_clean(attached)
        two.call("DEL").ok()


@pytest.mark.parametrize("version", ["0.3.1", "0.2.0"])
def test_versions_before_0_4_0_are_refused(lab: Lab, version: str) -> None:
    with lab.attached(web("0.4.0")) as one:
        answer = Walled(one, {**conf_of(one), "cniVersion": version}).call("ADD")
        assert answer.code() == 1


def test_as_a_process_where_packets_are_dropped(lab: Lab) -> None:
    with dropping(lab.host), lab.attached(web()) as one:
        conf = conf_of(one)
        known: dict[str, Any] = {"netns": one.netns, "container_id": one.container_id}
        assert lab.host.cni("ADD", "firewall", conf, **known).result() == one.result
        assert outward(one.netns) == [f"outside {address.partition('/')[0]}" for address in one.addresses]
        lab.host.cni("CHECK", "firewall", conf, **known).ok()
        lab.host.cni("DEL", "firewall", conf, **known).ok()


# Packets where another firewall drops


@pytest.mark.parametrize("make", [like_docker, like_ufw, like_rhel])
def test_packets_pass_another_firewall(lab: Lab, outside: Netns, make: Any) -> None:
    host = lab.host
    with dropping(host, make), lab.attached(numbered(2)) as plain:
        assert not_outward(plain.netns)
        with walled(lab) as one:
            top = [forward(host, version)[0] for version in ((4, 6) if IPV6 else (4,))]
            assert set(top) == {ACCEPT}
            assert outward(one.netns) == [f"outside {target}" for target in one.targets]
            # Who is outside gets answers, and begins nothing; who has not the plugin fares as before.
            assert cut_off(outside, one)
            assert not_outward(plain.netns)
            one.check()
            with walled(lab) as two:
                assert forward(host).count(ACCEPT) == 1
                assert outward(two.netns) == [f"outside {target}" for target in two.targets]
            assert outward(one.netns)[0]
            # A rule set that was saved and is restored still means the same.
            saved = host.run(["iptables-save", "-t", "filter"]).stdout
            assert ACCEPT in saved
            host.run(["iptables-restore"], input=saved)
            assert outward(one.netns) == [f"outside {target}" for target in one.targets]
            one.check()
        assert ACCEPT not in forward(host)
        assert not_outward(plain.netns)


def test_packets_inside_a_bridge(lab: Lab) -> None:
    host = lab.host
    with dropping(host), lab.attached(web()) as plain, walled(lab) as one, walled(lab) as two:
        for on in (True, False):
            with bridge_netfilter(host, on):
                assert reaches(one.netns, two)
                for target in two.targets:
                    assert one.netns.ping(target) > 0
                # A container without the plugin is not let through, where the bridge asks.
                assert cut_off(plain.netns, two) if on else reaches(plain.netns, two)
                if IPV6 and on:
                    # A neighbour is asked again under the link-local address.
                    where = [two.one.ip(6), "dev", "eth0"]
                    mac = two.netns.links()["eth0"]["address"]
                    one.netns.run(["ip", "neighbour", "replace", *where, "lladdr", mac, "nud", "probe"])
                    _wait_for_reachable(one.netns, two.one.ip(6))


def _wait_for_reachable(netns: Netns, address: str) -> None:
    """Without traffic of its own: only the answer to a probe makes a neighbour reachable."""

    def state() -> str:
        return netns.run(["ip", "-6", "neighbour", "show", address]).stdout

    wait_until(lambda: "PROBE" not in state(), "the end of the probes")
    assert "REACHABLE" in state(), state()


def test_ptp_and_several_addresses(lab: Lab) -> None:
    lab.scripted().gives("10.7.0.5/24 10.7.0.1", "10.8.0.5/24 10.8.0.1", routes=[{"dst": "0.0.0.0/0"}])
    conf = {"cniVersion": "1.0.0", "name": "routed", "type": "ptp", "ipam": {"type": "scripted"}}
    with dropping(lab.host), walled(lab, conf) as one:
        assert sorted(elements(lab.host, "accept4")) == ["10.7.0.5", "10.8.0.5"]
        for source in ("10.7.0.5", "10.8.0.5"):
            assert ask(one.netns, ("tcp", OUTSIDE, 80, 0, source)) == [f"outside {source}"]


def test_published_ports_pass_with_the_plugin_and_without(lab: Lab, outside: Netns) -> None:
    with dropping(lab.host), lab.attached(web()) as one:
        mapping = [{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]
        ports = {**conf_of(one), "type": "portmap", "runtimeConfig": {"portMappings": mapping}}
        known: dict[str, Any] = {"netns": one.netns, "container_id": one.container_id}
        lab.cni("ADD", "portmap", ports, **known).ok()
        two = Walled(one, conf_of(one))
        queries = [("tcp", target, 8080) for target in (HOST, HOST6)[: 2 if IPV6 else 1]]
        wanted = [f"one {source}" for source in (OUTSIDE, OUTSIDE6)[: 2 if IPV6 else 1]]
        with serving(one.netns, "one", "tcp:81"):
            assert ask(outside, *queries) == wanted
            two.call("ADD").ok()
            assert ask(outside, *queries) == wanted
            two.call("DEL").ok()
            assert ACCEPT in forward(lab.host)
            assert ask(outside, *queries) == wanted
            assert not any(no_answer(outside, ("tcp", one.ip(), 81)))
        lab.cni("DEL", "portmap", ports, **known).ok()


def test_errors_about_published_ports_pass(lab: Lab, outside: Netns) -> None:
    """A router with a narrow link behind it says so, and the container must hear it."""
    far = lab.host.netns("far")
    try:
        outside.run(["ip", "link", "add", "far0", "type", "veth", "peer", "name", "eth0", "netns", "far"])
        for netns, link, address in ((outside, "far0", "198.51.100.1/24"), (far, "eth0", "198.51.100.2/24")):
            netns.run(["ip", "address", "add", address, "dev", link])
            netns.run(["ip", "link", "set", link, "up"])
        outside.run(["ip", "link", "set", "far0", "mtu", "900"])
        outside.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        far.run(["ip", "route", "add", "default", "via", "198.51.100.1"])
        lab.host.run(["ip", "route", "add", "198.51.100.0/24", "via", OUTSIDE])
        with dropping(lab.host), lab.attached(web(ipam=pool())) as one:
            mapping = [{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]
            ports = {**conf_of(one), "type": "portmap", "runtimeConfig": {"portMappings": mapping}}
            known: dict[str, Any] = {"netns": one.netns, "container_id": one.container_id}
            lab.cni("ADD", "portmap", ports, **known).ok()
            with serving(one.netns, "x" * 5000, "tcp:81"):
                read = f"one = socket.create_connection(('{HOST}', 8080), 20)\nprint(len(one.makefile().read()))"
                assert int(far.run([sys.executable, "-c", f"import socket\n{read}"]).stdout) > 5000
            lab.cni("DEL", "portmap", ports, **known).ok()
    finally:
        lab.host.run(["ip", "route", "delete", "198.51.100.0/24"], check=False)
        outside.run(["ip", "link", "delete", "far0"], check=False)
        far.delete()


def test_isolation_has_no_way_round_by_published_ports(lab: Lab, outside: Netns) -> None:
    """By way of the host's address, packets go from the bridge to the bridge, past the ports' flags."""
    network = web(hairpinMode=True)
    with walled(lab, network, ingressPolicy="isolated") as one, walled(lab, network, ingressPolicy="isolated") as two:
        mapping = [{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]
        ports = {**conf_of(two.one), "type": "portmap", "runtimeConfig": {"portMappings": mapping}}
        known: dict[str, Any] = {"netns": two.netns, "container_id": two.one.container_id}
        lab.cni("ADD", "portmap", ports, **known).ok()
        queries = [("tcp", target, 8080) for target in (HOST, HOST6)[:FAMILIES]]
        for on in (True, False):
            with bridge_netfilter(lab.host, on), serving(two.netns, "two", "tcp:81"):
                assert all(ask(outside, *queries))
                assert not any(no_answer(one.netns, *queries))
        lab.cni("DEL", "portmap", ports, **known).ok()


def test_a_published_port_is_for_containers_of_other_networks_too(lab: Lab, outside: Netns) -> None:
    """Kept apart are addresses of containers; a port of the host is everybody's."""
    policy = {"ingressPolicy": "same-bridge"}
    with walled(lab, numbered(1), **policy) as one, walled(lab, numbered(2), **policy) as two:
        mapping = [{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]
        ports = {**conf_of(two.one), "type": "portmap", "runtimeConfig": {"portMappings": mapping}}
        known: dict[str, Any] = {"netns": two.netns, "container_id": two.one.container_id}
        with serving(two.netns, "two", "tcp:81"):
            lab.cni("ADD", "portmap", ports, **known).ok()
            queries = [("tcp", target, 8080) for target in (HOST, HOST6)[:FAMILIES]]
            assert all(ask(one.netns, *queries))
            assert not any(no_answer(one.netns, *(("tcp", target, 81) for target in two.targets)))
            lab.cni("DEL", "portmap", ports, **known).ok()


@pytest.mark.parametrize("dropped", [False, True])
def test_an_internal_network_has_no_way_out_and_none_in(lab: Lab, outside: Netns, dropped: bool) -> None:
    keys = {"ingressPolicy": "same-bridge", "internal": True}
    with contextlib.ExitStack() as stack:
        if dropped:
            stack.enter_context(dropping(lab.host))
        one, two = (stack.enter_context(walled(lab, numbered(1), **keys)) for _ in range(2))
        other = stack.enter_context(walled(lab, numbered(2), **keys))
        free = stack.enter_context(walled(lab, numbered(3), ingressPolicy="same-bridge"))
        assert reaches(one.netns, two)
        assert one.netns.ping("10.1.0.1") > 0
        assert cut_off(one.netns, other, free)
        assert cut_off(free.netns, one)
        assert cut_off(outside, one)
        assert unreachable(one.netns, OUTSIDE)
        mapping = [{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]
        ports = {**conf_of(one.one), "type": "portmap", "runtimeConfig": {"portMappings": mapping}}
        known: dict[str, Any] = {"netns": one.netns, "container_id": one.one.container_id}
        with serving(one.netns, "one", "tcp:81"):
            lab.cni("ADD", "portmap", ports, **known).ok()
            assert not any(no_answer(outside, *(("tcp", target, 8080) for target in (HOST, HOST6)[:FAMILIES])))
            lab.cni("DEL", "portmap", ports, **known).ok()
        one.check()
        assert sorted(elements(lab.host, "internal")) == ["br1", "br2"]
        lab.host.run(["nft", "flush", "set", "inet", "netloom", "internal"])
        assert "internal" in one.broken()
    assert elements(lab.host, "internal") == []


def test_an_internal_network_of_ptp(lab: Lab, outside: Netns) -> None:
    ipam = pool("10.5.0.0/16", routes=[{"dst": "0.0.0.0/0"}])
    network = {"cniVersion": "1.0.0", "name": "ptp5", "type": "ptp", "ipam": ipam}
    with walled(lab, network, internal=True) as one, walled(lab, network, internal=True) as two:
        assert one.netns.ping(two.one.ip()) > 0
        assert unreachable(one.netns, OUTSIDE)
        assert len(elements(lab.host, "internal")) == 2
        one.check()
    assert elements(lab.host, "internal") == []


def ptp_subnets(number: int) -> list[str]:
    return [f"10.{number}.0.0/16", f"fd00:{number}::/64"][:FAMILIES]


def ptp(number: int) -> dict[str, Any]:
    ipam = pool(*ptp_subnets(number), routes=[{"dst": "0.0.0.0/0"}, {"dst": "::/0"}])
    return {"cniVersion": "1.0.0", "name": f"ptp{number}", "type": "ptp", "ipam": ipam}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("internal", [False, True])
def test_networks_of_ptp_that_are_kept_apart(lab: Lab, outside: Netns, internal: bool, dropped: bool) -> None:
    with contextlib.ExitStack() as stack:
        if dropped:
            stack.enter_context(dropping(lab.host))
        one, two = (stack.enter_context(walled(lab, ptp(5), apart=ptp_subnets(5), internal=internal)) for _ in range(2))
        other = stack.enter_context(walled(lab, ptp(6), apart=ptp_subnets(6), internal=internal))
        assert reaches(one.netns, two)
        assert cut_off(one.netns, other)
        assert cut_off(other.netns, one)
        assert cut_off(outside, one)
        if not internal:
            assert one.netns.ping(OUTSIDE) > 0
        one.check()
    assert elements(lab.host, "apart4") == elements(lab.host, "joined4") == []


@pytest.mark.parametrize("name", ["", "MY-RULES"])
def test_an_administrators_rules_come_first(lab: Lab, name: str) -> None:
    chain = name or "CNI-ADMIN"
    keys: dict[str, Any] = {"iptablesAdminChainName": name} if name else {}
    with dropping(lab.host):
        tables(lab.host, f"-N {chain}", f"-A {chain} -p tcp --dport 80 -j DROP")
        with serving(lab.host, "host", "tcp:82"), walled(lab, **keys) as one:
            call = f'-A FORWARD -m comment --comment "netloom asks first: {chain}" -j {chain}'
            assert forward(lab.host)[:2] == [call, ACCEPT]
            assert not_outward(one.netns)
            assert one.netns.ping(OUTSIDE) > 0
            tables(lab.host, f"-F {chain}")
            assert outward(one.netns) == [f"outside {target}" for target in one.targets]
            one.check()


def test_the_configured_bit(lab: Lab) -> None:
    file = lab.host.path("/etc/netloom/netloom.toml")
    before = file.read_text(encoding="utf-8")
    try:
        with dropping(lab.host):
            file.write_text(f"{before}\n[cni]\nforward_mark_bit = 7\n", encoding="utf-8")
            with walled(lab) as one:
                assert forward(lab.host)[0] == ACCEPT.replace("0x1000000", "0x80")
                assert outward(one.netns) == [f"outside {target}" for target in one.targets]
                file.write_text(f"{before}\n[cni]\nforward_mark_bit = 77\n", encoding="utf-8")
            # A wrong bit keeps nobody from going, and everybody from coming.
            with lab.attached(web()) as plain:
                answer = Walled(plain, conf_of(plain)).call("ADD")
                assert answer.code() == 999
                assert "cni.forward_mark_bit: want a whole number from 0 to 31, found 77" in answer.json["msg"]
    finally:
        file.write_text(before, encoding="utf-8")
        # As the first ADD found them.
        with walled(lab):
            pass


# Policies


# Without iptables in the bridge the port's flag isolates, with it the forward chain does as well.
@pytest.mark.parametrize(("dropped", "netfilter"), [(False, False), (True, True)])
def test_policies_on_several_bridges(lab: Lab, outside: Netns, dropped: bool, netfilter: bool) -> None:
    host = lab.host
    with contextlib.ExitStack() as stack:
        stack.enter_context(bridge_netfilter(host, netfilter))
        if dropped:
            stack.enter_context(dropping(host))
        a1, a2 = (stack.enter_context(walled(lab, numbered(1), ingressPolicy="same-bridge")) for _ in range(2))
        b1 = stack.enter_context(walled(lab, numbered(2), ingressPolicy="same-bridge"))
        i1, i2 = (stack.enter_context(walled(lab, numbered(3), ingressPolicy="isolated")) for _ in range(2))
        free = stack.enter_context(walled(lab, numbered(4), ingressPolicy="open"))
        assert reaches(a1.netns, a2)
        assert cut_off(a1.netns, b1, i1)
        assert cut_off(b1.netns, a1)
        assert cut_off(i1.netns, i2, a1)
        # A bridge without a policy is like the world outside, as in the reference.
        assert reaches(free.netns, a1, i1)
        assert reaches(a1.netns, free)
        assert i1.netns.ping("10.3.0.1") > 0
        for one in (a1, i1):
            assert outward(one.netns) == [f"outside {target}" for target in one.targets]
        assert cut_off(outside, a1) if dropped else reaches(outside, a1)
        for one in (a1, a2, b1, i1, i2, free):
            one.check()
        ports = [one for one in host.links().values() if one.get("linkinfo", {}).get("info_slave_data")]
        isolated = [one["ifname"] for one in ports if one["linkinfo"]["info_slave_data"]["isolated"]]
        assert sorted(isolated) == sorted([i1.one.port, i2.one.port])
        assert sorted(elements(host, "separated")) == ["br1", "br2", "br3"]
        assert elements(host, "isolated") == [{"concat": ["br3", "br3"]}]
    assert [elements(host, name) for name in ("separated", "same", "isolated")] == [[], [], []]


def test_policies_without_a_bridge(lab: Lab) -> None:
    """ptp: the host's end of each container stands for a bridge of its own."""

    def routed(number: int) -> dict[str, Any]:
        ipam = pool(f"10.{number}.0.0/16", routes=[{"dst": "0.0.0.0/0"}])
        return {"cniVersion": "1.0.0", "name": f"ptp{number}", "type": "ptp", "ipam": ipam}

    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(walled(lab, routed(5), ingressPolicy="same-bridge")) for _ in range(2))
        bridged = stack.enter_context(walled(lab, numbered(6), ingressPolicy="isolated"))
        free = stack.enter_context(walled(lab, routed(7)))
        assert unreachable(one.netns, two.one.ip())
        assert unreachable(one.netns, bridged.one.ip())
        assert one.netns.ping(free.one.ip()) > 0
        assert one.netns.ping(OUTSIDE) > 0
        one.check()
        # The last of a network with a bridge takes that network's elements, and no others.
        with walled(lab, numbered(8), ingressPolicy="same-bridge"):
            pass
        assert len(elements(lab.host, "separated")) == 3
        one.check()
    assert elements(lab.host, "separated") == []


def test_hairpin_of_the_port_is_kept(lab: Lab) -> None:
    with walled(lab, web(hairpinMode=True), ingressPolicy="isolated") as one:
        data = lab.host.links()[one.one.port]["linkinfo"]["info_slave_data"]
        assert (data["hairpin"], data["isolated"]) == (True, True)


# Bad input


def test_configurations_that_are_wrong(lab: Lab) -> None:
    with lab.attached(web(ipam=pool())) as one:
        before = lab.host.snapshot()
        none = {"cniVersion": "1.1.0", "ips": []}
        inside = {**none, "interfaces": [{"name": "eth0", "sandbox": one.netns.path}]}
        nowhere = {**none, "interfaces": [{"name": "nobr0"}]}
        alone = {**none, "interfaces": one.result["interfaces"][:1]}
        wrong: list[tuple[dict[str, Any], tuple[str, ...]]] = [
            ({"backend": "pf"}, ('$.backend: want "iptables"', '"pf"')),
            ({"backend": 5}, ("$.backend", "5")),
            ({"backend": "firewalld"}, ("$.backend: firewalld does not run", '"firewalld"')),
            ({"ingressPolicy": "closed"}, ('$.ingressPolicy: want "open", "same-bridge" or "isolated"', '"closed"')),
            ({"iptablesAdminChainName": "A B"}, ("$.iptablesAdminChainName", '"A B"')),
            ({"iptablesAdminChainName": "C" * 29}, ("$.iptablesAdminChainName", "28 characters")),
            ({"firewalldZone": "a zone"}, ("$.firewalldZone", '"a zone"')),
            ({"ingressPolicy": "isolated", "prevResult": none}, ("$.ingressPolicy", "no interfaces")),
            ({"ingressPolicy": "same-bridge", "prevResult": inside}, ('"eth0", is none of the host', '"same-bridge"')),
            ({"ingressPolicy": "same-bridge", "prevResult": nowhere}, ('no link "nobr0"', '"same-bridge"')),
            ({"internal": True, "prevResult": inside}, ("$.internal", '"eth0", is none of the host')),
            ({"internal": "yes"}, ("$.internal",)),
            ({"apart": ["10.5.0.1/16"]}, ('$.apart: want networks such as "10.5.0.0/16"', '"10.5.0.1/16"')),
            ({"apart": ["10.5.0.0"]}, ("$.apart", '"10.5.0.0"')),
            ({"apart": "10.5.0.0/16"}, ("$.apart",)),
            ({"ingressPolicy": "isolated", "prevResult": alone}, ("no port of bridge br0", '"isolated"')),
        ]
        for keys, words in wrong:
            answer = Walled(one, conf_of(one, **keys)).call("ADD")
            assert answer.code() == 7, keys
            for word in words:
                assert word in answer.json["msg"], answer.json
            lab.host.assert_clean(before)
        lone = conf_of(one)
        del lone["prevResult"]
        answer = Walled(one, lone).call("ADD")
        assert (answer.code(), "chained plugin" in answer.json["msg"]) == (7, True)
        # Nothing to do, and nothing done.
        bare = {"cniVersion": "1.1.0", "interfaces": one.result["interfaces"], "ips": []}
        two = Walled(one, conf_of(one, prevResult=bare, backend="nftables"))
        assert two.call("ADD").result()["interfaces"] == one.result["interfaces"]
        two.check()
        two.call("DEL").ok()
        lab.host.assert_clean(before)


def test_a_netns_that_is_none(lab: Lab) -> None:
    with lab.attached(web(ipam=pool())) as one:
        before = lab.host.snapshot()
        for path in ("/run/netns/nothing", "/etc/passwd"):
            assert Walled(one, conf_of(one)).call("ADD", netns=path).code() > 0
        lab.host.assert_clean(before)


# CHECK


def test_check_finds(lab: Lab) -> None:
    host = lab.host
    for command, says in (
        ("nft flush set inet netloom accept4", "accept4"),
        ("nft flush set inet netloom separated", "separated"),
        ("nft flush set inet netloom isolated", "isolated"),
        ("bridge link set dev {port} isolated off", "isolation is off on bridge port {port}"),
        ("iptables -F FORWARD", "FORWARD of table ip filter drops"),
        ("ip link set br0 down", ""),
    ):
        with dropping(host), walled(lab, ingressPolicy="isolated") as one:
            one.check()
            port = one.one.port
            host.run(command.format(port=port).split())
            if says:
                assert says.format(port=port) in one.broken()
            else:
                one.check()


def test_check_without_a_result(lab: Lab) -> None:
    with walled(lab) as one:
        answer = one.call("CHECK", {key: value for key, value in one.conf.items() if key != "prevResult"})
        assert (answer.code(), answer.json["msg"]) == (7, "required prevResult missing")


# DEL and GC


def test_del_needs_neither_namespace_nor_result(lab: Lab) -> None:
    with dropping(lab.host):
        for how in ("no netns", "path gone", "no result"):
            with settled(lab, web(ipam=pool()), ingressPolicy="isolated") as two:
                one, before = two.one, lab.host.snapshot()
                two.call("ADD").ok()
                assert ACCEPT in forward(lab.host)
                bare = {key: value for key, value in two.conf.items() if key != "prevResult"}
                if how == "path gone":
                    one.netns.delete()
                conf = bare if how == "no result" else two.conf
                more = {"netns": ""} if how == "no netns" else {}
                two.call("DEL", conf, **more).ok()
                assert elements(lab.host, "accept4") == []
                if how == "no netns":
                    lab.host.run(["bridge", "link", "set", "dev", one.port, "isolated", "off"])
                    lab.host.assert_clean(before)
                two.call("DEL", conf, **more).ok()
        lab.cni("DEL", "firewall", net(), container_id="never", netns="/run/netns/nothing").ok()


def test_an_add_again_after_a_missed_del(lab: Lab) -> None:
    with walled(lab) as one:
        before = lab.host.snapshot()
        one.call("ADD").ok()
        lab.host.assert_clean(before)
        one.check()


def test_gc_removes_the_dead_and_spares_the_living(lab: Lab) -> None:
    host = lab.host
    with dropping(host), walled(lab, numbered(1), ingressPolicy="same-bridge") as living:
        before = host.snapshot()
        dead = host.netns()
        network = numbered(1)
        result = lab.cni("ADD", "bridge", network, netns=dead, container_id="dead").result()
        conf = {**living.conf, "prevResult": result}
        lab.cni("ADD", "firewall", conf, netns=dead, container_id="dead").ok()
        dead.delete()
        bare = {key: value for key, value in conf.items() if key != "prevResult"}
        lab.cni("GC", "firewall", {**bare, "name": "other", "cni.dev/valid-attachments": []}).ok()
        assert len(elements(host, "accept4")) == 2
        answer = lab.cni("GC", "firewall", {**bare, "cni.dev/valid-attachments": []})
        answer.ok()
        assert living.one.container_id in answer.stderr
        assert elements(host, "accept4") == [living.one.ip()]
        lab.cni("GC", "bridge", {**network, "cni.dev/valid-attachments": []}).ok()
        host.assert_clean(before)
        assert outward(living.netns)[0]


def test_what_netloom_gc_does(lab: Lab) -> None:
    """After a flush, and for who died without DEL."""
    host = lab.host

    def gc(*options: str) -> str:
        return host.run([sys.executable, "-m", "cli", "gc", *options]).stdout

    with dropping(host), walled(lab, ingressPolicy="isolated") as one:
        host.run(["nft", "flush", "ruleset"])
        like_docker(host)
        assert not_outward(one.netns)
        assert "elements were missing" in gc("--rebuild")
        assert outward(one.netns) == [f"outside {target}" for target in one.targets]
        one.check()
        gone(host)
        gc("--rebuild")
        one.check()
        like_docker(host)
        one.netns.delete()
        gc()
        assert ACCEPT not in forward(host)
        assert elements(host, "accept4") == elements(host, "isolated") == []
    with walled(lab, web(macspoofchk=True)):
        pass  # the bridge table is there again, as before


# firewalld


def test_with_firewalld(lab: Lab) -> None:
    host = lab.host
    with bus.running(host), bus.firewalld_running(host) as calls:
        for keys, zone in (({}, "trusted"), ({"backend": "firewalld", "firewalldZone": "public"}, "public")):
            with lab.attached(web()) as one:
                before = len(calls())
                two = Walled(one, conf_of(one, **keys))
                two.call("ADD").ok()
                sources = [f"{target}/{128 if ':' in target else 32}" for target in two.targets]
                assert calls()[before:] == [f"addSource {zone} {source}" for source in sources]
                two.check()
                assert calls()[-1] == f"querySource {zone} {sources[-1]}"
                before = len(calls())
                bare = {key: value for key, value in two.conf.items() if key != "prevResult"}
                two.call("DEL", bare, netns="").ok()
                assert calls()[before:] == [f"removeSource {zone} {source}" for source in sources]
                assert "accept" in two.broken()
        # What the reference put in.
        with lab.attached(web(ipam=pool())) as one:
            before = len(calls())
            Walled(one, conf_of(one)).call("DEL").ok()
            assert calls()[before:] == [f"removeSource trusted {one.ip()}/32"]
        # Somebody else has the address by now: a DEL that comes again, and what a missed one left, take nothing away.
        with walled(lab, backend="firewalld") as heir:
            removed = sum(line.startswith("removeSource") for line in calls())
            wanted = [nft.accept(target, "net gone eth0") for target in heir.targets]
            key = Key(str(heir.conf["name"]), "gone", "eth0", "firewall")
            Records(str(host.path("/run/netloom"))).write(Record(key, elements=tuple(wanted), firewalld_zone="trusted"))
            for _ in range(2):
                heir.call("DEL", container_id="gone", netns="").ok()
            assert not [line for line in calls() if line.startswith("removeSource")][removed:]
            heir.check()
        before = len(calls())
        with walled(lab, backend="iptables") as without:
            without.check()
        assert len(calls()) == before
        lab.cni("STATUS", "firewall", net(backend="firewalld")).ok()
        # A zone that there is not: nothing is left.
        with lab.attached(web()) as one:
            attached = host.snapshot()
            answer = Walled(one, conf_of(one, firewalldZone="nothing")).call("ADD")
            assert answer.code() == 7
            assert "$.firewalldZone: firewalld does not take" in answer.json["msg"]
            assert '(INVALID_ZONE: nothing), found "nothing"' in answer.json["msg"]
            host.assert_clean(attached)
        stack = contextlib.ExitStack()
        left = stack.enter_context(walled(lab))
    # firewalld ended, and has forgotten everything.
    left.check()
    stack.close()
    answer = lab.cni("STATUS", "firewall", net(backend="firewalld"))
    assert (answer.code(), "firewalld does not run" in answer.json["msg"]) == (50, True)


# Faults


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, when: str) -> None:
    host = lab.host
    with dropping(host), settled(lab, numbered(1), ingressPolicy="isolated") as two:
        one = two.one
        called = two.call("ADD").calls
        two.call("DEL").ok()
        host.run(["bridge", "link", "set", "dev", one.port, "isolated", "off"])
        assert len(called) > 15
        before = host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 else "signal"
            answer = two.call("ADD", faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            try:
                host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
        undone = two.call("ADD", faults=[{"at": len(called), "when": when, "kind": "error"}]).undo_calls
        for number, label in enumerate(undone, 1):
            faults = [
                {"at": len(called), "when": when, "kind": "error"},
                {"at": number, "when": when, "kind": "error", "undo": True},
            ]
            assert two.call("ADD", faults=faults).code() > 0, label
            # What the undo could not do, the runtime's DEL does.
            two.call("DEL").ok()
            host.run(["bridge", "link", "set", "dev", one.port, "isolated", "off"])
            try:
                host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{when} step {number} of the undo, {label}: {error}") from error
        two.call("ADD").ok()
        assert outward(one.netns) == [f"outside {target}" for target in two.targets]
        two.call("DEL").ok()
