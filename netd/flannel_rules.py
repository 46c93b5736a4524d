"""The firewall's part of `flannel_network`: what the network's containers send leaves under the host's address, and
other firewalls let it pass.

A table of netd's own, `inet netloom_flannel`, written as a whole. An empty set in it bears a name made from the rules:
so one look tells whether they are there, and whether they are these. That they pass where Docker and others drop what
is forwarded is done as for the plugins (kernel.foreign): marked here, accepted there.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from kernel import foreign, libnftables, mark, nft
from kernel.errors import NotFound
from kernel.netlink import Message, string
from kernel.session import Session
from netd.values import AnyNetwork

TABLE = nft.FLANNEL_TABLE
_GONE = f"table inet {TABLE}\ndelete table inet {TABLE}\n"
_MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
_WORDS = {4: "ip", 6: "ip6"}
# include/uapi/linux/netfilter/nf_tables.h
_GETSET = 10 << 8 | 10
_SET_TABLE, _SET_NAME = 1, 2
_INET = struct.pack(">BBH", 1, 0, 0)


@dataclass(frozen=True, slots=True)
class Rules:
    """The network, this host's part of it, and whether what leaves is masqueraded."""

    network: tuple[AnyNetwork, ...]
    own: tuple[AnyNetwork, ...]
    masquerades: bool


def converge(wanted: Rules | None) -> None:
    """Make the table as it should be, in the calling thread's namespace; None: there should be none.

    Raises:
        KernelError
    """
    with Session() as session:
        if wanted is None:
            if nft.has_table(TABLE):
                libnftables.run(_GONE, f"remove the table inet {TABLE}")
                foreign.settle(session)
            return
        text = _text(wanted)
        name = f"v{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not _there(session, name):
            libnftables.run(_GONE + text.replace("@VERSION@", name), f"write the table inet {TABLE}")
        foreign.ensure(session, sorted({one.version for one in wanted.own}))


def _text(wanted: Rules) -> str:
    """The table. Pure."""
    marking = f"meta mark set meta mark | {mark.forward_mark():#010x}"
    passing, leaving = [], []
    for whole in wanted.network:
        word = _WORDS[whole.version]
        passing += [
            f"{word} saddr {whole} {marking}",
            f"{word} daddr {whole} ct state established,related {marking}",
        ]
        leaving += [
            f"{word} saddr {own} {word} daddr != {whole} {word} daddr != {_MULTICAST[own.version]} masquerade"
            for own in wanted.own
            if own.version == whole.version and wanted.masquerades
        ]
    return "\n".join(
        [
            f"table inet {TABLE} {{",
            "set @VERSION@ { type mark; }",
            "chain forward { type filter hook forward priority filter - 10; policy accept;",
            *passing,
            "}",
            "chain postrouting { type nat hook postrouting priority srcnat; policy accept;",
            *leaving,
            "}",
            "}",
            "",
        ]
    )


def _there(session: Session, name: str) -> bool:
    """Whether the table has this set."""
    body = _INET + string(_SET_TABLE, TABLE) + string(_SET_NAME, name)
    try:
        session.netfilter.get(Message(_GETSET, 0, body, f"look for the table inet {TABLE}"))
    except NotFound:
        return False
    return True
