"""macvlan: each verb in each spec version, each key and mode, in a real host with a segment: what is printed, what the
kernel has, what a packet does, and that DEL puts everything back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from ipaddress import ip_address
from typing import Any

import pytest

from cni.interface import macvlan
from cni.request import parse
from cni.undo import Undo
from cni.versions import SUPPORTED
from kernel import link, netns
from kernel.errors import Exists
from kernel.link import MacvlanSpec
from kernel.netlink import Message
from kernel.session import Session
from tests.cni.interface import reference
from tests.cni.lab import WITH_CHECK, Capture, Lab, ethernet, mac_bytes, pool, send, unreachable
from tests.hosts import IPV6, Host, Netns, wait_until

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
FAMILIES = 2 if IPV6 else 1
MASTER = "up0"
NETS = ["192.168.7.0/24", "fd07::/64"][:FAMILIES]
GATEWAYS = ["192.168.7.1", "fd07::1"][:FAMILIES]
DEFAULTS = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}][:FAMILIES]
MODES = ("bridge", "private", "vepa", "passthru")


@pytest.fixture(scope="module")
def segment(module_lab: Lab) -> Iterator[Netns]:
    """A neighbour on the segment of the host's interface up0; it is everybody's gateway."""
    host = module_lab.host
    netns = host.netns("segment")
    host.run(["ip", "link", "add", MASTER, "type", "veth", "peer", "name", "eth0", "netns", netns.name])
    host.run(["ip", "link", "set", MASTER, "up"])
    for address in ("192.168.7.1/24", "fd07::1/64")[:FAMILIES]:
        netns.run(["ip", "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else [])])
    netns.run(["ip", "link", "set", "eth0", "up"])
    yield netns
    host.run(["ip", "link", "delete", MASTER])
    netns.delete()


@pytest.fixture
def lab(segment: Netns, module_lab: Lab) -> Iterator[Lab]:
    """The module's host with its segment, which each test must leave as it found it."""
    before = module_lab.host.snapshot()
    yield module_lab
    module_lab.tidy(before)


def conf_of(version: str = "1.1.0", name: str = "lan", **keys: Any) -> dict[str, Any]:
    ipam = {**pool(*NETS), "routes": DEFAULTS}
    return {"cniVersion": version, "name": name, "type": "macvlan", "master": MASTER, "ipam": ipam, **keys}


def layer2(**keys: Any) -> dict[str, Any]:
    conf = conf_of(**keys)
    del conf["ipam"]
    return conf


