"""Attachment records: what each attachment wants of the host's kernel, on disk before the kernel is touched.

One file per attachment and plugin, `<run dir>/attachments/<network>/<container id>@<ifname>.<plugin>`.
From them a flushed nftables table is restored, and a DEL without namespace or prevResult knows what to remove. They
live in the run directory and are not synced: no container survives a power cut.

Elements that several attachments of a network want together ("shared", such as the network's exemption from
masquerade) are counted by markers, `<run dir>/shared/<hash>/<network>`, so that the last DEL of the last network that
wants one removes it, in constant time. Of elements that lie within one another the kernel has the widest only.

What the host wants as a whole, whatever is attached ("standing"), is in `<run dir>/standing/<who wants it>.json`.

One lock for the host, `<run dir>/attachments.lock`:
- shared, while a record is written, and while elements and their record are removed together;
- exclusive, while the elements of a network's last attachment go, and while the tables are rebuilt.
So an element never outlives its record, nor is one removed that a newer record wants.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec

from kernel import foreign, nft
from kernel.errors import KernelError
from kernel.nft import Chain, Element
from kernel.nft_codec import widest
from kernel.session import Session

_VERSION = 1
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,160}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Key:
    """Whose record. `plugin` is the CNI type: each plugin of a chain keeps its own."""

    network: str
    container_id: str
    ifname: str
    plugin: str


@dataclass(frozen=True, slots=True)
class Record:
    """What an attachment wants of the host's kernel, and where its container lives."""

    key: Key
    netns: str = ""  # path, as the runtime gave it
    netns_inode: int = 0  # 0: unknown
    netns_cookie: int = 0  # 0: unknown
    links: tuple[str, ...] = ()  # host links that belong to this attachment alone
    files: tuple[str, ...] = ()  # absolute paths that go with it, such as tuning's backup
    bridge: str = ""  # the bridge it hangs on, "" for none
    elements: tuple[Element, ...] = ()  # of this attachment alone
    shared: tuple[Element, ...] = ()  # of all attachments of the network
    chains: tuple[Chain, ...] = ()  # of this attachment alone; its elements lead there
    admin_chain: str = ""  # of iptables, to be asked before what this attachment sends and gets passes
    firewalld_zone: str = ""  # that the addresses are sources of
    version: int = field(default=_VERSION)


