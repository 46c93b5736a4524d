"""The measurements themselves, once and small: that they measure, and leave nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import addresses, attach
from bench.host import Budget, Plan
from tests import hosts

pytestmark = pytest.mark.kernel


def plan() -> Plan:
    """Its time begins now; more than any test may take."""
    return Plan(rounds=2, scale=0.1, taken=40, budget=Budget(3600))


def test_attachments_are_measured_on_both_sides(tmp_path: Path) -> None:
    names = {"bridge ipMasq ADD, cold", "VERSION, cold", "/bin/true"}
    rows = list(attach.measure(plan(), tmp_path, lambda spec: spec.name in names, lambda _text: None))
    assert {row.name for row in rows} == names
    add = next(row for row in rows if row.name.startswith("bridge"))
    assert add.ratio is not None, add.note
    assert add.rounds == 2
    assert add.spread is not None
    assert add.spread[0] <= add.ratio <= add.spread[1]
    assert not any(hosts.scratch().glob("cold-*"))


def test_ipamd_is_measured_with_few_and_with_many_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "require_disk", lambda _path: "a test")
    rows = {row.name: row for row in addresses.measure(plan(), tmp_path, lambda _spec: True, lambda _text: None)}
    assert list(rows) == [spec.name for spec in addresses.Catalogue(40).specs]
    for row in rows.values():
        assert row.ours is not None, row.note
    assert rows["ipamd Allocate, 8 clients"].ratio is not None
    assert (rows["ipamd allocations per fsync, 1 client"].ours or 0) >= 1
    assert (rows["ipamd allocations, 8 clients, 40 taken"].ours or 0) > 0
    assert not any(hosts.scratch().glob("ipamd-*"))
