"""What the reference left in nftables: recognised by the names that it gives, and removed without touching anybody
else's. The rules here are written as it writes them; tests/peers has those that it wrote itself, and iptables."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from kernel import reference
from kernel.netlink import Message, Socket
from kernel.reference import Owner
from kernel.session import Session
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
ONE, TWO = Owner("net", "c1", "eth0"), Owner("net", "c2", "eth0")
# The beginning of sha512sum of "netc1".
HASH = "623e1c388032b20529218ecc"


def nft(commands: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=commands, text=True, check=True)


def ruleset() -> str:
    return spaces.run("nft", "list", "ruleset")


def masquerade(owner: Owner, address: str) -> str:
    comment = f"{reference._mark(owner)}, net: {owner.network}, if: {owner.ifname}, id: {owner.container_id}"
    return f"""
        add table inet cni_plugins_masquerade
        add chain inet cni_plugins_masquerade masq_checks
        add rule inet cni_plugins_masquerade masq_checks ip saddr {address} ip daddr != 10.1.0.0/16 masquerade \
            comment "{comment}"
    """


def published(container_id: str, port: int, family: str = "ip") -> str:
    return f"""
        add table {family} cni_hostport
        add chain {family} cni_hostport hostports
        add chain {family} cni_hostport masquerading {{ type nat hook postrouting priority srcnat; }}
        add rule {family} cni_hostport hostports tcp dport {port} counter comment "{container_id}"
        add rule {family} cni_hostport masquerading meta mark {port} masquerade comment "{container_id}"
    """


def spoof_check(owner: Owner, port: str) -> str:
    name = f"{owner.container_id}-{owner.ifname}"
    chain = f"bridge nat cni-br-iface-{name}"
    return f"""
        add table bridge nat
        add chain bridge nat PREROUTING {{ type filter hook prerouting priority -300; }}
        add chain {chain}
        add chain {chain}-mac
        add rule bridge nat PREROUTING iifname "{port}" jump cni-br-iface-{name} comment "macspoofchk-{name}"
        add rule {chain} jump cni-br-iface-{name}-mac comment "macspoofchk-{name}"
        add rule {chain}-mac ether saddr 02:00:00:00:00:01 return comment "macspoofchk-{name}"
        add rule {chain}-mac drop comment "macspoofchk-{name}"
    """


def isolation(bridge: str, family: str = "ip") -> str:
    return f"""
        add table {family} filter
        add chain {family} filter CNI-ISOLATION-STAGE-1
        add chain {family} filter CNI-ISOLATION-STAGE-2
        add rule {family} filter CNI-ISOLATION-STAGE-1 iifname {bridge} oifname != {bridge} counter \
            jump CNI-ISOLATION-STAGE-2
        add rule {family} filter CNI-ISOLATION-STAGE-2 oifname {bridge} counter drop
    """


def accepted(address: str) -> str:
    return f"""
        add table ip filter
        add chain ip filter CNI-FORWARD
        add rule ip filter CNI-FORWARD ip daddr {address} ct state related,established counter accept
        add rule ip filter CNI-FORWARD ip saddr {address} counter accept
    """


def test_names_are_the_references() -> None:
    assert reference.chain_name("net", "c1", "DN-") == f"CNI-DN-{HASH[:21]}"
    assert reference.chain_name("net", "c1") == f"CNI-{HASH}"
    assert len(reference.chain_name("a" * 200, "b" * 200, "SN-")) == 28


REMOVALS: list[Callable[[Session], None]] = [
    lambda session: reference.remove_masquerade(session, ONE),
    lambda session: reference.remove_spoof_check(session, ONE),
    lambda session: reference.remove_published(session, ONE),
    lambda session: reference.collect_masquerade(session, "net", []),
    lambda session: reference.collect_published(session, "net", []),
    reference.collect_spoof_checks,
    reference.collect_isolation,
]


@pytest.mark.parametrize("remove", REMOVALS)
def test_where_the_reference_never_worked_one_list_of_tables_is_all(
    session: Session, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Session], None]
) -> None:
    nft("add table inet other")
    asked: list[str] = []
    real = Socket.dump

    def dump(self: Socket, message: Message) -> object:
        asked.append(message.what)
        return real(self, message)

    monkeypatch.setattr(Socket, "dump", dump)
    monkeypatch.setattr(Socket, "get", lambda _self, message: asked.append(message.what))
    monkeypatch.setattr(subprocess, "run", None)
    remove(session)
    assert asked.count("list nftables' tables") == len(asked) == 1


def test_masquerade_in_nftables(session: Session) -> None:
    nft(masquerade(ONE, "10.1.0.2") + masquerade(ONE, "10.2.0.2") + masquerade(TWO, "10.1.0.3"))
    reference.remove_masquerade(session, ONE)
    assert "id: c1" not in ruleset()
    assert "id: c2" in ruleset()
    reference.remove_masquerade(session, ONE)
    reference.remove_masquerade(session, Owner("net", "c2", "eth1"))
    assert "id: c2" in ruleset()


def test_gc_of_masquerade_in_nftables(session: Session) -> None:
    other = Owner("othernet", "c1", "eth0")
    nft(masquerade(ONE, "10.1.0.2") + masquerade(TWO, "10.1.0.3") + masquerade(other, "10.9.0.2"))
    reference.collect_masquerade(session, "net", [("c2", "eth0")])
    assert "net: net, if: eth0, id: c1" not in ruleset()
    assert "id: c2" in ruleset()
    assert "net: othernet" in ruleset()
    reference.collect_masquerade(session, "net", [])
    assert "net: net," not in ruleset()
    assert "net: othernet" in ruleset()


def test_published_in_nftables(session: Session) -> None:
    nft(published("c1", 80) + published("c1", 81, "ip6") + published("c12", 82) + published("c2", 83))
    reference.remove_published(session, ONE)
    assert 'comment "c1"' not in ruleset()
    assert ruleset().count('comment "c12"') == ruleset().count('comment "c2"') == 2


def test_spoof_check(session: Session) -> None:
    nft(spoof_check(ONE, "veth1") + spoof_check(TWO, "veth2"))
    reference.remove_spoof_check(session, ONE)
    assert "c1-eth0" not in ruleset()
    assert ruleset().count("c2-eth0") >= 6
    reference.remove_spoof_check(session, ONE)


def test_spoof_check_of_which_only_half_is_left(session: Session) -> None:
    nft(spoof_check(ONE, "veth1") + "delete chain bridge nat PREROUTING\n")
    reference.remove_spoof_check(session, ONE)
    assert "c1-eth0" not in ruleset()


def test_gc_of_spoof_checks_goes_by_the_port(session: Session) -> None:
    spaces.run("ip", "link", "add", "veth2", "type", "veth", "peer", "name", "veth3")
    nft(spoof_check(ONE, "veth1") + spoof_check(TWO, "veth2"))
    nft('add rule bridge nat PREROUTING iifname "veth9" drop comment "somebody else\'s"')
    reference.collect_spoof_checks(session)
    assert "c1-eth0" not in ruleset()
    assert "c2-eth0" in ruleset()
    assert "veth9" in ruleset()


def test_gc_of_isolation_goes_by_the_bridge(session: Session) -> None:
    spaces.run("ip", "link", "add", "br1", "type", "bridge")
    nft(isolation("br0") + isolation("br1") + isolation("br0", "ip6"))
    reference.collect_isolation(session)
    assert "br0" not in ruleset()
    assert ruleset().count('"br1"') == 3


def test_accepted_addresses(session: Session) -> None:
    nft(accepted("10.1.0.2") + accepted("10.1.0.22"))
    nft("add rule ip filter CNI-FORWARD ip saddr 10.1.0.2 counter drop")
    nft("add rule ip filter CNI-FORWARD ip saddr 10.1.0.2 tcp dport 22 counter")
    reference.remove_accepted(session, [])
    assert ruleset().count("10.1.0.2 ") == 4
    reference.remove_accepted(session, [ip_address("10.1.0.2"), ip_address("fd00::2")])
    assert ruleset().count("10.1.0.2 ") == 2, "those that are not the reference's stay"
    assert ruleset().count("10.1.0.22 ") == 2


def test_a_chain_that_somebody_else_leads_to_stays_empty(session: Session) -> None:
    nft(spoof_check(ONE, "veth1") + "add chain bridge nat mine\nadd rule bridge nat mine jump cni-br-iface-c1-eth0")
    for _ in range(2):
        reference.remove_spoof_check(session, ONE)
        assert "macspoofchk-c1" not in ruleset()
        assert ruleset().count("cni-br-iface-c1-eth0") == 3  # both chains, and the foreign jump
