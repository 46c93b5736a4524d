"""Docker hosts of one cluster: an etcd, and an ipamd, netd, workers and shim on each; a host more without Docker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.docker.engine import HASTY, Docker
from tests.etcd import EtcdCluster
from tests.hosts import Host, HostError, Ipamd
from tests.many_hosts.fleet import LEASE_S, Netd
from tests.runtimes import cgroups
from tests.underlay import Underlay

_FIRST = 11  # the first host's number on the underlay


@dataclass
class Cluster:
    """`dockers` and `netds` by host."""

    underlay: Underlay
    etcd: EtcdCluster
    dockers: dict[str, Docker] = field(default_factory=dict)
    netds: dict[str, Netd] = field(default_factory=dict)

    def join(self, host: Host, stack: contextlib.ExitStack) -> Ipamd:
        """A host that has no ipamd yet becomes one of the cluster's; netd ends with the stack."""
        self.underlay.join(host, _FIRST + len(self.netds))
        ipamd = host.start_ipamd(
            store={"kind": "etcd"},
            etcd={"endpoints": list(self.etcd.endpoints)},
            cluster={"lease_s": LEASE_S},
            netd={"interface": "eth0"},
            reclaim={"grace_s": 1, "interval_s": 1},
        )
        netd = self.netds[host.name] = Netd(host)
        netd.start()
        stack.callback(netd.stop)
        return ipamd

    def power_off(self, name: str) -> None:
        """The power of a host with Docker goes, with all that runs there; nothing comes from it any more."""
        docker = self.dockers[name]
        docker.shim = docker.dockerd = None
        with contextlib.suppress(HostError):  # which names who was still running
            docker.host.reboot()

    def power_on(self, name: str) -> None:
        """It comes back, with everything that starts at boot."""
        docker = self.dockers[name]
        for container in docker.host.path("/var/lib/docker/containers").iterdir():
            cgroups.forget(container.name)
        self.underlay.join(docker.host, _FIRST + list(self.netds).index(name))
        docker.ipamd.start()
        docker.begin_service()
        self.netds[name].start()
        docker.host.path("/run/docker/plugins").mkdir(parents=True)
        docker.start_shim()
        docker.start_dockerd()


@contextlib.contextmanager
def clustered(launcher: Path, dockerd: Mapping[str, Sequence[str]], subnet: str = "") -> Iterator[Cluster]:
    """`dockerd`: arguments by host. `subnet`: the underlay's."""
    with contextlib.ExitStack() as stack:
        underlay = stack.enter_context(Underlay("cluster", subnet) if subnet else Underlay("cluster"))
        made = Cluster(underlay, stack.enter_context(EtcdCluster(1, underlay=underlay)))
        for name, arguments in dockerd.items():
            docker = Docker(name, launcher, list(arguments))
            docker.shim_module = HASTY
            docker.is_patient = True
            stack.enter_context(docker)
            docker.ipamd.stop()
            docker.ipamd = made.join(docker.host, stack)
            made.dockers[name] = docker
        yield made
