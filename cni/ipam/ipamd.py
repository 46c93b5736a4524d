"""The ipamd IPAM plugin: asks the address daemon over its socket.

Either the configuration names pools that an operator made (`pool`, `pools`), or it carries host-local's keys, and ipamd
keeps a pool for the network from them. It works under our interface plugins (in their process) and, executed, under
those of others.

A DEL while ipamd is away leaves a release record, which ipamd replays when it is back, and succeeds.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from cni import check as verify
from cni import config
from cni.errors import CniError, Code
from cni.failures import note
from cni.ipam import resolver, routing
from cni.ipam.ranges import RangeConf
from cni.ipam.routing import RouteConf
from cni.living import Observer, boot_id
from cni.request import Request
from cni.result import DNS, IPConfig, Result
from cni.undo import Undo
from kernel import netns, paths
from kernel.errors import KernelError
from kernel.session import Session, Visit

if TYPE_CHECKING:
    from ipamd.client import Client, IpamError
    from protos.ipam.v1 import ipam_pb2 as pb

CLIENT = "cni"
DEADLINE_S = 5.0
_LABEL = "label:"


class Label(msgspec.Struct, frozen=True):
    """A label of the container, as the conventions have it in args.cni."""

    key: str
    value: str = ""


class IpamConf(msgspec.Struct, frozen=True, rename="camel"):
    """The `ipam` object: ours (`pool`, `pools`, `exclude`, `sticky`, `socket`, `timeout`), then host-local's."""

    pool: str = ""
    pools: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sticky: bool | str = False
    socket: str = ""
    timeout: float = DEADLINE_S
    ranges: tuple[tuple[RangeConf, ...], ...] = ()
    subnet: str = ""
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""
    routes: tuple[RouteConf, ...] = ()
    resolv_conf: str = ""


def parse(request: Request) -> IpamConf:
    """The `ipam` object, checked.

    Raises:
        CniError: 7, naming the path.
    """
    conf = config.convert(request.config.get("ipam", {}), IpamConf, "$.ipam")
    if conf.pool and conf.pools:
        raise _invalid("pool and pools are both there", "name one pool in `pool`, or several in `pools`")
    if (conf.pool or conf.pools) and (conf.ranges or conf.subnet):
        raise _invalid("both a named pool and ranges are there", "drop either pool/pools or ranges/subnet")
    if conf.socket and (not conf.socket.startswith("/") or "\0" in conf.socket):
        raise _invalid(f"socket: {config.found(conf.socket)}", "want an absolute path")
    if isinstance(conf.sticky, str) and not (conf.sticky.removeprefix(_LABEL).strip() and conf.sticky.isprintable()):
        raise _invalid(f"sticky: {config.found(conf.sticky)}", 'want true, "label:<key>", or a name of your own')
    if not 0 < conf.timeout <= 300:
        raise _invalid(f"timeout: {conf.timeout:g}", "want seconds between 0 and 300")
    routing.routes(conf.routes)
    return conf


