"""The table of backends, by the name that a configuration has."""

from __future__ import annotations

from collections.abc import Mapping

from netd.fabric import direct, host_gw, none, vxlan
from netd.fabric.base import Backend

BACKENDS: Mapping[str, Backend] = {"vxlan": vxlan, "host-gw": host_gw, "direct": direct, "none": none}
# Those whose hosts have a tunnel's end.
TUNNELS = frozenset(("vxlan", "direct"))
