"""What the shim must know after a restart: Docker repeats neither CreateNetwork nor CreateEndpoint nor Join.

One file for each network, endpoint, pool, problem, and address that is to go back,
`<state dir>/docker/<kind>/<id>.json`, replaced as a whole; those of networks and pools are on the disk before Docker
gets its answer. The others are not waited for: what an endpoint speaks of, an interface and rules, survives no power
cut either, and what comes back is what Docker does not have (libnetwork.reconcile). The shim is the only writer; a lock
on the directory sees to that. A file that cannot be understood is told and set aside as `<file>.bad`: the rest of the
host's containers must not wait for it. What a file holds is known from its first reading on.

As installed, the state directory belongs to ipamd's user, who must not tell root what to do. So ours must be our own
user's, and is held open: whatever is put into its place later is not looked at.
"""

import contextlib
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from libnetwork.errors import DriverError
from libnetwork.options import NetworkOptions
from libnetwork.published import Published
from telemetry import log

_logger = logging.getLogger("netloom-docker")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


class Shown(msgspec.Struct, frozen=True):
    """An overlay network as Docker shows it: what it does not tell its driver when it makes one."""

    name: str
    labels: dict[str, str] = {}
    attachable: bool = False
    options: dict[str, str] = {}


class Network(msgspec.Struct, frozen=True):
    """A network as Docker created it.

    Attributes:
        pools: CIDRs, IPv4 before IPv6; `gateways` likewise.
        plugins: of the conflist that the options name, as they were when the network was made: a DEL must find what
            its ADD found, whatever became of the file.
        version: that conflist's.
        interim: an overlay with addresses of Docker's own, which is to be replaced (libnetwork.overlays).
        shared: of an overlay: that all hosts show it was told to ipamd, or heard from it.
        shown: of an overlay, once Docker was asked.
    """

    id: str
    options: NetworkOptions
    pools: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    plugins: tuple[dict[str, Any], ...] = ()
    version: str = ""
    interim: bool = False
    shared: bool = False
    shown: Shown | None = None


class Endpoint(msgspec.Struct, frozen=True):
    """A container's place in a network.

    Attributes:
        addresses: with prefix length; as Docker gave them, or as the CNI ADD did where Docker has no IPAM.
        ifname: of the interface, in the staging namespace and in dockerd's.
        staging: path of the namespace in which ADD ran; "" before.
        result: of the ADD, as printed; None before.
        ports: what is published now; None while nothing is.
        ended: Docker has deleted it, and its DEL is to come.
    """

    id: str
    network_id: str
    addresses: tuple[str, ...]
    mac: str
    ifname: str
    staging: str = ""
    result: dict[str, Any] | None = None
    ports: tuple[Published, ...] | None = None
    ended: bool = False


class Pool(msgspec.Struct, frozen=True):
    """A pool that Docker asked for. `sub_pool` is where addresses come from that nobody names. `overlay`: the network
    whose pool it is; such a one is never written down, its id says it."""

    id: str
    pool: str
    sub_pool: str = ""
    overlay: str = ""


class Ended(msgspec.Struct, frozen=True):
    """An address whose endpoint has ended, and which Docker gives back next, or, if it cannot reach us then, never."""

    id: str
    pool_id: str
    address: str  # without prefix length


class Problem(msgspec.Struct, frozen=True):
    """What keeps an overlay network from being in this host's Docker as it should, or addresses from following names
    (libnetwork.sticky), for `netloom status`."""

    id: str  # the network's name for ipamd; or "sticky-" and Docker's id
    text: str


Value = Network | Endpoint | Pool | Ended | Problem
T = TypeVar("T", Network, Endpoint, Pool, Ended, Problem)
_KINDS: dict[type, str] = {
    Network: "networks",
    Endpoint: "endpoints",
    Pool: "pools",
    Ended: "ended",
    Problem: "problems",
}
_SYNCED = (Network, Pool)


def peek(directory: str, kind: type[T]) -> list[T]:
    """Every one of a kind that can be read, for who only looks. Raises OSError where the directory cannot be read."""
    found = []
    top = os.path.join(directory, _KINDS[kind])
    for name in sorted(os.listdir(top)):
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            if name.endswith(".json"):
                with open(os.path.join(top, name), "rb") as file:
                    found.append(msgspec.json.decode(file.read(), type=kind))
    return found


