"""`netloom ip import host-local`: the addresses that host-local gave out, allocated in ipamd for the same attachments.

- The data directory is read under the lock of both host-locals, which is then let go: what they give out meanwhile is
  found by the next run. Running it again changes nothing for what is there already.
- An attachment is taken as a whole or not at all: with exactly the addresses that its files have.
- Files are only removed on request, and only those whose address ipamd has.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import TypedDict

import click
import msgspec

from cli import output
from cli.failure import Failure, Status
from cli.options import Choices, command, complete_pool, pass_choices
from cni import config
from cni.errors import CniError
from cni.ipam.address_files import AddressFile, AddressFiles, Place
from cni.ipam.host_local import DATA_DIR
from cni.ipam.ipamd import CLIENT, IpamConf
from cni.ipam.ranges import RangeConf
from cni.living import boot_id
from cni.request import check_network
from ipamd.client import Client, IpamError
from kernel import paths
from kernel.record import Records
from protos.ipam.v1 import ipam_pb2

_TYPES = ("host-local", "ipamd")
_COLUMNS = ("NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "OUTCOME")


class Entry(TypedDict):
    """An attachment with its addresses, and what became of it."""

    network: str
    container_id: str
    ifname: str
    addresses: list[str]
    outcome: str  # imported, present, left
    reason: str  # why it was left


class _Pools(msgspec.Struct, frozen=True):
    """Where a network's addresses are to be allocated: named pools, or the network's own."""

    names: tuple[str, ...] = ()
    spec: ipam_pb2.PoolSpec | None = None


class _Found(msgspec.Struct, frozen=True):
    """What a network's data directory holds."""

    attachments: dict[bytes, list[AddressFile]]
    places: dict[bytes, Place | None]


@click.group("import", short_help="Take over addresses that another IPAM plugin gave out.")
def imports() -> None:
    """Take over addresses that another IPAM plugin gave out."""


@command(imports, "host-local")
@click.option("--data-dir", metavar="PATH", default=DATA_DIR, show_default=True, help="host-local's dataDir.")
@click.option("--network", "networks", metavar="NAME", multiple=True, help="Only these; several.  [default: all]")
@click.option("--conf", metavar="FILE", help="The network's CNI configuration: its ranges become the network's pool.")
@click.option(
    "--pool", "pools", metavar="NAME", multiple=True, shell_complete=complete_pool, help="Named pools; several."
)
@click.option("--remove", is_flag=True, help="Remove the files of what ipamd has.")
@pass_choices
def host_local(
    choices: Choices, data_dir: str, networks: tuple[str, ...], conf: str | None, pools: tuple[str, ...], remove: bool
) -> int:
    """Allocate what host-local gave out in ipamd, for the same containers.

    Without --conf and --pool an address is allocated in the pool that ipamd keeps for its network. Running it again is
    no error. Do it once before the configuration changes from host-local to ipamd, and once after.

    \b
    netloom ip import host-local --conf /etc/cni/net.d/10-web.conflist
    netloom ip import host-local --conf /etc/cni/net.d/10-web.conflist --remove
    """
    if conf and pools:
        raise click.UsageError("--conf names the pool, so --pool does not go with it; choose one")
    given = _Pools(names=pools)
    if conf:
        name, given = _configured(conf)
        networks = networks or (name,)
        if networks != (name,):
            raise click.UsageError(f"--conf {conf} is of network {name}; it does not go with another --network")
    entries: list[Entry] = []
    empty: list[str] = []
    with choices.ipamd() as ipamd:
        for network in networks or _networks(data_dir):
            with _as_failures():
                found = _read(data_dir, network)
            empty += [file.name for file in found.attachments.pop(b"", [])]
            taken = list(_import(ipamd, network, found, given))
            entries += taken
            if remove:
                with _as_failures():
                    _remove(data_dir, network, found, taken)
    left = [entry for entry in entries if entry["outcome"] == "left"]
    if choices.as_json:
        output.document({"attachments": entries, "empty": empty})
    else:
        _print(entries, empty)
    return Status.FAILED if left else Status.DONE


