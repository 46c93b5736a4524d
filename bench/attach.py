"""ADD, DEL and VERSION as a runtime executes them: ours on one host, Debian's reference plugins on another.

- Both get the same configuration (spec 1.0.0, IPv4; a bridge is the default gateway) but for the IPAM plugin: ipamd,
  whose answers are durable, against host-local, which does not sync. Both keep their files in the same place.
- One round: one side's ADDs and then its DELs, with the result as prevResult, then the other's; the order of the sides
  changes from round to round. Namespaces are made beforehand and used again. The first ADD on a host, which makes
  bridge and tables, is not counted.
- What a call must have done is looked at: its status each time, what the kernel shows once for each side and network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import warm
from bench.host import BenchError, Helper, Plan, finished, runner
from bench.stats import Row, Spec, absent, row
from tests.hosts import CNI_BIN, PROGRAM_PATH, Host, HostError, Netns

PEER_BIN = "/usr/lib/cni"
NAMESPACES = 32
_ID = "0123456789abcdef" * 4

_NO_LIMIT = "cold: each call starts Python; no limit, the warm way is what must be fast"
_DURABLE = "ipamd's addresses are on disk when ADD returns, host-local's are not"
_PARALLEL = "time per call: from the first start to the last end, divided by the number of calls"


@dataclass(frozen=True, slots=True)
class Network:
    """One network of both sides; `title` is what its rows are called."""

    title: str
    name: str
    subnet: str
    type: str
    keys: Mapping[str, Any]

    def conf(self, ipam: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "cniVersion": "1.0.0",
            "name": self.name,
            "type": self.type,
            **self.keys,
            "ipam": {**ipam, "ranges": [[{"subnet": self.subnet}]]},
        }


def _bridge(title: str, name: str, subnet: str, masquerade: bool) -> Network:
    keys = {"bridge": f"br-{name}", "isDefaultGateway": True, "ipMasq": masquerade}
    return Network(title, name, subnet, "bridge", keys)


MASTER = "up0"  # macvlan's, on each host
PLAIN = _bridge("bridge", "plain", "10.77.0.0/16", masquerade=False)
MASQUERADED = _bridge("bridge ipMasq", "masq", "10.78.0.0/16", masquerade=True)
PTP = Network("ptp", "ptp", "10.79.0.0/16", "ptp", {})
MACVLAN = Network("macvlan", "macvlan", "10.80.0.0/16", "macvlan", {"master": MASTER})


@dataclass(frozen=True, slots=True)
class Work:
    """ADDs and DELs that are measured together. `count` of them in each round of a full run, `width` at a time."""

    network: Network
    width: int
    count: int
    add: Spec
    delete: Spec


def _cold(network: Network) -> Work:
    name = network.title
    note = f"{_NO_LIMIT}; {_DURABLE}"
    return Work(network, 1, 5, Spec(f"{name} ADD, cold", "ms", note=note), Spec(f"{name} DEL, cold", "ms", note=note))


Bounds = tuple[float, float | None]


def _warm(network: Network, add: Bounds | None, delete: Bounds | None, width: int) -> Work:
    """`add` and `delete` are (limit, aim) of the ratio."""
    name = network.title
    specs = []
    for verb, bounds in (("ADD", add), ("DEL", delete)):
        limit, aim = bounds or (None, None)
        note = _DURABLE if width == 1 else f"{_DURABLE}; {_PARALLEL}"
        specs.append(
            Spec(f"{name} {verb}{'' if width == 1 else f', {width} at once'}", "ms", "lower", limit, aim, note)
        )
    return Work(network, width, 16 if width == 1 else NAMESPACES, *specs)


COLD = (_cold(PLAIN), _cold(MASQUERADED))
COLD_VERSION = Spec("VERSION, cold", "ms", note=_NO_LIMIT)
WARM = (
    _warm(PLAIN, (0.65, 0.40), (1.0, 0.9), 1),
    _warm(MASQUERADED, (0.35, 0.20), (0.40, 0.25), 1),
    _warm(PTP, (0.80, 0.6), (1.0, None), 1),
    _warm(MACVLAN, (0.80, 0.6), (1.0, None), 1),
    _warm(PLAIN, (0.70, 0.40), None, 8),
    _warm(PLAIN, (0.70, 0.40), (0.70, 0.40), 32),
    _warm(MASQUERADED, None, None, 32),
)
WARM_VERSION = Spec("VERSION", "ms", "lower", 0.8, 0.5)
_VERSIONS = 20
_FLOOR = Spec("/bin/true", "ms", note="what the measuring client and the kernel cost; in every time above")


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    found = [spec for work in WARM for spec in (work.add, work.delete)] + [WARM_VERSION]
    found += [spec for work in COLD for spec in (work.add, work.delete)] + [COLD_VERSION]
    return [*found, _FLOOR]


@dataclass
class Side:
    """One host with its plugins, namespaces and measuring client."""

    name: str
    host: Host
    client: Helper
    binaries: str
    ipam: Mapping[str, Any]
    namespaces: list[Netns] = field(default_factory=list)

    def call(self, verb: str, conf: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
        """One execution, for the runner."""
        env = {"CNI_COMMAND": verb, "CNI_PATH": self.binaries, "PATH": PROGRAM_PATH}
        if verb != "VERSION":
            env |= {
                "CNI_CONTAINERID": f"{index:04x}{_ID[4:]}",
                "CNI_NETNS": self.namespaces[index].path,
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": "",
            }
        return {"argv": [f"{self.binaries}/{conf['type']}"], "env": env, "stdin": json.dumps(conf)}

    def run(self, calls: Sequence[Mapping[str, Any]], width: int) -> tuple[list[float], list[str]]:
        """Milliseconds of each call (with a width over 1: one number, the time per call), and what each printed.

        Raises BenchError when one failed.
        """
        answer = self.client.ask({"width": width, "limit_s": 120, "calls": calls})
        for status, printed, call in zip(answer["status"], answer["stdout"], calls, strict=True):
            if status != 0:
                verb = call["env"].get("CNI_COMMAND", "")
                raise BenchError(
                    f"{self.name}: {call['argv'][0]} {verb} exited {status}: {printed} {answer['stderr'][-2000:]}"
                )
        if width == 1:
            return [took / 1e6 for took in answer["took_ns"]], answer["stdout"]
        return [answer["wall_ns"] / 1e6 / len(calls)], answer["stdout"]

    def attach_and_detach(self, network: Network, count: int, width: int) -> tuple[list[float], list[float]]:
        """Milliseconds of the ADDs and of the DELs."""
        conf = network.conf(self.ipam)
        added, results = self.run([self.call("ADD", conf, index) for index in range(count)], width)
        confs = [{**conf, "prevResult": json.loads(result)} for result in results]
        deleted, _ = self.run([self.call("DEL", conf, index) for index, conf in enumerate(confs)], width)
        return added, deleted

    def prove(self, network: Network) -> None:
        """One ADD and DEL, uncounted; raises BenchError unless the kernel shows the address, and later no interface."""
        conf = network.conf(self.ipam)
        _, (printed,) = self.run([self.call("ADD", conf)], 1)
        result = json.loads(printed)
        wanted = [ip["address"] for ip in result["ips"]]
        found = self.namespaces[0].addresses().get("eth0")
        if not wanted or found != wanted:
            raise BenchError(f"{self.name}: ADD printed the addresses {wanted}, the kernel has {found}")
        self.run([self.call("DEL", {**conf, "prevResult": result})], 1)
        if "eth0" in self.namespaces[0].links():
            raise BenchError(f"{self.name}: eth0 is still there after DEL")


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    if not any(wanted(spec) for spec in specs()):
        return
    with ExitStack() as hosts:
        peer = peer_side(hosts, place)
        yield from _measure_warm(hosts, peer, plan, place, wanted, say)
        if any(wanted(spec) for work in COLD for spec in (work.add, work.delete)) or wanted(COLD_VERSION):
            ours = _cold_side(hosts, place)
            yield from _compare(plan, ours, peer, COLD, COLD_VERSION, 5, wanted, say)
        if wanted(_FLOOR):
            true = {"argv": ["/bin/true"], "env": {}, "stdin": ""}
            yield row(_FLOOR, [peer.run([true] * plan.samples(40), 1)[0] for _ in range(plan.rounds)])


def _measure_warm(
    hosts: ExitStack,
    peer: Side,
    plan: Plan,
    place: Path,
    wanted: Callable[[Spec], bool],
    say: Callable[[str], None],
) -> Iterable[Row]:
    mine = [spec for work in WARM for spec in (work.add, work.delete)] + [WARM_VERSION]
    mine = [spec for spec in mine if wanted(spec)]
    if not mine:
        return
    try:
        ours = side(hosts, "warm", CNI_BIN, {"type": "ipamd"}, place, lambda host, at: warm.start(host, at, hosts))
    except (BenchError, HostError, OSError) as error:
        # Where there is no warm way at all nobody is to fail for it; where there is one, it must start.
        yield from (absent(spec, str(error), excused=not warm.exists()) for spec in mine)
        return
    yield from _compare(plan, ours, peer, WARM, WARM_VERSION, _VERSIONS, wanted, say)


def peer_side(hosts: ExitStack, place: Path, name: str = "peer") -> Side:
    """A host with Debian's reference plugins. Raises BenchError where there are none."""
    if not Path(PEER_BIN, "bridge").exists():
        raise BenchError(f"no {PEER_BIN}/bridge: apt-get install -y containernetworking-plugins")
    ipam = {"type": "host-local", "dataDir": str(place / name / "host-local")}
    return side(hosts, name, PEER_BIN, ipam, place, None)


