"""What stands in etcd under which key. Values are JSON; fields that a version does not know are ignored by it, and kept
where it writes a record of another one again (`encode_over`).

    version                    VersionRecord: the schema, and the cluster's own id
    pools/<pool>               PoolRecord
    reservations/<pool>#<ip>   ReservationRecord
    nodes/<node>               NodeRecord, for as long as the node belongs to the cluster
    alive/<node>               AliveRecord, under a lease
    blocks/<pool>#<cidr>       BlockRecord: which node hands the block's addresses out
    published/<pool>#<cidr>    PublishedRecord: what of the block is in use, as of a few seconds ago
    addresses/<pool>#<ip>      AddressRecord: who holds an address of a pool of mode cluster-address
    owned/<node>/<pool>#<ip>   empty: the addresses of a node
    macs/<pool>#<ip>           MacRecord: of an address in an overlay network, where it does not follow from the address
    freed/<pool>#<ip>          FreedRecord, under a lease as long as the cool-down
    networks/<network>         NetworkRecord: what ipamd defined, and netd carries from host to host
    last-network               the name of the network that was defined last: puts definitions of several nodes in order
    netd/<node>                netd's, see `netd`

Pool and node names have neither "#" nor "/". Whoever changes what a key means raises SCHEMA; whoever must not meet an
older version raises NEEDS too, and an older one refuses to start. Where only some use of it needs that, whoever begins
with it raises what stands under `version`, once AliveRecord.schema says that no older member runs.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

SCHEMA = 2
NEEDS = 1
# From the first overlay network on, as older members would take it for a routed one, and write it without its VNI.
OVERLAYS_NEED = 2

VERSION = "version"
POOLS = "pools/"
RESERVATIONS = "reservations/"
NODES = "nodes/"
ALIVE = "alive/"
BLOCKS = "blocks/"
PUBLISHED = "published/"
ADDRESSES = "addresses/"
OWNED = "owned/"
MACS = "macs/"
FREED = "freed/"
NETWORKS = "networks/"
LAST_NETWORK = "last-network"

T = TypeVar("T")


class VersionRecord(Struct, frozen=True, omit_defaults=True):
    """`needs`: the lowest schema that a member must know. `cluster`: made once, by the first node."""

    schema: int
    needs: int
    cluster: str


class PoolRecord(Struct, frozen=True, omit_defaults=True):
    """`spec` is ipamd's text. A pool that is going away gives no block and no address any more."""

    spec: str
    deleting: bool = False


class ReservationRecord(Struct, frozen=True, omit_defaults=True):
    note: str = ""


class NodeRecord(Struct, frozen=True, omit_defaults=True):
    """`id` is made by the node at its first start and kept on its disk."""

    id: str
    hostname: str
    created_unix_s: int
    draining: bool = False


class AliveRecord(Struct, frozen=True, omit_defaults=True):
    """`schema`: the one that the member knows; those of schema 1 do not say it."""

    id: str
    boot_id: str
    version: str
    since_unix_s: int
    schema: int = 1


class BlockRecord(Struct, frozen=True, omit_defaults=True):
    node: str
    node_id: str


class NetworkRecord(Struct, frozen=True, omit_defaults=True):
    """A network: its pool has its name, `backend` "" is netd's default, `mtu` 0 what netd works out.

    `open`: everybody may reach its containers, not only its own and those of networks in `connected`. From `vni` on of
    type "overlay" only: `internal`: it has no way out; `flood`: frames for nobody known go to every host that is on it;
    `docker`: the name under which every host's Docker shows it, "" for none.
    """

    name: str
    type: str = ""
    subnets: tuple[str, ...] = ()
    backend: str = ""
    bridge: str = ""
    mtu: int = 0
    masquerade: bool = True
    open: bool = False
    connected: tuple[str, ...] = ()
    created_unix_s: int = 0
    vni: int = 0
    internal: bool = False
    flood: bool = False
    docker: str = ""


class PublishedRow(Struct, frozen=True, array_like=True):
    """One address in use: its allocation, as far as others want to know it."""

    cidr: str
    gateway: str
    range_set: int
    generation: int
    client: str
    network: str
    container_id: str
    ifname: str
    created_unix_s: int
    workload: str


class PublishedRecord(Struct, frozen=True):
    node: str
    rows: tuple[PublishedRow, ...]


class AddressRecord(Struct, frozen=True):
    """Who holds an address. `allocation` is ipamd's row, with all of its addresses."""

    node: str
    node_id: str
    generation: int
    allocation: msgspec.Raw


class AddressHolder(Struct, frozen=True):
    """An AddressRecord, read for its holder only."""

    node: str
    node_id: str
    generation: int


class MacRecord(Struct, frozen=True):
    """The MAC of an address, as long as this node holds it by the allocation of this generation."""

    node_id: str
    generation: int
    mac: str


class FreedRecord(Struct, frozen=True, omit_defaults=True):
    """Who had an address last, and for which workload (ipamd's `former_name`)."""

    node: str
    node_id: str
    workload: str = ""


class LayoutError(ValueError):
    """A value is not what this version understands."""


def encode(record: Struct) -> bytes:
    return msgspec.json.encode(record)


def encode_over(found: bytes, record: Struct) -> bytes:
    """A record in place of what was found, with the fields of it that only a newer version knows."""
    there = msgspec.json.decode(found, type=dict[str, msgspec.Raw])
    known = {field.encode_name for field in msgspec.structs.fields(record)}
    own = msgspec.json.decode(encode(record), type=dict[str, msgspec.Raw])
    return msgspec.json.encode(own | {name: value for name, value in there.items() if name not in known})


def decode(kind: type[T], key: str, value: bytes) -> T:
    """Raises LayoutError that names the key."""
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutError(f"etcd: {key}: this is no {kind.__name__}: {error}") from None


def place(pool: str, what: str) -> str:
    """The end of a key: an address or a block of a pool."""
    return f"{pool}#{what}"


def split(ending: str) -> tuple[str, str]:
    """The inverse of `place`."""
    pool, _, what = ending.partition("#")
    return pool, what
