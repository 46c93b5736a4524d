"""tuning: each verb in each spec version, each key, in a real host: what is printed, what the container's namespace
has, that DEL restores it, whoever changed it, and that the host's own is never touched."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cni.chained import tuning_backup
from cni.versions import SUPPORTED
from tests.cni.interface.reference import needs_reference
from tests.cni.lab import REFERENCE, WITH_CHECK, Lab, Served, net
from tests.hosts import CNI_BIN, IPV6, PROGRAM_PATH, Host, Netns

pytestmark = pytest.mark.kernel
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")

ALLOWLIST = "/etc/cni/tuning"
BACKUPS = "/run/cni/tuning"
ALL = {
    "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1", "net.ipv4.ip_default_ttl": "77"},
    "mac": "02:00:00:00:00:77",
    "mtu": 1380,
    "promisc": True,
    "allmulti": True,
    "txQLen": 123,
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    """As for the other plugins, with an allow-list of its own."""
    with Host(own=(ALLOWLIST,)) as host:
        lab = Lab(host)
        assert lab.ipamd.pid
        lab.warm_up()
        host.path("/run/cni/tuning").mkdir(parents=True)
        yield lab


class Container:
    """A namespace with an interface that some plugin made, and the result of that plugin."""

    def __init__(self, lab: Lab, netns: Netns, container_id: str, version: str = "1.1.0") -> None:
        self.lab = lab
        self.netns = netns
        self.container_id = container_id
        self.version = version

    def link(self, name: str = "eth0") -> None:
        """Makes an interface; its other end is in the container, too."""
        self.netns.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-peer"])
        self.netns.run(["ip", "link", "set", name, "up"])
        self.netns.run(["ip", "link", "set", f"{name}-peer", "up"])

    def result(self, name: str = "eth0", **of_interface: Any) -> dict[str, Any]:
        mac = self.netns.links()[name]["address"]
        interface = {"name": name, "mac": mac, "sandbox": self.netns.path, **of_interface}
        return {"cniVersion": self.version, "interfaces": [{"name": "br0", "mac": "02:00:00:00:00:01"}, interface]}

    def conf(self, keys: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        base = {"cniVersion": self.version, "name": "net", "type": "tuning"}
        return {**base, "prevResult": self.result(), **keys, **more}

    def call(self, verb: str, keys: Mapping[str, Any], *, ifname: str = "eth0", **more: Any) -> Served:
        conf = self.conf(keys)
        if ifname != "eth0":
            conf["prevResult"] = self.result(ifname)
        more = {"netns": self.netns, "container_id": self.container_id, **more}
        return self.lab.cni(verb, "tuning", conf, ifname=ifname, **more)

    def add(self, keys: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return self.call("ADD", keys, **more).result()

    def delete(self, keys: Mapping[str, Any], **more: Any) -> None:
        self.call("DEL", keys, **more).ok()

    def refused(self, keys: Mapping[str, Any], before: object = None, **more: Any) -> dict[str, Any]:
        """An ADD that must fail and change nothing; its error object."""
        before = before or state(self.netns)
        answer = self.call("ADD", keys, **more)
        assert answer.code() > 0
        assert "Traceback" not in answer.stderr
        assert state(self.netns) == before
        assert self.backup() is None
        error: dict[str, Any] = answer.json
        return error

    def reference(self, verb: str, keys: Mapping[str, Any], *, ifname: str = "eth0", args: str = "") -> dict[str, Any]:
        """The same from Debian's."""
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns.path,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": CNI_BIN,
            "PATH": PROGRAM_PATH,
        }
        done = self.lab.host.run(
            [f"{REFERENCE}/tuning"], input=json.dumps(self.conf(keys)), env=environment, check=False, cwd="/"
        )
        found: dict[str, Any] = json.loads(done.stdout or "{}")
        return found

    def sysctl(self, key: str) -> str:
        return sysctl(self.netns, key)

    def backup(self) -> dict[str, Any] | None:
        path = self.lab.host.path(f"{BACKUPS}/{self.container_id}_eth0.json")
        return json.loads(path.read_bytes()) if path.is_file() else None


def sysctl(where: Host | Netns, key: str) -> str:
    return where.run(["cat", f"/proc/sys/{key.replace('.', '/')}"]).stdout.strip()


def state(where: Host | Netns, link: str = "eth0") -> dict[str, Any]:
    """All sysctls of the namespace and all attributes of its links."""
    # Counters of what happened, and times that come with packets.
    script = "cd /proc/sys/net && grep -rs '' . | grep -v -e nf_conntrack_count -e stable_secret | sort"
    found: dict[str, Any] = {"sysctls": where.run(["sh", "-c", script], check=False).stdout.splitlines()}
    for name, one in where.links().items():
        flags = sorted(set(one["flags"]) & {"UP", "PROMISC", "ALLMULTI"})
        found[name] = (one.get("address"), one["mtu"], one.get("txqlen", 0), flags)
    return found


@contextlib.contextmanager
def container(lab: Lab, container_id: str = "c1", version: str = "1.1.0") -> Iterator[Container]:
    with lab.space() as netns:
        one = Container(lab, netns, container_id, version)
        one.link()
        try:
            yield one
        except BaseException:
            # So that the next test finds the host as it should be.
            one.netns.run(["sh", "-c", f"rm -rf {BACKUPS}/* /run/netloom/attachments/*"], check=False)
            raise


