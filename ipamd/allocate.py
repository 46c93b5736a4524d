"""From an ask to addresses that are this node's: asks the ledger, and the cluster where the pools want that.

Without a cluster, and for pools of this node alone, the ledger's answer is the answer.
"""

from typing import Protocol

from ipamd.engine import Engine
from ipamd.errors import NeedsBlockError, UnavailableError
from ipamd.lease import Ask, Ledger
from ipamd.store.base import Allocation

# Each refusal teaches this node who holds what it asked for, so a few tries are many.
_MOST_TRIES = 32


class LostError(Exception):
    """Others hold addresses that this node wanted to have; the ledger has been told of them."""


class Blocks(Protocol):
    """What claims blocks for node-block pools."""

    async def provide(self, need: NeedsBlockError) -> None:
        """Gets the block that is wanted, or one more; raises what to answer where that cannot be."""


class Claims(Protocol):
    """What claims addresses for cluster-address pools."""

    async def ready(self) -> None:
        """Returns when the state of such pools is known, or cannot be known now. Raises UnavailableError."""

    async def confirm(self, allocation: Allocation) -> None:
        """Returns when the cluster has the allocation's addresses as this node's.

        Raises LostError where others have them, UnavailableError, PreconditionError.
        """


class Member(Protocol):
    """This node as one of a cluster."""

    @property
    def blocks(self) -> Blocks: ...

    @property
    def claims(self) -> Claims: ...


async def allocate(engine: Engine, ledger: Ledger, member: Member | None, ask: Ask) -> tuple[Allocation, bool]:
    """As `Ledger.allocate`, durably, and with the cluster's consent where it is needed. Raises IpamdError."""
    if member is None:
        return await engine.run(lambda: ledger.allocate(ask), grows=True)
    if ledger.wants_claims(ask.pools):
        await member.claims.ready()
    for _ in range(_MOST_TRIES):
        try:
            allocation, created = await engine.run(lambda: ledger.allocate(ask), grows=True)
        except NeedsBlockError as need:
            await member.blocks.provide(need)
            continue
        if allocation.generation not in ledger.unconfirmed:
            return allocation, created
        try:
            await member.claims.confirm(allocation)
        except LostError:
            continue
        return allocation, created
    raise UnavailableError(f"others were faster each of {_MOST_TRIES} times; ask again")
