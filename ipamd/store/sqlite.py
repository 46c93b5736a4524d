"""Address state in one SQLite file, in WAL mode with full durability: `commit` returns after the log was synced.

- The connection holds the file exclusively: no shared-memory file, no lock calls on each commit, and no second writer,
  whoever it may be. A lock file beside it gives a second daemon an error that names the first.
- An allocation's row holds all that a release needs; `taken` says which address is whose, in the address' own order,
  and is what makes two holders impossible even if the daemon were wrong.
- Addresses are text in canonical form, so that a person can read the file (a copy of it, or with the daemon stopped).
- The schema's version is a row. An older file is brought forward in one transaction; a newer one is refused.

Numbers from the kernel have 64 bits without a sign, SQLite's have one: they are stored as two's complement.
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import msgspec

from ipamd.errors import StartError
from ipamd.store.base import (
    EVENTS_KEPT,
    Address,
    Allocation,
    Change,
    ConflictError,
    Copy,
    Drop,
    DropBlock,
    DropPool,
    Errand,
    Event,
    Filter,
    Forget,
    Former,
    Freed,
    Grant,
    Instant,
    Key,
    Netns,
    Note,
    PoolRow,
    PutBlock,
    PutPool,
    Regroup,
    Rename,
    Reservation,
    Reserve,
    Settle,
    StoreError,
    StoreFullError,
    Touch,
    Unreserve,
    Use,
    former_name,
)

# "NLIP": marks the file as ours (PRAGMA application_id).
APPLICATION_ID = 0x4E4C4950

# MIGRATIONS[n] brings version n to n + 1. Never change one that was released; add another.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE node (name TEXT NOT NULL);
    CREATE TABLE pool (
        name TEXT PRIMARY KEY, spec TEXT NOT NULL, managed INTEGER NOT NULL
    ) WITHOUT ROWID;
    -- AUTOINCREMENT: a generation is never used again, also when the newest allocation is gone.
    CREATE TABLE allocation (
        generation INTEGER PRIMARY KEY AUTOINCREMENT,
        node TEXT NOT NULL, client TEXT NOT NULL, network TEXT NOT NULL, container_id TEXT NOT NULL,
        ifname TEXT NOT NULL,
        addresses TEXT NOT NULL,
        netns_inode INTEGER NOT NULL, netns_cookie INTEGER NOT NULL, netns_path TEXT NOT NULL,
        boot_id TEXT NOT NULL, boottime_ns INTEGER NOT NULL, created_unix_s INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX allocation_key ON allocation (container_id, ifname, network, client, node);
    -- Held addresses, and reserved ones with generation 0.
    CREATE TABLE taken (
        pool TEXT NOT NULL, ip TEXT NOT NULL, generation INTEGER NOT NULL, PRIMARY KEY (pool, ip)
    ) WITHOUT ROWID;
    CREATE TABLE reservation (
        pool TEXT NOT NULL, ip TEXT NOT NULL, note TEXT NOT NULL, PRIMARY KEY (pool, ip)
    ) WITHOUT ROWID;
    -- A queue for each range set: an index ends in the row's number, so each is read in the order of freeing.
    CREATE TABLE freed (
        seq INTEGER PRIMARY KEY,
        pool TEXT NOT NULL, range_set INTEGER NOT NULL, ip TEXT NOT NULL,
        boot_id TEXT NOT NULL, boottime_ns INTEGER NOT NULL
    );
    CREATE INDEX freed_queue ON freed (pool, range_set);
    CREATE UNIQUE INDEX freed_ip ON freed (pool, ip);
    """,
    """
    ALTER TABLE allocation ADD COLUMN workload TEXT NOT NULL DEFAULT '';
    CREATE TABLE former (
        pool TEXT NOT NULL, range_set INTEGER NOT NULL, workload TEXT NOT NULL, ip TEXT NOT NULL,
        PRIMARY KEY (pool, range_set, workload)
    ) WITHOUT ROWID;
    -- Who had an address last; so there are never more of them than addresses that are touched.
    CREATE UNIQUE INDEX former_ip ON former (pool, ip);
    CREATE TABLE block (pool TEXT NOT NULL, cidr TEXT NOT NULL, PRIMARY KEY (pool, cidr)) WITHOUT ROWID;
    CREATE TABLE errand (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL, pool TEXT NOT NULL, ip TEXT NOT NULL, generation INTEGER NOT NULL
    );
    CREATE INDEX errand_place ON errand (pool, ip);
    CREATE TABLE event (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL, allocation BLOB NOT NULL, unix_s INTEGER NOT NULL
    );
    CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
)

_SAFE_DISTANCE = 1 << 32  # more numbers than anybody gives between a backup and its restoration
_CHECKPOINT_PAGES = 2000  # 8 MiB of log: a checkpoint each few hundred commits, and a short recovery
_CACHE_KIB = 4096

_ALLOCATION = (
    "SELECT generation, node, client, network, container_id, ifname, addresses, netns_inode, netns_cookie, netns_path,"
    " boot_id, boottime_ns, created_unix_s, workload FROM allocation"
)
# CROSS JOIN: in the order of the addresses that are asked for.
_USES = (
    "SELECT t.ip, a.addresses, a.generation, a.client, a.network, a.container_id, a.ifname, a.created_unix_s,"
    " a.workload FROM json_each(?) j CROSS JOIN taken t ON t.pool = ? AND t.ip = j.value"
    " CROSS JOIN allocation a ON a.generation = t.generation"
)
_FREED = "SELECT pool, range_set, ip, boot_id, boottime_ns FROM freed"

_Row = tuple[int, str, str, str, str, str, str, int, int, str, str, int, int, str]

_decode_addresses = msgspec.json.Decoder(tuple[Address, ...]).decode
_decode_allocation = msgspec.json.Decoder(Allocation).decode
_encode = msgspec.json.Encoder().encode


class SqliteStore:
    """See `ipamd.store.base.Store`."""

    kind = "sqlite"

    def __init__(self, path: str) -> None:
        """Opens or creates the file; its directory is made where it is missing (mode 0700).

        Raises StartError: another daemon has it, it is of a newer version, no database of ours, or cannot be opened.
        """
        self._path = path
        self._lock = _take_lock(path)
        try:
            self._db = _open(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._execute = self._db.execute

    @property
    def schema(self) -> str:
        return str(len(MIGRATIONS))

    def begin(self) -> None:
        try:
            self._execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._raise(error)

    def apply(self, changes: Sequence[Change]) -> int:
        generation = 0
        execute = self._execute
        try:
            execute("SAVEPOINT one")
            for change in changes:
                generation = _APPLY[type(change)](self._db, change) or generation
            execute("RELEASE one")
        except (sqlite3.IntegrityError, ConflictError) as error:
            execute("ROLLBACK TO one")
            execute("RELEASE one")
            raise ConflictError(str(error)) from None
        except sqlite3.Error as error:
            self._raise(error)
        return generation

    def commit(self) -> None:
        try:
            self._execute("COMMIT")
        except sqlite3.Error as error:
            self._raise(error)

    def rollback(self) -> None:
        # SQLite may have rolled back by itself; a second attempt has nothing to do.
        with contextlib.suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._execute("ROLLBACK")

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    def snapshot(self) -> "SqliteSnapshot":
        return SqliteSnapshot(self._db)

    def load(self, copy: Copy) -> None:
        """Puts a copy into this store, which must be empty, in one transaction.

        Raises StoreError, also where two rows of the copy contradict each other.
        """
        try:
            self._execute("BEGIN IMMEDIATE")
            _load(self._db, copy)
            self._execute("COMMIT")
        except (sqlite3.Error, ConflictError, OverflowError) as error:
            self.rollback()
            if isinstance(error, sqlite3.Error):
                self._raise(error)
            raise StoreError(str(error)) from None
        except BaseException:
            self.rollback()
            raise

    def find(self, key: Key) -> Allocation | None:
        return self._one(
            _ALLOCATION + " WHERE container_id = ? AND ifname = ? AND network = ? AND client = ? AND node = ?",
            (key.container_id, key.ifname, key.network, key.client, key.node),
        )

    def holder(self, pool: str, ip: str) -> Allocation | Reservation | None:
        for (generation,) in self._rows("SELECT generation FROM taken WHERE pool = ? AND ip = ?", (pool, ip)):
            if generation:
                return self._one(_ALLOCATION + " WHERE generation = ?", (generation,))
            ((note,),) = self._rows("SELECT note FROM reservation WHERE pool = ? AND ip = ?", (pool, ip))
            return Reservation(pool, ip, note)
        return None

    def uses(self, pool: str, ips: Sequence[str]) -> list[Use]:
        # A third of what it costs to ask for the holder of each.
        return [
            Use(next(a for a in _decode_addresses(row[1]) if a.pool == pool and a.ip == row[0]), *row[2:])
            for row in self._rows(_USES, (_encode(ips).decode(), pool))
        ]

    def allocations(self, wanted: Filter, after: int = 0, limit: int = 1000) -> list[Allocation]:
        where = ["generation > ?"]
        values: list[object] = [after]
        for column, value in (
            ("node = ?", wanted.node),
            ("client = ?", wanted.client),
            ("network = ?", wanted.network),
            ("container_id = ?", wanted.container_id),
            ("boot_id != ?", wanted.not_boot_id),
        ):
            if value:
                where.append(column)
                values.append(value)
        if wanted.pool and wanted.ip:
            where.append("generation = (SELECT generation FROM taken WHERE pool = ? AND ip = ?)")
            values += [wanted.pool, wanted.ip]
        elif wanted.ip:
            where.append("generation IN (SELECT t.generation FROM pool p JOIN taken t ON t.pool = p.name AND t.ip = ?)")
            values.append(wanted.ip)
        elif wanted.pool:
            where.append("EXISTS (SELECT 1 FROM json_each(addresses) WHERE value ->> 2 = ?)")
            values.append(wanted.pool)
        text = f"{_ALLOCATION} WHERE {' AND '.join(where)} ORDER BY generation LIMIT ?"
        return [_allocation(row) for row in self._rows(text, (*values, limit))]

    def count(self) -> int:
        ((count,),) = self._rows("SELECT count(*) FROM allocation")
        return int(count)

    def taken(self, pool: str) -> Iterator[tuple[str, int]]:
        try:
            yield from self._execute("SELECT ip, generation FROM taken WHERE pool = ?", (pool,))
        except sqlite3.Error as error:
            self._raise(error)

    def pools(self) -> list[PoolRow]:
        return [
            PoolRow(name, spec, bool(managed))
            for name, spec, managed in self._rows("SELECT name, spec, managed FROM pool ORDER BY name")
        ]

    def freed(self, pool: str) -> Iterator[Freed]:
        for row in self._rows(f"{_FREED} WHERE pool = ? ORDER BY seq", (pool,)):
            yield _freed(row)

    def find_freed(self, pool: str, ip: str) -> Freed | None:
        for row in self._rows(f"{_FREED} WHERE pool = ? AND ip = ?", (pool, ip)):
            return _freed(row)
        return None

    def oldest_freed(self, pool: str, range_set: int, skip: int = 0) -> Freed | None:
        text = f"{_FREED} WHERE pool = ? AND range_set = ? ORDER BY seq LIMIT 1 OFFSET ?"
        for row in self._rows(text, (pool, range_set, skip)):
            return _freed(row)
        return None

    def count_freed(self, pool: str, range_set: int, since: Instant) -> int:
        text = "SELECT count(*) FROM freed WHERE pool = ? AND range_set = ? AND boot_id = ? AND boottime_ns >= ?"
        ((count,),) = self._rows(text, (pool, range_set, since.boot_id, since.boottime_ns))
        return int(count)

    def reservations(self, pool: str = "") -> Iterable[Reservation]:
        text = "SELECT pool, ip, note FROM reservation WHERE ? IN ('', pool) ORDER BY pool, ip"
        return [Reservation(*row) for row in self._rows(text, (pool,))]

    def remembered_node(self) -> str:
        for (name,) in self._rows("SELECT name FROM node"):
            return str(name)
        return ""

    def remember_node(self, name: str) -> None:
        try:
            self._execute("DELETE FROM node")
            self._execute("INSERT INTO node VALUES (?)", (name,))
        except sqlite3.Error as error:
            self._raise(error)

    def blocks(self, pool: str = "") -> list[tuple[str, str]]:
        return self._rows("SELECT pool, cidr FROM block WHERE ? IN ('', pool) ORDER BY pool, cidr", (pool,))

    def errands(self, limit: int = 1000) -> list[Errand]:
        text = "SELECT seq, kind, pool, ip, generation FROM errand ORDER BY seq LIMIT ?"
        return [Errand(*row) for row in self._rows(text, (limit,))]

    def former(self, pool: str, range_set: int, workload: str) -> str:
        text = "SELECT ip FROM former WHERE pool = ? AND range_set = ? AND workload = ?"
        for (ip,) in self._rows(text, (pool, range_set, workload)):
            return str(ip)
        return ""

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        text = "SELECT revision, kind, allocation, unix_s FROM event WHERE revision > ? ORDER BY revision LIMIT ?"
        return [
            Event(revision, kind, _decode_allocation(encoded), unix_s)
            for revision, kind, encoded, unix_s in self._rows(text, (after, limit))
        ]

    def event_bounds(self) -> tuple[int, int]:
        ((oldest,),) = self._rows("SELECT min(revision) FROM event")
        newest = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'event'")
        last = int(newest[0][0]) if newest else 0
        return (last + 1 if oldest is None else int(oldest)), last

    def note(self, name: str) -> str:
        for (value,) in self._rows("SELECT value FROM note WHERE name = ?", (name,)):
            return str(value)
        return ""

    def _rows(self, text: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._execute(text, values).fetchall()
        except sqlite3.Error as error:
            self._raise(error)

    def _one(self, text: str, values: tuple[Any, ...]) -> Allocation | None:
        try:
            row: _Row | None = self._execute(text, values).fetchone()
        except sqlite3.Error as error:
            self._raise(error)
        return None if row is None else _allocation(row)

    def _raise(self, error: sqlite3.Error) -> NoReturn:
        """As a StoreError that says what SQLite met. A full disk shows as SQLITE_FULL, or as a failed write."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(self._path)):
            raise StoreFullError(f"{self._path}: no room on the disk") from error
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise StoreError(f"{self._path}: {error} ({name})") from error


