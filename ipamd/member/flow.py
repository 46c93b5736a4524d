"""How many blocks of a range set are claimed at once: as many as last a while at the pace at which the last ones did.

Pure; moments are seconds of one clock.
"""

_MOST_AT_ONCE = 16
_LAST_S = 0.5


class Flow:
    """Of one range set. `enough_s`: when it was last seen that nothing is to be claimed, though little is left."""

    __slots__ = ("_claimed", "_claimed_s", "enough_s")

    def __init__(self) -> None:
        self._claimed = 1  # at the last time
        self._claimed_s = float("-inf")
        self.enough_s = float("-inf")

    def note(self, blocks: int, now_s: float) -> None:
        """So many were claimed at once."""
        self._claimed, self._claimed_s = blocks, now_s

    def wanted(self, now_s: float) -> int:
        """How many are to be claimed now."""
        lasted_s = max(now_s - self._claimed_s, 1e-3)
        return max(1, min(round(self._claimed * _LAST_S / lasted_s), _MOST_AT_ONCE))

    def is_rush(self, now_s: float) -> bool:
        """Whether blocks were claimed lately."""
        return now_s - self._claimed_s < 2 * _LAST_S
