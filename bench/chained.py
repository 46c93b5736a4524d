"""Chains: the standard one beside the reference's, published ports beside many others, connections to them.

- The chain is executed as libcni does: each plugin in turn with the result so far as prevResult, and for DEL in reverse
  with the whole result. A sample is the sum of the plugins' times.
- Two of our hosts differ in how many ports are published. What is measured is asked of both in turn, so that the
  machine's other work hits both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import flow, warm
from bench.attach import MASQUERADED, Network, Side, peer_side, rounds, side
from bench.host import BenchError, Helper, Plan, finished
from bench.stats import Row, Spec, absent
from tests.hosts import CNI_BIN, HostError

ADD = Spec(
    "standard chain ADD", "ms", "lower", 0.25, 0.12, "bridge ipMasq hairpin, portmap of a tcp port, firewall, tuning"
)
DELETE = Spec("standard chain DEL", "ms", "lower", 0.30, 0.15, ADD.note)
ONE_ADD = Spec(
    "plugin netloom ADD", "ms", "lower", 0.15, note="a port and limits; peer: bridge, portmap, firewall, bandwidth"
)
ONE_DELETE = Spec("plugin netloom DEL", "ms", "lower", note=ONE_ADD.note)
_CHAINS = 4

_FEW, _SOME, _MANY, _FOREIGN = 10, 1_000, 10_000, 20_000
_EACH = 500  # ports of a container that only takes room
_FLAT = 1.3
_PORT = 30_000
_PORTMAPS = 8
_WINDOW_S = 0.15
_WINDOWS = 3


def _flat(beside: str) -> tuple[Spec, Spec]:
    note = f"peer: beside {_FEW} published ports"
    return (
        Spec(f"portmap ADD, {beside}", "ms", "lower", _FLAT, note=note),
        Spec(f"portmap DEL, {beside}", "ms", "lower", _FLAT, note=note),
    )


SOME = _flat(f"{_SOME:,} ports published")
MANY = _flat(f"{_MANY:,} ports published")
FOREIGN = _flat(f"{_MANY:,} ports and {_FOREIGN:,} foreign rules")
CONNECT = Spec(
    f"connections to a port, {_MANY:,} published",
    "1/s",
    "higher",
    0.9,
    note="the best of each round's windows; peer: one",
)


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [ADD, DELETE, ONE_ADD, ONE_DELETE, *_PORTS]


_PORTS = (*SOME, *MANY, *FOREIGN, CONNECT)


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    parts = (((ADD, DELETE), _measure_chain), ((ONE_ADD, ONE_DELETE), _measure_one), (_PORTS, _measure_ports))
    for mine, work in parts:
        wishes = [spec for spec in mine if wanted(spec)]
        if not wishes:
            continue
        say(mine[0].name.replace("ADD", "ADD and DEL"))
        try:
            with ExitStack() as hosts:
                found = {row.name: row for row in work(plan, place, hosts)}
        except (BenchError, HostError, OSError) as error:
            yield from (absent(spec, str(error), excused=False) for spec in wishes)
            continue
        yield from (found[spec.name] for spec in wishes)


# The standard chain

_BRIDGE = Network(
    "", "chain", "10.81.0.0/16", "bridge", {**MASQUERADED.keys, "bridge": "br-chain", "hairpinMode": True}
)


def _plugins(one: Side, index: int) -> list[dict[str, Any]]:
    """What libcni makes of the list of plugins, without prevResult."""
    common = {"cniVersion": "1.0.0", "name": _BRIDGE.name}
    mappings = [{"hostPort": _PORT + index, "containerPort": 80, "protocol": "tcp"}]
    return [
        _BRIDGE.conf(one.ipam),
        {**common, "type": "portmap", "runtimeConfig": {"portMappings": mappings}},
        {**common, "type": "firewall"},
        {**common, "type": "tuning"},
    ]


def _add(one: Side, confs: Sequence[Mapping[str, Any]], index: int) -> tuple[float, dict[str, Any]]:
    """Milliseconds, and the result."""
    took = 0.0
    result: dict[str, Any] = {}
    for conf in confs:
        previous = {"prevResult": result} if result else {}
        (ms,), (printed,) = one.run([one.call("ADD", {**conf, **previous}, index)], 1)
        took += ms
        result = json.loads(printed)
    return took, result


def _delete(one: Side, confs: Sequence[Mapping[str, Any]], index: int, result: Mapping[str, Any]) -> float:
    calls = [one.call("DEL", {**conf, "prevResult": result}, index) for conf in reversed(confs)]
    return sum(one.run(calls, 1)[0])


def _measure_chain(plan: Plan, place: Path, hosts: ExitStack) -> Iterable[Row]:
    peer = peer_side(hosts, place, "chainpeer")
    ours = side(hosts, "chain", CNI_BIN, {"type": "ipamd"}, place, lambda host, at: warm.start(host, at, hosts))
    for one in (ours, peer):
        _prove(one)
    made, gone = _pairs(plan, (ours, _plugins), (peer, _plugins))
    yield finished(plan, ADD, *made)
    yield finished(plan, DELETE, *gone)


_Confs = Callable[[Side, int], list[dict[str, Any]]]
_Samples = list[list[float]]
_LIMITS = {"ingressRate": 800_000_000, "ingressBurst": 8_000_000, "egressRate": 800_000_000, "egressBurst": 8_000_000}


def _everything(one: Side, index: int) -> list[dict[str, Any]]:
    """The chain that one execution of ours stands for."""
    bridge, portmap, firewall, _ = _plugins(one, index)
    limits = {**firewall, "type": "bandwidth", "runtimeConfig": {"bandwidth": _LIMITS}}
    return [bridge, portmap, firewall, limits]


def _in_one(_one: Side, index: int) -> list[dict[str, Any]]:
    mappings = [{"hostPort": _PORT + index, "containerPort": 80, "protocol": "tcp"}]
    given = {"portMappings": mappings, "bandwidth": _LIMITS}
    return [{"cniVersion": "1.0.0", "name": _BRIDGE.name, "type": "netloom", "runtimeConfig": given}]


def _measure_one(plan: Plan, place: Path, hosts: ExitStack) -> Iterable[Row]:
    peer = peer_side(hosts, place, "onepeer")
    ours = side(hosts, "one", CNI_BIN, {"type": "ipamd"}, place, lambda host, at: warm.start(host, at, hosts))
    ours.host.run([sys.executable, "-m", "cli", "network", "create", _BRIDGE.name, "--subnet", _BRIDGE.subnet])
    for one, confs in ((ours, _in_one), (peer, _everything)):
        _, result = _add(one, confs(one, 0), 0)
        if not any(interface["name"].startswith("bwp") for interface in result["interfaces"]):
            raise BenchError(f"{one.name}: nothing was limited: {result['interfaces']}")
        _delete(one, confs(one, 0), 0, result)
    made, gone = _pairs(plan, (ours, _in_one), (peer, _everything))
    yield finished(plan, ONE_ADD, *made)
    yield finished(plan, ONE_DELETE, *gone)


def _pairs(
    plan: Plan, first: tuple[Side, _Confs], second: tuple[Side, _Confs]
) -> tuple[tuple[_Samples, _Samples], tuple[_Samples, _Samples]]:
    """Milliseconds of ADDs, and of DELs, of both sides, by round."""
    (ours, _), (peer, _) = first, second
    confs = {ours.name: first[1], peer.name: second[1]}
    added: dict[str, list[list[float]]] = {ours.name: [], peer.name: []}
    deleted: dict[str, list[list[float]]] = {ours.name: [], peer.name: []}
    for sides in rounds(plan, ours, peer):
        for one in sides:
            plugins, indexes = confs[one.name], range(plan.samples(_CHAINS))
            made = [_add(one, plugins(one, index), index) for index in indexes]
            gone = [_delete(one, plugins(one, index), index, made[index][1]) for index in indexes]
            added[one.name].append([took for took, _ in made])
            deleted[one.name].append(gone)
    return (added[ours.name], added[peer.name]), (deleted[ours.name], deleted[peer.name])


def _prove(one: Side) -> None:
    """One uncounted ADD and DEL; raises BenchError unless the port leads to the container in between."""
    confs = _plugins(one, 0)
    for conf in confs:
        if conf["type"] == "portmap":
            conf["runtimeConfig"]["portMappings"][0]["containerPort"] = flow.PORT
    _, result = _add(one, confs, 0)
    with _end(one, 0, 0):
        address = str(result["ips"][0]["gateway"])
        with _host_end(one) as client:
            rate = client.ask({"do": "connect", "to": address, "port": _PORT, "seconds": 0.01})["rate"]
    if rate <= 0:
        raise BenchError(f"{one.name}: no connection to {address} port {_PORT}")
    _delete(one, confs, 0, result)
    if "eth0" in one.namespaces[0].links():
        raise BenchError(f"{one.name}: eth0 is still there after the chain's DEL")


def _end(one: Side, index: int, processor: int) -> Helper:
    """`bench.flow` in a container, listening."""
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("flow.py")), str(processor)]
    end = Helper(one.host, one.namespaces[index].command(program))
    end.ask({"do": "listen"})
    return end


def _host_end(one: Side) -> Helper:
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("flow.py")), "1"]
    end = Helper(one.host, program)
    end.ask({"do": "listen"})
    return end


# Published ports


class Published:
    """One of our hosts: a server and a client in containers, the server's port published, and any number of others."""

    def __init__(self, hosts: ExitStack, place: Path, name: str) -> None:
        self.side = side(hosts, name, CNI_BIN, {"type": "ipamd"}, place, lambda host, at: warm.start(host, at, hosts))
        self._filled: list[dict[str, Any]] = []
        conf = MASQUERADED.conf(self.side.ipam)
        indexes = range(4)  # server, client, the one that is measured, the one that fills
        _, printed = self.side.run([self.side.call("ADD", conf, index) for index in indexes], 1)
        self._results = [json.loads(text) for text in printed]
        self.side.run([self._call("ADD", 0, [_mapping(_PORT, flow.PORT)])], 1)
        hosts.enter_context(_end(self.side, 0, 0))
        self._client = hosts.enter_context(_end(self.side, 1, 1))

    def _call(self, verb: str, index: int, mappings: Sequence[Mapping[str, Any]], suffix: str = "") -> dict[str, Any]:
        conf = {
            "cniVersion": "1.0.0",
            "name": MASQUERADED.name,
            "type": "portmap",
            "runtimeConfig": {"portMappings": mappings},
            "prevResult": self._results[index],
        }
        call = self.side.call(verb, conf, index)
        if suffix:
            call["env"]["CNI_CONTAINERID"] = f"fill{suffix}"
        return call

    def fill(self, count: int) -> None:
        """Publish up to so many ports in all, from containers that have nothing but ports."""
        have = 1 + sum(len(json.loads(call["stdin"])["runtimeConfig"]["portMappings"]) for call in self._filled)
        while have < count:
            ports = range(have, min(have + _EACH, count))
            mappings = [_mapping(_PORT + number, 80) for number in ports]
            self._filled.append(self._call("ADD", 3, mappings, str(have)))
            self.side.run(self._filled[-1:], 1)
            have = ports[-1] + 1

    def clear(self) -> None:
        """Take back what `fill` published."""
        calls = [{**call, "env": {**call["env"], "CNI_COMMAND": "DEL"}} for call in self._filled]
        self.side.run(calls, 1)
        self._filled.clear()

    def add_and_delete(self, count: int) -> tuple[list[float], list[float]]:
        """Milliseconds of ADDs and DELs of one port."""
        made, gone = [], []
        for _ in range(count):
            mappings = [_mapping(_PORT - 1, 80)]
            made += self.side.run([self._call("ADD", 2, mappings)], 1)[0]
            gone += self.side.run([self._call("DEL", 2, mappings)], 1)[0]
        return made, gone

    def connections(self) -> float:
        """A second, from one container to the other's published port."""
        gateway = self._results[1]["ips"][0]["gateway"]
        asked = {"do": "connect", "to": gateway, "port": _PORT, "seconds": _WINDOW_S}
        return float(self._client.ask(asked)["rate"])


