"""Results in the shape of every spec version, out and in. Pure.

Rules of this file
- Shape, order and omission of keys are those of the reference's Go types (pkg/types/020, 040, 100), so that a result
  can be compared with a reference plugin's field by field. From 1.0.0 on the reference sorts all keys.
- Going down loses what the older shape has no place for: up to 0.2.0 all but the first address of each family, the
  interfaces and the routes of a family without address; up to 0.4.0 the interface fields of 1.1.0. Route fields of
  1.1.0 survive in 0.3.0 to 0.4.0 and everything of 1.1.0 survives in 1.0.0, since Go shares those structs; the
  specification has them in 1.1.0 only, and readers of the older versions ignore them.
- Coming in, addresses are checked and take their canonical spelling (as a round trip through Go's net.IPNet does).
"""

import socket
from collections.abc import Mapping

import msgspec

from cni.config import convert, found, without_nulls
from cni.errors import CniError, Code, shown
from cni.result import DNS, Interface, IPConfig, Result, Route

SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
CURRENT = "1.1.0"

_NESTED = frozenset({"0.1.0", "0.2.0"})  # ip4 and ip6, routes inside
_VERSIONED = frozenset({"0.3.0", "0.3.1", "0.4.0"})  # ips[].version

Document = dict[str, object]


def supported_from(oldest: str) -> tuple[str, ...]:
    """Every version from `oldest` on."""
    return SUPPORTED[SUPPORTED.index(oldest) :]


def at_least(version: str, other: str) -> bool:
    """Whether a supported version is `other` or newer."""
    return SUPPORTED.index(version) >= SUPPORTED.index(other)


def same_shape(version: str, other: str) -> bool:
    """Whether results of two supported versions have one shape."""
    return all((version in shape) is (other in shape) for shape in (_NESTED, _VERSIONED))


def incompatible(version: str, supported: tuple[str, ...]) -> CniError:
    """The answer to a configuration of a version that the plugin does not speak, in the reference's words."""
    listed = " ".join(f'"{one}"' for one in supported)
    return CniError(
        Code.INCOMPATIBLE_VERSION,
        "incompatible CNI versions",
        f"config is {shown(version)}, plugin supports [{listed}]",
    )


def encode(result: Result, version: str) -> Document:
    """The result as JSON-ready values in the shape of `version`; "" means 0.1.0.

    Raises:
        CniError: 1 for an unknown version; 7 where the version needs an address and there is none.
    """
    version = version or "0.1.0"
    if version not in SUPPORTED:
        raise incompatible(version, SUPPORTED)
    if version in _NESTED:
        return _encode_nested(result, version)
    if version in _VERSIONED:
        return _encode_versioned(result, version)
    return _encode_flat(result, version)


def decode(document: object, version: str, at: str = "$") -> Result:
    """The result in `document`: a prevResult, or what a delegate printed.

    Args:
        document: decoded JSON. Its own cniVersion counts; keys that no version knows are ignored.
        version: what to assume where the document has no cniVersion, that is the configuration's version.
        at: the JSON path of `document`, for the text of an error.

    Raises:
        CniError: 7, the text names the JSON path.
    """
    if not isinstance(document, Mapping):
        raise _invalid(at, "expected a result object", document)
    clean = without_nulls(document)
    own = clean.get("cniVersion", "")
    if not isinstance(own, str):
        raise _invalid(f"{at}.cniVersion", "expected str", own)
    own = own or version or "0.1.0"
    if own not in SUPPORTED:
        raise _invalid(f"{at}.cniVersion", f"expected one of {', '.join(SUPPORTED)}", own)
    if own in _NESTED:
        return _decode_nested(convert(clean, _NestedResult, at), at)
    return _decode_flat(convert(clean, _FlatResult, at), at)


def is_ipv6(address: str) -> bool:
    """The family of an address or CIDR, by its spelling."""
    return ":" in address


