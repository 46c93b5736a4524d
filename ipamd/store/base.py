"""The contract of a store, and the values that it keeps.

- A store holds rows: pools, allocations, freed addresses that are still remembered, reservations. It decides nothing.
- What changes state is a `Change`. Each names its preconditions; `apply` takes a group of them, all or none, and raises
  `ConflictError` where a precondition fails, with nothing of that group applied.
- Groups between `begin` and `commit` become durable together. Reads see what was applied before. Only when `commit` has
  returned may anybody be told. Where `commit` or `apply` raises `StoreError`, the caller calls `rollback`, and nothing
  since `begin` has happened.
- Synchronous, used by one caller at a time. `commit` may run in another thread: it is where the wait for the disk is.

A group of changes is small, and its preconditions are "absent" and "present": a store whose transactions are compares
and puts can hold it too. There, `commit` has nothing left to do.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

from msgspec import Struct

# At least so many of the newest events are remembered, and not more than twice as many.
EVENTS_KEPT = 10_000


class StoreError(Exception):
    """The store could not do it (I/O, damage); the text says what it met."""


class StoreFullError(StoreError):
    """There is no room on the disk."""


class ConflictError(Exception):
    """A precondition does not hold; the text names it."""


class Key(Struct, frozen=True):
    """What an allocation belongs to; all five together are unique."""

    node: str
    client: str
    network: str
    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.client} {self.container_id}/{self.ifname} of network {self.network} on node {self.node}"


class Instant(Struct, frozen=True):
    """A moment that no clock change moves: CLOCK_BOOTTIME in nanoseconds, within the boot that `boot_id` names."""

    boot_id: str
    boottime_ns: int


class Netns(Struct, frozen=True):
    """A network namespace. 0: unknown. The path is for people."""

    inode: int = 0
    cookie: int = 0
    path: str = ""


class Address(Struct, frozen=True, array_like=True):
    """One address of an allocation: "10.1.0.2/16", its gateway ("" for none), and where it came from."""

    cidr: str
    gateway: str
    pool: str
    range_set: int

    @property
    def ip(self) -> str:
        """The address without its prefix length."""
        return self.cidr.partition("/")[0]


class Allocation(Struct, frozen=True):
    """Addresses that an attachment holds. `generation` is 0 only before the store gave it one.

    `workload` is who they are for beyond one container, "" for nobody in particular.
    """

    key: Key
    addresses: tuple[Address, ...]
    netns: Netns
    at: Instant
    created_unix_s: int
    generation: int = 0
    workload: str = ""


class PoolRow(Struct, frozen=True):
    """A pool. `spec` is the text that `pool` wrote; the store does not look into it."""

    name: str
    spec: str
    managed: bool


class Freed(Struct, frozen=True):
    """An address that was released: not handed out again before its cool-down is over."""

    pool: str
    range_set: int
    ip: str
    at: Instant


class Use(Struct, frozen=True):
    """An address that is held, and of its allocation what others want to know."""

    address: Address
    generation: int
    client: str
    network: str
    container_id: str
    ifname: str
    created_unix_s: int
    workload: str


class Reservation(Struct, frozen=True):
    """An address that an operator keeps back."""

    pool: str
    ip: str
    note: str


class Former(Struct, frozen=True):
    """The address that a workload (`former_name`) had last out of a range set, and nobody else since."""

    pool: str
    range_set: int
    workload: str
    ip: str


def former_name(workload: str, ifname: str) -> str:
    """Under which name an address is remembered. A workload may have several interfaces in one range set."""
    return f"{workload} {ifname}"


class Errand(Struct, frozen=True):
    """What the cluster is yet to be told; durable together with the change that it follows from.

    "claim": the address is this node's; "unclaim": it no longer is. `seq` rises.
    """

    seq: int
    kind: Literal["claim", "unclaim"]
    pool: str
    ip: str
    generation: int


class Event(Struct, frozen=True):
    """What happened to an allocation. `revision` rises and is never used again."""

    revision: int
    kind: Literal["allocated", "released"]
    allocation: Allocation
    unix_s: int


class Filter(Struct, frozen=True):
    """Which allocations are wanted; an empty field matches all."""

    node: str = ""
    client: str = ""
    network: str = ""
    container_id: str = ""
    pool: str = ""
    ip: str = ""
    not_boot_id: str = ""

    def matches(self, allocation: Allocation) -> bool:
        """Whether the allocation is wanted."""
        key = allocation.key
        return (
            self.node in ("", key.node)
            and self.client in ("", key.client)
            and self.network in ("", key.network)
            and self.container_id in ("", key.container_id)
            and (not self.not_boot_id or allocation.at.boot_id != self.not_boot_id)
            and (not self.pool or any(a.pool == self.pool for a in allocation.addresses))
            and (not self.ip or any(a.ip == self.ip for a in allocation.addresses))
        )


class Grant(Struct, frozen=True):
    """Keeps an allocation and gives it the next generation, which is never used again.

    Wants its key absent and its addresses neither held nor reserved; freed rows of its addresses go. Its workload, if
    it has one, is remembered for each address, and whoever had the address before no longer is. `claims`: pools whose
    addresses the cluster is to be told of.
    """

    allocation: Allocation
    claims: tuple[str, ...] = ()


class Touch(Struct, frozen=True):
    """The attachment asked again. Wants the generation present."""

    generation: int
    netns: Netns
    at: Instant


class Drop(Struct, frozen=True):
    """Ends an allocation; its addresses are freed as `freed` says, behind all that were freed before.

    Wants the allocation's generation present. `claims`: as for Grant; a claim that was not told yet goes.
    """

    allocation: Allocation
    freed: tuple[Freed, ...]
    claims: tuple[str, ...] = ()
    unix_s: int = 0


class Forget(Struct, frozen=True):
    """Removes freed rows of a pool, and who had these addresses; where there is none, nothing is to do."""

    pool: str
    ips: tuple[str, ...]


class PutPool(Struct, frozen=True):
    """Keeps a pool. Wants the name absent (`new`) or present."""

    pool: PoolRow
    new: bool


class Regroup(Struct, frozen=True):
    """A pool's range sets changed: these freed addresses now belong to these sets. Their order stays."""

    pool: str
    range_sets: tuple[tuple[str, int], ...]


