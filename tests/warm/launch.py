"""What the tests of the launcher need: the built program, something that answers it, and a cold program that tells."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cni import wire

# Records that it ran, what it was given, and answers as a plugin would.
COLD = """#!/bin/sh
input=$(cat)
{ echo "$0"; for one; do echo "arg $one"; done; echo "stdin $input"; env; } >> "$COLD_LOG"
echo '{"cold": true}'
echo 'cold stderr' >&2
exit 3
"""


@dataclass(frozen=True, slots=True)
class Launched:
    """How one launcher ended. `cold` is what each cold program that ran was given."""

    status: int
    stdout: bytes
    stderr: bytes
    cold: str

    def error(self) -> dict[str, Any]:
        """The CNI error of a launcher that went no cold way."""
        assert self.cold == "", self.cold
        assert self.status == 1, self
        document = json.loads(self.stdout)
        assert isinstance(document, dict), self
        return document

    def went_cold(self) -> None:
        """Exactly one cold program answered, and the launcher became it."""
        assert self.cold.count("stdin ") == 1, self
        assert (self.status, self.stdout, self.stderr) == (3, b'{"cold": true}\n', b"cold stderr\n"), self


class Bench:
    """A directory with the launcher under a plugin's name, a cold program, and the path of a socket."""

    def __init__(self, directory: Path, launcher: Path, plugin: str = "bridge") -> None:
        self.directory = directory
        self.program = directory / plugin
        self.program.write_bytes(launcher.read_bytes())
        self.program.chmod(0o755)
        self.cold = directory / "cold"
        self.cold.mkdir()
        (self.cold / plugin).write_text(COLD, encoding="ascii")
        (self.cold / plugin).chmod(0o755)
        self.log = directory / "cold.log"
        self.socket = directory / "cni.sock"

    def environment(self, verb: str = "ADD", **more: str) -> dict[str, str]:
        return {
            "CNI_COMMAND": verb,
            "PATH": os.environ["PATH"],
            "NETLOOM_CNI_SOCKET": str(self.socket),
            "NETLOOM_CNI_COLD": f"{self.cold}/",
            "COLD_LOG": str(self.log),
            # Tests that mean to wait for it set a short one; for all others it must not pass on a slow machine.
            "NETLOOM_CNI_WAIT_MS": "30000",
            **more,
        }

    def start(
        self, environment: Mapping[str, str] | None = None, argv: Sequence[str] = (), **options: Any
    ) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [str(self.program), *argv], env=environment or self.environment(), **{**streams, **options}
        )

    def finish(self, process: subprocess.Popen[bytes], stdin: bytes | None = b"{}") -> Launched:
        try:
            stdout, stderr = process.communicate(stdin, timeout=60)
        finally:
            process.kill()
        cold = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Launched(process.returncode, stdout or b"", stderr or b"", cold)

    def run(
        self,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"{}",
        argv: Sequence[str] = (),
        **options: Any,
    ) -> Launched:
        return self.finish(self.start(environment, argv, **options), stdin)


Talk = Callable[[socket.socket], None]


@dataclass
class Server:
    """Answers each connection with `talk` in a thread. `requests` has what launchers sent to `taken`."""

    path: Path
    talk: Talk
    backlog: int = 16
    errors: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = os.open(self.path.parent, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{directory}/{self.path.name}")
        os.close(directory)
        self._listener.listen(self.backlog)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self.errors and error is None:
            raise self.errors[0]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self.talk(connection)
                except BaseException as error:  # raised again in the test's thread
                    self.errors.append(error)


@dataclass
class Taken:
    """A request as it arrived, with its descriptors."""

    request: wire.Request
    descriptors: list[int]

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


def take(connection: socket.socket) -> Taken:
    """The whole request of a launcher."""
    descriptors: list[int] = []
    data, ancillary, _flags, _address = connection.recvmsg(65536, 64)
    for _level, _kind, content in ancillary:
        numbers = array.array("i")
        numbers.frombytes(content)
        descriptors.extend(numbers)
    while len(data) < wire.HEADER_SIZE or len(data) < wire.HEADER_SIZE + wire.header(data).length:
        more = connection.recv(1 << 20)
        assert more, f"the launcher left after {len(data)} bytes"
        data += more
    assert wire.header(data).kind == wire.KIND_REQUEST
    return Taken(wire.request(data[wire.HEADER_SIZE :]), descriptors)


def accepted(deadline_ms: int = 60000) -> bytes:
    return wire.frame(wire.KIND_ACCEPTED, [(wire.TAG_DEADLINE, wire.u32(deadline_ms))])


def response(stdout: bytes = b"", stderr: bytes = b"", status: int = 0) -> bytes:
    return wire.frame(
        wire.KIND_RESPONSE,
        [(wire.TAG_STDOUT, stdout), (wire.TAG_STDERR, stderr), (wire.TAG_STATUS, wire.u32(status))],
    )


def done(connection: socket.socket) -> bool:
    """Whether the launcher said DONE before it left."""
    try:
        data = connection.recv(wire.HEADER_SIZE)
    except ConnectionResetError:
        return False
    if not data:
        return False
    assert wire.header(data).kind == wire.KIND_DONE
    return True