class State:
    """See the module. Its methods may be called from any thread."""

    def __init__(self, directory: str) -> None:
        """Makes the directories where they are missing.

        Raises:
            DriverError: another shim has them, or another user.
            OSError: they cannot be made.
        """
        self._directory = directory
        os.makedirs(directory, 0o700, exist_ok=True)
        self._held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._place = f"/proc/self/fd/{self._held}"
        self._known: dict[str, Any] = {}  # what each file holds, by its path; the values are frozen
        self._mutex = threading.Lock()  # nobody reads a file that goes
        try:
            self._take()
        except BaseException:
            os.close(self._held)
            raise

    def _take(self) -> None:
        found = os.fstat(self._held)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise DriverError(
                f"{self._directory} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:04o}; wanted one "
                f"that only user {os.geteuid()} can write to: move it away"
            )
        for kind in _KINDS.values():
            os.makedirs(os.path.join(self._place, kind), 0o700, exist_ok=True)
        # Of the directory itself: the kernel frees it at our end.
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DriverError(f"{self._directory} is in use by another netloom-docker; stop it first") from None

    def close(self) -> None:
        """Lets another shim have the directory."""
        os.close(self._held)

    def _shown(self, path: str) -> str:
        """As an operator finds it."""
        return path.replace(self._place, self._directory)

    def put(self, value: Value) -> None:
        """Writes one; a network or pool is on disk when this returns."""
        path = self._path(type(value), value.id)
        temporary = f"{path}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode(value))
                file.flush()
                if isinstance(value, _SYNCED):
                    os.fdatasync(fd)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
        self._known[path] = value
        self._sync(type(value), path)

    def get(self, kind: type[T], id: str) -> T:  # noqa: A002 - Docker's word
        """The one of this id. Raises DriverError where there is none."""
        found = self.find(kind, id)
        if found is None:
            bad = f"{self._path(kind, id)}.bad"
            if os.path.exists(bad):
                raise DriverError(
                    f"{kind.__name__.lower()} {id[:12]}: what netloom-docker wrote down about it could not be read "
                    f"and is in {self._shown(bad)}: remove it in Docker and make it again"
                )
            raise DriverError(
                f"{kind.__name__.lower()} {id[:12]} is unknown to netloom-docker; it was made while another state "
                f"directory than {self._directory} was in use: remove it in Docker and make it again"
            )
        return found

    def find(self, kind: type[T], id: str) -> T | None:  # noqa: A002
        """The one of this id, or None."""
        return self._read(kind, self._path(kind, id))

    def all(self, kind: type[T]) -> Iterator[T]:
        """Every one of a kind that can be read."""
        directory = os.path.join(self._place, _KINDS[kind])
        for name in sorted(os.listdir(directory)):
            if name.endswith(".json"):
                path = os.path.join(directory, name)
                try:
                    found = self._read(kind, path)
                except OSError as error:
                    log.event(_logger, "error", "cannot read state", file=self._shown(path), error=str(error))
                    continue
                if found is not None:
                    yield found

    def remove(self, kind: type[T], id: str) -> None:  # noqa: A002
        """Forgets one; nothing where there is none."""
        path = self._path(kind, id)
        with self._mutex, contextlib.suppress(FileNotFoundError):
            self._known.pop(path, None)
            os.unlink(path)
            self._sync(kind, path)

    def _path(self, kind: type, id: str) -> str:  # noqa: A002
        if not _ID.fullmatch(id):
            raise DriverError(f"wanted an id of letters, digits and . _ -, found {id!r}")
        return os.path.join(self._place, _KINDS[kind], f"{id}.json")

    def _read(self, kind: type[T], path: str) -> T | None:
        known: T | None = self._known.get(path)
        if known is not None:
            return known
        with self._mutex:
            return self._read_first(kind, path)

    def _read_first(self, kind: type[T], path: str) -> T | None:
        try:
            with open(path, "rb") as file:
                found = msgspec.json.decode(file.read(), type=kind)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            wrong = str(error)
        else:
            if f"{found.id}.json" == os.path.basename(path):
                self._known.setdefault(path, found)
                return found
            wrong = f"it is about {found.id}"
        log.event(
            _logger, "error", "state set aside, as it makes no sense", file=f"{self._shown(path)}.bad", error=wrong
        )
        with contextlib.suppress(FileNotFoundError):  # another thread was first
            os.rename(path, f"{path}.bad")
        return None

    @staticmethod
    def _sync(kind: type, path: str) -> None:
        """The entry of the directory."""
        if kind not in _SYNCED:
            return
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
