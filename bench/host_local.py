"""host-local's ADD with few, many and very many addresses taken: ours beside itself, and beside the reference's.

The files of the addresses that are taken are written beforehand, as either of the two would have written them one after
the other. The first ADD of each network, which lets ours build its index, is not counted. What an ADD takes, a DEL
gives back. The reference reads every file at each ADD; where that takes half a second it gets few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from bench import warm
from bench.attach import Side, peer_side, rounds, side
from bench.host import BenchError, Plan, finished
from bench.stats import Row, Spec, absent
from tests.hosts import CNI_BIN, HostError

_COUNT = 8
_PEER_READS = 20_000  # files that the reference may read in a round


class Catalogue:
    """The rows of this file; names depend on how many addresses count as many."""

    def __init__(self, plan: Plan) -> None:
        self.sizes = (10, 1_000, 60_000 if plan.scale >= 1 else 10_000)
        self.beside = {size: Spec(f"host-local ADD, {size:,} taken", "ms") for size in self.sizes}
        self.flat = {
            size: Spec(f"host-local ADD, {size:,} taken, beside {self.sizes[0]}", "ms", "lower", 1.3)
            for size in self.sizes[1:]
        }
        self.specs = [*self.beside.values(), *self.flat.values()]


def specs(plan: Plan) -> list[Spec]:
    """All rows of this file, in their order."""
    return Catalogue(plan).specs


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    catalogue = Catalogue(plan)
    if not any(wanted(spec) for spec in catalogue.specs):
        return
    took: dict[tuple[str, int], list[list[float]]] = {}
    try:
        with ExitStack() as hosts:
            peer = peer_side(hosts, place, "reference")
            ipam = {"type": "host-local", "dataDir": str(place / "indexed" / "host-local")}
            ours = side(hosts, "indexed", CNI_BIN, ipam, place, lambda host, at: warm.start(host, at, hosts))
            say("host-local: files of addresses that are taken")
            for number, size in enumerate(catalogue.sizes):
                for one in (ours, peer):
                    _fill(one, number, size)
                    _add_and_delete(one, number, 1)
            say("host-local ADD")
            for sides in rounds(plan, ours, peer):
                for one in sides:
                    for number, size in enumerate(catalogue.sizes):
                        count = plan.samples(_COUNT)
                        if one is peer:
                            count = max(1, min(count, _PEER_READS // size))
                        took.setdefault((one.name, size), []).append(_add_and_delete(one, number, count))
    except (BenchError, HostError, OSError) as error:
        yield from (absent(spec, str(error), excused=False) for spec in catalogue.specs if wanted(spec))
        return
    for size, spec in catalogue.beside.items():
        if wanted(spec):
            yield finished(plan, spec, took[ours.name, size], took[peer.name, size])
    for size, spec in catalogue.flat.items():
        if wanted(spec):
            yield finished(plan, spec, took[ours.name, size], took[ours.name, catalogue.sizes[0]])


def _subnet(number: int) -> IPv4Network:
    return IPv4Network(f"10.{90 + number}.0.0/16")


def _conf(one: Side, number: int) -> Mapping[str, Any]:
    ipam = {**one.ipam, "ranges": [[{"subnet": str(_subnet(number))}]]}
    return {"cniVersion": "1.0.0", "name": f"taken{number}", "type": "host-local", "ipam": ipam}


def _fill(one: Side, number: int, size: int) -> None:
    directory = Path(one.ipam["dataDir"], f"taken{number}")
    directory.mkdir(parents=True)
    hosts = _subnet(number).hosts()
    next(hosts)  # the gateway
    last = ""
    for index in range(size):
        last = str(next(hosts))
        (directory / last).write_bytes(f"{index:064x}\r\neth0".encode())
    (directory / "last_reserved_ip.0").write_text(last, encoding="ascii")


def _add_and_delete(one: Side, number: int, count: int) -> list[float]:
    """Milliseconds of the ADDs."""
    conf = _conf(one, number)
    took, _ = one.run([one.call("ADD", conf, index) for index in range(count)], 1)
    one.run([one.call("DEL", conf, index) for index in range(count)], 1)
    return took
