"""One data directory and two host-locals: ours, and Debian's where the machine has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cni import skel
from kernel.session import Session
from tests.hosts import ROOT

Keys = Mapping[str, Any] | None  # of the configuration, instead of those that it has or beside them
DEBIANS = "/usr/lib/cni/host-local"


@dataclass(frozen=True)
class Answer:
    """What a call printed."""

    json: Any
    log: str = ""

    @property
    def code(self) -> int:
        """0 where it went well."""
        return int(self.json.get("code", 0)) if self.json else 0

    @property
    def addresses(self) -> list[str]:
        assert self.code == 0, self.json
        return [ip["address"].split("/")[0] for ip in self.json["ips"]]

    @property
    def text(self) -> str:
        return f"{self.json['msg']}; {self.json.get('details', '')}"


@dataclass
class Network:
    """The network "net", with a run directory for our index."""

    top: Path
    ipam: dict[str, Any] = field(default_factory=lambda: {"subnet": "10.9.0.0/28"})
    version: str = "1.0.0"

    @property
    def directory(self) -> Path:
        return self.top / "data" / "net"

    @property
    def run_dir(self) -> Path:
        return self.top / "run"

    def conf(self, keys: Keys = None) -> dict[str, Any]:
        ipam = {"type": "host-local", "dataDir": str(self.top / "data"), **self.ipam}
        return {"cniVersion": self.version, "name": "net", "type": "bridge", "ipam": ipam, **(keys or {})}

    def environment(self, verb: str, cid: str, args: str = "", ifname: str = "eth0") -> dict[str, str]:
        return {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": cid,
            "CNI_NETNS": "/nowhere",
            "CNI_IFNAME": ifname,
            "CNI_PATH": "/usr/lib/cni",
            "CNI_ARGS": args,
            "NETLOOM_RUN_DIR": str(self.run_dir),
        }

    def ours(self, verb: str, cid: str = "c1", args: str = "", ifname: str = "eth0", keys: Keys = None) -> Answer:
        """In this process."""
        stdin = json.dumps(self.conf(keys)).encode()
        environment = self.environment(verb, cid, args, ifname)
        outcome = skel.run("host-local", environment, lambda: stdin, lambda: cast("Session", None))
        return Answer(json.loads(outcome.stdout) if outcome.stdout else None, outcome.stderr.decode())

    def debians(self, verb: str, cid: str = "c1", args: str = "", ifname: str = "eth0", keys: Keys = None) -> Answer:
        with self.start([DEBIANS], verb, cid, args, ifname, keys) as process:
            return finish(process)

    def start(
        self, argv: list[str], verb: str, cid: str, args: str = "", ifname: str = "eth0", keys: Keys = None
    ) -> subprocess.Popen[bytes]:
        """As a process; [] is ours."""
        process = subprocess.Popen(
            argv or [sys.executable, "-m", "cni", "host-local"],
            cwd=ROOT,
            env={**self.environment(verb, cid, args, ifname), "PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self.conf(keys)).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def files(self) -> dict[str, bytes]:
        """Every plain file but the lock."""
        if not self.directory.exists():
            return {}
        found = [file for file in self.directory.iterdir() if file.is_file() and file.name != "lock"]
        return {file.name: file.read_bytes() for file in found}

    def held(self) -> dict[str, bytes]:
        """The files of addresses."""
        return {name: content for name, content in self.files().items() if not name.startswith("last_")}

    def put(self, files: Mapping[str, bytes]) -> None:
        """Files as anybody may have left them."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.directory / name).write_bytes(content)


def finish(process: subprocess.Popen[bytes]) -> Answer:
    stdout, stderr = process.communicate()
    return Answer(json.loads(stdout) if stdout else None, stderr.decode())
