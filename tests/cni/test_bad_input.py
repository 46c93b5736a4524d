"""What operators and runtimes get wrong: one table over all plugins.

Each ADD is refused with an error that names the field and the value, and the host, the container's namespace and
everything that holds addresses are as before. Then what goes wrong later: masters and bridges that vanish.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cni.registry import PLUGINS
from tests.cni.lab import FOUR, Lab, pool
from tests.hosts import CniCall, Host, Netns

pytestmark = pytest.mark.kernel

ANOTHER_KIND = "/proc/self/ns/mnt"
PLAIN = "/etc/hostname"
ROUTED = {**pool(FOUR), "routes": [{"dst": "0.0.0.0/0"}]}


@dataclass(frozen=True)
class Case:
    """A request that must be refused. `says`: what must stand in its message or details."""

    plugin: str
    keys: Mapping[str, Any]
    code: int
    says: tuple[str, ...]
    args: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    version: str = "1.0.0"
    after: bool = False  # whether the container has an interface already

    def __str__(self) -> str:
        return f"{self.plugin} {dict(self.keys)} {self.args} {dict(self.env)}"[:300]


def base(plugin: str) -> dict[str, Any]:
    """A configuration with which the plugin would be content."""
    address: Any = {"type": "static", "addresses": [{"address": "10.9.0.5/24", "gateway": "10.9.0.1"}]}
    known: dict[str, dict[str, Any]] = {
        "bridge": {"bridge": "br0", "ipam": address},
        "ptp": {"ipam": address},
        "macvlan": {"master": "up0", "ipam": address},
        "loopback": {},
        "ipamd": {"ipam": pool(FOUR)},
        "host-local": {"ipam": {"type": "host-local", "subnet": "10.8.0.0/24"}},
        "static": {"ipam": address},
        "tuning": {"mtu": 1400, "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}},
        "bandwidth": {"ingressRate": 10**7, "egressRate": 10**7},
        "firewall": {"ingressPolicy": "same-bridge"},
        "portmap": {"runtimeConfig": {"portMappings": [mapping()]}},
    }
    return known[plugin]


INTERFACE = ("bridge", "ptp", "macvlan")
CHAINED = tuple(name for name in ("tuning", "bandwidth", "firewall", "portmap") if name in PLUGINS)
IPAM = ("ipamd", "host-local", "static")


def mapping(**keys: Any) -> dict[str, Any]:
    return {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", **keys}


def ports(**keys: Any) -> dict[str, Any]:
    return {"runtimeConfig": {"portMappings": [mapping(hostPort=8081), mapping(**keys)]}}


def ranges(kind: str, *sets: Any) -> dict[str, Any]:
    return {"ipam": {"type": kind, "ranges": list(sets)}}


def subnet(cidr: str, start: str = "", end: str = "") -> dict[str, str]:
    return {"subnet": cidr, **({"rangeStart": start} if start else {}), **({"rangeEnd": end} if end else {})}


def of_masters() -> Iterator[Case]:
    for name, says in (("nowhere", "on the host"), ("lo", "Ethernet"), ("br0", "on the host")):
        yield Case("macvlan", {"master": name}, 7, ("$.master", f'"{name}"', says))
    yield Case("macvlan", {"master": "much-too-long-a-name"}, 7, ("$.master", "much-too-long-a-name"))
    yield Case(
        "macvlan", {"master": "nowhere", "linkInContainer": True}, 7, ("$.master", "nowhere", "in the container")
    )
    yield Case("macvlan", {"mode": "router"}, 7, ("$.mode", '"router"'))
    yield Case("bridge", {"bridge": "up0"}, 7, ("$.bridge", "up0"))
    yield Case("bridge", {"bridge": "a/b"}, 7, ("$.bridge", "a/b"))


def of_mtus() -> Iterator[Case]:
    yield Case("macvlan", {"mtu": 1501}, 7, ("$.mtu", "1501", "1500", "up0"))
    for plugin in ("bridge", "ptp", "macvlan", "tuning"):
        for mtu in (67, 70000, 2**31, -1):
            yield Case(plugin, {"mtu": mtu}, 7, ("$.mtu", str(mtu)), after=plugin == "tuning")


def of_macs() -> Iterator[Case]:
    for mac in ("01:00:5e:00:00:01", "02:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00:00:00", "x"):
        for plugin in ("bridge", "macvlan", "tuning"):
            after = plugin == "tuning"
            yield Case(plugin, {"runtimeConfig": {"mac": mac}}, 7, ("runtimeConfig.mac", mac), after=after)
            yield Case(plugin, {"args": {"cni": {"mac": mac}}}, 7, ("args.cni.mac", mac), after=after)
            yield Case(plugin, {}, 7, ("CNI_ARGS", "MAC", mac), args=f"MAC={mac}", after=after)
            if plugin != "bridge":
                yield Case(plugin, {"mac": mac}, 7, ("$.mac", mac), after=after)


def of_ranges() -> Iterator[Case]:
    for kind in ("host-local", "ipamd"):
        for sets, says in (
            ([[subnet("10.8.0.0/24")], [subnet("10.8.0.0/24")]], "10.8.0.1-10.8.0.254"),
            ([[subnet("10.8.0.0/24", "10.8.0.10", "10.8.0.20"), subnet("10.8.0.0/24", "10.8.0.20")]], "10.8.0.20"),
            ([[subnet("10.8.0.0/24", "10.8.0.9", "10.8.0.8")]], "10.8.0.9"),
            ([[subnet("10.8.0.0/24", "10.9.0.9")]], "10.9.0.9"),
            ([[subnet("10.8.0.1/24")]], "10.8.0.1/24"),
            ([[subnet("10.8.0.0/33")]], "10.8.0.0/33"),
            ([[subnet("10.8.0.0/24"), subnet("fd00::/64")]], "fd00::"),
            ([[]], ""),
        ):
            yield Case(kind, ranges(kind, *sets), 7, ("ranges", says))
            yield Case("bridge", ranges(kind, *sets), 7, ("ranges", says))
    for address in ("10.9.0.5", "10.9.0.5/33", "10.9.0/24", "x"):
        keys = {"ipam": {"type": "static", "addresses": [{"address": address}]}}
        for plugin in ("static", *INTERFACE):
            yield Case(plugin, keys, 7, ("$.ipam.addresses[0]", f'"{address}"'))


def of_named_sets() -> Iterator[Case]:
    """ipamd's own words for a place, and what they mean in the configuration."""
    bad = [subnet("10.8.0.0/24", "10.9.0.9")]
    keys: dict[str, Any] = {"ipam": {"type": "ipamd", "subnet": "10.7.0.0/24", "ranges": [bad]}}
    yield Case("ipamd", keys, 7, ("range_sets[1] is $.ipam.ranges[0];", "10.9.0.9"))
    keys = {"ipam": {"type": "ipamd", **bad[0]}}
    yield Case("ipamd", keys, 7, ("range_sets[0] is $.ipam.subnet;", "10.9.0.9"))
    keys = {"ipam": {"type": "ipamd", "subnet": "10.7.0.0/24"}, "runtimeConfig": {"ipRanges": [bad]}}
    yield Case("ipamd", keys, 7, ("range_sets[0] is $.runtimeConfig.ipRanges[0];", "10.9.0.9"))
    keys = {"ipam": {"type": "ipamd", "subnet": "10.7.0.0/24"}, "runtimeConfig": {"ipRanges": [[]]}}
    yield Case("ipamd", keys, 7, ("$.runtimeConfig.ipRanges[0]", "[]"))


