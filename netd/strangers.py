"""Keeps strangers of this host out of the cluster's networks on other hosts.

Who masquerades, as docker0 or libvirt do, sends under this host's own address, and the other hosts let this host in. So
what is forwarded is judged here, where it still has its true source (kernel/nft_tables.py, `strangers`). Who may begin
to talk to a network's addresses: the network itself, and those that it is connected with. A network that is open is
everybody's. This host's own parts of networks are left to those who attach containers to them: the plugins, by their
records.

- Where nobody translates addresses, nothing leaves with another source, and no table is made for it alone: it would
  have every packet tracked, those of tunnels twice, which takes a quarter of what they carry. Whether somebody else
  translates is looked at again every 2 s; the first table of our own plugins has the elements from the start.
- The elements stay when netd ends, as all that it made; `netd --remove` takes them away.
- Those of the configuration and those of the networks that etcd, or ipamd, tells are kept apart: while nobody tells,
  what was known before holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from cluster.layout import NetworkRecord
from kernel import nft
from kernel.errors import KernelError
from kernel.nft import Element
from kernel.record import Records
from kernel.session import Session
from netd.agent import Agent
from netd.values import AnyNetwork, Network
from telemetry import log

_logger = logging.getLogger("netd")

CONFIGURED, DEFINED, OWN = "netd-configured", "netd-defined", "netd-own"  # whose elements they are
_EVERY_S = 2.0  # this host may have got a block


class Strangers:
    """`want` and `reload` say what there is; `run` does the rest."""

    def __init__(self, agent: Agent, run_dir: str, configured: Sequence[Network]) -> None:
        """`configured`: the configuration's own networks."""
        self._agent = agent
        self._records = Records(run_dir)
        self._configured = configured
        self._defined: Mapping[str, NetworkRecord] | None = None  # None: nobody has told yet
        self._elements: list[Element] | None = None  # about those; None: to be worked out
        self._done: dict[str, list[Element]] = {}
        self._nudged = asyncio.Event()
        self._complaint = ""

    def want(self, networks: Mapping[str, NetworkRecord]) -> None:
        """All defined networks as they are from now on."""
        if networks != self._defined:
            self._defined, self._elements = dict(networks), None
            self._nudged.set()

    def presume(self, networks: Mapping[str, NetworkRecord]) -> None:
        """What another boot knew of networks, before anybody tells; what this one knew is better."""
        if networks and self._defined is None and not self._records.standing(DEFINED):
            self.want(networks)

    def reload(self, configured: Sequence[Network]) -> None:
        """The configuration was read again."""
        self._configured = configured
        self._nudged.set()

    async def run(self) -> None:
        """Never returns."""
        while True:
            own, is_all = await asyncio.wrap_future(self._agent.call(lambda one: (one.node.subnets, one.may_drop)))
            self._nudged.clear()
            complaint = ""
            try:
                # Another thread: the lock of the records may be taken, and the thread for the kernel must not wait.
                await asyncio.to_thread(self._stand, self._wanted(own, is_all=is_all))
            except (KernelError, OSError, ValueError) as error:
                complaint = str(error)
            if complaint and complaint != self._complaint:
                log.event(_logger, "error", "strangers are not kept out of networks", error=complaint)
            self._complaint = complaint
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), _EVERY_S)

    def _wanted(self, own: Iterable[AnyNetwork], *, is_all: bool) -> dict[str, list[Element]]:
        """By whose they are. This host's own parts come first: they are what is let pass."""
        parts = of_host(own)
        if not is_all:  # an earlier netd may have known more
            parts = list(dict.fromkeys([*parts, *self._records.standing(OWN)]))
        wanted = {OWN: parts, CONFIGURED: of_configuration(self._configured)}
        if self._defined is not None:
            if self._elements is None:
                self._elements = of_definitions(self._defined)
            wanted[DEFINED] = self._elements
        return wanted

    def _stand(self, wanted: Mapping[str, list[Element]]) -> None:
        changed = {who: elements for who, elements in wanted.items() if self._done.get(who) != elements}
        with Session() as session:
            for who, elements in changed.items():
                self._records.stand(session, who, elements)
                self._done[who] = elements
            self._records.attend(session)


def remove(run_dir: str) -> None:
    """Take all of it away. Raises KernelError, OSError."""
    records = Records(run_dir)
    with Session() as session:
        for who in (CONFIGURED, DEFINED, OWN):
            if records.standing(who):
                records.stand(session, who, ())


def of_host(subnets: Iterable[AnyNetwork]) -> list[Element]:
    """The elements about this host's own parts of networks."""
    return [nft.local(str(one)) for one in subnets]


def of_configuration(networks: Iterable[Network]) -> list[Element]:
    """Those about the configuration's networks: each is reached from itself only."""
    return [element for one in networks if not one.open for element in _of_network(list(map(str, one.subnets)), ())]


def of_definitions(networks: Mapping[str, NetworkRecord]) -> list[Element]:
    """Those about defined networks."""
    found = []
    for one in networks.values():
        if not one.open:
            friends = [subnet for name in one.connected if name in networks for subnet in networks[name].subnets]
            found += _of_network(one.subnets, friends)
    return found


def _of_network(subnets: Sequence[str], friends: Sequence[str]) -> list[Element]:
    found = []
    for subnet in subnets:
        found.append(nft.remote(subnet))
        found += [nft.among(source, subnet) for source in (*subnets, *friends) if (":" in source) == (":" in subnet)]
    return found
