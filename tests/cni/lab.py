"""What the tests of the plugins share: a host with ipamd and a runner, configurations, an IPAM plugin that says what a
test wants, packets as they are on the wire."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cni.versions import SUPPORTED
from tests.hosts import CNI_BIN, IPV6, PROGRAM_PATH, ROOT, CniCall, Host, Ipamd, Netns, Snapshot, wait_until
from tests.warm.service import Service

REFERENCE = "/usr/lib/cni"  # Debian's containernetworking-plugins
WITH_CHECK = ("0.4.0", "1.0.0", "1.1.0")
Way = Literal["in process", "warm", "cold"]
LAUNCHERS = "/etc/netloom/launchers"
FOUR = "10.1.0.0/16"
SIX = "fd00:1::/64"


@dataclass(frozen=True, slots=True)
class Served(CniCall):
    """An answer of the runner: what was called on the way, too."""

    calls: tuple[str, ...] = ()
    undo_calls: tuple[str, ...] = ()


class Lab:
    """A host for all tests of a module, since each test leaves it as it was.

    Requests are served in one of three ways: by a runner in which faults can be injected; as installed by launcher and
    warm worker; or as installed without workers, where the launcher becomes a process that serves one request. Each
    request through a launcher is asserted to have gone the way that was asked for. (With workers there is the master's
    helper too, which here looks at nothing: tests break things to see who notices.)
    """

    def __init__(self, host: Host, ipamd: Ipamd | None = None) -> None:
        self.host = host
        self.way: Way = "in process"
        self._service: Service | None = None
        self._ipamd = ipamd
        self._runner: subprocess.Popen[str] | None = None
        self._log = host.directory / "runner.log"
        scripted = host.path(f"{CNI_BIN}/scripted")
        scripted.write_text(_SCRIPTED, encoding="ascii")
        scripted.chmod(0o755)

    @property
    def ipamd(self) -> Ipamd:
        if self._ipamd is None:
            self._ipamd = self.host.start_ipamd(pools={"cooldown_s": 0}, store={"kind": "memory"})
        return self._ipamd

    def cni(
        self,
        verb: str,
        type: str,  # noqa: A002 - the spec's word
        conf: Mapping[str, Any] | bytes,
        *,
        container_id: str = "c1",
        netns: Netns | str = "",
        ifname: str = "eth0",
        args: str = "",
        path: str = CNI_BIN,
        env: Mapping[str, str | None] | None = None,
        faults: Sequence[Mapping[str, Any]] = (),
    ) -> Served:
        """As `Host.cni`, but served in the lab's way; with faults always by the runner, which alone knows of calls."""
        if self.way != "in process" and not faults:
            options = {"container_id": container_id, "netns": netns, "ifname": ifname, "args": args, "path": path}
            return self._launched(verb, type, conf, {**options, "env": env or {}})
        environment: dict[str, str | None] = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns.path if isinstance(netns, Netns) else netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": path,
            "PATH": PROGRAM_PATH,
            **(env or {}),
        }
        stdin = conf if isinstance(conf, bytes) else json.dumps(conf).encode()
        request = {
            "plugin": type,
            "env": {name: value for name, value in environment.items() if value is not None},
            "stdin": base64.b64encode(stdin).decode(),
            "faults": list(faults),
        }
        runner = self._started_runner()
        assert runner.stdin is not None
        assert runner.stdout is not None
        runner.stdin.write(json.dumps(request) + "\n")
        runner.stdin.flush()
        line = runner.stdout.readline()
        if not line:
            raise AssertionError(f"the runner ended: {self._log.read_text()[-4000:]}")
        answer = json.loads(line)
        try:
            printed = json.loads(answer["stdout"])
        except ValueError:
            printed = None
        calls, undo_calls = tuple(answer["calls"]), tuple(answer["undo_calls"])
        return Served(verb, answer["status"], answer["stdout"], answer["stderr"], printed, 0.0, calls, undo_calls)

    def forget_runner(self) -> None:
        """After it was killed: the next request starts another."""
        if self._runner is not None:
            self._runner.wait()
            self._runner = None

    def serve(self, way: Way, launcher: Path | None = None) -> None:
        """From now on requests are served so. Any way but "in process" needs the launcher at its first time."""
        self.way = way
        if way != "in process" and self._service is None:
            assert launcher is not None
            arguments = ["--workers", "2", "--liveness-interval", "3600"]
            self._service = Service(self.host, launcher, arguments, "tests.warm.unwatched", LAUNCHERS)
        if way == "warm" and self._service is not None and self._service.process is None:
            self._service.start()

    def close(self) -> None:
        """Ends the workers, if there are any."""
        if self._service is not None and self._service.process is not None:
            assert self._service.stop() == 0, self._service.log()

    def _launched(self, verb: str, plugin: str, conf: Mapping[str, Any] | bytes, options: dict[str, Any]) -> Served:
        service = self._service
        assert service is not None
        service.forget_cold()
        if self.way == "cold":
            options["env"] = {"NETLOOM_CNI_SOCKET": "/nonexistent", **options["env"]}
        answer = service.call(verb, conf, plugin, **options)
        went = service.cold()
        wanted = [f"{plugin} {verb}".strip()] if self.way == "cold" else []
        assert [line.strip() for line in went] == wanted, f"{self.way} was wanted, went cold: {went}"
        return Served(verb, answer.status, answer.stdout, answer.stderr, answer.json, answer.took_s)

    def _started_runner(self) -> subprocess.Popen[str]:
        if self._runner is None:
            with self._log.open("a", encoding="utf-8") as log:
                self._runner = self.host.popen(
                    [sys.executable, "-m", "tests.cni.runner"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={"PATH": PROGRAM_PATH},
                )
        return self._runner

    @contextlib.contextmanager
    def attached(self, conf: Mapping[str, Any], type: str = "bridge", **more: Any) -> Iterator[Attached]:  # noqa: A002
        """A container that is attached for the duration of the block; its namespace is made, and goes, with it."""
        netns = self.host.netns()
        container_id = more.pop("container_id", netns.name)
        try:
            answer = self.cni("ADD", type, conf, netns=netns, container_id=container_id, **more)
            one = Attached(self, type, dict(conf), netns, container_id, answer.result(), more)
            try:
                yield one
            except BaseException:
                one.call("DEL")  # so that the next test finds the host as it should be
                raise
            one.call("DEL").ok()
        finally:
            netns.delete()

    @contextlib.contextmanager
    def space(self) -> Iterator[Netns]:
        """A container's namespace for the duration of the block."""
        netns = self.host.netns()
        try:
            yield netns
        finally:
            netns.delete()

    def scripted(self) -> Scripted:
        """The IPAM plugin "scripted", forgetting what earlier tests taught it."""
        return Scripted(self.host)

    def bridges(self) -> list[str]:
        found = self.host.links().items()
        return [name for name, one in found if one.get("linkinfo", {}).get("info_kind") == "bridge"]

    def warm_up(self) -> None:
        """Makes what the first ADD makes for all: tables, directories."""
        netns = self.host.netns()
        script = self.scripted()
        script.gives("10.99.0.2/24")
        conf = net(bridge="brwarm", ipam={"type": "scripted"}, ipMasq=True, macspoofchk=True)
        self.cni("ADD", "bridge", conf, netns=netns).ok()
        self.cni("DEL", "bridge", conf, netns=netns).ok()
        self.host.run(["ip", "link", "delete", "brwarm"])
        netns.delete()

    def tidy(self, before: Snapshot) -> None:
        """Raises HostError for whatever came or went since `before`, but for bridges; removes those."""
        bridges = self.bridges()
        try:
            self.host.assert_clean(before, keep=bridges)
        finally:
            for name in bridges:
                self.host.run(["ip", "link", "delete", "dev", name], check=False)


@dataclass
class Attached:
    """A container with its interface."""

    lab: Lab
    type: str
    conf: dict[str, Any]
    netns: Netns
    container_id: str
    result: dict[str, Any]
    more: dict[str, Any]

    def call(self, verb: str, **more: Any) -> Served:
        """Another verb for this attachment, as a runtime sends it: with ADD's result."""
        conf = {**self.conf, "prevResult": self.result}
        if self.conf["cniVersion"] in ("0.1.0", "0.2.0"):
            conf.pop("prevResult")
        return self.lab.cni(
            verb, self.type, conf, netns=self.netns, container_id=self.container_id, **{**self.more, **more}
        )

    def check(self) -> None:
        self.call("CHECK").ok()

    def broken(self) -> str:
        """CHECK must find something; what it says."""
        answer = self.call("CHECK")
        assert answer.code() > 0
        return str(answer.json["msg"])

    @property
    def port(self) -> str:
        return str(self.result["interfaces"][1]["name"])

    @property
    def mac(self) -> str:
        return str(self.result["interfaces"][2]["mac"])

    @property
    def addresses(self) -> list[str]:
        return [str(ip["address"]) for ip in self.result["ips"]]

    def ip(self, version: int = 4) -> str:
        return next(a.split("/")[0] for a in self.addresses if (":" in a) == (version == 6))


def net(version: str = "1.1.0", name: str = "net", **keys: Any) -> dict[str, Any]:
    """A bridge configuration."""
    return {"cniVersion": version, "name": name, "type": "bridge", "bridge": "br0", **keys}


def pool(*subnets: str, **keys: Any) -> dict[str, Any]:
    """An `ipam` object for ipamd."""
    return {"type": "ipamd", "ranges": [[{"subnet": subnet}] for subnet in subnets or (FOUR,)], **keys}


def both() -> dict[str, Any]:
    """IPv4, and IPv6 where the machine has it."""
    return pool(FOUR, *([SIX] if IPV6 else []))


# A foreign IPAM plugin: writes down what it was given, then does what a test put into /run/scripted/<verb>.
_SCRIPTED = r"""#!/bin/sh
dir=/run/scripted
cat > "$dir/stdin.$CNI_COMMAND"
env > "$dir/env.$CNI_COMMAND"
echo "$CNI_COMMAND" >> "$dir/log"
[ -f "$dir/$CNI_COMMAND" ] && . "$dir/$CNI_COMMAND"
exit 0
"""


class Scripted:
    """Teaches the IPAM plugin "scripted" and reads what it was asked."""

    def __init__(self, host: Host) -> None:
        self.directory = host.path("/run/scripted")
        self.directory.mkdir(exist_ok=True)
        for file in self.directory.iterdir():
            file.unlink()
        self.does("VERSION", answer={"cniVersion": "1.1.0", "supportedVersions": list(SUPPORTED)})

    def does(self, verb: str, shell: str = "", answer: object = None) -> None:
        """What it runs for a verb; `answer` is printed first."""
        text = answer if isinstance(answer, str) else json.dumps(answer) if answer is not None else ""
        lines = f"printf %s {shlex.quote(text)}\n{shell}\n"
        (self.directory / verb).write_text(lines, encoding="utf-8")

    def gives(self, *addresses: str, version: str = "1.1.0", **more: Any) -> None:
        """ADD answers with these addresses; "10.1.0.2/16 10.1.0.1" has a gateway."""
        ips = []
        for text in addresses:
            address, _, gateway = text.partition(" ")
            ips.append({"address": address, **({"gateway": gateway} if gateway else {})})
        self.does("ADD", answer={"cniVersion": version, "ips": ips, **more})

    def stdin(self, verb: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / f"stdin.{verb}").read_bytes())
        return found

    def env(self, verb: str) -> dict[str, str]:
        lines = (self.directory / f"env.{verb}").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text(encoding="ascii").split() if path.exists() else []


