"""Two hosts alike, one with Netloom and one with Debian's reference plugins, and a case run on both of them.

A case goes the way that libcni takes (containernetworking/cni, libcni/api.go): ADD of each plugin of the list with the
result of the one before, CHECK from 0.4.0 on, DEL in reverse with the final result, and DEL once more. After a refused
ADD comes one DEL of the whole list, as containerd does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from tests.cni.lab import REFERENCE, Lab
from tests.hosts import CNI_BIN, PROGRAM_PATH, CniCall, Host, Netns, wait_until
from tests.peers.observe import Facts, Observed, look, renamed, without_macs

ABSENT = "absent"
CONTAINER = "c1"
OLD = ("0.1.0", "0.2.0")  # without prevResult
WITH_CHECK = ("0.4.0", "1.0.0", "1.1.0")


@dataclass(frozen=True, slots=True)
class Case:
    """One network configuration, and what happens around it.

    Attributes:
        name: unique.
        plugins: the list's plugin objects, without name and version.
        version: the list's.
        error: what our message has to say, where ADD must fail; empty where it must succeed.
        cni_args: CNI_ARGS.
        runtime: runtimeConfig; each plugin gets the keys that its `capabilities` declare.
        host, inside: shell commands for both hosts, for both containers, before anything.
        between: shell commands for both hosts between ADD and CHECK; CHECK must then fail on both.
        direct: the IPAM plugin that is executed by itself, "" for none.
        ifname: CNI_IFNAME.
        containers: how many containers are attached, one after the other. The last one is looked at.
    """

    name: str
    plugins: Sequence[Mapping[str, Any]]
    version: str = "1.0.0"
    error: tuple[str, ...] = ()
    cni_args: str = ""
    runtime: Mapping[str, Any] | None = None
    host: str = ""
    inside: str = ""
    between: str = ""
    direct: str = ""
    ifname: str = "eth0"
    containers: int = 1

    @property
    def types(self) -> frozenset[str]:
        """The plugins that take part, IPAM's too."""
        ipam = {plugin["ipam"].get("type", "") for plugin in self.plugins if "ipam" in plugin}
        return frozenset({str(plugin["type"]) for plugin in self.plugins} | ipam)

    def configuration(self, plugin: Mapping[str, Any], previous: object = None) -> dict[str, Any]:
        """What libcni puts on a plugin's standard input."""
        conf = {"cniVersion": self.version, "name": "net", **plugin}
        declared = plugin.get("capabilities", {})
        runtime = {key: value for key, value in (self.runtime or {}).items() if declared.get(key)}
        if runtime:
            conf["runtimeConfig"] = runtime
        if previous is not None and self.version not in OLD:
            conf["prevResult"] = previous
        return conf


class Runtime(Protocol):
    """Executes one plugin."""

    def __call__(
        self,
        verb: str,
        plugin: str,
        conf: Mapping[str, Any],
        /,
        *,
        container_id: str,
        netns: Netns,
        ifname: str,
        args: str,
    ) -> CniCall: ...


