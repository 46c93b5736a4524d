"""What keeps the containers of one overlay from one another: looks at the bridge, the tunnel's end, MTUs and hosts, and
has a container of each host asked through the tunnel."""

import ipaddress
from collections.abc import Iterator

from cli.finding import Finding, some
from cli.netd import NetdDocument
from cli.overlays import OverlayDocument, OverlayHostDocument, counted
from kernel import bridgeport, link, vxlan
from kernel.leftovers import NETD_MARK
from kernel.session import Session
from netd import probe

_CHECK = "overlays"
_SMALL = 100


def examine(status: NetdDocument) -> Iterator[Finding]:
    """Of each overlay that this host is on. Needs root."""
    here = [one for one in status["overlays"] if one["here"]]
    if status["overlays"] and not here:
        yield Finding(_CHECK, "ok", f"no container of this host is on any of {len(status['overlays'])} overlays")
    with Session() as host:
        for one in here:
            other = _other(host, one)
            found = list(_vni(status, one))
            found += [*_device(host, one, other), *_mtu(host, one), *_told(one, other), *_hosts(one), *_tunnels(one)]
            if not any(finding.level == "problem" for finding in found):
                held = f"{counted(one['containers'])} on {len(one['hosts'])} hosts"
                text = f"{one['name']}: {held}, all {one['wanted']} entries are in the kernel"
                yield Finding(_CHECK, "ok", text)
            yield from found
            if one["fast_problem"]:
                remedy = (
                    "it works by the bridge; netd's log says when. If it is to be so: fast_path = false under [netd]"
                )
                yield Finding(_CHECK, "warning", f"{one['name']}: {one['fast_problem']}", remedy)


def _device(host: Session, one: OverlayDocument, other: str) -> Iterator[Finding]:
    """Is netd's device there, up, and a port of the bridge as it has to be?"""
    name, bridge = one["name"], link.find(host, one["bridge"])
    device = link.find(host, one["device"])
    if bridge is None:  # the last container left meanwhile
        return
    if not bridge.up:
        yield _problem(
            f"{name}: bridge {bridge.name} is down",
            f"netd brings it up again and again: who takes it down? ip link set {bridge.name} up",
        )
    if other:
        yield _problem(
            f"{name}: {other} is there that is not netd's, with VNI {one['vni']} or the name {one['device']}, so"
            " netd cannot make its own",
            f"where nobody needs it: ip link delete {other}; else make the network anew with another --vni",
        )
    elif device is None:
        if not _reasons(one):  # else those are told
            yield _problem(
                f"{name}: bridge {bridge.name} is there, and {one['device']}, its way to other hosts, is not",
                "netd makes it as soon as it has an underlay: see its log",
            )
    elif device.master != bridge.index:
        yield _problem(
            f"{name}: {device.name} is not in bridge {bridge.name}",
            f"netd puts it there again and again: who takes it out? ip link set {device.name} master {bridge.name}",
        )
    else:
        port = bridgeport.find(host, device.name)
        if port is not None and not port.answers:
            yield _problem(
                f"{name}: bridge {bridge.name} does not answer for containers of other hosts (neigh_suppress)",
                "a kernel of 4.15 or newer is needed; where this one is: who switches it off?"
                f" bridge link set dev {device.name} neigh_suppress on",
            )
        if not device.up and one["known"]:
            yield _problem(
                f"{name}: {device.name} is down, though it is known who is where",
                f"netd brings it up again and again: who takes it down? ip link set {device.name} up",
            )


def _vni(status: NetdDocument, one: OverlayDocument) -> Iterator[Finding]:
    """Has netd itself a use for the number?"""
    for network in status["networks"]:
        if network["device"] == one["device"]:
            yield _problem(
                f"{one['name']}: VNI {one['vni']} is that of the tunnels of network {network['name']}, too",
                "make one of them anew with another --vni, or set another vni under [netd] on all hosts",
            )


def _other(host: Session, one: OverlayDocument) -> str:
    """A link that is in the way of netd's device."""
    device = link.find(host, one["device"])
    if device is not None:
        return "" if device.kind == "vxlan" and device.alias == NETD_MARK else device.name
    specs = [found.vxlan for found in vxlan.all_vxlans(host) if found.vxlan is not None]
    return next((spec.name for spec in specs if (spec.vni, spec.port) == (one["vni"], one["port"])), "")


def _mtu(host: Session, one: OverlayDocument) -> Iterator[Finding]:
    """Do bridge and containers send what the tunnels cannot carry?"""
    bridge, most = link.find(host, one["bridge"]), one["mtu"]
    if bridge is None or not most:
        return
    if bridge.mtu > most:
        yield _problem(
            f"{one['name']}: bridge {bridge.name} sends packets of {bridge.mtu} bytes, and the tunnels carry {most}",
            f"ip link set {bridge.name} mtu {most}",
        )
    wide = [port for port in link.all_links(host, bridge.index) if port.mtu > most and port.name != one["device"]]
    if wide:
        yield _problem(
            f"{one['name']}: containers behind {some([port.name for port in wide])} send packets of"
            f" {max(port.mtu for port in wide)} bytes, and the tunnels carry {most}",
            f"attach them anew (DEL and ADD), or set mtu {most} on both ends of each",
        )


