"""Vouches that nobody of this host has a say in what its tunnels send, for HOLDS_S at a time.

As long as that holds, programs of the fast path send packets past the host's own way out (kernel/encapsulate.py). Rules
of nftables and policies of IPsec are looked at every EVERY_S. While netd is away nobody looks, and so nobody vouches:
packets go through the tunnels' ends then.
"""

from __future__ import annotations

import logging
import time

from kernel import outgoing
from kernel.bpf import Cell
from kernel.errors import KernelError
from kernel.outgoing import Sent
from kernel.session import Session
from telemetry import log

_logger = logging.getLogger("netd")

EVERY_S, HOLDS_S = 2.0, 10.0
_NEVER = 0


class Vouch:
    """For the thread of the kernel, in its namespace."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cell: Cell | None = None
        self._seen: tuple[bytes, frozenset[Sent]] | None = None
        self._rules = ""
        self._said: str | None = None

    def until(self) -> int:
        """Where programs find until when it holds (`encapsulate.Outer.until`). Raises KernelError."""
        if self._cell is None:
            self._cell = Cell("netloom_until")
        return self._cell.fd

    def look(self, packets: frozenset[Sent]) -> float:
        """Vouch for such packets, or for none; in how many seconds to look again. Raises KernelError."""
        if self._cell is None:
            return float("inf")
        said = self._who(packets) if packets else "there are none"
        self._cell.put(_NEVER if said else time.monotonic_ns() + int(HOLDS_S * 1e9))
        if said != self._said and packets:
            if said:
                log.event(_logger, "info", "packets of tunnels go out through netfilter", reason=said)
            else:
                log.event(_logger, "info", "packets of tunnels go past netfilter on their way out")
        self._said = said
        return EVERY_S if packets else float("inf")

    def _who(self, packets: frozenset[Sent]) -> str:
        """Who has a say; "": nobody."""
        try:
            if said := outgoing.unseen():
                return said
            seen = outgoing.generation(self._session), packets
            if seen != self._seen:
                self._seen = None
                self._rules = outgoing.of_rules(self._session, packets)
                self._seen = seen
        except KernelError as error:  # what cannot be looked at
            return str(error)
        return self._rules
