"""The portmap plugin: ports of the host lead to ports of the container.

What an ADD does, in this order
1. validate the whole configuration; find the container's addresses in prevResult, one of each family;
2. claim the ports and write the attachment record, in one step; what a dead container holds is taken over;
3. refuse ports at which a process of the host listens;
4. nftables: a chain for conditions, where there are any, then the elements, in one batch;
5. let 127.0.0.1 be routed to the container's network; forget UDP flows that lead elsewhere.
From step 2 on each step has pushed its inverse before the next begins.

What decides over a packet are elements of maps and sets (docs/adr/0013-published-ports.md), so nothing here depends on
the number of containers.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import Annotated

import msgspec

from cni import attachment, config
from cni import check as verify
from cni.chained import chain
from cni.errors import CniError, Code
from cni.failures import Failures, note
from cni.living import Observer
from cni.lock import attachment_lock
from cni.request import Request
from cni.result import Result
from cni.undo import Undo
from kernel import conntrack, leftovers, link, netns, nft, paths, ports, route, sysctl
from kernel.errors import KernelError, NotFound
from kernel.nft import Chain, Element
from kernel.ports import Listener, Port, Ports, Process
from kernel.record import Record, Records
from kernel.session import Session
from telemetry import trace

_PROTOCOLS = ("tcp", "udp", "sctp")
_EVERYWHERE = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - compared with what was asked for
_TRIES = 5
_LOCK_DEADLINE_S = 10.0  # for the lock of a dead container whose port we take: a DEL of it may be under way

AnyAddress = IPv4Address | IPv6Address


class Mapping(msgspec.Struct, frozen=True, rename={"host_port": "hostPort", "container_port": "containerPort"}):
    """One published port, as the runtime gives it; a range comes as one for each port."""

    host_port: int = 0
    container_port: int = 0
    protocol: str = ""
    host_ip: str = msgspec.field(default="", name="hostIP")


class PortmapConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `backend`, `mark_masq_bit` and `external_set_mark_chain` are
    accepted: nftables is the backend, and our rules need no mark."""

    backend: str = ""
    snat: bool = True
    masq_all: bool = False
    mark_masq_bit: Annotated[int, msgspec.Meta(ge=0, le=31)] = 13
    external_set_mark_chain: str = ""
    conditions_v4: tuple[str, ...] = msgspec.field(default=(), name="conditionsV4")
    conditions_v6: tuple[str, ...] = msgspec.field(default=(), name="conditionsV6")


class Wish(msgspec.Struct, frozen=True):
    """One port of the host and where it is to lead; `index` of its mapping, for the text of an error."""

    port: Port
    address: AnyAddress
    container_port: int
    index: int


class Plan(msgspec.Struct, frozen=True):
    """What an attachment wants of the host."""

    wishes: tuple[Wish, ...] = ()
    elements: tuple[Element, ...] = ()
    shared: tuple[Element, ...] = ()
    chains: tuple[Chain, ...] = ()
    loopback: bool = False  # 127.0.0.1 leads to the container


