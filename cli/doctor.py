"""`netloom doctor`: looks for what keeps containers of different hosts from one another, and says what to do.

Each finding is one sentence with its remedy. What was looked at and is well is told, too: a list that says nothing of
MTU because nobody looked would mislead.
"""

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from cli import doctor_overlays, netd, output
from cli.failure import Failure, Status
from cli.finding import Finding, some
from cli.netd import NetdDocument
from cli.options import Choices, common, pass_choices
from cli.status import other_firewalls
from kernel import addr, link, route, sysctl
from kernel.errors import KernelError, NotFound
from kernel.session import Session
from kernel.version import VERSION
from netd import probe
from netd.values import AnyAddress

_EPILOG = "Exit status: 0 all is well, 1 something was found, 2 wrong usage, 4 this needs root."
_MOST_PROBED = 200  # hosts; more are probed by their own doctors
_MOST_CONNECTED = 5
_SMALL = 100
_LEAST = {4: 576, 6: 1280}  # RFC 791, RFC 8200: what every host takes
_DEFAULT_PORT_OVERHEAD = {4: 50, 6: 70}


@click.command("doctor", epilog=_EPILOG, short_help="What keeps hosts from one another, and what to do.")
@common
@pass_choices
def doctor(choices: Choices) -> None:
    """Probe other hosts with packets of every size, and look at this host's settings, firewalls and versions."""
    if os.geteuid() != 0:
        raise Failure("probes need raw sockets: run this as root", Status.NOT_PERMITTED)
    found = list(_examine())
    if choices.as_json:
        output.document({"findings": [asdict(one) for one in found]})
    else:
        output.table(("CHECK", "RESULT", "WHAT"), [(one.check, _level(one), one.text) for one in found])
        remedies = [one for one in found if one.remedy]
        if remedies:
            output.line("")
            for one in remedies:
                output.line(f"{one.check}: {one.remedy}")
    if any(one.level == "problem" for one in found):
        raise click.exceptions.Exit(Status.FAILED)


def _level(one: Finding) -> str:
    return one.level if one.level == "ok" else one.level.upper()


def _examine() -> Iterator[Finding]:
    yield from _forwarding()
    yield from _firewalls()
    try:
        with netd.connected() as node:
            status = netd.document(node.status(), netd.socket_path())
    except Failure as failure:
        yield Finding("netd", "problem", failure.message, "systemctl start netloom-netd, and see its log")
        return
    yield from _daemon(status)
    yield from _underlay(status)
    yield from _tunnels(status)
    yield from doctor_overlays.examine(status)


def _daemon(status: NetdDocument) -> Iterator[Finding]:
    of_overlays = {problem for one in status["overlays"] for problem in one["problems"]}
    told = [problem for problem in status["problems"] if problem not in of_overlays]
    for problem in told:
        text, _, remedy = problem.partition("; ")
        yield Finding("netd", "problem", text, remedy)
    missing = [peer["name"] for peer in status["peers"] if peer["present"] < peer["wanted"]]
    if missing:
        yield Finding(
            "netd", "problem", f"entries that lead to {some(missing)} are missing", "see netloom route, and netd's log"
        )
    if not told and not missing and not of_overlays:
        yield Finding(
            "netd", "ok", f"all {status['entries']} entries for {len(status['peers'])} hosts are in the kernel"
        )
    others = sorted({peer["version"] for peer in status["peers"] if peer["version"]} - {status["version"]})
    if others:
        of = [peer["name"] for peer in status["peers"] if peer["version"] in others]
        yield Finding(
            "versions",
            "warning",
            f"this host has version {status['version']}, {some(of)} {', '.join(others)}",
            "neighbouring versions work together; upgrade all hosts to one when you can",
        )
    elif status["version"] != VERSION:
        yield Finding(
            "versions",
            "warning",
            f"this command is of version {VERSION}, netd of {status['version']}",
            "systemctl restart netloom-netd",
        )
    else:
        yield Finding("versions", "ok", f"all that is known is of version {VERSION}")
    if status["source"] == "etcd" and status["store_state"] != "connected":
        yield Finding(
            "etcd",
            "problem",
            f"etcd: {status['store_state']}",
            "what is there stays; new hosts are seen when it is back",
        )


def _forwarding() -> Iterator[Finding]:
    wrong = []
    for name, parts in (("ipv4.ip_forward", ("ipv4", "ip_forward")), ("ipv6.conf.all.forwarding", None)):
        try:
            value = sysctl.read(*(parts or ("ipv6", "conf", "all", "forwarding")))
        except NotFound:
            continue
        except KernelError as error:
            yield Finding("forwarding", "warning", f"net.{name} cannot be read: {error}")
            continue
        if value == "0":
            wrong.append(name)
    if "ipv4.ip_forward" in wrong:
        yield Finding(
            "forwarding",
            "problem",
            "net.ipv4.ip_forward is 0: this host passes no packets on to its containers",
            "sysctl -w net.ipv4.ip_forward=1, and look who switched it off (a file in /etc/sysctl.d?)",
        )
    if "ipv6.conf.all.forwarding" in wrong:
        yield Finding(
            "forwarding",
            "warning",
            "net.ipv6.conf.all.forwarding is 0: no IPv6 packets are passed on",
            "where containers have IPv6: sysctl -w net.ipv6.conf.all.forwarding=1",
        )
    if not wrong:
        yield Finding("forwarding", "ok", "IPv4 and IPv6 packets are passed on")


def _firewalls() -> Iterator[Finding]:
    found = other_firewalls()
    for problem in found:
        text, _, remedy = problem.partition(": ")
        yield Finding("firewalls", "problem", text, remedy)
    if not found:
        yield Finding("firewalls", "ok", "no other firewall here drops what containers send")