class Reference:
    """Executes Debian's plugins in a host."""

    def __init__(self, host: Host, path: str = f"{REFERENCE}:{CNI_BIN}") -> None:
        self.host = host
        self.path = path
        self.programs = ""  # a directory that comes first in PATH

    def __call__(
        self,
        verb: str,
        plugin: str,
        conf: Mapping[str, Any],
        *,
        container_id: str,
        netns: Netns | str,
        ifname: str = "eth0",
        args: str = "",
    ) -> CniCall:
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns if isinstance(netns, str) else netns.path,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": self.path,
            "PATH": f"{self.programs}:{PROGRAM_PATH}" if self.programs else PROGRAM_PATH,
        }
        done = self.host.run([f"{REFERENCE}/{plugin}"], input=json.dumps(conf), env=environment, cwd="/", check=False)
        try:
            printed = json.loads(done.stdout)
        except ValueError:
            printed = None
        return CniCall(verb, done.returncode, done.stdout, done.stderr, printed, 0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one side did: facts to compare, and what it said of errors."""

    facts: Facts
    messages: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether an ADD failed."""
        return any(what.startswith("ADD ") and what.endswith(" code") for what in self.facts)


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact that is not the same on both sides."""

    what: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.what}\n    ours:   {self.ours}\n    theirs: {self.theirs}"


class Side:
    """One of the two hosts."""

    def __init__(self, host: Host, runtime: Runtime) -> None:
        self.host = host
        self.runtime = runtime

    def run(self, case: Case) -> Outcome:
        """Go through a case, from a host with nothing on it back to one."""
        self._reset(case)
        containers = [self.host.netns(f"{CONTAINER}{'x' * number}") for number in range(case.containers)]
        try:
            return self._run(case, containers)
        finally:
            for one in containers:
                one.delete()

    def _reset(self, case: Case) -> None:
        self.host.run(["sh", "-c", _RESET])
        # Not named by a MAC of its own, so that it is the same on both sides.
        if case.host:
            self.host.run(["sh", "-ec", case.host])

    def _run(self, case: Case, containers: list[Netns]) -> Outcome:
        for one in containers:
            if case.inside:
                one.run(["sh", "-ec", case.inside])
        keep = json.dumps([case.plugins, case.runtime, case.cni_args]) + case.host + case.inside
        before = look(self.host, containers[-1]).facts(keep)
        calls: list[tuple[str, CniCall]] = []
        results: list[Any] = []
        for one in containers:
            found, result = self._add(case, one)
            calls = found  # the last container's
            results.append(result)
        failed = calls[-1][1].status != 0
        after = self._settled(containers[-1])
        names = after.replacements(keep)
        made = after.facts(keep)
        facts = {f"after ADD: {what}": how for what, how in (_changes(before, made) if failed else made).items()}
        if not failed and case.version in WITH_CHECK:
            if case.between:
                self.host.run(["sh", "-ec", case.between])
            calls += self._each("CHECK", case, case.plugins, containers[-1], results[-1])
        for number, (one, result) in enumerate(zip(reversed(containers), reversed(results), strict=True)):
            deletions = self._each("DEL", case, tuple(reversed(case.plugins)), one, result)
            calls += [
                (f"{what}{f' of container {number + 1} from the end' if number else ''}", call)
                for what, call in deletions
            ]
        left = look(self.host, containers[-1])
        rules = left.rules_about(*(one.name for one in containers), *_addresses(results))
        facts |= {f"after DEL: {what}": how for what, how in _changes(before, left.facts(keep)).items()}
        for number, rule in enumerate(rules):
            facts[f"after DEL: rule {number}"] = rule
        calls += [(f"{what} again", call) for what, call in self._each("DEL", case, case.plugins, containers[-1], None)]
        for what, call in calls:
            for key, value in _printed(call).items():
                facts[f"{what} {key}"] = without_macs(renamed(value, names), keep)
        return Outcome(facts, tuple(_message(call) for _, call in calls if call.status))

    def _add(self, case: Case, netns: Netns) -> tuple[list[tuple[str, CniCall]], Any]:
        previous: Any = None
        calls: list[tuple[str, CniCall]] = []
        for plugin in case.plugins:
            call = self._call("ADD", case, plugin, netns, previous)
            calls.append((f"ADD {case.direct or plugin['type']}", call))
            if call.status:
                return calls, None
            previous = call.json
        return calls, previous

    def _each(
        self, verb: str, case: Case, plugins: Sequence[Mapping[str, Any]], netns: Netns, result: Any
    ) -> list[tuple[str, CniCall]]:
        return [
            (f"{verb} {case.direct or plugin['type']}", self._call(verb, case, plugin, netns, result))
            for plugin in plugins
        ]

    def _call(self, verb: str, case: Case, plugin: Mapping[str, Any], netns: Netns, previous: Any) -> CniCall:
        return self.runtime(
            verb,
            case.direct or str(plugin["type"]),
            case.configuration(plugin, previous),
            container_id=netns.name,
            netns=netns,
            ifname=case.ifname,
            args=case.cni_args,
        )

    def _settled(self, netns: Netns) -> Observed:
        """The state once the kernel is ready with it."""
        found: list[Observed] = []

        def settled() -> bool:
            found.append(look(self.host, netns))
            last = found[-1]
            return last.host.settled() and (last.container is None or last.container.settled())

        wait_until(settled, "the kernel's work on IPv6 addresses")
        return found[-1]


class Twins:
    """Both sides, and what they do differently."""

    def __init__(self, ours: Side, theirs: Side) -> None:
        self.sides = (ours, theirs)

    def differences(self, case: Case) -> tuple[list[Difference], tuple[Outcome, Outcome]]:
        """What is not the same, and what each side did."""
        with ThreadPoolExecutor(2) as pool:
            ours, theirs = pool.map(lambda side: side.run(case), self.sides)
        keys = sorted(ours.facts.keys() | theirs.facts.keys())
        found = [
            Difference(key, ours.facts.get(key, ABSENT), theirs.facts.get(key, ABSENT))
            for key in keys
            if ours.facts.get(key) != theirs.facts.get(key)
        ]
        if ours.refused != theirs.refused:
            # What one of them made, and the verbs after that, have nothing to be compared with.
            found = [one for one in found if not _AFTERWARDS.match(one.what)]
        return _without_consequences(found), (ours, theirs)


_AFTERWARDS = re.compile(r"after ADD: |CHECK |ADD \S+ result ")
_KIND = re.compile(r"(after \w+: \w+) link (.+) kind")


def _without_consequences(found: list[Difference]) -> list[Difference]:
    """Where only one side has a link, all else about that link goes without saying."""
    alone = [match for one in found if ABSENT in (one.ours, one.theirs) and (match := _KIND.fullmatch(one.what))]
    consequences = [
        re.compile(
            rf"{re.escape(match[1])} (link {name} (?!kind)|.* dev {name}( |$)|sysctl \w+\.conf\.{name}\.|qdisc {name} )"
        )
        for match in alone
        for name in [re.escape(match[2])]
    ]
    return [one for one in found if not any(pattern.match(one.what) for pattern in consequences)]


def our_side(host: Host) -> Side:
    """A host that serves our plugins in one process."""
    lab = Lab(host)
    lab.cni("VERSION", "loopback", b"")  # the runner starts in this thread, which outlives it
    return Side(host, lab.cni)


def their_side(host: Host) -> Side:
    return Side(host, Reference(host))


# Links, rules, addresses that were given out, forwarding: as on a host that just started.
_RESET = r"""
for link in $(ls /proc/sys/net/ipv4/conf); do
    case $link in all|default|lo) ;; *) ip link delete "$link" 2>/dev/null || true;; esac