def parse(request: Request) -> tuple[PortmapConf, tuple[Mapping, ...]]:
    """The configuration and the ports, checked as a whole.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, PortmapConf)
    if conf.backend not in ("", "iptables", "nftables"):
        raise config.refused("backend", conf.backend, 'want "nftables" or leave it out')
    if "markMasqBit" in request.config and "externalSetMarkChain" in request.config:
        raise config.refused(
            "externalSetMarkChain", conf.external_set_mark_chain, "want it or markMasqBit, and neither has an effect"
        )
    for version in (4, 6):
        _condition(conf, version)
    mappings = tuple(request.capability("portMappings", list[Mapping]) or ())
    return conf, tuple(_checked(mapping, index) for index, mapping in enumerate(mappings))


def _place(index: int, key: str) -> str:
    return f"runtimeConfig.portMappings[{index}].{key}"


def _checked(mapping: Mapping, index: int) -> Mapping:
    for key, number in (("hostPort", mapping.host_port), ("containerPort", mapping.container_port)):
        if not 1 <= number <= 65535:
            raise config.refused(_place(index, key), number, "want a port, 1 to 65535")
    protocol = mapping.protocol.lower()
    if protocol not in _PROTOCOLS:
        raise config.refused(_place(index, "protocol"), mapping.protocol, 'want "tcp", "udp" or "sctp"')
    if not mapping.host_ip:
        return msgspec.structs.replace(mapping, protocol=protocol)
    try:
        address = ip_address(mapping.host_ip)
    except ValueError:
        raise config.refused(_place(index, "hostIP"), mapping.host_ip, "want an IP address") from None
    if isinstance(address, IPv6Address) and address.scope_id:
        raise config.refused(_place(index, "hostIP"), mapping.host_ip, "want an IP address without a zone")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_multicast or str(address) == "255.255.255.255":
        raise config.refused(_place(index, "hostIP"), mapping.host_ip, "want an address that one host has")
    return msgspec.structs.replace(mapping, protocol=protocol, host_ip=str(address))


# The plan: pure


def plan(request: Request, conf: PortmapConf, mappings: Sequence[Mapping], result: Result) -> Plan:
    """What the attachment wants of the host.

    Raises:
        CniError: 7, two mappings contradict one another; a condition cannot be taken.
    """
    networks = _networks(request, result)
    wishes = _wishes(mappings, {version: interface.ip for version, interface in networks.items()})
    owner = attachment.owner(request)
    elements: dict[tuple[str, tuple[str, ...]], Element] = {}
    chains = []
    for version in networks:
        own = [wish for wish in wishes if wish.port.version == version]
        text = _condition(conf, version)
        name = _chain_name(request, version) if text else ""
        if text and own:
            chains.append(Chain(name, _rules(version, text, own)))
        for wish in own:
            for element in nft.publish(
                "" if wish.port.everywhere else wish.port.address,
                wish.port.protocol,
                wish.port.number,
                str(wish.address),
                wish.container_port,
                owner,
                snat=conf.snat,
                all=conf.masq_all and conf.snat,
                chain=name,
            ):
                # Two ports of the host may lead to one of the container.
                elements[element.set, element.key] = element
    versions = {wish.port.version for wish in wishes}
    return Plan(
        wishes,
        tuple(elements.values()),
        tuple(nft.within(str(networks[v].network)) for v in sorted(versions)) if conf.snat else (),
        tuple(chains),
        conf.snat and any(_is_loopback(wish.port) for wish in wishes),
    )


def _networks(request: Request, result: Result) -> dict[int, chain.AnyInterface]:
    """The container's address of each family: the first that is of this interface, or of none that is known."""
    found: dict[int, chain.AnyInterface] = {}
    for ip in result.ips:
        if ip.interface is not None and 0 <= ip.interface < len(result.interfaces):
            interface = result.interfaces[ip.interface]
            if interface.name != request.ifname or not interface.sandbox:
                continue
        address = ip_interface(ip.address)
        found.setdefault(address.version, address)
    return found


def _wishes(mappings: Sequence[Mapping], addresses: dict[int, AnyAddress]) -> tuple[Wish, ...]:
    """Each mapping in each family that its hostIP and the container have."""
    found: dict[Port, Wish] = {}
    for index, mapping in enumerate(mappings):
        for version, address in addresses.items():
            if mapping.host_ip and ip_address(mapping.host_ip).version != version:
                continue
            port = Port(mapping.protocol, mapping.host_port, mapping.host_ip or _EVERYWHERE[version])
            wish = Wish(port, address, mapping.container_port, index)
            other = found.setdefault(port, wish)
            if other.container_port != wish.container_port:
                raise config.refused(
                    _place(index, "hostPort"),
                    mapping.host_port,
                    f"leads to container port {wish.container_port}, and in portMappings[{other.index}] to "
                    f"{other.container_port}",
                )
    return tuple(found.values())


def _is_loopback(port: Port) -> bool:
    return port.version == 4 and (port.everywhere or ip_address(port.address).is_loopback)


