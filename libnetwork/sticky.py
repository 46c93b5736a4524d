"""Addresses that follow containers' names: for whom Docker asks for an address, where a network is `-o sticky=true`.

Docker names no container at RequestAddress. But as its authorization plugin (libnetwork.authorization) the shim hears
of each start, restart and connect before Docker begins with it, and again when it is over. So it knows which are under
way, each a flight, and which pools they are going to want an address of.

- Flights that want an address of the same pool go one after the other: the next one when the one before has what it
  wants, or is over. A restart first stops its container, which may take long, and hinders nobody: it takes its turn
  when the container's endpoint goes (`leaves`). One that is being attached to a first network asks for nothing until
  that is done, and takes its turn anew then (`joined`): so the plugins of several may run at once.
- Docker also starts containers by itself, where their restart policy says so. It lists these as restarting, so the ones
  of the pool's network count as well. Who is meant of several is found by Docker's own lock: it tells nothing of a
  container that it is starting, so whoever it does tell of is not the one.
- Whoever is not certain gets an address like any other: a container may lose its own, but never gets another one's.
  Nothing is certain while a request is under way that may start anything; in the first while after the shim's own
  start, as a flight may be older than that; and before Docker serves its API, that is at boot, since only then it
  begins to ask.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from libnetwork import docker
from libnetwork.messages import Asked
from libnetwork.options import OVERLAY
from libnetwork.overlays import pool_id
from libnetwork.state import Endpoint, Network, Pool, Problem, State
from telemetry import log

_logger = logging.getLogger("netloom-docker")
PATIENCE_S = 10.0  # how long one flight keeps others waiting
_MOST_S = 60.0  # how long one waits for all others
_LOOK_S = 1.0
_UNSURE_S = 30.0  # after the shim's start; a call of Docker's that was cut off is repeated for 15 s
_BLIND_S = 3600.0  # Docker tells of no end where another authorization plugin refuses a request after us
_TELLS_S = 1.0  # how long Docker may take to tell of a container that nobody works on
_THREADS = 4
# Of the 32 threads that serve Docker's calls, and wait there.
_MOST_LEAVING, _MOST_JOINING = 12, 12
_MOST_GOING = 8  # flights that do not have all that they want
_RUNS = ("running", "paused")
_PROBLEM = "sticky-"

# As dockerd's router has it: with a version or without, on the decoded path.
_START = re.compile(r"(?:/v[0-9.]+)?/containers/(.+)/(start|restart)", re.DOTALL)
_CONNECT = re.compile(r"(?:/v[0-9.]+)?/networks/(.+)/connect", re.DOTALL)
_BUILD = re.compile(r"(?:/v[0-9.]+)?/build")
_OF_DOCKER = frozenset(("", "default", "bridge", "host", "none"))


class _Addresses(msgspec.Struct, frozen=True):
    four: str = msgspec.field(name="IPv4Address", default="")
    six: str = msgspec.field(name="IPv6Address", default="")


class _EndpointConfig(msgspec.Struct, frozen=True):
    addresses: _Addresses | None = msgspec.field(name="IPAMConfig", default=None)


class _Connect(msgspec.Struct, frozen=True):
    container: str = msgspec.field(name="Container")
    config: _EndpointConfig | None = msgspec.field(name="EndpointConfig", default=None)


class Wish(msgspec.Struct, frozen=True):
    """A request after which Docker may want an address. `verb`: start, restart, connect; build: for containers that
    nobody named. `container` and `network`: a name, an id, or the beginning of one; `named`: addresses."""

    verb: str
    container: str = ""
    network: str = ""
    named: tuple[str, ...] = ()


def wish_of(asked: Asked) -> Wish | None:
    """None for any other request, and what Docker will not understand either."""
    if asked.method != "POST":
        return None
    try:
        parts = urlsplit(asked.uri)
        path = unquote(parts.path, errors="strict")
        started, connected = _START.fullmatch(path), _CONNECT.fullmatch(path)
        if started:
            return Wish(started[2], started[1])
        if connected:
            wanted = msgspec.json.decode(asked.body or b"{}", type=_Connect)
            named = wanted.config.addresses if wanted.config is not None else None
            addresses = tuple(filter(None, (named.four, named.six))) if named is not None else ()
            return Wish("connect", wanted.container, connected[1], addresses)
        if _BUILD.fullmatch(path) and not _OF_DOCKER.issuperset(parse_qs(parts.query).get("networkmode", ())):
            return Wish("build")
    except (msgspec.DecodeError, ValueError):
        pass
    return None


@dataclass(eq=False, slots=True)
class _Flight:
    """`container`: its id, "" where it may be any. `wants`: pools of which it has not asked for an address yet;
    `leaving`: endpoints that go before it does. `turn`: is done when it may go; None before it asks for its turn.
    `given`: pools and addresses; `attaching`: it asks for nothing until it has been attached with one of these."""

    asked: Asked
    since: float
    container: str = ""
    name: str = ""
    wants: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    turn: Future[None] | None = None
    began: float = 0.0
    given: set[tuple[str, str]] = field(default_factory=set)
    attaching: bool = False

    @property
    def goes(self) -> bool:
        return self.turn is not None and self.turn.done()

    def waits_for(self, other: "_Flight") -> bool:
        """Whether both want the same. Docker does one thing at a time with a container: these need not wait here."""
        return self.container != other.container and not self.wants.isdisjoint(other.wants)


class Flights:
    """See the module. Every method but `before` may run in any thread."""

    def __init__(
        self,
        state: State,
        docker_socket: str,
        all_overlays: bool = False,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`all_overlays`: also those that do not say whether they are sticky."""
        self._state = state
        self._docker = docker_socket
        self._all_overlays = all_overlays
        self._clock = clock
        self._patience_s = patience_s
        self._executor = ThreadPoolExecutor(_THREADS, "netloom-sticky")
        self._leaving = threading.BoundedSemaphore(_MOST_LEAVING)
        self._joining = threading.BoundedSemaphore(_MOST_JOINING)
        self._mutex = threading.Lock()  # of the three below
        self._flights: list[_Flight] = []
        self._queue: list[_Flight] = []  # those that have asked for their turn, in that order
        self._unsure_until = clock() + _UNSURE_S
        self._is_asked = False  # whether Docker asks before it does anything

    def close(self) -> None:
        """Returns when nothing is under way."""
        self._executor.shutdown()

    # Docker's requests

    def activate(self) -> None:
        """A dockerd has started: nothing is under way."""
        with self._mutex:
            self._is_asked, self._unsure_until = False, 0.0
            gone, self._flights = self._flights, []
            self._queue.clear()
            for flight in gone:
                _let_go(flight, 0.0)

    async def before(self, asked: Asked) -> None:
        """A request that Docker is about to serve; returns when it may."""
        self._is_asked = True
        wish = wish_of(asked)
        if wish is None or not self._sticky():
            return
        flight = await asyncio.get_running_loop().run_in_executor(self._executor, self._begin, asked, wish)
        if flight is None or flight.turn is None:
            return
        turn = asyncio.wrap_future(flight.turn)
        until = time.monotonic() + _MOST_S
        while not turn.done():
            await asyncio.wait([turn], timeout=_LOOK_S)
            self._look_again(flight, until)

    def after(self, body: bytes) -> None:
        """A request that is over: AuthZRes, as it came."""
        if not self._flights:
            return
        try:
            asked = msgspec.json.decode(body, type=Asked)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        with self._mutex:
            # Of two of the same, the one that has had its turn.
            found = sorted((one for one in self._flights if one.asked == asked), key=lambda one: not one.goes)
            if found:
                self._end(found[0])

    def leaves(self, endpoint: str) -> None:
        """An endpoint has ended; returns when Docker may go on with its container."""
        with self._mutex:
            flight = next((one for one in self._flights if endpoint in one.leaving), None)
            if flight is None:
                return
            flight.leaving.clear()
            self._line_up(flight)
        self._wait(flight, self._leaving)

    def joined(self, network: str, addresses: Iterable[str]) -> None:
        """A container has been attached to a network with these addresses; returns when Docker may go on with it."""
        pools = self._sticky().get(network, {})
        given = {(pool, address) for pool in pools for address in addresses}
        with self._mutex:
            attached = [one for one in self._queue if one.attaching and not given.isdisjoint(one.given)]
            for one in attached:
                one.attaching = False
            flight = next((one for one in attached if one.wants), None)
            if flight is None:
                return
            flight.turn = Future()
            self._advance()
        self._wait(flight, self._joining)

    def _wait(self, flight: _Flight, places: threading.BoundedSemaphore) -> None:
        """Returns when it is a flight's turn, or where nobody more may wait."""
        turn = flight.turn
        if turn is not None and places.acquire(blocking=False):
            until = time.monotonic() + _MOST_S
            try:
                while not turn.done():
                    wait([turn], _LOOK_S)
                    self._look_again(flight, until)
            finally:
                places.release()
        self._hurry(flight)

    def _look_again(self, flight: _Flight, until: float) -> None:
        """Whoever is before it may have kept it waiting for too long by now."""
        with self._mutex:
            self._advance()
        if time.monotonic() > until:
            self._hurry(flight)

    def who(self, pool: str) -> str:
        """The name of the container for which Docker wants any address of a pool; "" where that is not certain, or not
        to count."""
        sticky = self._sticky()
        networks = {network for network, pools in sticky.items() if pool in pools}
        if not networks:
            return ""
        with self._mutex:
            why = self._why_unsure()
            flights = [one for one in self._queue if one.goes and not one.attaching and pool in one.wants]
        try:
            flight = self._one_of(flights, networks, pool) if not why else None
        except docker.DockerAwayError as error:
            flight, why = None, str(error)
        if flight is None:
            why = why or "several containers are being started, or none that is known"
            log.event(_logger, "info", "not certain for whom this address is", pool=pool, reason=why)
            return ""
        with self._mutex:
            for one in self._queue:
                if one.container == flight.container:
                    one.wants.discard(pool)
                    # Docker asks for both families before it goes on.
                    one.attaching = all(one.wants.isdisjoint(sticky[network]) for network in networks)
            self._advance()
        log.event(_logger, "debug", "an address is wanted", pool=pool, container=flight.name)
        return flight.name

    def given(self, pool: str, address: str, name: str) -> None:
        """Which address a container got after `who`; without a length."""
        with self._mutex:
            for flight in self._queue:
                if flight.name == name and flight.attaching:
                    flight.given.add((pool, address))

    def _why_unsure(self) -> str:
        now = self._clock()
        if not self._is_asked:
            return "Docker does not ask before it starts containers, or not yet"
        if now < self._unsure_until:
            return "a container may have been started before netloom-docker was"
        if any(not one.container and now - one.since < _BLIND_S for one in self._flights):
            return "a request is under way that may start any container"
        return ""

    def _one_of(self, flights: list[_Flight], networks: set[str], pool: str) -> _Flight | None:
        """Whose request it is; None where that is not certain. Raises DockerAwayError."""
        known = {one.container: one for one in flights}
        family = self._family(pool)
        # Docker's own starts first: most of these wait, and Docker tells of them at once.
        found: dict[str, _Flight] = {}
        for one in docker.containers(self._docker, status=["restarting"]):
            for place in one.places.values():
                if place.network_id in networks and not _names(place.named, family) and one.id not in known:
                    found[one.id] = _Flight(Asked(), 0.0, one.id, one.name)
        found |= known
        for one_id in list(found):
            if len(found) > 1 and docker.is_let_alone(self._docker, one_id, _TELLS_S):
                del found[one_id]
        return next(iter(found.values())) if len(found) == 1 else None

    # Their order

    def _begin(self, asked: Asked, wish: Wish) -> _Flight | None:
        """None where no address of a sticky network will be wanted."""
        flight = _Flight(asked, self._clock())
        try:
            if wish.verb != "build" and not self._look(flight, wish):
                return None
        except docker.DockerAwayError as error:
            log.event(_logger, "warning", "cannot tell which container is to start", uri=asked.uri, error=str(error))
            flight.container = ""
        with self._mutex:
            for other in self._flights:
                if wish.verb == "connect" and other.container == flight.container:
                    other.wants |= flight.wants  # where it gets there before that start, it is part of it
            self._flights.append(flight)
            if any(self._has_gone(one) for one in flight.leaving):
                flight.leaving.clear()
            if flight.container and not flight.leaving:
                self._line_up(flight)
        return flight

    def _has_gone(self, endpoint: str) -> bool:
        """Whether `leaves` was called, or is about to be."""
        found = self._state.find(Endpoint, endpoint)
        return found is None or found.ended

    def _look(self, flight: _Flight, wish: Wish) -> bool:
        """Whose it is, and what it is going to want; False where that is nothing. Raises DockerAwayError.

        The container stays "" where Docker does not know it.
        """
        found = docker.find_container(self._docker, wish.container)
        if found is None:
            return True  # Docker says so at once, or knows better
        sticky = self._sticky()
        # Where a container is connected that does not run, that is over at once; but it may be about to run.
        connected = {wish.network: docker.Place(named=wish.named)}
        places = connected if wish.verb == "connect" else found.places
        for name, place in places.items():
            pools = sticky.get(place.network_id or self._id(name), {})
            wants = {pool for pool, version in pools.items() if not _names(place.named, version)}
            flight.wants |= wants
            if wants and wish.verb == "restart" and found.state in _RUNS and place.endpoint_id:
                flight.leaving.add(place.endpoint_id)
        flight.container, flight.name = found.id, found.name
        return bool(flight.wants)

    def _id(self, name: str) -> str:
        found = docker.network(self._docker, name)
        return found.id if found is not None else ""

    def _line_up(self, flight: _Flight) -> None:
        flight.turn = Future()
        self._queue.append(flight)
        self._advance()

    def _advance(self) -> None:
        """Whoever waits for nobody goes."""
        now = self._clock()
        going = [one for one in self._queue if one.goes and one.wants]
        before = [one for one in going if not one.attaching and now - one.began < self._patience_s]
        places = _MOST_GOING - sum(now - one.began < _MOST_S for one in going)
        for flight in self._queue:
            if flight.goes:
                continue
            is_new = not flight.given
            if (places > 0 or not is_new) and not any(flight.waits_for(one) for one in before):
                _let_go(flight, now)
                places -= is_new
            before.append(flight)

    def _hurry(self, flight: _Flight) -> None:
        """It has waited for long enough."""
        with self._mutex:
            _let_go(flight, self._clock())

    def _end(self, flight: _Flight) -> None:
        self._flights.remove(flight)
        if flight in self._queue:
            self._queue.remove(flight)
        self._advance()

    # Which networks

    def _sticky(self) -> Mapping[str, Mapping[str, int]]:
        """The pools of each network whose addresses follow names, with their IP versions."""
        networks = [one for one in self._state.all(Network) if self._is_sticky(one)]
        if not networks:
            return {}
        local = {pool.pool: pool.id for pool in self._state.all(Pool)}
        found = {}
        for one in networks:
            if one.options.type == OVERLAY:
                found[one.id] = {pool_id(one.options.network, cidr): _version(cidr) for cidr in one.pools}
            else:
                found[one.id] = {local[cidr]: _version(cidr) for cidr in one.pools if cidr in local}
        return found

    def _is_sticky(self, network: Network) -> bool:
        if network.options.sticky is None:
            return self._all_overlays and network.options.type == OVERLAY
        return network.options.sticky

    def _family(self, pool: str) -> int:
        return next((pools[pool] for pools in self._sticky().values() if pool in pools), 0)

    # What is in the way

    def tell(self) -> None:
        """What keeps sticky networks from being that, for `netloom status`. To be called when Docker has just answered
        a request: had it asked before, that would be known."""
        there = {one.id for one in self._state.all(Problem) if is_ours(one)}
        wanted = set() if self._is_asked else {f"{_PROBLEM}{network}" for network in self._sticky()}
        for former in there - wanted:
            self._state.remove(Problem, former)
        for new in wanted - there:
            network = new.removeprefix(_PROBLEM)[:12]
            text = (
                f"network {network}: sticky has no effect, as Docker does not ask netloom before it starts containers: "
                'add "authorization-plugins": ["netloom"] to /etc/docker/daemon.json (or '
                "--authorization-plugin netloom to dockerd), then restart Docker"
            )
            log.event(_logger, "warning", "addresses do not follow names", network=network, error=text)
            self._state.put(Problem(new, text))


def is_ours(problem: Problem) -> bool:
    """Whether it was told by `Flights.tell`."""
    return problem.id.startswith(_PROBLEM) and len(problem.id) == len(_PROBLEM) + 64


def _let_go(flight: _Flight, now: float) -> None:
    if flight.turn is not None and not flight.turn.done():
        flight.began = now
        flight.turn.set_result(None)


def _names(addresses: tuple[str, ...], family: int) -> bool:
    """Whether one of these is of that IP version."""
    return any(_version(one) == family for one in addresses)


def _version(address: str) -> int:
    return 6 if ":" in address else 4
