"""A file that holds room on the disk: dropped when the disk is full, so that releases can still be written."""

import contextlib
import os

_SIZE = 4 << 20  # log and pages of some thousand releases


class BallastFile:
    """See the top of this file."""

    def __init__(self, path: str, size: int = _SIZE) -> None:
        self._path = path
        self._size = size

    def drop(self) -> None:
        """Gives the room up; does not raise."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def restore(self) -> bool:
        """Takes the room; True where the file is there at its full size. Does not raise."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        try:
            os.posix_fallocate(descriptor, 0, self._size)
        except OSError:
            self.drop()  # a part of it would only make matters worse
            return False
        finally:
            os.close(descriptor)
        return True
