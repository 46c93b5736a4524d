"""A clock that tests move by hand."""

from ipamd.store.base import Instant


class FakeClock:
    """See `ipamd.clock.Clock`."""

    def __init__(self, boot_id: str = "boot-1", seconds: float = 1000.0) -> None:
        self.boot_id = boot_id
        self.ns = int(seconds * 1e9)
        self.wall_s = 1_700_000_000

    def now_ns(self) -> int:
        return self.ns

    def unix_s(self) -> int:
        return self.wall_s

    def advance(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)

    def instant(self, seconds: float = 0.0) -> Instant:
        """Now, or so many seconds from now."""
        return Instant(self.boot_id, self.ns + int(seconds * 1e9))
