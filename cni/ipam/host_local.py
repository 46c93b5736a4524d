"""The host-local IPAM plugin: addresses of this host's own ranges, in files that the reference's host-local shares.

A host may go over from the reference and back at any time, with containers running: cni.ipam.address_files has the
rules. Keys, order of allocation and the meaning of errors are the reference's. Beyond it: GC, STATUS, a CHECK that
compares addresses, a DEL that succeeds whatever became of the ranges, and the same cost with 10 addresses taken as with
60,000.
"""

import os
import re
from collections.abc import Callable

import msgspec

from cni import config, versions
from cni.errors import CniError, Code
from cni.failures import Failures, note
from cni.ipam import ranges, resolver, routing
from cni.ipam.address_files import AddressFile, AddressFiles, Place
from cni.ipam.ranges import Address, RangeConf, RangeSet
from cni.ipam.routing import RouteConf
from cni.living import Observer, boot_id
from cni.request import Attachment, Request
from cni.result import DNS, IPConfig, Result
from cni.undo import Undo
from kernel import netns, paths
from kernel.errors import KernelError
from kernel.record import Record, Records
from kernel.session import Session

DATA_DIR = "/var/lib/cni/networks"

_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # bytes: PATH_MAX with the NUL, NAME_MAX
_CONTAINER_ID = re.compile(rb"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")


class HostLocalConf(msgspec.Struct, frozen=True, rename="camel"):
    """The `ipam` object."""

    ranges: tuple[tuple[RangeConf, ...], ...] = ()
    subnet: str = ""
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""
    routes: tuple[RouteConf, ...] = ()
    data_dir: str = ""
    resolv_conf: str = ""


class _Where(msgspec.Struct, frozen=True, rename="camel"):
    """All that a verb needs which takes nothing."""

    data_dir: str = ""


def parse(request: Request) -> HostLocalConf:
    """The `ipam` object, with values of the right types. Raises CniError 7, naming the path."""
    if "ipam" not in request.config:
        raise CniError(Code.INVALID_CONFIG, "invalid network config: IPAM config missing 'ipam' key")
    return config.convert(request.config["ipam"], HostLocalConf, "$.ipam")


def range_sets(request: Request, conf: HostLocalConf) -> tuple[RangeSet, ...]:
    """The range sets in the reference's order: runtimeConfig.ipRanges, the keys at the top, then `ranges`.

    Raises:
        CniError: 7, for what is wrong with them.
    """
    given = request.capability("ipRanges", tuple[tuple[RangeConf, ...], ...]) or ()
    sets = [(f"$.runtimeConfig.ipRanges[{index}]", one) for index, one in enumerate(given)]
    if conf.subnet:
        top = RangeConf(conf.subnet, conf.range_start, conf.range_end, conf.gateway)
        sets.append(("$.ipam", (top,)))
    sets += [(f"$.ipam.ranges[{index}]", one) for index, one in enumerate(conf.ranges)]
    return ranges.parse(sets, request.cni_version)


def key_of(container_id: str, ifname: str) -> bytes:
    """The content of an attachment's files."""
    return f"{container_id}\r\n{ifname}".encode()


def files_of(request: Request, data_dir: str, *, create: bool = False) -> AddressFiles:
    """The network's files, to be entered. Raises CniError 7 for a path that cannot be one."""
    directory = data_dir or DATA_DIR
    if not os.path.isabs(directory) or "\0" in directory:
        raise CniError(
            Code.INVALID_CONFIG,
            f"invalid network config: $.ipam.dataDir: {config.found(directory)}",
            "wanted an absolute path: the working directory is the runtime's, or a worker's",
        )
    path = os.path.join(os.path.normpath(directory), request.network)
    if len(os.fsencode(path)) >= _LONGEST_PATH or max(map(len, os.fsencode(path).split(b"/"))) > _LONGEST_NAME:
        key, value = ("name", request.network) if len(request.network) > _LONGEST_NAME else ("ipam.dataDir", directory)
        raise config.refused(key, value, "want what can be the name of a directory: it is too long")
    return AddressFiles(path, paths.run_dir(request.environment), create=create)


