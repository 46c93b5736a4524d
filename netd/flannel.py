"""What flannel's daemon leaves for others on its host, for one network: `subnet.env` and Docker's options.

    [netd]
    flannel_network = "pods"

- `/run/flannel/subnet.env` is for the plugin `flannel`, of ours or of its own project; `/run/flannel/docker` has
  options for dockerd, as flannel's mk-docker-opts.sh makes them out of the other. So an existing conflist, or a stock
  docker0, has the addresses of a subnet that netd routes.
- The subnet of each family is the host's own in that network: the one of the configuration, where there is one; else
  the block of an address that netd holds in ipamd for nothing but this. ipamd gives the same one after every start.
- netd masquerades what leaves the network, and says so in the file: only who knows the whole network can tell what that
  is, and between hosts containers keep their own addresses.
- A file that is right is not written. What cannot be done is a problem in words; what was written before stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from ipaddress import ip_interface, ip_network

from ipamd.client import Client, IpamError
from kernel.errors import KernelError
from netd import flannel_rules
from netd.agent import Agent
from netd.config import Config
from netd.disk import Directory, DirectoryError
from netd.reconcile import Reconciler
from netd.values import AnyInterface, AnyNetwork, Network
from protos.ipam.v1 import ipam_pb2
from telemetry import log

_logger = logging.getLogger("netd")

DIRECTORY = "/run/flannel"
SUBNET_FILE, DOCKER_FILE = "subnet.env", "docker"

_EVERY_S = 5.0
_ASK_AGAIN_S = 60.0
_TIMEOUT_S = 3.0
_PREFIXES = {4: "FLANNEL_", 6: "FLANNEL_IPV6_"}


class SubnetError(Exception):
    """This host has no subnet in the network; the text says why."""


def subnet_key(network: str) -> ipam_pb2.AttachmentKey:
    """As what netd holds an address of the host's block in ipamd."""
    return ipam_pb2.AttachmentKey(client="netd", network=network, container_id="subnet", ifname="-")


def gateway_of(subnet: AnyNetwork) -> AnyInterface:
    """The first usable address, by which the host is the containers' gateway."""
    first = subnet.network_address + (1 if subnet.num_addresses > 2 else 0)
    return ip_interface(f"{first}/{subnet.prefixlen}")


def files(network: Network, subnets: Sequence[AnyInterface], mtu: int, *, masquerades: bool) -> dict[str, str]:
    """The files' contents, by name. Pure. `subnets`: the gateways, at most one of a family."""
    lines = []
    for one in sorted(subnets, key=lambda found: found.version):
        whole = next(found for found in network.subnets if one.version == found.version and one.ip in found)
        lines += [f"{_PREFIXES[one.version]}NETWORK={whole}", f"{_PREFIXES[one.version]}SUBNET={one}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if masquerades else 'false'}"]
    options = {"IPMASQ": f"--ip-masq={'false' if masquerades else 'true'}", "MTU": f"--mtu={mtu}"}
    bip = next((one for one in subnets if one.version == 4), None)
    if bip is not None:
        options = {"BIP": f"--bip={bip}", **options}
    docker = [f'DOCKER_OPT_{name}="{option}"' for name, option in options.items()]
    # One space before each, as the script has it.
    docker.append(f'DOCKER_OPTS="{"".join(f" {option}" for option in options.values())}"')
    return {name: "\n".join(text) + "\n" for name, text in ((SUBNET_FILE, lines), (DOCKER_FILE, docker))}


