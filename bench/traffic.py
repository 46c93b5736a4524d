"""TCP between two containers, through interfaces that we made against the same made by hand with `ip`.

Two hosts, alike but for who set their containers up. Ours has what our plugins bring along, such as nftables tables
where a network asks for them; the other one has nothing. Windows of both alternate within each round, of which the
best one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.attach import MASTER
from bench.host import BenchError, Helper, Plan, finished
from bench.stats import Row, Spec, absent
from tests.hosts import Host, HostError, Netns

KINDS = ("bridge", "ptp", "macvlan")
_WINDOW_S = 0.06
_WINDOWS = 5  # of each side in a round
_LIMIT = 0.97
_BITS = 8 / 1e9

_BEST = "the best of each round's windows; peer: made by hand with ip"

STREAM = {kind: Spec(f"TCP through {kind}", "Gbit/s", "higher", _LIMIT, note=_BEST) for kind in KINDS}
TRIPS = {kind: Spec(f"round trips through {kind}", "1/s", "higher", _LIMIT, note=_BEST) for kind in KINDS}


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [spec for kind in KINDS for spec in (STREAM[kind], TRIPS[kind])]


def measure(plan: Plan, _place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    mine = [spec for spec in specs() if wanted(spec)]
    if not mine:
        return
    try:
        found = _measured(plan, say)
    except (BenchError, HostError, OSError) as error:
        yield from (absent(spec, str(error), excused=False) for spec in mine)
        return
    for spec in mine:
        yield finished(plan, spec, found[spec.name, "ours"], found[spec.name, "hand"])


def _measured(plan: Plan, say: Callable[[str], None]) -> dict[tuple[str, str], list[list[float]]]:
    found: dict[tuple[str, str], list[list[float]]] = {}
    with ExitStack() as stack:
        ours = Containers(stack, Host("ours"), "ours")
        hand = Containers(stack, Host("hand", plugins=False), "hand")
        say("TCP between containers")
        for number in range(plan.rounds):
            if number and plan.budget.over:
                break
            for kind in KINDS:
                for spec, do, factor in ((STREAM[kind], "stream", _BITS), (TRIPS[kind], "trips", 1.0)):
                    samples: dict[str, list[float]] = {"ours": [], "hand": []}
                    for window in range(2 * _WINDOWS):
                        side = (ours, hand)[(number + window) % 2]
                        samples[side.name].append(side.rate(kind, do) * factor)
                    for name, rates in samples.items():
                        # The best of the round: what else the machine does makes windows worse, never better.
                        found.setdefault((spec.name, name), []).append([max(rates)])
    return found


class Containers:
    """Two containers for each kind of interface, on one host."""

    def __init__(self, stack: ExitStack, host: Host, name: str) -> None:
        self.name = name
        self._host = stack.enter_context(host)
        self._stack = stack
        self._ends: dict[str, tuple[Helper, str]] = {}  # the client, and the server's address
        self._host.run(["ip", "link", "add", MASTER, "up", "type", "veth", "peer", "name", f"{MASTER}-peer"])
        self._host.run(["ip", "link", "set", f"{MASTER}-peer", "up"])
        for number, kind in enumerate(KINDS):
            spaces = (host.netns(f"{kind}1"), host.netns(f"{kind}2"))
            made = [
                self._made_by_hand(kind, number, index, netns)
                if name == "hand"
                else self._made_by_us(kind, number, index, netns)
                for index, netns in enumerate(spaces)
            ]
            client, _ = (self._end(netns, index) for index, netns in enumerate(spaces))
            self._ends[kind] = (client, made[1])

    def rate(self, kind: str, do: str) -> float:
        """What `bench.flow` answers, from the first container to the second."""
        client, address = self._ends[kind]
        return float(client.ask({"do": do, "to": address, "seconds": _WINDOW_S})["rate"])

    def _end(self, netns: Netns, index: int) -> Helper:
        flow = [sys.executable, "-I", "-S", str(Path(__file__).with_name("flow.py")), str(index)]
        end = self._stack.enter_context(Helper(self._host, netns.command(flow)))
        end.ask({"do": "listen"})
        return end

    def _made_by_us(self, kind: str, number: int, index: int, netns: Netns) -> str:
        keys: dict[str, Any] = {"bridge": {"bridge": "br0", "isDefaultGateway": True}, "macvlan": {"master": MASTER}}
        conf = {
            "cniVersion": "1.0.0",
            "name": kind,
            "type": kind,
            **keys.get(kind, {}),
            "ipam": {"type": "host-local", "ranges": [[{"subnet": f"10.{number + 1}.0.0/16"}]]},
        }
        result = self._host.cni("ADD", kind, conf, container_id=f"c{index}", netns=netns).result()
        return str(result["ips"][0]["address"]).split("/")[0]

    def _made_by_hand(self, kind: str, number: int, index: int, netns: Netns) -> str:
        net = f"10.{number + 1}.0"
        address, gateway, port = f"{net}.{index + 2}", f"{net}.1", f"{kind}{index}"
        self._host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        if kind == "macvlan":
            script = f"ip link add eth0 link {MASTER} netns {netns.name} type macvlan mode bridge"
        else:
            script = f"ip link add {port} type veth peer name eth0 netns {netns.name}"
        if kind == "bridge" and index == 0:
            script += f"; ip link add br0 type bridge; ip link set br0 up; ip address add {gateway}/16 dev br0"
        if kind == "bridge":
            script += f"; ip link set {port} up master br0"
        if kind == "ptp":
            script += f"; ip link set {port} up; ip address add {gateway}/32 dev {port}; "
            script += f"ip route add {address}/32 dev {port}"
        self._host.run(["sh", "-ec", script])
        inside = "ip link set eth0 up; "
        if kind == "ptp":
            inside += f"ip address add {address}/16 dev eth0 noprefixroute; ip route add {gateway}/32 dev eth0; "
            inside += f"ip route add {net}.0/16 via {gateway}"
        else:
            inside += f"ip address add {address}/16 dev eth0"
        netns.run(["sh", "-ec", inside])
        return address
