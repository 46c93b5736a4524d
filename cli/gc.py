"""`netloom gc`: take back what containers that died left behind, in this host's kernel and in ipamd.

Only root sees every network namespace, so this command looks; what to release is ipamd's decision, which wants to see
an attachment dead twice with a grace between. The kernel's side goes first: an address must not be handed out while
this host still has rules for its last holder. Where Docker's driver is, it compares with Docker in between.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import click

from cli import addresses, attach, documents, output, shim
from cli.documents import AllocationDocument
from cli.failure import EPILOG, Failure, Status
from cli.options import Choices, common, pass_choices
from cli.shim import CollectedDocument
from cni.errors import CniError
from cni.lock import AttachmentLock, attachment_lock
from ipamd.client import Client
from kernel import leftovers, liveness, paths
from kernel.errors import KernelError
from kernel.liveness import LiveNetns
from kernel.record import Record, Records
from kernel.session import Session
from protos.ipam.v1 import ipam_pb2

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LOCK_DEADLINE_S = 15.0  # a request of that attachment is under way: it will see to its own


class LeftoverDocument(TypedDict):
    network: str
    container_id: str
    ifname: str
    plugin: str
    netns: str
    links: list[str]
    elements: int


class RebuiltDocument(TypedDict):
    added: int
    removed: int


class GcDocument(TypedDict):
    dry_run: bool
    namespaces: int  # that live on this machine
    leftovers: list[LeftoverDocument]  # removed from the kernel, or would be
    rebuilt: RebuiltDocument | None
    released: list[AllocationDocument] | None  # or would be; None: ipamd was not reached
    suspected: list[AllocationDocument] | None
    docker: CollectedDocument | None  # None: this host has no driver of Docker's


class _Observation:
    """The namespaces that live, looked up once, at a known moment."""

    def __init__(self) -> None:
        self.boottime_ns = 0
        self._live: tuple[LiveNetns, ...] = ()

    def __call__(self) -> tuple[LiveNetns, ...]:
        if not self.boottime_ns:
            # Taken before the look: what began later is not judged by it.
            self.boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            self._live = liveness.observe()
        return self._live


@click.command("gc", epilog=EPILOG, short_help="Take back what dead containers left.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--rebuild", is_flag=True, help="Also restore nftables from the attachment records.")
@common
@pass_choices
def gc(choices: Choices, dry_run: bool, rebuild: bool) -> None:
    """Take back what containers that died left behind: kernel state and addresses; and what Docker has forgotten.

    An address is released when its container's network namespace was seen gone twice, with ipamd's grace in between
    ([reclaim] grace_s); until then it is listed as suspected. Needs root.
    """
    if dry_run and rebuild:
        raise click.UsageError("--rebuild changes the kernel, so it does not go with --dry-run; choose one")
    if os.geteuid() != 0:
        raise Failure("only root sees every network namespace; run this with sudo", Status.NOT_PERMITTED)
    observation = _Observation()
    with _kernel_errors():
        found = _sweep_kernel(observation, dry_run, rebuild)
        live = observation()
    found["docker"] = shim.collect(dry_run)
    # Failing to reach ipamd must not keep the kernel from being put right, and what was done is told all the same.
    try:
        with choices.ipamd() as ipamd:
            _report(ipamd, found, observation.boottime_ns, live)
    except Failure:
        _print(choices, found)
        raise
    _print(choices, found)


def _sweep_kernel(observation: _Observation, dry_run: bool, rebuild: bool) -> GcDocument:
    run_dir = paths.run_dir(os.environ)
    records = Records(run_dir)

    def lock(container_id: str, ifname: str) -> AttachmentLock:
        return attachment_lock(run_dir, container_id, ifname, "netloom gc", _LOCK_DEADLINE_S)

    with Session() as host:
        failures: list[Exception] = []
        gone = leftovers.sweep(host, records, lock, observe=observation, dry_run=dry_run, failures=failures)
        if not dry_run:
            attach.prune()
        rebuilt: RebuiltDocument | None = None
        # An address may have got a new holder already, whose elements are then the same: those come back here.
        if rebuild or (gone and not dry_run):
            added, removed = records.rebuild(host)
            rebuilt = RebuiltDocument(added=added, removed=removed)
        if failures:
            raise failures[0]
    return GcDocument(
        dry_run=dry_run,
        namespaces=len(observation()),
        leftovers=sorted((_leftover(record) for record in gone), key=lambda entry: entry["container_id"]),
        rebuilt=rebuilt,
        released=None,
        suspected=None,
        docker=None,
    )


def _report(ipamd: Client, found: GcDocument, boottime_ns: int, live: tuple[LiveNetns, ...]) -> None:
    with open(_BOOT_ID, encoding="ascii") as stream:
        boot_id = stream.read().strip()
    at = ipam_pb2.Instant(boot_id=boot_id, boottime_ns=boottime_ns)
    namespaces = [ipam_pb2.LiveNetns(inode=netns.inode, cookie=netns.cookie) for netns in live]
    answer = ipamd.report_liveness(at, namespaces, found["dry_run"])
    found["released"] = [documents.allocation(entry) for entry in answer.released]
    found["suspected"] = [documents.allocation(entry) for entry in answer.suspected]


@contextmanager
def _kernel_errors() -> Iterator[None]:
    try:
        yield
    except KernelError as error:
        raise Failure(f"the kernel refused: {error}; nothing was released") from None
    except CniError as error:
        raise Failure(f"{error}; nothing was released, try again") from None
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


def _print(choices: Choices, found: GcDocument) -> None:
    if choices.as_json:
        output.document(dict(found))
        return
    would = "would be " if found["dry_run"] else ""
    output.line(f"living network namespaces: {found['namespaces']}")
    if found["leftovers"]:
        output.line(f"{would}removed from the kernel:")
        output.table(
            ("CONTAINER", "INTERFACE", "NETWORK", "PLUGIN", "LINKS", "ELEMENTS", "NAMESPACE"),
            [
                (
                    entry["container_id"],
                    entry["ifname"],
                    entry["network"],
                    entry["plugin"],
                    ",".join(entry["links"]),
                    str(entry["elements"]),
                    entry["netns"],
                )
                for entry in found["leftovers"]
            ],
            ("ELEMENTS",),
        )
    if found["rebuilt"]:
        output.line(
            f"nftables restored from the attachment records: {found['rebuilt']['added']} elements were missing, "
            f"{found['rebuilt']['removed']} belonged to nobody"
        )
    if found["docker"]:
        shim.print_collected(found["docker"], would)
    for title, allocations in ((f"{would}released", found["released"]), ("suspected", found["suspected"])):
        if allocations:
            output.line(f"{title}:")
            addresses.print_allocations(allocations, reasons=True)
        elif allocations is not None:
            output.line(f"{title}: nothing")


def _leftover(record: Record) -> LeftoverDocument:
    return LeftoverDocument(
        network=record.key.network,
        container_id=record.key.container_id,
        ifname=record.key.ifname,
        plugin=record.key.plugin,
        netns=record.netns,
        links=list(record.links),
        elements=len(record.elements),
    )
