"""What the kernel tells of changes to nftables: to ours, to iptables' FORWARD, to firewalld's table, by whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel import nft
from kernel.events import Change, Events
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel


@pytest.fixture
def events(home: Space) -> Iterator[Events]:
    listening = Events()
    yield listening
    listening.close()


def seen(events: Events, *command: str) -> set[str]:
    """What a command did, as the names of the fields that are set."""
    spaces.run(*command)
    changes = events.wait(0)
    fields = ("structure", "elements", "forward", "firewalld", "lost")
    assert all(change.pid and change.process for change in changes)
    return {field for change in changes for field in fields if getattr(change, field)}


def test_what_is_taken_from_us(session: Session, events: Events) -> None:
    nft.add(session, [nft.accept("10.1.0.2", "net c1 eth0"), nft.accept("10.1.0.3", "net c2 eth0")])
    written = events.wait(0)
    assert {change.process for change in written} <= {"python", "python3", "pytest"}
    assert not any(change.structure for change in written), "the whole table was written, as it should be"
    assert seen(events, "nft", "delete element inet netloom accept4 { 10.1.0.2 }") == {"elements"}
    assert seen(events, "nft", "flush chain inet netloom forward") == {"structure"}
    assert seen(events, "nft", "add table inet other; add set inet other accept4 { type ipv4_addr; }") == set()
    assert seen(events, "nft", "delete table inet other") == set()
    assert "structure" in seen(events, "nft", "flush ruleset")


def test_what_iptables_forwards(session: Session, events: Events) -> None:
    for tool in ("iptables-nft", "ip6tables-nft"):
        assert seen(events, tool, "-P", "FORWARD", "DROP") == {"forward"}
        assert seen(events, tool, "-A", "FORWARD", "-j", "ACCEPT") == {"forward"}
        assert seen(events, tool, "-N", "CNI-ADMIN") == {"forward"}
        events.wait(0)
        assert seen(events, tool, "-A", "CNI-ADMIN", "-j", "ACCEPT") == set()
        assert seen(events, tool, "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE") == set()
        assert seen(events, tool, "-F", "FORWARD") == {"forward"}
    assert seen(events, "nft", "delete table ip filter") == {"forward"}
    assert seen(events, "nft", "add table inet filter; add chain inet filter FORWARD") == set()


def test_firewalld_and_silence(session: Session, events: Events) -> None:
    assert seen(events, "nft", "add table inet firewalld") == {"firewalld"}
    assert events.wait(0) == []
    assert Change() == Change(lost=False)