class Flannel:
    """Keeps the files, and the rules that go with them, as they should be."""

    def __init__(self, config: Config, agent: Agent, directory: str = DIRECTORY) -> None:
        self._config = config
        self._agent = agent
        self._directory = directory
        self._problem = ""
        self._nudged = asyncio.Event()
        self._held: tuple[str, tuple[AnyInterface, ...]] | None = None  # what ipamd gave, for which network
        self._asked_at = float("-inf")
        self._is_off = False  # whether nothing is left of an earlier configuration

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        return [self._problem] if self._problem else []

    def nudge(self) -> None:
        """Networks have changed: look now."""
        self._nudged.set()

    def reload(self, config: Config) -> None:
        """Another configuration; the thread for the kernel has it already."""
        self._config = config
        self._held = None
        self.nudge()

    async def run(self) -> None:
        """Never returns."""
        while True:
            problem = await self._once()
            if problem and problem != self._problem:
                log.event(_logger, "warning", "flannel's files are not up to date", reason=problem)
            self._problem = problem
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), _EVERY_S)
            self._nudged.clear()

    async def _once(self) -> str:
        """What is wrong; "" where nothing is."""
        name = self._config.flannel_network
        try:
            if not name:
                if not self._is_off:
                    await asyncio.to_thread(flannel_rules.converge, None)
                self._is_off = True
                return ""
            self._is_off = False
            network, mtu = await asyncio.wrap_future(self._agent.call(lambda one: _look(one, name)))
            if not mtu:
                return ""  # no underlay yet: that is a problem of its own
            subnets = await self._subnets(network)
            masquerades = self._config.flannel_masquerade
            rules = flannel_rules.Rules(network.subnets, tuple(one.network for one in subnets), masquerades)
            await asyncio.to_thread(flannel_rules.converge, rules)
            self._write(files(network, subnets, mtu, masquerades=masquerades))
        except SubnetError as error:
            return f"flannel_network {name}: {error}"
        except (OSError, DirectoryError, KernelError) as error:
            return f"flannel_network {name}: {self._directory}: {error}"
        return ""

    async def _subnets(self, network: Network) -> tuple[AnyInterface, ...]:
        own: dict[int, AnyInterface] = {}
        for subnet in self._config.node.subnets:
            if network.holds(subnet):
                own.setdefault(subnet.version, gateway_of(subnet))
        if own.keys() >= {one.version for one in network.subnets}:
            return tuple(own.values())
        try:
            held = await self._blocks(network)
        except SubnetError:
            if not own:
                raise
            held = ()  # no ipamd, or no pool: the other family has no subnet here
        return (*own.values(), *(one for one in held if one.version not in own))

    async def _blocks(self, network: Network) -> tuple[AnyInterface, ...]:
        """The gateways of this host's blocks, as ipamd said lately."""
        now = time.monotonic()
        held = self._held[1] if self._held is not None and self._held[0] == network.name else None
        if held is None or now - self._asked_at > _ASK_AGAIN_S:
            try:
                held = await asyncio.to_thread(_ask, self._config.ipamd_socket, network.name)
            except SubnetError:
                if held is None:
                    raise
            else:
                self._held, self._asked_at = (network.name, held), now
        return held

    def _write(self, contents: dict[str, str]) -> None:
        if not os.path.lexists(self._directory):
            os.makedirs(self._directory)
            os.chmod(self._directory, 0o755)  # noqa: S103 - whatever the umask is: others read it
        with contextlib.closing(Directory(self._directory)) as directory:
            for name, text in contents.items():
                if directory.read(name) != text.encode():
                    directory.write(name, text.encode(), mode=0o644)
                    log.event(_logger, "info", "flannel's file written", file=f"{self._directory}/{name}")


def _look(reconciler: Reconciler, name: str) -> tuple[Network, int]:
    """In the thread for the kernel: the network, and the MTU of its containers."""
    found = next((one for one in reconciler.networks if one.name == name), None)
    if found is None:
        raise SubnetError(
            f"this host knows no network of that name; define it (netloom network create, or [[network]]). Known: "
            f"{', '.join(one.name for one in reconciler.networks if one.subnets) or 'none'}"
        )
    return found, reconciler.mtu(found)


def _ask(socket: str, network: str) -> tuple[AnyInterface, ...]:
    """The gateways of this host's blocks."""
    try:
        with Client(socket, _TIMEOUT_S) as client:
            answer = client.allocate(subnet_key(network), pools=[client.get_network(network).pool])
    except IpamError as error:
        raise SubnetError(
            f"{error.message}; ipamd gives this host its subnet, or say it in the configuration (subnets under [netd])"
        ) from None
    return tuple(
        ip_interface(f"{one.gateway}/{one.cidr.partition('/')[2]}")
        if one.gateway
        else gateway_of(ip_network(one.cidr, strict=False))
        for one in answer.addresses
    )