def _chain_name(request: Request, version: int) -> str:
    """A name of its own for each attachment and family."""
    parts = (request.network, request.container_id, request.ifname, request.plugin, str(version))
    return nft.CHAIN_PREFIX + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _rules(version: int, text: str, wishes: Iterable[Wish]) -> tuple[str, ...]:
    """The rules of a chain that translates what the condition lets pass."""
    ip = "ip" if version == 4 else "ip6"
    exact: list[str] = []
    anywhere: list[str] = []
    for wish in wishes:
        key = f"{wish.port.protocol} . {wish.port.number}"
        data = f"{wish.address} . {wish.container_port}"
        if wish.port.everywhere:
            anywhere.append(f"{key} : {data}")
        else:
            exact.append(f"{wish.port.address} . {key} : {data}")
    return tuple(
        f"meta nfproto ipv{version} {text} dnat {ip} to {key} map {{ {', '.join(entries)} }}"
        for key, entries in ((f"{ip} daddr . meta l4proto . th dport", exact), ("meta l4proto . th dport", anywhere))
        if entries
    )


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Publish the container's ports; the result is the one before.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf, mappings = parse(request)
    result = chain.previous(request)
    if mappings and not _networks(request, result):
        # The reference publishes nothing then, and says nothing.
        addresses = [ip.address for ip in result.ips]
        raise config.refused("prevResult.ips", addresses, f"want an address of {request.ifname}, for its portMappings")
    wanted = plan(request, conf, mappings, result)
    records = Records(paths.run_dir(request.environment))
    left = records.read(attachment.key(request))
    if left is not None:
        leftovers.discard(host, records, left)
    if not wanted.wishes:
        if mappings:
            note("portmap: the container has no address of a family that a port is published for")
        return result
    for version in {wish.port.version for wish in wanted.wishes}:
        _check_condition(conf, version)
    with netns.opened(request.netns) as sandbox:
        record = Record(
            attachment.key(request),
            netns=request.netns,
            netns_inode=sandbox.identity.inode,
            netns_cookie=netns.cookie_at(sandbox, host.home_fd),
            elements=wanted.elements,
            shared=wanted.shared,
            chains=wanted.chains,
        )
    undo.push("take the published ports back", lambda: leftovers.discard(host, records, record))
    _take(request, host, records, record, wanted)
    _refuse_listened(request, wanted)
    with trace.step("nftables"):
        records.apply(host, record)
    if wanted.loopback:
        _route_loopback(host, next(wish.address for wish in wanted.wishes if wish.port.version == 4))
    _forget_flows(host, wanted)
    return result


def _check_condition(conf: PortmapConf, version: int) -> None:
    """Let libnftables read a condition before anything is done.

    Raises:
        CniError: 7, with libnftables' words.
    """
    text = _condition(conf, version)
    if not text:
        return
    try:
        nft.check_chain(Chain(f"{nft.CHAIN_PREFIX}check", (f"meta nfproto ipv{version} {text} accept",)))
    except KernelError as error:
        words = error.detail.rpartition("Error: ")[2] or error.detail
        raise config.refused(f"conditionsV{version}", text, f"libnftables refused it ({words})") from error


def _condition(conf: PortmapConf, version: int) -> str:
    words = conf.conditions_v4 if version == 4 else conf.conditions_v6
    if not any(words):
        return ""
    from cni.chained import conditions  # noqa: PLC0415 - few networks have one, and every cold process would pay

    return conditions.parse(f"conditionsV{version}", words, version)


@trace.step("listeners")
def _refuse_listened(request: Request, wanted: Plan) -> None:
    """Refuse ports at which a process of the host listens; its packets would go to the container.

    A process that works for this very container is none: podman's conmon holds the ports that its container publishes,
    so that nobody else takes them, also while the container is connected to a network anew.

    Raises:
        CniError: 103, naming port and process.
    """
    found = ports.listeners(wish.port for wish in wanted.wishes)
    if not found:
        return
    owners = ports.owners(one.inode for one in found)
    index = {wish.port: wish.index for wish in wanted.wishes}
    for one in found:
        processes = owners.get(one.inode, [])
        if not any(_works_for(process, request.container_id) for process in processes):
            raise CniError(
                Code.PORT_UNAVAILABLE,
                f"$.{_place(index[one.port], 'hostPort')}: {one.port} is taken on this host by "
                f"{_who_listens(one, processes)}",
                "choose another hostPort, or another hostIP, or end that process",
            )


