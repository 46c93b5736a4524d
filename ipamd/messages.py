"""Between the API's messages and ipamd's values. Pure; the shape of what a message holds is validated here."""

from collections.abc import Iterable

from ipamd.errors import InvalidArgumentError
from ipamd.lease import Ask
from ipamd.pool import MODES, Mode, Pool, PoolSpec, RangeSpec
from ipamd.pools import NetworkSpec, Usage
from ipamd.store.base import Address, Allocation, Event, Instant, Key, Netns
from protos.ipam.v1 import ipam_pb2 as pb

_LONGEST_NAME = 255  # bytes; a container id has 64 as a rule, an interface at most 15
_LONGEST_WORKLOAD = 400  # a pod's namespace and name may have 63 and 253
_LONGEST_PATH = 4096
_U64 = 1 << 64


def key_of(message: pb.AttachmentKey, node: str) -> Key:
    """The key, with the asked ipamd's node where it names none; raises InvalidArgumentError."""
    key = Key(message.node or node, message.client, message.network, message.container_id, message.ifname)
    if not (key.client and key.network and key.container_id and key.ifname):
        empty = [name for name in ("client", "network", "container_id", "ifname") if not getattr(key, name)]
        raise InvalidArgumentError(f"key: {', '.join(empty)}: wanted a name, found nothing")
    for name in ("node", "client", "network", "container_id", "ifname"):
        check_name(getattr(key, name), f"key.{name}")
    return key


def check_name(text: str, what: str, longest: int = _LONGEST_NAME) -> None:
    """Raises InvalidArgumentError for what would spoil a log or a table: control characters, great length."""
    if len(text) > longest or not text.isprintable():
        raise InvalidArgumentError(f"{what}: wanted at most {longest} printable characters, found {text[:longest]!r}")


def instant_of(message: pb.Instant) -> Instant:
    """The moment."""
    if message.boottime_ns >> 63 or len(message.boot_id) > _LONGEST_NAME:
        raise InvalidArgumentError("an instant has a boot id, and CLOCK_BOOTTIME in nanoseconds below 2^63")
    return Instant(message.boot_id, message.boottime_ns)


def ask_of(message: pb.AllocateRequest, node: str) -> Ask:
    """What an Allocate wants; raises InvalidArgumentError."""
    key = key_of(message.key, node)
    netns = message.netns
    if len(netns.path) > _LONGEST_PATH:
        raise InvalidArgumentError(f"netns.path: wanted at most {_LONGEST_PATH} characters, found {len(netns.path)}")
    check_name(message.workload, "workload", _LONGEST_WORKLOAD)
    pools, network = pools_of(message.pools, message.network_pool if message.HasField("network_pool") else None)
    if message.family not in (0, 4, 6):
        raise InvalidArgumentError(f"family: wanted 4, 6, or 0 for both, found {message.family}")
    return Ask(
        key,
        Netns(netns.inode, netns.cookie, netns.path),
        instant_of(message.at) if message.HasField("at") else None,
        pools,
        network,
        tuple(message.requested),
        message.workload,
        message.family,
    )


def probe_of(message: pb.StatusRequest, node: str) -> Ask | None:
    """The pools that a Status is about; None where it names none."""
    if not message.pools and not message.HasField("network_pool"):
        return None
    pools, network = pools_of(message.pools, message.network_pool if message.HasField("network_pool") else None)
    if network is not None and not message.network:
        raise InvalidArgumentError("network: wanted the name of the network whose pool this is, found nothing")
    return Ask(Key(node, "", message.network, "", ""), Netns(), None, pools, network)


