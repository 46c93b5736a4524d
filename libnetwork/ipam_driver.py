"""Docker's remote IPAM driver, on ipamd: pools become named pools, addresses become allocations of the client "docker".

Docker gives no key with an address, and after its restart it asks again for what it has (RequiresRequestReplay). So
each pool and address counts as claimed once it was asked for; a new dockerd (Plugin.Activate) makes all of them
unclaimed, and asking for an unclaimed one again succeeds. Asking for a claimed one is another's wish, and refused.

Docker has no use for the outcome of a release: it is answered at once, and whatever comes next waits for it. An address
whose endpoint has ended (`libnetwork.state.Ended`) and that Docker did not give back, since the shim was away, is taken
back as soon as somebody wants it.

A network's `--ip-range` is a pool of its own, since only addresses that nobody names come from it; the rest of the
network, for gateways and `--ip`, is a second one. The pools of overlay networks are ipamd's own (libnetwork.overlays).
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

import grpc

from ipamd.client import Client, IpamError
from kernel import route
from kernel.session import Session
from libnetwork.errors import DriverError
from libnetwork.messages import Empty, PoolRef, ReleaseAddress, RequestAddress, RequestPool
from libnetwork.overlays import Overlays, family
from libnetwork.state import Ended, Pool, State
from protos.ipam.v1 import ipam_pb2 as pb
from telemetry import log

_logger = logging.getLogger("netloom-docker")
CLIENT = "docker"
DEFAULT_POOLS = (*(f"172.{n}.0.0/16" for n in range(17, 32)), "192.168.0.0/16,20")
_MOST_POOLS = 65536
_RELEASERS = 8  # threads
_PATIENCE_S = 10.0
_LEAVING_S, _LEAVING_POLL_S = 2.0, 0.02
_REMEMBERED_S = _PATIENCE_S + _LEAVING_S
SPACE = "netloom"
_REST = ".rest"
_GATEWAY_HOLDER = "gateway"
_ADDRESS = "address"  # stands for the interface, which Docker does not tell
_GATEWAY = "com.docker.network.gateway"

AnyNetwork = IPv4Network | IPv6Network
Answer = dict[str, Any]
Holder = tuple[pb.AttachmentKey, int, str]  # whose, ipamd's generation, and for which container's name


class IpamDriver:
    """See the module. Every method may run in any thread; they take turns."""

    def __init__(
        self,
        state: State,
        client: Callable[[], Client],
        session: Callable[[], Session],
        default_pools: Iterable[str] = DEFAULT_POOLS,
        before_release: Callable[[str], None] = lambda _: None,
        who: Callable[[str], str] = lambda _: "",
        given: Callable[[str, str, str], None] = lambda *_: None,
    ) -> None:
        """`client` and `session` are the calling thread's; `default_pools`: "CIDR", or "CIDR,prefix length of a part";
        `before_release` returns when nobody has the address any more that Docker gives back; `who`: the name of the
        container that wants any address of a pool, if it is to get its former one; `given` hears of pool, address and
        name then (libnetwork.sticky).

        Raises DriverError for a default pool that is none.
        """
        self._state = state
        self._client = client
        self._overlays = Overlays(client)
        self._session = session
        self._before_release = before_release
        self._who, self._given = who, given
        self._default_pools = tuple(pool for text in default_pools for pool in _default(text))
        self._turn = threading.Lock()
        # After our own restart dockerd does not ask again: everything is somebody's.
        self._unclaimed_pools: set[str] = set()
        self._unclaimed: set[tuple[str, str]] = set()
        self._holders: dict[tuple[str, str], Holder] = {}  # of what we gave ourselves
        self._dockerd_is_new = False
        self._releasing: list[Future[None]] = []
        self._releaser = ThreadPoolExecutor(_RELEASERS, "netloom-release")
        # Taken back for somebody else, while Docker may still be about to give it back.
        self._taken_back: set[tuple[str, str]] = set()
        # By pool, container's name and IP version: what was given back a moment ago, and when.
        self._left: dict[tuple[str, str, int], tuple[str, float]] = {}

    def close(self) -> None:
        """Returns when nothing is under way."""
        self._releaser.shutdown()

    def await_releases(self) -> None:
        """`settle`, for who is not one of Docker's calls here."""
        with self._turn:
            self.settle()

    def settle(self) -> None:
        """Returns when every release that was answered is done, or lasts too long, as its endpoint's DEL hangs."""
        self._releasing = list(wait(self._releasing, _PATIENCE_S).not_done)

    def recover(self) -> None:
        """After a start: a pool of which nothing is held was being requested when the shim ended; Docker asks again.

        Every network has its gateway at least.
        """
        held = {one.key.network for one in self._held()}
        with self._turn:
            self._unclaimed_pools = {pool.id for pool in self._state.all(Pool) if held.isdisjoint(_names(pool))}

    def capabilities(self, _: Empty) -> Answer:
        """Docker asks again for what it has when it starts."""
        return {"RequiresMACAddress": False, "RequiresRequestReplay": True}

    def address_spaces(self, _: Empty) -> Answer:
        """Both names are one space."""
        return {"LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE}

    def activate(self) -> None:
        """A dockerd has started: it will ask again for what it still has.

        ipamd is asked at the first need: where it cannot answer now, Docker would take us for no driver at all.
        """
        with self._turn:
            self._unclaimed_pools = {pool.id for pool in self._state.all(Pool)}
            self._dockerd_is_new = True

    def _note_unclaimed(self) -> None:
        """Raises DriverError while ipamd is away."""
        if self._dockerd_is_new:
            self._unclaimed = {
                (one.key.network, _bare(address.cidr)) for one in self._held() for address in one.addresses
            }
            self._dockerd_is_new = False

    def _held(self) -> list[pb.Allocation]:
        try:
            return list(self._client().list_allocations(pb.ListAllocationsRequest(client=CLIENT)))
        except IpamError as error:
            raise DriverError(f"ipamd: {error.message}") from error

    # What nobody owns

    def owned(self) -> tuple[dict[str, str], set[tuple[str, str]]]:
        """The pools, id to CIDR, and the addresses but for gateways, each with ipamd's name of its pool.

        Docker's list of networks has a gateway only where somebody chose it, so it goes with its pool.
        """
        with self._turn:
            self.settle()
        addresses = {
            (one.key.network, _bare(address.cidr))
            for one in self._held()
            if one.key.container_id != _GATEWAY_HOLDER
            for address in one.addresses
        }
        return {pool.id: pool.pool for pool in self._state.all(Pool)}, addresses

    def discard_address(self, name: str, address: str) -> None:
        """Release an address that Docker does not have."""
        with self._turn:
            self.settle()
            self._release(name, address, self._forget(name, address))
            for ended in list(self._state.all(Ended)):
                pool = self._overlays.pool(ended.pool_id)
                if pool is not None and (pool.overlay, ended.address) == (name, address):
                    self._state.remove(Ended, ended.id)

    def discard_pool(self, id: str) -> None:  # noqa: A002 - Docker's word
        """Remove a pool that Docker does not have, with its gateway."""
        pool = self._state.find(Pool, id)
        if pool is None:
            return
        with self._turn:
            self.settle()
            for name in _names(pool):
                key = pb.AttachmentKey(client=CLIENT, network=name, container_id=_GATEWAY_HOLDER, ifname=_ADDRESS)
                try:
                    self._client().release(key)
                except IpamError as error:
                    raise DriverError(f"pool {pool.pool}: ipamd: {error.message}") from error
        self.release_pool(PoolRef(id))

    # Pools

    def request_pool(self, asked: RequestPool) -> Answer:
        """The pool that was named, or a free one."""
        with self._turn:
            overlay = self._overlays.asked_for(asked)
            if overlay is not None:
                return {"PoolID": overlay.id, "Pool": overlay.pool, "Data": {}}
            if asked.pool:
                pool = self._named(asked)
            elif asked.v6:
                raise DriverError("an IPv6 pool needs --subnet: there is no default one")
            else:
                pool = self._free()
            self._make(pool)
            self._state.put(pool)
            self._unclaimed_pools.discard(pool.id)
        return {"PoolID": pool.id, "Pool": pool.pool, "Data": {}}

    def release_pool(self, asked: PoolRef) -> Answer:
        """Forgets the pool, once nothing of it is held."""
        with self._turn:
            self._overlays.taken(asked.pool_id)
            pool = self._state.find(Pool, asked.pool_id)
            if pool is None:
                return {}
            self.settle()
            for ended in self._ended(pool):
                self._state.remove(Ended, ended.id)
            for name in _names(pool):
                try:
                    self._client().delete_pool(name)
                except IpamError as error:
                    if error.code is not grpc.StatusCode.NOT_FOUND:
                        raise DriverError(f"pool {pool.pool}: ipamd: {error.message}") from error
            self._state.remove(Pool, pool.id)
        return {}

    def _named(self, asked: RequestPool) -> Pool:
        network = _network(asked.pool, "--subnet")
        sub = _network(asked.sub_pool, "--ip-range") if asked.sub_pool else None
        if sub is not None and not (sub.version == network.version and sub.subnet_of(network)):  # type: ignore[arg-type]
            raise DriverError(f"--ip-range {sub} does not lie in --subnet {network}")
        pool = Pool(_id(network, sub), str(network), str(sub) if sub is not None else "")
        for other in self._state.all(Pool):
            if other.id == pool.id and pool.id in self._unclaimed_pools:
                continue
            if ip_network(other.pool).overlaps(network):
                raise DriverError(f"pool {network} overlaps with {other.pool}, which another network has")
        for one in self._overlays.all().values():
            for subnet in one.subnets:
                if ip_network(subnet).overlaps(network):
                    raise DriverError(f"pool {network} overlaps with {subnet}, which overlay network {one.name} has")
        return pool

    def _free(self) -> Pool:
        overlays = self._overlays.all().values()
        taken = [*(ip_network(pool.pool) for pool in self._state.all(Pool)), *self._routed()]
        taken += [ip_network(subnet) for one in overlays for subnet in one.subnets]
        for network in self._default_pools:
            if not any(network.overlaps(other) for other in taken if other.version == network.version):
                return Pool(_id(network, None), str(network))
        raise DriverError(
            f"none of the {len(self._default_pools)} default pools is free of other networks and of this host's "
            "routes; name one with --subnet"
        )

    def _routed(self) -> Iterator[AnyNetwork]:
        for found in route.all_routes(self._session(), 4):
            if found.dst.prefixlen:
                yield found.dst

    def _make(self, pool: Pool) -> None:
        first, *rest = _names(pool)
        sub = pool.sub_pool or pool.pool
        # Of this node alone, also in a cluster: another host's Docker may have a network with the same subnet.
        spec = pb.PoolSpec(cooldown_ms=0, mode="local")
        spec.range_sets.add(ranges=[pb.Range(subnet=pool.pool, gateway="none", **_bounds(pool, sub))])
        specs = [(first, spec)]
        for name in rest:
            spec = pb.PoolSpec(cooldown_ms=0, mode="local", excludes=[sub])
            spec.range_sets.add(ranges=[pb.Range(subnet=pool.pool, gateway="none")])
            specs.append((name, spec))
        for name, one in specs:
            try:
                self._create(name, one)
            except IpamError as error:
                raise DriverError(f"pool {pool.pool}: ipamd: {error.message}") from error

    def _create(self, name: str, spec: pb.PoolSpec) -> None:
        """Raises IpamError."""
        try:
            self._client().create_pool(name, spec)
        except IpamError as error:
            if error.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            spec.mode = ""  # an earlier version made it so
            self._client().create_pool(name, spec)

    # Addresses

    def request_address(self, asked: RequestAddress) -> Answer:
        """The address that was named, or a free one; with the network's prefix length."""
        is_gateway = (asked.options or {}).get("RequestAddressType") == _GATEWAY
        address = asked.address
        workload = "" if is_gateway or address else self._who(asked.pool_id)  # which asks Docker, and takes its time
        with self._turn:
            self._overlays.taken(asked.pool_id)
            pool = self._overlays.pool(asked.pool_id)
            if pool is None:
                pool = self._state.get(Pool, asked.pool_id)
            else:
                pool, gateway = self._overlays.whole(pool)
                if is_gateway:
                    return self._gateway(pool, gateway, address)
            self.settle()
            self._note_unclaimed()
            if is_gateway and not address:
                address = str(next(ip_network(pool.pool).hosts()))
            name, wanted = self._where(pool, address)
            if wanted:
                self._before_release(wanted)
                self._take_back(pool, wanted)
            if wanted and (name, wanted) in self._unclaimed:
                self._unclaimed.discard((name, wanted))
                return self._answer(pool, wanted)
            holder = _GATEWAY_HOLDER if is_gateway else os.urandom(8).hex()
            key = pb.AttachmentKey(client=CLIENT, network=name, container_id=holder, ifname=_ADDRESS)
            try:
                given = self._allocate(pool, key, [wanted] if wanted else [], workload)
            except IpamError as error:
                raise DriverError(f"pool {pool.pool}: ipamd: {error.message}") from error
            address = _bare(given.addresses[0].cidr)
            self._holders[name, address] = (key, given.generation, workload)
            if workload:
                self._given(asked.pool_id, address, workload)
            for ended in self._ended(pool):
                if ended.address == address:  # it was released otherwise
                    self._state.remove(Ended, ended.id)
            return self._answer(pool, address)

    @staticmethod
    def _gateway(pool: Pool, gateway: str, wanted: str) -> Answer:
        """An overlay's, which is the same on all hosts, and nobody's."""
        if wanted and ip_address(wanted) != ip_interface(gateway).ip:
            raise DriverError(
                f"--gateway {wanted}: overlay network {pool.overlay} has {_bare(gateway)} on every host; leave it out"
            )
        return {"Address": gateway, "Data": {}}

    def _allocate(self, pool: Pool, key: pb.AttachmentKey, wanted: list[str], workload: str) -> pb.AllocateResponse:
        """Raises IpamError."""
        asked: dict[str, Any] = {"pools": [key.network], "requested": wanted, "workload": workload}
        if pool.overlay:
            asked["family"] = family(pool)  # Docker asks for each by itself
        if pool.overlay and wanted:
            return self._allocate_named(key, {**asked, "workload": f"--ip {wanted[0]}"})
        left, when = self._left.get((key.network, workload, asked.get("family", 0)), ("", 0.0))
        if left and time.monotonic() - when < _REMEMBERED_S:
            with contextlib.suppress(IpamError):  # somebody else has it
                return self._allocate_named(key, {**asked, "requested": [left]})
        try:
            return self._client().allocate(key, **asked)
        except IpamError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or not self._take_back(pool):
                raise
        return self._client().allocate(key, **asked)

    def _allocate_named(self, key: pb.AttachmentKey, asked: dict[str, Any]) -> pb.AllocateResponse:
        """An address of an overlay that the user named, or that is the container's own: when that is restarted it wants
        it back at once. It does not cool down for that workload; but etcd must have heard that it was given back.

        Raises IpamError.
        """
        until = time.monotonic() + _LEAVING_S
        while True:
            try:
                return self._client().allocate(key, **asked)
            except IpamError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
            time.sleep(_LEAVING_POLL_S)

    def _take_back(self, pool: Pool, address: str = "") -> bool:
        """Take back what ended (this address alone), and Docker did not release. True where there was something."""
        found = [ended for ended in self._ended(pool) if address in ("", ended.address)]
        for ended in found:
            self._before_release(ended.address)
            name, bare = self._where(pool, ended.address)
            log.event(_logger, "warning", "address taken back, its release did not get here", address=bare)
            self._release(name, bare, self._forget(name, bare))
            self._state.remove(Ended, ended.id)
            self._taken_back.add((name, bare))
        return bool(found)

    def _ended(self, pool: Pool) -> list[Ended]:
        return [ended for ended in self._state.all(Ended) if ended.pool_id == pool.id]

    def release_address(self, asked: ReleaseAddress) -> Answer:
        """Gives it back; one that nobody holds is no error. What fails is told in the log, and left to the
        comparison: Docker would do nothing about it."""
        with self._turn:
            pool = self._overlays.pool(asked.pool_id) or self._state.find(Pool, asked.pool_id)
            if pool is None:
                return {}
            name, address = self._where(pool, asked.address)
            ended = next((one for one in self._ended(pool) if one.address == address), None)
            if (name, address) in self._taken_back:
                self._taken_back.discard((name, address))
                if ended is None:
                    return {}  # of the one that had it before: it comes late, and another one has the address by now
            self._releasing.append(
                self._releaser.submit(self._released, name, address, self._forget(name, address), ended)
            )
        return {}

    def _released(self, name: str, address: str, known: Holder | None, ended: Ended | None) -> None:
        self._before_release(address)
        began = time.monotonic()
        try:
            self._release(name, address, known)
            if ended is not None:
                self._state.remove(Ended, ended.id)
        except (DriverError, OSError) as error:
            log.event(_logger, "warning", "not released", address=address, error=str(error))
        log.event(_logger, "debug", "released", address=address, took_ms=round((time.monotonic() - began) * 1000, 1))

    def _forget(self, name: str, address: str) -> Holder | None:
        """How we gave it, if we did; not to be claimed by its old owner any more."""
        self._unclaimed.discard((name, address))
        holder = self._holders.pop((name, address), None)
        if holder is not None and holder[2]:
            now = time.monotonic()
            self._left = {place: left for place, left in self._left.items() if now - left[1] < _REMEMBERED_S}
            self._left[name, holder[2], ip_address(address).version] = address, now
        return holder

    def _release(self, name: str, address: str, known: Holder | None) -> None:
        client = self._client()
        try:
            if known is not None:
                client.release(known[0], generation=known[1])
            else:  # given by the shim that was here before
                wanted = pb.ListAllocationsRequest(client=CLIENT, network=name, address=address)
                for held in list(client.list_allocations(wanted)):
                    client.release(held.key, generation=held.generation)
        except IpamError as error:
            raise DriverError(f"address {address}: ipamd: {error.message}") from error

    @staticmethod
    def _where(pool: Pool, address: str) -> tuple[str, str]:
        """ipamd's pool for an address, and the address in canonical spelling."""
        names = _names(pool)
        if not address:
            return names[0], ""
        try:
            wanted = ip_address(address.partition("/")[0])
        except ValueError as error:
            raise DriverError(f"wanted an address, found {address!r}") from error
        if pool.overlay and not pool.pool:
            return pool.overlay, str(wanted)  # what is given back needs no judging
        if wanted not in ip_network(pool.pool):
            raise DriverError(f"address {wanted} does not lie in the network's subnet {pool.pool}")
        inside = not pool.sub_pool or wanted in ip_network(pool.sub_pool)
        return (names[0] if inside else names[-1]), str(wanted)

    @staticmethod
    def _answer(pool: Pool, address: str) -> Answer:
        return {"Address": f"{address}/{ip_network(pool.pool).prefixlen}", "Data": {}}


def _names(pool: Pool) -> tuple[str, ...]:
    """ipamd's pools for one of Docker's: where addresses come from, and the rest where that is not all."""
    if pool.overlay:
        return (pool.overlay,)
    return (pool.id, f"{pool.id}{_REST}") if pool.sub_pool and pool.sub_pool != pool.pool else (pool.id,)


def _id(network: AnyNetwork, sub: AnyNetwork | None) -> str:
    """The pool's name in ipamd, and its id towards Docker: ipamd takes letters, digits, - . _"""
    whole = f"docker-{network}" + (f"-{sub}" if sub is not None and sub != network else "")
    return whole.replace("/", "_").replace(":", ".")


def _bounds(pool: Pool, sub: str) -> dict[str, str]:
    """First and last address of the range; ipamd's own where it is the whole network."""
    if sub == pool.pool:
        return {}
    network, whole = ip_network(sub), ip_network(pool.pool)
    first, last = network.network_address, network.broadcast_address
    if first == whole.network_address:
        first += 1
    if last == whole.broadcast_address and whole.version == 4:
        last -= 1
    return {"start": str(first), "end": str(last)}


def _network(text: str, option: str) -> AnyNetwork:
    try:
        return ip_network(text)
    except ValueError as error:
        raise DriverError(f"{option} {text}: {error}") from error


def _default(text: str) -> list[AnyNetwork]:
    whole, _, length = text.partition(",")
    network = _network(whole, "--default-pool")
    if not length:
        return [network]
    if network.version != 4 or not length.isdecimal() or not network.prefixlen <= int(length) <= 30:
        raise DriverError(
            f"--default-pool {text}: wanted an IPv4 network and a prefix length from its own to 30: 10.128.0.0/12,24"
        )
    if 1 << (int(length) - network.prefixlen) > _MOST_POOLS:
        raise DriverError(f"--default-pool {text}: these are more than {_MOST_POOLS} pools; name a smaller network")
    return list(network.subnets(new_prefix=int(length)))


def _bare(cidr: str) -> str:
    return str(ip_interface(cidr).ip)
