"""The static IPAM plugin: addresses that the configuration, or the runtime, writes out. Keeps no state.

Where the addresses come from, as in the reference: `ipam.addresses` and those of `IP` in CNI_ARGS together;
args.cni.ips instead of both; runtimeConfig.ips instead of all. `GATEWAY` in CNI_ARGS is for the addresses of `IP`.
"""

from collections.abc import Sequence
from ipaddress import ip_address, ip_interface

import msgspec

from cni import check as verify
from cni import config, versions
from cni.errors import CniError, Code
from cni.ipam import routing
from cni.ipam.routing import RouteConf
from cni.request import Request
from cni.result import DNS, IPConfig, Result
from cni.undo import Undo
from kernel.session import Session


class AddressConf(msgspec.Struct, frozen=True):
    """An address as it is written."""

    address: str
    gateway: str = ""


class DnsConf(msgspec.Struct, frozen=True):
    """What goes into the result's `dns`."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class StaticConf(msgspec.Struct, frozen=True):
    """The `ipam` object."""

    addresses: tuple[AddressConf, ...] = ()
    routes: tuple[RouteConf, ...] = ()
    dns: DnsConf = DnsConf()


def parse(request: Request) -> Result:
    """The answer to an ADD.

    Raises:
        CniError: 4 for CNI_ARGS, 7 for the configuration, naming path and value.
    """
    if "ipam" not in request.config:
        raise CniError(Code.INVALID_CONFIG, "invalid network config: IPAM config missing 'ipam' key")
    conf = config.convert(request.config["ipam"], StaticConf, "$.ipam")
    ips = _given(request) or (*_configured(conf.addresses), *_of_arguments(request))
    for v6 in (False, True):
        count = sum(versions.is_ipv6(ip.address) is v6 for ip in ips)
        if count > 1 and not versions.at_least(request.cni_version, "0.3.0"):
            raise CniError(
                Code.INVALID_CONFIG,
                f"CNI version {request.cni_version} does not support more than 1 address per family",
                f"found {count} addresses of IPv{6 if v6 else 4}; use cniVersion 0.3.0 or newer",
            )
    dns = DNS(conf.dns.nameservers, conf.dns.domain, conf.dns.search, conf.dns.options)
    return Result(ips=ips, routes=routing.routes(conf.routes), dns=dns)


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Answer with the addresses."""
    del host, undo
    return parse(request)


def delete(request: Request, host: Session) -> None:
    """Nothing was taken."""
    del request, host


def check(request: Request, host: Session) -> None:
    """Verify that prevResult still has every address, each with its gateway.

    Raises:
        CniError: 999, naming the address.
    """
    del host
    result = verify.required_result(request)
    there = {versions.canonical_cidr(ip.address): ip for ip in result.ips}
    for ip in parse(request).ips:
        found = there.get(ip.address)
        if found is None or (ip.gateway and (not found.gateway or ip_address(found.gateway) != ip_address(ip.gateway))):
            raise CniError(
                Code.INTERNAL,
                f"CHECK: static: Failed to match addr {ip.address} on interface {request.ifname}",
                f"wanted it with {_gateway(ip)}, prevResult has {_gateway(found) if found else 'no such address'}",
            )


def gc(request: Request, host: Session) -> None:
    """There is nothing to collect."""
    del request, host


def status(request: Request, host: Session) -> None:
    """Fails for a configuration that no ADD could be served with."""
    del host
    parse(request)


def _given(request: Request) -> tuple[IPConfig, ...]:
    """Instead of all others, where there are any."""
    for name, ips in (
        ("$.runtimeConfig.ips", request.capability("ips", list[str])),
        ("$.args.cni.ips", request.convention("ips", list[str])),
    ):
        if ips:
            where = "an entry in the 'ips' field is NOT in CIDR notation"
            return tuple(
                IPConfig(_cidr(ip, f"{name}[{index}]: {where}", Code.INVALID_CONFIG)) for index, ip in enumerate(ips)
            )
    return ()


def _configured(addresses: Sequence[AddressConf]) -> tuple[IPConfig, ...]:
    found = []
    for index, one in enumerate(addresses):
        at = f"$.ipam.addresses[{index}]"
        where = f"{at}: the 'address' field is expected to be in CIDR notation"
        gateway = _ip(one.gateway, f"{at}: invalid gateway address", Code.INVALID_CONFIG) if one.gateway else ""
        found.append(IPConfig(_cidr(one.address, where, Code.INVALID_CONFIG), gateway))
    return tuple(found)


def _of_arguments(request: Request) -> tuple[IPConfig, ...]:
    # MAC is the interface plugin's.
    arguments = request.arguments("IP", "GATEWAY", "MAC")
    where = "CNI_ARGS: the 'ip' field is expected to be in CIDR notation"
    cidrs = [
        _cidr(text.strip(), where, Code.INVALID_ENVIRONMENT)
        for text in arguments.get("IP", "").split(",")
        if arguments.get("IP")
    ]
    gateways = [
        _ip(text.strip(), "CNI_ARGS: invalid gateway address", Code.INVALID_ENVIRONMENT)
        for text in arguments.get("GATEWAY", "").split(",")
        if arguments.get("GATEWAY")
    ]
    # Of several within one network the last one counts.
    return tuple(
        IPConfig(cidr, next((g for g in reversed(gateways) if ip_address(g) in ip_interface(cidr).network), ""))
        for cidr in cidrs
    )


def _cidr(text: str, where: str, code: Code) -> str:
    try:
        return versions.canonical_cidr(text)
    except ValueError:
        raise CniError(code, f"{where}, got: {config.found(text)}", "wanted 10.0.0.5/24") from None


def _ip(text: str, where: str, code: Code) -> str:
    try:
        return versions.canonical_ip(text)
    except ValueError:
        raise CniError(code, f"{where}: {config.found(text)}", "wanted 10.0.0.1") from None


def _gateway(ip: IPConfig) -> str:
    return f"gateway {ip.gateway}" if ip.gateway else "no gateway"
