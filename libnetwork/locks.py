"""Locks by name: those of one endpoint wait for one another, and for nobody else."""

import contextlib
import threading
from collections.abc import Iterator


class Locks:
    """One lock for each name that is in use."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Wait for it, and have it for the duration of the block."""
        with self._mutex:
            lock, users = self._held.get(name, (threading.Lock(), 0))
            self._held[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._mutex:
                lock, users = self._held.pop(name)
                if users > 1:
                    self._held[name] = (lock, users - 1)
