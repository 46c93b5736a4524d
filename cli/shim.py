"""What `netloom status` says of the Docker shim: does it answer, and which networks, endpoints and ports it keeps."""

import http.client
import os
import socket
from typing import TypedDict

from cli import output
from libnetwork import conflist, state
from libnetwork.state import Endpoint, Network

SOCKET = "/run/docker/plugins/netloom.sock"
_TIMEOUT_S = 5.0
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


class NetworkDocument(TypedDict):
    id: str
    name: str  # towards plugins and ipamd
    type: str
    conflist: str
    bridge: str
    subnets: list[str]
    endpoints: int


class PortDocument(TypedDict):
    protocol: str
    host_ip: str  # "": every address
    host_port: int
    container_port: int


class EndpointDocument(TypedDict):
    id: str
    network_id: str
    addresses: list[str]
    mac: str
    ports: list[PortDocument]  # published now, with those that the shim chose


class DockerDocument(TypedDict):
    socket: str
    answers: bool
    error: str
    networks: list[NetworkDocument]
    endpoints: list[EndpointDocument]


def look(state_dir: str, plugin_socket: str = SOCKET) -> DockerDocument | None:
    """None where the shim never kept anything on this host, or where this user may not look."""
    directory = os.path.join(state_dir, "docker")
    try:
        networks, endpoints = state.peek(directory, Network), state.peek(directory, Endpoint)
    except OSError:
        return None
    error = _ask(plugin_socket)
    return DockerDocument(
        socket=plugin_socket,
        answers=not error,
        error=error,
        networks=[_network(network, endpoints) for network in networks],
        endpoints=[_endpoint(endpoint) for endpoint in endpoints],
    )


def problems(found: DockerDocument | None) -> list[str]:
    """What keeps Docker from the networks that it has of us."""
    if found is None or found["answers"] or not found["networks"]:
        return []
    return [
        f"Docker's driver does not answer at {found['socket']}: {found['error']}: "
        "systemctl start netloom-docker.socket netloom-docker.service"
    ]


def fact(found: DockerDocument) -> str:
    """One line."""
    does = "answers" if found["answers"] else f"does not answer ({found['error']})"
    return f"driver {does}, {len(found['networks'])} networks, {len(found['endpoints'])} endpoints"


def print_tables(found: DockerDocument) -> None:
    """Networks and endpoints, for people."""
    if found["networks"]:
        output.line("")
        output.table(
            ("DOCKER NETWORK", "TYPE", "BRIDGE", "SUBNETS", "ENDPOINTS"),
            [
                (
                    one["id"][:12],
                    f"conflist {one['conflist']}" if one["conflist"] else one["type"],
                    one["bridge"],
                    " ".join(one["subnets"]),
                    str(one["endpoints"]),
                )
                for one in found["networks"]
            ],
            ("ENDPOINTS",),
        )
    if found["endpoints"]:
        output.line("")
        output.table(
            ("ENDPOINT", "DOCKER NETWORK", "MAC", "ADDRESSES", "PORTS"),
            [
                (
                    one["id"][:12],
                    one["network_id"][:12],
                    one["mac"],
                    " ".join(one["addresses"]),
                    " ".join(map(_port_text, one["ports"])),
                )
                for one in found["endpoints"]
            ],
        )


def _network(network: Network, endpoints: list[Endpoint]) -> NetworkDocument:
    options = network.options
    return NetworkDocument(
        id=network.id,
        name=conflist.name(network),
        type="" if options.conflist else options.type,
        conflist=options.conflist,
        bridge=conflist.bridge(network) if options.type == "bridge" and not options.conflist else "",
        subnets=list(network.pools),
        endpoints=sum(one.network_id == network.id for one in endpoints),
    )


def _endpoint(endpoint: Endpoint) -> EndpointDocument:
    return EndpointDocument(
        id=endpoint.id,
        network_id=endpoint.network_id,
        addresses=list(endpoint.addresses),
        mac=endpoint.mac,
        ports=[
            PortDocument(
                protocol=_PROTOCOLS.get(one.proto, str(one.proto)),
                host_ip=one.host_ip,
                host_port=one.host_port,
                container_port=one.port,
            )
            for one in endpoint.ports or ()
        ],
    )


def _port_text(port: PortDocument) -> str:
    """As docker ps writes it."""
    where = f"[{port['host_ip']}]" if ":" in port["host_ip"] else port["host_ip"] or "*"
    return f"{where}:{port['host_port']}->{port['container_port']}/{port['protocol']}"


def _ask(path: str) -> str:
    """Why it does not answer; "" where it does. Not by Plugin.Activate, which says that a dockerd has started."""
    connection = http.client.HTTPConnection("docker", timeout=_TIMEOUT_S)
    try:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(_TIMEOUT_S)
        connection.sock.connect(path)
        connection.request("POST", "/NetworkDriver.GetCapabilities", body=b"")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return getattr(error, "strerror", None) or str(error)
    finally:
        connection.close()
    return "" if b'"Scope"' in body else f"status {answer.status}: {body[:200].decode(errors='replace')}"
