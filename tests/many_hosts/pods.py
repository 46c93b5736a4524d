"""Hosts with all of Netloom: one etcd, ipamd and netd on each, and containers by the plugin netloom.

with Pods() as pods:
    pods.start()
    pods.netloom(1, "network", "create", "pods", "--subnet", "10.2.0.0/16", "--block", "24")
    pods.until_known("pods")
    one, two = pods.pod(1, "pods"), pods.pod(2, "pods")
    one.ping(two.ipv4)
    pods.release(one)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from tests.hosts import Host, HostError, Netns, wait_until
from tests.many_hosts.fleet import LEASE_S, Container, Fleet


def conf_of(network: str, ports: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
    """All that stands in the configuration of a host. `ports`: (of the host, of the container), TCP."""
    conf: dict[str, Any] = {"cniVersion": "1.1.0", "name": network, "type": "netloom"}
    if ports:
        mappings = [{"hostPort": host, "containerPort": inside, "protocol": "tcp"} for host, inside in ports]
        conf["runtimeConfig"] = {"portMappings": mappings}
    return conf


class Pods(Fleet):
    """A fleet whose networks are defined in etcd. `families`: of the underlay's addresses that hosts are known by."""

    def __init__(
        self, families: Sequence[int] = (4,), segments: Sequence[int] = (0, 0, 0), own: tuple[str, ...] = ()
    ) -> None:
        super().__init__("vxlan", families[0], segments=segments, etcd=True, own=own)
        self._families = families
        self._confs: dict[str, tuple[int, Container, dict[str, Any]]] = {}

    def configure(self, host: Host, **netd_keys: object) -> None:
        """With ipamd running, as it writes the one file of both."""
        number = self.hosts.index(host) + 1
        host.start_ipamd(
            store={"kind": "etcd"},
            etcd={"endpoints": list(self.etcd.endpoints)},
            cluster={"lease_s": LEASE_S},
            netd={
                "interface": "eth0",
                "public_ip": [self.underlay_address(number, family) for family in self._families],
                **netd_keys,
            },
            log={"level": "info"},
        )

    def netloom(self, number: int, *words: str) -> subprocess.CompletedProcess[str]:
        """The command on a host; it has to succeed."""
        done = self.try_netloom(number, *words)
        if done.returncode != 0:
            raise HostError(f"netloom {' '.join(words)}: {done.stdout}{done.stderr}")
        return done

    def try_netloom(self, number: int, *words: str) -> subprocess.CompletedProcess[str]:
        return self.host(number).run([sys.executable, "-m", "cli", *words], check=False)

    def until_known(self, network: str) -> None:
        """Until ipamd and netd of every host have heard of the network."""
        for number, netd in enumerate(self.netds, 1):
            wait_until(partial(self._known, number, network), f"{network} on {netd.host.name}", netd.log)

    def _known(self, number: int, network: str) -> bool:
        return network in self.fabric(number) and self.try_netloom(number, "network", "show", network).returncode == 0

    def fabric(self, number: int) -> dict[str, Any]:
        """What netd of a host says to plugins, by network."""
        found: dict[str, Any] = json.loads(self.host(number).path("/run/netloom/fabric.json").read_text())["networks"]
        return found

    def pod(self, number: int, network: str, *ports: tuple[int, int]) -> Container:
        """A container on a host, attached to a network."""
        self._containers += 1
        host, name = self.host(number), f"{network}-{self._containers}"
        netns = host.netns(name)
        netns.run(["ip", "link", "set", "lo", "up"])
        conf = conf_of(network, ports)
        result = host.cni("ADD", "netloom", conf, container_id=name, netns=netns).result()
        addresses = [str(ip["address"]).partition("/")[0] for ip in result["ips"]]
        four, six = ([a for a in addresses if (":" in a) is wanted] for wanted in (False, True))
        made = Container(netns, name, "".join(four), "".join(six))
        self._confs[name] = number, made, {**conf, "prevResult": result}
        return made

    def check(self, pod: Container) -> None:
        """CHECK of its attachment."""
        number, _, conf = self._confs[pod.id]
        self.host(number).cni("CHECK", "netloom", conf, container_id=pod.id, netns=pod.netns).ok()

    def release(self, *pods: Container) -> None:
        """DEL, and its namespace."""
        for pod in pods:
            number, _, conf = self._confs.pop(pod.id)
            self.host(number).cni("DEL", "netloom", conf, container_id=pod.id, netns=pod.netns).ok()
            pod.netns.delete()

    def release_all(self) -> None:
        self.release(*[pod for _, pod, _ in self._confs.values()])

    def until_ways(self, *pods: Container) -> None:
        """Until every host has a way to each of these: a host may have got its block just now."""
        for pod in pods:
            for address in filter(None, (pod.ipv4, pod.ipv6)):
                for number, netd in enumerate(self.netds, 1):
                    if number != self._confs[pod.id][0]:
                        wait_until(partial(self.knows_way, number, address), f"a way to {address}", netd.log)

    def knows_way(self, number: int, address: str) -> bool:
        """Whether a host's netd made a route to the address."""
        return self.goes_by(self.host(number), address)

    @staticmethod
    def goes_by(host: Host, address: str, device: str = "") -> bool:
        """Whether a host has a route of netd's to the address, over this device."""
        found = host.run(["ip", "-j", "route", "get", address, "fibmatch"], check=False).stdout
        return any(one.get("protocol") == "110" and device in ("", one["dev"]) for one in json.loads(found or "[]"))


def outside_of(pods: Pods) -> Netns:
    """A machine on the underlay that is no host of ours."""
    underlay = pods.underlays[0]
    beyond = underlay.host.netns("beyond")
    underlay.join(beyond, 99)
    beyond.run(["ip", "link", "set", "lo", "up"])
    return beyond