def refused(lab: Lab, conf: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An ADD that must fail, and leave nothing; its error object."""
    with lab.space() as netns:
        before = lab.host.snapshot()
        answer = lab.cni("ADD", "macvlan", conf, netns=netns, **more)
        assert answer.code() > 0
        lab.host.assert_clean(before)
        assert set(netns.links()) == {"lo"}
    error: dict[str, Any] = answer.json
    return error


def data(netns: Netns, name: str = "eth0") -> dict[str, Any]:
    found: dict[str, Any] = netns.links()[name]["linkinfo"]["info_data"]
    return found


def sysctl(where: Host | Netns, name: str) -> str:
    return where.run(["cat", f"/proc/sys/net/{name}"]).stdout.strip()


def mac_of(result: dict[str, Any]) -> str:
    return str(result["interfaces"][0]["mac"])


# Each verb in each version


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    host = lab.host
    dns = {"nameservers": ["192.0.2.53"], "search": ["example"]}
    conf = conf_of(version, mtu=1400, bcqueuelen=77, dns=dns)
    before = host.snapshot()
    with lab.space() as netns:
        result = lab.cni("ADD", "macvlan", conf, netns=netns).result()

        # What is printed.
        assert (result["cniVersion"], result["dns"]) == (version, dns)
        inside = netns.links()
        if version in ("0.1.0", "0.2.0"):
            assert set(result) == {"cniVersion", "ip4", "dns"} | ({"ip6"} if IPV6 else set())
            assert result["ip4"]["gateway"] == GATEWAYS[0]
            addresses = [result[key]["ip"] for key in ("ip4", "ip6")[:FAMILIES]]
        else:
            mac = inside["eth0"]["address"]
            assert result["interfaces"] == [{"name": "eth0", "mac": mac, "sandbox": netns.path}]
            assert [one["interface"] for one in result["ips"]] == [0] * FAMILIES
            assert [one["gateway"] for one in result["ips"]] == GATEWAYS
            assert [one.get("version") for one in result["ips"]] == (
                [None] * FAMILIES if version in ("1.0.0", "1.1.0") else ["4", "6"][:FAMILIES]
            )
            assert result["routes"] == DEFAULTS
            addresses = [one["address"] for one in result["ips"]]

        # What the kernel has; on the host nothing.
        assert [
            fact for fact in host.snapshot().minus(before) if not fact.startswith(("allocation", "file /run/netns"))
        ] == []
        assert set(inside) == {"lo", "eth0"}
        assert (inside["eth0"]["mtu"], "UP" in inside["eth0"]["flags"]) == (1400, True)
        assert (data(netns)["mode"], data(netns)["bcqueuelen"]) == ("bridge", 77)
        assert inside["eth0"]["link_index"] == host.links()[MASTER]["ifindex"]
        assert netns.addresses()["eth0"] == addresses
        assert [one["gateway"] for one in netns.routes() if one["dst"] == "default"] == GATEWAYS
        assert sysctl(netns, "ipv4/conf/eth0/arp_notify") == "1"
        if IPV6:
            assert sysctl(netns, "ipv6/conf/eth0/ndisc_notify") == "1"
        for gateway in GATEWAYS:
            assert netns.ping(gateway) > 0

        # The other verbs.
        with_result = {**conf, "prevResult": result}
        answer = lab.cni("CHECK", "macvlan", with_result, netns=netns)
        assert (answer.stdout, answer.status) == ("", 0) if version in WITH_CHECK else answer.code() == 1
        valid = [{"containerID": "c1", "ifname": "eth0"}]
        for verb, more in (("GC", {"cni.dev/valid-attachments": valid}), ("STATUS", {})):
            answer = lab.cni(verb, "macvlan", {**conf, **more})
            assert (answer.stdout, answer.status) == ("", 0) if version == "1.1.0" else answer.code() == 1
        assert netns.ping(GATEWAYS[0]) > 0
        answer = lab.cni("DEL", "macvlan", with_result if version in WITH_CHECK else conf, netns=netns)
        answer.ok()
        assert answer.stdout == ""
        assert set(netns.links()) == {"lo"}
        lab.cni("DEL", "macvlan", conf, netns=netns).ok()
    host.assert_clean(before)


def test_as_a_process(lab: Lab) -> None:
    with lab.space() as netns:
        conf = conf_of("1.0.0")
        assert lab.host.cni("VERSION", "macvlan", b"").json["supportedVersions"] == list(SUPPORTED)
        result = lab.host.cni("ADD", "macvlan", conf, netns=netns).result()
        assert netns.ping(GATEWAYS[0]) > 0
        lab.host.cni("CHECK", "macvlan", {**conf, "prevResult": result}, netns=netns).ok()
        lab.host.cni("DEL", "macvlan", conf, netns=netns).ok()


@pytest.mark.parametrize("version", SUPPORTED)
def test_layer_2_alone(lab: Lab, version: str) -> None:
    conf = layer2(version=version)
    if version in ("0.1.0", "0.2.0"):
        # A result of that version needs an address; nothing of the attempt is left.
        assert refused(lab, conf)["msg"] == "cannot convert: no valid IP addresses"
        return
    with lab.attached(conf, "macvlan") as one:
        assert set(one.result) - {"dns"} == {"cniVersion", "interfaces"} or one.result.get("ips") == []
        assert "UP" in one.netns.links()["eth0"]["flags"]
        assert one.netns.addresses()["eth0"] == []
        if version in WITH_CHECK:
            one.check()


# Packets


@pytest.mark.parametrize("mode", MODES)
def test_who_reaches_whom(lab: Lab, segment: Netns, mode: str) -> None:
    conf = conf_of(mode=mode)
    with lab.attached(conf, "macvlan") as one:
        assert data(one.netns)["mode"] == mode
        for gateway in GATEWAYS:
            assert one.netns.ping(gateway) > 0
        for version in (4, 6)[:FAMILIES]:
            assert segment.ping(one.ip(version)) > 0
        one.check()
        if mode == "passthru":
            error = refused(lab, conf)
            assert (error["code"], "$.mode: want a mode that master up0" in error["msg"]) == (7, True)
            assert 'found "passthru"' in error["msg"]
            assert refused(lab, conf_of(mode="bridge"))["code"] == 7
            return
        assert "$.mode" in refused(lab, conf_of(mode="passthru"))["msg"]
        with lab.attached(conf, "macvlan") as two:
            if mode == "bridge":
                for version in (4, 6)[:FAMILIES]:
                    assert one.netns.ping(two.ip(version)) > 0
                    assert two.netns.ping(one.ip(version)) > 0
            else:
                # No switch on this segment sends a frame back to where it came from.
                assert unreachable(one.netns, two.ip())
            assert two.netns.ping(GATEWAYS[0]) > 0


def test_the_segment_hears_of_a_new_container(lab: Lab, segment: Netns) -> None:
    with Capture(segment) as seen, lab.attached(conf_of(), "macvlan") as one:
        mac, packed = mac_bytes(mac_of(one.result)), ip_address(one.ip()).packed
        arp = (b"\xff" * 6 + mac + b"\x08\x06", mac + packed, packed)
        wait_until(lambda: seen.has(*arp), "gratuitous ARP", lambda: str(seen.frames()))
        if IPV6:
            told = ip_address(one.ip(6)).packed + b"\x02\x01" + mac
            wait_until(lambda: seen.has(b"\x33\x33\x00\x00\x00\x01" + mac, told), "an unsolicited advertisement")


def test_frames_leave_under_the_own_mac(lab: Lab, segment: Netns) -> None:
    with lab.attached(layer2(mac="02:00:00:00:00:07"), "macvlan") as one, Capture(segment) as seen:
        send(one.netns, ethernet("02:00:00:00:00:07", b"hello"))
        wait_until(lambda: seen.has(mac_bytes("02:00:00:00:00:07"), b"hello"), "the frame")


# Master


def test_the_default_routes_interface(lab: Lab) -> None:
    conf = conf_of()
    del conf["master"]
    error = refused(lab, conf)
    assert (error["code"], "$.master: want a name" in error["msg"]) == (7, True)
    assert lab.cni("STATUS", "macvlan", conf).code() == 50
    lab.host.run(["ip", "link", "add", "worse0", "type", "veth", "peer", "name", "worse1"])
    try:
        lab.host.run(["ip", "link", "set", "worse0", "up"])
        lab.host.run(["ip", "route", "add", "default", "dev", "worse0", "metric", "500"])
        lab.host.run(["ip", "route", "add", "default", "dev", MASTER, "metric", "100"])
        lab.cni("STATUS", "macvlan", conf).ok()
        with lab.attached(conf, "macvlan") as one:
            assert one.netns.links()["eth0"]["link_index"] == lab.host.links()[MASTER]["ifindex"]
            # By now another one has it; that breaks nothing.
            lab.host.run(["ip", "route", "delete", "default", "dev", MASTER])
            one.check()
    finally:
        lab.host.run(["ip", "link", "delete", "worse0"])
        lab.host.run(["ip", "route", "flush", "dev", MASTER])


@needs_ipv6
def test_an_ipv6_default_route(lab: Lab) -> None:
    lab.host.run(["ip", "-6", "route", "add", "default", "dev", MASTER])
    try:
        with lab.attached(conf_of(master=""), "macvlan") as one:
            assert one.netns.ping(GATEWAYS[0]) > 0
    finally:
        lab.host.run(["ip", "-6", "route", "delete", "default", "dev", MASTER])


def test_a_master_inside_the_container(lab: Lab, segment: Netns) -> None:
    conf = conf_of(master="in0", linkInContainer=True, mac="02:00:00:00:00:0c")
    with lab.space() as netns:
        lab.host.run(["ip", "link", "add", "out0", "type", "veth", "peer", "name", "in0", "netns", netns.name])
        netns.run(["ip", "link", "set", "in0", "up"])
        before = lab.host.snapshot()
        result = lab.cni("ADD", "macvlan", conf, netns=netns).result()
        eth = netns.links()["eth0"]
        assert eth["link"] == "in0"
        assert mac_of(result) == "02:00:00:00:00:0c"
        with_result = {**conf, "prevResult": result}
        lab.cni("CHECK", "macvlan", with_result, netns=netns).ok()
        lab.cni("STATUS", "macvlan", conf).ok()
        # Taken as if the host's interface of that name were meant: another master.
        answer = lab.cni("CHECK", "macvlan", {**with_result, "linkInContainer": False, "master": MASTER}, netns=netns)
        assert "another master" in answer.json["msg"]
        assert lab.cni("ADD", "macvlan", conf, netns=netns).code() == 4
        lab.cni("DEL", "macvlan", conf, netns=netns).ok()
        assert set(netns.links()) == {"lo", "in0"}
        assert lab.cni("ADD", "macvlan", {**conf, "master": MASTER}, netns=netns).code() == 7
        lab.host.run(["ip", "link", "delete", "out0"])
        assert before.minus(lab.host.snapshot())


def test_a_master_inside_by_its_default_route(lab: Lab) -> None:
    conf = layer2(master="", linkInContainer=True)
    with lab.space() as netns:
        lab.host.run(["ip", "link", "add", "out0", "type", "veth", "peer", "name", "in0", "netns", netns.name])
        netns.run(["ip", "link", "set", "in0", "up"])
        assert "in the container" in lab.cni("ADD", "macvlan", conf, netns=netns).json["msg"]
        netns.run(["ip", "route", "add", "default", "dev", "in0"])
        lab.cni("ADD", "macvlan", conf, netns=netns).ok()
        assert data(netns)["mode"] == "bridge"
        lab.cni("DEL", "macvlan", conf, netns=netns).ok()
        lab.host.run(["ip", "link", "delete", "out0"])


def test_a_macvlan_on_a_macvlan(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "mv0", "link", MASTER, "type", "macvlan", "mode", "bridge"])
    try:
        with lab.attached(layer2(master="mv0"), "macvlan") as one:
            one.check()
    finally:
        lab.host.run(["ip", "link", "delete", "mv0"])


def test_a_master_that_goes(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "gone0", "type", "veth", "peer", "name", "gone1"])
    lab.host.run(["ip", "link", "set", "gone0", "up"])
    with lab.attached(conf_of(master="gone0"), "macvlan") as one:
        lab.host.run(["ip", "link", "delete", "gone0"])
        assert set(one.netns.links()) == {"lo"}
        assert one.broken() == "CHECK: master gone0 is gone"
        # DEL, at the end of the block, gives the addresses back; the fixture looks whether it did.


def test_passthru_takes_a_mac_and_gives_the_masters_back(lab: Lab) -> None:
    own = lab.host.links()[MASTER]["address"]
    with lab.attached(conf_of(mode="passthru"), "macvlan") as one:
        assert mac_of(one.result) == own
        assert one.netns.ping(GATEWAYS[0]) > 0
    with lab.attached(conf_of(mode="passthru", mac="02:00:00:00:00:0e"), "macvlan") as one:
        assert mac_of(one.result) == "02:00:00:00:00:0e" == lab.host.links()[MASTER]["address"]
        assert one.netns.ping(GATEWAYS[0]) > 0
        one.check()
    assert lab.host.links()[MASTER]["address"] == own


# Names


def test_a_name_that_the_host_has_too(lab: Lab) -> None:
    with lab.attached(conf_of(), "macvlan", ifname=MASTER) as one:
        assert set(one.netns.links()) == {"lo", MASTER}
        assert one.netns.ping(GATEWAYS[0]) > 0
        one.check()


def test_a_second_add_is_refused_and_harms_nothing(lab: Lab) -> None:
    with lab.attached(conf_of(), "macvlan") as one:
        before = lab.host.snapshot()
        answer = one.call("ADD")
        assert (answer.code(), "CNI_IFNAME eth0" in answer.json["msg"]) == (4, True)
        lab.host.assert_clean(before)
        one.check()


class OlderKernel:
    """rtnetlink of a host as kernels before 6.15 answer: a link of the host is in the way of a container's."""

    def __init__(self, real: Any, name: str) -> None:
        self._real = real
        self._name = name
        self.sent: list[str] = []

    def execute(self, messages: Sequence[Message]) -> None:
        self.sent += [message.what for message in messages]
        if any(message.what.startswith(f"add macvlan {self._name} ") for message in messages):
            raise Exists("add macvlan", 17)
        self._real.execute(messages)


@dataclasses.dataclass
class OlderHost:
    """A Session on such a kernel, as far as a macvlan's birth needs one."""

    real: Session
    rtnl: Any

    def visit(self, where: netns.Netns) -> Any:
        return self.real.visit(where)


# Births with a host's link in the way, in this process: its own namespace is a private one of the test.
_BIRTH = """
import os, sys
sys.path.insert(0, os.getcwd())
from tests.cni.interface.test_macvlan import birth
birth(sys.argv[1], sys.argv[2] == "taken")
"""


def birth(path: str, taken: bool) -> None:
    """Runs `_make` as on an older kernel, then its undo. `taken`: the container's name goes to somebody else."""
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": path, "CNI_IFNAME": "eth0"}
    stdin = b'{"cniVersion": "1.1.0", "name": "lan", "type": "macvlan"}'
    request = parse(
        {**environment, "CNI_PATH": "/"}, stdin, plugin="macvlan", supported=SUPPORTED, request_id="0" * 16, began_ns=0
    )
    with Session() as session, netns.opened(path) as sandbox, session.visit(sandbox) as inside:
        host: Any = OlderHost(session, OlderKernel(session.rtnl, "eth0"))
        master = link.get(session, MASTER)
        spec = MacvlanSpec("eth0", master.index, "bridge", sandbox.fd, mac="02:00:00:00:00:01")
        with Undo() as undo:
            if taken:
                other = dataclasses.replace(spec, mac="02:00:00:00:00:02")
                link.add_macvlan(session, other)
            outcome = _outcome(partial(macvlan._make, request, host, inside, spec, undo))
            print(outcome, *sorted(one.name for one in link.all_links(inside)))
        print(*sorted(one.name for one in link.all_links(inside)))
        if taken:
            link.delete(inside, "eth0")


def _outcome(step: Any) -> str:
    try:
        step()
    except Exception as error:
        return type(error).__name__
    return "made"


@pytest.mark.parametrize(("how", "printed"), [("free", "made eth0 lo\nlo"), ("taken", None)])
def test_the_host_has_the_name_on_an_older_kernel(lab: Lab, how: str, printed: str | None) -> None:
    with lab.space() as space:
        found = lab.host.run([sys.executable, "-c", _BIRTH, space.path, how]).stdout.strip()
        if printed is not None:
            assert found == printed
        else:
            first, last = found.split("\n")
            assert first.startswith("CniError eth0 lo nl")
            # Undo removes the one under the temporary name, and leaves what is somebody else's.
            assert last == "eth0 lo"


# MAC


@pytest.mark.parametrize(
    ("capability", "args", "key", "expected"),
    [
        ("02:00:00:00:00:01", "MAC=02:00:00:00:00:03", "02:00:00:00:00:04", "02:00:00:00:00:01"),
        ("", "MAC=02:00:00:00:00:03", "02:00:00:00:00:04", "02:00:00:00:00:03"),
        ("", "", "02-00-00-00-00-0A", "02:00:00:00:00:0a"),
        ("", "IgnoreUnknown=1;MAC=02:00:00:00:00:03;K8S_POD_NAME=x", "", "02:00:00:00:00:03"),
    ],
)
def test_where_a_mac_comes_from(lab: Lab, capability: str, args: str, key: str, expected: str) -> None:
    conf = layer2(mac=key)
    if capability:
        conf["runtimeConfig"] = {"mac": capability}
    with lab.attached(conf, "macvlan", args=args) as one:
        assert mac_of(one.result) == one.netns.links()["eth0"]["address"] == expected
        one.check()


def test_bad_macs(lab: Lab) -> None:
    for mac in ("nonsense", "01:00:00:00:00:01", "00:00:00:00:00:00", "02:00", "02:00:00:00:00:00:00:01"):
        for where, keys in (("$.mac", {"mac": mac}), ("$.runtimeConfig.mac", {"runtimeConfig": {"mac": mac}})):
            error = refused(lab, conf_of(**keys))
            assert (error["code"], where in error["msg"], mac in error["msg"]) == (7, True, True)


def test_a_mac_that_is_taken_on_the_master(lab: Lab) -> None:
    with lab.attached(conf_of(mac="02:00:00:00:00:0b"), "macvlan") as one:
        error = refused(lab, conf_of(mac="02:00:00:00:00:0b"))
        assert (error["code"], "02:00:00:00:00:0b is in use on master up0" in error["msg"]) == (7, True)
        one.check()


# Bad input


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"master": "nothing0"}, ("$.master", '"nothing0"', "on the host")),
        ({"master": "lo"}, ("$.master", '"lo"', "Ethernet")),
        ({"master": "a/b"}, ("$.master", '"a/b"')),
        ({"master": "br%d"}, ("$.master", '"br%d"')),
        ({"master": 5}, ("$.master", "5")),
        ({"mode": "source"}, ("$.mode", '"source"', "passthru")),
        ({"mtu": 1501}, ("$.mtu", "1501", "1500", "up0")),
        ({"mtu": -1}, ("$.mtu", "-1")),
        ({"mtu": 20}, ("$.mtu", "found 20", "68 to 1500")),
        ({"bcqueuelen": -1}, ("$.bcqueuelen",)),
        ({"bcqueuelen": 2**32}, ("$.bcqueuelen",)),
        ({"linkInContainer": True}, ("$.master", '"up0"', "in the container")),
    ],
)
def test_configurations_that_are_wrong(lab: Lab, keys: dict[str, Any], words: tuple[str, ...]) -> None:
    error = refused(lab, conf_of(**keys))
    assert error["code"] == 7
    assert all(word in error["msg"] for word in words), error


