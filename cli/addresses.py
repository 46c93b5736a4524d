"""`netloom ip`: which attachment holds which address; give one back; keep one back."""

import click

from cli import documents, output
from cli.documents import AllocationDocument
from cli.failure import Failure, Status
from cli.options import Choices, command, complete_pool, pass_choices
from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2

_COLUMNS = ("ADDRESS", "POOL", "NETWORK", "CONTAINER", "INTERFACE", "CLIENT", "NODE", "SINCE")


@click.group("ip", short_help="Addresses: who holds which, release, reserve.")
def addresses() -> None:
    """Addresses: who holds which, release, reserve."""


@command(addresses, "list")
@click.option("--pool", metavar="NAME", default="", shell_complete=complete_pool, help="Only of this pool.")
@click.option("--network", metavar="NAME", default="", help="Only of this network.")
@click.option("--container", metavar="ID", default="", help="Only of this container.")
@click.option("--client", metavar="NAME", default="", help="Only of this client: cni, docker.")
@click.option("--node", metavar="NAME", default="", help="Only of this node.")
@click.option("--cluster", is_flag=True, help="Of all nodes, out of the cluster's pools.")
@click.option("--reserved", is_flag=True, help="The reservations instead; of the filters, --pool only.")
@pass_choices
def list_(
    choices: Choices, pool: str, network: str, container: str, client: str, node: str, cluster: bool, reserved: bool
) -> None:
    """List the addresses that are in use."""
    with choices.ipamd() as ipamd:
        if reserved:
            if network or container or client or node or cluster:
                raise click.UsageError("--reserved goes with --pool only: a reservation belongs to no container")
            _print_reservations(choices, _reservations(ipamd, pool))
            return
        request = ipam_pb2.ListAllocationsRequest(
            pool=pool, network=network, container_id=container, client=client, node=node, cluster=cluster
        )
        found = [documents.allocation(entry) for entry in ipamd.list_allocations(request)]
    # An attachment is found by any of its addresses; a row is one address, and only those of the pool were asked for.
    if choices.as_json:
        output.document({"allocations": sorted(found, key=_by_first_address)})
    else:
        print_allocations(found, pool)


@command(addresses, "show")
@click.argument("address")
@pass_choices
def show(choices: Choices, address: str) -> None:
    """Show who holds an address, or for whom it is reserved."""
    with choices.ipamd() as ipamd:
        holders = _holders(ipamd, address, "")
        wanted = documents.order(address)[:2]
        reserved = [entry for entry in _reservations(ipamd, "") if documents.order(entry["address"])[:2] == wanted]
    if not holders and not reserved:
        raise Failure(f"nobody holds {address}, and it is not reserved; 'netloom ip list' shows what is in use")
    if choices.as_json:
        output.document({"allocations": holders, "reservations": reserved})
        return
    for holder in holders:
        output.facts(_facts(holder))
    for entry in reserved:
        output.facts([("address", entry["address"]), ("reserved in", entry["pool"]), ("note", entry["note"])])


@command(addresses, "watch")
@click.option(
    "--after", type=click.IntRange(min=1), metavar="REVISION", help="Begin behind this revision.  [default: now]"
)
@pass_choices
def watch(choices: Choices, after: int | None) -> None:
    """Show what happens to addresses, one event a line, until interrupted.

    The first column is the revision: --after goes on from there without a gap, as long as ipamd remembers it (the last
    10,000 events). With --json, each line is a document.
    """
    seen = after or 0
    try:
        with choices.ipamd() as ipamd:
            for page in ipamd.watch_allocations(seen):
                for event in page.events:
                    _print_event(choices, documents.event(event))
                seen = page.revision
    except KeyboardInterrupt:
        return
    except Failure as failure:
        if failure.status is Status.UNREACHABLE and seen:
            raise Failure(f"{failure.message}; go on with --after {seen}", failure.status) from None
        raise


def _print_event(choices: Choices, event: documents.EventDocument) -> None:
    if choices.as_json:
        output.document_line({**event})
        return
    held = event["allocation"]
    addresses = ",".join(entry["cidr"] for entry in held["addresses"])
    output.line(
        f"{event['revision']}  {event['at']}  {event['kind']:<9}  {addresses}  {held['network']}  "
        f"{held['container_id']}  {held['ifname']}  {held['client']}"
    )


