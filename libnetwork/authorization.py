"""Docker's authorization plugin: `docker network rm` of an overlay that is in use is refused, in words; and who is
started is known before Docker wants an address (libnetwork.sticky).

Docker removes a network whatever its driver answers (libnetwork.sharing), but asks such a plugin before. That is for
hosts where dockerd has `--authorization-plugin=netloom`; without it Docker never calls us here.

- Docker asks for each request of each client, and once more with the answer to it, and serves nobody whom we do not
  answer: everything but these requests is answered in the event loop, without a look at anything.
- This is no guard. Whatever cannot be judged is allowed; what happens then is what happens without the plugin. Nor are
  `docker network prune` and what the shim itself has Docker remove any of its business.
- Judging one removal may take two seconds, or three while etcd is away, and asks Docker, who asks us whether it may
  answer: so it has threads of its own, and waits for nobody's turn.

Source: https://docs.docker.com/engine/extend/plugins_authorization/; moby, pkg/authorization.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import msgspec
from aiohttp import web

from ipamd.client import Client, IpamError
from libnetwork import docker, http
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import CLIENT
from libnetwork.messages import Asked
from libnetwork.sharing import Sharing
from libnetwork.sticky import Flights
from protos.ipam.v1 import ipam_pb2 as pb
from telemetry import log

_logger = logging.getLogger("netloom-docker")
IMPLEMENTS = "authz"
_THREADS = 4
_TELL_S = 1.5  # how long another host may take to tell of what it released
_POLL_S = 0.1
_MOST_NAMED = 4  # of each host's
_MOST_ANSWER = 4 << 20  # more than Docker tells of the requests that concern us, with its answer to them
_ALLOW = b'{"Allow":true}'
# As dockerd's router has it: with a version or without, on the decoded path.
_NETWORK = re.compile(r"(?:/v[0-9.]+)?/networks/(.+)", re.DOTALL)


def asked_of(body: bytes) -> Asked:
    """An empty one of what makes no sense: a repeated call comes without its arguments (libnetwork.http)."""
    try:
        return msgspec.json.decode(body, type=Asked)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Asked()


def removal(asked: Asked) -> str:
    """Which network a client wants to have removed: a name, an id or the beginning of one; "" for any other request."""
    try:
        path = unquote(urlsplit(asked.uri).path, errors="strict") if asked.method == "DELETE" else ""
    except ValueError:
        return ""
    found = _NETWORK.fullmatch(path)
    return found[1] if found else ""


class Authorization:
    """See the module."""

    def __init__(self, sharing: Sharing, flights: Flights, client: Callable[[], Client], docker_socket: str) -> None:
        """`client` is the calling thread's."""
        self._sharing = sharing
        self._flights = flights
        self._client = client
        self._docker = docker_socket
        self._executor = ThreadPoolExecutor(_THREADS, "netloom-judge")

    def close(self) -> None:
        """Returns when nothing is under way."""
        self._executor.shutdown()

    def routes(self) -> list[web.RouteDef]:
        """Of the plugin's HTTP side."""
        return [
            web.post("/AuthZPlugin.AuthZReq", self._before),
            web.post("/AuthZPlugin.AuthZRes", self._after),
        ]

    async def _before(self, request: web.Request) -> web.Response:
        try:
            asked = asked_of(await request.read())
        except web.HTTPRequestEntityTooLarge:
            asked = Asked()
        name = removal(asked)
        await self._flights.before(asked)
        if not name or self._sharing.removing(name):
            return _answer(_ALLOW)
        began = time.monotonic()
        why = await asyncio.get_running_loop().run_in_executor(self._executor, self._why_not, name)
        took_ms = round((time.monotonic() - began) * 1000, 1)
        log.event(_logger, "info" if why else "debug", "removal judged", network=name, took_ms=took_ms, refused=why)
        return _answer(msgspec.json.encode({"Allow": False, "Msg": why}) if why else _ALLOW)

    async def _after(self, request: web.Request) -> web.Response:
        """With Docker's whole answer, of any size."""
        body = bytearray()
        async for part in request.content.iter_any():
            if len(body) <= _MOST_ANSWER:
                body += part
        if len(body) <= _MOST_ANSWER:
            self._flights.after(bytes(body))
        return _answer(_ALLOW)

    def _why_not(self, name: str) -> str:
        """What keeps a network from being removed; "" where nothing does."""
        try:
            return self.judge(name)
        except (DriverError, docker.DockerAwayError) as error:
            log.event(_logger, "warning", "a removal cannot be judged, and is allowed", network=name, error=str(error))
        except Exception as error:  # noqa: BLE001 - Docker would refuse it, without a word
            log.event(_logger, "error", "a removal cannot be judged, and is allowed", network=name, error=repr(error))
        return ""

    def judge(self, name: str) -> str:
        """As the module says, of a network by its name, id or the beginning of that; "" where it may go.

        Raises:
            DriverError: ipamd is away.
            DockerAwayError: it does not answer, or nothing is meant, or more than one.
        """
        found = self._sharing.shared_in_docker(name)
        if found is None:
            return ""
        one, definition = found
        until = time.monotonic() + _TELL_S
        while True:
            try:
                held = list(
                    self._client().list_allocations(
                        pb.ListAllocationsRequest(pool=definition.name, client=CLIENT, cluster=True)
                    )
                )
            except IpamError as error:
                return f"network {one.name} is shared with other hosts, and whether they use it is not known: " + (
                    error.message
                )
            if not held:
                return ""
            here = docker.addresses(self._docker, one)
            if here or time.monotonic() > until:
                return (
                    f"network {one.name} is in use by {_who(held, here)}; stop these containers, or disconnect them "
                    f"(docker network disconnect {one.name} CONTAINER)"
                )
            time.sleep(_POLL_S)


def _who(held: Iterable[pb.Allocation], here: dict[str, str]) -> str:
    """`here`: names of this host's containers by address; Docker does not tell those of others."""
    by_node: dict[str, list[str]] = {}
    for allocation in held:
        for one in allocation.addresses:
            address = one.cidr.partition("/")[0]
            name = here.get(address)
            by_node.setdefault(allocation.key.node, []).append(f"{name} ({address})" if name else address)
    return ", and by ".join(f"{_some(found)} on {node}" for node, found in sorted(by_node.items()))


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type=http.CONTENT_TYPE)
