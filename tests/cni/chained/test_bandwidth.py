"""bandwidth after ptp and bridge, in a real host: what is printed, what the kernel has, how fast bytes go, that DEL
puts everything back, and the same beside the reference."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.interface import reference
from tests.cni.lab import WITH_CHECK, Attached, Lab, Served, both
from tests.hosts import Host, HostError, Netns, wait_until

pytestmark = pytest.mark.kernel
CHAINED = [version for version in SUPPORTED if version not in ("0.1.0", "0.2.0")]
MBIT = 1_000_000
LIMITS: dict[str, Any] = {
    "ingressRate": 8 * MBIT,
    "ingressBurst": 800_000,
    "egressRate": 16 * MBIT,
    "egressBurst": 1_600_000,
}
EGRESS = {key: value for key, value in LIMITS.items() if key.startswith("egress")}
INGRESS = {key: value for key, value in LIMITS.items() if key.startswith("ingress")}
PACKET = 1514


def conf_of(version: str = "1.0.0", name: str = "net", **keys: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": name, "type": "bandwidth", **keys}


def below_conf(version: str = "1.0.0", type: str = "ptp", name: str = "net", **keys: Any) -> dict[str, Any]:  # noqa: A002
    """The interface plugin before ours."""
    return {"cniVersion": version, "name": name, "type": type, "ipam": both(), **keys}


def ifb_name(container_id: str, network: str = "net", ifname: str = "") -> str:
    """As the reference makes it (pkg/utils, MustFormatHashWithPrefix), for the first interface of a container."""
    return "bwp" + hashlib.sha512(f"{network}{container_id}{ifname}".encode()).hexdigest()[:12]


@dataclass
class Limited:
    """A container whose interface is limited."""

    lab: Lab
    one: Attached
    conf: dict[str, Any]
    result: dict[str, Any]
    ifname: str = "eth0"

    def call(self, verb: str, **more: Any) -> Served:
        conf = {**self.conf, "prevResult": self.result}
        more = {"netns": self.one.netns, "container_id": self.one.container_id, "ifname": self.ifname, **more}
        return self.lab.cni(verb, "bandwidth", conf, **more)

    @property
    def port(self) -> str:
        """The host's end."""
        return next(str(i["name"]) for i in self.result["interfaces"] if i["name"].startswith("veth"))

    @property
    def ifb(self) -> str:
        return str(self.result["interfaces"][-1]["name"])

    def broken(self) -> str:
        answer = self.call("CHECK")
        assert answer.code() > 0
        return str(answer.json["msg"])


def add(lab: Lab, one: Attached, conf: dict[str, Any], **more: Any) -> Served:
    more = {"netns": one.netns, "container_id": one.container_id, **more}
    return lab.cni("ADD", "bandwidth", {**conf, "prevResult": one.result}, **more)


@contextlib.contextmanager
def attached(lab: Lab, below: dict[str, Any], **more: Any) -> Iterator[Attached]:
    """A container with an interface whose addresses are no longer tentative: routes come with that."""
    with lab.attached(below, below["type"], **more) as one:
        for interface in one.result["interfaces"]:
            if not interface.get("sandbox"):
                wait_until(partial(reference.settled, lab.host, interface["name"]), "the end of detection")
        yield one


@contextlib.contextmanager
def limited(lab: Lab, conf: dict[str, Any], below: dict[str, Any] | None = None, **more: Any) -> Iterator[Limited]:
    """A container with a limit for the duration of the block; what was below it goes after it."""
    below = below or below_conf(conf["cniVersion"])
    with attached(lab, below, **more) as one:
        it = Limited(lab, one, conf, add(lab, one, conf, **more).result(), more.get("ifname", "eth0"))
        try:
            yield it
        except BaseException:
            it.call("DEL")
            raise
        it.call("DEL").ok()


def qdiscs(where: Host | Netns, dev: str) -> list[dict[str, Any]]:
    """`tc -j qdisc` of a device that somebody asked for, in order; without fair queues and counters."""
    shown = json.loads(where.run(["tc", "-j", "qdisc", "show", "dev", dev]).stdout or "[]")
    keys = ("kind", "handle", "root", "parent", "options")
    return [
        {key: one[key] for key in keys if key in one}
        for one in shown
        if one["handle"] != "0:" and one["kind"] != "fq_codel"
    ]


