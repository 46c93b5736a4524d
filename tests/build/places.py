"""Where the tests install to: a repository of their own, and root directories for chroot(2)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import ROOT, Host, Netns, wait_until

GLIBC = (
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2",
    "librt.so.1", "libutil.so.1", "libresolv.so.2", "libanl.so.1", "libnss_files.so.2", "libnss_dns.so.2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tree:
    """The files that build/install and build/deb read, in a directory of the test's own."""

    root: Path

    @classmethod
    def make(cls, root: Path, bundle: Path, launcher: Path) -> Tree:
        for name in ("build", "docs", "warm", "cni"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        shutil.copy(ROOT / "LICENSE", root)
        (root / "out").mkdir()
        subprocess.run(["cp", "-a", "--reflink=auto", str(bundle), str(root / "out/bundle")], check=True)
        shutil.copy(launcher, root / "out/launcher")
        return cls(root)

    def rename_build(self, name: str) -> None:
        """From now on this is the bundle of other sources."""
        file = self.root / "out/bundle/BUILD"
        _, *rest = file.read_text().splitlines(keepends=True)
        file.write_text("".join([f"build={name}\n", *rest]))

    def run(self, script: str, destination: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of the scripts in build/, as the Makefile calls it."""
        # A script that is killed leaves its working directory; it is to go with the tree.
        added = {"TMPDIR": str(self.root / "out"), **({"DESTDIR": str(destination)} if destination else {})}
        return subprocess.run(
            ["sh", f"build/{script}"],
            cwd=self.root,
            env={**os.environ, **added, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def package(self, version: str) -> Path:
        done = self.run("deb", DEB_VERSION=version, DEB_COMPRESSION="none")
        assert done.returncode == 0, done.stderr
        (path,) = (self.root / "out").glob(f"netloom_{version}_*.deb")
        return path


@dataclass(slots=True)
class Chroot:
    """A root directory for programs of a host, in that host's namespaces. /run, /proc and /dev are the host's."""

    host: Host
    root: Path

    @classmethod
    def empty(cls, host: Host) -> Chroot:
        """Nothing but glibc, and what the kernel provides: /proc, /dev (gRPC reads /dev/urandom) and an empty /run."""
        root = host.directory / "empty"
        for name in ("proc", "run", "dev", "etc", "tmp", "lib", "lib64", "var/lib/netloom"):
            (root / name).mkdir(parents=True)
        for name in GLIBC:
            found = [
                Path(directory) / name for directory in ("/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64")
            ]
            for file in [file for file in found if file.exists()][:1]:
                shutil.copy(file, root / "lib" / name)
        for name in GLIBC[:2]:
            if (root / "lib" / name).exists():
                shutil.copy(root / "lib" / name, root / ("lib64" if "x86" in name else "lib") / name)
        chroot = cls(host, root)
        chroot._mount("/proc", "/run", "/dev")
        return chroot

    @classmethod
    def machine(cls, host: Host) -> Chroot:
        """This machine's own files, below an overlay that takes every change."""
        layers = host.directory / "layers"
        root = layers / "root"
        layers.mkdir()
        host.run(["mount", "-t", "tmpfs", "-o", "mode=755", "netloom", str(layers)])
        host.run(["mkdir", *(str(layers / name) for name in ("upper", "work", "root"))])
        where = f"lowerdir=/,upperdir={layers}/upper,workdir={layers}/work"
        host.run(["mount", "-t", "overlay", "-o", where, "netloom", str(root)])
        chroot = cls(host, root)
        chroot._mount("/proc", "/run", "/dev", "/sys")
        return chroot

    def _mount(self, *paths: str) -> None:
        # What is mounted below /run later, a container's namespace, is to be seen here too.
        self.host.run(["mount", "--make-rshared", "/run"])
        for path in paths:
            self.host.run(["mount", "--rbind", path, f"{self.root}{path}"])

    def command(self, argv: Sequence[str]) -> list[str]:
        return ["chroot", str(self.root), *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess calls it
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """As `Host.run`, in this root."""
        return self.host.run(self.command(argv), input=input, env=env, check=check, cwd="/")

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return self.host.popen(self.command(argv), cwd="/", **options)

    def serve(self, argv: Sequence[str], socket: str) -> subprocess.Popen[str]:
        """Starts a daemon; returns when its socket is there. Its output goes to `log` in the host's directory."""
        path = self.host.directory / "log"
        with path.open("a") as log:
            process = self.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def listens() -> bool:
            assert process.poll() is None, path.read_text()
            return self.host.path(socket).exists()

        wait_until(listens, socket, path.read_text)
        return process

    def sh(self, script: str, check: bool = True) -> str:
        return self.run(["sh", "-ec", script], check=check).stdout

    def cni(
        self,
        verb: str,
        type: str,  # noqa: A002 - the spec's word
        conf: Mapping[str, Any],
        netns: Netns,
        cold: bool = False,
        **env: str,
    ) -> dict[str, Any]:
        """Executes /opt/cni/bin/<type> as a runtime does; the printed object. `cold` or not is not left to chance:
        the other way is closed."""
        way = {"NETLOOM_CNI_SOCKET": "/nonexistent"} if cold else {"NETLOOM_CNI_COLD": "/nonexistent"}
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": netns.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            **way,
            **env,
        }
        done = self.run([f"/opt/cni/bin/{type}"], input=json.dumps(conf), env=environment, check=False)
        assert done.returncode == 0, f"{verb}: {done.stdout} {done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return found
