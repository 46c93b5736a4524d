"""Two Docker hosts of one cluster: an etcd, and an ipamd, netd, workers and shim on each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.docker.engine import Docker
from tests.etcd import EtcdCluster
from tests.many_hosts.fleet import LEASE_S, Netd
from tests.underlay import Underlay

FIRST = 11  # host1's number on the underlay


@contextlib.contextmanager
def clustered(
    launcher: Path, dockerd: Mapping[str, Sequence[str]], subnet: str = ""
) -> Iterator[tuple[dict[str, Docker], dict[str, Netd]]]:
    """`dockerd`: arguments by host. `subnet`: the underlay's."""
    with contextlib.ExitStack() as stack:
        underlay = stack.enter_context(Underlay("cluster", subnet) if subnet else Underlay("cluster"))
        etcd = stack.enter_context(EtcdCluster(1, underlay=underlay))
        hosts, netds = {}, {}
        for number, (name, arguments) in enumerate(dockerd.items(), FIRST):
            docker = stack.enter_context(Docker(name, launcher, list(arguments)))
            underlay.join(docker.host, number)
            docker.ipamd.stop()
            docker.ipamd = docker.host.start_ipamd(
                store={"kind": "etcd"},
                etcd={"endpoints": list(etcd.endpoints)},
                cluster={"lease_s": LEASE_S},
                netd={"interface": "eth0"},
                pools={"cooldown_s": 0},
                reclaim={"grace_s": 1, "interval_s": 1},
            )
            netds[name] = Netd(docker.host)
            netds[name].start()
            stack.callback(netds[name].stop)
            hosts[name] = docker
        yield hosts, netds
