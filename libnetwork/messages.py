"""Requests of Docker's two plugin protocols, as docker.io 20.10 sends them, decoded into frozen values.

Docker sends null for what is empty. A key that is not listed here is none that the shim needs; replies are plain
objects, made where they are answered.

Source: moby, libnetwork/drivers/remote/api and libnetwork/ipams/remote/api.
"""

from typing import Any

import msgspec


class Empty(msgspec.Struct, frozen=True):
    """A request without arguments."""


class IpamData(msgspec.Struct, frozen=True, rename="pascal"):
    """One pool of a network. `pool` and `gateway` are CIDRs: "10.0.0.0/16", "10.0.0.1/16"; `address_space` is the name
    that its IPAM driver gave."""

    pool: str = ""
    gateway: str = ""
    aux_addresses: dict[str, str] | None = None
    address_space: str = ""


class CreateNetwork(msgspec.Struct, frozen=True):
    """`docker network create`."""

    network_id: str = msgspec.field(name="NetworkID")
    options: dict[str, Any] | None = msgspec.field(name="Options", default=None)
    ipv4_data: tuple[IpamData, ...] | None = msgspec.field(name="IPv4Data", default=None)
    ipv6_data: tuple[IpamData, ...] | None = msgspec.field(name="IPv6Data", default=None)


class NetworkRef(msgspec.Struct, frozen=True):
    """DeleteNetwork."""

    network_id: str = msgspec.field(name="NetworkID")


class EndpointInterface(msgspec.Struct, frozen=True):
    """Addresses with prefix length; "" where Docker has none."""

    address: str = msgspec.field(name="Address", default="")
    address_ipv6: str = msgspec.field(name="AddressIPv6", default="")
    mac_address: str = msgspec.field(name="MacAddress", default="")


class CreateEndpoint(msgspec.Struct, frozen=True):
    """A container is to be connected; it has no namespace yet."""

    network_id: str = msgspec.field(name="NetworkID")
    endpoint_id: str = msgspec.field(name="EndpointID")
    interface: EndpointInterface | None = msgspec.field(name="Interface", default=None)
    options: dict[str, Any] | None = msgspec.field(name="Options", default=None)


class EndpointRef(msgspec.Struct, frozen=True):
    """DeleteEndpoint, Leave, EndpointOperInfo, RevokeExternalConnectivity."""

    network_id: str = msgspec.field(name="NetworkID")
    endpoint_id: str = msgspec.field(name="EndpointID")


class Join(msgspec.Struct, frozen=True):
    """The container starts; Docker takes the interface from its own namespace afterwards."""

    network_id: str = msgspec.field(name="NetworkID")
    endpoint_id: str = msgspec.field(name="EndpointID")
    sandbox_key: str = msgspec.field(name="SandboxKey", default="")
    options: dict[str, Any] | None = msgspec.field(name="Options", default=None)


class ProgramExternal(msgspec.Struct, frozen=True):
    """The endpoint has the default route now, and publishes ports."""

    network_id: str = msgspec.field(name="NetworkID")
    endpoint_id: str = msgspec.field(name="EndpointID")
    options: dict[str, Any] | None = msgspec.field(name="Options", default=None)


class PortBinding(msgspec.Struct, frozen=True):
    """An entry of com.docker.network.portmap; `proto` is the protocol's number, `host_port` 0 if we are to choose."""

    proto: int = msgspec.field(name="Proto")
    port: int = msgspec.field(name="Port")
    host_ip: str = msgspec.field(name="HostIP", default="")
    host_port: int = msgspec.field(name="HostPort", default=0)
    host_port_end: int = msgspec.field(name="HostPortEnd", default=0)


class RequestPool(msgspec.Struct, frozen=True, rename="pascal"):
    """A network is created; `pool` is empty where we choose."""

    address_space: str = ""
    pool: str = ""
    sub_pool: str = ""
    options: dict[str, str] | None = None
    v6: bool = False


class PoolRef(msgspec.Struct, frozen=True):
    """ReleasePool."""

    pool_id: str = msgspec.field(name="PoolID")


class RequestAddress(msgspec.Struct, frozen=True):
    """`address` is empty where we choose."""

    pool_id: str = msgspec.field(name="PoolID")
    address: str = msgspec.field(name="Address", default="")
    options: dict[str, str] | None = msgspec.field(name="Options", default=None)


class ReleaseAddress(msgspec.Struct, frozen=True):
    """`address` comes without prefix length."""

    pool_id: str = msgspec.field(name="PoolID")
    address: str = msgspec.field(name="Address")


class Asked(msgspec.Struct, frozen=True):
    """AuthZReq and AuthZRes, as far as they are looked at: a request to Docker's own API. Docker sends the body where
    that is JSON of less than 1 MiB."""

    method: str = msgspec.field(name="RequestMethod", default="")
    uri: str = msgspec.field(name="RequestUri", default="")
    body: bytes | None = msgspec.field(name="RequestBody", default=None)


class Collect(msgspec.Struct, frozen=True, rename="pascal"):
    """Netloom.Collect, a call of our own: `netloom gc` wants the comparison with Docker now."""

    dry_run: bool = False
