"""Taking away all that netd made: for who goes back to another way between hosts."""

from __future__ import annotations

import socket

from ipamd.errors import StartError
from kernel import fastpath, link, route
from kernel.session import Session
from netd import flannel_rules, strangers
from netd.found import PROTOCOL, Found


def remove(socket_path: str, run_dir: str) -> int:
    """Every route of our protocol and every device with our alias; how many those were.

    Raises StartError while a netd serves on that socket, which would put all of it back.
    """
    if _serves(socket_path):
        raise StartError("netd runs, and would put everything back; stop it first: systemctl stop netloom-netd")
    flannel_rules.converge(None)
    strangers.remove(run_dir)
    with Session() as session:
        fastpath.detach_all(session, places=True)
        routes = [one for version in (4, 6) for one in route.all_routes(session, version, protocol=PROTOCOL)]
        for one in routes:
            route.delete(session, one)
        found = Found()
        found.read(session)
        devices = list(found.indexes)
        for name in devices:
            link.delete(session, name)
    return len(routes) + len(devices)


def _serves(socket_path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(socket_path)
        except OSError:
            return False
        return True
