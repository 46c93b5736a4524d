"""`netloom store`: a copy of all that ipamd keeps, and a store made from one."""

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, NoReturn

import click

from cli import output
from cli.failure import Failure, Status
from cli.options import Choices, command, pass_choices
from ipamd import backup as backups
from ipamd.backup import Backup, BackupError
from ipamd.config import ClusterConfig, Config, load
from ipamd.errors import IpamdError, StartError
from ipamd.pool import Mode
from ipamd.store.base import StoreError
from ipamd.store.sqlite import SqliteStore
from kernel.settings import ConfigError

if TYPE_CHECKING:
    from ipamd.member.migrate import Migrated

_BESIDE = ("", "-wal", "-shm", "-journal", ".ballast")  # what belongs to a database


@click.group("store", short_help="ipamd's store: back it up, restore it, move it.")
def store() -> None:
    """ipamd's store: back it up, restore it, move it into a cluster or out of one."""


@command(store, "backup")
@click.argument("file", type=click.Path())
@pass_choices
def backup(choices: Choices, file: str) -> None:
    """Write all that ipamd keeps to FILE ("-": to standard output), as JSON lines.

    ipamd goes on serving meanwhile; the copy is of one moment. In a cluster it holds what the cluster shares, too, and
    of the nodes this one: back up each node. FILE appears only when it is complete, and only its owner may read it.
    """
    if file == "-":
        with choices.ipamd() as ipamd:
            for piece in ipamd.export_store():
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    with _replacing(file) as stream, choices.ipamd() as ipamd:
        size = sum(stream.write(piece) for piece in ipamd.export_store())
    if choices.as_json:
        output.document({"file": file, "bytes": size})
    else:
        output.line(f"wrote {size} bytes to {file}")


