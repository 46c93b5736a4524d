"""Which network namespaces live on this machine: what root can see, and nobody else.

A namespace lives as long as something holds it. Looked at, in this order (a namespace that passes from a process to a
bind mount while we look is then seen at least once):
- every process, and every thread where a process has several (setns(2) moves one thread);
- open descriptors that lead to a namespace;
- nsfs mounts in every mount namespace that a process is in ("ip netns add", what runtimes keep under /run/netns).

Not seen: a namespace held only by a socket, by a device that moved out of it, by a descriptor in flight or in the
private descriptor table of a thread, or by a mount in a mount namespace that no process is in. No runtime keeps a
container so. Whoever acts on an observation therefore asks for two, some time apart. Of the processes only those of
our own pid namespace and its descendants are seen, so an observation belongs in the host's or in the one that the
containers' runtime is in.

Some processes may hide their namespaces even from root (another security module's or Landlock domain's). What they
cannot hide is the inode of /proc/<pid>/net/dev, which each namespace has of its own: such a process is fine where that
is the one of a namespace that was found another way, and otherwise there is no answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kernel import netns
from kernel.errors import Denied, KernelError

T = TypeVar("T")

_LINK = re.compile(r"net:\[(\d+)\]")
_GONE = (FileNotFoundError, ProcessLookupError, NotADirectoryError)
_WAYS = 4
_PASSES = 3  # over the list of processes, for those that started meanwhile


@dataclass(frozen=True, slots=True, order=True)
class LiveNetns:
    """A network namespace that lives. Inodes are given out again within one boot, cookies never."""

    inode: int
    cookie: int  # 0: unknown, as the namespace could not be entered, or the kernel has no cookies (before 5.14)


def observe() -> tuple[LiveNetns, ...]:
    """Every network namespace that lives on this machine, each once, in the order of their inodes.

    A namespace that ends while we look may be among them. The caller's own namespace does not change. Measured on two
    cores, Linux 6.18: 2 ms, and more for each process (19 µs), namespace (37 µs), thread (6 µs, where there are
    several) and open descriptor (2.3 µs).

    Raises:
        Denied: a process hides its namespace, so that what is missing here might be alive.
    """
    view = _look()
    found = _in_a_thread(lambda: [_identified(inode, paths, bool(view.hidden)) for inode, paths in view.paths.items()])
    seen = {net_dev for _, net_dev in found}
    _refuse_hidden({net_dev: process for net_dev, process in view.hidden.items() if net_dev not in seen})
    return tuple(sorted(namespace for namespace, _ in found))


def visit_others(work: Callable[[int], T]) -> list[T]:
    """What `work` returns inside each namespace but the caller's own; it is given the inode. One that ends is left out.

    `work` runs in a thread of its own, and must leave nothing open there.

    Raises:
        Denied: a process hides its namespace.
        KernelError: what `work` raises, but for namespaces that are gone.
    """
    own = os.stat("/proc/thread-self/ns/net").st_ino
    view = _look()
    view.hidden.pop(os.stat("/proc/thread-self/net/dev").st_ino, None)

    def visit() -> Iterator[T]:
        for inode, paths in view.paths.items():
            for path in paths if inode != own else ():
                try:
                    with netns.opened(path) as opened:
                        if opened.identity.inode != inode:
                            continue
                        netns.setns(opened.fd)
                except (KernelError, OSError):
                    continue
                if view.hidden:
                    view.hidden.pop(os.stat("/proc/thread-self/net/dev").st_ino, None)
                yield work(inode)
                break

    found = _in_a_thread(lambda: list(visit()))
    _refuse_hidden(view.hidden)
    return found


def _refuse_hidden(hidden: Mapping[int, str]) -> None:
    if hidden:
        processes = ", ".join(sorted(hidden.values()))
        raise Denied(
            "observe network namespaces", errno.EACCES, f"that of {processes} cannot be seen; run as real root"
        )


def _look() -> _View:
    view = _View()
    view.note("/proc/thread-self/ns/net")
    for process in _processes():
        with contextlib.suppress(*_GONE):
            try:
                view.look_at(process)
            except PermissionError:
                view.look_at_hidden(process)
    for process in view.mounts.values():
        with contextlib.suppress(*_GONE):
            view.look_at_mounts(process)
    return view


def netns_cookie(where: int | str) -> int:
    """The cookie of a namespace, by descriptor or path; 0 where the kernel has none. The caller stays where it is.

    Raises:
        NotFound, NotANamespace: as for `kernel.netns.opened`.
        Denied: it may not be entered.
    """
    if isinstance(where, int):
        return _in_a_thread(lambda: _cookie_of(where))
    with netns.opened(where) as opened:
        return _in_a_thread(lambda: _cookie_of(opened.fd))


def _processes() -> Iterator[str]:
    """The directory of each process, and of those that start while the caller looks at them."""
    known: set[str] = set()
    for _ in range(_PASSES):
        new = [name for name in os.listdir("/proc") if name.isdigit() and name not in known]
        if not new:
            return
        known.update(new)
        yield from (f"/proc/{name}" for name in new)


class _View:
    """What was seen so far."""

    def __init__(self) -> None:
        self.paths: dict[int, list[str]] = {}  # of each namespace's inode: some ways to it, as each may vanish
        self.mounts: dict[tuple[int, ...], str] = {}  # one process for each mount namespace and root directory
        self.hidden: dict[int, str] = {}  # a process for each inode of net/dev, where no more may be seen

    def look_at(self, process: str) -> None:
        """Notes what a process holds. Raises PermissionError where it may not be looked at."""
        threads = [process]
        if os.stat(f"{process}/task").st_nlink > 3:  # two of the directory's own, one for each thread
            threads = [f"{process}/task/{thread}" for thread in os.listdir(f"{process}/task")]
        for thread in threads:
            self.note(f"{thread}/ns/net")
        for thread in threads:  # the first may have ended, and then has none of this while the others go on
            with contextlib.suppress(*_GONE):
                for descriptor in os.listdir(f"{thread}/fd"):
                    self.note(f"{thread}/fd/{descriptor}")
                # mountinfo leaves out what is not below the reader's root: one under chroot(2) speaks for itself only.
                root = os.stat(f"{thread}/root")
                self.mounts.setdefault((os.stat(f"{thread}/ns/mnt").st_ino, root.st_dev, root.st_ino), thread)
                return

    def look_at_hidden(self, process: str) -> None:
        """Notes what a process that may not be looked at cannot hide: which namespaces it is in, and its mounts."""
        for task in os.listdir(f"{process}/task"):
            self.hidden.setdefault(os.stat(f"{process}/task/{task}/net/dev").st_ino, process)
        self.mounts.setdefault((-int(process.rpartition("/")[2]),), process)

    def note(self, path: str) -> None:
        """Notes the namespace that a link of /proc leads to, if it does."""
        try:
            link = os.readlink(path)
        except _GONE:
            return
        if link.startswith("net:[") and (match := _LINK.fullmatch(link)):
            paths = self.paths.setdefault(int(match[1]), [])
            if len(paths) < _WAYS:
                paths.append(path)

    def look_at_mounts(self, process: str) -> None:
        """Notes mounted namespaces. proc_pid_mountinfo(5): field 4 is the root within the file system, 5 the place."""
        try:
            with open(f"{process}/mountinfo", "rb") as stream:
                lines = stream.readlines()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # the process has ended and given its mounts up (fs/proc_namespace.c, mounts_open_common)
        for line in lines:
            fields = line.split(b" ")
            match = _LINK.fullmatch(fields[3].decode("ascii", "replace"))
            if match and b" - nsfs " in line:
                place = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields[4])
                paths = self.paths.setdefault(int(match[1]), [])
                paths.append(f"{process}/root{os.fsdecode(place)}")


def _identified(inode: int, paths: Iterable[str], net_dev: bool) -> tuple[LiveNetns, int]:
    """The namespace with its cookie, and on request the inode of its net/dev (else 0), through the first path that
    still leads there. Enters it and stays."""
    for path in paths:
        # Another namespace may be mounted over it, or have got the process's number: then the inode is not the same.
        with contextlib.suppress(KernelError, OSError), netns.opened(path) as opened:
            if opened.identity.inode == inode:
                cookie = _cookie_of(opened.fd)
                return LiveNetns(inode, cookie), os.stat("/proc/thread-self/net/dev").st_ino if net_dev else 0
    return LiveNetns(inode, 0), 0


def _cookie_of(fd: int) -> int:
    netns.setns(fd)
    return netns.cookie()


def _in_a_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own, which may enter namespaces and never has to come home: setns(2) moves one
    thread, and this one ends. A forked process would do as well but for what other threads hold at the fork."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="namespaces", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
