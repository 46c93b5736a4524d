"""`netloom status`: is this host able to give containers their addresses?"""

import os
from collections.abc import Sequence
from typing import TypedDict

import click

from cli import documents, netd, output, shim
from cli.documents import PoolDocument
from cli.failure import Failure, Status
from cli.netd import NetdDocument
from cli.options import Choices, common, pass_choices
from cli.pools import print_usage
from cli.shim import DockerDocument
from ipamd.client import Client, IpamError
from kernel import foreign, nft, paths
from kernel.errors import KernelError
from kernel.record import Records
from kernel.session import Session
from protos.ipam.v1 import ipam_pb2


class IpamdDocument(TypedDict):
    version: str
    node: str
    store: str
    schema: str
    boot_id: str
    uptime_s: float
    allocations: int
    pools: int


class EndpointDocument(TypedDict):
    endpoint: str
    version: str
    leader: bool
    db_bytes: int
    alarms: list[str]
    error: str  # "": it answers


class ClusterDocument(TypedDict):
    reachable: bool
    since_s: float  # for how long it has been so
    draining: bool
    unpublished: int  # changes that the cluster does not know yet
    etcd: list[EndpointDocument]


class KernelDocument(TypedDict):
    attachments: int | None  # None: only root may look
    releases_waiting: int | None
    releases_bad: int | None


class StatusDocument(TypedDict):
    state: str  # healthy, degraded, unreachable
    problems: list[str]
    socket: str
    ipamd: IpamdDocument | None
    cluster: ClusterDocument | None  # None: the store belongs to this host
    pools: list[PoolDocument]
    kernel: KernelDocument
    docker: DockerDocument | None  # None: no shim ever ran on this host, or only root may look
    netd: NetdDocument | None  # None: no netd ran since the host's start, or only root may look


_EPILOG = (
    "Exit status: 0 healthy, 1 degraded (the problems are listed), 2 wrong usage, 3 ipamd cannot be reached. "
    "What only root may see is left out for others."
)


@click.command("status", epilog=_EPILOG, short_help="Is this host healthy?")
@common
@pass_choices
def status(choices: Choices) -> None:
    """Show whether ipamd and Docker's driver run, how full the pools are, and what the host's kernel side knows."""
    kernel = _kernel(paths.run_dir(os.environ))
    docker = shim.look(paths.state_dir(os.environ))
    node = netd.look()
    socket = choices.socket_path()
    try:
        with choices.ipamd() as ipamd:
            found = _ask(ipamd, socket, kernel, docker, node)
    except Failure as failure:
        if choices.as_json:
            output.document(
                StatusDocument(
                    state="unreachable",
                    problems=[failure.message, *shim.problems(docker), *netd.problems(node)],
                    socket=socket,
                    ipamd=None,
                    cluster=None,
                    pools=[],
                    kernel=kernel,
                    docker=docker,
                    netd=node,
                )
            )
        raise
    if choices.as_json:
        output.document(dict(found))
    else:
        _print(found)
    if found["problems"]:
        raise click.exceptions.Exit(Status.FAILED)


def _ask(
    ipamd: Client, socket: str, kernel: KernelDocument, docker: DockerDocument | None, node: NetdDocument | None
) -> StatusDocument:
    answer = ipamd.status()
    pools = sorted((documents.pool(entry) for entry in ipamd.list_pools()), key=lambda entry: entry["name"])
    problems = [*_refusals(ipamd, pools), *_bad_records(kernel), *other_firewalls(), *shim.problems(docker)]
    problems += netd.problems(node)
    cluster = _cluster(answer)
    problems += _cluster_problems(cluster)
    return StatusDocument(
        state="degraded" if problems else "healthy",
        problems=problems,
        socket=socket,
        ipamd=IpamdDocument(
            version=answer.version,
            node=answer.node,
            store=answer.store,
            schema=answer.schema,
            boot_id=answer.boot_id,
            uptime_s=answer.uptime_s,
            allocations=answer.allocations,
            pools=answer.pools,
        ),
        cluster=cluster,
        pools=pools,
        kernel=kernel,
        docker=docker,
        netd=node,
    )


def _cluster(answer: ipam_pb2.StatusResponse) -> ClusterDocument | None:
    if answer.store != "etcd":
        return None
    return ClusterDocument(
        reachable=answer.etcd_reachable,
        since_s=answer.etcd_since_s,
        draining=answer.draining,
        unpublished=answer.unpublished,
        etcd=[
            EndpointDocument(
                endpoint=one.endpoint,
                version=one.version,
                leader=one.leader,
                db_bytes=one.db_bytes,
                alarms=list(one.alarms),
                error=one.error,
            )
            for one in answer.etcd
        ],
    )


