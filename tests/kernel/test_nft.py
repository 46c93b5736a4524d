"""Elements in the kernel as they were asked for, whatever the tables were before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import libnftables, nft, nft_codec, nft_tables
from kernel.errors import Denied, Exists, KernelError
from kernel.nft import Element
from kernel.session import Session
from tests.hosts import ROOT, wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

ONE_OF_EACH = (
    nft.masquerade("10.1.0.2", "net c1 eth0"),
    nft.masquerade("fd00::2", "net c1 eth0"),
    nft.no_masquerade("10.1.0.0/16"),
    nft.no_masquerade("fd00::/64"),
    *nft.spoof_check("veth12ab", "02:00:00:00:00:01", "net c1 eth0"),
    *nft.publish("", "tcp", 8080, "10.1.0.2", 80, "net c1 eth0"),
    *nft.publish("192.0.2.1", "udp", 53, "10.1.0.2", 5353, "net c1 eth0", all=True),
    *nft.publish("", "sctp", 65535, "fd00::2", 1, "net c1 eth0"),
    *nft.publish("2001:db8::1", "tcp", 1, "fd00::2", 65535, "net c1 eth0", all=True),
    nft.within("10.1.0.0/16"),
    nft.within("fd00::/64"),
    nft.accept("10.1.0.2", "net c1 eth0"),
    nft.accept("fd00::2", "net c1 eth0"),
    *nft.separate("br0", isolated=True),
)


def ruleset() -> list[dict[str, Any]]:
    printed = spaces.run(sys.executable, "-I", "-S", str(ROOT / "tests/nft_list.py"))
    found: list[dict[str, Any]] = json.loads(printed)["nftables"]
    return [entry for entry in found if "metainfo" not in entry]


def in_set(name: str) -> list[Any]:
    """The elements as libnftables shows them."""
    return next((entry["set"].get("elem", []) for entry in ruleset() if entry.get("set", {}).get("name") == name), [])


def inet_rules() -> int:
    return sum(entry.get("rule", {}).get("family") == "inet" for entry in ruleset())


def test_every_set_is_in_its_tables_text() -> None:
    for name in nft.element_sets():
        family = Element(name, ("",)).family
        assert re.search(rf"\t(set|map) {name} \{{", nft_tables.table(family))
        assert re.search(rf"@{name}\b", nft_tables.table(family))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1), st.integers(0, 32), st.integers(0, 128))
def test_keys_come_back_as_they_were_written(four: int, six: int, bits4: int, bits6: int) -> None:
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network  # noqa: PLC0415

    networks = (str(IPv4Network((four, bits4), strict=False)), str(IPv6Network((six, bits6), strict=False)))
    for element in (
        nft.masquerade(str(IPv4Address(four)), "o"),
        nft.masquerade(str(IPv6Address(six)), "o"),
        *(nft.no_masquerade(network) for network in networks),
        *nft.spoof_check("v" * 15, f"02:00:00:00:00:{bits4:02x}", "ö" * 80),
    ):
        (found,) = nft_codec.parse(element.set, nft_codec.body_of([element]))
        assert found.key == element.key
        assert nft_codec.same_key(element, found)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1), st.integers(0, 65535), st.sampled_from(["tcp", "sctp"]))
def test_what_a_map_leads_to_comes_back(four: int, six: int, port: int, protocol: str) -> None:
    from ipaddress import IPv4Address, IPv6Address  # noqa: PLC0415

    for address in (str(IPv4Address(four)), str(IPv6Address(six))):
        for host_ip in ("", address):
            for element in nft.publish(host_ip, protocol, port, address, 65535 - port, "o"):
                (found,) = nft_codec.parse(element.set, nft_codec.body_of([element], data=True))
                assert found == element
    jump = Element("anycond4", ("udp", str(port)), "o", ("c_0123456789abcdef",))
    assert nft_codec.parse(jump.set, nft_codec.body_of([jump], data=True)) == [jump]


def test_a_key_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match="has 1 parts"):
        nft_codec.body_of([Element("masq4", ("10.0.0.1", "10.0.0.2"))])
    with pytest.raises(ValueError, match="host bits set"):
        nft.no_masquerade("10.1.0.1/16")


@pytest.mark.kernel
def test_elements_come_and_go(session: Session) -> None:
    assert not any(nft.present(session, element) for element in ONE_OF_EACH)
    nft.delete(session, ONE_OF_EACH)
    assert ruleset() == []
    nft.add(session, ONE_OF_EACH)
    assert all(nft.present(session, element) for element in ONE_OF_EACH)
    nft.add(session, ONE_OF_EACH)
    for name in nft.element_sets():
        found = sorted(nft.all_elements(session, name), key=repr)
        assert found == sorted((element for element in ONE_OF_EACH if element.set == name), key=repr)
    assert in_set("masq4") == [{"elem": {"val": "10.1.0.2", "comment": "net c1 eth0"}}]
    assert [entry["elem"]["val"] for entry in in_set("masq6")] == ["fd00::2"]
    network = {"prefix": {"addr": "10.1.0.0", "len": 16}}
    assert in_set("nomasq4") == [{"concat": [network, network]}]
    network = {"prefix": {"addr": "fd00::", "len": 64}}
    assert in_set("nomasq6") == [{"concat": [network, network]}]
    assert [entry["elem"]["val"] for entry in in_set("guarded")] == ["veth12ab"]
    assert [entry["elem"]["val"] for entry in in_set("allowed")] == [{"concat": ["veth12ab", "02:00:00:00:00:01"]}]
    nft.delete(session, ONE_OF_EACH)
    assert not any(nft.present(session, element) for element in ONE_OF_EACH)
    nft.delete(session, ONE_OF_EACH)
    assert all(nft.all_elements(session, name) == [] for name in nft.element_sets())


@pytest.mark.kernel
def test_only_what_is_there_is_removed(session: Session) -> None:
    nft.add(session, ONE_OF_EACH[:3])
    nft.delete(session, [*ONE_OF_EACH[1:], nft.masquerade("10.1.0.9", "")])
    assert nft.present(session, ONE_OF_EACH[0])
    assert [len(nft.all_elements(session, name)) for name in ("masq4", "masq6", "nomasq4")] == [1, 0, 0]


@pytest.mark.kernel
def test_presence_is_exact(session: Session) -> None:
    nft.add(session, [nft.no_masquerade("10.1.0.0/16"), nft.masquerade("10.1.0.2", "")])
    assert not nft.present(session, nft.no_masquerade("10.1.0.0/24"))
    assert not nft.present(session, nft.no_masquerade("10.0.0.0/8"))
    assert not nft.present(session, nft.masquerade("10.1.0.3", ""))


@pytest.mark.kernel
def test_a_network_within_another_is_refused_and_replaced(session: Session) -> None:
    outer, inner = nft.no_masquerade("10.1.0.0/16"), nft.no_masquerade("10.1.2.0/24")
    assert nft.contains(outer, inner)
    assert not nft.contains(inner, outer)
    assert not nft.contains(nft.no_masquerade("fd00::/8"), inner)
    nft.add(session, [outer])
    with pytest.raises(Exists):
        nft.add(session, [inner])
    assert nft.holds(session, inner)
    assert not nft.present(session, inner)
    for wanted in ([inner], [outer], [inner, nft.no_masquerade("10.2.0.0/16")], []):
        nft.converge(session, nft.shared_sets(), wanted)
        assert set(nft.all_elements(session, "nomasq4")) == set(wanted)
        assert nft.converge(session, nft.shared_sets(), wanted) == (0, 0)


@pytest.mark.kernel
def test_an_element_belongs_to_the_last_who_added_it(session: Session) -> None:
    first, second = nft.masquerade("10.1.0.2", "net first eth0"), nft.masquerade("10.1.0.2", "net second eth0")
    nft.add(session, [first])
    nft.add(session, [second])
    nft.delete(session, [first])
    assert nft.all_elements(session, "masq4") == [second]
    nft.delete(session, [second])
    assert nft.all_elements(session, "masq4") == []


@pytest.mark.kernel
@pytest.mark.parametrize("flush", ["flush ruleset", "delete table inet netloom", "flush table inet netloom"])
def test_add_makes_what_a_reload_took(session: Session, flush: str) -> None:
    nft.add(session, ONE_OF_EACH)
    rules = inet_rules()
    libnftables.run(flush, "a foreign reload")
    nft.add(session, ONE_OF_EACH)
    assert all(nft.present(session, element) for element in ONE_OF_EACH)
    assert inet_rules() in (0, rules)


@pytest.mark.kernel
def test_a_table_of_another_version_is_replaced(session: Session) -> None:
    libnftables.run(
        "table inet netloom { set schema0 { type mark; }; set masq4 { type ipv4_addr; }; chain old { }; }", "old"
    )
    nft.add(session, ONE_OF_EACH)
    assert all(nft.present(session, element) for element in ONE_OF_EACH)
    assert not any(entry.get("chain", {}).get("name") == "old" for entry in ruleset())


@pytest.mark.kernel
def test_tables_are_made_for_the_families_that_are_asked_for(session: Session) -> None:
    nft.add(session, [ONE_OF_EACH[0]])
    assert {entry["table"]["family"] for entry in ruleset() if "table" in entry} == {"inet"}
    nft.add(session, list(ONE_OF_EACH))
    assert {entry["table"]["family"] for entry in ruleset() if "table" in entry} == {"inet", "bridge"}
    nft.ensure_tables(session, {"inet", "bridge"})
    assert all(nft.present(session, element) for element in ONE_OF_EACH)
    libnftables.run("table ip other {\n}", "somebody else's")
    nft.delete_tables()
    nft.delete_tables()
    assert [entry["table"]["name"] for entry in ruleset() if "table" in entry] == ["other"]


@pytest.mark.kernel
def test_thousands_in_one_call(session: Session) -> None:
    owner = "a-network-with-a-long-name " + "c" * 64 + " eth0"
    many = [nft.masquerade(f"10.{n >> 8}.{n & 255}.2", owner) for n in range(5000)]
    pairs = [element for n in range(2500) for element in nft.spoof_check(f"veth{n:08x}", "02:00:00:00:00:01", owner)]
    nft.add(session, [*many, *pairs])
    assert all(nft.present(session, element) for element in (*many[::50], *pairs[::50], many[-1], pairs[-1]))
    # The kernel grows its hashes behind our back, and its lists are incomplete meanwhile.
    wait_until(lambda: set(nft.all_elements(session, "masq4")) == set(many), "the whole list")
    for name in ("allowed", "guarded"):
        wanted = {element for element in pairs if element.set == name}
        wait_until(lambda name=name, wanted=wanted: set(nft.all_elements(session, name)) == wanted, name)  # type: ignore[misc]
    assert nft.all_elements(session, "masq4")[0].comment == owner
    nft.delete(session, [*many, *pairs[:-1]])
    assert not any(nft.present(session, element) for element in (*many[::50], *pairs[:-1:50]))
    assert nft.present(session, pairs[-1])
    wait_until(lambda: nft.all_elements(session, "masq4") == [], "the empty list")
    wait_until(lambda: nft.all_elements(session, "guarded") == [pairs[-1]], "the one that is left")


@pytest.mark.kernel
def test_a_batch_is_all_or_nothing(session: Session) -> None:
    nft.add(session, ONE_OF_EACH)
    libnftables.run("delete table bridge netloom", "half of it goes")
    libnftables.run("table bridge netloom { set guarded { type ifname; }; }", "and comes back wrong")
    # The bridge table is not of our version, so that the first batch fails as a whole; the second finds it repaired.
    fresh = [nft.masquerade("10.1.0.3", ""), *nft.spoof_check("veth2", "02:00:00:00:00:02", "")]
    nft.add(session, fresh)
    assert all(nft.present(session, element) for element in fresh)


@pytest.mark.kernel
def test_long_and_odd_comments_do_no_harm(session: Session) -> None:
    for number, owner in enumerate(("x" * 1000, "ä" * 200, 'quo"te \\ $(reboot)', "")):
        element = nft.masquerade(f"10.1.0.{number}", owner)
        nft.add(session, [element])
        assert nft.present(session, element)
    assert len(in_set("masq4")) == 4


@pytest.mark.kernel
def test_refusals_carry_libnftables_words(session: Session) -> None:
    with pytest.raises(KernelError, match=r"do nonsense: .*syntax error"):
        libnftables.run("table inet {", "do nonsense")
    with pytest.raises(KernelError):
        libnftables.run("delete table inet nowhere", "delete what is not there")


@pytest.mark.kernel
def test_without_the_right_nothing_is_written(home: Space) -> None:
    # Who has no rights may not be able to read the tree either: it is imported before they go.
    program = (
        "from kernel import nft; from kernel.errors import Denied; from kernel.session import Session\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "try: nft.add(Session(), [nft.masquerade('10.1.0.2', '')])\n"
        "except Denied as error: print('denied:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("denied:"), done
    assert ruleset() == []
    assert Denied("x", 1).errno == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(29, 32), st.integers(0, 7), st.integers(29, 32)),
        min_size=1,
        max_size=12,
    )
)
def test_what_lies_in_another_is_left_out(boxes: list[tuple[int, int, int, int]]) -> None:
    from ipaddress import IPv4Network  # noqa: PLC0415

    elements = [nft.masquerade("10.0.0.1", "o"), nft.no_masquerade("10.0.0.0/8")]
    for one, length, other, its in boxes:
        source, target = IPv4Network((one, length), strict=False), IPv4Network((other, its), strict=False)
        elements.append(nft.join(str(source), str(target)))
    distinct = list(dict.fromkeys(elements))
    wanted = {a for a in distinct if not any(b is not a and nft.contains(b, a) for b in distinct)}
    found = nft_codec.widest(elements)
    assert len(found) == len(set(found))
    assert set(found) == wanted
