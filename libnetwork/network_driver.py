"""Docker's remote network driver: each call, what it does, and what Docker gets back.

The way of a container, in Docker's order
- CreateEndpoint: addresses and MAC are settled and written down. Docker repeats none of this, ever.
- Join: the network's plugins run ADD in a staging namespace; the interface moves to dockerd's namespace, from where
  Docker takes it, names it and gives it addresses and routes once more: a move loses them.
- Program/RevokeExternalConnectivity: portmap alone, as its own chained ADD and DEL: which endpoint publishes changes
  while a container runs.
- Leave: Docker has yet to move the interface back, so nothing happens here.
- DeleteEndpoint: written down, and answered. Then DEL of all plugins, then whatever is left of the interface. Docker
  has no use for the outcome; what could meet with that DEL waits for it: the address's release, the network's next
  endpoint, published ports, the network's end.

When a call fails, Docker only releases the address after CreateEndpoint, and calls DeleteEndpoint after Join; errors of
Leave and DeleteEndpoint it ignores.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ipaddress import ip_interface, ip_network
from typing import Any

import msgspec

from kernel import link, macs, netns, sysctl
from kernel.errors import KernelError
from kernel.session import Session
from libnetwork import conflist, options, published
from libnetwork.chain import Chain
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import SPACE
from libnetwork.locks import Locks
from libnetwork.messages import (
    CreateEndpoint,
    CreateNetwork,
    Empty,
    EndpointRef,
    Join,
    NetworkRef,
    ProgramExternal,
)
from libnetwork.options import OVERLAY
from libnetwork.overlays import pool_id
from libnetwork.sharing import Sharing
from libnetwork.staging import Staging
from libnetwork.state import Ended, Endpoint, Network, Pool, State
from libnetwork.sticky import Flights
from telemetry import log

_logger = logging.getLogger("netloom-docker")
_PATIENCE_S = 10.0
_ENDERS = 8  # threads; the plugins of one endpoint keep one worker busy

Answer = dict[str, Any]


class NetworkDriver:
    """See the module. Every method may run in any thread; those of one endpoint wait for one another."""

    def __init__(
        self,
        state: State,
        staging: Staging,
        session: Callable[[], Session],
        path: tuple[str, ...],
        conf_dir: str,
        sharing: Sharing,
        flights: Flights,
    ) -> None:
        """`session`: the calling thread's; `path`: where the plugins' executables are."""
        self._state = state
        self._staging = staging
        self._session = session
        self._path = path
        self._conf_dir = conf_dir
        self._sharing = sharing
        self._flights = flights
        self._locks = Locks()
        self._ender = ThreadPoolExecutor(_ENDERS, "netloom-end")
        self._ending_mutex = threading.Lock()
        self._ending: dict[str, tuple[Endpoint, Future[None]]] = {}  # by id, with its DEL

    def close(self) -> None:
        """Returns when nothing is under way."""
        self._ender.shutdown()

    def settle(self, network_id: str = "", timeout_s: float | None = _PATIENCE_S) -> None:
        """Returns when the DEL of every endpoint (of a network) that had ended is over, or lasts too long: one plugin
        that hangs must not keep all containers from starting."""
        with self._ending_mutex:
            ending = [future for one, future in self._ending.values() if network_id in ("", one.network_id)]
        wait(ending, timeout_s)

    def settle_address(self, address: str) -> None:
        """Returns when no endpoint that had ended has this address any more, however long that takes."""
        with self._ending_mutex:
            ending = [future for one, future in self._ending.values() if address in _bare(one)]
        wait(ending)

    def capabilities(self, _: Empty) -> Answer:
        """Local: Docker refuses global outside a swarm."""
        return {"Scope": "local", "ConnectivityScope": "local"}

    # Networks

    def create_network(self, asked: CreateNetwork) -> Answer:
        """Writes the network down; its bridge is made with the first container."""
        found, unknown = options.parse(asked.options)
        for option in unknown:
            log.event(
                _logger, "warning", "unknown option of Docker's is ignored", option=option, network=asked.network_id
            )
        pools = (*(asked.ipv4_data or ()), *(asked.ipv6_data or ()))
        network = Network(
            asked.network_id,
            found,
            tuple(pool.pool for pool in pools if pool.pool),
            tuple(pool.gateway for pool in pools if pool.gateway),
        )
        self._check_bridge(network)
        if found.sticky and found.type != OVERLAY and all(pool.address_space != SPACE for pool in pools):
            raise DriverError(
                "option sticky=true: the addresses are not ours; add --ipam-driver netloom, or leave it out"
            )
        if found.type == OVERLAY:
            network = self._sharing.admit(network, asked)
        network = conflist.adopt(network, self._conf_dir)
        for what in conflist.lost(network):
            log.event(
                _logger,
                "warning",
                "Docker takes the interface over and does not keep this",
                what=what,
                conflist=found.conflist,
                network=network.id,
            )
        self._state.put(network)
        if found.type == OVERLAY:
            self._sharing.created(network)
        self._flights.tell()
        return {}

    def delete_network(self, asked: NetworkRef) -> Answer:
        """Forgets the network; a bridge that was made for it goes. An overlay goes from all hosts."""
        network = self._state.find(Network, asked.network_id)
        if network is None:
            return {}
        if network.options.type != OVERLAY:
            self._forget(network)
            return {}
        with self._sharing.going(network):
            self._forget(network)
            self._sharing.removed(network)
        return {}

    def _forget(self, network: Network) -> None:
        self.settle(network.id)
        left = [endpoint.id for endpoint in self._state.all(Endpoint) if endpoint.network_id == network.id]
        if left:
            raise DriverError(f"network {network.id[:12]} still has {len(left)} endpoints, such as {left[0][:12]}")
        nobody = Endpoint("none", network.id, (), "", "")
        if not network.interim:
            with contextlib.suppress(DriverError):
                conflist.chain(network, nobody, self._path).gc([])
        self._state.remove(Network, network.id)

    def _check_bridge(self, network: Network) -> None:
        if network.options.type != "bridge" or network.options.conflist:
            return
        wanted = conflist.bridge(network)
        for other in self._state.all(Network):
            if other.id != network.id and other.options.type == "bridge" and conflist.bridge(other) == wanted:
                raise DriverError(
                    f"option com.docker.network.bridge.name={wanted}: network {other.id[:12]} has this bridge"
                )

    # What nobody owns

    def owned(self) -> tuple[set[str], set[str]]:
        """The ids of all endpoints but those that have ended, and of all networks."""
        endpoints = {one.id for one in self._state.all(Endpoint) if not one.ended}
        return endpoints, {one.id for one in self._state.all(Network)}

    def end(self) -> None:
        """Detach what Docker has deleted, where that failed, or ended with an earlier shim."""
        for endpoint in list(self._state.all(Endpoint)):
            if endpoint.ended:
                self._end(endpoint)

    def discard_endpoint(self, id: str) -> None:  # noqa: A002 - Docker's word
        """Remove an endpoint that Docker does not have."""
        with self._locks.held(id):
            endpoint = self._state.find(Endpoint, id)
            if endpoint is not None:
                self._detach(endpoint)

    def discard_network(self, id: str) -> None:  # noqa: A002
        """Remove a network that Docker does not have."""
        network = self._state.find(Network, id)
        if network is not None:
            self._forget(network)

    # Endpoints

    def create_endpoint(self, asked: CreateEndpoint) -> Answer:
        """Settles addresses and MAC."""
        network = self._state.get(Network, asked.network_id)
        if network.interim:
            raise DriverError(f"overlay network {network.options.network}: {self._sharing.why_interim(network)}")
        self.settle(network.id)
        wanted = asked.interface
        addresses = tuple(a for a in (wanted.address, wanted.address_ipv6) if a) if wanted else ()
        self._end_holders(asked, addresses)
        with self._locks.held(asked.endpoint_id):
            mac = wanted.mac_address if wanted else ""
            endpoint = Endpoint(
                asked.endpoint_id, network.id, addresses, mac or _mac(addresses), f"nl{asked.endpoint_id[:12]}"
            )
            answer: Answer = {}
            if not mac:
                answer["MacAddress"] = endpoint.mac
            if not addresses:
                # Docker has no IPAM here, and asks for the addresses now: so the ADD happens now.
                try:
                    endpoint = self._attach(network, endpoint)
                except DriverError as error:
                    # Docker does not call DeleteEndpoint. What could not be undone is left to the comparison.
                    if not getattr(error, "__notes__", ()):
                        self._state.remove(Endpoint, endpoint.id)
                    raise
                for text in endpoint.addresses:
                    answer["Address" if ip_interface(text).version == 4 else "AddressIPv6"] = text
            self._state.put(endpoint)
        return {"Interface": answer}

    def _end_holders(self, asked: CreateEndpoint, addresses: tuple[str, ...]) -> None:
        """Docker gives these addresses away anew: whoever had them has ended, and its DeleteEndpoint did not get here.
        Its DEL must not come later: it would take from the kernel what the new endpoint has under that address."""
        for other in list(self._state.all(Endpoint)):
            if (
                other.network_id == asked.network_id
                and other.id != asked.endpoint_id
                and not set(addresses).isdisjoint(other.addresses)
            ):
                log.event(_logger, "warning", "endpoint ended unheard, its address is given anew", endpoint=other.id)
                self.discard_endpoint(other.id)

    def join(self, asked: Join) -> Answer:
        """Attaches, and tells Docker which interface to take and what to give it."""
        network = self._state.get(Network, asked.network_id)
        with self._locks.held(asked.endpoint_id):
            endpoint = self._state.get(Endpoint, asked.endpoint_id)
            if endpoint.result is None:
                endpoint = self._attach(network, endpoint)
            answer: Answer = {
                "InterfaceName": {"SrcName": endpoint.ifname, "DstPrefix": network.options.prefix},
                "StaticRoutes": _static_routes(endpoint),
            }
            if network.options.internal:
                answer["DisableGatewayService"] = True
            else:
                gateways = _gateways(network, endpoint)
                answer["Gateway"] = gateways.get(4, "")
                answer["GatewayIPv6"] = gateways.get(6, "")
                if not any(gateways.values()):
                    answer["DisableGatewayService"] = True
        self._flights.joined(network.id, _bare(endpoint))
        return answer

    def _attach(self, network: Network, endpoint: Endpoint) -> Endpoint:
        """ADD in a staging namespace, and the interface out of it. On failure nothing is left."""
        host = self._session()
        chain = conflist.chain(network, endpoint, self._path)
        if endpoint.staging:
            # An earlier attempt that ended with the shim; Docker asks again.
            self._undo(host, chain, endpoint)
        runtime = {"mac": endpoint.mac} if endpoint.mac else {}
        with self._staging.lent(host) as path:
            # Before the ADD: whoever finds the shim dead in the middle knows what to undo.
            self._state.put(msgspec.structs.replace(endpoint, staging=path))
            began = time.monotonic()
            moving_s = 0.0

            def move() -> None:
                nonlocal moving_s
                begins = time.monotonic()
                try:
                    self._move_out(host, path, endpoint.ifname)
                except KernelError as error:
                    raise DriverError(f"endpoint {endpoint.id[:12]}: {error}") from error
                moving_s = time.monotonic() - begins

            try:
                # The kernel takes its time to move an interface. Our own chained plugins do not touch it.
                beside = None if network.plugins else move
                result = chain.add(endpoint.id, path, endpoint.ifname, runtime, meanwhile=beside)
                if beside is None:
                    try:
                        move()
                    except DriverError:
                        chain.delete(endpoint.id, path, endpoint.ifname, runtime, result)
                        raise
            except DriverError:
                link.delete(host, endpoint.ifname)
                self._state.put(endpoint)
                raise
            _log_parts("attached", endpoint, plugins=time.monotonic() - began - moving_s, link=moving_s)
        attached = msgspec.structs.replace(
            endpoint,
            staging=path,
            result=result,
            addresses=endpoint.addresses or tuple(ip["address"] for ip in result.get("ips", ())),
        )
        self._state.put(attached)
        if network.options.type == "ptp" and not network.options.conflist:
            _answer_for_neighbours(result)
        return attached

    @staticmethod
    def _move_out(host: Session, path: str, ifname: str) -> None:
        with netns.opened(path) as where, host.visit(where) as inside:
            found = link.get(inside, ifname)
            link.set_down(inside, found.index)
            link.move(inside, found.index, host.home_fd, ifname)

    def operational_info(self, asked: EndpointRef) -> Answer:
        """What `docker inspect` may show."""
        self._state.get(Endpoint, asked.endpoint_id)
        return {"Value": {}}

    def leave(self, asked: EndpointRef) -> Answer:
        """Nothing yet: Docker gives the interface back after this."""
        del asked
        return {}

    def delete_endpoint(self, asked: EndpointRef) -> Answer:
        """Forgets the endpoint, as far as Docker is concerned."""
        with self._locks.held(asked.endpoint_id):
            endpoint = self._state.find(Endpoint, asked.endpoint_id)
            if endpoint is None:
                return {}
            self._state.put(msgspec.structs.replace(endpoint, ended=True))
        self._end(endpoint)
        self._flights.leaves(endpoint.id)
        return {}

    def _end(self, endpoint: Endpoint) -> None:
        """Detach beside other work, unless that is under way."""
        with self._ending_mutex:
            if endpoint.id not in self._ending:
                self._ending[endpoint.id] = endpoint, self._ender.submit(self._finish, endpoint.id)

    def _finish(self, id: str) -> None:  # noqa: A002 - Docker's word
        """What fails is told and kept for the next comparison to finish."""
        try:
            endpoint = self._state.find(Endpoint, id)
            if endpoint is not None:
                self._note_ended(endpoint)
            try:
                self.discard_endpoint(id)
            except DriverError as error:
                # A worker that was killed in the middle is the likely cause, and the next one does it.
                log.event(_logger, "warning", "detaching again", endpoint=id, error=str(error))
                self.discard_endpoint(id)
        except Exception as error:  # noqa: BLE001 - nobody else hears of it
            log.event(_logger, "warning", "not detached", endpoint=id, error=str(error))
        finally:
            with self._ending_mutex:
                del self._ending[id]

    def _note_ended(self, endpoint: Endpoint) -> None:
        """Docker gives the addresses back next; where they are ipamd's, that is not to depend on its reaching us."""
        network = self._state.find(Network, endpoint.network_id)
        if network is not None and network.options.type == OVERLAY:
            for bare in _bare(endpoint):
                its_pool = pool_id(network.options.network, bare)
                self._state.put(Ended(f"{its_pool}.{bare.replace(':', '.')}", its_pool, bare))
            return
        subnets = {str(where.network): str(where.ip) for where in map(ip_interface, endpoint.addresses)}
        for pool in self._state.all(Pool):
            address = subnets.get(pool.pool)
            if address is not None:
                self._state.put(Ended(f"{pool.id}.{address.replace(':', '.')}", pool.id, address))

    def _detach(self, endpoint: Endpoint) -> None:
        """Raises DriverError with all failures, after everything was tried; the endpoint is kept then."""
        host = self._session()
        network = self._state.find(Network, endpoint.network_id)
        failures = []
        if not endpoint.staging or network is None:
            link.delete(host, endpoint.ifname)
        else:
            if endpoint.ports is not None:
                try:
                    endpoint = self._revoke(network, endpoint)
                except DriverError as error:
                    failures.append(str(error))
            try:
                # The interface is in dockerd's namespace by now, or gone: no namespace is named.
                self._undo(host, conflist.chain(network, endpoint, self._path), endpoint)
            except DriverError as error:
                failures.append(str(error))
        if failures:
            self._state.put(endpoint)
            raise DriverError("; ".join(failures))
        self._state.remove(Endpoint, endpoint.id)
        self._staging.forget(lambda: {one.staging for one in self._state.all(Endpoint)})

    @staticmethod
    def _undo(host: Session, chain: Chain, endpoint: Endpoint) -> None:
        """DEL. The interface is in dockerd's namespace by now, or gone: then no namespace is named. Where an ADD did
        not end, it may still be in the staging one."""
        netns_path = "" if endpoint.result is not None else endpoint.staging
        began = time.monotonic()
        try:
            chain.delete(endpoint.id, netns_path, endpoint.ifname, {}, endpoint.result)
        finally:
            deleted = time.monotonic()
            link.delete(host, endpoint.ifname)
        _log_parts("detached", endpoint, plugins=deleted - began, link=time.monotonic() - deleted)

    # Published ports

    def program(self, asked: ProgramExternal) -> Answer:
        """Publishes the endpoint's ports: it has the container's default route."""
        network = self._state.get(Network, asked.network_id)
        bindings = published.bindings(asked.options)
        if bindings:
            self.settle()
        with self._locks.held(asked.endpoint_id):
            endpoint = self._state.get(Endpoint, asked.endpoint_id)
            if not bindings or network.options.type == "macvlan":
                return {}
            chain = conflist.ports(network, self._path)
            choice = published.Choice(bindings)
            while True:
                ports = choice.ports()
                mappings = list(published.mappings(ports, network.options.host_binding))
                # Before the ADD, so that a DEL follows whatever comes.
                self._state.put(msgspec.structs.replace(endpoint, ports=ports))
                try:
                    chain.add(
                        endpoint.id, endpoint.staging, endpoint.ifname, {"portMappings": mappings}, endpoint.result
                    )
                except DriverError as error:
                    self._state.put(endpoint)
                    if not choice.goes_on(error):
                        raise
                else:
                    return {}

    def revoke(self, asked: EndpointRef) -> Answer:
        """Publishes them no more."""
        with self._locks.held(asked.endpoint_id):
            endpoint = self._state.find(Endpoint, asked.endpoint_id)
            network = self._state.find(Network, asked.network_id)
            if endpoint is not None and network is not None and endpoint.ports is not None:
                self._state.put(self._revoke(network, endpoint))
        return {}

    def _revoke(self, network: Network, endpoint: Endpoint) -> Endpoint:
        mappings = list(published.mappings(endpoint.ports or (), network.options.host_binding))
        conflist.ports(network, self._path).delete(
            endpoint.id, endpoint.staging, endpoint.ifname, {"portMappings": mappings}, endpoint.result
        )
        return msgspec.structs.replace(endpoint, ports=None)