def _cluster_problems(cluster: ClusterDocument | None) -> list[str]:
    if cluster is None:
        return []
    problems = [f"etcd {one['endpoint']} does not answer: {one['error']}" for one in cluster["etcd"] if one["error"]]
    problems += [
        f"etcd {one['endpoint']} has an alarm: {', '.join(one['alarms'])}" for one in cluster["etcd"] if one["alarms"]
    ]
    if not cluster["reachable"]:
        problems.append(
            f"etcd cannot be reached for {_duration(cluster['since_s'])}: no new blocks, and no new addresses of pools "
            "of mode cluster-address"
        )
    return problems


def _refusals(ipamd: Client, pools: Sequence[PoolDocument]) -> list[str]:
    """Why the next container would get no address, in ipamd's words; each reason once (a full disk concerns all)."""
    reasons: dict[str, None] = {}
    for pool in pools:
        try:
            ipamd.status(pools=[pool["name"]])
        except IpamError as error:
            reasons.setdefault(error.message)
    return list(reasons)


def _bad_records(kernel: KernelDocument) -> list[str]:
    if not kernel["releases_bad"]:
        return []
    return [
        f"{kernel['releases_bad']} release records cannot be read: see *.bad in the releases directory, and ipamd's log"
    ]


def other_firewalls() -> list[str]:
    """What drops packets that containers want to pass, and how to let them."""
    try:
        with Session() as host:
            versions = [version for version in nft.FORWARDING if nft.forwards(version)]
            lacking = foreign.missing(host, versions)
            problems = [f"{lacking} drops packets of containers: run netloom gc --rebuild"] if lacking else []
            problems += [
                f"chain {one.chain} of table {one.family} {one.table} drops packets of containers;"
                f" it needs a rule, here and in its file: {one.remedy}"
                for one in (foreign.droppers(host) if versions else ())
                if not set(versions).isdisjoint(one.versions)
            ]
    except KernelError:  # only root may look; whatever else is wrong, an ADD tells
        return []
    return problems


def _kernel(run_dir: str) -> KernelDocument:
    try:
        attachments: int | None = sum(one.key.plugin != "netd" for one in Records(run_dir).all())
    except PermissionError:
        attachments = None
    try:
        names: list[str] | None = os.listdir(f"{run_dir}/releases")
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except PermissionError:
        names = None
    return KernelDocument(
        attachments=attachments,
        releases_waiting=None if names is None else sum(name.endswith(".json") for name in names),
        releases_bad=None if names is None else sum(name.endswith(".bad") for name in names),
    )


def _print(found: StatusDocument) -> None:
    ipamd, kernel, docker, node = found["ipamd"], found["kernel"], found["docker"], found["netd"]
    facts = [("state", found["state"]), ("socket", found["socket"])]
    if ipamd is not None:
        facts += [
            ("ipamd", f"version {ipamd['version']}, up {_duration(ipamd['uptime_s'])}"),
            ("node", ipamd["node"]),
            ("store", f"{ipamd['store']}, schema {ipamd['schema']}" if ipamd["schema"] else ipamd["store"]),
            ("allocations", f"{ipamd['allocations']} in {ipamd['pools']} pools"),
        ]
    if found["cluster"] is not None:
        facts += _cluster_facts(found["cluster"])
    facts += [
        ("attachments", _count(kernel["attachments"], "with state in this host's kernel")),
        ("releases", _count(kernel["releases_waiting"], "waiting for ipamd")),
        *([("docker", shim.fact(docker))] if docker is not None else []),
        *([("netd", netd.fact(node))] if node is not None else []),
        *(("problem", problem) for problem in found["problems"]),
    ]
    output.facts(facts)
    if found["pools"]:
        output.line("")
        print_usage(found["pools"])
    if docker is not None:
        shim.print_tables(docker)
    if node is not None and node["answers"]:
        netd.print_tables(node)


def _cluster_facts(cluster: ClusterDocument) -> list[tuple[str, str]]:
    state = "reachable" if cluster["reachable"] else f"away for {_duration(cluster['since_s'])}"
    draining = "; this node is drained" if cluster["draining"] else ""
    facts = [("cluster", f"etcd is {state}, {cluster['unpublished']} changes to be told{draining}")]
    for one in cluster["etcd"]:
        size = f"version {one['version']}, {one['db_bytes'] / 1e6:.1f} MB{', leader' if one['leader'] else ''}"
        facts.append(("etcd", f"{one['endpoint']}  {one['error'] or size}"))
    return facts


def _count(number: int | None, what: str) -> str:
    return "unknown (only root may look)" if number is None else f"{number} {what}"


def _duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    whole = int(seconds)
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {smaller_name}"
    return f"{whole} s"