# Prints each frame that an interface receives, as hexadecimal digits, until it is ended; "ready" comes first.
_CAPTURE = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
    wire.bind((sys.argv[1], 0))
    print("ready", flush=True)
    while True:
        frame, where = wire.recvfrom(4096)
        if where[2] != 4:  # PACKET_OUTGOING
            print(frame.hex(), flush=True)
"""
_SEND = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
    wire.bind((sys.argv[1], 0))
    for frame in sys.argv[2:]:
        wire.send(bytes.fromhex(frame))
"""


class Capture:
    """The frames that arrive at an interface while the block runs."""

    def __init__(self, netns: Netns | Host, interface: str = "eth0") -> None:
        self._netns = netns
        self._interface = interface
        self._file = Path()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Capture:
        host = self._netns.host if isinstance(self._netns, Netns) else self._netns
        self._file = host.directory / f"capture-{os.urandom(4).hex()}"
        with self._file.open("w", encoding="ascii") as out:
            self._process = self._netns.popen(
                [sys.executable, "-I", "-S", "-c", _CAPTURE, self._interface], stdin=subprocess.DEVNULL, stdout=out
            )
        wait_until(lambda: self._file.read_text().startswith("ready"), "the capture")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def frames(self) -> list[bytes]:
        lines = self._file.read_text(encoding="ascii").rpartition("\n")[0].splitlines()[1:]
        return [bytes.fromhex(line) for line in lines]

    def has(self, *parts: bytes) -> bool:
        return any(all(part in frame for part in parts) for frame in self.frames())


