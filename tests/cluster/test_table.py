"""Whose each block is, when what is read and what was done come in any order."""

from __future__ import annotations

from cluster import layout
from cluster.etcd import Pair
from cluster.layout import BlockRecord
from ipamd.member.table import Table

OWN = BlockRecord("a", "id-a")


def pair(cidr: str, node: str, revision: int) -> Pair:
    record = layout.encode(BlockRecord(node, f"id-{node}"))
    return Pair(layout.BLOCKS + layout.place("pods", cidr), record, revision, revision, 1, 0)


def test_what_was_done_since_a_list_was_read_counts() -> None:
    table = Table(OWN)
    table.note_own("pods", "10.2.1.0/24", 40)
    table.replace([pair("10.2.2.0/24", "b", 30)], 39)
    assert (table.own(), table.others("pods")) == ([("pods", "10.2.1.0/24")], ["10.2.2.0/24"])
    table.replace([], 40)
    assert table.cidrs("pods") == []


def test_no_revision_counts_when_etcd_began_anew() -> None:
    """Else blocks that etcd lost would be believed to be there, and nobody would put them there again."""
    table = Table(OWN)
    table.note_own("pods", "10.2.1.0/24", 40)
    table.note(pair("10.2.2.0/24", "b", 41))
    table.replace([pair("10.2.2.0/24", "c", 3)], 4, went_back=True)
    assert table.own() == []
    claim = table.get("pods", "10.2.2.0/24")
    assert claim is not None
    assert (claim.node, claim.revision) == ("c", 3)