def _cold_side(hosts: ExitStack, place: Path) -> Side:
    return side(hosts, "cold", CNI_BIN, {"type": "ipamd"}, place, lambda _host, _place: None)


def side(
    hosts: ExitStack,
    name: str,
    binaries: str,
    ipam: Mapping[str, Any],
    place: Path,
    prepare: Callable[[Host, Path], object] | None,
) -> Side:
    """A host with its namespaces. `prepare` is for ours: it runs after ipamd is there."""
    host = hosts.enter_context(Host(name, plugins=name == "cold"))
    if prepare is not None:
        host.start_ipamd(store={"path": str(place / name / "ipamd.db")})
        prepare(host, place)
    host.run(["ip", "link", "add", MASTER, "up", "type", "veth", "peer", "name", f"{MASTER}-peer"])
    host.run(["ip", "link", "set", f"{MASTER}-peer", "up"])
    one = Side(name, host, runner(host), binaries, ipam)
    one.namespaces = [host.netns(f"c{index}") for index in range(NAMESPACES)]
    return one


def _compare(
    plan: Plan,
    ours: Side,
    peer: Side,
    works: Sequence[Work],
    version: Spec,
    versions: int,
    wanted: Callable[[Spec], bool],
    say: Callable[[str], None],
) -> Iterable[Row]:
    for work in works:
        if not (wanted(work.add) or wanted(work.delete)):
            continue
        say(work.add.name.replace("ADD", "ADD and DEL"))
        yield from _compare_work(plan, ours, peer, work, wanted)
    if wanted(version):
        say(version.name)
        yield _compare_version(plan, ours, peer, version, versions)