def tbf(rate_bits: int, burst_bits: int) -> dict[str, Any]:
    options = {"rate": rate_bits // 8, "burst": burst_bits // 8, "lat": 25_000}
    return {"kind": "tbf", "handle": "1:", "root": True, "options": options}


INGRESS_QDISC = {"kind": "ingress", "handle": "ffff:", "parent": "ffff:fff1", "options": {}}


def filters(where: Host | Netns, dev: str) -> list[dict[str, Any]]:
    """The filters at a device's ingress, without the heads of hash tables."""
    shown = json.loads(where.run(["tc", "-j", "filter", "show", "dev", dev, "parent", "ffff:"]).stdout or "[]")
    return [one for one in shown if "actions" in one.get("options", {})]


def ifbs(host: Host) -> list[str]:
    return [n for n, one in host.links().items() if one.get("linkinfo", {}).get("info_kind") == "ifb"]


def has_fq_codel(lab: Lab) -> bool:
    with lab.space() as netns:
        netns.run(["ip", "link", "set", "lo", "up"])
        return netns.run(["tc", "qdisc", "add", "dev", "lo", "root", "fq_codel"], check=False).returncode == 0


# Each verb in each version


@pytest.mark.parametrize("version", CHAINED)
def test_every_verb(lab: Lab, version: str) -> None:
    host = lab.host
    before = host.snapshot()
    with limited(lab, conf_of(version, **LIMITS), below_conf(version, mtu=1400)) as it:
        ifb = ifb_name(it.one.container_id)
        links = host.links()
        added = {"name": ifb, "mac": links[ifb]["address"]}
        assert it.result == {**it.one.result, "interfaces": [*it.one.result["interfaces"], added]}
        assert (links[ifb]["linkinfo"]["info_kind"], links[ifb]["mtu"]) == ("ifb", 1400)
        assert "UP" in links[ifb]["flags"]
        assert qdiscs(host, it.port) == [tbf(8 * MBIT, 800_000), INGRESS_QDISC]
        assert qdiscs(host, ifb) == [tbf(16 * MBIT, 1_600_000)]
        (found,) = filters(host, it.port)
        assert (found["kind"], found["protocol"], found["pref"]) == ("u32", "all", 1)
        assert [one["to_dev"] for one in found["options"]["actions"]] == [ifb]
        assert host.ping(it.one.ip()) > 0
        assert it.one.netns.ping("10.1.0.1") > 0

        answer = it.call("CHECK")
        assert (answer.stdout, answer.status) == ("", 0) if version in WITH_CHECK else answer.code() == 1
        valid = [{"containerID": it.one.container_id, "ifname": "eth0"}]
        for verb, more in (("GC", {"cni.dev/valid-attachments": valid}), ("STATUS", {})):
            answer = lab.cni(verb, "bandwidth", {**it.conf, **more})
            assert (answer.stdout, answer.status) == ("", 0) if version == "1.1.0" else answer.code() == 1
        assert ifbs(host) == [ifb]
        for _ in range(2):
            answer = it.call("DEL")
            assert (answer.stdout, answer.status) == ("", 0)
            assert ifbs(host) == []
    host.assert_clean(before)


def test_older_versions_have_no_chains(lab: Lab) -> None:
    with lab.space() as netns:
        for version in ("0.1.0", "0.2.0"):
            assert lab.cni("ADD", "bandwidth", conf_of(version, **LIMITS), netns=netns).code() == 1


# Keys


def test_one_direction_alone(lab: Lab) -> None:
    host = lab.host
    with limited(lab, conf_of(**INGRESS)) as it:
        assert it.result == it.one.result
        assert qdiscs(host, it.port) == [tbf(8 * MBIT, 800_000)]
        assert ifbs(host) == []
        assert not list(host.path("/run/netloom/attachments").rglob("*.bandwidth"))
        it.call("CHECK").ok()
    with limited(lab, conf_of(**EGRESS)) as it:
        assert qdiscs(host, it.port) == [INGRESS_QDISC]
        assert qdiscs(host, it.ifb) == [tbf(16 * MBIT, 1_600_000)]
        it.call("CHECK").ok()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ingressRate": 0, "ingressBurst": 0, "egressRate": 0, "egressBurst": 0},
        {"runtimeConfig": {"bandwidth": {"ingressRate": 0}}},
        {"runtimeConfig": {}},
        # As in the reference: with one key of its own, what the runtime asks for does not count.
        {"egressRate": 0, "runtimeConfig": {"bandwidth": LIMITS}},
    ],
)
def test_no_limit(lab: Lab, keys: dict[str, Any]) -> None:
    with limited(lab, conf_of(**keys)) as it:
        assert it.result == it.one.result
        assert qdiscs(lab.host, it.port) == []
        it.call("CHECK").ok()


def test_the_runtime_sets_limits(lab: Lab) -> None:
    # containerd's go-cni capitalises the keys and gives half a gigabyte as burst.
    burst = 2**32 - 1
    asked = {"IngressRate": 10 * MBIT, "IngressBurst": burst, "EgressRate": 20 * MBIT, "EgressBurst": burst}
    with limited(lab, conf_of(runtimeConfig={"bandwidth": asked})) as it:
        shaper, _ = qdiscs(lab.host, it.port)
        assert shaper["options"]["rate"] == 10 * MBIT // 8
        # There is room for the rate of 274.9 seconds.
        assert 0.99 < shaper["options"]["burst"] / (274.9 * 10 * MBIT / 8) < 1.01
        (shaper,) = qdiscs(lab.host, it.ifb)
        assert shaper["options"]["rate"] == 20 * MBIT // 8
        assert 0.99 < shaper["options"]["burst"] / (burst / 8) < 1.01
        it.call("CHECK").ok()


