"""What a request leaves for `netloom trace`, served warm and cold; and that nothing of it can fail a request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, wait_until
from tests.warm.service import COLD, Service, bridge

pytestmark = pytest.mark.kernel

COLDLY = {"NETLOOM_CNI_SOCKET": "/nonexistent"}
TRACE = "/run/netloom/trace"


@pytest.fixture(scope="module")
def service(launcher: Path) -> Iterator[Service]:
    with Host() as host:
        host.start_ipamd(pools={"cooldown_s": 0}, store={"kind": "memory"}, log={"format": "json"})
        one = Service(host, launcher, ["--workers", "2"])
        one.start()
        yield one
        assert one.stop() == 0


@pytest.fixture(autouse=True)
def _forgotten(service: Service) -> None:
    service.host.run(["rm", "-rf", TRACE])


def netloom(service: Service, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return service.host.run([sys.executable, "-m", "cli", "trace", *words], **options)


def traced(service: Service, count: int) -> list[dict[str, Any]]:
    """So many requests; the caller has its answer before the last one is written down."""
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        found[:] = json.loads(netloom(service, "--json", "--last", "1000").stdout)["requests"]
        return len(found) >= count

    wait_until(all_there, f"{count} traces", lambda: str(found))
    assert len(found) == count
    return found


def names(one: dict[str, Any]) -> list[str]:
    return [step["step"] for step in one["steps"]]


@pytest.mark.parametrize(("way", "env"), [("warm", {}), ("cold", COLDLY)])
def test_every_verb_is_told_with_its_steps(service: Service, way: str, env: dict[str, str]) -> None:
    host = service.host
    c1 = host.netns()
    conf = bridge(cniVersion="1.1.0")
    result = service.call("ADD", conf, netns=c1, env=env).result()
    service.call("CHECK", {**conf, "prevResult": result}, netns=c1, env=env).ok()
    service.call("STATUS", conf, env=env).ok()
    service.call("VERSION", conf, env=env).ok()
    valid = [{"containerID": "c1", "ifname": "eth0"}]
    service.call("GC", {**conf, "cni.dev/valid-attachments": valid}, env=env).ok()
    service.call("DEL", conf, netns=c1, env=env).ok()
    c1.delete()
    found = traced(service, 5)
    assert [one["verb"] for one in found] == ["ADD", "CHECK", "STATUS", "GC", "DEL"]
    assert {one["way"] for one in found} == {way}
    assert {one["network"] for one in found} == {"net"}
    assert {(one["plugin"], one["outcome"], one["code"], one["error"]) for one in found} == {("bridge", "done", 0, "")}
    assert len({one["request_id"] for one in found}) == 5
    assert all(one["total_ns"] == sum(step["ns"] for step in one["steps"]) for one in found)
    if way == "warm":
        assert {one["pid"] for one in found} <= set(service.workers())
    first = "receive" if way == "warm" else "start"
    add, delete = found[0], found[-1]
    assert (add["container_id"], add["ifname"]) == ("c1", "eth0")
    there = [first, "parse", "lock", "namespace", "load", "allocate", "record", "bridge link", "nftables", "configure"]
    assert [name for name in names(add) if name in there] == there
    assert {"announce", "result", "deliver", "unlock"} <= set(names(add))
    assert {first, "lock", "release", "deliver"} <= set(names(delete))
    # The same id stands in ipamd's log.
    assert service.host._ipamd is not None
    logged = [json.loads(line) for line in service.host._ipamd.log().splitlines() if line.startswith("{")]
    assert {one["msg"] for one in logged if one.get("request_id") == add["request_id"]} == {"allocated"}
    assert {one["msg"] for one in logged if one.get("request_id") == delete["request_id"]} == {"released"}


@pytest.mark.parametrize("env", [{}, COLDLY], ids=["warm", "cold"])
def test_failures_are_told_with_their_code(service: Service, env: dict[str, str]) -> None:
    c1 = service.host.netns()
    refused = service.call("ADD", bridge(ipam={"type": "ipamd", "pool": "none"}), netns=c1, env=env)
    assert refused.code() == 7
    assert service.call("ADD", b"{", netns=c1, env=env).code() == 6
    assert service.call("ADD", bridge(), env=env).code() == 4
    assert service.call("ADD", bridge(), netns="/nonexistent", env=env).code() == 8
    c1.delete()
    found = traced(service, 4)
    assert [(one["outcome"], one["code"]) for one in found] == [("failed", code) for code in (7, 6, 4, 8)]
    assert found[0]["request_id"] in refused.json["details"]
    assert refused.json["msg"] in found[0]["error"]
    assert "undo" in names(found[0])
    assert found[2]["network"] == ""


@pytest.mark.parametrize("env", [{}, COLDLY], ids=["warm", "cold"])
def test_an_answer_that_nobody_got_is_told(service: Service, env: dict[str, str]) -> None:
    host = service.host
    c1 = host.netns()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": c1.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "NETLOOM_CNI_COLD": COLD,
        **env,
    }
    shell = ["sh", "-c", "exec /opt/cni/bin/bridge > /dev/full"]
    assert host.run(shell, input=json.dumps(bridge()), env=environment, check=False).returncode != 0
    (one,) = traced(service, 1)
    assert one["outcome"] == "undelivered"
    assert names(one).index("deliver") < names(one).index("undo")
    assert set(c1.links()) == {"lo"}
    c1.delete()


@pytest.mark.parametrize("env", [{}, COLDLY], ids=["warm", "cold"])
def test_a_full_disk_fails_no_request(service: Service, env: dict[str, str]) -> None:
    host = service.host
    c1 = host.netns()
    trace = host.path(TRACE)
    trace.mkdir(mode=0o700)
    host.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "netloom", TRACE])
    try:
        for _ in range(6):
            assert service.call("ADD", bridge(), netns=c1, env=env).result()["ips"]
            delete = service.call("DEL", bridge(), netns=c1, env=env)
            delete.ok()
            assert delete.stderr == ""
        assert host.run(["stat", "-c", "%s", f"{TRACE}/requests"]).stdout.strip() == "4096"
        document = json.loads(netloom(service, "--json").stdout)
        assert document["requests"]
        assert document["unreadable"] == 1
    finally:
        host.run(["umount", TRACE])
        c1.delete()


def test_warm_and_cold_at_once(service: Service) -> None:
    host = service.host
    spaces = [host.netns() for _ in range(6)]
    script = 'for n; do CNI_CONTAINERID=$n CNI_NETNS=/run/netns/$n "$PLUGIN" < /run/conf > /dev/null & done; wait'
    host.path("/run/conf").write_text(json.dumps(bridge()), encoding="ascii")
    for verb in ("ADD", "DEL"):
        common = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, "CNI_IFNAME": "eth0"}
        common |= {"PLUGIN": "/opt/cni/bin/bridge", "CNI_PATH": "/opt/cni/bin", "NETLOOM_CNI_COLD": COLD}
        ways = [(spaces[:3], {"NETLOOM_CNI_WAIT_MS": "30000"}), (spaces[3:], COLDLY)]
        running = [
            host.popen(["sh", "-c", script, "sh", *(one.name for one in some)], env={**common, **env})
            for some, env in ways
        ]
        assert [one.wait(60) for one in running] == [0, 0]
    found = traced(service, 12)
    assert sorted((one["verb"], one["container_id"], one["way"]) for one in found) == sorted(
        (verb, one.name, "warm" if one in spaces[:3] else "cold") for verb in ("ADD", "DEL") for one in spaces
    )
    assert {one["outcome"] for one in found} == {"done"}
    for one in spaces:
        one.delete()


@pytest.mark.parametrize("env", [{}, COLDLY], ids=["warm", "cold"])
def test_a_directory_of_somebody_else_is_not_written_to(service: Service, env: dict[str, str]) -> None:
    trace = service.host.path(TRACE)
    trace.mkdir(mode=0o700)
    os.chown(trace, 65534, 65534)
    service.call("STATUS", bridge(cniVersion="1.1.0"), env=env).ok()
    service.call("STATUS", bridge(cniVersion="1.1.0"), env=env).ok()
    assert os.listdir(trace) == []
