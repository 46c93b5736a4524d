"""Staging namespaces: where a CNI ADD runs before Docker takes the finished interface.

Each is bound to a file in `<run dir>/staging`, so it outlives the shim: addresses and records of an endpoint belong to
the namespace in which ADD ran, and must not look dead while the container lives. One serves one ADD at a time, and any
number of endpoints one after the other, since the interface leaves it at once. What an ADD leaves behind in one ends it
for new endpoints; its name stays until the last of its endpoints is gone.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from kernel import link, netns
from kernel.errors import KernelError, from_errno
from kernel.session import Session

_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Staging:
    """See the module. Its methods may be called from any thread."""

    def __init__(self, run_dir: str) -> None:
        self._directory = os.path.join(run_dir, "staging")
        self._mutex = threading.Lock()
        self._free: list[str] = []
        self._spoiled: set[str] = set()

    def recover(self, in_use: set[str]) -> None:
        """Take over what an earlier shim left; `in_use` are the paths that endpoints name."""
        os.makedirs(self._directory, 0o700, exist_ok=True)
        with Session() as host:
            for name in sorted(os.listdir(self._directory)):
                path = os.path.join(self._directory, name)
                if self._is_empty(host, path):
                    self._free.append(path)
                elif path in in_use:
                    self._spoiled.add(path)
                else:
                    _remove(path)

    @contextmanager
    def lent(self, host: Session) -> Iterator[str]:
        """The path of an empty namespace that nobody else has for the duration of the block."""
        with self._mutex:
            path = self._free.pop() if self._free else ""
        path = path or self._make()
        try:
            yield path
        finally:
            clean = self._is_empty(host, path)
            with self._mutex:
                if clean:
                    self._free.append(path)
                else:
                    self._spoiled.add(path)

    def forget(self, in_use: Callable[[], set[str]]) -> None:
        """Remove what is spoiled and no endpoint's any more."""
        with self._mutex:
            for path in sorted(self._spoiled - (in_use() if self._spoiled else set())):
                _remove(path)
                self._spoiled.discard(path)

    def _make(self) -> str:
        path = os.path.join(self._directory, os.urandom(6).hex())
        done: Future[None] = Future()

        def work() -> None:
            try:
                _unshare_to(path)
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                done.set_exception(error)
            else:
                done.set_result(None)

        # A thread of its own: it leaves its namespace, and ends.
        thread = threading.Thread(target=work, name="netloom-staging")
        thread.start()
        thread.join()
        done.result()
        return path

    @staticmethod
    def _is_empty(host: Session, path: str) -> bool:
        """Whether it is a namespace with nothing in it but its loopback."""
        try:
            with netns.opened(path) as where, host.visit(where) as inside:
                return [one.name for one in link.all_links(inside)] == ["lo"]
        except KernelError:
            return False


def _remove(path: str) -> None:
    _libc.umount2(path.encode(), _MNT_DETACH)
    os.unlink(path)


def _unshare_to(path: str) -> None:
    """Move the calling thread to a new network namespace, and bind that to a new file."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise from_errno("make a network namespace", ctypes.get_errno())
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400))
    if _libc.mount(b"/proc/thread-self/ns/net", path.encode(), None, _MS_BIND, None) != 0:
        number = ctypes.get_errno()
        os.unlink(path)
        raise from_errno(f"bind a network namespace to {path}", number)
