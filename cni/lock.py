"""One request at a time for each attachment (container id, interface name), across processes.

Rules of this file
- The lock is flock(2) on `<run dir>/locks/<container id>@<ifname>`, held until the request's undo is finished: the
  runtime's next verb for the same attachment waits, whoever serves it.
- The file goes away with the lock, or a busy host would collect one for each container it ever ran. Therefore a waiter
  that gets the lock looks whether the path still leads to the file that it has locked, and starts again if not.
- The directory belongs to us and nobody else may write in it: we create and remove files by names that others chose.
- The kernel drops the lock when its holder dies, so there is nothing to break.
"""

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from cni.errors import CniError, Code

DEADLINE_S = 60.0
_NAME_MAX = 255  # bytes, limits.h
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class AttachmentLock:
    """Use as a context manager. See `attachment_lock`."""

    def __init__(self, run_dir: str, container_id: str, ifname: str, holder: str, deadline_s: float) -> None:
        self._directory = f"{run_dir}/locks"
        self._name = _file_name(container_id, ifname)
        self._attachment = f"{container_id}/{ifname}"
        self._holder = holder
        self._deadline_s = deadline_s
        self._directory_fd = -1
        self._fd = -1

    def __enter__(self) -> Self:
        self._directory_fd = _open_directory(self._directory)
        try:
            self._fd = self._acquire()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} {self._holder}".encode("utf-8", "replace"), 0)
        except OSError as error:
            self._close()
            raise _io_failure(f"{self._directory}/{self._name}", error) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with suppress(OSError):  # somebody emptied the directory; the lock itself is the descriptor
            os.unlink(self._name, dir_fd=self._directory_fd)
        self._close()

    def _acquire(self) -> int:
        """A locked descriptor of the file that the path leads to."""
        give_up = time.monotonic() + self._deadline_s
        pause_s = _FIRST_PAUSE_S
        while True:
            fd = os.open(
                self._name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory_fd
            )
            try:
                if _try_lock(fd):
                    if self._leads_to(fd):
                        return fd
                    # Unlinked by its holder between our open and our lock.
                    os.close(fd)
                    fd = -1
                    continue
                holder = os.pread(fd, 200, 0)
            except BaseException:
                if fd >= 0:
                    os.close(fd)
                raise
            os.close(fd)
            if time.monotonic() >= give_up:
                raise self._timed_out(holder)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _leads_to(self, fd: int) -> bool:
        try:
            there = os.stat(self._name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        mine = os.fstat(fd)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _timed_out(self, holder: bytes) -> CniError:
        who = holder.decode("utf-8", "replace") or "an unknown process"
        return CniError(
            Code.TRY_AGAIN_LATER,
            f"another request for attachment {self._attachment} is still running",
            f"waited {self._deadline_s:g} s for {who}; the lock is {self._directory}/{self._name}",
        )

    def _close(self) -> None:
        for fd in (self._fd, self._directory_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory_fd = -1


def attachment_lock(
    run_dir: str, container_id: str, ifname: str, holder: str = "", deadline_s: float = DEADLINE_S
) -> AttachmentLock:
    """The lock of one attachment, to be used in a `with` statement.

    Args:
        run_dir: where `locks` is, or will be made.
        container_id: checked before: no slash, no "@".
        ifname: checked before: no slash.
        holder: who we are, for the text that a waiter gets when it gives up; the process id is put before it.
        deadline_s: how long entering waits.

    Entering raises:
        CniError: 11 after the deadline, naming the holder; 5 where the directory cannot be used.
    """
    return AttachmentLock(run_dir, container_id, ifname, holder, deadline_s)


def _file_name(container_id: str, ifname: str) -> str:
    """Distinct attachments have distinct names: a container id has no "@" and does not begin with "+"."""
    name = f"{container_id}@{ifname}"
    if len(name.encode("utf-8", "surrogateescape")) <= _NAME_MAX:
        return name
    import hashlib  # noqa: PLC0415 - 3 ms that only names beyond 255 bytes pay for

    return "+" + hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True


def _open_directory(path: str) -> int:
    """A descriptor of the lock directory, made with mode 0700 where it is missing."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            with suppress(FileExistsError):  # another first request was faster
                os.mkdir(path, 0o700)
            fd = os.open(path, flags)
        status = os.fstat(fd)
    except OSError as error:
        raise _io_failure(path, error) from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        raise CniError(
            Code.IO_FAILURE,
            f"cannot use {path}: wanted a directory of user {os.geteuid()} that nobody else may write to",
            f"found owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}; chown and chmod 0700, or remove it",
        )
    return fd


def _io_failure(path: str, error: OSError) -> CniError:
    return CniError(
        Code.IO_FAILURE,
        f"cannot lock the attachment: {path}: {error.strerror or error}",
        "check that the directory can be written to and has room",
    )
