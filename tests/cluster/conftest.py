"""For the tests of faults: one etcd of three members and one fleet of ten nodes for all of them.

Clients and logs live as long as the fleet, so the judge sees all faults as one history. A test that fails takes the
fleet with it; the next one gets a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.nodes import Fleet, Node, pool
from tests.etcd import EtcdCluster
from tests.hosts import HostError
from tests.underlay import Underlay

BLOCKS, SHARED = "blocks", "shared"
# 32 blocks of 61 addresses, and 509 addresses: the nodes meet often.
BLOCKS_SUBNET, SHARED_SUBNET = "10.64.0.0/21", "10.65.0.0/23"
NODES = 10
QUOTA_MB = 64
# The node whose clock jumps.
JUMPING = f"n{NODES}"


@dataclass
class Field:
    """Where the faults happen."""

    etcd: EtcdCluster
    fleet: Fleet
    clock: Path  # what libfaketime reads, for one node

    @property
    def nodes(self) -> list[Node]:
        return list(self.fleet.nodes.values())


class _Kept:
    def __init__(self) -> None:
        self.stack = ExitStack()
        self.field: Field | None = None

    def drop(self) -> None:
        self.field = None
        self.stack.close()
        self.stack = ExitStack()


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.failed:  # type: ignore[attr-defined]
        item.stash[_failed] = True
    return report


@pytest.fixture(scope="module")
def kept() -> Iterator[_Kept]:
    found = _Kept()
    yield found
    found.drop()


@pytest.fixture
def field(kept: _Kept, request: pytest.FixtureRequest) -> Iterator[Field]:
    """Three members, ten nodes that know two pools, and their clients at rest."""
    if kept.field is None:
        kept.field = _make(kept.stack)
    kept.field.etcd.compact()  # what the tests before wrote would fill it
    yield kept.field
    if request.node.stash.get(_failed, False):
        kept.drop()


def _make(stack: ExitStack) -> Field:
    underlay = stack.enter_context(Underlay())
    etcd = stack.enter_context(EtcdCluster(3, "3.4", underlay=underlay, quota_bytes=QUOTA_MB << 20))
    clock = Path(underlay.host.directory) / "clock"
    clock.write_text("+0\n", encoding="ascii")
    pools = {
        BLOCKS: pool(BLOCKS_SUBNET, "node-block"),
        SHARED: pool(SHARED_SUBNET, "cluster-address"),
    }
    fleet = Fleet(
        etcd,
        NODES,
        pools,
        ask_for={SHARED: SHARED_SUBNET},
        environments={JUMPING: false_clock(clock)},
        config={"cluster": {"lease_s": 5}},
        # Some 500 requests a second: who takes all of the processors makes leases and leaders go that nobody struck,
        # and every other test beside this one slow.
        rest_s=0.05,
    )
    return Field(etcd, stack.enter_context(fleet), clock)


def false_clock(file: Path) -> dict[str, str]:
    """Variables under which a program's wall clock is ahead by what the file says ("+3600"), within a second.

    CLOCK_MONOTONIC and CLOCK_BOOTTIME stay true, as they do where somebody sets a machine's clock.
    """
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        raise HostError("no libfaketime here: install Debian's libfaketime")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
