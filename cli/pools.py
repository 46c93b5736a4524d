"""`netloom pool`: which addresses there are to hand out."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import click

from cli import documents, output
from cli.documents import PoolDocument
from cli.options import Choices, command, complete_pool, pass_choices
from protos.ipam.v1 import ipam_pb2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

USAGE_COLUMNS = ("POOL", "KIND", "FAMILY", "SIZE", "ALLOCATED", "RESERVED", "COOLING", "FREE", "USED")
NUMBERS = ("SIZE", "ALLOCATED", "RESERVED", "COOLING", "FREE", "HERE", "CLAIMED", "BLOCKS")
_BLOCK_COLUMNS = ("POOL", "FAMILY", "HERE", "CLAIMED", "BLOCKS", "USED")
_MODES = ("local", "node-block", "cluster-address")
_LONGEST_COOLDOWN_S = 4294967.0  # what the API's 32 bits of milliseconds hold: 49 days


class _Sharing(TypedDict):
    """Options of a pool that nodes share."""

    mode: str | None
    blocks: tuple[str, ...]
    blocks_per_node: int


@click.group("pool", short_help="Pools: which addresses there are.")
def pools() -> None:
    """Pools: which addresses there are."""


@command(pools, "list")
@pass_choices
def list_(choices: Choices) -> None:
    """List the pools and how full they are."""
    with choices.ipamd() as ipamd:
        found = sorted((documents.pool(entry) for entry in ipamd.list_pools()), key=lambda entry: entry["name"])
    if choices.as_json:
        output.document({"pools": found})
    else:
        print_usage(found)


@command(pools, "show")
@click.argument("name", shell_complete=complete_pool)
@pass_choices
def show(choices: Choices, name: str) -> None:
    """Show a pool: its ranges, how full it is, what is reserved."""
    with choices.ipamd() as ipamd:
        pool = documents.pool(ipamd.get_pool(name))
        reserved = ipamd.list_reservations(name)
    reservations = sorted(
        (documents.reservation(entry) for entry in reserved),
        key=lambda entry: documents.order(entry["address"]),
    )
    if choices.as_json:
        output.document({**pool, "reservations": reservations})
        return
    output.facts(_facts(pool))
    for entry in reservations:
        output.facts([("reserved", f"{entry['address']}  {entry['note']}".rstrip())])
    output.line("")
    print_usage([pool])


@command(pools, "create")
@click.argument("name")
@click.option("--subnet", "subnets", metavar="CIDR", multiple=True, required=True, help="Several: IPv4 and IPv6.")
@click.option("--range", "ranges", metavar="FIRST-LAST", multiple=True, help="Only these of the subnet; several.")
@click.option("--gateway", "gateways", metavar="ADDRESS|none", multiple=True, help="[default: the first of the subnet]")
@click.option("--exclude", "excludes", metavar="ADDRESS|CIDR", multiple=True, help="Never handed out; several.")
@click.option(
    "--cooldown",
    "cooldown_s",
    metavar="SECONDS",
    type=click.FloatRange(0, _LONGEST_COOLDOWN_S),
    help="A freed address rests so long.  [default: ipamd's]",
)
@click.option(
    "--mode", type=click.Choice(_MODES), help="Who may hand addresses out.  [default: local; in a cluster node-block]"
)
@click.option(
    "--block", "blocks", metavar="/LENGTH", multiple=True, help="node-block: a block's prefix.  [default: /26 and /122]"
)
@click.option(
    "--blocks-per-node", type=click.IntRange(0), default=0, help="node-block: the most that one node holds.  [0: any]"
)
@pass_choices
def create(
    choices: Choices,
    name: str,
    subnets: tuple[str, ...],
    ranges: tuple[str, ...],
    gateways: tuple[str, ...],
    excludes: tuple[str, ...],
    cooldown_s: float | None,
    **sharing: Unpack[_Sharing],
) -> None:
    """Create a pool.

    Who asks gets one address of each family that the pool has. Subnets of one family are used up in the order given.

    \b
    netloom pool create blue --subnet 10.1.0.0/16 --subnet fd00:1::/64
    netloom pool create lab --subnet 192.0.2.0/24 --range 192.0.2.100-192.0.2.199 --gateway 192.0.2.254
    netloom pool create pods --subnet 10.2.0.0/16 --mode node-block --block /25
    netloom pool create lan --subnet 192.0.2.0/24 --mode cluster-address
    """
    spec = pool_spec(subnets, ranges, gateways, excludes, cooldown_s)
    spec.mode = sharing["mode"] or ""
    spec.block_v4, spec.block_v6 = block_lengths(sharing["blocks"])
    spec.blocks_per_node = sharing["blocks_per_node"]
    with choices.ipamd() as ipamd:
        made = documents.pool(ipamd.create_pool(name, spec))
    if choices.as_json:
        output.document(dict(made))
    else:
        output.line(f"created pool {made['name']}; {_sizes(made)}")


@command(pools, "delete")
@click.argument("name", shell_complete=complete_pool)
@pass_choices
def delete(choices: Choices, name: str) -> None:
    """Delete a pool that nobody holds an address of."""
    with choices.ipamd() as ipamd:
        ipamd.delete_pool(name)
    if choices.as_json:
        output.document({"name": name})
    else:
        output.line(f"deleted pool {name}")


def print_usage(found: Sequence[PoolDocument]) -> None:
    """How full pools are, and the blocks of those that have any."""
    output.table(USAGE_COLUMNS, usage_rows(found), NUMBERS)
    rows = block_rows(found)
    if rows:
        output.line("")
        output.table(_BLOCK_COLUMNS, rows, NUMBERS)


def block_rows(found: Sequence[PoolDocument]) -> list[tuple[str, ...]]:
    """Which part of its blocks this node holds, and all nodes together."""
    return [
        (
            pool["name"],
            _family(usage["family"]),
            str(usage["blocks"]),
            str(usage["blocks_claimed"]),
            _short(usage["blocks_total"]),
            output.fill(usage["blocks_claimed"], int(usage["blocks_total"])),
        )
        for pool in found
        if pool["mode"] == "node-block"
        for usage in pool["usage"]
    ]


def _sizes(made: PoolDocument) -> str:
    if made["mode"] == "node-block":
        blocks = ", ".join(f"{_family(usage['family'])} {_short(usage['blocks_total'])}" for usage in made["usage"])
        return f"blocks for the nodes to claim: {blocks}"
    sizes = ", ".join(f"{_family(usage['family'])} {_short(usage['free'])}" for usage in made["usage"])
    return f"addresses to hand out: {sizes}"


def block_lengths(blocks: Sequence[str]) -> tuple[int, int]:
    """Prefix lengths of IPv4 and IPv6 blocks, 0 where none is named; up to 32 it is one of IPv4."""
    lengths = {4: 0, 6: 0}
    for text in blocks:
        digits = text.removeprefix("/")
        if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= 128):
            raise click.UsageError(f"--block {text}: wanted a prefix length such as /26 or /122")
        version = 4 if int(digits) <= 32 else 6
        if lengths[version]:
            raise click.UsageError(f"--block {text}: there is one for IPv{version} already")
        lengths[version] = int(digits)
    return lengths[4], lengths[6]


def usage_rows(found: Sequence[PoolDocument]) -> list[tuple[str, ...]]:
    """Rows for USAGE_COLUMNS, one for each range set. Cooling addresses count as used: they cannot be had now."""
    return [
        (
            pool["name"],
            "network" if pool["managed"] else "named" if pool["mode"] == "local" else pool["mode"],
            _family(usage["family"]),
            _short(usage["size"]),
            str(usage["allocated"]),
            str(usage["reserved"]),
            str(usage["cooling"]),
            _short(usage["free"]),
            output.fill(int(usage["size"]) - int(usage["free"]), int(usage["size"])),
        )
        for pool in found
        for usage in pool["usage"]
    ]


@dataclass
class _Subnet:
    network: Network
    gateway: str = ""
    spans: list[tuple[Address, Address]] = field(default_factory=list)


def pool_spec(
    subnets: Sequence[str],
    ranges: Sequence[str],
    gateways: Sequence[str],
    excludes: Sequence[str],
    cooldown_s: float | None,
) -> ipam_pb2.PoolSpec:
    """A pool out of the command line: one range set for each family, each range and gateway in the subnet it lies in.

    Raises UsageError that names the option and the value.
    """
    parsed = [_Subnet(_network(text)) for text in subnets]
    for text in ranges:
        first, last = _span(text)
        _home(parsed, first, f"--range {text}").spans.append((first, last))
    for text in gateways:
        if text == "none":
            for subnet in parsed:
                subnet.gateway = subnet.gateway or "none"
            continue
        gateway = _address(text, f"--gateway {text}")
        _home(parsed, gateway, f"--gateway {text}").gateway = str(gateway)
    spec = ipam_pb2.PoolSpec(excludes=excludes)
    if cooldown_s is not None:
        spec.cooldown_ms = round(cooldown_s * 1000)
    for version in dict.fromkeys(subnet.network.version for subnet in parsed):
        members = [entry for subnet in parsed if subnet.network.version == version for entry in _ranges(subnet)]
        spec.range_sets.append(ipam_pb2.RangeSet(ranges=members))
    return spec


def _ranges(subnet: _Subnet) -> list[ipam_pb2.Range]:
    network, gateway = str(subnet.network), subnet.gateway
    if not subnet.spans:
        return [ipam_pb2.Range(subnet=network, gateway=gateway)]
    return [
        ipam_pb2.Range(subnet=network, start=str(first), end=str(last), gateway=gateway) for first, last in subnet.spans
    ]


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_interface(text).network
    except ValueError:
        raise click.UsageError(f"--subnet {text}: wanted a CIDR such as 10.1.0.0/16") from None
    raise click.UsageError(f"--subnet {text}: has host bits set; write {meant}")


def _span(text: str) -> tuple[Address, Address]:
    first_text, dash, last_text = text.partition("-")
    if not dash:
        raise click.UsageError(f"--range {text}: wanted two addresses with a dash, such as 10.1.0.10-10.1.0.99")
    first, last = _address(first_text.strip(), f"--range {text}"), _address(last_text.strip(), f"--range {text}")
    if first.version != last.version or int(first) > int(last):
        raise click.UsageError(f"--range {text}: wanted the lower address first, both of one family")
    return first, last


def _address(text: str, what: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise click.UsageError(f"{what}: {text!r} is no IP address") from None


def _home(subnets: Sequence[_Subnet], address: Address, what: str) -> _Subnet:
    for subnet in subnets:
        if address in subnet.network:
            return subnet
    known = ", ".join(str(subnet.network) for subnet in subnets)
    raise click.UsageError(f"{what}: {address} lies in none of the subnets ({known}); name its subnet with --subnet")


def _facts(pool: PoolDocument) -> list[tuple[str, str]]:
    facts = [
        ("pool", pool["name"]),
        ("kind", "kept from a network's configuration" if pool["managed"] else "named"),
        ("cooldown", "ipamd's default" if pool["cooldown_s"] is None else f"{pool['cooldown_s']:g} s"),
    ]
    if pool["mode"] == "node-block":
        limit = f"; at most {pool['blocks_per_node']} to a node" if pool["blocks_per_node"] else ""
        facts.append(("mode", f"node-block, blocks of /{pool['block_v4']} and /{pool['block_v6']}{limit}"))
    else:
        facts.append(("mode", pool["mode"]))
    for number, range_set in enumerate(pool["range_sets"]):
        for entry in range_set:
            span = (
                f", {entry['start'] or 'first'} to {entry['end'] or 'last'}" if entry["start"] or entry["end"] else ""
            )
            gateway = {"": ", gateway: the first", "none": ", no gateway"}.get(
                entry["gateway"], f", gateway {entry['gateway']}"
            )
            facts.append((f"range set {number}", f"{entry['subnet']}{span}{gateway}"))
    return [*facts, *(("excluded", exclude) for exclude in pool["excludes"])]


def _family(name: str) -> str:
    return {"ipv4": "IPv4", "ipv6": "IPv6"}.get(name, name)


def _short(number: str) -> str:
    """A number of addresses; beyond a million million only its magnitude, which is what a person can use."""
    value = int(number)
    return number if value < 10**12 else f"~2^{value.bit_length() - (value & (value - 1) == 0)}"