def test_a_master_that_is_a_bridges_port(lab: Lab) -> None:
    lab.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    lab.host.run(["ip", "link", "add", "port0", "type", "veth", "peer", "name", "port1"])
    lab.host.run(["ip", "link", "set", "port0", "master", "br0"])
    error = refused(lab, conf_of(master="port0"))
    assert (error["code"], "$.master" in error["msg"], '"port0"' in error["msg"]) == (7, True, True)
    lab.host.run(["ip", "link", "delete", "port0"])


# CHECK


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ip link delete eth0", "eth0 is gone"),
        ("ip link set eth0 down", "eth0 of the container is down"),
        ("ip link set eth0 address 02:00:00:00:00:09", "has the MAC 02:00:00:00:00:09"),
        ("ip link set eth0 type macvlan mode private", "has the mode private, not bridge"),
        ("ip link set eth0 type macvlan bcqueuelen 9", "has a bcqueuelen of 9, not 77"),
        ("ip route delete default", "the route to 0.0.0.0/0"),
        ("ip address flush dev eth0", "lacks the address"),
    ],
)
def test_check_finds(lab: Lab, command: str, says: str) -> None:
    with lab.attached(conf_of(bcqueuelen=77), "macvlan") as one:
        one.check()
        one.netns.run(command.split())
        assert says in one.broken()


