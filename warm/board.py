"""What master and workers know of each other without a message: one slot of shared memory for each worker.

A slot is written by one process at a time: by the master while no worker has it, else by its worker. Each number is
written in one store of eight bytes, so a reader sees the old or the new one.
"""

import mmap
import struct
import time

_SLOT = 64  # bytes: one cache line
_NUMBER = struct.Struct("=Q")
_BUSY, _SERVED, _READY = 0, 8, 16


class Board:
    """The slots; made by the master before it forks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size * _SLOT)

    def clear(self, slot: int) -> None:
        """Nobody has it."""
        for what in (_BUSY, _SERVED, _READY):
            self._put(slot, what, 0)

    def ready(self, slot: int) -> None:
        """The worker waits for its first request."""
        self._put(slot, _READY, 1)

    def is_ready(self, slot: int) -> bool:
        """Whether its worker ever waited for a request."""
        return bool(self._get(slot, _READY))

    def begin(self, slot: int) -> None:
        """The worker has a connection from now on."""
        self._put(slot, _BUSY, time.monotonic_ns())

    def end(self, slot: int, served: int) -> None:
        """The worker is free again."""
        self._put(slot, _SERVED, served)
        self._put(slot, _BUSY, 0)

    def busy_since_ns(self, slot: int) -> int:
        """CLOCK_MONOTONIC of when its worker got the connection that it has; 0 where it has none."""
        return self._get(slot, _BUSY)

    def served(self, slot: int) -> int:
        """How many requests its worker has finished."""
        return self._get(slot, _SERVED)

    def _put(self, slot: int, what: int, number: int) -> None:
        _NUMBER.pack_into(self._memory, slot * _SLOT + what, number)

    def _get(self, slot: int, what: int) -> int:
        return int(_NUMBER.unpack_from(self._memory, slot * _SLOT + what)[0])
