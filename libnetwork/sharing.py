"""Overlay networks in Docker: the same network, by the same name, in the Docker of every host.

A network of Docker's belongs to one host, and Docker tells its driver neither the name nor who else has it. So
- ipamd knows under which name the hosts' Dockers show an overlay (`Network.docker`): the shim that was asked to make
  one tells it (ShareNetwork), and every shim follows, and makes through Docker's API what its Docker lacks;
- a network that was made without our IPAM driver would have addresses that other hosts have, too. It is replaced:
  another one of the same name, with our IPAM driver, then the first one goes;
- whoever removes a shared network in one Docker ends the sharing, and it goes from all. ipamd refuses that while a
  container of Docker's anywhere is on it. Docker removes the network whatever its driver answers; so another one is
  there before Docker gets the refusal.

Nothing is removed that a container is on or is to be on when it starts, nor what is not ours. What cannot be done is a
problem (`libnetwork.state.Problem`), told in the log once, and tried again, ever more rarely.

Docker calls us back while it serves our own call, so what these calls need does not take `_turn`.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_network

import msgspec

from ipamd.client import Client, IpamError
from libnetwork import docker, sticky
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import SPACE
from libnetwork.messages import CreateNetwork, IpamData
from libnetwork.options import OVERLAY
from libnetwork.overlays import Overlays, gateways, subnets
from libnetwork.state import Network, Problem, Shown, State
from protos.ipam.v1 import ipam_pb2 as pb
from telemetry import log

_logger = logging.getLogger("netloom-docker")
DRIVER = "netloom"
INTERVAL_S = 1.0
_LOOK_S = 10.0  # Docker is asked at least so often, and whenever something changed
_ABSENT_S = 10.0  # a network that ipamd does not know any more: it may be about to hear of it
_LOST_S = 10.0  # one that Docker does not list any more: we may be about to hear that it is being removed
_MOST_PAUSE_S = 30.0
_VISIBLE_S = 5.0  # until Docker lists what it just had made
_REPLACED = "another one has the cluster's addresses"
_POLL_S, _MOST_POLL_S = 0.002, 0.1


class Sharing:
    """See the module."""

    def __init__(
        self,
        state: State,
        client: Callable[[], Client],
        docker_socket: str,
        await_releases: Callable[[], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        """`client` is the calling thread's; `await_releases` returns when ipamd has every address that came back."""
        self._state = state
        self._client = client
        self._overlays = Overlays(client)
        self._docker = docker_socket
        self._await_releases = await_releases
        self._interval_s = interval_s
        self._turn = threading.Lock()
        self._mutex = threading.Lock()  # of the five below
        self._awaited: list[str] = []  # ids of what Docker is about to list
        self._making: list[str] = []  # overlays that we have Docker make, since all hosts share them
        self._removing: list[str] = []  # ids that we have Docker remove
        self._going: list[str] = []  # overlays that somebody has Docker remove
        self._replaced: dict[str, tuple[Network, docker.Network]] = {}  # by the overlay's name; to go for a new one
        self._woken = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="netloom-share", daemon=True)
        # Of the thread, and under `_turn`:
        self._seen: object = None
        self._next_look = 0.0
        self._absent: dict[str, float] = {}  # since when ipamd does not know an overlay that Docker has
        self._lost: dict[str, float] = {}  # since when Docker does not list an overlay that it had
        self._pauses: dict[str, tuple[float, float]] = {}  # not before, and how long the pause is
        self._problems: dict[str, str] = {}
        self._complaint = ""

    def start(self) -> None:
        """Begin to follow."""
        self._problems = {one.id: one.text for one in self._state.all(Problem) if not sticky.is_ours(one)}
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is under way."""
        self._stopped = True
        self._woken.set()
        self._thread.join()

    def wake(self) -> None:
        """Something may have changed: look now."""
        self._woken.set()

    # Docker's calls

    def admit(self, network: Network, asked: CreateNetwork) -> Network:
        """A new overlay network, judged by its definition.

        Raises:
            DriverError: it cannot be like this; with the remedy.
        """
        name = network.options.network
        definition = self._overlays.get(name)
        pools = subnets(definition)
        if 4 not in pools:
            raise DriverError(f"overlay network {name} has no IPv4 subnet, and Docker makes no network without one")
        if network.options.internal and not definition.internal:
            raise DriverError(
                f"--internal: overlay network {name} has a way out, on all hosts; leave --internal out, or take a "
                "network that was made with netloom network create NAME --type overlay --internal"
            )
        self._refuse_second(network)
        four, six = asked.ipv4_data or (), asked.ipv6_data or ()
        if any(one.address_space != SPACE for one in (*four, *six)) or not four:
            return msgspec.structs.replace(network, interim=True)
        if definition.internal and not network.options.internal:
            raise DriverError(f"overlay network {name} has no way out; add --internal")
        _check_pools(definition, four, 4)
        if network.options.ipv6:
            _check_pools(definition, six, 6)
        with self._mutex:
            return msgspec.structs.replace(network, shared=name in self._making)

    def _refuse_second(self, network: Network) -> None:
        for other in self._of(network.options.network):
            if other.id == network.id or other.interim:
                continue
            if not self._is_there(other):
                continue  # Docker forgot it
            shown = other.shown.name if other.shown is not None else other.id[:12]
            raise DriverError(
                f"option network={network.options.network}: Docker has this overlay network already, as {shown}; use "
                "that, or remove it first (docker network rm)"
            )

    def _is_there(self, network: Network) -> bool:
        """Whether Docker lists it. Raises DriverError where it does not answer."""
        try:
            return docker.network(self._docker, network.id) is not None
        except docker.DockerAwayError as error:
            raise DriverError(f"network {network.id[:12]}: {error}") from error

    def created(self, network: Network) -> None:
        """Docker gets the answer to CreateNetwork now, and lists it then: to be shared, or replaced.

        Where it replaces another one, that goes now: for a moment there is none. Were it to go before, that moment
        would be longer; and after, the name would be ambiguous for as long.
        """
        with self._mutex:
            self._awaited.append(network.id)
            replaced = None if network.interim else self._replaced.pop(network.options.network, None)
        if replaced is not None:
            with contextlib.suppress(docker.DockerAwayError, docker.RefusedError):  # there is another chance
                self._remove(*replaced, _REPLACED)
        self._woken.set()

    @contextlib.contextmanager
    def going(self, network: Network) -> Iterator[None]:
        """Docker is removing a network, and lists it no more: it is not made again for the duration of the block."""
        with self._noted(self._going, network.options.network):
            yield

    def removed(self, network: Network) -> None:
        """Docker removes a network, as somebody wishes: it is to go from all hosts. Within `going`.

        Raises:
            DriverError: it is in use, and another one is there instead.
        """
        with self._mutex:
            if network.interim or network.id in self._removing:
                return
        with self._turn:
            definition = self._overlays.find(network.options.network)
            if definition is None or not definition.docker:
                return
            self._woken.set()
            if network.shown is not None and network.shown.name != definition.docker:
                return  # another name of this host's own
            if any(self._is_there(one) for one in self._of(definition.name)):
                return  # one of two
            self._await_releases()
            try:
                self._client().share_network(definition.name, "")
            except IpamError as error:
                log.event(
                    _logger,
                    "warning",
                    "a shared network is not to be removed, and comes back",
                    network=definition.name,
                    docker=definition.docker,
                    error=error.message,
                )
                refusal = DriverError(f"network {definition.docker} comes back: {error.message}")
                try:
                    self._make(definition, network.shown or Shown(definition.docker))
                except (docker.DockerAwayError, docker.RefusedError) as again:
                    refusal.add_note(f"not yet: {again}")
                raise refusal from error
            log.event(_logger, "info", "removed for all hosts", network=definition.name, docker=definition.docker)

    def removing(self, id: str) -> bool:  # noqa: A002 - Docker's word
        """Whether it is us who has Docker remove this network."""
        with self._mutex:
            return id in self._removing

    def shared_in_docker(self, name: str) -> tuple[docker.Network, pb.Network] | None:
        """The overlay network that all hosts show, and that goes from all when Docker removes this one; None where this
        one is something else. `name`: or its id, or the beginning of that.

        Raises:
            DriverError: ipamd is away, or Docker.
            DockerAwayError
        """
        if not any(self._of()):
            return None
        one = docker.network(self._docker, name)
        network = self._state.find(Network, one.id) if one is not None else None
        if one is None or network is None or network.options.type != OVERLAY or network.interim:
            return None
        definition = self._overlays.find(network.options.network)
        if definition is None or definition.docker != one.name:
            return None
        if any(other.id != one.id and self._is_there(other) for other in self._of(definition.name)):
            return None  # one of two
        self._await_releases()
        return one, definition

    def why_interim(self, network: Network) -> str:
        """What keeps a network from being replaced, or that this is about to happen."""
        problem = self._state.find(Problem, network.options.network)
        return problem.text if problem is not None else "it is being replaced, try again"

    # Following

    def _run(self) -> None:
        while not self._stopped:
            woken = self._woken.wait(self._interval_s)
            self._woken.clear()
            with self._mutex:
                awaited, self._awaited = self._awaited, []
            try:
                for one in awaited:
                    self._await(one)
                self.once(look=woken)
            except (docker.DockerAwayError, DriverError) as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001 - the next time may fare better
                self._complain(repr(error))
            else:
                self._complaint = ""

    def _complain(self, text: str) -> None:
        self._next_look = 0.0
        if text != self._complaint:
            log.event(_logger, "warning", "cannot follow the shared networks", error=text)
        self._complaint = text

    def _await(self, id: str) -> None:  # noqa: A002 - Docker's word
        """Until Docker lists it."""
        until, pause_s = time.monotonic() + _VISIBLE_S, _POLL_S
        while docker.network(self._docker, id) is None and self._state.find(Network, id) is not None:
            if time.monotonic() > until:
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_POLL_S)

    def once(self, *, look: bool = True) -> None:
        """Compare, and do what is to be done; unless `look`, only where something changed, or is still to be done.

        Raises:
            DriverError: ipamd is away.
            DockerAwayError
        """
        with self._turn:
            known = self._overlays.all()
            seen = [(one.name, one.docker) for one in known.values()]
            if not any(docker_name for _, docker_name in seen) and not any(self._of()):
                self._tell({})
                return
            now = time.monotonic()
            if not look and seen == self._seen and now < self._next_look:
                return
            problems = self._compare(known)
            self._tell(problems)
            self._seen, self._next_look = (
                seen,
                now + (self._interval_s if problems or self._absent or self._lost else _LOOK_S),
            )

    def _compare(self, known: dict[str, pb.Network]) -> dict[str, str]:
        """What could not be done, by the overlay's name."""
        listed = docker.networks(self._docker)
        here: dict[str, list[tuple[Network, docker.Network]]] = {}
        for one in sorted(listed, key=lambda one: one.created):
            network = self._state.find(Network, one.id)
            if network is not None and network.options.type == OVERLAY:
                here.setdefault(network.options.network, []).append((self._learned(network, one), one))
        wanted = {one.name for one in known.values() if one.docker}
        self._lost = {name: since for name, since in self._lost.items() if name in wanted and name not in here}
        problems = {}
        for name in sorted(here.keys() | wanted):
            not_before, pause_s = self._pauses.get(name, (0.0, 0.0))
            if time.monotonic() < not_before:
                problems[name] = self._problems.get(name, "")
                continue
            try:
                self._bring_in_line(name, known.get(name), here.get(name, []), listed)
            except (docker.RefusedError, DriverError, IpamError) as error:
                problems[name] = error.message if isinstance(error, IpamError) else str(error)
                pause_s = min(max(2 * pause_s, self._interval_s), _MOST_PAUSE_S)
                self._pauses[name] = time.monotonic() + pause_s, pause_s
            else:
                self._pauses.pop(name, None)
        return problems

    def _learned(self, network: Network, one: docker.Network) -> Network:
        shown = Shown(one.name, dict(one.labels), one.attachable, dict(one.options))
        if network.shown != shown:
            network = msgspec.structs.replace(network, shown=shown)
            if not network.interim:  # which is about to go
                self._state.put(network)
        return network

    def _bring_in_line(
        self,
        name: str,
        definition: pb.Network | None,
        here: list[tuple[Network, docker.Network]],
        listed: Iterable[docker.Network],
    ) -> None:
        """One overlay. Raises DockerAwayError, RefusedError, DriverError, IpamError."""
        final = [both for both in here if not both[0].interim]
        for interim, one in here:
            if interim.interim:
                self._take_over(interim, one, definition, bool(final))
        if final:
            self._settle(*self._one_of(final), definition)
        elif definition is not None and definition.docker and not here and self._may_be_made(name):
            for one in listed:
                if one.name == definition.docker:
                    raise DriverError(
                        f"overlay network {name} is to be {one.name} in every host's Docker, and this one has another "
                        f"network of this name (driver {one.driver}); remove that (docker network rm {one.id[:12]})"
                    )
            self._make(definition, Shown(definition.docker))
            self._lost.pop(name, None)

    def _may_be_made(self, name: str) -> bool:
        """Not while it is being removed: Docker lists it no more before it tells us."""
        with self._mutex:
            if name in self._going:
                self._lost.setdefault(name, time.monotonic())
                return False
        if not self._of(name):
            return True
        return time.monotonic() - self._lost.setdefault(name, time.monotonic()) >= _LOST_S

    def _one_of(self, final: list[tuple[Network, docker.Network]]) -> tuple[Network, docker.Network]:
        """Two came to be at once: the one that is used stays, else the first one."""
        if len(final) == 1:
            return final[0]
        used = [docker.users(self._docker, one) for _, one in final]
        kept = next((index for index, users in enumerate(used) if users), 0)
        for index, (network, one) in enumerate(final):
            if index != kept and not used[index]:
                self._remove(network, one, "there are two of them")
        return final[kept]

    def _take_over(self, interim: Network, one: docker.Network, definition: pb.Network | None, replaced: bool) -> None:
        if definition is None:
            name = interim.options.network
            raise DriverError(f"overlay network {name} is gone; remove {one.name} (docker network rm)")
        began = time.monotonic()
        if not replaced:
            with self._mutex:
                self._replaced[definition.name] = interim, one
            try:
                self._make_again(definition, interim.shown or Shown(one.name))
            finally:
                with self._mutex:
                    self._replaced.pop(definition.name, None)
        if docker.network(self._docker, one.id) is not None:
            self._remove(interim, one, _REPLACED)
        log.event(
            _logger,
            "info",
            "replaced, for the cluster's addresses; its id is another one now",
            network=definition.name,
            docker=one.name,
            former=one.id,
            took_ms=round((time.monotonic() - began) * 1000, 1),
        )
        self._woken.set()

    def _make_again(self, definition: pb.Network, shown: Shown) -> None:
        """What Docker refuses after all is tried once more, as the one that it replaces is gone by then."""
        try:
            self._make(definition, shown)
        except docker.RefusedError as error:
            with self._mutex:
                if definition.name in self._replaced:
                    raise  # that one is still there
            log.event(_logger, "warning", "once more", network=definition.name, error=str(error))
            self._make(definition, shown)

    def _settle(self, network: Network, one: docker.Network, definition: pb.Network | None) -> None:
        """A network that is as it should be: shared, or no longer."""
        name = network.options.network
        if definition is None:
            since = self._absent.setdefault(name, time.monotonic())
            if time.monotonic() - since < _ABSENT_S:
                return
        self._absent.pop(name, None)
        if definition is not None and definition.docker:
            if not network.shared:
                self._state.put(msgspec.structs.replace(network, shared=True))
        elif definition is not None and not network.shared:
            self._client().share_network(name, one.name)
            self._state.put(msgspec.structs.replace(network, shared=True))
            log.event(_logger, "info", "shared with all hosts", network=name, docker=one.name)
        else:
            users = docker.users(self._docker, one)
            if users:
                raise DriverError(
                    f"overlay network {name} was removed for all hosts, and {one.name} stays in this Docker as long as "
                    f"container {users[0]} refers to it: docker network disconnect {one.name} {users[0]}"
                )
            self._remove(network, one, "it was removed for all hosts")

    def _tell(self, problems: dict[str, str]) -> None:
        for name in self._problems.keys() - problems.keys():
            self._state.remove(Problem, name)
        for name, text in problems.items():
            if self._problems.get(name) != text:
                log.event(_logger, "warning", "not as it should be in Docker", network=name, error=text)
                self._state.put(Problem(name, text))
        self._problems = problems

    # What Docker does for us

    def _make(self, definition: pb.Network, shown: Shown) -> str:
        """Raises DockerAwayError, RefusedError."""
        pools = subnets(definition)
        ways = gateways(definition)
        config = [{"Subnet": pools[version], "Gateway": ways[version].partition("/")[0]} for version in sorted(pools)]
        body = {
            "Name": shown.name,
            "CheckDuplicate": False,  # it is another's, for a moment
            "Driver": DRIVER,
            "Internal": definition.internal,
            "Attachable": shown.attachable,
            "EnableIPv6": 6 in pools,
            "IPAM": {"Driver": DRIVER, "Options": {"network": definition.name}, "Config": config},
            "Options": {**shown.options, "type": OVERLAY, "network": definition.name},
            "Labels": shown.labels,
        }
        with self._noted(self._making, definition.name if definition.docker else ""):
            made = docker.create_network(self._docker, body)
        log.event(_logger, "info", "made in Docker", network=definition.name, docker=shown.name, id=made)
        return made

    def _remove(self, network: Network, one: docker.Network, why: str) -> None:
        """Raises DockerAwayError, RefusedError."""
        with self._noted(self._removing, network.id):
            docker.remove_network(self._docker, one.id)
        name = network.options.network
        log.event(_logger, "info", "removed in Docker", network=name, docker=one.name, id=one.id, reason=why)

    @contextlib.contextmanager
    def _noted(self, where: list[str], what: str) -> Iterator[None]:
        with self._mutex:
            where.append(what)
        try:
            yield
        finally:
            with self._mutex:
                where.remove(what)

    def _of(self, name: str = "") -> list[Network]:
        """This shim's overlay networks (of this name)."""
        return [
            one for one in self._state.all(Network) if one.options.type == OVERLAY and name in ("", one.options.network)
        ]


def _check_pools(definition: pb.Network, data: Iterable[IpamData], version: int) -> None:
    """Whether Docker has the network's subnet and gateway of a family, and nothing else. Raises DriverError."""
    wanted, gateway = subnets(definition).get(version, ""), gateways(definition).get(version, "")
    found = [one.pool for one in data]
    if not wanted:
        raise DriverError(f"--ipv6: overlay network {definition.name} has no IPv6 subnet; leave --ipv6 out")
    if [str(ip_network(pool)) for pool in found] != [wanted]:
        raise DriverError(
            f"overlay network {definition.name} has the subnet {wanted}, and Docker {' and '.join(found) or 'none'}: "
            f"use --ipam-driver netloom --ipam-opt network={definition.name} --subnet {wanted}"
        )
    for one in data:
        if one.gateway and one.gateway != gateway:
            raise DriverError(
                f"--gateway {one.gateway}: overlay network {definition.name} has {gateway} on every host; leave it out"
            )
        for name, address in (one.aux_addresses or {}).items():
            raise DriverError(
                f"--aux-address {name}={address}: would be kept back on this host only; leave it out, and have netloom "
                f"keep it back for all: netloom ip reserve {definition.name} {address.partition('/')[0]}"
            )
