"""Conditions: what goes into nft's text, and what does not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.chained import conditions
from cni.errors import CniError
from kernel import nft
from kernel.nft import Chain
from kernel.session import Session
from tests.kernel.conftest import home as home  # noqa: PLC0414 - a fixture here, too
from tests.kernel.conftest import session as session  # noqa: PLC0414

NATIVE = [
    (4, ["ip saddr 10.0.0.0/8"], "ip saddr 10.0.0.0/8"),
    (4, ["ip", "saddr", "!=", "192.0.2.1"], "ip saddr != 192.0.2.1"),
    (4, ["ip saddr { 10.0.0.0/8, 192.0.2.1 } tcp dport 80"], "ip saddr { 10.0.0.0/8 , 192.0.2.1 } tcp dport 80"),
    (4, ["ip daddr 192.0.2.1-192.0.2.9"], "ip daddr 192.0.2.1-192.0.2.9"),
    (4, ['iifname "eth*"'], 'iifname "eth*"'),
    (4, ["iifname", "accept"], 'iifname "accept"'),
    (4, ["iifname { eth0, drop }", "meta l4proto tcp"], 'iifname { "eth0" , "drop" } meta l4proto tcp'),
    (4, ["iifname ip"], "iifname ip"),  # a word of nft's wants quotes, and libnftables says so
    (4, ["meta mark & 0xff == 0x10"], "meta mark & 0xff == 0x10"),
    (4, ["ct state new fib saddr type unicast"], "ct state new fib saddr type unicast"),
    (4, ["ip saddr . th sport { 10.0.0.1 . 53 }"], "ip saddr . th sport { 10.0.0.1 . 53 }"),
    (4, ["tcp flags syn / syn,ack"], "tcp flags syn / syn , ack"),
    (4, ["ether saddr 02:00:00:00:00:01"], "ether saddr 02:00:00:00:00:01"),
    (6, ["ip6 saddr fd00::/8"], "ip6 saddr fd00::/8"),
    (6, ["ip6 daddr != { ::1, fd00::1-fd00::9 }"], "ip6 daddr != { ::1 , fd00::1-fd00::9 }"),
]
TRANSLATED = [
    (4, ["-s", "10.0.0.0/8"], "ip saddr 10.0.0.0/8"),
    (4, ["!", "-d", "192.0.2.0/24"], "ip daddr != 192.0.2.0/24"),
    (4, ["-d", "!", "192.0.2.0/24"], "ip daddr != 192.0.2.0/24"),
    (4, ["--source", "10.0.0.1,10.0.0.2"], "ip saddr { 10.0.0.1 , 10.0.0.2 }"),
    (6, ["-s", "fd00::/8", "-i", "eth0"], 'ip6 saddr fd00::/8 iifname "eth0"'),
    (4, ["!", "-i", "eth+"], 'iifname != "eth*"'),
    (4, ["-p", "TCP", "-m", "tcp", "--sport", "1024:"], "meta l4proto tcp th sport 1024-65535"),
    (4, ["-p", "udp", "--dport", ":100"], "meta l4proto udp th dport 0-100"),
    (4, ["-m", "multiport", "--dports", "80,443,8000:8100"], "th dport { 80 , 443 , 8000-8100 }"),
    (4, ["-m", "iprange", "--src-range", "10.0.0.1-10.0.0.9"], "ip saddr 10.0.0.1-10.0.0.9"),
    (4, ["-m", "mark", "--mark", "0x1/0xff"], "meta mark & 0xff == 0x1"),
    (4, ["-m", "mark", "!", "--mark", "7"], "meta mark != 7"),
    (4, ["-m", "addrtype", "--dst-type", "LOCAL"], "fib daddr type local"),
    (4, ["-m", "conntrack", "--ctstate", "NEW,ESTABLISHED"], "ct state { new , established }"),
    (4, ["-m", "comment", "--comment", "from-the-office", "-s", "10.0.0.1"], "ip saddr 10.0.0.1"),
]


@pytest.mark.parametrize(("version", "words", "wanted"), [*NATIVE, *TRANSLATED])
def test_what_is_taken(version: int, words: list[str], wanted: str) -> None:
    assert conditions.parse(f"conditionsV{version}", words, version) == wanted


@pytest.mark.parametrize("words", [[], [""], [" ", ""]])
def test_no_condition(words: list[str]) -> None:
    assert conditions.parse("conditionsV4", words, 4) == ""


@pytest.mark.kernel
def test_libnftables_understands_them(session: Session) -> None:
    for version, _, text in [one for one in (*NATIVE, *TRANSLATED) if one[2] != "iifname ip"]:
        nft.check_chain(Chain("c_x", (f"meta nfproto ipv{version} {text} accept",)))
    assert nft.chains(session) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ip saddr 10.0.0.1; flush ruleset"], "flush ruleset"),
        (["ip saddr 10.0.0.1\nadd table x"], "add table x"),
        (["ip saddr 10.0.0.1 # accept"], "# accept"),
        (["ip saddr $host"], "$host"),
        (["ip saddr @masq4"], "@masq4"),
        (["ip saddr 10.0.0.1 }"], "10.0.0.1 }"),
        (["ip saddr { 10.0.0.1"], "{ 10.0.0.1"),
        (["ip saddr { { 10.0.0.1 } }"], "{ {"),
        (['iifname "eth0'], "eth0"),
        (['iifname "eth0" "drop"; "'], "drop"),
        (["ip saddr 10.0.0.1 accept"], '"accept"'),
        (["counter ip saddr 10.0.0.1"], '"counter"'),
        (["jump ports"], '"jump"'),
        (["dnat to 10.0.0.1"], '"dnat"'),
        (["meta mark set 5"], '"set"'),
        (["limit rate 1/second"], '"limit"'),
        (["ip saddr host.example"], '"host.example"'),
        (['ip saddr "host.example"'], "host.example"),
        (["ip saddr 999.1.1.1"], '"999.1.1.1"'),
        (["ip saddr 10.0.0.0/99"], '"10.0.0.0/99"'),
        (["tcp dport ssh"], '"ssh"'),
        (["ip saddr ⅷ"], "conditionsV4"),
        (["iifname", "x" * 5000], "at most 4096"),
        (["-j", "DROP"], '"-j"'),
        (["-o", "eth0"], '"-o"'),
        (["-m", "set", "--match-set", "x", "src"], '"-m set"'),
        (["-s"], '"-s"'),
        (["-s", "-d"], '"-s"'),
        (["!"], '""'),
        (["-p", "icmp"], '"-p icmp"'),
        (["--dport", "http"], '"--dport http"'),
        (["-s", "10.0.0.1;drop"], "10.0.0.1;drop"),
        (["-i", 'eth0" accept'], "conditionsV4"),
    ],
)
def test_what_is_refused_and_what_to_write_instead(words: list[str], found: str) -> None:
    with pytest.raises(CniError) as caught:
        conditions.parse("conditionsV4", words, 4)
    assert caught.value.code == 7
    assert "$.conditionsV4" in caught.value.msg
    assert found in caught.value.msg
    assert 'such as ["ip saddr 10.0.0.0/8"' in caught.value.msg


_PIECES = st.sampled_from(
    [*sorted(conditions._WORDS), *sorted(conditions._SIGNS), "10.0.0.1", "0x1", "-s", "-i", "!", "-m", "accept", "drop"]
)


@given(st.lists(st.one_of(_PIECES, st.text(max_size=12)), max_size=12))
def test_nothing_ends_the_rule_or_begins_another(words: list[str]) -> None:
    try:
        text = conditions.parse("conditionsV4", words, 4)
    except CniError as error:
        assert error.code == 7
        return
    assert not re.search(r"[\n;#$@`\\]", text)
    assert text.isascii()
    assert text.count('"') % 2 == 0
    bare = re.sub(r'"[^"]*"', "", text)
    assert bare.count("{") == bare.count("}")
    for word in re.findall(r"[a-z]+[a-z0-9_]*", re.sub(r"\b(0x)?[0-9a-f:]*[0-9:][0-9a-f:./-]*", "", bare)):
        assert word in conditions._WORDS
