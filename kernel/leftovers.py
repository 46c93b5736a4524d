"""What containers that died left in the host's kernel: nftables elements, host links, records, an idle bridge."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from ipaddress import ip_network

from kernel import deleter, link, liveness, nft
from kernel.liveness import LiveNetns
from kernel.nft import Element
from kernel.record import Record, Records
from kernel.session import Session

BRIDGE_MARK = "made by netloom"  # the alias of a bridge that is ours to delete
NETD_MARK = "netloom netd"  # that of netd's devices: one on a bridge is there for the others, not for itself

Lock = Callable[[str, str], AbstractContextManager[object]]


def sweep(
    host: Session,
    records: Records,
    lock: Lock,
    *,
    observe: Callable[[], Iterable[LiveNetns]] = liveness.observe,
    dry_run: bool = False,
    only: Callable[[Record], bool] = lambda _: True,
    failures: list[Exception],
) -> list[Record]:
    """Remove what belongs to attachments whose namespace is gone.

    The records are listed before the namespaces are, so one of an ADD that is under way is never taken for dead.

    Args:
        host: the host's namespace.
        records: the host's records.
        lock: the attachment's lock, from (container id, ifname), held while its things are removed.
        observe: lists every namespace that lives.
        dry_run: only say what would be removed.
        only: which records to look at.
        failures: what kept a record from being removed is appended; it keeps nobody else's here.

    Returns:
        The records of the dead.
    """
    candidates = [record for record in records.all() if only(record)]
    living = set(observe()) if candidates else set()
    cookies = {one.cookie for one in living if one.cookie}
    inodes = {one.inode for one in living}
    unidentified = {one.inode for one in living if not one.cookie}
    gone = []
    for record in candidates:
        if not record.netns_inode and not record.netns_cookie:
            continue
        if record.netns_cookie:
            alive = record.netns_cookie in cookies or record.netns_inode in unidentified
        else:
            alive = record.netns_inode in inodes
        if alive:
            continue
        try:
            if dry_run or _remove(host, records, record, lock):
                gone.append(record)
        except Exception as error:  # noqa: BLE001 - the caller is to know, after the others
            failures.append(error)
    if not dry_run:
        from kernel.ports import Ports  # noqa: PLC0415 - no plugin's request comes here

        Ports(records).prune()
        for name in sorted({record.bridge for record in gone if record.bridge}):
            delete_idle_bridge(host, records, name)
    return gone


def _remove(host: Session, records: Records, record: Record, lock: Lock) -> bool:
    with lock(record.key.container_id, record.key.ifname):
        if records.read(record.key) != record:
            return False  # a DEL or a newer ADD came meanwhile
        discard(host, records, record)
    return True


def discard(host: Session, records: Records, record: Record) -> None:
    """Remove all that a record names, then the record. A failure leaves it, so that a second attempt knows of it; what
    opens anything to the container is gone even then, unless it is connected still."""
    for name in record.links:
        delete_port(host, name)
    try:
        for path in record.files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        forget_sources(host, record)
    except Exception:
        records.take_out(host, record)
        raise
    records.remove(host, record)
    if any(element.data for element in record.elements):  # of maps: published ports
        _give_ports_back(host, records, record)


def forget_sources(host: Session, record: Record) -> None:
    """Take an attachment's addresses out of their zone, where firewalld runs; but none that is another's by now."""
    if not record.firewalld_zone:
        return
    from kernel import firewalld  # noqa: PLC0415 - few hosts have it, and every cold process would pay for the import

    with firewalld.connected() as asked:
        if asked is not None:
            for source in sources(record, lambda element: not nft.is_anothers(host, element)):
                asked.remove_source(record.firewalld_zone, source)


def sources(record: Record, which: Callable[[Element], bool] = lambda _: True) -> list[str]:
    """An attachment's addresses as firewalld has them, "10.1.0.2/32"; `which` looks at the element of each."""
    accepted = (element for element in record.elements if element.set in ("accept4", "accept6"))
    return [str(ip_network(element.key[0])) for element in accepted if which(element)]


def _give_ports_back(host: Session, records: Records, record: Record) -> None:
    """What follows once the record is gone: its claims end, another network of the same container may have the ports
    now, and UDP clients must not go on sending to where it was."""
    from kernel import conntrack, ports  # noqa: PLC0415 - only who has published ports pays for them

    for key in ports.Ports(records).release(record):
        records.restore(host, key)
    targets = {
        (one.key[0], int(one.key[2])) for one in record.elements if one.set[:-1] == "published" and "udp" in one.key
    }
    if targets:
        conntrack.forget_target(host, targets)


def delete_port(host: Session, name: str) -> bool:
    """Delete a link of one attachment, if it is there and of a kind that we make: the host's end of a veth pair, or
    an ifb device. True where it did; a veth's other end is gone with it."""
    found = link.find(host, name)
    if found is None or found.kind not in ("veth", "ifb"):
        return False
    deleter.delete(host, found)
    return True


def delete_idle_bridge(host: Session, records: Records, name: str) -> bool:
    """Delete a bridge that Netloom made, once it has no port but netd's and no attachment wants it; True where it did.

    ADD writes its record before it looks for the bridge, and no record is written while we hold the records.
    """
    with records.hold():
        bridge = link.find(host, name)
        if bridge is None or bridge.alias != BRIDGE_MARK:
            return False
        if any(port.kind != "vxlan" or port.alias != NETD_MARK for port in link.all_links(host, bridge.index)):
            return False
        if any(record.bridge == name for record in records.all()):
            return False
        return link.delete(host, name)