def _works_for(process: Process, container_id: str) -> bool:
    return any(container_id in re.split(r"[^A-Za-z0-9_.\-]", argument) for argument in process.arguments)


def _who_listens(one: Listener, processes: Sequence[Process]) -> str:
    if not one.exact:
        return "a socket, and this kernel cannot tell whose it is"
    if not processes:
        return f"the kernel or a process out of sight, which listens at {one.address}"
    listed = ", ".join(f"{process.pid} ({process.name})" for process in processes)
    return f"process {listed}, which listens at {one.address}"


@trace.step("record")
def _take(request: Request, host: Session, records: Records, record: Record, wanted: Plan) -> None:
    """Claim the ports and write the record; take from the dead what they hold.

    The lock of a dead holder's attachment is taken only while no lock on the ports is held, and is not waited for
    without end: two ADDs that each wait for what the other holds end with an error, not never.

    Raises:
        CniError: 103, naming port and holder.
    """
    run_dir = paths.run_dir(request.environment)
    claims = Ports(records)
    observer = Observer(host)
    for _ in range(_TRIES):
        held = claims.take(record)
        if not held:
            return
        for port, holder in held:
            if _lives(observer, holder):
                raise _held(port, holder, wanted)
        for holder in {one.key: one for _, one in held}.values():
            own = (holder.key.container_id, holder.key.ifname) == (request.container_id, request.ifname)
            if own:  # of another network: the lock is ours already
                _discard_unchanged(host, records, holder)
                continue
            with attachment_lock(run_dir, holder.key.container_id, holder.key.ifname, "portmap", _LOCK_DEADLINE_S):
                _discard_unchanged(host, records, holder)
    raise _held(*held[0], wanted)


def _lives(observer: Observer, holder: Record) -> bool:
    """Whether the holder's namespace does. Where nobody can tell, it keeps its ports."""
    try:
        return observer.lives_at(holder.netns, holder.netns_inode, holder.netns_cookie)
    except KernelError as error:
        note(f"portmap: whether {holder.key.container_id} lives cannot be seen: {error}")
        return True


def _discard_unchanged(host: Session, records: Records, holder: Record) -> None:
    if records.read(holder.key) == holder:
        note(f"portmap: took over the ports of {holder.key.container_id}, whose network namespace is gone")
        leftovers.discard(host, records, holder)


def _held(port: Port, holder: Record, wanted: Plan) -> CniError:
    index = next(wish.index for wish in wanted.wishes if wish.port == port)
    key = holder.key
    return CniError(
        Code.PORT_UNAVAILABLE,
        f"$.{_place(index, 'hostPort')}: {port} is published by container {key.container_id} "
        f"(interface {key.ifname}, network {key.network})",
        "choose another hostPort, or another hostIP where both have one, or remove that container",
    )


def _route_loopback(host: Session, address: AnyAddress) -> None:
    """Let packets to and from 127.0.0.1 pass the link to the container; the table's chain `guard` keeps those of others
    out. Shared by all containers behind the link, and never undone."""
    index = route.link_to(host, address)
    if not index:
        return
    try:
        name = link.by_index(host, index).name
        sysctl.ensure("1", "ipv4", "conf", name, "route_localnet")
    except NotFound:
        return  # the link went with its container


@trace.step("flows")
def _forget_flows(host: Session, wanted: Plan) -> None:
    """UDP clients that went on sending come to this container now. No ADD fails for it."""
    udp = [wish.port for wish in wanted.wishes if wish.port.protocol == "udp"]
    try:
        if udp:
            conntrack.forget_port(host, udp)
    except KernelError as error:
        note(f"portmap: UDP clients may reach the last holder of a port for a while: {error}")