# The data directory


def _networks(data_dir: str) -> list[str]:
    try:
        with os.scandir(data_dir) as found:
            return sorted(entry.name for entry in found if entry.is_dir() and _is_name(entry.name))
    except OSError as error:
        raise Failure(
            f"cannot read {data_dir}: {error.strerror}; name host-local's dataDir with --data-dir",
            Status.NOT_PERMITTED if isinstance(error, PermissionError) else Status.FAILED,
        ) from None


def _is_name(name: str) -> bool:
    try:
        return bool(check_network({"name": name}))
    except CniError:
        return False


def _read(data_dir: str, network: str) -> _Found:
    if not _is_name(network):
        raise Failure(f"{network!r} is no name of a network", Status.USAGE)
    attachments: dict[bytes, list[AddressFile]] = {}
    places: dict[bytes, Place | None] = {}
    with _files(data_dir, network) as files:
        if not files.exists:
            raise Failure(f"there is no {files.path}; name host-local's dataDir with --data-dir")
        for file in files.scan():
            key = b"?" + file.name.encode() if file.content is None else file.content
            attachments.setdefault(key, []).append(file)
            places[key] = places.get(key) or files.recall(file)
    for held in attachments.values():
        held.sort(key=_order)
    return _Found(dict(sorted(attachments.items(), key=lambda item: _order(item[1][0]))), places)


def _order(file: AddressFile) -> tuple[int, int]:
    return file.address.version, int(file.address)


def _remove(data_dir: str, network: str, found: _Found, entries: Sequence[Entry]) -> None:
    there = {address for entry in entries if entry["outcome"] != "left" for address in entry["addresses"]}
    with _files(data_dir, network) as files:
        for file in (file for held in found.attachments.values() for file in held):
            if file.name in there:
                files.release(file)


def _files(data_dir: str, network: str) -> AddressFiles:
    return AddressFiles(os.path.join(os.path.abspath(data_dir), network), paths.run_dir(os.environ))