@pytest.mark.parametrize(
    ("rate_bits", "burst"),
    [
        (MBIT, 10 * PACKET),  # ten packets, what TCP begins with
        (100 * MBIT, 125_000),  # 10 ms of the rate, one tick of the slowest timer
        (10_000 * MBIT, 12_500_000),
    ],
)
def test_a_rate_without_a_burst_has_one(lab: Lab, rate_bits: int, burst: int) -> None:
    with limited(lab, conf_of(ingressRate=rate_bits, egressRate=rate_bits)) as it:
        for dev in (it.port, it.ifb):
            options = qdiscs(lab.host, dev)[0]["options"]
            assert options["rate"] == rate_bits // 8
            assert abs(options["burst"] - burst) <= burst // 1000 + 1
        it.call("CHECK").ok()


def test_a_burst_smaller_than_a_packet_lets_packets_pass(lab: Lab) -> None:
    conf = conf_of(ingressRate=10 * MBIT, ingressBurst=1, egressRate=10 * MBIT, egressBurst=8 * 57)
    with attached(lab, below_conf()) as one:
        answer = add(lab, one, conf)
        it = Limited(lab, one, conf, answer.result())
        assert "$.ingressRate: its burst of 1 bytes is raised to 1514" in answer.stderr
        assert "$.egressRate: its burst of 57 bytes is raised to 1514" in answer.stderr
        for dev in (it.port, it.ifb):
            assert abs(qdiscs(lab.host, dev)[0]["options"]["burst"] - PACKET) <= 1
        it.call("CHECK").ok()
        assert transfer(it, into=True, size=50_000) > 0
        assert transfer(it, into=False, size=50_000) > 0
        it.call("DEL").ok()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"ingressBurst": 8000}, "$.ingressBurst: if burst is set, rate must also be set: want ingressRate beside it"),
        ({"egressBurst": 8000, "ingressRate": 8000}, "$.egressBurst: if burst is set"),
        (
            {"runtimeConfig": {"bandwidth": {"EgressBurst": 8000}}},
            "$.runtimeConfig.bandwidth.egressBurst: if burst is set",
        ),
        ({"egressRate": 8000, "egressBurst": 8 * (2**32 - 1)}, "$.egressBurst: burst cannot be more than 4GB"),
        ({"egressRate": 7}, "$.egressRate: want at least 8 bits a second, or 0 for no limit, found 7"),
        ({"ingressRate": -1}, "$.ingressRate: expected int >= 0, found -1"),
        ({"ingressRate": 1.5}, "$.ingressRate: expected int, found 1.5"),
        ({"ingressRate": "1M"}, '$.ingressRate: expected int, found "1M"'),
        ({"ingressRate": 2**64}, "$.ingressRate: expected int"),
        (
            {"runtimeConfig": {"bandwidth": {"ingressRate": True}}},
            "$.runtimeConfig.bandwidth.ingressRate: expected int",
        ),
        ({"runtimeConfig": {"bandwidth": 5}}, "$.runtimeConfig.bandwidth: expected object, found 5"),
    ],
)
def test_bad_values(lab: Lab, keys: dict[str, Any], says: str) -> None:
    with attached(lab, below_conf()) as one:
        before = lab.host.snapshot()
        for verb in ("ADD", "CHECK"):
            conf = {**conf_of(**keys), "prevResult": one.result}
            answer = lab.cni(verb, "bandwidth", conf, netns=one.netns, container_id=one.container_id)
            assert (answer.code(), says in answer.json["msg"]) == (7, True), answer.json
        assert lab.cni("STATUS", "bandwidth", conf_of("1.1.0", **keys)).code() == 7
        # A DEL has to succeed with any configuration.
        lab.cni("DEL", "bandwidth", conf_of(**keys), netns=one.netns, container_id=one.container_id).ok()
        lab.host.assert_clean(before)


def test_largest_values(lab: Lab) -> None:
    keys: dict[str, Any] = {"egressRate": 2**63 - 1, "egressBurst": 8 * (2**32 - 1) - 1, "ingressRate": 8}
    with limited(lab, conf_of(**keys)) as it:
        assert qdiscs(lab.host, it.ifb)[0]["options"]["rate"] == (2**63 - 1) // 8
        it.call("CHECK").ok()


# Where it goes


def test_after_bridge(lab: Lab) -> None:
    bridge = below_conf(type="bridge", bridge="br0", isGateway=True, mtu=1300)
    with limited(lab, conf_of(**LIMITS), bridge) as it:
        assert it.result["interfaces"][0]["name"] == "br0"
        assert qdiscs(lab.host, it.port) == [tbf(8 * MBIT, 800_000), INGRESS_QDISC]
        assert lab.host.links()[it.ifb]["mtu"] == 1300
        assert it.one.netns.ping("10.1.0.1") > 0
        it.call("CHECK").ok()