# Each verb in each version


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    """In a chain, behind a bridge."""
    host = lab.host
    lab.scripted().gives("10.7.0.5/24 10.7.0.1")
    if version in ("0.1.0", "0.2.0"):
        ip4 = {"ip": "10.7.0.5/24", "gateway": "10.7.0.1"}
        lab.scripted().does("ADD", answer={"cniVersion": version, "ip4": ip4})
    elif version not in ("1.0.0", "1.1.0"):
        ips = [{"version": "4", "address": "10.7.0.5/24", "gateway": "10.7.0.1"}]
        lab.scripted().does("ADD", answer={"cniVersion": version, "ips": ips})
    with lab.attached(net(version, isGateway=True, ipam={"type": "scripted"})) as one:
        before = state(one.netns)
        conf = {"cniVersion": version, "name": "net", "type": "tuning", **ALL}
        first = {**conf, "prevResult": one.result}
        more: dict[str, Any] = {"netns": one.netns, "container_id": one.container_id}
        on_host, others = host.snapshot(), state(host)

        result = lab.cni("ADD", "tuning", first, **more).result()
        wanted = json.loads(json.dumps(one.result))
        for interface in wanted.get("interfaces", ()):
            if "sandbox" in interface:
                interface["mac"] = ALL["mac"]
                if "mtu" in interface:
                    interface["mtu"] = ALL["mtu"]
        assert result == wanted

        link = one.netns.links()["eth0"]
        assert (link["address"], link["mtu"], link["txqlen"]) == (ALL["mac"], 1380, 123)
        assert {"PROMISC", "ALLMULTI"} <= set(link["flags"])
        assert sysctl(one.netns, "net.ipv4.conf.eth0.arp_filter") == "1"
        assert sysctl(one.netns, "net.ipv4.ip_default_ttl") == "77"
        assert state(host) == others
        assert host.ping("10.7.0.5") > 0  # neighbours know of the new MAC

        last = {**conf, "prevResult": result}
        if version == "1.1.0":
            valid = [{"containerID": one.container_id, "ifname": "eth0"}]
            lab.cni("GC", "tuning", {**conf, "cni.dev/valid-attachments": valid}).ok()
        for verb in ("GC", "STATUS"):
            answer = lab.cni(verb, "tuning", {**conf, "cni.dev/valid-attachments": []})
            assert (answer.stdout, answer.status) == ("", 0) if version == "1.1.0" else answer.code() == 1
        answer = lab.cni("CHECK", "tuning", last, **more)
        assert (answer.stdout, answer.status) == ("", 0) if version in WITH_CHECK else answer.code() == 1

        answer = lab.cni("DEL", "tuning", last if version in WITH_CHECK else conf, **more)
        answer.ok()
        assert answer.stdout == ""
        host.assert_clean(on_host)
        assert state(one.netns) == before
        lab.cni("DEL", "tuning", conf, **more).ok()
    host.run(["ip", "link", "delete", "br0"])


def test_as_a_process(lab: Lab) -> None:
    with container(lab) as one:
        before = state(one.netns)
        more: dict[str, Any] = {"netns": one.netns, "container_id": one.container_id}
        result = lab.host.cni("ADD", "tuning", one.conf(ALL), **more).result()
        assert result["interfaces"][1]["mac"] == ALL["mac"]
        lab.host.cni("CHECK", "tuning", one.conf(ALL), **more).ok()
        lab.host.cni("DEL", "tuning", one.conf(ALL), **more).ok()
        assert state(one.netns) == before


# Keys


def test_nothing_asked_for_is_nothing_done(lab: Lab) -> None:
    with container(lab) as one:
        before, facts = state(one.netns), lab.host.snapshot()
        assert one.add({}) == one.result()
        assert one.add({"promisc": False, "mtu": 0, "mac": "", "sysctl": {}, "dataDir": ""}) == one.result()
        assert state(one.netns) == before
        lab.host.assert_clean(facts)
        one.delete({})


SOURCES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"mac": "02-00-00-00-00-0A"}, "", {"mac": "02:00:00:00:00:0a"}),
    ({"mac": "02:00:00:00:00:0a"}, "MAC=02:00:00:00:00:0b", {"mac": "02:00:00:00:00:0b"}),
    (
        {"mac": "02:00:00:00:00:0a"},
        "IgnoreUnknown=1;K8S_POD_NAME=p;MAC=02:00:00:00:00:0b;IP=10.0.0.9",
        {"mac": "02:00:00:00:00:0b"},
    ),
    (
        {"mac": "02:00:00:00:00:0a", "runtimeConfig": {"mac": "02:00:00:00:00:0c"}},
        "MAC=02:00:00:00:00:0b",
        {"mac": "02:00:00:00:00:0c"},
    ),
    (
        {"runtimeConfig": {"mac": "02:00:00:00:00:0c"}, "args": {"cni": {"mac": "02:00:00:00:00:0d"}}},
        "MAC=02:00:00:00:00:0b",
        {"mac": "02:00:00:00:00:0d"},
    ),
    ({"mac": "02:00:00:00:00:0a", "args": {"cni": {"mac": ""}}}, "", {}),
    ({"mtu": 1400, "args": {"cni": {"mtu": 1300}}}, "", {"mtu": 1300}),
    ({"mtu": 1400, "args": {"cni": {"mtu": 0}}}, "", {}),
    ({"promisc": True, "args": {"cni": {"promisc": False}}}, "", {}),
    ({"args": {"cni": {"promisc": True, "allmulti": True}}}, "", {"flags": ["ALLMULTI", "PROMISC"]}),
    ({"allmulti": True, "args": {"cni": {"allmulti": False}}}, "", {}),
    ({"txQLen": 5, "args": {"cni": {"txQLen": 0}}}, "", {"txqlen": 0}),
    ({"args": {"cni": {"labels": [{"key": "a", "value": "b"}], "ips": ["10.0.0.1"]}}}, "", {}),
]