def pools_of(names: Iterable[str], own: pb.NetworkPool | None) -> tuple[tuple[str, ...], NetworkSpec | None]:
    """Named pools, or the network's own; raises InvalidArgumentError for both and for neither."""
    pools = tuple(names)
    if bool(pools) == (own is not None):
        raise InvalidArgumentError("wanted either pools or network_pool, found " + ("both" if pools else "neither"))
    if len(set(pools)) < len(pools):
        raise InvalidArgumentError(f"pools: each pool gives its addresses once, found {', '.join(pools)}")
    if own is None:
        return pools, None
    spec = own.spec
    return pools, NetworkSpec(spec.SerializeToString(deterministic=True), lambda: spec_of(spec))


def spec_of(message: pb.PoolSpec, mode: Mode = "local") -> PoolSpec:
    """The spec as it was asked for, with this mode where it names none; `pool.validate` judges it."""
    return PoolSpec(
        tuple(
            tuple(RangeSpec(r.subnet, r.start, r.end, r.gateway) for r in range_set.ranges)
            for range_set in message.range_sets
        ),
        tuple(message.excludes),
        message.cooldown_ms if message.HasField("cooldown_ms") else None,
        _mode_of(message.mode, mode),
        message.block_v4 or 26,
        message.block_v6 or 122,
        message.blocks_per_node,
    )


def _mode_of(text: str, default: Mode) -> Mode:
    if not text:
        return default
    for mode in MODES:
        if text == mode:
            return mode
    raise InvalidArgumentError(f"mode: wanted one of {', '.join(MODES)}, found {text[:80]!r}")


def spec_message(spec: PoolSpec) -> pb.PoolSpec:
    """The inverse of `spec_of`."""
    return pb.PoolSpec(
        range_sets=[
            pb.RangeSet(ranges=[pb.Range(subnet=r.subnet, start=r.start, end=r.end, gateway=r.gateway) for r in ranges])
            for ranges in spec.range_sets
        ],
        excludes=spec.excludes,
        cooldown_ms=spec.cooldown_ms,
        mode=spec.mode,
        block_v4=spec.block_v4,
        block_v6=spec.block_v6,
        blocks_per_node=spec.blocks_per_node,
    )


def pool_message(pool: Pool, usage: Iterable[Usage]) -> pb.Pool:
    """A pool and how full it is."""
    return pb.Pool(
        name=pool.name,
        spec=spec_message(pool.spec),
        managed=pool.managed,
        usage=[
            pb.PoolUsage(
                family=u.family,
                size=str(u.size),
                allocated=u.allocated,
                reserved=u.reserved,
                cooling=u.cooling,
                free=str(u.free),
                blocks=u.blocks,
                blocks_claimed=u.blocks_claimed,
                blocks_total=str(u.blocks_total),
                elsewhere=u.elsewhere,
            )
            for u in usage
        ],
    )


def address_messages(addresses: Iterable[Address]) -> list[pb.Address]:
    """Addresses."""
    return [pb.Address(cidr=a.cidr, gateway=a.gateway, pool=a.pool, range_set=a.range_set) for a in addresses]


def allocation_message(allocation: Allocation, reason: str = "") -> pb.Allocation:
    """An allocation, and why it was named in an answer."""
    key, netns, at = allocation.key, allocation.netns, allocation.at
    return pb.Allocation(
        key=pb.AttachmentKey(
            node=key.node,
            client=key.client,
            network=key.network,
            container_id=key.container_id,
            ifname=key.ifname,
        ),
        generation=allocation.generation,
        addresses=address_messages(allocation.addresses),
        netns=pb.Netns(inode=netns.inode, cookie=netns.cookie, path=netns.path),
        at=pb.Instant(boot_id=at.boot_id, boottime_ns=at.boottime_ns),
        created_unix_s=allocation.created_unix_s,
        reason=reason,
        workload=allocation.workload,
    )


def events_message(revision: int, events: Iterable[Event]) -> pb.AllocationEvents:
    """What happened, up to a revision."""
    return pb.AllocationEvents(
        revision=revision,
        events=[
            pb.AllocationEvent(
                revision=event.revision,
                kind=event.kind,
                allocation=allocation_message(event.allocation),
                unix_s=event.unix_s,
            )
            for event in events
        ],
    )
