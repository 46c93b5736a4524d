"""A node that others may soon remove, as it cannot renew its lease: in real time, with an etcd that is really away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from ipamd.client import Client, IpamError
from tests.cluster.daemons import Node
from tests.etcd import EtcdCluster
from tests.ipamd.daemon import ROOT, cidrs, key, spec, wait_for

pytestmark = pytest.mark.kernel

# The shortest lease, and the shortest grace that goes with it.
HASTY = "[cluster]\nlease_s = 5\nreclaim_nodes_after_s = 20\n"
REFUSAL = "etcd could not be reached for so long that other nodes may soon take what this one holds"


class Hasty(Node):
    """Takes a grace of less than a minute."""

    def spawn(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NETLOOM_RUN_DIR": f"{self.directory}/run", "PYTHONPATH": ROOT}
        argv = [sys.executable, "-m", "tests.cluster.hasty", "--config", str(self.config)]
        with open(self.log, "ab") as log:
            return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=log, stdin=subprocess.DEVNULL)


def why_not(client: Client) -> str:
    """Why a new address is refused, with the code; "" where it is given, and released again."""
    try:
        client.allocate(key("new"), pools=["blue"])
    except IpamError as error:
        return f"{error.code.name}: {error.message}"
    client.release(key("new"))
    return ""


def test_half_of_the_grace_without_etcd_ends_the_giving_of_addresses(tmp_path: Path) -> None:
    """Not the end of what was given, nor releases; also after a restart, and until etcd is back."""
    with EtcdCluster() as etcd, Hasty(tmp_path, "a", etcd.sockets, HASTY) as a:
        with a.client() as client:
            client.create_pool("blue", spec("10.1.0.0/24", cooldown_ms=0))
            first = cidrs(client.allocate(key("first"), pools=["blue"]))
            client.allocate(key("second"), pools=["blue"])
            etcd.kill("m1")
            wait_for("the loss is seen", lambda: not client.status().etcd_reachable)
            # etcd away is no reason by itself: the address comes from the node's own block.
            at_first = why_not(client)
            assert at_first == "" or "the lease could not be renewed" in a.log.read_text()
            wait_for("the end of giving", lambda: why_not(client) != "")
            refused = why_not(client)
            assert refused.startswith(f"{grpc.StatusCode.UNAVAILABLE.name}: ")
            assert REFUSAL in refused
            with pytest.raises(IpamError, match=REFUSAL):
                client.status(pools=["blue"])
            again = client.allocate(key("first"), pools=["blue"])
            assert (again.created, cidrs(again)) == (False, first)
            client.release(key("second"))
        a.kill()
        a.start()
        with a.client() as client:
            assert REFUSAL in why_not(client)
            etcd.start("m1")
            wait_for("addresses again", lambda: why_not(client) == "")
            client.status(pools=["blue"])
            assert cidrs(client.allocate(key("first"), pools=["blue"])) == first