def test_where_values_come_from(lab: Lab) -> None:
    with container(lab) as one:
        mac, mtu, queue, flags = before = state(one.netns)["eth0"]
        for keys, args, wanted in SOURCES:
            given = (wanted.get("mac", mac), wanted.get("mtu", mtu), wanted.get("txqlen", queue))
            bare = one.result()["interfaces"][0]
            result = one.add(keys, args=args)
            assert state(one.netns)["eth0"] == (*given, sorted({*flags, *wanted.get("flags", [])})), keys
            assert [interface["mac"] for interface in result["interfaces"]] == [bare["mac"], given[0]], keys
            one.delete(keys, args=args)
            assert state(one.netns)["eth0"] == before, keys


def test_spellings_of_sysctls(lab: Lab) -> None:
    with container(lab) as one:
        one.link("e.1")
        before = state(one.netns)
        for key, path in (
            ("net.ipv4.conf.IFNAME.arp_filter", "eth0/arp_filter"),
            ("net/ipv4/conf/IFNAME/arp_filter", "eth0/arp_filter"),
            ("net/ipv4.conf.eth0.arp_filter", "eth0/arp_filter"),
            ("/net//ipv4/conf/all/arp_filter", "all/arp_filter"),
            ("net..ipv4.conf.lo.arp_filter.", "lo/arp_filter"),
        ):
            keys = {"sysctl": {key: "1"}}
            one.add(keys)
            assert one.sysctl(f"net/ipv4/conf/{path}") == "1", key
            one.call("CHECK", keys).ok()
            one.delete(keys)
            assert state(one.netns) == before, key
        keys = {"sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}}
        one.add(keys, ifname="e.1")
        assert one.netns.run(["cat", "/proc/sys/net/ipv4/conf/e.1/arp_filter"]).stdout == "1\n"
        one.delete(keys, ifname="e.1")
        assert state(one.netns) == before


def test_sysctls_of_args(lab: Lab) -> None:
    """They replace, also under another spelling, and are taken where the configuration has none of its own."""
    with container(lab) as one:
        before = state(one.netns)
        for own in ({"net.ipv4.ip_default_ttl": "70", "net.ipv4.conf.all.arp_filter": "1"}, {}):
            keys = {"sysctl": own, "args": {"cni": {"sysctl": {"net/ipv4/ip_default_ttl": "71"}}}}
            if not own:
                del keys["sysctl"]
            one.add(keys)
            assert one.sysctl("net.ipv4.ip_default_ttl") == "71"
            assert one.sysctl("net.ipv4.conf.all.arp_filter") == ("1" if own else "0")
            one.call("CHECK", keys).ok()
            one.delete(keys)
            assert state(one.netns) == before


def test_sysctls_of_all_kinds(lab: Lab) -> None:
    with container(lab) as one:
        long = ",".join(str(port) for port in range(1024, 6000, 2))  # the kernel prints more than a page of it
        assert len(long) > 8192 > 4096
        half = ",".join(str(port) for port in range(1024, 2600, 2))
        one.netns.run(["sh", "-c", f"printf %s {half} > /proc/sys/net/ipv4/ip_local_reserved_ports"])
        one.netns.run(["sh", "-c", f"printf {half},%s 2601,2603 > /proc/sys/net/ipv4/ip_local_reserved_ports"])
        before = state(one.netns)
        keys = {
            "sysctl": {
                "net.ipv4.ip_local_reserved_ports": "",
                "net.ipv4.tcp_rmem": "4096 87380 4194304",
                "net.ipv4.ping_group_range": "0 2147483647",
                "net.ipv4.route.flush": "1",  # can only be written
                "net.core.somaxconn": "1234",
            }
        }
        one.add(keys)
        assert one.sysctl("net.ipv4.ip_local_reserved_ports") == ""
        assert one.sysctl("net.ipv4.tcp_rmem").split() == ["4096", "87380", "4194304"]
        one.call("CHECK", keys).ok()
        one.delete(keys)
        assert state(one.netns) == before
        # And the other way round.
        one.netns.run(["sh", "-c", "echo > /proc/sys/net/ipv4/ip_local_reserved_ports"])
        empty = state(one.netns)
        one.add({"sysctl": {"net.ipv4.ip_local_reserved_ports": "8080,9090"}})
        assert one.sysctl("net.ipv4.ip_local_reserved_ports") == "8080,9090"
        one.delete({"sysctl": {"net.ipv4.ip_local_reserved_ports": "8080,9090"}})
        assert state(one.netns) == empty


@needs_ipv6
def test_an_mtu_too_small_for_ipv6(lab: Lab) -> None:
    """Below 1280 an interface has no sysctls of IPv6: those come back first with the MTU."""
    with container(lab) as one:
        one.netns.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_ra_rtr_pref"])
        before = state(one.netns)
        keys = {"mtu": 1000, "sysctl": {"net.ipv6.conf.IFNAME.forwarding": "1"}}
        one.add(keys)
        assert one.netns.links()["eth0"]["mtu"] == 1000
        one.delete(keys)
        assert one.netns.links()["eth0"]["mtu"] == before["eth0"][1]
        assert one.sysctl("net.ipv6.conf.eth0.forwarding") == "0"


def test_a_directory_in_place_of_a_backup_keeps_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert tuning_backup.read(str(tmp_path)) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_of_ones_own(lab: Lab) -> None:
    with container(lab) as one:
        before, facts = state(one.netns), lab.host.snapshot()
        for keys in ({"mtu": 1400, "dataDir": "/run/netloom/some/where"}, {"mtu": 1400}):
            one.add({"mtu": 1400, "dataDir": "/run/netloom/some/where"})
            assert lab.host.path("/run/netloom/some/where/c1_eth0.json").stat().st_mode & 0o777 == 0o600
            one.delete(keys)  # the record knows where, whatever the configuration says by now
            assert state(one.netns) == before
            for directory in ("/run/netloom/some/where", "/run/netloom/some"):
                lab.host.path(directory).rmdir()
            lab.host.assert_clean(facts)


# The allow-list


def test_the_allow_list(lab: Lab) -> None:
    file = lab.host.path(f"{ALLOWLIST}/allowlist.conf")
    keys = {"sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}}
    try:
        with container(lab) as one:
            for text, allowed in (
                ("^net.ipv4.conf.IFNAME.arp_[a-z]*$\n", True),
                ("\n  nothing\n\n  net\\.ipv4\\.conf\\.IFNAME  \n", True),
                ("arp", True),
                ("", False),
                ("^net.ipv4.conf.eth0.arp_filter$", False),
                ("^arp", False),
            ):
                file.write_text(text)
                if allowed:
                    one.add(keys)
                    one.delete(keys)
                    lab.cni("STATUS", "tuning", one.conf(keys)).ok()
                    continue
                error = one.refused(keys)
                assert (error["code"], "allowlist.conf" in error["msg"]) == (7, True)
                assert 'sysctl["net.ipv4.conf.IFNAME.arp_filter"]' in error["msg"]
                assert lab.cni("STATUS", "tuning", one.conf(keys)).code() == 50
                one.delete(keys)
            one.add({"mtu": 1400})
            one.delete({"mtu": 1400})
            for text in ("(", "^net[[:alpha:]]", r"\pL"):
                file.write_text(f"fine\n{text}\n")
                error = one.refused(keys)
                assert (error["code"], "line 2" in error["msg"]) == (7, True)
            file.write_text("^net.ipv4.ip_default_ttl$\n")
            one.refused({"args": {"cni": {"sysctl": {"net.ipv4.ip_forward": "1"}}}})
    finally:
        file.unlink(missing_ok=True)


# Bad input


WRONG: list[tuple[dict[str, Any], str, int, tuple[str, ...]]] = [
    ({"mac": "02:00:00:00:00"}, "", 7, ("$.mac", "02:00:00:00:00")),
    ({"mac": "01:00:5e:00:00:01"}, "", 7, ("$.mac", "01:00:5e:00:00:01", "multicast")),
    ({"mac": "00:00:00:00:00:00"}, "", 7, ("$.mac", "00:00:00:00:00:00")),
    ({"mac": 5}, "", 7, ("$.mac", "found 5")),
    ({}, "MAC=zz", 7, ("CNI_ARGS: MAC", "zz")),
    ({}, "K8S_POD_NAME=x", 4, ("CNI_ARGS", "K8S_POD_NAME=x")),
    ({"runtimeConfig": {"mac": "1"}}, "", 7, ("$.runtimeConfig.mac", "1")),
    ({"args": {"cni": {"mac": "1"}}}, "", 7, ("$.args.cni.mac", "1")),
    ({"args": {"cni": 3}}, "", 7, ("$.args.cni", "found 3")),
    ({"mtu": -1}, "", 7, ("$.mtu", "-1")),
    ({"mtu": 2**40}, "", 7, ("$.mtu", str(2**40))),
    ({"mtu": "1400"}, "", 7, ("$.mtu", '"1400"')),
    ({"mtu": 1400.5}, "", 7, ("$.mtu", "1400.5")),
    ({"mtu": 67}, "", 7, ("$.mtu", "67", "eth0")),
    ({"mtu": 70000}, "", 7, ("$.mtu", "70000")),
    ({"mac": "02:00:00:00:00:09", "args": {"cni": {"mtu": 70000}}}, "", 7, ("$.args.cni.mtu", "70000")),
    ({"txQLen": -1}, "", 7, ("$.txQLen", "-1")),
    ({"txQLen": 2**32}, "", 7, ("$.txQLen", str(2**32))),
    ({"txQLen": True}, "", 7, ("$.txQLen", "true")),
    ({"promisc": "yes"}, "", 7, ("$.promisc", '"yes"')),
    ({"allmulti": 1}, "", 7, ("$.allmulti", "1")),
    ({"dataDir": "run/x"}, "", 7, ("$.dataDir", "run/x")),
    ({"dataDir": "/run/\0x"}, "", 7, ("$.dataDir",)),
    ({"dataDir": 1}, "", 7, ("$.dataDir", "1")),
    ({"mtu": 1400, "dataDir": "/proc/1/status/x"}, "", 5, ("/proc/1/status/x/c1_eth0.json", "backup")),
    ({"mtu": 1400, "dataDir": "/run/" + 300 * "x"}, "", 5, ("backup", "too long")),
    ({"sysctl": []}, "", 7, ("$.sysctl", "[]")),
    ({"sysctl": {"net.ipv4.ip_default_ttl": 5}}, "", 7, ("$.sysctl", "expected str")),
    ({"sysctl": {"kernel.hostname": "x"}}, "", 7, ('sysctl["kernel.hostname"]', '"x"', "net.")),
    ({"sysctl": {"net": "1"}}, "", 7, ('sysctl["net"]', '"1"')),
    ({"sysctl": {"": "1"}}, "", 7, ('sysctl[""]', '"1"')),
    ({"sysctl": {"net/../kernel/hostname": "1"}}, "", 7, ("kernel/hostname", 'no "/proc/sys/net/kernel/hostname"')),
    ({"sysctl": {"/etc/passwd": "1"}}, "", 7, ("/etc/passwd",)),
    ({"sysctl": {"../../etc/passwd": "1"}}, "", 7, ("/etc/passwd",)),
    ({"sysctl": {"net.ipv4.ip_default_ttl\0": "1"}}, "", 7, ("\\u0000",)),
    ({"sysctl": {"net.ipv4.\n": "1"}}, "", 7, ("\\n",)),
    ({"sysctl": {"net." + 5000 * "x": "1"}}, "", 7, ("sysctl", "xxx")),
    ({"sysctl": {"net.ipv4.nothing": "1"}}, "", 7, ("net.ipv4.nothing", '"1"', "/proc/sys/net/ipv4/nothing")),
    ({"sysctl": {"net.ipv4.conf.eth7.arp_filter": "1"}}, "", 7, ("eth7",)),
    ({"sysctl": {"net.ipv4.conf": "1"}}, "", 7, ('"net.ipv4.conf"',)),
    ({"sysctl": {"net.ipv4.ip_default_ttl": "999"}}, "", 7, ('"999"', "refused by the kernel")),
    ({"sysctl": {"net.ipv4.ip_default_ttl": "many"}}, "", 7, ('"many"', "refused by the kernel")),
    ({"sysctl": {"net.ipv4.ip_default_ttl": "\x00"}}, "", 7, ("refused by the kernel",)),
    ({"sysctl": {"net.ipv4.ip_default_ttl": "9" * 9000}}, "", 7, ("refused by the kernel",)),
    (
        {"sysctl": {"net.ipv4.ip_default_ttl": "1", "net/ipv4/ip_default_ttl": "2"}},
        "",
        7,
        ("net.ipv4.ip_default_ttl", "net/ipv4/ip_default_ttl", "one value"),
    ),
    ({"args": {"cni": {"sysctl": {"a": "1"}}}}, "", 7, ('$.args.cni.sysctl["a"]',)),
]


def test_configurations_that_are_wrong(lab: Lab) -> None:
    facts = lab.host.snapshot()
    with container(lab) as one:
        before = state(one.netns)
        for keys, args, code, words in WRONG:
            # Others are in order, and set before: they are undone.
            good: dict[str, Any] = {"allmulti": True, "sysctl": {"net.ipv4.conf.all.arp_filter": "1"}, **keys}
            if isinstance(good["sysctl"], dict):
                good["sysctl"] = {"net.ipv4.conf.all.arp_filter": "1", **good["sysctl"]}
            error = one.refused(good, before, args=args)
            assert error["code"] == code, error
            text = f"{error['msg']} {error.get('details', '')}"
            assert [word for word in words if word not in text] == [], error
            one.delete(good, args=args)
    lab.host.assert_clean(facts)


def test_a_key_given_twice(lab: Lab) -> None:
    with container(lab) as one:
        before = state(one.netns)
        rest = json.dumps({**one.conf({}), "sysctl": "HERE"})
        for text, wrong in (
            ('{"net.core.somaxconn": "1", "net.core.somaxconn": "2"}', True),
            ('{"net.core.somaxconn": "1", "net.core.somaxc\\u006fnn": "1"}', True),
            ('{ "net.core.somaxconn" :\n"1" , "net.ipv4.ip_default_ttl": "2" }', False),
            (r'{"net.ipv4.conf.all.tag": "1", "net.core.somaxconn": "5"}', False),
        ):
            conf = rest.replace('"HERE"', text).encode()
            answer = lab.cni("ADD", "tuning", conf, netns=one.netns)
            assert (answer.status == 1) == wrong, answer
            if wrong:
                assert (answer.code(), "duplicated sysctl keys" in answer.json["msg"]) == (7, True)
                assert "net.core.somaxconn" in answer.json["msg"]
            lab.cni("DEL", "tuning", conf, netns=one.netns).ok()
            assert state(one.netns) == before


def test_without_what_it_needs(lab: Lab) -> None:
    with container(lab) as one:
        conf = one.conf(ALL)
        del conf["prevResult"]
        for verb in ("ADD", "CHECK"):
            answer = lab.cni(verb, "tuning", conf, netns=one.netns)
            assert (answer.code(), "prevResult missing" in answer.json["msg"]) == (7, True)
        one.netns.run(["ip", "link", "set", "eth0", "down"])
        one.netns.run(["ip", "link", "set", "eth0", "name", "other"])
        for keys in ({"mtu": 1400}, {"sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}}):
            answer = lab.cni("ADD", "tuning", {**conf, **keys, "prevResult": {"cniVersion": "1.1.0"}}, netns=one.netns)
            assert answer.code() in (4, 7)
            assert "eth0" in answer.json["msg"]
        # Sysctls of the namespace need no interface.
        bare = {key: conf[key] for key in ("cniVersion", "name", "type")}
        bare |= {"sysctl": {"net.ipv4.ip_default_ttl": "70"}, "prevResult": {"cniVersion": "1.1.0", "ips": []}}
        before = one.sysctl("net.ipv4.ip_default_ttl")
        lab.cni("ADD", "tuning", bare, netns=one.netns).ok()
        assert one.sysctl("net.ipv4.ip_default_ttl") == "70"
        lab.cni("DEL", "tuning", bare, netns=one.netns).ok()
        assert one.sysctl("net.ipv4.ip_default_ttl") == before


def test_what_the_whole_host_shares_is_never_touched(lab: Lab) -> None:
    """Those sysctls are not in a container's namespace, or read-only there."""
    with container(lab) as one:
        before = state(lab.host)
        for key in (
            "net.core.rmem_max",
            "net.core.netdev_max_backlog",
            "net.netfilter.nf_conntrack_max",
            "net.netfilter.nf_conntrack_buckets",
            "net.ipv4.tcp_mem",
            "net.ipv4.tcp_allowed_congestion_control",
            "net.ipv4.inet_peer_threshold",
        ):
            old = lab.host.run(["cat", f"/proc/sys/{key.replace('.', '/')}"], check=False).stdout.strip()
            answer = one.call("ADD", {"sysctl": {key: "65537"}})
            assert answer.code() == 7, key
            assert key in answer.json["msg"]
            assert lab.host.run(["cat", f"/proc/sys/{key.replace('.', '/')}"], check=False).stdout.strip() == old
        assert state(lab.host) == before


# CHECK


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ip link set eth0 address 02:00:00:00:00:99", 'mac of eth0 is "02:00:00:00:00:99", not "02:00:00:00:00:77"'),
        ("ip link set eth0 mtu 1400", "mtu of eth0 is 1400, not 1380"),
        ("ip link set eth0 promisc off", "promisc of eth0 is false, not true"),
        ("ip link set eth0 allmulticast off", "allmulti of eth0 is false, not true"),
        ("ip link set eth0 txqueuelen 9", "txQLen of eth0 is 9, not 123"),
        ("sysctl -qw net.ipv4.ip_default_ttl=9", 'sysctl net.ipv4.ip_default_ttl is "9", not "77"'),
        ("sysctl -qw net.ipv4.conf.eth0.arp_filter=0", 'sysctl net.ipv4.conf.eth0.arp_filter is "0", not "1"'),
        ("ip link delete eth0", "is gone"),
    ],
)
def test_check_finds(lab: Lab, command: str, says: str) -> None:
    with container(lab) as one:
        conf = one.conf(ALL)
        one.add(ALL)
        lab.cni("CHECK", "tuning", conf, netns=one.netns).ok()
        one.netns.run(command.split())
        answer = lab.cni("CHECK", "tuning", conf, netns=one.netns)
        assert answer.code() == 999
        assert says in answer.json["msg"]
        lab.cni("DEL", "tuning", conf, netns=one.netns).ok()


# DEL


def test_del_whatever_is_missing(lab: Lab) -> None:
    facts = lab.host.snapshot()
    for how in ("no netns", "path gone", "plain file", "no result", "wrong keys", "no interface", "other namespace"):
        with container(lab) as one, container(lab) as other:
            within = lab.host.snapshot()
            old = state(one.netns)
            strange = state(other.netns)
            conf = one.conf(ALL)
            one.add(ALL)
            where: Netns | str = one.netns
            if how in ("no netns", "path gone", "plain file"):
                where = {"no netns": "", "path gone": "/run/netns/gone", "plain file": "/etc/passwd"}[how]
            elif how == "no result":
                del conf["prevResult"]
            elif how == "wrong keys":
                conf |= {"mtu": "x", "sysctl": 5, "dataDir": {}, "args": [], "prevResult": 3}
            elif how == "no interface":
                one.netns.run(["ip", "link", "delete", "eth0"])
            else:
                where = other.netns
            answer = lab.cni("DEL", "tuning", conf, netns=where)
            answer.ok()
            if how in ("no result", "wrong keys"):
                assert state(one.netns) == old, how
            if how == "no interface":
                assert one.sysctl("net.ipv4.ip_default_ttl") != "77"
            assert state(other.netns) == strange, how
            lab.host.assert_clean(within)
            lab.cni("DEL", "tuning", conf, netns=where).ok()
    lab.host.assert_clean(facts)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"mtu": "x"}',
        b'{"mtu": -5}',
        b'{"mac": "zz"}',
        b'{"txQLen": 99999999999}',
        b"\xff\xfe",
        b'{"netloom": {}}',
        b'{"netloom": {"place": {"bootId": "", "netnsInode": 0, "netnsCookie": 0, "ifindex": 0}, "beganNs": 1, '
        b'"sysctls": {"../../kernel/hostname": "x"}}}',
        b"[" * 5000,
    ],
)
def test_del_with_a_corrupt_backup(lab: Lab, text: bytes) -> None:
    with container(lab) as one:
        facts = lab.host.snapshot()
        one.add(ALL)
        changed = state(one.netns)
        lab.host.path(f"{BACKUPS}/c1_eth0.json").write_bytes(text)
        one.delete(ALL)
        assert state(one.netns) == changed
        lab.host.assert_clean(facts)


