"""Brings the shim's state in line with Docker's own: removes what no container and no network of Docker's owns.

Docker does not repeat a call that it gave up on, so after a crash of either side there are endpoints, networks, pools
and addresses that nobody will ever delete. The truth is asked of Docker's API. Nothing is removed while that cannot be
reached, nor before it was missing for a while: a container that is being started is in our files seconds before it is
in Docker's list.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kernel.errors import KernelError
from libnetwork import docker
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import IpamDriver
from libnetwork.messages import Collect
from libnetwork.network_driver import NetworkDriver
from telemetry import log

_logger = logging.getLogger("netloom-docker")
INTERVAL_S = 20.0
GRACE_S = 60.0

Thing = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one look came to, as things: ("endpoint", id), ("network", id), ("address", "POOL ADDRESS"), ("pool", id).

    Attributes:
        removed: or, in a dry run, what would be.
        suspected: missing, with the seconds since then; the grace is not over, or it could not be removed.
    """

    removed: list[Thing]
    suspected: dict[Thing, float]


class Reconciler:
    """Looks at intervals, in a thread of its own."""

    def __init__(
        self,
        look: Callable[[], docker.Truth],
        network: NetworkDriver,
        ipam: IpamDriver,
        interval_s: float = INTERVAL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        """`grace_s`: how long something must be missing, in every look, before it is removed."""
        self._look = look
        self._network = network
        self._ipam = ipam
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._missing: dict[Thing, float] = {}  # since when
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="netloom-reconcile", daemon=True)
        self._complaint = ""

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when the last look is over."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.once()
            except (docker.DockerAwayError, DriverError) as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001 - the next look may fare better
                self._complain(repr(error))
            else:
                self._complaint = ""

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            log.event(_logger, "warning", "cannot compare with Docker", error=text)
        self._complaint = text

    def collect(self, asked: Collect) -> dict[str, Any]:
        """Compare now, for `netloom gc`. Raises DriverError where nothing could be compared."""
        try:
            found = self.once(dry_run=asked.dry_run)
        except docker.DockerAwayError as error:
            raise DriverError(f"nothing was compared: {error}") from error
        return {
            "Removed": [{"Kind": kind, "Name": name} for kind, name in found.removed],
            "Suspected": [
                {"Kind": kind, "Name": name, "MissingS": round(seconds, 1)}
                for (kind, name), seconds in found.suspected.items()
            ],
            "GraceS": self._grace_s,
        }

    def once(self, *, dry_run: bool = False) -> Comparison:
        """One look.

        Raises:
            DockerAwayError: nothing was removed, and what was missing counts anew.
        """
        with self._turn:
            if not dry_run:
                self._network.end()
            try:
                return self._compare(dry_run)
            except docker.DockerAwayError:
                self._missing.clear()  # dockerd that starts has no list yet of what it will have
                raise

    def _compare(self, dry_run: bool) -> Comparison:
        # Ours first: what Docker adds meanwhile is in its list, and not yet in ours.
        endpoints, networks = self._network.owned()
        pools, addresses = self._ipam.owned()
        truth = self._look()
        missing: dict[Thing, Callable[[], object]] = {}
        for endpoint in endpoints - truth.endpoints:
            missing["endpoint", endpoint] = partial(self._network.discard_endpoint, endpoint)
        for network in networks - truth.networks:
            missing["network", network] = partial(self._network.discard_network, network)
        for name, address in addresses:
            if address not in truth.addresses:
                missing["address", f"{name} {address}"] = partial(self._ipam.discard_address, name, address)
        for pool, cidr in pools.items():
            if cidr not in truth.pools:
                missing["pool", pool] = partial(self._ipam.discard_pool, pool)
        now = time.monotonic()
        self._missing = {thing: self._missing.get(thing, now) for thing in missing}
        removed = []
        for thing in [thing for thing, since in self._missing.items() if now - since >= self._grace_s]:
            if dry_run:
                removed.append(thing)
                continue
            try:
                missing[thing]()
            except (DriverError, KernelError, OSError) as error:  # of one thing; the others are not to wait
                log.event(_logger, "warning", "cannot remove what Docker does not have", thing=thing, error=str(error))
            else:
                removed.append(thing)
                del self._missing[thing]
                log.event(_logger, "info", "removed what Docker does not have", kind=thing[0], name=thing[1])
        gone = set(removed)
        return Comparison(removed, {one: now - since for one, since in self._missing.items() if one not in gone})