class SqliteSnapshot:
    """A copy of the file at one moment."""

    def __init__(self, db: sqlite3.Connection) -> None:
        # No name: a file in the directory for temporary files, which SQLite unlinks at once.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            db.backup(self._db)
        except sqlite3.Error as error:
            self._db.close()
            raise StoreError(f"the rows cannot be copied: {error}") from error

    def copy(self) -> Copy:
        rows = self._db.execute
        return Copy(
            pools=(
                PoolRow(n, spec, bool(managed)) for n, spec, managed in rows("SELECT name, spec, managed FROM pool")
            ),
            reservations=(Reservation(*row) for row in rows("SELECT pool, ip, note FROM reservation")),
            allocations=(_allocation(row) for row in rows(f"{_ALLOCATION} ORDER BY generation")),
            freed=(_freed(row) for row in rows(f"{_FREED} ORDER BY seq")),
            former=(Former(*row) for row in rows("SELECT pool, range_set, workload, ip FROM former")),
            blocks=((pool, cidr) for pool, cidr in rows("SELECT pool, cidr FROM block")),
            notes=(Note(*row) for row in rows("SELECT name, value FROM note")),
            generation=_counter(self._db, "allocation"),
            revision=_counter(self._db, "event"),
        )

    def close(self) -> None:
        self._db.close()


