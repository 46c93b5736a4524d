"""The bandwidth plugin: limits what enters and what leaves a container, on the host's end of its veth pair.

What the container receives is what the host's end sends: a shaper there. What it sends enters the host's end, where
nothing can be held back; a filter sends it through an ifb device with a shaper of its own.

Rules of this file
- The ifb device has the name that the reference gives it, so each side removes what the other made. That name is the
  same for all interfaces of a container in a network; a second one gets another.
- The record, with the ifb's name, is on disk before there is one. Without an egress limit there is none: all that
  exists goes with the veth.
- A second ADD is refused before it touches what the first one made.
- DEL removes the ifb alone; the plugin that made the veth removes that, and its qdiscs go with it.
"""

import hashlib
import re
import time
from typing import Annotated

import msgspec

from cni import attachment, config
from cni import check as verify
from cni.chained import chain
from cni.errors import CniError, Code
from cni.failures import Failures, note
from cni.request import Request
from cni.result import Interface, Result
from cni.undo import Undo
from kernel import leftovers, link, netns, paths, qdisc
from kernel.errors import NotFound
from kernel.link import Link
from kernel.netlink import Message
from kernel.qdisc import Tbf
from kernel.record import Record, Records
from kernel.session import Session
from telemetry import trace

_CAPABILITY = "bandwidth"
_PREFIX = "bwp"  # the reference's
_NAME_LENGTH = 15
_NAME = rf"{_PREFIX}[0-9a-f]{{{_NAME_LENGTH - len(_PREFIX)}}}"

_MAX_BURST = (2**32 - 1) * 8  # bits, and less than that, as the reference
# The default burst. Tokens may come as seldom as the slowest timer that Linux is built with ticks (100 times a second),
# and what comes at once must fit; ten packets are what TCP begins with (RFC 6928).
_TICKS_PER_S = 100
_LEAST_PACKETS = 10
_ETHERNET_HEADER = 14

_UNDER_WAY_S = 1.0  # longer than an ADD of the reference takes from the ifb to the filter

_Bits = Annotated[int, msgspec.Meta(ge=0)]


class BandwidthConf(msgspec.Struct, frozen=True, rename="camel"):
    """The limits, in bits and bits a second; 0 is none. As keys of the plugin, or as the capability of that name."""

    ingress_rate: _Bits = 0
    ingress_burst: _Bits = 0
    egress_rate: _Bits = 0
    egress_burst: _Bits = 0


