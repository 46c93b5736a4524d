"""docs/netd.md is true where a program can tell."""

from __future__ import annotations

import re

from netd import config
from netd.fabric.registry import BACKENDS
from netd.metrics import NetdMetrics, Sample
from protos.node.v1 import node_pb2
from tests.hosts import ROOT

TEXT = (ROOT / "docs/netd.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    """The first cell of each table row below a heading."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]


def codes(heading: str) -> set[str]:
    return {code for cell in first_cells(heading) for code in re.findall(r"`([^`]+)`", cell)}


def test_every_key_and_flag() -> None:
    keys = {f"netd.{key}" for key in config._KEYS["netd"]}
    keys |= {f"{table}.{key}" for table, names in config._LISTS.items() for key in names}
    found = codes("Configuration")
    assert {one for one in found if not one.startswith("--")} == keys | {"cluster.lease_s"}
    flags = {flag for _, flag in config._OVERRIDES.values()} | {"--config", "--check", "--remove"}
    assert {one for one in found if one.startswith("--")} == flags


def test_every_backend() -> None:
    assert codes("Backends") == set(BACKENDS)


def test_every_method() -> None:
    assert codes("API") == set(node_pb2.DESCRIPTOR.services_by_name["Node"].methods_by_name)


def test_every_metric() -> None:
    printed = NetdMetrics("1", "n", lambda: Sample(entries={"route": 1}, peers={"up": 1})).render().decode()
    made = {
        re.sub(r"_(total|info)$", "", line.split()[2])
        for line in printed.splitlines()
        if line.startswith("# TYPE netloom_netd_")
    }
    assert codes("Metrics") == made