def canonical_ip(text: str) -> str:
    """An address in canonical spelling; an IPv4-mapped one as IPv4, as Go prints it. Raises ValueError."""
    try:
        if ":" not in text:
            return socket.inet_ntoa(socket.inet_pton(socket.AF_INET, text))
        packed = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError) as error:
        raise ValueError(f"no IP address: {text!r}") from error
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntoa(packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def canonical_cidr(text: str) -> str:
    """An address with prefix length, in canonical spelling, host bits kept. Raises ValueError."""
    address, slash, length = text.partition("/")
    canonical = canonical_ip(address)
    if not slash or not (length.isascii() and length.isdigit()) or len(length) > 3:
        raise ValueError(f"no prefix length: {text!r}")
    bits = int(length)
    if is_ipv6(address) and not is_ipv6(canonical):
        bits -= 96  # ::ffff:10.0.0.1/104 is 10.0.0.1/8
    if not 0 <= bits <= (128 if is_ipv6(canonical) else 32):
        raise ValueError(f"prefix length out of range: {text!r}")
    return f"{canonical}/{bits}"


# --- out ---


def _encode_nested(result: Result, version: str) -> Document:
    document: Document = {"cniVersion": version}
    for key, v6 in (("ip4", False), ("ip6", True)):
        address = next((ip for ip in result.ips if is_ipv6(ip.address) is v6), None)
        if address is None:
            continue
        family: Document = {"ip": address.address}
        _put(family, gateway=address.gateway)
        # The reference keeps dst and gw only.
        _put(family, routes=[_nested_route(route) for route in result.routes if is_ipv6(route.dst) is v6])
        document[key] = family
    if len(document) == 1:
        raise CniError(
            Code.INVALID_CONFIG,
            "cannot convert: no valid IP addresses",
            f"a result of spec version {version} needs an IP address; use cniVersion 0.3.0 or later",
        )
    document["dns"] = _encode_dns(result.dns)
    return document


def _nested_route(route: Route) -> Document:
    nested: Document = {"dst": route.dst}
    _put(nested, gw=route.gw)
    return nested


def _encode_versioned(result: Result, version: str) -> Document:
    document: Document = {"cniVersion": version}
    interfaces = []
    for interface in result.interfaces:
        entry: Document = {"name": interface.name}
        _put(entry, mac=interface.mac, sandbox=interface.sandbox)
        interfaces.append(entry)
    ips = []
    for ip in result.ips:
        entry = {"version": "6" if is_ipv6(ip.address) else "4"}
        _put_index(entry, interface=ip.interface)
        entry["address"] = ip.address
        _put(entry, gateway=ip.gateway)
        ips.append(entry)
    _put(document, interfaces=interfaces, ips=ips, routes=[_encode_route(route) for route in result.routes])
    # The 0.3.0 to 0.4.0 types print an empty dns, those of 1.0.0 leave it out.
    document["dns"] = _encode_dns(result.dns)
    return document


def _encode_route(route: Route) -> Document:
    entry: Document = {"dst": route.dst}
    _put(entry, gw=route.gw, mtu=route.mtu, advmss=route.advmss, priority=route.priority)
    _put_index(entry, table=route.table, scope=route.scope)
    return entry


def _encode_flat(result: Result, version: str) -> Document:
    interfaces = []
    for interface in result.interfaces:
        entry: Document = {"name": interface.name}
        _put(entry, mac=interface.mac, mtu=interface.mtu, sandbox=interface.sandbox)
        _put(entry, socketPath=interface.socket_path, pciID=interface.pci_id)
        interfaces.append(_sorted(entry))
    ips = []
    for ip in result.ips:
        entry = {"address": ip.address}
        _put(entry, gateway=ip.gateway)
        _put_index(entry, interface=ip.interface)
        ips.append(entry)
    document: Document = {"cniVersion": version}
    _put(document, dns=_sorted(_encode_dns(result.dns)), interfaces=interfaces, ips=ips)
    _put(document, routes=[_sorted(_encode_route(route)) for route in result.routes])
    return document


def _encode_dns(dns: DNS) -> Document:
    document: Document = {}
    _put(document, nameservers=list(dns.nameservers), domain=dns.domain)
    _put(document, search=list(dns.search), options=list(dns.options))
    return document


def _put(entry: Document, **fields: object) -> None:
    """Go's omitempty: only what is not empty or zero."""
    entry.update({key: value for key, value in fields.items() if value})


def _put_index(entry: Document, **fields: int | None) -> None:
    """Go's omitempty on a pointer: 0 is something, None is not."""
    entry.update({key: value for key, value in fields.items() if value is not None})


def _sorted(entry: Document) -> Document:
    return dict(sorted(entry.items()))


# --- in: the wire's own types, with the wire's spelling ---


class _WireDns(msgspec.Struct):
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class _WireRoute(msgspec.Struct):
    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class _WireInterface(msgspec.Struct):
    name: str = ""
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0
    socket_path: str = msgspec.field(name="socketPath", default="")
    pci_id: str = msgspec.field(name="pciID", default="")


class _WireIp(msgspec.Struct):
    address: str
    gateway: str = ""
    interface: int | None = None


class _FlatResult(msgspec.Struct):
    interfaces: tuple[_WireInterface, ...] = ()
    ips: tuple[_WireIp, ...] = ()
    routes: tuple[_WireRoute, ...] = ()
    dns: _WireDns = msgspec.field(default_factory=_WireDns)


class _NestedIp(msgspec.Struct):
    ip: str
    gateway: str = ""
    routes: tuple[_WireRoute, ...] = ()


class _NestedResult(msgspec.Struct):
    ip4: _NestedIp | None = None
    ip6: _NestedIp | None = None
    dns: _WireDns = msgspec.field(default_factory=_WireDns)


def _decode_nested(wire: _NestedResult, at: str) -> Result:
    ips: list[IPConfig] = []
    routes: list[Route] = []
    for key, family in (("ip4", wire.ip4), ("ip6", wire.ip6)):
        if family is None:
            continue
        here = f"{at}.{key}"
        address = _cidr(family.ip, f"{here}.ip")
        if is_ipv6(address) is not (key == "ip6"):
            raise _invalid(f"{here}.ip", f"expected an IPv{key[2]} address", address)
        ips.append(IPConfig(address, _ip(family.gateway, f"{here}.gateway")))
        routes += _decode_routes(family.routes, f"{here}.routes")
    return Result((), tuple(ips), tuple(routes), _decode_dns(wire.dns))


def _decode_flat(wire: _FlatResult, at: str) -> Result:
    # ips[].version (0.3.0 to 0.4.0) only repeats what the address says.
    ips = []
    for index, ip in enumerate(wire.ips):
        here = f"{at}.ips[{index}]"
        if ip.interface is not None and ip.interface < 0:
            raise _invalid(f"{here}.interface", "expected an index into interfaces", ip.interface)
        ips.append(IPConfig(_cidr(ip.address, f"{here}.address"), _ip(ip.gateway, f"{here}.gateway"), ip.interface))
    interfaces = tuple(
        Interface(one.name, one.mac, one.sandbox, one.mtu, one.socket_path, one.pci_id) for one in wire.interfaces
    )
    return Result(interfaces, tuple(ips), _decode_routes(wire.routes, f"{at}.routes"), _decode_dns(wire.dns))


def _decode_routes(wire: tuple[_WireRoute, ...], at: str) -> tuple[Route, ...]:
    return tuple(
        Route(
            _cidr(route.dst, f"{at}[{index}].dst"),
            _ip(route.gw, f"{at}[{index}].gw"),
            route.mtu,
            route.advmss,
            route.priority,
            route.table,
            route.scope,
        )
        for index, route in enumerate(wire)
    )


def _decode_dns(wire: _WireDns) -> DNS:
    return DNS(wire.nameservers, wire.domain, wire.search, wire.options)


def _cidr(text: str, at: str) -> str:
    try:
        return canonical_cidr(text)
    except ValueError:
        raise _invalid(at, "expected an IP address with prefix length", text) from None


def _ip(text: str, at: str) -> str:
    """An optional address."""
    if not text:
        return ""
    try:
        return canonical_ip(text)
    except ValueError:
        raise _invalid(at, "expected an IP address", text) from None


def _invalid(at: str, wanted: str, value: object) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: {at}: {wanted}, found {found(value)}")