def of_leases() -> Iterator[Case]:
    """What no interface can have, whoever gives it."""
    for plugin in INTERFACE:
        for addresses, says in (
            (["224.0.0.1/24"], ("ips[0].address", "224.0.0.1/24")),
            (["0.0.0.0/0"], ("ips[0].address", "0.0.0.0/0")),
            (["255.255.255.255/32"], ("ips[0].address", "255.255.255.255/32")),
            (["ff02::1/64"], ("ips[0].address", "ff02::1/64")),
            (["10.9.0.5/24", "10.9.0.5/16"], ("ips[1].address", "10.9.0.5/16", "once")),
            (["10.9.0.5/24 fd00::1"], ("ips[0].gateway", "fd00::1", "10.9.0.5/24")),
            (["10.9.0.5/24 224.0.0.1"], ("ips[0].gateway", "224.0.0.1")),
        ):
            listed = [dict(zip(("address", "gateway"), one.split(), strict=False)) for one in addresses]
            keys = {"ipam": {"type": "static", "addresses": listed}, "isGateway": True}
            yield Case(plugin, keys, 7, ("static", *says))
        for routes in (
            [{"dst": "192.0.2.0/24", "gw": "172.16.0.1"}],
            [{"dst": "192.0.2.0/24", "gw": "10.9.0.1"}, {"dst": "192.0.2.0/24", "gw": "10.9.0.1"}],
            [{"dst": "192.0.2.0/24", "gw": "fd00::1"}],
        ):
            keys = {"ipam": {**base(plugin)["ipam"], "routes": routes}}
            yield Case(plugin, keys, 7, ("route", "192.0.2.0/24", routes[0]["gw"]))
    for name in ("all", "default"):
        yield Case("bridge", {"bridge": name, "mtu": 1400}, 7, ("$.bridge", f'"{name}"'))
        for plugin in (*INTERFACE, *CHAINED):
            yield Case(plugin, {}, 4, ("CNI_IFNAME", f'"{name}"'), env={"CNI_IFNAME": name})