class Records:
    """The records of one host, in its run directory. Any number of processes may use them at once."""

    def __init__(self, run_dir: str) -> None:
        self._root = f"{run_dir}/attachments"
        self._shared = f"{run_dir}/shared"
        self._standing = f"{run_dir}/standing"
        self._lock = f"{run_dir}/attachments.lock"
        self._run_dir = run_dir

    @property
    def run_dir(self) -> str:
        """The host's run directory."""
        return self._run_dir

    def write(self, record: Record) -> None:
        """Write or replace a record."""
        path = self._path(record.key)
        data = msgspec.json.encode(record)
        with self._locked(fcntl.LOCK_SH):
            _write(self._root, path, data)
            for element in record.shared:
                self._mark(element, record.key.network)

    def read(self, key: Key) -> Record | None:
        """The record, or None. An unreadable one counts as none: it was never finished."""
        return _load(self._path(key))

    def apply(self, session: Session, record: Record) -> None:
        """Put the elements of a written record into the kernel; those of all records, where our tables were not there:
        somebody flushed them, or a version before this one had written them."""

        def write() -> None:
            with contextlib.suppress(KernelError):  # what is wrong with another's record is not this one's affair
                self.rebuild(session)

        if not all(nft.holds(session, element) for element in record.shared):
            if not all(nft.current(session, family) for family in {element.family for element in record.shared}):
                write()
            # The first of its network. Adding it plainly would do wrong where other networks lie within this one: the
            # kernel takes it beside theirs, and confuses them when one is removed (nft_set_pipapo.c, pipapo_get).
            with self._locked(fcntl.LOCK_EX):
                nft.ensure_tables(session, {element.family for element in record.shared})
                self._settle(session)
        for chain in record.chains:
            nft.add_chain(session, chain, write)
        nft.add(session, record.elements, write)
        foreign.ensure(session, _forwarded(record), _asked(record))

    def restore(self, session: Session, key: Key) -> None:
        """Put the elements of a record back that another record had taken over. Nothing where it is gone by now."""
        with self._locked(fcntl.LOCK_EX):
            record = self.read(key)
            if record is not None:

                def write() -> None:
                    with contextlib.suppress(KernelError):
                        self._rebuild(session)

                nft.add(session, record.elements, write)

    def all(self) -> Iterator[Record]:
        """Every record of the host, in no order; what cannot be read is passed over."""
        for directory in _entries(self._root):
            for path in _entries(directory):
                record = _load(path)
                if record is not None:
                    yield record

    def of_network(self, network: str, plugin: str) -> Iterator[Record]:
        """The records of one network and plugin."""
        for path in _entries(os.path.join(self._root, _name(network))):
            if path.endswith(f".{plugin}"):
                record = _load(path)
                if record is not None and record.key.network == network:
                    yield record

    def elsewhere(self, key: Key) -> bool:
        """Whether another network, or another plugin, has an attachment of this container and interface name."""
        stem = f"{_name(key.container_id)}@{_name(key.ifname)}."
        own = self._path(key)
        return any(
            os.path.basename(path).startswith(stem) and path != own
            for directory in _entries(self._root)
            for path in _entries(directory)
        )

    def remove(self, session: Session, record: Record) -> None:
        """Take the attachment's elements and chains from the kernel, then its record; the network's with the last one.

        A failure leaves the record, so that a second attempt knows what to do.
        """
        path, network = self._path(record.key), record.key.network
        with self._locked(fcntl.LOCK_SH):
            self.take_out(session, record)
            others = _has_others(path)
            if others:
                _unlink(path)
        if others and not _is_empty(os.path.dirname(path)):
            return
        with self._locked(fcntl.LOCK_EX):
            if not others:  # a rebuild may have come between, and put back what the record wants
                self.take_out(session, record)
            if not _has_others(path):
                if self._is_marked(network):
                    self._settle(session, without=network)
                    self._unmark(network)
                for top in (self._root, self._shared):
                    _remove_files(top)
                self._end_passing(session, path)
            _unlink(path)
            with contextlib.suppress(OSError):  # a new attachment came
                os.rmdir(os.path.dirname(path))

    @staticmethod
    def take_out(session: Session, record: Record) -> None:
        """Take the attachment's own elements and chains from the kernel. The record stays, and a rebuild heeds it."""
        nft.delete(session, record.elements)
        nft.delete_chains(session, (chain.name for chain in record.chains))

    def change_shared(self, session: Session, having: Element, shared: Sequence[Element], plugin: str) -> None:
        """Let the plugin's attachments whose shared elements include one want these shared elements from now on, and
        have the kernel hold them. Nothing is done where that is so already."""
        if not self._differs(having, shared, plugin):
            return
        with self._locked(fcntl.LOCK_EX):
            if not self._differs(having, shared, plugin):  # a record was just being written
                return
            found = [one for one in self.all() if one.key.plugin == plugin and having in one.shared]
            for record in found:
                if set(record.shared) != set(shared):
                    changed = replace(record, shared=tuple(shared))
                    _write(self._root, self._path(record.key), msgspec.json.encode(changed))
            for network in {record.key.network for record in found}:
                self._mark_anew(network)
        self.rebuild(session)

    def _differs(self, having: Element, shared: Sequence[Element], plugin: str) -> bool:
        """Whether `change_shared` has something to do: a record wants other elements, or its network's markers say more
        than its records do, because one that wanted more is gone."""
        records = list(self.all())
        found = [one for one in records if one.key.plugin == plugin and having in one.shared]
        if any(set(one.shared) != set(shared) for one in found):
            return True
        for network in {one.key.network for one in found}:
            wanted = {_digest(element) for one in records if one.key.network == network for element in one.shared}
            marked = {
                os.path.basename(directory)
                for directory in _entries(self._shared)
                if os.path.exists(os.path.join(directory, _name(network)))
            }
            if marked != wanted:
                return True
        return False

    def _mark_anew(self, network: str) -> None:
        self._unmark(network)
        for record in self.all():
            if record.key.network == network:
                for element in record.shared:
                    self._mark(element, network)

    def stand(self, session: Session, who: str, elements: Sequence[Element]) -> None:
        """From now on somebody wants these standing elements for the host, and no others; they last as records do. With
        none, everything of his goes.

        They are about what leaves with another source than its own. Where nobody translates addresses there is no need
        for a table, which has every packet tracked: they wait for one, or for `attend`.
        """
        path = os.path.join(self._standing, f"{who}.json")
        with self._locked(fcntl.LOCK_EX):
            if elements:
                _write(self._standing, path, msgspec.json.encode(elements))
            else:
                _unlink(path)
            wanted = self._all_standing()
            if nft.current(session, "inet"):
                nft.converge(session, nft.standing_sets(), wanted)
            elif wanted and foreign.translates(session):
                self._rebuild(session)

    def attend(self, session: Session) -> bool:
        """Write the tables where they are missing, and standing elements are needed by now; True: they were."""
        if nft.current(session, "inet") or not foreign.translates(session) or not self.standing():
            return False
        self.rebuild(session)
        return True

    def standing(self, who: str = "") -> list[Element]:
        """What somebody wants for the host; "": all of them."""
        paths = [path for path in _entries(self._standing) if path.endswith(f"/{who}.json" if who else ".json")]
        return [one for path in paths for one in _load_standing(path)]

    def rebuild(self, session: Session, *, anew: bool = False) -> tuple[int, int]:
        """Make our nftables tables hold exactly what the records want; where one is missing, or of another version, it
        comes with all of that, at once.

        Args:
            session: the host's namespace.
            anew: a chain or rule may be missing in a table that is there; all rules are written again.

        Returns:
            How many elements were missing, and how many had no record.

        Raises:
            KernelError: as far as it goes all is done: a chain that the kernel refuses by now, such as one about a link
                that is gone, is left out with what leads there.
        """
        with self._locked(fcntl.LOCK_EX):
            return self._rebuild(session, anew=anew)

    def _rebuild(self, session: Session, *, anew: bool = False) -> tuple[int, int]:
        """Exclusive."""
        records = list(self.all())
        wanted = [element for record in records for element in record.elements]
        wanted += widest(element for record in records for element in record.shared)
        wanted += self._all_standing()
        chains = {chain.name: chain for record in records for chain in record.chains}
        written = self._write(session, wanted, list(chains.values()), anew=anew)
        refused: dict[str, KernelError] = {}
        for chain in chains.values():
            if nft.count_rules(session, chain.name) != len(chain.rules):
                try:
                    nft.add_chain(session, chain)
                except KernelError as error:
                    refused[chain.name] = error
        wanted = [element for element in wanted if not refused.keys() & element.data]
        missing, stale = nft.converge(session, nft.element_sets(), wanted)
        nft.delete_chains(session, (name for name in nft.chains(session) if name not in chains))
        self._let_pass(session, records)
        if refused:
            raise next(iter(refused.values()))
        return written + missing, stale

    def _all_standing(self) -> list[Element]:
        return widest(self.standing())

    @staticmethod
    def _write(session: Session, wanted: Sequence[Element], chains: Sequence[Chain], *, anew: bool) -> int:
        """Write the tables that are missing, or all; how many elements came with them. What could not be said is
        missing still."""
        families = {element.family for element in wanted}
        behind = sorted(family for family in families if anew or not nft.current(session, family))
        if not behind:
            return 0
        from kernel import nft_write  # noqa: PLC0415 - few requests come here, and every cold process would pay

        theirs = [element for element in wanted if element.family in behind]
        with contextlib.suppress(KernelError):
            return nft_write.write(session, behind, theirs, chains)
        # A chain is refused by now, maybe: without all of them, what they are for is not reached for a moment.
        with contextlib.suppress(KernelError):
            names = {chain.name for chain in chains}
            return nft_write.write(session, behind, [one for one in theirs if not names & set(one.data)], [])
        return nft_write.write(session, behind, [], [])

    def let_pass(self, session: Session) -> bool:
        """Put the rules back that a reload of another firewall took away (kernel.foreign), where one is wanted; True
        where it had to."""
        return any(nft.forwards(version) for version in nft.FORWARDING) and self._let_pass(session, self.all())

    def _let_pass(self, session: Session, records: Iterable[Record]) -> bool:
        wanted: dict[int, set[str]] = {}
        for record in records:
            for version in _forwarded(record):
                wanted.setdefault(version, set()).update(_asked(record))
        changed = False
        for version in nft.FORWARDING:
            if version in wanted:
                changed |= foreign.ensure(session, (version,), sorted(wanted[version]))
            else:
                foreign.settle(session, (version,))
        return changed

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other process from writing or removing records for the duration of the block."""
        with self._locked(fcntl.LOCK_EX):
            yield

    def _end_passing(self, session: Session, path: str) -> None:
        """Take our rules out of other firewalls if nobody wants them, now that a network's last attachment goes.
        Exclusive. Once for a network, because to look whether anybody does may have to wait for what was deleted just
        now (kernel.foreign)."""
        if _has_others(os.path.dirname(path)):  # other networks
            foreign.settle(session)
        else:
            foreign.remove(session)

    def _path(self, key: Key) -> str:
        name = f"{_name(key.container_id)}@{_name(key.ifname)}.{key.plugin}"
        return f"{self._root}/{_name(key.network)}/{name}"

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            os.makedirs(self._run_dir, 0o755, exist_ok=True)
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def _mark(self, element: Element, network: str) -> None:
        directory = os.path.join(self._shared, _digest(element))
        marker = os.path.join(directory, _name(network))
        if not os.path.exists(marker):
            _write(self._shared, marker, msgspec.json.encode(element))

    def _is_marked(self, network: str) -> bool:
        return any(os.path.exists(os.path.join(directory, _name(network))) for directory in _entries(self._shared))

    def _unmark(self, network: str) -> None:
        """Drop the network's markers."""
        for directory in _entries(self._shared):
            _unlink(os.path.join(directory, _name(network)))
            with contextlib.suppress(OSError):  # another network wants it
                os.rmdir(directory)

    def _settle(self, session: Session, without: str = "") -> None:
        """Make the sets of shared elements hold what is marked, but for one network's wishes. Exclusive."""
        wanted = []
        touched = set()
        for directory in _entries(self._shared):
            for marker in _entries(directory):
                with contextlib.suppress(OSError, msgspec.MsgspecError), open(marker, "rb") as file:
                    element = msgspec.json.decode(file.read(), type=Element)
                    touched.add(element.set)
                    if os.path.basename(marker) != _name(without):
                        wanted.append(element)
        # What has an owner is an attachment's own, and not ours to judge.
        owned = [element for name in touched for element in nft.all_elements(session, name) if element.comment]
        nft.converge(session, sorted(touched), [*owned, *widest(wanted)])


