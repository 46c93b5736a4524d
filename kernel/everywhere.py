"""What the interfaces of all containers on this machine look like, for checks; only root sees them all."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kernel import addr, link, liveness, netlink
from kernel.deleter import Deleter


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address on an interface in a network namespace."""

    ip: str  # "10.1.0.2"
    netns_inode: int
    ifname: str


@dataclass(frozen=True, slots=True)
class _Here:
    """A Door to the namespace that the thread is in."""

    rtnl: netlink.Socket
    deleter: Deleter | None = None


def addresses() -> list[InterfaceAddress]:
    """Every address of every interface in every namespace, the caller's own among them; loopback's are left out.

    Raises:
        KernelError: a namespace's interfaces could not be read, or a process hides its namespace.
    """
    own = _addresses_here(os.stat("/proc/thread-self/ns/net").st_ino)
    return own + [found for namespace in liveness.visit_others(_addresses_here) for found in namespace]


def _addresses_here(inode: int) -> list[InterfaceAddress]:
    rtnl = netlink.Socket(netlink.ROUTE)
    try:
        door = _Here(rtnl)
        names = {one.index: one.name for one in link.all_links(door)}
        return [
            InterfaceAddress(str(one.interface.ip), inode, names.get(one.index, "?"))
            for one in addr.all_addresses(door)
            if names.get(one.index) != "lo"
        ]
    finally:
        rtnl.close()
