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

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ipamd.client import Client
from tests.hosts import PATIENCE_S, CniCall, Host, HostError, Ipamd, Netns, wait_until
from tests.many_hosts.fleet import LEASE_S, Container, Fleet, Netd

_LATER = 11  # CNI's "try again later"


def conf_of(network: str, ports: Sequence[tuple[int, int]] = (), **wishes: object) -> dict[str, Any]:
    """All that stands in the configuration of a host. `ports`: (of the host, of the container), TCP. `wishes`: what
    else the runtime gives, by capability: ips=["10.0.0.7/24"], mac="02:00:00:00:00:01", bandwidth={...}; but `sticky`
    is the network's own key."""
    conf: dict[str, Any] = {"cniVersion": "1.1.0", "name": network, "type": "netloom"}
    if "sticky" in wishes:
        conf["sticky"] = wishes.pop("sticky")
    if ports:
        mappings = [{"hostPort": host, "containerPort": inside, "protocol": "tcp"} for host, inside in ports]
        wishes["portMappings"] = mappings
    if wishes:
        conf["runtimeConfig"] = wishes
    return conf


def answer(call: Callable[[], CniCall]) -> CniCall:
    """The plugin's last word: like a runtime, asks again where it is told to ask later, as etcd took too long."""
    calls: list[CniCall] = []

    def answered() -> bool:
        calls.append(call())
        return calls[-1].status == 0 or calls[-1].code() != _LATER

    with contextlib.suppress(HostError):
        wait_until(answered, "another answer")
    return calls[-1]


