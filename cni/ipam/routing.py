"""`ipam.routes` of a configuration, for the result."""

from collections.abc import Sequence

import msgspec

from cni import config, versions
from cni.errors import CniError, Code
from cni.result import Route


class RouteConf(msgspec.Struct, frozen=True):
    """A route as it is written."""

    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


def routes(confs: Sequence[RouteConf]) -> tuple[Route, ...]:
    """The routes, checked.

    Raises:
        CniError: 7, naming the path and the value.
    """
    return tuple(_route(f"$.ipam.routes[{index}]", conf) for index, conf in enumerate(confs))


def _route(at: str, conf: RouteConf) -> Route:
    try:
        dst = versions.canonical_cidr(conf.dst)
    except ValueError as error:
        raise _invalid(f"{at}.dst", conf.dst, "wanted a CIDR such as 192.0.2.0/24") from error
    try:
        gw = versions.canonical_ip(conf.gw) if conf.gw else ""
    except ValueError as error:
        raise _invalid(f"{at}.gw", conf.gw, "wanted an IP address") from error
    for key, number in (("mtu", conf.mtu), ("advmss", conf.advmss), ("priority", conf.priority)):
        if not 0 <= number < 2**32:
            raise _invalid(f"{at}.{key}", number, "wanted a number between 0 and 4294967295")
    return Route(dst, gw, conf.mtu, conf.advmss, conf.priority, conf.table, conf.scope)


def _invalid(at: str, value: object, wanted: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: {at}: {config.found(value)}", wanted)
