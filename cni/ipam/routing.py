"""`ipam.routes` of a configuration, for the result."""

from collections.abc import Sequence
from typing import Annotated

import msgspec

from cni import config, versions
from cni.errors import CniError, Code
from cni.result import Route

Unsigned = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class RouteConf(msgspec.Struct, frozen=True):
    """A route as it is written."""

    dst: str
    gw: str = ""
    mtu: Unsigned = 0
    advmss: Unsigned = 0
    priority: Unsigned = 0
    table: Unsigned | None = None
    scope: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None


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
    return Route(dst, gw, conf.mtu, conf.advmss, conf.priority, conf.table, conf.scope)


def _invalid(at: str, value: object, wanted: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"invalid network config: {at}: {config.found(value)}", wanted)
