"""Docker on our networks beside Docker on its own bridge, one dockerd: containers that do nothing, networks that come
and go, and where the shim's time goes.

- Only with --only, as it starts dockerd, and takes minutes. Both sides are asked of the same dockerd in turn.
- A run is `docker run --rm --network NETWORK IMAGE true`, from the start of the docker command to its end. Ours is a
  network of type bridge with ipamd's addresses; the peer a network of Docker's driver bridge with Docker's addresses.
- The shim's time is what it logs of each call. Moving an interface between namespaces waits for the kernel
  (`dev_change_net_namespace`): what is left is our own share, plugins included. What the shim does after an answer, DEL
  and the release of the address, nobody waits for; it has rows of its own, and the next run begins after it.
- The memory is that of the shim with so many endpoints, which are made as dockerd makes them, several at a time, and
  without containers.
- The shim, the workers and ipamd run from the checkout.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bench.host import BenchError, Plan, finished
from bench.stats import Row, Spec, absent, row
from bench.warm import _compiled
from bench.workers import pss_mb
from tests.docker.engine import Docker
from tests.hosts import ROOT, HostError, wait_until
from tests.runtimes import images

RUN = Spec("docker run --rm of a no-op", "ms", "lower", 1.10, 1.0, "peer: Docker's driver bridge")
NETWORK = Spec("docker network create and rm", "ms", "lower", 1.2, None, RUN.note)
OWN = Spec(
    "docker run: the shim's own share", "ms", "lower", 15.0, None, "all calls of a run, but what waits for the kernel"
)
AFTER = Spec("docker run: the shim's work after its answers", "ms", note="DEL, and the release of the address")
ALL = Spec("docker run: all calls of the shim", "ms")
PARTS = {
    name: Spec(f"docker run: {title}", "ms")
    for name, title in {
        "RequestAddress": "RequestAddress",
        "CreateEndpoint": "CreateEndpoint",
        "Join": "Join",
        "attached plugins": "Join, the plugins",
        "attached link": "Join, moving the interface",
        "ProgramExternalConnectivity": "ProgramExternalConnectivity",
        "EndpointOperInfo": "EndpointOperInfo",
        "RevokeExternalConnectivity": "RevokeExternalConnectivity",
        "Leave": "Leave",
        "DeleteEndpoint": "DeleteEndpoint",
        "ReleaseAddress": "ReleaseAddress",
        "detached plugins": "after DeleteEndpoint, the plugins",
        "detached link": "after DeleteEndpoint, what is left of the interface",
        "released": "after ReleaseAddress, ipamd",
    }.items()
}
_RUNS, _NETWORKS, _ENDPOINTS = 5, 3, 200
MEMORY = Spec(f"docker: memory of the shim, {_ENDPOINTS} endpoints", "MB", "lower", 80.0, None, "proportional set size")
_CALL = re.compile(r"netloom-docker: (?:NetworkDriver|IpamDriver)\.(\w+) +took_ms=([\d.]+)")
_STEP = re.compile(r"netloom-docker: (attached|detached) .*plugins_ms=([\d.]+) link_ms=([\d.]+)")
_RELEASED = re.compile(r"netloom-docker: (released) .*took_ms=([\d.]+)")
_WAIT = "attached link"
_AFTER = ("detached plugins", "detached link", "released")


def specs() -> list[Spec]:
    """All rows of this file, in their order."""
    return [RUN, NETWORK, OWN, ALL, AFTER, *PARTS.values(), MEMORY]


class _Engine(Docker):
    """With the workers of an installation: those of the tests write down what they are asked."""

    workers = "warm"


def measure(plan: Plan, place: Path, wanted: Callable[[Spec], bool], say: Callable[[str], None]) -> Iterable[Row]:
    """Rows of all that is wanted; what cannot be measured becomes a row that says so."""
    wishes = [spec for spec in specs() if wanted(spec)]
    if not wishes:
        return
    if shutil.which("dockerd") is None:
        yield from (absent(spec, "dockerd is not installed", excused=True) for spec in wishes)
        return
    say("docker run, docker network")
    try:
        with _Engine("engine", _compiled(place)) as docker:
            found = {one.name: one for one in _measured(plan, docker, wanted)}
    except (BenchError, HostError, OSError) as error:
        yield from (absent(spec, str(error), excused=False) for spec in wishes)
        return
    yield from (found[spec.name] for spec in wishes)


def _measured(plan: Plan, docker: Docker, wanted: Callable[[Spec], bool]) -> Iterable[Row]:
    if any(wanted(spec) for spec in specs() if spec is not MEMORY):
        yield from _runs(plan, docker)
    if wanted(MEMORY):
        yield from _memory(docker)


def _memory(docker: Docker) -> Iterable[Row]:
    network = docker.network("many", "--subnet", "10.73.0.0/16")
    script = [sys.executable, "-I", "-S", str(ROOT / "bench/endpoints.py")]
    which = (network, "docker-10.73.0.0_16")
    made = docker.host.run([*script, "make", *which, str(_ENDPOINTS)], timeout=300).stdout
    held = len(docker.state()["endpoints"])
    if held != _ENDPOINTS or docker.shim is None:
        raise BenchError(f"wanted {_ENDPOINTS} endpoints, found {held}")
    yield row(MEMORY, [[pss_mb(docker.shim.pid)]])
    docker.host.run([*script, "end", *which, made.strip()], timeout=300)
    docker.docker("network", "rm", "many")


def _runs(plan: Plan, docker: Docker) -> Iterable[Row]:
    docker.network("ours", "--subnet", "10.70.0.0/16")
    docker.docker("network", "create", "-d", "bridge", "--subnet", "10.71.0.0/16", "theirs")
    for name in ("ours", "theirs"):
        _run(docker, name)  # makes the bridge
        _network(docker, name)
    runs: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    networks: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    calls: list[Mapping[str, float]] = []
    rounds = 0
    for number in range(plan.rounds):
        if number and plan.budget.over:
            break
        rounds += 1
        for took in (runs["ours"], runs["theirs"], networks["ours"], networks["theirs"]):
            took.append([])
        for sample in range(plan.samples(_RUNS)):
            for name in _order(number + sample):
                before = len(docker.shim_log())
                runs[name][-1].append(_run(docker, name))
                if name == "ours":
                    calls.append(_parts(_log_of_run(docker, before)))
        for sample in range(plan.samples(_NETWORKS)):
            for name in _order(number + sample):
                networks[name][-1].append(_network(docker, name))
    yield finished(plan, RUN, runs["ours"], runs["theirs"])
    yield finished(plan, NETWORK, networks["ours"], networks["theirs"])
    per = len(calls) // rounds
    grouped = [calls[start : start + per] for start in range(0, len(calls), per)]
    totals = [[sum(took for name, took in one.items() if name in _OUTER) for one in group] for group in grouped]
    yield row(OWN, [[sum(one[name] for name in _OUTER) - one[_WAIT] for one in group] for group in grouped])
    yield row(ALL, totals)
    yield row(AFTER, [[sum(one[name] for name in _AFTER) for one in group] for group in grouped])
    for name, spec in PARTS.items():
        yield row(spec, [[one[name] for one in group] for group in grouped])


_OUTER = frozenset(name for name in PARTS if name[0].isupper())  # Docker's calls


def _order(number: int) -> tuple[str, str]:
    return ("theirs", "ours") if number % 2 else ("ours", "theirs")


def _run(docker: Docker, network: str) -> float:
    """Milliseconds."""
    began = time.monotonic()
    docker.docker("run", "--rm", "--network", network, images.NAME, "true")
    return (time.monotonic() - began) * 1000


def _network(docker: Docker, side: str) -> float:
    """Milliseconds for both commands together."""
    driver = ["-d", "netloom", "--ipam-driver", "netloom"] if side == "ours" else ["-d", "bridge"]
    began = time.monotonic()
    docker.docker("network", "create", *driver, "--subnet", "10.72.0.0/24", "fleeting")
    docker.docker("network", "rm", "fleeting")
    return (time.monotonic() - began) * 1000


def _log_of_run(docker: Docker, before: int) -> str:
    """What the shim wrote from there on, to the end of what it does after its last answer."""
    wait_until(lambda: _RELEASED.search(docker.shim_log(), before), "the end of a run", docker.shim_log)
    return docker.shim_log()[before:]


def _parts(text: str) -> Mapping[str, float]:
    """What one run's calls took. Raises BenchError where a call is missing, or one was refused."""
    took: dict[str, float] = defaultdict(float)
    for name, milliseconds in _CALL.findall(text) + _RELEASED.findall(text):
        took[name] += float(milliseconds)
    for what, plugins, link in _STEP.findall(text):
        took[f"{what} plugins"] += float(plugins)
        took[f"{what} link"] += float(link)
    missing = sorted(set(PARTS) - set(took))
    if missing:
        raise BenchError(f"the shim's log of a run lacks {', '.join(missing)}: {text[-2000:]}")
    return took
