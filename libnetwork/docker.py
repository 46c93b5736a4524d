"""What Docker itself says there is: its networks, and the endpoints and addresses of its containers. Read only."""

import http.client
import json
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

SOCKET = "/var/run/docker.sock"
_TIMEOUT_S = 10.0


class DockerAwayError(Exception):
    """The daemon does not answer, or not as expected; nothing may be concluded."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What Docker has.

    Attributes:
        networks: ids.
        endpoints: ids, of running containers.
        pools: subnets of networks whose IPAM driver is ours, as CIDRs.
        addresses: gateways, auxiliary addresses and containers' addresses, without prefix length.
    """

    networks: frozenset[str] = field(default_factory=frozenset)
    endpoints: frozenset[str] = field(default_factory=frozenset)
    pools: frozenset[str] = field(default_factory=frozenset)
    addresses: frozenset[str] = field(default_factory=frozenset)


def look(path: str, driver: str) -> Truth:
    """Ask the daemon at this socket.

    Args:
        path: /var/run/docker.sock
        driver: our IPAM driver's name.

    Raises:
        DockerAwayError: it cannot be asked.
    """
    networks, containers = _get(path, "/networks"), _get(path, "/containers/json?all=1")
    pools, addresses = set(), set()
    for network in networks:
        ipam = network.get("IPAM") or {}
        for pool in ipam.get("Config") or ():
            if ipam.get("Driver") == driver:
                pools.add(pool.get("Subnet"))
            addresses |= {text.partition("/")[0] for text in (pool.get("AuxiliaryAddresses") or {}).values()}
            addresses.add((pool.get("Gateway") or "").partition("/")[0])
    endpoints = set()
    for container in containers:
        for place in ((container.get("NetworkSettings") or {}).get("Networks") or {}).values():
            endpoints.add(place.get("EndpointID"))
            addresses |= {place.get("IPAddress"), place.get("GlobalIPv6Address")}
    return Truth(
        frozenset(network["Id"] for network in networks),
        frozenset(filter(None, endpoints)),
        frozenset(filter(None, pools)),
        frozenset(filter(None, addresses)),
    )


def container(path: str, name: str) -> tuple[str, int] | None:
    """The id and the process id of a running container, by name or id; None where there is none.

    Raises:
        DockerAwayError: the daemon cannot be asked.
    """
    status, found = _ask(path, f"/containers/{quote(name, safe='')}/json")
    if status == 404:
        return None
    pid = found.get("State", {}).get("Pid", 0) if isinstance(found, dict) else 0
    return (str(found["Id"]), pid) if pid else None


def _get(path: str, what: str) -> list[dict[str, Any]]:
    status, found = _ask(path, what)
    if status != 200 or not isinstance(found, list):
        raise DockerAwayError(f"GET {what}: status {status}: {str(found)[:200]}")
    return found


def _ask(path: str, what: str) -> tuple[int, Any]:
    connection = _Connection(path)
    try:
        connection.request("GET", what, headers={"Host": "docker"})
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DockerAwayError(f"Docker at {path}: {error}") from error
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)
