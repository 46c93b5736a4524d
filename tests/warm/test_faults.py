"""Worker or launcher killed at every step of ADD and DEL, and an undo that runs late. See tests/warm/faulty.py."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import CniCall, Host, Netns, Snapshot, wait_until
from tests.warm.service import COLD, Service, bridge

pytestmark = pytest.mark.kernel

COUNT = "/run/steps"
PAUSED = "/run/paused"
WHERE = "/run/where"
# From here on the launcher may have printed the result.
ANSWERED = ("after _respond", "before _wait_for_done", "after _wait_for_done", "before __exit__", "after __exit__", "")


@pytest.fixture
def service(host: Host, launcher: Path) -> Iterator[Service]:
    host.start_ipamd(pools={"cooldown_s": 0})
    one = Service(host, launcher, ["--workers", "2", "--max-workers", "4"], module="tests.warm.faulty")
    one.start()
    yield one
    assert one.stop() == 0


@pytest.fixture
def c1(service: Service) -> Netns:
    """A container, on a host that has the bridge and the tables already."""
    netns = service.host.netns("c1")
    service.add(netns).ok()
    service.delete(netns).ok()
    return netns


def steps(service: Service, verb: str, netns: Netns) -> int:
    """How many there are."""
    service.call(verb, bridge(), netns=netns, env={"NETLOOM_TEST_COUNT": COUNT}).ok()
    # The worker writes it after the launcher has left.
    wait_until(service.host.path(COUNT).exists, "the number of steps")
    count = int(service.host.path(COUNT).read_text(encoding="ascii"))
    service.host.path(COUNT).unlink()
    return count


def faulty(service: Service, verb: str, netns: Netns, at: int | str, what: str) -> tuple[CniCall, str]:
    """The call, and the name of the step where the fault was: "" where there were fewer steps this time."""
    env = {"NETLOOM_TEST_AT": str(at), "NETLOOM_TEST_DO": what, "NETLOOM_TEST_WHERE": WHERE}
    call = service.call(verb, bridge(), netns=netns, env=env)
    where = service.host.path(WHERE)
    if not where.exists():
        return call, ""
    name = where.read_text(encoding="ascii")
    where.unlink()
    return call, name


def settle(service: Service, before: Snapshot) -> None:
    """Waits until the host is as before: what the worker does after its launcher was killed takes a moment."""
    try:
        wait_until(lambda: service.host.snapshot() == before, "the undo")
    except AssertionError:
        service.host.assert_clean(before)


def test_worker_killed_at_each_step_of_add(service: Service, c1: Netns) -> None:
    before = service.host.snapshot()
    count = steps(service, "ADD", c1)
    service.delete(c1).ok()
    service.host.assert_clean(before)
    assert count > 20
    for at in range(1, count + 1):
        call, where = faulty(service, "ADD", c1, at, "kill")
        if call.status == 0:
            # Killed after RESPONSE: the launcher had printed the result, and an ADD it is.
            assert where in ANSWERED
            assert c1.addresses()["eth0"] == [ip["address"] for ip in call.result()["ips"]]
        elif "did not learn" in call.stderr:
            assert where in ANSWERED  # printed, and failed all the same: a DEL follows
        else:
            assert call.code() == 11, where
        service.delete(c1).ok()
        service.host.assert_clean(before)
    # Nobody was harmed for good.
    service.add(c1).ok()
    service.delete(c1).ok()
    service.host.assert_clean(before)
    assert service.cold() == []


def test_worker_killed_at_each_step_of_del(service: Service, c1: Netns) -> None:
    before = service.host.snapshot()
    service.add(c1).ok()
    count = steps(service, "DEL", c1)
    service.host.assert_clean(before)
    assert count > 12
    for at in range(1, count + 1):
        service.add(c1).ok()
        call, where = faulty(service, "DEL", c1, at, "kill")
        if call.status == 0:
            assert where in ANSWERED
        else:
            assert call.code() == 11, where
        service.delete(c1).ok()
        service.host.assert_clean(before)
    service.add(c1).ok()
    service.delete(c1).ok()
    service.host.assert_clean(before)
    assert service.cold() == []


def test_launcher_killed_at_each_step_of_add_undoes_it(service: Service, c1: Netns) -> None:
    before = service.host.snapshot()
    count = steps(service, "ADD", c1)
    service.delete(c1).ok()
    service.host.assert_clean(before)
    for at in range(1, count + 1):
        call, where = faulty(service, "ADD", c1, at, "launcher")
        if where in ANSWERED:
            # It may have said DONE, which is the last that it does before it ends; a runtime that sees it killed sends
            # a DEL.
            service.delete(c1).ok()
        else:
            assert call.status != 0, where
        settle(service, before)
    assert service.cold() == []


def test_launcher_killed_at_each_step_of_del(service: Service, c1: Netns) -> None:
    before = service.host.snapshot()
    service.add(c1).ok()
    count = steps(service, "DEL", c1)
    for at in range(1, count + 1):
        service.add(c1).ok()
        faulty(service, "DEL", c1, at, "launcher")
        settle(service, before)  # what was accepted is finished, whoever listens
    assert service.cold() == []


def start(service: Service, verb: str, netns: Netns, **env: str) -> subprocess.Popen[str]:
    """A plugin as a process of its own."""
    host = service.host
    conf = host.path("/run/conf")
    conf.write_text(json.dumps(bridge()), encoding="utf-8")
    environment = {
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": netns.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "PATH": os.environ["PATH"],
        "NETLOOM_CNI_COLD": COLD,
        "NETLOOM_CNI_WAIT_MS": "30000",
        **env,
    }
    with conf.open(encoding="utf-8") as stdin:
        return host.popen(["/opt/cni/bin/bridge"], stdin=stdin, stdout=subprocess.PIPE, env=environment)


def paused_before_undo(service: Service, c1: Netns) -> None:
    """An ADD whose launcher is gone, and whose worker stands still before it undoes what it did."""
    fault = {"NETLOOM_TEST_AT": "before _wait_for_done", "NETLOOM_TEST_DO": "pause", "NETLOOM_TEST_PAUSED": PAUSED}
    process = start(service, "ADD", c1, **fault)
    # Without a reader the launcher cannot print, so that it says no DONE.
    assert process.stdout is not None
    process.stdout.close()
    wait_until(service.host.path(PAUSED).exists, "the worker to stand still")
    process.wait(60)
    assert c1.addresses()["eth0"], "it did all of the ADD"


@pytest.mark.parametrize("way", ["warm", "cold"])
def test_a_new_add_waits_for_the_late_undo_and_keeps_its_address(service: Service, c1: Netns, way: str) -> None:
    before = service.host.snapshot()
    paused_before_undo(service, c1)
    elsewhere = {"NETLOOM_CNI_SOCKET": "/nonexistent"} if way == "cold" else {}
    add = start(service, "ADD", c1, **elsewhere)
    with pytest.raises(subprocess.TimeoutExpired):
        add.wait(1)
    service.host.path(PAUSED).unlink()
    printed, _ = add.communicate(timeout=60)
    assert add.returncode == 0, printed
    addresses = [ip["address"] for ip in json.loads(printed)["ips"]]
    assert c1.addresses()["eth0"] == addresses
    assert [one for one in service.host.allocations() if addresses[0].split("/")[0] in one]
    service.host.ping(addresses[0].split("/")[0])
    assert service.cold() == (["bridge ADD"] if way == "cold" else [])
    service.delete(c1).ok()
    settle(service, before)


def test_a_del_waits_for_the_late_undo(service: Service, c1: Netns) -> None:
    before = service.host.snapshot()
    paused_before_undo(service, c1)
    delete = start(service, "DEL", c1)
    with pytest.raises(subprocess.TimeoutExpired):
        delete.wait(1)
    service.host.path(PAUSED).unlink()
    assert delete.wait(60) == 0
    # The runtime's next ADD comes after that DEL: what it gets is its own.
    addresses = [ip["address"] for ip in service.add(c1).result()["ips"]]
    assert c1.addresses()["eth0"] == addresses
    assert len(service.host.allocations()) == 1
    service.delete(c1).ok()
    settle(service, before)


def test_another_attachment_does_not_wait(service: Service, c1: Netns) -> None:
    paused_before_undo(service, c1)
    other = service.host.netns("other")
    service.add(other, "other").ok()
    service.delete(other, "other").ok()
    service.host.path(PAUSED).unlink()


def test_a_worker_that_is_not_at_home_ends(service: Service, c1: Netns) -> None:
    workers = set(service.workers())
    call, _ = faulty(service, "ADD", c1, "after _wait_for_done", "astray")
    call.ok()
    wait_until(lambda: len(set(service.workers()) - workers) == 1, "another worker in its place")
    assert "is not at home" in service.log()
    service.delete(c1).ok()
    service.add(c1).ok()
    service.delete(c1).ok()
    assert service.cold() == []


def test_requests_for_many_attachments_at_once(service: Service, c1: Netns) -> None:
    """The invariant under concurrency: as many allocations as interfaces, and none at the end."""
    before = service.host.snapshot()
    failures: list[BaseException] = []

    def live(name: str) -> None:
        try:
            netns = service.host.netns(name)
            for _ in range(4):
                address = service.add(netns, name).result()["ips"][0]["address"]
                assert netns.addresses()["eth0"] == [address]
                service.delete(netns, name).ok()
            netns.delete()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(f"m{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert service.cold() == []
    settle(service, before)
