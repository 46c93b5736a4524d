"""`netloom ip` against a real ipamd."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from cli.failure import Status
from tests.cli.conftest import LIMIT_S, ROOT, Ipamd, Netloom

UNIX_S = len("2026-11-21T01:23:03Z")


@pytest.fixture
def blue(ipamd: Ipamd, netloom: Netloom) -> Ipamd:
    """With a pool of both families, of which two containers hold addresses."""
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24", "--subnet", "fd00:1::/64").status == 0
    ipamd.allocate("one", "blue")
    ipamd.allocate("two", "blue")
    return ipamd


def test_list_has_a_row_for_each_address_in_numeric_order(blue: Ipamd, netloom: Netloom) -> None:
    for number in range(3, 12):
        blue.allocate(f"c{number}", "blue")
    ran = netloom("ip", "list")
    assert ran.status == 0
    header, *rows = (line.split() for line in ran.out.splitlines())
    assert header == ["ADDRESS", "POOL", "NETWORK", "CONTAINER", "INTERFACE", "CLIENT", "NODE", "SINCE"]
    assert rows[0][:7] == ["10.1.0.2", "blue", "net", "one", "eth0", "cni", "n1"]
    assert len(rows[0][7]) == UNIX_S
    assert [row[0] for row in rows[:11]] == [f"10.1.0.{host}" for host in range(2, 13)]
    assert [row[0] for row in rows[11:14]] == ["fd00:1::2", "fd00:1::3", "fd00:1::4"]
    assert len(rows) == 22


def test_list_as_json_is_one_document_with_stable_keys(blue: Ipamd, netloom: Netloom) -> None:
    document = json.loads(netloom("ip", "list", "--json").out)
    assert list(document) == ["allocations"]
    first, second = document["allocations"]
    created, boot_id, generation = first.pop("created"), first.pop("boot_id"), first.pop("generation")
    assert len(created) == UNIX_S
    assert len(boot_id) == 36
    assert generation > 0
    assert first == {
        "node": "n1",
        "client": "cni",
        "network": "net",
        "container_id": "one",
        "ifname": "eth0",
        "addresses": [
            {"address": "10.1.0.2", "cidr": "10.1.0.2/24", "gateway": "10.1.0.1", "pool": "blue", "range_set": 0},
            {"address": "fd00:1::2", "cidr": "fd00:1::2/64", "gateway": "fd00:1::1", "pool": "blue", "range_set": 1},
        ],
        "netns": {"path": "/run/netns/one", "inode": 4026539999, "cookie": 0},
        "reason": "",
        "workload": "",
    }
    assert second["container_id"] == "two"


@pytest.mark.parametrize(
    ("words", "containers"),
    [
        (["--container", "two"], {"two"}),
        (["--network", "net"], {"one", "two"}),
        (["--network", "other"], set()),
        (["--pool", "blue", "--client", "cni", "--node", "n1"], {"one", "two"}),
        (["--client", "docker"], set()),
    ],
)
def test_list_filters(blue: Ipamd, netloom: Netloom, words: list[str], containers: set[str]) -> None:
    document = json.loads(netloom("ip", "list", "--json", *words).out)
    assert {entry["container_id"] for entry in document["allocations"]} == containers


def test_list_of_one_pool_leaves_out_an_attachments_addresses_in_another(blue: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "green", "--subnet", "10.2.0.0/24").status == 0
    blue.allocate("three", "green", "blue")
    rows = netloom("ip", "list", "--pool", "green").out.splitlines()[1:]
    assert [row.split()[:4] for row in rows] == [["10.2.0.2", "green", "net", "three"]]


def test_show_by_any_address(blue: Ipamd, netloom: Netloom) -> None:
    ran = netloom("ip", "show", "fd00:1::3")
    assert ran.status == 0
    for part in ("two", "eth0", "10.1.0.3/24 of pool blue, gateway 10.1.0.1", "/run/netns/two (inode 4026539999)"):
        assert part in ran.out


@pytest.mark.parametrize("spelling", ["fd00:1:0:0::3", "FD00:1::3"])
def test_show_takes_any_spelling_of_an_address(blue: Ipamd, netloom: Netloom, spelling: str) -> None:
    assert "two" in netloom("ip", "show", spelling).out
    assert netloom("ip", "reserve", "blue", "fd00:1::99").status == 0
    assert "blue" in netloom("ip", "show", spelling.replace("3", "99")).out


def test_show_of_what_nobody_holds(blue: Ipamd, netloom: Netloom) -> None:
    ran = netloom("ip", "show", "10.1.0.77")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("netloom: nobody holds 10.1.0.77")
    assert ran.err.count("\n") == 1


def test_show_of_what_is_no_address(blue: Ipamd, netloom: Netloom) -> None:
    ran = netloom("ip", "show", "ten")
    assert ran.status == 2
    assert "'ten'" in ran.err


def test_release_asks_and_names_the_holder(blue: Ipamd, netloom: Netloom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    ran = netloom("ip", "release", "10.1.0.2")
    assert ran.status == 1
    assert "Release 10.1.0.2, fd00:1::2, held by container one, interface eth0, of network net" in ran.err
    assert "you did not agree" in ran.err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "--yes" in netloom("ip", "release", "10.1.0.2").err
    assert netloom("ip", "show", "10.1.0.2").status == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    ran = netloom("ip", "release", "10.1.0.2")
    assert ran.status == 0
    assert ran.out.startswith("released 10.1.0.2, fd00:1::2, held by container one")
    assert netloom("ip", "show", "fd00:1::2").status == 1
    assert netloom("ip", "show", "10.1.0.3").status == 0


def test_release_with_yes_as_json(blue: Ipamd, netloom: Netloom) -> None:
    ran = netloom("--json", "ip", "release", "10.1.0.2", "--yes")
    assert ran.err == ""
    document = json.loads(ran.out)
    assert [entry["address"] for entry in document["released"]] == ["10.1.0.2", "fd00:1::2"]
    assert document["holder"]["container_id"] == "one"
    again = netloom("ip", "release", "10.1.0.2", "--yes")
    assert (again.status, again.out) == (1, "")
    assert "nobody holds" in again.err


def test_release_of_an_address_that_two_pools_have(blue: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "twin", "--subnet", "10.1.0.0/24").status == 0
    blue.allocate("other", "twin")
    ran = netloom("ip", "release", "10.1.0.2", "--yes")
    assert ran.status == 2
    assert "container one" in ran.err
    assert "container other" in ran.err
    assert "--pool" in ran.err
    assert netloom("ip", "release", "10.1.0.2", "--pool", "twin", "--yes").status == 0
    assert "one" in netloom("ip", "show", "10.1.0.2").out


def test_reserve_and_unreserve(blue: Ipamd, netloom: Netloom) -> None:
    assert netloom("ip", "reserve", "blue", "10.1.0.4", "--note", "the printer").status == 0
    assert blue.allocate("three", "blue").addresses[0].cidr == "10.1.0.5/24"
    assert netloom("ip", "list", "--reserved").out.split() == [
        "ADDRESS",
        "POOL",
        "NOTE",
        "10.1.0.4",
        "blue",
        "the",
        "printer",
    ]
    assert json.loads(netloom("ip", "list", "--reserved", "--pool", "blue", "--json").out) == {
        "reservations": [{"pool": "blue", "address": "10.1.0.4", "note": "the printer"}]
    }
    assert "the printer" in netloom("ip", "show", "10.1.0.4").out
    taken = netloom("ip", "reserve", "blue", "10.1.0.2")
    assert taken.status == 1
    assert "one" in taken.err
    assert netloom("ip", "unreserve", "blue", "10.1.0.4").status == 0
    assert netloom("ip", "unreserve", "blue", "10.1.0.4").status == 1
    assert netloom("ip", "list", "--reserved").out.split() == ["ADDRESS", "POOL", "NOTE"]


def test_filters_that_do_not_go_together(blue: Ipamd, netloom: Netloom) -> None:
    ran = netloom("ip", "list", "--reserved", "--container", "one")
    assert ran.status == 2
    assert "--reserved" in ran.err


def test_the_request_id_is_in_the_daemons_log(blue: Ipamd, netloom: Netloom) -> None:
    netloom("ip", "reserve", "blue", "10.1.0.9")
    (line,) = [line for line in blue.log.read_text().splitlines() if "reserved" in line]
    assert "request_id=" in line


@pytest.mark.usefixtures("blue")
def test_watch_shows_events_from_a_revision_on() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "cli", "ip", "watch", "--after", "1"]
    watching = [
        subprocess.Popen([*words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for more in ([], ["--json"])
    ]
    try:
        plain, as_json = (process.stdout.readline() if process.stdout else "" for process in watching)
        revision, _, kind, cidrs, *rest = plain.split()
        assert (revision, kind, cidrs) == ("2", "allocated", "10.1.0.3/24,fd00:1::3/64")
        assert rest == ["net", "two", "eth0", "cni"]
        document = json.loads(as_json)
        assert (document["revision"], document["kind"]) == (2, "allocated")
        assert document["allocation"]["container_id"] == "two"
        for process in watching:
            process.send_signal(signal.SIGINT)
        assert [process.wait(LIMIT_S) for process in watching] == [0, 0]
    finally:
        for process in watching:
            process.kill()
            process.communicate()


@pytest.mark.usefixtures("blue")
def test_watch_from_a_revision_that_is_not_there(netloom: Netloom) -> None:
    ran = netloom("ip", "watch", "--after", "99999")
    assert ran.status == Status.FAILED
    assert "list the allocations, then watch from 2" in ran.err
