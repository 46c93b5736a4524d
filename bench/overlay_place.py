"""Where an overlay's bridge is better: in the host's namespace, or in one of its own. `python -m bench.overlay_place`.

Not of `make bench`: its figures decided something, and stand in docs/adr/0020-overlay.md. Everything is made by hand,
and alike on two pairs of hosts, but for the place. In a namespace of its own, bridge and VXLAN device see none of the
host's netfilter; what goes out takes a veth more, whose end on the host has the gateway's address. "ours" is the host's
namespace, "peer" one of its own, so a ratio over 1 of a rate, or below 1 of a time, speaks for the host's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench import paths, report
from bench.host import Budget, Plan
from bench.overlay import VNI, bridge_netfilter
from bench.stats import Row, Spec, row
from kernel import link, netns
from kernel.link import VethSpec
from kernel.session import Session
from tests.hosts import Host, Netns, keep_in_memory, remove_scratch, sweep
from tests.kernel import spaces
from tests.underlay import Underlay

_SPACE = "ov"
_SUBNET = "10.0.0.0/16"
_GATEWAY_MAC = "02:42:0a:00:00:01"
_PLAN = Plan(9, 1.0, 0, Budget(300))
_ATTACHMENTS, _PLACES = 60, 15


def make(hosts: Sequence[Host], under: Underlay, *, own: bool) -> tuple[Netns, Netns]:
    """A network on two hosts, and a container on each. `own`: in a namespace of its own."""
    spaces_ = []
    for number, host in enumerate(hosts, 1):
        local, there = under.address(10 + number), under.address(13 - number)
        inside = f"ip netns exec {_SPACE} " if own else ""
        gateway = "g0" if own else "br0"
        lines = ["sysctl -qw net.ipv4.ip_forward=1"]
        if own:
            lines += [f"ip netns add {_SPACE}", f"ip link add g0 mtu 1450 up type veth peer name g1 netns {_SPACE}"]
        lines += [
            f"{inside}ip link add br0 mtu 1450 up type bridge",
            f"ip link add vx0 mtu 1450 type vxlan id {VNI} local {local} dev eth0 dstport 4789",
            *([f"ip link set vx0 netns {_SPACE}", f"{inside}ip link set g1 mtu 1450 up master br0"] if own else []),
            f"{inside}bridge fdb append 00:00:00:00:00:00 dev vx0 dst {there}",
            f"{inside}ip link set vx0 up master br0",
            f"ip link set {gateway} address {_GATEWAY_MAC}",
            # Both hosts' gateways have one MAC: a port's would be learned from the other host.
            *([f"{inside}bridge fdb replace {_GATEWAY_MAC} dev g1 master static sticky"] if own else []),
            f"ip address add 10.0.0.1/16 dev {gateway}",
            "nft add table ip m",
            "nft add chain ip m p '{ type nat hook postrouting priority srcnat; }'",
            f"nft add rule ip m p ip saddr {_SUBNET} ip daddr != {_SUBNET} masquerade",
            f"ip netns add c{number}",
            f"{inside}ip link add v0 mtu 1450 type veth peer name eth0 mtu 1450 netns /run/netns/c{number}",
            f"{inside}ip link set v0 up master br0",
        ]
        host.run(["sh", "-ec", "\n".join(lines)])
        container = Netns(host, f"c{number}")
        script = f"ip link set eth0 up; ip address add 10.0.1.{number}/16 dev eth0; ip route add default via 10.0.0.1"
        container.run(["sh", "-ec", script])
        spaces_.append(container)
    spaces_[0].ping("10.0.1.2")
    return spaces_[0], spaces_[1]


def traffic(stack: ExitStack) -> Iterator[Row]:
    """Throughput and round trips, to a container of the other host and to a machine outside."""
    sides = []
    every: list[Host] = []
    for name, own in (("host", False), ("own", True)):
        under = stack.enter_context(Underlay(f"{name}-under"))
        hosts = [stack.enter_context(Host(f"{name}{number}", plugins=False)) for number in (1, 2)]
        for number, host in enumerate(hosts, 1):
            under.join(host, 10 + number)
        one, two = make(hosts, under, own=own)
        beyond = under.host.netns("beyond")
        under.join(beyond, 99)
        one.ping(under.address(99))
        source = paths.space(stack, one)
        inner = paths.Way(source, paths.space(stack, two), "10.0.1.2")
        sides.append((inner, paths.Way(source, paths.space(stack, beyond), under.address(99))))
        every += hosts
    helper = paths.measurer(stack, every[0])
    for on in (False, True):
        if not bridge_netfilter(every, on=on) and on:
            continue
        words = "br_netfilter" if on else "no br_netfilter"
        for index, where in enumerate(("other host", "outside")):
            ways = sides[0][index], sides[1][index]
            stream, trips = (f"{what} to {where}, {words}" for what in ("TCP", "round trips"))
            yield paths.compared(helper, _PLAN, Spec(stream, "Gbit/s", "higher"), "stream", *ways)
            yield paths.compared(helper, _PLAN, Spec(trips, "1/s", "higher"), "trips", *ways)


def attaching() -> list[list[float]]:
    """Milliseconds of attachments, in the host's and in the other; then of the places themselves. Run in a host."""
    took: list[list[float]] = [[], [], [], []]
    with Session() as host:
        for number in range(_ATTACHMENTS):
            for side in (0, 1) if number % 2 else (1, 0):
                with _container() as path:
                    took[side].append(_attach(host, path, own=bool(side)))
        for number in range(_PLACES):
            for side in (0, 1) if number % 2 else (1, 0):
                took[2 + side].append(_place(host, own=bool(side)))
    return took


