"""An answered allocation is on the disk: seen in system calls, after kill -9, and on a full disk."""

import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import grpc
import pytest

from ipamd.client import IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.ipamd.daemon import WAIT_S, Daemon, cidrs, key, now, own, wait_for

POOL = own("10.0.0.0/8")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_reply_follows_the_sync_of_its_row(tmp_path: Path) -> None:
    """For each allocation: its row is written to the log, the log is synced, and only then the reply is sent."""
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,pwrite64,sendmsg,sendto,write,writev"
    prefix = ("strace", "-f", "-y", "-e", calls, "-e", "signal=none", "-s", "8192", "-o", str(trace))
    answers: dict[str, str] = {}

    def work(daemon: Daemon, name: str) -> None:
        with daemon.client() as client:
            for letter in "abcdefghij":
                container = f"cid-{name}{letter}-x"
                answers[container] = cidrs(client.allocate(key(container), network_pool=POOL))[0]

    with Daemon(tmp_path, "", prefix=prefix) as daemon:
        work(daemon, "one")
        threads = [threading.Thread(target=work, args=(daemon, f"{name}")) for name in ("p", "q", "r", "s")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert daemon.process is not None
        # strace does not pass signals on; its child is the daemon.
        (child,) = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        assert daemon.process.wait(WAIT_S) == 0
    assert len(answers) == 50
    lines = trace.read_text(errors="replace").splitlines()
    # A call that another thread's interrupts is shown in two lines; a sync counts from its second one.
    synced = [
        number
        for number, line in enumerate(lines)
        if re.search(r"fdatasync\(\d+<[^>]*-wal>\) += 0|fdatasync resumed>.*= 0|fsync\(\d+<[^>]*-wal>\) += 0", line)
    ]
    for container, cidr in answers.items():
        written = next(
            n for n, line in enumerate(lines) if "-wal>" in line and "pwrite64" in line and container in line
        )
        sent = next(n for n, line in enumerate(lines) if re.search(r"\b(sendmsg|sendto|writev?)\(", line)
                    and "-wal>" not in line and "ipamd.log" not in line and cidr in line)  # fmt: skip
        assert any(written < sync < sent for sync in synced), f"{container}: {written} {sent}"


def test_kill_9_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    rng = random.Random(7)
    held: dict[str, list[str]] = {}  # answered, and not asked to be released since
    unknown: set[str] = set()  # asked, or asked to be released, and not answered
    lock = threading.Lock()

    def work(daemon: Daemon, name: str) -> None:
        with contextlib.suppress(IpamError), daemon.client() as client:
            for number in range(100_000):
                container = f"{name}-{number}"
                with lock:
                    unknown.add(container)
                answer = client.allocate(key(container), network_pool=POOL)
                with lock:
                    held[container] = cidrs(answer)
                    unknown.discard(container)
                if number % 3 == 0:
                    with lock:
                        del held[container]
                        unknown.add(container)
                    client.release(key(container), generation=answer.generation)
                    with lock:
                        unknown.discard(container)

    with Daemon(tmp_path) as daemon:
        for round_number in range(6):
            count = len(held)
            threads = [
                threading.Thread(target=work, args=(daemon, f"r{round_number}w{n}"), daemon=True) for n in range(4)
            ]
            for thread in threads:
                thread.start()
            wait_for("answers", lambda count=count: len(held) > count + 20)  # type: ignore[misc]
            time.sleep(rng.random() / 10)
            daemon.kill()
            for thread in threads:
                thread.join(WAIT_S)
            daemon.start()
            with daemon.client() as client:
                found = {a.key.container_id: cidrs(a) for a in client.list_allocations()}
                assert held == {name: cidr for name, cidr in found.items() if name not in unknown}
                taken = [cidr for each in found.values() for cidr in each]
                assert len(set(taken)) == len(taken)
                # The next reconcile: what nobody was told of goes.
                valid = [pb.Attachment(container_id=name, ifname="eth0") for name in held]
                client.garbage_collect(pb.GarbageCollectRequest(client="cni", network="n", valid=valid, before=now()))
                assert {a.key.container_id for a in client.list_allocations()} == set(held)
                usage = client.get_pool("net/n").usage[0]
                assert usage.allocated == len(held)
            unknown.clear()
    assert len(held) > 100


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=12m tmpfs "{disk}" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    with Daemon(tmp_path, "[pools]\ncooldown_s = 0\n", store=f"{disk}/ipamd.db", prefix=prefix) as daemon:
        assert daemon.process is not None
        inside = f"/proc/{daemon.process.pid}/root{disk}"
        assert os.path.exists(f"{inside}/ipamd.db.ballast")
        with daemon.client() as client:
            held = [str(number) for number in range(50)]
            for name in held:
                client.allocate(key(name), network_pool=POOL)
            _fill(f"{inside}/filler")

            refusal: list[IpamError] = []

            def refused() -> bool:
                try:
                    client.allocate(key(f"more-{len(held)}"), network_pool=POOL)
                except IpamError as error:
                    refusal.append(error)
                    return True
                held.append(f"more-{len(held)}")
                return False

            wait_for("a refusal", refused)
            assert refusal[0].code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "disk" in refusal[0].message
            assert "full" in refusal[0].message
            with pytest.raises(IpamError, match="disk"):
                client.status(network="n", network_pool=POOL)
            assert client.status().allocations == len(held)
            assert not os.path.exists(f"{inside}/ipamd.db.ballast")
            for name in held[:40]:
                assert client.release(key(name)).released
            with pytest.raises(IpamError, match="disk"):
                client.allocate(key("another"), network_pool=POOL)
            os.unlink(f"{inside}/filler")

            def recovered() -> bool:
                with contextlib.suppress(IpamError):
                    return client.allocate(key("another"), network_pool=POOL).created
                return False

            wait_for("allocations to go on", recovered)
            assert os.path.getsize(f"{inside}/ipamd.db.ballast") == 4 << 20
            left = {a.key.container_id for a in client.list_allocations()}
            assert left == {*held[40:], "another"}
            assert client.get_pool("net/n").usage[0].allocated == len(left)
        assert daemon.stop() == 0


def _fill(path: str) -> None:
    """Takes the last byte of the disk."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