# The verbs


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Take an address of each range set.

    Raises:
        CniError: 4 where the attachment holds one, 7, 100 where a set has none left, 101 where a requested one is
            taken; 5 and 11 for the data directory.
    """
    conf = parse(request)
    sets = range_sets(request, conf)
    wanted = _requested(request, sets)
    result = _without_addresses(conf)
    place = _place(request, host)
    taken: dict[str, int] = {}
    # Before anything is taken: an inverse that finds nothing does nothing.
    undo.push("release the addresses", lambda: _give_back(request, conf, taken))
    ips = []
    with files_of(request, conf.data_dir, create=True) as files:
        for number, one in enumerate(sets):
            _refuse_second(request, files, number, one)
            address = _take(request, files, (number, one), wanted.get(number), taken)
            files.remember(str(address), place)
            found = one.range_of(address)
            assert found is not None  # noqa: S101 - it was taken from there
            ips.append(IPConfig(f"{address}/{found.subnet.prefixlen}", str(found.gateway)))
    return msgspec.structs.replace(result, ips=tuple(ips))


def delete(request: Request, host: Session) -> None:
    """Give back whatever the attachment holds in the data directory, whatever the ranges are by now."""
    del host
    try:
        where = config.convert(request.config.get("ipam", {}), _Where, "$.ipam")
        files = files_of(request, where.data_dir)
    except CniError as error:
        note(f"DEL: {error}; no ADD has taken anything with that")
        return
    with files, Failures() as failures:
        for file in _held(request, files):
            failures.attempt(files.release, file)


def check(request: Request, host: Session) -> None:
    """Verify that the attachment holds addresses, and those of prevResult that are of these ranges.

    Raises:
        CniError: 999, naming the address.
    """
    del host
    conf = parse(request)
    sets = range_sets(request, conf)
    with files_of(request, conf.data_dir) as files:
        held = {str(file.address) for file in _held(request, files)}
        if not held:
            raise CniError(
                Code.INTERNAL,
                f"CHECK: host-local: Failed to find address added by container {request.container_id}",
                f"{files.path} has no file of it for {request.ifname}; the next ADD may give its address away",
            )
        for address in _reported(request, sets):
            if str(address) not in held:
                file = files.at(address)
                raise CniError(
                    Code.INTERNAL,
                    f"CHECK: address {address} does not belong to container {request.container_id}, {request.ifname}",
                    f"{files.path}/{address} {_whose(file)}",
                )


def gc(request: Request, host: Session) -> None:
    """Free every address whose attachment is not in the list, and every empty file; but nothing that still lives.

    An attachment lives where its interface is in its namespace, as far as that is known: our ADD and our interface
    plugins write down the namespace, the reference does not. A text that is no container id was written by a person,
    to keep the address back, and stays.
    """
    where = config.convert(request.config.get("ipam", {}), _Where, "$.ipam")
    with files_of(request, where.data_dir) as files:
        unwanted = [file for file in files.scan() if _is_unwanted(file, request.valid_attachments)]
        places = {file.name: files.recall(file) for file in unwanted if file.content} if files.exists else {}
    # Without the lock: an ADD need not wait until all namespaces of the host were looked at.
    living = _Living(request, host)
    gone = []
    for file in unwanted:
        if file.content and living.attached(file, places[file.name]):
            note(f"GC: {_whose(file)}, which is not in the list, but its interface lives; keeps {file.name}")
        else:
            gone.append(file)
    with files_of(request, where.data_dir) as files, Failures() as failures:
        if files.exists:
            failures.attempt(files.refresh)
            for file in gone:
                failures.attempt(files.release, file)
            there = {file.name for file in files.scan()}
            for name in files.remembered():
                if name not in there:
                    files.forget(name)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 7 for the configuration, 50.
    """
    del host
    conf = parse(request)
    sets = range_sets(request, conf)
    _without_addresses(conf)
    try:
        with files_of(request, conf.data_dir) as files:
            files.probe()
            for one in sets:
                if _next(files, one, None) is None and not _empty_files(files, one):
                    raise _exhausted(files, one)
    except CniError as error:
        if error.code == Code.INVALID_CONFIG:
            raise
        raise CniError(Code.NOT_AVAILABLE, "no address could be given now", str(error)) from error


# ADD