class _as_failures:  # noqa: N801 - used as a statement
    """What the data directory refuses, as the command's end."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CniError):
            raise Failure(str(error), Status.FAILED if os.geteuid() == 0 else Status.NOT_PERMITTED) from error


# ipamd


def _import(ipamd: Client, network: str, found: _Found, given: _Pools) -> Iterator[Entry]:
    pools, why_not = given, ""
    if not given.names and given.spec is None:
        try:
            pools = _Pools(spec=ipamd.get_pool(f"net/{network}").spec)
        except IpamError as error:
            why_not = f"{error.message}; name the network's configuration with --conf, or pools with --pool"
    number = sum(len(ipamd.get_pool(name).spec.range_sets) for name in pools.names)
    number += len(pools.spec.range_sets) if pools.spec is not None else 0
    records = {(one.key.network, one.key.container_id, one.key.ifname): one for one in _records().all()}
    for key, files in found.attachments.items():
        container_id, separator, ifname = key.decode("utf-8", "replace").partition("\r\n")
        entry = Entry(
            network=network,
            container_id=container_id if separator else "",
            ifname=ifname,
            addresses=[file.name for file in files],
            outcome="left",
            reason=why_not or ("" if separator and ifname else _unknown(files[0])),
        )
        if not entry["reason"] and len(files) != number:
            # Asked all the same, ipamd would give it others beside them, which are perhaps the next attachment's.
            entry["reason"] = f"ipamd's pools give {number} addresses, it has {len(files)}"
        if not entry["reason"]:
            netns = ipam_pb2.Netns()
            record, place = records.get((network, container_id, ifname)), found.places.get(key)
            if place is not None and place.boot_id == boot_id():
                netns = ipam_pb2.Netns(inode=place.inode, cookie=place.cookie, path=place.path)
            elif record is not None:
                netns = ipam_pb2.Netns(inode=record.netns_inode, cookie=record.netns_cookie, path=record.netns)
            _allocate(ipamd, entry, netns, pools)
        yield entry


def _records() -> Records:
    return Records(paths.run_dir(os.environ))


def _unknown(file: AddressFile) -> str:
    if file.content is None:
        return "it is no plain file, or cannot be read"
    return f"its file says {config.found(file.content.decode('utf-8', 'replace'))}, which names no interface"


def _allocate(ipamd: Client, entry: Entry, netns: ipam_pb2.Netns, pools: _Pools) -> None:
    """Allocate all of the attachment's addresses, and write down what came of it."""
    key = ipam_pb2.AttachmentKey(
        client=CLIENT, network=entry["network"], container_id=entry["container_id"], ifname=entry["ifname"]
    )
    now = ipam_pb2.Instant(boot_id=boot_id(), boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    own = None if pools.names else ipam_pb2.NetworkPool(spec=pools.spec)
    try:
        answer = ipamd.allocate(
            key, netns=netns, at=now, pools=pools.names, network_pool=own, requested=entry["addresses"]
        )
        got = [address.cidr.partition("/")[0] for address in answer.addresses]
        if sorted(got) == sorted(entry["addresses"]):
            entry["outcome"] = "imported" if answer.created else "present"
            return
        entry["reason"] = f"ipamd would hold {', '.join(got)} for it"
        if answer.created:
            ipamd.release(key, generation=answer.generation)
    except IpamError as error:
        entry["reason"] = error.message


# The configuration


def _configured(path: str) -> tuple[str, _Pools]:
    """The network's name, and the pool that its configuration means."""
    try:
        with open(path, "rb") as file:
            document = config.decode(file.read())
        name = check_network(document)
        plugins = config.convert(document.get("plugins", [document]), list[dict[str, object]], "$.plugins")
        ipams = [config.convert(one.get("ipam", {}), dict[str, object], "$.ipam") for one in plugins]
        ipam = next((one for one in ipams if one.get("type") in _TYPES), None)
        if ipam is None:
            raise Failure(f"{path}: no plugin in it has an ipam of type {' or '.join(_TYPES)}", Status.USAGE)
        conf = config.convert(ipam, IpamConf, "$.ipam")
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", Status.USAGE) from None
    except CniError as error:
        raise Failure(f"{path}: {error}", Status.USAGE) from None
    names = (conf.pool,) if conf.pool else conf.pools
    return name, _Pools(names) if names else _Pools(spec=_spec(conf))


def _spec(conf: IpamConf) -> ipam_pb2.PoolSpec:
    top = ((RangeConf(conf.subnet, conf.range_start, conf.range_end, conf.gateway),),) if conf.subnet else ()
    sets = (*top, *conf.ranges)
    return ipam_pb2.PoolSpec(
        excludes=conf.exclude,
        range_sets=[
            ipam_pb2.RangeSet(
                ranges=[
                    ipam_pb2.Range(subnet=one.subnet, start=one.range_start, end=one.range_end, gateway=one.gateway)
                    for one in ranges
                ]
            )
            for ranges in sets
        ],
    )


def _print(entries: Sequence[Entry], empty: Sequence[str]) -> None:
    rows = [
        (
            entry["network"],
            entry["container_id"] or "?",
            entry["ifname"] or "?",
            ", ".join(entry["addresses"]),
            f"{entry['outcome']}: {entry['reason']}" if entry["reason"] else entry["outcome"],
        )
        for entry in entries
    ]
    if rows:
        output.table(_COLUMNS, rows)
    counts = {outcome: sum(entry["outcome"] == outcome for entry in entries) for outcome in ("imported", "present")}
    output.line(
        f"imported {counts['imported']} attachments, {counts['present']} were there already, "
        f"{len(entries) - sum(counts.values())} were left"
    )
    if empty:
        output.line(f"left out as their files are empty and nobody's: {', '.join(empty)}")
