"""`netloom status`: healthy, degraded, unreachable."""

import json
import os
import sys
from pathlib import Path

import pytest
from aiohttp import web

from cli import shim
from cli.status import _duration
from kernel.record import Key, Record, Records
from libnetwork.options import NetworkOptions
from libnetwork.published import Published
from libnetwork.state import Endpoint, Network, State
from tests.cli.conftest import Ipamd, Netloom
from tests.hosts import Host
from tests.libnetwork.test_http import serving


def test_healthy(ipamd: Ipamd, netloom: Netloom, scratch: Path) -> None:
    assert netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24").status == 0
    ipamd.allocate("one", "blue")
    Records(str(scratch)).write(Record(Key("net", "one", "eth0", "bridge")))
    ran = netloom("status", "--json")
    assert (ran.status, ran.err) == (0, "")
    document = json.loads(ran.out)
    daemon = document.pop("ipamd")
    assert daemon.pop("uptime_s") > 0
    assert daemon.pop("version")
    assert isinstance(daemon.pop("schema"), str)
    assert daemon == {
        "node": "n1",
        "store": "memory",
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "allocations": 1,
        "pools": 1,
    }
    assert [pool["name"] for pool in document.pop("pools")] == ["blue"]
    assert document == {
        "state": "healthy",
        "problems": [],
        "cluster": None,
        "socket": f"{scratch}/ipamd.sock",
        "kernel": {"attachments": 1, "releases_waiting": 0, "releases_bad": 0},
        "docker": None,
        "netd": None,
    }
    people = netloom("status")
    assert people.status == 0
    assert "state        healthy\n" in people.out
    assert "blue  named  IPv4" in people.out


def test_a_full_pool_is_degraded_and_says_so(ipamd: Ipamd, netloom: Netloom) -> None:
    assert netloom("pool", "create", "tiny", "--subnet", "10.1.0.0/31", "--gateway", "none").status == 0
    assert netloom("pool", "create", "roomy", "--subnet", "10.2.0.0/24").status == 0
    ipamd.allocate("one", "tiny")
    assert netloom("status").status == 0
    ipamd.allocate("two", "tiny")
    ran = netloom("status")
    assert (ran.status, ran.err) == (1, "")
    (problem,) = [line for line in ran.out.splitlines() if line.startswith("problem")]
    assert "tiny" in problem
    document = json.loads(netloom("status", "--json").out)
    assert document["state"] == "degraded"
    assert len(document["problems"]) == 1


def shims_state(scratch: Path) -> None:
    """Two networks, one with a container whose port 80 is published at a port of the shim's choice."""
    state = State(str(scratch / "docker"))
    state.put(Network("a" * 64, NetworkOptions(), ("10.1.0.0/24",), ("10.1.0.1/24",)))
    state.put(Network("b" * 64, NetworkOptions(conflist="mine")))
    ports = (Published(6, 80, "127.0.0.1", 8080), Published(17, 53, "", 32768, 0, chosen=True))
    state.put(Endpoint("e" * 64, "a" * 64, ("10.1.0.2/24",), "02:42:0a:01:00:02", "nle", ports=ports))
    (scratch / "docker/endpoints/damaged.json").write_text("{")
    state.close()


