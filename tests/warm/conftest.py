"""The launcher, built as `make launcher` builds it; with NETLOOM_SANITIZE=1 under the sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts import ROOT
from tests.warm.launch import Bench


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launcher") / "launcher"
    target = "launcher-sanitized" if os.environ.get("NETLOOM_SANITIZE") == "1" else "launcher"
    done = subprocess.run(
        ["make", "-s", target, f"LAUNCHER={path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "the compiler has something to say"
    return path


@pytest.fixture
def bench(tmp_path: Path, launcher: Path) -> Bench:
    return Bench(tmp_path, launcher)
