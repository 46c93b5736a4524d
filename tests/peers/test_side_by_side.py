"""The same configurations through ours and through Debian's reference plugins, on two hosts alike, compared field by
field: what is printed, links, addresses, routes, neighbours, rules, queueing disciplines, sysctls, host-local's files
after ADD; what CHECK and DEL say; what is left after DEL. What may differ is in tests/peers/differences.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cni.registry import PLUGINS
from tests.cni.lab import REFERENCE
from tests.hosts import IPV6, ROOT, CniCall, Host
from tests.peers.cases import GROUPS, cases
from tests.peers.differences import ACCEPTED, Accepted, unexplained
from tests.peers.twins import Case, Side, Twins, our_side, their_side
from tests.warm.service import Service

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not os.path.exists(f"{REFERENCE}/bridge"), reason=f"no {REFERENCE}/bridge"),
]
ALL = [(group, case) for group in GROUPS for case in cases(group)]


class Tally:
    """What the cases that ran have shown."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.used: set[Accepted] = set()


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def twins(request: pytest.FixtureRequest) -> Iterator[Twins]:
    """A fresh pair of hosts for a group of cases."""
    assert request.param in GROUPS
    with Host("ours") as ours, Host("theirs", plugins=False) as theirs:
        yield Twins(our_side(ours), their_side(theirs))


def test_there_are_enough() -> None:
    names = [case.name for group in GROUPS.values() for case in group]
    assert len(names) == len(set(names)) >= 50
    for plugin in {plugin for plugin in PLUGINS if os.path.exists(f"{REFERENCE}/{plugin}")}:
        assert sum(plugin in case.types for group in GROUPS.values() for case in group) >= 3, plugin


@pytest.mark.parametrize(("twins", "case"), ALL, ids=[case.name for _, case in ALL], indirect=["twins"])
def test_the_same(twins: Twins, tally: Tally, case: Case) -> None:
    tally.ran.add(case.name)
    compare(twins, tally, case)


def compare(twins: Twins, tally: Tally, case: Case) -> None:
    differences, (ours, theirs) = twins.differences(case)
    left = unexplained(case, differences, tally.used)
    said = f"ours said: {ours.messages}\ntheirs said: {theirs.messages}"
    assert not left, "\n".join([*map(str, left), said])
    assert ours.refused == bool(case.error), said
    for word in case.error:
        assert word in ours.messages[0], said


def test_every_accepted_difference_still_occurs(tally: Tally) -> None:
    """Needs what all the cases have shown, and so comes after them."""
    if tally.ran != {case.name for _, case in ALL}:
        pytest.skip("only some of the cases ran")
    if not IPV6:
        pytest.skip("no IPv6 on this machine, so none of its differences")
    stale = [entry for entry in ACCEPTED if entry not in tally.used and (not entry.needs or _has(entry.needs))]
    assert not stale, "no case shows these differences any more: take them out\n" + "\n".join(map(str, stale))


def _has(qdisc: str) -> bool:
    """Whether this kernel has a queueing discipline."""
    argv = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", qdisc]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


# The cases above run in one process of ours. Some of them once more the two ways of an installation.
_AS_INSTALLED = (
    "bridge-1.0.0-dual",
    "bridge-mtu-of-a-string",
    "ptp-0.3.1",
    "macvlan-plain",
    "loopback-1.0.0",
    "host-local-range",
    "static-0.4.0-dual",
    "standard-chain",
)


def test_each_as_a_process_of_its_own(tally: Tally) -> None:
    with Host("ours") as ours, Host("theirs", plugins=False) as theirs:
        twins = Twins(Side(ours, ours.cni), their_side(theirs))
        for case in _chosen():
            compare(twins, tally, case)


def test_each_through_the_launcher(tally: Tally, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    subprocess.run(["make", "-s", "launcher", f"LAUNCHER={launcher}"], cwd=ROOT, check=True)
    with Host("ours") as ours, Host("theirs", plugins=False) as theirs:
        service = Service(ours, launcher)
        service.start()

        def call(verb: str, plugin: str, conf: Mapping[str, Any], **more: Any) -> CniCall:
            return service.call(verb, conf, plugin, **more)

        twins = Twins(Side(ours, call), their_side(theirs))
        for case in _chosen():
            compare(twins, tally, case)
        assert service.cold() == []
        service.stop()


def _chosen() -> list[Case]:
    return [case for _, case in ALL if case.name in _AS_INSTALLED]
