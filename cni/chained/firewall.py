"""The firewall plugin: what a container may do where the host's firewalls drop forwarded packets, and who may reach it.

What an ADD does, in this order
1. validate the whole configuration and what prevResult says of the interfaces;
2. write the attachment record: what this attachment will want of the host;
3. the ingress policy: elements that all attachments of the network share, and for `isolated` the port's own flag;
4. the container's addresses into the sets that our forward chain marks packets by, and the rule that lets marked
   packets pass other firewalls, where one drops (kernel.foreign);
5. with firewalld, each address into the zone.
From step 2 on each step has pushed its inverse before the next begins.

The rules are the reference's: from the container everything is accepted, to it what belongs to a connection it began.
A policy comes before them.

Configuration keys and results are those of the reference plugin; differences have a comment that says why.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

import msgspec

from cni import attachment, config
from cni import check as verify
from cni.chained import chain
from cni.errors import CniError, Code
from cni.failures import Failures
from cni.request import Request
from cni.result import Interface, Result
from cni.undo import Undo
from kernel import firewalld, foreign, leftovers, link, netns, nft, paths
from kernel.errors import KernelError
from kernel.firewalld import Firewalld, Refused
from kernel.link import Link
from kernel.nft import Element
from kernel.record import Record, Records
from kernel.session import Session
from telemetry import trace

_OPEN, _SAME_BRIDGE, _ISOLATED = ("", "open"), "same-bridge", "isolated"
_FIREWALLD = "firewalld"
_CHAIN = re.compile(r"[A-Za-z0-9_.+:/~][A-Za-z0-9_.+:/~\-]{0,27}", re.ASCII)  # iptables(8): up to 28 characters
_ZONE = re.compile(r"[^\s\0]{1,64}")


class FirewallConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys, in the reference's spelling. `backend` "iptables" and "nftables" mean the same: our sets, and
    one rule in iptables where it drops."""

    backend: str = ""
    iptables_admin_chain_name: str = foreign.ADMIN_CHAIN
    firewalld_zone: str = firewalld.ZONE
    ingress_policy: str = ""
    internal: bool = False  # ours: the reference has no such key, nor the next two
    bridged: bool = False
    apart: tuple[str, ...] = ()

    @property
    def admin_chain(self) -> str:
        """The chain of iptables to be asked first."""
        return self.iptables_admin_chain_name or foreign.ADMIN_CHAIN

    @property
    def zone(self) -> str:
        """firewalld's zone for the addresses."""
        return self.firewalld_zone or firewalld.ZONE