def _log_parts(what: str, endpoint: Endpoint, **parts_s: float) -> None:
    """Where the time of a call went: the plugins', and the kernel's for the link."""
    milliseconds: dict[str, Any] = {f"{name}_ms": round(seconds * 1000, 1) for name, seconds in parts_s.items()}
    log.event(_logger, "debug", what, endpoint=endpoint.id, **milliseconds)


def _bare(endpoint: Endpoint) -> set[str]:
    return {str(ip_interface(text).ip) for text in endpoint.addresses}


def _mac(addresses: Sequence[str]) -> str:
    """The one that follows from the addresses; by chance where nobody knows them yet."""
    return macs.of_addresses(ip_interface(text).ip for text in addresses) or (b"\x02\x42" + os.urandom(4)).hex(":")


def _gateways(network: Network, endpoint: Endpoint) -> dict[int, str]:
    """By IP version: Docker's, else what the ADD's result has."""
    found = {version: conflist.gateway_of(network, version) for version in (4, 6)}
    have = {ip_interface(text).version for text in endpoint.addresses}
    for ip in (endpoint.result or {}).get("ips", ()):
        version = ip_interface(ip["address"]).version
        found[version] = found[version] or ip.get("gateway", "")
    return {version: gateway for version, gateway in found.items() if version in have}


def _static_routes(endpoint: Endpoint) -> list[dict[str, Any]]:
    """The result's routes but for defaults, which Docker makes of the gateway. Type 0 has a next hop, 1 is on-link."""
    routes = []
    for route in (endpoint.result or {}).get("routes", ()):
        if ip_network(route["dst"], strict=False).prefixlen == 0:
            continue
        if route.get("gw"):
            routes.append({"Destination": route["dst"], "RouteType": 0, "NextHop": route["gw"]})
        else:
            routes.append({"Destination": route["dst"], "RouteType": 1})
    return routes


def _answer_for_neighbours(result: Mapping[str, Any]) -> None:
    """A container of type ptp takes its whole network for on-link; its host's end answers for the others."""
    name = next(one["name"] for one in result["interfaces"] if not one.get("sandbox"))
    sysctl.ensure("1", "ipv4", "conf", name, "proxy_arp")
    sysctl.ensure("0", "ipv4", "neigh", name, "proxy_delay")  # up to 0.8 s otherwise