def _counter(db: sqlite3.Connection, table: str) -> int:
    """The newest AUTOINCREMENT number that a table has given."""
    for (number,) in db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)):
        return int(number)
    return 0


def _load(db: sqlite3.Connection, copy: Copy) -> None:
    for table in ("pool", "allocation", "reservation", "freed", "former", "block", "note"):
        if db.execute(f"SELECT 1 FROM {table}").fetchone():  # noqa: S608 (names from the line above)
            raise ConflictError(f"there are rows of {table} already; wanted an empty store")
    for pool in copy.pools:
        _put_pool(db, PutPool(pool, new=True))
    for reservation in copy.reservations:
        _reserve(db, Reserve(reservation))
    for allocation in copy.allocations:
        _insert(db, allocation)
    for freed in copy.freed:
        _free(db, freed)
    for former in copy.former:
        db.execute("INSERT INTO former VALUES (?,?,?,?)", (former.pool, former.range_set, former.workload, former.ip))
    for pool_name, cidr in copy.blocks:
        _put_block(db, PutBlock(pool_name, cidr))
    for note in copy.notes:
        _note(db, note)
    for table, number in (("allocation", copy.generation), ("event", copy.revision)):
        db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
        db.execute("INSERT INTO sqlite_sequence VALUES (?,?)", (table, number + _SAFE_DISTANCE))


