"""What a host and its container look like, as comparable facts: a line of text for what, and one for how it is.

Two hosts on which the same was done have the same facts. Names and MACs that are drawn anew each time are replaced by
what they belong to, so that it still shows whether two places have the same one. Left out: numbers of interfaces and
timers, and what comes when it likes (IPv6 link-local addresses, multicast, neighbours that were learned).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hosts import Host, Netns

Facts = dict[str, str]

# One process after the other in one shell: the state, as text, of the namespace it runs in.
_LOOK = r"""
printf 'address show\nroute show table all\nneigh show\nrule show\n' | ip -j -d -batch -
printf 'route show table all\nneigh show\nrule show\n' | ip -j -6 -d -batch -
tc -j qdisc show
echo
echo sysctls
cd /proc/sys/net
grep -rs . ipv4/conf ipv6/conf ipv4/ip_forward ipv4/ping_group_range || true
"""
_HOST = r"""
echo rules
nft list ruleset
echo files
find /var/lib/cni -type f | while read -r file; do
    printf '%s %s ' "$file" "$(stat -c %a "$file")"
    tr '\r\n' '_|' <"$file"
    echo
done
echo end
"""
_RANDOM_NAME = re.compile(r"veth[0-9a-f]{8}")
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_CONSTANT_MACS = ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff")

# Of `ip -d link`: numbers, what follows from other facts, what the driver has of its own.
_LINK_NOISE = re.compile(
    r"ifindex|ifname|link|link_(index|netnsid|netns)|addr_info|(gso|gro|tso)_\w+|num_[rt]x_queues|m(in|ax)_mtu|parent\w+"
    r"|operstate"
)
_TIMED = re.compile(r".*(_timer|bridge_id|root_id|designated_\w+)|id|no|state|root_port|topology_change\w*")
# Follow the carrier and the moment.
_LINK_FLAGS = frozenset({"LOWER_UP", "NO-CARRIER", "M-DOWN"})
_ROUTE_FLAGS = frozenset({"linkdown", "dead"})


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace as its tools print it."""

    addresses: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    neighbours: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    qdiscs: list[dict[str, Any]]
    sysctls: list[str]

    def settled(self) -> bool:
        """Whether the kernel has done with the IPv6 addresses that count here: looked for duplicates, and made the
        local route, which it does some moments after the address also where it does not look."""
        local = {route["dst"] for route in self.routes if route.get("type") == "local"}
        found = (one for link in self.addresses if "UP" in link["flags"] for one in link.get("addr_info", ()))
        return all(
            one["local"] in local and not one.get("tentative")
            for one in found
            if one["family"] == "inet6" and one["scope"] != "link"
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """A host, and its container where there is one, in one moment."""

    host: Space
    container: Space | None
    ruleset: str
    files: list[str]
    names: Mapping[str, str] = field(default_factory=dict)

    def facts(self, keep: str) -> Facts:
        """Everything, with random names and MACs replaced; those in the text `keep` are nobody's choice but ours."""
        names = self.replacements(keep)
        found = dict(_space("host", self.host))
        if self.container is not None:
            found |= dict(_space("container", self.container))
        for line in self.files:
            path, _, rest = line.partition(" ")
            found[f"file {path}"] = rest.strip("|")
        return {renamed(what, names): renamed(how, names) for what, how in found.items()}

    def replacements(self, keep: str) -> dict[str, str]:
        """What stands for each random name and MAC."""
        names: dict[str, str] = {}
        inside = [] if self.container is None else self.container.addresses
        # By the host's number: those of containers are the same in each of them.
        ends = {one["link_index"]: str(one["ifname"]) for one in inside if "link_index" in one}
        for where, space in (("host", self.host), ("container", self.container)):
            for link in [] if space is None else space.addresses:
                name, mac = str(link["ifname"]), str(link.get("address", ""))
                if _RANDOM_NAME.fullmatch(name):
                    names[name] = f"<host end of {ends.get(link['ifindex'], 'another')}>"
                    name = names[name]
                if _MAC.fullmatch(mac) and mac not in _CONSTANT_MACS and mac not in keep:
                    names.setdefault(mac, f"<MAC of {where}'s {name}>")
        return names

    def rules_about(self, *words: str) -> list[str]:
        """The lines of the host's nftables rule set, iptables' included, in which one of the words occurs."""
        return [line.strip() for line in self.ruleset.splitlines() if any(word in line for word in words)]


def without_macs(text: str, keep: str) -> str:
    """The text without the random MACs that no link has any more."""
    return _MAC.sub(lambda match: match[0] if match[0] in _CONSTANT_MACS or match[0] in keep else "<MAC>", text)


def renamed(text: str, names: Mapping[str, str]) -> str:
    for name, meaning in names.items():
        text = text.replace(name, meaning)
    return text


def look(host: Host, netns: Netns | None = None) -> Observed:
    """Observe a host, and a container of it."""
    script = _LOOK + _HOST
    if netns is not None:
        script = f"{_LOOK}{_HOST}exec nsenter --net={netns.path} sh -c '{_quoted(_LOOK)}'\n"
    printed = host.run(["sh", "-c", script]).stdout
    printed, _, inside = printed.partition("\nend\n")
    printed, _, rest = printed.partition("rules\n")
    ruleset, _, files = f"{rest}\n".rpartition("files\n")
    return Observed(_parsed(printed), _parsed(inside) if inside else None, ruleset, files.splitlines())


def _quoted(script: str) -> str:
    return script.replace("'", "'\\''")


def _parsed(printed: str) -> Space:
    documents, _, sysctls = printed.partition("sysctls\n")
    decoder = json.JSONDecoder()
    found: list[list[dict[str, Any]]] = []
    text = documents.strip()
    while text:
        document, end = decoder.raw_decode(text)
        found.append([entry for entry in document if entry])
        text = text[end:].lstrip()
    addresses, routes4, neighbours4, rules4, routes6, neighbours6, rules6, qdiscs = found
    rules = [{"family": 4, **one} for one in rules4] + [{"family": 6, **one} for one in rules6]
    return Space(addresses, routes4 + routes6, neighbours4 + neighbours6, rules, qdiscs, sysctls.splitlines())


def _space(where: str, space: Space) -> Iterator[tuple[str, str]]:
    for link in space.addresses:
        yield from _link(where, link)
    for route in space.routes:
        dst = str(route["dst"])
        if dst.startswith(("fe80:", "ff00:", "multicast")) or route.get("type") == "multicast":
            continue
        kept = {key: value for key, value in route.items() if key not in ("dst", "dev", "table", "flags")}
        flags = sorted(set(route.get("flags", ())) - _ROUTE_FLAGS)
        what = f"{where} route {dst} dev {route.get('dev', '-')} table {route.get('table', 'main')}"
        # Several to one destination differ in their metric or their gateway.
        yield f"{what} metric {route.get('metric', 0)}", " ".join([_text(kept), *flags])
    for one in space.neighbours:
        if "PERMANENT" in one.get("state", ()):
            yield f"{where} neighbour {one['dst']} dev {one['dev']}", str(one.get("lladdr", ""))
    for number, rule in enumerate(space.rules):
        yield f"{where} rule {number}", _text(rule)
    for one in space.qdiscs:
        if one["kind"] not in ("noqueue", "pfifo_fast", "mq"):
            parent = one.get("parent", "root")
            kept = {key: one[key] for key in ("kind", "handle", "options") if key in one}
            yield f"{where} qdisc {one['dev']} {parent}", _text(kept)
    for line in space.sysctls:
        path, _, value = line.partition(":")
        yield f"{where} sysctl {path.replace('/', '.')}", value


def _link(where: str, link: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = f"{where} link {link['ifname']}"
    info = link.get("linkinfo", {})
    yield f"{what} kind", str(info.get("info_kind", "device"))
    for key, value in link.items():
        if key == "flags":
            value = " ".join(sorted(set(value) - _LINK_FLAGS))  # noqa: PLW2901
        elif key == "linkinfo":
            for group in ("info_data", "info_slave_data"):
                for inner, inner_value in (info.get(group) or {}).items():
                    if not _TIMED.fullmatch(inner):
                        yield f"{what} {group}.{inner}", json.dumps(inner_value)
            continue
        elif _LINK_NOISE.fullmatch(key):
            continue
        yield f"{what} {key}", value if isinstance(value, str) else json.dumps(value)
    for one in link.get("addr_info", ()):
        if one["family"] == "inet6" and one["scope"] == "link":
            continue
        kept = {key: value for key, value in one.items() if key not in ("family", "local", "prefixlen", "label")}
        yield f"{where} address {one['local']}/{one['prefixlen']} dev {link['ifname']}", _text(kept)


def _text(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key} {json.dumps(value).strip(chr(34))}" for key, value in sorted(values.items()))
