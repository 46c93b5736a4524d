"""Debian's reference plugins, executed in a test's host beside ours, and what to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import pytest

from tests.cni.lab import REFERENCE, Lab
from tests.hosts import CNI_BIN, PROGRAM_PATH, Host, Netns

needs_reference = pytest.mark.skipif(
    not os.path.exists(f"{REFERENCE}/ptp"), reason=f"no {REFERENCE} (Debian: containernetworking-plugins)"
)


def call(lab: Lab, verb: str, conf: Mapping[str, Any], netns: Netns, container_id: str = "ref") -> dict[str, Any]:
    """What the reference prints. Raises HostError unless it exits with 0."""
    environment = {
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": container_id,
        "CNI_NETNS": netns.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": CNI_BIN,
        "PATH": PROGRAM_PATH,
    }
    printed = lab.host.run([f"{REFERENCE}/{conf['type']}"], input=json.dumps(conf), env=environment, cwd="/").stdout
    found: dict[str, Any] = json.loads(printed or "{}")
    return found


def comparable(result: Mapping[str, Any], netns: Netns) -> Any:
    """A result without what is drawn anew each time, and without the empty `dns` that newer versions leave out."""
    result = {key: value for key, value in result.items() if (key, value) != ("dns", {})}
    text = json.dumps(result).replace(netns.path, "SANDBOX")
    for one in result.get("interfaces", ()):
        text = text.replace(one["mac"], "MAC")
        if one["name"].startswith("veth"):
            text = text.replace(one["name"], "VETH")
    return json.loads(text)


def state(where: Host | Netns, link: str) -> set[str]:
    """A link's kind, MTU, addresses and routes as `ip` shows them, one line each, without names and flags that follow
    the carrier."""
    one = where.links()[link]
    kind, data = one["linkinfo"]["info_kind"], one["linkinfo"].get("info_data")
    found = {f"{kind} {data} mtu {one['mtu']} {'up' if 'UP' in one['flags'] else 'down'}"}
    found |= {f"address {address}" for address in where.addresses()[link]}
    for route in where.routes():
        if route.get("dev") == link:
            found.add(f"route { ({key: value for key, value in route.items() if key not in ('flags', 'dev')}) }")
    return found


def settled(where: Host | Netns, link: str) -> bool:
    """Whether duplicate address detection is over."""
    return not where.run(["ip", "-6", "address", "show", "dev", link, "tentative"]).stdout.strip()


def difference(ours: set[str], theirs: set[str]) -> list[str]:
    """What only one side has."""
    return [*(f"ours: {one}" for one in sorted(ours - theirs)), *(f"theirs: {one}" for one in sorted(theirs - ours))]