def parse(request: Request) -> FirewallConf:
    """The configuration, checked as a whole.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, FirewallConf)
    # The reference takes whatever it does not know for no backend, and so hides a misspelt one.
    if conf.backend not in ("", "iptables", _FIREWALLD, "nftables"):
        raise config.refused("backend", conf.backend, 'want "iptables", "nftables", "firewalld", or leave it out')
    if conf.ingress_policy not in (*_OPEN, _SAME_BRIDGE, _ISOLATED):
        raise config.refused("ingressPolicy", conf.ingress_policy, 'want "open", "same-bridge" or "isolated"')
    if not _CHAIN.fullmatch(conf.admin_chain):
        raise config.refused(
            "iptablesAdminChainName", conf.iptables_admin_chain_name, "want the name of a chain, at most 28 characters"
        )
    for subnet in conf.apart:
        _check_subnet(subnet)
    if not _ZONE.fullmatch(conf.zone):
        raise config.refused("firewalldZone", conf.firewalld_zone, "want the name of a zone")
    return conf


def _check_subnet(text: str) -> None:
    try:
        if str(ip_network(text)) == text:
            return
    except ValueError:
        pass
    raise config.refused("apart", text, 'want networks such as "10.5.0.0/16"')


class Wishes(msgspec.Struct, frozen=True):
    """What an attachment wants of the host. `port`: what is to be isolated."""

    addresses: tuple[str, ...]
    own: tuple[Element, ...]
    shared: tuple[Element, ...] = ()
    port: Link | None = None

    @property
    def sources(self) -> list[str]:
        """The addresses as firewalld has them."""
        return [str(ip_network(address)) for address in self.addresses]


def _wishes(request: Request, conf: FirewallConf, host: Session, result: Result) -> Wishes:
    """Raises CniError 7 where the policy does not fit what prevResult has."""
    owner = attachment.owner(request)
    addresses = tuple(str(one.ip) for one in chain.container_ips(result))
    own = tuple(nft.accept(address, owner) for address in addresses)
    apart = tuple(_keep_apart(conf.apart))
    if conf.ingress_policy in _OPEN and not conf.internal and not conf.bridged:
        return Wishes(addresses, own, apart)
    isolated = conf.ingress_policy == _ISOLATED
    first = _first(conf, host, result)
    policy = () if conf.ingress_policy in _OPEN else tuple(nft.separate(first.name, isolated=isolated))
    if conf.internal:
        policy += (nft.internal(first.name),)
    if conf.bridged:
        policy += (nft.bridged(first.name),)
    if first.kind != "bridge":
        # The host's end of a ptp network: the attachment's own, and nobody else is behind it.
        return Wishes(addresses, (*own, *(dataclasses.replace(element, comment=owner) for element in policy)), apart)
    port = _port(host, first, chain.on_host(result)) if isolated else None
    if isolated and port is None:
        raise _unfit(conf, f"prevResult names no port of bridge {first.name}")
    return Wishes(addresses, own, (*policy, *apart), port)


def _keep_apart(subnets: Sequence[str]) -> Iterator[Element]:
    """What keeps everybody but their own containers from these networks."""
    for subnet in subnets:
        yield nft.keep_apart(subnet)
        for other in subnets:
            if ip_network(other).version == ip_network(subnet).version:
                yield nft.join(other, subnet)


def _first(conf: FirewallConf, host: Session, result: Result) -> Link:
    """The link that the policy is about: the first interface of the result, as in the reference."""
    if not result.interfaces:
        raise _unfit(conf, "prevResult has no interfaces")
    first = result.interfaces[0]
    # The reference takes the name whatever it is: for macvlan that of a link of the host which has no part in it.
    if first.sandbox or not first.name:
        raise _unfit(conf, f"the first interface of prevResult, {config.found(first.name)}, is none of the host's")
    found = link.find(host, first.name)
    if found is None:
        raise _unfit(conf, f"the host has no link {config.found(first.name)}, which is first in prevResult")
    return found


def _unfit(conf: FirewallConf, why: str) -> CniError:
    policy = () if conf.ingress_policy in _OPEN else (("ingressPolicy", conf.ingress_policy),)
    key, value = (*policy, *((key, True) for key in ("internal", "bridged") if getattr(conf, key)))[0]
    return config.refused(key, value, f'chain "firewall" after "bridge" for it: {why}')


def _port(host: Session, bridge: Link, known: Iterable[Interface]) -> Link | None:
    """The container's port of the bridge."""
    for interface in known:
        found = link.find(host, interface.name)
        if found is not None and found.master == bridge.index:
            return found
    return None


@contextmanager
def _firewalld(conf: FirewallConf) -> Iterator[Firewalld | None]:
    """firewalld, where the addresses are to become sources of its zone. As in the reference, without a backend it is
    asked where it runs.

    Raises:
        CniError: 7, it is asked for and does not run.
    """
    if conf.backend not in ("", _FIREWALLD):
        yield None
        return
    with firewalld.connected() as found:
        if found is None and conf.backend:
            raise config.refused("backend", conf.backend, "firewalld does not run; start it, or leave the key out")
        yield found