def of_long_names() -> Iterator[Case]:
    yield Case("host-local", {"name": 300 * "x"}, 7, ("$.name", "xxx", "too long"))
    for directory in ("/" + 300 * "x", 100 * "/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"):
        keys = {"ipam": {"type": "host-local", "subnet": "10.8.0.0/24", "dataDir": directory}}
        yield Case("host-local", keys, 7, ("$.ipam.dataDir", "/xxx", "too long"))
    keys = {"ipam": {"type": "host-local", "subnet": "10.8.0.0/24", "resolvConf": "/" + 5000 * "y"}}
    yield Case("host-local", keys, 7, ("$.ipam.resolvConf", "yyy", "too long"))
    yield Case("host-local", {"args": {"cni": {"ips": ["10.8.0"]}}}, 7, ("$.args.cni.ips", "10.8.0"))
    for plugin in ("bridge", "macvlan", "tuning"):
        yield Case(plugin, {}, 7, ("CNI_ARGS: MAC", "zzz"), args=f"MAC={5000 * 'z'}", after=plugin == "tuning")


def of_namespaces() -> Iterator[Case]:
    for plugin in (*INTERFACE, "loopback", *CHAINED):
        for path in (PLAIN, ANOTHER_KIND, "/run/netns/none", "/run", "netns", "/run/netns/\x7f"):
            shown = path.replace("\x7f", "\\x7f")
            yield Case(plugin, {}, 8, (shown, "CNI_NETNS"), env={"CNI_NETNS": path})
        yield Case(plugin, {}, 4, ("CNI_NETNS",), env={"CNI_NETNS": ""})


def of_names() -> Iterator[Case]:
    for plugin in INTERFACE:
        yield Case(plugin, {}, 4, ("CNI_IFNAME", "eth0"), after=True)
    for plugin in (*INTERFACE, "loopback", *CHAINED, *IPAM):
        yield Case(plugin, {}, 4, ("CNI_IFNAME", "a/b"), env={"CNI_IFNAME": "a/b"})
        yield Case(plugin, {}, 4, ("CNI_IFNAME", "0123456789abcdef"), env={"CNI_IFNAME": "0123456789abcdef"})
        yield Case(plugin, {}, 4, ("CNI_CONTAINERID", "../c"), env={"CNI_CONTAINERID": "../c"})
        yield Case(plugin, {"name": "a/b"}, 7, ("network name", "a/b"))
        yield Case(plugin, {}, 1, ("9.9.9",), version="9.9.9")


def of_results() -> Iterator[Case]:
    wrong: list[tuple[Any, tuple[str, ...]]] = [
        (None, ("prevResult",)),
        ({"cniVersion": "0.2.0", "ip4": {"ip": "10.9.0.5/24"}}, ("$.prevResult.cniVersion", '"0.2.0"')),
        ({"cniVersion": "0.3.1", "ips": []}, ("$.prevResult.cniVersion", '"0.3.1"')),
        ({"cniVersion": "9.9.9"}, ("$.prevResult.cniVersion", '"9.9.9"')),
        ({"cniVersion": 1}, ("$.prevResult.cniVersion", "1")),
        ({"ips": [{"address": "10.9.0.5"}]}, ("$.prevResult.ips[0].address", '"10.9.0.5"')),
        ({"ips": [{"address": "10.9.0.5/24", "interface": -1}]}, ("$.prevResult.ips[0].interface", "-1")),
        ({"ips": {}}, ("$.prevResult.ips", "{}")),
        ({"interfaces": [5]}, ("$.prevResult.interfaces[0]", "5")),
        ([], ("$.prevResult", "[]")),
        ("x", ("$.prevResult", '"x"')),
    ]
    # What a plugin needs and does not find. tuning needs nothing: it acts on the interface of CNI_IFNAME.
    needs = {"bandwidth": "port0", "firewall": "interfaces", "portmap": "$.prevResult.ips"}
    empty: list[dict[str, Any]] = [{}, {"interfaces": []}, {"ips": [{"address": "10.9.0.5/24"}]}]
    for plugin in CHAINED:
        for result, says in wrong:
            yield Case(plugin, {"prevResult": result}, 7, says, after=True)
        for result in empty if plugin in needs else ():
            if plugin != "portmap" or "ips" not in result:
                for version in ({}, {"cniVersion": "1.0.0"}):
                    keys = {"prevResult": {**result, **version}}
                    yield Case(plugin, keys, 7, ("prevResult", needs[plugin]), after=True)


