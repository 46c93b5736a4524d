"""`netloom network` with an ipamd of one host: the networks that it has, and those that want a cluster."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ipamd.client import Client, IpamError
from tests.cli.conftest import LIMIT_S, Netloom

pytestmark = pytest.mark.usefixtures("ipamd")


def test_a_routed_network_and_how_it_is_shown(netloom: Netloom) -> None:
    made = netloom("network", "create", "pods", "--subnet", "10.2.0.0/16", "--type", "routed")
    assert (made.status, made.out) == (0, "created network pods (10.2.0.0/16), bridge nl-pods\n")
    header, row = netloom("network", "list").out.splitlines()
    assert header.split() == ["NETWORK", "TYPE", "VNI", "SUBNETS", "BACKEND", "BRIDGE", "MTU", "CONNECTED"]
    assert row.split() == ["pods", "routed", "-", "10.2.0.0/16", "default", "nl-pods", "auto"]
    shown = netloom("network", "show", "pods").out
    assert "backend     netd's default\n" in shown
    for word in ("vni", "gateway", "flood", "docker"):
        assert word not in shown
    (document,) = json.loads(netloom("network", "list", "--json").out)["networks"]
    assert (document["type"], document["vni"], document["gateways"], document["docker"]) == ("routed", 0, [], "")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ((), 2, "a routed network wants --subnet CIDR"),
        (("--type", "routed"), 2, "a routed network wants --subnet CIDR"),
        (("--type", "overley"), 2, "overley"),
        (("--type", "overlay", "--vni", "0"), 2, "--vni"),
        (("--type", "overlay", "--vni", "16777216"), 2, "--vni"),
        (("--subnet", "10.2.0.0/16", "--vni", "7"), 2, "vni: found 7 with type routed"),
        (("--subnet", "10.2.0.0/16", "--flood"), 2, "flood: found True with type routed"),
        (("--type", "overlay"), 1, 'overlay networks want a cluster; set [store] kind = "etcd"'),
        (("--type", "overlay", "--subnet", "10.2.0.0/16", "--vni", "7"), 1, "overlay networks want a cluster"),
    ],
)
def test_what_cannot_be_created(netloom: Netloom, words: tuple[str, ...], status: int, text: str) -> None:
    ran = netloom("network", "create", "blue", *words)
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err
    assert json.loads(netloom("network", "list", "--json").out)["networks"] == []
    assert json.loads(netloom("pool", "list", "--json").out)["pools"] == []


def test_what_one_host_has_no_use_for_is_refused_in_words(netloom: Netloom, scratch: Path) -> None:
    netloom("network", "create", "pods", "--subnet", "10.2.0.0/16")
    with Client(str(scratch / "ipamd.sock"), LIMIT_S) as client:
        calls: list[tuple[str, Callable[[], object]]] = [
            ("FAILED_PRECONDITION", lambda: client.share_network("pods", "x")),
            ("FAILED_PRECONDITION", lambda: client.set_mac("pods", "10.2.0.7", "02:00:00:00:00:07")),
            ("NOT_FOUND", lambda: client.share_network("nothing", "x")),
        ]
        for code, call in calls:
            with pytest.raises(IpamError) as error:
                call()
            assert error.value.code.name == code
            assert (
                "overlay networks want a cluster" in error.value.message or "no network nothing" in error.value.message
            )