def _open(path: str) -> sqlite3.Connection:
    try:
        # Created here so that the mode does not depend on the umask; SQLite gives its log the same.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.fchmod(descriptor, 0o600)
            os.close(descriptor)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
    except (OSError, sqlite3.Error) as error:
        raise StartError(f"{path}: cannot be opened: {error}; it must be a file that this user may write") from None
    try:
        _prepare(db, path)
    except sqlite3.Error as error:
        db.close()
        raise StartError(_opening_failed(path, error)) from None
    except BaseException:
        db.close()
        raise
    return db


def _opening_failed(path: str, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return f"{path}: this is no database, or a damaged one ({error}); restore a copy, or move it away to begin anew"
    if code == sqlite3.SQLITE_BUSY:
        return f"{path}: another program has it open; close that program and start again"
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return f"{path}: no room on the disk to open the database; free some and start again"
    return f"{path}: cannot be opened: {error}; it and its directory must be writable for this user"


def _prepare(db: sqlite3.Connection, path: str) -> None:
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    ((application,),) = db.execute("PRAGMA application_id")
    ((objects,),) = db.execute("SELECT count(*) FROM sqlite_master")
    if application not in (0, APPLICATION_ID) or (objects and not application):
        raise StartError(f"{path}: this is another program's database; name another file for the store")
    ((mode,),) = db.execute("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StartError(f"{path}: this file system cannot keep SQLite's log (journal mode {mode}); use a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    _migrate(db, path)


def _migrate(db: sqlite3.Connection, path: str) -> None:
    """Brings the schema forward, all steps in one transaction."""
    db.execute("BEGIN EXCLUSIVE")
    try:
        found = _version(db, path)
        for step in MIGRATIONS[found:]:
            for statement in _statements(step):
                db.execute(statement)
        if found < len(MIGRATIONS):
            db.execute("DELETE FROM schema")
            db.execute("INSERT INTO schema VALUES (?)", (len(MIGRATIONS),))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection, path: str) -> int:
    db.execute("CREATE TABLE IF NOT EXISTS schema (version INTEGER NOT NULL)")
    row: tuple[int] | None = db.execute("SELECT version FROM schema").fetchone()
    found = row[0] if row else 0
    if found > len(MIGRATIONS):
        raise StartError(
            f"{path}: the database has schema version {found}, this ipamd knows up to {len(MIGRATIONS)}; start the "
            "newer ipamd that wrote it, or restore a copy from before the upgrade"
        )
    return found


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit before the first."""
    text = ""
    for piece in script.split(";")[:-1]:
        text += f"{piece};"  # one in a comment or a text completes nothing
        if sqlite3.complete_statement(text):
            yield text
            text = ""


def _take_lock(path: str) -> int:
    """A descriptor that holds the lock file; the kernel lets go of it when the process ends, however it ends."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartError(
            f"{path}.lock: {error.strerror}; the store's directory must exist and be writable for this user"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        pid = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        os.close(lock)
        raise StartError(
            f"{path}: another ipamd (process {pid or 'unknown'}) uses this database; stop it first, or name another "
            "store"
        ) from None
    except OSError as error:
        # The lock is held; only its note could not be written (a full disk).
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            os.close(lock)
            raise StartError(f"{path}.lock: {error.strerror}") from None
    return lock


def _is_full(path: str) -> bool:
    try:
        room = os.statvfs(os.path.dirname(path))
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < 1 << 16 or (room.f_files > 0 and room.f_favail == 0)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _allocation(row: _Row) -> Allocation:
    generation, node, client, network, container_id, ifname, addresses, inode, cookie, path, boot_id, at = row[:12]
    return Allocation(
        Key(node, client, network, container_id, ifname),
        _decode_addresses(addresses),
        Netns(inode & (1 << 64) - 1, cookie & (1 << 64) - 1, path),
        Instant(boot_id, at),
        row[12],
        generation,
        row[13],
    )


def _freed(row: tuple[str, int, str, str, int]) -> Freed:
    pool, range_set, ip, boot_id, boottime_ns = row
    return Freed(pool, range_set, ip, Instant(boot_id, boottime_ns))


def _grant(db: sqlite3.Connection, change: Grant) -> int:
    new = change.allocation
    generation = _insert(db, new)
    for address in new.addresses:
        ip = address.ip
        _forget_one(db, address.pool, ip)
        if new.workload:
            place = (address.pool, address.range_set, former_name(new.workload, new.key.ifname), ip)
            db.execute("INSERT OR REPLACE INTO former VALUES (?,?,?,?)", place)
        if address.pool in change.claims:
            _send(db, "claim", address.pool, ip, generation)
    _record_event(db, "allocated", msgspec.structs.replace(new, generation=generation), new.created_unix_s)
    return generation


def _insert(db: sqlite3.Connection, new: Allocation) -> int:
    """The row and its addresses; returns its generation, which is the next one where it has none."""
    key, netns = new.key, new.netns
    cursor = db.execute(
        "INSERT INTO allocation (generation, node, client, network, container_id, ifname, addresses, netns_inode,"
        " netns_cookie, netns_path, boot_id, boottime_ns, created_unix_s, workload)"
        " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            new.generation or None,
            key.node,
            key.client,
            key.network,
            key.container_id,
            key.ifname,
            _encode(new.addresses).decode(),
            _signed(netns.inode),
            _signed(netns.cookie),
            netns.path,
            new.at.boot_id,
            new.at.boottime_ns,
            new.created_unix_s,
            new.workload,
        ),
    )
    generation = cursor.lastrowid or 0
    for address in new.addresses:
        db.execute("INSERT INTO taken VALUES (?,?,?)", (address.pool, address.ip, generation))
    return generation