done
ip link set lo up
nft flush ruleset
rm -rf /var/lib/cni/* /run/cni
echo 0 >/proc/sys/net/ipv4/ip_forward
[ ! -d /proc/sys/net/ipv6 ] || echo 0 >/proc/sys/net/ipv6/conf/all/forwarding
"""


def _changes(before: Facts, after: Facts) -> Facts:
    """What came, went or changed."""
    found = {what: how for what, how in after.items() if before.get(what) != how}
    return found | {what: f"gone; was {how}" for what, how in before.items() if what not in after}


def _printed(call: CniCall) -> Facts:
    """Exit status, and standard output by its JSON paths; of an error the code alone."""
    found = {"exit status": str(call.status)}
    if call.status and isinstance(call.json, dict):
        found["code"] = str(call.json.get("code"))
    elif call.stdout.strip():
        found |= {f"result {path}": value for path, value in _flat("", call.json)}
    return found


def _flat(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [one for key, inner in value.items() for one in _flat(f"{path}.{key}", inner)]
    if isinstance(value, list) and value:
        return [one for number, inner in enumerate(value) for one in _flat(f"{path}[{number}]", inner)]
    return [(path or ".", value if isinstance(value, str) else json.dumps(value))]


def _message(call: CniCall) -> str:
    if not isinstance(call.json, dict):
        return call.stdout
    return f"{call.json.get('msg')}; {call.json.get('details', '')}"


def _addresses(results: Sequence[Any]) -> list[str]:
    """The containers' addresses, however the version spells them."""
    found = []
    for result in results:
        if isinstance(result, dict):
            ips = [one.get("address") for one in result.get("ips", ())]
            ips += [result[key].get("ip") for key in ("ip4", "ip6") if key in result]
            found += [ip.split("/")[0] for ip in ips if ip]
    return found
