"""Taking away all that netd made: for who goes back to another way between hosts."""

from __future__ import annotations

from kernel import link, route
from kernel.session import Session
from netd import flannel_rules
from netd.found import PROTOCOL, Found


def remove() -> int:
    """Every route of our protocol and every device with our alias; how many those were."""
    flannel_rules.converge(None)
    with Session() as session:
        routes = [one for version in (4, 6) for one in route.all_routes(session, version, protocol=PROTOCOL)]
        for one in routes:
            route.delete(session, one)
        found = Found()
        found.read(session)
        devices = list(found.indexes)
        for name in devices:
            link.delete(session, name)
    return len(routes) + len(devices)