def test_a_backup_that_is_none(lab: Lab) -> None:
    with container(lab) as one:
        path = lab.host.path(f"{BACKUPS}/c1_eth0.json")
        path.mkdir()
        assert one.refused({"mtu": 1400})["code"] == 5
        assert one.call("DEL", {"mtu": 1400}).code() > 0
        path.rmdir()
        lab.host.run(["mkfifo", f"{BACKUPS}/c1_eth0.json"])
        one.delete({"mtu": 1400})
        path.symlink_to("/etc/hostname")
        one.add({"mtu": 1400})
        assert not path.is_symlink()
        one.delete({"mtu": 1400})


def test_what_the_kernel_refuses_is_reported_once(lab: Lab) -> None:
    with container(lab) as one:
        facts = lab.host.snapshot()
        before = state(one.netns)
        keys = {"mtu": 1400, "sysctl": {"net.ipv4.ip_default_ttl": "70"}}
        one.add(keys)
        path = lab.host.path(f"{BACKUPS}/c1_eth0.json")
        backup = json.loads(path.read_bytes())
        path.write_text(json.dumps({**backup, "mtu": 1_000_000}))
        answer = one.call("DEL", keys)
        assert answer.code() == 999
        assert "MTU 1000000" in answer.json["msg"]
        assert one.sysctl("net.ipv4.ip_default_ttl") != "70"  # the rest was restored
        one.delete(keys)
        one.netns.run(["ip", "link", "set", "eth0", "mtu", str(before["eth0"][1])])
        assert state(one.netns) == before
        lab.host.assert_clean(facts)


