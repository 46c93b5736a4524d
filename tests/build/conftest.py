"""A bundle for all tests here, made once by what `make binaries` calls, and again only when a source has changed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hosts
from tests.build.places import Chroot, Tree
from tests.hosts import ROOT, Host


@pytest.fixture(scope="session")
def bundle() -> Path:
    """A copy of out/bundle that stays as it is while others work in out/."""
    subprocess.run([sys.executable, "-I", str(ROOT / "build/bundle.py")], check=True)
    copy = hosts.scratch() / "bundle"
    lock = os.open(ROOT / "out", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["cp", "-a", "--reflink=auto", str(ROOT / "out/bundle"), str(copy)], check=True)
    finally:
        os.close(lock)
    return copy


@pytest.fixture(scope="session")
def launcher() -> Path:
    """The launcher, as `make launcher` makes it."""
    path = hosts.scratch() / "launcher"
    subprocess.run(["make", "-s", "launcher", f"LAUNCHER={path}"], cwd=ROOT, check=True)
    return path


@pytest.fixture
def tree(bundle: Path, launcher: Path, tmp_path: Path) -> Tree:
    """A repository with a bundle that was just made."""
    return Tree.make(tmp_path / "repository", bundle, launcher)


@pytest.fixture(scope="session")
def packages(bundle: Path, launcher: Path) -> tuple[Path, Path]:
    """Two versions of the package: 0.0.9-1 and 1.0.0-1."""
    root = hosts.scratch() / "packages"
    tree = Tree.make(root, bundle, launcher)
    found = (tree.package("0.0.9-1"), tree.package("1.0.0-1"))
    shutil.rmtree(tree.root / "out/bundle")
    return found


@pytest.fixture
def chroot() -> Iterator[Chroot]:
    """This machine's file system, in a state of its own: what is written there is gone with the test."""
    with Host(plugins=False) as host:
        yield Chroot.machine(host)
