"""`ipam.resolvConf` of a configuration: the name servers of a file, for the result."""

from cni import config
from cni.errors import CniError, Code
from cni.result import DNS

_LARGEST_RESOLV_CONF = 1 << 20  # bytes


def read(path: str) -> DNS:
    """The name servers of a resolv.conf, read as the reference does.

    Raises:
        CniError: 7, it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_LARGEST_RESOLV_CONF).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CniError(
            Code.INVALID_CONFIG, f"invalid network config: $.ipam.resolvConf: {config.found(path)}", reason
        ) from error
    nameservers: list[str] = []
    domain = ""
    search: list[str] = []
    options: list[str] = []
    for words in (line.split() for line in lines if not line.lstrip().startswith(("#", ";"))):
        match words:
            case ["nameserver", server, *_]:
                nameservers.append(server)
            case ["domain", name, *_]:
                domain = name
            case ["search", *names]:
                search.extend(names)
            case ["options", *found]:
                options.extend(found)
    return DNS(tuple(nameservers), domain, tuple(search), tuple(options))