@command(store, "restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=False))
@click.option("--to", "path", metavar="PATH", type=click.Path(), help="The database to make.  [default: as configured]")
@click.option("--force", is_flag=True, help="Put aside a database that is there already.")
@click.option("--cluster", is_flag=True, help="Put what the cluster shares into an empty etcd instead, once for all.")
@pass_choices
def restore(choices: Choices, file: str, path: str | None, force: bool, cluster: bool) -> None:
    """Make this node's database from a backup. ipamd must be stopped; containers may go on running.

    --cluster is for an etcd that was lost: it restores what all nodes share, from the backup of any node; the nodes'
    own databases stay as they are, and the nodes claim again what they hold.

    What was allocated after the backup is not in it: run 'netloom ip check' afterwards, which names addresses that
    containers have and nobody holds, and reserves them with --repair.
    """
    copy = _read(file)
    if cluster:
        _restore_cluster(choices, copy)
        return
    target = os.path.abspath(path) if path else _configured().store_path
    aside = _put_aside(target, force)
    _make(target, copy, aside)
    _print(choices, target, copy, aside)


@command(store, "migrate")
@click.option("--to", "kind", type=click.Choice(["etcd", "sqlite"]), required=True, help="The store from now on.")
@click.option(
    "--mode",
    type=click.Choice(["cluster-address", "node-block"]),
    default="cluster-address",
    show_default=True,
    help="Of the pools, in a cluster.",
)
@pass_choices
def migrate(choices: Choices, kind: str, mode: Mode) -> None:
    """Take this node's database into a cluster, or out of one whose only node it is.

    ipamd must be stopped; containers go on running, and keep what they have. [etcd] in the configuration names the
    cluster. Afterwards set kind under [store], and start ipamd.
    """
    from cluster.errors import EtcdError  # noqa: PLC0415 - gRPC takes 60 ms, which other commands do not pay

    config = _configured({"store_kind": "etcd"})
    assert config.cluster is not None  # noqa: S101 (a configuration with that kind has it)
    if not os.path.exists(config.store_path):
        raise Failure(f"{config.store_path}: there is no database; ipamd makes one when it starts")
    try:
        done = asyncio.run(_migrate(config, config.cluster, kind, mode))
    except (StartError, StoreError, IpamdError) as error:
        raise Failure(f"{error}") from None
    except EtcdError as error:
        raise Failure(f"{error}; nothing was changed here", Status.UNREACHABLE) from None
    finally:
        _own(config.store_path)
    if choices.as_json:
        output.document({"kind": kind, "pools": list(done.pools), "blocks": done.blocks, "addresses": done.addresses})
        return
    names = f" ({', '.join(done.pools)})" if done.pools else ""
    output.line(f"moved {len(done.pools)} pools{names}, {done.blocks} blocks, {done.addresses} addresses")
    for what in done.left:
        output.line(f"left in etcd: {what}")
    output.line(f'now set kind = "{kind}" under [store], and start ipamd')


async def _migrate(config: Config, cluster: ClusterConfig, kind: str, mode: Mode) -> "Migrated":
    from cluster.etcd import Etcd  # noqa: PLC0415
    from ipamd.member.migrate import to_cluster, to_sqlite  # noqa: PLC0415

    database = SqliteStore(config.store_path)
    etcd = Etcd(cluster.etcd)
    try:
        if kind == "etcd":
            return await to_cluster(database, etcd, config.node, mode)
        return await to_sqlite(database, etcd)
    finally:
        await etcd.close()
        database.close()


def _restore_cluster(choices: Choices, copy: Backup) -> None:
    from cluster.errors import EtcdError  # noqa: PLC0415 - as above

    if not copy.shared:
        raise Failure(f"the backup of node {copy.head.node} has nothing of a cluster: its store was {copy.head.store}")
    config = _configured({"store_kind": "etcd"})
    assert config.cluster is not None  # noqa: S101 (a configuration with that kind has it)
    try:
        count = asyncio.run(_put(config.cluster, copy))
    except IpamdError as error:
        raise Failure(str(error)) from None
    except EtcdError as error:
        raise Failure(f"{error}; run it again, it goes on where it ended", Status.UNREACHABLE) from None
    if choices.as_json:
        output.document({"keys": count, "node": copy.head.node})
    else:
        output.line(f"put {count} keys into etcd, as node {copy.head.node} knew them; now start the nodes")


async def _put(cluster: ClusterConfig, copy: Backup) -> int:
    from cluster.etcd import Etcd  # noqa: PLC0415
    from ipamd.member.copy import restore as restore_shared  # noqa: PLC0415

    etcd = Etcd(cluster.etcd)
    try:
        return await restore_shared(etcd, copy.shared)
    finally:
        await etcd.close()


def _read(file: str) -> Backup:
    try:
        with open(file, "rb") as stream:
            return backups.read(stream, file)
    except BackupError as error:
        raise Failure(str(error), Status.USAGE) from None
    except OSError as error:
        raise Failure(f"{file}: cannot be read: {error.strerror}") from None


def _configured(overrides: Mapping[str, object] | None = None) -> Config:
    try:
        return load(None, overrides or {}, os.environ)
    except ConfigError as error:
        raise Failure(f"{error}{'' if overrides else '; or name the database with --to'}", Status.USAGE) from None


def _make(target: str, copy: Backup, aside: str) -> None:
    """Makes the database; where that fails, all is as before."""
    try:
        made = SqliteStore(target)  # takes the lock: an ipamd that runs is named by the error
    except StartError as error:
        # What has the name now, if anything, is that ipamd's.
        if not os.path.lexists(target):
            _put_back(target, aside)
        raise Failure(f"{error}; nothing was changed") from None
    try:
        try:
            made.load(copy.copy)
            made.remember_node(copy.head.node)
        finally:
            made.close()  # first: it removes its log by name
    except StoreError as error:
        _put_back(target, aside)
        raise Failure(f"{error}; nothing was changed") from None
    except BaseException:
        _put_back(target, aside)
        raise
    finally:
        _own(target)


def _own(target: str) -> None:
    """ipamd runs as an ordinary user, to whom the directory belongs; this command mostly as root."""
    owner = os.stat(os.path.dirname(target))
    for suffix in (*_BESIDE, ".lock"):
        with contextlib.suppress(FileNotFoundError):
            os.chown(target + suffix, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _put_aside(target: str, force: bool) -> str:
    """Renames what is there; returns what was added to its name, "" where there was nothing."""
    if not os.path.lexists(target):
        return ""
    if not force:
        raise Failure(f"{target}: there is a database already; say --force to put it aside, or name another with --to")
    try:
        SqliteStore(target).close()  # brings its log into the file; refuses while an ipamd has it
    except StartError as error:
        if str(error).startswith((f"{target}: another ", f"{target}: this is another ")):  # ipamd, or program
            raise Failure(str(error)) from None
        # Damaged: that is why it is to be replaced.
    aside = f".before-restore-{int(time.time())}"
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.rename(target + suffix, target + suffix + aside)
    return aside


def _put_back(target: str, aside: str) -> None:
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target + suffix)
        if aside:
            with contextlib.suppress(FileNotFoundError):
                os.rename(target + suffix + aside, target + suffix)


@contextlib.contextmanager
def _replacing(file: str) -> Iterator[IO[bytes]]:
    """A new file that takes the name when all of it is on the disk."""
    directory, name = os.path.split(os.path.abspath(file))
    if os.path.exists(file) and not os.path.isfile(file):
        raise Failure(f"{file}: this is no ordinary file, and would be replaced by one; name another, or - for a pipe")
    try:
        descriptor, new = tempfile.mkstemp(prefix=f".{name}.", dir=directory)  # mode 0600
    except OSError as error:
        _refuse(file, error)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(new, file)
    except OSError as error:
        os.unlink(new)
        _refuse(file, error)
    except BaseException:
        os.unlink(new)
        raise


def _refuse(file: str, error: OSError) -> NoReturn:
    raise Failure(f"{file}: cannot be written: {error.strerror}") from None


def _print(choices: Choices, target: str, copy: Backup, aside: str) -> None:
    counts = {name: len(list(getattr(copy.copy, name))) for name in ("pools", "reservations", "allocations", "blocks")}
    if choices.as_json:
        output.document({"path": target, "node": copy.head.node, "put_aside": aside and target + aside, **counts})
        return
    output.line(
        f"made {target} from a backup of node {copy.head.node}: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
    )
    if aside:
        output.line(f"what was there is now {target}{aside}")
    output.line("start ipamd, then run 'netloom ip check'")
