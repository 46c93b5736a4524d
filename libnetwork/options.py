"""What `docker network create -o …` may say. Pure.

Docker's own names are used where Docker's own drivers have the thing; ours are `type` and `conflist`. An unknown one of
ours is refused with the list of those that there are; of Docker's (com.docker.*) an unknown one is only told.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import msgspec

from libnetwork.errors import DriverError

OVERLAY = "overlay"
TYPES = ("bridge", "ptp", "macvlan", OVERLAY)
_MODES = ("bridge", "private", "vepa", "passthru")
_GENERIC = "com.docker.network.generic"
_INTERNAL = "com.docker.network.internal"
_IPV6 = "com.docker.network.enable_ipv6"
_IFNAME = re.compile(r"[A-Za-z0-9_.\-]{1,15}", re.ASCII)
_OF_OUR_PLUGINS = frozenset({"type", "network", "bridge", "icc", "masquerade", "mtu", "parent", "macvlan_mode"})
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class NetworkOptions(msgspec.Struct, frozen=True):
    """A network as it was asked for. "", 0 and None stand for what was not said."""

    type: str = "bridge"
    network: str = ""
    conflist: str = ""
    bridge: str = ""
    icc: bool = True
    masquerade: bool = True
    host_binding: str = ""
    mtu: int = 0
    prefix: str = "eth"
    parent: str = ""
    macvlan_mode: str = "bridge"
    sticky: bool | None = None
    internal: bool = False
    ipv6: bool = False


# Docker's name → ours. The second name of a thing is what newer Dockers write.
_NAMES = {
    "type": "type",
    "network": "network",
    "conflist": "conflist",
    "com.docker.network.bridge.name": "bridge",
    "com.docker.network.bridge.enable_icc": "icc",
    "com.docker.network.bridge.enable_ip_masquerade": "masquerade",
    "com.docker.network.bridge.host_binding_ipv4": "host_binding",
    "com.docker.network.driver.mtu": "mtu",
    "com.docker.network.mtu": "mtu",
    "com.docker.network.container_iface_prefix": "prefix",
    "parent": "parent",
    "macvlan_mode": "macvlan_mode",
    "sticky": "sticky",
}


def parse(options: Mapping[str, Any] | None) -> tuple[NetworkOptions, list[str]]:
    """The options of CreateNetwork, and those of Docker's that nobody knows.

    Raises:
        DriverError: names the option, the value and what is possible.
    """
    given = options or {}
    generic = given.get(_GENERIC) or {}
    if not isinstance(generic, Mapping):
        raise DriverError(f"{_GENERIC}: wanted an object of options, found {generic!r}")
    values: dict[str, Any] = {"internal": bool(given.get(_INTERNAL)), "ipv6": bool(given.get(_IPV6))}
    unknown = []
    for name, text in sorted(generic.items()):
        field = _NAMES.get(name)
        if field is None:
            if not name.startswith("com.docker."):
                raise DriverError(f"option {name}={text}: unknown; known are {', '.join(sorted(_NAMES))}")
            unknown.append(f"{name}={text}")
        else:
            values[field] = _value(name, field, str(text))
    found = NetworkOptions(**values)
    _check_together(found)
    if found.type == OVERLAY:
        _check_overlay(found, generic)
    idle = sorted(name for name in generic if found.conflist and _NAMES.get(name) in _OF_OUR_PLUGINS)
    if idle:
        raise DriverError(f"option {idle[0]}={generic[idle[0]]}: with -o conflist=NAME the conflist says such things")
    return found, unknown


def _value(name: str, field: str, text: str) -> object:
    if field in ("icc", "masquerade", "sticky"):
        if text.lower() not in _BOOLEANS:
            raise DriverError(f"option {name}={text}: wanted true or false")
        return _BOOLEANS[text.lower()]
    if field == "host_binding":
        try:
            return str(ip_address(text))
        except ValueError as error:
            raise DriverError(f"option {name}={text}: wanted an address of this host: {error}") from error
    if field == "mtu":
        if not text.isdecimal() or not 68 <= int(text) <= 65535:
            raise DriverError(f"option {name}={text}: wanted a number from 68 to 65535")
        return int(text)
    wanted = {"type": TYPES, "macvlan_mode": _MODES}.get(field)
    if wanted is not None and text not in wanted:
        raise DriverError(f"option {name}={text}: wanted one of {', '.join(wanted)}")
    if field in ("bridge", "parent", "prefix") and not _IFNAME.fullmatch(text):
        raise DriverError(f"option {name}={text}: wanted the name of an interface, 1 to 15 letters, digits, _ . -")
    return text


def _check_together(found: NetworkOptions) -> None:
    if found.type == "macvlan" and not found.parent and not found.conflist:
        raise DriverError("a network of type macvlan needs -o parent=INTERFACE, the host's interface to the segment")
    if found.parent and found.type != "macvlan":
        raise DriverError(f"option parent={found.parent}: only with -o type=macvlan, not with {found.type}")
    if found.bridge and found.type != "bridge":
        raise DriverError(f"option com.docker.network.bridge.name={found.bridge}: only with -o type=bridge")
    if found.network and found.type != OVERLAY:
        raise DriverError(f"option network={found.network}: only with -o type=overlay, not with {found.type}")


def _check_overlay(found: NetworkOptions, generic: Mapping[str, Any]) -> None:
    """What an overlay is, its definition says, for all hosts."""
    if not found.network:
        raise DriverError(
            "a network of type overlay needs -o network=NAME, a name of netloom network list; netloom network create "
            "NAME --type overlay makes one"
        )
    for name in sorted(generic):
        if _NAMES.get(name) in (_OF_OUR_PLUGINS | {"conflist"}) - {"type", "network"}:
            raise DriverError(
                f"option {name}={generic[name]}: with -o type=overlay the network's definition says such things, for "
                "all hosts (netloom network create)"
            )
