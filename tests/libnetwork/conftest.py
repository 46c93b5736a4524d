from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from libnetwork.options import NetworkOptions
from libnetwork.state import Endpoint, Network, State

_PLUGIN = """#!/bin/sh
here=$(dirname "$0") type=$(basename "$0")
number=$(ls "$here/calls" | wc -l)
cat >"$here/calls/$(printf %03d "$number") $CNI_COMMAND $type"
env >"$here/environment"
if [ -f "$here/$CNI_COMMAND $type" ]; then . "$here/$CNI_COMMAND $type"; fi
if [ "$CNI_COMMAND" = ADD ]; then
    echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.2/24"}], "by": "'"$type"'"}'
fi
"""


@dataclass(frozen=True)
class Plugins:
    """A directory of executables that note how they were called, and do what a test says."""

    directory: Path

    def make(self, *types: str) -> None:
        for name in types:
            path = self.directory / name
            path.write_text(_PLUGIN)
            path.chmod(0o755)

    def script(self, verb: str, name: str, text: str) -> None:
        """What this plugin does before it answers."""
        (self.directory / f"{verb} {name}").write_text(text + "\n")

    def refuse(self, verb: str, name: str, words: str, details: str = "", code: int = 100) -> None:
        answer = json.dumps({"cniVersion": "1.0.0", "code": code, "msg": words, "details": details})
        self.script(verb, name, f"echo '{answer}'; exit 1")

    def calls(self) -> list[str]:
        """["ADD bridge", …] in order."""
        return [path.name[4:] for path in sorted((self.directory / "calls").iterdir())]

    def conf(self, number: int) -> dict[str, Any]:
        """What the call got on standard input."""
        found: dict[str, Any] = json.loads(sorted((self.directory / "calls").iterdir())[number].read_text())
        return found

    def environment(self) -> dict[str, str]:
        """Of the last call."""
        lines = (self.directory / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    directory = tmp_path / "plug ins"
    (directory / "calls").mkdir(parents=True)
    made = Plugins(directory)
    made.make("bridge", "firewall", "portmap")
    return made


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    found = State(str(tmp_path / "state"))
    yield found
    found.close()


def network(id: str = "n1" * 32, **options: Any) -> Network:  # noqa: A002 - Docker's word
    return Network(id, NetworkOptions(**options), ("10.1.0.0/24",), ("10.1.0.1/24",))


def endpoint(id: str = "e1" * 32, **fields: Any) -> Endpoint:  # noqa: A002
    values: dict[str, Any] = {
        "network_id": "n1" * 32,
        "addresses": ("10.1.0.2/24",),
        "mac": "02:42:0a:01:00:02",
        "ifname": "nle1",
    }
    return Endpoint(id, **{**values, **fields})