# Backups of others


def test_a_stale_backup_is_never_applied(lab: Lab) -> None:
    """A container died without DEL; the next one has its id."""
    facts = lab.host.snapshot()
    for first in (ALL, {"mtu": 1300}, {"sysctl": {"net.ipv4.ip_default_ttl": "70"}}):
        for second in (ALL, {}, {"promisc": True}):
            with container(lab) as dead:
                dead.add(first)
            with container(lab) as one:
                before = state(one.netns)
                one.add(second)
                one.delete(second)
                assert state(one.netns) == before
            lab.host.assert_clean(facts)
    # Also where the ADD was the reference's, which leaves it, and DEL is ours; or where another record knows of it.
    with container(lab) as dead:
        dead.add(ALL)
        old = lab.host.path(f"{BACKUPS}/c1_eth0.json").read_bytes()
    with container(lab) as one:
        before = state(one.netns)
        one.add({"sysctl": {"net.ipv4.ip_default_ttl": "70"}})
        lab.host.path(f"{BACKUPS}/c1_eth0.json").write_bytes(old)
        one.delete(ALL)
        assert one.sysctl("net.ipv4.ip_default_ttl") == "70"
        assert state(one.netns)["eth0"] == before["eth0"]
    lab.host.assert_clean(facts)


def test_an_interface_of_the_same_name(lab: Lab) -> None:
    """The interface was made anew in between: its attributes are its own, the namespace's sysctls are the old ones."""
    with container(lab) as one:
        one.add(ALL)
        one.netns.run(["ip", "link", "delete", "eth0"])
        one.link()
        before = state(one.netns)
        one.delete(ALL)
        assert state(one.netns)["eth0"] == before["eth0"]
        assert one.sysctl("net.ipv4.ip_default_ttl") != "77"


