"""Moments that no clock change moves, and the wall clock for people's eyes only."""

import time
from typing import Protocol

from ipamd.errors import StartError
from ipamd.store.base import Instant

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"


class Clock(Protocol):
    """What time it is. Tests have one of their own."""

    boot_id: str

    def now_ns(self) -> int:
        """CLOCK_BOOTTIME: nanoseconds since this boot, time in suspend included."""

    def unix_s(self) -> int:
        """Wall clock; nothing is decided by it."""


class BootClock:
    """The machine's clock."""

    def __init__(self, boot_id_file: str = BOOT_ID_FILE) -> None:
        try:
            with open(boot_id_file, encoding="ascii") as file:
                self.boot_id = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"{boot_id_file}: cannot be read ({error}); ipamd needs /proc mounted") from None
        if not self.boot_id:
            raise StartError(f"{boot_id_file}: wanted a boot id, found an empty file; ipamd needs /proc mounted")

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def unix_s(self) -> int:
        return int(time.time())


def age_ns(clock: Clock, at: Instant) -> int:
    """How long ago a moment was. One of another boot counts from the start of this one, which is later."""
    return clock.now_ns() - (at.boottime_ns if at.boot_id == clock.boot_id else 0)
