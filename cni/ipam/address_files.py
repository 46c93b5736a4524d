"""host-local's data directory of one network, under its lock: a file for each address, as the reference has it.

    <data dir>/<network>/10.1.0.5             "<container id>\\r\\n<interface>"; of old versions "<container id>" only
    <data dir>/<network>/last_reserved_ip.0   the address that was last taken of range set 0
    <data dir>/<network>/lock                 flock(2), held by whoever looks or changes

Rules of this file
- The reference reads and writes the same files under the same lock. Any of them may come or go between two of ours.
- The file of an address appears whole: it is written without a name (O_TMPFILE) and then linked, which fails where the
  name is taken. A crash before the link leaves nothing, where the reference leaves an empty file that nobody frees
  (its issue 498). Where the file system cannot do that, it is made as the reference does it.
- Nothing is synced, as the reference does not: no container survives a power cut, and a file that lost its content by
  one is freed as any empty file.
- An empty file is nobody's: who made it died before he could tell the runtime. It counts as taken until GC, or until
  its range set has no other address left.
- Whatever bears the name of an address takes it, whatever it is: a directory, a symbolic link, a file that cannot be
  read. Only plain files belong to somebody; no link is followed.
- Which address is free, and what a container holds, is asked of the index (cni.ipam.address_index).
"""

import errno
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from cni.errors import CniError, Code
from cni.ipam.address_index import AddressIndex, Shelf, named, point_named
from cni.ipam.ranges import Address
from cni.living import boot_id

T = TypeVar("T")

LOCK_DEADLINE_S = 30.0
_FIRST_PAUSE_S = 0.0002
_LONGEST_PAUSE_S = 0.005
_LARGEST = 65536  # bytes of a file that are looked at
_SPACES = b" \t\n\v\f\r"


class AddressFile(msgspec.Struct, frozen=True):
    """One file of an address.

    Attributes:
        content: without spaces around it; None where it is no plain file or cannot be read.
        inode: by which another file of the same name is told apart.
    """

    name: str
    address: Address
    content: bytes | None
    inode: int


class Place(msgspec.Struct, frozen=True):
    """Which namespace an address was given to; kept beside the index, for GC."""

    key: bytes
    boot_id: str
    path: str
    inode: int
    cookie: int