@command(addresses, "release")
@click.argument("address")
@click.option("--pool", metavar="NAME", default="", shell_complete=complete_pool, help="Where several pools have it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_choices
def release(choices: Choices, address: str, pool: str, yes: bool) -> None:
    """Give an address back that its holder did not release.

    All addresses of the attachment that holds it go back. A container that still runs keeps using them, and they will
    be handed out again: make sure that it is gone.
    """
    with choices.ipamd() as ipamd:
        holder = _one_holder(_holders(ipamd, address, pool), address)
        if not yes:
            _confirm(holder)
        key = ipam_pb2.AttachmentKey(
            node=holder["node"],
            client=holder["client"],
            network=holder["network"],
            container_id=holder["container_id"],
            ifname=holder["ifname"],
        )
        # The generation: what was shown and agreed to, not what another container got in the meantime.
        answer = ipamd.release(key, generation=holder["generation"])
    released = [documents.address(entry) for entry in answer.released]
    if not released:
        raise Failure(f"{address} was released by somebody else in the meantime; nothing was changed")
    if choices.as_json:
        output.document({"released": released, "holder": holder})
        return
    output.line(f"released {', '.join(entry['address'] for entry in released)}, held by {_name(holder)}")


@command(addresses, "reserve")
@click.argument("pool", shell_complete=complete_pool)
@click.argument("address")
@click.option("--note", metavar="TEXT", default="", help="What it is kept for.")
@pass_choices
def reserve(choices: Choices, pool: str, address: str, note: str) -> None:
    """Keep an address of a pool back, so that nobody gets it."""
    with choices.ipamd() as ipamd:
        made = documents.reservation(ipamd.reserve(pool, address, note))
    if choices.as_json:
        output.document(dict(made))
    else:
        output.line(f"reserved {made['address']} in pool {made['pool']}")


@command(addresses, "unreserve")
@click.argument("pool", shell_complete=complete_pool)
@click.argument("address")
@pass_choices
def unreserve(choices: Choices, pool: str, address: str) -> None:
    """Let a reserved address be handed out again."""
    with choices.ipamd() as ipamd:
        ipamd.unreserve(pool, address)
    if choices.as_json:
        output.document({"pool": pool, "address": address})
    else:
        output.line(f"{address} in pool {pool} is no longer reserved")


def print_allocations(found: list[AllocationDocument], pool: str = "", reasons: bool = False) -> None:
    """A table with a row for each address, sorted by address. `pool` leaves out those of other pools."""
    rows = [
        (address, entry) for entry in found for address in entry["addresses"] if not pool or address["pool"] == pool
    ]
    rows.sort(key=lambda row: (*documents.order(row[0]["address"]), row[0]["pool"]))
    cells = [
        (
            address["address"],
            address["pool"],
            entry["network"],
            entry["container_id"],
            entry["ifname"],
            entry["client"],
            entry["node"],
            entry["created"],
            *([entry["reason"]] if reasons else []),
        )
        for address, entry in rows
    ]
    output.table((*_COLUMNS, "REASON") if reasons else _COLUMNS, cells)


def _print_reservations(choices: Choices, found: list[documents.ReservationDocument]) -> None:
    if choices.as_json:
        output.document({"reservations": found})
    else:
        output.table(("ADDRESS", "POOL", "NOTE"), [(entry["address"], entry["pool"], entry["note"]) for entry in found])


def _reservations(ipamd: Client, pool: str) -> list[documents.ReservationDocument]:
    found = [documents.reservation(entry) for entry in ipamd.list_reservations(pool)]
    return sorted(found, key=lambda entry: (*documents.order(entry["address"]), entry["pool"]))


def _holders(ipamd: Client, address: str, pool: str) -> list[AllocationDocument]:
    request = ipam_pb2.ListAllocationsRequest(address=address, pool=pool)
    found = [documents.allocation(entry) for entry in ipamd.list_allocations(request)]
    return sorted(found, key=_by_first_address)


def _one_holder(holders: list[AllocationDocument], address: str) -> AllocationDocument:
    if not holders:
        raise Failure(f"nobody holds {address}; 'netloom ip list' shows what is in use")
    if len(holders) > 1:
        whose = "; ".join(f"{_name(holder)} in pool {_pools(holder)}" for holder in holders)
        raise Failure(f"several hold {address}: {whose}; choose one with --pool", Status.USAGE)
    return holders[0]


def _confirm(holder: AllocationDocument) -> None:
    held = ", ".join(address["address"] for address in holder["addresses"])
    question = output.visible(
        f"Release {held}, held by {_name(holder)} since {holder['created'] or 'an unknown time'}?"
    )
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        raise Failure("nobody answered, so nothing was released; say --yes to go without the question") from None
    if not agreed:
        raise Failure("nothing was released, as you did not agree")


def _name(holder: AllocationDocument) -> str:
    return (
        f"container {holder['container_id']}, interface {holder['ifname']}, of network {holder['network']} "
        f"({holder['client']}, node {holder['node']})"
    )


def _pools(holder: AllocationDocument) -> str:
    return ", ".join(sorted({address["pool"] for address in holder["addresses"]}))


def _facts(holder: AllocationDocument) -> list[tuple[str, str]]:
    facts = [
        ("container", holder["container_id"]),
        ("interface", holder["ifname"]),
        ("network", holder["network"]),
        ("client", holder["client"]),
        ("node", holder["node"]),
    ]
    for address in holder["addresses"]:
        gateway = f", gateway {address['gateway']}" if address["gateway"] else ""
        facts.append(("address", f"{address['cidr']} of pool {address['pool']}{gateway}"))
    netns = holder["netns"]
    known = f" (inode {netns['inode']})" if netns["inode"] else ""
    return [
        *facts,
        ("namespace", (netns["path"] or "unknown") + known),
        ("since", holder["created"] or "unknown"),
        *([("workload", holder["workload"])] if holder["workload"] else []),
        ("generation", str(holder["generation"])),
    ]


def _by_first_address(entry: AllocationDocument) -> tuple[int, int, str, int]:
    first = entry["addresses"][0]["address"] if entry["addresses"] else ""
    return (*documents.order(first), entry["generation"])
