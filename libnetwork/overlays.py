"""ipamd's overlay networks, as Docker's IPAM driver sees them: a pool of Docker's is one family of an overlay's pool.

Such a pool is nowhere written down: its id, `overlay-<network>-<4 or 6>`, says what it is, and any number of networks
of Docker's may have it one after the other, or for a moment beside one another (libnetwork.sharing). Its gateway
belongs to nobody; all else is allocated in ipamd's pool of the network, for the client "docker".
"""

from collections.abc import Callable
from ipaddress import ip_interface, ip_network

import grpc

from ipamd.client import Client, IpamError
from libnetwork.errors import DriverError
from libnetwork.messages import RequestPool
from libnetwork.options import OVERLAY
from libnetwork.state import Pool
from protos.ipam.v1 import ipam_pb2 as pb

_PREFIX = "overlay-"
_OPTION = "network"  # docker network create --ipam-opt network=NAME


class Overlays:
    """See the module. May be used by any thread; IpamDriver's calls take turns."""

    def __init__(self, client: Callable[[], Client]) -> None:
        """`client` is the calling thread's."""
        self._client = client
        self._offered: set[str] = set()  # pools that Docker did not name, and has not taken yet

    def all(self) -> dict[str, pb.Network]:
        """By name. Raises DriverError while ipamd is away."""
        try:
            return {one.name: one for one in self._client().list_networks() if one.type == OVERLAY}
        except IpamError as error:
            raise DriverError(f"ipamd: {error.message}") from error

    def find(self, name: str) -> pb.Network | None:
        """None where there is no network of this name.

        Raises:
            DriverError: it is none of type overlay, or ipamd is away.
        """
        try:
            found = self._client().get_network(name)
        except IpamError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return None
            raise DriverError(f"ipamd: {error.message}") from error
        if found.type != OVERLAY:
            raise DriverError(
                f"network {name} is of type {found.type}, not overlay; take another name, and netloom network create "
                "NAME --type overlay"
            )
        return found

    def get(self, name: str) -> pb.Network:
        """As `find`, and raises DriverError where there is none."""
        found = self.find(name)
        if found is None:
            raise DriverError(
                f"network {name}: netloom has none of this name; make it first: netloom network create {name} --type "
                "overlay"
            )
        return found

    # Pools

    def asked_for(self, asked: RequestPool) -> Pool | None:
        """The overlay's pool that Docker wants to have, by --ipam-opt network=NAME or by its very subnet; else None.

        Raises:
            DriverError: it is not to be had like this.
        """
        name = (asked.options or {}).get(_OPTION, "")
        definition = self.get(name) if name else self._with_subnet(asked.pool)
        if definition is None:
            return None
        version = 6 if asked.v6 else 4
        subnet = subnets(definition).get(version, "")
        if not subnet or (asked.pool and _canonical(asked.pool) != subnet):
            raise DriverError(
                f"--subnet {asked.pool or f'(IPv{version})'}: overlay network {definition.name} has "
                f"{' and '.join(definition.subnets)}; say that, or leave --subnet out"
            )
        if asked.sub_pool:
            raise DriverError(
                f"--ip-range {asked.sub_pool}: addresses of overlay network {definition.name} come from one pool for "
                "all hosts; leave it out"
            )
        pool = Pool(f"{_PREFIX}{definition.name}-{version}", subnet, overlay=definition.name)
        if not asked.pool:
            # Docker does not take a subnet that the host has a route to, and asks for another one, for ever.
            if pool.id in self._offered:
                self._offered.discard(pool.id)
                raise DriverError(
                    f"Docker does not take {subnet} of overlay network {definition.name} by itself, since this host "
                    f"has a route or a name server there: add --subnet {subnet}"
                )
            self._offered.add(pool.id)
        return pool

    def _with_subnet(self, wanted: str) -> pb.Network | None:
        if not wanted:
            return None
        for one in self.all().values():
            if _canonical(wanted) in one.subnets:
                return one
        return None

    def taken(self, pool_id: str) -> None:
        """Docker has a pool, or has given it up."""
        self._offered.discard(pool_id)

    @staticmethod
    def pool(id: str) -> Pool | None:  # noqa: A002 - Docker's word
        """What an id says: no subnet; None where it is none of an overlay."""
        if not id.startswith(_PREFIX):
            return None
        return Pool(id, "", overlay=id.removeprefix(_PREFIX).rpartition("-")[0])

    def whole(self, pool: Pool) -> tuple[Pool, str]:
        """With its subnet; and its gateway, with the subnet's length. Raises DriverError."""
        definition = self.get(pool.overlay)
        version = family(pool)
        subnet = subnets(definition).get(version)
        if subnet is None:
            raise DriverError(
                f"overlay network {pool.overlay} has no IPv{version} subnet any more; make it anew in Docker"
            )
        return Pool(pool.id, subnet, overlay=pool.overlay), gateways(definition).get(version, "")


def pool_id(network: str, address: str) -> str:
    """Of the pool that an address of an overlay network is from."""
    return f"{_PREFIX}{network}-{ip_interface(address).version}"


def family(pool: Pool) -> int:
    """4 or 6."""
    return int(pool.id[-1])


def subnets(definition: pb.Network) -> dict[int, str]:
    """By IP version."""
    return {ip_network(subnet).version: subnet for subnet in definition.subnets}


def gateways(definition: pb.Network) -> dict[int, str]:
    """By IP version, with the subnet's length: "10.0.0.1/24"."""
    return {ip_interface(gateway).version: gateway for gateway in definition.gateways}


def _canonical(cidr: str) -> str:
    try:
        return str(ip_network(cidr))
    except ValueError:
        return cidr  # no overlay's
