"""The bit of the mark, as the host's configuration has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernel import mark, nft, paths
from kernel.errors import KernelError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What takes the place of /etc/netloom/netloom.toml; not there yet."""
    file = tmp_path / "netloom.toml"
    monkeypatch.setattr(paths, "CONFIG_FILE", str(file))
    monkeypatch.setattr(mark, "_known", (None, mark.DEFAULT_BIT))
    return file


def test_the_default(config: Path) -> None:
    assert (mark.forward_bit(), mark.forward_mark(), nft.schema()) == (24, 0x1000000, nft.SCHEMA)
    for text in ("", "[log]\nlevel = 'info'\n", "[cni]\n# forward_mark_bit = 3\n", "this is no TOML", "[cni]\n"):
        config.write_text(text)
        assert mark.forward_bit() == 24


def test_the_file_is_read_again_when_it_changes(config: Path) -> None:
    for number, text in enumerate(
        ("[cni]\nforward_mark_bit = {}\n", "cni.forward_mark_bit={}", "cni = {{ forward_mark_bit = {} }}")
    ):
        for bit in (number, number + 20):
            config.write_text(text.format(bit))
            os.utime(config, ns=(bit, bit))  # a clock's tick may be longer than this test
            assert (mark.forward_bit(), mark.forward_mark()) == (bit, 1 << bit)
    assert nft.schema() == f"{nft.SCHEMA}_bit22"
    config.unlink()
    assert mark.forward_bit() == 24


@pytest.mark.parametrize("value", ["32", "-1", "1.0", "true", '"24"', "[]"])
def test_a_wrong_bit_is_refused_with_its_value(config: Path, value: str) -> None:
    config.write_text(f"[cni]\nforward_mark_bit = {value}\n")
    with pytest.raises(KernelError, match=r"cni\.forward_mark_bit: want a whole number from 0 to 31, found"):
        mark.forward_bit()


def test_what_cannot_be_read_is_refused(config: Path) -> None:
    for text in ("[cni]\nforward_mark_bit = \n", "cni = 5 # forward_mark_bit", "[cni\nforward_mark_bit = 3"):
        config.write_text(text)
        with pytest.raises(KernelError, match=r"forward_mark_bit in .*netloom\.toml"):
            mark.forward_bit()
    config.unlink()
    config.mkdir()
    with pytest.raises(KernelError):
        mark.forward_bit()
