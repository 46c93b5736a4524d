"""The master and its workers in a host of the tests, with launchers in /opt/cni/bin and a cold way that is counted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cni.registry import PLUGINS
from tests.hosts import CNI_BIN, CniCall, Host, HostError, Netns, wait_until

COLD = "/etc/netloom/cold/"
_COLD_LOG = "/run/cold.log"
SOCKET = "/run/netloom/cni.sock"


class Service:
    """Use as a context manager. The host's teardown ends whatever is left of it."""

    def __init__(
        self,
        host: Host,
        launcher: Path,
        arguments: Sequence[str] = (),
        module: str = "warm",
        directory: str = CNI_BIN,
    ) -> None:
        """`directory` is where the launchers go; one that is not CNI_BIN leaves that as it is."""
        self.host = host
        self.directory = directory
        self.arguments = list(arguments)
        self.module = module
        self._log = host.directory / "warm.log"
        self.process: subprocess.Popen[str] | None = None
        plain, cold = host.path("/etc/netloom/plain"), host.path(COLD.rstrip("/"))
        shutil.copytree(host.path(CNI_BIN), plain)
        cold.mkdir()
        host.path(directory).mkdir(exist_ok=True)
        for plugin in PLUGINS:
            script = f'#!/bin/sh\necho {plugin} "$CNI_COMMAND" >> {_COLD_LOG}\nexec /etc/netloom/plain/{plugin}\n'
            (cold / plugin).write_text(script, encoding="ascii")
            (cold / plugin).chmod(0o755)
            target = host.path(directory) / plugin
            target.unlink(missing_ok=True)
            shutil.copy(launcher, target)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def start(self, env: Mapping[str, str] | None = None) -> None:
        """Returns when a worker waits for requests."""
        argv = [sys.executable, "-m", self.module, *self.arguments]
        with self._log.open("a", encoding="utf-8") as log:
            self.process = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        wait_until(self._answers, "a warm worker", lambda: self.log()[-4000:])

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise HostError(f"the master ended with status {self.process.returncode}: {self.log()[-4000:]}")
        if not self.host.path(SOCKET).exists():
            return False
        before = self.cold()
        self.call("VERSION", {}).ok()
        warm = self.cold() == before
        self.forget_cold()
        return warm

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.signal(signal.SIGTERM)
        return self.process.wait(60)

    def workers(self) -> list[int]:
        """The process ids of the workers there are now."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        except FileNotFoundError:
            return []
        return [int(pid) for pid in children.split() if "worker" in _title(int(pid))]

    def call(self, verb: str, conf: Mapping[str, Any] | bytes, plugin: str = "bridge", **options: Any) -> CniCall:
        """As Host.cni, with a cold way that is counted."""
        env = {"NETLOOM_CNI_COLD": COLD, "NETLOOM_CNI_WAIT_MS": "30000", **options.pop("env", {})}
        return self.host.cni(verb, plugin, conf, env=env, directory=self.directory, **options)

    def cold(self) -> list[str]:
        """The requests that went cold, in words."""
        log = self.host.path(_COLD_LOG)
        return log.read_text(encoding="ascii").splitlines() if log.exists() else []

    def forget_cold(self) -> None:
        self.host.path(_COLD_LOG).unlink(missing_ok=True)

    def add(self, netns: Netns, container_id: str = "c1", **options: Any) -> CniCall:
        return self.call("ADD", bridge(), netns=netns, container_id=container_id, **options)

    def delete(self, netns: Netns | str, container_id: str = "c1", **options: Any) -> CniCall:
        return self.call("DEL", bridge(), netns=netns, container_id=container_id, **options)


def bridge(**more: Any) -> dict[str, Any]:
    """A network with masquerade, so that nftables and records take part too."""
    return {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "bridge",
        "bridge": "br0",
        "isDefaultGateway": True,
        "ipMasq": True,
        "ipam": {"type": "ipamd", "subnet": "10.9.0.0/16"},
        **more,
    }


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
    except OSError:
        return ""