class DropPool(Struct, frozen=True):
    """Removes a pool with its freed rows, reservations, blocks and former addresses.

    Wants it present and nothing allocated from it.
    """

    name: str


class Reserve(Struct, frozen=True):
    """Keeps an address back. Wants it neither held nor reserved; its freed row goes."""

    reservation: Reservation


class Unreserve(Struct, frozen=True):
    """Ends a reservation; the address is freed as `freed` says. Wants it present."""

    freed: Freed


class Rename(Struct, frozen=True):
    """The node has another name now: every allocation of `old` becomes one of `new`."""

    old: str
    new: str


class PutBlock(Struct, frozen=True):
    """This node holds a block of a pool. Wants it absent."""

    pool: str
    cidr: str


class DropBlock(Struct, frozen=True):
    """This node gave a block up; freed rows within (`ips`) go, as with Forget. Wants it present."""

    pool: str
    cidr: str
    ips: tuple[str, ...] = ()


class Settle(Struct, frozen=True):
    """The cluster knows of these errands."""

    seqs: tuple[int, ...]


class Note(Struct, frozen=True):
    """Keeps a value under a name, "" removes it."""

    name: str
    value: str


Change = (
    Grant
    | Touch
    | Drop
    | Forget
    | PutPool
    | Regroup
    | DropPool
    | Reserve
    | Unreserve
    | Rename
    | PutBlock
    | DropBlock
    | Settle
    | Note
)


