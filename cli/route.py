"""`netloom route`: which way a packet takes to an address or a container, and whether all that it needs is there."""

import ipaddress

import click

from cli import netd, output
from cli.failure import Failure, Status
from cli.options import Choices, common, pass_choices
from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2
from protos.node.v1 import node_pb2 as pb

_EPILOG = (
    "Exit status: 0 the way is complete, 1 something of it is missing, nobody has the address or knows the container, "
    "2 wrong usage, 3 netd cannot be reached."
)
_KINDS = {
    "own": "a container of this host",
    "overlay": "a container of another host",
    "gateway": "the gateway, which each host of the network has itself",
    "nobody": "nobody's: no container has it",
    "unknown": "an address whose holder is not known",
    "underlay": "another host itself",
    "elsewhere": "beyond the hosts that netd knows",
}


@click.command("route", epilog=_EPILOG, short_help="The way to an address or a container of another host.")
@click.argument("target", metavar="ADDRESS|CONTAINER")
@common
@pass_choices
def route(choices: Choices, target: str) -> None:
    """Show the way of a packet from this host: next hop, tunnel, host, MTU, and each entry of the kernel's.

    A container is named by its id, or the beginning of it.
    """
    addresses = [target] if _is_address(target) else _addresses_of(choices, target)
    with netd.connected() as node:
        ways = [(address, node.explain(address)) for address in addresses]
    if choices.as_json:
        output.document({"target": target, "ways": [_document(address, way) for address, way in ways]})
    else:
        for number, (address, way) in enumerate(ways):
            if number:
                output.line("")
            _print(address, way)
    if any(way.problems or not all(entry.present for entry in way.entries) for _, way in ways):
        raise click.exceptions.Exit(Status.FAILED)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _addresses_of(choices: Choices, container: str) -> list[str]:
    """Those that ipamd knows of: of this host's containers, else in a cluster of the others'."""
    with choices.ipamd() as ipamd:
        found = _allocations(ipamd, container, cluster=False)
        if not found and ipamd.status().store == "etcd":
            found = _allocations(ipamd, container, cluster=True)
    ids = {one.key.container_id for one in found}
    if container in ids:
        ids = {container}
    if len(ids) > 1:
        raise Failure(f"{container} is the beginning of several containers' ids: {', '.join(sorted(ids)[:5])}")
    if not ids:
        raise Failure(
            f"ipamd knows no container {container}; name its address instead (host-local's containers it never knows)"
        )
    return [address.cidr.partition("/")[0] for one in found if one.key.container_id in ids for address in one.addresses]


def _allocations(ipamd: Client, container: str, *, cluster: bool) -> list[ipam_pb2.Allocation]:
    """Of containers whose ids begin so."""
    listed = ipamd.list_allocations(ipam_pb2.ListAllocationsRequest(cluster=cluster))
    return [one for one in listed if one.key.container_id.startswith(container)]


def _document(address: str, way: pb.ExplainResponse) -> dict[str, object]:
    return {
        "address": address,
        "kind": way.kind,
        "node": way.node,
        "network": way.network,
        "backend": way.backend,
        "subnet": way.subnet,
        "way": way.way,
        "link": way.link,
        "next_hop": way.next_hop,
        "outer": way.outer,
        "vni": way.vni,
        "port": way.port,
        "mtu": way.mtu,
        "bridge": way.bridge,
        "mac": way.mac,
        "note": way.note,
        "entries": [
            {"kind": one.kind, "text": one.text, "present": one.present, "instead": one.instead} for one in way.entries
        ],
        "kernel": way.kernel,
        "problems": list(way.problems),
    }


def _print(address: str, way: pb.ExplainResponse) -> None:
    facts = [("address", address)]
    if way.kind not in ("peer", "overlay"):
        of = f" ({way.node})" if way.node else ""
        facts.append(("is", f"{_KINDS.get(way.kind, way.kind)}{of}"))
    else:
        facts.append(("host", way.node))
    if way.bridge:
        facts += _overlay(way)
    elif way.kind == "peer":
        facts += [("network", f"{way.network}, backend {way.backend}"), ("subnet", way.subnet)]
    if way.way == "tunnel":
        facts.append(("way", f"tunnel {way.link} to {way.outer or 'nowhere'}, VNI {way.vni}, UDP port {way.port}"))
    elif way.way == "route":
        facts.append(("way", f"by {way.next_hop} over {way.link}, nothing encapsulated"))
    elif way.kind == "peer":
        facts.append(("way", "none that netd made"))
    if way.mtu:
        facts.append(("mtu", str(way.mtu)))
    facts += [("kernel", way.kernel)] if way.kernel else []
    facts += [("note", way.note)] if way.note else []
    facts += [("problem", problem) for problem in way.problems]
    output.facts(facts)
    if way.entries:
        output.line("")
        output.table(
            ("ENTRY", "THERE", "AS IPROUTE2 WRITES IT"),
            [(one.kind, "yes" if one.present else "NO", _entry(one)) for one in way.entries],
        )


def _overlay(way: pb.ExplainResponse) -> list[tuple[str, str]]:
    """Of an address in an overlay's subnet."""
    port = f", port {way.link}" if way.kind == "own" and way.link else ""
    facts = [
        ("network", f"{way.network}, an overlay, VNI {way.vni}"),
        ("subnet", way.subnet),
        ("bridge", f"{way.bridge}{port}"),
    ]
    if way.kind == "overlay" and not way.link:
        facts.append(("vtep", way.outer or "unknown"))
    return facts + ([("mac", way.mac)] if way.mac else [])


def _entry(one: pb.EntryState) -> str:
    return f"{one.text} (instead: {one.instead})" if one.instead else one.text
