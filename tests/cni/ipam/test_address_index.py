"""The index: runs of taken addresses against a plain set, and when it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.ipam.address_index import AddressIndex, Shelf, named, point_named
from cni.ipam.ranges import Address

FIRST: dict[int, Address] = {
    4: IPv4Address("255.255.255.192"),
    6: IPv6Address(2**128 - 64),
}  # up to the very last address
STEPS = st.lists(st.tuples(st.sampled_from(["take", "free"]), st.sampled_from([4, 6]), st.integers(0, 63)))


def first_free(model: set[Address], low: Address, high: Address) -> Address | None:
    return next((low + n for n in range(int(high) - int(low) + 1) if low + n not in model), None)


@given(STEPS, st.integers(0, 63), st.integers(0, 63))
def test_as_a_set(steps: list[tuple[str, int, int]], low: int, high: int) -> None:
    index, model = AddressIndex(), set[Address]()
    for what, family, offset in steps:
        address = FIRST[family] + offset
        if what == "take":
            index.take(address)
            model.add(address)
        else:
            index.free(address)
            model.discard(address)
    filled = AddressIndex()
    points = [point for address in model if (point := point_named(str(address)))]
    filled.fill(points, [])
    low, high = sorted((low, high))
    for base in FIRST.values():
        wanted = first_free(model, base + low, base + high)
        assert index.first_free(base + low, base + high) == wanted
        assert filled.first_free(base + low, base + high) == wanted


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("10.0.0.1", True),
        ("fd00::1", True),
        ("::102:304", True),
        ("0.0.0.0", True),
        ("010.0.0.1", False),
        ("10.0.0.01", False),
        ("10.0.1", False),
        ("FD00::1", False),
        ("fd00:0::1", False),
        ("::1.2.3.4", False),
        ("fe80::1%eth0", False),
        ("::ffff:1.2.3.4", False),  # Go prints it as IPv4, so nobody has such a file
        ("lock", False),
        ("last_reserved_ip.0", False),
        ("10.0.0.1\n", False),
        ("٣.0.0.1", False),
        ("\udcff", False),
        ("", False),
    ],
)
def test_names_in_gos_spelling(name: str, known: bool) -> None:
    assert (named(name) is not None) is known


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "net"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    yield path, fd
    os.close(fd)


def sealed(tmp_path: Path, fd: int) -> Shelf:
    shelf = Shelf(str(tmp_path / "a b?#%41"), fd, "boot")
    index = shelf.store(AddressIndex())
    index.hold(b"c1", "10.0.0.1")
    shelf.seal(index)
    index.close()
    return shelf


def test_believed_while_nobody_else_writes(tmp_path: Path, directory: tuple[Path, int]) -> None:
    index = sealed(tmp_path, directory[1]).load()
    assert index is not None
    assert index.held(b"c1") == ["10.0.0.1"]


def touch(path: Path) -> None:
    (path / "10.0.0.9").touch()


def come_and_go(path: Path) -> None:
    (path / "x").touch()
    (path / "x").unlink()


def set_back(path: Path) -> None:
    before = path.stat().st_mtime_ns
    touch(path)
    os.utime(path, ns=(before, before))


@pytest.mark.parametrize("change", [touch, come_and_go, set_back])
def test_not_believed_after_somebody_wrote_at_once(tmp_path: Path, directory: tuple[Path, int], change: object) -> None:
    # Within the same tick of the kernel's clock as our own last change, most of the time.
    shelf = sealed(tmp_path, directory[1])
    assert callable(change)
    change(directory[0])
    assert shelf.load() is None


def test_not_believed_after_a_reboot_or_for_another_directory(tmp_path: Path, directory: tuple[Path, int]) -> None:
    shelf = sealed(tmp_path, directory[1])
    assert Shelf(os.path.dirname(os.path.dirname(shelf.base)), directory[1], "other boot").load() is None
    other = tmp_path / "other"
    other.mkdir()
    status = directory[0].stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    fd = os.open(other, os.O_RDONLY)
    try:
        for suffix in ("db", "stamp"):
            os.rename(f"{shelf.base}.{suffix}", f"{Shelf(str(tmp_path / 'a b?#%41'), fd, 'boot').base}.{suffix}")
        assert Shelf(str(tmp_path / "a b?#%41"), fd, "boot").load() is None
    finally:
        os.close(fd)


@pytest.mark.parametrize("missing", ["db", "stamp"])
def test_half_of_it_is_none(tmp_path: Path, directory: tuple[Path, int], missing: str) -> None:
    shelf = sealed(tmp_path, directory[1])
    os.unlink(f"{shelf.base}.{missing}")
    assert shelf.load() is None


def test_where_nothing_can_be_kept_it_works_without(tmp_path: Path, directory: tuple[Path, int]) -> None:
    (tmp_path / "file").touch()
    shelf = Shelf(str(tmp_path / "file"), directory[1], "boot")
    index = shelf.store(AddressIndex())
    index.hold(b"c1", "10.0.0.1")
    shelf.seal(index)
    assert index.held(b"c1") == ["10.0.0.1"]
    assert shelf.load() is None