def _send(db: sqlite3.Connection, kind: str, pool: str, ip: str, generation: int) -> None:
    db.execute("INSERT INTO errand (kind, pool, ip, generation) VALUES (?,?,?,?)", (kind, pool, ip, generation))


def _record_event(db: sqlite3.Connection, kind: str, allocation: Allocation, unix_s: int) -> None:
    text = "INSERT INTO event (kind, allocation, unix_s) VALUES (?,?,?)"
    revision = db.execute(text, (kind, _encode(allocation), unix_s)).lastrowid or 0
    if revision % EVENTS_KEPT == 0:
        db.execute("DELETE FROM event WHERE revision <= ?", (revision - EVENTS_KEPT,))


def _touch(db: sqlite3.Connection, change: Touch) -> None:
    netns, at = change.netns, change.at
    cursor = db.execute(
        "UPDATE allocation SET netns_inode = ?, netns_cookie = ?, netns_path = ?, boot_id = ?, boottime_ns = ?"
        " WHERE generation = ?",
        (_signed(netns.inode), _signed(netns.cookie), netns.path, at.boot_id, at.boottime_ns, change.generation),
    )
    _want_row(cursor, f"generation {change.generation}")


def _drop(db: sqlite3.Connection, change: Drop) -> None:
    old = change.allocation
    _want_row(
        db.execute("DELETE FROM allocation WHERE generation = ?", (old.generation,)), f"generation {old.generation}"
    )
    for address in old.addresses:
        db.execute("DELETE FROM taken WHERE pool = ? AND ip = ?", (address.pool, address.ip))
        if address.pool in change.claims:
            # Also where the claim was not told yet: it may be on its way.
            db.execute("DELETE FROM errand WHERE pool = ? AND ip = ? AND kind = 'claim'", (address.pool, address.ip))
            _send(db, "unclaim", address.pool, address.ip, old.generation)
    for freed in change.freed:
        _free(db, freed)
    _record_event(db, "released", old, change.unix_s)