# DEL


def delete(request: Request, host: Session) -> None:
    """Take the ports back; success where there is nothing left to do."""
    records = Records(paths.run_dir(request.environment))
    record = records.read(attachment.key(request))
    with Failures() as failures:
        if record is not None:
            failures.attempt(leftovers.discard, host, records, record)
        else:
            from cni import reference  # noqa: PLC0415 - what we attached ourselves has nothing of it

            reference.forget(request, host, failures)
            if request.prev_result is not None:
                failures.attempt(_delete_unrecorded, request, host, records)


def _delete_unrecorded(request: Request, host: Session, records: Records) -> None:
    """Where the record was lost, or the reference did the ADD: what the configuration tells, as far as it is this
    attachment's by its comment; and UDP flows to where the container was."""
    try:
        conf, mappings = parse(request)
        wanted = plan(request, conf, mappings, chain.previous(request))
    except CniError as error:
        note(f"DEL goes by the attachment record alone: {error}")
        return
    nft.delete(host, wanted.elements)
    nft.delete_chains(host, (one.name for one in wanted.chains))
    Ports(records).release(Record(attachment.key(request), elements=wanted.elements))
    targets = {
        (one.key[0], int(one.key[2])) for one in wanted.elements if one.set[:-1] == "published" and "udp" in one.key
    }
    if targets:
        conntrack.forget_target(host, targets)


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify that each port leads to the container.

    Raises:
        CniError: names the first thing that is wrong.
    """
    conf, mappings = parse(request)
    wanted = plan(request, conf, mappings, verify.required_result(request))
    if not wanted.wishes:
        return
    for one in wanted.chains:
        if nft.count_rules(host, one.name) != len(one.rules):
            raise verify.broken(
                f"nftables chain {one.name} of table inet {nft.TABLE} is not as it was made",
                "run `netloom gc --rebuild`",
            )
    verify.elements(host, wanted.shared)
    for element in wanted.elements:
        _check_element(host, request, element)
    if wanted.loopback:
        _check_loopback(host, next(wish.address for wish in wanted.wishes if wish.port.version == 4))


def _check_element(host: Session, request: Request, element: Element) -> None:
    found = nft.find(host, element)
    where = f"nftables set {element.set} of table {element.family} {nft.TABLE}"
    what = " . ".join(element.key)
    if found is None:
        raise verify.broken(f"{where} lacks {what}", "run `netloom gc --rebuild`")
    if found.data == element.data:
        return
    # The runtime published the port by several networks of one container: one of them has it.
    if ports.of_element(element) is not None and f" {request.container_id[:64]} " in found.comment:
        return
    raise verify.broken(
        f"{where} leads {what} to {' . '.join(found.data)}, not to {' . '.join(element.data)}",
        f"it belongs to {found.comment!r}; run `netloom gc --rebuild`",
    )


def _check_loopback(host: Session, address: AnyAddress) -> None:
    index = route.link_to(host, address)
    if not index:
        return  # ADD did without, too
    name = link.by_index(host, index).name
    if sysctl.read("ipv4", "conf", name, "route_localnet") != "1":
        raise verify.broken(
            f"127.0.0.1 does not reach the container: route_localnet of {name} is off",
            f"sysctl -w net.ipv4.conf.{name}.route_localnet=1",
        )


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more."""
    parse(request)
    from cni import reference  # noqa: PLC0415 - GC alone needs it

    with Failures() as failures:
        attachment.collect(request, host, failures)
        reference.collect(request, host, failures)
        failures.attempt(Ports(Records(paths.run_dir(request.environment))).prune)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now: whether the configuration is in order and nftables can be used.

    Raises:
        CniError: 50, no table can be made; 7, the configuration.
    """
    conf, _ = parse(request)
    try:
        nft.check_table(host)
        for version in (4, 6):
            _check_condition(conf, version)
    except KernelError as error:
        raise CniError(
            Code.NOT_AVAILABLE, f"ports cannot be published: {error}", "nftables with NAT is needed"
        ) from error
