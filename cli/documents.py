"""ipamd's answers as JSON documents. The keys are an interface: they may be added to, never renamed.

Numbers that may exceed 2^53 (sizes of IPv6 pools) are decimal text, as readers of JSON differ in what they keep.
"""

import ipaddress
from datetime import UTC, datetime
from typing import TypedDict

from protos.ipam.v1 import ipam_pb2


class AddressDocument(TypedDict):
    address: str
    cidr: str
    gateway: str
    pool: str
    range_set: int


class NetnsDocument(TypedDict):
    path: str
    inode: int
    cookie: int


class AllocationDocument(TypedDict):
    node: str
    client: str
    network: str
    container_id: str
    ifname: str
    generation: int
    addresses: list[AddressDocument]
    netns: NetnsDocument
    boot_id: str
    created: str  # RFC 3339, "" where unknown
    reason: str
    workload: str


class EventDocument(TypedDict):
    revision: int
    kind: str  # allocated, released
    at: str  # RFC 3339
    allocation: AllocationDocument


class UsageDocument(TypedDict):
    family: str
    size: str
    allocated: int
    reserved: int
    cooling: int
    free: str
    blocks: int  # mode node-block: of this node, of all nodes, and how many there are
    blocks_claimed: int
    blocks_total: str
    elsewhere: int  # mode cluster-address: held by other nodes


class RangeDocument(TypedDict):
    subnet: str
    start: str
    end: str
    gateway: str


class PoolDocument(TypedDict):
    name: str
    managed: bool
    range_sets: list[list[RangeDocument]]
    excludes: list[str]
    cooldown_s: float | None
    mode: str  # local, node-block, cluster-address
    block_v4: int
    block_v6: int
    blocks_per_node: int  # 0: no limit
    usage: list[UsageDocument]


class NodeDocument(TypedDict):
    name: str
    id: str
    hostname: str
    alive: bool
    draining: bool
    created: str  # RFC 3339, "" where unknown
    alive_since: str
    version: str
    blocks: int
    addresses: int
    boot_id: str


class ReservationDocument(TypedDict):
    pool: str
    address: str
    note: str


def allocation(message: ipam_pb2.Allocation) -> AllocationDocument:
    """Who holds which addresses, since when."""
    return {
        "node": message.key.node,
        "client": message.key.client,
        "network": message.key.network,
        "container_id": message.key.container_id,
        "ifname": message.key.ifname,
        "generation": message.generation,
        "addresses": [address(entry) for entry in message.addresses],
        "netns": {"path": message.netns.path, "inode": message.netns.inode, "cookie": message.netns.cookie},
        "boot_id": message.at.boot_id,
        "created": _moment(message.created_unix_s),
        "reason": message.reason,
        "workload": message.workload,
    }


def event(message: ipam_pb2.AllocationEvent) -> EventDocument:
    """What happened to an allocation."""
    return {
        "revision": message.revision,
        "kind": message.kind,
        "at": _moment(message.unix_s),
        "allocation": allocation(message.allocation),
    }


def address(message: ipam_pb2.Address) -> AddressDocument:
    """One address of an allocation."""
    return {
        "address": message.cidr.partition("/")[0],
        "cidr": message.cidr,
        "gateway": message.gateway,
        "pool": message.pool,
        "range_set": message.range_set,
    }


def pool(message: ipam_pb2.Pool) -> PoolDocument:
    """A pool, what it was asked to be, and how full it is."""
    spec = message.spec
    return {
        "name": message.name,
        "managed": message.managed,
        "range_sets": [
            [{"subnet": r.subnet, "start": r.start, "end": r.end, "gateway": r.gateway} for r in range_set.ranges]
            for range_set in spec.range_sets
        ],
        "excludes": list(spec.excludes),
        "cooldown_s": spec.cooldown_ms / 1000 if spec.HasField("cooldown_ms") else None,
        "mode": spec.mode,
        "block_v4": spec.block_v4,
        "block_v6": spec.block_v6,
        "blocks_per_node": spec.blocks_per_node,
        "usage": [
            {
                "family": usage.family,
                "size": usage.size,
                "allocated": usage.allocated,
                "reserved": usage.reserved,
                "cooling": usage.cooling,
                "free": usage.free,
                "blocks": usage.blocks,
                "blocks_claimed": usage.blocks_claimed,
                "blocks_total": usage.blocks_total,
                "elsewhere": usage.elsewhere,
            }
            for usage in message.usage
        ],
    }


def node(message: ipam_pb2.Node) -> NodeDocument:
    """A node of the cluster."""
    return {
        "name": message.name,
        "id": message.id,
        "hostname": message.hostname,
        "alive": message.alive,
        "draining": message.draining,
        "created": _moment(message.created_unix_s),
        "alive_since": _moment(message.alive_since_unix_s),
        "version": message.version,
        "blocks": message.blocks,
        "addresses": message.addresses,
        "boot_id": message.boot_id,
    }


def reservation(message: ipam_pb2.Reservation) -> ReservationDocument:
    """An address that an operator keeps back."""
    return {"pool": message.pool, "address": message.address, "note": message.note}


def order(text: str) -> tuple[int, int, str]:
    """A key that sorts addresses by family and number, and whatever is no address behind them."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return 9, 0, text
    return parsed.version, int(parsed), text


def _moment(unix_s: int) -> str:
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if unix_s > 0 else ""
    except (ValueError, OverflowError, OSError):
        return ""
