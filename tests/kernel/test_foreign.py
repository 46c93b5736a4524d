"""The rule in front of another firewall's: where it stands, that iptables keeps it, that it comes once and goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel import foreign, mark, nft, paths
from kernel import legacy as legacy_programs
from kernel.errors import KernelError
from kernel.session import Session
from tests.hosts import ROOT
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel
ACCEPT = '-A FORWARD -m mark --mark 0x1000000/0x1000000 -m comment --comment "netloom lets pass 0x1000000" -j ACCEPT'
TOOLS = {4: "iptables", 6: "ip6tables"}


def call_of(chain: str) -> str:
    return f'-A FORWARD -m comment --comment "netloom asks first: {chain}" -j {chain}'


def iptables(*commands: str, version: int = 4, kind: str = "nft") -> None:
    for command in commands:
        spaces.run(f"{TOOLS[version]}-{kind}", "-w", *command.split())


def forward(version: int = 4, kind: str = "nft") -> list[str]:
    """The rules of FORWARD as iptables prints them."""
    return spaces.run(f"{TOOLS[version]}-{kind}", "-S", "FORWARD").splitlines()[1:]


def restore(saved: str, *options: str) -> None:
    subprocess.run(["iptables-nft-restore", *options], input=saved, text=True, check=True)


def ruleset() -> str:
    return spaces.run("nft", "list", "ruleset")


@pytest.mark.parametrize("version", [4, 6])
def test_it_comes_where_packets_are_dropped_and_goes(session: Session, version: int) -> None:
    iptables("-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", version=version)
    before = ruleset()
    assert foreign.missing(session)
    assert foreign.ensure(session)
    assert forward(version) == [ACCEPT, "-A FORWARD -j DOCKER-USER"]
    assert not foreign.ensure(session)
    assert not foreign.missing(session)
    assert len(forward(version)) == 2
    assert foreign.remove(session) == []
    assert ruleset() == before


def test_it_survives_iptables_save_and_restore(session: Session) -> None:
    iptables("-P FORWARD DROP", "-N CNI-ADMIN", "-A FORWARD -i br0 -o br0 -j ACCEPT")
    foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    saved = spaces.run("iptables-nft-save")
    wanted = [call_of("CNI-ADMIN"), ACCEPT, "-A FORWARD -i br0 -o br0 -j ACCEPT"]
    assert forward() == wanted
    restore(saved)
    assert forward() == wanted
    assert not foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    # What --noflush appends once more is one again.
    restore(saved, "--noflush")
    assert len(forward()) == 6
    assert foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    assert forward() == [*wanted, wanted[-1]]
    restore(saved)
    foreign.remove(session)
    assert forward() == wanted[-1:]


def test_nothing_is_touched_where_nobody_drops(session: Session) -> None:
    assert not foreign.ensure(session)
    assert ruleset() == ""
    iptables("-P FORWARD ACCEPT", "-P INPUT DROP", "-t nat -A POSTROUTING -j MASQUERADE")
    before = ruleset()
    assert not foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    assert ruleset() == before
    iptables("-A FORWARD -j REJECT")
    assert foreign.ensure(session)
    assert forward()[0] == ACCEPT


def test_an_administrators_chain_is_asked_first(session: Session) -> None:
    iptables("-P FORWARD DROP")
    foreign.ensure(session, admin_chains=["ADMIN-1"])
    assert forward() == [ACCEPT]
    iptables("-N ADMIN-1")
    assert foreign.ensure(session, admin_chains=["ADMIN-1"])
    assert forward() == [call_of("ADMIN-1"), ACCEPT]
    iptables("-N ADMIN-2")
    assert foreign.ensure(session, admin_chains=["ADMIN-2"])
    assert forward() == [call_of("ADMIN-1"), call_of("ADMIN-2"), ACCEPT]
    assert not foreign.ensure(session, admin_chains=["ADMIN-2", "ADMIN-1"])
    assert not foreign.ensure(session)
    assert foreign.remove(session) == ["ADMIN-1", "ADMIN-2"]
    # Such a chain wants to be asked even where all else is accepted.
    iptables("-P FORWARD ACCEPT")
    assert foreign.ensure(session, admin_chains=["ADMIN-1"])
    assert forward() == [call_of("ADMIN-1"), ACCEPT]


def test_what_is_put_in_front_of_it_stays_there(session: Session) -> None:
    iptables("-P FORWARD DROP")
    foreign.ensure(session)
    for number in range(40):
        iptables(f"-I FORWARD -s 10.0.0.{number} -j DROP")
    before = forward()
    assert not foreign.ensure(session)
    assert forward() == before
    assert before[-1] == ACCEPT


def test_many_at_once_leave_one_rule(home: Space, session: Session) -> None:
    iptables("-P FORWARD DROP")
    script = "from kernel import foreign\nfrom kernel.session import Session\nwith Session() as s:\n"
    script += "    for _ in range(100): foreign.ensure(s)\n"
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(4)]
    while any(process.poll() is None for process in running):
        spaces.run("iptables-nft", "-w", "-F", "FORWARD")
    assert [process.returncode for process in running] == [0] * 4
    assert forward() in ([], [ACCEPT])
    foreign.ensure(session)
    assert forward() == [ACCEPT]


def test_among_20000_rules_only_the_first_are_looked_at(session: Session) -> None:
    many = "".join(f"-A FORWARD -s 10.{n >> 8 & 255}.{n & 255}.0/24 -j DROP\n" for n in range(20_000))
    restore(f"*filter\n:FORWARD DROP [0:0]\n{many}COMMIT\n")
    assert foreign.ensure(session)
    chain = foreign._Chain(True, 20_001)
    top = foreign._top(session, 4, chain)
    assert top[0].ours
    assert 1 < len(top) < 200
    assert len(foreign._rules(session, 4, chain)) < 2000
    assert not foreign.ensure(session)
    assert foreign._is_still_there(session, 4)
    iptables("-D FORWARD 1")
    assert not foreign._is_still_there(session, 4)
    assert foreign.ensure(session)
    assert not foreign.ensure(session)
    foreign.settle(session)
    assert not foreign._top(session, 4, chain)[0].ours


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What takes the place of /etc/netloom/netloom.toml; not there yet."""
    file = tmp_path / "netloom.toml"
    monkeypatch.setattr(paths, "CONFIG_FILE", str(file))
    monkeypatch.setattr(mark, "_known", (None, mark.DEFAULT_BIT))
    yield file


