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
    """A result without what is drawn anew each time."""
    text = json.dumps(result).replace(netns.path, "SANDBOX")
    for one in result.get("interfaces", ()):
        text = text.replace(one["mac"], "MAC")
        if one["name"].startswith("veth"):
            text = text.replace(one["name"], "VETH")
    return json.loads(text)


def state(where: Host | Netns, link: str) -> dict[str, Any]:
    """A link's kind, MTU, addresses and routes as `ip` shows them, without names and flags that follow the carrier."""
    links = where.links()
    routes = [
        {key: value for key, value in one.items() if key not in ("flags", "dev")}
        for one in where.routes()
        if one.get("dev") == link
    ]
    return {
        "kind": links[link]["linkinfo"]["info_kind"],
        "data": links[link]["linkinfo"].get("info_data"),
        "mtu": links[link]["mtu"],
        "up": "UP" in links[link]["flags"],
        "addresses": sorted(where.addresses()[link]),
        "routes": sorted(routes, key=str),
    }