def test_dockers_driver(ipamd: Ipamd, netloom: Netloom, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)  # the path of a socket has 107 bytes
    monkeypatch.setattr(shim.look, "__defaults__", ("s",))
    shims_state(scratch)
    away = netloom("status")
    assert away.status == 1
    problem = "Docker's driver does not answer at s: No such file or directory: systemctl start netloom-docker.socket"
    assert problem in away.out
    assert (scratch / "docker/endpoints/damaged.json").exists()

    async def capabilities(_: web.Request) -> web.Response:
        return web.json_response({"Scope": "local"})

    application = web.Application()
    application.router.add_post("/NetworkDriver.GetCapabilities", capabilities)
    with serving(application, "s"):
        there = netloom("status")
        assert there.status == 0
        assert "docker       driver answers, 2 networks, 1 endpoints\n" in there.out
        assert "aaaaaaaaaaaa    bridge         nl-aaaaaaaaaaaa  10.1.0.0/24          1\n" in there.out
        assert "bbbbbbbbbbbb    conflist mine" in there.out
        assert "10.1.0.2/24  127.0.0.1:8080->80/tcp *:32768->53/udp (our choice)\n" in there.out
        document = json.loads(netloom("status", "--json").out)["docker"]
    assert (document["answers"], document["error"]) == (True, "")
    assert [one["endpoints"] for one in document["networks"]] == [1, 0]
    assert document["endpoints"][0]["ports"][1] == {
        "protocol": "udp",
        "host_ip": "",
        "host_port": 32768,
        "container_port": 53,
        "chosen": True,
    }
    assert document["endpoints"][0]["ports"][0]["chosen"] is False


def test_a_driver_that_has_nothing_may_be_away(ipamd: Ipamd, netloom: Netloom, scratch: Path) -> None:
    State(str(scratch / "docker")).close()
    ran = netloom("status")
    assert ran.status == 0
    assert "docker       driver does not answer" in ran.out


def test_release_records_that_cannot_be_read(ipamd: Ipamd, netloom: Netloom, scratch: Path) -> None:
    (scratch / "releases").mkdir(exist_ok=True)
    (scratch / "releases" / "x.bad").touch()
    ran = netloom("status")
    assert ran.status == 1
    assert "1 release records cannot be read" in ran.out


@pytest.mark.kernel
def test_another_firewall_that_drops_what_containers_send(host: Host) -> None:
    host.start_ipamd()
    c1 = host.netns("c1")
    result = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.2/16"}]}
    conf = {"cniVersion": "1.0.0", "name": "net", "type": "firewall", "prevResult": result}
    status = [sys.executable, "-m", "cli", "status", "--json"]
    chain = "inet filter forward { type filter hook forward priority 0; policy drop; }"
    host.run(["nft", f"add table inet filter; add chain {chain}"])
    assert host.run(status).returncode == 0  # nobody wants anything yet
    host.cni("ADD", "firewall", conf, netns=c1).ok()
    ran = host.run(status, check=False)
    assert ran.returncode == 1
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem.startswith("chain forward of table inet filter drops packets of containers")
    host.run(problem.partition(": ")[2].split())
    assert host.run(status).returncode == 0
    host.run(["iptables", "-P", "FORWARD", "DROP"])
    ran = host.run(status, check=False)
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem == "FORWARD of table ip filter drops packets of containers: run netloom gc --rebuild"
    host.run([sys.executable, "-m", "cli", "gc", "--rebuild"])
    assert host.run(status).returncode == 0


def test_unreachable_for_people_and_programs(netloom: Netloom, scratch: Path) -> None:
    ran = netloom("status")
    assert (ran.status, ran.out) == (3, "")
    assert "ipamd is not running" in ran.err
    ran = netloom("status", "--json")
    assert ran.status == 3
    document = json.loads(ran.out)
    assert document["state"] == "unreachable"
    assert document["ipamd"] is None
    assert document["problems"] == [ran.err.removeprefix("netloom: ").rstrip("\n")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to stop being root")
def test_what_only_root_may_see_is_left_out_for_others(ipamd: Ipamd, netloom: Netloom, scratch: Path) -> None:
    Records(str(scratch)).write(Record(Key("net", "one", "eth0", "bridge")))
    for directory in (scratch, *scratch.parents):
        if directory.stat().st_mode & 0o005 != 0o005 and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    os.chmod(scratch / "attachments", 0o700)
    os.chmod(scratch / "ipamd.sock", 0o666)
    os.seteuid(65534)
    try:
        ran = netloom("status", "--json")
        people = netloom("status")
    finally:
        os.seteuid(0)
    assert ran.status == 0
    assert json.loads(ran.out)["kernel"]["attachments"] is None
    assert "only root may look" in people.out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