def of_ports() -> Iterator[Case]:
    wrong: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"protocol": "icmp"}, ("protocol", '"icmp"')),
        ({"protocol": ""}, ("protocol", '""')),
        ({"hostIP": "10.0.0"}, ("hostIP", '"10.0.0"')),
        ({"hostIP": "224.0.0.1"}, ("hostIP", '"224.0.0.1"')),
        ({"hostPort": 8081, "containerPort": 81}, ("hostPort", "8081", "portMappings[0]")),
    ]
    for key in ("hostPort", "containerPort"):
        wrong += [({key: port}, (f"].{key}:", str(port))) for port in (0, 65536, -1, 2**40)]
        wrong += [
            ({key: port}, (f"].{key}:", shown)) for port, shown in (("80", '"80"'), (80.5, "80.5"), (True, "true"))
        ]
    for keys, says in wrong:
        yield Case("portmap", ports(**keys), 7, ("$.runtimeConfig.portMappings[1]", *says), after=True)
    yield Case("portmap", {"runtimeConfig": {"portMappings": {}}}, 7, ("portMappings", "{}"), after=True)
    for protocol in ("tcp", "udp"):
        keys = ports(hostPort=7000, protocol=protocol)
        yield Case("portmap", keys, 103, ("hostPort", "7000", "python"), after=True)


ALL = (
    of_masters,
    of_mtus,
    of_macs,
    of_ranges,
    of_named_sets,
    of_leases,
    of_long_names,
    of_namespaces,
    of_names,
    of_results,
    of_ports,
)
CASES = [case for some in ALL for case in some() if case.plugin in PLUGINS]


