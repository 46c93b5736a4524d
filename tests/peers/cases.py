"""The configurations that go through both. Groups share a pair of hosts; each case begins on a bare one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.hosts import IPV6
from tests.peers.twins import Case

FOUR = "10.1.0.0/16"
SIX = "fd00:1::/64"
DEFAULTS: list[dict[str, Any]] = [{"dst": "0.0.0.0/0"}]
DEFAULTS6: list[dict[str, Any]] = [{"dst": "::/0"}]
UPLINK = """
    ip link add uplink0 address 02:00:00:00:00:01 type veth peer name uplink1 address 02:00:00:00:00:02
    ip link set uplink0 up
    ip link set uplink1 up
"""


def host_local(*subnets: str, **keys: Any) -> dict[str, Any]:
    return {"type": "host-local", "ranges": [[{"subnet": subnet}] for subnet in subnets or (FOUR,)], **keys}


def static(*addresses: str, **keys: Any) -> dict[str, Any]:
    """ "10.1.0.5/16 10.1.0.1" has a gateway."""
    entries = []
    for text in addresses:
        address, _, gateway = text.partition(" ")
        entries.append({"address": address, **({"gateway": gateway} if gateway else {})})
    return {"type": "static", "addresses": entries, **keys}


def dual(**keys: Any) -> dict[str, Any]:
    return host_local(FOUR, SIX, **keys)


def bridge(**keys: Any) -> Mapping[str, Any]:
    return {"type": "bridge", "bridge": "br0", **keys}


def ptp(**keys: Any) -> Mapping[str, Any]:
    return {"type": "ptp", **keys}


def macvlan(**keys: Any) -> Mapping[str, Any]:
    return {"type": "macvlan", "master": "uplink0", **keys}


def loopback() -> Mapping[str, Any]:
    return {"type": "loopback"}


BRIDGE = [
    Case("bridge-plain", [bridge(ipam=host_local())]),
    Case("bridge-default-name", [{"type": "bridge", "ipam": host_local()}]),
    Case("bridge-0.1.0", [bridge(isGateway=True, ipam=host_local(routes=DEFAULTS))], "0.1.0"),
    Case("bridge-0.2.0", [bridge(isDefaultGateway=True, ipam=host_local())], "0.2.0"),
    Case("bridge-0.3.0", [bridge(isGateway=True, ipam=host_local(routes=DEFAULTS))], "0.3.0"),
    Case("bridge-0.3.1-dual", [bridge(isGateway=True, ipam=dual(routes=DEFAULTS + DEFAULTS6))], "0.3.1"),
    Case("bridge-0.4.0-dual", [bridge(isDefaultGateway=True, ipMasq=True, ipam=dual())], "0.4.0"),
    Case("bridge-1.0.0-dual", [bridge(isDefaultGateway=True, ipMasq=True, hairpinMode=True, ipam=dual())]),
    Case("bridge-ipv6", [bridge(isDefaultGateway=True, ipam=host_local(SIX))]),
    Case("bridge-without-ipam", [bridge()]),
    Case("bridge-mtu", [bridge(mtu=1400, isGateway=True, ipam=host_local())]),
    Case("bridge-promisc", [bridge(promiscMode=True, ipam=host_local())]),
    Case("bridge-mac", [bridge(capabilities={"mac": True}, ipam=host_local())], runtime={"mac": "02:11:22:33:44:55"}),
    Case("bridge-mac-argument", [bridge(ipam=host_local())], cni_args="IgnoreUnknown=1;MAC=02:11:22:33:44:66"),
    Case("bridge-dns", [bridge(dns={"nameservers": ["192.0.2.53"], "search": ["example"]}, ipam=host_local())]),
    Case("bridge-macspoofchk", [bridge(macspoofchk=True, ipam=host_local())]),
    Case("bridge-force-address", [bridge(isGateway=True, forceAddress=True, ipam=host_local())], host="""
        ip link add br0 address 02:00:00:00:00:02 type bridge; ip address add 10.7.0.1/16 dev br0"""),
    Case("bridge-that-is-there", [bridge(isGateway=True, ipam=host_local())], host="""
        ip link add br0 address 02:00:00:00:00:02 type bridge"""),
    Case("bridge-second-container", [bridge(isDefaultGateway=True, ipam=host_local())], containers=2),
    Case("bridge-masquerade-second-container", [bridge(isGateway=True, ipMasq=True, ipam=host_local())], containers=2),
    Case("bridge-after-loopback", [loopback(), bridge(ipam=host_local())]),
    Case("bridge-gateway-of-ipam", [bridge(isGateway=True, ipam=static("10.1.0.5/16 10.1.0.254", routes=DEFAULTS))]),
    Case("bridge-check-address-gone", [bridge(isGateway=True, ipam=host_local())],
         between="nsenter --net=/run/netns/c1 ip address flush dev eth0"),
    Case("bridge-check-route-gone", [bridge(isGateway=True, ipam=host_local(routes=DEFAULTS))],
         between="nsenter --net=/run/netns/c1 ip route delete default"),
]  # fmt: skip

BRIDGE_ERRORS = [
    Case("bridge-hairpin-and-promisc", [bridge(hairpinMode=True, promiscMode=True, ipam=host_local())],
         error=("hairpinMode", "promiscMode")),
    Case("bridge-other-address", [bridge(isGateway=True, ipam=host_local())], error=("10.7.0.1/16", "forceAddress"),
         host="ip link add br0 address 02:00:00:00:00:02 type bridge; ip address add 10.7.0.1/16 dev br0"),
    Case("bridge-is-no-bridge", [bridge(ipam=host_local())], error=("bridge", "br0", "veth"),
         host="ip link add br0 address 02:00:00:00:00:02 type veth peer name br1 address 02:00:00:00:00:03"),
    Case("bridge-interface-taken", [bridge(ipam=host_local())], error=("eth0",),
         inside="ip link add eth0 address 02:00:00:00:00:03 type bridge"),
    Case("bridge-mtu-of-a-string", [bridge(mtu="1400", ipam=host_local())], error=("mtu",)),
    Case("bridge-invalid-mac", [bridge(capabilities={"mac": True}, ipam=host_local())], error=("mac", "02:11"),
         runtime={"mac": "02:11"}),
    Case("bridge-unknown-version", [bridge(ipam=host_local())], "0.9.9", error=("0.9.9",)),
    Case("bridge-unknown-ipam", [bridge(ipam={"type": "no-such-plugin"})], error=("no-such-plugin",)),
    Case("bridge-network-full", [bridge(ipam=host_local("10.9.0.0/30"))], error=("10.9.0.",), containers=2),
    Case("bridge-vlan-out-of-range", [bridge(vlan=4095, ipam=host_local())], error=("vlan", "4095")),
]  # fmt: skip

PTP = [
    Case("ptp-plain", [ptp(ipam=host_local())]),
    Case("ptp-0.1.0", [ptp(ipam=host_local(routes=DEFAULTS))], "0.1.0"),
    Case("ptp-0.2.0-ipv6", [ptp(ipam=host_local(SIX, routes=DEFAULTS6))], "0.2.0"),
    Case("ptp-0.3.1", [ptp(ipMasq=True, ipam=host_local(routes=DEFAULTS))], "0.3.1"),
    Case("ptp-0.4.0-dual", [ptp(ipMasq=True, ipam=dual(routes=DEFAULTS + DEFAULTS6))], "0.4.0"),
    Case("ptp-1.0.0-dual", [ptp(mtu=1400, ipam=dual(routes=[*DEFAULTS, {"dst": "192.0.2.0/24"}]))]),
    Case("ptp-static", [ptp(ipam=static("10.2.0.9/24 10.2.0.1", routes=DEFAULTS))]),
    Case("ptp-dns", [ptp(dns={"nameservers": ["192.0.2.53"]}, ipam=host_local())]),
    Case("ptp-second-container", [ptp(ipMasq=True, ipam=host_local(routes=DEFAULTS))], containers=2),
    Case("ptp-without-ipam", [ptp()], error=("ipam",)),
    Case("ptp-interface-taken", [ptp(ipam=host_local())], error=("eth0",),
         inside="ip link add eth0 address 02:00:00:00:00:03 type bridge"),
    Case("ptp-mtu-too-large", [ptp(mtu=70000, ipam=host_local())], error=("mtu", "70000")),
]  # fmt: skip

MACVLAN = [
    Case("macvlan-plain", [macvlan(ipam=host_local(routes=DEFAULTS))], host=UPLINK),
    Case("macvlan-0.2.0", [macvlan(ipam=host_local(routes=DEFAULTS))], "0.2.0", host=UPLINK),
    Case("macvlan-0.3.1", [macvlan(mode="private", ipam=host_local())], "0.3.1", host=UPLINK),
    Case("macvlan-0.4.0-dual", [macvlan(mode="vepa", ipam=dual(routes=DEFAULTS + DEFAULTS6))], "0.4.0", host=UPLINK),
    Case("macvlan-ipv6", [macvlan(ipam=host_local(SIX, routes=DEFAULTS6))], host=UPLINK),
    Case("macvlan-without-ipam", [macvlan(mtu=1400)], host=UPLINK),
    Case("macvlan-passthru", [macvlan(mode="passthru", ipam=host_local())], host=UPLINK),
    Case("macvlan-mac", [macvlan(mac="02:11:22:33:44:77", ipam=host_local())], host=UPLINK),
    Case("macvlan-mac-capability", [macvlan(capabilities={"mac": True}, ipam=host_local())], host=UPLINK,
         runtime={"mac": "02:11:22:33:44:88"}),
    Case("macvlan-of-the-default-route", [{"type": "macvlan", "ipam": host_local()}],
         host=UPLINK + "ip address add 192.0.2.2/24 dev uplink0; ip route add default via 192.0.2.1"),
    Case("macvlan-no-such-master", [macvlan(ipam=host_local())], error=("master", "uplink0")),
    Case("macvlan-unknown-mode", [macvlan(mode="sideways", ipam=host_local())], host=UPLINK,
         error=("mode", "sideways")),
    Case("macvlan-mtu-over-the-masters", [macvlan(mtu=1600, ipam=host_local())], host=UPLINK, error=("mtu", "1600")),
    Case("macvlan-interface-taken", [macvlan(ipam=host_local())], host=UPLINK, error=("eth0",),
         inside="ip link add eth0 address 02:00:00:00:00:03 type bridge"),
    Case("macvlan-invalid-mac", [macvlan(mac="02:11", ipam=host_local())], host=UPLINK, error=("mac", "02:11")),
]  # fmt: skip

LOOPBACK = [
    Case("loopback-0.2.0", [loopback()], "0.2.0", ifname="lo"),
    Case("loopback-0.3.1", [loopback()], "0.3.1", ifname="lo"),
    Case("loopback-0.4.0", [loopback()], "0.4.0", ifname="lo"),
    Case("loopback-1.0.0", [loopback()], ifname="lo"),
    Case("loopback-of-another-name", [loopback()]),
    Case("loopback-check-down", [loopback()], between="nsenter --net=/run/netns/c1 ip link set lo down"),
    Case("loopback-with-a-foreign-address", [loopback()], inside="ip address add 192.0.2.7/32 dev lo",
         error=("192.0.2.7",)),
]  # fmt: skip


def alone(name: str, ipam: dict[str, Any], version: str = "1.0.0", **more: Any) -> Case:
    """An IPAM plugin that is executed by itself, as a foreign interface plugin does."""
    return Case(name, [{"type": "bridge", "ipam": ipam}], version, direct=str(ipam["type"]), **more)


RANGE = {"subnet": FOUR, "rangeStart": "10.1.2.10", "rangeEnd": "10.1.2.20", "gateway": "10.1.0.254"}
IPAM = [
    alone("host-local-0.1.0", host_local(FOUR, SIX, routes=DEFAULTS), "0.1.0"),
    alone("host-local-0.3.0", host_local(routes=[{"dst": "192.0.2.0/24", "gw": "10.1.0.9"}]), "0.3.0"),
    alone("host-local-0.4.0-dual", dual(routes=DEFAULTS + DEFAULTS6), "0.4.0"),
    alone("host-local-range", {"type": "host-local", "ranges": [[RANGE]]}),
    alone("host-local-short-form", {"type": "host-local", **RANGE}),
    alone("host-local-two-subnets-in-a-set", {
        "type": "host-local", "ranges": [[{"subnet": "10.9.0.0/30"}, {"subnet": "10.9.1.0/30"}]]}, containers=2),
    alone("host-local-third-container", host_local("10.9.0.0/29"), containers=3),
    alone("host-local-address-asked-for", host_local(), cni_args="IgnoreUnknown=1;IP=10.1.77.77"),
    alone("host-local-own-directory", host_local(dataDir="/var/lib/cni/mine")),
    alone("host-local-resolver", host_local(resolvConf="/run/resolv.conf"),
          host="printf 'nameserver 192.0.2.53\\nsearch a b\\n' >/run/resolv.conf"),
    alone("host-local-full", host_local("10.9.0.0/30"), containers=2, error=("10.9.0.",)),
    alone("host-local-not-in-range", host_local(), cni_args="IP=192.0.2.1", error=("192.0.2.1",)),
    alone("host-local-gateway-asked-for", host_local(), cni_args="IP=10.1.0.1", error=("10.1.0.1",)),
    alone("host-local-subnet-too-small", host_local("10.9.0.0/31"), error=("10.9.0.0/31",)),
    alone("host-local-host-bits", host_local("10.9.0.1/24"), error=("10.9.0.1/24",)),
    alone("host-local-overlap", host_local("10.9.0.0/24", "10.9.0.128/25"), error=("10.9.0.129",)),
    alone("host-local-end-before-start", {"type": "host-local", "ranges": [[{**RANGE, "rangeEnd": "10.1.2.9"}]]},
          error=("10.1.2.9",)),
    alone("static-0.2.0", static("10.1.0.5/16 10.1.0.1", routes=DEFAULTS), "0.2.0"),
    alone("static-0.4.0-dual", static("10.1.0.5/16 10.1.0.1", "fd00:1::5/64 fd00:1::1"), "0.4.0"),
    alone("static-1.0.0", static("10.1.0.5/16", routes=DEFAULTS, dns={"nameservers": ["192.0.2.53"]})),
    alone("static-arguments", static(), cni_args="IgnoreUnknown=1;IP=10.1.0.7/16,fd00:1::7/64;GATEWAY=10.1.0.1"),
    alone("static-no-prefix", static("10.1.0.5"), error=("10.1.0.5",)),
    alone("static-not-an-address", static("10.1.0.999/16"), error=("10.1.0.999",)),
]  # fmt: skip


def tuning(**keys: Any) -> Mapping[str, Any]:
    return {"type": "tuning", **keys}


def tuned(name: str, version: str = "1.0.0", error: tuple[str, ...] = (), **keys: Any) -> Case:
    return Case(name, [bridge(ipam=host_local()), tuning(**keys)], version, error=error)


SYSCTLS = {"net.ipv4.conf.IFNAME.log_martians": "1", "net.ipv4.ip_unprivileged_port_start": "80"}
TUNING = [
    tuned("tuning-nothing"),
    tuned("tuning-sysctls", sysctl=SYSCTLS),
    tuned("tuning-sysctls-0.3.1", "0.3.1", sysctl=SYSCTLS),
    tuned("tuning-mac", mac="02:11:22:33:44:99"),
    tuned("tuning-mtu", "0.4.0", mtu=1400),
    tuned("tuning-promisc-and-allmulti", promisc=True, allmulti=True),
    tuned("tuning-arguments", args={"cni": {"mac": "02:11:22:33:44:aa", "mtu": 1300, "promisc": True}}, mtu=1400),
    Case("tuning-mac-capability", [bridge(ipam=host_local()), tuning(capabilities={"mac": True})],
         runtime={"mac": "02:11:22:33:44:bb"}),
    Case("tuning-check-mtu-changed", [bridge(ipam=host_local()), tuning(mtu=1400)],
         between="nsenter --net=/run/netns/c1 ip link set eth0 mtu 1300"),
    Case("tuning-of-ptp", [ptp(ipam=host_local()), tuning(sysctl=SYSCTLS, mtu=1400)]),
    tuned("tuning-unknown-sysctl", error=("net.ipv4.no_such_key",), sysctl={"net.ipv4.no_such_key": "1"}),
    tuned("tuning-kernel-sysctl", error=("kernel.shmmax",), sysctl={"kernel.shmmax": "1"}),
    tuned("tuning-refused-value", error=("net.ipv4.conf.eth0.rp_filter", "much"),
          sysctl={"net.ipv4.conf.IFNAME.rp_filter": "much"}),
    tuned("tuning-invalid-mac", error=("mac", "02:11"), mac="02:11"),
    Case("tuning-alone", [tuning(mtu=1400)], error=("prevResult",)),
]  # fmt: skip


def bandwidth(*rates: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "bandwidth", **{key: value for one in rates for key, value in one.items()}}


IN = {"ingressRate": 8000000, "ingressBurst": 800000}
OUT = {"egressRate": 16000000, "egressBurst": 1600000}
BANDWIDTH = [
    Case("bandwidth-nothing", [bridge(ipam=host_local()), bandwidth()]),
    Case("bandwidth-in", [bridge(ipam=host_local()), bandwidth(IN)]),
    Case("bandwidth-out", [bridge(ipam=host_local()), bandwidth(OUT)], "0.4.0"),
    Case("bandwidth-both-0.3.0", [bridge(ipam=host_local()), bandwidth(IN, OUT)], "0.3.0"),
    Case("bandwidth-both-of-ptp", [ptp(ipam=host_local()), bandwidth(IN, OUT)]),
    Case("bandwidth-mtu", [bridge(mtu=1400, ipam=host_local()), bandwidth(IN, OUT)]),
    Case("bandwidth-capability", [bridge(ipam=host_local()), bandwidth({"capabilities": {"bandwidth": True}})],
         runtime={"bandwidth": {**IN, **OUT}}),
    Case("bandwidth-check-qdisc-gone", [bridge(ipam=host_local()), bandwidth(IN)],
         between="tc qdisc delete root dev $(ls /proc/sys/net/ipv4/conf | grep ^veth)"),
    Case("bandwidth-negative", [bridge(ipam=host_local()), bandwidth({"ingressRate": -1, "ingressBurst": 1})],
         error=("ingressRate", "-1")),
    Case("bandwidth-burst-too-large", [bridge(ipam=host_local()), bandwidth(IN, {"ingressBurst": 8 * 2**32})],
         error=("ingressBurst", str(8 * 2**32))),
    Case("bandwidth-alone", [bandwidth(IN)], error=("prevResult",)),
]  # fmt: skip


def portmap(**keys: Any) -> Mapping[str, Any]:
    return {"type": "portmap", "capabilities": {"portMappings": True}, **keys}


def published(name: str, *ports: Mapping[str, Any], version: str = "1.0.0", **keys: Any) -> Case:
    error = keys.pop("error", ())
    plugins = [bridge(isGateway=True, ipam=keys.pop("ipam", host_local())), portmap(**keys)]
    return Case(name, plugins, version, runtime={"portMappings": list(ports)}, error=error)


TCP = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
UDP = {"hostPort": 5353, "containerPort": 53, "protocol": "udp"}
PORTMAP = [
    Case("portmap-nothing", [bridge(isGateway=True, ipam=host_local()), portmap()]),
    published("portmap-tcp", TCP),
    published("portmap-tcp-and-udp-0.3.1", TCP, UDP, version="0.3.1"),
    published("portmap-dual-0.4.0", TCP, UDP, version="0.4.0", ipam=dual()),
    published("portmap-sctp", {**TCP, "protocol": "sctp"}),
    published("portmap-host-address", {**TCP, "hostIP": "127.0.0.1"}),
    published("portmap-masq-all", TCP, masqAll=True),
    published("portmap-without-snat", TCP, snat=False),
    Case("portmap-of-ptp", [ptp(ipam=host_local(routes=DEFAULTS)), portmap()], runtime={"portMappings": [TCP]}),
    published("portmap-port-0", {**TCP, "hostPort": 0}, error=("hostPort", "0")),
    published("portmap-container-port-too-large", {**TCP, "containerPort": 65536}, error=("containerPort", "65536")),
    published("portmap-unknown-protocol", {**TCP, "protocol": "icmp"}, error=("protocol", "icmp")),
    published("portmap-invalid-host-address", {**TCP, "hostIP": "127.0.0.999"}, error=("hostIP", "127.0.0.999")),
    Case("portmap-without-address", [bridge(), portmap()], runtime={"portMappings": [TCP]}, error=("ips",)),
    Case("portmap-alone", [portmap()], runtime={"portMappings": [TCP]}, error=("prevResult",)),
]  # fmt: skip


def firewall(**keys: Any) -> Mapping[str, Any]:
    return {"type": "firewall", **keys}


FIREWALL = [
    Case("firewall-plain", [bridge(isGateway=True, ipam=host_local()), firewall()]),
    Case("firewall-0.4.0-dual", [bridge(isGateway=True, ipam=dual()), firewall(backend="iptables")], "0.4.0"),
    Case("firewall-same-bridge", [bridge(isGateway=True, ipam=host_local()), firewall(ingressPolicy="same-bridge")]),
    Case("firewall-admin-chain", [ptp(ipam=host_local()), firewall(iptablesAdminChainName="MINE")]),
    Case("firewall-old-version", [bridge(ipam=host_local()), firewall()], "0.3.1", error=("0.3.1",)),
    Case("firewall-unknown-policy", [bridge(ipam=host_local()), firewall(ingressPolicy="closed")],
         error=("ingressPolicy", "closed")),
    Case("firewall-alone", [firewall()], error=("prevResult",)),
    Case("standard-chain", [bridge(isDefaultGateway=True, ipMasq=True, hairpinMode=True, ipam=host_local()), portmap(),
                            firewall(), tuning()], runtime={"portMappings": [TCP]}),
]  # fmt: skip

GROUPS: dict[str, list[Case]] = {
    "bridge": BRIDGE,
    "bridge-errors": BRIDGE_ERRORS,
    "ptp": PTP,
    "macvlan": MACVLAN,
    "loopback": LOOPBACK,
    "ipam": IPAM,
    "tuning": TUNING,
    "bandwidth": BANDWIDTH,
    "portmap": PORTMAP,
    "firewall": FIREWALL,
}
_NEEDS_IPV6 = (SIX.partition("/")[0], "::/0")


def cases(group: str) -> list[Case]:
    """The group's cases that this machine can run."""
    return [case for case in GROUPS[group] if IPV6 or not any(word in repr(case) for word in _NEEDS_IPV6)]