def _free(db: sqlite3.Connection, freed: Freed) -> None:
    db.execute(
        "INSERT OR REPLACE INTO freed (pool, range_set, ip, boot_id, boottime_ns) VALUES (?,?,?,?,?)",
        (freed.pool, freed.range_set, freed.ip, freed.at.boot_id, freed.at.boottime_ns),
    )


def _forget(db: sqlite3.Connection, change: Forget) -> None:
    for ip in change.ips:
        _forget_one(db, change.pool, ip)


def _forget_one(db: sqlite3.Connection, pool: str, ip: str) -> None:
    db.execute("DELETE FROM freed WHERE pool = ? AND ip = ?", (pool, ip))
    db.execute("DELETE FROM former WHERE pool = ? AND ip = ?", (pool, ip))


def _put_pool(db: sqlite3.Connection, change: PutPool) -> None:
    row = change.pool
    if change.new:
        db.execute("INSERT INTO pool VALUES (?,?,?)", (row.name, row.spec, row.managed))
    else:
        cursor = db.execute("UPDATE pool SET spec = ?, managed = ? WHERE name = ?", (row.spec, row.managed, row.name))
        _want_row(cursor, f"pool {row.name}")


def _regroup(db: sqlite3.Connection, change: Regroup) -> None:
    for ip, range_set in change.range_sets:
        db.execute("UPDATE freed SET range_set = ? WHERE pool = ? AND ip = ?", (range_set, change.pool, ip))


