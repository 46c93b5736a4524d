"""Three hosts (or more) with netd, on one segment or on two with a router between them.

    with Fleet(backend="vxlan", underlay=6) as fleet:
        fleet.start()                              # netd on each host
        one = fleet.container(1)                   # on host1: bridge plugin, addresses by host-local
        two = fleet.container(2)
        one.ping(two.ipv4)

Host n has the number 10 + n on its segment and the subnets 10.2.n.0/24 and fd02:n::/64. Every host has the same
configuration with all as [[peer]]; with `etcd` each says only its own subnets, and peers come from there.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from netd.client import Client, NodeError
from protos.node.v1 import node_pb2 as pb
from tests.etcd import EtcdCluster
from tests.hosts import IPV6, PATIENCE_S, ROOT, Host, HostError, Netns, wait_until
from tests.underlay import Underlay

LEASE_S = 5
SOCKET = "/run/netloom/netd.sock"
CONFIG = "/etc/netloom/netloom.toml"


class Netd:
    """netd as a process of a host. Its output goes to `log()`."""

    def __init__(self, host: Host, arguments: Sequence[str] = ()) -> None:
        self.host = host
        self.arguments = arguments
        self._log = host.directory / "netd.log"
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise HostError("netd does not run")
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def spawn(self) -> None:
        argv = [sys.executable, "-m", "netd", "--config", CONFIG, *self.arguments]
        with self._log.open("a", encoding="utf-8") as log:
            self._process = self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start(self) -> None:
        """Returns once it answers. Raises HostError with the log when it ends before."""
        self.spawn()
        self.wait()

    def wait(self) -> None:
        wait_until(self._answers, "netd's answer", lambda: self.log()[-4000:])

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def reload(self) -> None:
        """SIGHUP; does not wait."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def status(self) -> pb.StatusResponse:
        with Client(str(self.host.path(SOCKET)), PATIENCE_S) as client:
            return client.status()

    def explain(self, address: str) -> pb.ExplainResponse:
        with Client(str(self.host.path(SOCKET)), PATIENCE_S) as client:
            return client.explain(address)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise HostError(f"netd ended with status {self._process.returncode}; its log:\n{self.log()[-4000:]}")
        if not self.host.path(SOCKET).exists():
            return False
        with contextlib.suppress(NodeError):
            return self.status().settled
        return False

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise HostError(f"netd did not end on {number.name}; its log:\n{self.log()[-4000:]}") from None


@dataclass(frozen=True)
class Container:
    """A container on a host: its namespace and its addresses, without lengths."""

    netns: Netns
    id: str
    ipv4: str
    ipv6: str

    def ping(self, address: str, limit_s: float = PATIENCE_S) -> float:
        return self.netns.ping(address, limit_s)


