"""docs/plugins.md says where Netloom differs from the reference plugins just as the table does that the comparison of
both is judged by (tests/peers)."""

from __future__ import annotations

from pathlib import Path

from tests.peers.differences import table

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs/plugins.md"
TITLE = "## Where Netloom differs from the reference plugins\n"


def test_the_table_in_the_document_is_the_tests() -> None:
    _, title, rest = DOCUMENT.read_text(encoding="utf-8").partition(TITLE)
    assert title
    found = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert found == table().splitlines(), "put the output of `python -m tests.peers.differences` there"
