"""`netloom attach` and `detach`: what they refuse before anything happens. tests/docker shows what they do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.failure import Status
from tests.cli.conftest import Netloom


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As root sees it, on a host without Docker and podman."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("libnetwork.docker.SOCKET", str(tmp_path / "docker.sock"))


def test_only_root_may(netloom: Netloom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (("attach", "--network", "lan", "web"), ("detach", "web")):
        ran = netloom(*words)
        assert (ran.status, ran.out) == (Status.NOT_PERMITTED, "")
        assert "only root may" in ran.err


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("web",), Status.USAGE, "Missing option '--network'"),
        (("--network", "lan"), Status.USAGE, "Missing argument"),
        (("--network", "lan", "--ip", "ten", "web"), Status.USAGE, "--ip ten: "),
        (("--network", "lan", "--ip", "10.1.0.7/33", "web"), Status.USAGE, "--ip 10.1.0.7/33: "),
        (("--network", "lan", "--gateway", "10.1.0.1/24", "web"), Status.USAGE, "--gateway 10.1.0.1/24: "),
        (("--network", "lan", "--mac", "02:00", "web"), Status.USAGE, "--mac 02:00: wanted six pairs"),
        (("--network", "lan", "a/b"), Status.USAGE, "a/b: wanted the name of a container, a process id, or the path"),
        (("--network", "lan", "web"), Status.FAILED, "web: no running container of Docker's or podman's"),
        (("--network", "lan", "4194999"), Status.FAILED, "/proc/4194999/ns/net: there is no such namespace"),
        (("--network", "lan", "/nonexistent"), Status.FAILED, "/nonexistent: there is no such namespace"),
    ],
)
def test_what_cannot_be_is_refused(netloom: Netloom, words: tuple[str, ...], status: int, said: str) -> None:
    ran = netloom("attach", *words)
    assert (ran.status, ran.out) == (status, "")
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.usefixtures("root")
def test_detach_of_what_was_never_attached(netloom: Netloom) -> None:
    ran = netloom("detach", "web")
    assert (ran.status, ran.out) == (Status.FAILED, "")
    assert "nothing that attach made for web is there" in ran.err
