"""The command run in this process, against a real ipamd on a scratch socket."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cli import app
from protos.ipam.v1 import ipam_pb2, ipam_pb2_grpc

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """What a run of the command came to."""

    status: int
    out: str
    err: str


Netloom = Callable[..., Ran]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's directories and configuration in one place, whose path has odd characters and is long for a socket."""
    directory = tmp_path / ("a b%41 " + "d" * 100)
    directory.mkdir()
    (directory / "netloom.toml").write_text("")
    for variable in ("NETLOOM_RUN_DIR", "NETLOOM_STATE_DIR"):
        monkeypatch.setenv(variable, str(directory))
    monkeypatch.setenv("NETLOOM_CONFIG", str(directory / "netloom.toml"))
    monkeypatch.delenv("NETLOOM_IPAMD_SOCKET", raising=False)
    return directory


@pytest.fixture
def netloom(scratch: Path, capfd: pytest.CaptureFixture[str]) -> Netloom:
    """Runs the command with these words."""

    def run(*words: str) -> Ran:
        capfd.readouterr()
        status = app.main(words)
        return Ran(status, *capfd.readouterr())

    return run


class Ipamd:
    """A running ipamd, and a stub to prepare what the command then shows."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ipamd", "--node", "n1", "--store", "memory"], cwd=ROOT, stdout=log, stderr=log
            )
        self._directory_fd = os.open(directory, os.O_PATH)
        self.channel = grpc.insecure_channel(
            f"unix:/proc/self/fd/{self._directory_fd}/ipamd.sock", [("grpc.default_authority", "localhost")]
        )
        self.stub = ipam_pb2_grpc.IpamStub(self.channel)

    def wait(self) -> None:
        limit = time.monotonic() + LIMIT_S
        while not (self.directory / "ipamd.sock").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        self.channel.close()
        os.close(self._directory_fd)
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        finally:
            self.process.kill()

    def allocate(self, container: str, *pools: str) -> ipam_pb2.AllocateResponse:
        """Addresses for eth0 of a container in network "net"."""
        request = ipam_pb2.AllocateRequest(
            key=ipam_pb2.AttachmentKey(client="cni", network="net", container_id=container, ifname="eth0"),
            netns=ipam_pb2.Netns(inode=4026539999, path=f"/run/netns/{container}"),
            at=ipam_pb2.Instant(
                boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            ),
            pools=pools,
        )
        return self.stub.Allocate(request, timeout=LIMIT_S)


@pytest.fixture
def ipamd(scratch: Path) -> Iterator[Ipamd]:
    """An ipamd without any pool."""
    daemon = Ipamd(scratch)
    try:
        daemon.wait()
        yield daemon
    finally:
        daemon.stop()