# DEL, GC and STATUS


def test_del_needs_neither_namespace_nor_master_nor_configuration(lab: Lab) -> None:
    conf = conf_of()
    for change in ({}, {"master": "nothing0"}, {"mode": "nonsense", "mtu": -1}):
        with lab.space() as netns:
            before = lab.host.snapshot()
            lab.cni("ADD", "macvlan", conf, netns=netns).ok()
            lab.cni("DEL", "macvlan", {**conf, **change}, netns=netns).ok()
            lab.host.assert_clean(before)
            assert set(netns.links()) == {"lo"}
    before = lab.host.snapshot()
    for path in ("", "/run/netns/gone", "/etc/passwd"):
        with lab.space() as netns:
            lab.cni("ADD", "macvlan", conf, netns=netns).ok()
        lab.cni("DEL", "macvlan", conf, netns=path).ok()
        lab.host.assert_clean(before)


def test_gc_frees_the_addresses_of_the_dead(lab: Lab) -> None:
    conf = conf_of()
    with lab.attached(conf, "macvlan") as living:
        before = lab.host.snapshot()
        with lab.space() as netns:
            lab.cni("ADD", "macvlan", conf, netns=netns, container_id="dead").ok()
        assert len(lab.host.allocations()) == 2
        valid = [{"containerID": living.container_id, "ifname": "eth0"}]
        lab.cni("GC", "macvlan", {**conf, "cni.dev/valid-attachments": valid}).ok()
        lab.host.assert_clean(before)
        living.check()
    lab.cni("GC", "macvlan", {**layer2(), "cni.dev/valid-attachments": []}).ok()