def _told(one: OverlayDocument, other: str) -> Iterator[Finding]:
    """What netd says of it, beyond what is looked at here. Where `other` is, all refusals follow from that."""
    if not one["known"]:
        yield _problem(
            f"{one['name']}: it is not known yet who is where, so nothing passes {one['device']}",
            "netd asks etcd for it: netloom status says whether it is reached",
        )
    for text, _, remedy in (problem.partition("; ") for problem in _reasons(one)):
        if not other:
            yield _problem(f"{one['name']}: {text.removeprefix(_of_network(one))}", remedy)
    if one["known"] and one["present"] < one["wanted"]:
        missing = one["wanted"] - one["present"]
        yield _problem(
            f"{one['name']}: {missing} of {one['wanted']} entries are missing",
            "netloom route ADDRESS says which, and netd's log why",
        )


def _reasons(one: OverlayDocument) -> list[str]:
    """Problems that netd has with it, but for hosts that it cannot reach: those are found one by one."""
    told = dict.fromkeys(one["problems"])
    return [text for text in told if not (text.startswith(_of_network(one)) and "underlay address" in text)]


def _of_network(one: OverlayDocument) -> str:
    return f"network {one['name']}: "


def _hosts(one: OverlayDocument) -> Iterator[Finding]:
    """Are there containers on hosts that nothing can lead to?"""
    for host in one["hosts"]:
        if host["state"] == "here" or host["outer"]:
            continue
        on = f"{one['name']}: {counted(host['containers'])} on {host['name']} cannot be reached"
        if host["state"] == "unknown":
            yield _problem(f"{on}, as nobody told its underlay address", "systemctl enable --now netloom-netd there")
        elif host["state"] == "down":
            yield _problem(
                f"{on}, as it is silent and does not answer", "is it up? what leads there comes back with it"
            )
        elif rival := _rival(one, host["name"]):
            remedy = "give one of them another, or remove the one that is gone: netloom node remove"
            yield _problem(f"{on}, as it claims the underlay address of {rival}", remedy)
        else:
            yield _problem(
                f"{on}, as its underlay addresses are of another family than tunnels have here",
                "give it one of this family, or set public_ip to one of the other family on all hosts",
            )


def _rival(one: OverlayDocument, host: str) -> str:
    """Whose underlay address a host claims, with the address, in netd's words; "" where it does not."""
    for problem in one["problems"]:
        _, _, found = problem.partition(f" on {host}, which claims the underlay address of ")
        if found:
            return found.rpartition(": ")[0]
    return ""


def _tunnels(one: OverlayDocument) -> Iterator[Finding]:
    """Does a container of each host answer through the tunnel? Asked in the name of one of this host."""
    sources = {
        address.version: (address, mac)
        for host in one["hosts"]
        if host["state"] == "here"
        for address, mac in _few(host)
    }
    targets = {
        address: (mac, host["name"], ipaddress.ip_address(host["outer"]))
        for host in one["hosts"]
        if host["outer"]
        for address, mac in _few(host)
        if address.version in sources
    }
    if not targets:
        return
    asked = {address: mac for address, (mac, _, _) in targets.items()}
    try:
        answered = probe.neighbours(one["device"], sources.values(), asked)
    except OSError:  # no such device: that was found above
        return
    reached = {targets[address][1] for address in answered}
    lost = {name: outer for _, name, outer in targets.values() if name not in reached}
    alive = probe.echo((outer, _SMALL) for outer in lost.values()) if lost else {}
    lost = {name: outer for name, outer in lost.items() if alive[outer, _SMALL] is not None}
    if lost:
        yield _problem(
            f"{one['name']}: {some(sorted(lost))} answer, but no container there does through {one['device']}",
            f"does a firewall there or between drop UDP port {one['port']}? does netd run there, and netloom route"
            f" {next(iter(sources.values()))[0]} there find everything?",
        )
    elif reached:
        text = f"{one['name']}: containers of {len(reached)} hosts answer through {one['device']}"
        yield Finding(_CHECK, "ok", text)


def _few(host: OverlayHostDocument) -> list[tuple[probe.AnyAddress, str]]:
    """Addresses and MACs of a few of its containers."""
    return [(ipaddress.ip_address(one["address"]), one["mac"]) for one in host["some"]]


def _problem(text: str, remedy: str) -> Finding:
    return Finding(_CHECK, "problem", text, remedy)
