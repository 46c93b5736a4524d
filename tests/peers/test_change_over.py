"""A host changes over, and back, with containers running: what the reference attached Netloom detaches, and the
reverse. What the reference left in the firewall goes with our DEL and GC."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from kernel import reference as left_by_reference
from tests.cni.lab import REFERENCE, Lab
from tests.hosts import IPV6, CniCall, Host, HostError, Netns, wait_until
from tests.peers.twins import Reference

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not os.path.exists(f"{REFERENCE}/bridge"), reason=f"no {REFERENCE}/bridge"),
]
RANGES = [[{"subnet": "10.1.0.0/16"}], *([[{"subnet": "fd00:1::/64"}]] if IPV6 else [])]
IPAM: dict[str, Any] = {"type": "host-local", "ranges": RANGES, "routes": [{"dst": "0.0.0.0/0"}]}
BRIDGE: dict[str, Any] = {
    "type": "bridge",
    "bridge": "br0",
    "isGateway": True,
    "ipMasq": True,
    "macspoofchk": True,
    "ipam": IPAM,
}
PTP: dict[str, Any] = {"type": "ptp", "ipMasq": True, "ipam": IPAM}
MACVLAN: dict[str, Any] = {"type": "macvlan", "master": "uplink0", "ipam": IPAM}
STATIC: dict[str, Any] = {
    "type": "bridge",
    "bridge": "br0",
    "ipam": {"type": "static", "addresses": [{"address": "10.1.0.5/16"}]},
}
PORTS = [
    {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
    {"hostPort": 8081, "containerPort": 53, "protocol": "udp"},
]
PORTMAP: dict[str, Any] = {
    "type": "portmap",
    "capabilities": {"portMappings": True},
    "runtimeConfig": {"portMappings": PORTS},
}
FIREWALL: dict[str, Any] = {"type": "firewall", "ingressPolicy": "same-bridge"}
BANDWIDTH: dict[str, Any] = {"type": "bandwidth", "egressRate": 8000000, "egressBurst": 800000}
TUNING: dict[str, Any] = {"type": "tuning", "mtu": 1400, "promisc": True}
OTHER: dict[str, Any] = {"hostPort": 9090, "containerPort": 90, "protocol": "tcp"}
LISTS: dict[str, list[Mapping[str, Any]]] = {
    "bridge": [BRIDGE],
    "ptp": [PTP],
    "macvlan": [MACVLAN],
    "static": [STATIC],
    "chain": [BRIDGE, PORTMAP, FIREWALL, BANDWIDTH, TUNING],
}
Runner = Any  # Lab.cni and Reference have the same arguments


class Changing:
    """A host with both."""

    def __init__(self, host: Host) -> None:
        self.host = host
        lab = Lab(host)
        # Ours finds our IPAM plugins, theirs its own.
        self.ours: Runner = lab.cni
        self.theirs: Runner = Reference(host)
        self.lab = lab

    def attach(self, who: Runner, plugins: Sequence[Mapping[str, Any]], netns: Netns, name: str = "net") -> Any:
        result: Any = None
        for plugin in plugins:
            conf = {"cniVersion": "1.0.0", "name": name, **plugin, **({"prevResult": result} if result else {})}
            result = who("ADD", plugin["type"], conf, container_id=netns.name, netns=netns).result()
        return result

    def detach(
        self,
        who: Runner,
        plugins: Sequence[Mapping[str, Any]],
        netns: Netns,
        result: Any,
        name: str = "net",
        path: str | None = None,
    ) -> None:
        for plugin in reversed(plugins):
            conf = {"cniVersion": "1.0.0", "name": name, **plugin, **({"prevResult": result} if result else {})}
            call: CniCall = who(
                "DEL", plugin["type"], conf, container_id=netns.name, netns=netns if path is None else path
            )
            call.ok()

    def collect(self, plugins: Sequence[Mapping[str, Any]], *valid: Netns, name: str = "net") -> None:
        """Our GC."""
        attachments = [{"containerID": one.name, "ifname": "eth0"} for one in valid]
        for plugin in plugins:
            conf = {"cniVersion": "1.1.0", "name": name, **plugin, "cni.dev/valid-attachments": attachments}
            self.ours("GC", plugin["type"], conf).ok()

    def left(self, netns: Netns, *words: str) -> list[str]:
        """What still speaks of the container on the host: rules, chains, links, addresses given out."""
        names = [netns.name, *words]
        names += [left_by_reference.chain_name("net", netns.name, prefix) for prefix in ("", "DN-", "SN-")]
        names.append(f"bwp{hashlib.sha512(f'net{netns.name}'.encode()).hexdigest()}"[:15])
        found = []
        for command in (
            ["nft", "list", "ruleset"],
            ["iptables-legacy-save"],
            ["ip6tables-legacy-save"],
            ["ip", "-o", "link"],
            ["sh", "-c", "grep -r . /var/lib/cni/networks /run/cni || true"],
        ):
            # Where the kernel knows iptables-legacy not, its programs fail.
            for line in self.host.run(command, check=False).stdout.splitlines():
                if any(word in line for word in names) and "last_reserved_ip" not in line:
                    found.append(line.strip())
        return found


@pytest.fixture(scope="module")
def changing() -> Iterator[Changing]:
    with Host("changing") as host:
        host.run(["ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "uplink1"])
        host.run(["ip", "link", "set", "uplink0", "up"])
        host.run(["ip", "link", "set", "uplink1", "up"])
        changing = Changing(host)
        changing.ours("VERSION", "bridge", b"")
        yield changing


@pytest.fixture
def netns(changing: Changing) -> Iterator[Netns]:
    one = changing.host.netns()
    yield one
    one.delete()


def addresses(result: Mapping[str, Any]) -> list[str]:
    return [ip["address"].split("/")[0] for ip in result["ips"]]


@pytest.fixture(params=["nft", "legacy"])
def iptables(request: pytest.FixtureRequest, changing: Changing) -> Iterator[str]:
    """Which iptables the reference finds: both write to the kernel by other ways."""
    if request.param == "legacy":
        if changing.host.run(["iptables-legacy", "-t", "nat", "-S"], check=False).returncode:
            pytest.skip("this kernel has no ip_tables")
        place = changing.host.path("/etc/netloom/legacy")
        place.mkdir(exist_ok=True)
        for name in ("iptables", "ip6tables"):
            real = shutil.which(f"{name}-legacy", path="/usr/sbin:/sbin")
            assert real is not None
            link = place / name
            link.unlink(missing_ok=True)
            link.symlink_to(real)
        changing.theirs.programs = "/etc/netloom/legacy"
    yield str(request.param)
    changing.theirs.programs = ""


@pytest.mark.parametrize("how", ["plain", "without prevResult", "without namespace", "namespace gone"])
@pytest.mark.parametrize("plugins", LISTS.values(), ids=LISTS)
def test_what_the_reference_attached_we_detach(
    changing: Changing, netns: Netns, plugins: list[Mapping[str, Any]], how: str
) -> None:
    result = changing.attach(changing.theirs, plugins, netns)
    held = addresses(result)
    assert changing.left(netns, *held)
    path = None
    if how == "without namespace":
        path = ""
    elif how == "namespace gone":
        netns.delete()
    changing.detach(changing.ours, plugins, netns, None if how == "without prevResult" else result, path=path)
    # Links go some time after their namespace.
    wait_until(lambda: changing.left(netns, *held) == [], "a clean host", lambda: str(changing.left(netns, *held)))
    if how == "plain":
        assert set(netns.links()) == {"lo"}
    changing.detach(changing.ours, plugins, netns, None)


@pytest.mark.parametrize("plugins", LISTS.values(), ids=LISTS)
def test_what_we_attached_the_reference_detaches(
    changing: Changing, netns: Netns, plugins: list[Mapping[str, Any]]
) -> None:
    result = changing.attach(changing.ours, plugins, netns)
    masquerades = any(plugin.get("ipMasq") for plugin in plugins)
    try:
        changing.detach(changing.theirs, plugins, netns, result)
    except HostError as error:
        # It asks iptables to delete its rule, and that there is none is no error to iptables-legacy alone.
        assert masquerades and "does not exist" in str(error)
        changing.detach(changing.theirs, plugins, netns, result)
    assert set(netns.links()) == {"lo"}
    assert not list(changing.host.path("/var/lib/cni/networks").rglob("*[.:]*[.:]*"))
    # Our own record and elements it does not know. They go with our GC, DEL or next ADD.
    changing.collect(plugins)
    assert [path for path in changing.host.path("/run/netloom/attachments").rglob("*") if path.is_file()] == []
    assert changing.left(netns, *addresses(result)) == []


def test_ipmasq_of_either_iptables(changing: Changing, netns: Netns, iptables: str) -> None:
    other = changing.host.netns()
    changing.attach(changing.theirs, [BRIDGE], other)
    held = changing.attach(changing.theirs, [BRIDGE], netns)
    chain = left_by_reference.chain_name("net", netns.name)
    rules = changing.host.run([f"iptables-{'legacy' if iptables == 'legacy' else 'nft'}-save", "-t", "nat"]).stdout
    assert f":{chain} " in rules
    assert f"-j {chain}" in rules
    changing.detach(changing.ours, [BRIDGE], netns, held)
    assert changing.left(netns, *addresses(held)) == []
    assert len(changing.left(other)) >= 3, "another container's stay"
    changing.detach(changing.ours, [BRIDGE], other, None)
    assert changing.left(other) == []
    other.delete()


def test_a_chain_that_an_administrator_uses_too(changing: Changing, netns: Netns, iptables: str) -> None:
    held = changing.attach(changing.theirs, [BRIDGE], netns)
    chain = left_by_reference.chain_name("net", netns.name)
    program = f"iptables-{iptables}"
    changing.host.run([program, "-t", "nat", "-N", "MINE"])
    changing.host.run([program, "-t", "nat", "-A", "MINE", "-j", chain])
    changing.detach(changing.ours, [BRIDGE], netns, held)
    rules = changing.host.run([program, "-t", "nat", "-S"]).stdout.splitlines()
    assert [line for line in rules if chain in line] == [f"-N {chain}", f"-A MINE -j {chain}"]
    changing.host.run([program, "-t", "nat", "-F", "MINE"])
    changing.host.run([program, "-t", "nat", "-X", "MINE"])
    changing.detach(changing.ours, [BRIDGE], netns, None)
    assert changing.left(netns, *addresses(held)) == []


def test_ports_of_either_iptables(changing: Changing, netns: Netns, iptables: str) -> None:
    other = changing.host.netns()
    plugins = [BRIDGE, PORTMAP]
    changing.attach(changing.theirs, plugins, netns)
    result = changing.attach(changing.theirs, [BRIDGE, {**PORTMAP, "runtimeConfig": {"portMappings": [OTHER]}}], other)
    save = f"iptables-{'legacy' if iptables == 'legacy' else 'nft'}-save"
    chain = left_by_reference.chain_name("net", netns.name, "DN-")
    # One jump for each protocol.
    assert changing.host.run([save, "-t", "nat"]).stdout.count(f"-j {chain}") == 2
    changing.detach(changing.ours, plugins, netns, None, path="")
    assert [line for line in changing.left(netns) if "veth" not in line] == []
    assert len(changing.left(other)) >= 6, "another container's stay"
    changing.detach(changing.ours, plugins, other, result)
    assert changing.left(other, *addresses(result)) == []
    other.delete()


def test_accepted_addresses_of_either_iptables(changing: Changing, netns: Netns, iptables: str) -> None:
    plugins = [BRIDGE, FIREWALL]
    result = changing.attach(changing.theirs, plugins, netns)
    save = f"iptables-{'legacy' if iptables == 'legacy' else 'nft'}-save"
    (four, *_) = addresses(result)
    assert changing.host.run([save, "-t", "filter"]).stdout.count(f"{four}/32") == 2
    changing.host.run([save.removesuffix("-save"), "-A", "CNI-FORWARD", "-s", four, "-j", "LOG"])
    changing.detach(changing.ours, plugins, netns, result)
    saved = changing.host.run([save, "-t", "filter"]).stdout
    assert [line for line in saved.splitlines() if f"{four}/32" in line] == [f"-A CNI-FORWARD -s {four}/32 -j LOG"]
    changing.host.run([save.removesuffix("-save"), "-D", "CNI-FORWARD", "-s", four, "-j", "LOG"])


def test_gc_takes_back_what_died(changing: Changing, netns: Netns) -> None:
    """The reference's GC frees nothing; iptables-legacy's chains wait for a DEL."""
    dead, elsewhere = changing.host.netns(), changing.host.netns()
    plugins = [BRIDGE, PORTMAP, FIREWALL]
    bare = [BRIDGE, {**PORTMAP, "runtimeConfig": {"portMappings": [OTHER]}}]
    lost = changing.attach(changing.theirs, plugins, dead)
    kept = changing.attach(changing.theirs, bare, netns)
    other = [{**BRIDGE, "bridge": "br1", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.3.0.0/16"}]]}}]
    foreign = changing.attach(changing.theirs, other, elsewhere, name="othernet")
    before = (changing.left(netns), changing.left(elsewhere, *addresses(foreign)))
    dead.delete()
    port = lost["interfaces"][1]["name"]
    wait_until(lambda: port not in changing.host.links(), "the end of the dead container's link")
    for _ in range(2):
        changing.collect(plugins, netns)
        # What firewall accepts names an address and nobody.
        rules = [line for line in changing.left(dead, *addresses(lost)) if "accept" not in line]
        assert rules == []
        assert (changing.left(netns), changing.left(elsewhere, *addresses(foreign))) == before
    changing.detach(changing.ours, plugins, dead, lost, path="")
    assert changing.left(dead, *addresses(lost)) == []
    changing.detach(changing.ours, bare, netns, kept)
    changing.detach(changing.ours, other, elsewhere, foreign, name="othernet")
    elsewhere.delete()


def test_isolation_of_a_bridge_that_is_gone(changing: Changing, netns: Netns) -> None:
    plugins = [{**BRIDGE, "bridge": "brgone"}, FIREWALL]
    result = changing.attach(changing.theirs, plugins, netns)
    changing.collect(plugins, netns)
    assert changing.left(netns, '"brgone"')
    changing.detach(changing.ours, plugins, netns, result)
    changing.host.run(["ip", "link", "delete", "brgone"])
    changing.collect(plugins)
    assert changing.left(netns, "brgone") == []


def test_an_add_of_ours_after_one_of_theirs(changing: Changing, netns: Netns) -> None:
    """podman's network reload: DEL by us, ADD by us, of a container that the reference attached."""
    plugins = [BRIDGE, PORTMAP]
    before = changing.attach(changing.theirs, plugins, netns)
    changing.detach(changing.ours, plugins, netns, before)
    after = changing.attach(changing.ours, plugins, netns)
    assert left_by_reference.chain_name("net", netns.name) not in changing.host.run(["nft", "list", "ruleset"]).stdout
    changing.detach(changing.ours, plugins, netns, after)
    assert changing.left(netns, *addresses(after)) == []