def test_without_a_veth_nothing_is_done(lab: Lab) -> None:
    host = lab.host
    conf = conf_of(**LIMITS)
    interfaces = [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}]

    def refused(netns: Netns, said: str, interfaces: list[Any] = interfaces, **more: Any) -> None:
        before = host.snapshot()
        previous = {"cniVersion": "1.0.0", "interfaces": interfaces}
        answer = lab.cni("ADD", "bandwidth", {**conf, "prevResult": previous, **more}, netns=netns)
        assert answer.code() == 7
        wanted = "$.ingressRate: only the host's end of a veth pair can be limited, but "
        assert answer.json["msg"].endswith(f"{wanted}{said}, found 8000000")
        host.assert_clean(before)

    with lab.space() as netns, lab.space() as other:
        answer = lab.cni("ADD", "bandwidth", conf, netns=netns)
        assert answer.code() == 7
        assert "must be called as chained plugin" in answer.json["msg"]
        refused(netns, "the container has no interface eth0")
        host.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1"])
        host.run(["ip", "link", "add", "eth0", "netns", netns.name, "link", "up0", "type", "macvlan"])
        refused(netns, "interface eth0 of the container is of kind macvlan")
        host.run(["ip", "link", "delete", "up0"])
        netns.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "veth1", "netns", other.name])
        refused(netns, "the other end of interface eth0 is not in the host's namespace")
        netns.run(["ip", "link", "delete", "eth0"])
        host.run(["ip", "link", "add", "veth1", "type", "veth", "peer", "name", "eth0", "netns", netns.name])
        not_named = "prevResult does not name veth1, the host's end of eth0, without a sandbox"
        refused(netns, not_named, [])
        refused(netns, not_named, [{"name": "veth1", "sandbox": netns.path}, {"name": "veth2"}])
        # Another link of the host has by chance the number of the other end, which is in a third namespace.
        index = host.links()["veth1"]["ifindex"]
        netns.run(["ip", "link", "set", "eth0", "name", "eth7"])
        peer = ["peer", "name", "eth0", "index", "7777", "netns", netns.name]
        other.run(["ip", "link", "add", "veth1", "index", str(index), "type", "veth", *peer])
        refused(netns, "the other end of interface eth0 is not in the host's namespace")
        host.run(["ip", "link", "delete", "veth1"])


# How fast


# Prints its port; then how many bytes came, and how long after the first the last one did.
_RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    got = len(peer.recv(1 << 16))
    began = time.monotonic()
    while data := peer.recv(1 << 16):
        got += len(data)
    print(got, time.monotonic() - began, flush=True)
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as peer:
    peer.sendall(bytes(int(sys.argv[3])))
"""


def transfer(it: Limited, *, into: bool, size: int) -> float:
    """Seconds that so many bytes over TCP take into the container, or out of it."""
    inside, host = it.one.netns, it.lab.host
    receiver, sender = (inside, host) if into else (host, inside)
    address = it.one.ip() if into else "10.1.0.1"
    python = [sys.executable, "-I", "-S", "-c"]
    process = receiver.popen([*python, _RECEIVE, address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        sender.run([*python, _SEND, address, port, str(size)])
        got, took = process.stdout.readline().split()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert int(got) == size
    return float(took)


def test_each_direction_is_limited_and_no_other(lab: Lab) -> None:
    size, burst = 1_000_000, 40_000  # bytes
    rates = {"ingressRate": 8 * MBIT, "ingressBurst": burst * 8, "egressRate": 16 * MBIT, "egressBurst": burst * 8}
    for into, keys in ((True, INGRESS), (False, EGRESS)):
        wanted: dict[str, Any] = {key: value for key, value in rates.items() if key in keys}
        (rate,) = (value // 8 for key, value in wanted.items() if key.endswith("Rate"))
        with limited(lab, conf_of(**wanted)) as it:
            least = (size - burst) / rate
            slow = transfer(it, into=into, size=size)
            assert slow >= 0.7 * least, (into, slow, least)
            # And it is the rate, not a stop. Ten times: the machine may have other things to do.
            assert slow <= 10 * least, (into, slow, least)
            assert transfer(it, into=not into, size=size) < slow


def test_a_burst_passes_at_once(lab: Lab) -> None:
    size = 800_000
    with limited(lab, conf_of(ingressRate=MBIT, ingressBurst=8 * MBIT, egressRate=MBIT, egressBurst=8 * MBIT)) as it:
        for into in (True, False):
            # At the rate it would be 6.4 seconds.
            assert transfer(it, into=into, size=size) < 0.7 * 8 * size / MBIT


def test_both_interfaces_of_the_chain_are_ipv4_and_ipv6(lab: Lab) -> None:
    """The filter takes every protocol: ARP, neighbours and IPv6 come back from the ifb device, too."""
    with limited(lab, conf_of(**LIMITS)) as it:
        for address in it.one.addresses:
            target = "fd00:1::1" if ":" in address else "10.1.0.1"
            assert it.one.netns.ping(target) > 0
            assert lab.host.ping(address.split("/")[0]) > 0


# Sends into the container as much as it can. Not TCP, which keeps its own queue below a local shaper short.
_FLOOD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    while True:
        one.sendto(bytes(1400), (sys.argv[1], 9))
"""


