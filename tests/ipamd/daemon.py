"""A real ipamd in a process of its own, in a directory of its own, and what tests ask it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb

ROOT = str(Path(__file__).parents[2])
WAIT_S = 60.0


def wait_for(what: str, condition: Callable[[], object]) -> None:
    """Polls; a generous limit, as the machine may be busy."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {WAIT_S:.0f} s in vain for: {what}")
        time.sleep(0.02)


class Daemon:
    """Starts on entry, is killed on exit if it still runs. `settings` are lines for the configuration."""

    def __init__(self, directory: Path, settings: str = "", *, store: str = "", prefix: Sequence[str] = ()) -> None:
        self.directory = directory
        self.socket = f"{directory}/run/ipamd.sock"
        self.database = store or f"{directory}/state/ipamd.db"
        self.log = directory / "ipamd.log"
        self.config = directory / "netloom.toml"
        self.prefix = prefix
        directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'[ipamd]\nsocket = "{self.socket}"\nnode = "host"\n[store]\npath = "{self.database}"\n'
            f'[log]\nlevel = "info"\nformat = "json"\n{settings}'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def spawn(self) -> subprocess.Popen[bytes]:
        """Starts it and does not wait."""
        environment = {**os.environ, "NETLOOM_RUN_DIR": f"{self.directory}/run", "PYTHONPATH": ROOT}
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "ipamd", "--config", str(self.config)],
                cwd=ROOT,
                env=environment,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.process = process = self.spawn()

        def ready() -> bool:
            assert process.poll() is None, self.log.read_text()
            # A killed daemon's socket may still be there, and refuses.
            with contextlib.suppress(IpamError), self.client() as client:
                return bool(client.status().version)
            return False

        try:
            wait_for("ipamd's answer", ready)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)

    def client(self, request_id: str = "") -> Client:
        return Client(self.socket, timeout_s=WAIT_S, request_id=request_id)


def key(container: str, network: str = "n", ifname: str = "eth0") -> pb.AttachmentKey:
    return pb.AttachmentKey(client="cni", network=network, container_id=container, ifname=ifname)


def spec(*subnets: str, **options: object) -> pb.PoolSpec:
    return pb.PoolSpec(
        range_sets=[pb.RangeSet(ranges=[pb.Range(subnet=subnet)]) for subnet in subnets],
        **options,  # type: ignore[arg-type]
    )


def own(*subnets: str, **options: object) -> pb.NetworkPool:
    return pb.NetworkPool(spec=spec(*subnets, **options))


def cidrs(answer: pb.AllocateResponse | pb.Allocation) -> list[str]:
    return [address.cidr for address in answer.addresses]


def now() -> pb.Instant:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return pb.Instant(boot_id=boot_id, boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
