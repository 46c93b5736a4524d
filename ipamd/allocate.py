"""From an ask to addresses that are this node's: asks the ledger, and the cluster where the pools want that.

Without a cluster, and for pools of this node alone, the ledger's answer is the answer.
"""

import time
from collections.abc import Callable
from typing import Protocol

from ipamd.engine import Engine
from ipamd.errors import NeedsBlockError, UnavailableError
from ipamd.lease import Ask, Ledger
from ipamd.rounds import Rounds
from ipamd.store.base import Allocation, Instant, Key

# Each refusal teaches this node who holds what it asked for, so a few tries are many.
_MOST_TRIES = 32
# One takes as long as etcd may ([etcd] timeout_s, 3 s), and who asks waits for 5 s.
_LAST_TRY_S = 1.5


class LostError(Exception):
    """Others hold addresses that this node wanted to have; the ledger has been told of them."""


class Blocks(Protocol):
    """What claims blocks for node-block pools."""

    async def provide(self, need: NeedsBlockError) -> None:
        """Gets the block that is wanted, or one more; raises what to answer where that cannot be."""


class Claims(Protocol):
    """What claims addresses for cluster-address pools."""

    @property
    def rounds(self) -> Rounds:
        """In which they are asked for."""

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


class Turn:
    """An ask that is not answered yet."""

    __slots__ = ("ask", "ended")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.ended = False

    def check(self) -> None:
        """Raises UnavailableError where the attachment was released meanwhile."""
        if self.ended:
            raise UnavailableError(f"{self.ask.key} was released while it was being asked for")


class Underway:
    """The asks that wait for the cluster. A release ends those of its key that were there before it.

    A client that waited too long gives up and releases, before this daemon has heard that it gave up. The ask would
    then get an address of which nobody knows.
    """

    def __init__(self) -> None:
        self._turns: dict[Key, list[Turn]] = {}

    @property
    def waiting(self) -> int:
        """How many they are."""
        return sum(map(len, self._turns.values()))

    def begin(self, ask: Ask) -> Turn:
        """To be ended by `done`."""
        turn = Turn(ask)
        self._turns.setdefault(ask.key, []).append(turn)
        return turn

    def done(self, turn: Turn) -> None:
        """It is answered."""
        turns = self._turns[turn.ask.key]
        turns.remove(turn)
        if not turns:
            del self._turns[turn.ask.key]

    def end(self, key: Key, before: Instant | None) -> None:
        """The key is released; `before`: only what was asked for before that moment."""
        for turn in self._turns.get(key, ()):
            at = turn.ask.at
            if before is None or (at and at.boot_id == before.boot_id and at.boottime_ns < before.boottime_ns):
                turn.ended = True


async def allocate(
    engine: Engine, ledger: Ledger, member: Member | None, underway: Underway, ask: Ask
) -> tuple[Allocation, bool]:
    """As `Ledger.allocate`, durably, and with the cluster's consent where it is needed. Raises IpamdError."""
    if member is None:
        return await engine.run(lambda: ledger.allocate(ask), grows=True)
    if ledger.wants_claims(ask.pools):
        turn = underway.begin(ask)
        try:
            return await _allocate(engine, ledger, member, turn, member.claims)
        finally:
            underway.done(turn)
    # Nearly always a block of this node has an address: whether it must wait is known only where none has.
    waiting: list[Turn] = []

    def choose() -> tuple[Allocation, bool]:
        try:
            return ledger.allocate(ask)
        except NeedsBlockError:
            if not waiting:  # a batch for which the disk had no room runs twice
                waiting.append(underway.begin(ask))
            raise

    try:
        return await engine.run(choose, grows=True)
    except NeedsBlockError as need:
        await member.blocks.provide(need)
        return await _allocate(engine, ledger, member, waiting[0], None)
    finally:
        for turn in waiting:
            underway.done(turn)


def release(ledger: Ledger, underway: Underway, key: Key, generation: int, before: Instant | None) -> Allocation | None:
    """As `Ledger.release`, in a batch of the engine: who asked before it has had a first try then, and is known to wait
    where that was not enough.
    """
    if not generation:
        underway.end(key, before)
    return ledger.release(key, generation, before)


async def _allocate(
    engine: Engine, ledger: Ledger, member: Member, turn: Turn, claims: Claims | None
) -> tuple[Allocation, bool]:
    """For an ask that waits for the cluster; `claims`: what claims its addresses."""
    ask = turn.ask

    def choose() -> tuple[Allocation, bool]:
        turn.check()
        return ledger.allocate(ask)

    last_try_s = time.monotonic() + _LAST_TRY_S
    if claims is not None:
        await claims.ready()
    for tries in range(1, _MOST_TRIES + 1):
        try:
            if claims is None:
                return await engine.run(choose, grows=True)
            return await _claim(engine, ledger, claims, turn, choose)
        except NeedsBlockError as need:
            await member.blocks.provide(need)
        except LostError:
            if time.monotonic() > last_try_s:
                raise UnavailableError(
                    f"others were faster each of {tries} times, and etcd is slow; ask again"
                ) from None
    raise UnavailableError(f"others were faster each of {_MOST_TRIES} times; ask again")


async def _claim(
    engine: Engine, ledger: Ledger, claims: Claims, turn: Turn, choose: Callable[[], tuple[Allocation, bool]]
) -> tuple[Allocation, bool]:
    """Addresses that the cluster has as this node's; raises LostError."""
    going = await claims.rounds.enter()
    try:
        allocation, created = await engine.run(choose, grows=True)
        if allocation.generation in ledger.unconfirmed:
            await claims.confirm(allocation)
            turn.check()
        return allocation, created
    finally:
        claims.rounds.leave(going)