def test_fair_queues_keep_the_round_trip_short(lab: Lab) -> None:
    """A flow fills the shaper's queue; who else waits in it, waits for all of that, unless queues are fair."""
    conf = conf_of(ingressRate=8 * MBIT, ingressBurst=8 * 10 * PACKET)
    python = [sys.executable, "-I", "-S", "-c"]
    with limited(lab, conf) as it:
        kinds = [q["kind"] for q in json.loads(lab.host.run(["tc", "-j", "qdisc", "show", "dev", it.port]).stdout)]
        assert kinds == (["tbf", "fq_codel"] if has_fq_codel(lab) else ["tbf"])
        if kinds == ["tbf"]:
            pytest.skip("this kernel has no fq_codel; without it the limit holds, as the other tests show")

        def loaded() -> float:
            """The best of ten round trips beside such a flow, in milliseconds."""
            address = it.one.ip()
            flood = lab.host.popen([*python, _FLOOD, address], stdin=subprocess.DEVNULL)
            try:
                wait_until(lambda: backlog(lab.host, it.port) > 50_000, "a queue")
                return min(lab.host.ping(address) for _ in range(10))
            finally:
                flood.kill()
                flood.wait()

        fair = loaded()
        lab.host.run(["tc", "qdisc", "delete", "dev", it.port, "parent", "1:1"])
        # One queue of half a second, as the reference has it with a runtime's burst.
        lab.host.run(["tc", "qdisc", "add", "dev", it.port, "parent", "1:1", "bfifo", "limit", "500000"])
        assert fair < loaded() / 3


def backlog(host: Host, dev: str) -> int:
    shown = json.loads(host.run(["tc", "-s", "-j", "qdisc", "show", "dev", dev]).stdout)
    return max(int(one["backlog"]) for one in shown)


# What is there already


def test_a_second_add_touches_nothing(lab: Lab) -> None:
    for keys in (LIMITS, EGRESS, INGRESS):
        with limited(lab, conf_of(**keys)) as it:
            before = lab.host.snapshot()
            answer = add(lab, it.one, it.conf)
            assert answer.code() == 4
            assert f"CNI_IFNAME eth0: its end on the host, {it.port}, has a qdisc" in answer.json["msg"]
            lab.host.assert_clean(before)
            it.call("CHECK").ok()


def test_after_a_missed_del_the_add_begins_anew(lab: Lab) -> None:
    host = lab.host
    with attached(lab, below_conf(), container_id="again") as one:
        add(lab, one, conf_of(**LIMITS)).ok()
    # bandwidth was not asked to remove anything.
    (old,) = ifbs(host)
    index = host.links()[old]["ifindex"]
    with limited(lab, conf_of(**LIMITS), container_id="again") as it:
        assert ifbs(host) == [old]
        assert host.links()[old]["ifindex"] != index
        it.call("CHECK").ok()


def test_after_a_missed_del_the_other_name_is_forgotten(lab: Lab) -> None:
    host = lab.host
    name = ifb_name("again")
    host.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "odd1"])
    with attached(lab, below_conf(), container_id="again") as one:
        add(lab, one, conf_of(**LIMITS)).ok()
    assert ifbs(host) == [ifb_name("again", ifname="eth0")]
    host.run(["ip", "link", "delete", name])
    with limited(lab, conf_of(**LIMITS), container_id="again"):
        assert ifbs(host) == [name]


def test_two_interfaces_of_a_container_in_one_network(lab: Lab) -> None:
    """The reference has one name for both, and its second ADD fails."""
    host = lab.host
    conf = conf_of(**LIMITS)
    with limited(lab, conf) as first:
        cid = first.one.container_id
        second = lab.cni("ADD", "ptp", below_conf(), netns=first.one.netns, container_id=cid, ifname="net1").result()
        one = Attached(lab, "ptp", below_conf(), first.one.netns, cid, second, {"ifname": "net1"})
        for _ in range(2):
            result = add(lab, one, conf, ifname="net1").result()
            it = Limited(lab, one, conf, result, "net1")
            assert it.ifb == ifb_name(cid, ifname="net1")
            assert sorted(ifbs(host)) == sorted([first.ifb, it.ifb])
            it.call("CHECK").ok()
            first.call("CHECK").ok()
            it.call("DEL").ok()
            assert ifbs(host) == [first.ifb]
            it.call("DEL").ok()
            first.call("CHECK").ok()
            for where in ("root", "ingress"):
                host.run(["tc", "qdisc", "delete", "dev", it.port, where])
        # Even while nothing leads to the first one's device, it is not taken away.
        host.run(["tc", "qdisc", "delete", "dev", first.port, "ingress"])
        assert add(lab, one, conf, ifname="net1").result()["interfaces"][-1]["name"] != first.ifb
        assert len(ifbs(host)) == 2
        it.call("DEL").ok()
        one.call("DEL").ok()


def test_a_device_without_a_filter_is_replaced(lab: Lab) -> None:
    """The reference's DEL was missed, or its ADD was killed."""
    host = lab.host
    name = ifb_name("dead")
    host.run(["ip", "link", "add", name, "type", "ifb"])
    index = host.links()[name]["ifindex"]
    with limited(lab, conf_of(**LIMITS), container_id="dead") as it:
        assert (it.ifb, ifbs(host)) == (name, [name])
        assert host.links()[name]["ifindex"] != index


def test_a_link_of_another_kind_is_left_alone(lab: Lab) -> None:
    host = lab.host
    name = ifb_name("odd")
    host.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "odd1"])
    with limited(lab, conf_of(**LIMITS), container_id="odd") as it:
        assert it.ifb == ifb_name("odd", ifname="eth0")
        it.call("CHECK").ok()
    assert name in host.links()
    host.run(["ip", "link", "delete", name])


# DEL, GC


