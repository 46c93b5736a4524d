"""`netloom ip check`: does the store say what is so in the kernel, and what the cluster was told?"""

import os
import time
from typing import TypedDict

import click

from cli import output
from cli.failure import EPILOG, Failure, Status
from cli.options import Choices, common, pass_choices
from ipamd.client import Client
from kernel import everywhere, paths
from kernel.errors import KernelError
from kernel.record import Records
from protos.ipam.v1 import ipam_pb2

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class DifferenceDocument(TypedDict):
    kind: str
    pool: str
    address: str
    node: str
    text: str
    repairable: bool
    repaired: bool


class CheckDocument(TypedDict):
    kernel: bool  # whether the kernel was looked at
    allocations: int
    blocks: int
    differences: list[DifferenceDocument]


@click.command("check", epilog=EPILOG, short_help="Compare store, kernel and cluster; mend what is safe.")
@click.option("--repair", is_flag=True, help="Mend what is safe and was found by an earlier check, a grace ago.")
@click.option("--no-kernel", is_flag=True, help="Leave the kernel out; what is left needs no root.")
@common
@pass_choices
def check(choices: Choices, repair: bool, no_kernel: bool) -> None:
    """Compare what ipamd's store says with the kernel of this host, and with what the cluster knows.

    Every difference is named, with what to do. Exit status 1 while there is one that was not mended. --repair mends
    what is safe, but only what an earlier check found too, [reclaim] grace_s ago: what is under way looks like a
    difference for a moment.
    """
    if not no_kernel and os.geteuid() != 0:
        raise Failure(
            "only root sees every container's interfaces; run this with sudo, or leave them out with --no-kernel",
            Status.NOT_PERMITTED,
        )
    with choices.ipamd() as ipamd:
        request = ipam_pb2.CheckStoreRequest(repair=repair)
        if not no_kernel:
            _look(ipamd, request)
        answer = ipamd.check_store(request)
    found = CheckDocument(
        kernel=not no_kernel,
        allocations=answer.allocations,
        blocks=answer.blocks,
        differences=[
            DifferenceDocument(
                kind=one.kind,
                pool=one.pool,
                address=one.address,
                node=one.node,
                text=one.text,
                repairable=one.repairable,
                repaired=one.repaired,
            )
            for one in answer.differences
        ],
    )
    _print(choices, found, repair)
    if any(not one["repaired"] for one in found["differences"]):
        raise click.exceptions.Exit(Status.FAILED)


def _look(ipamd: Client, request: ipam_pb2.CheckStoreRequest) -> None:
    """Fills in what this host's containers have on their interfaces.

    A namespace counts as a container's where an attachment record or an allocation names it: others on this machine,
    such as those of a host inside a container, may use the same ranges for themselves. An allocation may not know its
    namespace, such as one that was imported: its address counts wherever it is.
    """
    with open(_BOOT_ID, encoding="ascii") as stream:
        request.at.boot_id = stream.read().strip()
    request.at.boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ours: set[int] = set()
    anywhere: set[str] = set()
    for entry in ipamd.list_allocations():
        if entry.netns.inode:
            ours.add(entry.netns.inode)
        else:
            anywhere.update(address.cidr.partition("/")[0] for address in entry.addresses)
    try:
        ours |= {record.netns_inode for record in Records(paths.run_dir(os.environ)).all()}
        found = everywhere.addresses()
    except KernelError as error:
        raise Failure(f"the kernel refused: {error}; --no-kernel leaves it out") from None
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None
    request.kernel.extend(
        ipam_pb2.KernelAddress(address=one.ip, netns_inode=one.netns_inode, ifname=one.ifname)
        for one in found
        if one.netns_inode in ours or one.ip in anywhere
    )


def _print(choices: Choices, found: CheckDocument, repair: bool) -> None:
    if choices.as_json:
        output.document(dict(found))
        return
    looked = f"{found['allocations']} allocations" + (f", {found['blocks']} blocks" if found["blocks"] else "")
    if not found["differences"]:
        output.line(f"no difference; looked at {looked}" + ("" if found["kernel"] else ", not at the kernel"))
        return
    output.line(f"looked at {looked}" + ("" if found["kernel"] else ", not at the kernel"))
    output.table(
        ("KIND", "ADDRESS", "POOL", "NODE", "STATE", "WHAT"),
        [
            (one["kind"], one["address"], one["pool"], one["node"], _state(one), one["text"])
            for one in found["differences"]
        ],
    )
    if not repair and any(one["repairable"] for one in found["differences"]):
        output.line("--repair mends what is marked 'safe', once it was found twice with the grace in between")


def _state(one: DifferenceDocument) -> str:
    if one["repaired"]:
        return "mended"
    return "safe" if one["repairable"] else "for you"
