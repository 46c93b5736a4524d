"""`netloom network`: networks that containers are attached to by name, defined once for all nodes."""

import os
from collections.abc import Iterable
from typing import TypedDict

import click
from click.shell_completion import CompletionItem

from cli import netd, output, overlays
from cli.daemon import connected
from cli.failure import Failure, Status
from cli.options import Choices, command, pass_choices
from kernel import paths, shared
from kernel.errors import KernelError
from kernel.record import Records
from kernel.session import Session
from protos.ipam.v1 import ipam_pb2

_MODES = ("local", "node-block", "cluster-address")
_TYPES = ("routed", "overlay")
_MOST_VNI = (1 << 24) - 1
_BACKENDS = ("host-gw", "vxlan", "direct", "none")
_COMPLETION_TIMEOUT_S = 1.0


class NetworkDocument(TypedDict):
    name: str
    type: str
    subnets: list[str]
    backend: str
    bridge: str
    mtu: int
    masquerade: bool
    open: bool
    connected: list[str]
    pool: str
    vni: int
    internal: bool
    flood: bool
    docker: str
    gateways: list[str]


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    choices = ctx.find_object(Choices) or Choices()
    try:
        with connected(choices.socket_path(), _COMPLETION_TIMEOUT_S) as ipamd:
            found = ipamd.list_networks()
    except Failure:
        return []
    return [CompletionItem(network.name) for network in found if network.name.startswith(incomplete)]


@click.group("network", short_help="Networks: defined once, for all nodes.")
def networks() -> None:
    """Networks that containers are attached to by name, defined once for all nodes."""


@command(networks, "list")
@pass_choices
def list_(choices: Choices) -> None:
    """List the networks."""
    with choices.ipamd() as ipamd:
        found = [_document(network) for network in ipamd.list_networks()]
    if choices.as_json:
        output.document({"networks": found})
        return
    output.table(
        ("NETWORK", "TYPE", "VNI", "SUBNETS", "BACKEND", "BRIDGE", "MTU", "CONNECTED"),
        [
            (
                one["name"],
                one["type"],
                str(one["vni"] or "-"),
                ",".join(one["subnets"]),
                "-" if one["vni"] else one["backend"] or "default",
                one["bridge"],
                str(one["mtu"] or "auto"),
                ",".join(one["connected"]),
            )
            for one in found
        ],
    )


@command(networks, "show")
@click.argument("name", shell_complete=_complete)
@pass_choices
def show(choices: Choices, name: str) -> None:
    """Show a network; where netd runs, also what it knows of an overlay."""
    with choices.ipamd() as ipamd:
        found = _document(ipamd.get_network(name))
    here = netd.overlay(name) if found["type"] == "overlay" else None
    if choices.as_json:
        output.document({**found, "overlay": here})
    else:
        output.facts([*_facts(found), *(overlays.facts(here) if here is not None else ())])


@command(networks, "create")
@click.argument("name")
@click.option(
    "--type",
    "kind",
    type=click.Choice(_TYPES),
    default="routed",
    show_default=True,
    help="Subnets routed between hosts, or one layer-2 network over all of them.",
)
@click.option(
    "--subnet",
    "subnets",
    metavar="CIDR",
    multiple=True,
    help="One of a family; IPv4 and IPv6.  [overlay's default: one that is free]",
)
@click.option(
    "--vni", metavar="NUMBER", type=click.IntRange(1, _MOST_VNI), help="Of an overlay.  [default: one that is free]"
)
@click.option("--internal", is_flag=True, help="An overlay without a way out.")
@click.option("--flood", is_flag=True, help="An overlay that carries frames for nobody known to every host on it.")
@click.option("--backend", type=click.Choice(_BACKENDS), default=None, help="Between hosts.  [default: netd's]")
@click.option("--block", "block_v4", metavar="BITS", type=click.IntRange(22, 32), help="Prefix of an IPv4 block.")
@click.option("--block6", "block_v6", metavar="BITS", type=click.IntRange(118, 128), help="Prefix of an IPv6 block.")
@click.option(
    "--mode", type=click.Choice(_MODES), default=None, help="Of the pool.  [default: node-block in a cluster]"
)
@click.option("--exclude", "excludes", metavar="ADDRESS|CIDR", multiple=True, help="Never handed out; several.")
@click.option("--bridge", metavar="NAME", default="", help="Its bridge on every host.  [default: nl-NAME]")
@click.option("--mtu", metavar="BYTES", type=click.IntRange(1280, 65521), help="[default: what the hosts allow]")
@click.option("--no-masquerade", is_flag=True, help="Leave with the containers' own addresses.")
@click.option("--open", "is_open", is_flag=True, help="Let everybody reach its containers.")
@pass_choices
def create(  # noqa: PLR0913, PLR0917 - a command's options
    choices: Choices,
    name: str,
    kind: str,
    subnets: tuple[str, ...],
    vni: int | None,
    internal: bool,
    flood: bool,
    backend: str | None,
    block_v4: int | None,
    block_v6: int | None,
    mode: str | None,
    excludes: tuple[str, ...],
    bridge: str,
    mtu: int | None,
    no_masquerade: bool,
    is_open: bool,
) -> None:
    """Define a network, with a pool of its name. The configuration on every host is then only its name.

    \b
    netloom network create pods --subnet 10.2.0.0/16 --block 24 --backend vxlan
    echo '{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "netloom",
        "capabilities": {"portMappings": true, "bandwidth": true}}]}' > /etc/cni/net.d/10-pods.conflist
    netloom network create blue --type overlay
    """
    if not subnets and kind == "routed":
        raise click.UsageError(
            "a routed network wants --subnet CIDR, one of a family; only for --type overlay it is chosen"
        )
    request = ipam_pb2.CreateNetworkRequest(
        network=ipam_pb2.Network(
            name=name,
            type=kind,
            subnets=subnets,
            backend=backend or "",
            bridge=bridge,
            mtu=mtu or 0,
            no_masquerade=no_masquerade,
            open=is_open,
            vni=vni or 0,
            internal=internal,
            flood=flood,
        ),
        mode=mode or "",
        block_v4=block_v4 or 0,
        block_v6=block_v6 or 0,
        excludes=excludes,
    )
    with choices.ipamd() as ipamd:
        made = _document(ipamd.create_network(request))
    if choices.as_json:
        output.document(dict(made))
    else:
        vni_text = f", VNI {made['vni']}" if made["vni"] else ""
        output.line(f"created network {made['name']} ({', '.join(made['subnets'])}){vni_text}, bridge {made['bridge']}")