def _requested(request: Request, sets: tuple[RangeSet, ...]) -> dict[int, Address]:
    """The addresses that the runtime asks for, by the number of the range set that each lies in.

    All three places count together, as in the reference: CNI_ARGS, args.cni.ips, runtimeConfig.ips. MAC and GATEWAY in
    CNI_ARGS are the interface plugin's.
    """
    texts = [("CNI_ARGS: IP", text) for text in request.arguments("IP", "MAC", "GATEWAY").get("IP", "").split(",")]
    texts += [("$.args.cni.ips", text) for text in request.convention("ips", list[str]) or ()]
    texts += [("$.runtimeConfig.ips", text) for text in request.capability("ips", list[str]) or ()]
    wanted: dict[int, Address] = {}
    left = []
    for address in dict.fromkeys(_address(text, where) for where, text in texts if text):
        number = next((n for n, one in enumerate(sets) if one.range_of(address) is not None), None)
        if number is None or number in wanted:
            left.append(str(address))
        else:
            wanted[number] = address
    if left:
        raise CniError(
            Code.INVALID_CONFIG,
            f"failed to allocate all requested IPs: {' '.join(left)}",
            f"each of the range sets {'; '.join(map(str, sets))} gives one address",
        )
    return wanted


def _address(text: str, where: str) -> Address:
    try:
        # What is behind the slash must be right, and means nothing: the range's prefix length counts.
        return ranges.address((versions.canonical_cidr(text) if "/" in text else text).partition("/")[0])
    except ValueError:
        raise CniError(
            Code.INVALID_CONFIG,
            f"cannot understand ip: {config.found(text)}",
            f"it stands at {where}; wanted 10.0.0.5 or 10.0.0.5/24",
        ) from None


def _refuse_second(request: Request, files: AddressFiles, number: int, one: RangeSet) -> None:
    # What old versions wrote may belong to any interface of the container.
    holders = (key_of(request.container_id, request.ifname), request.container_id.encode())
    for file in (file for key in holders for file in files.held(key)):
        if one.range_of(file.address) is not None:
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                f"failed to allocate for range {number}: {file.name} has been allocated to {request.container_id}, "
                "duplicate allocation is not allowed",
                f"CNI_CONTAINERID is {request.container_id}, CNI_IFNAME {request.ifname}; run DEL first",
            )


def _take(
    request: Request, files: AddressFiles, numbered: tuple[int, RangeSet], wanted: Address | None, taken: dict[str, int]
) -> Address:
    """An address of the set, with its file. What is begun is put into `taken`: name and inode."""
    number, one = numbered
    key = key_of(request.container_id, request.ifname)

    def began(name: str, inode: int) -> None:
        taken[name] = inode

    if wanted is not None:
        _take_requested(files, numbered, wanted, lambda: files.take(wanted, key, number, began))
        return wanted
    last = files.last_reserved(number)
    for attempt in (1, 2):
        while (address := _next(files, one, last)) is not None:
            if files.take(address, key, number, began):
                return address
        if attempt == 1:
            for file in _empty_files(files, one):
                files.release(file)
    raise _exhausted(files, one, f"failed to allocate for range {number}: ")


def _take_requested(
    files: AddressFiles, numbered: tuple[int, RangeSet], wanted: Address, take: Callable[[], bool]
) -> None:
    number, one = numbered
    found = one.range_of(wanted)
    if found is not None and wanted == found.gateway:
        raise CniError(
            Code.INVALID_CONFIG,
            f"failed to allocate for range {number}: requested ip {wanted} is subnet's gateway",
            "ask for another one",
        )
    if take():
        return
    file = files.at(wanted)
    if file is not None and file.content == b"" and files.release(file) and take():
        return
    raise CniError(
        Code.ADDRESS_UNAVAILABLE,
        f"failed to allocate for range {number}: requested IP address {wanted} is not available in range set {one}",
        f"{files.path}/{wanted} {_whose(file)}",
    )


def _next(files: AddressFiles, one: RangeSet, last: Address | None) -> Address | None:
    """The address that is to be taken next; None where there is none."""
    for within, first, end in one.spans(last):
        address = files.first_free(first, end)
        if address == within.gateway:
            address = files.first_free(address + 1, end) if address != end else None
        if address is not None:
            return address
    return None


def _empty_files(files: AddressFiles, one: RangeSet) -> list[AddressFile]:
    """Files of the set that a crash left without content: nobody's (see cni.ipam.address_files)."""
    found = [(file, one.range_of(file.address)) for file in files.held(b"")]
    return [file for file, within in found if within is not None and file.address != within.gateway]


