"""What no interface can have, refused before anything is made of it. Pure."""

from cni import config, parsed
from cni.errors import CniError, Code
from cni.result import Result

_BROADCAST = parsed.address("255.255.255.255")


def check(result: Result, ipam_type: str) -> None:
    """Refuse addresses that an IPAM plugin cannot have meant.

    Args:
        result: what the plugin gave; each address and gateway is one.
        ipam_type: its name, for the text of the error.

    Raises:
        CniError: 7, naming the place and the value.
    """
    seen = set()
    for index, ip in enumerate(result.ips):
        at = f"IPAM plugin {ipam_type}: ips[{index}]"
        address = parsed.interface(ip.address).ip
        if address.is_multicast or address.is_unspecified or address == _BROADCAST:
            raise _refused(f"{at}.address", ip.address, "want the address of one interface")
        if address in seen:
            raise _refused(f"{at}.address", ip.address, "want each address once")
        seen.add(address)
        if ip.gateway:
            gateway = parsed.address(ip.gateway)
            if gateway.version != address.version:
                raise _refused(f"{at}.gateway", ip.gateway, f"want a gateway of the family of {ip.address}")
            if gateway.is_multicast:
                raise _refused(f"{at}.gateway", ip.gateway, "want the address of one interface")


def _refused(at: str, value: str, reason: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"{at}: {reason}, found {config.found(value)}", "correct $.ipam")
