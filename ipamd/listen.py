"""A daemon's Unix socket: made with its owner and mode before anybody can open it, and put in place in one step.

The socket is bound in a private directory beside its final place, given owner and mode, and then renamed over it. So no
moment exists at which it has the umask's rights, and a client finds either the old daemon's socket or the new one. A
socket that somebody still answers on is not replaced.

A path in sun_path has at most 107 bytes (unix(7)); every path here goes through /proc/self/fd, so deep ones work.
"""

import contextlib
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from ipamd.errors import StartError
from telemetry.health import HealthServer


class SocketPlace:
    """Where the daemon listens, as a context manager. Bind `address`, then call `publish`; `remove` when it is over."""

    def __init__(self, path: str, daemon: str = "ipamd") -> None:
        """Makes the directory where it is missing (mode 0755); `daemon` is who wants to listen. Raises StartError."""
        self._path = path
        self._daemon = daemon
        directory, self._name = os.path.split(path)
        try:
            _make_directory(directory)
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StartError(
                f"{directory}: {error.strerror}; the socket's directory must exist, or be creatable"
            ) from None
        self._private_name = f".{self._name}.{secrets.token_hex(4)}"
        try:
            # Two daemons that start at once must not both find nobody listening. The kernel frees it at their end.
            fcntl.flock(self._directory, fcntl.LOCK_EX)
            self._refuse_occupied()
            os.mkdir(self._private_name, 0o700, dir_fd=self._directory)
            self._private = os.open(self._private_name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._directory)
            os.fchmod(self._private, 0o700)
        except OSError as error:
            os.close(self._directory)
            raise StartError(f"{path}: {error.strerror}; the directory must be writable for this user") from None
        except BaseException:
            os.close(self._directory)
            raise
        self._inode = 0
        self._hidden = -1

    @property
    def address(self) -> str:
        """The path to bind, short enough for any socket."""
        return f"/proc/self/fd/{self._private}/s"

    @property
    def inner(self) -> str:
        """A second path to bind, for `hide`."""
        return f"/proc/self/fd/{self._private}/inner"

    def hide(self) -> str:
        """Takes the name of what was bound at `inner` away, and returns the path by which this process reaches it."""
        self._hidden = os.open("inner", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._private)
        os.unlink("inner", dir_fd=self._private)
        # connect(2) follows it to the socket, which needs no name for that (proc(5), /proc/pid/fd).
        return f"/proc/self/fd/{self._hidden}"

    def publish(self, mode: int, owner: int | None, group: int | None) -> None:
        """Gives the bound socket its rights and puts it in place. Raises StartError."""
        try:
            if owner is not None or group is not None:
                os.chown("s", -1 if owner is None else owner, -1 if group is None else group, dir_fd=self._private)
            os.chmod("s", mode, dir_fd=self._private)
            self._inode = os.stat("s", dir_fd=self._private).st_ino
            os.rename("s", self._name, src_dir_fd=self._private, dst_dir_fd=self._directory)
        except OSError as error:
            raise StartError(
                f"{self._path}: {error.strerror}; to give the socket to another owner or group, this user must be root "
                "or a member of the group"
            ) from None
        finally:
            self._drop_private()
            fcntl.flock(self._directory, fcntl.LOCK_UN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        self._drop_private()
        if self._hidden >= 0:
            os.close(self._hidden)
        os.close(self._private)
        os.close(self._directory)

    def remove(self) -> None:
        """Takes the socket away, unless another one stands in its place by now. May be called twice."""
        with contextlib.suppress(OSError):
            if os.stat(self._name, dir_fd=self._directory).st_ino == self._inode:
                os.unlink(self._name, dir_fd=self._directory)
        self._inode = 0

    def _drop_private(self) -> None:
        for name in ("s", "inner"):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._private)
        with contextlib.suppress(OSError):
            os.rmdir(self._private_name, dir_fd=self._directory)

    def _refuse_occupied(self) -> None:
        """Raises StartError where somebody listens there, or what stands there is no socket."""
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise StartError(f"{self._path}: there is a file that is no socket; move it away, or name another socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{self._directory}/{self._name}")
            except ConnectionRefusedError:
                return  # left behind by a daemon that is gone
            except BlockingIOError:
                pass  # its backlog is full: somebody listens
        raise StartError(f"{self._path}: another {self._daemon} listens there; stop it first, or name another socket")


def _make_directory(directory: str) -> None:
    if not os.path.isdir(directory):
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o755)  # noqa: S103 (clients of other users must reach the socket, under any umask)


@contextlib.asynccontextmanager
async def served(pages: HealthServer, listen: str) -> AsyncIterator[None]:
    """A daemon's pages for the duration of the block. Raises StartError where `listen`, as configured, cannot be."""
    try:
        await pages.start()
    except OSError as error:
        raise StartError(f"http_listen {listen}: {error.strerror or error}; free the port or name another") from None
    try:
        yield
    finally:
        await pages.close()
