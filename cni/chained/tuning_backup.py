"""Tuning's backup: what an attachment's interface and its namespace's sysctls were before.

One file, `<dataDir>/<container id>_<ifname>.json`. Its place and its first five keys are the reference's, so that
either restores what the other changed. Below `netloom`, which the reference passes over, there is what it does not
keep: the old sysctls, and the boot, namespace and interface that all of it was read from. Only there it is ever
applied: a container that died without DEL leaves its backup, and the next one may have the same id. The reference's own
backups do not say where they belong, and are applied as the reference does it.

A backup is on disk before the first change, so one that cannot be read was never finished, and there is nothing to
restore.
"""

import contextlib
import errno
import os
from typing import Annotated

import msgspec

from cni.errors import CniError, Code, shown

DATA_DIR = "/run/cni/tuning"

# A path that leads to nothing: no entry, a file on the way, a name that no file can have.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class Place(msgspec.Struct, frozen=True, rename="camel"):
    """Where the values were read. `netns_cookie` is 0 where the kernel has none, `ifindex` where no interface was."""

    boot_id: str
    netns_inode: int
    netns_cookie: int
    ifindex: int

    def same_netns(self, other: "Place") -> bool:
        """Whether both are in one namespace."""
        return (self.boot_id, self.netns_inode, self.netns_cookie) == (
            other.boot_id,
            other.netns_inode,
            other.netns_cookie,
        )


class Own(msgspec.Struct, frozen=True, rename="camel"):
    """What only Netloom writes: CLOCK_BOOTTIME of the ADD in nanoseconds; the old values of sysctls by their path below
    /proc/sys/net, in the order in which they were set."""

    place: Place
    began_ns: int
    sysctls: dict[str, str] = {}


class Backup(msgspec.Struct, frozen=True, omit_defaults=True):
    """The file. A value is there where the configuration changed it."""

    mac: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{2}:){5}[0-9a-f]{2}$|^$")] = ""
    promisc: bool | None = None
    mtu: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    allmulti: bool | None = None
    tx_q_len: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] | None = msgspec.field(default=None, name="txQLen")
    netloom: Own | None = None


def path_of(data_dir: str, container_id: str, ifname: str) -> str:
    """The backup of an attachment."""
    return os.path.join(data_dir, f"{container_id}_{ifname}.json")


def read(path: str) -> Backup | None:
    """The backup, or None where there is none that can be read."""
    try:
        # O_NONBLOCK: a FIFO under that name must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with open(fd, "rb", closefd=False) as file:  # which leaves a directory's descriptor open
                backup = msgspec.json.decode(file.read(), type=Backup)
        finally:
            os.close(fd)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    names = backup.netloom.sysctls if backup.netloom else ()
    return None if any(part in ("", ".", "..") for name in names for part in name.split("/")) else backup


def write(path: str, backup: Backup) -> None:
    """Write a new backup, and its directory where that is missing.

    Raises:
        CniError: 5, it cannot be written.
    """
    try:
        _remove(path)
        try:
            _create(path, backup)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            _create(path, backup)
    except OSError as error:
        raise CniError(
            Code.IO_FAILURE,
            f"cannot write the backup {shown(path, 200)}: {error.strerror or error}",
            "what tuning changes could not be restored; make room, or set dataDir to another directory",
        ) from error


def replace(path: str, backup: Backup) -> None:
    """Replace a backup as a whole. Raises OSError."""
    temporary = f"{path}.new"
    _remove(temporary)
    try:
        _create(temporary, backup)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove(path: str) -> None:
    """Remove a backup where there is one.

    Raises:
        CniError: 5, it stays.
    """
    try:
        _remove(path)
    except OSError as error:
        if error.errno not in _NOWHERE:
            reason = error.strerror or str(error)
            raise CniError(
                Code.IO_FAILURE, f"cannot remove the backup {shown(path, 200)}: {reason}", "remove it"
            ) from error


def _create(path: str, backup: Backup) -> None:
    # As Go's json.MarshalIndent(…, "", " ").
    data = msgspec.json.format(msgspec.json.encode(backup), indent=1)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
