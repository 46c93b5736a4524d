"""The harness itself: hosts are apart from each other and from the machine, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import BOOT_ID, IPV6, ROOT, Host, HostError, scratch, sweep, wait_until

pytestmark = pytest.mark.kernel


def machine() -> list[str]:
    """What of the machine no host may change."""
    commands = (
        ["ip", "-o", "link"],
        ["ip", "-4", "route", "show", "table", "all"],
        ["ip", "netns", "list"],
        [sys.executable, "-I", "-S", str(ROOT / "tests/nft_list.py")],
    )
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    # Only those mounts that are ours: others may come and go meanwhile.
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "netloom" in line]
    fixed = [path for path in ("/etc/netloom", "/opt/cni/bin", "/etc/cni/net.d", "/run/netns") if Path(path).exists()]
    return [*printed, *mounts, *fixed, Path(BOOT_ID).read_text()]


def busy(host: Host) -> None:
    host.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "v0"])
    container = host.netns("c1")
    host.run(["ip", "link", "set", "v1", "netns", "c1"])
    container.run(["ip", "address", "add", "192.0.2.2/24", "dev", "v1"])
    container.run(["ip", "link", "set", "v1", "up"])
    host.run(["ip", "link", "set", "v0", "up"])
    host.run([sys.executable, "-c", "open('/run/netloom/x', 'w'); open('/etc/netloom/netloom.toml', 'w')"])


def test_a_host_has_its_own_links_and_paths_and_the_machine_is_untouched() -> None:
    before = machine()
    with Host("one") as one, Host("two") as two:
        busy(one)
        assert "v0" in one.links()
        assert set(two.links()) == {"lo"}
        assert one.addresses()["v0"] == ["192.0.2.1/24"]
        assert one.path("/run/netloom/x").exists()
        assert not two.path("/run/netloom/x").exists()
        assert two.run(["ls", "/run/netloom", "/run/netns", "/var/run/netns"]).stdout.count("c1") == 0
        assert one.run(["ls", "/var/run/netns"]).stdout == "c1\n"
        assert not Path("/run/netloom/x").exists()
        assert machine() == before
    assert machine() == before


def test_programs_run_in_the_container() -> None:
    with Host() as host:
        busy(host)
        container = host.netns("c2")
        assert set(container.links()) == {"lo"}
        busy_one = host.run(["ip", "netns", "exec", "c1", "ip", "-o", "address"]).stdout
        assert "192.0.2.2" in busy_one
        assert host.ping("192.0.2.2") > 0
        container.delete()
        container.delete()
        assert host.run(["ip", "netns", "list"]).stdout.split()[0] == "c1"


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_ping_over_ipv6_and_without_an_answer(host: Host) -> None:
    assert host.ping("::1") > 0
    with pytest.raises(HostError, match=r"no answer from 198\.51\.100\.1"):
        host.ping("198.51.100.1", limit_s=0.3)


def test_ipv6_addresses_are_listed_without_link_local(host: Host) -> None:
    assert host.addresses()["lo"] == ["127.0.0.1/8", "::1/128"] if IPV6 else ["127.0.0.1/8"]


def test_a_failing_program_is_told_with_its_output(host: Host) -> None:
    with pytest.raises(HostError, match="out\nstderr: err"):
        host.run(["sh", "-c", "printf out; printf err >&2; exit 3"])
    assert host.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    assert host.run(["cat"], input=b"\xff\n").stdout == "�\n"


def test_a_plugin_gets_the_environment_of_a_runtime_and_nothing_else(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    plugin = host.path("/opt/cni/bin/echo")
    plugin.write_text("#!/bin/sh\nenv -u _ -u PWD -u OLDPWD | sort >&2\ncat\nexit 1\n")
    plugin.chmod(0o755)
    call = host.cni("ADD", "echo", {"code": 7}, netns=host.netns("c1"), env={"CNI_ARGS": None, "X": "y"})
    assert call.stderr.splitlines() == [
        "CNI_COMMAND=ADD",
        "CNI_CONTAINERID=c1",
        "CNI_IFNAME=eth0",
        "CNI_NETNS=/run/netns/c1",
        "CNI_PATH=/opt/cni/bin",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "X=y",
    ]
    assert call.code() == 7
    with pytest.raises(HostError, match="ADD exited 1"):
        call.result()


def test_a_snapshot_sees_what_came_and_what_went(host: Host) -> None:
    before = host.snapshot()
    host.assert_clean(before)
    busy(host)
    host.run(["nft", "add table inet t; add chain inet t c; add rule inet t c counter"])
    with pytest.raises(HostError) as caught:
        host.assert_clean(before, keep=["v0"])
    text = str(caught.value)
    assert "file /run/netloom/x" in text
    assert '"table": "t"' in text
    assert "link v0" not in text
    later = host.snapshot()
    host.run(["ip", "link", "delete", "v0"])
    with pytest.raises(HostError, match="- link v0: veth up"):
        host.assert_clean(later)


def test_another_boot_id_is_the_hosts_alone(host: Host) -> None:
    own = Path(BOOT_ID).read_text()
    host.boot_id("11111111-2222-4333-8444-555555555555")
    assert host.run(["cat", BOOT_ID]).stdout == "11111111-2222-4333-8444-555555555555\n"
    host.boot_id("2")
    assert host.run(["cat", BOOT_ID]).stdout == "2\n"
    assert Path(BOOT_ID).read_text() == own


def test_a_reboot_keeps_files_and_nothing_else(host: Host) -> None:
    busy(host)
    host.path("/var/lib/netloom/db").write_text("kept")
    boot = host.run(["cat", BOOT_ID]).stdout
    process = host.popen(["sleep", "1000"])
    host.reboot()
    assert process.returncode == -signal.SIGKILL
    assert set(host.links()) == {"lo"}
    assert host.run(["ls", "/run/netns", "/run/netloom"]).stdout.split() == ["/run/netloom:", "/run/netns:"]
    assert host.run(["cat", "/var/lib/netloom/db"]).stdout == "kept"
    first = host.run(["cat", BOOT_ID]).stdout
    host.reboot()
    assert len({boot, first, host.run(["cat", BOOT_ID]).stdout}) == 3


def test_nothing_is_left_after_a_failure() -> None:
    before = machine()
    with pytest.raises(ZeroDivisionError), Host() as host:
        busy(host)
        directory = host.directory
        process = host.popen(["sleep", "1000"])
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    assert not directory.exists()
    assert machine() == before


def test_a_daemon_that_nobody_ended_is_an_error_and_is_ended() -> None:
    with pytest.raises(HostError, match=r"was still running: .*sleep 1001"), Host() as host:
        host.run(["sh", "-c", "setsid sleep 1001 >/dev/null 2>&1 </dev/null &"])
        (pid,) = host.processes()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon's end")


def test_a_path_that_no_host_has_to_itself_is_refused(host: Host) -> None:
    with pytest.raises(HostError, match="/tmp/x is not below"):
        host.path("/tmp/x")
    assert host.path("/var/run/netloom") == host.path("/run/netloom")


KILLED = """
import subprocess, sys, time
from tests.hosts import Host, scratch
from tests.test_hosts import busy
with Host("victim") as host:
    busy(host)
    daemon = host.popen(["sleep", "1002"])
    host.run(["sh", "-c", "setsid sleep 1003 >/dev/null 2>&1 </dev/null &"])
    print(scratch(), daemon.pid, *host.processes(), flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def place() -> Iterator[str]:
    """Where only this test sweeps: other runs begin at any time, and sweep then."""
    with tempfile.TemporaryDirectory(prefix="swept-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield directory


def victim(place: str) -> tuple[subprocess.Popen[str], Path, list[int]]:
    environment = {**os.environ, "NETLOOM_SCRATCH": place}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    directory, *pids = process.stdout.readline().split()
    process.stdout.close()
    return process, Path(directory), [int(pid) for pid in pids]


def test_a_sweep_removes_what_a_killed_run_left_and_only_that(place: str) -> None:
    before = machine()
    alive, its_directory, its_pids = victim(place)
    dead, directory, pids = victim(place)
    try:
        sweep(place)
        assert directory.exists()
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait()
        done = sweep(place)
        assert any("sleep 1003" in what for what in done)
        assert any(f"removed {directory}" in what for what in done)
        assert not directory.exists()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of its processes")
        assert its_directory.exists()
        assert all(Path(f"/proc/{pid}").exists() for pid in its_pids)
        assert scratch().exists()
    finally:
        for process in (alive, dead):
            process.kill()
            process.wait()
        sweep(place)
    assert not its_directory.exists()
    assert machine() == before


def test_a_reused_process_id_does_not_keep_the_left_overs_of_the_dead(place: str) -> None:
    dead, directory, _ = victim(place)
    dead.kill()
    dead.wait()
    # The owner's file of a process with this very id, but started at another time.
    owner = (directory / "owner").read_text().split()
    renamed = directory.with_name(f"netloom-{os.geteuid()}-{os.getpid()}-reused")
    directory.rename(renamed)
    (renamed / "owner").write_text(f"{owner[0]} {owner[1]} {os.getpid()} 1")
    sweep(place)
    assert not renamed.exists()
