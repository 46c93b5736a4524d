"""Brings the shim's state in line with Docker's own: removes what no container and no network of Docker's owns.

Docker does not repeat a call that it gave up on, so after a crash of either side there are endpoints, networks, pools
and addresses that nobody will ever delete. The truth is asked of Docker's API. Nothing is removed while that cannot be
reached, nor what only one look found missing: a container that is being connected is in our files before it is in
Docker's list.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial

from libnetwork import docker
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import IpamDriver
from libnetwork.network_driver import NetworkDriver
from telemetry import log

_logger = logging.getLogger("netloom-docker")
INTERVAL_S = 30.0
_FIRST_S = 2.0  # between the looks after a start, when much may be left over

Thing = tuple[str, str]


class Reconciler:
    """Looks at intervals, in a thread of its own."""

    def __init__(
        self,
        look: Callable[[], docker.Truth],
        network: NetworkDriver,
        ipam: IpamDriver,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._look = look
        self._network = network
        self._ipam = ipam
        self._interval_s = interval_s
        self._missing: set[Thing] = set()
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
        looks = 0
        while not self._stop.wait(_FIRST_S if looks < 2 else self._interval_s):
            try:
                self.once()
            except docker.DockerAwayError as error:
                looks = 0
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001 - the next look may fare better
                self._complain(repr(error))
            else:
                looks += 1
                self._complaint = ""

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            log.event(_logger, "warning", "cannot compare with Docker", error=text)
        self._complaint = text

    def once(self) -> list[Thing]:
        """One look; what was removed: ("endpoint", id), ("network", id), ("address", text), ("pool", CIDR).

        Raises:
            DockerAwayError: nothing was removed.
        """
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
        removed = []
        for thing in [thing for thing in missing if thing in self._missing]:
            try:
                missing[thing]()
            except DriverError as error:
                log.event(_logger, "warning", "cannot remove what Docker does not have", thing=thing, error=str(error))
            else:
                removed.append(thing)
                log.event(_logger, "info", "removed what Docker does not have", kind=thing[0], name=thing[1])
        self._missing = set(missing) - set(removed)
        return removed