def _drop_pool(db: sqlite3.Connection, change: DropPool) -> None:
    query = "SELECT 1 FROM taken WHERE pool = ? AND generation > 0"
    if db.execute(query, (change.name,)).fetchone():
        raise ConflictError(f"pool {change.name} still has allocations")
    _want_row(db.execute("DELETE FROM pool WHERE name = ?", (change.name,)), f"pool {change.name}")
    for table in ("freed", "taken", "reservation", "block", "former"):
        db.execute(f"DELETE FROM {table} WHERE pool = ?", (change.name,))  # noqa: S608 (names from the line above)


def _reserve(db: sqlite3.Connection, change: Reserve) -> None:
    new = change.reservation
    db.execute("INSERT INTO taken VALUES (?,?,0)", (new.pool, new.ip))
    db.execute("INSERT INTO reservation VALUES (?,?,?)", (new.pool, new.ip, new.note))
    _forget_one(db, new.pool, new.ip)


def _unreserve(db: sqlite3.Connection, change: Unreserve) -> None:
    where = (change.freed.pool, change.freed.ip)
    cursor = db.execute("DELETE FROM reservation WHERE pool = ? AND ip = ?", where)
    _want_row(cursor, f"reservation of {change.freed.ip}")
    db.execute("DELETE FROM taken WHERE pool = ? AND ip = ?", where)
    _free(db, change.freed)


def _rename(db: sqlite3.Connection, change: Rename) -> None:
    db.execute("UPDATE allocation SET node = ? WHERE node = ?", (change.new, change.old))


def _put_block(db: sqlite3.Connection, change: PutBlock) -> None:
    db.execute("INSERT INTO block VALUES (?,?)", (change.pool, change.cidr))


def _drop_block(db: sqlite3.Connection, change: DropBlock) -> None:
    cursor = db.execute("DELETE FROM block WHERE pool = ? AND cidr = ?", (change.pool, change.cidr))
    _want_row(cursor, f"block {change.cidr} of pool {change.pool}")
    for ip in change.ips:
        _forget_one(db, change.pool, ip)


def _settle(db: sqlite3.Connection, change: Settle) -> None:
    db.executemany("DELETE FROM errand WHERE seq = ?", [(seq,) for seq in change.seqs])


def _note(db: sqlite3.Connection, change: Note) -> None:
    if change.value:
        db.execute("INSERT OR REPLACE INTO note VALUES (?,?)", (change.name, change.value))
    else:
        db.execute("DELETE FROM note WHERE name = ?", (change.name,))


def _want_row(cursor: sqlite3.Cursor, what: str) -> None:
    if cursor.rowcount != 1:
        raise ConflictError(f"there is no {what}")


_APPLY: dict[type, Callable[[sqlite3.Connection, Any], int | None]] = {
    Grant: _grant,
    Touch: _touch,
    Drop: _drop,
    Forget: _forget,
    PutPool: _put_pool,
    Regroup: _regroup,
    DropPool: _drop_pool,
    Reserve: _reserve,
    Unreserve: _unreserve,
    Rename: _rename,
    PutBlock: _put_block,
    DropBlock: _drop_block,
    Settle: _settle,
    Note: _note,
}
