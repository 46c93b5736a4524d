"""Files that netd keeps, in directories that another user owns too: root must not be led elsewhere by a link.

The directory is opened once and checked; everything after goes through its descriptor. A file is replaced by rename:
whoever reads finds the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import stat


class DirectoryError(Exception):
    """The directory is none that may be written to; the text says why."""


class Directory:
    """An open directory. `own`: it must be this user's alone, and is made where it is missing."""

    def __init__(self, path: str, *, own: bool = False) -> None:
        self.path = path
        try:
            if own and not os.path.lexists(path):
                os.makedirs(path, mode=0o700)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise DirectoryError(f"{path}: {error.strerror}; netd needs this directory") from None
        found = os.fstat(self._fd)
        if own and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022):
            os.close(self._fd)
            raise DirectoryError(f"{path}: others may write there; chown it to netd's user and chmod it 0700")

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none. Raises OSError."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read()

    def write(self, name: str, content: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
        """Raises OSError. `durable`: it survives a power cut."""
        fresh = f".{name}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=self._fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, mode, dir_fd=self._fd), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.rename(fresh, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def close(self) -> None:
        os.close(self._fd)
