"""An underlay: a segment that joins hosts, as the switch between real ones does.

    with Underlay() as underlay, Host("host1") as first, Host("host2") as second:
        underlay.join(first, 11)      # eth0: 192.168.77.11/24 and fd77::11/64
        underlay.join(second, 12)
        underlay.cut(first)           # frames vanish, its link stays up: what a broken switch looks like
        underlay.heal(first)
        underlay.unplug(first)        # no carrier
        underlay.plug(first)

It is a namespace of its own with a bridge. The bridge has the addresses .1 and ::1 there, so that programs of `host`
reach all that is joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_network
from types import TracebackType
from typing import Self

from tests.hosts import IPV6, Host, HostError, Netns

_BRIDGE = "segment"


@dataclass(frozen=True, slots=True)
class Port:
    """Where a host is joined. `ipv6` is empty where the machine has no IPv6."""

    number: int
    name: str  # of the port at the bridge
    device: str  # of the other end, inside the host
    ipv4: str  # without its length
    ipv6: str


class Underlay:
    """One segment; use it as a context manager, around the hosts that it joins."""

    def __init__(
        self, name: str = "underlay", ipv4: str = "192.168.77.0/24", ipv6: str = "fd77::/64", mtu: int = 1500
    ) -> None:
        self.host = Host(name, plugins=False)
        self.ipv4, self.ipv6 = ip_network(ipv4), ip_network(ipv6)
        self.mtu = mtu
        self._ports: dict[str, Port] = {}

    def __enter__(self) -> Self:
        self.host.__enter__()
        try:
            # No snooping: without a querier it would drop groups after a while. No learning delay at a port's start.
            options = ["mcast_snooping", "0", "forward_delay", "0"]
            self.host.run(["ip", "link", "add", _BRIDGE, "mtu", str(self.mtu), "up", "type", "bridge", *options])
            for command in self._addressing(1, _BRIDGE):
                self.host.run(command)
        except BaseException:
            self.host.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host.__exit__(kind, error, trace)

    def address(self, number: int, family: int = 4) -> str:
        """The address that a host with this number has, as text."""
        return str((self.ipv4 if family == 4 else self.ipv6)[number])

    def join(self, there: Host | Netns, number: int, device: str = "eth0") -> Port:
        """Gives a host, or a namespace of one, an interface on the segment, with its addresses, up.

        Numbers are from 2. A host that lost its interfaces (`Host.reboot`) is joined again in the same way.
        """
        if number < 2:
            raise HostError(f"number {number}: 1 is the segment's own, hosts begin with 2")
        port = Port(number, f"p{number}", device, self.address(number), self.address(number, 6) if IPV6 else "")
        if self._key(there) in self._ports:  # its other end went with the host's namespace, perhaps not yet
            self.host.run(["ip", "link", "delete", port.name], check=False)
        mtu = ["mtu", str(self.mtu)]
        peer = ["peer", "name", f"{port.name}e", *mtu]
        if isinstance(there, Host):
            peer = ["peer", "name", device, *mtu, "netns", there.netns_path]
        self.host.run(["ip", "link", "add", port.name, "master", _BRIDGE, *mtu, "up", "type", "veth", *peer])
        if isinstance(there, Netns):
            self._hand_over(there, port)
        for command in self._addressing(number, device):
            there.run(command)
        there.run(["ip", "link", "set", device, "up"])
        self._ports[self._key(there)] = port
        return port

    def port(self, there: Host | Netns) -> Port:
        """Where a host was joined."""
        return self._ports[self._key(there)]

    def cut(self, there: Host | Netns) -> None:
        """From now on nothing reaches the host, and nothing comes from it; nobody is told."""
        self.host.run(["ip", "link", "set", self.port(there).name, "nomaster"])

    def heal(self, there: Host | Netns) -> None:
        self.host.run(["ip", "link", "set", self.port(there).name, "master", _BRIDGE])

    def unplug(self, there: Host | Netns) -> None:
        """As `cut`, and the host sees it: its link has no carrier."""
        self.host.run(["ip", "link", "set", self.port(there).name, "down"])

    def plug(self, there: Host | Netns) -> None:
        self.host.run(["ip", "link", "set", self.port(there).name, "up"])

    @staticmethod
    def _key(there: Host | Netns) -> str:
        return f"{there.host.directory}/{there.name}" if isinstance(there, Netns) else str(there.directory)

    def _hand_over(self, there: Netns, port: Port) -> None:
        """By way of the namespace's host."""
        self.host.run(["ip", "link", "set", f"{port.name}e", "netns", there.host.netns_path])
        there.host.run(["ip", "link", "set", f"{port.name}e", "netns", there.path])
        there.run(["ip", "link", "set", f"{port.name}e", "name", port.device])

    def _addressing(self, number: int, device: str) -> list[list[str]]:
        commands = [["ip", "address", "add", f"{self.ipv4[number]}/{self.ipv4.prefixlen}", "dev", device]]
        if IPV6:
            # Nobody waits for duplicate address detection: the numbers are unique.
            address = f"{self.ipv6[number]}/{self.ipv6.prefixlen}"
            commands.append(["ip", "-6", "address", "add", address, "dev", device, "nodad"])
        return commands