class Limit(msgspec.Struct, frozen=True):
    """One direction's limit. `rate` and `burst` are bytes (a second); burst 0: the default. `key` and `bits` are how
    the rate was asked for."""

    rate: int
    burst: int
    key: str
    bits: int

    def bucket(self, mtu: int) -> Tbf:
        """The token bucket on a link of that MTU."""
        packet = mtu + _ETHERNET_HEADER
        burst = self.burst or max(self.rate // _TICKS_PER_S, _LEAST_PACKETS * packet)
        return qdisc.bucket(self.rate, min(burst, _MAX_BURST // 8), packet)


class Limits(msgspec.Struct, frozen=True):
    """What the container may receive and send; None where there is no limit."""

    ingress: Limit | None
    egress: Limit | None

    @property
    def any(self) -> Limit | None:
        """One of them, or None."""
        return self.ingress or self.egress


def parse(request: Request) -> Limits:
    """The limits, checked as a whole. As in the reference, one key of the plugin's own is enough for the capability not
    to count at all.

    Raises:
        CniError: 7, naming key and value.
    """
    prefix = ""
    conf = config.convert(request.config, BandwidthConf)
    if not any(field.encode_name in request.config for field in msgspec.structs.fields(BandwidthConf)):
        conf = request.capability(_CAPABILITY, BandwidthConf) or conf
        prefix = f"runtimeConfig.{_CAPABILITY}."
    return Limits(
        _limit(f"{prefix}ingress", conf.ingress_rate, conf.ingress_burst),
        _limit(f"{prefix}egress", conf.egress_rate, conf.egress_burst),
    )


def _limit(key: str, rate: int, burst: int) -> Limit | None:
    if burst and not rate:
        raise config.refused(f"{key}Burst", burst, f"if burst is set, rate must also be set: want {key}Rate beside it")
    if burst // 8 >= _MAX_BURST // 8:
        raise config.refused(f"{key}Burst", burst, f"burst cannot be more than 4GB: want less than {_MAX_BURST} bits")
    if 0 < rate < 8:
        raise config.refused(f"{key}Rate", rate, "want at least 8 bits a second, or 0 for no limit")
    # Less than a byte is not the same as none.
    return Limit(rate // 8, max(burst // 8, 1 if burst else 0), f"{key}Rate", rate) if rate else None


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Limit the container's interface.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    limits = parse(request)
    result = chain.previous(request)
    if limits.any is None:
        return result
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        port = _port(request, host, link.find(inside, request.ifname), result, limits.any)
        inode, cookie = sandbox.identity.inode, inside.cookie
    _refuse_taken(request, host, port, limits)
    records = Records(paths.run_dir(request.environment))
    left = records.read(attachment.key(request))
    if left is not None:
        leftovers.discard(host, records, left)
    messages: list[Message] = []
    shaped: list[tuple[Link, Limit]] = []
    if limits.egress is not None:
        name = _free_name(request, host, records)
        record = Record(
            attachment.key(request), netns=request.netns, netns_inode=inode, netns_cookie=cookie, links=(name,)
        )
        attachment.write_record(host, records, record, undo)
        undo.push(f"delete ifb {name}", lambda: leftovers.delete_port(host, name))
        link.add_ifb(host, name, port.mtu)
        ifb = link.get(host, name)
        undo.push(f"delete the ingress qdisc of {port.name}", lambda: qdisc.delete(host, port.index, qdisc.INGRESS))
        # The filter last: what passes it is limited from the first packet on.
        messages += [_shaper(ifb, port.mtu, limits.egress), link.up_message(ifb.index)]
        messages += [qdisc.ingress_message(port), qdisc.redirect_message(port, ifb)]
        shaped.append((ifb, limits.egress))
        result = msgspec.structs.replace(result, interfaces=(*result.interfaces, Interface(ifb.name, ifb.mac)))
    if limits.ingress is not None:
        undo.push(f"delete the shaper of {port.name}", lambda: qdisc.delete(host, port.index))
        messages.append(_shaper(port, port.mtu, limits.ingress))
        shaped.append((port, limits.ingress))
    with trace.step("shaper"):
        host.rtnl.execute(messages)
    fair = [qdisc.fq_codel_message(one, limit.rate, port.mtu + _ETHERNET_HEADER) for one, limit in shaped]
    for error in host.rtnl.attempt(fair):
        if error is not None and not isinstance(error, NotFound):
            raise error  # a kernel without them limits as well, and lets packets wait longer
    return result


def _port(request: Request, host: Session, eth: Link | None, result: Result, limit: Limit) -> Link:
    """The host's end of the veth pair, which prevResult must know.

    Raises:
        CniError: 7, there is none.
    """
    if eth is None:
        why = f"the container has no interface {request.ifname}"
    elif eth.kind != "veth":
        why = f"interface {request.ifname} of the container is of kind {eth.kind or 'device'}"
    else:
        try:
            port = link.by_index(host, eth.peer)
        except NotFound:
            port = None
        if port is not None and port.kind == "veth" and port.peer == eth.index:
            if any(known.name == port.name for known in chain.on_host(result)):
                return port
            why = f"prevResult does not name {port.name}, the host's end of {request.ifname}, without a sandbox"
        else:
            why = f"the other end of interface {request.ifname} is not in the host's namespace"
    raise config.refused(limit.key, limit.bits, f"only the host's end of a veth pair can be limited, but {why}")


def _refuse_taken(request: Request, host: Session, port: Link, limits: Limits) -> None:
    """Refuse a second ADD, and to meddle with what somebody else set up.

    Raises:
        CniError: 4.
    """
    for limit, parent, kind in (
        (limits.ingress, qdisc.ROOT, "root"),
        (limits.egress, qdisc.INGRESS, "ingress"),
    ):
        found = qdisc.get(host, port.index, parent) if limit is not None else None
        if found is not None and found.handle:
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                f"CNI_IFNAME {request.ifname}: its end on the host, {port.name}, has a qdisc ({found.kind}) already"
                f" at its {kind}",
                "run DEL of the attachment first; name bandwidth once in the list",
            )


def _free_name(request: Request, host: Session, records: Records) -> str:
    """A name for the ifb device that no living attachment uses; what a dead one left under it is removed."""
    for name in (_name(request), _name(request, request.ifname)):
        there = link.find(host, name)
        if there is None:
            return name
        if there.kind == "ifb" and not _in_use(request, host, records, there):
            leftovers.delete_port(host, name)
            return name
    raise CniError(
        Code.INTERNAL, f"no free name for an ifb device: {name} is taken", f"look at it with `ip -d link show {name}`"
    )


def _name(request: Request, ifname: str = "") -> str:
    """The ifb's name: the reference's, or with an interface's name one for that alone."""
    digest = hashlib.sha512(f"{request.network}{request.container_id}{ifname}".encode()).hexdigest()
    return f"{_PREFIX}{digest}"[:_NAME_LENGTH]


def _in_use(request: Request, host: Session, records: Records, ifb: Link) -> bool:
    """Whether another interface of the container, attached by us or by the reference, is limited with this device."""
    return _recorded(request, records, ifb.name) or ifb.index in _targets(host)


def _recorded(request: Request, records: Records, name: str) -> bool:
    """Whether another attachment of the network has this device."""
    own = attachment.key(request)
    return any(name in other.links and other.key != own for other in records.of_network(request.network, own.plugin))


def _targets(host: Session) -> set[int]:
    """The indexes of the links that a filter anywhere on the host redirects to."""
    hooks = {one.index for one in qdisc.all_qdiscs(host) if one.parent == qdisc.INGRESS}
    return {target for index in hooks for target in qdisc.redirects(host, index)}


def _shaper(where: Link, mtu: int, limit: Limit) -> Message:
    """The request for a link's shaper."""
    tbf = limit.bucket(mtu)
    if 0 < limit.burst < tbf.burst:
        note(
            f"$.{limit.key}: its burst of {limit.burst} bytes is raised to {tbf.burst}: larger packets would never pass"
        )
    return qdisc.tbf_message(where, tbf)


# DEL


def delete(request: Request, host: Session) -> None:
    """Remove the ifb device; success where there is nothing left to do."""
    records = Records(paths.run_dir(request.environment))
    record = records.read(attachment.key(request))
    if record is not None:
        leftovers.discard(host, records, record)
    else:
        _delete_unrecorded(request, host, records)


def _delete_unrecorded(request: Request, host: Session, records: Records) -> None:
    """Remove what the reference made for the attachment, or we, before the record was lost."""
    name = _name(request)
    found = link.find(host, name)
    if found is not None and found.kind == "ifb" and not _recorded(request, records, name):
        leftovers.delete_port(host, name)


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify shapers, ifb device and filter.

    Raises:
        CniError: names the first thing that is wrong.
    """
    limits = parse(request)
    result = verify.required_result(request)
    if limits.any is None:
        return
    with netns.opened(request.netns) as sandbox, host.visit(sandbox) as inside:
        eth = link.find(inside, request.ifname)
    try:
        port = _port(request, host, eth, result, limits.any)
    except CniError as error:
        raise verify.broken(error.msg) from error
    if limits.ingress is not None:
        _check_shaper(host, port, port.mtu, limits.ingress)
    if limits.egress is not None:
        ifb = _check_ifb(request, host, result)
        _check_shaper(host, ifb, port.mtu, limits.egress)
        if ifb.index not in qdisc.redirects(host, port.index):
            raise verify.broken(f"nothing sends what enters {port.name} through {ifb.name}")


def _check_ifb(request: Request, host: Session, result: Result) -> Link:
    record = Records(paths.run_dir(request.environment)).read(attachment.key(request))
    name = record.links[0] if record is not None and record.links else _name(request)
    if not any(known.name == name for known in chain.on_host(result)):
        raise verify.broken(f"prevResult does not name {name}, the ifb device of this attachment, without a sandbox")
    found = link.find(host, name)
    if found is None or found.kind != "ifb":
        raise verify.broken(f"the ifb device {name} is gone")
    if not found.up:
        raise verify.broken(f"the ifb device {name} is down", f"ip link set {name} up")
    return found


def _check_shaper(host: Session, where: Link, mtu: int, limit: Limit) -> None:
    found = qdisc.get(host, where.index)
    if found is None or found.tbf is None:
        raise verify.broken(f"link {where.name} has no shaper (tbf) at its root")
    wanted = limit.bucket(mtu)
    if not wanted.like(found.tbf):
        raise verify.broken(f"the shaper of link {where.name} is {found.tbf}; {limit.key} asks for {wanted}")


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more."""
    with Failures() as failures:
        attachment.collect(request, host, failures)
        failures.attempt(_collect_orphans, request, host)


def _collect_orphans(request: Request, host: Session) -> None:
    """Remove ifb devices of the reference whose veth is gone. To which network one belonged its name does not say;
    but nothing goes through a device to which no filter leads.

    The reference makes the device before the filter, so they are looked at twice.
    """
    orphans = _orphans(request, host)
    if orphans:
        time.sleep(_UNDER_WAY_S)
        for index, name in orphans.items() & _orphans(request, host).items():
            note(f"GC: nothing leads to the ifb device {name} (link {index}), and nobody wants it: it goes")
            leftovers.delete_port(host, name)


def _orphans(request: Request, host: Session) -> dict[int, str]:
    """Index and name of the ifb devices that have a name of ours, no record and no filter."""
    # Ours are looked for after the devices: each has its record first.
    found = {one.index: one.name for one in link.all_links(host) if one.kind == "ifb" and re.fullmatch(_NAME, one.name)}
    if not found:
        return {}
    records = Records(paths.run_dir(request.environment))
    wanted = {name for record in records.all() for name in record.links}
    targets = _targets(host)
    return {index: name for index, name in found.items() if index not in targets and name not in wanted}


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now, as far as the configuration says."""
    del host
    parse(request)
