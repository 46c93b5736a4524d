"""A command as root in a virtual machine with Debian's kernel: tests/vm/run [-m MEGABYTES] [-t SECONDS] [--] COMMAND...

For what the kernel of a test machine may lack. QEMU emulates the processor, 20 to 30 times slower than it is, unless
KVM works. Inside is the host's whole file system, and this clone as it is when the machine starts; what is written
stays inside. /tmp, /run, /var/tmp and /dev/shm are empty. There is no network, and no init system.

The kernel is in out/vm (build/setup puts it there, without installing it), else in /boot. Environment: what `PASSED`
names, and NETLOOM_*. Exit statuses: the command's own; 77 this machine cannot do it, stderr says why; 124 the time is
over; 125 the virtual machine did not boot, or died. Standard library only: it runs before anything is set up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import lzma
import os
import platform
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
ROOTS = (PROJECT / "out/vm", Path("/"))  # with boot/ and lib/modules/ in them
PASSED = ("CI", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
CANNOT, TIME_OVER, DIED = 77, 124, 125

_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "modprobe": "kmod", "busybox": "busybox-static"}
# What is needed before the host's files are there. The rest is loaded by whom it is asked of.
_MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay")
_BOOT_S = {"kvm": 30.0, "tcg": 180.0}
_CONSOLE_LINES = 20


class CannotError(Exception):
    """This machine cannot do it; the text says why, and what to install."""


class DiedError(Exception):
    """The virtual machine did not boot, or ended by itself."""


class TimeOverError(Exception):
    """The command did not end in time."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and the directory of its modules, which is named after its version."""

    image: Path
    modules: Path

    def wanted(self, root: Path) -> list[Path]:
        """The files of `_MODULES` and of what those need, in the order of loading. Raises CannotError."""
        found: dict[Path, None] = {}
        for name in _MODULES:
            argv = ["modprobe", "-d", str(root), "-S", self.modules.name, "--show-depends", name]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise CannotError(f"kernel {self.modules.name} has no module {name}: {done.stderr.strip()}")
            for line in done.stdout.splitlines():
                # Some are built in. Options may follow; the path may have spaces.
                if loaded := re.match(r"insmod (.+?\.ko(?:\.\w+)?)(?: |$)", line):
                    found[Path(loaded[1])] = None
        return list(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/vm/run", description="A command in a virtual machine.")
    parser.add_argument("-m", "--memory", type=int, default=2048, metavar="MEGABYTES")
    parser.add_argument("-t", "--time", type=float, default=900.0, metavar="SECONDS", help="for the command")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with tempfile.TemporaryDirectory(prefix="netloom-vm-") as directory:
            return run(Path(directory), given.command, given.memory, given.time)
    except (CannotError, DiedError, TimeOverError) as error:
        print(f"tests/vm/run: {error}", file=sys.stderr)
        return {CannotError: CANNOT, DiedError: DIED, TimeOverError: TIME_OVER}[type(error)]
    except KeyboardInterrupt:
        return 130


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def run(directory: Path, command: Sequence[str], memory: int, limit_s: float) -> int:
    """The command's exit status. `directory` is for files of this run. Raises CannotError, DiedError, TimeOverError."""
    check_programs()
    image = directory / "initrd"
    kernel, modules = find_kernel()
    write_ramdisk(image, kernel, modules, command)
    accelerators = (["kvm"] if has_kvm() else []) + ["tcg"]
    for accelerator in accelerators:
        with Machine(directory, kernel, image, accelerator, memory) as machine:
            if not machine.boots(_BOOT_S[accelerator]) and accelerator != accelerators[-1]:
                print("tests/vm/run: KVM did not boot; emulating the processor", file=sys.stderr)
                continue
            return machine.status(limit_s)
    raise AssertionError("unreachable")


def check_programs() -> None:
    if platform.machine() != "x86_64":
        raise CannotError(f"only x86_64 is set up, this is {platform.machine()}")
    if missing := [f"{name} (package {package})" for name, package in _PROGRAMS.items() if not shutil.which(name)]:
        raise CannotError(f"missing: {', '.join(missing)}")
    if subprocess.run(["ldd", str(shutil.which("busybox"))], capture_output=True, check=False).returncode == 0:
        raise CannotError("busybox is not static (package busybox-static)")


def find_kernel() -> tuple[Kernel, list[Path]]:
    """The newest kernel that has what booting takes, and those modules. Raises CannotError."""
    problems = []
    for root in ROOTS:
        for image in sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime, reverse=True):
            kernel = Kernel(image, root / "lib/modules" / image.name.removeprefix("vmlinuz-"))
            try:
                return kernel, kernel.wanted(root)
            except CannotError as error:
                problems.append(str(error))
    raise CannotError("; ".join(problems) or "no kernel in out/vm or /boot: sh build/setup vm")


def has_kvm() -> bool:
    """/dev/kvm may be there and not work without these modules."""
    loaded = any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))
    return loaded and os.access("/dev/kvm", os.W_OK)


# The initial ramdisk