def _exhausted(files: AddressFiles, one: RangeSet, prefix: str = "") -> CniError:
    return CniError(
        Code.POOL_EXHAUSTED,
        f"{prefix}no IP addresses available in range set: {one}",
        f"{files.path} has a file for each; DEL or GC frees those of dead containers, or widen the range",
    )


def _give_back(request: Request, conf: HostLocalConf, taken: dict[str, int]) -> None:
    """Undo: exactly what this ADD took, and not what a file of that name holds by now."""
    if not taken:
        return
    key = key_of(request.container_id, request.ifname)
    with files_of(request, conf.data_dir) as files, Failures() as failures:
        for name, inode in taken.items():
            failures.attempt(files.release, AddressFile(name, ranges.address(name), key, inode))


def _place(request: Request, host: Session) -> Place:
    """Which namespace the addresses are for. The reference never looks at it, so a bad one is no error here."""
    key = key_of(request.container_id, request.ifname)
    try:
        with netns.opened(request.netns) as container:
            inode, cookie = container.identity.inode, netns.cookie_at(container, host.home_fd)
    except (KernelError, ValueError):
        inode = cookie = 0
    return Place(key, boot_id(), request.netns, inode, cookie)


# The other verbs


def _held(request: Request, files: AddressFiles) -> list[AddressFile]:
    """The attachment's files; where it has none, those that an old version wrote for its container."""
    return files.held(key_of(request.container_id, request.ifname)) or files.held(request.container_id.encode())


def _reported(request: Request, sets: tuple[RangeSet, ...]) -> list[Address]:
    """The addresses of prevResult that are ours to know: of this interface, out of these ranges."""
    result = request.prev_result
    if result is None:
        return []
    found = []
    for ip in result.ips:
        at = ip.interface if ip.interface is not None else -1
        if 0 <= at < len(result.interfaces) and result.interfaces[at].name != request.ifname:
            continue
        address = ranges.address(ip.address.partition("/")[0])
        if any(one.range_of(address) is not None for one in sets):
            found.append(address)
    return found


def _is_unwanted(file: AddressFile, valid: tuple[Attachment, ...]) -> bool:
    """Whether GC may free the file, as far as its content says."""
    if file.content is None:
        note(f"GC: {file.name} is no plain file, or cannot be read; it stays")
        return False
    if file.content == b"":
        return True
    container_id, separator, ifname = file.content.partition(b"\r\n")
    if not _CONTAINER_ID.fullmatch(container_id) or (separator and not _is_ifname(ifname)):
        note(f"GC: {file.name} names no attachment; it stays")
        return False
    return not any(
        container_id == one.container_id.encode() and (not separator or ifname == one.ifname.encode()) for one in valid
    )


def _is_ifname(text: bytes) -> bool:
    return 0 < len(text) <= 15 and not any(char in b"/: \t\r\n" for char in text)


class _Living:
    """Which attachments live, from what ADD wrote beside the index and from the records of interface plugins."""

    def __init__(self, request: Request, host: Session) -> None:
        self._observer = Observer(host)
        self._boot_id = boot_id()
        self._network = request.network
        self._all_records = Records(paths.run_dir(request.environment))
        self._records: list[Record] | None = None

    def attached(self, file: AddressFile, place: Place | None) -> bool:
        container_id, _, ifname = (file.content or b"").decode("ascii", "replace").partition("\r\n")
        known = place is not None and place.boot_id == self._boot_id and ifname
        if place and known and self._observer.attached(place.path, place.inode, place.cookie, ifname):
            return True
        if self._records is None:
            self._records = [one for one in self._all_records.all() if one.key.network == self._network]
        return any(
            self._observer.attached(one.netns, one.netns_inode, one.netns_cookie, one.key.ifname)
            for one in self._records
            if one.key.container_id == container_id and ifname in ("", one.key.ifname)
        )


def _whose(file: AddressFile | None) -> str:
    if file is None:
        return "is not there"
    if file.content is None:
        return "is no plain file"
    if not file.content:
        return "is empty"
    text = file.content.decode("ascii", "backslashreplace").replace("\r\n", ", ")
    return f"belongs to {config.found(text, 200)}"


def _without_addresses(conf: HostLocalConf) -> Result:
    dns = resolver.read(conf.resolv_conf) if conf.resolv_conf else DNS()
    return Result(routes=routing.routes(conf.routes), dns=dns)
