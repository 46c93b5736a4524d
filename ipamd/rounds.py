"""Rounds in which addresses of cluster-address pools are asked for: one commit here and one transaction of etcd's each.

- Who asks while a round is under way waits for the next; all of them then go together. So the more ask at a time, the
  less each costs, and the rate does not depend on the way to etcd. Who asks alone goes at once.
- After a round those who were just answered may ask again. The next one waits a moment until most of them did (an
  eighth less of the processor for each, at 8 clients, than not to wait for the last quarter); where that was in vain,
  the next ones do not, up to 16.
- A round that takes long (etcd hangs, somebody lost an address) is not waited for: the next begins beside it.

Belongs to one event loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable

MOST_ASKS = 32
_GATHER_S = 0.02
_LONGEST_S = 0.1


class Round:
    """Those who went together."""

    __slots__ = ("inside", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.inside = size  # who is not answered yet


class Rounds:
    """See the top of this file."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[Round]] = deque()
        self._current: Round | None = None
        self._timer: asyncio.TimerHandle | None = None  # the end of a gathering, or the limit of a round
        self._wanted = 0  # how many end a gathering; 0: there is none
        self._in_vain = 0
        self._left_out = 0

    async def enter(self) -> Round:
        """The round that this ask is of, when it begins; to be handed to `leave`."""
        if self._current is None and not self._wanted:
            self._current = Round(1)
            self._limit()
            return self._current
        turn: asyncio.Future[Round] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._wanted and len(self._waiting) >= self._wanted:
            self._in_vain = 0
            self._begin()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(turn.result())
            raise

    def leave(self, one: Round) -> None:
        """An ask of this round is answered."""
        one.inside -= 1
        if not one.inside and one is self._current:
            self._current = None
            self._gather(one.size)

    def _gather(self, answered: int) -> None:
        waiting = len(self._waiting)
        at_work = min(waiting + answered, MOST_ASKS)
        wanted = at_work - (at_work + 4) // 8
        if wanted <= 1 or waiting >= wanted:
            self._begin()
        elif self._left_out < self._in_vain:
            self._left_out += 1
            self._begin()
        else:
            self._left_out = 0
            self._wanted = wanted
            self._set_timer(_GATHER_S, self._give_up)

    def _give_up(self) -> None:
        self._in_vain = min(2 * self._in_vain + 1, 16)
        self._begin()

    def _begin(self) -> None:
        """Lets in who waits; a round that is still under way goes on beside them."""
        self._wanted = 0
        self._current = None
        turns: list[asyncio.Future[Round]] = []
        while self._waiting and len(turns) < MOST_ASKS:
            turn = self._waiting.popleft()
            if not turn.done():
                turns.append(turn)
        if not turns:
            self._set_timer(0, None)
            return
        self._current = Round(len(turns))
        for turn in turns:
            turn.set_result(self._current)
        self._limit()

    def _limit(self) -> None:
        self._set_timer(_LONGEST_S, self._begin)

    def _set_timer(self, seconds: float, function: Callable[[], None] | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, function) if function is not None else None
