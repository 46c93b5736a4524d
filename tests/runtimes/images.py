"""An image without a registry: busybox, and what it takes to be a root file system."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

BUSYBOX = "/bin/busybox"
NAME = "localhost/busybox:1"
# A web server that says the name of its host and lives until it is killed. In /dev, as the rest of a pod's own
# container cannot be written to.
SERVE = ["/bin/sh", "-c", "hostname > /dev/index.html; exec httpd -f -p 80 -h /dev"]


def root_tar() -> bytes:
    """The root file system, as a tar archive that is the same each time."""
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    files = {"etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n", "etc/group": b"root:x:0:\n"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for directory in ("bin", "etc", "proc", "sys", "dev", "tmp", "root"):
            _add(tar, directory, tarfile.DIRTYPE)
        _add(tar, "bin/busybox", content=Path(BUSYBOX).read_bytes())
        for applet in applets:
            if applet != "busybox":
                _add(tar, f"bin/{applet}", tarfile.SYMTYPE, link="busybox")
        for name, content in files.items():
            _add(tar, name, content=content)
    return out.getvalue()


def docker_archive(command: list[str], name: str) -> bytes:
    """The same as an image that `ctr image import` takes."""
    layer = root_tar()
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        _add(tar, f"{digest}/layer.tar", content=layer)
        _add(tar, config_name, content=config)
        _add(tar, "manifest.json", content=json.dumps(manifest).encode())
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    info.mode = 0o755
    tar.addfile(info, io.BytesIO(content))