def write_ramdisk(image: Path, kernel: Kernel, modules: Sequence[Path], command: Sequence[str]) -> None:
    """An archive in the format `newc` of cpio, uncompressed (Documentation/driver-api/early-userspace)."""
    busybox = Path(str(shutil.which("busybox")))
    files: dict[str, tuple[int, bytes]] = {
        "bin": (0o040755, b""),
        "bin/busybox": (0o100755, busybox.read_bytes()),
        "init": (0o100755, (HERE / "init").read_bytes()),
        "guest": (0o100755, (HERE / "guest").read_bytes()),
        "settings": (0o100644, settings(kernel).encode()),
        "command": (0o100644, script(command).encode()),
        "modules": (0o040755, b""),
        "clone.tar": (0o100644, snapshot(PROJECT)),
    }
    names = [path.name.split(".ko")[0] + ".ko" for path in modules]
    files["modules/order"] = (0o100644, "".join(f"{name}\n" for name in names).encode())
    for name, path in zip(names, modules, strict=True):
        files[f"modules/{name}"] = (0o100644, unpacked(path))
    with image.open("wb") as archive:
        for number, (name, (mode, content)) in enumerate({**files, "TRAILER!!!": (0, b"")}.items(), start=1):
            fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
            header = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
            for part in (header, content):
                archive.write(part + bytes(-len(part) % 4))


def snapshot(project: Path) -> bytes:
    """The clone as it is now, for who works on it meanwhile; without what is made from it, and too large to copy."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tops = [path for path in project.iterdir() if path.name != "out" and not path.name.startswith(".")]
        for path in sorted(inner for top in tops for inner in (top, *top.rglob("*"))):
            with contextlib.suppress(FileNotFoundError):  # somebody's temporary file
                tar.add(path, str(path.relative_to(project)), recursive=False)
    return archive.getvalue()


def unpacked(module: Path) -> bytes:
    """Newer kernels have their modules compressed."""
    content = module.read_bytes()
    if module.suffix == ".ko":
        return content
    if module.suffix == ".xz":
        return lzma.decompress(content)
    raise CannotError(f"{module}: cannot unpack {module.suffix}")


def settings(kernel: Kernel) -> str:
    return f"PROJECT={shlex.quote(str(PROJECT))}\nMODULES={shlex.quote(str(kernel.modules.resolve()))}\n"


def script(command: Sequence[str]) -> str:
    names = sorted(name for name in os.environ if name in PASSED or name.startswith("NETLOOM_"))
    lines = [f"export {name}={shlex.quote(os.environ[name])}" for name in names]
    return "\n".join([*lines, f"cd {shlex.quote(os.getcwd())} || exit 126", f"exec {shlex.join(command)}", ""])


class Machine:
    """A running virtual machine. The command's output goes to our standard output as it comes."""

    def __init__(self, directory: Path, kernel: Kernel, ramdisk: Path, accelerator: str, memory: int) -> None:
        self._console = directory / "console"
        self._log = directory / "qemu"
        self._control = Channel(directory / "control.sock")
        self._output = Channel(directory / "output.sock")
        self._said = b""
        processor = "host" if accelerator == "kvm" else "max"
        # However this process ends, so does the machine.
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "qemu-system-x86_64",
            "-M",
            "q35",
            "-accel",
            accelerator,
            "-cpu",
            processor,
            "-smp",
            "2",
        ]
        argv += ["-m", f"{memory}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-serial", f"file:{self._console}", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
        argv += self._output.options("output") + self._control.options("control")
        argv += ["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"]
        argv += ["-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-kernel", str(kernel.image)]
        argv += ["-initrd", str(ramdisk), "-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()
        self._output.close()

    def boots(self, limit_s: float) -> bool:
        """Whether the command was about to start within that time."""
        try:
            self._until(lambda: b"started\n" in self._said, limit_s)
        except (DiedError, TimeOverError):
            return False
        return True

    def status(self, limit_s: float) -> int:
        """The command's exit status."""
        if b"started\n" not in self._said:
            raise DiedError(f"the virtual machine did not boot\n{self._last_words()}")
        try:
            self._until(lambda: b"exit " in self._said and self._said.endswith(b"\n"), limit_s)
        except TimeOverError:
            raise TimeOverError(f"the command did not end within {limit_s:g} s") from None
        # The guest's writes are done when QEMU has them: all output came before the status did.
        self._copy()
        return int(self._said.split()[-1])

    def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        end = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            for channel in (self._control, self._output):
                selector.register(channel.accepted(), selectors.EVENT_READ)
            while not condition():
                if self._process.poll() is not None:
                    self._copy()
                    if condition():
                        return
                    raise DiedError(f"the virtual machine ended by itself\n{self._last_words()}")
                if time.monotonic() > end:
                    raise TimeOverError
                selector.select(0.2)
                self._copy()

    def _copy(self) -> None:
        self._said += self._control.read()
        if output := self._output.read():
            sys.stdout.buffer.write(output)
            sys.stdout.buffer.flush()

    def _last_words(self) -> str:
        said = []
        for file in (self._log, self._console):
            if file.exists():
                said += file.read_text(encoding="utf-8", errors="replace").splitlines()[-_CONSOLE_LINES:]
        return "\n".join(said)


class Channel:
    """What the guest writes to a virtio port comes out of a unix socket, to which QEMU connects when it starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(10.0)
        self._connection: socket.socket | None = None

    def options(self, name: str) -> list[str]:
        chardev = f"socket,id={name},path={str(self._path).replace(',', ',,')}"
        return ["-chardev", chardev, "-device", f"virtserialport,chardev={name},name={name}"]

    def accepted(self) -> socket.socket:
        """Raises DiedError where QEMU does not connect."""
        if self._connection is None:
            try:
                self._connection, _ = self._listener.accept()
            except TimeoutError:
                raise DiedError("QEMU did not start") from None
            self._connection.setblocking(False)
        return self._connection

    def read(self) -> bytes:
        """All that has come."""
        parts = []
        try:
            while self._connection is not None and (part := self._connection.recv(65536)):
                parts.append(part)
        except (BlockingIOError, ConnectionResetError):
            pass
        return b"".join(parts)

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


if __name__ == "__main__":
    sys.exit(main())
