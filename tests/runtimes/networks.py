"""Configurations that the tests of several runtimes share."""

from __future__ import annotations

from typing import Any

from tests.hosts import IPV6

SETS = [[{"subnet": "10.20.0.0/16"}], [{"subnet": "fd00:20::/64"}]][: 2 if IPV6 else 1]
GATEWAYS = ["10.20.0.1", "fd00:20::1"][: 2 if IPV6 else 1]


def bridge(name: str = "web0", **more: Any) -> dict[str, Any]:
    return {
        "type": "bridge",
        "bridge": name,
        "isDefaultGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "capabilities": {"mac": True, "ips": True},
        "ipam": {"type": "ipamd", "ranges": SETS},
        **more,
    }


PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
TUNING = {"type": "tuning", "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}, "mtu": 1400}
FIREWALL = {"type": "firewall", "ingressPolicy": "same-bridge"}
BANDWIDTH = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
# What stands in most clusters' /etc/cni/net.d.
CHAIN = [bridge(), PORTMAP, FIREWALL, TUNING, BANDWIDTH]
TYPES = [str(plugin["type"]) for plugin in CHAIN]


def added() -> list[str]:
    """What a runtime asks for, in order, to attach a container to the chain."""
    return [f"ADD {kind}" for kind in TYPES]


def deleted() -> list[str]:
    """And to detach it."""
    return [f"DEL {kind}" for kind in reversed(TYPES)]