class Copy(Struct, frozen=True):
    """All that a store holds, to be put into an empty one: `Store.snapshot`, `load`.

    A store that was loaded goes on counting far behind `generation` and `revision`: what was handed out after the copy
    was taken had numbers that must not come again.
    """

    pools: Iterable[PoolRow] = ()
    reservations: Iterable[Reservation] = ()
    allocations: Iterable[Allocation] = ()
    freed: Iterable[Freed] = ()
    former: Iterable[Former] = ()
    blocks: Iterable[tuple[str, str]] = ()
    notes: Iterable[Note] = ()
    generation: int = 0
    revision: int = 0


class Snapshot(Protocol):
    """The rows of one moment."""

    def copy(self) -> Copy:
        """The rows, read while they are asked for; once."""

    def close(self) -> None:
        """Lets go of it."""


class Store(Protocol):
    """See the top of this file."""

    @property
    def kind(self) -> str:
        """ "memory", "sqlite"."""

    @property
    def schema(self) -> str:
        """The version of what it keeps."""

    def begin(self) -> None:
        """Starts a group that becomes durable as one."""

    def apply(self, changes: Sequence[Change]) -> int:
        """Applies all of them or none; returns the generation of the last Grant, 0 where there was none.

        Raises ConflictError (nothing of these changes was applied) or StoreError (roll back).
        """

    def commit(self) -> None:
        """Returns when everything since `begin` is durable; raises StoreError (roll back)."""

    def rollback(self) -> None:
        """Takes back everything since `begin`. Does not raise."""

    def close(self) -> None:
        """Lets go of it; nothing may be called afterwards."""

    def snapshot(self) -> "Snapshot":
        """All rows of this moment, to be read later in any thread. Not to be asked between `begin` and `commit`."""

    def find(self, key: Key) -> Allocation | None:
        """The allocation of a key."""

    def holder(self, pool: str, ip: str) -> Allocation | Reservation | None:
        """Who holds an address."""

    def uses(self, pool: str, ips: Sequence[str]) -> list[Use]:
        """Those of these addresses that are held, in the same order."""

    def allocations(self, wanted: Filter, after: int = 0, limit: int = 1000) -> list[Allocation]:
        """Up to `limit` allocations with a generation above `after`, rising."""

    def count(self) -> int:
        """How many allocations there are."""

    def taken(self, pool: str) -> Iterator[tuple[str, int]]:
        """Every held address of a pool with its generation; 0 for a reservation."""

    def pools(self) -> list[PoolRow]:
        """Every pool."""

    def freed(self, pool: str) -> Iterator[Freed]:
        """Every freed address of a pool, oldest first."""

    def find_freed(self, pool: str, ip: str) -> Freed | None:
        """Whether and when an address was freed."""

    def oldest_freed(self, pool: str, range_set: int, skip: int = 0) -> Freed | None:
        """The head of a range set's queue; `skip`: of what comes behind so many."""

    def count_freed(self, pool: str, range_set: int, since: Instant) -> int:
        """How many were freed in this boot at or after a moment."""

    def reservations(self, pool: str = "") -> Iterable[Reservation]:
        """Every reservation (of a pool)."""

    def remembered_node(self) -> str:
        """The node's name when `remember_node` was last called, "" for never. Stores that belong to one node only."""

    def remember_node(self, name: str) -> None:
        """Keeps the node's name, durably with the next commit."""

    def blocks(self, pool: str = "") -> list[tuple[str, str]]:
        """(pool, CIDR) of every block that this node holds (of a pool)."""

    def errands(self, limit: int = 1000) -> list[Errand]:
        """What the cluster is yet to be told, oldest first."""

    def former(self, pool: str, range_set: int, workload: str) -> str:
        """The address that a workload (`former_name`) had last, "" for none and where another had it since."""

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        """Events with a revision above `after`, rising, as far as they are remembered (`EVENTS_KEPT`)."""

    def event_bounds(self) -> tuple[int, int]:
        """The oldest revision that is remembered, and the newest that there was; (1, 0) where there was none."""

    def note(self, name: str) -> str:
        """The value that a Note keeps, "" for none."""
