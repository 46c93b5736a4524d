"""etcd came back without its data: its disk was lost, or it was restored empty, or from an old backup.

That is noticed by what only a loss explains: its revision went back, or this host's own record, which is permanent, is
not there. What a listing lacks then are no hosts that left, so nothing is withdrawn for it:

- For a grace of GRACE_LEASES nobody is judged. Each netd notices within a third of the lease, at its next renewal, and
  says again who it is; the rest of the first lease is for an etcd that comes and goes, and for the wait before another
  try, and the second one is what a host has whenever its lease is lost.
- After that a host that has not come back is as one that is silent: it goes when it does not answer probes either.
- Blocks, networks and addresses are ipamd's, which puts back what is in use on its host, within seconds. An ipamd that
  is stopped, or does not take an empty etcd for its cluster, puts nothing back. So what is a host's stays until that
  host's ipamd has been alive in etcd for as long as the grace, or the host itself is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set

GRACE_LEASES = 2


class Loss:
    """`noticed` is called once for each loss, at once."""

    def __init__(self, lease_s: float, noticed: Callable[[], None]) -> None:
        self._grace_s = GRACE_LEASES * lease_s
        self._noticed = noticed
        self._until = 0.0
        self._alive: dict[str, float] = {}  # node → since when its ipamd is known to be alive
        self.until = ""  # when the grace is over, for people

    def begin(self) -> None:
        """etcd lost its data. May be called by everybody who notices."""
        if self.active:
            return
        self._until = time.monotonic() + self._grace_s
        self._alive.clear()
        self.until = time.strftime("%H:%M:%S", time.localtime(time.time() + self._grace_s))
        self._noticed()

    @property
    def active(self) -> bool:
        """Whether the grace lasts."""
        return time.monotonic() < self._until

    def told(self, alive: Set[str]) -> set[str]:
        """Of the nodes whose ipamd is alive now, those that had the time to put back what they have."""
        now = time.monotonic()
        self._alive = {node: self._alive.get(node, now) for node in alive}
        return {node for node, since in self._alive.items() if now - since >= self._grace_s}
