"""An attachment's record, once for all plugins: interface plugins and those chained after them keep one each.

The record is on disk before the kernel is touched; from it DEL and GC know what there is without asking anybody.
"""

import dataclasses
import hashlib

from cni.failures import Failures, note
from cni.living import Observer
from cni.request import Request
from cni.undo import Undo
from kernel import leftovers, paths
from kernel.record import Key, Record, Records
from kernel.session import Session
from telemetry import trace

_LONGEST_OWNER = 127  # bytes
_CONTAINER_ID = 64  # characters of it that stand in a comment


def key(request: Request) -> Key:
    """Whose record."""
    return Key(request.network, request.container_id, request.ifname, request.plugin)


def owner(request: Request) -> str:
    """The comment of an attachment's nftables elements: another for each, also where names are longer than the 127
    bytes that the kernel keeps of it."""
    whole = f"{request.network} {request.container_id} {request.ifname}"
    if len(whole) <= _LONGEST_OWNER and len(request.container_id) <= _CONTAINER_ID:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    network = f"{request.network[:20]}~{digest}"
    return f"{network} {request.container_id[:_CONTAINER_ID]} {request.ifname}"


@trace.step("record")
def write_record(host: Session, records: Records, record: Record, undo: Undo) -> None:
    """Write the record; `undo` removes it, and its elements from the kernel, as it is on disk by then."""
    undo.push("remove the attachment record", lambda: records.remove(host, records.read(record.key) or record))
    records.write(record)


def complete_record(records: Records, record: Record, wanted: Record) -> Record:
    """Write the record anew with the elements that are wanted, where it was written before they were known.

    Undoing that is the first writing's inverse: two would remove the record although its elements are still there.

    Returns:
        The record as it is now.
    """
    if (wanted.elements, wanted.shared) == (record.elements, record.shared):
        return record
    record = dataclasses.replace(record, elements=wanted.elements, shared=wanted.shared)
    records.write(record)
    return record


def collect(request: Request, host: Session, failures: Failures) -> list[Record]:
    """Remove what attachments of this network and plugin left that the runtime does not know any more.

    An attachment whose interface still lives in its namespace is reported and left alone: its container runs.

    Returns:
        The records that the network had.
    """
    valid = {(attachment.container_id, attachment.ifname) for attachment in request.valid_attachments}
    records = Records(paths.run_dir(request.environment))
    observer = Observer(host)
    found = list(records.of_network(request.network, request.plugin))
    for record in found:
        if (record.key.container_id, record.key.ifname) in valid:
            continue
        if observer.attached(record.netns, record.netns_inode, record.netns_cookie, record.key.ifname):
            note(f"GC: {record.key.container_id} {record.key.ifname} is not in the list, but its interface lives")
            continue
        failures.attempt(leftovers.discard, host, records, record)
    return found