def test_del_with_little_left(lab: Lab) -> None:
    host = lab.host
    for how in ("no netns", "vanished", "no prevResult", "no record", "nonsense"):
        with attached(lab, below_conf()) as one:
            before = host.snapshot()
            it = Limited(lab, one, conf_of(**LIMITS), add(lab, one, conf_of(**LIMITS)).result())
            more: dict[str, Any] = {"container_id": one.container_id, "netns": one.netns}
            conf: Any = {**it.conf, "prevResult": it.result}
            if how == "no netns":
                more["netns"] = ""
            elif how == "vanished":
                more["netns"] = "/run/netns/gone"
            elif how == "no prevResult":
                conf = it.conf
            elif how == "no record":
                for path in host.path("/run/netloom/attachments").rglob("*.bandwidth"):
                    path.unlink()
            else:
                conf = {**conf_of(egressBurst=5), "prevResult": {"interfaces": 7}}
            for _ in range(2):
                answer = lab.cni("DEL", "bandwidth", conf, **more)
                assert (answer.status, answer.stdout) == (0, ""), how
            host.assert_clean(before)


def test_a_del_that_fails_knows_again_the_next_time(lab: Lab) -> None:
    with limited(lab, conf_of(**LIMITS)) as it:
        called = it.call("DEL").calls
        where = next(number for number, what in enumerate(called, 1) if what == f"delete link {it.ifb}")
        for device in ("root", "ingress"):
            lab.host.run(["tc", "qdisc", "delete", "dev", it.port, device])
        add(lab, it.one, it.conf).ok()
        assert it.call("DEL", faults=[{"at": where, "when": "before", "kind": "error"}]).code() > 0
        assert ifbs(lab.host) == [it.ifb]
        it.call("DEL").ok()
        assert ifbs(lab.host) == []


def gc(lab: Lab, *container_ids: str, name: str = "net") -> Served:
    valid = [{"containerID": one, "ifname": "eth0"} for one in container_ids]
    answer = lab.cni("GC", "bandwidth", {**conf_of("1.1.0", name), "cni.dev/valid-attachments": valid})
    answer.ok()
    return answer


def test_gc_removes_what_died(lab: Lab) -> None:
    host = lab.host
    with limited(lab, conf_of(**LIMITS)) as living:
        with attached(lab, below_conf()) as one:
            add(lab, one, conf_of(**LIMITS)).ok()
        # Its namespace is gone, and nobody sent a DEL.
        assert len(ifbs(host)) == 2
        gc(lab, name="other")
        gc(lab, one.container_id, living.one.container_id)
        assert len(ifbs(host)) == 2
        answer = gc(lab)  # the runtime knows neither
        assert ifbs(host) == [living.ifb]
        assert "its interface lives" in answer.stderr
        living.call("CHECK").ok()
    assert not list(host.path("/run/netloom/attachments").rglob("*.bandwidth"))


def test_the_operators_gc_removes_what_died(lab: Lab) -> None:
    with attached(lab, below_conf()) as one:
        add(lab, one, conf_of(**LIMITS)).ok()
    assert len(ifbs(lab.host)) == 1
    lab.host.run([sys.executable, "-m", "cli", "gc"])
    assert ifbs(lab.host) == []
    assert not list(lab.host.path("/run/netloom/attachments").rglob("*.bandwidth"))


def test_gc_removes_devices_of_the_reference_that_lead_nowhere(lab: Lab) -> None:
    host = lab.host
    orphan, used, foreign = "bwp0123456789ab", "bwp0123456789ac", "bwpcali012345"
    with limited(lab, conf_of(**LIMITS)) as living, attached(lab, below_conf()) as one:
        # Another's filter leads to it; the record knows it; it has another name: none of these goes.
        for name in (orphan, used, foreign):
            host.run(["ip", "link", "add", name, "type", "ifb"])
        port = one.result["interfaces"][0]["name"]
        host.run(["tc", "qdisc", "add", "dev", port, "clsact"])
        action = ["action", "mirred", "egress", "redirect", "dev", used]
        match = ["protocol", "all", "u32", "match", "u32", "0", "0"]
        host.run(["tc", "filter", "add", "dev", port, "ingress", *match, *action])
        host.run(["tc", "qdisc", "delete", "dev", living.port, "ingress"])  # with it the filter
        answer = gc(lab, living.one.container_id, one.container_id)
        assert sorted(ifbs(host)) == sorted([living.ifb, used, foreign])
        assert f"nothing leads to the ifb device {orphan}" in answer.stderr
        for name in (used, foreign):
            host.run(["ip", "link", "delete", name])


# CHECK


