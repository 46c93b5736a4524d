"""The tables with all that belongs into them, at once: what is in them then, and that no packet sees them without."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernel import libnftables, nft, nft_tables, nft_write
from kernel.nft import Chain, Element
from kernel.record import Key, Record, Records
from kernel.session import Session
from tests.hosts import ROOT
from tests.kernel import spaces
from tests.kernel.spaces import Space

OWNER = "net c1 eth0"
CHAINS = (
    Chain("c_1", ("meta nfproto ipv4 ip saddr 10.0.0.0/8 dnat ip to meta l4proto . th dport map @anydnat4", "counter")),
    Chain("c_2", ()),
)
ELEMENTS = (
    nft.masquerade("10.1.0.2", OWNER),
    nft.masquerade("fd00::2", OWNER),
    nft.no_masquerade("10.1.0.0/16"),
    nft.no_masquerade("10.2.0.0/16", "10.3.4.0/24"),
    nft.no_masquerade("fd00::/64"),
    *nft.spoof_check("veth12ab", "02:00:00:00:00:01", OWNER),
    *nft.publish("", "tcp", 8080, "10.1.0.2", 80, OWNER),
    *nft.publish("192.0.2.1", "udp", 53, "10.1.0.2", 5353, OWNER, all=True),
    *nft.publish("", "sctp", 65535, "fd00::2", 1, OWNER),
    *nft.publish("2001:db8::1", "tcp", 1, "fd00::2", 65535, OWNER, all=True),
    *nft.publish("", "udp", 1, "10.1.0.2", 2, "", chain="c_1"),
    *nft.publish("2001:db8::1", "udp", 1, "fd00::2", 2, OWNER, chain="c_2"),
    nft.within("10.1.0.0/16"),
    nft.within("fd00::/64"),
    nft.accept("10.1.0.2", 'odd "owner" \\ $(reboot)\n'),
    nft.accept("fd00::2", "x" * 127),
    nft.keep_apart("10.1.0.0/16"),
    nft.keep_apart("fd00::/64"),
    nft.join("10.1.0.0/16", "10.1.0.0/16"),
    nft.join("fd00::/64", "fd00::/64"),
    *nft.separate("br-0.1", isolated=True),
    nft.internal("br@:x"),
    nft.internal("tcp"),  # a word of nft's own
    nft.bridged("br0"),
)
ODD = Element("internal", ("veth*",))  # nft takes it for a pattern

# Datagrams, each from another port and so of a flow of its own, until the input ends; prints how many.
_SENDER = """
import select, socket, sys
sent = 0
ended = False
while not ended:
    for _ in range(20):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.sendto(b"x", (sys.argv[1], 9))
            sent += 1
    ended = bool(select.select([sys.stdin], [], [], 0)[0])
print(sent)
"""
# Prints the sources of what arrives, once the input ends, with how often each came.
_RECEIVER = """
import collections, json, select, socket, sys
found = collections.Counter()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)
    one.bind(("", 9))
    print("ready", flush=True)
    while True:
        readable = select.select([one, sys.stdin], [], [])[0]
        if one not in readable:
            break
        found[one.recvfrom(10)[1][0]] += 1
