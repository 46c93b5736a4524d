"""`netloom node`: the nodes of the cluster."""

import click

from cli import documents, output
from cli.documents import NodeDocument
from cli.options import Choices, command, complete_node, pass_choices

_COLUMNS = ("NODE", "STATE", "HOST", "BLOCKS", "ADDRESSES", "VERSION", "ALIVE SINCE")
_NUMBERS = ("BLOCKS", "ADDRESSES")


@click.group("node", short_help="Nodes of the cluster.")
def nodes() -> None:
    """Nodes of the cluster."""


@command(nodes, "list")
@pass_choices
def list_(choices: Choices) -> None:
    """List the nodes, whether they are alive, and what they hold."""
    with choices.ipamd() as ipamd:
        found = [documents.node(entry) for entry in ipamd.list_nodes()]
    if choices.as_json:
        output.document({"nodes": found})
    else:
        output.table(_COLUMNS, [_row(node) for node in found], _NUMBERS)


@command(nodes, "show")
@click.argument("name", shell_complete=complete_node)
@pass_choices
def show(choices: Choices, name: str) -> None:
    """Show a node."""
    with choices.ipamd() as ipamd:
        (found,) = [documents.node(entry) for entry in ipamd.list_nodes(name)]
    if choices.as_json:
        output.document(dict(found))
        return
    facts = [
        ("node", found["name"]),
        ("state", _state(found)),
        ("host", found["hostname"]),
        ("id", found["id"]),
        ("in the cluster since", found["created"]),
        ("blocks", str(found["blocks"])),
        ("addresses", str(found["addresses"])),
    ]
    if found["alive"]:
        facts += [("alive since", found["alive_since"]), ("version", found["version"]), ("boot", found["boot_id"])]
    output.facts(facts)


@command(nodes, "drain")
@click.argument("name", shell_complete=complete_node)
@click.option("--undo", is_flag=True, help="Let it give addresses again.")
@pass_choices
def drain(choices: Choices, name: str, undo: bool) -> None:
    """Have a node give no new addresses of the cluster's pools.

    Its containers keep theirs; blocks that become empty go back to the cluster. The node obeys at once, or when it is
    back.
    """
    with choices.ipamd() as ipamd:
        found = documents.node(ipamd.drain_node(name, undo=undo))
    if choices.as_json:
        output.document(dict(found))
    elif undo:
        output.line(f"node {name} gives addresses again")
    else:
        output.line(f"node {name} gives no new addresses; it holds {found['blocks']} blocks")


@command(nodes, "remove")
@click.argument("name", shell_complete=complete_node)
@click.option("--force", is_flag=True, help="Also while it is alive. Its addresses may then be in use twice.")
@pass_choices
def remove(choices: Choices, name: str, force: bool) -> None:
    """Forget a node that is gone, and take back all that it holds.

    Its blocks and addresses can be handed out by others at once: be sure that its containers are gone, too.
    """
    with choices.ipamd() as ipamd:
        removed = ipamd.remove_node(name, force=force)
    if choices.as_json:
        output.document({"name": name, "blocks": removed.blocks, "addresses": removed.addresses})
    else:
        output.line(f"removed node {name}: {removed.blocks} blocks and {removed.addresses} addresses came back")


def _row(node: NodeDocument) -> tuple[str, ...]:
    return (
        node["name"],
        _state(node),
        node["hostname"],
        str(node["blocks"]),
        str(node["addresses"]),
        node["version"],
        node["alive_since"],
    )


def _state(node: NodeDocument) -> str:
    state = "alive" if node["alive"] else "silent"
    return f"{state}, draining" if node["draining"] else state
