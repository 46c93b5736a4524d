"""host-local: ours alone, and beside Debian's on one data directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.ipam import address_files
from cni.versions import SUPPORTED, at_least
from tests.cni.ipam.network import DEBIANS, Answer, Network, finish
from tests.cni.lab import Lab, net
from tests.hosts import CNI_BIN, ROOT

needs_debians = pytest.mark.skipif(not os.path.exists(DEBIANS), reason="no containernetworking-plugins here")
Side = Literal["ours", "debians"]


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path)


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each index that is built anew."""
    seen: list[str] = []
    real = address_files.AddressFiles._rebuild

    def counted(self: address_files.AddressFiles) -> None:
        seen.append(self.path)
        real(self)

    monkeypatch.setattr(address_files.AddressFiles, "_rebuild", counted)
    return seen


# The verbs


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb_in_every_version(tmp_path: Path, version: str) -> None:
    ipam = {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    network = Network(tmp_path, ipam, version)
    answer = network.ours("ADD")
    assert answer.code == 0
    if at_least(version, "0.3.0"):
        assert answer.addresses == ["10.9.0.2", "fd00:9::2"]
        assert [ip["gateway"] for ip in answer.json["ips"]] == ["10.9.0.1", "fd00:9::1"]
        assert answer.json["routes"] == [{"dst": "0.0.0.0/0"}]
    else:
        assert (answer.json["ip4"]["ip"], answer.json["ip6"]["ip"]) == ("10.9.0.2/24", "fd00:9::2/64")
    assert network.files() == {
        "10.9.0.2": b"c1\r\neth0",
        "fd00:9::2": b"c1\r\neth0",
        "last_reserved_ip.0": b"10.9.0.2",
        "last_reserved_ip.1": b"fd00:9::2",
    }
    assert stat.S_IMODE((network.directory / "10.9.0.2").stat().st_mode) == 0o600
    check = network.ours("CHECK", keys={"prevResult": answer.json})
    assert check.code == (0 if at_least(version, "0.4.0") else 1)
    valid = [{"containerID": "c1", "ifname": "eth0"}]
    for verb in ("GC", "STATUS"):
        assert network.ours(verb, keys={"cni.dev/valid-attachments": valid}).code == (0 if version == "1.1.0" else 1)
    assert sorted(network.held()) == ["10.9.0.2", "fd00:9::2"]
    for _ in range(2):
        assert network.ours("DEL", keys={"prevResult": answer.json}).json is None
    assert network.held() == {}


def test_what_the_configuration_adds(network: Network, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(
        "# nameserver 192.0.2.1\n ; x\nnameserver 192.0.2.2\nnameserver fe80::1%eth0\ndomain d\nsearch a b\n"
        "search c\noptions ndots:2 edns0\nnameserver\nfoo bar\n"
    )
    route = {
        "dst": "192.0.2.0/24",
        "gw": "10.9.0.9",
        "mtu": 1400,
        "advmss": 1300,
        "priority": 5,
        "table": 7,
        "scope": 0,
    }
    network.ipam |= {"resolvConf": str(tmp_path / "resolv.conf"), "routes": [route]}
    network.version = "1.1.0"
    answer = network.ours("ADD").json
    assert answer["routes"] == [route]
    assert answer["dns"] == {
        "nameservers": ["192.0.2.2", "fe80::1%eth0"],
        "domain": "d",
        "search": ["a", "b", "c"],
        "options": ["ndots:2", "edns0"],
    }


@pytest.mark.parametrize(
    ("ipam", "more", "args", "code", "words"),
    [
        ({}, {}, "", 7, "no IP ranges specified"),
        ({"subnet": "10.9.0.5/24"}, {}, "", 7, "Network has host bits set"),
        ({"subnet": "10.9.0.4/31"}, {}, "", 7, "too small to allocate from"),
        ({"ranges": [[]]}, {}, "", 7, "empty range set"),
        ({"ranges": [[{}]]}, {}, "", 7, "$.ipam.ranges[0][0]"),
        ({"ranges": [[{"subnet": 5}]]}, {}, "", 7, "$.ipam.ranges[0][0].subnet: expected str, found 5"),
        ({"subnet": "10.9.0.0/24", "ranges": [[{"subnet": "10.9.0.0/25"}]]}, {}, "", 7, "range set 0 overlaps with 1"),
        ({"subnet": "10.9.0.0/24", "routes": [{"dst": "x"}]}, {}, "", 7, "$.ipam.routes[0].dst"),
        ({"subnet": "10.9.0.0/24", "resolvConf": "/nonexistent"}, {}, "", 7, "$.ipam.resolvConf"),
        ({"subnet": "10.9.0.0/24", "dataDir": "data"}, {}, "", 7, "$.ipam.dataDir"),
        ({"subnet": "10.9.0.0/24"}, {"runtimeConfig": {"ips": ["x"]}}, "", 7, "cannot understand ip"),
        ({"subnet": "10.9.0.0/24"}, {"args": {"cni": {"ips": ["10.9.0.9/99"]}}}, "", 7, "cannot understand ip"),
        ({"subnet": "10.9.0.0/24"}, {}, "IP=10.8.0.9", 7, "failed to allocate all requested IPs: 10.8.0.9"),
        ({"subnet": "10.9.0.0/24"}, {}, "IP=10.9.0.1", 7, "requested ip 10.9.0.1 is subnet's gateway"),
        ({"subnet": "10.9.0.0/24"}, {"runtimeConfig": {"ips": ["10.9.0.8", "10.9.0.9"]}}, "", 7, "10.9.0.9"),
        ({"subnet": "10.9.0.0/24"}, {}, "FOO=1", 4, "unknown args"),
        ({"subnet": "10.9.0.0/24"}, {"ipam": None}, "", 7, "missing 'ipam' key"),
    ],
)
def test_bad_input_is_named_and_takes_nothing(
    network: Network, ipam: dict[str, Any], more: dict[str, Any], args: str, code: int, words: str
) -> None:
    network.ipam = ipam
    answer = network.ours("ADD", "c1", args, keys=more)
    assert answer.code == code
    assert words in answer.json["msg"]
    assert network.held() == {}
    assert network.ours("DEL", "c1", args, keys=more).code == 0
    if not args and "ips" not in str(more):
        network.version = "1.1.0"
        assert network.ours("STATUS", keys=more).code == code


def test_requested_addresses_of_all_places_count(network: Network) -> None:
    network.ipam = {"ranges": [[{"subnet": f"10.{n}.0.0/24"}] for n in (1, 2, 3)] + [[{"subnet": "fd00::/64"}]]}
    more = {"runtimeConfig": {"ips": ["fd00:0::9"]}, "args": {"cni": {"ips": ["10.2.0.9/16", "10.3.0.9"]}}}
    answer = network.ours("ADD", "c1", "IP=10.3.0.9;MAC=0a:00:00:00:00:01", keys=more)
    assert answer.addresses == ["10.1.0.2", "10.2.0.9", "10.3.0.9", "fd00::9"]
    taken = network.ours("ADD", "c2", keys=more)
    assert taken.code == 101
    assert "requested IP address 10.2.0.9 is not available in range set 10.2.0.1-10.2.0.254" in taken.text
    assert 'belongs to "c1, eth0"' in taken.text
    assert set(network.held().values()) == {b"c1\r\neth0"}  # what c2 had got of the first set is free again


def test_ranges_of_the_runtime_come_first(network: Network) -> None:
    network.ipam |= {"ranges": [[{"subnet": "fd00::/64"}]]}
    more = {"runtimeConfig": {"ipRanges": [[{"Subnet": "10.1.0.0/24", "RangeStart": "10.1.0.7"}]]}}
    assert network.ours("ADD", keys=more).addresses == ["10.1.0.7", "10.9.0.2", "fd00::2"]


def test_exhausted(network: Network) -> None:
    network.ipam = {"subnet": "10.9.0.0/29"}
    assert [network.ours("ADD", f"c{n}").addresses for n in range(5)] == [[f"10.9.0.{n}"] for n in range(2, 7)]
    answer = network.ours("ADD", "c9")
    assert answer.code == 100
    assert "no IP addresses available in range set: 10.9.0.1-10.9.0.6" in answer.text
    network.version = "1.1.0"
    status = network.ours("STATUS")
    assert status.code == 50
    assert "no IP addresses available" in status.text
    network.ours("DEL", "c2")
    assert network.ours("STATUS").code == 0
    assert network.ours("ADD", "c9").addresses == ["10.9.0.4"]


def test_a_second_add_is_refused_and_leaves_the_first(network: Network) -> None:
    network.ipam |= {"ranges": [[{"subnet": "fd00::/64"}]]}
    network.ours("ADD")
    before = network.files()
    for args in ("", "IP=10.9.0.9"):
        answer = network.ours("ADD", args=args)
        assert answer.code == 4
        assert "10.9.0.2 has been allocated to c1, duplicate allocation is not allowed" in answer.text
    assert network.files() == before
    assert network.ours("ADD", ifname="eth1").addresses == ["10.9.0.3", "fd00::3"]
    network.ours("DEL")
    assert sorted(network.held()) == ["10.9.0.3", "fd00::3"]


def test_delete_needs_no_ranges(network: Network) -> None:
    network.ours("ADD")
    network.ipam = {"subnet": "10.99.0.5/31"}
    assert network.ours("DEL").code == 0
    assert network.held() == {}


def test_delete_check_and_gc_make_no_directory(network: Network) -> None:
    network.version = "1.1.0"
    assert network.ours("DEL").code == 0
    assert network.ours("CHECK").code == 999
    assert network.ours("GC", keys={"cni.dev/valid-attachments": []}).code == 0
    assert network.ours("STATUS").code == 0
    assert not network.directory.exists()


def test_check_compares_addresses(network: Network) -> None:
    network.version = "1.1.0"
    answer = network.ours("ADD").json
    network.ours("ADD", "c2")
    others = {"address": "192.0.2.1/24"}
    result = {**answer, "ips": [others, *answer["ips"]]}
    assert network.ours("CHECK", keys={"prevResult": result}).code == 0
    wrong = {**answer, "ips": [{"address": "10.9.0.3/28"}]}
    check = network.ours("CHECK", keys={"prevResult": wrong})
    assert check.code == 999
    assert "address 10.9.0.3 does not belong to container c1" in check.text
    assert 'belongs to "c2, eth0"' in check.text
    (network.directory / "10.9.0.2").unlink()
    assert "Failed to find address added by container c1" in network.ours("CHECK", keys={"prevResult": answer}).text


def test_gc_frees_what_is_not_in_the_list(network: Network) -> None:
    network.version = "1.1.0"
    for cid in ("c1", "c2", "c3"):
        network.ours("ADD", cid)
    network.ours("ADD", "c1", ifname="eth1")
    network.put({"10.9.0.9": b"", "10.9.0.10": b" c1 ", "10.9.0.11": b"gone", "10.9.0.12": b"kept for the printer"})
    valid = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c3", "ifname": "eth0"}]
    answer = network.ours("GC", keys={"cni.dev/valid-attachments": valid})
    assert answer.code == 0
    assert sorted(network.held()) == ["10.9.0.10", "10.9.0.12", "10.9.0.2", "10.9.0.4"]
    assert {"lock", "last_reserved_ip.0"} <= set(os.listdir(network.directory))
    assert network.ours("ADD", "c4").addresses == ["10.9.0.6"]


def test_files_of_old_versions_belong_to_any_interface(network: Network) -> None:
    network.put({"10.9.0.5": b"c1", "10.9.0.6": b"c1\r\neth1"})
    assert "10.9.0.5 has been allocated to c1" in network.ours("ADD").text
    network.ours("DEL", ifname="eth1")
    assert sorted(network.held()) == ["10.9.0.5"]
    network.ours("DEL", ifname="eth1")
    assert network.held() == {}


def test_empty_files_are_used_when_nothing_else_is_left(network: Network) -> None:
    network.ipam = {"subnet": "10.9.0.0/29"}
    network.version = "1.1.0"
    network.put({"10.9.0.3": b"", "10.9.0.4": b"\n", "10.9.0.1": b""})
    assert [network.ours("ADD", f"c{n}").addresses for n in range(3)] == [["10.9.0.2"], ["10.9.0.5"], ["10.9.0.6"]]
    assert network.ours("STATUS").code == 0
    assert network.ours("ADD", "c3").addresses == ["10.9.0.3"]
    assert network.ours("ADD", "c4").addresses == ["10.9.0.4"]
    assert network.ours("ADD", "c5").code == 100
    assert network.ours("STATUS").code == 50
    network.put({"10.9.0.4": b""})  # written in place
    network.ours("GC", keys={"cni.dev/valid-attachments": [{"containerID": "c3", "ifname": "eth0"}]})
    assert sorted(network.held()) == ["10.9.0.3"]


def test_a_requested_address_whose_file_is_empty(network: Network) -> None:
    network.put({"10.9.0.5": b""})
    assert network.ours("ADD", args="IP=10.9.0.5").addresses == ["10.9.0.5"]


# The index


def test_the_number_of_taken_addresses_does_not_matter(
    network: Network, rebuilt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network.ipam = {"subnet": "10.0.0.0/16"}
    calls: list[str] = []
    real = os.open

    def counted(path: Any, *args: Any, **more: Any) -> int:
        calls.append(str(path))
        return real(path, *args, **more)

    def cost() -> int:
        network.ours("ADD", "warm-up")
        network.ours("DEL", "warm-up")
        calls.clear()
        rebuilt.clear()
        with monkeypatch.context() as watched:
            watched.setattr(os, "open", counted)
            watched.setattr(os, "listdir", None)
            codes = [network.ours(verb, "x").code for verb in ("ADD", "CHECK", "DEL")]
        assert (codes, rebuilt) == ([0, 0, 0], [])
        return len(calls)

    network.put({f"10.0.0.{n}": b"old" for n in range(2, 12)})
    few = cost()
    network.put({f"10.0.{n >> 8}.{n & 255}": b"old%d\r\neth0" % n for n in range(2, 2000)})
    network.put({"last_reserved_ip.0": b"10.0.0.1"})  # the next free one is behind all of them
    assert cost() == few


def test_lost_or_damaged_index(network: Network) -> None:
    network.ours("ADD", "c1")
    (database,) = network.run_dir.glob("host-local/*.db")
    database.write_bytes(os.urandom(len(database.read_bytes())))  # and the stamp is as it was
    assert network.ours("ADD", "c2").addresses == ["10.9.0.3"]
    shutil.rmtree(network.run_dir)
    network.ours("DEL", "c1")
    assert sorted(network.held()) == ["10.9.0.3"]
    shutil.rmtree(network.run_dir)
    network.run_dir.touch()  # nothing can be kept
    assert network.ours("ADD", "c3").addresses == ["10.9.0.4"]
    network.ours("DEL", "c2")
    assert sorted(network.held()) == ["10.9.0.4"]


def test_an_index_that_is_wrong_in_spite_of_its_stamp(network: Network) -> None:
    network.ours("ADD", "c1")
    (base,) = (str(file)[:-3] for file in network.run_dir.glob("host-local/*.db"))
    shutil.copy(f"{base}.db", f"{base}.old")
    network.ours("ADD", "c2")
    shutil.copy(f"{base}.old", f"{base}.db")  # knows nothing of c2
    assert network.ours("ADD", "c3").addresses == ["10.9.0.4"]
    shutil.copy(f"{base}.old", f"{base}.db")
    network.ours("ADD", "c2")
    assert set(network.held().values()) >= {b"c1\r\neth0", b"c3\r\neth0"}
    assert len(network.held()) in (3, 4)


def test_a_restored_backup_is_noticed(network: Network, tmp_path: Path) -> None:
    network.ours("ADD", "c1")
    subprocess.run(["cp", "-a", str(network.directory), str(tmp_path / "backup")], check=True)
    network.ours("ADD", "c2")
    network.ours("DEL", "c1")
    # In place, as rsync does it: with the directory's old modification time, under its old inode.
    for file in network.directory.iterdir():
        file.unlink()
    subprocess.run(["cp", "-a", f"{tmp_path}/backup/.", str(network.directory)], check=True)
    assert "10.9.0.2 has been allocated to c1" in network.ours("ADD", "c1").text
    assert network.ours("ADD", "c3").addresses == ["10.9.0.3"]


def test_a_file_that_somebody_wrote_into_is_not_its_old_owners(network: Network) -> None:
    network.ours("ADD", "c1")
    (network.directory / "10.9.0.2").write_bytes(b"c2\r\neth0")
    network.ours("DEL", "c1")
    assert network.held() == {"10.9.0.2": b"c2\r\neth0"}
    network.ours("DEL", "c2")
    assert network.held() == {}


# A directory as nobody should leave it


def test_hostile_directory(network: Network, tmp_path: Path) -> None:
    network.ipam = {"subnet": "10.9.0.0/24"}
    network.version = "1.1.0"
    victim = tmp_path / "victim"
    victim.write_bytes(b"c1\r\neth0")
    directory = network.directory
    network.put(
        {
            "10.9.0.7": b"\xff\xfe\0garbage",
            "10.9.0.8": b"c1\neth0",
            "10.9.0.9": b"x" * 200_000,
            "10.9.000.10": b"c1\r\neth0",
            "notes.txt": b"c1\r\neth0",
        }
    )
    (directory / "10.9.0.2").symlink_to(victim)
    (directory / "10.9.0.3").symlink_to("/nonexistent")
    (directory / "10.9.0.4").mkdir()
    (directory / "10.9.0.4" / "10.9.0.50").write_bytes(b"c1\r\neth0")
    os.mkfifo(directory / "10.9.0.5")
    (directory / "last_reserved_ip.0").symlink_to(victim)
    before = sorted(os.listdir(directory))
    assert network.ours("ADD").addresses == ["10.9.0.6"]
    assert network.ours("ADD", "c2").addresses == ["10.9.0.10"]
    assert network.ours("CHECK").code == 0
    assert network.ours("STATUS").code == 0
    assert network.ours("DEL").code == 0
    assert network.ours("DEL", "c2").code == 0
    answer = network.ours("GC", keys={"cni.dev/valid-attachments": []})
    assert answer.code == 0
    assert victim.read_bytes() == b"c1\r\neth0"
    assert sorted(os.listdir(directory)) == sorted([*before, "lock"])
    for name in ("10.9.0.2", "10.9.0.4", "10.9.0.5"):
        assert network.ours("ADD", args=f"IP={name}").code == 101


@pytest.mark.parametrize("lock", ["link", "directory"])
def test_a_lock_that_is_none(network: Network, tmp_path: Path, lock: str) -> None:
    network.version = "1.1.0"
    network.put({})
    if lock == "link":
        (network.directory / "lock").symlink_to(tmp_path / "elsewhere")
    else:
        (network.directory / "lock").mkdir()
    assert network.ours("ADD").code == 5
    assert str(network.directory) in network.ours("ADD").text
    assert network.ours("STATUS").code == 50
    assert not (tmp_path / "elsewhere").exists()


def test_a_data_directory_that_is_none(network: Network) -> None:
    network.version = "1.1.0"
    (network.top / "data").write_text("")
    assert network.ours("ADD").code == 5
    assert network.ours("STATUS").code == 50


def test_garbage_as_last_reserved(network: Network) -> None:
    network.put({"last_reserved_ip.0": b"\xff\0"})
    assert network.ours("ADD").addresses == ["10.9.0.2"]
    network.put({"last_reserved_ip.0": b"10.9.0.14"})  # the end of the range: round it goes
    assert network.ours("ADD", "c2").addresses == ["10.9.0.3"]
    (network.directory / "last_reserved_ip.0").unlink()
    (network.directory / "last_reserved_ip.0").mkdir()
    assert network.ours("ADD", "c3").addresses == ["10.9.0.4"]


def test_without_unnamed_files(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what an old kernel makes of it: EISDIR
    assert network.ours("ADD").addresses == ["10.9.0.2"]
    network.put({"10.9.0.3": b"x"})
    assert network.ours("ADD", "c2").addresses == ["10.9.0.4"]
    assert network.held()["10.9.0.4"] == b"c2\r\neth0"


def test_the_lock_is_waited_for_and_named(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl  # noqa: PLC0415 - only here

    network.ours("ADD")
    monkeypatch.setattr(address_files, "LOCK_DEADLINE_S", 0.05)
    monkeypatch.setattr(address_files.AddressFiles.__init__, "__kwdefaults__", {"create": False, "deadline_s": 0.05})
    with (network.directory / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = network.ours("ADD", "c2")
    assert answer.code == 11
    assert f"somebody else holds {network.directory}/lock" in answer.text
    assert network.ours("ADD", "c2").code == 0


# An ADD that ends half way


def crash(network: Network, verb: str, cid: str, number: int) -> int:
    """The exit status, -9 where it was killed before its n-th call."""
    argv = [sys.executable, "-m", "tests.cni.ipam.crash", str(number)]
    with network.start(argv, verb, cid) as process:
        finish(process)
        return process.returncode


@pytest.mark.parametrize("verb", ["ADD", "DEL"])
def test_killed_anywhere_both_go_on(network: Network, verb: str) -> None:
    network.ipam = {"subnet": "10.9.0.0/24"}
    sides: list[Callable[..., Answer]] = [network.ours]
    if os.path.exists(DEBIANS):
        sides.append(network.debians)
    network.ours("ADD", "stays")
    number, killed = 0, 0
    while True:
        number += 1
        cid = f"c{number}"
        if verb == "DEL":
            sides[number % len(sides)]("ADD", cid)
        status = crash(network, verb, cid, number)
        held = network.held()
        assert b"" not in held.values()
        assert len(held) == len(set(held.values()))
        # Who comes next, of either kind, gets an address of his own, and frees what the dead one may have left.
        next_one = sides[number % len(sides)]("ADD", f"n{number}").addresses[0]
        assert next_one not in held
        assert sides[(number + 1) % len(sides)]("DEL", cid).code == 0
        assert network.ours("DEL", f"n{number}").code == 0
        assert list(network.held().values()) == [b"stays\r\neth0"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert killed > 15


def test_a_failing_add_leaves_the_index_right(network: Network, rebuilt: list[str]) -> None:
    network.ipam = {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "10.8.0.0/30"}]]}
    network.ours("ADD", "c1")
    rebuilt.clear()
    for _ in range(3):
        assert network.ours("ADD", "c2").code == 100
    assert list(network.held().values()) == [b"c1\r\neth0"] * 2
    assert rebuilt == []


def test_what_cannot_be_delivered_is_given_back(network: Network) -> None:
    network.version = "0.2.0"
    network.ipam = {"subnet": "10.9.0.0/24"}
    stdin = json.dumps(network.conf()).encode()
    program = [sys.executable, "-m", "cni", "host-local"]
    environment = {**network.environment("ADD", "c1"), "PATH": os.defpath}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(program, cwd=ROOT, env=environment, input=stdin, stdout=full, check=False)
    assert done.returncode == 1
    assert network.held() == {}
    assert "last_reserved_ip.0" in network.files()


# Beside Debian's


@needs_debians
def test_each_respects_the_other(network: Network) -> None:
    assert network.ours("ADD", "c1").addresses == ["10.9.0.2"]
    assert network.debians("ADD", "c2").addresses == ["10.9.0.3"]
    assert "has been allocated to c1" in network.debians("ADD", "c1").text
    assert "has been allocated to c2" in network.ours("ADD", "c2").text
    assert network.debians("CHECK", "c1").code == 0
    assert network.ours("CHECK", "c2").code == 0
    assert network.ours("ADD", "c3", "IP=10.9.0.3").code == 101
    assert "is not available" in network.debians("ADD", "c3", "IP=10.9.0.2").text
    assert network.debians("DEL", "c1").code == 0
    assert network.ours("DEL", "c2").code == 0
    assert network.held() == {}


IPAMS: list[dict[str, Any]] = [
    {"subnet": "10.9.0.0/29"},
    {"subnet": "10.9.0.0/28", "gateway": "10.9.0.6", "rangeStart": "10.9.0.4", "rangeEnd": "10.9.0.8"},
    {"ranges": [[{"subnet": "10.9.0.0/30"}, {"subnet": "10.9.1.0/29", "gateway": "10.9.1.6"}]]},
    {"ranges": [[{"subnet": "fd00::/125"}], [{"subnet": "10.9.0.0/29", "rangeStart": "10.9.0.0"}]]},
    {"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.9", "rangeEnd": "10.9.0.12", "gateway": "10.9.0.9"},
]
STEP = st.tuples(
    st.sampled_from(["ADD", "ADD", "ADD", "DEL", "DEL", "CHECK"]),
    st.integers(0, 7),
    st.sampled_from(["", "", "", "IP=10.9.0.5", "IP=10.9.0.6"]),
    st.sampled_from(["ours", "debians"]),
)


@needs_debians
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(IPAMS), st.lists(STEP, min_size=5, max_size=25))
def test_mixed_as_debians_alone(ipam: dict[str, Any], steps: list[tuple[str, int, str, Side]]) -> None:
    """The same requests to Debian's alone, to ours alone, and to both in turns: the same addresses and files."""
    with tempfile.TemporaryDirectory() as top:
        alone, mixed, own = (Network(Path(top, name), ipam) for name in ("alone", "mixed", "own"))
        present: set[str] = set()
        for verb, number, args, side in steps:
            cid = f"c{number}"
            # What differs is left out: the reference lets a second ADD pass where it requests an address, and takes
            # an address before it refuses one that is in no range.
            asked = args if verb == "ADD" and cid not in present and ipam in IPAMS[:2] else ""
            answers = [
                alone.debians(verb, cid, asked),
                mixed.ours(verb, cid, asked) if side == "ours" else mixed.debians(verb, cid, asked),
                own.ours(verb, cid, asked),
            ]
            if verb == "ADD" and answers[0].code == 0:
                present.add(cid)
                assert answers[0].addresses == answers[1].addresses == answers[2].addresses
            elif verb == "DEL":
                present.discard(cid)
            assert [bool(answer.code) for answer in answers] == [bool(answers[0].code)] * 3, (answers, verb, cid)
            assert alone.held() == mixed.held() == own.held()
            if alone.held():
                assert alone.files() == mixed.files() == own.files()


@needs_debians
def test_fifty_at_once_of_both_kinds(network: Network) -> None:
    network.ipam = {"subnet": "10.9.0.0/24", "ranges": [[{"subnet": "fd00::/64"}]]}

    def at_once(verb: str, kinds: list[list[str]]) -> list[Answer]:
        processes = [network.start(argv, verb, f"c{n}") for n, argv in enumerate(kinds)]
        return [finish(process) for process in processes]

    kinds: list[list[str]] = [[], [DEBIANS]] * 25
    answers = at_once("ADD", kinds)
    given = [address for answer in answers for address in answer.addresses]
    assert len(given) == len(set(given)) == 100
    assert network.held() == {
        address: f"c{number}\r\neth0".encode() for number, one in enumerate(answers) for address in one.addresses
    }
    assert {answer.code for answer in at_once("DEL", kinds[::-1])} == {0}
    assert network.held() == {}


# With containers


def local(**keys: Any) -> dict[str, Any]:
    return net(isGateway=True, ipam={"type": "host-local", "subnet": "10.8.0.0/24", **keys})


@pytest.fixture
def clean(lab: Lab) -> Any:
    """Removes what stays for a network's next container."""
    yield lab
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"), ignore_errors=True)
    shutil.rmtree(lab.host.path("/run/netloom/host-local"), ignore_errors=True)


@pytest.mark.kernel
@needs_debians
def test_over_and_back_with_containers(clean: Lab) -> None:
    foreign = clean.host.path(f"{CNI_BIN}/foreign")
    shutil.copy(DEBIANS, foreign)
    try:
        debians = net(isGateway=True, ipam={"type": "foreign", "subnet": "10.8.0.0/24"})
        with clean.attached(debians) as first, clean.attached(local()) as second:
            assert (first.addresses, second.addresses) == (["10.8.0.2/24"], ["10.8.0.3/24"])
            assert first.netns.ping("10.8.0.3") > 0
            first.conf, second.conf = second.conf, first.conf
            first.check()
            second.check()
            with clean.attached(debians) as third, clean.attached(local()) as fourth:
                assert (third.ip(), fourth.ip()) == ("10.8.0.4", "10.8.0.5")
            assert second.netns.ping("10.8.0.2") > 0
        # Each was deleted by the other's plugin.
        left = sorted(os.listdir(clean.host.path("/var/lib/cni/networks/net")))
        assert left == ["last_reserved_ip.0", "lock"]
    finally:
        foreign.unlink()


@pytest.mark.kernel
def test_gc_spares_what_lives(clean: Lab) -> None:
    data = clean.host.path("/var/lib/cni/networks/net")
    listed: dict[str, Any] = {"cni.dev/valid-attachments": []}
    with clean.attached(local()) as one:
        data.joinpath("10.8.0.9").write_bytes(b"dead\r\neth0")
        # By the record of the bridge alone, and by what ADD wrote down alone.
        for hidden in ("", "/run/netloom/host-local", "/run/netloom/attachments"):
            path = clean.host.path(hidden) if hidden else None
            if path:
                path.rename(f"{path}.hidden")
            answer = clean.cni("GC", "host-local", {**local(), **listed})
            answer.ok()
            assert f"{one.container_id}, eth0" in answer.stderr
            assert one.ip() in os.listdir(data)
            assert "10.8.0.9" not in os.listdir(data)
            if path:
                shutil.rmtree(path, ignore_errors=True)
                os.rename(f"{path}.hidden", path)
        assert "its interface lives" in clean.cni("GC", "bridge", {**local(), **listed}).stderr
        assert one.ip() in os.listdir(data)
    netns = clean.host.netns()
    result = clean.cni("ADD", "host-local", local(), netns=netns, container_id="c2").result()
    address = result["ips"][0]["address"].split("/")[0]
    netns.delete()
    clean.cni("GC", "host-local", {**local(), **listed}).ok()
    assert address not in os.listdir(data)


@pytest.mark.kernel
def test_status_of_a_read_only_and_of_a_full_disk(clean: Lab) -> None:
    clean.host.run(["mkdir", "/run/disk"])
    for options, filler in (("ro", ""), ("size=4k,nr_inodes=9", "dd if=/dev/zero of=/run/disk/x bs=4k count=1")):
        clean.host.run(["mount", "-t", "tmpfs", "-o", options, "disk", "/run/disk"])
        try:
            conf = local(dataDir="/run/disk")
            if filler:
                clean.cni("ADD", "host-local", conf, netns="/nowhere").ok()
                clean.cni("DEL", "host-local", conf, netns="/nowhere").ok()
                clean.cni("STATUS", "host-local", conf).ok()
                clean.host.run(filler.split(), check=False)
            status = clean.cni("STATUS", "host-local", conf)
            assert status.code() == 50
            assert "/run/disk" in status.stdout
            assert clean.cni("ADD", "host-local", conf, netns="/nowhere").code() == 5
            assert not list(clean.host.path("/run/disk").rglob("10.*"))
        finally:
            clean.host.run(["umount", "/run/disk"])
    clean.host.run(["rmdir", "/run/disk"])