def _invalid(what: str, remedy: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: $.ipam.{what}", remedy)


def _range_sets(request: Request, conf: IpamConf) -> list[tuple[str, tuple[RangeConf, ...]]]:
    """The range sets, each with its JSON path, in host-local's order: runtimeConfig.ipRanges, the keys at the top, then
    `ranges`."""
    given = request.capability("ipRanges", tuple[tuple[RangeConf, ...], ...]) or ()
    sets = [(f"$.runtimeConfig.ipRanges[{index}]", one) for index, one in enumerate(given)]
    if conf.subnet:
        sets.append(("$.ipam.subnet", (RangeConf(conf.subnet, conf.range_start, conf.range_end, conf.gateway),)))
    sets += [(f"$.ipam.ranges[{index}]", one) for index, one in enumerate(conf.ranges)]
    return sets


def _named(conf: IpamConf) -> tuple[str, ...]:
    return (conf.pool,) if conf.pool else conf.pools


def _network_pool(request: Request, conf: IpamConf) -> "pb.NetworkPool | None":
    """The network's own pool as the configuration wants it; None where named pools are used."""
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415 - 30 ms that a refused configuration need not pay

    if _named(conf):
        return None
    sets = _range_sets(request, conf)
    if not sets:
        raise _invalid("pool is missing", "name a pool in `pool`, or give `subnet` or `ranges` as for host-local")
    spec = pb.PoolSpec(excludes=conf.exclude)
    for place, ranges in sets:
        if not ranges:
            wish = "want at least one range in each set"
            raise CniError(Code.INVALID_CONFIG, f"invalid network config: {place}: found an empty range set, []", wish)
        spec.range_sets.add(
            ranges=[pb.Range(subnet=r.subnet, start=r.range_start, end=r.range_end, gateway=r.gateway) for r in ranges]
        )
    return pb.NetworkPool(spec=spec)


def _requested(request: Request) -> tuple[str, ...]:
    """The addresses that the runtime asks for, each once. MAC and GATEWAY in CNI_ARGS are the interface plugin's.

    podman's `network reload` of a container that has a fixed address names that address twice.
    """
    return tuple(dict.fromkeys(ip.split("/")[0] for ip in request.ips("MAC", "GATEWAY")))


def _workload(request: Request, conf: IpamConf) -> str:
    """For whom the address is beyond this container, "" where `sticky` is not wanted.

    A container id is new with every container, so it is no such name.

    Raises:
        CniError: 7, the runtime gives no name.
    """
    if not conf.sticky:
        return ""
    if isinstance(conf.sticky, str):
        if not conf.sticky.startswith(_LABEL):
            return conf.sticky
        wanted = conf.sticky.removeprefix(_LABEL)
        labels = request.convention("labels", tuple[Label, ...]) or ()
        found = next((label.value for label in labels if label.key == wanted), "")
        where = f"the runtime gives no label {config.found(wanted)} in args.cni.labels"
    else:
        # podman gives the container's name as the pod's, and no namespace.
        names = (request.args.get("K8S_POD_NAMESPACE", ""), request.args.get("K8S_POD_NAME", ""))
        found = "/".join(name for name in names if name) if names[1] else ""
        where = "the runtime gives no K8S_POD_NAME in CNI_ARGS, and a container id is no lasting name"
    if not found:
        raise _invalid(f"sticky: {where}", "drop sticky, or name the workload there")
    return found


# The verbs


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Get an address from each pool or range set.

    Raises:
        CniError: 11 where ipamd is away, 100 and up where it refuses.
    """
    return _begin(request, _netns(request, host), undo)()


def begin(request: Request, inside: Visit, undo: Undo) -> Callable[[], Result]:
    """Ask as `add` does, for the namespace that was entered. What is returned waits for the answer."""
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415

    where = pb.Netns(inode=inside.where.identity.inode, cookie=inside.cookie, path=request.netns)
    return _begin(request, where, undo)


def _begin(request: Request, where: "pb.Netns", undo: Undo) -> Callable[[], Result]:
    from ipamd.client import IpamError  # noqa: PLC0415 - the messages take 30 ms to import

    conf = parse(request)
    pool = _network_pool(request, conf)
    requested = _requested(request)
    workload = _workload(request, conf)
    without = _without_addresses(conf)
    client = _client(request, conf)
    asked = client.prepare_allocate(
        _key(request),
        netns=where,
        at=_instant(request),
        pools=_named(conf),
        network_pool=pool,
        requested=requested,
        workload=workload,
    )
    refused = False

    def wait() -> Result:
        nonlocal refused
        try:
            answer = asked.result()
        except IpamError as error:
            refused = True
            raise _error(request, error) from error
        finally:
            _leave(client)
        return msgspec.structs.replace(
            without, ips=tuple(IPConfig(address.cidr, address.gateway) for address in answer.addresses)
        )

    def give_back() -> None:
        if asked.asked and asked.answer is None and not refused:
            # The ADD failed, or was interrupted, before it had the answer: ipamd may give it addresses any moment.
            with contextlib.suppress(CniError):
                wait()
        if asked.answer is not None and asked.answer.created:
            # What was held before belongs to an ADD that succeeded, and is not ours to give back.
            _release(request, conf, asked.answer.generation)

    undo.push("release the addresses", give_back)
    asked.ask()
    return wait


def delete(request: Request, host: Session) -> None:
    """Give back whatever this attachment holds."""
    del host
    try:
        conf = parse(request)
    except CniError as error:
        # What an ADD refused holds nothing; but the socket may be all that is wrong, so the default is asked.
        note(f"DEL: {error}")
        conf = IpamConf()
    _release(request, conf, 0)


def _release(request: Request, conf: IpamConf, generation: int) -> None:
    from ipamd.client import IpamError  # noqa: PLC0415

    try:
        with _using(request, conf) as client:
            client.release(_key(request), generation=generation)
    except IpamError as error:
        if _is_away(error):
            _leave_release_record(request, generation, error)
        elif _is_refused(error):
            # No ADD of such a key was ever served. The runtime sends this DEL after the ADD that failed, and would
            # repeat it for ever.
            note(f"DEL: ipamd: {error.message}")
        else:
            raise _error(request, error) from error


def _leave_release_record(request: Request, generation: int, why: "IpamError") -> None:
    """Write down what ipamd must release when it is back: only what was allocated before now.

    Raises:
        CniError: 11, the record cannot be written either.
    """
    directory = paths.releases_dir(request.environment)
    document = {
        "version": 1,
        "key": {
            "node": "",
            "client": CLIENT,
            "network": request.network,
            "container_id": request.container_id,
            "ifname": request.ifname,
        },
        "generation": generation,
        "before": {"boot_id": boot_id(), "boottime_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME)},
        "request_id": request.request_id,
    }
    name = os.path.join(directory, os.urandom(8).hex())
    try:
        _ensure_releases(directory)
        owner = os.stat(directory)
        fd = os.open(f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchown(fd, owner.st_uid, owner.st_gid)
            os.write(fd, msgspec.json.encode(document))
        finally:
            os.close(fd)
        os.rename(f"{name}.tmp", f"{name}.json")
    except OSError as error:
        raise CniError(
            Code.TRY_AGAIN_LATER,
            f"ipamd cannot be reached ({why.message}), and no release record could be written",
            f"{error}; start ipamd or free space in {directory}",
        ) from error
    note(f"DEL: ipamd cannot be reached ({why.message}); it will release the addresses when it is back")


def _ensure_releases(directory: str) -> None:
    """Make the directory of release records where it is missing, for the owner of the run directory: ipamd, which is
    not root, must be able to remove them."""
    run_dir = os.path.dirname(directory)
    os.makedirs(run_dir, 0o755, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        owner = os.stat(run_dir)
        os.chown(directory, owner.st_uid, owner.st_gid)
        os.chmod(directory, 0o770)  # noqa: S103 - for ipamd and its group, whatever the umask is


def check(request: Request, host: Session) -> None:
    """Verify that ipamd knows the addresses that ADD reported."""
    from ipamd.client import IpamError  # noqa: PLC0415

    del host
    conf = parse(request)
    result = verify.required_result(request)
    # Another interface's addresses may be in the result of a chain.
    cidrs = [ip.address for ip in result.ips if _is_own(ip, result, request)]
    try:
        with _using(request, conf) as client:
            client.check(_key(request), cidrs)
    except IpamError as error:
        refusal = _error(request, error)
        if refusal.code in (Code.INVALID_CONFIG, Code.POOL_CONFLICT):
            # Released behind its back, or held with others: nothing is wrong with the configuration.
            raise verify.broken(refusal.msg, refusal.details) from error
        raise refusal from error


def _is_own(ip: IPConfig, result: Result, request: Request) -> bool:
    if ip.interface is None or not 0 <= ip.interface < len(result.interfaces):
        return True
    return result.interfaces[ip.interface].name == request.ifname


def gc(request: Request, host: Session) -> None:
    """Let ipamd release what is not in the list, but nothing whose interface still lives in its namespace."""
    from ipamd.client import IpamError  # noqa: PLC0415
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415

    conf = parse(request)
    asked = pb.GarbageCollectRequest(client=CLIENT, network=request.network, before=_instant(request), dry_run=True)
    for attachment in request.valid_attachments:
        asked.valid.add(container_id=attachment.container_id, ifname=attachment.ifname)
    observer = Observer(host)
    try:
        with _using(request, conf) as client:
            candidates = client.garbage_collect(asked).released
            asked.living.extend(one.generation for one in candidates if _lives(observer, one))
            asked.dry_run = False
            answer = client.garbage_collect(asked)
    except IpamError as error:
        raise _error(request, error) from error
    for one in answer.living:
        held = ", ".join(address.cidr for address in one.addresses)
        note(f"GC: {one.key.container_id} {one.key.ifname} is not in the list, but its interface lives; keeps {held}")


def _lives(observer: Observer, allocation: "pb.Allocation") -> bool:
    if allocation.at.boot_id and allocation.at.boot_id != boot_id():
        return False
    seen = allocation.netns
    return observer.attached(seen.path, seen.inode, seen.cookie, allocation.key.ifname)


def status(request: Request, host: Session) -> None:
    """Whether ipamd could serve an ADD of this network.

    Raises:
        CniError: 50.
    """
    from ipamd.client import IpamError  # noqa: PLC0415

    del host
    conf = parse(request)
    pool = _network_pool(request, conf)
    try:
        with _using(request, conf) as client:
            client.status(pools=_named(conf), network=request.network, network_pool=pool)
    except IpamError as error:
        raise CniError(Code.NOT_AVAILABLE, "no address could be given now", _error(request, error).args[1]) from error


def network(request: Request, name: str) -> "pb.Network":
    """What ipamd knows of a network, over the connection that the `ipam` object names.

    Raises:
        CniError: 7, there is none of that name; 11, ipamd is away.
    """
    from ipamd.client import IpamError  # noqa: PLC0415

    try:
        with _using(request, config.convert(request.config.get("ipam", {}), IpamConf, "$.ipam")) as client:
            return client.get_network(name)
    except IpamError as error:
        raise _error(request, error) from error


def set_mac(request: Request, pool: str, address: str, mac: str, *, expected: bool = False) -> None:
    """Tell all hosts the MAC of an address that this host holds; it is forgotten when the address is given back.

    `expected`: it is what follows from the address, so that ipamd forgets another one; of an address that this host
    does not hold there is nothing to forget.

    Raises:
        CniError: the address is not held, or ipamd is away.
    """
    from ipamd.client import IpamError  # noqa: PLC0415

    try:
        with _using(request, config.convert(request.config.get("ipam", {}), IpamConf, "$.ipam")) as client:
            client.set_mac(pool, address, mac)
    except IpamError as error:
        if expected and error.code.name in ("NOT_FOUND", "FAILED_PRECONDITION"):
            return
        raise _error(request, error) from error


# Towards ipamd


_MOST_CONNECTIONS = 8
_connections: "dict[tuple[str, float], Client] | None" = None


def keep_connections(socket_path: str) -> None:
    """From now on a connection is kept for the requests to come, and the one to this socket is made at once.

    For a process that serves many requests. Call it in the namespace of the host, as gRPC's threads stay where they
    were started, and after every fork. An ipamd that is away now is found when it is asked.
    """
    global _connections  # noqa: PLW0603 - one set of connections a process
    from ipamd.client import Client, IpamError  # noqa: PLC0415

    _connections = {}
    client = _connections[socket_path, DEADLINE_S] = Client(socket_path, timeout_s=DEADLINE_S)
    with contextlib.suppress(IpamError):
        client.status()


def _client(request: Request, conf: IpamConf) -> "Client":
    """A client for one request, to be left with `_leave`."""
    from ipamd.client import Client  # noqa: PLC0415

    socket_path = conf.socket or paths.ipamd_socket(request.environment)
    if _connections is None:
        return Client(socket_path, timeout_s=conf.timeout, request_id=request.request_id)
    client = _connections.get((socket_path, conf.timeout))
    if client is None:
        if len(_connections) >= _MOST_CONNECTIONS:
            _connections.pop(next(iter(_connections))).close()
        client = _connections[socket_path, conf.timeout] = Client(socket_path, timeout_s=conf.timeout)
    client.set_request_id(request.request_id)
    return client


def _leave(client: "Client") -> None:
    """Close the client unless connections are kept."""
    if _connections is None:
        client.close()


@contextlib.contextmanager
def _using(request: Request, conf: IpamConf) -> "Iterator[Client]":
    client = _client(request, conf)
    try:
        yield client
    finally:
        _leave(client)


def _is_away(error: "IpamError") -> bool:
    """Whether ipamd did not answer, or cannot now: what was asked is to be asked again later."""
    import grpc  # noqa: PLC0415

    return error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def _is_refused(error: "IpamError") -> bool:
    """Whether ipamd says that what was asked can never work."""
    import grpc  # noqa: PLC0415

    return bool(error.code is grpc.StatusCode.INVALID_ARGUMENT)


def _error(request: Request, error: "IpamError") -> CniError:
    """ipamd's refusal as a CNI error."""
    import grpc  # noqa: PLC0415 - loaded with the client already

    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return CniError(
            Code.TRY_AGAIN_LATER,
            f"ipamd is of another version than this plugin ({error.message})",
            f"install one version of both, and restart ipamd; request {request.request_id}",
        )
    code = {
        grpc.StatusCode.UNAVAILABLE: Code.TRY_AGAIN_LATER,
        grpc.StatusCode.DEADLINE_EXCEEDED: Code.TRY_AGAIN_LATER,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Code.POOL_EXHAUSTED,
        grpc.StatusCode.ALREADY_EXISTS: Code.ADDRESS_UNAVAILABLE,
        grpc.StatusCode.FAILED_PRECONDITION: Code.POOL_CONFLICT,
        grpc.StatusCode.INVALID_ARGUMENT: Code.INVALID_CONFIG,
        grpc.StatusCode.NOT_FOUND: Code.INVALID_CONFIG,
    }.get(error.code, Code.INTERNAL)
    return CniError(code, f"ipamd: {error.message}", f"{_where(request, error)}request {request.request_id}")


def _where(request: Request, error: "IpamError") -> str:
    """Where the configuration has what ipamd calls range_sets[i]."""
    named = re.search(r"range_sets\[(\d+)\]", error.message)
    if named is None:
        return ""
    sets = _range_sets(request, config.convert(request.config.get("ipam", {}), IpamConf, "$.ipam"))
    index = int(named[1])
    return f"range_sets[{index}] is {sets[index][0]}; " if index < len(sets) else ""


def _key(request: Request) -> "pb.AttachmentKey":
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415

    return pb.AttachmentKey(
        client=CLIENT, network=request.network, container_id=request.container_id, ifname=request.ifname
    )


def _instant(request: Request) -> "pb.Instant":
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415

    return pb.Instant(boot_id=boot_id(), boottime_ns=request.began_ns)


def _netns(request: Request, host: Session) -> "pb.Netns":
    """Which namespace the addresses are for, so that they can be reclaimed when it is gone."""
    from protos.ipam.v1 import ipam_pb2 as pb  # noqa: PLC0415

    if not request.netns:
        return pb.Netns()
    try:
        with netns.opened(request.netns) as container:
            cookie = netns.cookie_at(container, host.home_fd)
            return pb.Netns(inode=container.identity.inode, cookie=cookie, path=request.netns)
    except KernelError as error:
        raise CniError(Code.INVALID_NETNS, f"failed to open netns {request.netns!a}", str(error)) from error


# What comes from the configuration alone


def _without_addresses(conf: IpamConf) -> Result:
    dns = resolver.read(conf.resolv_conf) if conf.resolv_conf else DNS()
    return Result(routes=routing.routes(conf.routes), dns=dns)
