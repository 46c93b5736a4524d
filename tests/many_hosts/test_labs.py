"""The labs of docs/labs with several hosts, command by command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import pytest

from tests.docker import lab
from tests.hosts import ROOT, Host
from tests.many_hosts.fleet import Netd
from tests.many_hosts.pods import Pods

pytestmark = pytest.mark.kernel

LABS = ("flannel-vxlan", "flannel-host-gw")
BIN = "/run/lab"


def prepare(host: Host) -> None:
    """The programs that a shell of the lab finds: ours, and busybox's ping, which a host may lack."""
    directory = host.path(BIN)
    directory.mkdir()
    for name, module in (("netloom", "cli"), ("netd", "netd")):
        program = directory / name
        program.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m {module} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    (directory / "ping").symlink_to("/bin/busybox")


def run(name: str, hosts: Mapping[str, Host], environment: Mapping[str, str] | None = None) -> None:
    """Executes a lab."""
    variables = {**os.environ, "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", **(environment or {})}

    def execute(host: str, command: str) -> str:
        return hosts[host].run(["sh", "-c", f"{{ {command}\n}} 2>&1"], env=variables, cwd="/", check=False).stdout

    lab.run(lab.LABS / f"{name}.md", execute)


class _Hosts(Pods):
    """Two hosts with ipamd and netd, whose pid is in /run/netd.pid."""

    def __init__(self, **netd_keys: object) -> None:
        super().__init__(segments=(0, 0))
        self._keys = netd_keys

    def configure(self, host: Host, **netd_keys: object) -> None:
        keys = {**self._keys, "subnets": [], **netd_keys}  # in this order in the file
        number = self.hosts.index(host) + 1
        host.start_ipamd(
            store={"kind": "etcd"},
            etcd={"endpoints": list(self.etcd.endpoints)},
            netd={**keys, "interface": "eth0", "public_ip": [self.underlay_address(number)]},
        )

    def start(self) -> None:
        super().start()
        for netd in self.netds:
            prepare(netd.host)
            _write_pid(netd)

    def run(self, name: str) -> None:
        """Executes a lab here."""
        etcdctl = {"ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": ",".join(self.etcd.endpoints)}
        run(name, {host.name: host for host in self.hosts}, etcdctl)


def _write_pid(netd: Netd) -> None:
    netd.host.path("/run/netd.pid").write_text(f"{netd.pid}\n")


def test_flannel_vxlan() -> None:
    with _Hosts() as hosts:
        hosts.start()
        config = '{"Network": "10.2.0.0/16", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}'
        hosts.etcd.etcdctl("put", "/coreos.com/network/config", config)
        for number, subnet in ((1, "10.2.33"), (2, "10.2.44")):
            lease = f'{{"PublicIP": "{hosts.underlay_address(number)}", "BackendType": "vxlan"}}'
            hosts.etcd.etcdctl("put", f"/coreos.com/network/subnets/{subnet}.0-24", lease)
            directory = hosts.host(number).path("/run/flannel")
            directory.mkdir()
            (directory / "subnet.env").write_text(
                f"FLANNEL_NETWORK=10.2.0.0/16\nFLANNEL_SUBNET={subnet}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
            )
        hosts.run("flannel-vxlan")


def test_flannel_host_gw() -> None:
    with _Hosts(backend="host-gw", flannel_network="pods") as hosts:
        hosts.start()
        hosts.run("flannel-host-gw")