# ADD


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Let the container's packets pass, and keep out whom the policy keeps out.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    result = chain.previous(request)
    wishes = _wishes(request, conf, host, result)
    records = Records(paths.run_dir(request.environment))
    with netns.opened(request.netns) as sandbox:
        inode, cookie = sandbox.identity.inode, netns.cookie_at(sandbox, host.home_fd)
    left = records.read(attachment.key(request))
    if left is not None:
        leftovers.discard(host, records, left)
    with _firewalld(conf) as asked:
        record = Record(
            attachment.key(request),
            netns=request.netns,
            netns_inode=inode,
            netns_cookie=cookie,
            elements=wishes.own,
            shared=wishes.shared,
            admin_chain=conf.admin_chain,
            firewalld_zone=conf.zone if asked is not None else "",
        )
        attachment.write_record(host, records, record, undo)
        if wishes.port is not None:
            _isolate(host, wishes.port, undo)
        with trace.step("nftables"):
            records.apply(host, record)
        if asked is not None:
            undo.push("take the addresses out of firewalld's zone", lambda: leftovers.forget_sources(host, record))
            for source in wishes.sources:
                _add_source(conf, asked, source)
    return result


def _isolate(host: Session, port: Link, undo: Undo) -> None:
    """Set the port's flag; `undo` sets it as it was. DEL leaves it: the port goes with the next plugin's."""
    if not port.isolated:
        undo.push(
            f"end the isolation of port {port.name}",
            lambda: link.set_port(host, port.index, hairpin=port.hairpin, isolated=False),
        )
        link.set_port(host, port.index, hairpin=port.hairpin, isolated=True)


def _add_source(conf: FirewallConf, asked: Firewalld, source: str) -> None:
    try:
        asked.add_source(conf.zone, source)
    except Refused as error:
        raise config.refused(
            "firewalldZone", conf.zone, f"firewalld does not take {source} into it ({error.told})"
        ) from error


# DEL


def delete(request: Request, host: Session) -> None:
    """Take everything back; success where there is nothing left to do."""
    records = Records(paths.run_dir(request.environment))
    record = records.read(attachment.key(request))
    with Failures() as failures:
        if record is not None:
            failures.attempt(leftovers.discard, host, records, record)
        else:
            from cni import reference  # noqa: PLC0415 - what we attached ourselves has nothing of it

            reference.forget(request, host, failures)
            failures.attempt(_forget_sources, request, host)


def _forget_sources(request: Request, host: Session) -> None:
    """Take addresses out of firewalld's zone that the reference put in, which keeps no record; but none that an
    attachment of ours has by now: a DEL may come twice."""
    try:
        conf = parse(request)
    except CniError:
        return  # an ADD with it was refused
    if conf.backend in ("", _FIREWALLD) and request.prev_result is not None:
        with firewalld.connected() as asked:
            if asked is not None:
                for address in chain.container_ips(request.prev_result):
                    if not nft.present(host, nft.accept(str(address.ip), "")):
                        asked.remove_source(conf.zone, str(ip_network(address.ip)))


# CHECK


def check(request: Request, host: Session) -> None:
    """Verify elements, isolation, the rule in front of another firewall's, and firewalld's sources.

    Raises:
        CniError: names the first thing that is wrong.
    """
    conf = parse(request)
    result = verify.required_result(request)
    wishes = _wishes(request, conf, host, result)
    verify.elements(host, [*wishes.own, *wishes.shared])
    if wishes.port is not None and not wishes.port.isolated:
        name = wishes.port.name
        raise verify.broken(f"isolation is off on bridge port {name}", f"bridge link set dev {name} isolated on")
    where = foreign.missing(host, {ip_address(address).version for address in wishes.addresses})
    if where:
        raise verify.broken(f"{where} drops, and lacks the rule that lets pass", "run `netloom gc --rebuild`")
    with _firewalld(conf) as asked:
        if asked is not None:
            for source in wishes.sources:
                if not asked.has_source(conf.zone, source):
                    raise verify.broken(f"{source} is no source of firewalld's zone {conf.zone}", "run DEL and ADD")


# GC and STATUS


def gc(request: Request, host: Session) -> None:
    """Remove what attachments left that the runtime does not know any more."""
    parse(request)
    from cni import reference  # noqa: PLC0415 - GC alone needs it

    with Failures() as failures:
        attachment.collect(request, host, failures)
        reference.collect(request, host, failures)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, with what is missing.
    """
    conf = parse(request)
    try:
        foreign.missing(host)  # whether the kernel, and where needed iptables-legacy, answers
        with _firewalld(conf):
            pass
    except (KernelError, CniError) as error:
        raise CniError(Code.NOT_AVAILABLE, str(error)) from error