def test_a_missed_del_is_made_up_for(lab: Lab) -> None:
    with container(lab) as one:
        facts = lab.host.snapshot()
        before = state(one.netns)
        one.add({**ALL, "dataDir": "/run/cni/tuning/elsewhere"})
        second = {"sysctl": {"net.ipv4.ip_default_ttl": "60", "net.core.somaxconn": "77"}, "mtu": 1350}
        one.add(second)
        after = state(one.netns)
        assert (after["eth0"][0], after["eth0"][1]) == (before["eth0"][0], 1350)
        one.delete(second)
        assert state(one.netns) == before
        lab.host.path("/run/cni/tuning/elsewhere").rmdir()
        lab.host.assert_clean(facts)


@pytest.mark.parametrize("order", ["012", "021", "102", "120", "201", "210"])
def test_several_attachments_set_one_sysctl(lab: Lab, order: str) -> None:
    """Whichever goes first, the values of those that are left stay, and the last one restores the container's."""
    with container(lab) as one:
        names = ["eth0", "eth1", "eth2"]
        for name in names[1:]:
            one.link(name)
        before = state(one.netns)
        keys = [
            {"sysctl": {"net.ipv4.ip_default_ttl": str(70 + number), "net.ipv4.conf.IFNAME.arp_filter": "1"}}
            for number in range(3)
        ]
        for name, key in zip(names, keys, strict=True):
            one.add(key, ifname=name)
        left = [0, 1, 2]
        for number in map(int, order):
            one.delete(keys[number], ifname=names[number])
            left.remove(number)
            if left:
                assert one.sysctl("net.ipv4.ip_default_ttl") == str(70 + left[-1])
        assert state(one.netns) == before