@command(networks, "delete")
@click.argument("name", shell_complete=_complete)
@pass_choices
def delete(choices: Choices, name: str) -> None:
    """Delete a network that nobody uses, with its pool."""
    with choices.ipamd() as ipamd:
        others = ipamd.get_network(name).connected
        ipamd.delete_network(name)
        changed = [network for network in ipamd.list_networks() if network.name in others]
    if changed and os.geteuid() == 0:
        # Its subnet may be another network's next, which these are not connected with.
        _tell_kernel(changed)
    if choices.as_json:
        output.document({"name": name})
    else:
        output.line(f"deleted network {name}")


@command(networks, "connect")
@click.argument("one", shell_complete=_complete)
@click.argument("other", shell_complete=_complete)
@pass_choices
def connect(choices: Choices, one: str, other: str) -> None:
    """Let the containers of two networks reach one another."""
    _connect(choices, one, other, undo=False)


@command(networks, "disconnect")
@click.argument("one", shell_complete=_complete)
@click.argument("other", shell_complete=_complete)
@pass_choices
def disconnect(choices: Choices, one: str, other: str) -> None:
    """End what connect began. Connections that stand go on until they end."""
    _connect(choices, one, other, undo=True)


def _connect(choices: Choices, one: str, other: str, *, undo: bool) -> None:
    with choices.ipamd() as ipamd:
        answer = ipamd.connect_networks(one, other, undo=undo)
    changed = [_document(network) for network in answer]
    here = os.geteuid() == 0
    if here:
        _tell_kernel(answer)
    if choices.as_json:
        output.document({"networks": changed, "applied": here})
        return
    for network in changed:
        output.line(f"{network['name']} is connected with: {', '.join(network['connected']) or 'none'}")
    if not here:
        output.line("this host's containers learn of it from netd, or by a connect as root")


def _tell_kernel(networks: Iterable[ipam_pb2.Network]) -> None:
    """Have what is attached on this host now heed it; other hosts' netd does the same there."""
    try:
        records = Records(paths.run_dir(os.environ))
        with Session() as host:
            wanted = [shared.elements(one.subnets, one.reachable, is_open=one.open) for one in networks]
            shared.tell(host, records, wanted)
    except KernelError as error:
        raise Failure(f"the network is changed, but this host's kernel refused: {error}; run it again") from None
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


def _document(message: ipam_pb2.Network) -> NetworkDocument:
    return {
        "name": message.name,
        "type": message.type,
        "subnets": list(message.subnets),
        "backend": message.backend,
        "bridge": message.bridge,
        "mtu": message.mtu,
        "masquerade": not message.no_masquerade,
        "open": message.open,
        "connected": list(message.connected),
        "pool": message.pool,
        "vni": message.vni,
        "internal": message.internal,
        "flood": message.flood,
        "docker": message.docker,
        "gateways": list(message.gateways),
    }


def _facts(one: NetworkDocument) -> list[tuple[str, str]]:
    return [
        ("network", one["name"]),
        ("type", one["type"]),
        *([("vni", str(one["vni"]))] if one["vni"] else []),
        *(("subnet", subnet) for subnet in one["subnets"]),
        *(("gateway", gateway) for gateway in one["gateways"]),
        ("pool", one["pool"]),
        *([("backend", one["backend"] or "netd's default")] if not one["vni"] else []),
        ("bridge", one["bridge"]),
        ("mtu", str(one["mtu"] or "what the hosts allow")),
        ("masquerade", "yes" if one["masquerade"] and not one["internal"] else "no"),
        ("reached by", "everybody" if one["open"] else ", ".join(("its own", *one["connected"]))),
        *(
            [
                ("way out", "no" if one["internal"] else "yes"),
                ("flood", "yes" if one["flood"] else "no"),
                ("docker", f"every host's shows it as {one['docker']}" if one["docker"] else "not shared"),
            ]
            if one["vni"]
            else []
        ),
    ]