@pytest.fixture
def floor(lab: Lab) -> Iterator[Host]:
    """The host with a master for macvlans, and a process that has port 7000 of TCP and UDP."""
    lab.host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1"])
    listener = lab.host.popen([sys.executable, "-I", "-S", "-c", _LISTEN], stdout=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "ready\n"
    yield lab.host
    listener.kill()
    listener.wait()
    lab.host.run(["ip", "link", "delete", "up0"])


_LISTEN = """
import socket, time
tcp = socket.create_server(("0.0.0.0", 7000))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 7000))
print("ready", flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def pair(host: Host, netns: Netns) -> Iterator[None]:
    """An interface eth0 whose other end is port0. With the namespace alone it would go some time later."""
    host.run(["ip", "link", "add", "port0", "type", "veth", "peer", "name", "eth0", "netns", netns.name])
    try:
        yield
    finally:
        host.run(["ip", "link", "delete", "port0"])


def within(netns: Netns) -> Any:
    links = netns.links()
    return {name: (one.get("address"), one["mtu"], one["flags"]) for name, one in links.items()}, netns.addresses()


def ask(lab: Lab, case: Case, netns: Netns, verb: str = "ADD", **more: Any) -> CniCall:
    previous = {
        "cniVersion": case.version,
        "interfaces": [{"name": "port0"}, {"name": "eth0", "sandbox": netns.path}],
        "ips": [{"address": "10.9.0.5/24", "interface": 1}],
    }
    conf = {"cniVersion": case.version, "name": "net", "type": case.plugin, **base(case.plugin)}
    if case.plugin in CHAINED:
        conf["prevResult"] = previous
    conf = {**conf, **case.keys, **more}
    return lab.cni(verb, case.plugin, conf, netns=netns, args=case.args, env=case.env)


@pytest.mark.usefixtures("floor")
@pytest.mark.parametrize("plugin", sorted({case.plugin for case in CASES}))
def test_what_is_refused(lab: Lab, plugin: str) -> None:
    with lab.space() as empty, lab.space() as taken, pair(lab.host, taken):
        spaces = {False: (empty, within(empty)), True: (taken, within(taken))}
        before = lab.host.snapshot()
        problems = []
        for case in CASES:
            if case.plugin != plugin:
                continue
            netns, inside = spaces[case.after]
            answer = ask(lab, case, netns)
            if answer.status != 1 or not answer.json:
                problems.append(f"{case}: {answer.stdout} {answer.stderr}")
                ask(lab, case, netns, "DEL")
                continue
            text = f"{answer.json['msg']} {answer.json.get('details', '')}"
            missing = [word for word in case.says if word not in text]
            if case.code != answer.json["code"] or missing or "Traceback" in answer.stderr:
                problems.append(f"{case}: wanted {case.code} and {missing} in {answer.json} {answer.stderr}")
            if len(answer.stdout) > 2000:
                problems.append(f"{case}: {len(answer.stdout)} bytes of error")
            if not (case.after and plugin in INTERFACE):  # without a record the interface of that name is what goes
                gone = ask(lab, case, netns, "DEL")
                if gone.status and case.code not in (1, 4) and "name" not in case.keys:
                    problems.append(f"{case}: DEL fails: {gone.stdout}")
            if within(netns) != inside:
                problems.append(f"{case}: the namespace is not as before")
        lab.host.assert_clean(before, keep=("br0",))  # shared by all containers: it was in order, and stays
        assert not problems, "\n".join(problems)
        # And what all of them are variations of is taken.
        good = Case(plugin, {"ingressPolicy": "open"} if plugin == "firewall" else {}, 0, ())
        netns = taken if plugin in CHAINED else empty
        ask(lab, good, netns).ok()
        ask(lab, good, netns, "DEL").ok()
        lab.host.run(["rm", "-rf", "/var/lib/cni/networks", "/run/netloom/host-local"])


def test_routes_that_the_kernel_sees_otherwise(lab: Lab) -> None:
    """It cuts large numbers, and has a name of its own for table 0; CHECK knows."""
    routes = [
        {"dst": "192.0.2.0/26", "mtu": 2**31, "advmss": 2**32 - 1},
        {"dst": "192.0.2.64/26", "table": 0},
        {"dst": "192.0.2.128/26", "mtu": 1},
    ]
    conf = {"cniVersion": "1.0.0", "name": "net", "type": "ptp", **base("ptp")}
    conf["ipam"]["routes"] = routes
    with lab.attached(conf, "ptp") as one:
        one.check()
        one.netns.run(["ip", "route", "delete", "192.0.2.0/26"])
        assert "192.0.2.0/26" in one.broken()


# What vanishes while a container runs


@pytest.mark.usefixtures("floor")
@pytest.mark.parametrize(
    ("plugin", "command", "says"),
    [
        ("macvlan", "ip link delete up0", "up0"),
        ("bridge", "ip link delete br0", "br0"),
        ("ptp", "ip link delete {end}", "eth0"),
    ],
)
def test_masters_that_vanish(lab: Lab, plugin: str, command: str, says: str) -> None:
    """CHECK names what is gone; DEL and a new ADD succeed as soon as they can; addresses come back."""
    conf = {"cniVersion": "1.0.0", "name": "net", "type": plugin, **base(plugin), "ipam": pool(FOUR)}
    with lab.space() as netns:
        before = lab.host.snapshot()
        result = lab.cni("ADD", plugin, conf, netns=netns).result()
        (end,) = [one["name"] for one in result["interfaces"] if one["name"].startswith("veth")] or [""]
        lab.host.run(command.format(end=end).split())
        answer = lab.cni("CHECK", plugin, {**conf, "prevResult": result}, netns=netns)
        assert answer.code() == 999
        assert says in answer.json["msg"]
        if plugin == "macvlan":
            answer = lab.cni("ADD", plugin, conf, netns=netns, container_id="c2")
            assert (answer.code(), "$.master" in answer.json["msg"]) == (7, True)
            lab.cni("DEL", plugin, conf, netns=netns, container_id="c2").ok()
        lab.cni("DEL", plugin, {**conf, "prevResult": result}, netns=netns).ok()
        assert set(netns.links()) == {"lo"}
        if plugin == "macvlan":
            lab.host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1"])
        lab.host.assert_clean(before, keep=lab.bridges())
        lab.cni("ADD", plugin, conf, netns=netns).ok()
        lab.cni("DEL", plugin, conf, netns=netns).ok()


@pytest.mark.usefixtures("floor")
def test_an_mtu_over_the_masters_after_macvlan(lab: Lab) -> None:
    conf = {"cniVersion": "1.0.0", "name": "net", "type": "macvlan", **base("macvlan")}
    with lab.attached(conf, "macvlan") as one:
        tuning = {**conf, "type": "tuning", "mtu": 1501, "prevResult": one.result}
        inside = within(one.netns)
        answer = lab.cni("ADD", "tuning", tuning, netns=one.netns, container_id=one.container_id)
        assert answer.code() == 7
        assert "$.mtu" in answer.json["msg"]
        assert "1501" in answer.json["msg"]
        assert within(one.netns) == inside
