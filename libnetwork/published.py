"""Published ports: from Docker's bindings to CNI's mappings, one port of the host each. Pure but for asking the kernel
which port is free.

Docker names a port, a range of which one will do, or none, and then the port is ours to choose. Whether somebody else
publishes or listens on a port, the plugin says: its error names the mapping, and another port is tried for that one,
where there is another.
"""

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from cni.errors import Code
from libnetwork.errors import DriverError, PluginError
from libnetwork.messages import PortBinding

_PORTMAP = "com.docker.network.portmap"
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
_TRIES = 32  # of ports of our choice, each of which nobody listened on a moment before
_TAKEN = re.compile(r"\$\.runtimeConfig\.portMappings\[(\d+)\]\.hostPort: ")


class Published(PortBinding, frozen=True):
    """A binding with its one port. `chosen`: by us, as Docker named none."""

    chosen: bool = False


def bindings(given: Mapping[str, Any] | None) -> tuple[PortBinding, ...]:
    """What Docker wants to have published. Raises DriverError."""
    try:
        return msgspec.convert((given or {}).get(_PORTMAP) or (), tuple[PortBinding, ...])
    except msgspec.ValidationError as error:
        raise DriverError(f"{_PORTMAP}: {error}") from error


class Choice:
    """One port for each binding, until all of them are free."""

    def __init__(self, wanted: Sequence[PortBinding]) -> None:
        self._wanted = wanted
        self._taken = [0] * len(wanted)  # how many turned out to be

    def ports(self) -> tuple[Published, ...]:
        """The next ones to try."""
        return tuple(_chosen(*one) for one in zip(self._wanted, self._taken, strict=True))

    def goes_on(self, error: DriverError) -> bool:
        """Whether it was a port that is taken, and there is another for that binding."""
        found = _TAKEN.search(str(error))
        if not isinstance(error, PluginError) or error.code != Code.PORT_UNAVAILABLE or found is None:
            return False
        index = int(found[1])
        if index >= len(self._wanted):
            return False
        self._taken[index] += 1
        one = self._wanted[index]
        return self._taken[index] < (_TRIES if not one.host_port else one.host_port_end - one.host_port + 1)


def _chosen(binding: PortBinding, taken: int) -> Published:
    """The named port, the next of a range, or one on which no process of the host listens."""
    port = binding.host_port + taken
    if not binding.host_port:
        kind = socket.SOCK_STREAM if binding.proto == socket.IPPROTO_TCP else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    return Published(binding.proto, binding.port, binding.host_ip, port, 0, chosen=not binding.host_port)


def mappings(ports: Sequence[PortBinding], host_binding: str) -> Iterator[dict[str, Any]]:
    """CNI's port mappings; `host_binding` is the address of those that name none. Raises DriverError."""
    for one in ports:
        name = _PROTOCOLS.get(one.proto)
        if name is None:
            raise DriverError(f"port {one.port}: protocol {one.proto} is none of tcp, udp, sctp")
        yield {
            "hostPort": one.host_port,
            "containerPort": one.port,
            "protocol": name,
            "hostIP": one.host_ip or host_binding,
        }


def protocol(port: PortBinding) -> str:
    """Its name; the number where it has none."""
    return _PROTOCOLS.get(port.proto, str(port.proto))
