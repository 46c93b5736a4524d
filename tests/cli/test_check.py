"""`netloom ip check` on a host whose containers really have interfaces."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2
from tests.cli.conftest import Ipamd, Netloom
from tests.hosts import Host, Netns

BRIDGE = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "bridge",
    "bridge": "nl0",
    "ipam": {"type": "ipamd", "pools": ["blue"]},
}
_ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C"}


def _netloom(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    return host.run([sys.executable, "-m", "cli", *words], env=_ENVIRONMENT, check=False)


def _check(host: Host, *words: str) -> tuple[int, dict[str, Any]]:
    done = _netloom(host, "ip", "check", "--json", *words)
    assert done.stderr == "", done
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def _add(host: Host, container: str) -> Netns:
    netns = host.netns(container)
    host.cni("ADD", "bridge", BRIDGE, container_id=container, netns=netns).ok()
    return netns


@pytest.mark.kernel
def test_check_finds_what_was_lost_and_what_nobody_holds_and_mends_both(host: Host) -> None:
    host.start_ipamd(reclaim={"grace_s": 0, "interval_s": 0})
    assert _netloom(host, "pool", "create", "blue", "--subnet", "10.1.0.0/24").returncode == 0
    one, two = _add(host, "one"), _add(host, "two")
    status, document = _check(host)
    assert (status, document) == (0, {"kernel": True, "allocations": 2, "blocks": 0, "differences": []})

    one.run(["ip", "address", "del", "10.1.0.2/24", "dev", "eth0"])
    two.run(["ip", "address", "add", "10.1.0.77/24", "dev", "eth0"])
    status, document = _check(host, "--repair")
    assert status == 1, "found for the first time: nothing is mended yet"
    found = {(entry["kind"], entry["address"]): entry for entry in document["differences"]}
    assert set(found) == {("leaked", "10.1.0.2"), ("missing", "10.1.0.77")}
    assert not any(entry["repaired"] for entry in found.values())

    people = _netloom(host, "ip", "check")
    assert people.returncode == 1
    assert "leaked" in people.stdout
    assert "--repair mends" in people.stdout

    status, document = _check(host, "--repair")
    assert status == 0
    assert [entry["repaired"] for entry in document["differences"]] == [True, True]
    assert _check(host)[0] == 0
    held = json.loads(_netloom(host, "ip", "list", "--json").stdout)["allocations"]
    assert [entry["container_id"] for entry in held] == ["two"]
    reserved = json.loads(_netloom(host, "ip", "list", "--reserved", "--json").stdout)["reservations"]
    assert [entry["address"] for entry in reserved] == ["10.1.0.77"]


@pytest.mark.kernel
def test_namespaces_that_are_no_containers_of_this_host_are_left_out(host: Host) -> None:
    host.start_ipamd()
    assert _netloom(host, "pool", "create", "blue", "--subnet", "10.1.0.0/24").returncode == 0
    other = host.netns("other")
    other.run(["ip", "link", "add", "x0", "type", "veth", "peer", "name", "x1"])
    other.run(["ip", "address", "add", "10.1.0.9/24", "dev", "x0"])
    assert _check(host) == (0, {"kernel": True, "allocations": 0, "blocks": 0, "differences": []})


@pytest.mark.kernel
def test_an_allocation_that_does_not_know_its_namespace_is_not_leaked(host: Host) -> None:
    """Such as one that was imported from host-local."""
    host.start_ipamd(reclaim={"grace_s": 0, "interval_s": 0})
    assert _netloom(host, "pool", "create", "blue", "--subnet", "10.1.0.0/24").returncode == 0
    one = _add(host, "one")
    with Client(str(host.path("/run/netloom/ipamd.sock")), timeout_s=30) as ipamd:
        key = ipam_pb2.AttachmentKey(client="cni", network="net", container_id="one", ifname="eth0")
        ipamd.release(key)
        asked = ipamd.allocate(key, pools=["blue"], requested=["10.1.0.99"])
    one.run(["ip", "address", "del", "10.1.0.2/24", "dev", "eth0"])
    one.run(["ip", "address", "add", "10.1.0.99/24", "dev", "eth0"])
    shutil.rmtree(host.path("/run/netloom/attachments"))
    assert [address.cidr for address in asked.addresses] == ["10.1.0.99/24"]
    assert _check(host, "--repair")[1]["differences"] == []
    assert _check(host, "--repair") == (0, {"kernel": True, "allocations": 1, "blocks": 0, "differences": []})


@pytest.mark.kernel
def test_from_within_a_container_that_container_is_seen(host: Host) -> None:
    host.start_ipamd()
    assert _netloom(host, "pool", "create", "blue", "--subnet", "10.1.0.0/24").returncode == 0
    one = _add(host, "one")
    done = one.run([sys.executable, "-m", "cli", "ip", "check", "--json"], env=_ENVIRONMENT, check=False)
    assert json.loads(done.stdout)["differences"] == [], done


def test_without_the_kernel_nothing_is_said_of_containers(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    ipamd.allocate("one", "blue")
    ran = netloom("ip", "check", "--no-kernel")
    assert (ran.status, ran.out) == (0, "no difference; looked at 1 allocations, not at the kernel\n")