# GC and the sweep


def test_gc_removes_the_backups_of_the_dead(lab: Lab) -> None:
    with container(lab, "living") as living:
        living.add(ALL)
        facts = lab.host.snapshot()
        with container(lab, "dead") as dead:
            dead.add(ALL)
        with container(lab, "listed") as listed:
            listed.add(ALL)
        conf = living.conf(ALL)
        valid = [{"containerID": "listed", "ifname": "eth0"}]
        lab.cni("GC", "tuning", {**conf, "name": "other", "cni.dev/valid-attachments": []}).ok()
        assert dead.backup()
        answer = lab.cni("GC", "tuning", {**conf, "cni.dev/valid-attachments": valid})
        answer.ok()
        assert "living eth0" in answer.stderr
        assert dead.backup() is None
        assert listed.backup()
        assert living.backup()
        lab.cni("GC", "tuning", {**conf, "cni.dev/valid-attachments": []}).ok()
        lab.host.assert_clean(facts)
        with container(lab, "dead") as dead:
            dead.add(ALL)
        lab.host.run([sys.executable, "-m", "cli", "gc"])
        lab.host.assert_clean(facts)
        living.call("CHECK", ALL).ok()
        living.delete(ALL)
        lab.cni("GC", "tuning", {**conf, "cni.dev/valid-attachments": []}).ok()


# Faults


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_each_step_of_add_leaves_nothing(lab: Lab, when: str) -> None:
    with container(lab) as one:
        before, facts = state(one.netns), lab.host.snapshot()
        called = one.call("ADD", ALL).calls
        one.delete(ALL)
        assert len(called) > 12
        for number, label in enumerate(called, 1):
            kind = "error" if number % 2 else "signal"
            answer = one.call("ADD", ALL, faults=[{"at": number, "when": when, "kind": kind}])
            assert answer.code() > 0, label
            try:
                assert state(one.netns) == before
                lab.host.assert_clean(facts)
            except AssertionError as error:
                raise AssertionError(f"{kind} {when} step {number}, {label}: {error}") from error
        one.add(ALL)
        one.delete(ALL)
        assert state(one.netns) == before