print(json.dumps(found))
"""


def in_kernel(session: Session) -> set[Element]:
    return {element for name in nft.element_sets() for element in nft.all_elements(session, name)}


def rules() -> list[tuple[str, str]]:
    """Of all chains, in order, as libnftables shows them; counters left out."""
    printed = json.loads(spaces.run(sys.executable, "-I", "-S", str(ROOT / "tests/nft_list.py")))["nftables"]
    found = [one["rule"] for one in printed if "rule" in one]
    return [(one["chain"], json.dumps([part for part in one["expr"] if "counter" not in part])) for one in found]


@pytest.mark.kernel
def test_every_element_and_chain_is_written_as_it_is_added(session: Session) -> None:
    twice = [
        nft.masquerade("10.1.0.2", "net c9 eth0"),
        *nft.publish("", "tcp", 8080, "10.1.0.9", 80, "net c9 eth0")[:1],  # leads elsewhere
    ]
    nft_write.write(session, ["bridge", "inet"], [*ELEMENTS, *twice], CHAINS)
    odd = next(one for one in ELEMENTS if "odd" in one.comment)
    assert in_kernel(session) == {*ELEMENTS, replace(odd, comment="")} - {odd}
    written = rules()
    assert [nft.count_rules(session, chain.name) for chain in CHAINS] == [2, 0]
    assert nft.converge(session, nft.element_sets(), [*ELEMENTS, ODD]) == (2, 0)
    assert in_kernel(session) == {*ELEMENTS, ODD}
    nft.delete_tables()
    for chain in CHAINS:
        nft.add_chain(session, chain)
    nft.add(session, ELEMENTS)
    assert sorted(rules()) == sorted(written)


DAMAGES = {
    "a chain emptied": ("flush chain inet netloom guard", True),
    "a rule too many": ("insert rule inet netloom forward accept", True),
    "all rules": ("flush table inet netloom; flush table bridge netloom", True),
    "a chain gone": ("flush chain inet netloom guard; delete chain inet netloom guard", True),
    "elements gone": ("flush set inet netloom masq4; flush set inet netloom apart4", True),
    "a set gone": ("flush chain inet netloom forward; delete set inet netloom joined4", True),
    "a set of another type": (
        "flush chain inet netloom forward; delete set inet netloom joined4;"
        "add set inet netloom joined4 { type ipv4_addr; }",
        False,
    ),
    "a chain of another kind": (
        "flush chain inet netloom guard; delete chain inet netloom guard; add chain inet netloom guard",
        False,
    ),
    "a chain too many": (
        "add chain inet netloom more { type filter hook output priority 0; policy accept; }",
        False,
    ),
    "no table": ("delete table inet netloom", False),
    "another version": ("delete set inet netloom @SCHEMA@; add set inet netloom schema0 { type mark; }", False),
}


@pytest.mark.kernel
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_somebody_damaged_is_as_it_was(session: Session, damage: str) -> None:
    """Where it can be, without anything that is there being taken away for a moment."""
    words, in_place = DAMAGES[damage]
    plain = [one for one in ELEMENTS if "odd" not in one.comment]
    nft_write.write(session, ["bridge", "inet"], plain, CHAINS)
    before = rules()
    libnftables.run(words.replace("@SCHEMA@", nft.schema()), damage)
    extra = nft.masquerade("10.9.9.9", "stays where the table does")
    with contextlib.suppress(Exception):
        libnftables.run('add element inet netloom masq4 { 10.9.9.9 comment "stays where the table does" }', "mark it")
    nft_write.write(session, ["bridge", "inet"], plain, CHAINS)
    assert sorted(rules()) == sorted(before)
    assert "elements" not in spaces.run("nft", "list", "set", "inet", "netloom", "hold")
    assert in_kernel(session) == {*plain, extra} if in_place else in_kernel(session) == set(plain)
    assert set(nft.all_chains(session, "inet")) == {
        *nft_write._CHAIN.findall(nft_tables.table("inet")),
        *(chain.name for chain in CHAINS),
    }


@contextlib.contextmanager
def linked(name: str, number: int) -> Iterator[Space]:
    """A namespace with 10.<number>.0.2, behind this one, which forwards."""
    with spaces.fresh() as space:
        spaces.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space.path)
        spaces.run("ip", "address", "add", f"10.{number}.0.1/24", "dev", name)
        spaces.run("ip", "link", "set", name, "up")
        with spaces.inside(space):
            spaces.run("ip", "address", "add", f"10.{number}.0.2/24", "dev", "eth0")
            spaces.run("ip", "link", "set", "eth0", "up")
            spaces.run("ip", "route", "add", "default", "via", f"10.{number}.0.1")
        yield space


@contextlib.contextmanager
def program(space: Space, text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs in a namespace until its input ends."""
    with spaces.inside(space):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", text, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def result(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate("", timeout=60)
    return json.loads(out)


@pytest.mark.kernel
@pytest.mark.parametrize("damage", ["a chain emptied", "a chain too many"])
def test_no_packet_passes_while_the_tables_are_put_right(session: Session, tmp_path: Path, damage: str) -> None:
    """Neither to who is kept apart, nor out under an inner address."""
    records = Records(str(tmp_path))
    shared = (nft.no_masquerade("10.3.0.0/24"), nft.keep_apart("10.3.0.0/24"), nft.join("10.3.0.0/24", "10.3.0.0/24"))
    for number in range(200):
        key = Key("net", f"c{number}", "eth0", "netloom")
        address = f"10.1.0.{number + 2}" if number < 100 else f"10.3.0.{number - 98}"
        elements = (nft.masquerade(address, f"net c{number} eth0"), *nft.publish("", "tcp", number, address, 1, "x"))
        records.write(Record(key, elements=elements, shared=shared))
    records.rebuild(session)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    with linked("one", 1) as one, linked("out", 2) as out, linked("apart", 3) as apart, contextlib.ExitStack() as stack:
        outside, inside = (stack.enter_context(program(space, _RECEIVER)) for space in (out, apart))
        for receiver in (outside, inside):
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
        senders = [stack.enter_context(program(one, _SENDER, f"10.{number}.0.2")) for number in (2, 3)]
        for _ in range(15):
            libnftables.run(DAMAGES[damage][0], "somebody's mistake")
            records.rebuild(session, anew=True)
        assert min(result(sender) for sender in senders) > 200
        arrived = result(outside)
        assert set(arrived) == {"10.2.0.1"}
        assert arrived["10.2.0.1"] > 200
        assert result(inside) == {}
        # It is the table that keeps them away.
        nft.delete_tables()
        with program(apart, _RECEIVER) as receiver, program(one, _SENDER, "10.3.0.2") as sender:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
            assert result(sender) > 0
            assert list(result(receiver)) == ["10.1.0.2"]