def _forwarded(record: Record) -> list[int]:
    """The families, 4 and 6, whose packets other firewalls are to let pass for this attachment."""
    sets = {element.set for element in record.elements}
    return [version for version, names in nft.FORWARDING.items() if not sets.isdisjoint(names)]


def _asked(record: Record) -> tuple[str, ...]:
    return (record.admin_chain,) if record.admin_chain else ()


def _write(top: str, path: str, data: bytes) -> None:
    """Make the file `path`, in a directory of `top`, whole or not at all. A killed writer leaves its temporary file in
    `top`, where it is in nobody's way."""
    temporary = os.path.join(top, f".{os.urandom(8).hex()}")
    for directory in (top, os.path.dirname(path)):
        # One by one: os.makedirs leaves the mode of those between to the umask.
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _remove_files(top: str) -> None:
    """Remove what killed writers left. Exclusive: nobody is writing."""
    with contextlib.suppress(FileNotFoundError), os.scandir(top) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def _name(text: str) -> str:
    """A file's name for any text: itself where that is short and plain, else a digest of it."""
    if _PLAIN.fullmatch(text):
        return text
    return "~" + hashlib.sha256(text.encode()).hexdigest()


def _digest(element: Element) -> str:
    return hashlib.sha256(repr((element.set, element.key)).encode()).hexdigest()[:32]


def _entries(directory: str) -> list[str]:
    try:
        return [os.path.join(directory, name) for name in os.listdir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)


def _is_empty(directory: str) -> bool:
    return not _has_others(os.path.join(directory, ""))


def _has_others(path: str) -> bool:
    """Whether the directory of a file holds anything else."""
    directory, name = os.path.split(path)
    try:
        with os.scandir(directory) as entries:
            return any(entry.name != name for entry in entries)
    except FileNotFoundError:
        return False


def _load_standing(path: str) -> list[Element]:
    """Nothing where it cannot be read: whoever wants it says so again at its next start."""
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=list[Element])
    except (OSError, msgspec.MsgspecError):
        return []
    known = nft.standing_sets()
    return [element for element in found if element.set in known]


def _load(path: str) -> Record | None:
    try:
        with open(path, "rb") as file:
            record = msgspec.json.decode(file.read(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.version == _VERSION else None