def send(netns: Netns, *frames: bytes, interface: str = "eth0") -> None:
    """Puts frames on an interface as they are."""
    script = [sys.executable, "-I", "-S", "-c", _SEND, interface]
    netns.run([*script, *(frame.hex() for frame in frames)])


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, payload: bytes, destination: str = "ff:ff:ff:ff:ff:ff", kind: int = 0x88B5) -> bytes:
    """A frame; 0x88B5 is for local experiments (IEEE 802)."""
    return mac_bytes(destination) + mac_bytes(source) + kind.to_bytes(2, "big") + payload.ljust(46, b"\0")


def unreachable(netns: Netns, target: str) -> bool:
    """Whether a whole second of echo requests gets no answer."""
    argv = [sys.executable, "-I", "-S", str(ROOT / "tests/ping.py"), target, "1"]
    return netns.run(argv, check=False).returncode != 0


def elements(host: Host, name: str) -> list[Any]:
    """What a set of ours holds, without the comments."""
    found: list[Any] = []
    for entry in host.nft():
        if entry.get("set", {}).get("name") == name:
            found += entry["set"].get("elem", [])
    return [one["elem"]["val"] if isinstance(one, dict) and "elem" in one else one for one in found]


def pause() -> None:
    """Lets time pass for a thing that must not happen; no test fails when it is too short."""
    time.sleep(0.3)