def test_another_bit_replaces_rule_and_tables(session: Session, config: Path) -> None:
    iptables("-P FORWARD DROP", "-N CNI-ADMIN")
    nft.add(session, [nft.accept("10.1.0.2", "net c1 eth0")])
    foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    assert "0x01000000" in spaces.run("nft", "list", "chain", "inet", "netloom", "accepted")
    config.write_text("[cni]\nforward_mark_bit = 5\n")
    nft.add(session, [nft.accept("10.1.0.3", "net c2 eth0")])
    assert foreign.ensure(session)
    assert "0x00000020" in spaces.run("nft", "list", "chain", "inet", "netloom", "accepted")
    assert forward() == [call_of("CNI-ADMIN"), ACCEPT.replace("0x1000000", "0x20")]
    config.write_text("[cni]\nforward_mark_bit = 32\n")
    for attempt in (foreign.ensure, lambda one: nft.add(one, [nft.accept("10.1.0.4", "net c3 eth0")])):
        with pytest.raises(KernelError, match=r"cni.forward_mark_bit: want a whole number from 0 to 31, found 32"):
            attempt(session)


def test_it_goes_with_the_last_who_wants_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    iptables("-P FORWARD DROP", "-N CNI-ADMIN")
    iptables("-P FORWARD DROP", version=6)
    elements = [
        nft.accept("10.1.0.2", "net c1 eth0"),
        *(one for one in nft.publish("", "tcp", 80, "10.1.0.2", 80, "net c1 eth0") if one.set == "published4"),
        nft.accept("fd00::2", "net c1 eth0"),
    ]
    nft.add(session, elements)
    foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    for number in range(len(elements)):
        foreign.settle(session)
        there = elements[number:]
        assert bool(forward(4)) == any(element.set[-1] == "4" for element in there)
        assert bool(forward(6)) == any(element.set[-1] == "6" for element in there)
        nft.delete(session, elements[number : number + 1])
    foreign.settle(session)
    assert (forward(4), forward(6)) == ([], [])
    # Somebody comes just while the rule is taken out.
    foreign.ensure(session, admin_chains=["CNI-ADMIN"])
    answers = iter([False, True])
    monkeypatch.setattr(nft, "forwards", lambda _version: next(answers))
    foreign.settle(session, (4,))
    assert forward() == [call_of("CNI-ADMIN"), ACCEPT]


def test_tables_in_nfts_own_language_are_named_and_left_alone(session: Session) -> None:
    spaces.run("nft", "add table inet filter; add table ip6 fw; add table ip filter")
    for chain, policy in (("inet filter forward", "drop"), ("ip6 fw forward", "drop"), ("ip filter forward", "accept")):
        spaces.run("nft", f"add chain {chain} {{ type filter hook forward priority 0; policy {policy}; }}")
    iptables("-P FORWARD DROP", version=6)
    before = spaces.run("nft", "list table inet filter")
    foreign.ensure(session)
    assert spaces.run("nft", "list table inet filter") == before
    found = foreign.droppers(session)
    assert {(one.family, one.table, one.chain) for one in found} == {
        ("inet", "filter", "forward"),
        ("ip6", "fw", "forward"),
    }
    for one in found:
        program, *arguments = one.remedy.split()
        spaces.run(program, *arguments)
    assert foreign.droppers(session) == []


def legacy(version: int) -> None:
    """Skips where the kernel has no iptables of the old kind."""
    if subprocess.run(
        [f"{TOOLS[version]}-legacy", "-P", "FORWARD", "DROP"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this kernel has no iptables-legacy")


@pytest.mark.parametrize("version", [4, 6])
def test_iptables_legacy(session: Session, version: int) -> None:
    assert not foreign.legacy_in_use()
    legacy(version)
    iptables("-N CNI-ADMIN", "-A FORWARD -i br0 -j DROP", version=version, kind="legacy")
    before = forward(version, "legacy")
    assert foreign.legacy_in_use()
    assert foreign.missing(session)
    assert foreign.ensure(session, admin_chains=["CNI-ADMIN", "NONE"])
    wanted = [call_of("CNI-ADMIN"), ACCEPT, "-A FORWARD -i br0 -j DROP"]
    assert forward(version, "legacy") == wanted
    assert not foreign.ensure(session, admin_chains=["CNI-ADMIN", "NONE"])
    assert not foreign.missing(session)
    iptables("-F FORWARD", version=version, kind="legacy")
    assert foreign.ensure(session, (version,))
    foreign.settle(session)
    iptables("-A FORWARD -i br0 -j DROP", version=version, kind="legacy")
    assert forward(version, "legacy") == before


def test_without_the_legacy_program_it_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy(4)
    monkeypatch.setattr(legacy_programs, "PROGRAM_PATH", "/nonexistent")
    with pytest.raises(KernelError, match="its tables are in use here, but the program is not installed"):
        foreign.ensure(session)
    # A DEL has nothing to look for there.
    assert foreign.remove(session) == []
    foreign.settle(session)