class AddressFiles:
    """The data directory of a network; use it as a context manager, which is the time of the lock.

    Entering and every method raise CniError 5 where the directory cannot be used, 11 where the lock cannot be had.
    """

    def __init__(self, path: str, run_dir: str, *, create: bool = False, deadline_s: float = LOCK_DEADLINE_S) -> None:
        """`create`: make a missing directory. Otherwise there are no addresses in it, and `exists` is false."""
        self.path = path
        self.exists = False
        self._run_dir = run_dir
        self._create = create
        self._deadline_s = deadline_s
        self._fd = self._lock_fd = -1
        self._index: AddressIndex | None = None
        self._fresh = False  # the index was built under this lock
        self._changed = False  # the directory is not the stamped one any more
        self._torn = False  # a change may have reached the directory and not the index

    def __enter__(self) -> Self:
        try:
            self._lock()
        except OSError as error:
            self._close()
            raise self._failure(error) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self._index is not None:
                if self._changed and not self._torn:
                    self._shelf.seal(self._index)
                self._index.close()
        finally:
            self._index = None
            self._close()

    # What there is

    def held(self, key: bytes) -> list[AddressFile]:
        """The files whose content is `key`, by address."""
        if not self.exists:
            return []
        for _ in range(2):
            names = self._ask(lambda index: index.held(key))
            files = [file for name in names if (file := self._look(name)) is not None and file.content == key]
            if len(files) == len(names):
                break
            self._rebuild()  # somebody wrote into a file
        return sorted(files, key=lambda file: (file.address.version, int(file.address)))

    def at(self, address: Address) -> AddressFile | None:
        """The file of an address."""
        return self._look(str(address)) if self.exists else None

    def first_free(self, first: Address, last: Address) -> Address | None:
        """The lowest address from `first` to `last` that no file has."""
        return self._ask(lambda index: index.first_free(first, last)) if self.exists else first

    def last_reserved(self, range_set: int) -> Address | None:
        """The address of this range set that was last taken; None where that is unknown."""
        if not self.exists:
            return None
        content, _ = self._read(f"last_reserved_ip.{range_set}")
        return named((content or b"").decode("ascii", "replace"))

    def scan(self) -> Iterator[AddressFile]:
        """Every file of an address, read from the directory itself."""
        for name in self._names():
            file = self._look(name)
            if file is not None:
                yield file

    # What changes it

    def take(self, address: Address, key: bytes, range_set: int, began: Callable[[str, int], None]) -> bool:
        """Make the file of an address; False where there is one.

        Args:
            address: which.
            key: its content.
            range_set: whose last address it is now.
            began: called with name and inode before the file is there, so that an interrupted ADD can be undone.
        """
        name = str(address)
        with self._change():
            made = self._link(name, key, began)
            if made:
                self._index_of().take(address)
                self._index_of().hold(key, name)
        if made:
            self._remember_last(range_set, name)
        elif not self._fresh:
            self._rebuild()
        else:
            self._ask(lambda index: index.take(address))
        return made

    def release(self, file: AddressFile) -> bool:
        """Remove the file of an address, if it is still this one."""
        now = self._look(file.name) if self.exists else None
        if now is None or now.content is None or (now.content, now.inode) != (file.content, file.inode):
            return False
        with self._change():
            os.unlink(file.name, dir_fd=self._fd)
            self._index_of().free(file.address)
            self._index_of().drop(now.content, file.name)
        self.forget(file.name)
        return True

    def probe(self) -> None:
        """Whether a file could be made. Raises CniError 5. Changes nothing."""
        if not self.exists:
            above = self.path
            while not os.path.lexists(above):
                above = os.path.dirname(above)
            if not (os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)):
                raise self._failure(OSError(errno.EACCES, f"{above} cannot be written to"))
            return
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno in _NO_TMPFILE and os.access(self.path, os.W_OK | os.X_OK):
                return
            raise self._failure(error) from error
        try:
            os.write(fd, b"0")
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(fd)

    def refresh(self) -> None:
        """Build the index anew from what is there."""
        self._rebuild()

    # Where the addresses are

    def remember(self, name: str, place: Place) -> None:
        """Keep for which namespace an address was taken. Nothing depends on it but GC's caution."""
        with suppress(OSError):
            self._shelf.make()
            with suppress(FileExistsError):
                os.mkdir(f"{self._shelf.base}.netns", 0o700)
            with open(f"{self._shelf.base}.netns/{name}", "wb") as file:
                file.write(msgspec.json.encode(place))

    def recall(self, file: AddressFile) -> Place | None:
        """The namespace that the address was taken for, by the same container as now."""
        try:
            with open(f"{self._shelf.base}.netns/{file.name}", "rb") as stream:
                place = msgspec.json.decode(stream.read(), type=Place)
        except (OSError, msgspec.MsgspecError):
            return None
        return place if place.key == file.content else None

    def forget(self, name: str) -> None:
        """The address is nobody's any more."""
        with suppress(OSError):
            os.unlink(f"{self._shelf.base}.netns/{name}")

    def remembered(self) -> list[str]:
        """The names that something is kept of."""
        try:
            return os.listdir(f"{self._shelf.base}.netns")
        except OSError:
            return []

    # The lock

    def _lock(self) -> None:
        give_up = time.monotonic() + self._deadline_s
        pause_s = _FIRST_PAUSE_S
        while self._open():
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise CniError(
                        Code.TRY_AGAIN_LATER,
                        f"somebody else holds {self.path}/lock",
                        f"waited {self._deadline_s:g} s for it; 'fuser {self.path}/lock' shows who it is",
                    ) from None
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                continue
            if self._is_there():
                self.exists = True
                self._shelf = Shelf(self._run_dir, self._fd, boot_id())
                return
            self._close()  # removed, or replaced, while we waited

    def _open(self) -> bool:
        if self._lock_fd >= 0:
            return True
        while True:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not self._create:
                    return False
                _make_directories(self.path)
                continue
            try:
                # The reference's mode; nobody writes into it.
                self._lock_fd = os.open(
                    "lock",
                    os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    0o750,
                    dir_fd=self._fd,
                )
            except FileNotFoundError:  # the directory was removed
                self._close()
                continue
            return True

    def _is_there(self) -> bool:
        """Whether the paths still lead to what was opened."""
        try:
            directory, lock = os.stat(self.path), os.stat("lock", dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(directory, os.fstat(self._fd)) and os.path.samestat(lock, os.fstat(self._lock_fd))

    def _close(self) -> None:
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    # The index

    def _index_of(self) -> AddressIndex:
        if self._index is None:
            self._index = self._shelf.load()
            if self._index is None:
                self._rebuild()
                assert self._index is not None  # noqa: S101 - what _rebuild is for
        return self._index

    def _ask(self, question: Callable[[AddressIndex], T]) -> T:
        try:
            return question(self._index_of())
        except sqlite3.Error:
            self._rebuild()
            return question(self._index_of())

    def _rebuild(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
        taken: list[bytes] = []
        held: list[tuple[bytes, str]] = []
        for name in self._names():
            point = point_named(name)
            if point is None:
                continue
            taken.append(point)
            content, _ = self._read(name)
            if content is not None:
                held.append((content, name))
        fresh = AddressIndex()
        fresh.fill(taken, held)
        self._index = self._shelf.store(fresh)
        self._fresh = self._changed = True
        self._torn = False

    def _change(self) -> "_Change":
        self._index_of()
        return _Change(self)

    # Files

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._fd) if self.exists else []
        except OSError as error:
            raise self._failure(error) from error

    def _look(self, name: str) -> AddressFile | None:
        address = named(name)
        if address is None:
            return None
        content, inode = self._read(name)
        return AddressFile(name, address, content, inode) if inode else None

    def _read(self, name: str) -> tuple[bytes | None, int]:
        """The content of a plain file without spaces around it, and its inode; 0 where there is nothing."""
        try:
            # A named pipe would block without O_NONBLOCK.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None, 0
        except OSError:
            try:
                return None, os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_ino
            except OSError:
                return None, 0
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None, status.st_ino
            return os.read(fd, _LARGEST).strip(_SPACES), status.st_ino
        except OSError:  # a bad disk
            return None, 1
        finally:
            os.close(fd)

    def _link(self, name: str, key: bytes, began: Callable[[str, int], None]) -> bool:
        """Make the file, whole; False where the name is taken."""
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno in _NO_TMPFILE:
                return self._write_in_place(name, key, began)
            raise
        try:
            _write(fd, key)
            began(name, os.fstat(fd).st_ino)
            try:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=self._fd, follow_symlinks=True)
            except FileExistsError:
                return False
        finally:
            os.close(fd)
        return True

    def _write_in_place(self, name: str, key: bytes, began: Callable[[str, int], None]) -> bool:
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except FileExistsError:
            return False
        try:
            began(name, os.fstat(fd).st_ino)
            _write(fd, key)
        except BaseException:
            os.unlink(name, dir_fd=self._fd)
            raise
        finally:
            os.close(fd)
        return True

    def _remember_last(self, range_set: int, name: str) -> None:
        # Lost or torn, the search begins elsewhere: not worth failing an ADD that has its address.
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(f"last_reserved_ip.{range_set}", flags, 0o600, dir_fd=self._fd)
            try:
                os.pwrite(fd, name.encode(), 0)
                os.ftruncate(fd, len(name))
            finally:
                os.close(fd)

    def _failure(self, error: OSError) -> CniError:
        return CniError(
            Code.IO_FAILURE,
            f"cannot use the data directory {self.path}: {error.strerror or error}",
            "check that it is a directory that root can write to and has room; $.ipam.dataDir names another",
        )


class _Change:
    """A change of the directory and then of the index. What is interrupted between the two leaves an index that must
    not be believed; what fails in the index alone does not fail the change."""

    def __init__(self, files: AddressFiles) -> None:
        self._files = files

    def __enter__(self) -> None:
        self._files._torn = self._files._changed = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if error is None:
            self._files._torn = False
        if isinstance(error, sqlite3.Error):
            self._files._rebuild()
            return True
        if isinstance(error, OSError):
            raise self._files._failure(error) from error
        return False


_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS)


def _write(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _make_directories(path: str) -> None:
    """As the reference: every missing one with mode 0755."""
    above = os.path.dirname(path)
    if not os.path.isdir(above):
        _make_directories(above)
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
