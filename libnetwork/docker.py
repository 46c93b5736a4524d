"""What Docker itself says there is: its networks, and the endpoints and addresses of its containers. Networks that all
hosts share are made and removed through it, too (libnetwork.sharing)."""

import http.client
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

SOCKET = "/var/run/docker.sock"
_TIMEOUT_S = 10.0
_ID = re.compile("[0-9a-f]{64}")


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


class RefusedError(Exception):
    """The daemon answers, and does not do it; the text is its own."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network as Docker lists it. `ipam`: its IPAM driver; `created`: as text, which sorts."""

    id: str
    name: str
    driver: str = ""
    ipam: str = ""
    created: str = ""
    internal: bool = False
    attachable: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


def networks(path: str) -> list[Network]:
    """All of them. Raises DockerAwayError."""
    return [_network(found) for found in _get(path, "/networks")]


def network(path: str, id: str) -> Network | None:  # noqa: A002 - Docker's word
    """The one of this id, or None. Raises DockerAwayError."""
    status, found = _ask(path, f"/networks/{quote(id, safe='')}")
    if status == 404:
        return None
    if status != 200 or not isinstance(found, dict):
        raise DockerAwayError(f"GET /networks/{id}: status {status}: {str(found)[:200]}")
    return _network(found)


def create_network(path: str, body: Mapping[str, Any]) -> str:
    """POST /networks/create; its id. Raises DockerAwayError, RefusedError."""
    status, found = _ask(path, "/networks/create", "POST", body)
    if status != 201 or not isinstance(found, dict):
        raise RefusedError(_words(status, found))
    return str(found["Id"])


def remove_network(path: str, id: str) -> None:  # noqa: A002
    """What is not there is no error. Raises DockerAwayError, RefusedError."""
    status, found = _ask(path, f"/networks/{quote(id, safe='')}", "DELETE")
    if status not in (204, 404):
        raise RefusedError(_words(status, found))


def users(path: str, wanted: Network) -> list[str]:
    """Names of the containers that are on a network, or are to be when they start. Raises DockerAwayError."""
    found = []
    for one in _get(path, "/containers/json?all=1"):
        for name, place in ((one.get("NetworkSettings") or {}).get("Networks") or {}).items():
            # One that never ran has the name alone.
            if place.get("NetworkID") == wanted.id or (not place.get("NetworkID") and name in (wanted.name, wanted.id)):
                found.append(str((one.get("Names") or [one["Id"]])[0]).lstrip("/"))
    return found


def addresses(path: str, wanted: Network) -> dict[str, str]:
    """Names of the running containers that are on a network, by their addresses there. Raises DockerAwayError."""
    found = {}
    for one in _get(path, "/containers/json"):
        for place in ((one.get("NetworkSettings") or {}).get("Networks") or {}).values():
            if place.get("NetworkID") == wanted.id:
                for key in ("IPAddress", "GlobalIPv6Address"):
                    found[str(place.get(key) or "")] = str((one.get("Names") or [one["Id"]])[0]).lstrip("/")
    found.pop("", None)
    return found


def _network(found: Mapping[str, Any]) -> Network:
    return Network(
        found["Id"],
        found["Name"],
        found.get("Driver", ""),
        (found.get("IPAM") or {}).get("Driver", ""),
        found.get("Created", ""),
        bool(found.get("Internal")),
        bool(found.get("Attachable")),
        found.get("Options") or {},
        found.get("Labels") or {},
    )


def _words(status: int, found: Any) -> str:
    return str(found["message"]) if isinstance(found, dict) and "message" in found else f"status {status}: {found}"


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


@dataclass(frozen=True, slots=True)
class Place:
    """A container's in a network: ids, "" where it has none yet, and the addresses that its user named."""

    network_id: str = ""
    endpoint_id: str = ""
    named: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Container:
    """As Docker lists it. `state`: "created", "running", "paused", "restarting", "exited", …; `places` by the network's
    name, or whatever else its user called it."""

    id: str
    name: str
    state: str
    places: Mapping[str, Place] = field(default_factory=dict)


def containers(path: str, **filters: Sequence[str]) -> list[Container]:
    """Those that a filter of Docker's lets through, as status=["restarting"]. The list waits for no container, whatever
    is being done with it. Raises DockerAwayError."""
    query = quote(json.dumps({name: list(values) for name, values in filters.items()}), safe="")
    return [_container(found) for found in _get(path, f"/containers/json?all=1&filters={query}")]


def find_container(path: str, name: str) -> Container | None:
    """The one that Docker means by a name, an id, or the beginning of one. Raises DockerAwayError."""
    name = name.removeprefix("/")
    ways = [{"id": [name]}] if _ID.fullmatch(name) else [{"name": [f"^/?{re.escape(name)}$"]}, {"id": [name]}]
    for filters in ways:
        found = [one for one in containers(path, **filters) if one.name == name or one.id.startswith(name)]
        if len(found) == 1:
            return found[0]
    return None


def is_let_alone(path: str, id: str, timeout_s: float) -> bool:  # noqa: A002 - Docker's word
    """Whether Docker tells of a container, or that there is none, within this time: it does not while it starts the
    container, or connects it. Raises DockerAwayError where it cannot be asked."""
    try:
        return _ask(path, f"/containers/{quote(id, safe='')}/json", timeout_s=timeout_s)[0] in (200, 404)
    except DockerAwayError as error:
        if isinstance(error.__cause__, TimeoutError):
            return False
        raise


def _container(found: Mapping[str, Any]) -> Container:
    places = {}
    for name, place in ((found.get("NetworkSettings") or {}).get("Networks") or {}).items():
        wishes = place.get("IPAMConfig") or {}
        addresses = tuple(filter(None, (wishes.get("IPv4Address"), wishes.get("IPv6Address"))))
        places[name] = Place(place.get("NetworkID") or "", place.get("EndpointID") or "", addresses)
    # Others are those by which linked containers call it: /other/alias.
    name = next((one[1:] for one in found.get("Names") or () if one.count("/") == 1), "")
    return Container(str(found["Id"]), name, str(found.get("State", "")), places)


def _get(path: str, what: str) -> list[dict[str, Any]]:
    status, found = _ask(path, what)
    if status != 200 or not isinstance(found, list):
        raise DockerAwayError(f"GET {what}: status {status}: {str(found)[:200]}")
    return found


def _ask(
    path: str, what: str, verb: str = "GET", body: Mapping[str, Any] | None = None, timeout_s: float = _TIMEOUT_S
) -> tuple[int, Any]:
    connection = _Connection(path, timeout_s)
    try:
        headers = {"Host": "docker", "Content-Type": "application/json"}
        connection.request(verb, what, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DockerAwayError(f"Docker at {path}: {error}") from error
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("docker")
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)
