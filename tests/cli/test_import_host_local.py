"""`netloom ip import host-local` against a real ipamd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cni.ipam.address_files import AddressFiles, Place
from cni.living import boot_id
from tests.cli.conftest import Ipamd, Netloom, Ran

FILES = {
    "10.1.0.2": b"one\r\neth0",
    "10.1.0.7": b"two\r\neth0",
    "fd00:1::2": b"one\r\neth0",
    "fd00:1::9": b"two\r\neth0",
    "last_reserved_ip.0": b"10.1.0.7",
    "lock": b"",
}
IPAM: dict[str, Any] = {"type": "host-local", "subnet": "10.1.0.0/24", "ranges": [[{"subnet": "fd00:1::/64"}]]}


class Data:
    """A data directory with the network "net"."""

    def __init__(self, top: Path, netloom: Netloom) -> None:
        self.top = top
        self.net = top / "net"
        self.net.mkdir(parents=True)
        self.netloom = netloom
        self.put(FILES)
        self.conf = top.parent / "10-net.conflist"
        self.write_conf(IPAM)

    def put(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (self.net / name).write_bytes(content)

    def write_conf(self, ipam: dict[str, Any]) -> None:
        plugins = [{"type": "tuning"}, {"type": "bridge", "ipam": ipam}]
        self.conf.write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": plugins}))

    def run(self, *words: str) -> Ran:
        return self.netloom("ip", "import", "host-local", "--data-dir", str(self.top), *words)

    def outcomes(self, *words: str, status: int = 0) -> dict[str, str]:
        ran = self.run("--json", *words)
        assert ran.status == status, ran
        return {
            entry["container_id"] or entry["addresses"][0]: f"{entry['outcome']} {entry['reason']}".strip()
            for entry in json.loads(ran.out)["attachments"]
        }

    def held(self) -> dict[str, list[str]]:
        found = json.loads(self.netloom("ip", "list", "--json").out)["allocations"]
        return {one["container_id"]: sorted(address["address"] for address in one["addresses"]) for one in found}


@pytest.fixture
def data(tmp_path: Path, ipamd: Ipamd, netloom: Netloom) -> Data:
    assert ipamd.process.poll() is None
    return Data(tmp_path / "networks", netloom)


ALL = {"one": ["10.1.0.2", "fd00:1::2"], "two": ["10.1.0.7", "fd00:1::9"]}


def test_with_a_configuration_and_again(data: Data) -> None:
    conf = ("--conf", str(data.conf))
    assert data.outcomes(*conf) == {"one": "imported", "two": "imported"}
    assert data.held() == ALL
    assert data.outcomes(*conf) == {"one": "present", "two": "present"}
    assert data.outcomes() == {"one": "present", "two": "present"}  # its pool is there now
    assert data.held() == ALL
    assert {file.name for file in data.net.iterdir()} == set(FILES)


def test_remove_takes_away_what_ipamd_has(data: Data) -> None:
    data.put({"10.1.0.50": b"old", "10.1.0.51": b"", "10.1.0.52": b"one\r\neth1\r\n"})
    ran = data.run("--conf", str(data.conf), "--remove")
    assert ran.status == 1
    assert "names no interface" in ran.out
    assert "give 2 addresses, it has 1" in ran.out
    assert "empty and nobody's: 10.1.0.51" in ran.out
    assert "imported 2 attachments, 0 were there already, 2 were left" in ran.out
    assert sorted(file.name for file in data.net.glob("1*")) == ["10.1.0.50", "10.1.0.51", "10.1.0.52"]
    assert data.held() == ALL


def test_named_pools(data: Data) -> None:
    assert data.netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24", "--subnet", "fd00:1::/64").status == 0
    assert data.outcomes("--pool", "blue", "--network", "net") == {"one": "imported", "two": "imported"}
    assert data.held() == ALL
    data.write_conf({"type": "ipamd", "pool": "blue"})
    assert data.outcomes("--conf", str(data.conf)) == {"one": "present", "two": "present"}


def test_what_cannot_be_taken_is_left_and_named(data: Data, ipamd: Ipamd) -> None:
    assert data.netloom("pool", "create", "blue", "--subnet", "10.1.0.0/24", "--subnet", "fd00:1::/64").status == 0
    ipamd.allocate("somebody", "blue")  # 10.1.0.2 and fd00:1::2
    data.put({"10.2.0.9": b"three\r\neth0", "fd00:1::30": b"three\r\neth0", "10.1.0.30": b"four\r\neth0"})
    outcomes = data.outcomes("--pool", "blue", "--remove", status=1)
    assert outcomes["two"] == "imported"
    assert outcomes["one"].startswith("left ")
    assert "somebody" in outcomes["one"]
    assert "10.2.0.9" in outcomes["three"]
    assert outcomes["four"] == "left ipamd's pools give 2 addresses, it has 1"
    assert set(data.held()) == {"somebody", "two"}
    assert sorted(file.name for file in data.net.glob("1*")) == ["10.1.0.2", "10.1.0.30", "10.2.0.9"]


def test_no_pool_yet(data: Data) -> None:
    outcomes = data.outcomes(status=1)
    assert "--conf" in outcomes["one"]
    assert data.held() == {}


def test_files_that_are_none(data: Data) -> None:
    (data.net / "10.1.0.40").symlink_to("/etc/passwd")
    assert "no plain file" in data.outcomes("--conf", str(data.conf), status=1)["10.1.0.40"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("--conf", "{conf}", "--pool", "x"), 2, "--pool does not go with it"),
        (("--conf", "{conf}", "--network", "other"), 2, "is of network net"),
        (("--conf", "/nonexistent"), 2, "cannot read /nonexistent"),
        (("--network", "other"), 1, "there is no"),
        (("--network", "../net"), 2, "is no name of a network"),
        (("--data-dir", "/nonexistent"), 1, "--data-dir"),
    ],
)
def test_wrong_use(data: Data, words: tuple[str, ...], status: int, text: str) -> None:
    ran = data.run(*(word.replace("{conf}", str(data.conf)) for word in words))
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err


@pytest.mark.parametrize("content", ["", "[]", '{"name": 5}', '{"name": "net"}', '{"name": "n", "plugins": 5}'])
def test_a_configuration_that_is_none(data: Data, content: str) -> None:
    data.conf.write_text(content)
    ran = data.run("--conf", str(data.conf))
    assert (ran.status, ran.out) == (2, "")
    assert str(data.conf) in ran.err


def test_the_namespace_that_our_host_local_knows_goes_along(data: Data, scratch: Path) -> None:
    with AddressFiles(str(data.net), str(scratch)) as files:
        for name in ("10.1.0.7", "fd00:1::9"):
            files.remember(name, Place(b"two\r\neth0", boot_id(), "/run/netns/two", 4026539999, 77))
    data.outcomes("--conf", str(data.conf))
    found = json.loads(data.netloom("ip", "list", "--json").out)["allocations"]
    netns = {one["container_id"]: one["netns"] for one in found}
    assert netns["two"] == {"path": "/run/netns/two", "inode": 4026539999, "cookie": 77}
    assert netns["one"] == {"path": "", "inode": 0, "cookie": 0}
