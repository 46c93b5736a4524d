"""What this node's claims, releases and watches of cluster-wide addresses know together."""

from dataclasses import dataclass, field

from msgspec import Raw, Struct, json

from cluster import layout
from cluster.etcd import Pair
from cluster.layout import AddressHolder, AddressRecord, BlockRecord, FreedRecord
from ipamd.shared import Place
from ipamd.store.base import Allocation, former_name


class Own(Struct, frozen=True):
    """An address that etcd has as this node's."""

    revision: int
    generation: int
    workload: str = ""  # as FreedRecord has it


@dataclass
class Book:
    """`own`: what etcd was seen to have as ours. `claiming`: what a transaction under way would make ours.

    `conflicts`: addresses that are in use here and that etcd has for somebody else, with what an operator is to know.
    """

    identity: BlockRecord
    own: dict[Place, Own] = field(default_factory=dict)
    claiming: set[Place] = field(default_factory=set)
    conflicts: dict[Place, str] = field(default_factory=dict)

    def is_ours(self, holder: AddressHolder | AddressRecord | FreedRecord) -> bool:
        """Whether a record is this node's."""
        return holder.node_id == self.identity.node_id

    def record(self, allocation: Allocation) -> bytes:
        """An allocation's addresses in etcd; the same for each of them."""
        row = Raw(json.encode(allocation))
        return layout.encode(AddressRecord(self.identity.node, self.identity.node_id, allocation.generation, row))

    def owned_key(self, place: Place) -> str:
        """The index entry of an address."""
        return f"{layout.OWNED}{self.identity.node}/{layout.place(*place)}"


def address_key(place: Place) -> str:
    """Who holds an address."""
    return layout.ADDRESSES + layout.place(*place)


def freed_key(place: Place) -> str:
    """Whether an address cools down."""
    return layout.FREED + layout.place(*place)


def mac_key(place: Place) -> str:
    """Which MAC an address has, where that does not follow from it."""
    return layout.MACS + layout.place(*place)


def holder_of(pair: Pair) -> AddressHolder:
    """Raises LayoutError."""
    return layout.decode(AddressHolder, pair.key, pair.value)


def workload_of(allocation: Allocation) -> str:
    """Under which name other nodes may give the addresses back."""
    return former_name(allocation.workload, allocation.key.ifname) if allocation.workload else ""