def _compare_work(plan: Plan, ours: Side, peer: Side, work: Work, wanted: Callable[[Spec], bool]) -> Iterable[Row]:
    added: dict[str, list[list[float]]] = {ours.name: [], peer.name: []}
    deleted: dict[str, list[list[float]]] = {ours.name: [], peer.name: []}
    count = plan.samples(work.count) if work.width == 1 else max(work.width, plan.samples(work.count))
    try:
        for one in (ours, peer):
            one.prove(work.network)
        for sides in rounds(plan, ours, peer):
            for one in sides:
                took = one.attach_and_detach(work.network, count, work.width)
                added[one.name].append(took[0])
                deleted[one.name].append(took[1])
    except (BenchError, HostError) as error:
        yield from (absent(spec, str(error), excused=False) for spec in (work.add, work.delete) if wanted(spec))
        return
    for spec, samples in ((work.add, added), (work.delete, deleted)):
        if wanted(spec):
            yield finished(plan, spec, samples[ours.name], samples[peer.name])


def _compare_version(plan: Plan, ours: Side, peer: Side, spec: Spec, full: int) -> Row:
    took: dict[str, list[list[float]]] = {ours.name: [], peer.name: []}
    conf = {"cniVersion": "1.0.0", "type": "bridge"}
    try:
        for sides in rounds(plan, ours, peer):
            for one in sides:
                took[one.name].append(one.run([one.call("VERSION", conf)] * plan.samples(full), 1)[0])
    except BenchError as error:
        return absent(spec, str(error), excused=False)
    return finished(plan, spec, took[ours.name], took[peer.name])


def rounds(plan: Plan, first: Side, second: Side) -> Iterable[tuple[Side, Side]]:
    """Both sides once for each round, in changing order, while there is time; always at least one round."""
    for number in range(plan.rounds):
        if number and plan.budget.over:
            return
        yield (second, first) if number % 2 else (first, second)
