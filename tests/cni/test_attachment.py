"""Whose an element is, by its comment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from cni import attachment
from kernel import nft, nft_codec


def comment(network: str, container_id: str, ifname: str = "eth0") -> str:
    """As the kernel keeps it."""
    request = cast(Any, SimpleNamespace(network=network, container_id=container_id, ifname=ifname))
    return nft_codec.owner_of(nft.masquerade("10.1.0.2", attachment.owner(request)))


def test_no_two_attachments_have_one_comment() -> None:
    assert comment("net", "c1") == "net c1 eth0"
    hexadecimal = "0123456789abcdef" * 4
    assert comment("net", hexadecimal, "e" * 15) == f"net {hexadecimal} {'e' * 15}"
    long = "n" * 150
    found = [
        comment(network, container_id, ifname)
        for network in (long, long + "m", "net")
        for container_id in (hexadecimal, hexadecimal + "1", hexadecimal + "2", "c" * 250)
        for ifname in ("eth0", "eth1", "e" * 15)
    ]
    assert len(set(found)) == len(found) == 36
    assert all(f" {hexadecimal} " in one or f" {'c' * 64} " in one for one in found)