class Pods(Fleet):
    """A fleet whose networks are defined in etcd. `families`: of the underlay's addresses that hosts are known by."""

    def __init__(
        self, families: Sequence[int] = (4,), segments: Sequence[int] = (0, 0, 0), own: tuple[str, ...] = ()
    ) -> None:
        super().__init__("vxlan", families[0], segments=segments, etcd=True, own=own)
        self._families = families
        self.ipamds: dict[int, Ipamd] = {}  # by the host's number
        # By container and interface; the container is the one with the addresses of this interface.
        self._attached: dict[tuple[str, str], tuple[int, Container, dict[str, Any]]] = {}

    def configure(self, host: Host, **netd_keys: object) -> None:
        """With ipamd running, as it writes the one file of both."""
        number = self.hosts.index(host) + 1
        self.ipamds[number] = host.start_ipamd(
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

    def ipamd(self, number: int) -> Client:
        """The API of a host's ipamd; to be closed."""
        return Client(str(self.host(number).path(self.ipamds[number].socket)), PATIENCE_S)

    def until_known(self, network: str) -> None:
        """Until ipamd and netd of every host have heard of the network."""
        for number, netd in enumerate(self.netds, 1):
            wait_until(partial(self._known, number, network), f"{network} on {netd.host.name}", netd.log)

    def _known(self, number: int, network: str) -> bool:
        if network not in self.fabric(number):
            return False
        with self.ipamd(number) as client:
            return network in (one.name for one in client.list_networks())

    def fabric(self, number: int) -> dict[str, Any]:
        """What netd of a host says to plugins, by network."""
        found: dict[str, Any] = json.loads(self.host(number).path("/run/netloom/fabric.json").read_text())["networks"]
        return found

    def pod(self, number: int, network: str, *ports: tuple[int, int], **wishes: object) -> Container:
        """A container on a host, attached to a network; see `conf_of`."""
        self._containers += 1
        host, name = self.host(number), f"{network}-{self._containers}"
        netns = host.netns(name)
        netns.run(["ip", "link", "set", "lo", "up"])
        return self._add(number, netns, name, "eth0", conf_of(network, ports, **wishes))

    def attach(self, pod: Container, network: str, ifname: str) -> Container:
        """Attaches a container to one more network; the same one, with its addresses there."""
        return self._add(self.where(pod), pod.netns, pod.id, ifname, conf_of(network))

    def _add(self, number: int, netns: Netns, name: str, ifname: str, conf: dict[str, Any]) -> Container:
        """ADD. Where it fails, teardown removes the namespace."""
        result = self.ask("ADD", number, conf, container_id=name, netns=netns, ifname=ifname).result()
        addresses = [str(ip["address"]).partition("/")[0] for ip in result["ips"]]
        four, six = ([a for a in addresses if (":" in a) is wanted] for wanted in (False, True))
        made = Container(netns, name, "".join(four), "".join(six))
        self._attached[name, ifname] = number, made, {**conf, "prevResult": result}
        return made

    def ask(self, verb: str, number: int, conf: Mapping[str, Any], **more: Any) -> CniCall:
        """The plugin's `answer`; `more` as `Host.cni` takes it."""
        return answer(partial(self.host(number).cni, verb, "netloom", conf, **more))

    def where(self, pod: Container) -> int:
        """The number of the container's host."""
        return next(number for (name, _), (number, _, _) in self._attached.items() if name == pod.id)

    def check(self, pod: Container) -> None:
        """CHECK of its attachments."""
        for (name, ifname), (number, _, conf) in self._attached.items():
            if name == pod.id:
                call = self.host(number).cni(
                    "CHECK", "netloom", conf, container_id=name, netns=pod.netns, ifname=ifname
                )
                call.ok()

    def release(self, *pods: Container) -> None:
        """DEL of all attachments, and its namespace."""
        for pod in pods:
            for key in [key for key in self._attached if key[0] == pod.id]:
                number, _, conf = self._attached.pop(key)
                self.host(number).cni("DEL", "netloom", conf, container_id=pod.id, netns=pod.netns, ifname=key[1]).ok()
            pod.netns.delete()

    def release_all(self) -> None:
        self.release(*{pod.id: pod for _, pod, _ in self._attached.values()}.values())

    def overlay(self, name: str, *words: str) -> str:
        """Defines an overlay, which every host has heard of then; its VXLAN device's name."""
        self.netloom(1, "network", "create", name, "--type", "overlay", *words)
        self.until_known(name)
        shown = json.loads(self.netloom(1, "network", "show", name, "--json").stdout)
        return f"nl-vx{shown['vni']}"

    def until_fast(self, network: str, *numbers: int) -> None:
        """Until an overlay's containers on these hosts are on the fast path, or netd says why not. At a port that is
        about to join the kernel may lose a packet."""
        for netd in (self.netd(number) for number in numbers):
            wait_until(partial(_is_fast, netd, network), f"the fast path of {network}", netd.log)

    def until_ways(self, *pods: Container) -> None:
        """Until every host has a way to each of these: a host may have got its block just now."""
        for pod in pods:
            for address in filter(None, (pod.ipv4, pod.ipv6)):
                for number, netd in enumerate(self.netds, 1):
                    if number != self.where(pod):
                        wait_until(partial(self.knows_way, number, address), f"a way to {address}", netd.log)

    def knows_way(self, number: int, address: str) -> bool:
        """Whether a host's netd made a route to the address."""
        return self.goes_by(self.host(number), address)

    @staticmethod
    def goes_by(host: Host, address: str, device: str = "") -> bool:
        """Whether a host has a route of netd's to the address, over this device."""
        found = host.run(["ip", "-j", "route", "get", address, "fibmatch"], check=False).stdout
        return any(one.get("protocol") == "110" and device in ("", one["dev"]) for one in json.loads(found or "[]"))


def _is_fast(netd: Netd, network: str) -> bool:
    return any(one.fast or one.fast_problem for one in netd.status().overlays if one.name == network)


def outside_of(pods: Pods) -> Netns:
    """A machine on the underlay that is no host of ours."""
    underlay = pods.underlays[0]
    beyond = underlay.host.netns("beyond")
    underlay.join(beyond, 99)
    beyond.run(["ip", "link", "set", "lo", "up"])
    return beyond
