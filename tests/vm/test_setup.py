"""build/setup and the kernel: fetched from apt, unpacked below out/, never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import ROOT

APT_GET = """#!/bin/sh
echo "$*" >>"$SEEN"
case "$*" in
*download*linux-image-1.2-test*) [ -e "$PACKAGE" ] && grep -q update "$SEEN" && cp "$PACKAGE" . ;;
*download*) exit 1 ;;
esac
"""
APT_CACHE = """#!/bin/sh
printf 'linux-image-amd64\\n  Depends: linux-image-1.2-test\\n'
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Our scripts with an environment that is ready, and an apt that has nothing, or one package."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "build", root / "build", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\ndependencies = []\n[dependency-groups]\ndev = []\n'
    )
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    argv = [sys.executable, "-I", "build/requirements.py", "stamp"]
    stamp = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True).stdout
    (root / ".venv/netloom.stamp").write_text(stamp)
    (tmp_path / "fake").mkdir()
    for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE)):
        (tmp_path / "fake" / name).write_text(text)
        (tmp_path / "fake" / name).chmod(0o755)
    return root


def set_up(clone: Path) -> str:
    env = {
        **os.environ,
        "PATH": f"{clone.parent / 'fake'}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "SEEN": str(clone.parent / "seen"),
        "PACKAGE": str(clone.parent / "package.deb"),
        "NETLOOM_PYTHON": sys.executable,
    }
    argv = ["sh", "build/setup", "vm"]
    return subprocess.run(argv, cwd=clone, env=env, capture_output=True, text=True, check=True).stderr


def test_without_one_the_setup_goes_on_and_says_so(clone: Path) -> None:
    assert "no kernel could be had from apt" in set_up(clone)
    assert [path.name for path in (clone / "out").iterdir()] == ["setup.log"]


def test_it_is_unpacked_and_not_installed(clone: Path) -> None:
    package = clone.parent / "package"
    control = "Package: linux-image-1.2-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"
    for name, text in (
        ("DEBIAN/control", control),
        ("DEBIAN/postinst", "#!/bin/sh\ntouch /boot/installed\n"),
        ("boot/vmlinuz-1.2-test", "kernel"),
        ("lib/modules/1.2-test/kernel/fs/9p/9p.ko", ""),
        ("lib/modules/1.2-test/kernel/drivers/gpu/gpu.ko", ""),
        ("usr/share/doc/linux/copyright", ""),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "DEBIAN/postinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", package, f"{package}.deb"], check=True, capture_output=True)
    before = sorted(os.listdir("/boot"))
    assert set_up(clone) == "setup: unpacking Debian's kernel into out/vm\n"
    there = {str(path.relative_to(clone / "out/vm")) for path in (clone / "out/vm").rglob("*") if path.is_file()}
    assert {"boot/vmlinuz-1.2-test", "lib/modules/1.2-test/kernel/fs/9p/9p.ko"} < there
    assert "lib/modules/1.2-test/modules.dep" in there
    assert not [name for name in there if name.endswith(".deb") or "gpu" in name or name.startswith("usr")]
    assert sorted(os.listdir("/boot")) == before
    seen = (clone.parent / "seen").read_text().splitlines()
    assert [line.split()[-1] for line in seen] == ["linux-image-1.2-test", "update", "linux-image-1.2-test"]
    assert set_up(clone) == "", "once is enough"