def _mapping(host: int, container: int) -> dict[str, Any]:
    return {"hostPort": host, "containerPort": container, "protocol": "tcp"}


_RULES = """
import sys
from kernel import libnftables
one = "ip saddr 10.{}.{}.1 tcp dport {} accept\\n"
body = "".join(one.format(n >> 8 & 255, n & 255, n % 60000 + 1) for n in range(int(sys.argv[1])))
libnftables.run("table ip foreign { chain a {\\n" + body + "}\\n}", "foreign rules")
"""


def _measure_ports(plan: Plan, place: Path, hosts: ExitStack) -> Iterable[Row]:
    few, many = Published(hosts, place, "few"), Published(hosts, place, "many")
    rates: dict[str, list[list[float]]] = {"few": [], "many": []}
    few.fill(_FEW)
    many.fill(_SOME)
    yield from _beside(plan, few, many, SOME)
    many.fill(_MANY)
    yield from _beside(plan, few, many, MANY)
    many.side.host.run([sys.executable, "-c", _RULES, str(_FOREIGN)])
    yield from _beside(plan, few, many, FOREIGN)
    many.side.host.run(["nft", "delete", "table", "ip", "foreign"])
    few.clear()
    for sides in rounds(plan, many.side, few.side):
        best = {"few": 0.0, "many": 0.0}
        for _ in range(_WINDOWS):
            for one in sides:
                best[one.name] = max(best[one.name], (few if one is few.side else many).connections())
        for name, rate in best.items():
            rates[name].append([rate])
    yield finished(plan, CONNECT, rates["many"], rates["few"])


def _beside(plan: Plan, few: Published, many: Published, specs: tuple[Spec, Spec]) -> Iterable[Row]:
    took: dict[str, list[tuple[list[float], list[float]]]] = {"few": [], "many": []}
    for each in (few, many):
        each.add_and_delete(1)
    for sides in rounds(plan, many.side, few.side):
        for one in sides:
            which = few if one is few.side else many
            took[one.name].append(which.add_and_delete(plan.samples(_PORTMAPS)))
    for number, spec in enumerate(specs):
        yield finished(plan, spec, [pair[number] for pair in took["many"]], [pair[number] for pair in took["few"]])