class Pinger:
    """Sends an echo request every 50 ms, from its making until `stop`, which tells how many got no answer."""

    def __init__(self, where: Host | Netns, target: str, interval_s: float = 0.05) -> None:
        script = str(ROOT / "tests/many_hosts/pinger.py")
        self._process = where.popen(
            [sys.executable, "-I", "-S", script, target, str(interval_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "answered\n":
            raise HostError(f"{target} never answered")

    def forget(self) -> None:
        """Only what is sent from now on counts."""
        assert self._process.stdin is not None
        self._process.stdin.write("forget\n")
        self._process.stdin.flush()

    def stop(self) -> tuple[int, int]:
        """(sent, lost)."""
        out, _ = self._process.communicate("\n", timeout=PATIENCE_S)
        sent, lost = map(int, out.split())
        return sent, lost


def assert_loses(
    most: int, containers: Sequence[Container], change: Callable[[], None], undo: Callable[[], None] = lambda: None
) -> None:
    """Between each two of these a change costs so many pings at most.

    Hosts come to it one after the other. On a busy machine that may take longer than so many pings do, so it is made up
    to four times (and undone before each but the first), until it costs no more: what is wrong costs more each time.
    """
    for attempt in range(4):
        if attempt:
            undo()
        pingers = [Pinger(one.netns, other.ipv4) for one in containers for other in containers if one is not other]
        settle()
        change()
        settle(1)
        results = [pinger.stop() for pinger in pingers]
        assert all(sent > 10 for sent, _ in results), results
        if max(lost for _, lost in results) <= most:
            return
    raise HostError(f"wanted {most} lost pings at most, found {results} (sent, lost)")


class Fleet:
    """`underlay`: the family of the addresses that hosts are known by. `segments`: of each host, 0 or 1."""

    def __init__(
        self,
        backend: str = "vxlan",
        underlay: int = 4,
        *,
        segments: Sequence[int] = (0, 0, 0),
        netd: Mapping[str, object] | None = None,
        ipv6_containers: bool = IPV6,
        etcd: bool = False,
        own: tuple[str, ...] = (),
    ) -> None:
        """`own`: further directories that each host has to itself."""
        self._own = own
        self.backend = backend
        self.family = underlay
        self.segments = segments
        self.netd_keys = dict(netd or {})
        self.ipv6_containers = ipv6_containers
        self._with_etcd = etcd
        self.etcd: EtcdCluster
        self._stack = contextlib.ExitStack()
        self.underlays: list[Underlay] = []
        self.hosts: list[Host] = []
        self.netds: list[Netd] = []
        self._containers = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for number in range(max(self.segments) + 1):
                self.underlays.append(
                    stack.enter_context(
                        Underlay(f"underlay{number}", f"192.168.{77 + number}.0/24", f"fd77:{number}::/64")
                    )
                )
            for number, segment in enumerate(self.segments, 1):
                host = stack.enter_context(Host(f"host{number}", own=self._own))
                self.underlays[segment].join(host, 10 + number)
                self.hosts.append(host)
                self.netds.append(Netd(host))
            if len(self.underlays) > 1:
                self._route_between(stack)
            if self._with_etcd:
                self.etcd = stack.enter_context(EtcdCluster(1, underlay=self.underlays[0]))
                for there in self.underlays[1:]:
                    back = ["ip", "route", "add", str(there.ipv4), "via", self.underlays[0].address(254)]
                    self.etcd.members["m1"].host.run(back)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for netd in self.netds:
                sys.stderr.write(f"--- {netd.host.name}\n{netd.log()[-3000:]}\n")
        self._stack.__exit__(kind, error, trace)

    def host(self, number: int) -> Host:
        """host1 is number 1."""
        return self.hosts[number - 1]

    def netd(self, number: int) -> Netd:
        return self.netds[number - 1]

    def underlay_address(self, number: int, family: int = 0) -> str:
        return self.underlays[self.segments[number - 1]].address(10 + number, family or self.family)

    def start(self) -> None:
        """netd on every host, all at once."""
        for netd in self.netds:
            self.configure(netd.host)
            netd.spawn()
        for netd in self.netds:
            netd.wait()

    def configure(self, host: Host, **netd_keys: object) -> None:
        """Writes the host's configuration; a running netd is not told."""
        own = {"node": host.name, "backend": self.backend, **self.netd_keys, **netd_keys}
        tables: list[tuple[str, dict[str, object]]] = [("[netd]", own)]
        if self._with_etcd:
            own = {"subnets": self.subnets(self.hosts.index(host) + 1), **own}
            if self.family == 6:
                own = {"public_ip": [self.underlay_address(self.hosts.index(host) + 1)], **own}
            tables = [("[netd]", {"interface": "eth0", **own}), ("[etcd]", {"endpoints": list(self.etcd.endpoints)})]
            tables.append(("[cluster]", {"lease_s": LEASE_S}))
        for number, other in enumerate(() if self._with_etcd else self.hosts, 1):
            tables.append(
                (
                    "[[peer]]",
                    {
                        "name": other.name,
                        "address": [self.underlay_address(number)],
                        "subnets": self.subnets(number),
                    },
                )
            )
        text = "\n".join(
            "\n".join([head, *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
            for head, table in tables
        )
        host.path(CONFIG).write_text(f'{text}\n[log]\nlevel = "info"\n', encoding="utf-8")

    def subnets(self, number: int) -> list[str]:
        return [f"10.2.{number}.0/24", *([f"fd02:{number}::/64"] if self.ipv6_containers else [])]

    def container(self, number: int) -> Container:
        """A new container on a host."""
        self._containers += 1
        host, name = self.host(number), f"c{self._containers}"
        netns = host.netns(name)
        conf: dict[str, Any] = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": subnet}] for subnet in self.subnets(number)],
                "routes": [{"dst": "0.0.0.0/0"}, *([{"dst": "::/0"}] if self.ipv6_containers else [])],
            },
        }
        result = host.cni("ADD", "bridge", conf, container_id=name, netns=netns).result()
        addresses = [str(ip["address"]).partition("/")[0] for ip in result["ips"]]
        return Container(
            netns, name, next(a for a in addresses if ":" not in a), next((a for a in addresses if ":" in a), "")
        )

    def all_reach_all(self, containers: Sequence[Container]) -> None:
        """Raises HostError naming the first pair that does not."""
        for one in containers:
            for other in containers:
                if one is not other:
                    one.ping(other.ipv4)
                    if other.ipv6:
                        one.ping(other.ipv6)

    def _route_between(self, stack: contextlib.ExitStack) -> None:
        """A router with number 254 on both segments."""
        router = stack.enter_context(Host("router", plugins=False))
        for number, underlay in enumerate(self.underlays):
            underlay.join(router, 254, f"eth{number}")
        router.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        if IPV6:
            router.run(["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"])
        for host, segment in zip(self.hosts, self.segments, strict=True):
            here, there = self.underlays[segment], self.underlays[1 - segment]
            host.run(["ip", "route", "add", str(there.ipv4), "via", here.address(254)])
            if IPV6:
                host.run(["ip", "-6", "route", "add", str(there.ipv6), "via", here.address(254, 6)])


def routes_of_netd(host: Host, family: int = 4) -> list[dict[str, Any]]:
    """What `ip` shows of netd's protocol."""
    found: list[dict[str, Any]] = json.loads(
        host.run(["ip", f"-{family}", "-j", "route", "show", "proto", "110"]).stdout
    )
    return found


def state_of_netd(host: Host) -> list[str]:
    """Every entry that netd made, one line each, as iproute2 shows them."""
    lines: list[str] = []
    for family in ("-4", "-6"):
        lines += host.run(["ip", family, "route", "show", "proto", "110"]).stdout.splitlines()
    for name in [name for name in host.links() if name.startswith("nl-vx")]:
        lines += [
            f"neigh {line}"
            for line in host.run(["ip", "neigh", "show", "dev", name, "nud", "permanent"]).stdout.splitlines()
        ]
        lines += [
            f"neigh {line}"
            for line in host.run(["ip", "-6", "neigh", "show", "dev", name, "nud", "permanent"]).stdout.splitlines()
        ]
        lines += [f"fdb {line}" for line in host.run(["bridge", "fdb", "show", "dev", name]).stdout.splitlines()]
        lines += [f"address {name} {address}" for address in host.addresses()[name]]
    return sorted({" ".join(line.split()) for line in lines})


def settle(pause_s: float = 0.3) -> None:
    """Lets a running ping show what it would lose."""
    time.sleep(pause_s)