def test_status(lab: Lab) -> None:
    lab.cni("STATUS", "macvlan", conf_of()).ok()
    for keys, word in (({"master": "nothing0"}, "nothing0"), ({"master": "lo"}, '"lo"'), ({"mtu": 9000}, "9000")):
        answer = lab.cni("STATUS", "macvlan", conf_of(**keys))
        assert (answer.code(), word in answer.json["msg"]) == (50, True)
    script = lab.scripted()
    script.does("STATUS", "exit 1", {"code": 50, "msg": "no addresses"})
    assert lab.cni("STATUS", "macvlan", conf_of(ipam={"type": "scripted"})).json["msg"] == "no addresses"


# Faults


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, when: str) -> None:
    conf = conf_of(mac="02:00:00:00:00:0d")
    with lab.space() as netns:
        called = lab.cni("ADD", "macvlan", conf, netns=netns).calls
        lab.cni("DEL", "macvlan", conf, netns=netns).ok()
        assert len(called) > 12
        before = lab.host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 or label == "allocate" else "signal"
            answer = lab.cni("ADD", "macvlan", conf, netns=netns, faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            if when == "after" and label in ("allocate", "read the namespace's cookie"):
                # Before we know of the answer nobody but the runtime can give the address back.
                lab.cni("DEL", "macvlan", conf, netns=netns).ok()
            try:
                lab.host.assert_clean(before)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
            assert set(netns.links()) == {"lo"}, label
        lab.cni("ADD", "macvlan", conf, netns=netns).ok()
        lab.cni("DEL", "macvlan", conf, netns=netns).ok()


# Beside the reference


@reference.needs_reference
@pytest.mark.parametrize(
    ("version", "addresses", "keys"),
    [
        ("0.3.1", ["192.168.7.50/24 192.168.7.1"], {"mac": "02:00:00:00:00:0f"}),
        # Not bcqueuelen, which Debian's version does not know.
        ("0.4.0", ["192.168.7.50/24 192.168.7.1"], {"mode": "private", "mtu": 1400}),
        ("1.0.0", ["192.168.7.50/24"], {"mode": "vepa", "dns": {"nameservers": ["192.0.2.1"]}}),
        ("1.0.0", [], {"mode": "passthru"}),
        pytest.param(
            "0.4.0", ["192.168.7.50/24 192.168.7.1", "fd07::50/64 fd07::1"], {"mode": "bridge"}, marks=needs_ipv6
        ),
    ],
)
def test_as_the_reference_does_it(lab: Lab, version: str, addresses: list[str], keys: dict[str, Any]) -> None:
    conf = layer2(version=version, **keys)
    if addresses:
        conf["ipam"] = {"type": "scripted"}
        ips = [dict(zip(("address", "gateway"), one.split(), strict=False)) for one in addresses]
        if version != "1.0.0":
            ips = [{**one, "version": "6" if ":" in one["address"] else "4"} for one in ips]
        routes = [default for default in DEFAULTS if any((":" in default["dst"]) == (":" in one) for one in addresses)]
        routes = routes if "gateway" in ips[0] else []
        lab.scripted().does("ADD", answer={"cniVersion": version, "ips": ips, "routes": routes})
    found = []
    for ours in (True, False):
        with lab.space() as netns:
            result = (
                lab.cni("ADD", "macvlan", conf, netns=netns).result()
                if ours
                else reference.call(lab, "ADD", conf, netns)
            )
            wait_until(partial(reference.settled, netns, "eth0"), "the end of detection")
            found.append((reference.comparable(result, netns), reference.state(netns, "eth0")))
            # Ours also removes what the reference made.
            lab.cni("DEL", "macvlan", conf, netns=netns).ok()
            assert set(netns.links()) == {"lo"}
    assert found[0][0] == found[1][0]
    assert reference.difference(found[0][1], found[1][1]) == []