def test_a_fault_in_the_undo_leaves_the_rest_to_del(lab: Lab) -> None:
    with container(lab) as one:
        before, facts = state(one.netns), lab.host.snapshot()
        last = {"at": len(one.call("ADD", ALL).calls), "when": "after", "kind": "error"}
        one.delete(ALL)
        whole = one.call("ADD", ALL, faults=[last])
        assert len(whole.undo_calls) > 8
        for number, label in enumerate(whole.undo_calls, 1):
            for when in ("before", "after"):
                fault = {"at": number, "when": when, "kind": "error", "undo": True}
                answer = one.call("ADD", ALL, faults=[last, fault])
                assert answer.code() > 0
                assert "INJECTED" in answer.stderr, label
                one.delete(ALL)
                assert state(one.netns) == before, label
                lab.host.assert_clean(facts)


def test_a_fault_at_each_step_of_del(lab: Lab) -> None:
    """All else is attempted, and the next DEL succeeds."""
    shared = {"sysctl": {"net.ipv4.ip_default_ttl": "60"}}
    facts = lab.host.snapshot()

    def attempt(*faults: dict[str, Any]) -> Served:
        with container(lab) as one:
            one.link("eth1")
            old = one.sysctl("net.ipv4.ip_default_ttl")
            one.add(ALL)
            one.add(shared, ifname="eth1")
            answer = one.call("DEL", ALL, faults=faults)
            one.delete(ALL)
            assert one.sysctl("net.ipv4.ip_default_ttl") == "60"
            one.delete(shared, ifname="eth1")
            left = one.sysctl("net.ipv4.ip_default_ttl")
            # What could not be handed over is the value that the other attachment found.
            assert left == old or "replace tuning's backup" in answer.stdout, answer
        return answer

    called = attempt().calls
    assert len(called) > 10
    for number, label in enumerate(called, 1):
        for when in ("before", "after"):
            assert attempt({"at": number, "when": when, "kind": "error"}).code() > 0, label
            lab.host.assert_clean(facts)


# Beside the reference

SAME: list[dict[str, Any]] = [
    {"mtu": 1380},
    {"mac": "02:00:00:00:00:77"},
    {"promisc": True, "allmulti": False},
    {"allmulti": True, "mtu": 1280, "mac": "02:00:00:00:00:77"},
    {"sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1", "net/ipv4/ip_default_ttl": "9"}},
    {"sysctl": {"net.core.somaxconn": "500"}, "mtu": 1500, "args": {"cni": {"sysctl": {"net.core.somaxconn": "501"}}}},
    {"runtimeConfig": {"mac": "02:00:00:00:00:78"}, "args": {"cni": {"mtu": 1300, "promisc": True}}},
    {},
]


@needs_reference
@pytest.mark.parametrize("version", ["0.2.0", "1.0.0"])
def test_as_the_reference_does_it(lab: Lab, version: str) -> None:
    for keys in SAME:
        found: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = []
        for theirs in (False, True):
            with container(lab, "c1", version) as one:
                one.netns.run(["ip", "link", "set", "eth0", "address", "02:00:00:00:00:01"])
                one.netns.run(["ip", "link", "set", "eth0-peer", "address", "02:00:00:00:00:02"])
                before = state(one.netns)
                conf = {**keys, "prevResult": previous(one, version)}
                result = one.reference("ADD", conf) if theirs else one.add(conf)
                assert "code" not in result, result
                result = json.loads(json.dumps(result).replace(one.netns.path, ""))
                found.append(({**result, "dns": {}}, state(one.netns), one.backup()))
                one.delete(conf)
                after = state(one.netns)
                assert after["eth0"] == before["eth0"], "whoever changed it, we restore it"
                assert theirs or after == before
        (result, tuned, backup), (their_result, their_tuned, their_backup) = found
        assert result == their_result, keys
        assert tuned == their_tuned, keys
        if backup is not None:
            assert backup.pop("netloom")
        assert (backup or None) == their_backup, keys


def previous(one: Container, version: str) -> dict[str, Any]:
    if version == "0.2.0":
        return {"cniVersion": version, "ip4": {"ip": "10.7.0.5/24"}}
    ip = {"address": "10.7.0.5/24", "interface": 1, **({} if version == "1.0.0" else {"version": "4"})}
    return {**one.result(), "ips": [ip], "dns": {}}


@needs_reference
def test_either_restores_what_the_other_changed(lab: Lab) -> None:
    keys = {"mac": "02:00:00:00:00:77", "mtu": 1380, "promisc": True, "allmulti": True}
    with container(lab, version="1.0.0") as one:
        facts = lab.host.snapshot()
        before = state(one.netns)
        assert "code" not in one.reference("ADD", keys)
        assert state(one.netns) != before
        one.call("CHECK", keys).ok()
        one.delete(keys)
        assert state(one.netns) == before
        lab.host.assert_clean(facts)

        one.add({**keys, "sysctl": {"net.ipv4.ip_default_ttl": "9"}})
        assert one.reference("CHECK", {**keys, "sysctl": {"net.ipv4.ip_default_ttl": "9"}}) == {}
        assert one.reference("DEL", keys) == {}
        assert state(one.netns)["eth0"] == before["eth0"]
        assert one.sysctl("net.ipv4.ip_default_ttl") == "9"  # it keeps none of those
        assert one.backup() is None
        one.delete(keys)  # the record goes
        lab.host.assert_clean(facts)
