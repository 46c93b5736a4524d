"""The benchmark's rows of a cluster, once and small: that they measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cluster
from bench.host import Budget, Plan
from tests import etcd

pytestmark = pytest.mark.kernel

PLAN = Plan(rounds=1, scale=0.3, taken=200, budget=Budget(600))


def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "require_disk", lambda _path: "a test")
    monkeypatch.setattr(cluster, "CLAIMANTS", 20)
    monkeypatch.setattr(cluster, "_SETTLE_S", 0.4)  # what it measures is looked at by nobody
    rows = list(cluster.measure(PLAN, tmp_path, lambda _spec: True, lambda _text: None))
    assert [row.name for row in rows] == [spec.name for spec in cluster.specs(PLAN)]
    for row in rows:
        assert row.ours is not None, row.note


def test_without_etcd_a_row_says_so_and_nobody_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.etcd.PROGRAM_PATH", str(tmp_path))
    etcd.programs.cache_clear()
    try:
        rows = list(cluster.measure(PLAN, tmp_path, lambda _spec: True, lambda _text: None))
    finally:
        etcd.programs.cache_clear()
    assert len(rows) == len(cluster.specs(PLAN))
    assert all("not measured: no etcd here" in row.note and row.limit is None for row in rows)