def _underlay(status: NetdDocument) -> Iterator[Finding]:
    """Do the others answer, and with packets as large as the link sends?"""
    if not status["underlay"]:
        return
    mtu = status["underlay_mtu"]
    hosts = {
        peer["name"]: [ipaddress.ip_address(text) for text in peer["addresses"]]
        for peer in status["peers"][:_MOST_PROBED]
    }
    wanted = [(address, size) for addresses in hosts.values() for address in addresses for size in (_SMALL, mtu)]
    answers = probe.echo(wanted)
    silent, narrow = [], []
    for name, addresses in hosts.items():
        for address in addresses:
            if answers[address, _SMALL] is None:
                silent.append(f"{name} ({address})")
            elif answers[address, mtu] is None:
                narrow.append((name, address))
    for name, address in narrow[:3]:
        largest = probe.largest(address, _LEAST[address.version], mtu)
        smaller = largest - _DEFAULT_PORT_OVERHEAD[address.version]
        yield Finding(
            "mtu",
            "problem",
            f"packets of {mtu} bytes, which {status['underlay']} sends, do not get to {name} ({address}); {largest} do",
            f"ip link set {status['underlay']} mtu {largest} on all hosts, or mtu = {smaller} under [netd]",
        )
    if silent:
        yield Finding(
            "underlay",
            "problem",
            f"no answer from {some(silent)}",
            "are they up, and does a firewall between drop ICMP? ip route get ADDRESS shows this host's way there",
        )
    elif hosts:
        yield Finding("underlay", "ok", f"{len(hosts)} hosts answer")
    if hosts and not narrow and len(silent) < len(wanted) // 2:
        yield Finding("mtu", "ok", f"packets of {mtu} bytes get to all that answer")


def _tunnels(status: NetdDocument) -> Iterator[Finding]:
    """Do encapsulated packets arrive, and their checksums?"""
    devices = {network["device"]: network for network in status["networks"] if network["device"]}
    if not devices:
        return
    targets = _tunnelled(status, list(devices))
    answers = probe.echo((address, _SMALL) for address in targets)
    reached = [address for address in targets if answers[address, _SMALL] is not None]
    under = probe.echo(
        (ipaddress.ip_address(text), _SMALL) for peer in status["peers"][:_MOST_PROBED] for text in peer["addresses"]
    )
    alive = {
        peer["name"]
        for peer in status["peers"][:_MOST_PROBED]
        if any(under[ipaddress.ip_address(text), _SMALL] is not None for text in peer["addresses"])
    }
    lost = sorted({name for address, name in targets.items() if address not in reached and name in alive})
    port = next(iter(devices.values()))["port"]
    if lost:
        yield Finding(
            "tunnels",
            "problem",
            f"{some(lost)} answer, but not through the tunnel",
            f"does a firewall there or between drop UDP port {port}? does netd run there, with the same vni and port?",
        )
    elif targets:
        yield Finding("tunnels", "ok", f"{len({targets[address] for address in reached})} hosts answer through tunnels")
    yield from _checksums(reached, targets, list(devices))


def _tunnelled(status: NetdDocument, devices: Sequence[str]) -> dict[AnyAddress, str]:
    """An address of each host's, of each family, that the kernel now sends through a tunnel: that of its tunnel end."""
    found: dict[AnyAddress, str] = {}
    with Session() as host:
        indexes = {one.index for name in devices if (one := link.find(host, name)) is not None}
        for peer in status["peers"][:_MOST_PROBED]:
            for version in (4, 6):
                ends = [n.network_address for s in peer["subnets"] if (n := ipaddress.ip_network(s)).version == version]
                # A host's own tunnel end has the lowest of its addresses.
                if ends and route.link_to(host, min(ends, key=int)) in indexes:
                    found[min(ends, key=int)] = peer["name"]
    return found


def _checksums(
    reached: Sequence[AnyAddress], names: dict[AnyAddress, str], devices: Sequence[str]
) -> Iterator[Finding]:
    """A kernel's TCP packet that gets lost where the same with a checksum made in software does not: the card spoils
    the checksums of encapsulated packets."""
    targets = [address for address in reached if isinstance(address, ipaddress.IPv4Address)][:_MOST_CONNECTED]
    silent = [target for target in targets if not probe.tcp_answers(target)]
    if targets and not silent:
        yield Finding("checksums", "ok", f"TCP through the tunnel to {some([names[one] for one in targets])} works")
    for target in silent:
        yield _checksum(target, names[target], devices)


def _checksum(target: ipaddress.IPv4Address, name: str, devices: Sequence[str]) -> Finding:
    source = _own_address(devices)
    if source is not None and probe.tcp_answers_checked(target, source):
        return Finding(
            "checksums",
            "problem",
            f"TCP through the tunnel to {name} gets lost, unless its checksum is worked out in software",
            "the network card or its driver spoils checksums inside tunnels: tx_checksum = false under [netd], and"
            " systemctl reload netloom-netd",
        )
    return Finding(
        "checksums",
        "warning",
        f"TCP through the tunnel to {name} gets no answer, whoever makes its checksum",
        "a firewall of that host drops it; checksums cannot be judged so",
    )


def _own_address(devices: Sequence[str]) -> ipaddress.IPv4Address | None:
    """The one that this host speaks from through its tunnels."""
    with Session() as host:
        for name in devices:
            found = link.find(host, name)
            for address in addr.all_addresses(host, found.index, 4) if found is not None else ():
                if isinstance(address.interface, ipaddress.IPv4Interface):
                    return address.interface.ip
    return None