@contextmanager
def _container() -> Iterator[str]:
    with spaces.fresh() as space:
        yield space.path


def _attach(host: Session, path: str, *, own: bool) -> float:
    """What is between an ADD's request and a veth pair on the bridge."""
    began = time.perf_counter()
    with netns.opened(path) as container, ExitStack() as stack:
        door = host.visit(stack.enter_context(netns.opened(f"/run/netns/{_SPACE}"))) if own else None
        inside = stack.enter_context(door) if door is not None else host
        bridge = link.get(inside, "br0")
        link.add_veth(inside, VethSpec("v9", "eth0", container.fd, 1450, "02:42:0a:00:09:09"), bridge.index)
        took = (time.perf_counter() - began) * 1e3
        link.delete(inside, "v9")
    return took


def _place(host: Session, *, own: bool) -> float:
    """A bridge, in a new namespace with a veth to the host, or in the host's."""
    began = time.perf_counter()
    with ExitStack() as stack:
        if not own:
            link.add_bridge(host, "br9", "02:42:0a:09:00:01", mtu=1450)
            took = (time.perf_counter() - began) * 1e3
            link.delete(host, "br9")
            return took
        space = stack.enter_context(spaces.fresh())
        new = stack.enter_context(netns.opened(space.path))
        inside = stack.enter_context(host.visit(new))
        link.add_bridge(inside, "br9", "02:42:0a:09:00:02", mtu=1450)
        link.add_veth(host, VethSpec("g9", "g1", new.fd, 1450, ""))
        took = (time.perf_counter() - began) * 1e3
        link.delete(host, "g9")
    return took


def times(stack: ExitStack) -> Iterator[Row]:
    """Of attachments and of places: both on one host, in turn."""
    under = stack.enter_context(Underlay("times"))
    host = stack.enter_context(Host("times", plugins=False))
    under.join(host, 11)
    script = f"ip link add br0 mtu 1450 up type bridge; ip netns add {_SPACE}; "
    host.run(["sh", "-ec", f"{script}ip netns exec {_SPACE} ip link add br0 mtu 1450 up type bridge"])
    found = json.loads(host.run([sys.executable, "-m", "bench.overlay_place", "attaching"]).stdout)
    yield row(Spec("a veth pair on the bridge", "ms"), [[one] for one in found[0]], [[one] for one in found[1]])
    yield row(Spec("the first on its host: the bridge", "ms"), [[one] for one in found[2]], [[one] for one in found[3]])


def main() -> None:
    if sys.argv[1:] == ["attaching"]:
        print(json.dumps(attaching()))
        return
    keep_in_memory()
    sweep()
    try:
        rows: list[Row] = []
        for part in (times, traffic):
            with ExitStack() as stack:
                rows += part(stack)
        print("\n".join(report.table(rows, report.style(os.environ, sys.stdout.isatty()))))
        print(f"load {statistics.mean(os.getloadavg()[:2]):.1f}")
    finally:
        remove_scratch()


if __name__ == "__main__":
    main()