def test_check_finds_what_is_broken(lab: Lab) -> None:
    host = lab.host
    with limited(lab, conf_of("1.1.0", **LIMITS), below_conf("1.1.0")) as it:
        rate = ["tbf", "rate", "9mbit", "burst", "100kb", "latency", "25ms"]
        action = ["action", "mirred", "egress", "redirect", "dev", it.ifb]
        match = ["protocol", "all", "prio", "1", "u32", "match", "u32", "0", "0"]

        def tc(*arguments: str) -> None:
            host.run(["tc", *arguments])

        tc("filter", "delete", "dev", it.port, "ingress")
        assert it.broken() == f"CHECK: nothing sends what enters {it.port} through {it.ifb}"
        tc("filter", "add", "dev", it.port, "ingress", *match, *action)
        it.call("CHECK").ok()

        for dev, key in ((it.port, "ingressRate"), (it.ifb, "egressRate")):
            tc("qdisc", "delete", "dev", dev, "root")
            assert it.broken() == f"CHECK: link {dev} has no shaper (tbf) at its root"
            tc("qdisc", "add", "dev", dev, "handle", "1:", "root", *rate)
            assert f"{key} asks for Tbf(rate={LIMITS[key] // 8}" in it.broken()
            tc("qdisc", "delete", "dev", dev, "root")
            burst = str(LIMITS[key.replace("Rate", "Burst")] // 8)
            bits = f"{LIMITS[key]}bit"
            tc(
                "qdisc",
                "add",
                "dev",
                dev,
                "handle",
                "1:",
                "root",
                *("tbf", "rate", bits, "burst", burst, "lat", "25ms"),
            )
            it.call("CHECK").ok()

        # What prevResult says.
        less = {**it.result, "interfaces": it.result["interfaces"][:-1]}
        answer = it.lab.cni(
            *("CHECK", "bandwidth", {**it.conf, "prevResult": less}),
            netns=it.one.netns,
            container_id=it.one.container_id,
        )
        assert f"prevResult does not name {it.ifb}" in answer.json["msg"]
        answer = it.lab.cni("CHECK", "bandwidth", it.conf, netns=it.one.netns, container_id=it.one.container_id)
        assert answer.code() == 7

        host.run(["ip", "link", "set", it.ifb, "down"])
        assert it.broken() == f"CHECK: the ifb device {it.ifb} is down"
        host.run(["ip", "link", "set", it.ifb, "up"])
        it.call("CHECK").ok()
        host.run(["ip", "link", "delete", it.ifb])
        assert it.broken() == f"CHECK: the ifb device {it.ifb} is gone"
        it.one.netns.run(["ip", "link", "delete", "eth0"])
        assert "the container has no interface eth0" in it.broken()


# Faults


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, when: str) -> None:
    conf = conf_of(**LIMITS)
    with attached(lab, below_conf()) as one:
        (port,) = (i["name"] for i in one.result["interfaces"] if not i.get("sandbox"))
        with_result = {**conf, "prevResult": one.result}

        def call(verb: str, **more: Any) -> Served:
            return lab.cni(verb, "bandwidth", with_result, netns=one.netns, container_id=one.container_id, **more)

        def unlimit() -> None:
            call("DEL").ok()
            for where in ("root", "ingress"):
                lab.host.run(["tc", "qdisc", "delete", "dev", port, where])

        called = call("ADD").calls
        assert len(called) > 8
        unlimit()
        before = lab.host.snapshot()
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 else "signal"
            answer = call("ADD", faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            try:
                lab.host.assert_clean(before)
                assert qdiscs(lab.host, port) == [], label
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
        # A fault while undoing does not stop the rest of it: the ifb device stays, and is known.
        undone = call("ADD", faults=[{"at": len(called), "when": "before", "kind": "error"}]).undo_calls
        assert len(undone) >= 3
        for number, label in enumerate(undone, 1):
            faults = [
                {"at": len(called), "when": "before", "kind": "error"},
                {"at": number, "when": "before", "kind": "error", "undo": True},
            ]
            answer = call("ADD", faults=faults)
            assert "INJECTED" in answer.json["msg"]
            assert "undoing the ADD" in answer.stderr, label
            call("DEL").ok()
            for where in ("root", "ingress"):
                lab.host.run(["tc", "qdisc", "delete", "dev", port, where], check=False)
            lab.host.assert_clean(before)
        assert qdiscs(lab.host, port) == []
        call("ADD").ok()
        assert one.netns.ping("10.1.0.1") > 0
        unlimit()


# Beside the reference


# What is not compared, and why:
# - fq_codel below the shaper, which ours adds where the kernel has it;
# - the second action of the reference's filter: its first one steals every packet;
# - counters, numbers that the kernel gives out, and MACs.
_DRAWN = {"ifindex", "address", "link_index", "link_netnsid", "index", "bytes", "packets", "backlog", "qlen"}


def state(lab: Lab, port: str, ifb: str) -> set[str]:
    """Everything that tc and ip show of a limit, one line for each field."""
    host = lab.host
    links = host.links()
    known: dict[str, Any] = {}
    for name, dev in (("port", port), ("ifb", ifb)):
        if dev in links:
            shown = json.loads(host.run(["tc", "-s", "-d", "-j", "qdisc", "show", "dev", dev]).stdout)
            known[f"qdisc of {name}"] = [one for one in shown if one["kind"] != "fq_codel"]
            known[f"link {name}"] = links[dev]
    known["filters"] = json.loads(
        host.run(["tc", "-d", "-j", "filter", "show", "dev", port, "parent", "ffff:"]).stdout or "[]"
    )
    for one in known["filters"]:
        del one.get("options", {}).get("actions", [])[1:]
    return {line.replace(port, "PORT") for line in fields(known, "")}


def fields(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _DRAWN:
                yield from fields(inner, f"{at} {key}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from fields(inner, f"{at}[{number}]")
    else:
        yield f"{at}: {value}"


@reference.needs_reference
@pytest.mark.parametrize(
    ("version", "keys"),
    [
        ("0.3.1", LIMITS),
        ("1.0.0", EGRESS),
        ("0.4.0", {"runtimeConfig": {"bandwidth": {"ingressRate": 123_456, "ingressBurst": 654_321}}}),
        ("1.0.0", {"runtimeConfig": {"bandwidth": {"egressRate": 20 * MBIT, "egressBurst": 2**32 - 1}}}),
        ("1.0.0", {"egressRate": 40_000 * MBIT, "egressBurst": 400 * MBIT}),
        ("0.3.0", {}),
    ],
)
def test_as_the_reference_does_it(lab: Lab, version: str, keys: dict[str, Any]) -> None:
    conf, below = conf_of(version, **keys), below_conf(version, mtu=1450)
    found = []
    for ours in (True, False):
        with attached(lab, below, container_id="twin") as one:
            if ours:
                result = add(lab, one, conf).result()
            else:
                result = reference.call(lab, "ADD", {**conf, "prevResult": one.result}, one.netns, "twin")
            it = Limited(lab, one, conf, result)
            found.append((reference.comparable(result, one.netns), state(lab, it.port, ifb_name("twin"))))
            if version in WITH_CHECK:
                it.call("CHECK").ok()  # of what the reference made, too
                reference.call(lab, "CHECK", {**conf, "prevResult": result}, one.netns, "twin")
            it.call("DEL").ok()
            assert ifbs(lab.host) == []
    (our_result, our_state), (their_result, their_state) = found
    for printed in (our_result, their_result):
        printed["ips"] = [{**ip, "address": ""} for ip in printed["ips"]]
    assert our_result == their_result
    assert reference.difference(our_state, their_state) == []


@reference.needs_reference
def test_a_burst_that_there_is_no_room_for(lab: Lab) -> None:
    """The reference cuts the upper bits of the buffer off, and gets any burst; ours is the largest that there is."""
    conf = conf_of(ingressRate=8 * MBIT, ingressBurst=2**32 - 1)
    with attached(lab, below_conf()) as one:
        add(lab, one, conf).ok()
        (ours,) = qdiscs(lab.host, one.result["interfaces"][0]["name"])
    with attached(lab, below_conf()) as one:
        it = Limited(lab, one, conf, reference.call(lab, "ADD", {**conf, "prevResult": one.result}, one.netns))
        (theirs,) = qdiscs(lab.host, it.port)
        it.call("CHECK").ok()
    assert ours["options"]["rate"] == theirs["options"]["rate"]
    assert theirs["options"]["burst"] < ours["options"]["burst"] < 2**32 / 8


@reference.needs_reference
def test_switching_to_the_reference_and_back(lab: Lab) -> None:
    conf = conf_of(**LIMITS)
    # Ours, then the reference's DEL. The record stays until GC, or the next ADD or DEL.
    with attached(lab, below_conf(), container_id="moved") as one:
        result = add(lab, one, conf).result()
        reference.call(lab, "DEL", {**conf, "prevResult": result}, one.netns, "moved")
        assert ifbs(lab.host) == []
    gc(lab)
    assert not list(lab.host.path("/run/netloom/attachments").rglob("*.bandwidth"))
    # The reference's, then our DEL, also without anything to go by but names.
    for netns in ("", "/run/netns/gone"):
        with attached(lab, below_conf(), container_id="moved") as one:
            reference.call(lab, "ADD", {**conf, "prevResult": one.result}, one.netns, "moved")
            assert ifbs(lab.host) == [ifb_name("moved")]
            lab.cni("DEL", "bandwidth", conf, netns=netns, container_id="moved").ok()
            assert ifbs(lab.host) == []
    # The reference's first interface lives; ours is the second one of the container.
    with attached(lab, below_conf(), container_id="moved") as one:
        theirs = reference.call(lab, "ADD", {**conf, "prevResult": one.result}, one.netns, "moved")
        more: dict[str, Any] = {"netns": one.netns, "container_id": "moved", "ifname": "net1"}
        second = lab.cni("ADD", "ptp", below_conf(), **more).result()
        result = lab.cni("ADD", "bandwidth", {**conf, "prevResult": second}, **more).result()
        assert sorted(ifbs(lab.host)) == sorted([ifb_name("moved"), ifb_name("moved", ifname="net1")])
        lab.cni("CHECK", "bandwidth", {**conf, "prevResult": result}, **more).ok()
        Limited(lab, one, conf, theirs).call("CHECK").ok()
        assert one.netns.ping("10.1.0.1") > 0
        lab.cni("DEL", "bandwidth", {**conf, "prevResult": result}, **more).ok()
        assert ifbs(lab.host) == [ifb_name("moved")]
        Limited(lab, one, conf, theirs).call("CHECK").ok()
        Limited(lab, one, conf, theirs).call("DEL").ok()
        lab.cni("DEL", "ptp", below_conf(), **more).ok()
    assert ifbs(lab.host) == []


@reference.needs_reference
def test_the_reference_refuses_a_rate_without_a_burst(lab: Lab) -> None:
    with attached(lab, below_conf()) as one, pytest.raises(HostError, match="burst must also be set"):
        reference.call(lab, "ADD", {**conf_of(egressRate=MBIT), "prevResult": one.result}, one.netns)
