"""What a plugin made: interfaces, addresses, routes, name servers. Values only; cni.versions turns them into JSON.

The fields are those of spec 1.1.0; an older version's result is a subset, or the same in another shape. A field at its
default is absent in JSON. To change one, `msgspec.structs.replace(value, field=…)`.

The classes are msgspec's because defining a frozen dataclass takes 0.75 ms in a process that lives for 40, these 0.03.
"""

import msgspec


class Interface(msgspec.Struct, frozen=True):
    """A link that takes part in the attachment. `sandbox` is the namespace's path, "" for a link of the host."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0
    socket_path: str = ""
    pci_id: str = ""


class IPConfig(msgspec.Struct, frozen=True):
    """An address with its prefix length. `interface` is an index into Result.interfaces; IPAM plugins leave it None."""

    address: str
    gateway: str = ""
    interface: int | None = None


class Route(msgspec.Struct, frozen=True):
    """A route to `dst` (CIDR). Without `gw`, the first gateway of its family in Result.ips is meant."""

    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class DNS(msgspec.Struct, frozen=True):
    """What the container's resolv.conf should hold."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.nameservers or self.domain or self.search or self.options)


class Result(msgspec.Struct, frozen=True):
    """The outcome of ADD."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[IPConfig, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: DNS = DNS()
