"""What `netloom status` and `netloom gc` say of the Docker shim.

Does it answer, which networks, endpoints and ports it keeps; and what it took back when asked to compare with Docker.
"""

import contextlib
import http.client
import json
import os
import socket
from typing import Any, TypedDict

from cli import output
from libnetwork import conflist, published, state
from libnetwork.state import Endpoint, Network, Problem

SOCKET = "/run/docker/plugins/netloom.sock"
_TIMEOUT_S = 5.0
_COLLECT_TIMEOUT_S = 120.0  # it waits for the plugins of each thing that goes


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
    chosen: bool  # by the shim, as Docker named none: docker port does not show it


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
    problems: list[str]  # what keeps overlay networks from being in this Docker as they should


def look(state_dir: str, plugin_socket: str = SOCKET) -> DockerDocument | None:
    """None where the shim never kept anything on this host, or where this user may not look."""
    directory = os.path.join(state_dir, "docker")
    try:
        networks, endpoints = state.peek(directory, Network), state.peek(directory, Endpoint)
    except OSError:
        return None
    problems: list[Problem] = []
    with contextlib.suppress(OSError):  # an older shim writes none
        problems = state.peek(directory, Problem)
    error = _ask(plugin_socket)
    return DockerDocument(
        socket=plugin_socket,
        answers=not error,
        error=error,
        networks=[_network(network, endpoints) for network in networks],
        endpoints=[_endpoint(endpoint) for endpoint in endpoints],
        problems=[one.text for one in problems],
    )


def problems(found: DockerDocument | None) -> list[str]:
    """What keeps Docker from the networks that it has of us."""
    if found is None:
        return []
    texts = [f"Docker: {text}" for text in found["problems"]]
    if found["answers"] or not found["networks"]:
        return texts
    return [
        *texts,
        f"Docker's driver does not answer at {found['socket']}: {found['error']}: "
        "systemctl start netloom-docker.socket netloom-docker.service",
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
                protocol=published.protocol(one),
                host_ip=one.host_ip,
                host_port=one.host_port,
                container_port=one.port,
                chosen=one.chosen,
            )
            for one in endpoint.ports or ()
        ],
    )


def _port_text(port: PortDocument) -> str:
    """As docker ps writes it, with a word about a port that docker ps does not have."""
    where = f"[{port['host_ip']}]" if ":" in port["host_ip"] else port["host_ip"] or "*"
    ours = " (our choice)" if port["chosen"] else ""
    return f"{where}:{port['host_port']}->{port['container_port']}/{port['protocol']}{ours}"


def _ask(path: str) -> str:
    """Why it does not answer; "" where it does. Not by Plugin.Activate, which says that a dockerd has started."""
    try:
        status, body = _post(path, "NetworkDriver.GetCapabilities", b"", _TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        return _words(error)
    return "" if b'"Scope"' in body else f"status {status}: {body[:200].decode(errors='replace')}"


def _post(path: str, call: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("docker", timeout=timeout_s)
    try:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(path)
        connection.request("POST", f"/{call}", body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# netloom gc


class ThingDocument(TypedDict):
    kind: str  # endpoint, network, address, pool
    name: str  # an id; of an address its pool and itself


class SuspectedThingDocument(ThingDocument):
    missing_s: float  # for which Docker has lacked it


class CollectedDocument(TypedDict):
    socket: str
    error: str  # why nothing was compared; ""
    grace_s: float
    removed: list[ThingDocument]  # or would be
    suspected: list[SuspectedThingDocument]


def collect(dry_run: bool) -> CollectedDocument | None:
    """Has the shim compare with Docker now. None where there is none on this host; what fails is in the document."""
    if not os.path.exists(SOCKET):
        return None
    found = CollectedDocument(socket=SOCKET, error="", grace_s=0.0, removed=[], suspected=[])
    try:
        body = json.dumps({"DryRun": dry_run}).encode()
        status, answer = _post(SOCKET, "Netloom.Collect", body, _COLLECT_TIMEOUT_S)
        document: dict[str, Any] = json.loads(answer)
        found["error"] = document.get("Err", "" if status == 200 else f"status {status}")
        if not found["error"]:
            found["grace_s"] = document["GraceS"]
            found["removed"] = [_thing(one) for one in document["Removed"]]
            found["suspected"] = [
                SuspectedThingDocument(**_thing(one), missing_s=one["MissingS"]) for one in document["Suspected"]
            ]
    except (OSError, http.client.HTTPException) as error:
        found["error"] = f"the driver does not answer: {_words(error)}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        found["error"] = f"the driver's answer makes no sense: {error!r}"
    return found


def print_collected(found: CollectedDocument, would: str) -> None:
    """For people."""
    if found["error"]:
        output.line(f"Docker: nothing compared ({found['socket']}): {found['error']}")
        return
    output.line(f"{would}removed, as Docker does not have it:{'' if found['removed'] else ' nothing'}")
    if found["removed"]:
        output.table(("KIND", "NAME"), [(one["kind"], one["name"]) for one in found["removed"]])
    if found["suspected"]:
        output.line(f"Docker does not have it, and after {found['grace_s']:g} s it goes:")
        output.table(
            ("KIND", "NAME", "MISSING S"),
            [(one["kind"], one["name"], f"{one['missing_s']:g}") for one in found["suspected"]],
            ("MISSING S",),
        )


def _thing(given: dict[str, Any]) -> ThingDocument:
    return ThingDocument(kind=str(given["Kind"]), name=str(given["Name"]))
