"""TCP between two containers, through interfaces that we made against the same made by hand with `ip`.

Two hosts, alike but for who set their containers up. Ours has what our plugins bring along, such as nftables tables
where a network asks for them; the other one has nothing. `bench.paths` says how they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import paths
from bench.attach import MASTER
from bench.host import BenchError, Plan
from bench.stats import Row, Spec, absent
from tests.hosts import Host, HostError, Netns

KINDS = ("bridge", "ptp", "macvlan")
_LIMIT = 0.97
_NOTE = "peer: made by hand with ip"

STREAM = {kind: Spec(f"TCP through {kind}", "Gbit/s", "higher", _LIMIT, note=_NOTE) for kind in KINDS}
TRIPS = {kind: Spec(f"round trips through {kind}", "1/s", "higher", _LIMIT, note=_NOTE) for kind in KINDS}


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [spec for kind in KINDS for spec in (STREAM[kind], TRIPS[kind])]


def measure(plan: Plan, _place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    mine = [spec for spec in specs() if wanted(spec)]
    if not mine:
        return
    say("TCP between containers")
    try:
        with ExitStack() as stack:
            rows = list(_measured(plan, stack, mine))
    except (BenchError, HostError, OSError) as error:
        rows = [absent(spec, str(error), excused=False) for spec in mine]
    yield from rows


def _measured(plan: Plan, stack: ExitStack, wanted: Iterable[Spec]) -> Iterable[Row]:
    ours, hand = stack.enter_context(Host("ours")), stack.enter_context(Host("hand", plugins=False))
    ways = {kind: (_way(stack, ours, kind, made_by_us), _way(stack, hand, kind, made_by_hand)) for kind in KINDS}
    helper = paths.measurer(stack, ours)
    for spec in wanted:
        kind = spec.name.rpartition(" ")[2]
        yield paths.compared(helper, plan, spec, "stream" if spec is STREAM[kind] else "trips", *ways[kind])


Made = Callable[[Host, str, int, Netns], str]


def _way(stack: ExitStack, host: Host, kind: str, made: Made) -> paths.Way:
    """Two containers with such an interface, and the way from the first to the second."""
    if kind == "macvlan":
        host.run(["ip", "link", "add", MASTER, "up", "type", "veth", "peer", "name", f"{MASTER}-peer"])
        host.run(["ip", "link", "set", f"{MASTER}-peer", "up"])
    spaces = (host.netns(f"{kind}1"), host.netns(f"{kind}2"))
    _, address = (made(host, kind, index, netns) for index, netns in enumerate(spaces))
    return paths.Way(paths.space(stack, spaces[0]), paths.space(stack, spaces[1]), address)


def made_by_us(host: Host, kind: str, index: int, netns: Netns) -> str:
    """A container's interface by our plugin; its address."""
    keys: dict[str, Any] = {"bridge": {"bridge": "br0", "isDefaultGateway": True}, "macvlan": {"master": MASTER}}
    conf = {
        "cniVersion": "1.0.0",
        "name": kind,
        "type": kind,
        **keys.get(kind, {}),
        "ipam": {"type": "host-local", "ranges": [[{"subnet": f"10.{KINDS.index(kind) + 1}.0.0/16"}]]},
    }
    result = host.cni("ADD", kind, conf, container_id=f"c{index}", netns=netns).result()
    return str(result["ips"][0]["address"]).split("/")[0]


def made_by_hand(host: Host, kind: str, index: int, netns: Netns) -> str:
    """The same with `ip`, as somebody would write it; its address."""
    net = f"10.{KINDS.index(kind) + 1}.0"
    address, gateway, port = f"{net}.{index + 2}", f"{net}.1", f"{kind}{index}"
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
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
    host.run(["sh", "-ec", script])
    inside = "ip link set eth0 up; "
    if kind == "ptp":
        inside += f"ip address add {address}/16 dev eth0 noprefixroute; ip route add {gateway}/32 dev eth0; "
        inside += f"ip route add {net}.0/16 via {gateway}"
    else:
        inside += f"ip address add {address}/16 dev eth0"
    netns.run(["sh", "-ec", inside])
    return address
